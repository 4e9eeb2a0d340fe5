"""A quantized checkpoint as it is written: tensors without calibration chunk by chunk, those of the calibrated pass by layers.

Not a command; quant_save uses it. Each quantized tensor is compared with its original on the way, for the error of its role.
"""

from __future__ import annotations

import dataclasses
import json
import math
import threading
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from checkpoint import Checkpoint, SourceShards
from console import UserError, explained, progress, writing
from devices import OneBehind, Stopped, default_device, each_device, on_device, one_ahead
from families import LAYER_PREFIX, Role, text_name
from hub import AHEAD_BYTES
from moe_ptq import DATA_FREE, Grid, round_weight
from moe_quant import fake_quant
from packed_format import Container, PackedWriter, open_writer
from recipe import Job, Recipe
from run_dir import RUN
from safetensors_file import CheckpointWriter


def _square_sum(a: Tensor, b: Tensor | None = None) -> float:
    """Sum of a**2, or of (a - b)**2, in float64 over pieces of bounded size."""
    size = 1 << (20 if a.device.type == "cpu" else 26)
    pieces = [tensor.flatten().split(size) for tensor in ((a,) if b is None else (a, b))]
    total = 0.0
    for piece, *other in zip(*pieces, strict=True):
        difference = piece.float() - other[0].float() if other else piece.float()
        found = difference.square_().sum(dtype=torch.float64).item()
        if not math.isfinite(found):  # squares beyond float32
            difference = piece.double() - other[0].double() if other else piece.double()
            found = difference.square_().sum().item()
        total += found
    return total


def _checked(job: Job, value: Tensor) -> Tensor:
    """``value``, unless rounding has left what its dtype holds."""
    if job.bits is not None and value.numel() and not bool(torch.isfinite(torch.stack(torch.aminmax(value))).all()):
        raise UserError(
            f"tensor {job.name}: rounded, its largest weight is beyond what {value.dtype} holds; leave it (16 bits)"
        )
    return value


def quantize_chunk(job: Job, weight: Tensor, recipe: Recipe, start: int = 0) -> Tensor:
    """The dequantized chunk in its own dtype, or the chunk itself if the job copies; a :class:`UserError` names it.
    ``start``: where the chunk lies along axis 0, which says its experts' bits."""
    if job.transposed and job.bits is not None:
        turned = quantize_chunk(dataclasses.replace(job, transposed=False), weight.mT.contiguous(), recipe, start)
        return turned.mT.contiguous()
    if job.by_expert:
        one = dataclasses.replace(job, by_expert=())
        each = zip(weight, job.by_expert[start:])
        return torch.stack([quantize_chunk(dataclasses.replace(one, bits=bits), w, recipe) for w, bits in each])
    if job.bits is None:
        if weight.is_floating_point() and not bool(torch.isfinite(weight).all()):
            raise UserError(f"tensor {job.name}: the weight contains NaN or infinity")
        return weight
    method = recipe.method if recipe.method in DATA_FREE else "clip"  # calibrated: what no layer holds (an untied embedding)
    steps = 1 if method == "absmax" else recipe.clip_steps
    with explained(f"tensor {job.name}"):
        if method in ("absmax", "clip"):
            return fake_quant(weight, int(job.bits), recipe.group, steps, recipe.clip_low)
        return round_weight(weight, Grid(int(job.bits), recipe.group), None, method).to(weight.dtype)


