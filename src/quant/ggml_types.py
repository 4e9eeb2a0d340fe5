"""Block types of ggml: what a block stores, how it is read, and how the scalar types are written.

Not a command. `encode(weight [..., I], "q4_K", importance)` returns the bytes that llama.cpp reads, `decode_rows` the weights
that it sees. Letters: N blocks, G groups of a block, I inputs. A block is a run of 1, 32 or 256 inputs of one row; a group is
the part of it that shares a scale, a vector the weights that are coded together (1; 8 for the lattice types of
:mod:`ggml_lattice`). A value is  scale[group] * unit(code) - offset[group].

The layouts are those of ggml-common.h and ggml-quants.c of llama.cpp; the tests compare with gguf-py and with the C library.
"""

from __future__ import annotations

import dataclasses
import functools
import types
from typing import NamedTuple

import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from torch import Tensor

from console import UserError

HALF_MAX = 65504.0
CHUNK_WEIGHTS = {"cpu": 1 << 16, "cuda": 1 << 25}  # coded together: what fits a core's cache, what fills a GPU


@dataclasses.dataclass(frozen=True)
class BlockType:
    """A type of tensor in a GGUF: ``block`` weights in ``bytes``, a scale per ``group``, ``vector`` weights per code."""

    name: str
    ggml: GGMLQuantizationType
    block: int
    bytes: int
    group: int
    vector: int

    @property
    def bits(self) -> float:
        """Bits per weight, scales included."""
        return 8 * self.bytes / self.block


def _block_type(name: str, group: int, vector: int = 1) -> BlockType:
    ggml = GGMLQuantizationType[name.upper()]
    return BlockType(name, ggml, *GGML_QUANT_SIZES[ggml], group, vector)


LATTICE = ("iq3_s", "iq3_xxs", "iq2_s", "iq2_xs", "iq2_xxs")
_GROUPS = {
    "f32": 1, "f16": 1, "bf16": 1, "q8_0": 32, "q5_1": 32, "q5_0": 32, "q4_0": 32, "iq4_nl": 32,
    "q6_K": 16, "q5_K": 32, "q4_K": 32, "iq4_xs": 32, "q3_K": 16, "q2_K": 16,
    "iq3_s": 32, "iq3_xxs": 32, "iq2_s": 16, "iq2_xs": 16, "iq2_xxs": 32,
}  # fmt: skip
TYPES = {name: _block_type(name, group, 8 if name in LATTICE else 1) for name, group in _GROUPS.items()}


class Scales(NamedTuple):
    """``scale`` and ``offset`` [N, block/group] float32 as decoded; ``raw``: the stored fields that :meth:`Codec.pack` needs,
    such that scale and offset are those of ``codec.scales_of(*raw)``; raw[0] is the half float of the block."""

    scale: Tensor
    offset: Tensor
    raw: tuple[Tensor, ...]


class Codec:
    """One block type: fits scales, finds codes, packs and decodes; every method works on many blocks at once.

    ``integers``: which of the ``raw`` of Scales hold an integer per group, and their least and largest value.
    """

    integers: dict[int, tuple[int, int]] = {1: (0, 15)}

    def __init__(self, block_type: BlockType) -> None:
        self.type = block_type

    def kernels(self, x: Tensor) -> types.ModuleType | None:
        """The module of fused kernels for weights on the device of ``x``, if there is one."""
        return None

    def group_kernels(self, x: Tensor) -> types.ModuleType | None:
        """The one that sweeps and descends for them, in fewer launches than ggml_round itself."""
        return self.kernels(x)

    def fit(self, w: Tensor, importance: Tensor) -> Scales:
        """Scales of small ``sum importance * (w - value)**2``; w, importance [N, block] float32."""
        raise NotImplementedError

    def scales_of(self, *raw: Tensor) -> Scales:
        """The scales that stored fields decode to; for any number of groups."""
        raise NotImplementedError

    def nearest(self, x: Tensor, scale: Tensor, offset: Tensor, importance: Tensor) -> tuple[Tensor, Tensor]:
        """Codes int32 [N, V/vector] and values float32 [N, V] nearest to ``x`` [N, V] for scale, offset [N, 1].

        The values are exactly those that :meth:`decode` gives.
        """
        raise NotImplementedError

    def units(self, codes: Tensor) -> Tensor:
        """[N, C] -> float32 [N, C * vector], with value = scale * unit - offset."""
        raise NotImplementedError

    def rescaled(self, scales: Scales, factor: Tensor) -> Scales:
        """The scales of each block times ``factor`` [N], as near as the format stores them."""
        raise NotImplementedError

    def pack(self, scales: Scales, codes: Tensor) -> Tensor:
        """uint8 [N, bytes] of the scales and the codes [N, block/vector]."""
        raise NotImplementedError

    def decode(self, data: Tensor) -> Tensor:
        """uint8 [N, bytes] -> float32 [N, block]."""
        raise NotImplementedError

    def block_codes(self, w: Tensor, scales: Scales, importance: Tensor) -> tuple[Tensor, Tensor]:
        """:meth:`nearest` for whole blocks: codes [N, block/vector] and values [N, block] of ``w`` [N, block]."""
        size, rows = self.type.group, w.numel() // self.type.group
        scale, offset = scales.scale.reshape(rows, 1), scales.offset.reshape(rows, 1)
        codes, values = self.nearest(w.reshape(rows, size), scale, offset, importance.reshape(rows, size))
        return codes.reshape(len(w), -1), values.reshape(w.shape)


