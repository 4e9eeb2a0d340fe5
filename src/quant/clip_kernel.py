"""The clip search as one Triton kernel for NVIDIA GPUs: read a group once, try every ratio in registers, write it rounded.

Not a command; moe_quant.fake_quant calls it for weights on a GPU. Bit-identical to the plain search on a CPU: the same
operations in the same order, no fused multiply-add (code * scale is exact, so only the squares could differ), and the sum
over a group by the same tree, as reductions over an axis of two.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from devices import numbers_on

ROWS, WARPS = 32, 8  # groups a program, and its warps: the fastest of those tried on an H200 (docs/DEVELOPMENT.md)


@triton.jit
def _round_half_even(x):
    # Adding and subtracting 1.5 * 2**23 rounds a float32 of magnitude below 2**22 to an integer, ties to even.
    return (x + 12582912.0) - 12582912.0


@triton.jit
def _to_bfloat16(x):
    # The float32 nearest to x that a bfloat16 holds, ties to even; x is finite and not negative. Integer arithmetic, since
    # Triton's interpreter truncates where a GPU rounds.
    bits = x.to(tl.int32, bitcast=True)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)


@triton.jit
def _clip_kernel(
    weight, out, factors, bad, count, steps, qmax, min_scale, huge, huge_unit,
    GROUP: tl.constexpr, ROWS: tl.constexpr, LEVELS: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    offset = row[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    inside = (row < count)[:, None]
    w = tl.load(weight + offset, mask=inside, other=0.0).to(tl.float32)
    size = tl.abs(w)
    unit = tl.where(tl.max(size, 1) > huge, huge_unit, 1.0)
    size = size * unit[:, None]
    top = tl.max(size, 1)
    total = tl.sum(size, 1)  # NaN and infinity reach it; tl.max may drop a NaN
    tl.atomic_or(bad, tl.max((~(total < float("inf"))).to(tl.int32), 0))
    best = tl.full((ROWS,), float("inf"), tl.float32)
    chosen = tl.zeros((ROWS,), tl.float32)
    for step in range(steps):
        scale = _to_bfloat16(top * tl.load(factors + step))
        scale = tl.where(scale < min_scale, 0.0, scale)
        inverse = tl.where(scale > 0, tl.div_rn(1.0, tl.where(scale > 0, scale, 1.0)), 0.0)
        code = tl.minimum(_round_half_even(size * inverse[:, None]), qmax)
        error = tl.fma(-code, tl.broadcast_to(scale[:, None], (ROWS, GROUP)), size)  # the product is exact: one rounding
        error = error * error
        width: tl.constexpr = GROUP
        for level in tl.static_range(LEVELS):
            error = tl.sum(tl.reshape(error, (ROWS, 2, width >> (level + 1))), 1)
        error = tl.reshape(error, (ROWS,))
        better = error < best
        best = tl.where(better, error, best)
        chosen = tl.where(better, scale, chosen)
    inverse = tl.where(chosen > 0, tl.div_rn(1.0, tl.where(chosen > 0, chosen, 1.0)), 0.0)
    code = tl.minimum(_round_half_even(size * inverse[:, None]), qmax)
    chosen = chosen / unit
    tl.atomic_or(bad, tl.max((~(chosen < 3.3961775292304e38)).to(tl.int32), 0))  # beyond bfloat16
    value = code * chosen[:, None]
    value = tl.where((w < 0) & (code > 0), -value, value)  # no negative zero
    tl.store(out + offset, value.to(out.dtype.element_ty), mask=inside)


def fits(weight: Tensor, group: int, bits: int) -> bool:
    """Whether the kernel takes this weight: on a GPU, in a float type, groups a power of two that fits in registers."""
    return weight.is_cuda and weight.dtype in (torch.bfloat16, torch.float16, torch.float32) and 16 <= group <= 1024 and (
        group & (group - 1) == 0 and 2 <= bits <= 8
    )  # fmt: skip


def clip_fake_quant(
    weight: Tensor, factors: list[float], qmax: int, group: int, min_scale: float, dtype: torch.dtype,
    rows: int = ROWS, warps: int = WARPS, huge: tuple[float, float] = (2.0**50, 2.0**-78),
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(dequantized weight in ``dtype``, int32 [1] that is not zero when the weight holds NaN or infinity). ``huge``: (a size,
    the unit in which groups with larger weights are searched)."""
    flat = weight.detach().contiguous()
    out = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    bad = torch.zeros(1, dtype=torch.int32, device=weight.device)
    table = numbers_on(tuple(factors), weight.device)
    count = weight.numel() // group
    if count:
        _clip_kernel[(triton.cdiv(count, rows),)](
            flat, out, table, bad, count, len(factors), float(qmax), min_scale, *huge,
            GROUP=group, ROWS=rows, LEVELS=group.bit_length() - 1, num_warps=warps, enable_fp_fusion=False,
        )  # fmt: skip
    return out, bad
