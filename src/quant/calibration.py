"""One decoder layer in memory: run calibration tokens through a checkpoint layer by layer and collect what rounding needs.

Not a command; quant_save drives it for the calibrated methods. transformers supplies each family's layer, built on the meta
device and filled from the checkpoint one layer at a time. For every linear and every routed expert the second moment of
its inputs is collected (an expert's inputs weighted by the square of their routing weight: that is how its error reaches
the layer's output), then the layer is rounded and the activations go on through the rounded layer.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import functools
import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn

from checkpoint import Checkpoint
from console import UserError
from devices import free_memory
from families import LAYER_PREFIX, MTP_PREFIX, Role, text_name
from ggml_round import COPIES as LDLQ_COPIES
from hf_model import all_finite, check_complete, check_finite, first_nonfinite, has_class, meta_model, model_config
from moe_ptq import LEAST_ROWS, WORKING_BYTES, Statistics, damp, diagonals, shrink

Inner = Callable[[int, Tensor], Tensor]


@dataclasses.dataclass(frozen=True)
class Calibration:
    """Token ids [sequences, length] and how they are used. ``record``: the data's entry for results and for resuming.

    ``floor``: effective tokens below which an expert's statistics are shrunk, as a share of its inputs. ``propagate``:
    'quantized' sends the activations through the rounded layers, 'bf16' through the original ones. ``token_power``: of
    the squared gradient that a token's weight in the second moments is (token_weights.py); 0 counts all tokens alike.
    ``damping``: of the mean second moment, added to each before anything is rounded: what the text hardly uses keeps worth.
    ``shrinkage``: how much of the moments of two different inputs is dropped: a text tells them less well than each one's own.
    """

    ids: Tensor
    record: dict[str, Any]
    batch: int = 8
    floor: float = 1.0
    propagate: str = "quantized"
    token_power: float = 0.0
    damping: float = 0.0
    shrinkage: float = 0.0
    device: torch.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    @property
    def dtype(self) -> torch.dtype:
        """Of weights and activations at work: bfloat16 on a GPU, float32 on a CPU."""
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32

    def batches(self) -> tuple[Tensor, ...]:
        """The ids in batches of one size, which is the largest that divides both ``batch`` and the sequences."""
        return self.ids.split(math.gcd(self.batch, len(self.ids)))

    def settings(self) -> dict[str, Any]:
        """What decides the result, for recipe.json and for resuming."""
        fields = {"batch": self.batch, "floor": self.floor, "propagate": self.propagate}
        return {"data": self.record, "shape": list(self.ids.shape), **fields, **self.weighting(), "dtype": str(self.dtype)}

    def weighting(self) -> dict[str, float]:
        """``token_power``, ``damping`` and ``shrinkage`` where they are not 0."""
        return {key: value for key in ("token_power", "damping", "shrinkage") if (value := getattr(self, key))}


LAYERS_AHEAD = 2  # of a model of the hub, fetched before they are read
FORWARD, BACKWARD = 28, 52  # float32 vectors as long as the heads' outputs that a token has at work in Gated DeltaNet
QVO, LEAST_HEAD = ("q_proj", "v_proj", "o_proj"), 64  # values that one head of an attention has at least
SCORE = 28  # bytes of a logit at work while the head's gradient is taken
SLACK = 768 << 20  # of a GPU: libraries, the writer's chunks, gaps between tensors
INPUTS_ON_GPU = 1 << 30  # the inputs of a layer's experts stay there up to this
MEAN_EXPERTS = 32  # whose second moments are summed together


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of the calibrated pass at its largest layer. ``layer``: weights in the dtype of the computation; ``stages``: the
    most that is at work outside of the rounding, ``beside`` what lies beside a piece that is rounded; ``piece``: all that
    could be rounded at once, ``least`` the smallest piece. ``host``: activations and the layer that is written."""

    layer: int
    stages: int
    beside: int
    piece: int
    least: int
    host: int

    def peak(self, working_bytes: float) -> int:
        """With pieces of so many bytes."""
        return max(self.stages, self.beside + int(min(self.piece, working_bytes)))

    def smallest(self) -> float:
        """Bytes of a piece below which none can be rounded."""
        working = WORKING_BYTES["cuda"]
        while working / 2 >= self.least:
            working /= 2
        return working

    def working_bytes(self, free: float) -> float:
        """Of a piece on a GPU: those of WORKING_BYTES where ``free`` bytes allow it, so that every card rounds the same
        pieces, else a half, a quarter, ... of them. :class:`UserError` where nothing would do."""
        working = WORKING_BYTES["cuda"]
        while self.peak(working) + SLACK > free and working > self.smallest():
            working /= 2
        if (needed := self.peak(working) + SLACK) > free:
            raise UserError(
                f"this calibration needs at least {needed / 2**30:.1f} GiB of the GPU's memory, {free / 2**30:.1f} are free: "
                "end what else is on it, raise GPU_MEMORY_GIB, take shorter sequences (--calib-length) or a larger card"
            )
        return working


