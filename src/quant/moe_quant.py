"""The pure grids: symmetric integers with one scale per group of inputs (absmax, MSE clip search) and absmean ternary.

Not a command. Tensors and numbers in, tensors out. Letters: N groups, G group size, I inputs (the last axis).

The arithmetic is float32 and spelled out so that every backend can give the same bits:
    scale   = bfloat16(absmax * f), f = float32(ratio / qmax), one multiplication and one rounding; below 2**-100 it is 0
    inverse = 1 / scale, correctly rounded; 0 where the scale is 0
    code    = clamp(round_half_even(w * inverse), -qmax, qmax)
    error   = sum over the group of (w - code * scale)**2 by a fixed tree: the upper half of the axis (padded with zeros
              to a power of two) is added to the lower half until one value is left; no fused multiply-add
A group whose largest weight is above 2**50 is searched times 2**-78, which changes no bit but those of sums that overflow.
code * scale has at most 15 significant bits, so it is exact in float32. Ties in the search keep the larger ratio.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from console import UserError

MIN_SCALE = 2.0**-100  # keeps the inverse finite and subnormal weights at code 0, whether or not a device flushes them
HUGE, HUGE_UNIT = 2.0**50, 2.0**-78  # groups with larger weights are searched in this unit: their squares leave float32
CLIP_LOW = 0.65  # the least ratio of the clip search: the published recipe's
CHUNK = {"cpu": 1 << 19, "cuda": 1 << 24}  # elements worked on at once: what stays in a CPU's cache, what fills a GPU


class Quantized(NamedTuple):
    """Codes int8 [..., I] and float32 scales [..., I/G] whose values a bfloat16 can hold; weight ~ code * scale."""

    codes: Tensor
    scale: Tensor


def check_grid(shape: Iterable[int], bits: int, group: int) -> None:
    """Raise :class:`UserError` unless bits is in 2..8 and ``group`` divides the last axis."""
    shape = tuple(shape)
    if not 2 <= bits <= 8:
        raise UserError(f"bits {bits} is outside 2..8")
    if group < 1 or not shape or shape[-1] % group:
        raise UserError(f"group {group} does not divide the last axis of shape {list(shape)}")


def clip_factors(bits: int, clip_steps: int, clip_low: float) -> list[float]:
    """float32(ratio / qmax) for the ratios from 1.0 down to ``clip_low``; one factor (absmax) when clip_steps <= 1."""
    qmax = 2 ** (bits - 1) - 1
    ratios = [1.0 - (1.0 - clip_low) * step / (clip_steps - 1) for step in range(clip_steps)] if clip_steps > 1 else [1.0]
    return torch.tensor([ratio / qmax for ratio in ratios], dtype=torch.float64).float().tolist()


def tree_views(values: Tensor) -> list[tuple[Tensor, Tensor]]:
    """The (lower, upper) halves of [G, N] that the tree adds in turn; the sum over G ends in ``values[0]``."""
    pairs, size = [], values.shape[0]
    while size > 1:
        half = 1 << (size - 1).bit_length() - 1
        pairs.append((values[: size - half], values[half:size]))
        size = half
    return pairs


def tree_sum_(values: Tensor, views: list[tuple[Tensor, Tensor]] | None = None) -> Tensor:
    """Sum of [G, N] over G by halving adds (module docstring); overwrites ``values``. Returns a view, [N]."""
    for lower, upper in views or tree_views(values):
        lower.add_(upper)
    return values[0]


def _finite(scale: Tensor) -> Tensor:
    if not bool(torch.isfinite(scale).all()):
        raise UserError("the weight contains NaN, infinity or values beyond bfloat16")
    return scale


def _rounded_scale(magnitude: Tensor, factor: float | Tensor) -> Tensor:
    scale = _finite((magnitude * factor).bfloat16().float())
    return torch.where(scale < MIN_SCALE, 0.0, scale)


def inverse_scale(scale: Tensor) -> Tensor:
    """1 / scale, and 0 where the scale is 0."""
    return torch.where(scale > 0, scale.reciprocal(), 0.0)


def _search(w: Tensor, bits: int, factors: list[float]) -> Tensor:
    """The scale [N] of least squared error for groups in columns, float32 [G, N]."""
    qmax = 2 ** (bits - 1) - 1
    size = w.abs()  # the grid is symmetric: code and error of -w mirror those of w
    top = size.amax(0)
    unit = None
    if bool((top > HUGE).any()):
        unit = torch.where(top > HUGE, HUGE_UNIT, 1.0)
        size, top = size * unit, top * unit
    scales = _rounded_scale(top, torch.tensor(factors, device=w.device)[:, None])  # [steps, N]
    if len(factors) == 1:
        return scales[0] if unit is None else _finite((scales[0] / unit).bfloat16().float())
    errors, work = torch.empty_like(scales), torch.empty_like(size)
    views = tree_views(work)  # made once: at this size a slice costs as much as the addition
    for scale, inverse, error in zip(scales, inverse_scale(scales), errors, strict=True):
        torch.mul(size, inverse, out=work).round_().clamp_(max=qmax)  # codes
        torch.addcmul(size, work, scale, value=-1, out=work).square_()
        error.copy_(tree_sum_(work, views))
    # A larger ratio never has a smaller scale, so of tied steps the largest scale is the earliest.
    best = torch.where(errors == errors.amin(0), scales, 0.0).amax(0)
    return best if unit is None else _finite((best / unit).bfloat16().float())


def pieces(groups: Tensor, chunk: int | None = None) -> Iterator[slice]:
    """Slices of groups [N, G] that are worked on at once, of ``chunk`` elements."""
    count = max(1, (chunk or CHUNK.get(groups.device.type, CHUNK["cpu"])) // groups.shape[1])
    return (slice(start, start + count) for start in range(0, len(groups), count))


def _rounded(weight: Tensor, bits: int, group: int, chunk: int | None, scale_of: Callable[[Tensor], Tensor]) -> Quantized:
    """The codes of ``weight`` for the scales [N] that ``scale_of`` gives groups in columns, float32 [G, N]."""
    check_grid(weight.shape, bits, group)
    qmax = 2 ** (bits - 1) - 1
    codes = torch.empty(weight.numel() // group, group, dtype=torch.int8, device=weight.device)
    scales = torch.empty(len(codes), dtype=torch.float32, device=weight.device)
    groups = weight.detach().reshape(-1, group)
    for piece in pieces(groups, chunk):
        # In columns, so that reductions over a group run along contiguous memory. A copy, since it is worked on in place.
        w = groups[piece].t().to(torch.float32, memory_format=torch.contiguous_format, copy=True)
        scale = scale_of(w)
        scales[piece] = scale
        codes[piece] = w.mul_(inverse_scale(scale)).round_().clamp_(-qmax, qmax).t()
    return Quantized(codes.view(weight.shape), scales.view(*weight.shape[:-1], -1))


def quantize_group(
    weight: Tensor, bits: int, group: int, clip_steps: int, clip_low: float = CLIP_LOW, chunk: int | None = None
) -> Quantized:
    """Round weight [..., I] to a symmetric grid of ``bits`` (2..8; codes -qmax..qmax, qmax = 2**(bits-1) - 1).

    Each group of ``group`` consecutive inputs gets the scale of least squared error among ``clip_steps`` ratios of its
    absmax, spaced evenly from 1.0 down to ``clip_low``; clip_steps <= 1 is absmax. All-zero groups get scale 0.
    ``chunk`` bounds the elements worked on at once and does not change the result. Raises :class:`UserError` on a
    group that does not divide, bits outside 2..8, NaN or infinity.
    """
    return _rounded(weight, bits, group, chunk, lambda w: _search(w, bits, clip_factors(bits, clip_steps, clip_low)))


def ternary(weight: Tensor, group: int, chunk: int | None = None) -> Quantized:
    """Absmean ternary of weight [..., I]: scale = mean |w| of the group, codes = clamp(round(w / scale), -1, 1).

    Source: BitNet b1.58 (Ma et al. 2024, "The Era of 1-bit LLMs", section 2), per group instead of per tensor.
    """
    return _rounded(weight, 2, group, chunk, lambda w: _rounded_scale(tree_sum_(w.abs()), torch.tensor(1 / group).item()))


def dequantize(q: Quantized, group: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """code * scale in float32 (exact), rounded once to ``dtype``; [..., I]."""
    codes, scales = q.codes.reshape(-1, group), q.scale.reshape(-1, 1)
    out = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    for piece in pieces(codes):
        out[piece] = codes[piece] * scales[piece]
    return out.view(q.codes.shape)


def fake_quant(
    weight: Tensor, bits: int, group: int, clip_steps: int, clip_low: float = CLIP_LOW, dtype: torch.dtype | None = None
) -> Tensor:
    """``dequantize(quantize_group(weight, ...))`` in ``dtype`` (default: the weight's); same shape as the weight. On an
    NVIDIA GPU one fused kernel gives the same bits (clip_kernel)."""
    dtype = dtype or weight.dtype
    if weight.is_cuda:
        import clip_kernel  # needs Triton, which a CPU build of torch does not bring

        if clip_kernel.fits(weight, group, bits):
            check_grid(weight.shape, bits, group)
            qmax, factors = 2 ** (bits - 1) - 1, clip_factors(bits, clip_steps, clip_low)
            huge = (HUGE, HUGE_UNIT)
            out, bad = clip_kernel.clip_fake_quant(weight, factors, qmax, group, MIN_SCALE, dtype, huge=huge)
            if bad.item():
                raise UserError("the weight contains NaN, infinity or values beyond bfloat16")
            return out
    return dequantize(quantize_group(weight, bits, group, clip_steps, clip_low), group, dtype)


def effective_bits(bits: float, group: int | None, scale_bits: int = 16) -> tuple[float, float]:
    """(weight bits, stored bits) of one tensor: the codes alone, and the codes with one scale per group.

    ``group`` None is a tensor without scales (kept as it is).
    """
    return float(bits), bits + (scale_bits / group if group else 0.0)


def average_bits(parts: Iterable[tuple[int, float, int | None]], scale_bits: int = 16) -> tuple[float, float]:
    """(weight bits, stored bits) per parameter over (numel, bits, group) parts; (0, 0) when there are none."""
    total = weight_sum = stored_sum = 0.0
    for numel, bits, group in parts:
        weight_bits, stored_bits = effective_bits(bits, group, scale_bits)
        total += numel
        weight_sum += numel * weight_bits
        stored_sum += numel * stored_bits
    return (weight_sum / total, stored_sum / total) if total else (0.0, 0.0)
