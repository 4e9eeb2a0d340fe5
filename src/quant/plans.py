"""What would become of every tensor of a checkpoint: the plan that a run prints before it writes, and what it reports after.

Not a command. Everything comes from headers: `plan_jobs(Checkpoint(model), recipe)`, `summarize(jobs, recipe)`, and
`quantize_times(jobs, recipe)` from the rates in results/.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import math
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from calibration import LAYERS_AHEAD, Calibration, MemoryPlan
from checkpoint import CONSUMED, PACKED, Checkpoint
from console import UserError, check_writable, write_json
from families import BOTH_ENDS, LAYER_PREFIX, Role, role_in_block, roles_of
from hf_model import check_complete
from hub import AHEAD_BYTES, MAX_SIDECAR_BYTES, WEIGHT_SUFFIXES
from moe_ptq import CALIBRATED, zero_point_bits
from moe_quant import average_bits
from packed_format import describe
from recipe import RECIPE_FILE, Job, Recipe
from run_dir import check_output, partial_of
from safetensors_file import INDEX, TensorInfo
from settings import setting
from size_model import BASE_BYTES, RESULTS, Rates, machine, recorded_rates, records_of, times

CHUNK_BYTES = 64 << 20  # quantized at once, while the next is read and the last written
FLOATS = (torch.bfloat16, torch.float16, torch.float32)


@dataclasses.dataclass(frozen=True)
class RecordSettings:
    """Where a run of quant_save or gguf_pack is recorded, and whether it replaces what is there."""

    tag: str | None = setting(None, "also record the run under this name, in `results/KIND/TAG.json`")
    result: Path | None = setting(None, "in this file instead")
    force: bool = setting(False, "1: replace an earlier output, and record, once the new one is complete")

    def file(self, kind: str) -> Path | None:
        """The record's file; one that exists is a :class:`UserError` without ``force``."""
        if self.result and not self.tag:
            raise UserError("--result and --tag go together")
        file = self.result or (Path("results") / kind / f"{self.tag}.json" if self.tag else None)
        if file and file.exists() and not self.force:
            raise UserError(f"{file}: exists; give another --result, or --force to replace it")
        if file:
            check_writable(file)
        return file


@dataclasses.dataclass(frozen=True)
class ShardSettings:
    """How a checkpoint is divided into files."""

    shard_gib: float = setting(4.0, "largest weight file")

    def __post_init__(self) -> None:
        if not 0 < self.shard_gib < float("inf"):
            raise UserError(f"--shard-gib {self.shard_gib} must be above 0")

    @property
    def bytes(self) -> int:
        return int(self.shard_gib * 2**30)


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
    assert checkpoint.model_type  # its error names the file
    roles = roles_of({name: info.shape for name, info in checkpoint.tensors.items()}, checkpoint.config)
    check_complete(checkpoint)
    parameters = {name: place.parameter for name, place in checkpoint.places.items()}
    for pattern, _ in recipe.overrides:
        if not fnmatch.filter(parameters.values(), pattern):
            raise UserError(f"overrides: {pattern}: no parameter of {checkpoint.path} has such a name")
    allocated = _allocated(checkpoint, recipe)
    jobs = []
    for name, info in checkpoint.tensors.items():
        inner = role_in_block(name, checkpoint.model_type) if roles[name] is Role.MTP else None
        bits = recipe.bits_of(parameters[name], roles[name], inner) if info.numel else None
        by_expert = allocated.get(name, ())
        if by_expert:
            bits = sum(by_expert) / len(by_expert)
        if info.dtype.itemsize == 1 and info.dtype.is_floating_point or bits and info.dtype not in FLOATS:
            raise UserError(f"tensor {name}: dtype {info.dtype} is already quantized; use a BF16, F16 or F32 checkpoint")
        if bits and bits != int(bits) and not by_expert and recipe.method not in CALIBRATED:
            known = ", ".join(CALIBRATED)
            raise UserError(f"tensor {name}: {bits} bits: a mix of two grids needs a calibrated method: {known}")
        each = by_expert if len(by_expert) > 1 else ()
        jobs.append(Job(name, info, roles[name], bits, each, checkpoint.family.is_turned(info.shape), inner))
    inputs = [job.inputs for job in jobs if job.bits]
    if odd := [job for job in jobs if job.bits and job.inputs % recipe.group]:
        raise UserError(
            f"group {recipe.group} does not divide the inputs of {len(odd)} of {len(inputs)} tensors ({odd[0].name}: "
            f"{odd[0].inputs}); choose a --group that divides {math.gcd(*inputs)}, which divides all"
        )
    return jobs