# ---------------------------------------------------------------- bits and half floats


def half(values: Tensor) -> Tensor:
    """float32 rounded to what float16 stores, infinities excluded."""
    return values.clamp(-HALF_MAX, HALF_MAX).half().float()


def half_bytes(values: Tensor) -> Tensor:
    """float32 [N] -> uint8 [N, 2]."""
    return values.clamp(-HALF_MAX, HALF_MAX).half()[:, None].contiguous().view(torch.uint8)


def bytes_half(data: Tensor) -> Tensor:
    """uint8 [N, 2] -> float32 [N]."""
    return data.contiguous().view(torch.float16)[:, 0].float()


def split_bits(data: Tensor, bits: int, inner: int) -> Tensor:
    """The ``bits``-wide fields of uint8 [N, B], as uint8 [N, B * 8/bits].

    Bytes come in runs of ``inner``: the lowest bits of a run give the first ``inner`` fields, the next bits the next ones.
    """
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=data.device)[:, None]
    fields = (data.reshape(len(data), -1, 1, inner) >> shifts) & (2**bits - 1)
    return fields.reshape(len(data), -1)


def join_bits(fields: Tensor, bits: int, inner: int) -> Tensor:
    """The inverse of :func:`split_bits`: integers [N, F] below 2**bits -> uint8 [N, F * bits/8]."""
    runs = fields.to(torch.uint8).reshape(len(fields), -1, 8 // bits, inner)
    out = runs[:, :, 0].clone()
    for k in range(1, 8 // bits):
        out |= runs[:, :, k] << (k * bits)
    return out.reshape(len(fields), -1)


# ---------------------------------------------------------------- types without a scale


class CastCodec(Codec):
    """f32, f16 and bf16: a code is the bit pattern of one weight; there is nothing to fit."""

    DTYPES = {"f32": (torch.float32, torch.int32), "f16": (torch.float16, torch.int16), "bf16": (torch.bfloat16, torch.int16)}

    integers = {}

    def __init__(self, block_type: BlockType) -> None:
        super().__init__(block_type)
        self.dtype, self.integer = self.DTYPES[block_type.name]

    def fit(self, w: Tensor, importance: Tensor) -> Scales:
        one = torch.ones_like(w)
        return Scales(one, torch.zeros_like(w), ())

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


# ---------------------------------------------------------------- rows of a tensor


@functools.cache
def codec(name: str) -> Codec:
    """The codec of a type; :class:`UserError` on a name that is not in TYPES."""
    block_type = _known(name)
    if name in LATTICE:
        from ggml_lattice import lattice_codec

        return lattice_codec(block_type)
    if name in CastCodec.DTYPES:
        return CastCodec(block_type)
    from ggml_scalar import ScalarCodec

    return ScalarCodec(block_type)


def _known(name: str) -> BlockType:
    if name not in TYPES:
        raise UserError(f"ggml type {name!r} is unknown; known: {', '.join(TYPES)}")
    return TYPES[name]


def row_bytes(name: str, inputs: int) -> int:
    """Bytes of a row of ``inputs`` weights; :class:`UserError` where its length is no multiple of the block."""
    kind = _known(name)
    if inputs % kind.block:
        raise UserError(f"a row of {inputs} weights is no multiple of the {kind.block} of {name}; use {fallback(name, inputs)}")
    return inputs // kind.block * kind.bytes


_SMALLER_BLOCK = {"q2_K": "q4_0", "q3_K": "q4_0", "q4_K": "q5_0", "q5_K": "q5_1", "q6_K": "q8_0", "iq4_xs": "iq4_nl"}


def fallback(name: str, inputs: int) -> str:
    """The type that llama-quantize takes instead for rows of ``inputs``: the name itself where its block fits, else a type
    with a block of 32, else f16 (tensor_type_fallback in llama-quant.cpp)."""
    if inputs % _known(name).block == 0:
        return name
    other = "iq4_nl" if name in LATTICE else _SMALLER_BLOCK.get(name, name)
    return other if inputs % TYPES[other].block == 0 else "f16"


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
    codes, _ = kind.block_codes(blocks, scales, importance)
    return kind.pack(scales, codes).reshape(len(w), -1)


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
