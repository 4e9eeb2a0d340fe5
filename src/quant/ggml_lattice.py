"""The lattice types of ggml (iq3_s, iq3_xxs, iq2_s, iq2_xs, iq2_xxs): eight signs and one or two points of a fixed grid.

Not a command; use them through :mod:`ggml_types`. A vector is eight weights: their signs, and their sizes as one grid point of
eight dimensions (iq2) or two of four (iq3). The xxs and xs types store seven signs: the number of minus signs is even. A
group's scale is  d * step * (2 * level + 1)  with d a half float of the block and a level of four bits.

Codes are found exactly: the point of least  sum w (x - s g)^2  over the whole grid, and where the signs would be odd the
cheapest flip, points chosen anew. With t = |x| / s that is the least  w . g^2 - 2 (w t) . g,  one matrix product with the grid.
llama.cpp looks at some neighbours of the rounded sizes and flips before it looks. Layouts: ggml-common.h of llama.cpp, grids:
gguf-py. Letters: N blocks, G groups of a block, M vectors or parts of them, P points.
"""

from __future__ import annotations

import dataclasses
import functools
import types
from collections.abc import Callable
from typing import NamedTuple

import torch
from gguf import quants
from torch import Tensor

from devices import numbers_on
from ggml_types import BlockType, Codec, Scales, bytes_half, half, half_bytes, join_bits, split_bits

LEVELS = 16
DELTAS = tuple(0.7 + 0.02 * k for k in range(33))  # the last gives way to 0
HALF_TINY = 2.0**-24  # the smallest that a half float holds: tiny blocks use low levels of it
FAR = 1e9  # of |x| / scale: keeps products finite and is far beyond every grid
SCORE_BYTES = {"cpu": 1 << 19, "cuda": 1 << 30}  # of a matrix of scores: half of a core's cache, a fraction of a GPU
KERNEL = True  # on a GPU by lattice_kernel; False: by matrix products, as on a CPU, with the same costs
GROUPS = True  # there, also sweep and descent of a group in one launch
INDEX_BITS = 10  # of the largest grid; a code is  signs | index << 8 | second index << 18


class Stored(NamedTuple):
    """The integers of N blocks: d [N] float32, level [N, G], index [N, 32 * parts], sign [N, 32] (bit i: weight i < 0)."""

    d: Tensor
    level: Tensor
    index: Tensor
    sign: Tensor


# ---------------------------------------------------------------- bytes


def _even(sign: Tensor) -> Tensor:
    """Seven stored sign bits -> eight with an even number of ones."""
    parity = sign ^ (sign >> 4)
    parity = parity ^ (parity >> 2)
    parity = parity ^ (parity >> 1)
    return sign | ((parity & 1) << 7)


def _join_words(sign: Tensor, level: Tensor) -> Tensor:
    """Four times seven signs and a level in little-endian 32 bits: sign [N, 32], level [N, 8] -> uint8 [N, 8, 4]."""
    shifts = torch.arange(0, 28, 7, device=sign.device)
    word = ((sign.long() & 127).view(-1, 8, 4) << shifts).sum(-1) | (level.long() << 28)
    return (word[..., None] >> torch.arange(0, 32, 8, device=sign.device) & 255).to(torch.uint8)


def _split_words(data: Tensor) -> tuple[Tensor, Tensor]:
    """uint8 [N, 8, 4] -> sign [N, 32], level [N, 8]."""
    word = (data.long() << torch.arange(0, 32, 8, device=data.device)).sum(-1)
    sign = word[..., None] >> torch.arange(0, 28, 7, device=data.device) & 127
    return _even(sign.int()).view(len(data), 32), (word >> 28).int()


def _join_iq3_xxs(s: Stored) -> tuple[Tensor, ...]:
    return s.index.to(torch.uint8), _join_words(s.sign, s.level).flatten(1)


def _split_iq3_xxs(d: Tensor, data: Tensor) -> Stored:
    sign, level = _split_words(data[:, 64:].view(-1, 8, 4))
    return Stored(d, level, data[:, :64].int(), sign)


