"""Which signal should decide who gets more bits: every order of the experts, allocated, quantized and judged by KL.

    python src/quant/moe_study.py --model models/razor-tiny --name razor_tiny [--expert-bits 3] [--methods clip,gptq_refit]
        [--strategies random,inverse,frequency,wmass,asal,wfro,composite] [--work work]

The signals are measured once; expert_signals.py says what the strategies are. For each of them and each rounding method a
checkpoint of the same size is made in WORK/TAG, TAG being NAME_int3STRATEGY_int4_METHOD, and recorded in
results/quantize/TAG.json; its KL to the model on held-out transcripts is in results/kl/TAG.json. What has its records is not
done again, so a killed run goes on. The last lines are the table, the least KL first.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from calibration import Calibration
from calibration_text import CalibrationSettings
from checkpoint import Checkpoint
from console import UserError, progress, run_cli, write_json
from devices import default_device, device_peaks
from expert_signals import STRATEGIES, bits_by_signal, signals_of
from hf_model import load_model, load_tokenizer
from kl import batches, measured, tiny_texts
from moe_ptq import CALIBRATED, METHODS
from quant_save import quantize_checkpoint
from recipe import RECIPE_FILE, Recipe
from records import describe_model, read_result, write_result
from settings import add_settings, settings_of

CLIP_STEPS = 16
BATCH = 16  # texts at once


def names_of(text: str, known: Sequence[str], option: str) -> list[str]:
    """The names of a list separated by commas."""
    if unknown := sorted(set(text.split(",")) - set(known)):
        raise UserError(f"{option}: {', '.join(unknown)} unknown; known: {', '.join(known)}")
    return text.split(",")


def quantized(args: argparse.Namespace, tag: str, recipe: Recipe, calibration: Calibration) -> Path:
    """The checkpoint of a tag, made and recorded unless it was."""
    out, record, started = args.work / tag, args.results / "quantize" / f"{tag}.json", time.time()
    if (out / RECIPE_FILE).exists() and record.exists():
        return out
    given, device = calibration if recipe.method in CALIBRATED else None, default_device()
    report = quantize_checkpoint(args.model, out, recipe, force=True, calibration=given, devices=(device,))
    write_result(
        record, kind="quantize", tag=tag, started=started, model=describe_model(args.model), recipe=recipe.to_json(),
        data=[given.record] if given else [], metrics=report.to_json(),
        extra={"output": describe_model(out), "devices": [str(device)], "device_peak_mib": device_peaks([device])},
    )  # fmt: skip
    return out


@torch.inference_mode()
def judged(args: argparse.Namespace, tag: str, recipe: Recipe, made: Path, reference: torch.nn.Module) -> dict[str, Any]:
    """The record of a checkpoint's KL to the model, as moe_eval takes it."""
    started, tokenizer, model = time.time(), load_tokenizer(args.model), load_model(made)
    pairs, entry = tiny_texts(tokenizer, args.items)
    context = int(getattr(model.config.get_text_config(), "max_position_embeddings", 4096))
    data = batches(tokenizer, pairs, BATCH, min(context, 4096))

    def parts() -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
        with progress(len(data), f"kl {tag}", "batch") as bar:
            for ids, real, answer in data:
                ids, kept = ids.to(model.device), real[:, 1:]
                logits, expected = (
                    own(input_ids=ids, attention_mask=real.to(model.device), use_cache=False).logits[:, :-1][kept]
                    for own in (model, reference)
                )
                yield logits, expected, ids[:, 1:][kept], answer[:, 1:][kept]
                bar.update()

    return write_result(
        args.results / "kl" / f"{tag}.json", kind="kl", tag=tag, started=started, model=describe_model(made),
        recipe=recipe.to_json(), data=[entry], metrics=measured(parts()), extra={"reference": describe_model(args.model)},
    )  # fmt: skip


def table(records: dict[tuple[str, str], dict[str, Any]]) -> str:
    lines = [f"{'strategy':<12}{'method':<12}{'mean KL':>10}{'+-':>10}{'99.9 %':>10}{'top-1':>9}"]
    for (strategy, method), record in sorted(records.items(), key=lambda item: item[1]["metrics"]["kl"]["mean"]):
        kl = record["metrics"]["kl"]
        numbers = f"{kl['mean']:>10.5f}{kl['standard_error']:>10.5f}{kl['p99_9']:>10.4f}{100 * kl['top1']:>8.2f}%"
        lines.append(f"{strategy:<12}{method:<12}{numbers}")
    return "\n".join(lines)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", required=True, type=Path, help="checkpoint directory")
    parser.add_argument("--name", required=True, help="what the tags of the records begin with")
    parser.add_argument("--expert-bits", type=float, default=3, help="mean bits of the experts (default 3)")
    parser.add_argument("--linear-bits", type=int, default=4, help="bits of every other matrix (default 4)")
    parser.add_argument("--options", default="2,3,4", help="bits that an expert may have (default 2,3,4)")
    parser.add_argument("--share", type=float, default=0.25, help="of three options: the experts raised, and lowered")
    shown = ",".join(name for name in STRATEGIES if name != "blind")
    parser.add_argument("--strategies", default=shown, help=f"orders of the experts (default {shown})")
    parser.add_argument("--methods", default="clip,gptq_refit", help="rounding methods (default clip,gptq_refit)")
    parser.add_argument("--items", type=int, default=64, help="held-out transcripts of each tiny task (default 64)")
    work = Path(os.environ.get("SCRATCH", "work"))
    parser.add_argument("--work", type=Path, default=work, help="directory of the checkpoints (default $SCRATCH, or work)")
    parser.add_argument("--results", type=Path, default=Path("results"), help="directory of the records (default results)")
    add_settings(parser, CalibrationSettings)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    strategies = names_of(args.strategies, STRATEGIES, "--strategies")
    methods = names_of(args.methods, METHODS, "--methods")
    options = sorted(int(bits) for bits in names_of(args.options, [str(bits) for bits in range(2, 9)], "--options"))
    checkpoint = Checkpoint(args.model)
    tags = {
        (strategy, method): f"{args.name}_int{args.expert_bits:g}{strategy}_int{args.linear_bits}_{method}"
        for strategy in strategies
        for method in methods
    }
    files = {key: args.results / "kl" / f"{tag}.json" for key, tag in tags.items()}
    if missing := [key for key, file in files.items() if not file.exists()]:
        ids, entry = settings_of(CalibrationSettings, args).ids(args.model)
        calibration, reference = Calibration(ids, entry), load_model(args.model)
        signals = signals_of(checkpoint, calibration)
        for strategy, method in missing:
            experts = bits_by_signal(strategy, signals, args.expert_bits, options, args.share)
            write_json(args.work / f"{args.name}_{strategy}.json", {"experts": experts})
            each = tuple((module, tuple(bits)) for module, bits in experts.items())
            recipe = Recipe(args.expert_bits, args.linear_bits, 128, CLIP_STEPS, method=method, experts=each)
            made = quantized(args, tags[strategy, method], recipe, calibration)
            judged(args, tags[strategy, method], recipe, made, reference)
    print(table({key: read_result(file, "kl") for key, file in files.items()}), flush=True)


if __name__ == "__main__":
    run_cli(main)
