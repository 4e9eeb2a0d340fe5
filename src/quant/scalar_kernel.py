"""Scales, sweep and descent of the scalar ggml types as Triton kernels for NVIDIA GPUs: a launch where else there are hundreds.

Not a command; ggml_scalar (scales) and ggml_round (sweep, descent) call it for weights on a GPU. The plain path takes about a
dozen launches for every column of a weight, however few rows it has; here a program holds a group of inputs of some rows in
registers and goes through its columns itself. Products of whole groups stay matrix products in ggml_round. The operations and
their order are those of the plain path, without fused multiply-add where a value must be the one that decoding gives; sums run
in another order, so near ties may fall otherwise.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from devices import numbers_on
from ggml_types import HALF_MAX, LARGE, SMALL, TINY

SWEEP_ROWS, DESCENT_ROWS, FIT_WEIGHTS = 32, 16, 1024  # of a program
WARPS, FIT_WARPS = 1, 4
# A column of a block's scales or codes begins at any address: one compilation serves all.
ANYWHERE = ("codes", "scales", "offsets", "multipliers", "minimums")
_SMALL, _LARGE, _TINY, _HALF_MAX = (tl.constexpr(value) for value in (SMALL, LARGE, TINY, HALF_MAX))


class Units(NamedTuple):
    """The units of a type: ``low`` to ``high`` with code = unit + ``zero``, or those of ``table`` [2 L]: the midpoints between
    neighbours (one fewer than units, then padding) and the steps from each unit to the next; the first unit is ``low``. A
    table of one number is none."""

    low: float
    high: float
    zero: int
    table: Tensor

    @property
    def levels(self) -> int:
        return len(self.table) // 2


# ---------------------------------------------------------------- arithmetic


@triton.jit
def _inverse(scale):
    return tl.where(scale == 0, 0.0, tl.div_rn(1.0, tl.where(scale == 0, 1.0, scale)))


@triton.jit
def _divided(x, y):
    return tl.div_rn(x, tl.broadcast_to(y, x.shape))


@triton.jit
def _clamp(x, low, high):
    return tl.minimum(tl.maximum(x, low), high)


@triton.jit
def _round(x, low, high):
    # Adding and subtracting 1.5 * 2**23 rounds a float32 of magnitude below 2**22 to an integer, ties to even.
    return (_clamp(x, low, high) + 12582912.0) - 12582912.0


@triton.jit
def _half(x):
    return _clamp(x, -_HALF_MAX, _HALF_MAX).to(tl.float16).to(tl.float32)


@triton.jit
def _nearest(real, table, low, high, zero, LEVELS: tl.constexpr, UP: tl.constexpr):
    """Code and unit nearest to a real unit. LEVELS 0: even steps, ties to even; else a table, ties ``UP`` or down."""
    if LEVELS == 0:
        unit = _round(real, low, high)
        code = unit.to(tl.int32) + zero
    else:
        unit = tl.zeros_like(real) + low
        code = tl.zeros_like(real).to(tl.int32)
        for k in tl.static_range(LEVELS - 1):
            middle = tl.load(table + k)
            above = real >= middle if UP else real > middle
            unit += tl.where(above, tl.load(table + LEVELS + k), 0.0)
            code += above.to(tl.int32)
    return code, unit


# ---------------------------------------------------------------- sweep and descent


@triton.jit
def _tile(outputs, GROUP: tl.constexpr, ROWS: tl.constexpr):
    """Of a program: its expert, the inputs of the group, which of its rows there are, their numbers, and the places of all
    [GROUP, ROWS] in the expert's weight."""
    expert = tl.program_id(1).to(tl.int64)
    output = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    k = tl.arange(0, GROUP)
    return expert, k, output < outputs, expert * outputs + output, k[:, None] * outputs + output[None, :]