class ErrorLog:
    """Squared error and squared size of every quantized tensor, kept in a file so that a resumed run still has them."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / RUN / "errors.jsonl"
        self.sums: dict[str, tuple[float, float]] = {}
        if self.path.exists():
            for line in self.path.read_text(encoding="utf-8").splitlines(keepends=True):
                if line.endswith("\n"):  # a killed run may have left half a line
                    name, error, size = json.loads(line)
                    self.sums[name] = (error, size)

    def add(self, name: str, error: float, size: float) -> None:
        self.sums[name] = (error, size)
        with writing(self.path), self.path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps([name, error, size]) + "\n")

    def by_role(self, jobs: list[Job]) -> dict[str, float]:
        """Relative squared error of each quantized role."""
        totals: dict[str, list[float]] = {}
        for job in jobs:
            if job.bits is not None:
                total = totals.setdefault(job.role, [0.0, 0.0])
                for place, value in enumerate(self.sums[job.name]):
                    total[place] += value
        # Six digits: the last ones depend on the number of threads that summed.
        return {role: float(f"{error / size:.6g}") if size else 0.0 for role, (error, size) in totals.items()}


class Sink:
    """Takes tensors in plan order: the checkpoint writer, the log of errors and the progress bar in one. Several may work at
    the same time, each with a device and a writer of its own; ``stop`` ends this one early."""

    def __init__(
        self, checkpoint: Checkpoint, writer: CheckpointWriter | PackedWriter, errors: ErrorLog, bar: Any,
        source: SourceShards | None = None, device: torch.device | None = None, stop: threading.Event | None = None,
    ) -> None:  # fmt: skip
        self.checkpoint, self.writer, self.errors, self.bar, self.source = checkpoint, writer, errors, bar, source
        self.device, self.stop = device or default_device(), stop or threading.Event()

    def _check_stop(self) -> None:
        if self.stop.is_set():
            raise Stopped

    def advance(self, size: int) -> None:
        with self.bar.get_lock():
            self.bar.update(size)

    def stream(self, jobs: Sequence[Job], recipe: Recipe, chunk_bytes: int) -> None:
        """Read, quantize without calibration (or copy) and write tensors chunk by chunk; the next chunk is read and the
        last one written meanwhile."""
        error = size = 0.0
        with one_ahead(self._chunks(jobs, chunk_bytes)) as chunks, OneBehind() as later:
            for job, start, weight in chunks:
                if job.bits is not None:
                    if start == 0:
                        error = size = 0.0
                    weight = weight.to(self.device)
                quantized = _checked(job, quantize_chunk(job, weight, recipe, start))
                if job.bits is not None:
                    error += _square_sum(weight, quantized)
                    size += _square_sum(weight)
                    if start + len(weight) == job.info.shape[0]:
                        self.errors.add(job.name, error, size)  # before the append that may complete the shard
                later(self._append, job.name, self.writer.encode(job.name, quantized))
                self.advance(weight.nbytes)

    def _append(self, name: str, value: Any) -> None:
        whole = len(self.writer.closed)
        self.writer.append(name, value)
        if self.source and len(self.writer.closed) > whole:
            self.source.sweep(self.writer)

    def _chunks(self, jobs: Sequence[Job], chunk_bytes: int) -> Iterator[tuple[Job, int, Tensor]]:
        """(job, place of its first row, rows) of the tensors that are this writer's and not written yet."""
        for job in jobs:
            if not self.writer.is_own(job.name):
                continue
            if self.writer.is_done(job.name):
                self.advance(job.info.bytes)
                continue
            for start, weight in self.checkpoint.read_chunks(job.name, chunk_bytes):
                self._check_stop()
                yield job, start, weight

    def put(self, job: Job, value: Tensor, chunk_bytes: int) -> None:
        """Write a tensor that the calibrated pass has rounded. Its error is taken chunk by chunk, on the device."""
        if self.writer.is_done(job.name):  # the layer is larger than a shard, and this shard was complete
            self.advance(job.info.bytes)
            return
        _checked(job, value)
        error = size = 0.0
        for start, weight in self.checkpoint.read_chunks(job.name, chunk_bytes):
            self._check_stop()
            weight = weight.to(self.device)
            error += _square_sum(weight, value[start : start + len(weight)].to(self.device))
            size += _square_sum(weight)
        self.errors.add(job.name, error, size)  # before the append that may complete the shard
        self._append(job.name, self.writer.encode(job.name, value))
        self.advance(job.info.bytes)


