"""Block types of ggml: what a block stores, how it is read, and how the scalar types are written.

Not a command. `encode(weight [..., I], "q4_K", importance)` returns the bytes that llama.cpp reads, `decode_rows` the weights
that it sees. Letters: N blocks, G groups of a block, I inputs. A block is a run of 1, 32 or 256 inputs of one row; a group is
the part of it that shares a scale, a vector the weights that are coded together (1; 8 for the lattice types of
:mod:`ggml_lattice`). A value is  scale[group] * unit(code) - offset[group].

The layouts are those of ggml-common.h and ggml-quants.c of llama.cpp; the tests compare with gguf-py and with the C library.
"""

from __future__ import annotations

import dataclasses
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


# ---------------------------------------------------------------- rows of a tensor


def known(name: str) -> BlockType:
    """The block type of a name; :class:`UserError` on one that is not in TYPES."""
    if name not in TYPES:
        raise UserError(f"ggml type {name!r} is unknown; known: {', '.join(TYPES)}")
    return TYPES[name]


def row_bytes(name: str, inputs: int) -> int:
    """Bytes of a row of ``inputs`` weights; :class:`UserError` where its length is no multiple of the block."""
    kind = known(name)
    if inputs % kind.block:
        raise UserError(f"a row of {inputs} weights is no multiple of the {kind.block} of {name}; use {fallback(name, inputs)}")
    return inputs // kind.block * kind.bytes


_SMALLER_BLOCK = {"q2_K": "q4_0", "q3_K": "q4_0", "q4_K": "q5_0", "q5_K": "q5_1", "q6_K": "q8_0", "iq4_xs": "iq4_nl"}


def fallback(name: str, inputs: int) -> str:
    """The type that llama-quantize takes instead for rows of ``inputs``: the name itself where its block fits, else a type
    with a block of 32, else f16 (tensor_type_fallback in llama-quant.cpp)."""
    if inputs % known(name).block == 0:
        return name
    other = "iq4_nl" if name in LATTICE else _SMALLER_BLOCK.get(name, name)
    return other if inputs % TYPES[other].block == 0 else "f16"
