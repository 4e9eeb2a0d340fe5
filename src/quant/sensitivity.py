"""What rounding a matrix costs in KL, to each number of bits or to each ggml type, and the choice of least cost in a budget.

Not a command; moe_alloc drives it.

`grid_losses` rounds the experts' gate_up or down matrices of one layer alone (clip search), all else stays as it is, and takes
the mean KL to the model on text. `type_losses` streams the checkpoint once. There the cost of a type for a tensor is the error
tr(D H D^T) of its output (on a sample of its rows) times nats per error, which is measured for every group of a layer (experts'
gate and up, experts' down, shared expert, attention): the group is rounded to one type, the activations that this changes are
carried to the end beside the true ones, and the KL of the predictions taken.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from calibration import Calibration, Collector, LayerStream
from checkpoint import Checkpoint
from console import UserError, progress, scratch_folder
from families import Role
from ggml_types import fallback
from gguf_layout import Piece, into_parameter, ordered_hessian, to_gguf
from kl import divergence
from moe_quant import fake_quant
from round_ggml import output_error
from token_weights import token_weights

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
    model: torch.nn.Module, data: Sequence[tuple[Tensor, ...]], options: Sequence[int], group: int, clip_steps: int
) -> dict[str, list[float]]:
    """The KL of ``model`` to itself on the batches of ``data`` (kl.batches) with each parameter of routed experts alone rounded
    to each number of bits of ``options``, by the parameter's name."""

    def logits(ids: Tensor, real: Tensor, _: Tensor) -> Tensor:
        out = model(input_ids=ids.to(model.device), attention_mask=real.to(model.device), use_cache=False).logits
        return out[:, :-1][real[:, 1:]]

    names = [name for name, p in model.named_parameters() if ".experts." in name and p.ndim == 3]
    expected = [logits(*batch) for batch in data]
    losses: dict[str, list[float]] = {name: [] for name in names}
    with progress(len(names) * len(options), "sensitivity", "rounding") as bar:
        for name in names:
            parameter = model.get_parameter(name)
            original = parameter.detach().clone()
            for bits in options:
                parameter.copy_(fake_quant(original.bfloat16(), bits, group, clip_steps))
                kl = [divergence(old, logits(*batch))[0] for old, batch in zip(expected, data, strict=True)]
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
    part = value[experts][:, rows]
    return part, hessian[experts], value.shape[0] * value.shape[1] / (part.shape[0] * part.shape[1])


def errors_of(
    value: Tensor, hessian: Tensor, kinds: Sequence[str], probe: str, rounded: Rounded
) -> tuple[dict[str, float], float, Tensor]:
    """(output error of ``value`` [E, O, I] in each type, judged by a sample; that of the probe; the value it gives back)."""
    part, own, share = sampled(value, hessian)
    errors = {kind: share * output_error(part - rounded(part, kind, own), own) for kind in kinds}
    decoded = rounded(value.contiguous(), fallback(probe, value.shape[-1]), hessian)
    return errors, output_error(value - decoded, hessian), decoded


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
    with progress(len(stream.layers), "sensitivity", "layer") as bar:
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
                    hessian = ordered_hessian(piece, moments.statistics(calibration.floor * moments.total.shape[-1]).hessian)
                    value = to_gguf(piece, originals[name]).float()
                    value = value if value.ndim == 3 else value[None]
                    errors[piece.name], error, decoded = errors_of(value, hessian, options[piece.name], probe, rounded)
                    probe_errors[key] += error
                    into_parameter(piece, decoded.view(piece.shape), layer.get_parameter(name))
                changed[key] = [out.cpu() for out in stream.run(layer, hidden[:count], kwargs[index])]
                for name, original in originals.items():
                    layer.get_parameter(name).copy_(original)
            hidden = after
            stream.empty(layer)
            bar.update()
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
