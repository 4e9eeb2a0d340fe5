"""What rounding a matrix costs in KL, to each number of bits or to each ggml type, and the choice of least cost in a budget.

Not a command; moe_alloc drives it.

`grid_losses` rounds the experts' gate_up or down matrices of one layer alone (clip search), all else stays as it is, and takes
the mean KL to the model on text. `type_losses` streams the checkpoint once, for types of ggml and for bits of a grid alike.
There the cost of an option for a matrix is the error tr(D H D^T) of its output (on a sample of its rows) times nats per error,
which is measured for every parameter: it is rounded to one option, the activations that this changes are carried to the end
beside the true ones, and the KL of the predictions taken. Nats per error differ a hundredfold between the matrices of a layer
(an input of the delta rule, its output), so no two share them.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import random
import tempfile
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import rankdata
from torch import Tensor

from calibration import Calibration, Collector, LayerStream, Moments, calibrated_shapes
from checkpoint import Checkpoint
from console import UserError, atomic_path, progress, scratch_folder, write_json
from families import LAYER_PREFIX, Role
from ggml_codecs import decode_rows
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
from hf_model import finite_logits, generation_ends
from kl import Batch, divergence
from moe_ptq import WORKING_BYTES, Grid, Statistics, damped, round_weight, rounding_parts
from moe_quant import fake_quant
from packed_format import bytes_of, plan_container, unit_of
from plans import plan_jobs
from recipe import Recipe
from rounders import DAMPING, encoded, fed_pieces, is_quantized, squared_error
from token_weights import token_weights

SIGNALS = ("frequency", "wmass", "asal", "wfro")
STRATEGIES = ("blind", "random", "inverse", *SIGNALS, "composite")


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


def expert_norms(checkpoint: Checkpoint) -> dict[str, list[float]]:
    """Frobenius norm of each expert's matrices together, by module of experts; one tensor in memory at a time."""
    squares: dict[str, torch.Tensor] = {}
    for name, info in checkpoint.tensors.items():
        place = checkpoint.places[name]
        module = place.parameter.rpartition(".")[0]
        if place.expert is None and not (module.endswith(".experts") and len(info.shape) == 3):
            continue
        own = torch.linalg.vector_norm(checkpoint.read(name).float().flatten(-2), dim=-1).double() ** 2
        row = squares.setdefault(module, torch.zeros(0, dtype=torch.float64))
        if place.expert is None:
            squares[module] = own + (row if len(row) else 0)
            continue
        if len(row) <= place.expert:
            row = squares[module] = torch.nn.functional.pad(row, (0, place.expert + 1 - len(row)))
        row[place.expert] += own
    return {module: row.sqrt().tolist() for module, row in squares.items()}


def signals_of(checkpoint: Checkpoint, calibration: Calibration) -> dict[str, dict[str, list[float]]]:
    """What orders the experts (allocation.SIGNALS), by module of experts."""
    reports, _ = probe(checkpoint, calibration)
    if not reports:
        raise UserError(f"{checkpoint.path}: has no routed experts to allocate bits to")
    signals = {}
    for module, norms in expert_norms(checkpoint).items():
        own = reports[module.split(".")[2]]
        signals[module] = {"frequency": own["frequency"], "wmass": own["mass"], "asal": own["salience"], "wfro": norms}
    return signals


def scores(strategy: str, signals: Mapping[str, Sequence[float]], seed: int = 0) -> list[float]:
    """A score for each expert of one layer from its ``signals`` (those of :data:`SIGNALS`); more is more important."""
    count = len(signals[SIGNALS[0]])
    if strategy == "random":
        return random.Random(seed).sample([float(i) for i in range(count)], count)
    if strategy in SIGNALS:
        return list(signals[strategy])
    ranks = [rankdata(signals[name]) - 1 for name in SIGNALS]  # equal ones share the mean of their ranks
    together = [float(sum(each)) for each in zip(*ranks)]
    if strategy == "composite":
        return together
    if strategy == "inverse":
        return [-value for value in together]
    raise UserError(f"strategy {strategy!r} is unknown; known: {', '.join(STRATEGIES)}")