def _allocated(checkpoint: Checkpoint, recipe: Recipe) -> dict[str, tuple[int, ...]]:
    """The bits that ``recipe.experts`` gives to each expert of a fused tensor, or to the one whose matrix a tensor is."""
    known, found, used = dict(recipe.experts), {}, set()
    for name, info in checkpoint.tensors.items() if known else ():
        place = checkpoint.places[name]
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
    weights: dict[str, int] = {}  # those with bits
    for job in jobs:
        entry = roles.setdefault(job.role, RoleReport())
        if job.bits:
            entry.bits = (entry.bits or 0.0) + job.bits * job.info.numel
            weights[job.role] = weights.get(job.role, 0) + job.info.numel
        entry.tensors += 1
        entry.parameters += job.info.numel
        entry.bytes += job.info.bytes
        entry.packed_bytes += job.packed_bytes(recipe)
    for role, entry in roles.items():
        if entry.bits:
            entry.bits = round(entry.bits / weights[role], 4)
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


def copy_sidecars(checkpoint: Checkpoint, files: Sequence[Path], out: Path) -> None:
    """Copy ``files`` beside what is written; config.json says what that is, not in what format the source was published."""
    for file in files:
        shutil.copyfile(file, out / file.name)
    if checkpoint.source_format:
        write_json(out / "config.json", checkpoint.config)


def stored_bytes(infos: Iterable[TensorInfo]) -> int:
    """Bytes that are read for tensors once."""
    return sum(stored.bytes for info in infos for stored in info.stored())


def ends_bytes(checkpoint: Checkpoint) -> int:
    """Bytes of the embedding and of the head, which may be the embedding once more."""
    roles = roles_of({name: info.shape for name, info in checkpoint.tensors.items()}, checkpoint.config)
    sizes = [stored_bytes(checkpoint.tensors[name] for name, own in roles.items() if own is role) for role in BOTH_ENDS]
    return sizes[0] + (sizes[1] or sizes[0])


def layers_fetched(checkpoint: Checkpoint, calibration: Calibration, kept: bool = False) -> tuple[int, int]:
    """(bytes, bytes at a time) that the calibrated pass reads to run the decoder layers. A token power above 0 reads them
    twice more, forward and back to the second, with both ends, unless the tokens' weights are ``kept`` in a file."""
    sizes: dict[int, int] = {}
    for name, place in checkpoint.places.items():
        if match := LAYER_PREFIX.match(place.parameter):
            sizes[int(match[1])] = sizes.get(int(match[1]), 0) + stored_bytes([checkpoint.tensors[name]])
    total = sum(sizes.values())
    if calibration.token_power and not kept:
        total += 2 * total - sizes.get(0, 0) + ends_bytes(checkpoint)
    return total, (1 + LAYERS_AHEAD) * max(sizes.values(), default=0)


def sensed_bytes(checkpoint: Checkpoint, calibration: Calibration) -> int:
    """Bytes that sensitivity.type_losses reads: the layers, and both ends."""
    return layers_fetched(checkpoint, calibration)[0] + ends_bytes(checkpoint)


def fetched_bytes(
    checkpoint: Checkpoint, calibration: Calibration | None, once: Iterable[str], heads: Iterable[str], tied: bool,
    weights_file: Path | None = None,
) -> tuple[int, int]:  # fmt: skip
    """(bytes, bytes at a time) that a run reads: the tensors ``once`` as they are written; with ``calibration`` the layers that
    it runs, and what of ``heads`` it rounds, a head that is ``tied`` to the embedding to embed as well."""
    total = stored_bytes(checkpoint.tensors[name] for name in once)
    if not calibration:
        return total, AHEAD_BYTES
    layers, ahead = layers_fetched(checkpoint, calibration, bool(weights_file and weights_file.exists()))
    return total + layers + (1 + tied) * stored_bytes(checkpoint.tensors[name] for name in heads), ahead


