"""Measure a vision-language model's accuracy: the multimodal counterpart of vllm_eval8, with its log, resume and record.

    python src/eval/mm_eval.py --model models/razor-tiny-vl --tag razor_tiny_vl_bf16 [--benchmarks tiny_count,tiny_digits]
        [--data-dir DIR] [--backend auto|vllm|hf] [--budget 32k|64k|80k] [--samples N] [--limit N] [--batch N]
        [--family NAME] [--out results/eval] [--temperature T --top-p P --top-k K --seed S] [--tensor-parallel N] [--force]
        [--dry-run]

Images keep their place in the prompt and their size: scaling is left to the model's processor (its min and max pixels,
which the record names). Sampling is the vendor's for the model's family (configs/eval.env). docs/MULTIMODAL.md.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from backend import HfMmBackend, choose_backend
from console import UserError, run_cli
from pictures import config_with_eyes, pictures_of
from records import public_path
from runner import (
    Loaded,
    add_run_arguments,
    check_args,
    describe_checkpoint,
    get_benchmarks,
    make_plan,
    run_evaluation,
)
from vllm_eval import VllmMmBackend


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", type=Path, required=True, help="checkpoint directory with its processor")
    add_run_arguments(parser, "tiny_count,tiny_digits,tiny_bars", "auto, vllm or hf", 16)
    args = parser.parse_args()
    check_args(args)
    return args


def make_backend(name: str, args: argparse.Namespace, budget: int, loaded: Loaded) -> HfMmBackend | VllmMmBackend:
    if name == "hf":
        return HfMmBackend(args.model, args.batch)
    images = max(len(pictures_of(benchmark.messages(item))) for benchmark, items in loaded for item in items)
    return VllmMmBackend(args.model, budget, images, args.tensor_parallel)


def pixel_limits(processor: Any) -> dict[str, Any]:
    """The processor's own limits on an image, beyond which it scales."""
    known = processor.image_processor.to_dict()
    return {key: known[key] for key in ("size", "min_pixels", "max_pixels") if known.get(key) is not None}


def main() -> None:
    args = parse_args()
    benchmarks, name = get_benchmarks(args.benchmarks.split(","), args.data_dir, pictures=True), choose_backend(args.backend)
    if name not in ("hf", "vllm"):
        raise UserError(f"--backend {name}: pictures go through hf or vllm")
    plan = make_plan(args, name, public_path(str(args.model.resolve())), config_with_eyes(args.model))

    run_evaluation(
        plan, benchmarks, lambda: describe_checkpoint(args.model),
        lambda loaded: make_backend(name, args, plan.sampling.max_tokens, loaded),
        lambda backend: {"pixels": pixel_limits(backend.processor)},
    )  # fmt: skip


if __name__ == "__main__":
    run_cli(main)
