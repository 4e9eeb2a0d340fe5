"""The scalar block types of ggml: every weight has its own integer; scales of groups are integers times a half float.

Not a command; use them through :mod:`ggml_codecs`. Layouts: ggml-common.h of llama.cpp. Letters: N blocks, G groups of a block,
S weights of a group, M = N * G. In the search for scales the weights of a group lie along the first axis ([S, M]), so that sums
over a group are additions of rows. It seeks the least ``sum importance * (w - value)**2``, all blocks of a chunk at once:

    1. every group for itself: candidate scales, the codes of each, the least-squares scale (and minimum) of those codes
    2. every block: candidate half floats d (and m), integers nearest to what the groups want, cost by the forms of 1
    3. rounds of: integers of the groups one up or down with codes chosen anew, then d (and m) by least squares; the best
       of all rounds is kept
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from gguf.quants import IQ4_NL
from torch import Tensor

from devices import numbers_on
from ggml_types import LARGE, SMALL, TINY, BlockType, Codec, Field, Run, Scales, half, join_fields, run, split_fields

if TYPE_CHECKING:
    import scalar_kernel

KERNEL = True  # on a GPU by scalar_kernel, in tens of thousands of launches less; False: as on a CPU
ROUNDS = 2  # of the search


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a block is written: ``fields`` in the order of the bytes, "d" and "m" being the half floats of the block."""

    fields: tuple[str | Run, ...]
    zero: int  # code - zero is the unit
    levels: int
    table: tuple[int, ...] | None = None  # units by code, where they are not evenly spaced
    scale_zero: int = 0  # stored integer - scale_zero multiplies d
    scale_levels: int = 0  # 0: a block is one group, whose scale is d itself

    @property
    def has_minimum(self) -> bool:
        return "m" in self.fields


SIX_BITS = (  # of eight scales and minimums: the upper two bits of numbers 4..7 lie above the six of numbers 0..3
    Run(4, (Field("scale", 6), Field("scale", 2, 4, 1, 4)), 4),
    Run(4, (Field("minimum", 6), Field("minimum", 2, 4, 1, 4)), 4),
    Run(4, (Field("scale", 4, 0, 1, 4), Field("minimum", 4, 0, 1, 4)), 4),
)
FOUR_BITS = run(16, "code", 4, inner=16)
LAYOUTS: dict[str, Layout] = {
    "q8_0": Layout(("d", run(32, "code", 8)), 128, 256),
    "q5_1": Layout(("d", "m", run(4, "code", 1, 4), FOUR_BITS), 0, 32),
    "q5_0": Layout(("d", run(4, "code", 1, 4), FOUR_BITS), 16, 32),
    "q4_0": Layout(("d", FOUR_BITS), 8, 16),
    "iq4_nl": Layout(("d", FOUR_BITS), 0, 16, IQ4_NL.kvalues),
    "q6_K": Layout((run(128, "code", 4, 0, 64), run(64, "code", 2, 4, 32), run(16, "scale", 8), "d"), 32, 64, None, 128, 256),
    "q5_K": Layout(("d", "m", *SIX_BITS, run(32, "code", 1, 4, 32), run(128, "code", 4, 0, 32)), 0, 32, None, 0, 64),
    "q4_K": Layout(("d", "m", *SIX_BITS, run(128, "code", 4, 0, 32)), 0, 16, None, 0, 64),
    "iq4_xs": Layout(
        ("d", run(2, "scale", 2, 4), run(4, "scale", 4), run(128, "code", 4, 0, 16)), 0, 16, IQ4_NL.kvalues, 32, 64
    ),
    "q3_K": Layout(
        (run(32, "code", 1, 2, 32), run(64, "code", 2, 0, 32), run(8, "scale", 4, 0, 8), run(4, "scale", 2, 4, 4), "d"),
        4, 8, None, 32, 64,
    ),
    "q2_K": Layout(
        (Run(16, (Field("scale", 4), Field("minimum", 4))), run(64, "code", 2, 0, 32), "d", "m"), 0, 4, None, 0, 16
    ),
}  # fmt: skip


