"""Codes and scales of values that lie on a symmetric grid, and eight 4-bit codes in an int32, as compressed-tensors packs them.

Not a command. Letters: N groups, G group size, O outputs, I inputs.

    value  = dtype(code * scale), code -7..7 (int3: -3..3), scale bfloat16, one for G consecutive inputs
    packed = sum over k of (code[8 j + k] + 8) << 4 k, int32 [O, I/8]: offset binary, the first code in the lowest bits

Source of the format: compressed-tensors 0.17 (https://github.com/vllm-project/compressed-tensors), format "pack-quantized".
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from console import UserError
from moe_quant import Quantized, inverse_scale
from packed_view import CHUNK

NEIGHBOURS = (0, 1, -1, 2, -2)  # of a quotient in bfloat16: the stored maximum is rounded, so the scale may lie beside it


def bfloat16_neighbour(value: Tensor, steps: int) -> Tensor:
    """The positive bfloat16 ``steps`` away from each bfloat16 in float32 ``value``, as float32."""
    return (value.bfloat16().view(torch.int16) + steps).clamp_min(0).view(torch.bfloat16).float()


def recover_scales(values: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """(scale float32 [N], whether it was found [N]) of groups ``values`` [N, G] in their stored dtype.

    The scale is the bfloat16 s with values == dtype(code * s) for whole codes up to qmax; a group of zeros has scale 0. The
    largest value is taken to be the largest code first, so a group that fits several scales gets the smallest.
    """
    qmax = 2 ** (bits - 1) - 1
    largest = values.float().abs().amax(1)
    scale, found = torch.zeros_like(largest), largest == 0
    for code in range(qmax, 0, -1):
        for steps in NEIGHBOURS:
            rest = (~found).nonzero()[:, 0]
            if not len(rest):
                return scale, found
            guess = bfloat16_neighbour(largest[rest] / code, steps)
            own = values[rest]
            codes = (own.float() * inverse_scale(guess)[:, None]).round().clamp_(-qmax, qmax)
            fits = ((codes * guess[:, None]).to(own.dtype) == own).all(1)
            scale[rest[fits]] = guess[fits]
            found[rest[fits]] = True
    return scale, found


def codes_of(values: Tensor, bits: Sequence[int], group: int) -> Quantized:
    """Codes int8 [..., I] and scales float32 [..., I/G] with dtype(code * scale) == values, exactly; a zero has no sign.

    ``bits``: the grids that a group is tried on, in turn. Raises :class:`UserError` where a group lies on none of them.
    """
    groups = values.reshape(-1, group)
    codes = torch.empty(groups.shape, dtype=torch.int8, device=values.device)
    scales = torch.empty(len(groups), dtype=torch.float32, device=values.device)
    count = max(1, CHUNK.get(values.device.type, CHUNK["cpu"]) // group)
    for start in range(0, len(groups), count):
        piece = groups[start : start + count]
        scale, found = recover_scales(piece, bits[0])
        for own in bits[1:]:
            rest = (~found).nonzero()[:, 0]
            scale[rest], found[rest] = recover_scales(piece[rest], own)
        if not bool(found.all()):
            raise UserError(
                f"not on a symmetric grid of {' or '.join(map(str, bits))} bits in groups of {group}, so it cannot be packed; "
                "pack what quant_save makes with absmax, clip, wclip, gptq or gptq_refit"
            )
        scales[start : start + count] = scale
        codes[start : start + count] = piece.float().mul_(inverse_scale(scale)[:, None]).round_().clamp_(-7, 7)
    return Quantized(codes.view(values.shape), scales.view(*values.shape[:-1], -1))


def pack_codes(codes: Tensor) -> Tensor:
    """int8 [..., I] in -8..7, I a multiple of 8 -> int32 [..., I/8]."""
    shifted = (codes + 8).view(torch.uint8)
    return (shifted[..., 0::2] | shifted[..., 1::2] << 4).view(torch.int32)  # a byte holds two codes, the lower one first
