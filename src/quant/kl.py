"""KL divergence over the whole vocabulary, and the held-out text on which it is taken.

Not a command. `divergence(reference_logits, logits)` is the primary signal of the project: moe_eval, sensitivity, gguf_kl and
the studies all call it. Text: transcripts of the tiny tasks (prompt and reference turn), or a file's, in documents or windows.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from console import UserError, read_text
from hf_model import prefix_ids, render_chat, text_ids
from records import data_entry
from task_text import GENERATOR_REVISION, TASK_TEXTS

EXACT = 4 << 30  # bytes of a checkpoint whose layers run in float32 on a GPU too when it is judged


def divergence(reference: torch.Tensor, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(KL(reference || model) in nats [N], whether the two agree on the likeliest token [N]) of logits [N, V]."""
    p, q = F.log_softmax(reference.float(), -1), F.log_softmax(logits.float(), -1)
    # Below zero only by rounding; what is near 1e-6 is float32 noise.
    return log_divergence(p, q).clamp_min_(0), p.argmax(-1) == q.argmax(-1)


def log_divergence(p: torch.Tensor, q: torch.Tensor, depth: float = math.inf) -> torch.Tensor:
    """KL [N] in nats of log-probabilities [N, V]; tokens that ``p`` puts ``depth`` nats below certainty count nothing."""
    terms = p.exp() * (p - q)
    return (terms if depth == math.inf else torch.where(p > -depth, terms, 0.0)).sum(-1)


def compared(p: torch.Tensor, q: torch.Tensor, target: torch.Tensor, depth: float = math.inf) -> dict[str, torch.Tensor]:
    """What two models say of the tokens ``target`` [N], from log-probabilities [N, V] of reference and model: ``kl``, ``loss``
    of each, whether their likeliest tokens ``agree`` and are ``right``, and the reference's ``likeliest``, all [N]."""
    first, kl = p.max(-1), log_divergence(p, q, depth)
    mine = q.argmax(-1)
    return {
        "kl": kl.clamp_min_(0) if depth == math.inf else kl,
        "loss": F.nll_loss(q, target, reduction="none"),
        "base_loss": F.nll_loss(p, target, reduction="none"),
        "agree": first.indices == mine,
        "right": mine == target,
        "base_right": first.indices == target,
        "likeliest": first.values.exp(),
    }


def compared_top(p: torch.Tensor, ids: torch.Tensor, q: torch.Tensor, target: torch.Tensor) -> dict[str, torch.Tensor]:
    """The same of a model that names some tokens only, ``ids`` [N, K] (-1: none) with log-probabilities ``q``, the target among
    them. What it leaves out is taken as one token more, whose KL is a lower bound of the whole (data-processing inequality)."""
    p, q, known = p.double(), q.double().masked_fill(ids < 0, -math.inf), ids >= 0
    own = p.gather(1, ids.clamp_min(0)).masked_fill(~known, -math.inf)
    named = torch.where(known, own.exp() * (own - q), 0.0).sum(-1)
    left, given = (torch.log1p(-each.exp().sum(-1).clamp_max(1 - 1e-12)) for each in (own, q))
    found, mine = compared(p, p, target), ids.gather(1, q.argmax(-1, keepdim=True))[:, 0]
    loss = -torch.where(ids == target[:, None], q, -math.inf).amax(-1)
    kl = (named + left.exp() * (left - given)).clamp_min(0)
    return found | {"kl": kl, "loss": loss, "agree": p.argmax(-1) == mine, "right": mine == target}


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


def split_documents(text: str) -> list[str]:
    """The parts of a text between its empty lines; a line of blanks is empty too (WikiText's)."""
    return [part for part in re.split(r"\n[^\S\n]*\n", text) if part.strip()]


def file_texts(path: Path, count: int) -> tuple[list[tuple[str, str]], dict[str, Any]]:
    """The first ``count`` documents of a text file, as (no prompt, document), and their record."""
    found = split_documents(read_text(path))
    if not found:
        raise UserError(f"{path}: holds no text")
    print(f"{path}: {min(count, len(found)):,} of {len(found):,} documents (parts between empty lines)", flush=True)
    return [("", part) for part in found[:count]], data_entry(path.name, "file", found[:count])


class Batch(NamedTuple):
    """Token ids [N, T] and masks of the same shape. A token is ``scored`` where its prediction counts; ``answer``: of the
    assistant's turn, or scored text."""

    ids: torch.Tensor
    real: torch.Tensor  # no padding
    scored: torch.Tensor
    answer: torch.Tensor


def batches(tokenizer: Any, pairs: list[tuple[str, str]], size: int, context: int) -> list[Batch]:
    """(prompt, turn) pairs in batches of like length, as :func:`padded` makes them of :func:`encoded`."""
    rows = sorted(encoded(tokenizer, pairs, context), key=lambda row: len(row.ids))
    return [padded(rows[start : start + size]) for start in range(0, len(rows), size)]


class Row(NamedTuple):
    """A text's token ids; the turn begins at place ``head``, and predictions count from place ``first`` on."""

    ids: list[int]
    head: int
    first: int


def encoded(tokenizer: Any, pairs: Iterable[tuple[str, str]], context: int) -> list[Row]:
    """(prompt, turn) pairs as token ids. A text without a prompt begins as the tokenizer lets it begin; a longer one than
    ``context`` is cut, and that is said."""
    rows, cut, prefix = list[Row](), list[int](), prefix_ids(tokenizer)
    for prompt, turn in pairs:
        head = text_ids(tokenizer, prompt) if prompt else prefix
        whole = head + text_ids(tokenizer, turn)
        cut += [len(whole) - context] if len(whole) > context else []
        rows.append(Row(whole[:context], len(head), 1 if prompt else len(head)))
    if cut:
        print(f"cut at {context:,} tokens: {len(cut):,} of {len(rows):,} texts, {sum(cut):,} tokens not judged", flush=True)
    return rows


def padded(rows: list[Row]) -> Batch:
    """Rows padded on the right to the longest of them."""
    ids = pad_sequence([torch.tensor(row.ids) for row in rows], batch_first=True)
    heads, firsts, lengths = torch.tensor([[row.head, row.first, len(row.ids)] for row in rows]).t()[:, :, None]
    place = torch.arange(ids.shape[1])
    real = place < lengths
    return Batch(ids, real, real & (place >= firsts), real & (place >= heads))


def text_windows(ids: list[int], prefix: list[int], length: int, half: bool, size: int) -> list[Batch]:
    """A text's token ids in windows of ``length``, in batches of ``size``; what is left behind the last window is left out.

    As in llama-perplexity the ``prefix`` that the tokenizer puts before a text stands once before the whole, and takes the
    place of the first tokens of every window. ``half``: the second half of each window is scored, whose predictions have
    context; else all behind the prefix, as in the tables of quantization papers.
    """
    ids = [*prefix, *ids]
    rows = torch.tensor(ids[: len(ids) // length * length]).view(-1, length)
    rows[:, : len(prefix)] = torch.tensor(prefix, dtype=torch.long)
    real = torch.ones_like(rows, dtype=torch.bool)
    scored = real & (torch.arange(length) >= (length // 2 + 1 if half else max(1, len(prefix))))
    parts = (each.split(size) for each in (rows, real, scored, scored))
    return [Batch(*each) for each in zip(*parts, strict=True)]
