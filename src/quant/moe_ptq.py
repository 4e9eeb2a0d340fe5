"""Post-training quantization: every rounding method on the same tensors, ours and those it is compared with.

Not a command. `round_weight(weight [E, O, I], grid, statistics, method)` returns the dequantized weight, batched over the
experts of a layer; a new method is one function and its row in METHODS. Letters: E experts (1 for a plain linear), O outputs, I
inputs, G group size. Statistics are second moments of the inputs, so the error of a matrix's output is  tr(D H D^T)  with
D = weight - rounded and H [I, I]; every calibrated method lowers that.

    absmax, clip      data-free symmetric grids (moe_quant)
    wclip             clip search weighted by the diagonal of H (what an imatrix does)
    rtn_asym, hqq     data-free grids with a zero point: minimum to maximum, and half-quadratic (Badri & Shaji 2023)
    awq               inputs scaled by a power of their size before a clip search (Lin et al. 2024, arXiv 2306.00978)
    gptq              error feedback along the inputs (Frantar et al. 2023, arXiv 2210.17323), scales searched per group
    gptq_refit        gptq, then scales by least squares and codes by coordinate descent in turn (QuantEase, arXiv 2309.01885)
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from console import UserError
from devices import Stopped, each_device
from moe_quant import MIN_SCALE, check_grid, clip_factors, fake_quant, inverse_scale

AWQ_ROWS = 1 << 15  # tried together
HUGE_BITS = 40
HUGE = 2.0**HUGE_BITS
DAMPINGS = (0.01, 0.1, 1.0, 10.0)  # of the mean of diag(H); the next is taken where a Cholesky factorization fails
COPIES = 8  # of the weights, as float32, that are at work together
LEAST_ROWS = 256
WORKING_BYTES = {"cpu": 1e9, "cuda": 8e9}  # few experts at once leave a GPU waiting for launches


@dataclasses.dataclass(frozen=True)
class Grid:
    """A symmetric integer grid: bits 2..8, ``group`` inputs share a bfloat16 scale, found by ``clip_steps`` ratios."""

    bits: int
    group: int
    clip_steps: int = 16
    clip_low: float = 0.65

    @property
    def qmax(self) -> int:
        return 2 ** (self.bits - 1) - 1


class Hessians(Protocol):
    """Second moments [E, I, I] of which those of some experts are made when they are asked for."""

    @property
    def shape(self) -> torch.Size: ...

    def __getitem__(self, part: slice | Tensor) -> Tensor: ...


class Statistics(NamedTuple):
    """``hessian`` [E, I, I]: mean of x x^T over the (weighted) inputs x of each matrix; ``tokens`` [E]: effective counts."""

    hessian: Tensor | Hessians
    tokens: Tensor


def diagonals(matrices: Tensor) -> Tensor:
    """A view [E, I] of matrices [E, I, I]."""
    return matrices.diagonal(dim1=1, dim2=2)


def shrink(hessian: Tensor, mean: Tensor, shares: Sequence[float]) -> Tensor:
    """H_e <- (1 - s) H_e + s H_mean in place, H_mean scaled to the trace of H_e (or as it is where H_e is zero), for each
    matrix of ``hessian`` [E, I, I] with a share s above 0."""
    trace = diagonals(hessian).sum(-1)
    scale = torch.where(trace > 0, trace / mean.trace().clamp_min(1e-30), 1.0)
    for e, share in enumerate(shares):
        if share:
            hessian[e].lerp_(mean * scale[e], share)
    return hessian


def damp(hessian: Tensor, damping: float) -> None:
    """Add the damping of :func:`damped`."""
    if damping:
        mean = diagonals(hessian).mean(-1, keepdim=True)
        diagonals(hessian).add_(damping * torch.where(mean > 0, mean, 1.0))


@contextlib.contextmanager
def damped(hessian: Tensor, damping: float) -> Iterator[Tensor]:
    """H + damping * mean(diag H) * 1 of each matrix [E, I, I], which is as it was afterwards. A mean of 0 counts as 1."""
    diagonal = diagonals(hessian)
    kept = diagonal.clone()
    damp(hessian, damping)
    try:
        yield hessian
    finally:
        diagonal.copy_(kept)


def inverse_factor(hessian: Tensor, damping: float, order: Tensor | None = None) -> Tensor:
    """Upper triangular U [E, I, I] with (H + damping * mean(diag H) * 1)^-1 = U^T U; one Cholesky and one solve, matrix by
    matrix. ``order`` [E, I] of the inputs, where it is not their own.

    Inputs that are never active (zero diagonal) get the mean diagonal. A matrix that cannot be factorized takes the next of
    DAMPINGS; :class:`UserError` when none helps (NaN in an activation).
    """
    diagonal = diagonals(hessian) if order is None else diagonals(hessian).gather(1, order)
    mean = diagonal.mean(-1, keepdim=True)
    mean = torch.where(mean > 0, mean, 1.0)
    dead = torch.where(diagonal > 0, 0.0, mean)
    identity = torch.eye(hessian.shape[-1], dtype=hessian.dtype, device=hessian.device)
    factors, pending, finite = torch.empty_like(hessian), list(range(len(hessian))), []
    for factor in (damping, *(d for d in DAMPINGS if d > damping)):
        infos = []
        for e in pending:
            matrix = hessian[e].clone() if order is None else hessian[e][order[e]][:, order[e]]
            if factor == damping:
                finite.append(torch.isfinite(matrix).all())
            matrix.diagonal().add_(dead[e] + factor * mean[e])
            lower, info = torch.linalg.cholesky_ex(matrix.flip(0, 1))
            # H = R R^T with R = lower flipped upper triangular, so U = R^-1
            factors[e] = torch.linalg.solve_triangular(lower.contiguous().flip(0, 1), identity, upper=True)
            infos.append(info)
        if finite and not bool(torch.stack(finite).all()):
            raise UserError("the calibration statistics contain NaN or infinity")
        finite, failed = [], torch.stack(infos).tolist()  # one wait for a GPU
        pending = [e for e, info in zip(pending, failed, strict=True) if info > 0]
        if not pending:
            return factors
    raise UserError("the calibration statistics are not positive definite at any damping")


def shrunk(values: Tensor, dim: int) -> tuple[Tensor, Tensor | float]:
    """(values, factor): as they are and 1; or where magnitudes are above HUGE, times the powers of two that bring the largest
    over ``dim`` (kept as an axis of 1) to it. Squares and sums then stay within float32, and such a product is exact."""
    top = torch.linalg.vector_norm(values, torch.inf, dim, keepdim=True)  # without a copy of the magnitudes
    if not bool((top > HUGE).any()):
        return values, 1.0
    factor = torch.where(top > HUGE, torch.exp2(HUGE_BITS - torch.frexp(top).exponent), 1.0)
    return values * factor, factor


def _bf16(values: Tensor) -> Tensor:
    return values.bfloat16().float()


def snap(w: Tensor, scale: Tensor, qmax: int) -> Tensor:
    """Codes (as floats) of ``w`` on the grid of ``scale``, which broadcasts; 0 where the scale is 0."""
    return (w * inverse_scale(scale)).round_().clamp_(-qmax, qmax)


def search_scale(w: Tensor, importance: Tensor, grid: Grid) -> Tensor:
    """The scale [E, O] of least weighted squared error for one group; w [E, G, O], importance [E, G]."""
    top = w.abs().amax(1)
    best, chosen = torch.full_like(top, torch.inf), torch.zeros_like(top)
    for factor in clip_factors(grid.bits, grid.clip_steps, grid.clip_low):
        scale = _bf16(top * factor)
        scale = torch.where(scale < MIN_SCALE, 0.0, scale)
        error = w - _bf16(snap(w, scale[:, None], grid.qmax) * scale[:, None])
        error = torch.einsum("ego,eg->eo", error.square_(), importance)
        better = error < best
        best, chosen = torch.where(better, error, best), torch.where(better, scale, chosen)
    return chosen


def wclip(weight: Tensor, grid: Grid, statistics: Statistics) -> Tensor:
    """Clip search per group with each input's error weighted by its second moment."""
    importance = diagonals(statistics.hessian)
    wt = weight.transpose(1, 2)
    out = torch.empty_like(wt)
    for start in range(0, wt.shape[1], grid.group):
        part = slice(start, start + grid.group)
        scale = search_scale(wt[:, part], importance[:, part], grid)[:, None]
        out[:, part] = _bf16(snap(wt[:, part], scale, grid.qmax) * scale)
    return out.transpose(1, 2)


