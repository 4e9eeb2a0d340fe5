"""The student in training: a quantized checkpoint with adapters on its grid, built layer by layer so that it is never whole.

Not a command. Each decoder layer is filled from the student's checkpoint, its targets are turned into grid cells (with the
teacher's weights as the direction inside each cell), and the layer is sharded before the next one is read.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from calibration import LayerStream
from checkpoint import Checkpoint
from console import UserError, progress
from families import Role, role_of, roles_of
from fsdp_setup import World, own_rows, shard
from hf_model import all_finite, scaled_logits
from moe_lora import Adapter, adapt_layer, checkpoint_layer
from moe_ptq import SYMMETRIC
from opd_data import AdapterSettings, Batch
from opd_losses import TopK, losses_by_source
from recipe import Recipe, read_recipe
from target_grid import FreeGrid, GgmlGrid, Grid, IntCells, IntGrid, int_cells

HEAD_CHUNK = 2048  # positions whose logits exist at once


class ParameterReader:
    """Parameters of transformers' module tree from a checkpoint, in the dtype of the disk."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint

    def read(self, parameter: str, part: slice = slice(None)) -> Tensor:
        """The parameter [E, O, I], or the matrices ``part`` of it; one that is a matrix [O, I] counts as [1, O, I]."""
        found = self._stored(parameter, part)
        return found.mT.contiguous() if self.is_turned(parameter) else found

    def is_turned(self, parameter: str) -> bool:
        """Whether the parameter lies as [E, I, O]."""
        return self.checkpoint.family.is_turned(self.checkpoint.parameter_shape(parameter))

    def shape(self, parameter: str) -> tuple[int, ...]:
        """Of the parameter as :meth:`read` gives it, a matrix as [O, I]."""
        shape = self.checkpoint.parameter_shape(parameter)
        return (shape[0], shape[2], shape[1]) if self.is_turned(parameter) else shape

    def _stored(self, parameter: str, part: slice) -> Tensor:
        shape = self.checkpoint.parameter_shape(parameter)
        experts, *matrix = shape if len(shape) == 3 else (1, *shape)
        first, last, _ = part.indices(experts)
        sources, places = self.checkpoint.sources[parameter], self.checkpoint.places
        info = self.checkpoint.tensors[sources[0]]
        if first >= last:
            return torch.empty(0, *matrix, dtype=info.dtype)
        if places[sources[0]].expert is None:
            return info.read(first, last - first) if len(shape) == 3 else info.read()[None]
        fused = torch.empty(last - first, *matrix, dtype=info.dtype)
        for name in sources:
            place = places[name]
            if first <= (place.expert or 0) < last:
                dataclasses.replace(place, expert=(place.expert or 0) - first).view(fused).copy_(self.checkpoint.read(name))
        return fused


