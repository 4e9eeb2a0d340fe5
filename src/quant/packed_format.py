"""The packed form of a quantized checkpoint: codes in int32, which tensors lie so, and what config.json says of it.

Not a command; quant_save --packed and packed_export write it. The container is compressed-tensors' "pack-quantized" (0.18 and
later, https://github.com/vllm-project/compressed-tensors): for every matrix weight_packed, weight_scale and weight_shape in
place of weight, experts one by one. Letters: N groups, G group size, O outputs, I inputs, B bits.

    value  = dtype(code * scale), code -(2**(B-1) - 1) .. 2**(B-1) - 1, scale bfloat16, one for G consecutive inputs
    packed = the codes of a row as B bits each, offset by 2**(B-1), without gaps: int32 [O, I B / 32], the first code in the
             lowest bits

B is the recipe's; what vLLM makes one matrix of has the largest B among its parts. A matrix that the container or vLLM's
kernels cannot take stays in BF16: unrounded where quant_save packs, with its values where a checkpoint is packed. Shapes,
fusions and what reads packed codes: vLLM 0.33, model_executor/layers/quantization/{utils/marlin_utils, compressed_tensors} and
models/.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import math
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from checkpoint import FORMAT, FUSED, PACKED, matrices_of
from console import UserError, write_json
from devices import default_device
from families import LAYER_PREFIX, MTP_PREFIX, VISION_PREFIX, Role, text_name
from moe_ptq import SYMMETRIC
from moe_quant import Quantized, inverse_scale, pieces
from recipe import Job, Recipe
from safetensors_file import DTYPE_NAMES, CheckpointWriter, Plan, split_plan
from settings import setting
from source_formats import ScaledInfo, word_count

GROUPS = (32, 64, 128, 256)  # group sizes that vLLM's kernels have, the last Humming alone
CHUNK = {"cpu": 1 << 19, "cuda": 1 << 26}  # values worked on at once
ENCODED_AT_ONCE = 1 << 25  # weights
OUTPUTS, INPUTS = 64, 128  # a kernel's matrix is made of tiles of so many
HIDDEN, INNER = 128, 64  # of the experts' kernel, the inner size also of the group (check_moe_marlin_supports_layer)
FUSIONS = (  # vLLM makes one matrix of these, so they are packed together or not at all
    (re.compile(r"(.*\.experts)\..*"), r"\1"),
    (re.compile(r"(.*)\.[qkv]_proj"), r"\1.qkv_proj"),
    (re.compile(r"(.*)\.(?:gate|up)_proj"), r"\1.gate_up_proj"),
    (re.compile(r"(.*)\.in_proj_(?:qkv|z)"), r"\1.in_proj_qkvz"),
    (re.compile(r"(.*)\.in_proj_[ba]"), r"\1.in_proj_ba"),
    (re.compile(r"(.*)\.(?:q_a_proj|kv_a_proj_with_mqa)"), r"\1.fused_qkv_a_proj"),
)
ROW_PARALLEL = re.compile(r"\.(down_proj|o_proj|out_proj|w2)(\.weight)?$")
DOWN = re.compile(r"\.(down_proj|w2)\b")
EXPERTS = ".experts."
ENDS = {Role.EMBEDDING: "embeddings", Role.LM_HEAD: "the head"}
EMBEDDED = (2, 4, 8)  # bits that vLLM's lookup of packed embeddings reads: it takes whole codes out of each word
FEW_OUTPUTS = re.compile(r".*\.in_proj_(a|b|ba)\.weight")
NEIGHBOURS = (0, 1, -1, 2, -2)  # of a quotient in bfloat16: the stored maximum is rounded, so the scale may lie beside it


# ---------------------------------------------------------------- codes


def bfloat16_neighbour(value: Tensor, steps: int) -> Tensor:
    """The positive bfloat16 ``steps`` away from each bfloat16 in float32 ``value``, as float32."""
    return (value.bfloat16().view(torch.int16) + steps).clamp_min(0).view(torch.bfloat16).float()


def recover_scales(values: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """(scale float32 [N], whether it was found [N]) of groups ``values`` [N, G] in their stored dtype.

    The scale is the bfloat16 s with values == dtype(code * s) for whole codes up to qmax; a group of zeros has scale 0. The
    largest value is taken to be the largest code first, so a group that fits several scales gets the smallest.
    """
    qmax = 2 ** (bits - 1) - 1
    largest = values.float().abs().amax(1)
    scale, found = torch.zeros_like(largest), largest == 0
    for code in range(qmax, 0, -1):
        for steps in NEIGHBOURS:
            rest = (~found).nonzero()[:, 0]
            if not len(rest):
                return scale, found
            guess = bfloat16_neighbour(largest[rest] / code, steps)
            own = values[rest]
            codes = (own.float() * inverse_scale(guess)[:, None]).round().clamp_(-qmax, qmax)
            fits = ((codes * guess[:, None]).to(own.dtype) == own).all(1)
            scale[rest[fits]] = guess[fits]
            found[rest[fits]] = True
    return scale, found


def codes_of(values: Tensor, bits: Sequence[int], group: int) -> Quantized:
    """Codes int8 [..., I] and scales float32 [..., I/G] with dtype(code * scale) == values, exactly; a zero has no sign.

    ``bits``: the grids that a group is tried on, in turn. Raises :class:`UserError` where a group lies on none of them.
    """
    groups = values.reshape(-1, group)
    codes = torch.empty(groups.shape, dtype=torch.int8, device=values.device)
    scales = torch.empty(len(groups), dtype=torch.float32, device=values.device)
    for piece in pieces(groups, CHUNK.get(values.device.type)):
        own = groups[piece]
        scale, found = recover_scales(own, bits[0])
        for other in bits[1:]:
            rest = (~found).nonzero()[:, 0]
            scale[rest], found[rest] = recover_scales(own[rest], other)
        if not bool(found.all()):
            raise UserError(
                f"not on a symmetric grid of {' or '.join(map(str, bits))} bits in groups of {group}, so it cannot be packed; "
                f"pack what quant_save makes with {', '.join(SYMMETRIC[:-1])} or {SYMMETRIC[-1]}"
            )
        scales[piece] = scale
        codes[piece] = own.float().mul_(inverse_scale(scale)[:, None]).round_()
    return Quantized(codes.view(values.shape), scales.view(*values.shape[:-1], -1))


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """int8 [..., I] in -2**(bits - 1) .. 2**(bits - 1) - 1, I a multiple of 32 -> int32 [..., I * bits / 32]."""
    eight = (codes + 2 ** (bits - 1)).view(torch.uint8).unflatten(-1, (-1, 8))  # which take ``bits`` bytes
    packed = torch.zeros(*eight.shape[:-1], bits, dtype=torch.uint8, device=codes.device)
    for place in range(8):
        byte, shift = divmod(place * bits, 8)
        packed[..., byte] |= eight[..., place] << shift
        if shift + bits > 8:
            packed[..., byte + 1] |= eight[..., place] >> 8 - shift
    return packed.flatten(-2).view(torch.int32)


# ---------------------------------------------------------------- what is packed


@dataclasses.dataclass(frozen=True)
class PackingSettings:
    """How wide the codes are."""

    packed_bits: int = setting(
        2, "least bits of a packed code, the recipe's otherwise; 4 for an engine without kernels of fewer (vLLM on a CPU)"
    )

    def __post_init__(self) -> None:
        if not 2 <= self.packed_bits <= 8:
            raise UserError(f"--packed-bits {self.packed_bits} is outside 2..8")


@dataclasses.dataclass(frozen=True)
class Container:
    """``packed``: names of the tensors that are packed, each with the grids (bits) its values may lie on; ``bits``: of their
    codes; ``kept``: names of quantized tensors that stay in BF16, each with the reason; ``config``: quantization_config for
    config.json; ``split``: stacks of experts beside packed ones, written one matrix each: after one fused tensor vLLM takes all
    for fused."""

    group: int
    packed: dict[str, tuple[int, ...]]
    bits: dict[str, int]
    kept: dict[str, str]
    config: dict[str, Any]
    split: frozenset[str] = frozenset()

    def stored(self, name: str, shape: tuple[int, ...]) -> Iterator[tuple[str, torch.dtype, tuple[int, ...]]]:
        """(name, dtype, shape) of what a packed tensor is stored as."""
        return stored_tensors(name, shape, self.group, self.bits[name])


def unit_of(name: str) -> str:
    """The matrix of vLLM that a tensor becomes a part of."""
    module = name.removesuffix(".weight")
    return next((pattern.sub(unit, module) for pattern, unit in FUSIONS if pattern.fullmatch(module)), module)


def is_expert(job: Job) -> bool:
    """Whether a tensor is of routed experts, of a decoder layer or of multi-token prediction."""
    return job.role is Role.ROUTED_EXPERT or job.role is Role.MTP and EXPERTS in job.name


def _fault(job: Job, experts: bool, group: int, ends: Collection[Role]) -> str | None:
    """Why a tensor is not packed, whatever it is fused with; None if nothing speaks against it."""
    if job.bits is None:
        return "not quantized"
    if is_expert(job) and not experts:
        return "routed experts, kept by --keep-experts"
    if job.role in ENDS and job.role not in ends:
        return f"vLLM reads {ENDS[job.role]} in BF16"
    if job.name.endswith("mtp.fc.weight"):
        return "vLLM reads mtp.fc in BF16"
    if FEW_OUTPUTS.fullmatch(job.name):
        return "too few outputs to gain from it"
    if len(job.info.shape) == 3 and (job.transposed or not FUSED.fullmatch(job.name)):
        return "the container holds no stack of experts of this layout"
    rows, inputs = matrices_of(job.name, job.info.shape)[0][1], job.info.shape[-1]
    if is_expert(job):
        hidden, inner = (rows, inputs) if DOWN.search(job.name) else (inputs, rows)
        tile = max(INNER, group)
        if hidden % HIDDEN or inner % tile:
            return f"no kernel takes experts of {hidden} by {inner} (hidden a multiple of {HIDDEN}, inner of {tile})"
    elif job.name.endswith(".eh_proj.weight"):
        return "vLLM reads eh_proj in BF16"
    elif job.role is not Role.EMBEDDING and (rows % OUTPUTS or inputs % INPUTS):
        return f"no kernel takes {rows} outputs by {inputs} inputs (multiples of {OUTPUTS} and {INPUTS})"
    return None


def plan_container(
    jobs: Sequence[Job], recipe: Recipe, experts: bool = True, least: int = 2, ends: Collection[Role] = ()
) -> Container:
    """What is packed, with or without the routed ``experts``, in ``least`` bits or more; ``ends``: whether vLLM reads the
    embedding and the head of this family from packed codes (Family.packed_ends). Raises :class:`UserError` on a recipe that
    the container cannot hold, and where nothing of the routed experts (or, without them, nothing at all) can be packed."""
    if recipe.method not in SYMMETRIC:
        raise UserError(f"--packed: method {recipe.method} is not a symmetric grid; use one of {', '.join(SYMMETRIC)}")
    if recipe.group not in GROUPS:
        raise UserError(f"--packed: no kernel has groups of {recipe.group}; use --group {', '.join(map(str, GROUPS))}")
    quantized = [job for job in jobs if job.bits is not None]
    if wrong := next((job for job in quantized if job.info.dtype != torch.bfloat16), None):
        raise UserError(f"--packed: tensor {wrong.name} is {wrong.info.dtype}; the container holds BF16 values: convert first")
    if not any(job.role is Role.LM_HEAD for job in jobs):  # the embedding is the head, and vLLM has no such packed one
        ends = ()
    faults: dict[str, str] = {}  # of units
    for job in jobs:
        plain = job.role is Role.VISION or job.role is Role.MTP and job.bits is None
        if not plain and (fault := _fault(job, experts, recipe.group, ends)):
            faults.setdefault(unit_of(job.name), fault)
    packed = {job.name: _grids(job) for job in quantized if unit_of(job.name) not in faults}
    width: dict[str, int] = collections.defaultdict(lambda: least)  # of units
    for name, grids in packed.items():
        width[unit_of(name)] = max(width[unit_of(name)], *grids)
    bits = {name: width[unit_of(name)] for name in packed}
    for job in quantized:
        if job.role is Role.EMBEDDING and job.name in bits:
            bits[job.name] = next(size for size in EMBEDDED if size >= bits[job.name])
    kept = {job.name: faults[unit_of(job.name)] for job in quantized if job.name not in packed}
    wanted = [job.name for job in quantized if experts and job.role is Role.ROUTED_EXPERT]
    what = "routed expert" if wanted else "matrix"
    wanted = wanted or [job.name for job in quantized]
    if not any(name in packed for name in wanted):
        why = kept[wanted[0]] if wanted else "nothing is quantized"
        raise UserError(f"--packed: no {what} can be packed: {why}")
    experts_of = [job for job in jobs if is_expert(job)]
    beside = {job.role for job in experts_of if job.name in packed}
    split = {job.name for job in experts_of if job.role in beside and job.name not in packed and FUSED.fullmatch(job.name)}
    return Container(recipe.group, packed, bits, kept, quantization_config(jobs, bits, recipe.group), frozenset(split))


def _grids(job: Job) -> tuple[int, ...]:
    """The bits of the grids that a matrix of this tensor may lie on, those of most matrices first."""
    if job.by_expert:
        return tuple(sorted(set(job.by_expert)))
    return (int(job.bits),) if job.bits == int(job.bits) else (int(job.bits), int(job.bits) + 1)


def stored_tensors(
    name: str, shape: tuple[int, ...], group: int, bits: int
) -> Iterator[tuple[str, torch.dtype, tuple[int, ...]]]:
    """(name, dtype, shape) of what a packed tensor is stored as."""
    for module, rows in matrices_of(name, shape):
        yield f"{module}.weight_packed", torch.int32, (rows, word_count(shape[-1], bits))
        yield f"{module}.weight_scale", torch.bfloat16, (rows, shape[-1] // group)
        yield f"{module}.weight_shape", torch.int64, (2,)


def split_tensors(name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> list[tuple[str, torch.dtype, tuple[int, ...]]]:
    """(name, dtype, shape) of what a stack of experts that is not packed is stored as."""
    return [(f"{module}.weight", dtype, (rows, shape[-1])) for module, rows in matrices_of(name, shape)]


def bytes_of(tensors: Iterable[tuple[str, torch.dtype, tuple[int, ...]]]) -> int:
    return sum(math.prod(shape) * dtype.itemsize for _, dtype, shape in tensors)


def summary(jobs: Sequence[Job], container: Container) -> dict[str, Any]:
    """Counts and bytes of the container, for the record: in all, packed, and of what stays as it is, by its reason."""
    packed = [job for job in jobs if job.name in container.packed]
    trunk = [job for job in packed if not MTP_PREFIX.match(job.name)]
    size = sum(bytes_of(container.stored(job.name, job.info.shape)) for job in packed)
    by_bits: dict[str, int] = collections.Counter()
    for job in packed:
        by_bits[str(container.bits[job.name])] += job.info.numel
    by_reason: dict[str, int] = collections.Counter()
    for job in jobs:
        if job.name not in container.packed:
            by_reason[container.kept.get(job.name, "not quantized")] += job.info.bytes
    return {
        "format": "compressed-tensors pack-quantized",
        "bytes": size + sum(by_reason.values()),
        "packed_tensors": len(packed),
        "packed_parameters": sum(job.info.numel for job in packed),
        "packed_bytes": size,
        "parameters_by_bits": dict(sorted(by_bits.items())),
        "expert_bits": sorted({container.bits[job.name] for job in trunk if is_expert(job)}),
        "kept_bytes": dict(by_reason),
        "group": container.group,
        "tensor_parallel_sizes": parallel_sizes(jobs, container),
    }


def parallel_sizes(jobs: Sequence[Job], container: Container) -> list[int]:
    """The tensor-parallel sizes, powers of two up to 64, at which no group straddles two ranks: vLLM divides the inputs of the
    projections down and out among them."""
    unit = max(container.group, INNER)
    inputs = [job.info.shape[-1] for job in jobs if job.name in container.packed and ROW_PARALLEL.search(job.name)]
    return [count for count in (2**power for power in range(7)) if not any(size % (count * unit) for size in inputs)]


def describe(facts: dict[str, Any]) -> str:
    """The summary as lines of text."""

    def size(count: int) -> str:
        return f"{count / 1e6:,.2f} MB"

    each = ", ".join(f"{count:,} in {bits} bits" for bits, count in facts["parameters_by_bits"].items())
    weights = f"{facts['packed_parameters']:,} weights in {size(facts['packed_bytes'])}: {each}"
    kept = [f"{size(count):>17}  as it is: {reason}" for reason, count in sorted(facts["kept_bytes"].items())]
    ranks = ", ".join(map(str, facts["tensor_parallel_sizes"])) or "none"
    lines = [f"packed for vLLM: {size(facts['bytes'])}; {weights}", *kept]
    if len(facts["expert_bits"]) > 1:  # transformers' get_experts_scheme takes the first group that names experts
        widths = ", ".join(map(str, facts["expert_bits"]))
        lines.append(
            f"experts of {widths} bits: vLLM reads them, transformers does not (it takes one width for all): --unpack there"
        )
    return "\n".join([*lines, f"tensor-parallel sizes that its groups of {facts['group']} allow: {ranks}"])


def _experts_of(jobs: Iterable[Job]) -> str:
    """A pattern of the experts' modules of these layers, whatever a loader calls what lies around the layers; those of
    multi-token prediction have layers of their own."""
    layers = sorted({int(match[1]) for job in jobs if (match := LAYER_PREFIX.match(text_name(job.name)))})
    return rf"(?!.*mtp\.).*layers\.(?:{'|'.join(map(str, layers))})\..*\.experts\..*"


def ignored(jobs: Sequence[Job], packed: Collection[str]) -> list[str]:
    """quantization_config's "ignore": every linear that is not packed, by name; whole subtrees by pattern, since the names of
    vision towers and of multi-token prediction differ between loaders. vLLM raises where parts of a fused matrix differ."""
    found: dict[str, None] = {}  # a dict keeps the order
    if not any(job.role is Role.LM_HEAD and job.name in packed for job in jobs):
        found[r"re:.*lm_head$"] = None
    predicts = any(job.role is Role.MTP and job.name in packed for job in jobs)
    for job in jobs:
        if job.name in packed:
            continue
        layer = LAYER_PREFIX.match(text_name(job.name))
        if job.role is Role.VISION:
            found[rf"re:.*{VISION_PREFIX.match(job.name)['part']}\..*"] = None
        elif job.role is Role.MTP and not predicts:
            found[r"re:.*mtp\..*" if MTP_PREFIX.match(job.name) else rf"re:.*layers\.{layer[1]}\..*"] = None
        elif job.role is Role.ROUTED_EXPERT:
            found[f"re:{_experts_of([job])}"] = None
        elif len(job.info.shape) == 2 and job.role not in (Role.EMBEDDING, Role.LM_HEAD):
            found[job.name.removesuffix(".weight")] = None
    return list(found)


def targets_of(jobs: Sequence[Job], bits: Mapping[str, int]) -> dict[int, list[str]]:
    """The targets of quantization_config's groups, by the bits of ``bits``: "Linear" of most linears, and patterns of what is
    otherwise. vLLM's heads and embeddings are no "Linear", and transformers knows experts by a pattern that names them."""
    linears, ends, experts = [], [], []
    for job in jobs:
        if job.name in bits:
            (ends if job.role in ENDS else experts if is_expert(job) else linears).append(job)
    counts = collections.Counter(bits[job.name] for job in linears or ends or experts)
    common = max(counts, key=lambda size: (counts[size], size))
    found: dict[int, list[str]] = {common: ["Linear"]}
    for job in ends:
        found.setdefault(bits[job.name], []).append(f"re:.*{re.escape(job.name.removesuffix('.weight').rpartition('.')[2])}$")
    predicts = any(MTP_PREFIX.match(job.name) for job in (*linears, *experts))
    for job in linears:
        if (own := bits[job.name]) != common:
            name = re.escape(re.sub(r".*(?=layers\.)", "", job.name.removesuffix(".weight")))
            before = r".*mtp\." if MTP_PREFIX.match(job.name) else r"(?!.*mtp\.).*" if predicts else ".*"
            found.setdefault(own, []).append(f"re:{before}{name}$")
    widths = sorted({bits[job.name] for job in experts})
    for own in widths:
        mine = [job for job in experts if bits[job.name] == own]
        trunk = [job for job in mine if not MTP_PREFIX.match(job.name)]
        patterns = [] if own == common else [r".*\.experts\..*"]
        if len(widths) > 1:
            patterns = [_experts_of(trunk)] if trunk else []
            patterns += [r".*mtp\..*\.experts\..*"] if len(mine) > len(trunk) else []
        found.setdefault(own, []).extend(f"re:{pattern}" for pattern in patterns)
    if predicts:  # transformers, which reads no such block, takes the first group that names experts for those of all layers
        first = [bits[job.name] for job in experts if not MTP_PREFIX.match(job.name)][:1]
        found = {own: found[own] for own in dict.fromkeys([*first, *found])}
    return found