class Choice(NamedTuple):
    """Stored fields: half floats d, m [N] as float32; integers of groups [N, G]. m and minimum are zeros where the type has
    none (q5_1 adds m, so its minimum is -1)."""

    d: Tensor
    multiplier: Tensor
    m: Tensor
    minimum: Tensor


# ---------------------------------------------------------------- what the search works on


class Problem(NamedTuple):
    """Weights, importance and their product [S, M] of the groups; ``snap`` rounds real units to those of the type, in place."""

    x: Tensor
    weight: Tensor
    linear: Tensor
    groups: int
    snap: Callable[[Tensor], Tensor]

    def per_block(self, values: Tensor) -> Tensor:
        """[M] -> [N, G]."""
        return values.view(-1, self.groups)


def problem(w: Tensor, importance: Tensor, group: int, snap: Callable[[Tensor], Tensor]) -> Problem:
    """The groups of blocks ``w`` [N, block] with importance [N, block], cut so that sums stay within float32."""
    w = torch.where(w.abs() < SMALL, 0.0, w.clamp(-LARGE, LARGE))
    x, weight = (values.reshape(-1, group).T.contiguous() for values in (w, importance))
    return Problem(x, weight, weight * x, w.shape[1] // group, snap)


def inverse(scale: Tensor) -> Tensor:
    """1 / scale; 0 where the scale is 0."""
    return torch.where(scale == 0, 0.0, 1.0 / scale)


def where(better: Tensor, new: Iterable[Tensor], old: Iterable[Tensor]) -> list[Tensor]:
    """``new`` where ``better``, else ``old``, tensor by tensor; better [N] decides for tensors [N, G] too."""
    return [torch.where(better[:, None] if a.ndim > better.ndim else better, a, b) for a, b in zip(new, old)]


def cheapest(trials: Iterable[Sequence[Tensor]]) -> Sequence[Tensor]:
    """Of trials (cost, ...) place by place the first of least cost."""
    trials = iter(trials)
    best = next(trials)
    for trial in trials:
        best = where(trial[0] < best[0], trial, best)
    return best


def best_round(p: Problem, choice: Choice, step: Callable, code: Callable) -> Choice:
    """``choice`` after rounds of ``step``: choice -> (that with better integers, its errors [N], that with better d and m)."""
    best, least = choice, torch.full_like(choice.d, torch.inf)
    for _ in range(ROUNDS):
        moved, error, choice = step(choice)
        best, least = Choice(*where(error < least, moved, best)), torch.minimum(error, least)
    error = p.per_block(code(p, choice)[1]).sum(1)
    return Choice(*where(error < least, choice, best))


# ---------------------------------------------------------------- without minimum


def fit_symmetric(p: Problem, tops: list[float], block_tops: list[float], low: int, high: int) -> Choice:
    """d and multipliers low..high. ``tops``: units that the largest weight of a group is tried on; ``block_tops``: multipliers
    that the largest scale of a block is tried on; empty: a block is one group, whose multiplier is 1."""
    scale, curve = (p.per_block(part) for part in search_symmetric(p, tops))
    none = torch.zeros_like(scale)
    if block_tops:
        d, multiplier = spread_symmetric(scale, curve, block_tops, low, high)
    else:
        d, multiplier = half(scale[:, 0]), torch.ones_like(scale)

    def step(choice: Choice) -> tuple[Choice, Tensor, Choice]:
        def moved(by: int) -> tuple[Tensor, ...]:
            multiplier = (choice.multiplier + by).clamp_(low, high)
            units, error = code_symmetric(p, choice._replace(multiplier=multiplier))
            b, a = (p.linear * units).sum(0), units.square_().mul_(p.weight).sum(0)
            return p.per_block(error), multiplier, p.per_block(b / a.clamp_min(TINY)), p.per_block(a)

        error, multiplier, scale, curve = cheapest(map(moved, (0, -1, 1) if block_tops else (0,)))
        choice = choice._replace(multiplier=multiplier)
        return choice, error.sum(1), choice._replace(d=refit_symmetric(multiplier, scale, curve, choice.d))

    return best_round(p, Choice(d, multiplier, torch.zeros_like(d), none), step, code_symmetric)


def search_symmetric(p: Problem, tops: list[float]) -> Sequence[Tensor]:
    """The best real scale [M] of each group and ``sum weight * unit**2`` of its codes: how sharply it matters."""
    over_peak = inverse(p.x.gather(0, p.x.abs().argmax(0, keepdim=True)))

    def trial(top: float) -> tuple[Tensor, ...]:
        units = p.snap(p.x * (over_peak * top))
        b, a = (p.linear * units).sum(0), (units.square_().mul_(p.weight)).sum(0)
        return -(b * b / a.clamp_min(TINY)), b / a.clamp_min(TINY), a

    return cheapest(map(trial, tops))[1:]


def spread_symmetric(scale: Tensor, curve: Tensor, tops: list[float], low: int, high: int) -> Sequence[Tensor]:
    """d and multipliers for wanted scales [N, G] of least ``sum curve * (d * multiplier - scale)**2``."""
    peak = scale.gather(1, scale.abs().argmax(1, keepdim=True))[:, 0]

    def trial(top: float) -> tuple[Tensor, ...]:
        d = half(peak / top)
        multiplier = (scale * inverse(d)[:, None]).round_().clamp_(low, high)
        d = refit_symmetric(multiplier, scale, curve, d)
        return (curve * (d[:, None] * multiplier - scale).square()).sum(1), d, multiplier

    return cheapest(map(trial, tops))[1:]


def refit_symmetric(multiplier: Tensor, scale: Tensor, curve: Tensor, old: Tensor) -> Tensor:
    """The d [N] of least ``sum curve * (d * multiplier - scale)**2``; ``old`` where nothing depends on it."""
    bottom = (curve * multiplier.square()).sum(1)
    return torch.where(bottom > 0, half((curve * multiplier * scale).sum(1) / bottom.clamp_min(TINY)), old)


def code_symmetric(p: Problem, choice: Choice) -> tuple[Tensor, Tensor]:
    """Units [S, M] and weighted errors [M] of the nearest codes."""
    scale = (choice.d[:, None] * choice.multiplier).view(-1)
    units = p.snap(p.x * inverse(scale))
    error = torch.addcmul(p.x, units, scale, value=-1).square_().mul_(p.weight).sum(0)
    return units, error


# ---------------------------------------------------------------- with minimum


class Form(NamedTuple):
    """The weighted error of a group as a function of scale s and offset o for fixed codes, value = s * unit - o:

    s**2 * a + o**2 * w - 2 s o q - 2 s b + 2 o x + constant, with sums over the weights of the group, each [M] or [N, G].
    """

    a: Tensor  # weight * unit**2
    b: Tensor  # weight * unit * x
    q: Tensor  # weight * unit
    x: Tensor  # weight * x
    w: Tensor  # weight

    def cost(self, s: Tensor, o: Tensor) -> Tensor:
        return s * (s * self.a - 2 * (o * self.q + self.b)) + o * (o * self.w + 2 * self.x)

    def offset(self, s: Tensor) -> Tensor:
        """The best offset that is not negative, for a scale."""
        return ((s * self.q - self.x) / self.w).clamp_min_(0)

    def best(self) -> tuple[Tensor, Tensor]:
        """The best scale and offset; the offset is not negative."""
        bottom = self.w * self.a - self.q.square()
        s = (self.w * self.b - self.q * self.x) / bottom.clamp_min(TINY)
        usable = (bottom > 1e-6 * self.w * self.a) & (s * self.q > self.x)
        s = torch.where(usable, s, self.b / self.a.clamp_min(TINY)).clamp_min_(0)
        o = torch.where(usable, self.offset(s), 0.0)
        flat = self.offset(torch.zeros_like(s))  # all weights alike, and negative
        better = self.cost(torch.zeros_like(s), flat) < self.cost(s, o)
        return torch.where(better, 0.0, s), torch.where(better, flat, o)


def form(p: Problem, units: Tensor) -> Form:
    """The form of the codes ``units`` [S, M], which it destroys."""
    b = (p.linear * units).sum(0)
    weighted = p.weight * units
    return Form(units.mul_(weighted).sum(0), b, weighted.sum(0), p.linear.sum(0), p.weight.sum(0))


def fit_minimum(p: Problem, tries: list[tuple[float, float]], block_tops: list[float], top: int) -> Choice:
    """d, m and integers 0..top of the groups; ``tries``: see :func:`search_minimum`; ``block_tops``: integers that the largest
    scale and the largest minimum of a block are tried on. top 0: a block is one group, whose integers are 1."""
    scale, offset, *sums = map(p.per_block, search_minimum(p, tries))
    if top:
        choice = spread_minimum(scale, Form(*sums), block_tops, top)
    else:
        one = torch.ones_like(scale)
        choice = Choice(half(scale[:, 0]), one, half(offset[:, 0]), one)

    def coded(choice: Choice) -> Sequence[Tensor]:
        units, error = code_minimum(p, choice)
        return p.per_block(error), choice.multiplier, choice.minimum, *map(p.per_block, form(p, units))

    def step(choice: Choice) -> tuple[Choice, Tensor, Choice]:
        best = coded(choice)
        for by in (1, -1, 0) if top else ():
            multiplier = (best[1] + by).clamp_(0, top)
            wanted = Form(*best[3:]).offset(choice.d[:, None] * multiplier) * inverse(choice.m)[:, None]
            near = (wanted.floor().clamp_(0, top), wanted.ceil().clamp_(0, top))
            best = cheapest([best, *(coded(choice._replace(multiplier=multiplier, minimum=minimum)) for minimum in near)])
        choice = choice._replace(multiplier=best[1], minimum=best[2])
        return choice, best[0].sum(1), refit_minimum(choice, Form(*best[3:]))

    return best_round(p, choice, step, code_minimum)


def search_minimum(p: Problem, tries: list[tuple[float, float]]) -> Sequence[Tensor]:
    """The best real scale and offset [M] of each group, and the form of its codes.

    A try (steps, share) spreads the range from ``share`` of the lowest weight to the highest over ``steps`` steps.
    """
    low, high = p.x.amin(0).clamp_max_(0), p.x.amax(0)

    def trial(steps: float, share: float) -> tuple[Tensor, ...]:
        over = inverse((high - share * low) / steps)
        f = form(p, p.snap(torch.addcmul(-share * low * over, p.x, over)))
        s, o = f.best()
        return f.cost(s, o), s, o, *f

    return cheapest(trial(*pair) for pair in tries)[1:]


def spread_minimum(scale: Tensor, f: Form, tops: list[float], top: int) -> Choice:
    """d, m and integers 0..top for wanted scales [N, G], by the forms of the groups."""

    def spread(wanted: Tensor, cost: Callable[[Tensor], Tensor]) -> Sequence[Tensor]:
        """The half float and the integers whose products, near what is ``wanted``, cost least."""
        peak = wanted.amax(1)

        def trial(factor: float) -> tuple[Tensor, ...]:
            own = half(peak / factor)
            near = (wanted * inverse(own)[:, None]).round_().clamp_(0, top)
            return cost(own[:, None] * near).sum(1), own, near

        return cheapest(map(trial, tops))[1:]

    d, multiplier = spread(scale, lambda s: f.cost(s, f.offset(s)))  # with the offset that each scale would like
    s = d[:, None] * multiplier
    m, minimum = spread(f.offset(s), lambda o: f.cost(s, o))
    return refit_minimum(Choice(d, multiplier, m, minimum), f)


def refit_minimum(choice: Choice, f: Form) -> Choice:
    """d and m by least squares for fixed integers and codes; kept where the system is singular or a value turns negative."""
    k, n = choice.multiplier, choice.minimum
    aa, bb, ab = (f.a * k * k).sum(1), (f.w * n * n).sum(1), (f.q * k * n).sum(1)
    ra, rb = (f.b * k).sum(1), -(f.x * n).sum(1)
    bottom = aa * bb - ab * ab
    d = half((bb * ra + ab * rb) / bottom.clamp_min(TINY))
    m = half((aa * rb + ab * ra) / bottom.clamp_min(TINY))
    alone = half(ra / aa.clamp_min(TINY))  # no group has a minimum
    usable = (bottom > 1e-6 * aa * bb) & (d > 0) & (m >= 0)
    lone = (bb == 0) & (aa > 0)
    return choice._replace(d=torch.where(usable, d, torch.where(lone, alone, choice.d)), m=torch.where(usable, m, choice.m))


def code_minimum(p: Problem, choice: Choice) -> tuple[Tensor, Tensor]:
    """Units [S, M] and weighted errors [M] of the nearest codes."""
    scale, offset = ((a[:, None] * b).view(-1) for a, b in ((choice.d, choice.multiplier), (choice.m, choice.minimum)))
    over = inverse(scale)
    units = p.snap(torch.addcmul(offset * over, p.x, over))
    error = torch.addcmul(p.x + offset, units, scale, value=-1).square_().mul_(p.weight).sum(0)
    return units, error


# ---------------------------------------------------------------- the codec


class ScalarCodec(Codec):
    """A type whose weights have one integer each."""

    def __init__(self, block_type: BlockType) -> None:
        super().__init__(block_type)
        self.layout = layout = LAYOUTS[block_type.name]
        self.groups = block_type.block // block_type.group
        if layout.scale_levels:
            self.integers = {1: (-layout.scale_zero, layout.scale_levels - 1 - layout.scale_zero)}
            if layout.has_minimum:
                self.integers[3] = (0, layout.scale_levels - 1)
        self.signed = layout.levels == 256  # codes are stored as signed bytes
        low = 1 if self.signed else 0  # -128 is decodable but left out, as llama.cpp never writes it
        self.range = low - layout.zero, layout.levels - 1 - layout.zero  # of evenly spaced units
        if (table := layout.table) is not None:
            self.midpoints = tuple((a + b) / 2 for a, b in zip(table, table[1:]))
            # The nearest unit of the table for every half step from -128 to 128: midpoints are multiples of a half.
            self.lookup = tuple(min(table, key=lambda unit: abs(k / 2 + 0.25 - unit)) for k in range(-256, 256))  # noqa: B023

    def scales_of(self, *raw: Tensor) -> Scales:
        """The decoded scales of the fields of a :class:`Choice`, by the same float32 products as llama.cpp."""
        d, multiplier, m, minimum = raw
        scale = d[:, None] * multiplier.float()
        offset = m[:, None] * minimum.float()
        return Scales(scale, offset, raw)

    def rescaled(self, scales: Scales, factor: Tensor) -> Scales:
        d, multiplier, m, minimum = scales.raw
        return self.scales_of(half(d * factor), multiplier, half(m * factor), minimum)

    # ------------------------------------------------------------ scales

    def fit(self, w: Tensor, importance: Tensor) -> Scales:
        layout, group = self.layout, self.type.group
        low, high = self.integers.get(1, (1, 1))
        how: tuple = (self._tops(), self._block_tops(low, high), low, high)
        if layout.has_minimum:
            top = high if self.integers else 0
            how = (self._tries(), [top * (0.8 + 0.3 * k / 11) for k in range(12)], top)
        if kernels := self.kernels(w):
            fit = kernels.fit_minimum if layout.has_minimum else kernels.fit_symmetric
            choice = fit(w, importance, group, self.kernel_units(w.device), *how)
        else:
            fit = fit_minimum if layout.has_minimum else fit_symmetric
            choice = fit(problem(w, importance, group, self._snap), *how)
        d, multiplier, m, minimum = choice
        if self.type.name == "q5_1":
            m, minimum = -m, -minimum
        if self.type.name == "q8_0":  # its grid is symmetric, and llama.cpp writes d >= 0
            d = d.abs()
        return self.scales_of(d, multiplier.int(), m, minimum.int())

    def _tries(self) -> list[tuple[float, float]]:
        """Ranges that :func:`search_minimum` tries."""
        highest = self.layout.levels - 1
        low, high = (-0.06, 0.12) if highest > 3 else (-0.2, 0.4)
        stretches = [1 + low + (high - low) * k / 7 for k in range(8)]
        return [(highest * stretch, share) for stretch in stretches for share in (1.0, 0.93, 0.86, 0.78, 0.7)]

    def _tops(self) -> list[float]:
        """Units that the largest weight of a group is tried on."""
        low, high = self.layout.zero, self.layout.levels - 1 - self.layout.zero
        if self.layout.table is not None:
            return [sign * top for top in range(88, 152, 4) for sign in (-1, 1)]
        if self.signed:
            return [high - 0.5 * k for k in range(9)]
        factors = [0.7 + 0.03 * k for k in range(24)]
        return [-low * f for f in factors] + [high * f for f in factors]

    def _block_tops(self, low: int, high: int) -> list[float]:
        """Multipliers that the largest scale of a block is tried on."""
        return [end * (0.8 + 0.3 * k / 11) for k in range(12) for end in (low, high)] if self.integers else []

    # ------------------------------------------------------------ codes

    def _snap(self, units: Tensor) -> Tensor:
        """Real units to the nearest that the type has, in place."""
        if self.layout.table is None:
            return units.round_().clamp_(*self.range)
        index = units.mul_(2).floor_().clamp_(-256, 255).add_(256).int()
        return numbers_on(self.lookup, units.device)[index]

    def nearest(self, x: Tensor, scale: Tensor, offset: Tensor, importance: Tensor) -> tuple[Tensor, Tensor]:
        unit = (x + offset) * inverse(scale)
        if self.layout.table is None:
            codes = self._snap(unit).add_(self.layout.zero).int()
        else:
            codes = torch.bucketize(unit, numbers_on(self.midpoints, x.device), out_int32=True)
        return codes, scale * self.units(codes) - offset

    def units(self, codes: Tensor) -> Tensor:
        if self.layout.table is None:
            return (codes - self.layout.zero).float()
        return numbers_on(self.layout.table, codes.device)[codes]

    # ------------------------------------------------------------ on a GPU

    def kernels(self, x: Tensor) -> types.ModuleType | None:
        """The module of fused kernels for weights on the device of ``x``, if there is one."""
        if not (x.is_cuda and KERNEL):
            return None
        import scalar_kernel  # Triton is there where a GPU is

        return scalar_kernel

    def kernel_units(self, device: torch.device) -> scalar_kernel.Units:
        from scalar_kernel import Units

        if (table := self.layout.table) is None:
            return Units(float(self.range[0]), float(self.range[1]), self.layout.zero, numbers_on((0,), device))
        steps = [b - a for a, b in zip(table, table[1:])]
        return Units(float(table[0]), float(table[-1]), 0, numbers_on((*self.midpoints, 0, *steps, 0), device))

    def sweep_group(
        self, block: Tensor, values: Tensor, errors: Tensor, codes: Tensor, scale: Tensor, offset: Tensor, factor: Tensor,
        importance: Tensor,
    ) -> bool:  # fmt: skip
        if kernels := self.kernels(block):
            kernels.sweep_group(block, values, errors, codes, scale, offset, factor, self.kernel_units(block.device))
        return kernels is not None

    def improve_group(
        self, values: Tensor, residual: Tensor, codes: Tensor, metric: Tensor, inverses: Tensor | None,
        raw: tuple[Tensor, ...], index: int,
    ) -> Tensor | None:  # fmt: skip
        if kernels := self.kernels(values):
            units = self.kernel_units(values.device)
            return kernels.improve_group(values, residual, codes, metric, raw, index, self.integers, units)
        return None

    # ------------------------------------------------------------ bytes

    def pack(self, scales: Scales, codes: Tensor) -> Tensor:
        d, multiplier, m, minimum = scales.raw
        layout, scale = self.layout, multiplier + self.layout.scale_zero
        if self.signed:
            codes = codes ^ 128
        if layout.scale_levels == 256:
            scale = scale ^ 128
        return join_fields({"d": d, "m": m, "scale": scale, "minimum": minimum, "code": codes}, layout.fields)

    def unpack(self, data: Tensor) -> tuple[Scales, Tensor]:
        layout = self.layout
        counts = {"code": self.type.block, "scale": self.groups, "minimum": self.groups}
        found = split_fields(data, layout.fields, counts)
        d, codes, multiplier, minimum = (found[name] for name in ("d", "code", "scale", "minimum"))
        if self.signed:
            codes ^= 128
        if layout.scale_levels == 256:
            multiplier ^= 128
        if layout.scale_levels:
            multiplier -= layout.scale_zero
        else:  # one group, whose multiplier is 1; q5_1 adds m
            multiplier += 1
            minimum -= int(layout.has_minimum)
        return self.scales_of(d, multiplier, found.get("m", torch.zeros_like(d)), minimum), codes
