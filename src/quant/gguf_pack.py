"""Safetensors straight to a GGUF for stock llama.cpp: calibrated, rounded and written layer by layer in one pass.

    python src/quant/gguf_pack.py --model models/razor-tiny --out work/iq3 --base-type IQ3_XXS --method ldlq \
        [--tensor-types configs/gguf_tensor_types_iq3.txt] [--calib FILE] [--dequant-out DIR] [--dry-run] [--result F --tag T]
    python src/quant/gguf_pack.py --model work/recovered --out work/gguf --base-type BF16 --method nearest \
        --blocks work/recovered/ggml.safetensors
    MODEL=models/razor-tiny OUT=work/iq3 python src/quant/gguf_pack.py --config configs/gguf_iq3.env    # pipelines/pack_gguf.sh

Types: the first pattern of --tensor-types that matches a tensor's name, else --base-type; --target-gib measures and chooses
them. Methods: ldlq (error feedback over the second moments of the inputs) and nearest (their diagonal as importance, or
--imatrix FILE without any calibration). --blocks takes the experts as merge_adapter packed them, byte for byte, and rounds the
rest to nearest without calibration. --reference makes the file by llama.cpp's own tools. OUT holds NAME-TYPE.gguf (with
--split-gib N files NAME-TYPE-00001-of-0000N.gguf, of which every reader takes the first), recipe.json and, for a model with a
vision tower, NAME-mmproj-f16.gguf. It appears when it is complete; after `kill -9` the same command
goes on where it stopped and ends with the same bytes.
"""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

from calibrated_pass import CalibratedPass
from calibration import Calibration, LayerStream
from calibration_text import CalibrationSettings
from checkpoint import Checkpoint, model_name
from console import UserError, explained, files_sha256, progress, run_cli, write_json
from gguf_dequant import dequantize
from gguf_format import GgufWriter, read_imatrix
from gguf_layout import MTP_PATTERN, MTP_TYPE, patterns_of, read_patterns
from hf_model import check_first
from hub import HubSettings, opened, remote_of
from pack_plan import (
    Blocks,
    GgufSink,
    Pack,
    SizeSettings,
    TypeSettings,
    left_out,
    pack_memory,
    pack_times,
    plan_pack,
    reads,
    report,
    table,
    write_mmproj,
)
from pack_reference import check_loads, make_reference
from plans import RecordSettings, dry_run_notes, fetched_bytes, hub_plan, sensed_bytes
from recipe import RECIPE_FILE, quantized_note
from records import DECODED_MARK, describe_model, write_result
from rounders import GgmlRounder, RoundingSettings
from run_dir import RUN, alone, beside, check_output, check_resume, staged_directory
from sensitivity import Chosen, allocate_types, chosen_once
from settings import add_dry_run, parse_settings, part, same, setting
from size_model import BASE_BYTES
from token_weights import kept_bytes

STATE = "written.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class PackSettings:
    """The keys of configs/gguf_iq3.env."""

    model: Path = setting(help="the checkpoint directory (config.json and safetensors)")
    out: Path = setting(help="the directory to make")
    types: TypeSettings = part(TypeSettings)
    rounding: RoundingSettings = part(RoundingSettings)
    text: CalibrationSettings = part(CalibrationSettings)
    hub: HubSettings = part(HubSettings)
    blocks: Path | None = setting(None, "ggml.safetensors of merge_adapter: the experts, as they are there")
    imatrix: Path | None = setting(None, "importance of llama-imatrix or moe_probe, instead of calibration")
    target_gib: float = same(SizeSettings, "target_gib", 0.0)
    protected: Path | None = setting(None, "file of what `TARGET_GIB` does not choose")
    mtp: bool = setting(True, "the block of multi-token prediction, where the checkpoint has one; 0 leaves it out")
    dequant_out: Path | None = setting(None, "a directory: also write what the file holds as a BF16 checkpoint")
    reference: bool = setting(False, "1: by llama.cpp's own converter, imatrix and llama-quantize")
    split_gib: float = setting(0.0, "above 0: files NAME-00001-of-0000N.gguf of at most so much (as llama-gguf-split)")
    strict: bool = setting(False, "1: refuse where a tensor's rows do not fit the type that is asked for it")
    record: RecordSettings = part(RecordSettings)

    def __post_init__(self) -> None:
        if not 0 <= self.target_gib < float("inf"):
            raise UserError(f"TARGET_GIB={self.target_gib}: must be above 0 (or 0 for the types of the recipe)")
        if not 0 <= self.split_gib < float("inf"):
            raise UserError(f"SPLIT_GIB={self.split_gib}: must be above 0 (or 0 for one file)")
        if self.reference and self.split_gib:
            raise UserError("SPLIT_GIB with REFERENCE=1: llama.cpp's own llama-gguf-split splits the reference's file")
        if self.reference and self.dequant_out:
            raise UserError("DEQUANT_OUT with REFERENCE=1: run src/quant/gguf_dequant.py on the reference's file")

    @property
    def block(self) -> str:
        """What the file holds of multi-token prediction, as gguf_layout.traced says it."""
        return "file" if self.mtp else "none"

    def calibration(self, method: str, dry_run: bool = False) -> Calibration:
        """What the method is calibrated on; a dry run needs its size alone."""
        ids, entry = self.text.size(self.model) if dry_run else self.text.ids(self.model)
        moments = self.rounding.moments
        power = 0.0 if method == "nearest" else moments.token_power
        return Calibration(ids, entry, token_power=power, shrinkage=moments.shrinkage)


