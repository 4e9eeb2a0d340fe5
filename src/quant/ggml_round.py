"""Error feedback into the block types of ggml: GPTQ/LDLQ for every codec, batched over the experts of a layer.

Not a command. `ldlq(weight [E, O, I], "iq3_xxs", hessian [E, I, I])` returns the bytes of all rows. Letters: E experts, O outputs,
I inputs, B inputs of a block, V of a vector, R = E * O rows; H is the second moment of the inputs, and a row w rounded to v has
the output error  (w - v) H (w - v)^T, which depends on no other row.

    sweep     vectors are coded in turn; inputs behind them take up their error (Frantar et al. 2023, arXiv 2210.17323; with
              vectors: Tseng et al. 2024, arXiv 2402.04396). The scales of a block are fitted when the sweep reaches it, on
              the weights that carry the errors so far, and tried at several sizes: the loss of each is known exactly.
    rescale   the scale of a block by least squares under H, codes fixed
    descend   each vector in turn takes better codes, all others fixed (QuantEase, arXiv 2309.01885)
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from console import UserError
from ggml_types import Codec, Scales, balanced, codec, decode_rows, encode, row_bytes
from rounding import inverse_factor

FACTORS = (1.0,)  # sizes of the fitted scales that a sweep tries


class Rounded(NamedTuple):
    """``values`` [E, I, O], ``codes`` [R, I/V], and the scales of each block of inputs, for R = E * O rows."""

    values: Tensor
    codes: Tensor
    scales: list[Scales]


def rows_of(columns: Tensor) -> Tensor:
    """[E, V, O] -> [E * O, V]."""
    return columns.transpose(1, 2).reshape(-1, columns.shape[1])


def columns_of(rows: Tensor, experts: int) -> Tensor:
    """[E * O, V] -> [E, V, O]."""
    return rows.view(experts, -1, rows.shape[1]).transpose(1, 2)


def per_row(values: Tensor, outputs: int) -> Tensor:
    """[E, V], the same for every output -> [E * O, V]."""
    return values[:, None].expand(-1, outputs, -1).reshape(-1, values.shape[1])


def row_errors(wt: Tensor, values: Tensor, hessian: Tensor) -> Tensor:
    """(w - v) H (w - v)^T of every row, [E, O]; weights and values [E, I, O]."""
    difference = wt - values
    return (torch.bmm(hessian, difference) * difference).sum(1)


def spans(length: int, size: int) -> list[slice]:
    return [slice(start, start + size) for start in range(0, length, size)]


# ---------------------------------------------------------------- sweep


def vector_importance(factor: Tensor, vector: int) -> Tensor:
    """[E, I]: how much an error of each input costs while the other inputs of its vector stay and later ones make up for it.

    H^-1 = U^T U; the loss of an error d of a vector is  d (U_vv^T U_vv)^-1 d^T  and this is the diagonal of that matrix.
    """
    experts, inputs, _ = factor.shape
    own = torch.stack([factor[:, part, part] for part in spans(inputs, vector)], 1)
    solved = torch.linalg.solve_triangular(own, torch.eye(vector, dtype=own.dtype, device=own.device).expand_as(own), upper=True)
    return solved.square().sum(-1).reshape(experts, inputs)


def sweep_block(block: Tensor, scales: Scales, factor: Tensor, importance: Tensor, kind: Codec) -> tuple[Tensor, Tensor, Tensor]:
    """Code a block of inputs ``block`` [E, B, O], which it changes. Returns codes [R, B/V], values and errors [E, B, O].

    ``factor`` [E, B, B] is the block of U, ``importance`` [E, B]. The sum of squares of the errors is the loss of the block.
    """
    experts, size, outputs = block.shape
    group, vector = kind.type.group, kind.type.vector
    values, errors = torch.empty_like(block), torch.empty_like(block)
    codes = torch.empty(experts * outputs, size // vector, dtype=torch.int32, device=block.device)
    for index, outer in enumerate(spans(size, group)):
        scale, offset = scales.scale[:, index, None], scales.offset[:, index, None]
        for start in range(outer.start, outer.stop, vector):
            part, rest = slice(start, start + vector), slice(start + vector, outer.stop)
            x = block[:, part]
            code, value = kind.nearest(rows_of(x), scale, offset, per_row(importance[:, part], outputs))
            codes[:, start // vector : start // vector + code.shape[1]] = code
            values[:, part] = columns_of(value, experts)
            errors[:, part] = forward_error(factor[:, part, part], x - values[:, part])
            block[:, rest].baddbmm_(factor[:, part, rest].transpose(1, 2), errors[:, part], alpha=-1)
        behind = slice(outer.stop, size)
        block[:, behind].baddbmm_(factor[:, outer, behind].transpose(1, 2), errors[:, outer], alpha=-1)
    return codes, values, errors


def forward_error(own: Tensor, difference: Tensor) -> Tensor:
    """The e of  U_vv^T e = d  for vectors d [E, V, O]: what inputs behind the vector are moved by."""
    if own.shape[-1] == 1:
        return difference / own
    return torch.linalg.solve_triangular(own.transpose(1, 2), difference, upper=False)


def sweep(wt: Tensor, factor: Tensor, kind: Codec, factors: tuple[float, ...] = FACTORS) -> Rounded:
    """Round ``wt`` [E, I, O] with error feedback along the inputs; ``factor`` is U of :func:`rounding.inverse_factor`."""
    experts, inputs, outputs = wt.shape
    importance = vector_importance(factor, kind.type.vector)
    work = wt.clone()
    values, codes, scales = torch.empty_like(wt), [], []
    for part in spans(inputs, kind.type.block):
        own = rows_of(work[:, part])
        fitted = kind.fit(own, balanced(per_row(importance[:, part], outputs)))
        best = None
        for size in factors:
            trial = fitted if size == 1 else kind.rescaled(fitted, torch.full_like(own[:, 0], size))
            found = sweep_block(work[:, part].clone(), trial, factor[:, part, part], importance[:, part], kind)
            best = better_block(best, (*found, trial))
        code, values[:, part], errors, scale = best
        codes.append(code)
        scales.append(scale)
        work[:, part.stop :].baddbmm_(factor[:, part, part.stop :].transpose(1, 2), errors, alpha=-1)
    return Rounded(values, torch.cat(codes, 1), scales)


def better_block(old: tuple | None, new: tuple) -> tuple:
    """Of two (codes, values, errors, scales) of a block, row by row the one of smaller loss."""
    if old is None:
        return new
    better = new[2].square().sum(1) < old[2].square().sum(1)  # [E, O]
    row = better.reshape(-1, 1)
    codes = torch.where(row, new[0], old[0])
    values, errors = (torch.where(better[:, None], n, o) for n, o in zip(new[1:3], old[1:3]))
    return codes, values, errors, pick_scales(row, new[3], old[3])


def pick_scales(row: Tensor, new: Scales, old: Scales) -> Scales:
    """``new`` in the rows [R, 1] that are set, else ``old``."""

    def pick(a: Tensor, b: Tensor) -> Tensor:
        return torch.where(row.view(-1, *[1] * (a.ndim - 1)), a, b)

    raw = tuple(pick(a, b) for a, b in zip(new.raw, old.raw))
    return Scales(pick(new.scale, old.scale), pick(new.offset, old.offset), raw)


# ---------------------------------------------------------------- passes


def block_values(codes: Tensor, scales: Scales, kind: Codec) -> Tensor:
    """The values [R, B] of a block, as decoded."""
    units = kind.units(codes).view(len(codes), -1, kind.type.group)
    return (units * scales.scale[..., None] - scales.offset[..., None]).view(len(codes), -1)


def rescale_block(
    values: Tensor, codes: Tensor, scales: Scales, residual: Tensor, own: Tensor, kind: Codec
) -> tuple[Tensor, Scales, Tensor]:
    """The scale of a block of least error for fixed codes; rows that would not gain keep theirs.

    values, residual [E, B, O] with residual = H (w - v) on the block, ``own`` [E, B, B] of H. Returns all three anew.
    """
    experts = len(values)
    image = torch.bmm(own, values)
    factor = 1 + (values * residual).sum(1) / (values * image).sum(1).clamp_min(1e-30)
    trial = kind.rescaled(scales, factor.reshape(-1))
    delta = columns_of(block_values(codes, trial, kind), experts) - values
    step = torch.bmm(own, delta)
    better = (delta * (step - 2 * residual)).sum(1) < 0
    kept = better[:, None]
    return values + delta * kept, pick_scales(better.reshape(-1, 1), trial, scales), residual - step * kept


def descend_block(
    values: Tensor, codes: Tensor, scales: Scales, residual: Tensor, own: Tensor, kind: Codec
) -> None:
    """Coordinate descent over the vectors of a block, in place: values, residual [E, B, O], codes [R, B/V]."""
    experts, size, outputs = values.shape
    group, vector = kind.type.group, kind.type.vector
    diagonal = own.diagonal(dim1=1, dim2=2)
    for index, outer in enumerate(spans(size, group)):
        scale, offset = scales.scale[:, index, None], scales.offset[:, index, None]
        before = values[:, outer].clone()
        for start in range(outer.start, outer.stop, vector):
            part, rest = slice(start, start + vector), slice(start + vector, outer.stop)
            old, pull, metric = values[:, part], residual[:, part], own[:, part, part]
            target = old + pull / diagonal[:, part, None]
            code, value = kind.nearest(rows_of(target), scale, offset, per_row(diagonal[:, part], outputs))
            delta = columns_of(value, experts) - old
            better = (delta * (torch.bmm(metric, delta) - 2 * pull)).sum(1, keepdim=True) < 0  # [E, 1, O]
            delta = torch.where(better, delta, 0.0)
            values[:, part] = torch.where(better, columns_of(value, experts), old)
            place = slice(start // vector, start // vector + code.shape[1])
            codes[:, place] = torch.where(better.view(-1, 1), code, codes[:, place])
            residual[:, rest].baddbmm_(own[:, rest, part], delta, alpha=-1)
        behind = slice(outer.stop, size)
        residual[:, behind].baddbmm_(own[:, behind, outer], values[:, outer] - before, alpha=-1)


def improve(wt: Tensor, state: Rounded, hessian: Tensor, kind: Codec) -> Rounded:
    """One pass of rescale and descend over all blocks; no row's error rises (but for float32 rounding)."""
    values, codes, scales = state.values.clone(), state.codes.clone(), list(state.scales)
    vectors = kind.type.block // kind.type.vector
    for index, part in enumerate(spans(wt.shape[1], kind.type.block)):
        own, code = hessian[:, part, part], codes[:, index * vectors : (index + 1) * vectors]
        residual = torch.bmm(hessian[:, part], wt - values)
        block, scales[index], residual = rescale_block(values[:, part], code, scales[index], residual, own, kind)
        descend_block(block, code, scales[index], residual, own, kind)
        values[:, part] = block
    return Rounded(values, codes, scales)


def packed(state: Rounded, kind: Codec) -> Tensor:
    """uint8 [R, row bytes]."""
    codes = state.codes.chunk(len(state.scales), 1)
    return torch.cat([kind.pack(scales, code) for scales, code in zip(state.scales, codes)], 1)
