"""How much each expert matters, by what the router does with text and by its weights, and the orders that studies make of it.

Not a command; moe_probe prints the reports, moe_alloc and moe_study give bits by them. One decoder layer is in memory at a
time. A strategy gives every expert of a layer a score, and the experts with the highest scores get the most bits, the same
number in every layer:

    blind       every expert alike (the uniform recipe)        random      a seeded order
    frequency   share of the tokens routed to it               inverse     the reverse of composite
    wmass       share of the routing weights                   wfro        Frobenius norm of its matrices
    asal        energy of its activations (squared inputs of its down projection, times the routing weight squared)
    composite   mean rank of frequency, wmass, asal and wfro
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from scipy.stats import rankdata
from torch import Tensor

from calibration import Calibration, Collector, LayerStream, Moments
from checkpoint import Checkpoint
from console import UserError, progress
from families import place_of, text_config
from gguf_format import Entry
from gguf_layout import ggml_names, head_order

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


def entries_of(moments: Mapping[str, Moments], model_type: str, layers: int, order: Tensor | None = None) -> dict[str, Entry]:
    """The entries of calibration statistics, by llama.cpp's names; ``order``: where each input of linear_attn.out_proj lies
    for ggml (head_order), None for its own place."""
    entries = {}
    for parameter, value in moments.items():
        sums = value.total.diagonal(dim1=1, dim2=2).float().cpu().numpy()
        if order is not None and parameter.endswith("linear_attn.out_proj.weight"):
            sums = sums[:, order.numpy()]
        for name in ggml_names(parameter, model_type, layers):
            entries[name] = Entry(sums, value.weight.float().cpu().numpy())
    return entries


@torch.no_grad()
def probe(
    checkpoint: Checkpoint, calibration: Calibration, every_linear: bool = False
) -> tuple[dict[str, dict[str, Any]], dict[str, Entry]]:
    """(report of every decoder layer that has routed experts, by its index; the importance of each weight, by llama.cpp's
    names: of the experts, or of ``every_linear``)."""
    stream = LayerStream(checkpoint, calibration.device, calibration.dtype)
    config = text_config(checkpoint.config)
    order = head_order(config, config.get("linear_value_head_dim", 1))
    kwargs = stream.arguments(calibration.batches()[0])
    hidden = stream.embed(calibration.batches())
    reports, importance = {}, {}
    with progress(len(stream.layers), "probe", "layer") as bar:
        for index, layer in enumerate(stream.layers):
            stream.fill(layer, f"model.layers.{index}.")
            experts = {name for name, p in layer.named_parameters() if p.ndim == 3 and ".experts." in name}
            linears = {f"{name}.weight" for name, m in layer.named_modules() if isinstance(m, torch.nn.Linear)}
            wanted = experts | (linears if every_linear else set())
            collector = Collector(layer, wanted)
            hidden = [out.cpu() for out in stream.run(layer, hidden, kwargs[index])]
            collector.remove()
            for name, routed in collector.routed.items():
                moments = collector.moments[f"{name}.down_proj"]
                energy = moments.total.diagonal(dim1=1, dim2=2).sum(-1)
                tokens = moments.weight**2 / moments.square.clamp_min(1e-30)
                inputs = collector.moments[f"{name}.gate_up_proj"].total.shape[-1]
                reports[str(index)] = layer_report(routed, collector.mass[name], energy, tokens, inputs)
            named = {f"model.layers.{index}.{name}": moments for name, moments in collector.moments.items()}
            importance |= entries_of(named, checkpoint.config["model_type"], len(stream.layers), order)
            stream.empty(layer)
            bar.update()
    return reports, importance


def expert_norms(checkpoint: Checkpoint) -> dict[str, list[float]]:
    """Frobenius norm of each expert's matrices together, by module of experts; one tensor in memory at a time."""
    squares: dict[str, torch.Tensor] = {}
    for name, info in checkpoint.tensors.items():
        place = place_of(name)
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