@triton.jit(do_not_specialize_on_alignment=ANYWHERE)
def _sweep_kernel(
    block, values, errors, codes, scales, offsets, factor, table, outputs, block_step, value_step, code_step, scale_step,
    factor_step, factor_row, factor_column, low, high, zero, LEVELS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The columns of one group in turn, for ROWS outputs of one expert."""
    expert, k, inside, row, at = _tile(outputs, GROUP, ROWS)
    x = tl.load(block + expert * block_step + at, mask=inside[None, :], other=0.0)
    scale = tl.load(scales + row * scale_step, mask=inside, other=0.0)
    offset = tl.load(offsets + row * scale_step, mask=inside, other=0.0)
    inverse = _inverse(scale)
    found, moved = tl.zeros((GROUP, ROWS), tl.float32), tl.zeros((GROUP, ROWS), tl.float32)
    code = tl.zeros((GROUP, ROWS), tl.int32)
    factor += expert * factor_step
    for j in range(GROUP):
        own = (k == j)[:, None]
        column = tl.sum(tl.where(own, x, 0.0), 0)
        number, unit = _nearest((column + offset) * inverse, table, low, high, zero, LEVELS, False)
        value = scale * unit - offset
        error = _divided(column - value, tl.load(factor + j * (factor_row + factor_column)))
        ahead = tl.load(factor + j * factor_row + k * factor_column, mask=k > j, other=0.0)
        x = tl.fma(tl.broadcast_to(-ahead[:, None], (GROUP, ROWS)), tl.broadcast_to(error[None, :], (GROUP, ROWS)), x)
        found = tl.where(own, value[None, :], found)
        moved = tl.where(own, error[None, :], moved)
        code = tl.where(own, number[None, :], code)
    tl.store(values + expert * value_step + at, found, mask=inside[None, :])
    tl.store(errors + expert * value_step + at, moved, mask=inside[None, :])
    tl.store(codes + row[None, :] * code_step + k[:, None], code, mask=inside[None, :])


@triton.jit
def _image(metric, change, k, metric_row, metric_column, GROUP: tl.constexpr, ROWS: tl.constexpr):
    """metric @ change, [GROUP, ROWS]."""
    image = tl.zeros((GROUP, ROWS), tl.float32)
    for j in range(GROUP):
        column = tl.sum(tl.where((k == j)[:, None], change, 0.0), 0)
        own = tl.load(metric + k * metric_row + j * metric_column)
        image = tl.fma(tl.broadcast_to(own[:, None], (GROUP, ROWS)), tl.broadcast_to(column[None, :], (GROUP, ROWS)), image)
    return image


@triton.jit
def _step_group(
    value, residual, code, scale, offset, metric, diagonal, k, metric_row, metric_column, table, low, high, zero,
    LEVELS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The group coded anew for another scale or offset, in the rows where that lowers the form: which rows, and the state."""
    real = (value + _divided(residual, diagonal[:, None]) + offset[None, :]) * _inverse(scale)[None, :]
    number, unit = _nearest(real, table, low, high, zero, LEVELS, False)
    trial = scale[None, :] * unit - offset[None, :]
    change = trial - value
    image = _image(metric, change, k, metric_row, metric_column, GROUP, ROWS)
    better = tl.sum(change * (image - 2.0 * residual), 0) < 0
    value = tl.where(better[None, :], trial, value)
    residual = residual - tl.where(better[None, :], image, 0.0)
    return better, value, residual, tl.where(better[None, :], number, code)


@triton.jit(do_not_specialize_on_alignment=ANYWHERE)
def _descent_kernel(
    values, residuals, codes, moves, d_half, multipliers, m_half, minimums, metric, table, outputs, value_step, residual_step,
    code_step, raw_step, metric_step, metric_row, metric_column, low, high, zero, least, most, FIRST: tl.constexpr,
    SECOND: tl.constexpr, LEVELS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Block.improve for one group: its integers one up or down (FIRST: the multiplier, SECOND: the minimum), then its codes."""
    expert, k, inside, row, at = _tile(outputs, GROUP, ROWS)
    mask = inside[None, :]
    value = tl.load(values + expert * value_step + at, mask=mask, other=0.0)
    residual = tl.load(residuals + expert * residual_step + at, mask=mask, other=0.0)
    code = tl.load(codes + row[None, :] * code_step + k[:, None], mask=mask, other=0)
    d, m = tl.load(d_half + row, mask=inside, other=0.0), tl.load(m_half + row, mask=inside, other=0.0)
    multiplier = tl.load(multipliers + row * raw_step, mask=inside, other=0)
    minimum = tl.load(minimums + row * raw_step, mask=inside, other=0)
    metric += expert * metric_step
    diagonal = tl.load(metric + k * (metric_row + metric_column))
    before = value
    for turn in tl.static_range(4):
        if (turn < 2 and FIRST) or (turn >= 2 and SECOND):
            near, deep = multiplier, minimum
            if turn < 2:
                near = _clamp(multiplier + (1 - 2 * (turn % 2)), least, most)
            else:
                deep = _clamp(minimum + (1 - 2 * (turn % 2)), 0, most)
            better, value, residual, code = _step_group(
                value, residual, code, d * near.to(tl.float32), m * deep.to(tl.float32), metric, diagonal, k, metric_row,
                metric_column, table, low, high, zero, LEVELS, GROUP, ROWS,
            )  # fmt: skip
            multiplier, minimum = tl.where(better, near, multiplier), tl.where(better, deep, minimum)
    scale, offset = d * multiplier.to(tl.float32), m * minimum.to(tl.float32)
    inverse = _inverse(scale)
    for j in range(GROUP):
        own = (k == j)[:, None]
        old, pull = tl.sum(tl.where(own, value, 0.0), 0), tl.sum(tl.where(own, residual, 0.0), 0)
        curve = tl.load(metric + j * (metric_row + metric_column))
        number, unit = _nearest((old + _divided(pull, curve) + offset) * inverse, table, low, high, zero, LEVELS, False)
        new = scale * unit - offset
        change = new - old
        better = change * (curve * change - 2.0 * pull) < 0
        change = tl.where(better, change, 0.0)
        ahead = tl.load(metric + k * metric_row + j * metric_column, mask=k >= j, other=0.0)
        residual = tl.fma(
            tl.broadcast_to(-ahead[:, None], (GROUP, ROWS)), tl.broadcast_to(change[None, :], (GROUP, ROWS)), residual
        )
        taken = own & better[None, :]
        value, code = tl.where(taken, new[None, :], value), tl.where(taken, number[None, :], code)
    tl.store(values + expert * value_step + at, value, mask=mask)
    tl.store(moves + expert * GROUP * outputs + at, value - before, mask=mask)
    tl.store(codes + row[None, :] * code_step + k[:, None], code, mask=mask)
    if FIRST:
        tl.store(multipliers + row * raw_step, multiplier, mask=inside)
    if SECOND:
        tl.store(minimums + row * raw_step, minimum, mask=inside)


def sweep_group(
    block: Tensor, values: Tensor, errors: Tensor, codes: Tensor, scale: Tensor, offset: Tensor, factor: Tensor, units: Units
) -> None:
    """Code a group ``block`` [E, S, O] column by column: see Codec.sweep_group."""
    experts, group, outputs = block.shape
    _sweep_kernel[(triton.cdiv(outputs, SWEEP_ROWS), experts)](
        block, values, errors, codes, scale, offset, factor, units.table, outputs, block.stride(0), values.stride(0),
        codes.stride(0), scale.stride(0), *factor.stride(), units.low, units.high, units.zero, LEVELS=units.levels, GROUP=group,
        ROWS=SWEEP_ROWS, num_warps=WARPS, enable_fp_fusion=False,  # a tracked value must be the decoded one, bit for bit
    )  # fmt: skip


def improve_group(
    values: Tensor, residual: Tensor, codes: Tensor, metric: Tensor, raw: tuple[Tensor, ...], index: int,
    integers: dict[int, tuple[int, int]], units: Units,
) -> Tensor:  # fmt: skip
    """Better integers and codes for group ``index``, [E, S, O]; returns the change of its values: see Codec.improve_group."""
    d, multiplier, m, minimum = raw
    experts, size, outputs = values.shape
    moved = torch.empty(experts, size, outputs, dtype=values.dtype, device=values.device)
    _descent_kernel[(triton.cdiv(outputs, DESCENT_ROWS), experts)](
        values, residual, codes, moved, d, multiplier[:, index], m, minimum[:, index], metric, units.table, outputs,
        values.stride(0), residual.stride(0), codes.stride(0), multiplier.stride(0), *metric.stride(), units.low, units.high,
        units.zero, *integers.get(1, (0, 0)), FIRST=1 in integers, SECOND=3 in integers, LEVELS=units.levels, GROUP=size,
        ROWS=DESCENT_ROWS, num_warps=WARPS, enable_fp_fusion=False,
    )  # fmt: skip
    return moved


# ---------------------------------------------------------------- scales without a minimum (see ggml_scalar for the method)


@triton.jit
def _load_problem(weight, importance, count, GROUPS: tl.constexpr, GROUP: tl.constexpr, BLOCKS: tl.constexpr):
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    inside = block < count
    inner = tl.arange(0, GROUPS)[None, :, None] * GROUP + tl.arange(0, GROUP)[None, None, :]
    at = block[:, None, None] * (GROUPS * GROUP) + inner
    x = tl.load(weight + at, mask=inside[:, None, None], other=0.0)
    w = tl.load(importance + at, mask=inside[:, None, None], other=1.0)
    return block, inside, tl.where(tl.abs(x) < _SMALL, 0.0, _clamp(x, -_LARGE, _LARGE)), w


@triton.jit
def _at_largest(x, place, AXIS: tl.constexpr, COUNT: tl.constexpr):
    """Of all along an axis the first of largest size."""
    size = tl.abs(x)
    first = tl.min(tl.where(size == tl.max(size, AXIS, keep_dims=True), place, COUNT), AXIS, keep_dims=True)
    return tl.sum(tl.where(place == first, x, 0.0), AXIS, keep_dims=True)


@triton.jit
def _refit(multiplier, scale, curve, old):
    """d [N, 1] of least squares for what the groups [N, G] want."""
    bottom = tl.sum(curve * (multiplier * multiplier), 1, keep_dims=True)
    d = _half(tl.div_rn(tl.sum(curve * multiplier * scale, 1, keep_dims=True), tl.maximum(bottom, _TINY)))
    return tl.where(bottom > 0, d, old)


@triton.jit
def _code_symmetric(x, w, scale, table, low, high, LEVELS: tl.constexpr):
    """Units [N, G, S] and errors [N, G] for scales [N, G]."""
    _, unit = _nearest(x * _inverse(scale)[:, :, None], table, low, high, 0, LEVELS, True)
    rest = x - unit * scale[:, :, None]
    return unit, tl.sum(rest * rest * w, 2)


@triton.jit
def _fit_symmetric_kernel(
    weight, importance, tops, block_tops, table, d_out, multiplier_out, count, top_count, block_top_count, low, high, least,
    most, SPREAD: tl.constexpr, LEVELS: tl.constexpr, GROUPS: tl.constexpr, GROUP: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    block, inside, x, w = _load_problem(weight, importance, count, GROUPS, GROUP, BLOCKS)
    linear = w * x
    over_peak = _inverse(_at_largest(x, tl.arange(0, GROUP)[None, None, :], 2, GROUP))
    best = tl.full((BLOCKS, GROUPS), -1.0, tl.float32)
    scale, curve = tl.zeros((BLOCKS, GROUPS), tl.float32), tl.zeros((BLOCKS, GROUPS), tl.float32)
    for t in range(top_count):
        _, unit = _nearest(x * (over_peak * tl.load(tops + t)), table, low, high, 0, LEVELS, True)
        b, a = tl.sum(linear * unit, 2), tl.sum(unit * unit * w, 2)
        score = tl.div_rn(b * b, tl.maximum(a, _TINY))
        better = score > best
        best = tl.where(better, score, best)
        scale, curve = tl.where(better, tl.div_rn(b, tl.maximum(a, _TINY)), scale), tl.where(better, a, curve)
    multiplier = tl.full((BLOCKS, GROUPS), 1.0, tl.float32)
    if SPREAD:
        d = tl.zeros((BLOCKS, 1), tl.float32)
        cheapest = tl.full((BLOCKS, 1), float("inf"), tl.float32)
        peak = _at_largest(scale, tl.arange(0, GROUPS)[None, :], 1, GROUPS)
        for t in range(block_top_count):
            trial = _half(_divided(peak, tl.load(block_tops + t)))
            near = _round(scale * _inverse(trial), least, most)
            trial = _refit(near, scale, curve, trial)
            rest = trial * near - scale
            cost = tl.sum(curve * (rest * rest), 1, keep_dims=True)
            better = (cost < cheapest) | (t == 0)
            cheapest, d = tl.where(better, cost, cheapest), tl.where(better, trial, d)
            multiplier = tl.where(better, near, multiplier)
    else:
        d = _half(tl.max(scale, 1, keep_dims=True))  # one group
    best_d, best_multiplier = d, multiplier
    lowest = tl.full((BLOCKS, 1), float("inf"), tl.float32)
    for turn in tl.static_range(2):
        start = multiplier
        cheapest = tl.full((BLOCKS, GROUPS), float("inf"), tl.float32)
        for number in tl.static_range(3 if SPREAD else 1):  # 0, -1, 1
            moved = start
            if SPREAD and number > 0:
                moved = _clamp(start + (2 * number - 3), least, most)
            unit, error = _code_symmetric(x, w, d * moved, table, low, high, LEVELS)
            b, a = tl.sum(linear * unit, 2), tl.sum(unit * unit * w, 2)
            better = (error < cheapest) | (number == 0)
            cheapest, multiplier = tl.where(better, error, cheapest), tl.where(better, moved, multiplier)
            scale, curve = tl.where(better, tl.div_rn(b, tl.maximum(a, _TINY)), scale), tl.where(better, a, curve)
        total = tl.sum(cheapest, 1, keep_dims=True)
        better = (total < lowest) | (turn == 0)
        lowest, best_d = tl.where(better, total, lowest), tl.where(better, d, best_d)
        best_multiplier = tl.where(better, multiplier, best_multiplier)
        d = _refit(multiplier, scale, curve, d)
    _, error = _code_symmetric(x, w, d * multiplier, table, low, high, LEVELS)
    better = tl.sum(error, 1, keep_dims=True) < lowest
    best_d, best_multiplier = tl.where(better, d, best_d), tl.where(better, multiplier, best_multiplier)
    group = tl.arange(0, GROUPS)[None, :]
    tl.store(d_out + block[:, None] + tl.zeros((BLOCKS, 1), tl.int64), best_d, mask=inside[:, None])
    tl.store(multiplier_out + block[:, None] * GROUPS + group, best_multiplier, mask=inside[:, None])


def fit_symmetric(
    w: Tensor, importance: Tensor, group: int, units: Units, tops: list[float], block_tops: list[float], low: int, high: int
) -> tuple[Tensor, ...]:
    """:func:`ggml_scalar.fit_symmetric` of blocks w, importance [N, block]."""
    w, importance = w.contiguous(), importance.contiguous()
    count, size = w.shape
    d, multiplier = w.new_zeros(count), w.new_zeros(count, size // group)
    blocks = max(1, FIT_WEIGHTS // size)
    if count:
        _fit_symmetric_kernel[(triton.cdiv(count, blocks),)](
            w, importance, numbers_on(tuple(tops), w.device), numbers_on(tuple(block_tops) or (0.0,), w.device), units.table, d,
            multiplier, count, len(tops), len(block_tops), units.low, units.high, float(low), float(high),
            SPREAD=bool(block_tops), LEVELS=units.levels, GROUPS=size // group, GROUP=group, BLOCKS=blocks,
            num_warps=FIT_WARPS, enable_fp_fusion=False,
        )  # fmt: skip
    return d, multiplier, torch.zeros_like(d), torch.zeros_like(multiplier)


# ---------------------------------------------------------------- scales with a minimum


@triton.jit
def _cost(s, o, a, b, q, x, w):
    return s * (s * a - 2.0 * (o * q + b)) + o * (o * w + 2.0 * x)


@triton.jit
def _offset(s, q, x, w):
    """The best offset that is not negative, for a scale."""
    return tl.maximum(tl.div_rn(s * q - x, w), 0.0)


@triton.jit
def _best(a, b, q, x, w):
    """The best scale and offset of each group for the sums of its codes."""
    bottom = w * a - q * q
    s = tl.div_rn(w * b - q * x, tl.maximum(bottom, _TINY))
    usable = (bottom > 1e-6 * w * a) & (s * q > x)
    s = tl.maximum(tl.where(usable, s, tl.div_rn(b, tl.maximum(a, _TINY))), 0.0)
    o = tl.where(usable, _offset(s, q, x, w), 0.0)
    none = tl.zeros_like(s)
    flat = _offset(none, q, x, w)
    better = _cost(none, flat, a, b, q, x, w) < _cost(s, o, a, b, q, x, w)
    return tl.where(better, 0.0, s), tl.where(better, flat, o)


@triton.jit
def _sums(unit, linear, w):
    """a, b, q of the codes: see ggml_scalar.Form."""
    weighted = w * unit
    return tl.sum(unit * weighted, 2), tl.sum(linear * unit, 2), tl.sum(weighted, 2)


@triton.jit
def _code_minimum(x, w, scale, offset, high):
    """Units [N, G, S] and errors [N, G] for scales and offsets [N, G]."""
    over = _inverse(scale)
    unit = _round((offset * over)[:, :, None] + x * over[:, :, None], 0.0, high)
    rest = (x + offset[:, :, None]) - unit * scale[:, :, None]
    return unit, tl.sum(rest * rest * w, 2)


@triton.jit
def _refit_minimum(d, k, m, n, a, b, q, x, w):
    """d and m [N, 1] by least squares for fixed integers k, n and codes."""
    aa, bb = tl.sum(a * k * k, 1, keep_dims=True), tl.sum(w * n * n, 1, keep_dims=True)
    ab = tl.sum(q * k * n, 1, keep_dims=True)
    ra, rb = tl.sum(b * k, 1, keep_dims=True), -tl.sum(x * n, 1, keep_dims=True)
    bottom = aa * bb - ab * ab
    below = tl.maximum(bottom, _TINY)
    new_d, new_m = _half(tl.div_rn(bb * ra + ab * rb, below)), _half(tl.div_rn(aa * rb + ab * ra, below))
    alone = _half(tl.div_rn(ra, tl.maximum(aa, _TINY)))
    usable = (bottom > 1e-6 * aa * bb) & (new_d > 0) & (new_m >= 0)
    lone = (bb == 0) & (aa > 0)
    return tl.where(usable, new_d, tl.where(lone, alone, d)), tl.where(usable, new_m, m)


@triton.jit
def _spread(
    wanted, s, a, b, q, x, w, factors, factor_count, top, SCALES: tl.constexpr, BLOCKS: tl.constexpr, GROUPS: tl.constexpr
):
    """The half float [N, 1] and the integers [N, G] whose products, near what is ``wanted``, cost least: as SCALES with the
    offset that each would like, else as offsets for the scales s."""
    peak = tl.max(wanted, 1, keep_dims=True)
    cheapest, half = tl.full((BLOCKS, 1), float("inf"), tl.float32), tl.zeros((BLOCKS, 1), tl.float32)
    integers = tl.zeros((BLOCKS, GROUPS), tl.float32)
    for t in range(factor_count):
        trial = _half(_divided(peak, tl.load(factors + t)))
        near = _round(wanted * _inverse(trial), 0.0, top)
        own = trial * near
        if SCALES:
            cost = tl.sum(_cost(own, _offset(own, q, x, w), a, b, q, x, w), 1, keep_dims=True)
        else:
            cost = tl.sum(_cost(s, own, a, b, q, x, w), 1, keep_dims=True)
        better = cost < cheapest
        cheapest, half = tl.where(better, cost, cheapest), tl.where(better, trial, half)
        integers = tl.where(better, near, integers)
    return half, integers


@triton.jit
def _fit_minimum_kernel(
    weight, importance, steps, shares, factors, d_out, multiplier_out, m_out, minimum_out, count, try_count, factor_count, high,
    top, SPREAD: tl.constexpr, GROUPS: tl.constexpr, GROUP: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    block, inside, values, w = _load_problem(weight, importance, count, GROUPS, GROUP, BLOCKS)
    linear = w * values
    all_x, all_w = tl.sum(linear, 2), tl.sum(w, 2)
    low, peak = tl.minimum(tl.min(values, 2), 0.0), tl.max(values, 2)
    best = tl.full((BLOCKS, GROUPS), float("inf"), tl.float32)
    scale, offset = tl.zeros((BLOCKS, GROUPS), tl.float32), tl.zeros((BLOCKS, GROUPS), tl.float32)
    a, b, q = tl.zeros_like(scale), tl.zeros_like(scale), tl.zeros_like(scale)
    for t in range(try_count):
        start = tl.load(shares + t) * low
        over = _inverse(_divided(peak - start, tl.load(steps + t)))
        unit = _round((-start * over)[:, :, None] + values * over[:, :, None], 0.0, high)
        own_a, own_b, own_q = _sums(unit, linear, w)
        s, o = _best(own_a, own_b, own_q, all_x, all_w)
        cost = _cost(s, o, own_a, own_b, own_q, all_x, all_w)
        better = (cost < best) | (t == 0)
        best, scale, offset = tl.where(better, cost, best), tl.where(better, s, scale), tl.where(better, o, offset)
        a, b, q = tl.where(better, own_a, a), tl.where(better, own_b, b), tl.where(better, own_q, q)
    if SPREAD:
        d, k = _spread(scale, scale, a, b, q, all_x, all_w, factors, factor_count, top, True, BLOCKS, GROUPS)
        wanted = _offset(d * k, q, all_x, all_w)
        m, n = _spread(wanted, d * k, a, b, q, all_x, all_w, factors, factor_count, top, False, BLOCKS, GROUPS)
        d, m = _refit_minimum(d, k, m, n, a, b, q, all_x, all_w)
    else:
        d, m = _half(tl.max(scale, 1, keep_dims=True)), _half(tl.max(offset, 1, keep_dims=True))
        k, n = tl.full((BLOCKS, GROUPS), 1.0, tl.float32), tl.full((BLOCKS, GROUPS), 1.0, tl.float32)
    best_d, best_k, best_m, best_n = d, k, m, n
    lowest = tl.full((BLOCKS, 1), float("inf"), tl.float32)
    for turn in tl.static_range(2):
        unit, cheapest = _code_minimum(values, w, d * k, m * n, high)
        a, b, q = _sums(unit, linear, w)
        if SPREAD:
            for number in tl.static_range(3):  # 1, -1, 0
                near = _clamp(k + (1 - 2 * number if number < 2 else 0), 0.0, top)
                wanted = _offset(d * near, q, all_x, all_w) * _inverse(m)
                for side in tl.static_range(2):
                    deep = _clamp(tl.floor(wanted) if side == 0 else tl.ceil(wanted), 0.0, top)
                    unit, error = _code_minimum(values, w, d * near, m * deep, high)
                    better = error < cheapest
                    own_a, own_b, own_q = _sums(unit, linear, w)
                    cheapest = tl.where(better, error, cheapest)
                    a, b, q = tl.where(better, own_a, a), tl.where(better, own_b, b), tl.where(better, own_q, q)
                    k, n = tl.where(better, near, k), tl.where(better, deep, n)
        total = tl.sum(cheapest, 1, keep_dims=True)
        better = (total < lowest) | (turn == 0)
        lowest, best_d, best_m = tl.where(better, total, lowest), tl.where(better, d, best_d), tl.where(better, m, best_m)
        best_k, best_n = tl.where(better, k, best_k), tl.where(better, n, best_n)
        d, m = _refit_minimum(d, k, m, n, a, b, q, all_x, all_w)
    _, error = _code_minimum(values, w, d * k, m * n, high)
    better = tl.sum(error, 1, keep_dims=True) < lowest
    at = block[:, None] + tl.zeros((BLOCKS, 1), tl.int64)
    tl.store(d_out + at, tl.where(better, d, best_d), mask=inside[:, None])
    tl.store(m_out + at, tl.where(better, m, best_m), mask=inside[:, None])
    at = block[:, None] * GROUPS + tl.arange(0, GROUPS)[None, :]
    tl.store(multiplier_out + at, tl.where(better, k, best_k), mask=inside[:, None])
    tl.store(minimum_out + at, tl.where(better, n, best_n), mask=inside[:, None])


def fit_minimum(
    w: Tensor, importance: Tensor, group: int, units: Units, tries: list[tuple[float, float]], block_tops: list[float], top: int
) -> tuple[Tensor, ...]:
    """:func:`ggml_scalar.fit_minimum` of blocks w, importance [N, block]."""
    w, importance = w.contiguous(), importance.contiguous()
    count, size = w.shape
    d, m = w.new_zeros(count), w.new_zeros(count)
    multiplier, minimum = w.new_zeros(count, size // group), w.new_zeros(count, size // group)
    blocks = max(1, FIT_WEIGHTS // size)
    if count:
        _fit_minimum_kernel[(triton.cdiv(count, blocks),)](
            w, importance, *(numbers_on(column, w.device) for column in zip(*tries)), numbers_on(tuple(block_tops), w.device),
            d, multiplier, m, minimum, count, len(tries), len(block_tops), units.high, float(top), SPREAD=top > 0,
            GROUPS=size // group, GROUP=group, BLOCKS=blocks, num_warps=FIT_WARPS, enable_fp_fusion=False,
        )  # fmt: skip
    return d, multiplier, m, minimum