def bits_by_score(values: Sequence[float], mean: float, options: Sequence[int], share: float) -> list[int]:
    """Whole bits for experts with these scores, whose mean is exactly ``mean``.

    Two ``options`` (low, high): the best get high, as many as the mean allows. Three (low, middle, high) with the mean in
    the middle: the best ``share`` of the experts get high, as many of the worst low. Ties go to the lower index.
    """
    count = len(values)
    best = sorted(range(count), key=lambda e: (-values[e], e))
    low, high = options[0], options[-1]
    if len(options) == 2:
        raised, lowered, middle = (mean - low) / (high - low) * count, 0.0, low
    elif len(options) == 3 and options[1] == mean and 2 * mean == low + high:
        raised, lowered, middle = share * count, share * count, options[1]
    else:
        raise UserError(f"options {list(options)} at a mean of {mean:g} bits: give two, or three with the mean in the middle")
    if not 0 <= raised <= count or raised != int(raised) or raised + lowered > count:
        raise UserError(f"{raised:g} of {count} experts cannot have {high} bits; choose another share or other options")
    bits = [middle] * count
    for place in best[: int(raised)]:
        bits[place] = high
    for place in best[count - int(lowered) :]:
        bits[place] = low
    return bits


def bits_by_signal(
    strategy: str, signals: Mapping[str, Mapping[str, Sequence[float]]], mean: float, options: Sequence[int],
    share: float = 0.25, seed: int = 0,
) -> dict[str, list[int]]:  # fmt: skip
    """The bits of each expert, by module of experts, from the ``signals`` of every module."""
    if strategy == "blind":
        if mean != int(mean):
            raise UserError(f"strategy blind: {mean:g} bits must be a whole number")
        return {module: [int(mean)] * len(own[SIGNALS[0]]) for module, own in signals.items()}
    return {module: bits_by_score(scores(strategy, own, seed), mean, options, share) for module, own in signals.items()}


CANDIDATES = "iq2_xxs,iq2_xs,iq2_s,iq3_xxs,iq3_s,iq4_xs,q4_K,q5_K,q6_K,q8_0"
PROBE, PROBE_BITS, PROBE_SEQUENCES = "q3_K", "3", 32
ADDITIVE = 0.002  # predicted KL above which errors do not add up, and the choice is compared with the recipe by hand
STEPS = 1_000_000  # of a file's budget in the dynamic program
BITS = (2, 3, 4, 5, 6, 8)  # of a grid
OPEN = ""  # the chosen type of a piece that no pattern names
UNMEASURED = "q8_0"  # that of one whose inputs no calibrated pass sees
SAMPLE_EXPERTS, SAMPLE_ROWS = 8, 32
CARRIED_BYTES = 24 << 30  # of the host's memory: the changed activations
Rounded = Callable[[Tensor, str, Tensor], Tensor]  # a value [E, O, I] as a type gives it back, second moments [E, I, I] given


def solve(costs: Sequence[Sequence[int]], losses: Sequence[Sequence[float]], budget: int) -> list[int]:
    """For each item the index of its option so that the summed loss is least and the summed cost at most ``budget``.

    Exact dynamic programming over the cost in units of its greatest common divisor. Raises :class:`UserError` when even
    the cheapest options cost more.
    """
    floor = sum(min(row) for row in costs)
    if floor > budget:
        raise UserError(f"the budget of {budget} is below the {floor} of the cheapest choice; raise --expert-bits")
    unit = int(np.gcd.reduce([cost for row in costs for cost in row]))
    size = budget // unit + 1
    best = np.zeros(size)
    choices = np.zeros((len(costs), size), dtype=np.int8)
    for index, (row, loss) in enumerate(zip(costs, losses, strict=True)):
        table = np.full((len(row), size), np.inf)
        for option, (cost, value) in enumerate(zip(row, loss, strict=True)):
            step = cost // unit
            if step < size:
                table[option, step:] = best[: size - step] + value
        choices[index], best = table.argmin(0), table.min(0)
    picked, left = [0] * len(costs), int(best.argmin())
    for index in reversed(range(len(costs))):
        picked[index] = int(choices[index, left])
        left -= costs[index][picked[index]] // unit
    return picked


