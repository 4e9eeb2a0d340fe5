"""Error feedback into the block types of ggml: GPTQ/LDLQ for every codec, batched over the experts of a layer.

Not a command. `ldlq(weight [E, O, I], "iq3_xxs", hessian [E, I, I])` returns the bytes of all rows. Letters: E experts,
O outputs, I inputs, B inputs of a block, V of a vector, R = E * O rows; H is the second moment of the inputs, and a row w
rounded to v has the output error  (w - v) H (w - v)^T, which depends on no other row.

    sweep     vectors are coded in turn; inputs behind them take up their error (Frantar et al. 2023, arXiv 2210.17323; with
              vectors: Tseng et al. 2024, arXiv 2402.04396). The scales of a block are fitted when the sweep reaches it, on
              the weights that carry the errors so far, and tried at several sizes: the loss of each is known exactly.
    descend   block by block: its scale by least squares, the integers of its groups one up or down, and each vector in turn
              takes better codes, all others fixed (QuantEase, arXiv 2309.01885)
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from console import UserError
from ggml_codecs import balanced, codec, decode_rows, encode, fit_blocks
from ggml_types import Codec, Scales, row_bytes
from moe_ptq import WORKING_BYTES, damped, diagonals, inverse_factor, rounding_parts

SIZES = (1.0, 0.94, 1.06)  # of the fitted scales, that a sweep tries
PLAIN_SWEEP = ("q8_0",)  # types so fine that a sweep alone leaves no error worth the descents, which take ten times as long
COPIES = 12  # of the weights, as float32, that are at work together


class Rounded(NamedTuple):
    """``values`` [E, I, O], ``codes`` [R, I/V], and the scales of each block of inputs, for R = E * O rows."""

    values: Tensor
    codes: Tensor
    scales: list[Scales]


def rows_of(columns: Tensor) -> Tensor:
    """[E, V, O] -> [E * O, V]."""
    return columns.transpose(1, 2).contiguous().view(-1, columns.shape[1])


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
    identity = torch.eye(vector, dtype=own.dtype, device=own.device).expand_as(own)
    solved = torch.linalg.solve_triangular(own, identity, upper=True)
    return solved.square().sum(-1).reshape(experts, inputs)


def sweep_block(
    block: Tensor, scales: Scales, factor: Tensor, importance: Tensor, kind: Codec
) -> tuple[Tensor, Tensor, Tensor]:
    """Code a block of inputs ``block`` [E, B, O], which it changes. Returns codes [R, B/V], values and errors [E, B, O].

    ``factor`` [E, B, B] is the block of U, ``importance`` [E, B]. The sum of squares of the errors is the loss of the block.
    """
    experts, size, outputs = block.shape
    group, vector = kind.type.group, kind.type.vector
    values, errors = torch.empty_like(block), torch.empty_like(block)
    codes = torch.empty(experts * outputs, size // vector, dtype=torch.int32, device=block.device)
    for index, outer in enumerate(spans(size, group)):
        own = (
            block[:, outer], values[:, outer], errors[:, outer], codes[:, outer.start // vector : outer.stop // vector],
            scales.scale[:, index, None], scales.offset[:, index, None], factor[:, outer, outer], importance[:, outer],
        )  # fmt: skip
        if not kind.sweep_group(*own):
            sweep_group(*own, kind)
        behind = slice(outer.stop, size)
        block[:, behind].baddbmm_(factor[:, outer, behind].transpose(1, 2), errors[:, outer], alpha=-1)
    return codes, values, errors


def sweep_group(
    block: Tensor, values: Tensor, errors: Tensor, codes: Tensor, scale: Tensor, offset: Tensor, factor: Tensor,
    importance: Tensor, kind: Codec,
) -> None:  # fmt: skip
    """Code the inputs of one group ``block`` [E, S, O], which it changes, vector by vector: fills ``values`` and ``errors``
    [E, S, O] and ``codes`` [R, S/V]. scale, offset [R, 1]."""
    experts, size, outputs = block.shape
    vector = kind.type.vector
    for index, part in enumerate(spans(size, vector)):
        rest = slice(part.stop, size)
        x = block[:, part]
        code, value = kind.nearest(rows_of(x), scale, offset, per_row(importance[:, part], outputs))
        codes[:, index : index + code.shape[1]] = code
        values[:, part] = columns_of(value, experts)
        errors[:, part] = forward_error(factor[:, part, part], x - values[:, part])
        block[:, rest].baddbmm_(factor[:, part, rest].transpose(1, 2), errors[:, part], alpha=-1)


def forward_error(own: Tensor, difference: Tensor) -> Tensor:
    """The e of  U_vv^T e = d  for vectors d [E, V, O]: what inputs behind the vector are moved by."""
    if own.shape[-1] == 1:
        return difference / own
    return torch.linalg.solve_triangular(own.transpose(1, 2), difference, upper=False)


def sweep(wt: Tensor, factor: Tensor, kind: Codec, passes: int, sizes: tuple[float, ...] = SIZES) -> Rounded:
    """Round ``wt`` [E, I, O] with error feedback along the inputs; ``factor`` is U of :func:`moe_ptq.inverse_factor`.

    A block is improved ``passes`` times before its errors go on, under the metric of its loss, (U_bb^T U_bb)^-1.
    """
    outputs = wt.shape[2]
    importance = vector_importance(factor, kind.type.vector)
    work = wt.clone()
    values, codes, scales = torch.empty_like(wt), [], []
    for part in spans(wt.shape[1], kind.type.block):
        x, own = work[:, part], factor[:, part, part]
        fitted = fit_blocks(kind, rows_of(x), balanced(per_row(importance[:, part], outputs)))
        trials = (fitted if size == 1 else kind.rescaled(fitted, torch.full_like(x[:, 0], size).view(-1)) for size in sizes)
        found = ((*sweep_block(x.clone(), trial, own, importance[:, part], kind), trial) for trial in trials)
        code, values[:, part], errors, scale = functools.reduce(functools.partial(better_block, kind), found)
        if passes:
            metric = torch.cholesky_inverse(own, upper=True)
            for _ in range(passes):
                block = Block(values[:, part], code, scale, torch.bmm(metric, x - values[:, part]), metric, kind)
                block.improve()
                values[:, part], code, scale = block.values, block.codes, block.scales
            errors = forward_error(own, x - values[:, part])
        codes.append(code)
        scales.append(scale)
        work[:, part.stop :].baddbmm_(factor[:, part, part.stop :].transpose(1, 2), errors, alpha=-1)
    return Rounded(values, torch.cat(codes, 1), scales)


def better_block(kind: Codec, old: tuple, new: tuple) -> tuple:
    """Of two (codes, values, errors, scales) of a block, row by row the one of smaller loss."""
    better = new[2].square().sum(1) < old[2].square().sum(1)  # [E, O]
    row = better.reshape(-1, 1)
    values, errors = (torch.where(better[:, None], n, o) for n, o in zip(new[1:3], old[1:3]))
    return torch.where(row, new[0], old[0]), values, errors, pick_scales(row, new[3], old[3], kind)


def pick_scales(row: Tensor, new: Scales, old: Scales, kind: Codec) -> Scales:
    """``new`` in the rows [R, 1] that are set, else ``old``."""
    return kind.scales_of(*(torch.where(row if a.ndim > 1 else row[:, 0], a, b) for a, b in zip(new.raw, old.raw)))


# ---------------------------------------------------------------- descent


class Block:
    """One block of inputs of every row under a quadratic form, while the other blocks are fixed or will make up for it.

    values, residual [E, B, O] with residual = metric (target - values); codes [R, B/V]; metric [E, B, B]. A change of the
    values changes the form by  change metric change - 2 change residual,  and is made in the rows where that is negative.
    """

    def __init__(self, values: Tensor, codes: Tensor, scales: Scales, residual: Tensor, metric: Tensor, kind: Codec):
        self.values, self.codes, self.scales = values.clone(), codes.clone(), scales
        self.residual, self.metric, self.kind = residual, metric, kind
        self.vector, self.vectors = kind.type.vector, spans(values.shape[1], kind.type.vector)
        self.diagonal = metric.diagonal(dim1=1, dim2=2)
        self.inverses = None
        if self.vector > 1:  # inv_ex: without the wait of inv for a GPU's word that no matrix is singular
            self.inverses = torch.linalg.inv_ex(torch.stack([metric[:, v, v] for v in self.vectors], 1)).inverse

    def improve(self) -> None:
        """The scale of the block, then group by group its integers and the codes of its vectors. Once: it leaves the residual
        of the groups behind it as it was."""
        self.rescale()
        raw = tuple(part.clone() for part in self.scales.raw)
        for index, group in enumerate(spans(self.values.shape[1], self.kind.type.group)):
            inverses = None if self.inverses is None else self.inverses[:, self.places(group)]
            own = (self.values[:, group], self.residual[:, group], self.codes[:, self.places(group)])
            moved = self.kind.improve_group(*own, self.metric[:, group, group], inverses, raw, index)
            if moved is None:
                moved = self.improve_group(raw, index, group)
            self.residual[:, group.stop :].baddbmm_(self.metric[:, group.stop :, group], moved, alpha=-1)
        self.scales = self.kind.scales_of(*raw)

    def improve_group(self, raw: tuple[Tensor, ...], index: int, group: slice) -> Tensor:
        """The integers of one group, then the codes of its vectors; the change of its values."""
        before = self.values[:, group].clone()
        for place in self.kind.integers:
            for step in (1, -1):
                self.step_integer(raw, index, group, place, step)
        own = self.kind.scales_of(*one_group(raw, index))
        for vector in self.vectors[self.places(group)]:
            self.recode(vector, group, own)
        return self.values[:, group] - before

    def places(self, part: slice) -> slice:
        """The vectors of the inputs ``part``."""
        return slice(part.start // self.vector, part.stop // self.vector)

    def accept(self, part: slice, value: Tensor) -> tuple[Tensor, Tensor]:
        """Move the inputs ``part`` to ``value`` [E, P, O] where that lowers the form: which rows [E, 1, O], and the change."""
        change = value - self.values[:, part]
        gain = torch.bmm(self.metric[:, part, part], change).sub_(self.residual[:, part], alpha=2)
        better = (change * gain).sum(1, keepdim=True) < 0
        change = torch.where(better, change, 0.0)
        self.values[:, part] = torch.where(better, value, self.values[:, part])
        return better, change

    def rescale(self) -> None:
        """The scale of least error for fixed codes, rounded to what the format stores."""
        image = torch.bmm(self.metric, self.values)
        factor = 1 + (self.values * self.residual).sum(1) / (self.values * image).sum(1).clamp_min(1e-30)
        trial = self.kind.rescaled(self.scales, factor.reshape(-1))
        values = self.kind.block_values(self.codes, trial)
        better, change = self.accept(slice(None), columns_of(values, len(self.values)))
        self.scales = pick_scales(better.view(-1, 1), trial, self.scales, self.kind)
        self.residual = self.residual.baddbmm(self.metric, change, alpha=-1)

    def step_integer(self, raw: tuple[Tensor, ...], index: int, group: slice, place: int, step: int) -> None:
        """Move the integer ``raw[place]`` of a group by ``step``, with codes for it, where that lowers the form."""
        own = list(one_group(raw, index))
        own[place] = (own[place] + step).clamp(*self.kind.integers[place])
        target = self.values[:, group] + self.residual[:, group] / self.diagonal[:, group, None]
        row = self.take_nearest(target, group, group, self.kind.scales_of(*own))
        raw[place][:, index] = torch.where(row, own[place], raw[place][:, index, None])[:, 0]

    def recode(self, part: slice, group: slice, scales: Scales) -> None:
        """Better codes for one vector, sought around the optimum of each input alone and around that of all together."""
        inner = slice(part.start, group.stop)
        for together in (False, True) if self.vector > 1 else (False,):
            pull = self.residual[:, part]
            if together:
                step = torch.bmm(self.inverses[:, part.start // self.vector], pull)
            else:
                step = pull / self.diagonal[:, part, None]
            self.take_nearest(self.values[:, part] + step, part, inner, scales)

    def take_nearest(self, target: Tensor, part: slice, inner: slice, scales: Scales) -> Tensor:
        """Move the inputs ``part`` near ``target`` [E, P, O], for the scales of their group, where that lowers the form; the
        residual of the inputs ``inner`` follows. Which rows, [R, 1]."""
        importance = per_row(self.diagonal[:, part], target.shape[2])
        code, value = self.kind.nearest(rows_of(target), scales.scale, scales.offset, importance)
        better, change = self.accept(part, columns_of(value, len(target)))
        self.residual[:, inner].baddbmm_(self.metric[:, inner, part], change, alpha=-1)
        row, codes = better.view(-1, 1), self.codes[:, self.places(part)]
        codes.copy_(torch.where(row, code, codes))
        return row


def one_group(raw: tuple[Tensor, ...], index: int) -> tuple[Tensor, ...]:
    """The stored fields of one group of every block."""
    return tuple(part[:, index, None] if part.ndim > 1 else part for part in raw)


def descend(wt: Tensor, state: Rounded, hessian: Tensor, kind: Codec) -> Rounded:
    """Improve every block in turn while the others are fixed; no row's error rises, but for float32 rounding."""
    values, codes, scales = state.values.clone(), state.codes.chunk(len(state.scales), 1), []
    found = []
    for index, part in enumerate(spans(wt.shape[1], kind.type.block)):
        residual = torch.bmm(hessian[:, part], wt - values)
        block = Block(values[:, part], codes[index], state.scales[index], residual, hessian[:, part, part], kind)
        block.improve()
        values[:, part] = block.values
        found.append(block.codes)
        scales.append(block.scales)
    return Rounded(values, torch.cat(found, 1), scales)


