"""What rounding a matrix costs in KL, to each number of bits or to each ggml type, and the choice of least cost in a budget.

Not a command; moe_alloc drives it.

`grid_losses` rounds the experts' gate_up or down matrices of one layer alone (clip search), all else stays as it is, and takes
the mean KL to the model on text. `type_losses` streams the checkpoint once. There the cost of a type for a tensor is the error
tr(D H D^T) of its output (on a sample of its rows) times nats per error, which is measured for every group of a layer (experts'
gate and up, experts' down, shared expert, attention): the group is rounded to one type, the activations that this changes are
carried to the end beside the true ones, and the KL of the predictions taken.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import rankdata
from torch import Tensor

from calibration import Calibration, Collector, LayerStream, Moments
from checkpoint import Checkpoint
from console import UserError, progress, scratch_folder
from families import Role
from ggml_round import COPIES
from ggml_types import fallback
from gguf_format import Entry
from gguf_layout import Piece, into_parameter, ordered_hessian, pieces_of, to_gguf
from hf_model import finite_logits
from kl import Batch, divergence
from moe_ptq import WORKING_BYTES, rounding_parts
from moe_quant import fake_quant
from rounders import squared_error
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


SAMPLE_EXPERTS, SAMPLE_ROWS = 8, 32
Group = tuple[int, str]
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


def group_of(piece: Piece) -> Group:
    """Pieces whose nats per error are measured together."""
    part = piece.parameter.rpartition(".")[2] if piece.role is Role.ROUTED_EXPERT else str(piece.role)
    return piece.layer, "attention" if piece.role in (Role.ATTENTION, Role.LINEAR_ATTENTION) else part


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
        found = rounded(given, fallback(probe, value.shape[-1]), moments)
        total, decoded[experts, rows] = squared_error(given - found, moments, total), found.to(decoded.dtype)
    return errors, total, decoded


@torch.no_grad()
def type_losses(
    checkpoint: Checkpoint, calibration: Calibration, pieces: Sequence[Piece], options: Mapping[str, Sequence[str]], probe: str,
    rounded: Rounded, weights_file: Path | None = None, probed: int | None = None,
) -> tuple[dict[str, dict[str, float]], dict[Group, float]]:  # fmt: skip
    """(predicted KL by piece and type of ``options``; by group, the KL that rounding it to ``probe`` costs on the first
    ``probed`` sequences, None: all)."""
    stream = LayerStream(checkpoint, calibration.device, calibration.dtype)
    with scratch_folder() as work:
        weights = token_weights(stream, calibration, work, weights_file)
    kwargs, hidden = stream.arguments(calibration.batches()[0]), stream.embed(calibration.batches())
    count = None if probed is None else -(-probed // len(hidden[0]))  # batches
    changed: dict[Group, list[Tensor]] = {}  # the activations behind a rounded group
    errors: dict[str, dict[str, float]] = {}
    probe_errors: dict[Group, float] = {}
    layers = len(stream.layers)
    with progress(layers * (layers + 1) // 2, "sensitivity", "pass") as bar:  # each layer carries the changes before
        for index, layer in enumerate(stream.layers):
            stream.fill(layer, f"model.layers.{index}.")
            names = {p: p.parameter.removeprefix(f"model.layers.{index}.") for p in pieces if p.layer == index}
            groups: dict[Group, list[Piece]] = {}
            for piece in names:
                groups.setdefault(group_of(piece), []).append(piece)
            collector = Collector(layer, set(names.values()), None if weights is None else weights[index])
            after = [out.cpu() for out in stream.run(layer, hidden, kwargs[index])]
            collector.remove()
            for key, carried in changed.items():
                changed[key] = [out.cpu() for out in stream.run(layer, carried, kwargs[index])]
            for key, members in groups.items():
                originals = {names[piece]: layer.get_parameter(names[piece]).detach().clone() for piece in members}
                probe_errors[key] = 0.0
                for piece in members:
                    name = names[piece]
                    if name not in collector.moments:
                        raise UserError(f"{piece.parameter}: no calibration activation reached it; give more calibration text")
                    moments = collector.moments[name]
                    statistics = moments.statistics(calibration.floor * moments.shape[-1], 0.0, calibration.shrinkage)
                    hessian = ordered_hessian(piece, statistics.hessian)
                    value = to_gguf(piece, originals[name])
                    value = value.reshape(hessian.shape[0], -1, value.shape[-1])
                    errors[piece.name], error, decoded = errors_of(value, hessian, options[piece.name], probe, rounded)
                    probe_errors[key] += error
                    into_parameter(piece, decoded.view(piece.shape), layer.get_parameter(name))
                changed[key] = [out.cpu() for out in stream.run(layer, hidden[:count], kwargs[index])]
                for name, original in originals.items():
                    layer.get_parameter(name).copy_(original)
            hidden = after
            stream.empty(layer)
            bar.update(index + 1)
    nats = divergences(stream, hidden[:count], changed)
    worth = {key: value / max(probe_errors[key], 1e-30) for key, value in nats.items()}  # nats per error
    losses = {p.name: {kind: error * worth[group_of(p)] for kind, error in errors[p.name].items()} for p in pieces}
    return losses, nats


def divergences(stream: LayerStream, hidden: Sequence[Tensor], changed: Mapping[Group, Sequence[Tensor]]) -> dict[Group, float]:
    """The mean KL of the predictions behind each group's activations to those behind ``hidden``."""
    sums, count = dict.fromkeys(changed, 0.0), 0
    with stream.predictions() as logits:
        for place, own in enumerate(hidden):
            expected = logits(own.to(stream.device)).flatten(0, 1)
            count += len(expected)
            for key, carried in changed.items():
                kl, _ = divergence(expected, logits(carried[place].to(stream.device)).flatten(0, 1))
                sums[key] += kl.double().sum().item()
    return {key: total / count for key, total in sums.items()}
