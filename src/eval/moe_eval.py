"""Perplexity and full-vocabulary KL divergence to a reference model on held-out text, and the balance of its routers.

    python src/eval/moe_eval.py --model work/w3 --reference models/razor-tiny --tag razor_tiny_w3 [--items 64]
        [--text FILE [--window 512] [--scored half] | --pictures] [--out results/kl] [--force]

Text: held-out transcripts of the tiny tasks (prompt and reference turn); --pictures: those of the tiny tasks with pictures, by
a vision-language model; --text: a file. It is read in windows of 512 tokens whose second halves are scored, as llama-perplexity
does (the same figure on the same weights); `--window 2048 --scored all` is what papers on quantization tabulate; `--window 0`
takes the parts between empty lines one by one. Every window begins with what the tokenizer puts before a text.
KL(reference || model) is over the whole vocabulary at every position, in float32; `answer` counts only the positions of the
assistant's turn. Without --reference only perplexity and routing are measured.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from console import UserError, progress, read_text, run_cli
from hf_model import context_of, finite_logits, load_model, load_tokenizer, load_weights, prefix_ids, text_ids
from kl import Batch, batches, file_texts, measured, split_documents, text_windows, tiny_texts
from pictures import Prompt, config_with_eyes, load_processor, render_messages
from recipe import recipe_record
from records import add_tag_arguments, data_entry, describe_model, tagged_record, write_result
from runner import describe_checkpoint, item_record
from tasks_tiny import TINY_VISION_TASKS, VISION_REVISION


class RouterCounter:
    """Counts how often each expert is chosen, by hooks on the routers of a transformers model."""

    def __init__(self, model: torch.nn.Module, top_k: int) -> None:
        self.top_k = top_k
        self.counts: dict[str, torch.Tensor] = {}
        self.mask: torch.Tensor | None = None
        for name, module in model.named_modules():
            if name.endswith(".mlp.gate") and hasattr(module, "weight") and module.weight.ndim == 2:
                module.register_forward_hook(lambda m, a, out, name=name: self._count(name, m, a[0]))

    def _count(self, name: str, router: torch.nn.Module, hidden: torch.Tensor) -> None:
        logits = F.linear(hidden.reshape(-1, hidden.shape[-1]).float(), router.weight.float())
        chosen = logits.topk(self.top_k, -1).indices
        if self.mask is not None:
            chosen = chosen[self.mask.flatten()]
        count = torch.bincount(chosen.flatten(), minlength=logits.shape[-1])
        self.counts[name] = self.counts.get(name, 0) + count

    def summary(self) -> dict[str, Any] | None:
        """Normalised entropy of the expert load (1 is even), over layers, and the least load as a share of the mean."""
        if not self.counts:
            return None
        loads = torch.stack(list(self.counts.values())).double()
        shares = loads / loads.sum(-1, keepdim=True)
        entropy = -(shares * shares.clamp_min(1e-300).log()).sum(-1) / math.log(shares.shape[-1])
        return {
            "layers": len(shares),
            "experts": shares.shape[-1],
            "entropy_mean": entropy.mean().item(),
            "entropy_min": entropy.min().item(),
            "min_load": (shares.min() * shares.shape[-1]).item(),
        }


@torch.inference_mode()
def measure(model: torch.nn.Module, reference: torch.nn.Module | None, data: list[Batch]) -> dict[str, Any]:
    """Metrics over all batches; the last position of a row predicts nothing and is left out."""
    config = model.config.get_text_config()
    counter = RouterCounter(model, getattr(config, "num_experts_per_tok", 0) or 1)
    tokens = sum(int(batch.real.sum()) for batch in data)

    def parts() -> Iterator[tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor]]:
        with progress(tokens, "kl" if reference is not None else "perplexity", "token", True) as bar:
            for ids, real, scored, answer in data:
                ids, counter.mask, kept = ids.to(model.device), real.to(model.device), scored[:, 1:]
                inputs = {"input_ids": ids, "attention_mask": counter.mask}
                logits = finite_logits(model, **inputs)[:, :-1][kept]
                expected = finite_logits(reference, **inputs)[:, :-1][kept] if reference is not None else None
                yield logits, expected, ids[:, 1:][kept], answer[:, 1:][kept]
                bar.update(int(real.sum()))

    metrics, routing = measured(parts()), counter.summary()
    return metrics | ({"routing": routing} if routing else {})


def held_out(processor: Any, count: int) -> tuple[list[tuple[Prompt, str]], dict[str, Any]]:
    """(prompt, assistant turn) of ``count`` test items of every task, and their record."""
    pairs, rows = [], []
    for task in (kind() for kind in TINY_VISION_TASKS):
        for item, solution in task.load_with_solutions(count):
            turn = solution.removeprefix("<think>\n") + processor.tokenizer.eos_token
            pairs.append((render_messages(processor, task.messages(item)), turn))
            rows.append([*item_record(task, item), turn])
    return pairs, data_entry("tiny vision tasks, held-out transcripts", VISION_REVISION, rows)


def load_with_eyes(path: Path) -> torch.nn.Module:
    from transformers import AutoModelForImageTextToText

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    return load_weights(AutoModelForImageTextToText, path, dtype).to(device).eval()


def inputs_of(processor: Any, pairs: list[tuple[Prompt, str]]) -> tuple[Any, torch.Tensor]:
    """(model inputs padded on the right, mask [N, T] of the tokens of the assistant's turn)."""
    pictures = [[picture.open() for picture in prompt.pictures] for prompt, _ in pairs]
    common = {"images": pictures, "padding": True, "add_special_tokens": False, "return_tensors": "pt"}
    whole = processor(text=[prompt.text + turn for prompt, turn in pairs], **common)
    heads = processor(text=[prompt.text for prompt, _ in pairs], **common)["attention_mask"].sum(1)
    places = torch.arange(whole["input_ids"].shape[1])
    return whole, (places >= heads[:, None]) & whole["attention_mask"].bool()


@torch.inference_mode()
def measure_pictures(
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


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", type=Path, required=True, help="the checkpoint to judge")
    parser.add_argument("--reference", type=Path, help="the BF16 model that KL is taken to")
    add_tag_arguments(parser, "kl")
    parser.add_argument("--items", type=int, help="held-out transcripts of each tiny task (default 64); of --text: at most so "
                        "many windows, or documents (default: all)")  # fmt: skip
    text = parser.add_mutually_exclusive_group()
    text.add_argument("--text", type=Path, help="measure on this text file instead")
    text.add_argument(
        "--pictures", action="store_true", help="measure on the tiny tasks with pictures instead; needs --reference"
    )
    parser.add_argument("--window", type=int, help="tokens of a window of --text (default 512); 0: one document at a time")
    parser.add_argument("--scored", choices=("half", "all"), help="of each window: its second half (default), or all")
    parser.add_argument("--batch", type=int, help="texts or pictures at once (default 16; of --text's windows 4,096 tokens)")
    return parser.parse_args()


def of_pictures(args: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any]]:
    """(metrics, data entry) on pictures, by the whole model."""
    if not args.reference:
        raise UserError("--pictures: KL is taken to a --reference")
    config, other = config_with_eyes(args.model), config_with_eyes(args.reference)
    check_vocabularies(args, config["text_config"]["vocab_size"], other["text_config"]["vocab_size"])
    processor = load_processor(args.reference)
    processor.tokenizer.padding_side = "right"
    pairs, entry = held_out(processor, args.items or 64)
    models = (load_with_eyes(args.model), load_with_eyes(args.reference))
    return measure_pictures(*models, processor, pairs, args.batch or 16), entry


def of_text(args: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any]]:
    """(metrics, data entry) on text, by the text model."""
    tokenizer = load_tokenizer(args.reference or args.model, chat=not args.text)
    context = context_of(args.model)
    if args.text and args.window != 0:
        data, entry = windows_of(args, tokenizer, context)
    else:
        pairs, entry = file_texts(args.text, args.items or 1 << 40) if args.text else tiny_texts(tokenizer, args.items or 64)
        data = batches(tokenizer, pairs, args.batch or 16, min(context, 4096))
    print(f"{sum(int(batch.scored[:, 1:].sum()) for batch in data):,} positions are scored", flush=True)
    model = load_model(args.model)
    reference = load_model(args.reference) if args.reference else None
    config = model.config.get_text_config()
    if reference is not None:
        check_vocabularies(args, config.vocab_size, reference.config.get_text_config().vocab_size)
    return measure(model, reference, data), entry