def packed(state: Rounded, kind: Codec) -> Tensor:
    """uint8 [R, row bytes]."""
    codes = state.codes.chunk(len(state.scales), 1)
    return torch.cat([kind.pack(scales, code) for scales, code in zip(state.scales, codes)], 1)


# ---------------------------------------------------------------- all of it


def ldlq(
    weight: Tensor, name: str, hessian: Tensor, damping: float = 0.01, passes: int = 2, working_bytes: float | None = None
) -> Tensor:
    """Bytes uint8 [E, O, row_bytes] of ``weight`` [E, O, I] rounded for a small output error under ``hessian`` [E, I, I].

    ``damping`` of the mean of diag(H) is added to it. ``passes``: of descent, within a block when the sweep is there, and over
    all blocks afterwards. A row whose plain rounding (:func:`ggml_codecs.encode` with diag(H)) has a lower error takes that.
    """
    return ldlq_each(weight, (name,), hessian, damping, passes, working_bytes)[name]


def ldlq_each(
    weight: Tensor, names: Sequence[str], hessian: Tensor, damping: float = 0.01, passes: int = 2,
    working_bytes: float | None = None,
) -> dict[str, Tensor]:  # fmt: skip
    """:func:`ldlq` to several types, which share the factor of the second moments."""
    experts, outputs, inputs = weight.shape
    if hessian.shape != (experts, inputs, inputs):
        raise UserError(f"second moments {list(hessian.shape)} do not belong to a weight {list(weight.shape)}")
    sizes = {name: row_bytes(name, inputs) for name in names}
    out = {n: torch.empty(experts, outputs, size, dtype=torch.uint8, device=weight.device) for n, size in sizes.items()}
    for part, row in rounding_parts(weight.shape, working_bytes or WORKING_BYTES[weight.device.type], COPIES):
        h, w, data = hessian[part].float(), weight[part, row].float(), {}
        kinds = {name: kind for name in names if (kind := codec(name)).type.block > 1}
        with damped(h, damping) as moments:
            factor = inverse_factor(moments, 0.0) if kinds else moments
            for name, kind in kinds.items():
                how = (0, (1.0,)) if name in PLAIN_SWEEP else (passes, SIZES)
                data[name] = _ldlq(w, kind, moments, factor, *how)
        for name, own in out.items():
            found = encode(w, name, diagonals(h)[:, None])
            if name in data:
                _keep_better(found, data.pop(name), w, name, h)
            own[part, row] = found
    return out


def _ldlq(
    weight: Tensor, kind: Codec, moments: Tensor, factor: Tensor, passes: int, sizes: tuple[float, ...] = SIZES
) -> Tensor:
    """Bytes [E, O, row bytes] of sweep and descent, none of which raises the error under the damped ``moments``."""
    wt = weight.transpose(1, 2).contiguous()
    state = sweep(wt, factor, kind, passes, sizes)
    for _ in range(passes):
        state = descend(wt, state, moments, kind)
    return packed(state, kind).view(*weight.shape[:2], -1)


def _keep_better(kept: Tensor, data: Tensor, weight: Tensor, name: str, hessian: Tensor) -> None:
    """Put the rows of ``data`` [E, O, row bytes] into ``kept`` where their output error is lower."""
    wt = weight.transpose(1, 2)
    errors = [row_errors(wt, decode_rows(d, name).transpose(1, 2), hessian) for d in (data, kept)]
    better = (errors[0] < errors[1])[..., None]
    kept.copy_(torch.where(better, data, kept))