class Codes(NamedTuple):
    """Integer codes as floats [E, I, O] and scales [E, I/G, O]; the inputs are the middle axis."""

    codes: Tensor
    scale: Tensor

    def values(self, group: int) -> Tensor:
        """bfloat16(code * scale) as float32, [E, I, O]."""
        grouped = self.codes.unflatten(1, (-1, group))
        return (grouped * self.scale[:, :, None]).bfloat16().float().view_as(self.codes)


def gptq_codes(wt: Tensor, hessian: Tensor, grid: Grid, damping: float = 0.01, act_order: bool = False) -> Codes:
    """GPTQ on ``wt`` [E, I, O] (the weight transposed, so that an input is contiguous) for all experts at once.

    The scale of a group is searched when the sweep reaches it, on the weights that carry the errors of earlier groups, with
    input j weighted by 1 / U_jj**2: that is the loss which remains when later inputs compensate. ``act_order`` sweeps
    each group from its largest second moment to its smallest.
    """
    order = group_order(hessian, grid.group) if act_order else None
    factor = inverse_factor(hessian, damping, order)
    diagonal = diagonals(factor)
    work = wt.clone() if order is None else wt.gather(1, order[..., None].expand_as(wt))
    codes = torch.empty_like(work)
    scales = torch.empty(len(work), work.shape[1] // grid.group, work.shape[2], device=work.device)
    for index, start in enumerate(range(0, work.shape[1], grid.group)):
        part = slice(start, start + grid.group)
        block, own = work[:, part], factor[:, part, part]
        scale = search_scale(block, diagonal[:, part] ** -2, grid)
        errors, inverse, value = torch.empty_like(block), inverse_scale(scale), torch.empty_like(scale, dtype=torch.bfloat16)
        columns = (block.unbind(1), codes[:, part].unbind(1), errors.unbind(1), diagonal[:, part, None].unbind(1))
        rows = own[..., None].unbind(1)
        for j, (column, code, error, pivot) in enumerate(zip(*columns, strict=True), 1):  # a GPU waits for launches and views
            torch.mul(column, inverse, out=code).round_().clamp_(-grid.qmax, grid.qmax)
            torch.sub(column, torch.mul(code, scale, out=value), out=error).div_(pivot)
            block[:, j:].baddbmm_(rows[j - 1][:, j:], error[:, None], alpha=-1)
        work[:, part.stop :].baddbmm_(factor[:, part, part.stop :].transpose(1, 2), errors, alpha=-1)
        scales[:, index] = scale
    del work, factor
    if order is not None:
        codes = torch.empty_like(codes).scatter_(1, order[..., None].expand_as(codes), codes)
    return Codes(codes, scales)


def group_order(hessian: Tensor, group: int) -> Tensor:
    """Input indices [E, I] with every group sorted by falling second moment; groups keep their places."""
    moments = diagonals(hessian)
    inside = moments.reshape(len(moments), -1, group).argsort(dim=-1, descending=True, stable=True)
    starts = torch.arange(0, moments.shape[1], group, device=moments.device)[None, :, None]
    return (inside + starts).flatten(1)


def output_error(wt: Tensor, values: Tensor, hessian: Tensor) -> Tensor:
    """tr(D H D^T) of each matrix [E] for weights and rounded values [E, I, O]."""
    difference = wt - values
    return torch.bmm(hessian, difference).mul_(difference).flatten(1).sum(-1)


def refit_scales(wt: Tensor, codes: Codes, hessian: Tensor, group: int) -> Codes:
    """The scales of least output error for fixed codes: one small linear system per output, rounded to bfloat16.

    A scale that would turn negative or zero keeps its value. Shapes as in :class:`Codes`.
    """
    experts, inputs, outputs = wt.shape
    count = inputs // group
    linear = torch.bmm(hessian, wt).mul_(codes.codes).view(experts, count, group, outputs).sum(2).permute(0, 2, 1)
    matrix = torch.empty(experts, outputs, count, count, device=wt.device)
    for g in range(count):
        part = slice(g * group, (g + 1) * group)
        image = torch.bmm(hessian[:, :, part], codes.codes[:, part]).mul_(codes.codes)
        matrix[:, :, :, g] = image.view(experts, count, group, outputs).sum(2).permute(0, 2, 1)
    ridge = 1e-6 * matrix.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None]
    matrix.diagonal(dim1=-2, dim2=-1).add_(ridge + 1e-30)
    solved, info = torch.linalg.solve_ex(matrix, linear[..., None])
    solved = _bf16(solved[..., 0].permute(0, 2, 1))
    usable = (solved > MIN_SCALE) & torch.isfinite(solved) & (info == 0)[:, None, :]
    return Codes(codes.codes, torch.where(usable, solved, codes.scale).contiguous())


