"""KL divergence of a vision-language model to a reference on held-out pictures, over the whole vocabulary.

    python src/eval/mm_kl.py --model work/vl3 --reference models/razor-tiny-vl --tag razor_tiny_vl_int3_int4 [--items 64]
        [--out results/kl] [--force]

The pictures, questions and reference turns of the tiny vision tasks' test split, by teacher forcing, in float32 on a CPU.
`answer` counts only the positions of the assistant's turn. The text counterpart is moe_eval.py.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from console import UserError, progress, run_cli
from kl import measured
from pictures import Prompt, config_with_eyes, load_processor, render_messages
from recipe import recipe_record
from records import add_tag_arguments, data_entry, tagged_record, write_result
from runner import describe_checkpoint, item_record
from tasks_tiny import TINY_VISION_TASKS, VISION_REVISION


def held_out(processor: Any, count: int) -> tuple[list[tuple[Prompt, str]], dict[str, Any]]:
    """(prompt, assistant turn) of ``count`` test items of every task, and their record."""
    pairs, rows = [], []
    for task in (kind() for kind in TINY_VISION_TASKS):
        for item, solution in task.load_with_solutions(count):
            turn = solution.removeprefix("<think>\n") + processor.tokenizer.eos_token
            pairs.append((render_messages(processor, task.messages(item)), turn))
            rows.append([*item_record(task, item), turn])
    return pairs, data_entry("tiny vision tasks, held-out transcripts", VISION_REVISION, rows)


def load(path: Path) -> torch.nn.Module:
    from transformers import AutoModelForImageTextToText

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    return AutoModelForImageTextToText.from_pretrained(str(path), dtype=dtype, local_files_only=True).to(device).eval()


def inputs_of(processor: Any, pairs: list[tuple[Prompt, str]]) -> tuple[Any, torch.Tensor]:
    """(model inputs padded on the right, mask [N, T] of the tokens of the assistant's turn)."""
    pictures = [[picture.open() for picture in prompt.pictures] for prompt, _ in pairs]
    common = {"images": pictures, "padding": True, "add_special_tokens": False, "return_tensors": "pt"}
    whole = processor(text=[prompt.text + turn for prompt, turn in pairs], **common)
    heads = processor(text=[prompt.text for prompt, _ in pairs], **common)["attention_mask"].sum(1)
    places = torch.arange(whole["input_ids"].shape[1])
    return whole, (places >= heads[:, None]) & whole["attention_mask"].bool()


@torch.inference_mode()
def measure(
    model: torch.nn.Module, reference: torch.nn.Module, processor: Any, pairs: list[tuple[Prompt, str]], batch: int
) -> dict[str, Any]:
    """Metrics over all pairs; the last position of a row predicts nothing and is left out."""

    def parts() -> Iterator[tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor]]:
        with progress(len(pairs), "kl", "picture") as bar:
            for start in range(0, len(pairs), batch):
                part = pairs[start : start + batch]
                inputs, answer = inputs_of(processor, part)
                kept, target = inputs["attention_mask"].bool()[:, 1:], inputs["input_ids"][:, 1:]
                inputs = inputs.to(model.device)
                found, expected = (m(**inputs, use_cache=False).logits[:, :-1].float().cpu()[kept] for m in (model, reference))
                yield found, expected, target[kept], answer[:, 1:][kept]
                bar.update(len(part))

    return {"pictures": len(pairs)} | measured(parts())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", type=Path, required=True, help="the quantized checkpoint")
    parser.add_argument("--reference", type=Path, required=True, help="the BF16 model that KL is taken to")
    add_tag_arguments(parser, "kl")
    parser.add_argument("--items", type=int, default=64, help="held-out pictures of each task")
    parser.add_argument("--batch", type=int, default=16, help="pictures at once (default 16)")
    args = parser.parse_args()
    if min(args.items, args.batch) < 1:
        raise UserError("--items and --batch must be at least 1")
    result, started = tagged_record(args), time.time()
    config, other = config_with_eyes(args.model), config_with_eyes(args.reference)
    model, reference = describe_checkpoint(args.model), describe_checkpoint(args.reference)
    if config["text_config"]["vocab_size"] != other["text_config"]["vocab_size"]:
        raise UserError(f"{args.model} and {args.reference} have different vocabularies: KL between them means nothing")
    processor = load_processor(args.reference)
    processor.tokenizer.padding_side = "right"
    pairs, entry = held_out(processor, args.items)
    metrics = measure(load(args.model), load(args.reference), processor, pairs, args.batch)
    write_result(
        result, kind="kl", tag=args.tag, started=started, model=model, recipe=recipe_record(args.model), data=[entry],
        metrics=metrics, extra={"reference": reference},
    )  # fmt: skip
    kl = metrics["kl_answer"]
    print(
        f"answers: KL {kl['mean']:.5f} +- {kl['standard_error']:.5f}  99 % {kl['p99']:.4f}  top-1 {100 * kl['top1']:.2f} %"
        f"  ppl {metrics['ppl_answer']:.4f}", flush=True,
    )  # fmt: skip


if __name__ == "__main__":
    run_cli(main)
