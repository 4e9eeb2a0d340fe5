"""The two rounders of the calibrated pass: integer grids, by a method of moe_ptq, and llama.cpp's blocks, by ggml_round.

Not a command; quant_save gives one to calibrated_pass, gguf_pack the other. A parameter is left with what it was rounded to, so
the activations go on through it: what a layer is calibrated on is what the checkpoint or the file gives it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from calibrated_pass import MomentSettings, Take
from calibration import LayerStream, calibrated_shapes, hooked_shapes
from checkpoint import Checkpoint
from console import UserError, check_writable, explained
from families import MTP_PREFIX, Role
from ggml_codecs import decode_rows, encode
from ggml_round import COPIES, ldlq, ldlq_each
from ggml_types import TYPES
from gguf_layout import Piece, into_parameter, ordered_hessian, to_gguf
from hf_model import model_config
from moe_ptq import WORKING_BYTES, Grid, Statistics, even_spans, experts_at_once, round_weight, rounding_parts
from mtp import AROUND, MtpBlock, is_run
from recipe import Job, Recipe
from settings import part, setting


@dataclasses.dataclass(frozen=True)
class Target:
    """How a parameter of the module tree is rounded; ``fraction`` of its experts get one bit more than the grid has,
    chosen by what each gains, unless ``bits`` says how many each expert has."""

    grid: Grid
    fraction: float = 0.0
    bits: tuple[int, ...] = ()


def is_uncalibrated(job: Job, model_type: str) -> bool:
    """Whether a tensor is of a block of multi-token prediction that no calibration runs through: another than mtp.py's."""
    return job.role is Role.MTP and not (MTP_PREFIX.match(job.name) and is_run(model_type))


