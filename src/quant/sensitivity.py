"""What rounding a matrix costs in KL, to each number of bits or to each ggml type, and the choice of least cost in a budget.

Not a command; quant_save and gguf_pack drive it.

`Sensor` streams the checkpoint once, for types of ggml and for bits of a grid alike. The cost of an option for a matrix is the
error tr(D H D^T) of its output (on a sample of its rows) times nats per error, which is measured for every parameter: it is
rounded to one option, the activations that this changes are carried to the end beside the true ones, and the KL of the
predictions taken. Nats per error differ a hundredfold between the matrices of a layer (an input of the delta rule, its output),
so no two share them.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import tempfile
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from calibration import Calibration, Collector, LayerStream, Moments, calibrated_shapes
from checkpoint import Checkpoint
from console import UserError, atomic_path, progress, read_object, scratch_folder, write_json
from families import LAYER_PREFIX, Role
from ggml_round import COPIES
from ggml_types import fallback
from gguf_format import Entry, make_header, padded, tensor_bytes
from gguf_layout import (
    MTP_PATTERN,
    MTP_TYPE,
    Piece,
    chosen_type,
    exact_patterns,
    extra_keys,
    file_type,
    into_parameter,
    ordered_hessian,
    patterns_of,
    pieces_of,
    to_gguf,
    types_of,
)
from hf_model import generation_ends
from kl import divergence
from moe_ptq import WORKING_BYTES, Grid, Hessians, Statistics, damped, round_weight, rounding_parts
from packed_format import bytes_of, plan_container, unit_of
from plans import plan_jobs
from recipe import Recipe
from records import sha256_json
from rounders import DAMPING, decoded, fed_pieces, is_quantized, squared_error
from run_dir import alone
from token_weights import token_weights


def rank_correlation(a: Tensor, b: Tensor) -> float:
    """Spearman's rank correlation of two vectors; 1 when there is nothing to order."""
    if len(a) < 2:
        return 1.0
    ranks = [value.argsort().argsort().double() for value in (a, b)]
    return torch.corrcoef(torch.stack(ranks))[0, 1].item()


def layer_report(routed: Tensor, mass: Tensor, energy: Tensor, tokens: Tensor, inputs: int) -> dict[str, Any]:
    """The report of one layer from assignments, routing weights, down-input energy and effective tokens, all [E]."""
    frequency, mass, salience = (value.double().cpu() / value.sum().double().cpu() for value in (routed, mass, energy))
    entropy = -(frequency * frequency.clamp_min(1e-300).log()).sum().item() / math.log(max(2, len(frequency)))
    return {
        "experts": len(frequency),
        "entropy": entropy,
        "min_load": frequency.min().item() * len(frequency),
        "max_load": frequency.max().item() * len(frequency),
        "never_routed": int((routed == 0).sum()),
        "cold": int((tokens < inputs).sum()),
        "rank_frequency_mass": rank_correlation(frequency, mass),
        "rank_frequency_salience": rank_correlation(frequency, salience),
        "frequency": [round(value, 6) for value in frequency.tolist()],
        "mass": [round(value, 6) for value in mass.tolist()],
        "salience": [round(value, 6) for value in salience.tolist()],
    }


def entries_of(moments: Mapping[str, Moments], pieces: Sequence[Piece]) -> dict[str, Entry]:
    """The entries of calibration statistics of the parameters that ``pieces`` are made of, by llama.cpp's names."""
    entries: dict[str, Entry] = {}
    sums: dict[str, Tensor] = {}
    for piece in pieces:
        own = moments.get(piece.parameter)
        matrices = piece.shape[0] if len(piece.shape) == 3 else 1
        if own is None or piece.role is Role.EMBEDDING or own.shape[::2] != (matrices, piece.shape[-1]):
            continue
        if piece.parameter not in sums:
            sums[piece.parameter] = own.diagonal().float().cpu()
        found = sums[piece.parameter]
        found = found if piece.columns is None or piece.transposed else found[:, piece.columns]
        entries[piece.name] = Entry(found.numpy(), own.weight.float().cpu().numpy())
    return entries


@torch.no_grad()
def probe(
    checkpoint: Checkpoint, calibration: Calibration, every_linear: bool = False
) -> tuple[dict[str, dict[str, Any]], dict[str, Entry]]:
    """(report of every decoder layer that has routed experts, by its index; with ``every_linear`` the importance of each
    weight, by llama.cpp's names)."""
    stream = LayerStream(checkpoint, calibration.device, calibration.dtype)
    pieces = pieces_of(checkpoint) if every_linear else []
    kwargs = stream.arguments(calibration.batches()[0])
    hidden = stream.embed(calibration.batches())
    reports, importance = {}, {}
    with progress(len(stream.layers), "probe", "layer") as bar:
        for index, layer in enumerate(stream.layers):
            stream.fill(layer, f"model.layers.{index}.")
            experts = {name for name, p in layer.named_parameters() if p.ndim == 3 and "experts" in name.split(".")}
            linears = {f"{name}.weight" for name, m in layer.named_modules() if isinstance(m, torch.nn.Linear)}
            wanted = experts | (linears if every_linear else set())
            collector = Collector(layer, wanted)
            hidden = [out.cpu() for out in stream.run(layer, hidden, kwargs[index])]
            collector.remove()
            for name, routed in collector.routed.items():
                moments = collector.moments[f"{name}.down_proj"]
                energy = moments.diagonal().sum(-1)
                tokens = moments.weight**2 / moments.square.clamp_min(1e-30)
                inputs = next(own for key, own in collector.moments.items() if key.startswith(f"{name}.")).shape[-1]
                reports[str(index)] = layer_report(routed, collector.mass[name], energy, tokens, inputs)
            named = {f"model.layers.{index}.{name}": moments for name, moments in collector.moments.items()}
            importance |= entries_of(named, pieces)
            stream.empty(layer)
            bar.update()
    return reports, importance