@torch.no_grad()
def grid_losses(
    model: torch.nn.Module, data: Sequence[Batch], options: Sequence[int], group: int, clip_steps: int
) -> dict[str, list[float]]:
    """The KL of ``model`` to itself on the batches of ``data`` (kl.batches) with each parameter of routed experts alone rounded
    to each number of bits of ``options``, by the parameter's name."""

    def logits(batch: Batch) -> Tensor:
        inputs = {"input_ids": batch.ids.to(model.device), "attention_mask": batch.real.to(model.device)}
        return finite_logits(model, **inputs)[:, :-1][batch.scored[:, 1:]]

    names = [name for name, p in model.named_parameters() if ".experts." in name and p.ndim == 3]
    expected = [logits(batch) for batch in data]
    losses: dict[str, list[float]] = {name: [] for name in names}
    with progress(len(names) * len(options), "sensitivity", "rounding") as bar:
        for name in names:
            parameter = model.get_parameter(name)
            original = parameter.detach().clone()
            for bits in options:
                parameter.copy_(fake_quant(original.bfloat16(), bits, group, clip_steps))
                kl = [divergence(old, logits(batch))[0] for old, batch in zip(expected, data, strict=True)]
                losses[name].append(torch.cat(kl).double().mean().item())
                bar.update()
            parameter.copy_(original)
    return losses


def sampled(value: Tensor, hessian: Tensor) -> tuple[Tensor, Tensor, float]:
    """Some rows of some matrices of [E, O, I], their second moments, and how many times more rows there are."""
    experts = torch.linspace(0, len(value) - 1, min(SAMPLE_EXPERTS, len(value))).round().long().to(value.device)
    rows = torch.linspace(0, value.shape[1] - 1, min(SAMPLE_ROWS, value.shape[1])).round().long().to(value.device)
    part = value[experts][:, rows].float()
    return part, hessian[experts], value.shape[0] * value.shape[1] / (part.shape[0] * part.shape[1])


def errors_of(
    value: Tensor, hessian: Tensor, kinds: Sequence[str], probe: str, rounded: Rounded
) -> tuple[dict[str, float], float, Tensor]:
    """(output error of ``value`` [E, O, I] in each type, judged by a sample; that of the probe; the value it gives back)."""
    part, own, share = sampled(value, hessian)
    errors = {kind: share * squared_error(part - rounded(part, kind, own), own) for kind in kinds}
    decoded, total = torch.empty_like(value), 0.0
    for experts, rows in rounding_parts(value.shape, WORKING_BYTES[value.device.type], COPIES):
        given, moments = value[experts, rows].float(), hessian[experts]
        found = rounded(given, probe, moments)
        total, decoded[experts, rows] = squared_error(given - found, moments, total), found.to(decoded.dtype)
    return errors, total, decoded


def put_rounded(
    piece: Piece, original: Tensor, hessian: Tensor, kinds: Sequence[str], kind: str, rounded: Rounded, into: Tensor
) -> tuple[dict[str, float], float]:
    """Round a piece of the parameter ``original`` to ``kind`` within ``into``, a tensor of that shape; ``hessian``: of the
    parameter. Returns (output error of the piece in each of ``kinds``, that of ``kind``)."""
    own, value = ordered_hessian(piece, hessian), to_gguf(piece, original)
    errors, error, decoded = errors_of(value.reshape(own.shape[0], -1, value.shape[-1]), own, kinds, kind, rounded)
    into_parameter(piece, decoded.view(piece.shape), into)
    return errors, error


