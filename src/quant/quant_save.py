"""Quantize a checkpoint into one of the same names, shapes and dtypes, in a single streamed pass.

    python src/quant/quant_save.py --model models/razor-tiny --expert-bits 3 --linear-bits 4 --group 128 \
        --method gptq_refit --out out/razor-tiny-w3 [--calib FILE] [--packed] [--force]
        [--devices cuda:0,cuda:1 | all] [--result results/quantize/w3.json --tag w3]

Routed experts get --expert-bits; every other linear, the embedding and the head --linear-bits; router, norms, ssm state,
biases, vision and mtp are copied byte for byte. Methods that need no inputs (clip, absmax, ...) stream tensor by tensor;
the calibrated ones (gptq, ...) layer by layer, on --calib or, for razor-tiny, its tasks' training split. Several --devices
round shards (or, calibrated, the experts of a layer) at the same time, to the same bytes. recipe.json is written beside the
weights. --packed writes the same values in 4 bits a weight, as vLLM reads them (docs/PACKED.md). The output appears under its
name only when it is complete; Ctrl-C or an error leaves nothing behind, and after `kill -9` the same command goes on where it
stopped.
"""

from __future__ import annotations

import argparse
import dataclasses
import fnmatch
import json
import shutil
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from calibration import Calibration, layer_bytes, place_of
from calibration_text import add_calibration_arguments, calibration_of
from checkpoint import CONSUMED, Checkpoint, SourceShards, is_synthetic
from console import UserError, progress, run_cli, write_json
from devices import Stopped, default_device, device_peaks, each_device, on_device, parse_devices
from families import Role, roles_of
from moe_ptq import CALIBRATED, DATA_FREE, METHODS, Grid, round_weight, zero_point_bits
from moe_quant import average_bits, fake_quant
from overlap import OneBehind, one_ahead
from packed_layout import Container, PackedWriter, describe, open_writer, plan_container
from packed_layout import summary as packed_summary
from packed_view import PACKED
from recipe import RECIPE_FILE, Job, Recipe, read_allocation
from records import add_record_arguments, check_record_arguments, describe_model, header_sha256, write_result
from run_dir import RUN, check_output, check_resume, staged_directory
from safetensors_file import INDEX, CheckpointWriter
from size_model import BASE_BYTES
from token_weights import kept_bytes

CHUNK_BYTES = 64 << 20  # quantized at once, while the next is read and the last written
GPU_LANES = 4  # shards at work on a GPU, where no --devices are named (results/bench/h100_122b_disk.json)
FLOATS = (torch.bfloat16, torch.float16, torch.float32)
WEIGHT_SUFFIXES = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".npz"}
MAX_SIDECAR_BYTES = 64 << 20  # the largest tokenizers are about half of it


@dataclasses.dataclass
class RoleReport:
    """What happened to the tensors of one role. ``relative_error`` is sum (w - q)**2 / sum w**2; None if copied."""

    tensors: int = 0
    parameters: int = 0
    bits: float | None = None
    bytes: int = 0
    packed_bytes: int = 0
    relative_error: float | None = None


