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

import dataclasses
import threading
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from console import UserError
from devices import Stopped, each_device
from moe_quant import MIN_SCALE, check_grid, clip_factors, fake_quant, inverse_scale

HUGE_BITS = 40
HUGE = 2.0**HUGE_BITS
DAMPINGS = (0.01, 0.1, 1.0, 10.0)  # of the mean of diag(H); the next is taken where a Cholesky factorization fails
WORKING_BYTES = {"cpu": 1e9, "cuda": 24e9}  # few experts at once leave a GPU waiting for launches


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


class Statistics(NamedTuple):
    """``hessian`` [E, I, I]: mean of x x^T over the (weighted) inputs x of each matrix; ``tokens`` [E]: effective counts."""

    hessian: Tensor
    tokens: Tensor


def diagonals(matrices: Tensor) -> Tensor:
    """A view [E, I] of matrices [E, I, I]."""
    return matrices.diagonal(dim1=1, dim2=2)


def shrink(hessian: Tensor, tokens: Tensor, floor: float) -> Tensor:
    """Second moments of matrices with fewer than ``floor`` effective tokens, drawn towards their mean.

    H_e <- (1 - s) H_e + s H_mean with s = 1 - tokens_e / floor where that is positive, H_mean the token-weighted mean of
    all matrices, scaled to the trace of H_e (or as it is where H_e is zero). [E, I, I], [E] -> [E, I, I].
    """
    share = (1 - tokens / floor).clamp(0, 1).to(hessian)
    if not bool(share.any()):
        return hessian
    weight = tokens.to(hessian) / tokens.sum().clamp_min(1e-30)
    mean = torch.einsum("e,eij->ij", weight, hessian)
    trace = diagonals(hessian).sum(-1)
    scale = torch.where(trace > 0, trace / mean.trace().clamp_min(1e-30), 1.0)
    out = hessian.clone()
    for e in share.nonzero()[:, 0].tolist():
        out[e].lerp_(mean * scale[e], share[e].item())
    return out


def damped(hessian: Tensor, damping: float) -> Tensor:
    """H + damping * mean(diag H) * 1 of each matrix [E, I, I]; itself where ``damping`` is 0. A mean of 0 counts as 1."""
    if not damping:
        return hessian
    out = hessian.clone()
    mean = diagonals(out).mean(-1, keepdim=True)
    diagonals(out).add_(damping * torch.where(mean > 0, mean, 1.0))
    return out


def inverse_factor(hessian: Tensor, damping: float) -> Tensor:
    """Upper triangular U [E, I, I] with (H + damping * mean(diag H) * 1)^-1 = U^T U; one Cholesky and one solve.

    Inputs that are never active (zero diagonal) get the mean diagonal. A matrix that cannot be factorized takes the next of
    DAMPINGS; :class:`UserError` when none helps (NaN in an activation).
    """
    if not bool(torch.isfinite(hessian).all()):
        raise UserError("the calibration statistics contain NaN or infinity")
    diagonal = diagonals(hessian)
    mean = diagonal.mean(-1, keepdim=True)
    mean = torch.where(mean > 0, mean, 1.0)
    dead = torch.where(diagonal > 0, 0.0, mean)
    flipped = torch.empty_like(hessian)
    pending = torch.ones(len(hessian), dtype=torch.bool, device=hessian.device)
    for factor in (damping, *(d for d in DAMPINGS if d > damping)):
        damped = hessian[pending].clone()
        diagonals(damped).add_(dead[pending] + factor * mean[pending])
        lower, info = torch.linalg.cholesky_ex(damped.flip(1, 2))
        index = pending.nonzero()[:, 0]
        flipped[index] = lower
        pending[index] = info > 0
        if not bool(pending.any()):
            break
    else:
        raise UserError("the calibration statistics are not positive definite at any damping")
    upper = flipped.flip(1, 2)  # H = R R^T with R upper triangular, so U = R^-1
    identity = torch.eye(hessian.shape[-1], dtype=hessian.dtype, device=hessian.device).expand_as(upper)
    return torch.linalg.solve_triangular(upper, identity, upper=True)


def shrunk(values: Tensor, dim: int) -> tuple[Tensor, Tensor | float]:
    """(values, factor): as they are and 1; or where magnitudes are above HUGE, times the powers of two that bring the largest
    over ``dim`` (kept as an axis of 1) to it. Squares and sums then stay within float32, and such a product is exact."""
    top = values.abs().amax(dim, keepdim=True)
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
        return _bf16(self.codes * self.scale.repeat_interleave(group, 1))