@torch.no_grad()
def type_losses(
    checkpoint: Checkpoint, calibration: Calibration, pieces: Sequence[Piece], options: Mapping[str, Sequence[str]],
    probes: Mapping[str, str], rounded: Rounded, weights_file: Path | None = None, probed: int | None = None,
) -> tuple[dict[str, dict[str, float]], dict[str, float]]:  # fmt: skip
    """(predicted KL by piece and each of its ``options``; by parameter, the KL that rounding it to its ``probes`` costs on the
    first ``probed`` sequences, None: all, and no more than CARRIED_BYTES hold). KL is taken on the second half of each:
    sequences begin in mid-text, and before a model has read some of it, errors of its first layers cost a thousand times what
    they cost later."""
    stream = LayerStream(checkpoint, calibration.device, calibration.dtype)
    with scratch_folder() as work:
        weights = token_weights(stream, calibration, work, weights_file)
    parts = calibration.batches()
    kwargs, hidden = stream.arguments(parts[0]), stream.embed(parts)
    room = CARRIED_BYTES // (len({piece.parameter for piece in pieces}) * hidden[0].nbytes)
    count = max(1, min(room, len(parts) if probed is None else -(-probed // len(parts[0]))))  # batches
    print(f"sensitivity: KL on {count * parts[0].numel() // 2:,} positions of {count * len(parts[0]):,} sequences", flush=True)
    changed: dict[str, list[Tensor]] = {}  # the activations behind a rounded parameter
    errors: dict[str, dict[str, float]] = {}
    probe_errors: dict[str, float] = {}
    layers = len(stream.layers)

    def probed_value(key: str, original: Tensor, moments: Moments, into: Tensor) -> None:
        """Measure the errors of the pieces of a parameter, and put what their probes give into a tensor of its shape."""
        statistics = moments.statistics(calibration.floor * moments.shape[-1], 0.0, calibration.shrinkage)
        probe_errors[key] = 0.0
        for piece in pieces:
            if piece.parameter == key:
                kinds, kind = options[piece.name], probes[piece.name]
                errors[piece.name], error = put_rounded(piece, original, statistics.hessian, kinds, kind, rounded, into)
                probe_errors[key] += error

    for piece in pieces:
        if piece.role is Role.EMBEDDING:  # its inputs are single tokens: the error of a row counts as it is
            (source,) = piece.sources
            original = checkpoint.read(source).to(stream.device, stream.dtype)
            identity = Moments(1, original.shape[-1], stream.device)
            identity.total += torch.eye(original.shape[-1], device=stream.device)
            identity.weight += 1
            identity.square += 1
            value = original.clone()
            probed_value(piece.parameter, original, identity, value)
            changed[piece.parameter] = stream.embed(parts[:count], {source: value.cpu()})
    with progress(layers * (layers + 1) // 2, "sensitivity", "pass") as bar:  # each layer carries the changes before
        for index, layer in enumerate(stream.layers):
            prefix = f"model.layers.{index}."
            stream.fill(layer, prefix)
            wanted = dict.fromkeys(piece.parameter for piece in pieces if piece.layer == index)
            names = {key.removeprefix(prefix) for key in wanted}
            collector = Collector(layer, names, None if weights is None else weights[index])
            after = [out.cpu() for out in stream.run(layer, hidden, kwargs[index])]
            collector.remove()
            for key, carried in changed.items():
                changed[key] = [out.cpu() for out in stream.run(layer, carried, kwargs[index])]
            for key in wanted:
                name = key.removeprefix(prefix)
                if name not in collector.moments:
                    raise UserError(f"{key}: no calibration activation reached it; give more calibration text")
                parameter = layer.get_parameter(name)
                original = parameter.detach().clone()
                probed_value(key, original, collector.moments.pop(name), parameter)
                changed[key] = [out.cpu() for out in stream.run(layer, hidden[:count], kwargs[index])]
                parameter.copy_(original)
            hidden = after
            stream.empty(layer)
            bar.update(index + 1)
    head = next((piece.parameter for piece in pieces if piece.role is Role.LM_HEAD), "")
    if head:
        moments = Moments(1, stream.model.lm_head.in_features, stream.device)
        with stream.ending() as inputs_of:
            for own in hidden:
                moments.add(0, inputs_of(own.to(stream.device)).flatten(0, 1))
        original = checkpoint.read(checkpoint.sources[head][0]).to(stream.device, stream.dtype)
        value = original.clone()
        probed_value(head, original, moments, value)
    nats = divergences(stream, hidden[:count], changed, {head: value} if head else {})
    worth = {key: found / max(probe_errors[key], 1e-30) for key, found in nats.items()}  # nats per error
    losses = {p.name: {kind: error * worth[p.parameter] for kind, error in errors[p.name].items()} for p in pieces}
    return losses, nats


@torch.no_grad()
def kl_of_choices(
    checkpoint: Checkpoint, calibration: Calibration, pieces: Sequence[Piece], choices: Sequence[Mapping[str, str]],
    rounded: Rounded, probed: int,
) -> list[float]:  # fmt: skip
    """The KL, over the second halves of the last ``probed`` sequences, of the model with all ``pieces`` of its layers rounded
    as each of ``choices`` says: with what the sum of :func:`type_losses` leaves out. Ends stay as they are."""
    stream, parts = LayerStream(checkpoint, calibration.device, calibration.dtype), calibration.batches()
    kwargs, hidden = stream.arguments(parts[0]), stream.embed(parts)
    count = -(-probed // len(parts[0]))
    changed = {str(number): hidden[-count:] for number in range(len(choices))}
    with progress(len(stream.layers), "check", "layer") as bar:
        for index, layer in enumerate(stream.layers):
            prefix = f"model.layers.{index}."
            stream.fill(layer, prefix)
            wanted = dict.fromkeys(piece.parameter for piece in pieces if piece.layer == index)
            collector = Collector(layer, {key.removeprefix(prefix) for key in wanted})
            hidden = [out.cpu() for out in stream.run(layer, hidden, kwargs[index])]
            collector.remove()
            originals = {key: layer.get_parameter(key.removeprefix(prefix)).detach().clone() for key in wanted}
            for number, chosen in enumerate(choices):
                for piece in pieces:
                    if piece.parameter in wanted:
                        name = piece.parameter.removeprefix(prefix)
                        moments = collector.moments[name]
                        statistics = moments.statistics(calibration.floor * moments.shape[-1], 0.0, calibration.shrinkage)
                        original, kind = originals[piece.parameter], chosen[piece.name]
                        put_rounded(piece, original, statistics.hessian, (), kind, rounded, layer.get_parameter(name))
                changed[str(number)] = [out.cpu() for out in stream.run(layer, changed[str(number)], kwargs[index])]
            stream.empty(layer)
            bar.update()
    return list(divergences(stream, hidden[-count:], changed, {}).values())


def divergences(
    stream: LayerStream, hidden: Sequence[Tensor], changed: Mapping[str, Sequence[Tensor]], heads: Mapping[str, Tensor]
) -> dict[str, float]:
    """The mean KL, to the predictions behind ``hidden``, of those behind each of the ``changed`` activations and of those of
    each other head: over the second half of each sequence."""
    sums, count = dict.fromkeys([*changed, *heads], 0.0), 0
    with stream.predictions() as logits:
        head = stream.model.lm_head.weight

        def predicted(value: Tensor) -> Tensor:
            return logits(value[:, value.shape[1] // 2 :].to(stream.device)).flatten(0, 1)

        for place, own in enumerate(hidden):
            expected = predicted(own)
            count += len(expected)
            for key, carried in changed.items():
                sums[key] += divergence(expected, predicted(carried[place]))[0].double().sum().item()
            for key, weight in heads.items():
                true = head.clone()
                head.copy_(weight)
                sums[key] += divergence(expected, predicted(own))[0].double().sum().item()
                head.copy_(true)
    return {key: total / count for key, total in sums.items()}


def options_of(pieces: Sequence[Piece], candidates: Sequence[str]) -> dict[str, list[str]]:
    """The types that each piece may have: the candidates, or what llama.cpp takes for its row length, without repeats."""
    return {p.name: list(dict.fromkeys(fallback(kind, p.shape[-1]) for kind in candidates)) for p in pieces}


Sizes = Mapping[str, Mapping[str, int]]  # bytes by what is chosen for, and its options


def choose(sizes: Sizes, losses: Mapping[str, Mapping[str, float]], budget: int) -> dict[str, str]:
    """The option of each: least summed loss within ``budget`` bytes, counted in steps of a millionth of it."""
    unit = max(1, budget // STEPS)
    costs = [[-(-size // unit) for size in row.values()] for row in sizes.values()]
    values = [[losses[name][option] for option in row] for name, row in sizes.items()]
    floor = sum(min(row.values()) for row in sizes.values())
    if unit * sum(min(row) for row in costs) > budget:
        raise UserError(
            f"--target-gib leaves {budget / 2**30:.4f} GiB for the open tensors, the smallest need {floor / 2**30:.4f}"
        )
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


def allocate_types(
    checkpoint: Checkpoint, calibration: Calibration, target_gib: float, out: Path, patterns: Sequence[tuple[str, str]] = (),
    *, method: str = "ldlq", damping: float = DAMPING, weights_file: Path | None = None,
    candidates: Sequence[str] = tuple(CANDIDATES.split(",")), probe: str = PROBE, probe_sequences: int = PROBE_SEQUENCES,
    mark: str = "", mtp: str = "file", hand: tuple[str, Sequence[tuple[str, str]]] | None = None,
) -> tuple[dict[str, str], dict[str, Any]]:  # fmt: skip
    """Write the file of types ``out`` for a GGUF of at most ``target_gib``, rounded by ``method``; returns (the type of every
    tensor of the file by its name, metrics). ``patterns``: (pattern, type) of the tensors whose types are fixed; ``mark``:
    lines for the head of the file; ``mtp``: of gguf_layout.traced. The block of multi-token prediction changes no prediction
    of the model: its types are those of ``patterns``, or MTP_TYPE. ``hand``: (base type, patterns) of a recipe, whose types are
    candidates too, so that what is chosen is predicted to be no worse at the same bytes."""

    def rounded(value: Tensor, kind: str, hessian: Tensor) -> Tensor:
        return decode_rows(encoded(value.contiguous(), kind, method, hessian, damping), kind)

    started, pieces = time.time(), pieces_of(checkpoint, mtp)
    mtp = mtp if any(piece.role is Role.MTP for piece in pieces) else "none"
    own = patterns_of([*patterns, (MTP_PATTERN, MTP_TYPE)], pieces)
    fixed = fixed_types(pieces, own, fed_pieces(checkpoint, pieces))
    open_pieces = [piece for piece in pieces if piece.name not in fixed]
    if not open_pieces:
        raise UserError(f"{checkpoint.path}: no tensor's inputs are known, so no types can be measured; give TENSOR_TYPES")
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
    choose(sizes, {n: dict.fromkeys(kinds, 0.0) for n, kinds in options.items()}, budget)  # too small: said now
    probes = {p.name: fallback(probe, p.shape[-1]) for p in open_pieces}
    losses, nats = type_losses(
        checkpoint, calibration, open_pieces, options, probes, rounded, weights_file, probe_sequences
    )  # fmt: skip

    def measure(ways: Sequence[Mapping[str, str]]) -> list[float]:
        return kl_of_choices(checkpoint, calibration, open_pieces, ways, rounded, probe_sequences)

    chosen, facts = outcome(target_gib, taken, sizes, losses, choose(sizes, losses, budget), by_hand, measure)
    types = {piece.name: chosen.get(piece.name) or fixed[piece.name] for piece in pieces}
    metrics = facts | {
        "types": dict(collections.Counter(types[piece.name] for piece in open_pieces)),
        "chosen": {piece.name: types[piece.name] for piece in open_pieces if is_quantized(types[piece.name])},
        "nats": nats,
        "losses": losses,
    }
    print("\n".join(f"{count:>6} {kind}" for kind, count in metrics["types"].items()))
    with atomic_path(out) as temporary:
        text = f"# {facts['bytes'] / 2**30:.6f} GiB of at most {target_gib}\n{mark}" + exact_patterns(types)
        temporary.write_text(text, encoding="utf-8")
    print(f"wrote {out} in {time.time() - started:.1f} s", flush=True)
    return types, metrics


def outcome(
    target_gib: float, rest: int, sizes: Sizes, losses: Mapping[str, Mapping[str, float]], chosen: dict[str, str],
    by_hand: Mapping[str, str], measure: Callable[[Sequence[Mapping[str, str]]], list[float]],
) -> tuple[dict[str, str], dict[str, Any]]:  # fmt: skip
    """(what is taken; its bytes and predicted KL, printed, and those of a recipe ``by_hand``). ``rest``: bytes of all else.
    Where the predictions are so large that errors do not add up, ``measure`` tells the KL of both, and the better one is taken
    if both fit."""

    def told(name: str, options: Mapping[str, str]) -> dict[str, Any]:
        size = rest + sum(row[options[key]] for key, row in sizes.items())
        predicted, share = sum(losses[key][options[key]] for key in sizes), 100 * size / (target_gib * 2**30)
        print(f"{name}: {size / 2**30:.6f} GiB ({share:.3f} % of the budget), predicted KL {predicted:.5f}", flush=True)
        return {"bytes": size, "predicted_kl": predicted}

    found = told("chosen", chosen) | {"target_gib": target_gib}
    if not by_hand:
        return chosen, found
    hand = told("by hand", by_hand)
    found["by_hand"] = dict(hand)
    if hand["bytes"] <= target_gib * 2**30 and hand["predicted_kl"] > ADDITIVE:
        found["measured_kl"], found["by_hand"]["measured_kl"] = own, other = measure([chosen, by_hand])
        print(f"measured KL of the layers: chosen {own:.5f}, by hand {other:.5f}", flush=True)
        if other < own:
            print("what the recipe says is kept", flush=True)
            return {name: by_hand[name] for name in sizes}, found | hand | {"measured_kl": other}
    return chosen, found


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
    checkpoint: Checkpoint, calibration: Calibration, recipe: Recipe, target_gib: float, out: Path,
    packed_bits: int | None = None, made_of: str = "",
) -> dict[str, Any]:  # fmt: skip
    """Write the bits ``out`` of a checkpoint of at most ``target_gib``: of codes and scales, or with ``packed_bits`` of the
    container. What vLLM makes one matrix of has the same bits. Returns metrics; the rest keeps the bits of ``recipe``."""
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
    choose(sizes, {unit: dict.fromkeys(row, 0.0) for unit, row in sizes.items()}, budget)  # too small: said now

    def rounded(value: Tensor, bits: str, hessian: Tensor) -> Tensor:
        grid = Grid(int(bits), recipe.group, recipe.clip_steps, recipe.clip_low)
        with damped(hessian, calibration.damping):
            tokens = torch.ones(len(hessian), device=hessian.device)
            return round_weight(value.contiguous(), grid, Statistics(hessian, tokens), recipe.method)

    open_pieces = [piece for own in units.values() for piece in own]
    options = {piece.name: [str(bits) for bits in BITS] for piece in open_pieces}
    probes = dict.fromkeys(options, PROBE_BITS)
    by_piece, nats = type_losses(checkpoint, calibration, open_pieces, options, probes, rounded, None, PROBE_SEQUENCES)
    losses = {unit: {b: sum(by_piece[p.name][b] for p in own) for b in sizes[unit]} for unit, own in units.items()}
    chosen = choose(sizes, losses, budget)
    by_hand = {unit: str(jobs[own[0].name].bits) for unit, own in units.items()}
    by_hand = by_hand if all(bits in sizes[unit] for unit, bits in by_hand.items()) else {}  # 2.5 bits are no option

    def measure(ways: Sequence[Mapping[str, str]]) -> list[float]:
        each = [{piece.name: way[unit] for unit, own in units.items() for piece in own} for way in ways]
        return kl_of_choices(checkpoint, calibration, open_pieces, each, rounded, PROBE_SEQUENCES)

    chosen, found = outcome(target_gib, rest, sizes, losses, chosen, by_hand, measure)
    overrides = {piece.name: int(chosen[unit]) for unit, own in units.items() for piece in own}
    print("\n".join(f"{bits} bits  {unit}" for unit, bits in chosen.items()))
    write_json(out, {"made_of": made_of, "overrides": overrides})
    print(f"wrote {out} in {time.time() - started:.1f} s", flush=True)
    return found | {"chosen": chosen, "nats": nats, "losses": losses}
