"""Rows of weights to the bytes of a ggml type and back: the codec of each type, and whole tensors through it.

Not a command. `encode(weight [..., I], "q4_K", importance)` returns the bytes that llama.cpp reads, `decode_rows` the weights
that it sees.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from console import UserError
from ggml_lattice import LatticeCodec
from ggml_scalar import ScalarCodec
from ggml_types import CHUNK_WEIGHTS, HALF_MAX, LATTICE, BlockType, Codec, Scales, known, row_bytes


class CastCodec(Codec):
    """f32, f16 and bf16: a code is the bit pattern of one weight; there is nothing to fit."""

    DTYPES = {"f32": (torch.float32, torch.int32), "f16": (torch.float16, torch.int16), "bf16": (torch.bfloat16, torch.int16)}

    def __init__(self, block_type: BlockType) -> None:
        super().__init__(block_type)
        self.dtype, self.integer = self.DTYPES[block_type.name]

    def fit(self, w: Tensor, importance: Tensor) -> Scales:
        return Scales(torch.ones_like(w), torch.zeros_like(w), ())

    def nearest(self, x: Tensor, scale: Tensor, offset: Tensor, importance: Tensor) -> tuple[Tensor, Tensor]:
        codes = x.to(self.dtype).contiguous().view(self.integer).int()
        return codes, self.units(codes)

    def units(self, codes: Tensor) -> Tensor:
        return codes.to(self.integer).view(self.dtype).float()

    def rescaled(self, scales: Scales, factor: Tensor) -> Scales:
        return scales

    def pack(self, scales: Scales, codes: Tensor) -> Tensor:
        return codes.to(self.integer).contiguous().view(torch.uint8)

    def decode(self, data: Tensor) -> Tensor:
        return data.contiguous().view(self.dtype).float()


@functools.cache
def codec(name: str) -> Codec:
    """The codec of a type; :class:`UserError` on a name that is not in TYPES."""
    kind = known(name)
    return (LatticeCodec if name in LATTICE else CastCodec if name in CastCodec.DTYPES else ScalarCodec)(kind)


def balanced(importance: Tensor) -> Tensor:
    """Importance [N, block] divided by the mean of its block, at least 1e-6; ones for a block that has none."""
    mean = importance.mean(-1, keepdim=True)
    return torch.where(mean > 0, importance / mean.clamp_min(1e-38), 1.0).clamp_min(1e-6)


def fit_blocks(kind: Codec, w: Tensor, importance: Tensor) -> Scales:
    """:meth:`Codec.fit` of any number of blocks [N, block], in chunks of bounded memory."""
    parts = [kind.fit(w[part], importance[part]).raw for part in _chunks(w)]
    return kind.scales_of(*(torch.cat(fields) for fields in zip(*parts)))


def encode(weight: Tensor, name: str, importance: Tensor | None = None) -> Tensor:
    """Bytes uint8 [..., row_bytes] of ``weight`` [..., I], rounded for a small sum of importance * error**2.

    ``importance`` [I], or of a shape that broadcasts to the weight's; None: all weights alike.
    """
    size = row_bytes(name, weight.shape[-1])
    if importance is not None and importance.ndim > 1 and weight.ndim > 2:
        importance = importance.expand(*weight.shape[: weight.ndim - importance.ndim], *importance.shape)
        parts = [encode(w, name, importance[e if len(importance) > 1 else 0]) for e, w in enumerate(weight)]
        return torch.stack(parts)
    rows = weight.reshape(-1, weight.shape[-1])
    out = torch.empty(len(rows), size, dtype=torch.uint8, device=weight.device)
    for part in _chunks(rows):
        w = rows[part].float()
        own = torch.ones_like(w) if importance is None else importance.expand_as(rows)[part].to(w)
        out[part] = _encode_rows(w, codec(name), own)
    return out.view(*weight.shape[:-1], size)


def _encode_rows(w: Tensor, kind: Codec, importance: Tensor) -> Tensor:
    if not bool(torch.isfinite(w).all()):
        raise UserError(f"a weight to be written as {kind.type.name} is NaN or infinite")
    if not bool((torch.isfinite(importance) & (importance >= 0)).all()):
        raise UserError("an importance is negative, NaN or infinite; compute the imatrix again")
    blocks = w.reshape(-1, kind.type.block)
    importance = balanced(importance.reshape(blocks.shape))
    scales = kind.fit(blocks, importance)
    codes, values = kind.block_codes(blocks, scales, importance)
    check_range(blocks, values, kind, scales)
    return kind.pack(scales, codes).reshape(len(w), -1)


def check_range(blocks: Tensor, values: Tensor, kind: Codec, scales: Scales) -> None:
    """Raise :class:`UserError` where the scale of a block would have to be larger than a half float, or a weight than what a
    cast holds: the values would be cut without a word."""
    peak = blocks.abs().amax(1)
    if not bool((peak > HALF_MAX).any()):
        return
    cut = ~torch.isfinite(values).all(1)
    for field in scales.raw[:: 2 if len(scales.raw) > 2 else len(scales.raw) or 1]:  # d, and m where there is one
        cut |= field.abs() >= HALF_MAX
    if bool(cut.any()):
        raise UserError(
            f"a weight of {peak[cut].max().item():.4g} is beyond what {kind.type.name} stores (its scales are half floats); "
            "give the tensor bf16 or f32 by TENSOR_TYPES"
        )


def decode_rows(data: Tensor, name: str) -> Tensor:
    """float32 [..., I] of the bytes uint8 [..., row_bytes] of rows; :class:`UserError` where they are no whole blocks."""
    kind = codec(name)
    if data.shape[-1] % kind.type.bytes:
        raise UserError(f"a row of {data.shape[-1]} bytes is no multiple of the {kind.type.bytes} of a block of {name}")
    inputs = data.shape[-1] // kind.type.bytes * kind.type.block
    rows = data.reshape(-1, data.shape[-1])
    out = torch.empty(len(rows), inputs, device=data.device)
    for part in _chunks(out):
        out[part] = kind.decode(rows[part].reshape(-1, kind.type.bytes)).view(-1, inputs)
    return out.view(*data.shape[:-1], inputs)


def _chunks(rows: Tensor) -> list[slice]:
    """Slices of the rows [R, I] that are worked on together."""
    count = max(1, CHUNK_WEIGHTS[rows.device.type] // max(1, rows.shape[1]))
    return [slice(start, start + count) for start in range(0, len(rows), count)]
