"""The grid that a recovered weight must lie on, held so that training starts exactly at the student and ends on the grid.

Not a command. Letters: E matrices (experts; 1 for a plain linear), O outputs, I inputs, G group size.

    IntGrid    symmetric integers with a bfloat16 scale per group (moe_quant): value = code * scale
    GgmlGrid   a block type of llama.cpp (ggml_types): value = what the packed block decodes to
    FreeGrid   none: a norm's weights, in the dtype of the checkpoint

A weight is stored in steps of its grid: an adapter moves it by so many steps, which makes one learning rate fit all layers. For
IntGrid the latent weight is an int8 in 1/R of a step, R = 2**(8 - bits): its nearest code is the student's, its fraction points
to where the unquantized weight lay. Values are rounded to the dtype of the checkpoint, as they will be stored.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from console import UserError
from moe_quant import inverse_scale
from packed_format import recover_scales

LEAST_STEP = 0.05  # of the student's, below which a step does not shrink


def frozen(value: Tensor) -> nn.Parameter:
    """A parameter without gradient: FSDP shards parameters, not buffers."""
    return nn.Parameter(value.contiguous(), requires_grad=False)


def resolution(bits: int) -> int:
    """Latent positions in one step of a grid, so that the largest code and almost half a step more fit an int8."""
    return 2 ** (8 - bits)


class IntCells(NamedTuple):
    """A matrix on an integer grid: latent int8 [O, I] in 1/resolution(bits) of a step, scale bfloat16 [O, I/G]."""

    latent: Tensor
    scale: Tensor
    bits: int


def int_cells(student: Tensor, teacher: Tensor | None, bits: Sequence[int], group: int) -> IntCells:
    """The cells of a dequantized matrix ``student`` [O, I], on the first of the grids ``bits`` that it lies on exactly.

    ``teacher`` [O, I]: the unquantized matrix; the latent weight is as close to it as the cell of the code allows.
    """
    if student.shape[-1] % group:
        raise UserError(f"group {group} does not divide the last axis of shape {list(student.shape)}")
    for whose, weights in (("student's", student), ("teacher's", teacher)):
        if weights is not None and not torch.isfinite(weights).all():
            raise UserError(f"the {whose} weights hold NaN or infinity")
    groups = student.reshape(-1, group)
    for own in bits:
        scale, found = recover_scales(groups, own)
        if bool(found.all()):
            break
    else:
        raise UserError(
            f"not on a symmetric grid of {' or '.join(map(str, bits))} bits in groups of {group}; "
            "the student must come from quant_save with one of absmax, clip, wclip, gptq, gptq_refit"
        )
    qmax, fine = 2 ** (own - 1) - 1, resolution(own)
    inverse = inverse_scale(scale)[:, None]
    codes = (groups.float() * inverse).round().clamp_(-qmax, qmax)
    latent = codes * fine
    if teacher is not None:
        rest = max(fine // 2 - 1, 0)
        offset = (teacher.reshape(-1, group).float() * inverse - codes).mul_(fine).round_()
        latent += offset.clamp_(-rest, rest) * (scale > 0)[:, None]
    return IntCells(latent.to(torch.int8).view(student.shape), scale.bfloat16().view(student.shape[0], -1), own)


class IntGrid(nn.Module):
    """Symmetric integers of E matrices; ``bits`` may differ between them."""

    chunk = {"cpu": 1 << 18, "cuda": 1 << 27}  # weights worked on at once (whole matrices, at least one)

    def __init__(self, cells: Sequence[IntCells], group: int, stored: torch.dtype) -> None:
        super().__init__()
        # The int8 of a latent weight lies in a float8 parameter, bit for bit: FSDP2 of torch 2.11 shards only floating types.
        self.latent = frozen(torch.stack([cell.latent for cell in cells]).view(torch.float8_e4m3fn))
        self.scale = frozen(torch.stack([cell.scale for cell in cells]))
        self.bits, self.group, self.stored = tuple(cell.bits for cell in cells), group, stored
        self.shape = tuple(self.latent.shape)

    def _per_matrix(self, part: slice, numbers: Sequence[int]) -> Tensor:
        return torch.tensor(numbers[part], dtype=torch.float32, device=self.scale.device)[:, None, None]

    def position(self, part: slice, moved: Tensor | None, growth: Tensor | None = None) -> Tensor:
        """Where the matrices ``part``, moved by so many steps, lie between the codes, float32 [e, O, I]. With ``growth``
        [e, O, I/G] the latent weights stay where they are while the step grows, so that their codes shrink."""
        position = self.latent.view(torch.int8)[part].float() / self._per_matrix(part, [resolution(bits) for bits in self.bits])
        if growth is not None:
            position = (self.grouped(position) / (1 + growth).clamp_min(LEAST_STEP)[..., None]).view(position.shape)
        return position if moved is None else position.add_(moved)

    def codes(self, part: slice, moved: Tensor | None, growth: Tensor | None = None) -> Tensor:
        """Whole codes, float32 [e, O, I]."""
        return self.nearest(part, self.position(part, moved, growth))

    def nearest(self, part: slice, position: Tensor) -> Tensor:
        qmax = self._per_matrix(part, [2 ** (bits - 1) - 1 for bits in self.bits])
        return torch.minimum(position.round(), qmax).maximum(-qmax)

    def step(self, part: slice, growth: Tensor | None) -> Tensor:
        """The size of a step, float32 [e, O, I/G, 1]."""
        return self._scales(part, growth)[..., None]

    def grouped(self, value: Tensor) -> Tensor:
        """[e, O, I] -> [e, O, I/G, G]."""
        return value.view(*value.shape[:-1], -1, self.group)

    def values(self, part: slice, moved: Tensor | None, growth: Tensor | None, follow: bool = False) -> Tensor:
        """Weights [e, O, I] as stored; ``growth`` [e, O, I/G]: relative change of the scales, rounded with them, which the
        codes ``follow`` or not."""
        codes = self.codes(part, moved, growth if follow else None)
        return (self.grouped(codes) * self.step(part, growth)).view(codes.shape).to(self.stored)

    def _scales(self, part: slice, growth: Tensor | None) -> Tensor:
        scale = self.scale[part].float()
        return scale if growth is None else (scale * (1 + growth)).clamp_min(0).bfloat16().float()

    def growth_gradient(
        self, part: slice, moved: Tensor | None, growth: Tensor, gradient: Tensor, follow: bool = False
    ) -> Tensor:
        """Gradient [e, O, I/G] of the growth from that of the weights [e, O, I]. A code that follows takes back what the
        latent weight contributed, unless it is at the end of the grid (learned step sizes, Esser et al., arXiv 1902.08153)."""
        if not follow:
            codes = self.codes(part, moved)
            return (self.grouped(gradient) * self.grouped(codes)).sum(-1) * self.scale[part].float()
        position = self.position(part, moved, growth)
        codes = self.nearest(part, position)
        free = (position - codes).abs() <= 0.5
        latent = position if moved is None else position - moved
        change = codes - latent * free
        return (self.grouped(gradient) * self.grouped(change)).sum(-1) * self.scale[part].float()

    def describe(self) -> dict[str, object]:
        """What decides the grid beside the checkpoints, for the adapter's JSON."""
        same = len(set(self.bits)) == 1
        return {"grid": "int", "bits": self.bits[0] if same else list(self.bits), "group": self.group}