def windows_of(args: argparse.Namespace, tokenizer: Any, context: int) -> tuple[list[Batch], dict[str, Any]]:
    """The windows of --text and their record."""
    text, length, half = read_text(args.text), args.window or 512, args.scored != "all"
    if length > context:
        raise UserError(f"--window {length}: {args.model} reads at most {context} positions (max_position_embeddings)")
    ids, prefix = text_ids(tokenizer, text), prefix_ids(tokenizer)
    tokens, documents = len(prefix) + len(ids), len(split_documents(text))
    found, count = tokens // length, min(tokens // length, args.items or tokens)
    if not count or length < 2 * len(prefix) + 2:
        raise UserError(f"{args.text}: {tokens:,} tokens make no window of {length}; give more text, or another --window")
    print(f"{args.text}: {documents:,} documents, {tokens:,} tokens; {count:,} of {found:,} windows of {length:,}, "
          f"{'the second half of each' if half else 'all of each'} scored; {tokens - count * length:,} tokens behind them are "
          f"left out; {f'each begins with {prefix}' if prefix else 'nothing is put before them'}")  # fmt: skip
    batch = args.batch or max(1, 4096 // length)
    entry = data_entry(args.text.name, "file", [text]) | {"documents": documents, "tokens": tokens, "prefix": prefix}
    entry |= {"window": length, "windows": count, "scored": "half" if half else "all"}
    return text_windows(ids[: count * length], prefix, length, half, batch), entry


def check_vocabularies(args: argparse.Namespace, own: int, other: int) -> None:
    if own != other:
        raise UserError(f"{args.model} and {args.reference} have different vocabularies: KL between them means nothing")


def main() -> None:
    args = parse_args()
    if min(args.items or 1, args.batch or 1) < 1 or args.items == 0 or args.batch == 0:
        raise UserError("--items and --batch must be at least 1")
    if (args.window is not None or args.scored) and not args.text or args.scored and args.window == 0:
        raise UserError("--window and --scored: of the windows of --text")
    if args.window is not None and args.window != 0 and args.window < 16:
        raise UserError(f"--window {args.window}: at least 16, or 0 for one document at a time")
    result, started = tagged_record(args), time.time()
    describe = describe_checkpoint if args.pictures else describe_model
    described, other = (describe(path) if path else None for path in (args.model, args.reference))
    metrics, entry = of_pictures(args) if args.pictures else of_text(args)
    shown = f"ppl {metrics['ppl']:.4f} on {metrics['tokens']:,} positions"
    if kl := metrics.get("kl"):
        shown += f"  KL {kl['mean']:.5f} +- {kl['standard_error']:.5f}  99 % {kl['p99']:.4f}  99.9 % {kl['p99_9']:.4f}"
        shown += f"  top-1 {100 * kl['top1']:.2f} %"
    print(shown, flush=True)
    write_result(
        result, kind="kl", tag=args.tag, started=started, model=described, recipe=recipe_record(args.model), data=[entry],
        metrics=metrics, extra={"reference": other},
    )  # fmt: skip


if __name__ == "__main__":
    run_cli(main)
