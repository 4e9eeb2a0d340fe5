"""Which signal should decide who gets more bits: every order of the experts, allocated, quantized and judged by KL.

    python src/quant/moe_study.py --model models/razor-tiny --name razor_tiny [--expert-bits 3] [--methods clip,gptq_refit]
        [--strategies random,inverse,frequency,wmass,asal,wfro,composite] [--work work]

The signals are measured once; sensitivity.py says what the strategies are. For each of them and each rounding method a
checkpoint of the same size is made in WORK/TAG, TAG being NAME_int3STRATEGY_int4_METHOD, and recorded in
results/quantize/TAG.json; its KL to the model on held-out transcripts is in results/kl/TAG.json. What has its records is not
done again, so a killed run goes on. The last lines are the table, the least KL first.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from calibration import Calibration
from calibration_text import CalibrationSettings
from checkpoint import Checkpoint, different_file
from console import UserError, check_writable, progress, read_json, run_cli, write_json
from devices import default_device, device_peaks
from hf_model import context_of, finite_logits, load_model, load_tokenizer
from kl import batches, measured, tiny_texts
from moe_ptq import CALIBRATED, METHODS
from quant_save import quantize_checkpoint
from recipe import RECIPE_FILE, Recipe, read_recipe
from records import describe_model, read_result, write_result
from sensitivity import STRATEGIES, bits_by_signal, signals_of
from settings import parse_settings, part, same, setting

CLIP_STEPS = 16
BATCH = 16  # texts at once


def names_of(text: str, known: Iterable[str], option: str) -> list[str]:
    """The names of a list separated by commas."""
    if unknown := sorted(set(text.split(",")) - set(known)):
        raise UserError(f"{option}: {', '.join(unknown)} unknown; known: {', '.join(known)}")
    return text.split(",")


def quantized(settings: StudySettings, tag: str, recipe: Recipe, calibration: Calibration) -> Path:
    """The checkpoint of a tag, made and recorded unless it was."""
    out, record, started = settings.work / tag, settings.results / "quantize" / f"{tag}.json", time.time()
    if (out / RECIPE_FILE).exists() and record.exists():
        return out
    given, device = calibration if recipe.method in CALIBRATED else None, default_device()
    report = quantize_checkpoint(settings.model, out, recipe, force=True, calibration=given, devices=(device,))
    write_result(
        record, kind="quantize", tag=tag, started=started, model=describe_model(settings.model),
        recipe=read_recipe(out).to_json(),
        data=[given.record] if given else [], metrics=report.to_json(),
        extra={"output": describe_model(out), "devices": [str(device)], "device_peak_mib": device_peaks([device])},
    )  # fmt: skip
    return out


@torch.inference_mode()
def judged(settings: StudySettings, tag: str, recipe: Recipe, made: Path, reference: torch.nn.Module) -> dict[str, Any]:
    """The record of a checkpoint's KL to the model, as moe_eval takes it."""
    started, tokenizer, model = time.time(), load_tokenizer(settings.model), load_model(made)
    pairs, entry = tiny_texts(tokenizer, settings.items)
    data = batches(tokenizer, pairs, BATCH, min(context_of(made), 4096))

    def parts() -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
        with progress(sum(int(batch.real.sum()) for batch in data), f"kl {tag}", "token", True) as bar:
            for ids, real, scored, answer in data:
                ids, kept = ids.to(model.device), scored[:, 1:]
                logits, expected = (
                    finite_logits(own, input_ids=ids, attention_mask=real.to(model.device))[:, :-1][kept]
                    for own in (model, reference)
                )
                yield logits, expected, ids[:, 1:][kept], answer[:, 1:][kept]
                bar.update(int(real.sum()))

    return write_result(
        settings.results / "kl" / f"{tag}.json", kind="kl", tag=tag, started=started, model=describe_model(made),
        recipe=read_recipe(made).to_json(), data=[entry], metrics=measured(parts()),
        extra={"reference": describe_model(settings.model)},
    )  # fmt: skip


def table(records: dict[tuple[str, str], dict[str, Any]]) -> str:
    lines = [f"{'strategy':<12}{'method':<12}{'mean KL':>10}{'+-':>10}{'99.9 %':>10}{'top-1':>9}"]
    for (strategy, method), record in sorted(records.items(), key=lambda item: item[1]["metrics"]["kl"]["mean"]):
        kl = record["metrics"]["kl"]
        numbers = f"{kl['mean']:>10.5f}{kl['standard_error']:>10.5f}{kl['p99_9']:>10.4f}{100 * kl['top1']:>8.2f}%"
        lines.append(f"{strategy:<12}{method:<12}{numbers}")
    return "\n".join(lines)


@dataclasses.dataclass(frozen=True, kw_only=True)
class StudySettings:
    """Which orders of the experts are compared, rounded how."""

    model: Path = setting(help="checkpoint directory")
    name: str = setting(help="what the tags of the records begin with")
    expert_bits: float = same(Recipe, "expert_bits", 3)
    linear_bits: int = same(Recipe, "linear_bits", 4)
    options: str = setting("2,3,4", "bits that an expert may have")
    share: float = setting(0.25, "of three options: the experts raised, and lowered")
    strategies: str = setting(",".join(name for name in STRATEGIES if name != "blind"), "orders of the experts")
    methods: str = setting("clip,gptq_refit", "rounding methods")
    items: int = setting(64, "held-out transcripts of each tiny task")
    work: Path = setting(Path(os.environ.get("SCRATCH", "work")), "directory of the checkpoints")
    results: Path = setting(Path("results"), "directory of the records")
    text: CalibrationSettings = part(CalibrationSettings)


def main() -> None:
    settings, _ = parse_settings(StudySettings, __doc__)
    strategies = names_of(settings.strategies, STRATEGIES, "--strategies")
    methods = names_of(settings.methods, METHODS, "--methods")
    options = sorted(int(bits) for bits in names_of(settings.options, [str(bits) for bits in range(2, 9)], "--options"))
    checkpoint = Checkpoint(settings.model)
    tags = {
        (strategy, method): f"{settings.name}_int{settings.expert_bits:g}{strategy}_int{settings.linear_bits}_{method}"
        for strategy in strategies
        for method in methods
    }
    files = {key: settings.results / "kl" / f"{tag}.json" for key, tag in tags.items()}
    source = settings.work / f"{settings.name}_source.json"
    for file in (source, *files.values()):
        check_writable(file)
    if source.exists() and (other := different_file(read_json(source), checkpoint.identity)):
        raise UserError(f"{source}: {settings.name} was begun on another model ({other}); give another --name")
    if missing := [key for key, file in files.items() if not file.exists()]:
        ids, entry = settings.text.ids(settings.model)
        calibration, reference = Calibration(ids, entry), load_model(settings.model)
        signals = signals_of(checkpoint, calibration)
        for strategy, method in missing:
            experts = bits_by_signal(strategy, signals, settings.expert_bits, options, settings.share)
            write_json(source, checkpoint.identity)
            write_json(settings.work / f"{settings.name}_{strategy}.json", {"experts": experts})
            each = tuple((module, tuple(bits)) for module, bits in experts.items())
            recipe = Recipe(settings.expert_bits, settings.linear_bits, 128, CLIP_STEPS, method=method, experts=each)
            made = quantized(settings, tags[strategy, method], recipe, calibration)
            judged(settings, tags[strategy, method], recipe, made, reference)
    print(table({key: read_result(file, "kl") for key, file in files.items()}), flush=True)


if __name__ == "__main__":
    run_cli(main)