def quantization_config(jobs: Sequence[Job], bits: Mapping[str, int], group: int) -> dict[str, Any]:
    """What config.json says: a group of symmetric linears for each number of bits, and what is left out."""
    groups = {}
    for size, targets in targets_of(jobs, bits).items() if bits else ():
        weights = {
            "num_bits": size, "type": "int", "symmetric": True, "strategy": "group", "group_size": group, "dynamic": False,
            "actorder": None,
        }  # fmt: skip
        groups[f"group_{len(groups)}"] = {
            "targets": targets, "weights": weights, "input_activations": None, "output_activations": None,
            "format": "pack-quantized",
        }  # fmt: skip
    return {
        "quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed",
        "config_groups": groups, "ignore": ignored(jobs, bits), "kv_cache_scheme": None,
    }  # fmt: skip


class PackedWriter:
    """A CheckpointWriter of a packed checkpoint that is fed the dequantized one: the same plan, tensors and slices, of which
    :meth:`encode` makes what :meth:`append` writes. ``tensors``: those that are stored. Use as a context manager in a directory
    that holds the model's config.json: leaving it without an error completes that, and writes packed.json. ``shards``: how
    many tensors each file of the dequantized checkpoint has (default: as this plan would be split)."""

    def __init__(
        self, out: Path, plan: Plan, container: Container, shard_bytes: int, breaks: Collection[str] = (),
        shards: Sequence[int] = (), share: tuple[int, int] = (0, 1),
    ) -> None:  # fmt: skip
        self.container, self.out, self._whole = container, out, share[1] == 1
        self._plan = {name: (dtype, tuple(shape)) for name, dtype, shape in plan}
        self._shards = list(shards) or [len(shard) for shard in split_plan(plan, shard_bytes, breaks)]
        self._stored = {name: self._stored_as(name, dtype, shape) for name, (dtype, shape) in self._plan.items()}
        stored = [tensor for tensors in self._stored.values() for tensor in tensors]
        starts = {self._stored[name][0][0] for name in self._starts(shard_bytes, breaks)}
        self._writer = CheckpointWriter(out, stored, 1 << 62, starts, share)
        self.tensors, self.closed = self._writer.tensors, self._writer.closed
        self._matrices: collections.deque[tuple[str, int]] = collections.deque()  # of this tensor, each with its rows to come
        self._scales: list[Tensor] = []  # of the matrix that is being written
        self.device = default_device()

    def _stored_as(
        self, name: str, dtype: torch.dtype, shape: tuple[int, ...]
    ) -> list[tuple[str, torch.dtype, tuple[int, ...]]]:
        if name in self.container.packed:
            return list(self.container.stored(name, shape))
        return split_tensors(name, dtype, shape) if name in self.container.split else [(name, dtype, shape)]

    def _starts(self, shard_bytes: int, breaks: Collection[str]) -> Iterator[str]:
        """The tensors that begin a file: all that one is stored as lies in one file, so that it is complete or not."""
        filled = 0
        for place, (name, stored) in enumerate(self._stored.items()):
            size = bytes_of(stored)
            if place and (filled + size > shard_bytes or name in breaks):
                yield name
                filled = 0
            filled += size

    def __enter__(self) -> PackedWriter:
        self._writer.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._writer.__exit__(*error)
        if error[0] is None and self._whole:
            self._describe()

    def is_own(self, name: str) -> bool:
        return self._writer.is_own(self._stored[name][0][0])

    def is_done(self, name: str) -> bool:
        """Whether the file of this tensor was complete when the writer was made."""
        return self._writer.is_done(self._stored[name][0][0])

    def is_complete(self, name: str) -> bool:
        return self._writer.is_complete(self._stored[name][0][0])

    def read(self, name: str) -> Tensor:
        """A matrix of a complete file as the codes have it."""
        if name not in self.container.packed:
            return self.tensors[name].read()
        (dtype, shape), bits, module = self._plan[name], self.container.bits[name], name.removesuffix(".weight")
        words, scale = (self.tensors[f"{module}.weight_{part}"] for part in ("packed", "scale"))
        size = math.prod(shape) * dtype.itemsize
        block = (1, self.container.group)
        return ScaledInfo(dtype, shape, words.file, 0, size, codes=words, scale=scale, block=block, bits=bits).read()

    def encode(self, name: str, value: Tensor) -> Any:
        """What :meth:`append` takes for ``value``: (packed, scale) of its rows, or itself."""
        if name not in self.container.packed:
            return value.cpu()
        parts = []
        for rows in value.reshape(-1, value.shape[-1]).split(max(1, ENCODED_AT_ONCE // value.shape[-1])):
            try:
                own = codes_of(
                    rows if rows.is_cuda else rows.to(self.device), self.container.packed[name], self.container.group
                )
            except UserError as error:
                raise UserError(f"tensor {name}: {error}") from None
            parts.append((pack_codes(own.codes, self.container.bits[name]).cpu(), own.scale.bfloat16().cpu()))
        packed, scale = zip(*parts)
        return torch.cat(packed), torch.cat(scale)

    def append(self, name: str, piece: Any) -> None:
        """Write the next rows of ``name``; the scales of a matrix follow it once it is whole."""
        if name in self.container.split:
            self._append_split(name, piece.reshape(-1, piece.shape[-1]))
            return
        if name not in self.container.packed:
            self._put(name, piece)
            return
        packed, scale = piece
        shape = self._plan[name][1]
        while len(packed):
            if not self._matrices:
                self._matrices.extend(matrices_of(name, shape))
            module, missing = self._matrices.popleft()
            self._put(f"{module}.weight_packed", packed[:missing])
            self._scales.append(scale[:missing])
            if len(packed) < missing:
                self._matrices.appendleft((module, missing - len(packed)))
                return
            packed, scale = packed[missing:], scale[missing:]
            whole, self._scales = torch.cat(self._scales), []
            self._put(f"{module}.weight_scale", whole)
            self._put(f"{module}.weight_shape", torch.tensor([len(whole), shape[-1]]))

    def _append_split(self, name: str, rows: Tensor) -> None:
        while len(rows):
            if not self._matrices:
                self._matrices.extend(matrices_of(name, self._plan[name][1]))
            module, missing = self._matrices.popleft()
            self._put(f"{module}.weight", rows[:missing])
            if len(rows) < missing:
                self._matrices.appendleft((module, missing - len(rows)))
            rows = rows[missing:]

    def _put(self, name: str, value: Tensor) -> None:
        self._writer.append(name, value)

    def _describe(self) -> None:
        """packed.json, with the text of config.json; then config.json with its quantization_config."""
        text = (self.out / "config.json").read_text(encoding="utf-8")
        bits = self.container.bits
        tensors = [[name, DTYPE_NAMES[kind], list(shape), bits.get(name, 0)] for name, (kind, shape) in self._plan.items()]
        value = {"format": FORMAT, "group": self.container.group, "shards": self._shards, "config": text, "tensors": tensors}
        write_json(self.out / PACKED, value)
        write_json(self.out / "config.json", json.loads(text) | {"quantization_config": self.container.config})


def open_writer(
    out: Path, plan: Plan, shard_bytes: int, breaks: Collection[str] = (), container: Container | None = None,
    share: tuple[int, int] = (0, 1),
) -> CheckpointWriter | PackedWriter:  # fmt: skip
    """The writer of a dequantized checkpoint, or of one packed into ``container``."""
    if container is None:
        return CheckpointWriter(out, plan, shard_bytes, breaks, share)
    return PackedWriter(out, plan, container, shard_bytes, breaks, share=share)
