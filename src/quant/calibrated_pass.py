"""The calibrated pass: embed, then layer by layer collect second moments, round, write, and pass the activations on.

Not a command; quant_save drives it. One decoder layer's weights, its statistics and the activations are in memory; on the
host also the layer that is being written and, with a GPU, the next one. Each layer is a shard of the output; the activations
behind the last complete one lie beside it, so a killed run goes on there.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from calibration import Calibration, Collector, LayerStream, Moments
from checkpoint import Checkpoint, SourceShards
from console import UserError, atomic_path, progress, read_json, write_json
from families import LAYER_PREFIX, Role, text_name
from moe_ptq import Grid, Statistics, damped, output_error, round_weight
from overlap import OneBehind
from packed_format import Container, PackedWriter, open_writer
from quant_save import ErrorLog, Sink
from recipe import Job, Recipe
from refine import refine_norms
from run_dir import RUN
from safetensors_file import CheckpointWriter
from token_weights import token_weights

LM_HEAD = "lm_head.weight"


@dataclasses.dataclass(frozen=True)
class Target:
    """How a parameter of the module tree is rounded; ``fraction`` of its experts get one bit more than the grid has,
    chosen by what each gains, unless ``bits`` says how many each expert has."""

    grid: Grid
    fraction: float = 0.0
    bits: tuple[int, ...] = ()


def targets_of(stream: LayerStream, jobs: Sequence[Job], recipe: Recipe) -> dict[str, Target]:
    """A target for every parameter that has bits, by its name in the module tree. The embedding is not among them."""
    targets, experts = {}, dict(recipe.experts)
    for job in jobs:
        if job.bits is not None and job.role not in (Role.EMBEDDING, Role.MTP):
            whole = math.floor(job.bits)
            grid = Grid(whole, recipe.group, recipe.clip_steps, recipe.clip_low)
            parameter = stream.places[job.name].parameter
            bits = experts.get(parameter.rpartition(".")[0], ())
            targets[parameter] = Target(grid, 0.0 if bits else job.bits - whole, bits)
    return targets


class CalibratedPass:
    """Holds the activations between layers. ``cold``: experts with too few tokens, by parameter."""

    def __init__(
        self, stream: LayerStream, calibration: Calibration, targets: Mapping[str, Target], method: str,
        devices: Sequence[torch.device] = (),
    ) -> None:  # fmt: skip
        self.stream, self.calibration, self.targets, self.method = stream, calibration, targets, method
        self.devices = devices  # that round experts; activations stay on the calibration's
        self.kwargs = stream.arguments(calibration.batches()[0])
        self.hidden: list[Tensor] = []
        self.weights: Tensor | None = None  # of the calibration tokens, [layers, tokens]
        self.cold: dict[str, int] = {}
        self.unrouted: dict[str, int] = {}
        self.refined: list[list[float]] = []  # held-out relative error of each layer before and after

    def embed(self, values: Mapping[str, Tensor]) -> None:
        """Start from the embedding, as rounded in ``values`` (checkpoint names)."""
        self.hidden = self.stream.embed(self.calibration.batches(), values)

    @torch.no_grad()
    def layer(self, index: int, behind: OneBehind) -> dict[str, Tensor]:
        """Collect, round and run decoder layer ``index``; returns its rounded tensors by checkpoint name, in the dtype
        and shape they have on disk. ``behind`` writes the layer before, which is waited for at the end: the rounded tensors
        of one layer are in memory (the blocks of a GGUF, a fifth of their size, of two)."""
        stream, prefix = self.stream, f"model.layers.{index}."
        layer = stream.layers[index]
        stream.fill(layer, prefix)
        stream.read_ahead(index + 1)
        wanted = [name.removeprefix(prefix) for name in self.targets if name.startswith(prefix)]
        collector = Collector(layer, set(wanted), None if self.weights is None else self.weights[index])
        after = [out.cpu() for out in stream.run(layer, self.hidden, self.kwargs[index])]
        collector.remove()
        behind.check()  # a full disk is known before the layer is rounded
        for name in wanted:
            self._round(layer, prefix, name, collector.moments.pop(name, None))
        self._round_waiting()
        if self.calibration.refine:
            wanted += self._refine(layer, after, self.kwargs[index])
        if self.calibration.propagate == "quantized":
            after = [out.cpu() for out in stream.run(layer, self.hidden, self.kwargs[index])]
        self.hidden = after
        behind.wait()
        rounded = self._disk_values(layer, prefix, wanted)
        stream.empty(layer)
        return rounded

    def _refine(self, layer: torch.nn.Module, targets: list[Tensor], kwargs: dict[str, Any]) -> list[str]:
        """Train the layer's norms towards its own output before rounding; the names of those that changed."""
        changed, before, after = refine_norms(
            layer, self.hidden, targets, kwargs, self.stream.device, self.calibration.refine
        )  # fmt: skip
        self.refined.append([before, after])
        return changed

    def _round(self, layer: torch.nn.Module, prefix: str, name: str, moments: Moments | None) -> None:
        parameter, target = layer.get_parameter(name), self.targets[prefix + name]
        try:
            if moments is None:
                raise UserError("no calibration activation reached it; give more or other calibration text")
            statistics = self._statistics(prefix + name, moments)
            parameter.copy_(rounded(parameter, target, statistics, moments.weight, self.method, self.devices))
        except UserError as error:
            raise UserError(f"{prefix}{name}: {error}") from None

    def _round_waiting(self) -> None:
        """Round what :meth:`_round` put aside."""

    def _statistics(self, name: str, moments: Moments) -> Statistics:
        floor = self.calibration.floor * moments.total.shape[-1]
        statistics = moments.statistics(floor)
        self.cold[name] = int((statistics.tokens < floor).sum())
        self.unrouted[name] = int((statistics.tokens == 0).sum())
        return statistics._replace(hessian=damped(statistics.hessian, self.calibration.damping))

    def _disk_values(self, layer: torch.nn.Module, prefix: str, names: Sequence[str]) -> dict[str, Tensor]:
        values = {}
        for name in names:
            full = layer.get_parameter(name).detach()
            for source in self.stream.by_parameter[prefix + name]:
                info = self.stream.checkpoint.tensors[source]
                part = self.stream.places[source].view(full)
                values[source] = part.to("cpu", info.dtype, copy=True).reshape(info.shape)
        return values

    def _head_moments(self) -> Moments:
        """Second moments of what lm_head sees: the normed output of the last layer."""
        stream, norm = self.stream, self.stream.decoder.norm
        stream.fill(norm, "model.norm.")
        moments = Moments(1, stream.decoder.config.hidden_size, stream.device)
        for hidden in self.hidden:
            moments.add(0, norm(hidden.to(stream.device)).flatten(0, 1))
        stream.empty(norm)
        return moments

    @torch.no_grad()
    def head(self) -> dict[str, Tensor]:
        """Round lm_head (where it is a tensor of its own and has a grid) on the normed output of the last layer."""
        stream, name = self.stream, LM_HEAD
        if name not in self.targets:
            return {}
        moments = self._head_moments()
        source = stream.by_parameter[name][0]
        weight = stream.checkpoint.read(source)
        try:
            statistics = self._statistics(name, moments)
            value = round_weight(weight.to(stream.device), self.targets[name].grid, statistics, self.method)
        except UserError as error:
            raise UserError(f"{name}: {error}") from None
        return {source: value.to("cpu", weight.dtype)}

    def save(self, directory: Path, index: int) -> None:
        """Keep the activations behind layer ``index``, and the counts so far, for a run that resumes there."""
        write_json(facts_file(directory, index), {"cold": self.cold, "unrouted": self.unrouted, "refined": self.refined})
        with atomic_path(activations_file(directory, index)) as temporary:
            save_file({str(i): hidden.contiguous() for i, hidden in enumerate(self.hidden)}, temporary)

    def load(self, directory: Path, index: int) -> None:
        """What :meth:`save` kept."""
        saved = load_file(activations_file(directory, index))
        self.hidden = [saved[str(i)] for i in range(len(saved))]
        counts = read_json(facts_file(directory, index))
        self.cold, self.unrouted, self.refined = counts["cold"], counts["unrouted"], counts["refined"]

    def facts(self) -> dict[str, Any]:
        """What the record says of the calibration: experts below the floor and never routed to, over all layers."""
        experts = {name: count for name, count in self.cold.items() if ".experts." in name}
        unrouted = {name: count for name, count in self.unrouted.items() if ".experts." in name}
        facts = {"experts_below_floor": sum(experts.values()), "experts_never_routed": sum(unrouted.values())}
        facts |= self.calibration.weighting()
        if self.refined:
            facts["refined_layers"] = [[float(f"{value:.6g}") for value in pair] for pair in self.refined]
        return facts


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