def descend(wt: Tensor, codes: Codes, hessian: Tensor, grid: Grid) -> Codes:
    """One pass of coordinate descent: each code in turn takes the value of least output error, all others fixed."""
    values = codes.values(grid.group)
    new, difference = codes.codes.clone(), wt - values
    diagonal = diagonals(hessian).clamp_min(1e-30)
    for start in range(0, wt.shape[1], grid.group):
        part = slice(start, start + grid.group)
        own, scale = hessian[:, part, part], codes.scale[:, start // grid.group]
        residual, inverse = torch.bmm(hessian[:, part], difference), inverse_scale(scale)  # H D on this group, [E, G, O]
        rounded = torch.empty_like(residual, dtype=torch.bfloat16)
        change = torch.empty_like(scale)[:, None]
        columns = (values[:, part], new[:, part], residual, diagonal[:, part, None], rounded)
        below = own[..., None].unbind(2)
        for j, (old, code, rest, curve, value) in enumerate(zip(*(c.unbind(1) for c in columns), strict=True), 1):
            torch.mul(torch.addcdiv(old, rest, curve), inverse, out=code).round_().clamp_(-grid.qmax, grid.qmax)
            torch.sub(old[:, None], torch.mul(code, scale, out=value)[:, None], out=change)
            residual[:, j:].baddbmm_(below[j - 1][:, j:], change)
        values[:, part] = rounded
        difference[:, part] = wt[:, part] - values[:, part]
    return Codes(new, codes.scale)


def gptq(weight: Tensor, grid: Grid, statistics: Statistics, damping: float = 0.01, act_order: bool = False) -> Tensor:
    """See :func:`gptq_codes`."""
    wt = weight.transpose(1, 2).contiguous()
    return gptq_codes(wt, statistics.hessian, grid, damping, act_order).values(grid.group).transpose(1, 2)


def gptq_refit(
    weight: Tensor, grid: Grid, statistics: Statistics, damping: float = 0.01, passes: int = 3, act_order: bool = True
) -> Tensor:
    """GPTQ, then ``passes`` times: scales by least squares, codes by coordinate descent. A matrix keeps what lowered its
    output error under the damped moments, so no pass can make it worse."""
    wt = weight.transpose(1, 2).contiguous()
    with damped(statistics.hessian[:], damping) as hessian:
        codes = gptq_codes(wt, hessian, grid, 0.0, act_order)
        best = codes.values(grid.group)
        least = output_error(wt, best, hessian)
        for _ in range(passes):
            for step in (lambda c: refit_scales(wt, c, hessian, grid.group), lambda c: descend(wt, c, hessian, grid)):
                codes = step(codes)
                values = codes.values(grid.group)
                error = output_error(wt, values, hessian)
                better = error < least
                least, best = torch.where(better, error, least), torch.where(better[:, None, None], values, best)
                del values
    return best.transpose(1, 2)


def rtn_asym(weight: Tensor, grid: Grid) -> Tensor:
    """Round to nearest between minimum and maximum of a group: 2**bits levels, bfloat16 scale, integer zero point."""
    groups = weight.reshape(-1, grid.group)
    scale, zero = _asymmetric(groups, grid.bits)
    codes = (groups / scale + zero).round_().clamp_(0, 2**grid.bits - 1)
    return ((codes - zero) * scale).view_as(weight)


def _asymmetric(groups: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    low, high = groups.amin(-1, keepdim=True).clamp_max(0), groups.amax(-1, keepdim=True).clamp_min(0)
    scale = _bf16((high - low) / (2**bits - 1))
    scale = torch.where(scale < MIN_SCALE, 1.0, scale)
    return scale, (-low / scale).round()


def hqq(weight: Tensor, grid: Grid, norm: float = 0.7, beta: float = 10.0, growth: float = 1.01, steps: int = 20) -> Tensor:
    """Half-quadratic quantization: the zero point (a real number) of least l_p error, by shrinkage and averaging in turn."""
    groups = weight.reshape(-1, grid.group)
    top = 2**grid.bits - 1
    scale, zero = _asymmetric(groups, grid.bits)
    least = torch.full((len(groups), 1), torch.inf, device=weight.device)
    best = groups
    for _ in range(steps):
        codes = (groups / scale + zero).round_().clamp_(0, top)
        values = (codes - zero) * scale
        residual = groups - values
        error = residual.abs().pow(norm).mean(-1, keepdim=True)
        best = torch.where(error < least, values, best)
        least = torch.minimum(least, error)
        size = residual.abs()
        shrunk = residual.sign() * (size - size.clamp_min(1e-12).pow(norm - 1) / beta).clamp_min_(0)
        zero = _bf16((codes - (groups - shrunk) / scale).mean(-1, keepdim=True))
        beta *= growth
    return best.view_as(weight)


def awq(weight: Tensor, grid: Grid, statistics: Statistics, steps: int = 20) -> Tensor:
    """Per matrix, inputs scaled by (their root second moment) ** alpha before a clip search; alpha by least output error."""
    root = diagonals(statistics.hessian).clamp_min(1e-12).sqrt()

    def values_at(step: int, rows: Tensor, root: Tensor) -> Tensor:
        scale = root ** (step / steps)
        scale = (scale / (scale.amax(-1, keepdim=True) * scale.amin(-1, keepdim=True)).sqrt())[:, None]
        return fake_quant((rows * scale).contiguous(), grid.bits, grid.group, grid.clip_steps, grid.clip_low) / scale

    parts = weight.split(AWQ_ROWS, 1)
    chosen, least = torch.full_like(root[:, 0], -1), torch.full_like(root[:, 0], torch.inf)
    for step in range(steps):
        errors = [output_error(rows.mT, values_at(step, rows, root).mT, statistics.hessian) for rows in parts]
        error = torch.stack(errors).sum(0)
        chosen, least = torch.where(error < least, step, chosen), torch.minimum(error, least)
    best = weight.clone()
    for step in range(steps):
        if len(own := (chosen == step).nonzero()[:, 0]):
            for rows, into in zip(parts, best.split(AWQ_ROWS, 1), strict=True):
                into[own] = values_at(step, rows[own], root[own])
    return best


class Method(NamedTuple):
    """``round``: (weight [E, O, I], grid), and the statistics where it is ``calibrated``, to the dequantized weight.
    ``symmetric``: values are code * scale, which can lie packed; else groups have a zero point of ``zero_bits`` (None: as many
    as a code), or inputs a scale. ``whole``: what a row becomes depends on the others."""

    round: Callable[..., Tensor]
    calibrated: bool = False
    symmetric: bool = True
    zero_bits: int | None = 0
    whole: bool = False


METHODS = {
    "absmax": Method(lambda w, g: fake_quant(w, g.bits, g.group, 1, dtype=torch.bfloat16).float()),
    "clip": Method(lambda w, g: fake_quant(w, g.bits, g.group, g.clip_steps, g.clip_low, torch.bfloat16).float()),
    "rtn_asym": Method(rtn_asym, symmetric=False, zero_bits=None),
    "hqq": Method(hqq, symmetric=False, zero_bits=16),
    "wclip": Method(wclip, calibrated=True),
    "awq": Method(awq, calibrated=True, symmetric=False, whole=True),
    "gptq": Method(gptq, calibrated=True),
    "gptq_refit": Method(gptq_refit, calibrated=True),
}
CALIBRATED = tuple(name for name, method in METHODS.items() if method.calibrated)
DATA_FREE = tuple(name for name in METHODS if name not in CALIBRATED)
SYMMETRIC = tuple(name for name, method in METHODS.items() if method.symmetric)


def zero_point_bits(method: str, bits: int) -> int:
    """Bits that a method stores for the zero point of each group, beside its 16-bit scale."""
    found = METHODS[method].zero_bits if method in METHODS else 0
    return bits if found is None else found


def round_weight(
    weight: Tensor, grid: Grid, statistics: Statistics | None, method: str, devices: Sequence[torch.device] = (),
    working_bytes: float | None = None, out: Tensor | None = None, chosen: Tensor | None = None, errors: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The dequantized weight (values that bfloat16 nearly or exactly holds), float32, of ``weight`` [E, O, I] or [O, I].

    ``devices`` (of one kind, equal ones) share the experts of a calibrated method, in the pieces in which one device would
    work through them, so that the result is the same to the bit. A calibrated one can write it into ``out`` of any dtype,
    which may be the weight itself, for the experts ``chosen`` [N] alone; ``errors`` [E] then takes their output errors.
    ``working_bytes``: of a device, for a piece. Raises :class:`UserError` on an unknown method, a calibrated one without
    statistics, a grid that does not fit, NaN.
    """
    if method not in METHODS:
        raise UserError(f"method {method!r} is unknown; known: {', '.join(METHODS)}")
    check_grid(weight.shape, grid.bits, grid.group)
    if method in DATA_FREE:
        if not bool(torch.isfinite(weight).all()):
            raise UserError("the weight contains NaN or infinity")
        batched, factor = shrunk((weight.float() if weight.ndim == 3 else weight.float()[None]).contiguous(), 2)
        rounded = METHODS[method].round(batched, grid)
        return (rounded if isinstance(factor, float) else rounded / factor).view(weight.shape)
    if statistics is None:
        raise UserError(f"method {method} needs calibration statistics")
    out = torch.empty(weight.shape, device=weight.device) if out is None else out
    batched, into = (value if value.ndim == 3 else value[None] for value in (weight, out))
    numbers = torch.arange(len(batched), device=weight.device) if chosen is None else chosen
    memory = working_bytes or WORKING_BYTES[(*devices, weight.device)[0].type]
    # pieces are dealt out whole: a batched product of another size may round otherwise
    parts = rounding_parts((len(numbers), *batched.shape[1:]), memory, whole=METHODS[method].whole)
    shares = (devices or (weight.device,))[: len(parts)]

    def share(number: int, device: torch.device, stop: threading.Event) -> None:
        for part, rows in parts[number :: len(shares)]:
            if stop.is_set():
                raise Stopped
            experts = numbers[part]
            given = batched[experts, rows].to(device, torch.float32).contiguous()
            if not bool(torch.isfinite(given).all()):
                raise UserError("the weight contains NaN or infinity")
            hessian = statistics.hessian[experts].to(device)
            weights, factor = shrunk(given, 2)  # by outputs, which know nothing of each other
            moments = shrunk(hessian.flatten(1), 1)[0].view_as(hessian)
            rounded = METHODS[method].round(weights, grid, Statistics(moments, statistics.tokens[experts].to(device)))
            rounded = rounded if isinstance(factor, float) else rounded / factor
            if errors is not None:
                errors[experts] += finite_error(given, rounded, hessian).to(errors)
            # a zero has no sign: integers, into which it may be packed, have none
            into[experts, rows] = (rounded + 0.0).to(into.device, into.dtype)

    each_device(shares, share)
    return out


def finite_error(weight: Tensor, rounded: Tensor, hessian: Tensor) -> Tensor:
    """:func:`output_error` of [E, O, I], in float64 where weights are so large that squares leave float32."""
    error = output_error(weight.mT, rounded.mT, hessian)
    if bool(torch.isfinite(error).all()):
        return error
    return output_error(weight.mT.double(), rounded.mT.double(), hessian.double()).float()


def experts_at_once(shape: Sequence[int], working_bytes: float, copies: int = COPIES) -> int:
    """How many matrices [O, I] are rounded together: as many as keep two copies of their moments and ``copies`` of their
    weights in that memory; 0 where it is too small for one."""
    outputs, inputs = shape
    return int(working_bytes / (4 * inputs * (2 * inputs + copies * outputs)))


def rounding_parts(
    shape: Sequence[int], working_bytes: float, copies: int = COPIES, whole: bool = False
) -> list[tuple[slice, slice]]:
    """(experts, outputs) of a weight [E, O, I] that are rounded together: :func:`experts_at_once`, or rows of one expert where
    it is too large, unless it must stay ``whole``."""
    experts, outputs, inputs = shape
    count, rows = experts_at_once(shape[1:], working_bytes, copies), outputs
    if not count and not whole:
        rows = max(LEAST_ROWS, int((working_bytes / (4 * inputs) - 2 * inputs) / copies))
    return [(e, o) for e in even_spans(experts, max(1, count)) for o in even_spans(outputs, rows)]


def even_spans(length: int, most: int) -> list[slice]:
    """Spans of at most ``most``, none much smaller than the others."""
    size = math.ceil(length / math.ceil(length / most))
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]
