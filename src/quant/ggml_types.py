"""Block types of ggml: what a block stores, where its bits lie, and what a codec of a type can do.

Not a command. The bytes that llama.cpp reads come from :mod:`ggml_codecs`. Letters: N blocks, G groups of a block, I inputs. A
block is a run of 1, 32 or 256 inputs of one row; a group is the part of it that shares a scale, a vector the weights that are
coded together (1; 8 for the lattice types of :mod:`ggml_lattice`). A value is  scale[group] * unit(code) - offset[group].

The layouts are those of ggml-common.h and ggml-quants.c of llama.cpp; the tests compare with gguf-py and with the C library.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from torch import Tensor

from console import UserError

HALF_MAX = 65504.0
SMALL, LARGE = 1e-12, 1e9  # what lies below the least half float counts as 0, and what no type reaches is cut
TINY = 1e-30  # the least divisor
CHUNK_WEIGHTS = {"cpu": 1 << 16, "cuda": 1 << 25}  # coded together: what fits a core's cache, what fills a GPU


@dataclasses.dataclass(frozen=True)
class BlockType:
    """A type of tensor in a GGUF: ``block`` weights in ``bytes``, a scale per ``group``, ``vector`` weights per code;
    ``smaller``: the type with a block of 32 that llama-quantize takes for rows that the block does not fit."""

    name: str
    ggml: GGMLQuantizationType
    block: int
    bytes: int
    group: int
    vector: int
    smaller: str

    @property
    def bits(self) -> float:
        """Bits per weight, scales included."""
        return 8 * self.bytes / self.block


_FACTS: dict[str, tuple] = {  # group, vector, smaller
    "f32": (1,), "f16": (1,), "bf16": (1,), "q8_0": (32,), "q5_1": (32,), "q5_0": (32,), "q4_0": (32,), "iq4_nl": (32,),
    "q6_K": (16, 1, "q8_0"), "q5_K": (32, 1, "q5_1"), "q4_K": (32, 1, "q5_0"), "iq4_xs": (32, 1, "iq4_nl"),
    "q3_K": (16, 1, "q4_0"), "q2_K": (16, 1, "q4_0"), "iq3_s": (32, 8, "iq4_nl"), "iq3_xxs": (32, 8, "iq4_nl"),
    "iq2_s": (16, 8, "iq4_nl"), "iq2_xs": (16, 8, "iq4_nl"), "iq2_xxs": (32, 8, "iq4_nl"),
}  # fmt: skip


def _block_type(name: str, group: int, vector: int = 1, smaller: str = "") -> BlockType:
    ggml = GGMLQuantizationType[name.upper()]
    return BlockType(name, ggml, *GGML_QUANT_SIZES[ggml], group, vector, smaller or name)


TYPES = {name: _block_type(name, *facts) for name, facts in _FACTS.items()}
LATTICE = tuple(name for name, kind in TYPES.items() if kind.vector == 8)


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


def fallback(name: str, inputs: int) -> str:
    """The type that llama-quantize takes instead for rows of ``inputs``: the name itself where its block fits, else a type
    with a block of 32, else f16 (tensor_type_fallback in llama-quant.cpp)."""
    if inputs % known(name).block == 0:
        return name
    other = TYPES[name].smaller
    return other if inputs % TYPES[other].block == 0 else "f16"


# ---------------------------------------------------------------- what a type can do


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

    integers: dict[int, tuple[int, int]] = {}

    def __init__(self, block_type: BlockType) -> None:
        self.type = block_type

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

    def unpack(self, data: Tensor) -> tuple[Scales, Tensor]:
        """uint8 [N, bytes] -> the scales and the codes int32 [N, block/vector]."""
        raise NotImplementedError

    def decode(self, data: Tensor) -> Tensor:
        """uint8 [N, bytes] -> float32 [N, block]."""
        scales, codes = self.unpack(data)
        return self.block_values(codes, scales)

    def block_codes(self, w: Tensor, scales: Scales, importance: Tensor) -> tuple[Tensor, Tensor]:
        """:meth:`nearest` for whole blocks: codes [N, block/vector] and values [N, block] of ``w`` [N, block]."""
        size, rows = self.type.group, w.numel() // self.type.group
        scale, offset = scales.scale.reshape(rows, 1), scales.offset.reshape(rows, 1)
        codes, values = self.nearest(w.reshape(rows, size), scale, offset, importance.reshape(rows, size))
        return codes.reshape(len(w), -1), values.reshape(w.shape)

    def block_values(self, codes: Tensor, scales: Scales) -> Tensor:
        """The values [N, block] of whole blocks of codes, as decoded."""
        units = self.units(codes).view(len(codes), -1, self.type.group)
        return (units * scales.scale[..., None] - scales.offset[..., None]).view(len(codes), -1)

    def sweep_group(
        self, block: Tensor, values: Tensor, errors: Tensor, codes: Tensor, scale: Tensor, offset: Tensor, factor: Tensor,
        importance: Tensor,
    ) -> bool:  # fmt: skip
        """What :func:`ggml_round.sweep_group` does, by one kernel that leaves ``block`` as it was; False: there is none."""
        return False

    def improve_group(
        self, values: Tensor, residual: Tensor, codes: Tensor, metric: Tensor, inverses: Tensor | None,
        raw: tuple[Tensor, ...], index: int,
    ) -> Tensor | None:  # fmt: skip
        """What :meth:`ggml_round.Block.improve_group` does, by one kernel that leaves ``residual`` as it was; None: there is
        none. ``inverses``: of the metric of each vector; ``raw``: stored fields of the block, ``index``: which group it is."""
        return None


# ---------------------------------------------------------------- half floats and bits


def half(values: Tensor) -> Tensor:
    """float32 rounded to what float16 stores, infinities excluded."""
    return values.clamp(-HALF_MAX, HALF_MAX).half().float()


def half_bytes(values: Tensor) -> Tensor:
    """float32 [N] -> uint8 [N, 2]."""
    return values.clamp(-HALF_MAX, HALF_MAX).half()[:, None].contiguous().view(torch.uint8)


class Field(NamedTuple):
    """``repeat`` numbers of one name in a word: ``bits`` bits of each, from its bit ``shift`` on. All words of a run hold
    the numbers from ``first`` on."""

    name: str
    bits: int
    shift: int = 0
    repeat: int = 1
    first: int = 0


class Run(NamedTuple):
    """``bytes`` bytes of a block: little-endian words of ``size`` bytes, each with the fields from its lowest bits up. Of every
    ``inner`` words in a row the first numbers come first, then the second ones."""

    bytes: int
    fields: tuple[Field, ...]
    inner: int = 1
    size: int = 1

    def numbers(self, field: Field) -> slice:
        return slice(field.first, field.first + self.bytes // self.size * field.repeat)


def run(size: int, name: str, bits: int, shift: int = 0, inner: int = 1) -> Run:
    """``size`` bytes full of one field."""
    return Run(size, (Field(name, bits, shift, 8 // bits),), inner)


def join_fields(values: Mapping[str, Tensor], layout: Sequence[str | Run]) -> Tensor:
    """uint8 [N, bytes] of blocks: half floats [N] where ``layout`` is a name, else integers [N, numbers] in runs."""
    parts = []
    for part in layout:
        if isinstance(part, str):
            parts.append(half_bytes(values[part]))
            continue
        terms, offset = [], 0
        for field in part.fields:
            own = (values[field.name][:, part.numbers(field)] >> field.shift) & (2**field.bits - 1)
            own = own.to(torch.uint8 if part.size == 1 else torch.long).reshape(len(own), -1, field.repeat, part.inner)
            terms += [own[:, :, k] << (offset + k * field.bits) for k in range(field.repeat)]
            offset += field.repeat * field.bits
        word = functools.reduce(torch.bitwise_or, terms)
        if part.size > 1:
            word = (word[..., None] >> 8 * torch.arange(part.size, device=word.device) & 255).to(torch.uint8)
        parts.append(word.flatten(1))
    return torch.cat(parts, 1)


def split_fields(data: Tensor, layout: Sequence[str | Run], counts: Mapping[str, int]) -> dict[str, Tensor]:
    """The inverse of :func:`join_fields`; ``counts``: how many numbers int32 a block has of each name."""
    found: dict[str, Tensor] = {}
    at = 0
    for part in layout:
        size = 2 if isinstance(part, str) else part.bytes
        own = data[:, at : at + size]
        at += size
        if isinstance(part, str):
            found[part] = own.contiguous().view(torch.float16)[:, 0].float()
            continue
        word, offset = own.reshape(len(own), -1, 1, part.inner, part.size), 0
        if part.size == 1:
            word = word[..., 0]
        else:
            word = (word.long() << 8 * torch.arange(part.size, device=data.device)).sum(-1)
        for field in part.fields:
            shifted = word >> offset
            if field.repeat > 1:
                last = field.bits * field.repeat
                shifted = shifted >> torch.arange(0, last, field.bits, dtype=word.dtype, device=data.device)[:, None]
            numbers = (shifted & (2**field.bits - 1)).flatten(1).int()
            numbers = numbers << field.shift if field.shift else numbers
            if field.name not in found and numbers.shape[1] == counts[field.name]:
                found[field.name] = numbers
            else:
                whole = found.setdefault(field.name, numbers.new_zeros(len(data), counts[field.name]))
                whole[:, part.numbers(field)] |= numbers
            offset += field.bits * field.repeat
    for name in counts.keys() - found.keys():
        found[name] = torch.zeros(len(data), counts[name], dtype=torch.int32, device=data.device)
    return found
