"""Repair a rounded decoder layer through what is never rounded: its norms, trained to give back the layer's own output.

Not a command; `quant_save --refine 3` uses it. The layer's output before rounding, on the same inputs, is the target; Adam
moves the norm weights only (Norm Tweaking, Li et al. 2023, arXiv 2309.02784, does so with a distribution loss). The
last eighth of the batches is held out: a layer keeps its new norms only where they lower the error there, in bfloat16.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from calibration import output

NORM = re.compile(r"(.*\.)?\w*norm\.weight")
RATE = 1e-3


def norm_names(layer: nn.Module) -> list[str]:
    """The norm weights of a decoder layer, by their names in it."""
    return [name for name, parameter in layer.named_parameters() if NORM.fullmatch(name) and parameter.ndim == 1]


@torch.no_grad()
def relative_error(
    layer: nn.Module, inputs: Sequence[Tensor], targets: Sequence[Tensor], kwargs: Mapping[str, Any], device: torch.device
) -> float:
    """Sum of (output - target)**2 over sum of (target - input)**2: what the layer adds to its input is its work."""
    error = work = 0.0
    for hidden, target in zip(inputs, targets, strict=True):
        hidden, target = hidden.to(device), target.to(device)
        error += (output(layer, hidden, kwargs) - target).float().square().sum().item()
        work += (target - hidden).float().square().sum().item()
    return error / work if work else 0.0


def refine_norms(
    layer: nn.Module,
    inputs: Sequence[Tensor],
    targets: Sequence[Tensor],
    kwargs: Mapping[str, Any],
    device: torch.device,
    epochs: int,
    rate: float = RATE,
) -> tuple[list[str], float, float]:
    """Train the norms of a filled, rounded layer on batches [B, T, H]; returns (names of what changed, held-out relative
    error before, after). Fewer than two batches leave nothing to hold out, and nothing is changed."""
    held = max(1, len(inputs) // 8)
    names = norm_names(layer)
    if len(inputs) <= held or not names:
        return [], 0.0, 0.0
    check = (inputs[-held:], targets[-held:], kwargs, device)
    before = relative_error(layer, *check)
    original = {name: layer.get_parameter(name).detach().clone() for name in names}
    _train(layer, [layer.get_parameter(name) for name in names], inputs[:-held], targets[:-held], kwargs, device, epochs, rate)
    with torch.no_grad():
        for name in names:  # as they will be stored
            parameter = layer.get_parameter(name)
            parameter.copy_(parameter.bfloat16().to(parameter.dtype))
    after = relative_error(layer, *check)
    if after < before:
        return names, before, after
    with torch.no_grad():
        for name in names:
            layer.get_parameter(name).copy_(original[name])
    return [], before, before


def _train(
    layer: nn.Module, parameters: list[nn.Parameter], inputs: Sequence[Tensor], targets: Sequence[Tensor],
    kwargs: Mapping[str, Any], device: torch.device, epochs: int, rate: float,
) -> None:  # fmt: skip
    masters = [parameter.detach().float().clone() for parameter in parameters]  # a step is below bfloat16's resolution
    optimizer = torch.optim.Adam(masters, lr=rate)
    steps = epochs * len(inputs)
    for step in range(steps):
        hidden, target = (batches[step % len(inputs)].to(device) for batches in (inputs, targets))
        for group in optimizer.param_groups:
            group["lr"] = rate * (1 - step / steps)
        with torch.enable_grad():
            for parameter in parameters:
                parameter.requires_grad_(True)
            error = (output(layer, hidden, kwargs) - target).float().square().sum()
            loss = error / (target - hidden).float().square().sum().clamp_min(1e-12)
            gradients = torch.autograd.grad(loss, parameters)
        for parameter, master, gradient in zip(parameters, masters, gradients, strict=True):
            parameter.requires_grad_(False)
            master.grad = gradient.float()
        optimizer.step()
        with torch.no_grad():
            for parameter, master in zip(parameters, masters, strict=True):
                parameter.copy_(master)
