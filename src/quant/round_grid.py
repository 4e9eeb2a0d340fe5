"""The rounder of the calibrated pass for integer grids: each parameter by a method of moe_ptq, in the dtype of the checkpoint.

Not a command; quant_save gives it to calibrated_pass.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from calibrated_pass import Take
from calibration import LayerStream
from console import explained
from families import Role
from moe_ptq import Grid, Statistics, output_error, round_weight
from recipe import Job, Recipe


@dataclasses.dataclass(frozen=True)
class Target:
    """How a parameter of the module tree is rounded; ``fraction`` of its experts get one bit more than the grid has,
    chosen by what each gains, unless ``bits`` says how many each expert has."""

    grid: Grid
    fraction: float = 0.0
    bits: tuple[int, ...] = ()


class GridRounder:
    """Several ``devices`` share the experts of a parameter. The embedding is no target: it has no inputs to calibrate on."""

    def __init__(self, stream: LayerStream, jobs: Sequence[Job], recipe: Recipe, devices: Sequence[torch.device] = ()) -> None:
        self.stream, self.method, self.devices = stream, recipe.method, devices
        self.targets: dict[str, Target] = {}
        experts = dict(recipe.experts)
        for job in jobs:
            if job.bits is not None and job.role not in (Role.EMBEDDING, Role.MTP):
                whole = math.floor(job.bits)
                grid = Grid(whole, recipe.group, recipe.clip_steps, recipe.clip_low)
                parameter = stream.places[job.name].parameter
                bits = experts.get(parameter.rpartition(".")[0], ())
                self.targets[parameter] = Target(grid, 0.0 if bits else job.bits - whole, bits)

    def round(self, parameters: Mapping[str, Tensor], take: Take) -> None:
        for name, parameter in parameters.items():
            with explained(name):
                parameter.copy_(rounded(parameter, self.targets[name], *take(name), self.method, self.devices))

    def taken(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The parameters by checkpoint name, in the dtype and shape that they have on disk."""
        values = {}
        for name, full in parameters.items():
            for source in self.stream.by_parameter[name]:
                info = self.stream.checkpoint.tensors[source]
                part = self.stream.places[source].view(full.detach())
                values[source] = part.to("cpu", info.dtype, copy=True).reshape(info.shape)
        return values


def rounded(
    weight: Tensor, target: Target, statistics: Statistics, mass: Tensor, method: str, devices: Sequence[torch.device] = ()
) -> Tensor:
    """Round a parameter [E, O, I] or [O, I]; with a fraction, the experts whose output error falls most, weighted by
    their routing ``mass`` [E], get one bit more; with ``bits``, each expert has its own grid."""
    if target.bits:
        return _rounded_by_expert(weight, target, statistics, method, devices)
    low = round_weight(weight, target.grid, statistics, method, devices)
    if not target.fraction or weight.ndim != 3:
        return low
    high = round_weight(weight, dataclasses.replace(target.grid, bits=target.grid.bits + 1), statistics, method, devices)
    transposed = weight.float().transpose(1, 2)
    errors = [output_error(transposed, value.transpose(1, 2), statistics.hessian) for value in (low, high)]
    count = math.floor(target.fraction * len(weight) + 1e-9)
    chosen = ((errors[0] - errors[1]) * mass).topk(count).indices
    low[chosen] = high[chosen]
    return low


def _rounded_by_expert(
    weight: Tensor, target: Target, statistics: Statistics, method: str, devices: Sequence[torch.device]
) -> Tensor:
    out = torch.empty_like(weight, dtype=torch.float32)
    for bits in sorted(set(target.bits)):
        index = torch.tensor([e for e, own in enumerate(target.bits) if own == bits], device=weight.device)
        own = Statistics(statistics.hessian[index], statistics.tokens[index])
        out[index] = round_weight(weight[index], dataclasses.replace(target.grid, bits=bits), own, method, devices)
    return out
