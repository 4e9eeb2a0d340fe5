"""Quantize a checkpoint into one of the same names, shapes and dtypes, in a single streamed pass.

    python src/quant/quant_save.py --model models/razor-tiny --expert-bits 3 --linear-bits 4 --group 128 \
        --method gptq_refit --out out/razor-tiny-w3 [--calib FILE] [--packed] [--force] [--dry-run]
        [--devices cuda:0,cuda:1 | all] [--result results/quantize/w3.json --tag w3]
    METHOD=gptq_refit OUT=work/w3 python src/quant/quant_save.py --config configs/clip_122b.env     # pipelines/quantize.sh

Routed experts get --expert-bits; every other linear, the embedding and the head --linear-bits; the matrices of multi-token
prediction --mtp-bits; router, norms, ssm state, biases and vision are copied byte for byte. --target-gib chooses the bits of
all but the copied ones and mtp, by the KL that each costs (sensitivity). Methods that need no inputs (clip, absmax, ...) stream
tensor by tensor; the calibrated ones (gptq, ...) layer by layer, on --calib or, for razor-tiny, its tasks' training split.
Several --devices round shards (or, calibrated, the experts of a layer) at the same time, to the same bytes.
recipe.json is written beside the weights. --packed writes codes of the recipe's own bits, as vLLM reads them, and leaves what
has no such form unrounded (docs/PACKED.md). The output appears under its name only when it is complete; Ctrl-C or an error
leaves nothing behind, and after `kill -9` the same command goes on where it stopped.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from calibrated_pass import CalibratedPass, MomentSettings
from calibration import Calibration, LayerStream, plan_memory
from calibration_text import CalibrationSettings
from checkpoint import CONSUMED, Checkpoint, SourceShards, is_synthetic, model_name
from console import UserError, progress, run_cli, write_json
from devices import default_device, device_peaks, lanes, parse_devices
from hf_model import check_first
from hub import HubSettings, opened, remote_of
from moe_probe import probe_model
from moe_ptq import CALIBRATED, WORKING_BYTES
from pack_plan import SizeSettings
from packed_format import Container, PackingSettings, open_writer, plan_container, summary
from plans import (
    CHUNK_BYTES,
    QuantizeReport,
    RecordSettings,
    ShardSettings,
    copy_sidecars,
    dry_run_notes,
    fetched_bytes,
    hub_plan,
    plan_jobs,
    preflight,
    quantize_times,
    reads,
    sidecars,
    summarize,
    table,
)  # fmt: skip
from recipe import NOT_GIVEN, RECIPE_FILE, Job, Recipe, quantized_note, read_allocation
from records import describe_model, write_result
from rounders import GridRounder, is_uncalibrated
from run_dir import beside, check_output, check_resume, staged_directory
from sensitivity import Chosen, allocate_bits, chosen_once
from settings import add_dry_run, parse_settings, part, same, setting
from token_weights import kept_bytes
from write_checkpoint import ErrorLog, LayerSink, Sink, in_layers, sample_seconds, stream


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantizeSettings:
    """The keys of configs/clip_122b.env."""

    model: Path = setting(help="the checkpoint directory (config.json and safetensors)")
    out: Path = setting(help="the directory to make")
    recipe: Recipe = part(Recipe, expert_bits=NOT_GIVEN)
    allocation: Path | None = setting(None, "JSON of bits by parameter, as `TARGET_GIB` writes it, in place of the recipe's")
    target_gib: float = same(SizeSettings, "target_gib", 0.0)
    text: CalibrationSettings = part(CalibrationSettings)
    moments: MomentSettings = part(MomentSettings)
    propagate: str = setting("quantized", "with text: whose activations go on, `quantized` or `bf16`", ("quantized", "bf16"))
    packed: bool = setting(False, "1: the codes, for vLLM ([docs/PACKED.md](../docs/PACKED.md)), instead of BF16")
    packing: PackingSettings = part(PackingSettings)
    hub: HubSettings = part(HubSettings)
    devices: str = setting("", "`cuda:0,cuda:1` or `all`: several GPUs, to the same bytes; empty: the first one, or the CPU")
    shards: ShardSettings = part(ShardSettings)
    consume_source: bool = setting(
        False, "1: give the disk of the source back as it is read, and delete it: only of a synthetic checkpoint"
    )
    consume_real_source: bool = setting(False, "1: the same for any checkpoint: it will be gone")
    probe: bool = setting(False, "1: show routing and salience first")
    record: RecordSettings = part(RecordSettings)

    def __post_init__(self) -> None:
        known = ", ".join(CALIBRATED)
        if any(dataclasses.astuple(self.moments)) and not self.calibrated:
            raise UserError(f"--token-power, --damping, --shrinkage: of a calibrated method: {known}")
        if not 0 <= self.target_gib < float("inf"):
            raise UserError(f"TARGET_GIB={self.target_gib}: must be above 0 (or 0 for the bits of the recipe)")
        if self.target_gib and self.allocation:
            raise UserError("TARGET_GIB chooses the bits that --allocation gives: leave one of them out")
        if self.consume_source and not (self.consume_real_source or is_synthetic(self.model)):
            raise UserError(
                f"--consume-source: {self.model} is not of synthetic_moe.py; "
                "--consume-real-source would delete its weights for good"
            )

    @property
    def calibrated(self) -> bool:
        return self.recipe.method in CALIBRATED

    @property
    def consume(self) -> bool:
        return self.consume_source or self.consume_real_source

    def workers(self) -> tuple[torch.device, ...]:
        """The devices at work, one of them as often as shards should be on it."""
        devices = parse_devices(self.devices)
        alone = self.devices or self.calibrated or self.consume or remote_of(self.model)  # a network is no faster for more
        return devices if alone else lanes(devices[0])

    def read(self, device: torch.device, dry_run: bool) -> Calibration | None:
        """The text and how it counts, where the method or the choice of bits needs it; a dry run needs its size alone."""
        if not self.calibrated and (dry_run or not self.target_gib):
            return None
        Checkpoint(self.model)  # its errors first: they are clearer than a tokenizer's
        ids, entry = self.text.size(self.model) if dry_run else self.text.ids(self.model)
        how = dataclasses.asdict(self.moments) | {"propagate": self.propagate}
        return Calibration(ids, entry, **how, device=device)


def allocated_bits(settings: QuantizeSettings, calibration: Calibration, kept: Path) -> tuple[Path, dict[str, Any]]:
    """The file beside the output of bits that fit --target-gib, and the metrics of the choice. ``kept``: for the tokens'
    weights."""
    path, checkpoint = beside(settings.out, "bits.json"), Checkpoint(settings.model)
    recipe, gib = settings.recipe, settings.target_gib
    packed_bits = settings.packing.packed_bits if settings.packed else None
    made_of: dict[str, Any] = {"source": checkpoint.identity, "calibration": calibration.settings(), "recipe": recipe.to_json()}
    made_of |= {"gib": gib, "packed": packed_bits}

    def choose() -> Chosen:
        return allocate_bits(checkpoint, calibration, recipe, gib, packed_bits, kept)

    return path, chosen_once(settings.out, path, settings.record.force, made_of, choose)


def write_calibrated(
    checkpoint: Checkpoint, jobs: list[Job], recipe: Recipe, calibration: Calibration, out: Path, shard_bytes: int,
    chunk_bytes: int, source: SourceShards | None, devices: Sequence[torch.device], container: Container | None,
    working_bytes: float | None, weights_file: Path | None,
) -> tuple[dict[str, float], dict[str, Any]]:  # fmt: skip
    """Write every tensor to ``out``, layer by layer, each layer shards of its own; several ``devices`` share the experts of a
    layer. Returns the relative squared error of each quantized role and the facts of the calibration."""
    layers = LayerStream(checkpoint, calibration.device, calibration.dtype)
    rounder = GridRounder(layers, jobs, recipe, devices, working_bytes)
    work = CalibratedPass(layers, calibration, rounder, out, weights_file)
    last = checkpoint.sources[layers.tied] if layers.tied in rounder.targets else ()
    parts = in_layers(jobs, len(layers.layers), last)
    plan = [(job.name, job.info.dtype, job.info.shape) for part in parts for job in part]
    breaks = {part[0].name for part in parts if part}
    errors = ErrorLog(out)
    with (
        progress(sum(job.info.bytes for job in jobs), "quantize", "B", True) as bar,
        open_writer(out, plan, shard_bytes, breaks, container) as writer,
    ):
        sink = Sink(checkpoint, writer, errors, bar, None, calibration.device)
        facts = work.run(LayerSink(sink, parts, recipe, chunk_bytes, source))
    return errors.by_role(jobs), facts


def quantize_checkpoint(
    model: str | Path, out: str | Path, recipe: Recipe, force: bool = False, shard_bytes: int = 4 << 30,
    chunk_bytes: int = CHUNK_BYTES, calibration: Calibration | None = None, devices: Sequence[torch.device] = (),
    consume: bool = False, packed: bool = False, dry_run: bool = False, packed_bits: int = 2, weights_file: Path | None = None,
) -> QuantizeReport:  # fmt: skip
    """Quantize the checkpoint in directory ``model`` into ``out`` and return what was done, printing the plan first.

    Memory is a few times ``chunk_bytes``; with ``calibration``, which the calibrated methods need, it is that of
    calibration.plan_memory. The result does not depend on ``chunk_bytes``, nor on how many ``devices`` of
    one kind there are (default: one). Everything that can be checked is checked before ``out`` is touched; bad input is a
    :class:`UserError`. A killed run resumes to the same bytes, on as many devices as you like.
    ``consume`` gives the disk of each shard of ``model`` back once ``out`` has it, and deletes the weights at the end.
    ``packed`` stores the result as codes of ``packed_bits`` or more. ``dry_run`` ends after the plan. ``weights_file``: of the
    tokens' weights, kept for other runs.
    """
    devices = tuple(devices) or (calibration.device if calibration else default_device(),)
    if (recipe.method in CALIBRATED) != (calibration is not None):
        raise UserError(f"method {recipe.method}: {'needs' if calibration is None else 'takes no'} calibration tokens")
    checkpoint = Checkpoint(model)
    out = Path(out).resolve()
    jobs = plan_jobs(checkpoint, recipe)
    recipe = recipe.fitting(job.role for job in jobs)
    container = plan_container(jobs, recipe, least=packed_bits, ends=checkpoint.family.packed_ends) if packed else None
    if container:  # what it stores in BF16 gains nothing by being rounded
        jobs = [dataclasses.replace(job, bits=None, by_expert=()) if job.name in container.kept else job for job in jobs]
    report = summarize(jobs, recipe)
    report = dataclasses.replace(report, container=summary(jobs, container) if container else None)
    extras = sidecars(checkpoint.path)
    written = report.container["bytes"] if report.container else report.output_bytes
    if consume and checkpoint.source_format:
        raise UserError(f"{checkpoint.path}: {checkpoint.source_format} weights are not consumed; leave out --consume-source")
    if consume and checkpoint.remote:
        raise UserError(f"{checkpoint.remote.uri}: there is no disk to give back; leave out --consume-source")
    source = SourceShards(checkpoint, out) if consume else None
    if not consume and (checkpoint.path / CONSUMED).exists():
        raise UserError(f"{checkpoint.path}: its weights were consumed by another run; make or download it again")
    needed = written + sum(file.stat().st_size for file in extras)
    if consume:  # the disk needs room for what the output is ahead of the source by
        needed = min(needed, len(devices) * (3 * max(f.stat().st_size for f in checkpoint.files) + 2 * shard_bytes))
    needed += kept_bytes(checkpoint, calibration)
    if not dry_run:
        check_output(checkpoint.path, out, force, needed)
    memory = plan_memory(jobs, calibration, devices, dry_run) if calibration else None
    settings = {
        "packed": packed and packed_bits,
        "recipe": recipe.to_json(),
        "source": {} if dry_run else checkpoint.identity,
        "shard_bytes": shard_bytes,
        "calibration": calibration.settings() if calibration else None,
    }
    if memory and memory.working_bytes not in (None, WORKING_BYTES["cuda"]):  # pieces of another size may round a tie otherwise
        settings["working_bytes"] = memory.working_bytes
    resumed = not dry_run and check_resume(out, settings)
    print(quantized_note(checkpoint.path), end="")
    print(f"{checkpoint.path} -> {out}{' (resumed)' if resumed else ''}\n{recipe}\n{table(report)}")
    if calibration:
        sequences, length = calibration.ids.shape
        print(f"calibration: {sequences:,} sequences of {length:,} tokens, layer by layer")
        if any(job.bits and is_uncalibrated(job, checkpoint.model_type) for job in jobs):
            print("note: this family's block of multi-token prediction is not run; it is rounded without calibration (clip)")
    if checkpoint.remote:
        print(
            hub_plan(
                checkpoint,
                *fetched_bytes(checkpoint, calibration, *reads(jobs), weights_file),
                len(devices) == 1 and not calibration and not resumed,
            )
        )
    print(preflight(jobs, out, needed, chunk_bytes, memory, len(devices)))
    print("\n".join(quantize_times(jobs, recipe)), flush=True)
    if dry_run:
        print("\n".join(dry_run_notes(checkpoint.path, out, force, needed)), flush=True)
        return report
    if not calibration:
        seconds = max(sample_seconds(jobs, recipe, device) for device in set(devices)) / len(set(devices))
        print(f"about {seconds:.2g} s of arithmetic at the speed of a sample; the disk comes on top", flush=True)
    if not resumed:  # a source that is consumed reads as zeros by now
        check_first(checkpoint)
    with staged_directory(out, force, settings) as partial:
        if source:
            source.begin(resumed)
        copy_sidecars(checkpoint, extras, partial)
        if calibration and memory:
            errors, facts = write_calibrated(
                checkpoint, jobs, recipe, calibration, partial, shard_bytes, chunk_bytes, source, devices, container,
                memory.working_bytes, weights_file,
            )  # fmt: skip
            report = dataclasses.replace(report, calibration=facts)
        else:
            errors = stream(checkpoint, jobs, recipe, partial, shard_bytes, chunk_bytes, source, devices, container)
        for role, error in errors.items():
            report.roles[role].relative_error = error
        origin = {"name": model_name(checkpoint.path), "config_sha256": checkpoint.config_sha256, **checkpoint.hub}
        made = {"recipe": recipe.to_json(), "source": origin, "calibration": settings["calibration"]}
        write_json(partial / RECIPE_FILE, made | {"report": report.to_json()})
    if source:
        source.remove()
    if checkpoint.remote:
        print(checkpoint.remote.report(), flush=True)
    return report


def main() -> None:
    settings, args = parse_settings(QuantizeSettings, __doc__, add_dry_run)
    result, settings = settings.record.file("quantize"), opened(settings)
    devices, chosen, metrics = settings.workers(), settings.allocation, dict[str, Any]()
    kept = beside(settings.out, "token-weights.st") if settings.target_gib else None
    if settings.target_gib and args.dry_run:
        print(f"TARGET_GIB={settings.target_gib:g}: the bits below are the recipe's, the run measures and chooses its own")
    elif settings.target_gib:
        check_output(settings.model, settings.out.resolve(), settings.record.force, 0)
    calibration = settings.read(devices[0], args.dry_run)
    if settings.target_gib and calibration and kept and not args.dry_run:
        chosen, metrics = allocated_bits(settings, calibration, kept)
    allocation: dict[str, Any] = read_allocation(chosen) if chosen else {}
    recipe = dataclasses.replace(settings.recipe, **allocation)
    if settings.probe and not args.dry_run:
        probe_model(settings.model, calibration or Calibration(*settings.text.ids(settings.model)))
    started = time.time()
    described = describe_model(settings.model) if result else None
    report = quantize_checkpoint(
        settings.model, settings.out, recipe, settings.record.force, settings.shards.bytes,
        calibration=calibration if settings.calibrated else None, devices=devices, consume=settings.consume,
        packed=settings.packed, dry_run=args.dry_run, packed_bits=settings.packing.packed_bits, weights_file=kept,
    )  # fmt: skip
    if args.dry_run:
        return
    if kept:
        kept.unlink(missing_ok=True)
    seconds = time.time() - started
    if result:
        write_result(
            result, kind="quantize", tag=settings.record.tag, started=started, model=described,
            recipe=recipe.fitting(report.roles).to_json(), data=[calibration.record] if calibration else [],
            metrics=report.to_json() | ({"allocation": metrics} if metrics else {}),
            extra={"output": describe_model(settings.out), "devices": [str(device) for device in devices],
                   "device_peak_mib": device_peaks(devices)},
        )  # fmt: skip
    print(f"{table(report)}\nwrote {settings.out} in {seconds:.1f} s", flush=True)


if __name__ == "__main__":
    run_cli(main)
