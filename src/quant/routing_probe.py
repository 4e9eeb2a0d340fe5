"""What the router does with text, layer by layer: the load, mass and salience of each expert, and the importance of its inputs.

Not a command; moe_probe prints it, moe_alloc and moe_study order the experts by it. One decoder layer is in memory at a time.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from calibration import Calibration, Collector, LayerStream, Moments
from checkpoint import Checkpoint
from console import UserError, progress
from families import place_of, text_config
from gguf_format import Entry
from gguf_layout import ggml_names, head_order


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