def reads(jobs: Sequence[Job]) -> tuple[list[str], list[str], bool]:
    """Of :func:`fetched_bytes`: what quantize_checkpoint reads once (what it rounds, for its error), its head, whether tied."""
    tied = not any(job.role is Role.LM_HEAD for job in jobs)
    head = Role.EMBEDDING if tied else Role.LM_HEAD
    return [job.name for job in jobs], [job.name for job in jobs if job.bits and job.role is head], tied


def hub_plan(checkpoint: Checkpoint, fetched: int, ahead: int, whole: bool = False) -> str:
    """What a run fetches of a model of the hub, ``ahead`` bytes of it at a time, as lines of text. ``whole``: every shard
    passes whole and in order."""
    assert checkpoint.remote
    size, limit = checkpoint.bytes, checkpoint.remote.cache.limit
    text = f"{checkpoint.remote.uri}: {len(checkpoint.files)} shards, {size / 1e9:,.2f} GB; {fetched / 1e9:,.3f} GB to fetch"
    if fetched > 1.01 * size:
        kept = f"HUB_CACHE_GIB={limit / 2**30:g} may save some" if limit else "HUB_CACHE_GIB=X keeps X GiB of them on disk"
        text += f", since some weights are read several times ({kept})"
    checked = "the SHA-256 of every shard is checked as it passes"
    if not whole or checkpoint.source_format:
        checked = "no shard passes whole and in order: its SHA-256 is not checked; headers, lengths and the commit are"
    return f"{text}\nat most {ahead / 2**30:.1f} GiB of it wait in memory; {checked}"


def preflight(
    jobs: list[Job], out: Path, needed: int, chunk_bytes: int, calibrated: MemoryPlan | None, devices: int = 1
) -> str:
    """What the run will need, said before it starts: disk, and the bound on memory."""
    ancestor = next(parent for parent in out.parents if parent.exists())
    largest = max((job.info.bytes // job.info.shape[0] for job in jobs if job.info.shape and job.info.numel), default=0)
    memory = BASE_BYTES + 4 * max(chunk_bytes, largest) * (1 if calibrated else devices)
    if calibrated:
        memory += calibrated.host
    free = shutil.disk_usage(ancestor).free
    line = f"disk {needed / 1e9:.2f} GB of {free / 1e9:.2f} GB free; memory at most about {memory / 2**30:.1f} GiB"
    return "\n".join([line, *(calibrated.lines if calibrated else ())])


def bench_rates(results: Path, recipe: Recipe) -> Rates:
    """Parameters a second that bench.sh measured for a method: the grid alone, or one layer of a mixture of experts."""
    found: Rates = {}
    for file, record in records_of(results, "bench"):
        grids, layer = record["metrics"].get("grids", {}), record["metrics"].get("layer", {})
        grid = f"clip16_int{recipe.expert_bits:g}" if recipe.method == "clip" else f"{recipe.method}_int{recipe.expert_bits:g}"
        if recipe.method in layer:
            weights = layer["experts"] * sum(math.prod(shape) for shape in layer["shapes"])
            found[machine(record)] = (weights / (layer["statistics_s"] + layer[recipe.method]["seconds"]), file)
        elif grid in grids:
            found[machine(record)] = (1e9 * grids[grid], file)
    return found


def quantize_times(jobs: Sequence[Job], recipe: Recipe) -> list[str]:
    """How long the rounding would take where it was measured, as lines of text."""

    def rounded(record: Mapping[str, Any]) -> float:
        roles = record["metrics"].get("roles", {})
        same = record["recipe"].get("method") == recipe.method
        return sum(role["parameters"] for role in roles.values() if role["bits"]) if same else 0

    rates = recorded_rates(RESULTS, "quantize", rounded) | bench_rates(RESULTS, recipe)
    head = "time of the rounding, extrapolated from recorded rates (reading and writing at the disk's speed on top):"
    return [head, *times(rates, sum(job.info.numel for job in jobs if job.bits), recipe.method)]


def dry_run_notes(model: Path, out: Path, force: bool, needed: int) -> list[str]:
    """How a dry run ends: what stands in the way of the output, as notes."""
    notes = [f"note: {partial_of(out)} holds an unfinished run, which goes on"] if partial_of(out).exists() else []
    try:
        check_output(model, out, force, needed)
    except UserError as error:
        notes.append(f"note: the run would stop: {error}")
    return [*notes, "dry run: nothing was written"]