class GridRounder:
    """Several ``devices`` share the experts of a parameter. The embedding is no target, unless it is the head too: it has no
    inputs to calibrate on."""

    def __init__(
        self, stream: LayerStream, jobs: Sequence[Job], recipe: Recipe, devices: Sequence[torch.device] = (),
        working_bytes: float | None = None,
    ) -> None:  # fmt: skip
        self.stream, self.method, self.devices, self.working_bytes = stream, recipe.method, devices, working_bytes
        self.targets: dict[str, Target] = {}
        experts = dict(recipe.experts)
        for job in jobs:
            parameter = stream.checkpoint.places[job.name].parameter
            if (
                job.bits is not None
                and (job.role is not Role.EMBEDDING or parameter == stream.tied)
                and not is_uncalibrated(job, stream.checkpoint.model_type)
            ):
                whole = math.floor(job.bits)
                grid = Grid(whole, recipe.group, recipe.clip_steps, recipe.clip_low)
                bits = experts.get(parameter.rpartition(".")[0], ())
                self.targets[parameter] = Target(grid, 0.0 if bits else job.bits - whole, bits)

    def round(self, parameters: Mapping[str, Tensor], take: Take) -> None:
        for name, parameter in parameters.items():
            turned = parameter.mT if self.stream.checkpoint.family.is_turned(parameter.shape) else parameter
            with explained(name):
                round_in_place(turned, self.targets[name], *take(name), self.method, self.devices, self.working_bytes)

    def taken(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The parameters by checkpoint name, in the dtype and shape that they have on disk."""
        values = {}
        for name, full in parameters.items():
            checkpoint = self.stream.checkpoint
            for source in checkpoint.sources[name]:
                info, part = checkpoint.tensors[source], checkpoint.places[source].view(full.detach())
                values[source] = part.to("cpu", info.dtype, copy=True).reshape(info.shape)
        return values


def round_in_place(
    weight: Tensor, target: Target, statistics: Statistics, mass: Tensor, method: str, devices: Sequence[torch.device] = (),
    working_bytes: float | None = None,
) -> None:  # fmt: skip
    """Round a parameter [E, O, I] or [O, I]; with a fraction, the experts whose output error falls most, weighted by
    their routing ``mass`` [E], get one bit more; with ``bits``, each expert has its own grid."""

    def rounded(bits: int, out: Tensor, **more: Tensor) -> None:
        grid = dataclasses.replace(target.grid, bits=bits)
        round_weight(weight, grid, statistics, method, devices, working_bytes, out, **more)

    if target.bits:
        for bits in sorted(set(target.bits)):
            own = [e for e, each in enumerate(target.bits) if each == bits]
            rounded(bits, weight, chosen=torch.tensor(own, device=weight.device))
        return
    if not target.fraction or weight.ndim != 3:
        return rounded(target.grid.bits, weight)
    low, high = torch.zeros_like(mass), torch.zeros_like(mass)
    better = torch.empty_like(weight, device="cpu")
    rounded(target.grid.bits + 1, better, errors=high)
    rounded(target.grid.bits, weight, errors=low)
    chosen = ((low - high) * mass).topk(math.floor(target.fraction * len(weight) + 1e-9)).indices
    weight[chosen] = better[chosen.cpu()].to(weight.device)


METHODS = ("ldlq", "nearest")
TOKEN_POWER = 0.4
DAMPING = 0.1  # of the mean second moment, added to each: inputs that the calibration text hardly uses keep some worth


@dataclasses.dataclass(frozen=True, kw_only=True)
class RoundingSettings:
    """How weights are rounded into blocks, for a file or to choose its types."""

    method: str = setting("ldlq", "`ldlq`: error feedback over the second moments; `nearest`: their diagonal as importance")
    moments: MomentSettings = part(MomentSettings, token_power=TOKEN_POWER, damping=DAMPING)
    token_weights: Path | None = setting(
        None, "a file that keeps the tokens' weights for other runs on the same model and text"
    )

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise UserError(f"method {self.method!r} is unknown; known: {', '.join(METHODS)}")
        if not self.moments.damping:
            raise UserError("--damping must be above 0 for blocks")
        if self.method == "nearest" and (self.moments.token_power not in (0, TOKEN_POWER) or self.token_weights):
            raise UserError("--token-power, --token-weights: of method ldlq; nearest counts all tokens alike")
        if self.token_weights:
            check_writable(self.token_weights)


class Encoded(NamedTuple):
    """The bytes of a piece; the squared error of its output and the squared output, over calibration inputs, where these are
    known."""

    data: Tensor
    errors: list[float]


def is_quantized(kind: str) -> bool:
    return TYPES[kind].block > 1


def encoded(
    value: Tensor, kind: str, method: str, hessian: Tensor, damping: float = DAMPING, working_bytes: float | None = None
) -> Tensor:
    """Bytes of ``value`` [E, O, I] with second moments ``hessian`` [E, I, I] of its inputs."""
    if method == "ldlq" and is_quantized(kind):
        return ldlq(value, kind, hessian, damping, working_bytes=working_bytes)
    return encode(value.float(), kind, hessian.diagonal(dim1=1, dim2=2)[:, None])


def decoded(value: Tensor, kinds: Sequence[str], method: str, hessian: Tensor, damping: float = DAMPING) -> Iterator[Tensor]:
    """``value`` [E, O, I] as each of the types gives it back, in order; what error feedback needs is made once for all."""
    own = [kind for kind in kinds if method == "ldlq" and is_quantized(kind)]
    found = ldlq_each(value, own, hessian, damping) if own else {}
    for kind in kinds:
        yield decode_rows(found[kind] if kind in found else encoded(value, kind, method, hessian, damping), kind)


def squared_error(difference: Tensor, hessian: Tensor, total: float = 0.0) -> float:
    """``total`` and the sum over matrices of tr(D H D^T); D [E, O, I], H [E, I, I]."""
    for d, h in zip(difference, hessian, strict=True):
        error = ((d @ h) * d).sum(dtype=torch.float64).item()
        total += error if math.isfinite(error) else ((d.double() @ h.double()) * d.double()).sum().item()
    return total


def is_fed(piece: Piece, shape: Sequence[int], turned: bool = False) -> bool:
    """Whether what multiplies the columns of each matrix of a piece are the inputs of one matrix of its parameter, of this
    ``shape``: [O, I] or [E, O, I], ``turned``: [E, I, O]. Then the second moments of these inputs say how to round it."""
    if piece.function != "same" or len(shape) not in (2, 3):
        return False
    if turned:
        return piece.transposed and piece.rows is None and piece.span is None and piece.shape[-1] == shape[-2]
    inputs = shape[-1] if piece.columns is None else len(piece.columns)
    if piece.transposed or piece.shape[-1] != inputs or piece.rows is not None and piece.width != shape[-1]:
        return False
    if piece.rows is None or len(shape) == 2:
        return True
    expert = piece.rows // shape[-2]
    return len(expert) % shape[0] == 0 and torch.equal(
        expert, torch.arange(shape[0]).repeat_interleave(len(expert) // shape[0])
    )


def fed_pieces(checkpoint: Checkpoint, pieces: Sequence[Piece]) -> frozenset[str]:
    """The names of the pieces whose inputs a calibrated pass sees."""
    shapes = calibrated_shapes(checkpoint)
    block = next((found[0] for piece in pieces if (found := MTP_PREFIX.match(piece.parameter))), None)
    if block and shapes and is_run(checkpoint.model_type):
        own = hooked_shapes(MtpBlock(model_config(checkpoint.path).get_text_config(), torch.bfloat16))
        shapes |= {block + name: shape for name, shape in own.items() if not name.startswith(AROUND)}
    return frozenset(
        piece.name for piece in pieces
        if (shape := shapes.get(piece.parameter)) and is_fed(piece, shape, checkpoint.family.is_turned(shape))
    )  # fmt: skip


class GgmlRounder:
    """``targets``: the pieces of every parameter that has a quantized one which is ``fed``. Others of the same parameter (the
    half of a latent projection that llama.cpp multiplies from the other side) go to nearest beside it."""

    def __init__(
        self, pieces: Sequence[Piece], types: Mapping[str, str], method: str, damping: float, fed: Collection[str],
        working_bytes: float | None = None,
    ) -> None:  # fmt: skip
        self.types, self.method, self.damping, self.fed, self.working_bytes = types, method, damping, fed, working_bytes
        found: dict[str, list[Piece]] = {}
        for piece in pieces:
            if piece.function == "same":
                found.setdefault(piece.parameter, []).append(piece)
        wanted = {piece.parameter for piece in pieces if piece.name in fed and is_quantized(types[piece.name])}
        self.targets = {name: own for name, own in found.items() if name in wanted}
        self.encoded: dict[str, Encoded] = {}

    def round(self, parameters: Mapping[str, Tensor], take: Take) -> None:
        """Experts one parameter after the other. Then the matrices; those of one type and the same inputs (queries, keys and
        values) are encoded as one: a sweep takes as long for a few rows as for many, since its columns come one by one."""
        for name, parameter in parameters.items():
            for piece in self.targets[name]:
                if piece.name not in self.fed:
                    self._encode_plainly(piece, parameter)
            if parameter.ndim != 2:
                with explained(name):
                    hessian = take(name)[0].hessian
                    for alike in self._alike([piece for piece in self.targets[name] if piece.name in self.fed]):
                        self._encode([(piece, parameter) for piece in alike], ordered_hessian(alike[0], hessian))
        groups: list[tuple[list[tuple[Piece, Tensor]], Tensor]] = []
        for name, parameter in parameters.items():
            if parameter.ndim != 2:
                continue
            with explained(name):
                hessian = take(name)[0].hessian[:]
            for piece in self.targets[name]:
                if piece.name not in self.fed:
                    continue
                own = ordered_hessian(piece, hessian)
                for members, other in groups:
                    if self.types[members[0][0].name] == self.types[piece.name] and torch.equal(other, own):
                        members.append((piece, parameter))
                        break
                else:
                    groups.append(([(piece, parameter)], own))
        for members, hessian in groups:
            with explained(members[0][0].parameter):
                self._encode(members, hessian)

    def _encode_plainly(self, piece: Piece, parameter: Tensor) -> None:
        """To nearest, all inputs alike: nothing is known of what multiplies its columns."""
        kind = self.types[piece.name]
        data = encode(to_gguf(piece, parameter).float().contiguous(), kind, None)
        into_parameter(piece, decode_rows(data, kind).view(piece.shape), parameter)
        self.encoded[piece.name] = Encoded(data.cpu(), [])

    def _alike(self, pieces: Sequence[Piece]) -> list[list[Piece]]:
        """The pieces of one parameter; those of one type (the gates of experts and what they gate) together, since the factor
        of their second moments is one. Pieces with an order of inputs of their own stay alone."""
        found: dict[tuple[str, int], list[Piece]] = {}
        for number, piece in enumerate(pieces):
            found.setdefault((self.types[piece.name], -1 if piece.columns is None else number), []).append(piece)
        return list(found.values())

    def _encode(self, members: Sequence[tuple[Piece, Tensor]], hessian: Tensor) -> None:
        """Encode pieces of one type, with their parameters, whose inputs have the same second moments: some experts, or rows,
        at a time."""
        kind = self.types[members[0][0].name]
        values = [to_gguf(piece, parameter) for piece, parameter in members]
        values = [value.reshape(hessian.shape[0], -1, value.shape[-1]) for value in values]  # views, or copies
        memory = self.working_bytes or WORKING_BYTES[values[0].device.type]
        heights = [value.shape[1] for value in values]
        made: list[list[Tensor]] = [[] for _ in values]
        sizes = [[0.0, 0.0] for _ in values]
        together = experts_at_once((sum(heights), values[0].shape[2]), memory, COPIES)
        for experts in even_spans(len(values[0]), max(1, together)):
            moments = hessian[experts]
            value = torch.cat([value[experts] for value in values], 1)
            data = encoded(value, kind, self.method, moments, self.damping, self.working_bytes)  # it makes floats of some rows
            for number, (own, bytes_) in enumerate(zip(value.split(heights, 1), data.split(heights, 1))):
                bytes_ = bytes_.contiguous()
                for _, rows in rounding_parts((1, *own.shape[1:]), memory / len(own), COPIES):
                    weight, decoded = own[:, rows].float(), decode_rows(bytes_[:, rows], kind)
                    for place, difference in enumerate((weight - decoded, weight)):
                        sizes[number][place] = squared_error(difference, moments, sizes[number][place])
                    values[number][experts, rows] = decoded.to(own.dtype)
                made[number].append(bytes_.cpu())
        for (piece, parameter), value, parts, errors in zip(members, values, made, sizes):
            into_parameter(piece, value.reshape(piece.shape), parameter)
            self.encoded[piece.name] = Encoded(torch.cat(parts), [float(f"{size:.6g}") for size in errors])

    def taken(self, parameters: Mapping[str, Tensor]) -> dict[str, Encoded]:
        """The pieces that were encoded since the last call."""
        values, self.encoded = self.encoded, {}
        return values
