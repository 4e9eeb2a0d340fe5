"""The packed form of a quantized checkpoint: 4-bit codes in int32, which tensors lie so, and what config.json says of it.

Not a command; quant_save --packed and packed_export write it. The container is compressed-tensors' "pack-quantized" (0.17,
https://github.com/vllm-project/compressed-tensors): for every matrix weight_packed, weight_scale and weight_shape in place of
weight, experts one by one. Letters: N groups, G group size, O outputs, I inputs.

    value  = dtype(code * scale), code -7..7 (int3: -3..3), scale bfloat16, one for G consecutive inputs
    packed = sum over k of (code[8 j + k] + 8) << 4 k, int32 [O, I/8]: offset binary, the first code in the lowest bits

A matrix that the container or vLLM's kernels cannot take stays in BF16 with the values that the grid gave it, so the model is
the same. Shapes and fusions that kernels ask for: vLLM 0.32, model_executor/layers/quantization/{utils/marlin_utils,
compressed_tensors}.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import math
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from checkpoint import BITS, CHUNK, CODES_A_WORD, FORMAT, FUSED, PACKED, matrices_of
from console import UserError, write_json
from devices import default_device
from families import LAYER_PREFIX, MTP_PREFIX, VISION_PREFIX, Role, text_name
from moe_ptq import SYMMETRIC
from moe_quant import Quantized, inverse_scale, pieces
from recipe import Job, Recipe
from safetensors_file import DTYPE_NAMES, CheckpointWriter, Plan, split_plan

GROUPS = (32, 64, 128)  # group sizes that vLLM's kernels have
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
        codes[piece] = own.float().mul_(inverse_scale(scale)[:, None]).round_().clamp_(-7, 7)
    return Quantized(codes.view(values.shape), scales.view(*values.shape[:-1], -1))


def pack_codes(codes: Tensor) -> Tensor:
    """int8 [..., I] in -8..7, I a multiple of 8 -> int32 [..., I/8]."""
    shifted = (codes + 8).view(torch.uint8)
    return (shifted[..., 0::2] | shifted[..., 1::2] << 4).view(torch.int32)  # a byte holds two codes, the lower one first


# ---------------------------------------------------------------- what is packed


@dataclasses.dataclass(frozen=True)
class Container:
    """``packed``: names of the tensors that are packed, each with the grids (bits) its values may lie on; ``kept``: names of
    quantized tensors that stay in BF16, each with the reason; ``config``: quantization_config for config.json; ``split``:
    stacks of experts beside packed ones, written one matrix each: after one fused tensor vLLM takes all for fused."""

    group: int
    packed: dict[str, tuple[int, ...]]
    kept: dict[str, str]
    config: dict[str, Any]
    split: frozenset[str] = frozenset()


def unit_of(name: str) -> str:
    """The matrix of vLLM that a tensor becomes a part of."""
    module = name.removesuffix(".weight")
    return next((pattern.sub(unit, module) for pattern, unit in FUSIONS if pattern.fullmatch(module)), module)


def _fault(job: Job, experts: bool, group: int) -> str | None:
    """Why a tensor is not packed, whatever it is fused with; None if nothing speaks against it."""
    if job.bits is None:
        return "not quantized"
    if job.kind is Role.ROUTED_EXPERT and not experts:
        return "routed experts, kept by --keep-experts"
    if job.role in (Role.EMBEDDING, Role.LM_HEAD):
        return f"vLLM reads {'embeddings' if job.role is Role.EMBEDDING else 'the head'} in BF16"
    if FEW_OUTPUTS.fullmatch(job.name):
        return "too few outputs to gain from it"
    if max(job.by_expert, default=job.bits) > BITS:
        return f"more than {BITS} bits"
    if len(job.info.shape) == 3 and (job.transposed or not FUSED.fullmatch(job.name)):
        return "the container holds no stack of experts of this layout"
    rows, inputs = matrices_of(job.name, job.info.shape)[0][1], job.info.shape[-1]
    if job.kind is Role.ROUTED_EXPERT:
        hidden, inner = (rows, inputs) if DOWN.search(job.name) else (inputs, rows)
        tile = max(INNER, group)
        if hidden % HIDDEN or inner % tile:
            return f"no kernel takes experts of {hidden} by {inner} (hidden a multiple of {HIDDEN}, inner of {tile})"
    elif rows % OUTPUTS or inputs % INPUTS:
        return f"no kernel takes {rows} outputs by {inputs} inputs (multiples of {OUTPUTS} and {INPUTS})"
    return None


def plan_container(jobs: Sequence[Job], recipe: Recipe, experts: bool = True) -> Container:
    """What is packed, with or without the routed ``experts``; raises :class:`UserError` on a recipe that the container cannot
    hold, and where nothing of the routed experts (or, without them, nothing at all) can be packed."""
    if recipe.method not in SYMMETRIC:
        raise UserError(f"--packed: method {recipe.method} is not a symmetric grid; use one of {', '.join(SYMMETRIC)}")
    if recipe.group not in GROUPS:
        raise UserError(f"--packed: no kernel has groups of {recipe.group}; use --group {', '.join(map(str, GROUPS))}")
    quantized = [job for job in jobs if job.bits is not None]
    if wrong := next((job for job in quantized if job.info.dtype != torch.bfloat16), None):
        raise UserError(f"--packed: tensor {wrong.name} is {wrong.info.dtype}; the container holds BF16 values: convert first")
    faults: dict[str, str] = {}  # of units
    for job in jobs:
        if job.role is not Role.VISION and (fault := _fault(job, experts, recipe.group)):
            faults.setdefault(unit_of(job.name), fault)
    packed = {job.name: _grids(job) for job in quantized if unit_of(job.name) not in faults}
    kept = {job.name: faults[unit_of(job.name)] for job in quantized if job.name not in packed}
    wanted = [job.name for job in quantized if experts and job.role is Role.ROUTED_EXPERT]
    what = "routed expert" if wanted else "matrix"
    wanted = wanted or [job.name for job in quantized]
    if not any(name in packed for name in wanted):
        why = kept[wanted[0]] if wanted else "nothing is quantized"
        raise UserError(f"--packed: no {what} can be packed: {why}")
    experts_of = [job for job in jobs if job.kind is Role.ROUTED_EXPERT]
    beside = {job.role for job in experts_of if job.name in packed}
    split = {job.name for job in experts_of if job.role in beside and job.name not in packed and FUSED.fullmatch(job.name)}
    return Container(recipe.group, packed, kept, quantization_config(jobs, packed, recipe.group), frozenset(split))


def _grids(job: Job) -> tuple[int, ...]:
    """The bits of the grids that a matrix of this tensor may lie on, those of most matrices first."""
    if job.by_expert:
        return tuple(sorted(set(job.by_expert)))
    return (int(job.bits),) if job.bits == int(job.bits) else (int(job.bits), int(job.bits) + 1)


def stored_tensors(name: str, shape: tuple[int, ...], group: int) -> Iterator[tuple[str, torch.dtype, tuple[int, ...]]]:
    """(name, dtype, shape) of what a packed tensor is stored as."""
    for module, rows in matrices_of(name, shape):
        yield f"{module}.weight_packed", torch.int32, (rows, shape[-1] // CODES_A_WORD)
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
    size = sum(bytes_of(stored_tensors(job.name, job.info.shape, container.group)) for job in packed)
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

    weights = f"{facts['packed_parameters']:,} weights in {size(facts['packed_bytes'])}"
    kept = [f"{size(count):>17}  as it is: {reason}" for reason, count in sorted(facts["kept_bytes"].items())]
    ranks = ", ".join(map(str, facts["tensor_parallel_sizes"])) or "none"
    lines = [f"packed for vLLM: {size(facts['bytes'])}; {weights}", *kept]
    return "\n".join([*lines, f"tensor-parallel sizes that its groups of {facts['group']} allow: {ranks}"])


def ignored(jobs: Sequence[Job], packed: Collection[str]) -> list[str]:
    """quantization_config's "ignore": every linear that is not packed, by name; whole subtrees by pattern, since the names of
    vision towers and of multi-token prediction differ between loaders. vLLM raises where parts of a fused matrix differ."""
    found = {"re:.*lm_head$": None}  # a dict keeps the order
    predicts = any(job.role is Role.MTP and job.name in packed for job in jobs)
    for job in jobs:
        if job.name in packed:
            continue
        if job.role is Role.VISION:
            found[rf"re:.*{VISION_PREFIX.match(job.name)['part']}\..*"] = None
        elif job.role is Role.MTP and not predicts:
            layer = LAYER_PREFIX.match(text_name(job.name))
            found[r"re:.*mtp\..*" if MTP_PREFIX.match(job.name) else rf"re:.*layers\.{layer[1]}\..*"] = None
        elif job.kind is Role.ROUTED_EXPERT:
            layer = LAYER_PREFIX.match(text_name(job.name))
            found[rf"re:.*layers\.{layer[1]}\..*\.experts\..*" if layer else r"re:.*mtp\..*\.experts\..*"] = None
        elif len(job.info.shape) == 2 and job.role not in (Role.EMBEDDING, Role.LM_HEAD):
            found[job.name.removesuffix(".weight")] = None
    return list(found)


def quantization_config(jobs: Sequence[Job], packed: Collection[str], group: int) -> dict[str, Any]:
    """What config.json says: one group of 4-bit symmetric linears, and what it leaves out."""
    weights = {
        "num_bits": BITS, "type": "int", "symmetric": True, "strategy": "group", "group_size": group, "dynamic": False,
        "actorder": None,
    }  # fmt: skip
    scheme = {
        "targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None,
        "format": "pack-quantized",
    }  # fmt: skip
    return {
        "quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed",
        "config_groups": {"group_0": scheme}, "ignore": ignored(jobs, packed), "kv_cache_scheme": None,
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
            return list(stored_tensors(name, shape, self.container.group))
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
            parts.append((pack_codes(own.codes).cpu(), own.scale.bfloat16().cpu()))
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
        packed = self.container.packed
        tensors = [[name, DTYPE_NAMES[kind], list(shape), name in packed] for name, (kind, shape) in self._plan.items()]
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
