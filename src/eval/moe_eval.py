"""Perplexity and full-vocabulary KL divergence to a reference model on held-out text, and the balance of its routers.

    python src/eval/moe_eval.py --model work/w3 --reference models/razor-tiny --tag razor_tiny_w3 [--items 64]
        [--text FILE] [--out results/kl] [--force]

Text: held-out transcripts of the tiny tasks (prompt and reference turn), or the paragraphs of --text. KL(reference || model)
is over the whole vocabulary at every position, in float32; `answer` counts only the positions of the assistant's turn.
Without --reference only perplexity and routing are measured.
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

from console import UserError, progress, run_cli
from hf_model import load_model, load_tokenizer
from kl import batches, file_texts, measured, tiny_texts
from recipe import recipe_record
from records import add_tag_arguments, describe_model, tagged_record, write_result


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
def measure(model: torch.nn.Module, reference: torch.nn.Module | None, data: list[tuple[torch.Tensor, ...]]) -> dict[str, Any]:
    """Metrics over all batches; the last position of a row predicts nothing and is left out."""
    config = model.config.get_text_config()
    counter = RouterCounter(model, getattr(config, "num_experts_per_tok", 0) or 1)
    tokens = sum(int(real.sum()) for _, real, _ in data)

    def parts() -> Iterator[tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor]]:
        with progress(tokens, "kl" if reference is not None else "perplexity", "token", True) as bar:
            for ids, real, answer in data:
                ids, counter.mask, kept = ids.to(model.device), real.to(model.device), real[:, 1:]
                inputs = {"input_ids": ids, "attention_mask": counter.mask, "use_cache": False}
                logits = model(**inputs).logits[:, :-1][kept]
                expected = reference(**inputs).logits[:, :-1][kept] if reference is not None else None
                yield logits, expected, ids[:, 1:][kept], answer[:, 1:][kept]
                bar.update(int(real.sum()))

    metrics, routing = measured(parts()), counter.summary()
    return metrics | ({"routing": routing} if routing else {})


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", type=Path, required=True, help="the checkpoint to judge")
    parser.add_argument("--reference", type=Path, help="the BF16 model that KL is taken to")
    add_tag_arguments(parser, "kl")
    parser.add_argument("--items", type=int, default=64, help="held-out transcripts of each tiny task, or paragraphs")
    parser.add_argument("--text", type=Path, help="measure on this text file instead")
    parser.add_argument("--batch", type=int, default=16, help="texts at once (default 16)")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    if min(args.items, args.batch) < 1:
        raise UserError("--items and --batch must be at least 1")
    result = tagged_record(args)
    described, other = (describe_model(path) if path else None for path in (args.model, args.reference))
    started = time.time()
    tokenizer = load_tokenizer(args.reference or args.model)
    pairs, entry = file_texts(args.text, args.items) if args.text else tiny_texts(tokenizer, args.items)
    model = load_model(args.model)
    reference = load_model(args.reference) if args.reference else None
    if reference is not None and reference.config.get_text_config().vocab_size != model.config.get_text_config().vocab_size:
        raise UserError(f"{args.model} and {args.reference} have different vocabularies: KL between them means nothing")
    context = int(getattr(model.config.get_text_config(), "max_position_embeddings", 4096))
    metrics = measure(model, reference, batches(tokenizer, pairs, args.batch, min(context, 4096)))
    write_result(
        result, kind="kl", tag=args.tag, started=started, model=described, recipe=recipe_record(args.model), data=[entry],
        metrics=metrics, extra={"reference": other},
    )  # fmt: skip
    shown = f"ppl {metrics['ppl']:.4f}"
    if "kl" in metrics:
        kl = metrics["kl"]
        shown += f"  KL {kl['mean']:.5f} +- {kl['standard_error']:.5f}  99 % {kl['p99']:.4f}  99.9 % {kl['p99_9']:.4f}"
        shown += f"  top-1 {100 * kl['top1']:.2f} %"
    print(shown, flush=True)


if __name__ == "__main__":
    run_cli(main)