def check_places(settings: PackSettings) -> None:
    """Raise :class:`UserError` on an output that cannot be where it is asked for, before any work. Touches nothing."""
    out, force = settings.out.resolve(), settings.record.force
    if not settings.reference:
        check_output(settings.model, out, force, 0)
    if settings.dequant_out:
        other = settings.dequant_out.resolve()
        with explained("DEQUANT_OUT"):
            if other == out or other in out.parents or out in other.parents:
                raise UserError(f"{other}: is --out itself, or a directory inside or around it; choose another")
            check_output(settings.model, other, force, Checkpoint(settings.model).bytes, DECODED_MARK)


def allocated_types(settings: PackSettings, calibration: Calibration) -> tuple[PackSettings, dict[str, Any]]:
    """The settings with types that fit --target-gib, chosen into a file beside the output, and the metrics of the choice."""
    types, checkpoint = beside(settings.out, "types.txt"), Checkpoint(settings.model)
    rounding, patterns = settings.rounding, read_patterns(settings.protected) if settings.protected else []
    method, damping, hand = rounding.method, rounding.moments.damping, (settings.types.base, settings.types.patterns())
    made_of: dict[str, Any] = {"source": checkpoint.identity, "calibration": calibration.settings(), "fixed": patterns}
    made_of["hand"] = hand
    made_of |= {"method": method, "damping": damping, "gib": settings.target_gib} | ({} if settings.mtp else {"mtp": False})

    def choose() -> Chosen:
        return allocate_types(
            checkpoint, calibration, settings.target_gib, patterns, method=method, damping=damping,
            weights_file=rounding.token_weights, mtp=settings.block, hand=hand,
        )  # fmt: skip

    metrics = chosen_once(settings.out, types, settings.record.force, made_of, choose)
    return dataclasses.replace(settings, types=dataclasses.replace(settings.types, tensor_types=types), target_gib=0.0), metrics


def prepare(settings: PackSettings, dry_run: bool, calibration: Calibration | None = None) -> tuple[Pack, list[str]]:
    """The pack that the settings describe, and notes on substituted types; a dry run reads no text. ``calibration``: what has
    been read already."""
    types, method, checkpoint = settings.types, settings.rounding.method, Checkpoint(settings.model)
    importance = read_imatrix(settings.imatrix)[0] if settings.imatrix else None
    blocks = Blocks(settings.blocks) if settings.blocks else None
    method = "nearest" if settings.reference else method
    pack, notes = plan_pack(
        checkpoint, types.base, types.patterns(), method, None, importance, blocks, settings.block, settings.strict
    )
    pack = dataclasses.replace(pack, split=round(settings.split_gib * 2**30))
    pack = pack.seen_whole() if settings.reference else pack
    if not (pack.is_calibrated or settings.reference):
        return pack, notes
    calibration, moments = calibration or settings.calibration(method, dry_run), settings.rounding.moments
    kept = settings.rounding.token_weights
    return dataclasses.replace(pack, calibration=calibration, damping=moments.damping, weights_file=kept), notes


