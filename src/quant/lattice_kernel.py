"""Codes of the lattice types as Triton kernels for NVIDIA GPUs: every point, and every sign to flip, tried in registers.

Not a command; ggml_lattice calls it for weights on a GPU. `nearest` and `scores` do what its searches for points and for scales
do, without the matrix of scores (256 to 1,024 floats for every four or eight weights), the lists of vectors with an odd number
of signs, and the waits for their lengths. `sweep_group` and `improve_group` do what ggml_round does with a group of inputs in
one launch; the rows of an expert share the importance of its inputs there, so the squares of a point are weighted once for all,
and a flipped sign is one more product. Sums run in the order of the inputs in
float32; where two points cost the same to the last bits a matrix product may choose the other, so the results agree in cost,
not always in the index.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

VECTORS, POINTS, WARPS = 16, 256, 4  # of a program: vectors, points at once
# Of a program that goes through a group. One warp: with more, the search for eight inputs would be done by each of them again.
GROUP_ROWS, GROUP_POINTS, GROUP_WARPS = 16, 64, 1
# A column of a block's scales or codes begins at any address: one compilation serves all.
ANYWHERE = ("codes", "scales", "levels")


class Points(NamedTuple):
    """A grid: ``table`` [16 / parts, P], squares above sizes; ``parts``: points of a vector; ``even``: as many signs are minus;
    ``far``: the largest |x| / scale; ``bits`` of an index in a code."""

    table: Tensor
    parts: int
    even: bool
    far: float
    bits: int

    def constants(self, vectors: int, points: int, warps: int) -> dict[str, int | bool]:
        """What kernels are compiled for."""
        return {
            "PARTS": self.parts, "WIDTH": 8 // self.parts, "EVEN": self.even, "COUNT": self.table.shape[1], "BITS": self.bits,
            "VECTORS": vectors, "POINTS": min(points, self.table.shape[1]), "num_warps": warps,
        }  # fmt: skip


@triton.jit
def _best(
    own, pull, table, row, inside, flip, PART: tl.constexpr, WIDTH: tl.constexpr, COUNT: tl.constexpr, VECTORS: tl.constexpr,
    POINTS: tl.constexpr,
):  # fmt: skip
    """Score and index of the cheapest point for a part of every vector, with the sign of weight ``flip`` turned."""
    least = tl.full((VECTORS, POINTS), float("inf"), tl.float32)
    found = tl.zeros((VECTORS, POINTS), tl.int32)
    for start in range(0, COUNT, POINTS):
        point = start + tl.arange(0, POINTS)
        score = tl.zeros((VECTORS, POINTS), tl.float32)
        for d in tl.static_range(WIDTH):
            w = tl.load(own + row * 8 + PART * WIDTH + d, mask=inside, other=0.0)
            score += w[:, None] * tl.load(table + d * COUNT + point)[None, :]
        for d in tl.static_range(WIDTH):
            p = tl.load(pull + row * 8 + PART * WIDTH + d, mask=inside, other=0.0)
            p = tl.where(flip == PART * WIDTH + d, -p, p) * -2.0
            score += p[:, None] * tl.load(table + (WIDTH + d) * COUNT + point)[None, :]
        better = score < least
        least = tl.where(better, score, least)
        found = tl.where(better, tl.broadcast_to(point[None, :], (VECTORS, POINTS)), found)
    best = tl.min(least, 1)
    return best, tl.min(tl.where(least == best[:, None], found, COUNT), 1)


@triton.jit
def _nearest_kernel(
    scaled, own, pull, table, codes, count, PARTS: tl.constexpr, WIDTH: tl.constexpr, EVEN: tl.constexpr, COUNT: tl.constexpr,
    BITS: tl.constexpr, VECTORS: tl.constexpr, POINTS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * VECTORS + tl.arange(0, VECTORS)
    inside = row < count
    signs, odd = tl.zeros((VECTORS,), tl.int32), tl.zeros((VECTORS,), tl.int32)
    for column in tl.static_range(8):
        minus = (tl.load(scaled + row * 8 + column, mask=inside, other=0.0) < 0).to(tl.int32)
        signs |= minus << column
        odd ^= minus
    least = tl.full((VECTORS,), float("inf"), tl.float32)
    place, chosen = tl.zeros((VECTORS,), tl.int32), tl.zeros((VECTORS,), tl.int32)
    code = tl.zeros((VECTORS,), tl.int32)
    for part in tl.static_range(PARTS):
        score, index = _best(own, pull, table, row, inside, -1, part, WIDTH, COUNT, VECTORS, POINTS)
        code |= index << (8 + BITS * part)
        if EVEN:
            for flip in range(part * WIDTH, part * WIDTH + WIDTH):
                cost, point = _best(own, pull, table, row, inside, flip, part, WIDTH, COUNT, VECTORS, POINTS)
                better = cost - score < least
                least = tl.where(better, cost - score, least)
                place = tl.where(better, flip, place)
                chosen = tl.where(better, (point ^ index) << (8 + BITS * part), chosen)
    if EVEN:
        signs = tl.where(odd == 1, signs ^ (1 << place), signs)
        code = tl.where(odd == 1, code ^ chosen, code)
    tl.store(codes + row, code | signs, mask=inside)


@triton.jit
def _scores_kernel(
    features, tables, scores, count, WIDTH: tl.constexpr, COUNT: tl.constexpr, VECTORS: tl.constexpr, POINTS: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * VECTORS + tl.arange(0, VECTORS)
    inside = row < count
    table = tables + tl.program_id(1) * 2 * WIDTH * COUNT
    least = tl.full((VECTORS, POINTS), float("inf"), tl.float32)
    for start in range(0, COUNT, POINTS):
        point = start + tl.arange(0, POINTS)
        score = tl.zeros((VECTORS, POINTS), tl.float32)
        for d in tl.static_range(2 * WIDTH):
            own = tl.load(features + row * (2 * WIDTH) + d, mask=inside, other=0.0)
            score += own[:, None] * tl.load(table + d * COUNT + point)[None, :]
        least = tl.minimum(least, score)
    tl.store(scores + tl.program_id(1).to(tl.int64) * count + row, tl.min(least, 1), mask=inside)


# ---------------------------------------------------------------- a whole group of inputs: sweep and descent


@triton.jit
def _column(tile, place, j):
    """[V, C], [C] -> [V]: column j."""
    return tl.sum(tl.where((place == j)[None, :], tile, 0.0), 1)


@triton.jit
def _search(
    importance, at, step, largest, pull, table, PART: tl.constexpr, WIDTH: tl.constexpr, EVEN: tl.constexpr,
    COUNT: tl.constexpr, VECTORS: tl.constexpr, POINTS: tl.constexpr,
):  # fmt: skip
    """Score and index of the cheapest point for a part of vectors whose weights are alike; and for each flipped sign, [V, 8].

    Of  w . g^2 - 2 pull . g  the first term is one for all rows; a flip adds  4 pull_j g_j.
    """
    best, index = tl.full((VECTORS,), float("inf"), tl.float32), tl.zeros((VECTORS,), tl.int32)
    flipped, other = tl.full((VECTORS, 8), float("inf"), tl.float32), tl.zeros((VECTORS, 8), tl.int32)
    column = tl.arange(0, 8)
    for start in range(0, COUNT, POINTS):
        point = start + tl.arange(0, POINTS)
        base = tl.zeros((POINTS,), tl.float32)
        for d in tl.static_range(WIDTH):
            base += tl.load(importance + (at + PART * WIDTH + d) * step) / largest * tl.load(table + d * COUNT + point)
        score = tl.zeros((VECTORS, POINTS), tl.float32) + base[None, :]
        for d in tl.static_range(WIDTH):
            own = _column(pull, column, PART * WIDTH + d) * -2.0
            score += own[:, None] * tl.load(table + (WIDTH + d) * COUNT + point)[None, :]
        least = tl.min(score, 1)
        first = tl.min(tl.where(score == least[:, None], point[None, :], COUNT), 1)
        index, best = tl.where(least < best, first, index), tl.minimum(least, best)
        if EVEN:
            for d in range(WIDTH):
                own = _column(pull, column, PART * WIDTH + d) * 4.0
                cost = score + own[:, None] * tl.load(table + (WIDTH + d) * COUNT + point)[None, :]
                least = tl.min(cost, 1)
                first = tl.min(tl.where(cost == least[:, None], point[None, :], COUNT), 1)
                taken = (column == PART * WIDTH + d)[None, :] & (least[:, None] < flipped)
                other, flipped = tl.where(taken, first[:, None], other), tl.where(taken, least[:, None], flipped)
    return best, index, flipped, other


@triton.jit
def _vector(
    x, scale, importance, at, step, table, far, PARTS: tl.constexpr, WIDTH: tl.constexpr, EVEN: tl.constexpr,
    COUNT: tl.constexpr, BITS: tl.constexpr, VECTORS: tl.constexpr, POINTS: tl.constexpr,
):  # fmt: skip
    """Codes [V] and values [V, 8] of vectors x [V, 8] with the importance of inputs ``at`` to ``at + 7``."""
    column = tl.arange(0, 8)
    inverse = tl.where(scale > 0, tl.div_rn(1.0, tl.where(scale > 0, scale, 1.0)), 0.0)
    t = x * inverse[:, None]
    largest = tl.maximum(tl.max(tl.load(importance + (at + column) * step), 0), 1e-30)
    own = tl.load(importance + (at + column) * step) / largest
    pull = own[None, :] * tl.minimum(tl.abs(t), far)
    minus = (t < 0).to(tl.int32)
    signs, odd = tl.sum(minus << column[None, :], 1), tl.sum(minus, 1) & 1
    best, index, flipped, others = _search(importance, at, step, largest, pull, table, 0, WIDTH, EVEN, COUNT, VECTORS, POINTS)
    flipped -= best[:, None]
    second = index
    if PARTS == 2:
        best, second, more, points = _search(importance, at, step, largest, pull, table, 1, WIDTH, EVEN, COUNT, VECTORS, POINTS)
        behind = (column >= WIDTH)[None, :]
        flipped, others = tl.where(behind, more - best[:, None], flipped), tl.where(behind, points, others)
    if EVEN:
        least = tl.min(flipped, 1)
        place = tl.min(tl.where(flipped == least[:, None], column[None, :], 7), 1)
        chosen = tl.sum(tl.where(column[None, :] == place[:, None], others, 0), 1)
        signs = tl.where(odd == 1, signs ^ (1 << place), signs)
        index = tl.where((odd == 1) & (place < WIDTH), chosen, index)
        second = tl.where((odd == 1) & (place >= WIDTH), chosen, second)
    code = signs | (index << 8)
    point = tl.broadcast_to(index[:, None], (VECTORS, 8))
    if PARTS == 2:
        code |= second << (8 + BITS)
        point = tl.where((column < WIDTH)[None, :], index[:, None], second[:, None])
    unit = tl.load(table + (WIDTH + column % WIDTH)[None, :] * COUNT + point)
    unit = tl.where(((signs[:, None] >> column[None, :]) & 1) == 1, -unit, unit)
    return code, scale[:, None] * unit


@triton.jit
def _eight(tile, v, VECTORS: tl.constexpr, COUNT: tl.constexpr):
    """[V, 8 * COUNT] -> [V, 8]: the inputs of vector v."""
    own = (tl.arange(0, COUNT) == v)[None, :, None]
    return tl.sum(tl.where(own, tl.reshape(tile, (VECTORS, COUNT, 8)), 0.0), 1)


@triton.jit
def _with_eight(tile, v, own, VECTORS: tl.constexpr, COUNT: tl.constexpr):
    """The tile [V, 8 * COUNT] with ``own`` [V, 8] for vector v."""
    place = (tl.arange(0, COUNT) == v)[None, :, None]
    return tl.reshape(tl.where(place, own[:, None, :], tl.reshape(tile, (VECTORS, COUNT, 8))), (VECTORS, COUNT * 8))


@triton.jit(do_not_specialize_on_alignment=ANYWHERE)
def _sweep_kernel(
    block, values, errors, codes, scales, importance, factor, table, outputs, far, block_step, value_step, code_step,
    scale_step, importance_step, importance_column, factor_step, factor_row, factor_column, PARTS: tl.constexpr,
    WIDTH: tl.constexpr, EVEN: tl.constexpr, COUNT: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr,
    VECTORS: tl.constexpr, POINTS: tl.constexpr,
):  # fmt: skip
    """The vectors of one group in turn, for VECTORS outputs of one expert."""
    expert = tl.program_id(1).to(tl.int64)
    output = tl.program_id(0) * VECTORS + tl.arange(0, VECTORS)
    inside = (output < outputs)[:, None]
    row = expert * outputs + output
    k, column = tl.arange(0, GROUP), tl.arange(0, 8)
    x = tl.load(block + expert * block_step + k[None, :] * outputs + output[:, None], mask=inside, other=0.0)
    scale = tl.load(scales + row * scale_step, mask=output < outputs, other=0.0)
    importance += expert * importance_step
    factor += expert * factor_step
    for v in range(GROUP // 8):
        own = _eight(x, v, VECTORS, GROUP // 8)
        code, value = _vector(
            own, scale, importance, v * 8, importance_column, table, far, PARTS, WIDTH, EVEN, COUNT, BITS, VECTORS, POINTS
        )
        difference = own - value
        error = tl.zeros((VECTORS, 8), tl.float32)
        for j in range(8):
            at = factor + (v * 8 + j) * factor_row
            move = _column(difference, column, j) / tl.load(at + (v * 8 + j) * factor_column)
            ahead = tl.load(at + (v * 8 + column) * factor_column, mask=column > j, other=0.0)
            difference -= move[:, None] * ahead[None, :]
            behind = tl.load(at + k * factor_column, mask=k >= v * 8 + 8, other=0.0)
            x -= move[:, None] * behind[None, :]
            error = tl.where((column == j)[None, :], move[:, None], error)
        to = expert * value_step + (v * 8 + column)[None, :] * outputs + output[:, None]
        tl.store(values + to, value, mask=inside)
        tl.store(errors + to, error, mask=inside)
        tl.store(codes + row * code_step + v, code, mask=output < outputs)


@triton.jit(do_not_specialize_on_alignment=ANYWHERE)
def _descent_kernel(
    values, residuals, codes, moves, d_half, levels, metric, inverses, table, outputs, far, unit_step, value_step,
    residual_step, code_step, level_step, metric_step, metric_row, metric_column, inverse_step, least, most,
    PARTS: tl.constexpr, WIDTH: tl.constexpr, EVEN: tl.constexpr, COUNT: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr,
    VECTORS: tl.constexpr, POINTS: tl.constexpr,
):  # fmt: skip
    """Block.improve for one group: its level one up or down, then its codes, sought around two optima of every vector."""
    expert = tl.program_id(1).to(tl.int64)
    output = tl.program_id(0) * VECTORS + tl.arange(0, VECTORS)
    real = output < outputs
    row = expert * outputs + output
    k, column, vector = tl.arange(0, GROUP), tl.arange(0, 8), tl.arange(0, GROUP // 8)
    at, inside = k[None, :] * outputs + output[:, None], real[:, None]
    value = tl.load(values + expert * value_step + at, mask=inside, other=0.0)
    residual = tl.load(residuals + expert * residual_step + at, mask=inside, other=0.0)
    code = tl.load(codes + row[:, None] * code_step + vector[None, :], mask=inside, other=0)
    d, level = tl.load(d_half + row, mask=real, other=0.0), tl.load(levels + row * level_step, mask=real, other=0)
    metric += expert * metric_step
    inverses += expert * inverse_step
    across = metric_row + metric_column
    diagonal = tl.load(metric + k * across)
    before = value
    for turn in range(2):
        near = tl.minimum(tl.maximum(level + 1 - 2 * turn, least), most)
        scale = d * (unit_step * (2 * near + 1).to(tl.float32))
        target = value + residual / diagonal[None, :]
        trial, numbers = value, code
        for v in range(GROUP // 8):
            number, new = _vector(
                _eight(target, v, VECTORS, GROUP // 8), scale, metric, v * 8, across, table, far, PARTS, WIDTH, EVEN, COUNT,
                BITS, VECTORS, POINTS,
            )  # fmt: skip
            trial = _with_eight(trial, v, new, VECTORS, GROUP // 8)
            numbers = tl.where((vector == v)[None, :], number[:, None], numbers)
        change = trial - value
        image = tl.zeros((VECTORS, GROUP), tl.float32)
        for j in range(GROUP):
            image += _column(change, k, j)[:, None] * tl.load(metric + k * metric_row + j * metric_column)[None, :]
        better = tl.sum(change * (image - 2.0 * residual), 1) < 0
        value, residual = tl.where(better[:, None], trial, value), residual - tl.where(better[:, None], image, 0.0)
        code, level = tl.where(better[:, None], numbers, code), tl.where(better, near, level)
    scale = d * (unit_step * (2 * level + 1).to(tl.float32))
    for v in range(GROUP // 8):
        own_metric = metric + v * 8 * across
        for together in range(2):
            old, pull = _eight(value, v, VECTORS, GROUP // 8), _eight(residual, v, VECTORS, GROUP // 8)
            step = pull / tl.load(own_metric + column * across)[None, :]
            if together == 1:
                step = tl.zeros((VECTORS, 8), tl.float32)
                for j in range(8):
                    step += _column(pull, column, j)[:, None] * tl.load(inverses + v * 64 + column * 8 + j)[None, :]
            number, new = _vector(
                old + step, scale, metric, v * 8, across, table, far, PARTS, WIDTH, EVEN, COUNT, BITS, VECTORS, POINTS
            )
            change = new - old
            gain = pull * -2.0
            for j in range(8):
                gain += (
                    _column(change, column, j)[:, None] * tl.load(own_metric + column * metric_row + j * metric_column)[None, :]
                )
            better = tl.sum(change * gain, 1) < 0
            change = tl.where(better[:, None], change, 0.0)
            for j in range(8):
                ahead = tl.load(metric + k * metric_row + (v * 8 + j) * metric_column, mask=k >= v * 8, other=0.0)
                residual -= _column(change, column, j)[:, None] * ahead[None, :]
            value = _with_eight(value, v, tl.where(better[:, None], new, old), VECTORS, GROUP // 8)
            code = tl.where((vector == v)[None, :] & better[:, None], number[:, None], code)
    tl.store(values + expert * value_step + at, value, mask=inside)
    tl.store(moves + expert * GROUP * outputs + at, value - before, mask=inside)
    tl.store(codes + row[:, None] * code_step + vector[None, :], code, mask=inside)
    tl.store(levels + row * level_step, level, mask=real)


def nearest(scaled: Tensor, own: Tensor, pull: Tensor, points: Points) -> Tensor:
    """Codes int32 [M] of vectors [M, 8]: weights over their scale, importance, and that times the size."""
    codes = torch.empty(len(scaled), dtype=torch.int32, device=scaled.device)
    if len(codes):
        _nearest_kernel[(triton.cdiv(len(codes), VECTORS),)](
            scaled, own, pull, points.table, codes, len(codes), **points.constants(VECTORS, POINTS, WARPS)
        )
    return codes


def scores(features: Tensor, tables: Tensor) -> Tensor:
    """The least of ``features @ table`` for every table: [M, D], [K, D, P] -> [K, M]."""
    features = features.contiguous()
    out = features.new_empty(len(tables), len(features))
    if out.numel():
        _scores_kernel[(triton.cdiv(len(features), VECTORS), len(tables))](
            features, tables, out, len(features), WIDTH=features.shape[1] // 2, COUNT=tables.shape[2], VECTORS=VECTORS,
            POINTS=min(POINTS, tables.shape[2]), num_warps=WARPS,
        )  # fmt: skip
    return out


def sweep_group(
    block: Tensor, values: Tensor, errors: Tensor, codes: Tensor, scale: Tensor, factor: Tensor, importance: Tensor,
    points: Points,
) -> None:  # fmt: skip
    """Code a group ``block`` [E, S, O] vector by vector: see Codec.sweep_group."""
    experts, size, outputs = block.shape
    _sweep_kernel[(triton.cdiv(outputs, GROUP_ROWS), experts)](
        block, values, errors, codes, scale, importance, factor, points.table, outputs, points.far, block.stride(0),
        values.stride(0), codes.stride(0), scale.stride(0), *importance.stride(), *factor.stride(), GROUP=size,
        **points.constants(GROUP_ROWS, GROUP_POINTS, GROUP_WARPS),
    )  # fmt: skip


def improve_group(
    values: Tensor, residual: Tensor, codes: Tensor, metric: Tensor, inverses: Tensor, d: Tensor, level: Tensor,
    limits: tuple[float, int, int], points: Points,
) -> Tensor:  # fmt: skip
    """A better level and codes for a group [E, S, O]; returns the change of its values: see Codec.improve_group.

    d, level [R]; ``limits``: a scale is the first times d (2 level + 1), a level between the other two."""
    experts, size, outputs = values.shape
    inverses, (step, *levels) = inverses.contiguous(), limits
    moved = torch.empty(experts, size, outputs, dtype=values.dtype, device=values.device)
    _descent_kernel[(triton.cdiv(outputs, GROUP_ROWS), experts)](
        values, residual, codes, moved, d, level, metric, inverses, points.table, outputs, points.far, step, values.stride(0),
        residual.stride(0), codes.stride(0), level.stride(0), *metric.stride(), inverses.stride(0), *levels, GROUP=size,
        **points.constants(GROUP_ROWS, GROUP_POINTS, GROUP_WARPS),
    )  # fmt: skip
    return moved