def gptq_codes(wt: Tensor, hessian: Tensor, grid: Grid, damping: float = 0.01, act_order: bool = False) -> Codes:
    """GPTQ on ``wt`` [E, I, O] (the weight transposed, so that an input is contiguous) for all experts at once.

    The scale of a group is searched when the sweep reaches it, on the weights that carry the errors of earlier groups, with
    input j weighted by 1 / U_jj**2: that is the loss which remains when later inputs compensate. ``act_order`` sweeps
    each group from its largest second moment to its smallest.
    """
    order = None
    if act_order:
        order = group_order(hessian, grid.group)
        wt = wt.gather(1, order[..., None].expand_as(wt))
        hessian = permuted(hessian, order)
    factor = inverse_factor(hessian, damping)
    diagonal = diagonals(factor)
    work = wt.clone()
    codes = torch.empty_like(work)
    scales = torch.empty(len(work), work.shape[1] // grid.group, work.shape[2], device=work.device)
    for index, start in enumerate(range(0, work.shape[1], grid.group)):
        part = slice(start, start + grid.group)
        block, own = work[:, part], factor[:, part, part]
        scale = search_scale(block, diagonal[:, part] ** -2, grid)
        errors = torch.empty_like(block)
        for j in range(grid.group):
            column = block[:, j]
            code = snap(column, scale, grid.qmax)
            codes[:, start + j] = code
            errors[:, j] = (column - _bf16(code * scale)) / own[:, j, j, None]
            block[:, j + 1 :].baddbmm_(own[:, j, j + 1 :, None], errors[:, j, None], alpha=-1)
        work[:, part.stop :].baddbmm_(factor[:, part, part.stop :].transpose(1, 2), errors, alpha=-1)
        scales[:, index] = scale
    if order is not None:
        codes = torch.empty_like(codes).scatter_(1, order[..., None].expand_as(codes), codes)
    return Codes(codes, scales)


def group_order(hessian: Tensor, group: int) -> Tensor:
    """Input indices [E, I] with every group sorted by falling second moment; groups keep their places."""
    moments = diagonals(hessian)
    inside = moments.reshape(len(moments), -1, group).argsort(dim=-1, descending=True, stable=True)
    starts = torch.arange(0, moments.shape[1], group, device=moments.device)[None, :, None]
    return (inside + starts).flatten(1)


def permuted(hessian: Tensor, order: Tensor) -> Tensor:
    """Rows and columns of each matrix in the given order."""
    rows = hessian.gather(1, order[..., None].expand_as(hessian))
    return rows.gather(2, order[:, None].expand_as(hessian))


def output_error(wt: Tensor, values: Tensor, hessian: Tensor) -> Tensor:
    """tr(D H D^T) of each matrix [E] for weights and rounded values [E, I, O]."""
    difference = wt - values
    return (torch.bmm(hessian, difference) * difference).flatten(1).sum(-1)


def refit_scales(wt: Tensor, codes: Codes, hessian: Tensor, group: int) -> Codes:
    """The scales of least output error for fixed codes: one small linear system per output, rounded to bfloat16.

    A scale that would turn negative or zero keeps its value. Shapes as in :class:`Codes`.
    """
    experts, inputs, outputs = wt.shape
    count = inputs // group
    right = torch.bmm(hessian, wt)
    linear = (codes.codes * right).view(experts, count, group, outputs).sum(2).permute(0, 2, 1)
    matrix = torch.empty(experts, outputs, count, count, device=wt.device)
    for g in range(count):
        part = slice(g * group, (g + 1) * group)
        image = torch.bmm(hessian[:, :, part], codes.codes[:, part])
        matrix[:, :, :, g] = (codes.codes * image).view(experts, count, group, outputs).sum(2).permute(0, 2, 1)
    ridge = 1e-6 * matrix.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None]
    matrix.diagonal(dim1=-2, dim2=-1).add_(ridge + 1e-30)
    solved, info = torch.linalg.solve_ex(matrix, linear[..., None])
    solved = _bf16(solved[..., 0].permute(0, 2, 1))
    usable = (solved > MIN_SCALE) & torch.isfinite(solved) & (info == 0)[:, None, :]
    return Codes(codes.codes, torch.where(usable, solved, codes.scale).contiguous())