def write_pack(
    pack: Pack, out: Path, force: bool = False, dequant_out: Path | None = None, header: bytes | None = None,
    dry_run: str | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Write ``pack`` into the directory ``out`` and return its report, printing the plan first; a killed run resumes to the
    same bytes. ``dequant_out``: also as a BF16 checkpoint. ``header``: of the file, where llama.cpp's converter is not here.
    ``dry_run``, the method whose recorded times are shown, ends after the plan."""
    out, checkpoint = out.resolve(), pack.checkpoint
    needed = pack.data_bytes + checkpoint.config.get("vocab_size", 0) * 64 + (1 << 20)  # the header holds the vocabulary
    needed += kept_bytes(checkpoint, pack.calibration)
    settings, resumed = {}, False
    if dry_run is None:
        check_output(checkpoint.path, out, force, needed + (checkpoint.bytes if dequant_out else 0))
        settings = pack.settings()
        resumed = check_resume(out, settings)
    print(quantized_note(checkpoint.path), end="")
    print(f"{checkpoint.path} -> {out / pack.file_name}{' (resumed)' if resumed else ''}")
    print(f"method {dry_run or pack.method}, base type {pack.base}\n{table(report(pack, pack.data_bytes))}")
    if pack.split:
        print(f"split: {pack.split_text()}")
    if checkpoint.remote:
        print(hub_plan(checkpoint, *fetched_bytes(checkpoint, pack.calibration, *reads(pack), pack.weights_file)))
    if pack.calibration:
        print("calibration: {:,} sequences of {:,} tokens".format(*pack.calibration.ids.shape))
    memory = pack_memory(pack, dry_run is not None)
    host = (BASE_BYTES + memory.host) / 2**30
    print("\n".join([f"disk {needed / 1e9:.2f} GB; memory at most about {host:.1f} GiB", *memory.lines]), flush=True)
    if dequant_out:
        print(f"then {dequant_out}: {checkpoint.bytes / 1e9:.2f} GB in BF16", flush=True)
    if dry_run is not None:
        notes = dry_run_notes(checkpoint.path, out, force, needed)
        print("\n".join([*pack_times(pack, dry_run), *notes]), flush=True)
        return report(pack, pack.data_bytes)
    check_first(checkpoint)
    with staged_directory(out, force, settings) as partial:
        mmproj = write_mmproj(checkpoint, partial)  # what the converter cannot do is known before the work
        path, plan = partial / pack.file_name, [(piece.name, pack.bytes_of(piece)) for piece in pack.pieces]
        header = header or pack.header(partial / RUN)
        work, facts = None, None
        if pack.calibration:
            stream = LayerStream(checkpoint, pack.calibration.device, pack.calibration.dtype)
            rounder = GgmlRounder(pack.pieces, pack.types, pack.method, pack.damping, pack.fed, memory.working_bytes)
            work = CalibratedPass(stream, pack.calibration, rounder, partial, pack.weights_file)
        with (
            progress(sum(size for _, size in plan), "pack", "B", True) as bar,
            GgufWriter(path, pack.parts(header), plan, partial / RUN / STATE) as writer,
        ):
            sink = GgufSink(pack, writer, bar)
            if work:
                facts = work.run(sink) | {"relative_output_error": sink.relative_errors()}
            else:
                sink.write_data_free()
        path, files = writer.files[0], writer.files
        made = report(pack, sum(file.stat().st_size for file in files)) | {"file": path.name, "calibration": facts}
        made |= {"parts": {file.name: file.stat().st_size for file in files}} if pack.split else {}
        made["sha256"] = files_sha256(files)
        made["mmproj"] = mmproj
        check_loads(path)
        source = {"name": model_name(checkpoint.path), "config_sha256": checkpoint.config_sha256, **checkpoint.hub}
        recipe = {"recipe": pack.recipe(), "source": source, "calibration": settings["calibration"]}
        write_json(partial / RECIPE_FILE, recipe | {"report": made})
    if checkpoint.remote:
        print(checkpoint.remote.report(), flush=True)
    if dequant_out:
        dequantize(out / made["file"], checkpoint.path, dequant_out, force)
    return made


def main() -> None:
    settings, args = parse_settings(PackSettings, __doc__, add_dry_run)
    result, started, force = settings.record.file("pack"), time.time(), settings.record.force
    settings, calibration, kept, metrics = opened(settings), None, None, dict[str, Any]()
    if settings.reference and (remote := remote_of(settings.model)):
        raise UserError(f"REFERENCE=1: llama.cpp's own tools read weights from a disk; download {remote.uri} first")
    if not args.dry_run:
        check_places(settings)
    if settings.target_gib and args.dry_run:
        print(f"TARGET_GIB={settings.target_gib:g}: the types below are the recipe's, the run measures and chooses its own")
        if (checkpoint := Checkpoint(settings.model)).remote:
            print(
                f"which fetches {sensed_bytes(checkpoint, settings.calibration(settings.rounding.method, True)) / 1e9:,.2f} GB"
            )
    elif settings.target_gib:
        calibration = settings.calibration(settings.rounding.method)
        if calibration.token_power and not settings.rounding.token_weights:  # weighed once, for both
            kept = beside(settings.out, "token-weights.st")
            settings = dataclasses.replace(settings, rounding=dataclasses.replace(settings.rounding, token_weights=kept))
        settings, metrics = allocated_types(settings, calibration)
    pack, notes = prepare(settings, args.dry_run, calibration)
    print("".join(f"{note}\n" for note in notes + left_out(pack.checkpoint, pack.pieces)), end="", flush=True)
    source, recipe = describe_model(settings.model) if result else None, pack.recipe()
    if settings.reference:
        recipe["method"] = "llama-quantize"
    if args.dry_run:
        write_pack(pack, settings.out, force, settings.dequant_out, dry_run=recipe["method"])
        return
    if settings.reference and pack.calibration:
        with alone(settings.out.resolve()):
            patterns = patterns_of([*settings.types.patterns(), (MTP_PATTERN, MTP_TYPE)], pack.pieces)
            made = make_reference(pack, pack.calibration, settings.out, patterns, force)
    else:
        made = write_pack(pack, settings.out, force, settings.dequant_out)
    if kept:
        kept.unlink(missing_ok=True)
    if metrics:
        made["allocation"] = metrics
    if result:
        write_result(
            result, kind="pack", tag=settings.record.tag, started=started, model=source, recipe=recipe,
            data=[pack.calibration.record] if pack.calibration else [], metrics=made,
        )  # fmt: skip
    print(f"{table(made)}\nwrote {settings.out / made['file']} in {time.time() - started:.1f} s", flush=True)


if __name__ == "__main__":
    run_cli(main)