def _join_iq2_xxs(s: Stored) -> tuple[Tensor, ...]:
    return (torch.cat([s.index.to(torch.uint8).view(-1, 8, 4), _join_words(s.sign, s.level)], 2).flatten(1),)


def _split_iq2_xxs(d: Tensor, data: Tensor) -> Stored:
    index, words = data.reshape(-1, 8, 2, 4).unbind(2)
    sign, level = _split_words(words)
    return Stored(d, level, index.reshape(-1, 32).int(), sign)


def _join_iq2_xs(s: Stored) -> tuple[Tensor, ...]:
    word = s.index | (s.sign & 127) << 9
    return torch.stack([word & 255, word >> 8], 2).to(torch.uint8).flatten(1), join_bits(s.level, 4, 1)


def _split_iq2_xs(d: Tensor, data: Tensor) -> Stored:
    word = data[:, :64:2].int() | data[:, 1:64:2].int() << 8
    return Stored(d, split_bits(data[:, 64:], 4, 1).int(), word & 511, _even(word >> 9))


def _join_iq2_s(s: Stored) -> tuple[Tensor, ...]:
    low, high = (s.index & 255).to(torch.uint8), join_bits(s.index >> 8, 2, 1)
    return low, s.sign.to(torch.uint8), high, join_bits(s.level, 4, 1)


def _split_iq2_s(d: Tensor, data: Tensor) -> Stored:
    low, sign, high, level = data.split([32, 32, 8, 8], 1)
    return Stored(d, split_bits(level, 4, 1).int(), low.int() | split_bits(high, 2, 1).int() << 8, sign.int())


def _join_iq3_s(s: Stored) -> tuple[Tensor, ...]:
    low, high = (s.index & 255).to(torch.uint8), join_bits(s.index >> 8, 1, 1)
    return low, high, s.sign.to(torch.uint8), join_bits(s.level, 4, 1)


def _split_iq3_s(d: Tensor, data: Tensor) -> Stored:
    low, high, sign, level = data.split([64, 8, 32, 4], 1)
    return Stored(d, split_bits(level, 4, 1).int(), low.int() | split_bits(high, 1, 1).int() << 8, sign.int())


@dataclasses.dataclass(frozen=True)
class Layout:
    """``step``: scale = d * step * (2 level + 1). ``parts``: points of a vector. ``even``: seven signs are stored.

    ``factors``: the largest size of the grid is tried at these multiples of a middle of the group's largest weight and its
    root mean fourth power. They span what 98 % of groups want, in a trained model, Gaussian or heavy-tailed.
    """

    step: float
    parts: int
    even: bool
    factors: tuple[float, ...]
    join: Callable[[Stored], tuple[Tensor, ...]]
    split: Callable[[Tensor, Tensor], Stored]


def _spread(low: float, high: float, count: int) -> tuple[float, ...]:
    """``count`` numbers from low to high in equal ratios."""
    return tuple(low * (high / low) ** (k / (count - 1)) for k in range(count))


LAYOUTS = {
    "iq3_s": Layout(1.0, 2, False, _spread(1.0, 2.1, 12), _join_iq3_s, _split_iq3_s),
    "iq3_xxs": Layout(0.25, 2, True, _spread(1.0, 2.1, 12), _join_iq3_xxs, _split_iq3_xxs),
    "iq2_s": Layout(0.125, 1, False, _spread(0.75, 1.9, 9), _join_iq2_s, _split_iq2_s),
    "iq2_xs": Layout(0.125, 1, True, _spread(0.75, 1.9, 9), _join_iq2_xs, _split_iq2_xs),
    "iq2_xxs": Layout(0.125, 1, True, _spread(0.75, 1.9, 9), _join_iq2_xxs, _split_iq2_xxs),
}


# ---------------------------------------------------------------- the grid