class GridMaker:
    """The adapter of a parameter, or None where the recipe leaves it unquantized."""

    def __init__(self, student: Path, teacher: Path, config: AdapterSettings, world: World) -> None:
        self.student, self.teacher = ParameterReader(Checkpoint(student)), ParameterReader(Checkpoint(teacher))
        self.config, self.world, self.device, self.recipe = config, world, world.device, read_recipe(student)
        self.by_expert = dict(self.recipe.experts)

    def bits(self, parameter: str, role: Role) -> tuple[int, ...]:
        """The grids that a matrix of the parameter may lie on, the coarsest first; none where it is not quantized."""
        if parameter.rpartition(".")[0] in self.by_expert:
            return tuple(sorted(set(self.by_expert[parameter.rpartition(".")[0]])))
        bits = self.recipe.bits_of(parameter, role)
        return () if bits is None else tuple(sorted({math.floor(bits), math.ceil(bits)}))

    def make(self, parameter: str) -> Adapter | None:
        shape = self.student.shape(parameter)
        checkpoint = self.student.checkpoint
        source = checkpoint.sources[parameter][0]
        role = role_of(source, checkpoint.tensors[source].shape, checkpoint.model_type)
        if role is Role.NORM and self.config.norms:
            return Adapter(parameter, FreeGrid(self._finite(self.student, parameter)), True, "scales", self.config.rank)
        bits = self.bits(parameter, role)
        if role in (Role.MTP, Role.EMBEDDING, Role.LM_HEAD) or not bits:
            return None
        if self.config.base == "teacher" and shape != self.teacher.shape(parameter):
            other = list(self.teacher.shape(parameter))
            raise UserError(f"{parameter}: {list(shape)} in the student, {other} in the teacher")
        if self.config.ggml and role is Role.ROUTED_EXPERT:
            teacher = self._finite(self.teacher, parameter)
            grid: Grid = GgmlGrid(teacher, self.config.ggml, teacher.dtype)
        elif torch.equal(*(reader.read(parameter, slice(0, 1)) for reader in (self.student, self.teacher))):
            return None  # quant_save --packed does not round what no kernel reads packed
        else:
            grid = self._int_grid(parameter, shape, bits)
        return Adapter(parameter, grid, len(shape) == 2, self.config.mode, self.config.rank, self.config.seed)

    def _finite(self, reader: ParameterReader, parameter: str) -> Tensor:
        value = reader.read(parameter)
        if not all_finite(value):
            raise UserError(f"{reader.checkpoint.path}: {parameter} holds NaN or infinity")
        return value.to(self.device)

    def _int_grid(self, parameter: str, shape: tuple[int, ...], bits: tuple[int, ...]) -> IntGrid:
        """The grid of all matrices, of which only this process's are read where the bits of the others are known: the rest
        are zeros until the layer is sharded, which drops them."""
        experts, outputs, inputs = shape if len(shape) == 3 else (1, *shape)
        own = own_rows(experts, self.world) if len(bits) == 1 else slice(0, experts)
        student = self.student.read(parameter, own)
        teacher = self.teacher.read(parameter, own) if self.config.base == "teacher" else None
        # where all matrices have the same bits several are searched at once: one alone leaves a GPU waiting for launches
        count = max(1, IntGrid.chunk[self.device.type] // (outputs * inputs)) if len(bits) == 1 else 1
        cells: list[IntCells] = []
        try:
            for start in range(0, len(student), count):
                part = slice(start, start + count)
                others = None if teacher is None else teacher[part].to(self.device).flatten(0, 1)
                found = int_cells(student[part].to(self.device).flatten(0, 1), others, bits, self.recipe.group)
                pairs = (value.view(-1, outputs, value.shape[-1]) for value in found[:2])
                cells += [IntCells(latent, scale, found.bits) for latent, scale in zip(*pairs, strict=True)]
        except UserError as error:
            raise UserError(f"{self.student.checkpoint.path}: {parameter}: {error}") from None
        if len(cells) < experts:
            zeros = IntCells(
                torch.zeros(outputs, inputs, dtype=torch.int8, device=self.device),
                torch.zeros(outputs, inputs // self.recipe.group, dtype=torch.bfloat16, device=self.device), bits[0],
            )  # fmt: skip
            cells = [zeros] * own.start + cells + [zeros] * (experts - own.stop)
        return IntGrid(cells, self.recipe.group, student.dtype)


class Student(nn.Module):
    """Decoder, head and loss in one module, so that FSDP's root covers all of it; ``forward`` sums a batch's losses, which are
    ``losses`` on the teacher's text and on the student's."""

    def __init__(self, model: nn.Module, losses: tuple[str, str], temperature: float) -> None:
        super().__init__()
        self.model, self.losses, self.temperature = model, losses, temperature

    @property
    def layers(self) -> nn.ModuleList:
        return self.model.model.layers

    def forward(self, batch: Batch) -> Tensor:
        hidden = self.model.model(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False)[0]
        kept = hidden[batch.predicts]
        total = kept.new_zeros((), dtype=torch.float32)
        for start in range(0, len(kept), HEAD_CHUNK):
            part = slice(start, start + HEAD_CHUNK)
            teacher = TopK(*(field[part] for field in batch.teacher))
            # recomputed in the backward: the logits of the whole vocabulary are the largest tensors of a step
            total = total + checkpoint(
                self._chunk, kept[part], batch.targets[part], teacher, batch.own[part], use_reentrant=False
            )
        return total

    def _chunk(self, hidden: Tensor, targets: Tensor, teacher: TopK, own: Tensor) -> Tensor:
        logits = scaled_logits(self.model.lm_head(hidden), self.model.config)
        return losses_by_source(logits, targets, teacher, own, self.losses, self.temperature).sum()

    def logits(self, ids: Tensor) -> Tensor:
        """Logits [B, T, V] of token ids, for tests and checks."""
        return scaled_logits(self.model.lm_head(self.model.model(input_ids=ids, use_cache=False)[0]), self.model.config)


def build_student(
    student: Path, teacher: Path, config: AdapterSettings, world: World, losses: tuple[str, str], temperature: float,
    recompute: bool,
) -> Student:  # fmt: skip
    """The student on this process's device, sharded where there are several; every parameter but the adapters' is frozen."""
    checkpoint_ = Checkpoint(student)
    check_adapters(checkpoint_, Checkpoint(teacher), read_recipe(student), config)
    dtype = torch.bfloat16 if world.device.type == "cuda" else torch.float32
    stream = LayerStream(checkpoint_, world.device, dtype)
    maker = GridMaker(student, teacher, config, world)
    with progress(len(stream.layers), "load", "layer") as bar:
        for index, layer in enumerate(stream.layers):
            adapt_layer(layer, f"model.layers.{index}.", config.linears, config.norms, maker.make)
            stream.fill(layer, f"model.layers.{index}.")  # what no adapter stands in for
            if recompute:
                checkpoint_layer(layer)
            shard(layer, world)
            bar.update()
    fill_rest(stream)
    whole = Student(stream.model, losses, temperature)
    shard(whole, world)
    return whole


def fill_rest(stream: LayerStream) -> None:
    """The embedding, what lies around the layers, and the head, which may be the embedding."""
    for module, prefix in (*stream.around.items(), (stream.embedding, stream.embedding_prefix)):
        stream.fill(module, prefix)
    if "lm_head.weight" in stream.checkpoint.sources:
        stream.fill(stream.model.lm_head, "lm_head.")
    else:
        stream.model.lm_head.weight = stream.embedding.weight


def check_adapters(student: Checkpoint | None, teacher: Checkpoint, recipe: Recipe, config: AdapterSettings) -> None:
    """Raise :class:`UserError` unless adapters of these settings have something to train, by headers alone. ``student``: None
    where the recipe is yet to make it of the teacher."""
    if student is not None:
        check_pair(student, teacher)
    if recipe.method not in SYMMETRIC and (config.linears or not config.ggml):
        raise UserError(f"method {recipe.method} has no symmetric grid; a student of {', '.join(SYMMETRIC)} can be recovered")
    roles = roles_of({name: info.shape for name, info in teacher.tensors.items()}, teacher.config)
    if Role.ROUTED_EXPERT not in roles.values() and not config.linears:
        raise UserError(
            f"{teacher.path}: a dense model, without routed experts; LINEARS=1 (--linears) adapts its other matrices"
        )
    left = {Role.MTP, Role.EMBEDDING, Role.LM_HEAD}
    by_expert = {name for name, _ in recipe.experts}
    for name, role in roles.items():
        parameter = teacher.places[name].parameter
        bits = parameter.rpartition(".")[0] in by_expert or recipe.bits_of(parameter, role)
        if role not in left and bits and (config.linears or role is Role.ROUTED_EXPERT):
            return
    what = "experts or other matrices" if config.linears else "experts"
    raise UserError(f"{(student or teacher).path}: its recipe quantizes no {what}, so that nothing can be recovered")


def check_pair(student: Checkpoint, teacher: Checkpoint) -> None:
    """Raise :class:`UserError` unless the student is a quantized copy of the teacher: the same tensors and shapes."""
    mine, others = ({name: info.shape for name, info in c.tensors.items()} for c in (student, teacher))
    if mine != others:
        name = min(name for name in mine.keys() | others.keys() if mine.get(name) != others.get(name))
        raise UserError(f"{student.path} is no quantized copy of {teacher.path}: they differ in {name}")
