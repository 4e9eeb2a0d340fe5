"""The scalar block types of ggml: every weight has its own integer; scales of groups are integers times a half float.

Not a command; use them through :mod:`ggml_types`. Layouts: ggml-common.h of llama.cpp. Letters: N blocks, G groups of a block.
"""

from __future__ import annotations

import dataclasses
import functools
import types
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
from gguf.quants import IQ4_NL
from torch import Tensor

from ggml_fit import fit_minimum, fit_symmetric, problem
from ggml_types import BlockType, Codec, Scales, bytes_half, half, half_bytes, join_bits, split_bits

if TYPE_CHECKING:
    import scalar_kernel

KERNEL = True  # on a GPU by scalar_kernel, in tens of thousands of launches less; False: as on a CPU

# ---------------------------------------------------------------- integers of groups: (multipliers, minimums) [N, G]


def _split_k4(data: Tensor) -> tuple[Tensor, Tensor]:
    """q4_K, q5_K: 12 bytes, six bits each; the upper two of groups 4..7 lie above the six of groups 0..3."""
    low, offset, mixed = data[:, :4], data[:, 4:8], data[:, 8:]
    scale = torch.cat([low & 63, (mixed & 15) | (low >> 2 & 48)], 1)
    return scale, torch.cat([offset & 63, (mixed >> 4) | (offset >> 2 & 48)], 1)


def _join_k4(scale: Tensor, offset: Tensor) -> Tensor:
    first = scale[:, :4] | (scale[:, 4:] >> 4 << 6)
    second = offset[:, :4] | (offset[:, 4:] >> 4 << 6)
    return torch.cat([first, second, (scale[:, 4:] & 15) | ((offset[:, 4:] & 15) << 4)], 1)


def _split_q2(data: Tensor) -> tuple[Tensor, Tensor]:
    return data & 15, data >> 4


def _join_q2(scale: Tensor, offset: Tensor) -> Tensor:
    return scale | (offset << 4)


def _split_q3(data: Tensor) -> tuple[Tensor, None]:
    """q3_K: the low four bits of 16 scales in eight bytes, then their high two bits in four."""
    return split_bits(data[:, :8], 4, 8) | (split_bits(data[:, 8:], 2, 4) << 4), None


def _join_q3(scale: Tensor, _: None) -> Tensor:
    return torch.cat([join_bits(scale & 15, 4, 8), join_bits(scale >> 4, 2, 4)], 1)


def _split_iq4(data: Tensor) -> tuple[Tensor, None]:
    """iq4_xs: the high two bits of eight scales in two bytes, then their low four bits in four."""
    return split_bits(data[:, 2:], 4, 1) | (split_bits(data[:, :2], 2, 1) << 4), None


def _join_iq4(scale: Tensor, _: None) -> Tensor:
    return torch.cat([join_bits(scale >> 4, 2, 1), join_bits(scale & 15, 4, 1)], 1)


def _split_q6(data: Tensor) -> tuple[Tensor, None]:
    return data ^ 128, None