class GgmlGrid(nn.Module):
    """A block type of llama.cpp. Scales are fitted once to ``weight`` [E, O, I] and kept, so that packing the trained codes
    moves nothing; a step is the root mean square of a group."""

    chunk = {"cpu": 1 << 16, "cuda": 1 << 24}  # the search of a lattice takes many times the memory of its weights

    def __init__(self, weight: Tensor, name: str, stored: torch.dtype) -> None:
        from ggml_codecs import codec, fit_blocks
        from ggml_types import row_bytes

        super().__init__()
        row_bytes(name, weight.shape[-1])  # its error where the row does not fit
        self.name, self.stored, self.codec, self.shape = name, stored, codec(name), tuple(weight.shape)
        self.group = self.codec.type.group
        self.latent = frozen(weight.bfloat16())
        fitted = []
        for matrix in self.latent:
            blocks = matrix.float().reshape(-1, self.codec.type.block)
            fitted.append(fit_blocks(self.codec, blocks, torch.ones_like(blocks)))
        self.scale, self.offset = (frozen(torch.stack([fit[field] for fit in fitted])) for field in (0, 1))
        self.raw = nn.ParameterList(frozen(torch.stack(parts)) for parts in zip(*[fit[2] for fit in fitted], strict=True))

    def _blocks(self, part: slice, moved: Tensor | None) -> tuple[Tensor, tuple]:
        from ggml_types import Scales

        weight = self.latent[part].float()
        if moved is not None:
            weight = weight + (self.grouped(moved) * self.step(part)).view(weight.shape)
        raw = tuple(field[part].flatten(0, 1) for field in self.raw)
        scales = Scales(self.scale[part].flatten(0, 1), self.offset[part].flatten(0, 1), raw)
        return weight.reshape(-1, self.codec.type.block), scales

    def grouped(self, value: Tensor) -> Tensor:
        return value.view(*value.shape[:-1], -1, self.group)

    def step(self, part: slice, growth: Tensor | None = None) -> Tensor:
        return self.grouped(self.latent[part].float()).square().mean(-1, keepdim=True).sqrt()

    def values(self, part: slice, moved: Tensor | None, growth: Tensor | None, follow: bool = False) -> Tensor:
        blocks, scales = self._blocks(part, moved)
        _, values = self.codec.block_codes(blocks, scales, torch.ones_like(blocks))
        return values.view(-1, *self.shape[1:]).to(self.stored)

    def packed(self, part: slice, moved: Tensor | None) -> Tensor:
        """The bytes of the same codes as a GGUF stores them, uint8 [e, O, row bytes]."""
        blocks, scales = self._blocks(part, moved)
        codes, _ = self.codec.block_codes(blocks, scales, torch.ones_like(blocks))
        width = self.shape[2] // self.codec.type.block * self.codec.type.bytes
        return self.codec.pack(scales, codes).reshape(-1, self.shape[1], width)

    def describe(self) -> dict[str, object]:
        return {"grid": "ggml", "type": self.name}


class FreeGrid(nn.Module):
    """Values [N] that lie on no grid, such as a norm's; held as [1, 1, N], and moved by the growth itself."""

    chunk = IntGrid.chunk

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.scale, self.stored = frozen(value.view(1, 1, -1)), value.dtype
        self.shape = tuple(self.scale.shape)

    def values(self, part: slice, moved: Tensor | None, growth: Tensor | None, follow: bool = False) -> Tensor:
        return (self.scale[part].float() + (0 if growth is None else growth)).to(self.stored)

    def growth_gradient(
        self, part: slice, moved: Tensor | None, growth: Tensor, gradient: Tensor, follow: bool = False
    ) -> Tensor:
        return gradient

    def describe(self) -> dict[str, object]:
        return {"grid": "none"}


Grid = IntGrid | GgmlGrid | FreeGrid


def parts_of(grid: Grid) -> Iterator[slice]:
    """Runs of whole matrices of a grid that are worked on together."""
    experts, outputs, inputs = grid.shape
    count = max(1, grid.chunk[grid.scale.device.type] // max(1, outputs * inputs))
    for start in range(0, experts, count):
        yield slice(start, min(start + count, experts))