def stream(
    checkpoint: Checkpoint, jobs: list[Job], recipe: Recipe, out: Path, shard_bytes: int, chunk_bytes: int,
    source: SourceShards | None, devices: Sequence[torch.device], container: Container | None,
) -> dict[str, float]:  # fmt: skip
    """Write every tensor to ``out`` chunk by chunk, each device its own shards from reading to writing. Returns the relative
    squared error of each quantized role."""
    plan = [(job.name, job.info.dtype, job.info.shape) for job in jobs]
    errors = ErrorLog(out)

    def share(number: int, device: torch.device, stop: threading.Event) -> None:
        with open_writer(out, plan, shard_bytes, container=container, share=(number, len(devices))) as writer:
            if len(devices) == 1:
                names = [job.name for job in jobs if not writer.is_done(job.name)]
                checkpoint.expect([names], AHEAD_BYTES, whole=True)
            Sink(checkpoint, writer, errors, bar, source, device, stop).stream(jobs, recipe, chunk_bytes)

    with progress(sum(job.info.bytes for job in jobs), "quantize", "B", True) as bar:
        each_device(devices, share)
    if len(devices) > 1:
        with open_writer(out, plan, shard_bytes, container=container):  # finds every shard complete and adds the index
            pass
    return errors.by_role(jobs)


def in_layers(jobs: Sequence[Job], layers: int, last: Collection[str] = ()) -> list[list[Job]]:
    """Jobs before the decoder (embedding, vision, ...), of each layer, and after it (final norm, head, mtp); those that are
    named ``last`` are after it in any case."""
    parts: list[list[Job]] = [[] for _ in range(layers + 2)]
    for job in jobs:
        match = LAYER_PREFIX.match(text_name(job.name))
        if match and int(match[1]) < layers:
            parts[int(match[1]) + 1].append(job)
        else:
            parts[0 if job.role in (Role.EMBEDDING, Role.VISION) and job.name not in last else -1].append(job)
    return parts


class LayerSink:
    """The writer of the calibrated pass (calibrated_pass.Writer): ``parts`` of a checkpoint, as :func:`in_layers` has them.
    The disk of a consumed ``source`` is given back behind each part, not by shards: a layer that is not whole is calibrated
    again by a run that resumes."""

    def __init__(
        self, sink: Sink, parts: list[list[Job]], recipe: Recipe, chunk_bytes: int, source: SourceShards | None
    ) -> None:
        self.sink, self.recipe, self.chunk_bytes, self.source = sink, recipe, chunk_bytes, source
        self.before, *self.parts = parts
        self.stop = sink.stop

    def _is_done(self, part: Sequence[Job]) -> bool:
        return all(self.sink.writer.is_done(job.name) for job in part)

    def begin(self) -> int:
        self.sink.stream(self.before, self.recipe, self.chunk_bytes)
        layers = self.parts[:-1]
        whole = next((index for index, part in enumerate(layers) if not self._is_done(part)), len(layers))
        self.sink.advance(sum(job.info.bytes for part in layers[:whole] for job in part))
        return whole

    def embedding(self) -> dict[str, Tensor]:
        read = self.sink.writer.read  # their shard is complete
        return {job.name: read(job.name) for job in self.before if job.role is Role.EMBEDDING}

    def write(self, part: int, values: Mapping[str, Tensor]) -> None:
        for job in self.parts[part]:
            if job.name in values:
                self.sink.put(job, values[job.name], self.chunk_bytes)
            else:
                self.sink.stream([job], self.recipe, self.chunk_bytes)
        if self.source:
            self.source.sweep(self.sink.writer)

    def complete(self) -> bool:
        return self._is_done(self.parts[-1])


def sample_seconds(jobs: list[Job], recipe: Recipe, device: torch.device, count: int = 1 << 21) -> float:
    """Seconds that rounding all of ``jobs`` takes on a device at the speed of a random sample of about ``count`` weights.
    On a GPU this also compiles the kernel, before several threads would."""
    total = sum(job.info.numel for job in jobs if job.bits is not None)
    job = next((job for job in jobs if job.bits is not None and not job.by_expert), None)
    if job is None:
        return 0.0
    sample = torch.randn(max(1, count // recipe.group), recipe.group).bfloat16()
    sample = sample.to(device)
    with on_device(device):
        quantize_chunk(job, sample, recipe)
        started = time.perf_counter()
        quantize_chunk(job, sample, recipe).cpu()
    return (time.perf_counter() - started) * total / sample.numel()