def in_layers(jobs: Sequence[Job], layers: int) -> list[list[Job]]:
    """Jobs before the decoder (embedding, vision, ...), of each layer, and after it (final norm, head, mtp)."""
    parts: list[list[Job]] = [[] for _ in range(layers + 2)]
    for job in jobs:
        match = LAYER_PREFIX.match(text_name(job.name))
        if match and int(match[1]) < layers:
            parts[int(match[1]) + 1].append(job)
        else:
            parts[0 if job.role in (Role.EMBEDDING, Role.VISION) else -1].append(job)
    return parts


def activations_file(directory: Path, index: int) -> Path:
    """The activations behind decoder layer ``index`` while the run is unfinished."""
    return directory / RUN / f"activations-{index:05d}.st"


def facts_file(directory: Path, index: int) -> Path:
    """What is known of the experts up to decoder layer ``index``, beside its activations."""
    return directory / RUN / f"activations-{index:05d}.json"


def files_behind(directory: Path, index: int) -> tuple[Path, Path]:
    """What :meth:`CalibratedPass.save` keeps behind decoder layer ``index``."""
    return activations_file(directory, index), facts_file(directory, index)


def calibrated_stream(
    checkpoint: Checkpoint, jobs: list[Job], recipe: Recipe, calibration: Calibration, out: Path, shard_bytes: int,
    chunk_bytes: int, source: SourceShards | None = None, devices: Sequence[torch.device] = (),
    container: Container | None = None,
) -> tuple[dict[str, float], dict[str, Any]]:  # fmt: skip
    """Write every tensor to ``out``, layer by layer; several ``devices`` share the experts of a layer. Returns the relative
    squared error of each quantized role and the facts of the calibration."""
    stream, stop = LayerStream(checkpoint, calibration.device, calibration.dtype), threading.Event()
    work = CalibratedPass(stream, calibration, targets_of(stream, jobs, recipe), recipe.method, devices)
    work.weights = token_weights(stream, calibration, out / RUN)
    parts = in_layers(jobs, len(stream.layers))
    ordered = [job for part in parts for job in part]
    plan = [(job.name, job.info.dtype, job.info.shape) for job in ordered]
    breaks = {part[0].name for part in parts if part}
    errors = ErrorLog(out)
    with (
        contextlib.closing(stream),
        progress(sum(job.info.bytes for job in jobs), "quantize", "B", True) as bar,
        open_writer(out, plan, shard_bytes, breaks, container) as writer,
        OneBehind(calibration.device, stop) as later,
    ):
        sink = Sink(checkpoint, writer, errors, bar, None, calibration.device, stop)

        def write(part: list[Job], values: Mapping[str, Tensor], obsolete: Sequence[Path] = ()) -> None:
            for job in part:
                if job.name in values:
                    sink.put(job, values[job.name], chunk_bytes)
                else:
                    sink.stream([job], recipe, chunk_bytes)
            if source:  # not by shards: a layer that is not whole is calibrated again by a run that resumes
                source.sweep(writer)
            for path in obsolete:
                path.unlink(missing_ok=True)

        sink.stream(parts[0], recipe, chunk_bytes)
        first = _resume(work, writer, parts, out)
        if first == 0:
            embedded = [job for job in parts[0] if job.role is Role.EMBEDDING]
            work.embed({job.name: writer.tensors[job.name].read() for job in embedded})  # their shard is complete
        for index, part in enumerate(parts[1:-1]):
            if index < first:
                bar.update(sum(job.info.bytes for job in part))
                continue
            values = work.layer(index, later)
            work.save(out, index)
            # while the next layer is calibrated; a run that resumes needs the activations before it until then
            later(write, part, values, files_behind(out, index - 1))
            del values
        later(write, parts[-1], work.head())
    return errors.by_role(jobs), work.facts()


def _resume(work: CalibratedPass, writer: CheckpointWriter | PackedWriter, parts: list[list[Job]], out: Path) -> int:
    """The first layer that is not complete; loads the activations in front of it."""
    layers = parts[1:-1]
    first = next((i for i, part in enumerate(layers) if not all(writer.is_done(job.name) for job in part)), len(layers))
    if first:
        work.load(out, first - 1)
    return first