def _join_q6(scale: Tensor, _: None) -> Tensor:
    return scale ^ 128


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a block is written.

    ``fields`` in the order of the bytes: "d" and "m" (half floats: scale and minimum of the block), "s" (the integers of the
    groups), and ("low" or "high", bits, inner): the lower and upper bits of the codes as :func:`split_bits` reads them.
    """

    fields: tuple
    zero: int  # code - zero is the unit
    levels: int
    table: tuple[int, ...] | None = None  # units by code, where they are not evenly spaced
    scale_bytes: int = 0  # 0: a block is one group, whose scale is d itself
    scale_zero: int = 0  # stored integer - scale_zero multiplies d
    scale_levels: int = 2
    split: Callable | None = None
    join: Callable | None = None

    @property
    def has_minimum(self) -> bool:
        return "m" in self.fields


LAYOUTS: dict[str, Layout] = {
    "q8_0": Layout(("d", ("low", 8, 1)), 128, 256),
    "q5_1": Layout(("d", "m", ("high", 1, 1), ("low", 4, 16)), 0, 32),
    "q5_0": Layout(("d", ("high", 1, 1), ("low", 4, 16)), 16, 32),
    "q4_0": Layout(("d", ("low", 4, 16)), 8, 16),
    "iq4_nl": Layout(("d", ("low", 4, 16)), 0, 16, IQ4_NL.kvalues),
    "q6_K": Layout((("low", 4, 64), ("high", 2, 32), "s", "d"), 32, 64, None, 16, 128, 256, _split_q6, _join_q6),
    "q5_K": Layout(("d", "m", "s", ("high", 1, 32), ("low", 4, 32)), 0, 32, None, 12, 0, 64, _split_k4, _join_k4),
    "q4_K": Layout(("d", "m", "s", ("low", 4, 32)), 0, 16, None, 12, 0, 64, _split_k4, _join_k4),
    "iq4_xs": Layout(("d", "s", ("low", 4, 16)), 0, 16, IQ4_NL.kvalues, 6, 32, 64, _split_iq4, _join_iq4),
    "q3_K": Layout((("high", 1, 32), ("low", 2, 32), "s", "d"), 4, 8, None, 12, 32, 64, _split_q3, _join_q3),
    "q2_K": Layout(("s", ("low", 2, 32), "d", "m"), 0, 4, None, 16, 0, 16, _split_q2, _join_q2),
}

TOP_FACTORS = [0.7 + 0.03 * k for k in range(24)]


def minimum_tries(highest: int) -> list[tuple[float, float]]:
    """Ranges that :func:`ggml_fit.search_minimum` tries."""
    low, high = (-0.06, 0.12) if highest > 3 else (-0.2, 0.4)
    stretches = [1 + low + (high - low) * k / 7 for k in range(8)]
    return [(highest * stretch, share) for stretch in stretches for share in (1.0, 0.93, 0.86, 0.78, 0.7)]


def block_tops(low: int, high: int) -> list[float]:
    """Multipliers that the largest scale of a block is tried on."""
    return [end * (0.8 + 0.3 * k / 11) for k in range(12) for end in (low, high)]


class Stored(NamedTuple):
    """The fields of N blocks: half floats d, m [N] as float32, integers of groups [N, G]; m and minimum are zeros where the
    type has none (q5_1 adds m, so its offset is -m)."""

    d: Tensor
    multiplier: Tensor
    m: Tensor
    minimum: Tensor


class ScalarCodec(Codec):
    """A type whose weights have one integer each."""

    def __init__(self, block_type: BlockType) -> None:
        super().__init__(block_type)
        self.layout = LAYOUTS[block_type.name]
        self.groups = block_type.block // block_type.group
        highest = self.layout.scale_levels - 1 - self.layout.scale_zero
        self.integers = {1: (-self.layout.scale_zero, highest)} if self.layout.scale_bytes else {}
        if self.layout.scale_bytes and self.layout.has_minimum:
            self.integers[3] = (0, highest)

    def scales_of(self, d: Tensor, multiplier: Tensor, m: Tensor, minimum: Tensor) -> Scales:
        """The decoded scales of :class:`Stored` fields, by the same float32 products as llama.cpp."""
        scale = d[:, None] * multiplier.float()
        offset = m[:, None] * minimum.float()
        return Scales(scale, offset, (d, multiplier, m, minimum))

    def fit(self, w: Tensor, importance: Tensor) -> Scales:
        layout, kind = self.layout, self.type
        if layout.has_minimum:
            highest = layout.levels - 1
            how = (minimum_tries(highest), layout.scale_levels if layout.scale_bytes else 1)
        else:
            low, high = -layout.scale_zero, layout.scale_levels - 1 - layout.scale_zero
            how = (self._tops(), block_tops(low, high) if layout.scale_bytes else [], low, high)
        kernels = self.kernels(w)
        if kernels is None:
            fit = fit_minimum if layout.has_minimum else fit_symmetric
            choice = fit(problem(w, importance, kind.group, self._snap), *how)
        elif layout.has_minimum:
            choice = kernels.fit_minimum(w, importance, kind.group, highest, *how)
        else:
            choice = kernels.fit_symmetric(w, importance, kind.group, self.kernel_units(w.device), *how)
        d, multiplier, m, minimum = choice
        if kind.name == "q5_1":
            m, minimum = -m, -minimum
        if kind.name == "q8_0":  # its grid is symmetric, and llama.cpp writes d >= 0
            d = d.abs()
        return self.scales_of(d, multiplier.int(), m, minimum.int())

    def kernels(self, x: Tensor) -> types.ModuleType | None:
        if not (x.is_cuda and KERNEL):
            return None
        import scalar_kernel  # Triton is there where a GPU is

        return scalar_kernel

    def kernel_units(self, device: torch.device) -> scalar_kernel.Units:
        from scalar_kernel import Units, table_of

        layout = self.layout
        if layout.table is not None:
            return Units(float(layout.table[0]), float(layout.table[-1]), 0, table_of(layout.table, device))
        low, high = self._range()
        return Units(float(low), float(high), layout.zero, None)

    def _range(self) -> tuple[int, int]:
        """The least and largest of evenly spaced units."""
        low = 1 if self.layout.levels == 256 else 0  # -128 is decodable but left out, as llama.cpp never writes it
        return low - self.layout.zero, self.layout.levels - 1 - self.layout.zero

    def _snap(self, units: Tensor) -> Tensor:
        """Real units to the nearest that the type has, in place."""
        if self.layout.table is None:
            return units.round_().clamp_(*self._range())
        index = units.mul_(2).floor_().clamp_(-256, 255).add_(256).int()
        return self._lookup(units.device)[index]

    @functools.lru_cache(maxsize=4)  # noqa: B019 (codecs live as long as the process)
    def _lookup(self, device: torch.device) -> Tensor:
        """The nearest unit of the table for every half step from -128 to 128: midpoints are multiples of a half."""
        table = torch.tensor(self.layout.table, dtype=torch.float32)
        half_steps = torch.arange(-256, 256) / 2 + 0.25
        return table[(half_steps[:, None] - table).abs().argmin(1)].to(device)

    def _tops(self) -> list[float]:
        """Units that the largest weight of a group is tried on."""
        layout = self.layout
        if layout.table is not None:
            return [sign * top for top in range(88, 152, 4) for sign in (-1, 1)]
        low, high = layout.zero, layout.levels - 1 - layout.zero
        if layout.levels == 256:
            return [high - 0.5 * k for k in range(9)]
        return [-low * f for f in TOP_FACTORS] + [high * f for f in TOP_FACTORS]

    def nearest(self, x: Tensor, scale: Tensor, offset: Tensor, importance: Tensor) -> tuple[Tensor, Tensor]:
        layout = self.layout
        inverse = torch.where(scale == 0, 0.0, 1.0 / scale)
        unit = (x + offset) * inverse
        if layout.table is None:
            codes = self._snap(unit).add_(layout.zero).int()
        else:
            codes = torch.bucketize(unit, self._midpoints(x.device), out_int32=True)
        return codes, scale * self.units(codes) - offset

    @functools.lru_cache(maxsize=4)  # noqa: B019
    def _table(self, device: torch.device) -> Tensor:
        return torch.tensor(self.layout.table, dtype=torch.float32, device=device)

    @functools.lru_cache(maxsize=4)  # noqa: B019
    def _midpoints(self, device: torch.device) -> Tensor:
        table = self._table(device)
        return (table[1:] + table[:-1]) / 2

    def units(self, codes: Tensor) -> Tensor:
        if self.layout.table is None:
            return (codes - self.layout.zero).float()
        return self._table(codes.device)[codes]

    def rescaled(self, scales: Scales, factor: Tensor) -> Scales:
        d, multiplier, m, minimum = scales.raw
        return self.scales_of(half(d * factor), multiplier, half(m * factor), minimum)

    def pack(self, scales: Scales, codes: Tensor) -> Tensor:
        stored, layout, parts = Stored(*scales.raw), self.layout, []
        low_bits = next(field[1] for field in layout.fields if field[0] == "low")
        for field in layout.fields:
            if field in ("d", "m"):
                parts.append(half_bytes(stored.d if field == "d" else stored.m))
            elif field == "s":
                multiplier = (stored.multiplier + layout.scale_zero).to(torch.uint8)
                parts.append(layout.join(multiplier, stored.minimum.to(torch.uint8)))
            elif field[1] == 8:
                parts.append((codes - layout.zero).to(torch.int8).view(torch.uint8))
            else:
                part = codes & (2**low_bits - 1) if field[0] == "low" else codes >> low_bits
                parts.append(join_bits(part, *field[1:]))
        return torch.cat(parts, 1)

    def unpack(self, data: Tensor) -> tuple[Scales, Tensor]:
        """uint8 [N, bytes] -> the scales and the codes int32 [N, block]."""
        layout, start, found = self.layout, 0, {}
        for field in layout.fields:
            size = self._field_bytes(field)
            own = data[:, start : start + size]
            start += size
            if field in ("d", "m"):
                found[field] = bytes_half(own)
            elif field == "s":
                found["s"] = layout.split(own)
            elif field[1] == 8:
                found["low"] = (own ^ 128).int()
            else:
                found[field[0]] = split_bits(own, *field[1:]).int()
        codes = found["low"]
        if "high" in found:
            codes = codes | found["high"] << next(field[1] for field in layout.fields if field[0] == "low")
        return self.scales_of(*self._stored(found)), codes

    def _field_bytes(self, field: str | tuple) -> int:
        if field == "s":
            return self.layout.scale_bytes
        return 2 if field in ("d", "m") else self.type.block * field[1] // 8

    def _stored(self, found: dict) -> Stored:
        d = found["d"]
        one = torch.ones(len(d), self.groups, dtype=torch.int32, device=d.device)
        if "s" not in found:
            return Stored(d, one, found.get("m", torch.zeros_like(d)), -one if "m" in found else one * 0)
        multiplier, minimum = found["s"]
        multiplier = multiplier.int() - self.layout.scale_zero
        return Stored(d, multiplier, found.get("m", torch.zeros_like(d)), one * 0 if minimum is None else minimum.int())

    def decode(self, data: Tensor) -> Tensor:
        scales, codes = self.unpack(data)
        size = self.type.group
        values = self.units(codes).view(len(data), -1, size) * scales.scale[..., None] - scales.offset[..., None]
        return values.reshape(len(data), -1)
