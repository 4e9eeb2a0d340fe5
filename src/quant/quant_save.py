"""Quantize a checkpoint into one of the same names, shapes and dtypes, in a single streamed pass without calibration.

    python src/quant/quant_save.py --model models/razor-tiny --expert-bits 3 --linear-bits 4 --group 128 \
        --clip-steps 16 --out out/razor-tiny-w3 [--force] [--shard-gib 4] [--result results/quantize/w3.json --tag w3]

Routed experts get --expert-bits; every other linear, the embedding and the head --linear-bits; router, norms, ssm state,
biases, vision and mtp are copied byte for byte. recipe.json is written beside the weights. The output appears under its
name only when it is complete; Ctrl-C or an error leaves nothing behind.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import glob
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from checkpoint import INDEX, Checkpoint, CheckpointWriter, TensorInfo
from console import UserError, progress, run_cli, write_json
from model_layout import Role, roles_of
from moe_quant import average_bits, fake_quant
from recipe import RECIPE_FILE, Recipe
from results_store import describe_model, write_result

CHUNK_BYTES = 64 << 20  # read, quantized and written at once
FLOATS = (torch.bfloat16, torch.float16, torch.float32)
WEIGHT_SUFFIXES = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".npz"}
MAX_SIDECAR_BYTES = 64 << 20  # the largest tokenizers are about half of it


@dataclasses.dataclass(frozen=True)
class Job:
    """One tensor: quantized to ``bits``, or copied when ``bits`` is None."""

    name: str
    info: TensorInfo
    role: Role
    bits: int | None

    def packed_bytes(self, group: int) -> int:
        """Bytes of bit-packed codes and 16-bit scales, or of the tensor itself when it is copied."""
        if self.bits is None:
            return self.info.bytes
        return -(-self.info.numel * self.bits // 8) + 2 * self.info.numel // group


@dataclasses.dataclass
class RoleReport:
    """What happened to the tensors of one role. ``relative_error`` is sum (w - q)**2 / sum w**2; None if copied."""

    tensors: int = 0
    parameters: int = 0
    bits: int | None = None
    bytes: int = 0
    packed_bytes: int = 0
    relative_error: float | None = None


@dataclasses.dataclass(frozen=True)
class QuantizeReport:
    """``weight_bits`` and ``stored_bits`` (with 16-bit scales) are per quantized parameter, ``overall_bits`` is the
    packed size per parameter of the whole checkpoint, copied tensors included."""

    tensors: int
    parameters: int
    output_bytes: int
    packed_bytes: int
    weight_bits: float
    stored_bits: float
    overall_bits: float
    roles: dict[str, RoleReport]

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def plan_jobs(checkpoint: Checkpoint, recipe: Recipe) -> list[Job]:
    """A job for every tensor; raises :class:`UserError` on whatever the recipe cannot be applied to."""
    if checkpoint.config.get("quantization_config"):
        raise UserError(f"{checkpoint.path}: already quantized (quantization_config in config.json); use the original")
    roles = roles_of({name: info.shape for name, info in checkpoint.tensors.items()}, checkpoint.config)
    jobs = []
    for name, info in checkpoint.tensors.items():
        bits = recipe.bits_for(roles[name]) if info.numel else None
        if info.dtype.itemsize == 1 and info.dtype.is_floating_point or bits and info.dtype not in FLOATS:
            raise UserError(f"tensor {name}: dtype {info.dtype} is already quantized; use a BF16, F16 or F32 checkpoint")
        if bits and info.shape[-1] % recipe.group:
            raise UserError(
                f"tensor {name}: group {recipe.group} does not divide the last axis of shape {list(info.shape)}; "
                f"choose a --group that divides {info.shape[-1]}"
            )
        jobs.append(Job(name, info, roles[name], bits))
    return jobs


def summarize(jobs: list[Job], group: int) -> QuantizeReport:
    """Counts, sizes and bits of a plan; the errors are still None."""
    roles: dict[str, RoleReport] = {}
    for job in jobs:
        entry = roles.setdefault(job.role, RoleReport(bits=job.bits))
        entry.tensors += 1
        entry.parameters += job.info.numel
        entry.bytes += job.info.bytes
        entry.packed_bytes += job.packed_bytes(group)
    parameters = sum(entry.parameters for entry in roles.values())
    packed = sum(entry.packed_bytes for entry in roles.values())
    weight_bits, stored_bits = average_bits((job.info.numel, job.bits, group) for job in jobs if job.bits)
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
        bits, error = entry.bits or "kept", entry.relative_error
        shown = "" if error is None else f"{error:.3e}"
        megabytes = f"{entry.packed_bytes / 1e6:.2f}"
        lines.append(f"{role:<17}{entry.tensors:>8,}{entry.parameters:>17,}{bits:>6}{megabytes:>12}{shown:>12}")
    lines.append(
        f"{report.tensors:,} tensors, {report.parameters:,} parameters; {report.weight_bits:.2f} weight bits, "
        f"{report.stored_bits:.2f} stored bits with 16-bit scales (quantized tensors), {report.overall_bits:.2f} overall"
    )
    lines.append(f"on disk {report.output_bytes / 1e6:,.2f} MB dequantized; {report.packed_bytes / 1e6:,.2f} MB if packed")
    return "\n".join(lines)


def sidecars(model: Path) -> list[Path]:
    """The files of a model directory to copy: configuration, tokenizer, templates; no weights, nothing hidden."""
    return [
        file
        for file in sorted(model.iterdir())
        if file.is_file()
        and not file.name.startswith(".")
        and file.suffix not in WEIGHT_SUFFIXES
        and not file.name.endswith(".index.json")
        and file.name not in (INDEX, RECIPE_FILE)
        and file.stat().st_size <= MAX_SIDECAR_BYTES
    ]


def check_output(model: Path, out: Path, force: bool, needed: int) -> None:
    """Raise :class:`UserError` unless ``needed`` bytes can be written to ``out``. Touches nothing."""
    source = model.resolve()
    if out == source or out in source.parents:
        raise UserError(f"{out}: is the model itself or a directory around it; choose another --out")
    if out.exists() and not force:
        raise UserError(f"{out}: exists; use --force to replace it")
    if out.exists() and not (out / RECIPE_FILE).is_file() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"{out}: not an output of quant_save (no {RECIPE_FILE}); --force will not delete it, remove it")
    ancestor = next(parent for parent in out.parents if parent.exists())
    if not ancestor.is_dir() or not os.access(ancestor, os.W_OK | os.X_OK):
        raise UserError(f"{out}: cannot be created, {ancestor} is not a directory that you can write to")
    free = shutil.disk_usage(ancestor).free
    if free < needed:
        raise UserError(f"{out}: needs {needed / 1e9:.2f} GB, {free / 1e9:.2f} GB free on that disk")


def _alive(pid: str) -> bool:
    try:
        os.kill(int(pid), 0)
    except (ProcessLookupError, ValueError):
        return False
    except PermissionError:
        return True
    return True


def remove_stale(out: Path) -> None:
    """Remove what a killed run left beside ``out``; give back an output that was being replaced when it was killed."""
    name = glob.escape(out.name)
    for path in out.parent.glob(f".{name}.partial-*"):
        if not _alive(path.name.rpartition("-")[2]):
            shutil.rmtree(path)
    for path in out.parent.glob(f".{name}.replaced-*"):
        if not _alive(path.name.rpartition("-")[2]):
            shutil.rmtree(path) if out.exists() else path.rename(out)


@contextlib.contextmanager
def staged_directory(out: Path, force: bool) -> Iterator[Path]:
    """Yield a new directory beside ``out``; when the block succeeds it takes that name, with ``force`` in place of what
    was there. On any failure it is removed, with the parents made for it, and what was there is untouched."""
    created = [parent for parent in out.parents if not parent.exists()]  # innermost first
    partial = out.parent / f".{out.name}.partial-{os.getpid()}"
    replaced = out.parent / f".{out.name}.replaced-{os.getpid()}"
    try:
        try:
            partial.mkdir(parents=True)
        except OSError as error:
            raise UserError(f"{out}: cannot be created ({error.strerror})") from None
        yield partial
        if out.exists():
            if not force:
                raise UserError(f"{out}: appeared while this run was writing; use --force to replace it")
            out.rename(replaced)
        partial.rename(out)
    except BaseException:
        if replaced.exists():
            shutil.rmtree(replaced) if out.exists() else replaced.rename(out)
        shutil.rmtree(partial, ignore_errors=True)
        with contextlib.suppress(OSError):  # a parent that another program has filled meanwhile stays
            for parent in created:
                parent.rmdir()
        raise
    shutil.rmtree(replaced, ignore_errors=True)


def _square_sum(a: Tensor, b: Tensor | None = None) -> float:
    """Sum of a**2, or of (a - b)**2, in float64 over pieces of bounded size."""
    pieces = [tensor.flatten().split(1 << 20) for tensor in ((a,) if b is None else (a, b))]
    total = 0.0
    for piece, *other in zip(*pieces, strict=True):
        difference = piece.float() - other[0].float() if other else piece.float()
        total += difference.square_().sum(dtype=torch.float64).item()
    return total


def quantize_chunk(job: Job, weight: Tensor, recipe: Recipe) -> Tensor:
    """The dequantized chunk in its own dtype, or the chunk itself if the job copies; a :class:`UserError` names it."""
    if job.bits is None:
        if weight.is_floating_point() and not bool(torch.isfinite(weight).all()):
            raise UserError(f"tensor {job.name}: the weight contains NaN or infinity")
        return weight
    try:
        return fake_quant(weight, job.bits, recipe.group, recipe.clip_steps, recipe.clip_low)
    except UserError as error:
        raise UserError(f"tensor {job.name}: {error}") from None


def stream(
    checkpoint: Checkpoint, jobs: list[Job], recipe: Recipe, out: Path, shard_bytes: int, chunk_bytes: int
) -> dict[str, float]:
    """Write every tensor to ``out`` chunk by chunk. Returns the relative squared error of each quantized role."""
    errors: dict[str, list[float]] = {}
    plan = [(job.name, job.info.dtype, job.info.shape) for job in jobs]
    total = sum(job.info.bytes for job in jobs)
    with progress(total, "quantize", "B", True) as bar, CheckpointWriter(out, plan, shard_bytes) as writer:
        for job in jobs:
            for _, weight in checkpoint.read_chunks(job.name, chunk_bytes):
                quantized = quantize_chunk(job, weight, recipe)
                writer.append(job.name, quantized)
                if job.bits is not None:
                    sums = errors.setdefault(job.role, [0.0, 0.0])
                    sums[0] += _square_sum(weight, quantized)
                    sums[1] += _square_sum(weight)
                bar.update(weight.nbytes)
    # Six digits: the last ones depend on the number of threads that summed.
    return {role: float(f"{error / norm:.6g}") if norm else 0.0 for role, (error, norm) in errors.items()}


def quantize_checkpoint(
    model: str | Path,
    out: str | Path,
    recipe: Recipe,
    force: bool = False,
    shard_bytes: int = 4 << 30,
    chunk_bytes: int = CHUNK_BYTES,
) -> QuantizeReport:
    """Quantize the checkpoint in directory ``model`` into ``out`` and return what was done, printing the plan first.

    Memory is a few times ``chunk_bytes``. The result does not depend on ``chunk_bytes``. Everything that can be checked
    is checked before ``out`` is touched; bad input is a :class:`UserError`.
    """
    checkpoint = Checkpoint(model)
    out = Path(out).resolve()
    jobs = plan_jobs(checkpoint, recipe)
    report = summarize(jobs, recipe.group)
    extras = sidecars(checkpoint.path)
    remove_stale(out)
    check_output(checkpoint.path, out, force, report.output_bytes + sum(file.stat().st_size for file in extras))
    print(f"{checkpoint.path} -> {out}\n{recipe}\n{table(report)}", flush=True)
    with staged_directory(out, force) as partial:
        for file in extras:
            shutil.copyfile(file, partial / file.name)
        for role, error in stream(checkpoint, jobs, recipe, partial, shard_bytes, chunk_bytes).items():
            report.roles[role].relative_error = error
        source = {"name": checkpoint.path.resolve().name, "config_sha256": checkpoint.config_sha256}
        write_json(partial / RECIPE_FILE, {"recipe": recipe.to_json(), "source": source, "report": report.to_json()})
    return report


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True, type=Path, help="checkpoint directory (config.json and safetensors)")
    parser.add_argument("--out", required=True, type=Path, help="directory to make")
    parser.add_argument("--expert-bits", required=True, type=int, help="2..8 for routed experts; 16 leaves them")
    parser.add_argument("--linear-bits", required=True, type=int, help="2..8 for other matrices; 16 leaves them")
    parser.add_argument("--group", type=int, default=128, help="inputs that share a scale (default 128)")
    parser.add_argument("--clip-steps", type=int, default=16, help="ratios tried by the clip search; 1 is absmax")
    parser.add_argument("--force", action="store_true", help="replace an earlier output once the new one is complete")
    parser.add_argument("--shard-gib", type=float, default=4.0, help="largest weight file (default 4)")
    parser.add_argument("--result", type=Path, help="also record the run in this JSON file; needs --tag")
    parser.add_argument("--tag", help="name of the run in its record")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    if bool(args.result) != bool(args.tag):
        raise UserError("--result and --tag go together")
    if not 0 < args.shard_gib < float("inf"):
        raise UserError(f"--shard-gib {args.shard_gib} must be above 0")
    recipe = Recipe(args.expert_bits, args.linear_bits, args.group, args.clip_steps)
    if args.result and args.result.exists() and not args.force:
        raise UserError(f"{args.result}: exists; give another --result, or --force to replace it")
    started = time.time()
    source = describe_model(args.model) if args.result else None
    report = quantize_checkpoint(args.model, args.out, recipe, args.force, int(args.shard_gib * 2**30))
    seconds = time.time() - started
    if args.result:
        write_result(
            args.result, kind="quantize", tag=args.tag, started=started, model=source, recipe=recipe.to_json(),
            metrics=report.to_json(), extra={"output": describe_model(args.out)},
        )  # fmt: skip
    print(f"{table(report)}\nwrote {args.out} in {seconds:.1f} s", flush=True)


if __name__ == "__main__":
    run_cli(main)