@dataclasses.dataclass(frozen=True)
class MemoryPlan:
    """``working_bytes`` of a piece that is rounded (None: as large as any), ``host`` memory, lines that say it, and the peak on
    a ``gpu``."""

    working_bytes: float | None
    host: int
    lines: list[str]
    gpu: int | None = None


def plan_memory(
    jobs: Sequence[Any], calibration: Calibration, devices: Sequence[torch.device] = (), dry_run: bool = False
) -> MemoryPlan:
    """What the calibrated pass takes of each device's memory, within what is free there; too little is a :class:`UserError`,
    in a dry run a line. On a CPU a line says what a GPU would need."""
    needs, largest, working = pass_memory(jobs, calibration, 2), WORKING_BYTES["cuda"], None
    most, least = (f"{(needs.peak(size) + SLACK) / 2**30:.1f} GiB" for size in (largest, needs.smallest()))
    if calibration.device.type == "cpu":
        own = pass_memory(jobs, calibration, 4)
        line = f"on a GPU: at most about {most} of its memory, at least {least}"
        return MemoryPlan(None, own.host + own.peak(WORKING_BYTES["cpu"]), [line])
    free, lines, peak = min(map(free_memory, devices or [calibration.device])), [], None
    try:
        working = needs.working_bytes(free)
        peak = needs.peak(working) + SLACK
        lines.append(f"GPU memory at most about {peak / 2**30:.1f} of {free / 2**30:.1f} GiB free")
        if working < largest:
            lines[0] += f"; in smaller pieces than with {most}, so that a near tie may be rounded otherwise"
    except UserError as error:
        if not dry_run:
            raise
        lines.append(f"note: the run would stop: {error}")
    return MemoryPlan(working, needs.host + needs.layer, lines, peak)