CANDIDATES = "iq2_xxs,iq2_xs,iq2_s,iq3_xxs,iq3_s,iq4_xs,q4_K,q5_K,q6_K,q8_0"
PROBE, PROBE_BITS, PROBE_SEQUENCES = "q3_K", "3", 32
ADDITIVE = 0.002  # predicted KL above which errors do not add up, and what is chosen is measured whole
STEPS, SPAN = 1_000_000, 1 << 15  # of a file's budget in the dynamic program, and of them those that are worked on at once
BITS = (2, 3, 4, 5, 6, 8)  # of a grid
OPEN = ""  # the chosen type of a piece that no pattern names
UNMEASURED = "q8_0"  # that of one whose inputs no calibrated pass sees
SAMPLE_EXPERTS, SAMPLE_ROWS = 8, 32
CARRIED_BYTES = 24 << 30  # of the host's memory: the changed activations
# a value [E, O, I] as each of several types gives it back, in their order, second moments [E, I, I] given
Rounded = Callable[[Tensor, Sequence[str], Tensor], Iterable[Tensor]]


def solve(costs: Sequence[Sequence[int]], losses: Sequence[Sequence[float]], budget: int) -> list[int]:
    """For each item the index of its option so that the summed loss is least and the summed cost at most ``budget``.

    Exact dynamic programming over the cost in units of its greatest common divisor. Raises :class:`UserError` when even
    the cheapest options cost more.
    """
    floor = sum(min(row) for row in costs)
    if floor > budget:
        raise UserError(f"the budget of {budget} is below the {floor} of the cheapest choice; raise it")
    unit = int(np.gcd.reduce([cost for row in costs for cost in row]))
    size = budget // unit + 1
    best = np.zeros(size)
    choices = np.zeros((len(costs), size), dtype=np.int8)
    for chosen, row, loss in zip(choices, costs, losses, strict=True):
        least = np.full(size, np.inf)
        for start in range(0, size, SPAN):  # what stays in a core's cache
            for option, (cost, value) in enumerate(zip(row, loss, strict=True)):
                part = slice(max(start, cost // unit), min(start + SPAN, size))
                if part.start < part.stop:
                    found = best[part.start - cost // unit : part.stop - cost // unit] + value
                    better = found < least[part]
                    np.copyto(least[part], found, where=better)
                    np.copyto(chosen[part], option, where=better, casting="unsafe")
        best = least
    picked, left = [0] * len(costs), int(best.argmin())
    for index in reversed(range(len(costs))):
        picked[index] = int(choices[index, left])
        left -= costs[index][picked[index]] // unit
    return picked


def sampled(value: Tensor, hessian: Hessians) -> tuple[Tensor, Tensor, float]:
    """Some rows of some matrices of [E, O, I], their second moments, and how many times more rows there are."""
    experts = torch.linspace(0, len(value) - 1, min(SAMPLE_EXPERTS, len(value))).round().long().to(value.device)
    rows = torch.linspace(0, value.shape[1] - 1, min(SAMPLE_ROWS, value.shape[1])).round().long().to(value.device)
    part = value[experts][:, rows].float()
    return part, hessian[experts], value.shape[0] * value.shape[1] / (part.shape[0] * part.shape[1])


def matrices(piece: Piece, parameter: Tensor, hessian: Hessians) -> tuple[Tensor, Hessians]:
    """A piece of a parameter [E, O, I] in ggml's order, and the second moments of its inputs."""
    own, value = ordered_hessian(piece, hessian), to_gguf(piece, parameter)
    return value.reshape(own.shape[0], -1, value.shape[-1]), own


def sampled_errors(
    sources: Iterable[tuple[Piece, Tensor, Hessians]], options: Mapping[str, Sequence[str]], rounded: Rounded
) -> dict[str, dict[str, float]]:
    """Output error of each piece, of (piece, its parameter, second moments of the parameter), in each of its options, judged
    by a sample. Samples of one shape are rounded as one: each of their steps takes about as long for one as for all."""
    samples = {piece.name: sampled(*matrices(piece, parameter, hessian)) for piece, parameter, hessian in sources}
    alike: dict[tuple[Any, ...], list[str]] = {}
    for name, (part, _, _) in samples.items():
        alike.setdefault((*part.shape[1:], *options[name]), []).append(name)
    errors: dict[str, dict[str, float]] = {name: {} for name in samples}
    for names in alike.values():
        parts, moments = (torch.cat(each) for each in list(zip(*(samples[name] for name in names)))[:2])
        for kind, found in zip(options[names[0]], rounded(parts, options[names[0]], moments), strict=True):
            place = 0
            for name in names:
                part, own, share = samples[name]
                errors[name][kind] = share * squared_error(part - found[place : place + len(part)], own)
                place += len(part)
    return errors


def rounded_ways(
    pieces: Sequence[Piece], original: Tensor, hessian: Hessians, ways: Sequence[Mapping[str, str]], rounded: Rounded
) -> list[tuple[Tensor, float]]:
    """(a parameter with its ``pieces`` as a way says, their output error) for each of the ``ways``; ``hessian``: of the
    parameter. Pieces that go the same ways are rounded as one, as gguf_pack does it, and to several types at once."""
    made, errors = [original.clone() for _ in ways], [0.0 for _ in ways]
    alike: dict[tuple[Any, ...], list[Piece]] = {}
    for piece in pieces:
        key = (*(way[piece.name] for way in ways), piece.name if piece.columns is not None else "")
        alike.setdefault(key, []).append(piece)
    for (*kinds, _), members in alike.items():
        values, moments = zip(*(matrices(piece, original, hessian) for piece in members))
        value, once = torch.cat(values, 1) if len(values) > 1 else values[0], list(dict.fromkeys(kinds))
        decoded = {kind: torch.empty_like(value) for kind in once}
        for experts, rows in rounding_parts(value.shape, WORKING_BYTES[value.device.type], COPIES):
            given, own = value[experts, rows].float().contiguous(), moments[0][experts]
            for kind, found in zip(once, rounded(given, once, own), strict=True):
                decoded[kind][experts, rows] = found.to(value.dtype)
                error = squared_error(given - found, own)
                errors = [sum_ + error * (kind == other) for sum_, other in zip(errors, kinds)]
        for whole, kind in zip(made, kinds):
            for piece, part in zip(members, decoded[kind].split([each.shape[1] for each in values], 1)):
                into_parameter(piece, part.reshape(piece.shape), whole)
    return list(zip(made, errors))


class Sensor:
    """What rounding costs the model of a checkpoint in KL. It is taken on the second halves of ``probed`` of the calibration
    sequences (None: all), and of no more than CARRIED_BYTES hold: sequences begin in mid-text, and before a model has read some
    of it, errors of its first layers cost a thousand times what they cost later. ``units``: the pieces that are rounded, by
    what is chosen for: a parameter, or all that must have the same bits."""

    def __init__(
        self, checkpoint: Checkpoint, calibration: Calibration, units: Mapping[str, Sequence[Piece]], rounded: Rounded,
        weights_file: Path | None = None, probed: int | None = None,
    ) -> None:  # fmt: skip
        self.checkpoint, self.calibration, self.rounded = checkpoint, calibration, rounded
        self.stream = LayerStream(checkpoint, calibration.device, calibration.dtype)
        with scratch_folder() as work:
            self.weights = token_weights(self.stream, calibration, work, weights_file)
        self.parts = parts = calibration.batches()
        self.kwargs, self.embedded = self.stream.arguments(parts[0]), self.stream.embed(parts)
        self.parameters: dict[str, list[Piece]] = {}
        self.unit_of: dict[str, str] = {}  # by parameter
        for unit, pieces in units.items():
            for piece in pieces:
                self.parameters.setdefault(piece.parameter, []).append(piece)
                self.unit_of[piece.parameter] = unit
        ends = {own[0].role: key for key, own in self.parameters.items()}
        self.embedding, self.head = ends.get(Role.EMBEDDING), ends.get(Role.LM_HEAD)
        room = CARRIED_BYTES // (len(self.parameters) * self.embedded[0].nbytes)
        self.count = max(1, min(room, len(parts), len(parts) if probed is None else -(-probed // len(parts[0]))))  # batches

    def read(self, key: str) -> Tensor:
        """An end of the model."""
        (source,) = self.checkpoint.sources[key]
        return self.checkpoint.read(source).to(self.stream.device, self.stream.dtype)

    def embed(self, part: slice, value: Tensor) -> list[Tensor]:
        """What the first layer reads where the embedding is ``value``."""
        (source,) = self.checkpoint.sources[self.embedding or ""]
        return self.stream.embed(self.parts[part], {source: value.cpu()})

    def statistics(self, moments: Moments) -> Hessians:
        return moments.statistics(self.calibration.floor * moments.shape[-1], 0.0, self.calibration.shrinkage).hessian

    def ways_of(
        self, key: str, original: Tensor, hessian: Hessians, ways: Sequence[Mapping[str, str]]
    ) -> list[tuple[Tensor, float]]:
        return rounded_ways(self.parameters[key], original, hessian, ways, self.rounded)

    def layers(self, bar: Any, change: Callable[[nn.Module, dict[str, nn.Parameter], dict[str, Hessians], int], None]) -> None:
        """Fill each layer in turn, and hand it to ``change`` with the parameters in question, the second moments of their
        inputs and its number, while ``self.hidden`` is what it reads; afterwards what the last one makes."""
        stream, self.hidden = self.stream, self.embedded
        for index, layer in enumerate(stream.layers):
            prefix = f"model.layers.{index}."
            stream.fill(layer, prefix)
            names = [key.removeprefix(prefix) for key in self.parameters if key.startswith(prefix)]
            collector = Collector(layer, set(names), None if self.weights is None else self.weights[index])
            after = [out.cpu() for out in stream.run(layer, self.hidden, self.kwargs[index])]
            collector.remove()
            if lost := next((name for name in names if name not in collector.moments), ""):
                raise UserError(f"{prefix}{lost}: no calibration activation reached it; give more calibration text")
            hessians = {prefix + name: self.statistics(collector.moments[name]) for name in names}
            change(layer, {prefix + name: layer.get_parameter(name) for name in names}, hessians, index)
            self.hidden = after
            stream.empty(layer)
            bar.update()

    def head_moments(self) -> Hessians:
        """Second moments of what the head reads, behind all layers."""
        moments = Moments(1, self.stream.model.lm_head.in_features, self.stream.device)
        with self.stream.ending() as inputs_of:
            for own in self.hidden:
                moments.add(0, inputs_of(own.to(self.stream.device)).flatten(0, 1))
        return self.statistics(moments)

    def through(self, layer: nn.Module, index: int, hidden: Sequence[Tensor]) -> list[Tensor]:
        return [out.cpu() for out in self.stream.run(layer, hidden, self.kwargs[index])]

    @torch.no_grad()
    def losses(
        self, options: Mapping[str, Sequence[str]], probes: Mapping[str, str]
    ) -> tuple[dict[str, dict[str, float]], dict[str, float]]:
        """(predicted KL by piece and each of its ``options``; by parameter, the KL that rounding it to its ``probes`` costs on
        the first sequences). The checkpoint is streamed once."""
        sequences = self.count * len(self.parts[0])
        print(f"sensitivity: KL on {sequences * self.parts[0].shape[1] // 2:,} positions of {sequences} sequences", flush=True)
        carried: dict[str, tuple[list[Tensor], Tensor | None]] = {}  # the activations behind a rounded parameter, the head
        errors: dict[str, dict[str, float]] = {}
        probe_errors: dict[str, float] = {}

        def probed(key: str, original: Tensor, hessian: Hessians) -> Tensor:
            ((value, probe_errors[key]),) = self.ways_of(key, original, hessian, [probes])
            return value

        def sample(found: Mapping[str, tuple[Tensor, Hessians]]) -> None:
            given = ((piece, *own) for key, own in found.items() for piece in self.parameters[key])
            errors.update(sampled_errors(given, options, self.rounded))

        if self.embedding:  # its inputs are single tokens: the error of a row counts as it is
            original = self.read(self.embedding)
            identity = torch.eye(original.shape[-1], device=original.device)[None]
            sample({self.embedding: (original, identity)})
            value = probed(self.embedding, original, identity)
            carried[self.embedding] = self.embed(slice(self.count), value), None

        def change(layer: nn.Module, own: dict[str, nn.Parameter], hessians: dict[str, Hessians], index: int) -> None:
            for key, (hidden, _) in carried.items():
                carried[key] = self.through(layer, index, hidden), None
            sample({key: (parameter, hessians[key]) for key, parameter in own.items()})
            for key, parameter in own.items():
                original = parameter.detach().clone()
                parameter.copy_(probed(key, original, hessians[key]))
                carried[key] = self.through(layer, index, self.hidden[: self.count]), None
                parameter.copy_(original)

        with progress(len(self.stream.layers), "sensitivity", "layer") as bar:
            self.layers(bar, change)
        if self.head:
            original, hessian = self.read(self.head), self.head_moments()
            sample({self.head: (original, hessian)})
            carried[self.head] = self.hidden[: self.count], probed(self.head, original, hessian)
        nats = divergences(self.stream, self.hidden[: self.count], carried)
        worth = {key: found / max(probe_errors[key], 1e-30) for key, found in nats.items()}  # nats per error
        own = {piece.name: worth[key] for key, pieces in self.parameters.items() for piece in pieces}
        return {name: {kind: error * own[name] for kind, error in row.items()} for name, row in errors.items()}, nats

    def units_in(self, keys: Iterable[str]) -> dict[str, list[str]]:
        """Parameters by their unit."""
        found: dict[str, list[str]] = {}
        for key in keys:
            found.setdefault(self.unit_of[key], []).append(key)
        return found

    @torch.no_grad()
    def measure(self, ways: Sequence[Mapping[str, str]], around: bool = False) -> tuple[list[float], dict[str, float]]:
        """(KL over the last sequences of the model with all pieces as each of the ``ways`` says, with what the sum of
        :meth:`losses` leaves out; if asked, by how much that of the first is less where a unit is left as it is, by unit)."""
        part = slice(len(self.parts) - self.count, len(self.parts))
        whole = [str(number) for number in range(len(ways))]
        start, heads = self.embedded[part], dict[str, Tensor]()
        carried = dict.fromkeys(whole, start)
        if self.embedding:
            original = self.read(self.embedding)
            identity = torch.eye(original.shape[-1], device=original.device)[None]
            for way, (value, _) in zip(whole, self.ways_of(self.embedding, original, identity, ways)):
                carried[way] = self.embed(part, value)
            if around:
                carried[self.unit_of[self.embedding]] = start

        def change(layer: nn.Module, own: dict[str, nn.Parameter], hessians: dict[str, Hessians], index: int) -> None:
            originals = {key: parameter.detach().clone() for key, parameter in own.items()}
            made = {key: self.ways_of(key, originals[key], hessians[key], ways) for key in own}
            before = carried["0"]
            for number in reversed(range(len(ways))):
                for key, parameter in own.items():
                    parameter.copy_(made[key][number][0])
                carried[whole[number]] = self.through(layer, index, carried[whole[number]])
            for unit in [key for key in carried if key not in whole]:
                carried[unit] = self.through(layer, index, carried[unit])
            for unit, mine in self.units_in(own).items() if around else ():
                for key in mine:
                    own[key].copy_(originals[key])
                carried[unit] = self.through(layer, index, before)
                for key in mine:
                    own[key].copy_(made[key][0][0])

        with progress(len(self.stream.layers), "check", "layer") as bar:
            self.layers(bar, change)
        if self.head:
            found = self.ways_of(self.head, self.read(self.head), self.head_moments(), ways)
            heads = {way: value for way, (value, _) in zip(whole, found)}
            if around:
                carried[self.unit_of[self.head]] = carried["0"]
        kept = self.unit_of.get(self.head or "")
        cases = {key: (hidden, None if key == kept else heads.get(key, heads.get("0"))) for key, hidden in carried.items()}
        kl = divergences(self.stream, self.hidden[part], cases)
        return [kl[way] for way in whole], {key: kl["0"] - own for key, own in kl.items() if key not in whole}


def divergences(
    stream: LayerStream, hidden: Sequence[Tensor], cases: Mapping[str, tuple[Sequence[Tensor], Tensor | None]]
) -> dict[str, float]:
    """The mean KL, to the predictions behind ``hidden``, of those behind the activations and with the head (None: its own) of
    each of ``cases``: over the second half of each sequence."""
    sums, count = dict.fromkeys(cases, 0.0), 0
    with stream.predictions() as logits:
        head = stream.model.lm_head.weight
        true = head.clone()

        def predicted(value: Tensor) -> Tensor:
            return logits(value[:, value.shape[1] // 2 :].to(stream.device)).flatten(0, 1)

        for place, own in enumerate(hidden):
            expected = predicted(own)
            count += len(expected)
            for key, (carried, weight) in cases.items():
                if weight is not None:
                    head.copy_(weight)
                sums[key] += divergence(expected, predicted(carried[place]))[0].double().sum().item()
                if weight is not None:
                    head.copy_(true)
    return {key: total / count for key, total in sums.items()}


def options_of(pieces: Sequence[Piece], candidates: Sequence[str]) -> dict[str, list[str]]:
    """The types that each piece may have: the candidates, or what llama.cpp takes for its row length, without repeats."""
    return {p.name: list(dict.fromkeys(fallback(kind, p.shape[-1]) for kind in candidates)) for p in pieces}


Sizes = Mapping[str, Mapping[str, int]]  # bytes by what is chosen for, and its options


def check_room(sizes: Sizes, budget: int) -> int:
    """Bytes of a step of the budget; :class:`UserError` where the smallest options need more than it has."""
    unit = max(1, budget // STEPS)
    if unit * sum(-(-min(row.values()) // unit) for row in sizes.values()) > budget:
        floor = sum(min(row.values()) for row in sizes.values())
        lack, least = (floor - budget) / 2**30, floor / 2**30
        raise UserError(f"TARGET_GIB is {lack:.4f} too small: what is chosen needs {least:.4f} GiB at least")
    return unit


def choose(sizes: Sizes, losses: Mapping[str, Mapping[str, float]], budget: int) -> dict[str, str]:
    """The option of each: least summed loss within ``budget`` bytes, counted in steps of a millionth of it."""
    unit = check_room(sizes, budget)
    costs = [[-(-size // unit) for size in row.values()] for row in sizes.values()]
    values = [[losses[name][option] for option in row] for name, row in sizes.items()]
    picked = solve(costs, values, budget // unit)
    return {name: list(row)[index] for (name, row), index in zip(sizes.items(), picked, strict=True)}


def fixed_types(pieces: Sequence[Piece], patterns: Sequence[tuple[str, str]], fed: Collection[str]) -> dict[str, str]:
    """The types that are not chosen: of what llama-quantize keeps, of what ``patterns`` name, and of the rest whose rounding is
    not measured: what is not ``fed``, and an embedding that is the head too."""
    ends = (Role.EMBEDDING, Role.LM_HEAD)
    tied = not any(piece.role is Role.LM_HEAD for piece in pieces)
    wanted = {}
    for piece in pieces:
        known = not tied if piece.role in ends else piece.name in fed
        wanted[piece.name] = piece.kept or chosen_type(piece.name, OPEN if known else UNMEASURED, patterns)
    return {p.name: fallback(wanted[p.name], p.shape[-1]) for p in pieces if wanted[p.name]}


Chosen = tuple[str | dict[str, Any], dict[str, Any]]  # the file of types, or the JSON of bits; metrics


def chosen_once(out: Path, file: Path, force: bool, made_of: Mapping[str, Any], choose: Callable[[], Chosen]) -> dict[str, Any]:
    """The metrics of what ``choose`` has found for the output ``out``. It lies in ``file``, they in a JSON of that name: a
    killed run finds both; what is of other settings, or a user's, is refused, unless by ``force``."""
    facts, mark = file.with_suffix(".json"), sha256_json(made_of)
    with alone(out.resolve()):
        known = facts.exists() and read_object(facts).get("made_of") == mark
        if known and file.exists():
            print(f"kept {file}", flush=True)
            return read_object(facts)["metrics"]
        if (file.exists() or facts.exists()) and not known and not force:
            raise UserError(f"{file}: made with other settings or for another model; use --force to replace it")
        found, metrics = choose()
        write_json(facts, {"made_of": mark, "metrics": metrics} | (found if isinstance(found, dict) else {}))
        if isinstance(found, str):
            with atomic_path(file) as temporary:
                temporary.write_text(found, encoding="utf-8")
        print(f"wrote {file}", flush=True)
        return metrics


def allocate_types(
    checkpoint: Checkpoint,
    calibration: Calibration,
    target_gib: float,
    patterns: Sequence[tuple[str, str]] = (),
    *,
    method: str = "ldlq",
    damping: float = DAMPING,
    weights_file: Path | None = None,
    mtp: str = "file",
    hand: tuple[str, Sequence[tuple[str, str]]] | None = None,
) -> Chosen:
    """The file of types for a GGUF of at most ``target_gib``, rounded by ``method``. ``patterns``: (pattern, type) of the
    tensors whose types are fixed; ``mtp``: of gguf_layout.traced. The block of multi-token prediction changes no prediction of
    the model: its types are those of ``patterns``, or MTP_TYPE. ``hand``: (base type, patterns) of a recipe, whose types are
    candidates too, so that what is chosen is predicted to be no worse at the same bytes."""

    def rounded(value: Tensor, kinds: Sequence[str], hessian: Tensor) -> Iterable[Tensor]:
        return decoded(value.contiguous(), kinds, method, hessian, damping)

    started, pieces = time.time(), pieces_of(checkpoint, mtp)
    mtp = mtp if any(piece.role is Role.MTP for piece in pieces) else "none"
    own = patterns_of([*patterns, (MTP_PATTERN, MTP_TYPE)], pieces)
    fixed = fixed_types(pieces, own, fed_pieces(checkpoint, pieces))
    open_pieces = [piece for piece in pieces if piece.name not in fixed]
    if not open_pieces:
        raise UserError(f"{checkpoint.path}: no tensor's inputs are known, so no types can be measured; give TENSOR_TYPES")
    candidates = CANDIDATES.split(",")
    options, by_hand = options_of(open_pieces, candidates), {}
    if hand:
        by_hand = fixed | types_of({p.name: p.shape for p in open_pieces}, hand[0], patterns_of(hand[1], pieces))[0]
        options = {name: list(dict.fromkeys([*kinds, by_hand[name]])) for name, kinds in options.items()}
    with tempfile.TemporaryDirectory() as work:  # the size of a header does not depend on the types
        rows = [(p.name, p.shape, fixed.get(p.name, "f16")) for p in pieces]
        more = (extra_keys(checkpoint), generation_ends(checkpoint.path))
        header = len(make_header(checkpoint.path, rows, file_type("iq3_xxs"), Path(work), mtp, *more))
    taken = header + sum(padded(tensor_bytes(p.shape, fixed[p.name])) for p in pieces if p.name in fixed)
    budget = int(target_gib * 2**30) - taken
    sizes = {p.name: {kind: padded(tensor_bytes(p.shape, kind)) for kind in options[p.name]} for p in open_pieces}
    check_room(sizes, budget)  # too small: said now
    probes = {p.name: fallback(PROBE, p.shape[-1]) for p in open_pieces}
    together: dict[str, list[Piece]] = {}
    for piece in open_pieces:
        together.setdefault(piece.parameter, []).append(piece)
    sensor = Sensor(checkpoint, calibration, together, rounded, weights_file, PROBE_SEQUENCES)
    losses, nats = sensor.losses(options, probes)
    units = {piece.name: piece.parameter for piece in open_pieces}
    chosen, facts = outcome(target_gib, taken, sizes, losses, by_hand, units, sensor.measure)
    types = {piece.name: chosen.get(piece.name) or fixed[piece.name] for piece in pieces}
    metrics = facts | {
        "candidates": candidates,
        "types": dict(collections.Counter(types[piece.name] for piece in open_pieces)),
        "chosen": {piece.name: types[piece.name] for piece in open_pieces if is_quantized(types[piece.name])},
        "nats": nats,
        "losses": losses,
    }
    print("\n".join(f"{count:>6} {kind}" for kind, count in metrics["types"].items()))
    print(f"chosen in {time.time() - started:.1f} s", flush=True)
    return f"# {facts['bytes'] / 2**30:.6f} GiB of at most {target_gib}\n" + exact_patterns(types), metrics


# Sensor.measure of ways, and, if asked, what each unit costs among the others of the first
Measure = Callable[[Sequence[Mapping[str, str]], bool], tuple[list[float], dict[str, float]]]


def among_others(
    losses: Mapping[str, Mapping[str, float]], chosen: Mapping[str, str], units: Mapping[str, str], gains: Mapping[str, float]
) -> dict[str, dict[str, float]]:
    """Losses around a choice, from what its KL falls by where each of ``units`` (by what is chosen for) is left unrounded.

    The ratio of that to what rounding the unit alone costs is what a smaller error of it is worth. It holds how the error
    happens to meet those of others, of either sign, which hides what small units cost: so each ratio is drawn to that of all
    together, as far as the median deviation from it is larger than what the unit costs. A larger error meets the others anew:
    it costs no less than that of all."""
    alone = dict.fromkeys(gains, 0.0)
    for key, unit in units.items():
        alone[unit] += losses[key][chosen[key]]
    mean = max(sum(gains.values()), 0.0) / max(sum(alone.values()), 1e-30)
    noise = float(np.median([abs(gains[unit] - mean * own) for unit, own in alone.items()])) + 1e-30
    ratio = {unit: max(gains[unit] + noise * mean, 0.0) / (own + noise) for unit, own in alone.items()}
    found: dict[str, dict[str, float]] = {}
    for key, row in losses.items():
        now, own = row[chosen[key]], ratio[units[key]]
        found[key] = {kind: (loss - now) * (own if loss < now else max(own, mean)) for kind, loss in row.items()}
    return found


def outcome(
    target_gib: float, rest: int, sizes: Sizes, losses: Mapping[str, Mapping[str, float]], by_hand: Mapping[str, str],
    units: Mapping[str, str], measure: Measure,
) -> tuple[dict[str, str], dict[str, Any]]:  # fmt: skip
    """(what is taken; its bytes and predicted KL, printed, and those of a recipe ``by_hand``). ``rest``: bytes of all else.

    Where the prediction is so large that errors do not add up, the choice and the recipe, if it fits, are measured whole. What
    each of ``units`` (of what is chosen for) costs among the errors of all others then takes the place of what it costs alone,
    the choice is made anew, and measured as well: what loses least is taken."""
    budget = int(target_gib * 2**30) - rest

    def told(name: str, way: Mapping[str, str]) -> dict[str, Any]:
        size = rest + sum(row[way[key]] for key, row in sizes.items())
        predicted, share = sum(losses[key][way[key]] for key in sizes), 100 * size / (target_gib * 2**30)
        print(f"{name}: {size / 2**30:.6f} GiB ({share:.3f} % of the budget), predicted KL {predicted:.5f}", flush=True)
        return {"bytes": size, "predicted_kl": predicted}

    ways = {"chosen": choose(sizes, losses, budget)} | ({"by hand": {key: by_hand[key] for key in sizes}} if by_hand else {})
    facts = {name: told(name, way) for name, way in ways.items()}
    taken = "chosen"
    if facts["chosen"]["predicted_kl"] > ADDITIVE:
        fit = [name for name, own in facts.items() if own["bytes"] <= target_gib * 2**30]
        kl, gains = measure([ways[name] for name in fit], True)
        own = among_others(losses, ways["chosen"], units, gains)
        ways["second round"] = choose(sizes, own, budget)
        facts["second round"] = told("second round", ways["second round"])
        kl += measure([ways["second round"]], False)[0]
        for name, value in zip([*fit, "second round"], kl, strict=True):
            facts[name]["measured_kl"] = value
            print(f"measured KL, {name}: {value:.5f}", flush=True)
        taken = min([*fit, "second round"], key=lambda name: facts[name]["measured_kl"])
    print(f"taken: {taken}", flush=True)
    rounds = {name.replace(" ", "_"): own for name, own in facts.items()}
    return ways[taken], facts[taken] | {"target_gib": target_gib, "taken": taken, "ways": rounds}


def bits_sizes(
    checkpoint: Checkpoint, recipe: Recipe, pieces: Mapping[str, Piece], packed_bits: int | None
) -> tuple[dict[str, dict[str, int]], int]:
    """(bytes of each unit of vLLM by its bits, bytes of the rest) of a checkpoint whose ``pieces`` are chosen: of codes and
    scales, or with ``packed_bits`` of the container."""

    def sizes(own: Recipe) -> tuple[dict[str, int], int]:
        jobs, found, rest = plan_jobs(checkpoint, own), collections.Counter[str](), 0
        container = None
        if packed_bits is not None:
            container = plan_container(jobs, own, least=packed_bits, ends=checkpoint.family.packed_ends)
        for job in jobs:
            if container is None:
                size = job.packed_bytes(own)
            else:
                packed = job.name in container.packed
                size = bytes_of(container.stored(job.name, job.info.shape)) if packed else job.info.bytes
            if checkpoint.places[job.name].parameter in pieces and (container is None or job.name in container.packed):
                found[unit_of(job.name)] += size
            else:
                rest += size
        return found, rest

    made: dict[str, dict[str, int]] = {}
    for bits in BITS:
        for unit, size in sizes(dataclasses.replace(recipe, expert_bits=bits, linear_bits=bits))[0].items():
            made.setdefault(unit, {})[str(bits)] = size
    return made, sizes(recipe)[1]


def allocate_bits(
    checkpoint: Checkpoint, calibration: Calibration, recipe: Recipe, target_gib: float, packed_bits: int | None = None,
    weights_file: Path | None = None,
) -> Chosen:  # fmt: skip
    """The bits of a checkpoint of at most ``target_gib``: of codes and scales, or with ``packed_bits`` of the container. What
    vLLM makes one matrix of has the same bits; the rest keeps the bits of ``recipe``."""
    started = time.time()
    pieces = {}
    shapes, places = calibrated_shapes(checkpoint), checkpoint.places
    jobs = {places[job.name].parameter: job for job in plan_jobs(checkpoint, recipe)}
    tied = not any(job.role is Role.LM_HEAD for job in jobs.values())
    for parameter, job in jobs.items():
        layer, shape = LAYER_PREFIX.match(parameter), checkpoint.parameter_shape(parameter)
        known = not tied if job.role in (Role.EMBEDDING, Role.LM_HEAD) else layer and parameter in shapes
        if job.bits is not None and known:
            turned = len(shape) == 3 and checkpoint.family.is_turned(shape)
            shape = (*shape[:-2], shape[-1], shape[-2]) if turned else shape
            number = int(layer[1]) if layer else -1
            sources = tuple(checkpoint.sources[parameter])
            pieces[parameter] = Piece(parameter, shape, parameter, sources, job.role, number, transposed=turned)
    sizes, rest = bits_sizes(checkpoint, recipe, pieces, packed_bits)
    units: dict[str, list[Piece]] = {}
    for piece in pieces.values():
        units.setdefault(unit_of(piece.sources[0]), []).append(piece)
    units = {unit: units[unit] for unit in sizes}
    budget = int(target_gib * 2**30) - rest
    check_room(sizes, budget)  # too small: said now

    def rounded(value: Tensor, kinds: Sequence[str], hessian: Tensor) -> Iterator[Tensor]:
        tokens = torch.ones(len(hessian), device=hessian.device)
        for bits in kinds:
            grid = Grid(int(bits), recipe.group, recipe.clip_steps, recipe.clip_low)
            with damped(hessian, calibration.damping):
                found = round_weight(value.contiguous(), grid, Statistics(hessian, tokens), recipe.method)
            yield found

    open_pieces = [piece for own in units.values() for piece in own]
    options = {piece.name: [str(bits) for bits in BITS] for piece in open_pieces}
    probes = dict.fromkeys(options, PROBE_BITS)
    sensor = Sensor(checkpoint, calibration, units, rounded, weights_file, PROBE_SEQUENCES)
    by_piece, nats = sensor.losses(options, probes)
    losses = {unit: {b: sum(by_piece[p.name][b] for p in own) for b in sizes[unit]} for unit, own in units.items()}
    by_hand = {unit: str(jobs[own[0].name].bits) for unit, own in units.items()}
    by_hand = by_hand if all(bits in sizes[unit] for unit, bits in by_hand.items()) else {}  # 2.5 bits are no option
    names = {unit: [piece.name for piece in own] for unit, own in units.items()}

    def measure(ways: Sequence[Mapping[str, str]], around: bool) -> tuple[list[float], dict[str, float]]:
        each = [{name: way[unit] for unit, own in names.items() for name in own} for way in ways]
        return sensor.measure(each, around)

    chosen, found = outcome(target_gib, rest, sizes, losses, by_hand, dict(zip(names, names)), measure)
    overrides = {piece.name: int(chosen[unit]) for unit, own in units.items() for piece in own}
    print("\n".join(f"{bits} bits  {unit}" for unit, bits in chosen.items()))
    print(f"chosen in {time.time() - started:.1f} s", flush=True)
    return {"overrides": overrides}, found | {"candidates": list(BITS), "chosen": chosen, "nats": nats, "losses": losses}
