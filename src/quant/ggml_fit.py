"""Search of the scales of scalar block types: least ``sum importance * (w - value)**2``, all blocks of a chunk at once.

Not a command; :mod:`ggml_scalar` calls `fit_symmetric` and `fit_minimum`. Letters: N blocks, G groups of a block, S weights of
a group, M = N * G. The weights of a group lie along the first axis ([S, M]), so that sums over a group are additions of rows.

    1. every group for itself: candidate scales, the codes of each, the least-squares scale (and minimum) of those codes
    2. every block: candidate half floats d (and m), integers nearest to what the groups want, cost by the forms of 1
    3. rounds of: integers of the groups one up or down with codes chosen anew, then d (and m) by least squares; the best
       of all rounds is kept
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ggml_types import half

TINY = 1e-30
SMALL, LARGE = 1e-12, 1e9


class Problem(NamedTuple):
    """Weights and importance [S, M] of the groups; ``snap`` rounds real units to the units of the type, in place."""

    x: Tensor
    weight: Tensor
    groups: int
    snap: Callable[[Tensor], Tensor]

    def per_block(self, values: Tensor) -> Tensor:
        """[M] -> [N, G]."""
        return values.view(-1, self.groups)


class Choice(NamedTuple):
    """Stored fields: half floats d, m [N]; integers of groups [N, G], as floats."""

    d: Tensor
    multiplier: Tensor
    m: Tensor
    minimum: Tensor

    def where(self, better: Tensor, other: Choice) -> Choice:
        """``self`` for the blocks that are ``better`` [N], else ``other``."""
        return Choice(*(torch.where(better if a.ndim == 1 else better[:, None], a, b) for a, b in zip(self, other)))


def problem(w: Tensor, importance: Tensor, group: int, snap: Callable[[Tensor], Tensor]) -> Problem:
    """The groups of blocks ``w`` [N, block] with importance [N, block].

    What lies below the least half float counts as 0 and what no type reaches is cut, so that sums stay within float32.
    """
    w = torch.where(w.abs() < SMALL, 0.0, w.clamp(-LARGE, LARGE))
    columns = (values.reshape(-1, group).T.contiguous() for values in (w, importance))
    return Problem(*columns, w.shape[1] // group, snap)


def inverse(scale: Tensor) -> Tensor:
    """1 / scale; 0 where the scale is 0."""
    return torch.where(scale == 0, 0.0, 1.0 / scale)


# ---------------------------------------------------------------- without minimum


def fit_symmetric(p: Problem, tops: list[float], block_tops: list[float], low: int, high: int, rounds: int = 2) -> Choice:
    """d and multipliers low..high. ``tops``: units that the largest weight of a group is tried on; ``block_tops``: multipliers
    that the largest scale of a block is tried on; empty: a block is one group, whose multiplier is 1."""
    scale, curve = search_symmetric(p, tops)
    if block_tops:
        choice = spread_symmetric(p.per_block(scale), p.per_block(curve), block_tops, low, high)
    else:
        one = torch.ones_like(p.per_block(scale))
        choice = Choice(half(scale), one, torch.zeros_like(scale), torch.zeros_like(one))
    best, least = choice, None
    for _ in range(rounds):
        choice, error, scale, curve = step_symmetric(p, choice, low, high, steps=(0, -1, 1) if block_tops else (0,))
        better = torch.ones_like(error, dtype=torch.bool) if least is None else error < least
        best, least = choice.where(better, best), error if least is None else torch.minimum(error, least)
        choice = choice._replace(d=refit_symmetric(choice.multiplier, scale, curve, choice.d))
    _, error = code_symmetric(p, choice)
    return choice.where(p.per_block(error).sum(1) < least, best)


def search_symmetric(p: Problem, tops: list[float]) -> tuple[Tensor, Tensor]:
    """The best real scale [M] of each group and ``sum weight * unit**2`` of its codes: how sharply it matters."""
    peak = p.x.gather(0, p.x.abs().argmax(0, keepdim=True))
    over_peak = inverse(peak)
    linear = p.weight * p.x
    best = torch.full_like(peak[0], -1.0)
    scale, curve = torch.zeros_like(best), torch.zeros_like(best)
    for top in tops:
        units = p.snap(p.x * (over_peak * top))
        b, a = (linear * units).sum(0), (units.square_().mul_(p.weight)).sum(0)
        score = b * b / a.clamp_min(TINY)
        better = score > best
        best = torch.where(better, score, best)
        scale, curve = torch.where(better, b / a.clamp_min(TINY), scale), torch.where(better, a, curve)
    return scale, curve


def spread_symmetric(scale: Tensor, curve: Tensor, tops: list[float], low: int, high: int) -> Choice:
    """d and multipliers for wanted scales [N, G] of least ``sum curve * (d * multiplier - scale)**2``."""
    peak = scale.gather(1, scale.abs().argmax(1, keepdim=True))[:, 0]
    least = torch.full_like(peak, torch.inf)
    best = None
    for top in tops:
        d = half(peak / top)
        multiplier = (scale * inverse(d)[:, None]).round_().clamp_(low, high)
        d = refit_symmetric(multiplier, scale, curve, d)
        cost = (curve * (d[:, None] * multiplier - scale).square()).sum(1)
        choice = Choice(d, multiplier, torch.zeros_like(d), torch.zeros_like(multiplier))
        best = choice if best is None else choice.where(cost < least, best)
        least = torch.minimum(cost, least)
    return best


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


def step_symmetric(p: Problem, choice: Choice, low: int, high: int, steps: tuple) -> tuple[Choice, Tensor, Tensor, Tensor]:
    """Every multiplier moves by the step of least error. Also the errors [N], and scale and curve [N, G] of the codes."""
    least = multiplier = scale = curve = None
    linear = p.weight * p.x
    for step in steps:
        moved = choice._replace(multiplier=(choice.multiplier + step).clamp_(low, high))
        units, error = code_symmetric(p, moved)
        b, a = (linear * units).sum(0), units.square_().mul_(p.weight).sum(0)
        fresh = (p.per_block(error), moved.multiplier, p.per_block(b / a.clamp_min(TINY)), p.per_block(a))
        if least is None:
            least, multiplier, scale, curve = fresh
        else:
            better = fresh[0] < least
            kept = (least, multiplier, scale, curve)
            least, multiplier, scale, curve = (torch.where(better, new, old) for new, old in zip(fresh, kept))
    return choice._replace(multiplier=multiplier), least.sum(1), scale, curve


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

    def where(self, better: Tensor, other: Form) -> Form:
        return Form(*(torch.where(better, a, b) for a, b in zip(self, other)))

    def view(self, groups: int) -> Form:
        return Form(*(part.view(-1, groups) for part in self))


def form(p: Problem, units: Tensor, linear: Tensor) -> Form:
    """The form of the codes ``units`` [S, M], which it destroys; ``linear`` is weight * x."""
    b = (linear * units).sum(0)
    weighted = p.weight * units
    return Form(units.mul_(weighted).sum(0), b, weighted.sum(0), linear.sum(0), p.weight.sum(0))


def fit_minimum(p: Problem, tries: list[tuple[float, float]], levels: int, rounds: int = 2) -> Choice:
    """d, m and integers 0..levels-1 of the groups; ``tries``: see :func:`search_minimum`. levels 1: a block is one group."""
    linear = p.weight * p.x
    scale, offset, f = search_minimum(p, linear, tries)
    f = f.view(p.groups)
    scale, offset = p.per_block(scale), p.per_block(offset)
    if levels > 1:
        choice = spread_minimum(scale, offset, f, levels - 1)
    else:
        one = torch.ones_like(scale)
        choice = Choice(half(scale[:, 0]), one, half(offset[:, 0]), one)
    best, least = choice, None
    for _ in range(rounds):
        choice, error, f = step_minimum(p, linear, choice, levels - 1)
        better = torch.ones_like(error, dtype=torch.bool) if least is None else error < least
        best, least = choice.where(better, best), error if least is None else torch.minimum(error, least)
        choice = refit_minimum(choice, f)
    _, error = code_minimum(p, choice)
    return choice.where(p.per_block(error).sum(1) < least, best)


def search_minimum(p: Problem, linear: Tensor, tries: list[tuple[float, float]]) -> tuple[Tensor, Tensor, Form]:
    """The best real scale and offset [M] of each group, and the form of its codes.

    A try (steps, share) spreads the range from ``share`` of the lowest weight to the highest over ``steps`` steps.
    """
    low, high = p.x.amin(0).clamp_max_(0), p.x.amax(0)
    best = scale = offset = kept = None
    for steps, share in tries:
        over = inverse((high - share * low) / steps)
        units = p.snap(torch.addcmul(-share * low * over, p.x, over))
        f = form(p, units, linear)
        s, o = f.best()
        cost = f.cost(s, o)
        if best is None:
            best, scale, offset, kept = cost, s, o, f
            continue
        better = cost < best
        best, scale, offset = torch.where(better, cost, best), torch.where(better, s, scale), torch.where(better, o, offset)
        kept = f.where(better, kept)
    return scale, offset, kept


def spread_minimum(scale: Tensor, offset: Tensor, f: Form, top: int, steps: int = 12) -> Choice:
    """d, m and integers 0..top for wanted scales and offsets [N, G], by the forms of the groups."""
    peak, deepest = scale.amax(1), offset.amax(1)
    factors = [top * (0.8 + 0.3 * k / (steps - 1)) for k in range(steps)]
    least = torch.full_like(peak, torch.inf)
    d, multiplier = torch.zeros_like(peak), torch.zeros_like(scale)
    for factor in factors:  # with the offset that each scale would like
        trial = half(peak / factor)
        near = (scale * inverse(trial)[:, None]).round_().clamp_(0, top)
        s = trial[:, None] * near
        cost = f.cost(s, f.offset(s)).sum(1)
        better = cost < least
        least, d = torch.where(better, cost, least), torch.where(better, trial, d)
        multiplier = torch.where(better[:, None], near, multiplier)
    s = d[:, None] * multiplier
    wanted = f.offset(s)
    deepest = wanted.amax(1)
    least = torch.full_like(peak, torch.inf)
    m, minimum = torch.zeros_like(peak), torch.zeros_like(scale)
    for factor in factors:
        trial = half(deepest / factor)
        near = (wanted * inverse(trial)[:, None]).round_().clamp_(0, top)
        cost = f.cost(s, trial[:, None] * near).sum(1)
        better = cost < least
        least, m = torch.where(better, cost, least), torch.where(better, trial, m)
        minimum = torch.where(better[:, None], near, minimum)
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


def step_minimum(p: Problem, linear: Tensor, choice: Choice, top: int) -> tuple[Choice, Tensor, Form]:
    """The integers of each group move to the neighbours of least error. Also the errors [N] and the forms of the codes."""
    units, error = code_minimum(p, choice)
    least, kept = p.per_block(error), form(p, units, linear).view(p.groups)
    if top == 0:
        return choice, least.sum(1), kept
    for step in (1, -1, 0):
        moved = choice._replace(multiplier=(choice.multiplier + step).clamp_(0, top))
        wanted = kept.offset(moved.d[:, None] * moved.multiplier) * inverse(moved.m)[:, None]
        for minimum in (wanted.floor().clamp_(0, top), wanted.ceil().clamp_(0, top)):
            trial = moved._replace(minimum=minimum)
            units, error = code_minimum(p, trial)
            error = p.per_block(error)
            better = error < least
            least = torch.where(better, error, least)
            kept = form(p, units, linear).view(p.groups).where(better, kept)
            choice = choice._replace(
                multiplier=torch.where(better, trial.multiplier, choice.multiplier),
                minimum=torch.where(better, trial.minimum, choice.minimum),
            )
    return choice, least.sum(1), kept