def pass_memory(jobs: Sequence[Any], calibration: Calibration, item: int) -> Memory:
    """What a calibrated pass takes, with ``item`` bytes a weight and activation at work."""
    batch, tokens = calibration.batches()[0].numel(), calibration.ids.numel()
    layers: dict[str, dict[str, int]] = {}
    sizes: dict[tuple[str, int], int] = {}
    width = head = stages = least = embedding = 0
    predicts = any(job.bits and MTP_PREFIX.match(job.name) for job in jobs)  # else that block is not run
    for job in (job for job in jobs if job.info.shape):
        inputs, outputs = job.inputs, job.info.shape[-1 if job.transposed else -2] if len(job.info.shape) > 1 else 1
        if job.bits and len(job.info.shape) > 1:
            count = math.prod(job.info.shape[:-2])
            size = 4 * count * inputs * (2 * inputs + LDLQ_COPIES * outputs)
            together = (job.name.partition(".experts.")[0], inputs) if job.kind is Role.ROUTED_EXPERT else (job.name, inputs)
            sizes[together] = sizes.get(together, 0) + size  # experts that lie one by one are one parameter at work
            least = max(least, 4 * inputs * (2 * inputs + LDLQ_COPIES * min(outputs, LEAST_ROWS)))
        if not (match := LAYER_PREFIX.match(text_name(job.name)) or MTP_PREFIX.match(job.name)):
            width = max(width, job.info.shape[-1])
            embedding = max(embedding, item * job.info.numel if job.role is Role.EMBEDDING else 0)
            if job.role in (Role.EMBEDDING, Role.LM_HEAD):
                stages = max(stages, item * job.info.numel)
                scored = SCORE * outputs * calibration.ids.shape[1] if calibration.token_power else 0
                head = max(head, job.info.bytes * 5 // 2 + 8 * inputs**2)
                stages = max(stages, item * job.info.numel + scored)
            continue
        if match.re is MTP_PREFIX and not predicts:
            continue
        own = layers.setdefault(match[0], dict.fromkeys(("weights", "written", "moments", "mean", "widest", *QVO), 0))
        own["weights"] += item * job.info.numel
        own["written"] += job.info.bytes
        if job.kind is Role.ROUTED_EXPERT:
            own["mean"] = max(own["mean"], 4 * inputs**2)
        elif len(job.info.shape) == 2:
            own["moments"] += 4 * inputs**2 if job.bits else 0
            heads = job.kind in (Role.ATTENTION, Role.LINEAR_ATTENTION)
            own["widest"] = max(own["widest"], inputs if heads else inputs // 4)
            if (part := job.name.removesuffix(".weight").rpartition(".")[2]) in QVO:
                own[part] = outputs if part == "q_proj" else inputs
    rows = tokens * width * item  # of the experts' inputs
    beside = head
    for name, own in layers.items():
        kept = own["weights"] + (own["mean"] > 0) * min(rows, INPUTS_ON_GPU) + 3 * own["mean"]
        at_work = 4 * batch * own["widest"]
        count = own["o_proj"] // LEAST_HEAD if own["q_proj"] == own["o_proj"] else 0  # q_proj of a gated output is wider
        averaged = 2 * item * batch * count * own["v_proj"]  # by `attended`, and its parts
        ends = embedding if MTP_PREFIX.match(name) else 0  # it embeds the tokens once more
        stages = max(stages, kept + own["moments"] + max(MEAN_EXPERTS * own["mean"], ends + averaged + FORWARD * at_work))
        stages = max(stages, own["weights"] + BACKWARD * at_work if calibration.token_power else 0)
        beside = max(beside, kept + 2 * own["moments"])
    largest = max((own["weights"] for own in layers.values()), default=0)
    host = max((own["written"] for own in layers.values()), default=0) + 2 * rows + max(0, rows - INPUTS_ON_GPU)
    return Memory(largest, stages, beside, max(sizes.values(), default=0), least, host)


def trim_heap() -> None:
    """Return freed memory to the system. glibc keeps freed tensors below 32 MB in its heap, where small objects that live
    on keep whole layers resident; other C libraries have no such call and need none."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


class Moments:
    """Running second moment of one linear's inputs, or of every expert's: sums [E, I, I], weights [E], squares [E]."""

    def __init__(self, experts: int, inputs: int, device: torch.device) -> None:
        self.total = torch.zeros(experts, inputs, inputs, device=device)
        self.shape = self.total.shape
        self.weight = torch.zeros(experts, device=device)
        self.square = torch.zeros(experts, device=device)

    def add(self, index: int, x: Tensor, weight: Tensor | None = None) -> None:
        """Inputs x [N, I] of matrix ``index``; ``weight`` [N] multiplies each input."""
        add_products(self.total[index], x, weight)
        w = torch.ones(len(x), device=x.device) if weight is None else weight.float() ** 2
        self.weight[index] += w.sum()
        self.square[index] += (w * w).sum()

    def sums(self, experts: Tensor) -> Tensor:
        """A copy of those of some matrices."""
        return self.total[experts]

    def diagonal(self) -> Tensor:
        """That of the sums, [E, I]."""
        parts = torch.arange(len(self.weight), device=self.weight.device).split(MEAN_EXPERTS)
        return torch.cat([self.sums(part).diagonal(dim1=1, dim2=2) for part in parts])

    def statistics(self, floor: float, damping: float = 0.0, shrinkage: float = 0.0) -> Statistics:
        """Means, and effective counts (sum w)**2 / sum w**2; see :class:`Means`."""
        tokens = self.weight**2 / self.square.clamp_min(1e-30)
        return Statistics(Means(self, tokens, floor, damping, shrinkage), tokens)


def add_products(total: Tensor, x: Tensor, weight: Tensor | None) -> None:
    """Add  sum x x^T  over the rows of x [N, I], each times its ``weight``, to [I, I]."""
    x = x.float()
    scaled = x if weight is None else x * weight.float()[:, None]
    total.addmm_(scaled.t(), scaled)


class Means:
    """Second moments [E, I, I] of which those of some matrices are made when they are asked for (moe_ptq.Hessians): a layer's
    together are larger than its weights.

    Those of an expert with fewer than ``floor`` effective tokens are drawn towards the token-weighted mean of all by
    1 - tokens / floor; then each is drawn towards its diagonal by ``shrinkage``, and ``damping`` of the diagonal's mean added.
    """

    def __init__(self, moments: Moments, tokens: Tensor, floor: float, damping: float, shrinkage: float = 0.0) -> None:
        self.moments, self.damping, self.shrinkage, self.shape = moments, damping, shrinkage, moments.shape
        shares = (1 - tokens / floor).clamp(0, 1) if len(tokens) > 1 else torch.zeros_like(tokens)
        self.shares: list[float] = shares.tolist()
        self.middle: Tensor | None = None
        if any(self.shares):
            weight = tokens / tokens.sum().clamp_min(1e-30)
            for part in torch.arange(len(tokens), device=tokens.device).split(MEAN_EXPERTS):
                own = torch.einsum("e,eij->ij", weight[part], self._plain(part))
                self.middle = own if self.middle is None else self.middle.add_(own)

    def _plain(self, experts: Tensor) -> Tensor:
        sums = self.moments.sums(experts)
        if not bool(torch.isfinite(diagonals(sums)).all()):  # what is not finite has its square there
            raise UserError("a calibration activation is NaN or infinite")
        return sums.div_(self.moments.weight[experts].clamp_min(1e-30)[:, None, None])

    def __getitem__(self, part: int | slice | Tensor) -> Tensor:
        weight = self.moments.weight
        experts = torch.arange(len(weight), device=weight.device)[part.to(weight.device) if isinstance(part, Tensor) else part]
        if experts.ndim == 0:
            return self[experts[None]][0]
        means = self._plain(experts)
        if self.middle is not None:
            shrink(means, self.middle, [self.shares[e] for e in experts.tolist()])
        if self.shrinkage:
            diagonal = diagonals(means).clone()
            diagonals(means.mul_(1 - self.shrinkage)).copy_(diagonal)
        damp(means, self.damping)
        return means


@dataclasses.dataclass(frozen=True)
class Routed:
    """A batch at a module of experts: ``rows`` [N, H] and, in the order of the experts, the place of each input among them and
    its weight [S] (None: 1); those of expert e stand at starts[e] to starts[e + 1]."""

    rows: Tensor
    place: Tensor
    weight: Tensor | None
    starts: list[int]

    def of(self, expert: int, rows: Tensor) -> tuple[Tensor, Tensor | None]:
        """Inputs, from the rows where they are now, and weights."""
        own = slice(self.starts[expert], self.starts[expert + 1])
        return rows[self.place[own]], None if self.weight is None else self.weight[own]


class ExpertMoments(Moments):
    """Those of experts, made from their inputs, which take less memory than the sums and are multiplied in no time. ``inner``
    makes what is counted of an expert's input, from the weights as they are then."""

    def __init__(self, experts: int, inputs: int, batches: list[Routed], device: torch.device, inner: Inner | None) -> None:
        self.shape, self.batches, self.inner = torch.Size((experts, inputs, inputs)), batches, inner
        self.weight, self.square = torch.zeros(experts, device=device), torch.zeros(experts, device=device)

    def sums(self, experts: Tensor) -> Tensor:
        total = torch.zeros(len(experts), *self.shape[1:], device=self.weight.device)
        numbers = experts.tolist()
        for batch in self.batches:
            rows = batch.rows.to(total.device)
            for own, expert in zip(total, numbers):
                x, weight = batch.of(expert, rows)
                if len(x):
                    add_products(own, x if self.inner is None else self.inner(expert, x), weight)
        return total


@dataclasses.dataclass(frozen=True)
class Layout:
    """How one of transformers' modules holds its experts: ``first``, the parameter that reads their inputs (gate_up_proj, or
    up_proj of experts without a gate); ``transposed``: [E, I, O] instead of [E, O, I]."""

    first: str
    experts: int
    inner: int
    transposed: bool

    @classmethod
    def of(cls, module: nn.Module) -> Layout:
        first = "gate_up_proj" if hasattr(module, "gate_up_proj") else "up_proj"
        down, transposed = module.down_proj, getattr(module, "is_transposed", None)
        if transposed is None:  # llama4 does not say
            transposed = down.shape[1] * 2 == getattr(module, first).shape[2] and first == "gate_up_proj"
        return cls(first, down.shape[0], down.shape[1 if transposed else 2], bool(transposed))

    def inner_of(self, module: nn.Module, expert: int, x: Tensor) -> Tensor:
        """What down_proj of an expert reads when the expert reads x [N, I]."""
        weight, bias = getattr(module, self.first)[expert], getattr(module, f"{self.first}_bias", None)
        out = nn.functional.linear(x, weight.mT if self.transposed else weight, None if bias is None else bias[expert])
        if self.first == "up_proj":
            return module.act_fn(out)
        if hasattr(module, "_apply_gate"):
            return module._apply_gate(out)
        gate, up = out.chunk(2, -1)
        return module.act_fn(gate) * up


class _Fixed(nn.Module):
    """Stands in for a linear: gives ``value`` whatever comes in, or notes what comes in where there is none."""

    value: Tensor | None = None
    seen: Tensor

    def forward(self, x: Tensor) -> Tensor:
        self.seen = x
        return x if self.value is None else self.value


@torch.no_grad()
def attended(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """The inputs of an attention's v_proj as each head averages them over the positions, [tokens, heads, I]; None where its
    output is no such average of what v_proj makes (it has a gate).

    The attention itself averages them: it is given slices of them, as wide as a head, in the place of the values.
    """
    (hidden, *_) = inspect.signature(module.forward).bind(*args, **kwargs).arguments.values()
    linears, given, noted = (module.v_proj, module.o_proj), _Fixed(), _Fixed()
    size, weight = getattr(module, "head_dim", 0), module.v_proj.weight
    if not size or weight.shape[0] % size:
        return None
    count = weight.shape[0] // size

    def run(values: Tensor) -> Tensor:
        given.value = values
        module.forward(*args, **kwargs)
        return noted.seen.reshape(-1, noted.seen.shape[-1] // size, size)

    module.v_proj, module.o_proj = given, noted
    try:
        constant = run(torch.ones_like(hidden[..., :1]).expand(*hidden.shape[:-1], len(weight)))
        if bool((constant - constant[..., :1]).norm() > 0.02 * constant.norm()):  # a gate of each output
            return None
        expected = run(nn.functional.linear(hidden, weight))
        slices = [nn.functional.pad(part, (0, size - part.shape[-1])) for part in hidden.split(size, -1)]
        found = torch.cat([run(part.repeat(1, 1, count)) for part in slices], -1)[..., : hidden.shape[-1]]
    finally:
        module.v_proj, module.o_proj = linears
    own = weight.view(count, size, -1).repeat_interleave(found.shape[1] // count, 0)
    made = torch.einsum("nhi,hdi->nhd", found, own)
    return found if bool((made - expected).norm() <= 0.02 * expected.norm()) else None


class Collector:
    """Hooks on one decoder layer that fill :class:`Moments` for the parameters in ``wanted``.

    ``weights`` [tokens] multiply the squares of each token, in the order in which the layer sees them; None: all alike.
    """

    def __init__(self, layer: nn.Module, wanted: set[str], weights: Tensor | None = None) -> None:
        self.roots = None if weights is None else weights.sqrt()
        self.place = slice(0, 0)  # of the batch at work among all tokens
        self.moments: dict[str, Moments] = {}
        self.batches: dict[str, list[Routed]] = {}
        self.routed: dict[str, Tensor] = {}  # experts module -> tokens sent to each expert
        self.mass: dict[str, Tensor] = {}  # experts module -> sum of their routing weights
        self.averaged: set[str] = set()  # parameters whose inputs are taken as an attention averages them
        self.plain: set[str] = set()  # those of an attention that does not: it is not asked again for each batch
        self.aside = False  # while an attention runs on something else than its values
        self.handles = [layer.register_forward_pre_hook(self._advance)]
        for name, module in layer.named_modules():
            if f"{name}.v_proj.weight" in wanted and isinstance(getattr(module, "o_proj", None), nn.Linear):
                self.handles.append(module.register_forward_pre_hook(self._values(f"{name}.v_proj.weight"), with_kwargs=True))
            if isinstance(module, nn.Linear) and f"{name}.weight" in wanted:
                self.handles.append(module.register_forward_pre_hook(self._linear(f"{name}.weight")))
            elif any(f"{name}.{part}" in wanted for part in ("gate_up_proj", "up_proj", "down_proj")):
                self.handles.append(module.register_forward_pre_hook(self._experts(name), with_kwargs=True))

    def _advance(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        self.place = slice(self.place.stop, self.place.stop + args[0].shape[:-1].numel())

    def _own(self, device: torch.device) -> Tensor | None:
        """The roots of the weights of the tokens at work."""
        return None if self.roots is None else self.roots[self.place].to(device)

    def _linear(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            if self.aside or name in self.averaged:
                return
            x = args[0].reshape(-1, args[0].shape[-1])
            if name not in self.moments:
                self.moments[name] = Moments(1, x.shape[1], x.device)
            self.moments[name].add(0, x, self._own(x.device))

        return hook

    def _values(self, name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        """What v_proj makes reaches the layer's output averaged by the attention, and so does its error: its moments are those
        of its inputs as each head averages them. Otherwise a token that all others look at would count as one of many."""

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if name in self.plain:
                return
            self.aside = True
            try:
                heads = attended(module, args, kwargs)
            finally:
                self.aside = False
            if heads is None:
                self.plain |= {name} - self.averaged
                return
            if name not in self.averaged:
                self.averaged.add(name)
                self.moments[name] = Moments(1, heads.shape[-1], heads.device)
            for x in heads.unbind(1):
                self.moments[name].add(0, x, self._own(x.device))

        return hook

    def _experts(self, name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given = list(inspect.signature(module.forward).bind(*args, **kwargs).arguments.values())
            layout = Layout.of(module)
            hidden, device = given[0].reshape(-1, given[0].shape[-1]), given[0].device
            count, own = layout.experts, self._own(device)
            index, weights = given[1:3] if len(given) > 1 else (None, None)
            if index is None:  # llama4: a row for each expert and token, times its routing weight, or zeros
                live = hidden.view(count, -1, hidden.shape[1]).any(-1)
                routed, token = live.sum(1), live.nonzero()[:, 1]
                mass, rows, place = routed.float(), hidden[live.flatten()], torch.arange(len(token), device=device)
                weight = None if own is None else own[token]
            else:
                flat = index.flatten()
                routed = torch.bincount(flat, minlength=count)[:count]
                mass = torch.zeros(count, device=device).index_add_(0, flat, weights.flatten().float())
                order = flat.argsort(stable=True)
                rows, place = hidden, order // index.shape[1]
                weight = weights.flatten()[order]
                weight = weight if own is None else weight * own[place]
            self.routed[name] = self.routed.get(name, 0) + routed
            self.mass[name] = self.mass.get(name, 0) + mass
            batches = self.batches.setdefault(name, [])
            starts = [0, *routed.cumsum(0).tolist()]
            size = (len(batches) + 1) * rows.numel() * rows.element_size()
            batches.append(Routed(rows if size <= INPUTS_ON_GPU else rows.cpu(), place, weight, starts))
            if len(batches) == 1:
                inner = functools.partial(layout.inner_of, module)
                first = ExpertMoments(count, hidden.shape[1], batches, device, None)
                last = ExpertMoments(count, layout.inner, batches, device, inner)
                last.weight, last.square = first.weight, first.square  # the same inputs
                self.moments |= {f"{name}.{layout.first}": first, f"{name}.down_proj": last}
            counted = self.moments[f"{name}.down_proj"]
            for expert in routed.nonzero()[:, 0].tolist():
                part = slice(starts[expert], starts[expert + 1])
                w = torch.ones(part.stop - part.start, device=device) if weight is None else weight[part].float() ** 2
                counted.weight[expert] += w.sum()
                counted.square[expert] += (w * w).sum()

        return hook

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()


def hooked_shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """The parameters of a module tree that a :class:`Collector` can be asked for, with their shapes."""
    found: dict[str, tuple[int, ...]] = {}
    for name, own in module.named_modules():
        if isinstance(own, nn.Linear):
            found[f"{name}.weight"] = tuple(own.weight.shape)
        for part in ("gate_up_proj", "up_proj", "down_proj"):
            if (parameter := own._parameters.get(part)) is not None and parameter.ndim == 3:
                found[f"{name}.{part}"] = tuple(parameter.shape)
    return found


def calibrated_shapes(checkpoint: Checkpoint) -> dict[str, tuple[int, ...]]:
    """The parameters whose inputs a calibrated pass sees, in the decoder's layers and the head (an embedding that is tied to
    it), with their shapes, by their names in the module tree; none where transformers has no class of the model."""
    if checkpoint.known_family is None or not has_class(checkpoint.model_type):
        return {}
    config = model_config(checkpoint.path).get_text_config()
    model = meta_model(config)
    shapes = hooked_shapes(model)
    found = {name: shape for name, shape in shapes.items() if LAYER_PREFIX.match(name) or name == "lm_head.weight"}
    embedding = model.get_input_embeddings()
    tied = (name for name, module in model.named_modules() if module is embedding and config.tie_word_embeddings)
    return found | {f"{name}.weight": tuple(embedding.weight.shape) for name in tied}


def output(layer: nn.Module, hidden: Tensor, kwargs: Mapping[str, Any]) -> Tensor:
    """What a decoder layer makes of its input [B, T, H]."""
    out = layer(hidden, **kwargs)
    return out[0] if isinstance(out, tuple) else out


class _Stand(nn.Module):
    """Stands in for a decoder layer, whose attributes it has. ``carries``: whether the model wants a second output of it."""

    def __init__(self, layer: nn.Module, carries: bool) -> None:
        super().__init__()
        self._layer, self._carries = [layer], carries  # in a list, so that it is no submodule

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_layer"][0], name)


class _Recorder(_Stand):
    """Notes its input and the other arguments that the model gives it, by name, and passes the input on. The second output is
    the positions that a layer looks at: here all of them."""

    def __init__(self, layer: nn.Module, carries: bool, seen: list[tuple[Tensor, dict[str, Any]]]) -> None:
        super().__init__(layer, carries)
        self._seen = seen

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        signature = inspect.signature(self._layer[0].forward)
        (_, hidden), *named = signature.bind(*args, **kwargs).arguments.items()
        given: dict[str, Any] = {}
        for name, value in named:
            given |= value if signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD else {name: value}
        self._seen.append((hidden, given))
        if not self._carries:
            return hidden
        length = hidden.shape[1]
        return hidden, torch.arange(length, device=hidden.device).expand(len(hidden), length, length)


class _Given(_Stand):
    """Its output is what was given, if anything was, whatever comes in."""

    value: Tensor | None = None

    def forward(self, hidden: Tensor, *_: Any, **__: Any) -> Any:
        out = hidden if self.value is None else self.value
        return (out, None) if self._carries else out


class LayerStream:
    """The decoder of a checkpoint, with parameters in memory only for what is at work.

    ``device`` and ``dtype`` are those of the computation. Calibration sequences must have one length. ``ahead``: whether
    :meth:`read_ahead` reads (by default where a GPU works meanwhile; it takes a layer's bytes of the host's memory).
    """

    def __init__(self, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype, ahead: bool | None = None) -> None:
        from accelerate import init_empty_weights
        from transformers import AutoModelForCausalLM

        self.checkpoint, self.device, self.dtype = checkpoint, device, dtype
        config = model_config(checkpoint.path).get_text_config()
        check_complete(checkpoint)
        with init_empty_weights(include_buffers=False):
            self.model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
        self.decoder = self.model.model
        for module in self.decoder.modules():
            made = {name: buffer for name, buffer in module._buffers.items() if buffer is not None and not buffer.is_meta}
            module._buffers.update({name: buffer.to(self.device) for name, buffer in made.items()})
        self.layers = list(self.decoder.layers)
        self.embedding, prefix = self.model.get_input_embeddings(), "model."
        names = {module: f"{prefix}{name}." for name, module in self.decoder.named_children()}
        self.embedding_prefix = names[self.embedding]
        self.tied = f"{self.embedding_prefix}weight" if config.tie_word_embeddings else ""  # the head is this parameter
        self.around = {m: name for m, name in names.items() if m not in (self.embedding, self.decoder.layers)}
        self.ahead = device.type == "cuda" if ahead is None else ahead
        self._reader = ThreadPoolExecutor(1, "ahead")
        self._coming: dict[str, Future[Tensor]] = {}
        self._last = 0  # the layer that was expected last
        self.by_layer: dict[int, list[str]] = {index: [] for index in range(len(self.layers))}
        for parameter, own in checkpoint.sources.items():
            if (match := LAYER_PREFIX.match(parameter)) and int(match[1]) in self.by_layer:
                self.by_layer[int(match[1])] += own

    def fill(self, module: nn.Module, prefix: str, values: Mapping[str, Tensor] | None = None) -> None:
        """Give ``module`` its parameters and persistent buffers from the checkpoint (or from ``values``, by checkpoint
        name, where they are there). ``prefix`` ends in a dot. :class:`UserError` where the checkpoint lacks one; a parameter
        that is in memory and not in the checkpoint (an adapter's) stays."""
        sources, places = self.checkpoint.sources, self.checkpoint.places
        if (layer := LAYER_PREFIX.match(prefix)) and not self._coming:
            self._expect(int(layer[1]))
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
            parameter = prefix + name
            if parameter not in sources:
                if isinstance(tensor, nn.Parameter) and tensor.is_meta:
                    raise UserError(f"{self.checkpoint.path}: has no tensor for {parameter}")
                continue
            dtype = self.dtype if isinstance(tensor, nn.Parameter) else tensor.dtype
            full = torch.empty(tensor.shape, dtype=dtype, device=self.device)
            for source in sources[parameter]:
                value, own = values[source] if values and source in values else self._read(source), places[source].view(full)
                check_finite(own.copy_(value.view_as(own)), source, self.checkpoint.path)
            owner, _, leaf = name.rpartition(".")
            value = nn.Parameter(full, requires_grad=False) if isinstance(tensor, nn.Parameter) else full
            setattr(module.get_submodule(owner), leaf, value)

    def _expect(self, index: int) -> None:
        """Layer ``index`` of a model of the hub is read next: fetch it and the two that follow in the order in which layers
        come, which may be backward."""
        step, self._last = (1 if index >= self._last else -1), index
        layers = [index + step * more for more in range(1 + LAYERS_AHEAD)]
        self.checkpoint.expect(self.by_layer[number] for number in layers if 0 <= number < len(self.layers))

    def read_ahead(self, index: int) -> None:
        """Begin to read what :meth:`fill` will ask for decoder layer ``index``, where there is one, while the device works."""
        if self.ahead and index < len(self.layers):
            self._expect(index)
            layer = self.layers[index]
            for name, _ in [*layer.named_parameters(), *layer.named_buffers()]:
                for source in self.checkpoint.sources.get(f"model.layers.{index}.{name}", ()):
                    self._coming[source] = self._reader.submit(self.checkpoint.read, source)

    def close(self) -> None:
        """Read no more ahead."""
        self._reader.shutdown(cancel_futures=True)
        self._coming.clear()

    def _read(self, name: str) -> Tensor:
        coming = self._coming.pop(name, None)
        return self.checkpoint.read(name) if coming is None else coming.result()

    @staticmethod
    def empty(module: nn.Module) -> None:
        """Drop a module's parameters again, and give their memory back. What no checkpoint holds (gemma's scale of the
        embedding) stays: nothing could fill it a second time."""
        kept = [(part, name, part._buffers[name]) for part in module.modules() for name in part._non_persistent_buffers_set]
        module.to("meta")
        for part, name, buffer in kept:
            part._buffers[name] = buffer
        trim_heap()

    @contextlib.contextmanager
    def _layers(self, layers: Iterable[nn.Module]) -> Iterator[None]:
        """Others in the place of the decoder's layers."""
        self.decoder.layers = nn.ModuleList(layers)
        try:
            yield
        finally:
            self.decoder.layers = nn.ModuleList(self.layers)

    @contextlib.contextmanager
    def _filled(self, *parts: tuple[nn.Module, str]) -> Iterator[None]:
        for module, prefix in parts:
            self.fill(module, prefix)
        yield
        for module, _ in parts:
            self.empty(module)

    def _zeros(self, batch: int, length: int) -> Tensor:
        width = self.decoder.config.hidden_size
        return torch.zeros(batch, length, width, dtype=self.dtype, device=self.device)

    @torch.no_grad()
    def _seen(self, embedded: Tensor) -> list[tuple[Tensor, dict[str, Any]]]:
        """What the model hands to each decoder layer for an embedding [B, T, H] if no layer changes it."""
        seen: list[tuple[Tensor, dict[str, Any]]] = []
        limit = getattr(self.decoder.config, "index_topk", None)
        if self.checkpoint.family.carries and limit and embedded.shape[1] > limit:
            raise UserError(
                f"calibration sequences of {embedded.shape[1]} tokens: this family looks at {limit}; give shorter ones"
            )
        with self._layers(_Recorder(layer, bool(self.checkpoint.family.carries), seen) for layer in self.layers):
            self.decoder(inputs_embeds=embedded, use_cache=False)
        return seen

    def arguments(self, ids: Tensor) -> list[dict[str, Any]]:
        """What the model hands to each decoder layer for token ids [B, T]: masks, positions. They depend on the shape only."""
        with self._filled(*self.around.items()):
            return [kwargs for _, kwargs in self._seen(self._zeros(*ids.shape))]

    @torch.no_grad()
    def embed(self, parts: Iterable[Tensor], values: Mapping[str, Tensor] | None = None) -> list[Tensor]:
        """What the first decoder layer reads for each batch of token ids [B, T], on the CPU: made by the family's own modules
        (gemma and granite scale the embedding)."""
        self.fill(self.embedding, self.embedding_prefix, values)
        with self._filled(*self.around.items()):
            embedded = (self._finite(self.embedding, self.embedding_prefix, ids.to(self.device)) for ids in parts)
            out = [self._seen(value)[0][0].cpu() for value in embedded]
        self.empty(self.embedding)
        return out

    def _finite(self, module: nn.Module, prefix: str, given: Tensor) -> Tensor:
        """What a module makes of ``given``, where it is finite."""
        out = module(given)
        if not all_finite(out):
            raise UserError(f"{self.checkpoint.path}: {first_nonfinite(module, given, prefix=prefix)}")
        return out

    @contextlib.contextmanager
    def _behind(self, *more: tuple[nn.Module, str]) -> Iterator[Callable[[Tensor], Tensor]]:
        """The model's output for an output of the last layer, by the family's own norm, head, scale and cap."""
        first, *others = (_Given(layer, bool(self.checkpoint.family.carries)) for layer in self.layers)

        def logits(hidden: Tensor) -> Tensor:
            first.value = hidden if hidden.ndim == 3 else hidden[None]
            out = self.model(inputs_embeds=self._zeros(*first.value.shape[:2]), use_cache=False).logits
            if not all_finite(out):
                given = {"inputs_embeds": self._zeros(*first.value.shape[:2]), "use_cache": False}
                raise UserError(f"{self.checkpoint.path}: {first_nonfinite(self.model, **given)}")
            return out if hidden.ndim == 3 else out[0]

        with self._filled(*self.around.items(), *more), self._layers([first, *others]):
            yield logits

    @property
    def head_prefix(self) -> str:
        """Where the head's parameters stand: under their own name, or the embedding's."""
        return "lm_head." if "lm_head.weight" in self.checkpoint.sources else self.embedding_prefix

    @contextlib.contextmanager
    def predictions(self) -> Iterator[Callable[[Tensor], Tensor]]:
        """What makes logits of the last layer's output [B, T, H] or [T, H]; the head may be the embedding."""
        with self._behind((self.model.lm_head, self.head_prefix)) as logits:
            yield logits

    @contextlib.contextmanager
    def ending(self) -> Iterator[Callable[[Tensor], Tensor]]:
        """What makes the head's inputs of the last layer's output."""
        seen: list[Tensor] = []

        class Noted(nn.Module):
            def forward(self, hidden: Tensor) -> Tensor:
                seen.append(hidden)
                return hidden[..., :1]

        head, self.model.lm_head = self.model.lm_head, Noted()
        try:
            with self._behind() as run:

                def inputs_of(hidden: Tensor) -> Tensor:
                    run(hidden)
                    return seen.pop()

                yield inputs_of
        finally:
            self.model.lm_head = head

    @torch.no_grad()
    def run(self, layer: nn.Module, batches: Iterable[Tensor], kwargs: dict[str, Any]) -> Iterator[Tensor]:
        """Each batch [B, T, H] through a filled decoder layer. :class:`UserError` where NaN or infinity comes out."""
        for hidden in batches:
            out = output(layer, hidden.to(self.device), kwargs)
            if not all_finite(out):
                for module in layer.modules():  # one more run, which no Collector counts
                    module._forward_pre_hooks.clear()
                prefix = f"model.layers.{self.layers.index(layer)}."
                raise UserError(
                    f"{self.checkpoint.path}: {first_nonfinite(layer, hidden.to(self.device), prefix=prefix, **kwargs)}"
                )
            yield out
