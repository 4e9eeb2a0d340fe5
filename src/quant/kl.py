"""KL divergence over the whole vocabulary, and the held-out text on which it is taken.

Not a command. `divergence(reference_logits, logits)` is the primary signal of the project: moe_eval, moe_alloc, gguf_kl and the
studies all call it. Text: transcripts of the tiny tasks (prompt and reference turn), or the paragraphs of a file.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from console import UserError
from hf_model import render_chat
from records import data_entry
from task_text import GENERATOR_REVISION, TASK_TEXTS


def divergence(reference: torch.Tensor, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(KL(reference || model) in nats [N], whether the two agree on the likeliest token [N]) of logits [N, V]."""
    p, q = F.log_softmax(reference.float(), -1), F.log_softmax(logits.float(), -1)
    # Below zero only by rounding; what is near 1e-6 is float32 noise.
    kl = (p.exp() * (p - q)).sum(-1).clamp_min_(0)
    return kl, p.argmax(-1) == q.argmax(-1)


def summarize_kl(kl: np.ndarray, agree: np.ndarray) -> dict[str, Any]:
    """Mean with its standard error, upper percentiles, largest value, and top-1 agreement."""
    p99, p999 = np.quantile(kl, [0.99, 0.999])
    return {
        "positions": len(kl),
        "mean": float(kl.mean()),
        "standard_error": float(kl.std(ddof=1) / math.sqrt(len(kl))) if len(kl) > 1 else 0.0,
        "p99": float(p99),
        "p99_9": float(p999),
        "max": float(kl.max()),
        "top1": float(agree.mean()),
    }


def measured(parts: Iterable[tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor]]) -> dict[str, Any]:
    """Metrics over all parts of (logits [N, V], the reference's or None, next tokens [N], mask [N] of the assistant's turn);
    ``answer`` in their names: over its positions only."""
    kls, agrees, answers, losses = [], [], [], []
    for logits, expected, target, answer in parts:
        losses.append(F.cross_entropy(logits.float(), target, reduction="none").cpu())
        answers.append(answer)
        if expected is not None:
            kl, agree = divergence(expected, logits)
            kls.append(kl.cpu())
            agrees.append(agree.cpu())
    loss, answer = torch.cat(losses), torch.cat(answers)
    metrics: dict[str, Any] = {
        "tokens": len(loss),
        "ppl": loss.mean().exp().item(),
        "ppl_answer": loss[answer].mean().exp().item(),
    }
    if kls:
        kl, agree, answer = torch.cat(kls).double().numpy(), torch.cat(agrees).numpy(), answer.numpy()
        metrics |= {"kl": summarize_kl(kl, agree), "kl_answer": summarize_kl(kl[answer], agree[answer])}
    return metrics


def tiny_texts(tokenizer: Any, count: int, split: str = "test") -> tuple[list[tuple[str, str]], dict[str, Any]]:
    """(prompt, assistant turn) of ``count`` items of every tiny task, held out by default, and their record."""
    pairs = []
    for task in (kind() for kind in TASK_TEXTS):
        for item, solution in task.load_with_solutions(count, split):
            prompt = render_chat(tokenizer, [{"role": "user", "content": item.question}])
            turn = solution.removeprefix("<think>\n") + tokenizer.eos_token
            pairs.append((prompt, turn))
    name = "tiny_tasks transcripts" if split == "test" else f"tiny_tasks transcripts, {split} split"
    return pairs, data_entry(name, GENERATOR_REVISION, [list(pair) for pair in pairs])


def file_texts(path: Path, count: int) -> tuple[list[tuple[str, str]], dict[str, Any]]:
    """The first ``count`` paragraphs (separated by blank lines) of a text file."""
    try:
        paragraphs = [p for p in path.read_text(encoding="utf-8").split("\n\n") if p.strip()][:count]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot read text ({error})") from None
    if not paragraphs:
        raise UserError(f"{path}: holds no text")
    return [("", p) for p in paragraphs], data_entry(path.name, "file", paragraphs)


def batches(tokenizer: Any, pairs: list[tuple[str, str]], size: int, context: int) -> list[tuple[torch.Tensor, ...]]:
    """(ids, mask of real tokens, mask of assistant tokens), right-padded, in batches of like length."""
    rows = []
    for prompt, turn in pairs:
        head = tokenizer(prompt, add_special_tokens=False)["input_ids"] if prompt else []
        rows.append((len(head), (head + tokenizer(turn, add_special_tokens=False)["input_ids"])[:context]))
    rows.sort(key=lambda row: len(row[1]))
    result = []
    for start in range(0, len(rows), size):
        part = rows[start : start + size]
        ids = pad_sequence([torch.tensor(row) for _, row in part], batch_first=True)
        heads, lengths = torch.tensor([[head, len(row)] for head, row in part]).t()[:, :, None]
        place = torch.arange(ids.shape[1])
        result.append((ids, place < lengths, (place >= heads) & (place < lengths)))
    return result