class Grid(NamedTuple):
    """``points`` [P, 8 / parts], sizes; ``table`` [16 / parts, P]: squares above sizes; ``search``: tables whose
    squares are times each factor of the search for scales; ``signs`` [256, 8]: +1 and -1."""

    points: Tensor
    table: Tensor
    search: list[Tensor]
    signs: Tensor
    smallest: float
    largest: float


@functools.cache
def _grid(name: str, device: torch.device) -> Grid:
    source = getattr(quants, name.upper())
    source.init_grid()
    points = torch.from_numpy(source.grid).float().reshape(source.grid_shape).to(device)
    squares = [points.square() * factor for factor in (1.0, *LAYOUTS[name].factors)]
    table, *search = (torch.cat([square, points], 1).T.contiguous() for square in squares)
    bits = torch.arange(256, device=device)[:, None] >> torch.arange(8, device=device) & 1
    return Grid(points, table, search, 1.0 - 2.0 * bits, float(points.min()), float(points.max()))


def _parts(count: int, table: Tensor) -> list[slice]:
    """Slices of ``count`` rows whose products with the table are not too large."""
    rows = max(1, SCORE_BYTES[table.device.type] // (4 * table.shape[1]))
    return [slice(start, start + rows) for start in range(0, count, rows)]


def _lowest(w: Tensor, pull: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """The least  w . g^2 - 2 pull . g  over the points g, and its point: [M, 8 / parts] twice -> [M], [M] int64."""
    features = torch.cat([w, pull * -2.0], 1)
    score, index = w.new_empty(len(w)), torch.empty(len(w), dtype=torch.long, device=w.device)
    for part in _parts(len(w), grid.table):
        torch.min(features[part] @ grid.table, 1, out=(score[part], index[part]))
    return score, index


def _inverse(scale: Tensor) -> Tensor:
    return torch.where(scale > 0, 1.0 / scale, 0.0)


class LatticeCodec(Codec):
    """A type whose weights are coded by eights as points of a grid."""

    def __init__(self, block_type: BlockType) -> None:
        super().__init__(block_type)
        self.layout = LAYOUTS[block_type.name]
        self.width = 8 // self.layout.parts

    def grid(self, device: torch.device) -> Grid:
        return _grid(self.type.name, device)

    # ------------------------------------------------------------ codes

    def kernels(self, x: Tensor) -> types.ModuleType | None:
        if not (x.is_cuda and KERNEL):
            return None
        import lattice_kernel  # Triton is there where a GPU is

        return lattice_kernel

    def group_kernels(self, x: Tensor) -> types.ModuleType | None:
        return self.kernels(x) if GROUPS else None

    def nearest(self, x: Tensor, scale: Tensor, offset: Tensor, importance: Tensor) -> tuple[Tensor, Tensor]:
        grid = self.grid(x.device)
        if kernels := self.kernels(x):
            return kernels.nearest(x, scale, importance, grid.table, self.layout.parts, self.layout.even, FAR, INDEX_BITS)
        t = (x * _inverse(scale)).clamp_(-FAR, FAR).reshape(-1, 8).contiguous()
        w = importance.reshape(-1, 8)
        w = (w / w.amax(1, keepdim=True).clamp_min(1e-30)).contiguous()
        pull = w * t.abs()
        minus = t < 0
        score, index = _lowest(w.view(-1, self.width), pull.view(-1, self.width), grid)
        index = index.view(-1, self.layout.parts)
        if self.layout.even:
            odd = (minus.sum(1) & 1).nonzero()[:, 0]
            place, part, point = self._flips(w[odd], pull[odd], score.view(index.shape)[odd], index[odd], grid)
            minus[odd, place] ^= True
            index[odd, part] = point
        bits = 1 << torch.arange(8, dtype=torch.int32, device=x.device)
        codes = (minus.int() * bits).sum(1, dtype=torch.int32)
        for part in range(self.layout.parts):
            codes |= index[:, part].int() << (8 + INDEX_BITS * part)
        codes = codes.view(len(x), x.shape[1] // 8)
        return codes, scale * self.units(codes)

    def _flips(self, w: Tensor, pull: Tensor, score: Tensor, index: Tensor, grid: Grid) -> tuple[Tensor, Tensor, Tensor]:
        """The one sign to flip in each of M vectors, for the least error with points chosen anew.

        w, pull [M, 8]; score, index [M, parts] without a flip -> place, part, point [M]. Flipping weight j costs at least
        4 pull_j times the smallest size, and at most 4 pull_k times the present size of any k: few j are left to try.
        """
        sizes = grid.points[index].view(-1, 8)
        limit = (pull * sizes).amin(1, keepdim=True)
        row, place = (pull * grid.smallest <= limit).nonzero().unbind(1)
        part, inner = place // self.width, place % self.width
        own_w = w.view(-1, self.layout.parts, self.width)[row, part]
        own_pull = pull.view(-1, self.layout.parts, self.width)[row, part]
        own_pull.scatter_(1, inner[:, None], -own_pull.gather(1, inner[:, None]))
        found, point = _lowest(own_w, own_pull, grid)
        found -= score[row, part]
        best = found.new_full((len(w),), torch.inf).scatter_reduce_(0, row, found, "amin")
        order = torch.arange(len(row), device=row.device)
        order = torch.where(found == best[row], order, len(row))  # the first of equals
        first = torch.full_like(best, len(row), dtype=torch.long).scatter_reduce_(0, row, order, "amin")
        return place[first], part[first], point[first]

    def units(self, codes: Tensor) -> Tensor:
        grid = self.grid(codes.device)
        parts = [codes >> (8 + INDEX_BITS * part) & (2**INDEX_BITS - 1) for part in range(self.layout.parts)]
        sizes = grid.points[torch.stack(parts, -1)].view(*codes.shape, 8)
        return (sizes * grid.signs[codes & 255]).view(len(codes), 8 * codes.shape[1])

    # ------------------------------------------------------------ scales

    def scales_of(self, d: Tensor, level: Tensor) -> Scales:
        """d [N] float32 that a half float holds, level [N, G]. The products are exact, as are those with a grid point."""
        scale = d[:, None] * ((2.0 * level + 1) * self.layout.step)
        return Scales(scale, torch.zeros_like(scale), (d, level))

    def rescaled(self, scales: Scales, factor: Tensor) -> Scales:
        d, level = scales.raw
        return self.scales_of(half(d * factor), level)

    def fit(self, w: Tensor, importance: Tensor) -> Scales:
        return fit_scales(self, w, importance)

    # ------------------------------------------------------------ bytes

    def pack(self, scales: Scales, codes: Tensor) -> Tensor:
        d, level = scales.raw
        parts = [codes >> (8 + INDEX_BITS * part) & (2**INDEX_BITS - 1) for part in range(self.layout.parts)]
        stored = Stored(d, level, torch.stack(parts, -1).view(len(codes), -1), codes & 255)
        return torch.cat([half_bytes(d), *self.layout.join(stored)], 1)

    def unpack(self, data: Tensor) -> tuple[Scales, Tensor]:
        """uint8 [N, bytes] -> the scales and the codes int32 [N, 32]."""
        stored = self.layout.split(bytes_half(data[:, :2]), data[:, 2:])
        codes = stored.sign.clone()
        for part in range(self.layout.parts):
            codes |= stored.index[:, part :: self.layout.parts] << (8 + INDEX_BITS * part)
        return self.scales_of(stored.d, stored.level), codes

    def decode(self, data: Tensor) -> Tensor:
        scales, codes = self.unpack(data)
        units = self.units(codes).view(len(data), -1, self.type.group)
        return (units * scales.scale[..., None]).view(len(data), -1)


def lattice_codec(block_type: BlockType) -> LatticeCodec:
    """The codec of one of the five types."""
    return LatticeCodec(block_type)


# ---------------------------------------------------------------- the search for scales


def fit_scales(codec: LatticeCodec, w: Tensor, importance: Tensor) -> Scales:
    """Scales for w, importance [N, block]: a search in every group, least squares, then d and the levels of the block.

    Worked on blocks divided by their largest weight, so that neither tiny nor huge ones leave float32. A block too large for
    a half float gets the largest d there is, one too small d = 0.
    """
    size = codec.type.group
    largest = w.abs().amax(1, keepdim=True)
    largest = torch.where(largest > 0, largest, 1.0)
    x, weight = (w / largest).contiguous().view(-1, size), importance.contiguous().view(-1, size)
    scale = search_scales(codec, x, weight)
    codes, _ = codec.nearest(x, scale, torch.zeros_like(scale), weight)
    units = codec.units(codes)
    curve = (weight * units.square()).sum(1)
    ideal = ((weight * x * units).sum(1) / curve.clamp_min(1e-30)).clamp_min_(0)
    return codec.scales_of(*quantize_scales(ideal.view(len(w), -1), curve.view(len(w), -1), largest, codec.layout.step))


def search_scales(codec: LatticeCodec, x: Tensor, weight: Tensor) -> Tensor:
    """The scale [R, 1] of least weighted squared error among some for each of R groups; x, weight [R, group].

    The error of scale s is, but for a constant, s times the sum over vectors of the least  s w . g^2 - 2 (w |x|) . g.  With s
    = middle * factor the middle goes into the features and the factor into the table.
    """
    grid = codec.grid(x.device)
    moment = ((weight * x.square().square()).sum(1) / weight.sum(1).clamp_min(1e-30)).sqrt_().sqrt_()
    middle = (x.abs().amax(1, keepdim=True) * moment[:, None]).sqrt_() / grid.largest
    pull = _pull(x.view(-1, 8), weight.reshape(-1, 8), codec.layout.even).view(-1, codec.width)
    features = torch.cat([(weight * middle).view(pull.shape), pull * -2.0], 1)
    factors = numbers_on(codec.layout.factors, x.device)
    if kernels := codec.kernels(x):
        score = kernels.scores(features, torch.stack(grid.search))
    else:
        score = torch.empty(len(factors), len(features), device=x.device)
        for part in _parts(len(features), grid.table):
            own = features[part]
            for k, table in enumerate(grid.search):
                torch.amin(own @ table, 1, out=score[k, part])
    best = (score.view(len(factors), len(x), -1).sum(2) * factors[:, None]).argmin(0)
    return middle * factors[best, None]


def _pull(x: Tensor, weight: Tensor, even: bool) -> Tensor:
    """weight * |x| [M, 8]; where an odd number of signs must become even, minus that for the sign that is cheapest to flip
    while sizes are alike. Good enough to compare scales; the codes are found exactly."""
    pull = weight * x.abs()
    if even:
        odd = (x < 0).sum(1, keepdim=True) & 1
        place = pull.argmin(1, keepdim=True)
        pull.scatter_add_(1, place, pull.gather(1, place) * (-2.0 * odd))
    return pull


def quantize_scales(ideal: Tensor, curve: Tensor, unit: Tensor, step: float) -> tuple[Tensor, Tensor]:
    """d [N] and levels [N, G] for the scales ``ideal`` [N, G] in units of ``unit`` [N, 1].

    The least  sum curve * (d step (2 level + 1) - ideal)**2  over DELTAS around the d that gives the largest its top level,
    and d = 0; curve [N, G]: how the error of a group grows with its scale.
    """
    deltas = numbers_on(DELTAS, ideal.device)
    d = half((ideal.amax(1, keepdim=True) * unit * (deltas / (step * (2 * LEVELS - 1)))).clamp_min_(HALF_TINY))
    d[:, -1] = 0
    size = (d / unit * step)[..., None]  # [N, D, 1]
    level = ((ideal[:, None] * _inverse(size) - 1) * 0.5).round_().clamp_(0, LEVELS - 1)
    error = ((size * (2 * level + 1) - ideal[:, None]).square_() * curve[:, None]).sum(2)
    best = error.argmin(1, keepdim=True)
    level = level.gather(1, best[..., None].expand(-1, -1, ideal.shape[1]))
    return d.gather(1, best)[:, 0], level[:, 0].int()