@dataclasses.dataclass(frozen=True)
class QuantizeReport:
    """``weight_bits`` and ``stored_bits`` (with 16-bit scales) are per quantized parameter, ``overall_bits`` is the
    packed size per parameter of the whole checkpoint, copied tensors included. ``container``: what --packed wrote."""

    tensors: int
    parameters: int
    output_bytes: int
    packed_bytes: int
    weight_bits: float
    stored_bits: float
    overall_bits: float
    roles: dict[str, RoleReport]
    calibration: dict[str, Any] | None = None
    container: dict[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        value = dataclasses.asdict(self)
        if self.container is None:
            del value["container"]
        return value


def plan_jobs(checkpoint: Checkpoint, recipe: Recipe) -> list[Job]:
    """A job for every tensor; raises :class:`UserError` on whatever the recipe cannot be applied to."""
    if checkpoint.config.get("quantization_config"):
        raise UserError(f"{checkpoint.path}: already quantized (quantization_config in config.json); use the original")
    roles = roles_of({name: info.shape for name, info in checkpoint.tensors.items()}, checkpoint.config)
    parameters = {name: place_of(name).parameter for name in checkpoint.tensors}
    for pattern, _ in recipe.overrides:
        if not fnmatch.filter(parameters.values(), pattern):
            raise UserError(f"overrides: {pattern}: no parameter of {checkpoint.path} has such a name")
    allocated = _allocated(checkpoint, recipe)
    jobs = []
    for name, info in checkpoint.tensors.items():
        bits = recipe.bits_of(parameters[name], roles[name]) if info.numel else None
        by_expert = allocated.get(name, ())
        if by_expert:
            bits = sum(by_expert) / len(by_expert)
        if info.dtype.itemsize == 1 and info.dtype.is_floating_point or bits and info.dtype not in FLOATS:
            raise UserError(f"tensor {name}: dtype {info.dtype} is already quantized; use a BF16, F16 or F32 checkpoint")
        if bits and info.shape[-1] % recipe.group:
            raise UserError(
                f"tensor {name}: group {recipe.group} does not divide the last axis of shape {list(info.shape)}; "
                f"choose a --group that divides {info.shape[-1]}"
            )
        if bits and bits != int(bits) and not by_expert and recipe.method not in CALIBRATED:
            known = ", ".join(CALIBRATED)
            raise UserError(f"tensor {name}: {bits} bits: a mix of two grids needs a calibrated method: {known}")
        jobs.append(Job(name, info, roles[name], bits, by_expert if len(by_expert) > 1 else ()))
    return jobs


def _allocated(checkpoint: Checkpoint, recipe: Recipe) -> dict[str, tuple[int, ...]]:
    """The bits that ``recipe.experts`` gives to each expert of a fused tensor, or to the one whose matrix a tensor is."""
    known, found, used = dict(recipe.experts), {}, set()
    for name, info in checkpoint.tensors.items() if known else ():
        place = place_of(name)
        module = place.parameter.rpartition(".")[0]
        if module not in known:
            continue
        count = info.shape[0] if place.expert is None else place.expert + 1
        if len(known[module]) < count or place.expert is None and len(known[module]) != count:
            raise UserError(f"experts: {module}: {len(known[module])} bits, but {name} needs {count}")
        found[name] = known[module] if place.expert is None else (known[module][place.expert],)
        used.add(module)
    if missing := known.keys() - used:
        raise UserError(f"experts: {min(missing)}: no such module of experts in {checkpoint.path}")
    return found


def summarize(jobs: list[Job], recipe: Recipe) -> QuantizeReport:
    """Counts, sizes and bits of a plan; the errors are still None."""
    roles: dict[str, RoleReport] = {}
    for job in jobs:
        entry = roles.setdefault(job.role, RoleReport(bits=0.0 if job.bits else None))
        entry.bits = entry.bits + job.bits * job.info.numel if job.bits and entry.bits is not None else entry.bits
        entry.tensors += 1
        entry.parameters += job.info.numel
        entry.bytes += job.info.bytes
        entry.packed_bytes += job.packed_bytes(recipe)
    for entry in roles.values():
        if entry.bits:
            entry.bits = round(entry.bits / entry.parameters, 4)
    parameters = sum(entry.parameters for entry in roles.values())
    packed = sum(entry.packed_bytes for entry in roles.values())
    zero = zero_point_bits(recipe.method, recipe.linear_bits)
    quantized = [(job.info.numel, job.bits, recipe.group) for job in jobs if job.bits]
    weight_bits, stored_bits = average_bits(quantized, 16 + zero)
    return QuantizeReport(
        tensors=len(jobs),
        parameters=parameters,
        output_bytes=sum(entry.bytes for entry in roles.values()),
        packed_bytes=packed,
        weight_bits=round(weight_bits, 4),
        stored_bits=round(stored_bits, 4),
        overall_bits=round(8 * packed / max(1, parameters), 4),
        roles={str(role): roles[role] for role in Role if role in roles},
    )


def table(report: QuantizeReport) -> str:
    """The report by role, as lines of text."""
    lines = [f"{'role':<17}{'tensors':>8}{'parameters':>17}{'bits':>6}{'MB packed':>12}{'rel. error':>12}"]
    for role, entry in report.roles.items():
        bits, error = f"{entry.bits:g}" if entry.bits else "kept", entry.relative_error
        shown = "" if error is None else f"{error:.3e}"
        megabytes = f"{entry.packed_bytes / 1e6:.2f}"
        lines.append(f"{role:<17}{entry.tensors:>8,}{entry.parameters:>17,}{bits:>6}{megabytes:>12}{shown:>12}")
    lines.append(
        f"{report.tensors:,} tensors, {report.parameters:,} parameters; {report.weight_bits:.2f} weight bits, "
        f"{report.stored_bits:.2f} stored bits with 16-bit scales (quantized tensors), {report.overall_bits:.2f} overall"
    )
    lines.append(f"on disk {report.output_bytes / 1e6:,.2f} MB dequantized; {report.packed_bytes / 1e6:,.2f} MB if packed")
    if report.container:
        lines[-1] = describe(report.container)
    return "\n".join(lines)


def sidecars(model: Path, unpacking: bool = False) -> list[Path]:
    """The files of a model directory to copy: configuration, tokenizer, templates; no weights, nothing hidden. Those of a
    packed checkpoint are of use only for ``unpacking`` it."""
    if (model / PACKED).is_file() and not unpacking:
        unpack = f"python src/quant/packed_export.py --unpack {model} --out DIR"
        raise UserError(f"{model}: is packed, and a checkpoint made from it would not be; unpack it first: {unpack}")
    return [
        file
        for file in sorted(model.iterdir())
        if file.is_file()
        and not file.name.startswith(".")
        and file.suffix not in WEIGHT_SUFFIXES
        and not file.name.endswith(".index.json")
        and file.name not in (INDEX, RECIPE_FILE, CONSUMED)
        and file.stat().st_size <= MAX_SIDECAR_BYTES
    ]


def _square_sum(a: Tensor, b: Tensor | None = None) -> float:
    """Sum of a**2, or of (a - b)**2, in float64 over pieces of bounded size."""
    size = 1 << (20 if a.device.type == "cpu" else 26)
    pieces = [tensor.flatten().split(size) for tensor in ((a,) if b is None else (a, b))]
    total = 0.0
    for piece, *other in zip(*pieces, strict=True):
        difference = piece.float() - other[0].float() if other else piece.float()
        total += difference.square_().sum(dtype=torch.float64).item()
    return total


def quantize_chunk(job: Job, weight: Tensor, recipe: Recipe, start: int = 0) -> Tensor:
    """The dequantized chunk in its own dtype, or the chunk itself if the job copies; a :class:`UserError` names it.
    ``start``: where the chunk lies along axis 0, which says its experts' bits."""
    if job.by_expert:
        one = dataclasses.replace(job, by_expert=())
        each = zip(weight, job.by_expert[start:])
        return torch.stack([quantize_chunk(dataclasses.replace(one, bits=bits), w, recipe) for w, bits in each])
    if job.bits is None:
        if weight.is_floating_point() and not bool(torch.isfinite(weight).all()):
            raise UserError(f"tensor {job.name}: the weight contains NaN or infinity")
        return weight
    method = recipe.method if recipe.method in DATA_FREE else "clip"  # calibrated: what no layer holds (the embedding)
    steps = 1 if method == "absmax" else recipe.clip_steps
    try:
        if method in ("absmax", "clip"):
            return fake_quant(weight, int(job.bits), recipe.group, steps, recipe.clip_low)
        return round_weight(weight, Grid(int(job.bits), recipe.group), None, method).to(weight.dtype)
    except UserError as error:
        raise UserError(f"tensor {job.name}: {error}") from None


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
        with self.path.open("a", encoding="utf-8") as stream:
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
        self.device, self.stop = device or default_device(), stop

    def _check_stop(self) -> None:
        if self.stop is not None and self.stop.is_set():
            raise Stopped

    def _advance(self, size: int) -> None:
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
                quantized = quantize_chunk(job, weight, recipe, start)
                if job.bits is not None:
                    error += _square_sum(weight, quantized)
                    size += _square_sum(weight)
                    if start + len(weight) == job.info.shape[0]:
                        self.errors.add(job.name, error, size)  # before the append that may complete the shard
                later(self._append, job.name, self.writer.encode(job.name, quantized))
                self._advance(weight.nbytes)

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
                self._advance(job.info.bytes)
                continue
            for start, weight in self.checkpoint.read_chunks(job.name, chunk_bytes):
                self._check_stop()
                yield job, start, weight

    def put(self, job: Job, value: Tensor, chunk_bytes: int) -> None:
        """Write a tensor that the calibrated pass has rounded. Its error is taken chunk by chunk, on the device."""
        if self.writer.is_done(job.name):  # the layer is larger than a shard, and this shard was complete
            self._advance(job.info.bytes)
            return
        error = size = 0.0
        for start, weight in self.checkpoint.read_chunks(job.name, chunk_bytes):
            self._check_stop()
            weight = weight.to(self.device)
            error += _square_sum(weight, value[start : start + len(weight)].to(self.device))
            size += _square_sum(weight)
        self.errors.add(job.name, error, size)  # before the append that may complete the shard
        self._append(job.name, self.writer.encode(job.name, value))
        self._advance(job.info.bytes)


def stream(
    checkpoint: Checkpoint, jobs: list[Job], recipe: Recipe, out: Path, shard_bytes: int, chunk_bytes: int,
    devices: Sequence[torch.device], source: SourceShards | None = None, container: Container | None = None,
) -> dict[str, float]:  # fmt: skip
    """Write every tensor to ``out`` chunk by chunk, each device its own shards from reading to writing. Returns the relative
    squared error of each quantized role."""
    plan = [(job.name, job.info.dtype, job.info.shape) for job in jobs]
    errors = ErrorLog(out)

    def share(number: int, device: torch.device, stop: threading.Event) -> None:
        with open_writer(out, plan, shard_bytes, container=container, share=(number, len(devices))) as writer:
            Sink(checkpoint, writer, errors, bar, source, device, stop).stream(jobs, recipe, chunk_bytes)

    with progress(sum(job.info.bytes for job in jobs), "quantize", "B", True) as bar:
        each_device(devices, share)
    if len(devices) > 1:
        with open_writer(out, plan, shard_bytes, container=container):  # finds every shard complete and adds the index
            pass
    return errors.by_role(jobs)


def _settings(
    checkpoint: Checkpoint, recipe: Recipe, shard_bytes: int, calibration: Calibration | None, packed: bool
) -> dict[str, Any]:
    """What must be the same for an unfinished run to go on."""
    return {
        "packed": packed,
        "recipe": recipe.to_json(),
        "config_sha256": checkpoint.config_sha256,
        "header_sha256": header_sha256(checkpoint),
        "shard_bytes": shard_bytes,
        "calibration": calibration.settings() if calibration else None,
    }


def quantized_tensors(
    checkpoint: Checkpoint, jobs: list[Job], recipe: Recipe, partial: Path, shard_bytes: int, chunk_bytes: int,
    calibration: Calibration | None, source: SourceShards | None, devices: Sequence[torch.device], container: Container | None,
) -> tuple[dict[str, float], dict[str, Any] | None]:  # fmt: skip
    """Write every tensor to ``partial``, layer by layer with ``calibration``: (relative error by role, its facts)."""
    if not calibration:
        return stream(checkpoint, jobs, recipe, partial, shard_bytes, chunk_bytes, devices, source, container), None
    from calibrated_pass import calibrated_stream

    return calibrated_stream(
        checkpoint, jobs, recipe, calibration, partial, shard_bytes, chunk_bytes, source, devices, container
    )


def quantize_checkpoint(
    model: str | Path,
    out: str | Path,
    recipe: Recipe,
    force: bool = False,
    shard_bytes: int = 4 << 30,
    chunk_bytes: int = CHUNK_BYTES,
    calibration: Calibration | None = None,
    devices: Sequence[torch.device] = (),
    consume: bool = False,
    packed: bool = False,
) -> QuantizeReport:
    """Quantize the checkpoint in directory ``model`` into ``out`` and return what was done, printing the plan first.

    Memory is a few times ``chunk_bytes``; with ``calibration``, which the calibrated methods need, it is a decoder layer
    with its statistics and the activations. The result does not depend on ``chunk_bytes``, nor on how many ``devices`` of
    one kind there are (default: one). Everything that can be checked is checked before ``out`` is touched; bad input is a
    :class:`UserError`. A killed run resumes to the same bytes, on as many devices as you like.
    ``consume`` gives the disk of each shard of ``model`` back once ``out`` has it, and deletes the weights at the end.
    ``packed`` stores the result in 4 bits a weight.
    """
    devices = tuple(devices) or (calibration.device if calibration else default_device(),)
    if (recipe.method in CALIBRATED) != (calibration is not None):
        raise UserError(f"method {recipe.method}: {'needs' if calibration is None else 'takes no'} calibration tokens")
    checkpoint = Checkpoint(model)
    out = Path(out).resolve()
    jobs = plan_jobs(checkpoint, recipe)
    report = summarize(jobs, recipe)
    container = plan_container(jobs, recipe) if packed else None
    report = dataclasses.replace(report, container=packed_summary(jobs, container) if container else None)
    extras = sidecars(checkpoint.path)
    written = report.container["bytes"] if report.container else report.output_bytes
    source = SourceShards(checkpoint, out) if consume else None
    if not consume and (checkpoint.path / CONSUMED).exists():
        raise UserError(f"{checkpoint.path}: its weights were consumed by another run; make or download it again")
    needed = written + sum(file.stat().st_size for file in extras)
    if consume:  # the disk needs room for what the output is ahead of the source by
        needed = min(needed, len(devices) * (3 * max(f.stat().st_size for f in checkpoint.files) + 2 * shard_bytes))
    needed += kept_bytes(checkpoint, calibration)
    check_output(checkpoint.path, out, force, needed)
    settings = _settings(checkpoint, recipe, shard_bytes, calibration, packed)
    resumed = check_resume(out, settings)
    print(f"{checkpoint.path} -> {out}{' (resumed)' if resumed else ''}\n{recipe}\n{table(report)}", flush=True)
    print(preflight(jobs, out, needed, chunk_bytes, calibration, len(devices)), flush=True)
    if not calibration:
        seconds = max(sample_seconds(jobs, recipe, device) for device in set(devices)) / len(set(devices))
        print(f"about {seconds:.2g} s of arithmetic at the speed of a sample; the disk comes on top")
    with staged_directory(out, force, settings) as partial:
        if source:
            source.begin(resumed)
        for file in extras:
            shutil.copyfile(file, partial / file.name)
        errors, facts = quantized_tensors(
            checkpoint, jobs, recipe, partial, shard_bytes, chunk_bytes, calibration, source, devices, container
        )
        report = dataclasses.replace(report, calibration=facts)
        for role, error in errors.items():
            report.roles[role].relative_error = error
        origin = {"name": checkpoint.path.resolve().name, "config_sha256": checkpoint.config_sha256}
        made = {"recipe": recipe.to_json(), "source": origin, "calibration": settings["calibration"]}
        write_json(partial / RECIPE_FILE, made | {"report": report.to_json()})
    if source:
        source.remove()
    return report


def lanes(device: torch.device) -> tuple[torch.device, ...]:
    """The device as often as shards should be at work on it: a GPU waits for the disk, which one shard does not keep busy."""
    return (device,) * (GPU_LANES if device.type == "cuda" else 1)


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


def preflight(
    jobs: list[Job], out: Path, needed: int, chunk_bytes: int, calibration: Calibration | None, devices: int = 1
) -> str:
    """What the run will need, said before it starts: disk, and the bound on memory."""
    ancestor = next(parent for parent in out.parents if parent.exists())
    largest = max((job.info.bytes // job.info.shape[0] for job in jobs if job.info.shape and job.info.numel), default=0)
    memory = BASE_BYTES + 4 * max(chunk_bytes, largest) * (1 if calibration else devices)
    if calibration:
        memory += layer_bytes(jobs, calibration)
    free = shutil.disk_usage(ancestor).free
    return f"disk {needed / 1e9:.2f} GB of {free / 1e9:.2f} GB free; memory at most about {memory / 2**30:.1f} GiB"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True, type=Path, help="checkpoint directory (config.json and safetensors)")
    parser.add_argument("--out", required=True, type=Path, help="directory to make")
    bits = "2..8 for routed experts, 16 leaves them; a fraction mixes two grids by what each expert gains"
    parser.add_argument("--expert-bits", required=True, type=bits_argument, help=bits)
    parser.add_argument("--linear-bits", required=True, type=int, help="2..8 for other matrices; 16 leaves them")
    parser.add_argument("--group", type=int, default=128, help="inputs that share a scale (default 128)")
    parser.add_argument("--clip-steps", type=int, default=16, help="ratios tried by the clip search; 1 is absmax")
    parser.add_argument("--method", default="clip", help=f"{', '.join(METHODS)} (default clip)")
    parser.add_argument("--allocation", type=Path, help="JSON of moe_alloc: bits by parameter, in place of the two above")
    add_calibration_arguments(parser)
    parser.add_argument("--propagate", default="quantized", choices=("quantized", "bf16"), help="whose activations go on")
    more = "how much of its gradient a token counts in the second moments (0.4 keeps rare facts; default 0: all tokens alike)"
    parser.add_argument("--token-power", type=float, default=0.0, help=more)
    more = "of the mean second moment, added to each (0.1 goes with --token-power 0.4; default 0)"
    parser.add_argument("--damping", type=float, default=0.0, help=more)
    more = "passes that train the norms of each rounded layer towards its output before rounding (default 0: norms are kept)"
    parser.add_argument("--refine", type=int, default=0, help=more)
    parser.add_argument("--packed", action="store_true", help="write 4 bits a weight for vLLM instead of BF16 (docs/PACKED.md)")
    more = f"cuda:0,cuda:1,... or all (default: the first GPU, data-free with {GPU_LANES} shards at work; or the CPU)"
    parser.add_argument("--devices", default="", help=more)
    parser.add_argument("--force", action="store_true", help="replace an earlier output once the new one is complete")
    parser.add_argument("--shard-gib", type=float, default=4.0, help="largest weight file (default 4)")
    more = "give the disk of --model's weights back as they are read, and delete them: only of a synthetic checkpoint"
    parser.add_argument("--consume-source", action="store_true", help=more)
    parser.add_argument("--consume-real-source", action="store_true", help="the same for any checkpoint: it will be gone")
    add_record_arguments(parser, force=False)
    return parser.parse_args()


def bits_argument(text: str) -> float:
    """A whole number as int, else a float; argparse turns a ValueError into its own message."""
    value = float(text)
    return int(value) if value == int(value) else value


def check_arguments(args: argparse.Namespace) -> Recipe:
    check_record_arguments(args)
    if args.refine < 0 or args.refine and args.method not in CALIBRATED:
        raise UserError(f"--refine {args.refine}: 0 or more passes, with a calibrated method: {', '.join(CALIBRATED)}")
    if not (0 <= args.token_power <= 1 and 0 <= args.damping <= 10):
        raise UserError("--token-power must be within 0 and 1, --damping within 0 and 10")
    if (args.token_power or args.damping) and args.method not in CALIBRATED:
        raise UserError(f"--token-power, --damping: of a calibrated method: {', '.join(CALIBRATED)}")
    if args.consume_source and not (args.consume_real_source or is_synthetic(args.model)):
        raise UserError(
            f"--consume-source: {args.model} is not of synthetic_moe.py; "
            "--consume-real-source would delete its weights for good"
        )
    if not 0 < args.shard_gib < float("inf"):
        raise UserError(f"--shard-gib {args.shard_gib} must be above 0")
    allocation = read_allocation(args.allocation) if args.allocation else {}
    return Recipe(args.expert_bits, args.linear_bits, args.group, args.clip_steps, method=args.method, **allocation)


def main() -> None:
    args = parse_arguments()
    recipe, devices = check_arguments(args), parse_devices(args.devices)
    consume = args.consume_source or args.consume_real_source
    if not args.devices and recipe.method not in CALIBRATED and not consume:
        devices = lanes(devices[0])
    started = time.time()
    source = describe_model(args.model) if args.result else None
    calibration = None
    if recipe.method in CALIBRATED:
        Checkpoint(args.model)  # its errors first: they are clearer than a tokenizer's
        ids, entry = calibration_of(args)
        how = {"propagate": args.propagate, "refine": args.refine}
        how |= {"token_power": args.token_power, "damping": args.damping}
        calibration = Calibration(ids, entry, **how, device=devices[0])
    shard_bytes = int(args.shard_gib * 2**30)
    report = quantize_checkpoint(
        args.model, args.out, recipe, args.force, shard_bytes, calibration=calibration, devices=devices,
        consume=consume, packed=args.packed,
    )  # fmt: skip
    seconds = time.time() - started
    if args.result:
        write_result(
            args.result, kind="quantize", tag=args.tag, started=started, model=source, recipe=recipe.to_json(),
            data=[calibration.record] if calibration else [], metrics=report.to_json(),
            extra={"output": describe_model(args.out), "devices": [str(device) for device in devices],
                   "device_peak_mib": device_peaks(devices)},
        )  # fmt: skip
    print(f"{table(report)}\nwrote {args.out} in {seconds:.1f} s", flush=True)


if __name__ == "__main__":
    run_cli(main)
