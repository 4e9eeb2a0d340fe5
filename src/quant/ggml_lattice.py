"""The lattice types of ggml (iq3_s, iq3_xxs, iq2_s, iq2_xs, iq2_xxs): eight signs and one or two points of a fixed grid.

Not a command; use them through :mod:`ggml_codecs`. A vector is eight weights: their signs, and their sizes as one grid point of
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
from typing import TYPE_CHECKING, NamedTuple

import torch
from gguf import quants
from torch import Tensor

from devices import numbers_on
from ggml_types import BlockType, Codec, Field, Run, Scales, half, join_fields, run, split_fields
from moe_quant import inverse_scale

if TYPE_CHECKING:
    import lattice_kernel

LEVELS = 16
DELTAS = tuple(0.7 + 0.02 * k for k in range(33))  # the last gives way to 0
HALF_TINY = 2.0**-24  # the smallest that a half float holds: tiny blocks use low levels of it
FAR = 1e9  # of |x| / scale: keeps products finite and is far beyond every grid
SCORE_BYTES = {"cpu": 1 << 19, "cuda": 1 << 30}  # of a matrix of scores: half of a core's cache, a fraction of a GPU
GROUPS = True  # on a GPU sweep and descent of a group in one launch by lattice_kernel, not the search for points alone
INDEX_BITS = 10  # of the largest grid; a code is  signs | index << 8 | second index << 18


@dataclasses.dataclass(frozen=True)
class Layout:
    """``step``: scale = d * step * (2 level + 1). ``parts``: points of a vector. ``even``: seven signs are stored. ``fields``:
    the bytes behind d.

    ``factors``: the largest size of the grid is tried at these multiples of a middle of the group's largest weight and its
    root mean fourth power. They span what 98 % of groups want, in a trained model, Gaussian or heavy-tailed.
    """

    step: float
    parts: int
    even: bool
    factors: tuple[float, ...]
    fields: tuple[Run, ...]


def _spread(low: float, high: float, count: int) -> tuple[float, ...]:
    """``count`` numbers from low to high in equal ratios."""
    return tuple(low * (high / low) ** (k / (count - 1)) for k in range(count))


IQ3, IQ2 = _spread(1.0, 2.1, 12), _spread(0.75, 1.9, 9)
WORDS = Field("sign", 7, repeat=4), Field("level", 4)
LAYOUTS = {
    "iq3_s": Layout(1.0, 2, False, IQ3, (run(64, "index", 8), run(8, "index", 1, 8), run(32, "sign", 8), run(4, "level", 4))),
    "iq3_xxs": Layout(0.25, 2, True, IQ3, (run(64, "index", 8), Run(32, WORDS, size=4))),
    "iq2_s": Layout(0.125, 1, False, IQ2, (run(32, "index", 8), run(32, "sign", 8), run(8, "index", 2, 8), run(8, "level", 4))),
    "iq2_xs": Layout(0.125, 1, True, IQ2, (Run(64, (Field("index", 9), Field("sign", 7)), size=2), run(8, "level", 4))),
    "iq2_xxs": Layout(0.125, 1, True, IQ2, (Run(64, (Field("index", 8, repeat=4), *WORDS), size=8),)),
}


def _even(sign: Tensor) -> Tensor:
    """Seven stored sign bits -> eight with an even number of ones."""
    parity = sign ^ (sign >> 4)
    parity = parity ^ (parity >> 2)
    parity = parity ^ (parity >> 1)
    return sign | ((parity & 1) << 7)


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


class LatticeCodec(Codec):
    """A type whose weights are coded by eights as points of a grid."""

    integers = {1: (0, LEVELS - 1)}

    def __init__(self, block_type: BlockType) -> None:
        super().__init__(block_type)
        self.layout = LAYOUTS[block_type.name]
        self.width = 8 // self.layout.parts
        self.shifts = [8 + INDEX_BITS * part for part in range(self.layout.parts)]  # of the indices in a code

    def grid(self, device: torch.device) -> Grid:
        return _grid(self.type.name, device)

    # ------------------------------------------------------------ codes

    def nearest(self, x: Tensor, scale: Tensor, offset: Tensor, importance: Tensor) -> tuple[Tensor, Tensor]:
        # exact with full float32 products only: TF32 makes it approximate
        t = (x * inverse_scale(scale)).clamp_(-FAR, FAR).reshape(-1, 8).contiguous()
        w = importance.reshape(-1, 8)
        w = (w / w.amax(1, keepdim=True).clamp_min(1e-30)).contiguous()
        pull = w * t.abs()
        if kernels := self.kernels(x):
            codes = kernels.nearest(t, w, pull, self.kernel_points(x.device))
        else:
            codes = self._codes(t < 0, w, pull)
        codes = codes.view(len(x), x.shape[1] // 8)
        return codes, scale * self.units(codes)

    def _codes(self, minus: Tensor, w: Tensor, pull: Tensor) -> Tensor:
        """The code int32 [M] of vectors of signs ``minus`` (which may change), importance w and pull w t, [M, 8]."""
        grid = self.grid(w.device)
        score, index = _lowest(w.view(-1, self.width), pull.view(-1, self.width), grid)
        index = index.view(-1, self.layout.parts)
        if self.layout.even:
            odd = (minus.sum(1) & 1).nonzero()[:, 0]
            place, part, point = self._flips(w[odd], pull[odd], score.view(index.shape)[odd], index[odd], grid)
            minus[odd, place] ^= True
            index[odd, part] = point
        bits = 1 << torch.arange(8, dtype=torch.int32, device=w.device)
        return self._joined((minus.int() * bits).sum(1, dtype=torch.int32), index.int())

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

    def _joined(self, sign: Tensor, index: Tensor) -> Tensor:
        """Codes of eight signs and the indices [..., parts] of points, all int32."""
        for part, shift in enumerate(self.shifts):
            sign = sign | index[..., part] << shift
        return sign

    def _points(self, codes: Tensor) -> Tensor:
        """The indices [..., parts] of the points of codes."""
        return torch.stack([codes >> shift & (2**INDEX_BITS - 1) for shift in self.shifts], -1)

    def units(self, codes: Tensor) -> Tensor:
        grid = self.grid(codes.device)
        sizes = grid.points[self._points(codes)].view(*codes.shape, 8)
        return (sizes * grid.signs[codes & 255]).view(len(codes), 8 * codes.shape[1])

    # ------------------------------------------------------------ scales

    def scales_of(self, *raw: Tensor) -> Scales:
        """d [N] float32 that a half float holds, level [N, G]. The products are exact, as are those with a grid point."""
        d, level = raw
        scale = d[:, None] * ((2.0 * level + 1) * self.layout.step)
        return Scales(scale, torch.zeros_like(scale), raw)

    def rescaled(self, scales: Scales, factor: Tensor) -> Scales:
        d, level = scales.raw
        return self.scales_of(half(d * factor), level)

    def fit(self, w: Tensor, importance: Tensor) -> Scales:
        """A search in every group, least squares, then d and the levels of the block.

        Worked on blocks divided by their largest weight, so that neither tiny nor huge ones leave float32. A block too large
        for a half float gets the largest d there is, one too small d = 0.
        """
        size = self.type.group
        largest = w.abs().amax(1, keepdim=True)
        largest = torch.where(largest > 0, largest, 1.0)
        x, weight = (w / largest).contiguous().view(-1, size), importance.contiguous().view(-1, size)
        scale = self._search_scales(x, weight)
        codes, _ = self.nearest(x, scale, torch.zeros_like(scale), weight)
        units = self.units(codes)
        curve = (weight * units.square()).sum(1)
        ideal = ((weight * x * units).sum(1) / curve.clamp_min(1e-30)).clamp_min_(0)
        return self.scales_of(*self._quantized_scales(ideal.view(len(w), -1), curve.view(len(w), -1), largest))

    def _search_scales(self, x: Tensor, weight: Tensor) -> Tensor:
        """The scale [R, 1] of least weighted squared error among some for each of R groups; x, weight [R, group].

        The error of scale s is, but for a constant, s times the sum over vectors of the least  s w . g^2 - 2 (w |x|) . g.
        With s = middle * factor the middle goes into the features and the factor into the table.
        """
        grid = self.grid(x.device)
        moment = ((weight * x.square().square()).sum(1) / weight.sum(1).clamp_min(1e-30)).sqrt_().sqrt_()
        middle = (x.abs().amax(1, keepdim=True) * moment[:, None]).sqrt_() / grid.largest
        pull = self._pull(x.view(-1, 8), weight.reshape(-1, 8)).view(-1, self.width)
        features = torch.cat([(weight * middle).view(pull.shape), pull * -2.0], 1)
        factors = numbers_on(self.layout.factors, x.device)
        if kernels := self.kernels(x):
            score = kernels.scores(features, torch.stack(grid.search))
        else:
            score = torch.empty(len(factors), len(features), device=x.device)
            for part in _parts(len(features), grid.table):
                own = features[part]
                for k, table in enumerate(grid.search):
                    torch.amin(own @ table, 1, out=score[k, part])
        best = (score.view(len(factors), len(x), -1).sum(2) * factors[:, None]).argmin(0)
        return middle * factors[best, None]

    def _pull(self, x: Tensor, weight: Tensor) -> Tensor:
        """weight * |x| [M, 8]; where an odd number of signs must become even, minus that for the sign that is cheapest to flip
        while sizes are alike. Good enough to compare scales; the codes are found exactly."""
        pull = weight * x.abs()
        if self.layout.even:
            odd = (x < 0).sum(1, keepdim=True) & 1
            place = pull.argmin(1, keepdim=True)
            pull.scatter_add_(1, place, pull.gather(1, place) * (-2.0 * odd))
        return pull

    def _quantized_scales(self, ideal: Tensor, curve: Tensor, unit: Tensor) -> tuple[Tensor, Tensor]:
        """d [N] and levels [N, G] for the scales ``ideal`` [N, G] in units of ``unit`` [N, 1].

        The least  sum curve * (d step (2 level + 1) - ideal)**2  over DELTAS around the d that gives the largest its top level,
        and d = 0; curve [N, G]: how the error of a group grows with its scale.
        """
        step, deltas = self.layout.step, numbers_on(DELTAS, ideal.device)
        d = half((ideal.amax(1, keepdim=True) * unit * (deltas / (step * (2 * LEVELS - 1)))).clamp_min_(HALF_TINY))
        d[:, -1] = 0
        size = (d / unit * step)[..., None]  # [N, D, 1]
        level = ((ideal[:, None] * inverse_scale(size) - 1) * 0.5).round_().clamp_(0, LEVELS - 1)
        error = ((size * (2 * level + 1) - ideal[:, None]).square_() * curve[:, None]).sum(2)
        best = error.argmin(1, keepdim=True)
        level = level.gather(1, best[..., None].expand(-1, -1, ideal.shape[1]))
        return d.gather(1, best)[:, 0], level[:, 0].int()

    # ------------------------------------------------------------ on a GPU

    def kernels(self, x: Tensor) -> types.ModuleType | None:
        """The module of fused kernels for weights on the device of ``x``, if there is one."""
        if not x.is_cuda:
            return None
        import lattice_kernel  # Triton is there where a GPU is

        return lattice_kernel

    def kernel_points(self, device: torch.device) -> lattice_kernel.Points:
        from lattice_kernel import Points

        return Points(self.grid(device).table, self.layout.parts, self.layout.even, FAR, INDEX_BITS)

    def sweep_group(
        self, block: Tensor, values: Tensor, errors: Tensor, codes: Tensor, scale: Tensor, offset: Tensor, factor: Tensor,
        importance: Tensor,
    ) -> bool:  # fmt: skip
        kernels = self.kernels(block) if GROUPS else None
        if kernels:
            points = self.kernel_points(block.device)
            kernels.sweep_group(block, values, errors, codes, scale, factor, importance, points)
        return kernels is not None

    def improve_group(
        self, values: Tensor, residual: Tensor, codes: Tensor, metric: Tensor, inverses: Tensor | None,
        raw: tuple[Tensor, ...], index: int,
    ) -> Tensor | None:  # fmt: skip
        if not (GROUPS and (kernels := self.kernels(values))):
            return None
        limits, points = (self.layout.step, *self.integers[1]), self.kernel_points(values.device)
        return kernels.improve_group(values, residual, codes, metric, inverses, raw[0], raw[1][:, index], limits, points)

    # ------------------------------------------------------------ bytes

    def pack(self, scales: Scales, codes: Tensor) -> Tensor:
        d, level = scales.raw
        index = self._points(codes).view(len(codes), -1)
        return join_fields({"d": d, "level": level, "index": index, "sign": codes & 255}, ("d", *self.layout.fields))

    def unpack(self, data: Tensor) -> tuple[Scales, Tensor]:
        counts = {"level": self.type.block // self.type.group, "index": 32 * self.layout.parts, "sign": 32}
        found = split_fields(data, ("d", *self.layout.fields), counts)
        sign = _even(found["sign"]) if self.layout.even else found["sign"]
        codes = self._joined(sign, found["index"].view(len(data), 32, -1))
        return self.scales_of(found["d"], found["level"]), codes