def descend(wt: Tensor, codes: Codes, hessian: Tensor, grid: Grid) -> Codes:
    """One pass of coordinate descent: each code in turn takes the value of least output error, all others fixed."""
    values = codes.values(grid.group)
    new = codes.codes.clone()
    diagonal = diagonals(hessian).clamp_min(1e-30)
    for start in range(0, wt.shape[1], grid.group):
        part = slice(start, start + grid.group)
        own, scale = hessian[:, part, part], codes.scale[:, start // grid.group]
        residual = torch.bmm(hessian[:, part], wt - values)  # H D on this group, [E, G, O]
        for j in range(grid.group):
            target = values[:, start + j] + residual[:, j] / diagonal[:, start + j, None]
            code = snap(target, scale, grid.qmax)
            value = _bf16(code * scale)
            residual[:, j + 1 :].baddbmm_(own[:, j + 1 :, j, None], (values[:, start + j] - value)[:, None])
            new[:, start + j], values[:, start + j] = code, value
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
    hessian = damped(statistics.hessian, damping)
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
    wt = weight.transpose(1, 2)
    best, least = weight, torch.full((len(weight),), torch.inf, device=weight.device)
    for step in range(steps):
        scale = root ** (step / steps)
        scale = (scale / (scale.amax(-1, keepdim=True) * scale.amin(-1, keepdim=True)).sqrt())[:, None]
        values = fake_quant((weight * scale).contiguous(), grid.bits, grid.group, grid.clip_steps, grid.clip_low) / scale
        error = output_error(wt, values.transpose(1, 2), statistics.hessian)
        best = torch.where((error < least)[:, None, None], values, best)
        least = torch.minimum(least, error)
    return best


class Method(NamedTuple):
    """``round``: (weight [E, O, I], grid), and the statistics where it is ``calibrated``, to the dequantized weight.
    ``symmetric``: values are code * scale, which can lie packed; else groups have a zero point of ``zero_bits`` (None: as many
    as a code), or inputs a scale."""

    round: Callable[..., Tensor]
    calibrated: bool = False
    symmetric: bool = True
    zero_bits: int | None = 0


METHODS = {
    "absmax": Method(lambda w, g: fake_quant(w, g.bits, g.group, 1, dtype=torch.bfloat16).float()),
    "clip": Method(lambda w, g: fake_quant(w, g.bits, g.group, g.clip_steps, g.clip_low, torch.bfloat16).float()),
    "rtn_asym": Method(rtn_asym, symmetric=False, zero_bits=None),
    "hqq": Method(hqq, symmetric=False, zero_bits=16),
    "wclip": Method(wclip, calibrated=True),
    "awq": Method(awq, calibrated=True, symmetric=False),
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
    weight: Tensor, grid: Grid, statistics: Statistics | None, method: str, devices: Sequence[torch.device] = ()
) -> Tensor:
    """The dequantized weight (values that bfloat16 nearly or exactly holds), float32, of ``weight`` [E, O, I] or [O, I].

    ``devices`` (of one kind, equal ones) share the experts of a calibrated method, in the pieces in which one device would
    work through them, so that the result is the same to the bit. Raises :class:`UserError` on an unknown method, a calibrated
    one without statistics, a grid that does not fit, NaN.
    """
    if method not in METHODS:
        raise UserError(f"method {method!r} is unknown; known: {', '.join(METHODS)}")
    check_grid(weight.shape, grid.bits, grid.group)
    if not bool(torch.isfinite(weight).all()):
        raise UserError("the weight contains NaN or infinity")
    batched = weight.float() if weight.ndim == 3 else weight.float()[None]
    if method in DATA_FREE:
        batched, factor = shrunk(batched.contiguous(), 2)
        rounded = METHODS[method].round(batched, grid)
        return (rounded if isinstance(factor, float) else rounded / factor).view(weight.shape)
    if statistics is None:
        raise UserError(f"method {method} needs calibration statistics")
    out = torch.empty_like(batched)
    count = experts_at_once(batched.shape, WORKING_BYTES[batched.device.type])
    # pieces are dealt out whole: a batched product of another size may round otherwise
    parts = [slice(start, start + count) for start in range(0, len(batched), count)]
    shares = (devices or (batched.device,))[: len(parts)]

    def share(number: int, device: torch.device, stop: threading.Event) -> None:
        for part in parts[number :: len(shares)]:
            if stop.is_set():
                raise Stopped
            weights, factor = shrunk(batched[part].to(device), 2)  # by outputs, which know nothing of each other
            moments = shrunk(statistics.hessian[part].to(device).flatten(1), 1)[0].view(-1, *statistics.hessian.shape[1:])
            own = Statistics(moments, statistics.tokens[part].to(device))
            rounded = METHODS[method].round(weights, grid, own)
            out[part] = (rounded if isinstance(factor, float) else rounded / factor).to(out.device)

    each_device(shares, share)
    return out.add_(0.0).reshape(weight.shape)  # a zero has no sign: integers, into which it may be packed, have none


def experts_at_once(shape: tuple[int, ...], working_bytes: float) -> int:
    """How many matrices [O, I] are rounded together: as many as keep the copies of weights and moments in that memory."""
    _, outputs, inputs = shape
    return max(1, int(working_bytes / (4 * inputs * (6 * inputs + 8 * outputs))))
