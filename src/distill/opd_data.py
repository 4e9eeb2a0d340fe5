"""The files that pass between the phases of distillation, and the checks that they belong together.

Not a command; docs/OPD_INTEGRATION.md describes the formats.

    rollouts   samples.jsonl (every sample, resumable), rollouts.jsonl (the kept ones), rollouts.json (counts, digest)
    scores     index.json, scores-00000.safetensors, ...: token ids and the teacher's top-k for every completion token
    adapter    adapter.safetensors (A, B and growth of every parameter), adapter.json (what it belongs to, the loss curve)
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from checkpoint import Checkpoint
from console import UserError, atomic_path, file_sha256, read_json, write_json
from opd_losses import TopK
from records import header_sha256, peak_rss_mib, public_path, sha256_json

ROLLOUTS, MANIFEST, INDEX, PHASE = "rollouts.jsonl", "rollouts.json", "index.json", "phase.json"
ADAPTER, ADAPTER_JSON = "adapter.safetensors", "adapter.json"
FORMAT = 1


def tokenizer_sha256(tokenizer: Any) -> str:
    """Digest of the vocabulary: two tokenizers that agree here give a token id the same meaning."""
    return sha256_json(sorted(tokenizer.get_vocab().items()))


def model_identity(model: str | Path) -> dict[str, str]:
    """What makes a checkpoint this one and no other: its name, and digests of config.json, tensor headers and weights."""
    checkpoint = Checkpoint(model)
    return {
        "name": checkpoint.path.resolve().name,
        "config_sha256": checkpoint.config_sha256,
        "header_sha256": header_sha256(checkpoint),
        "weights_sha256": checkpoint.sha256(),
    }


def same_model(a: dict[str, str], b: dict[str, str]) -> bool:
    """Whether two identities are of one checkpoint, wherever it lies."""
    return all(a.get(key) == b.get(key) for key in ("config_sha256", "header_sha256", "weights_sha256"))


def read_rollouts(directory: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """(kept rollouts, manifest), the digest of the former checked against the latter."""
    manifest = read_json(directory / MANIFEST)
    path = directory / ROLLOUTS
    if not path.is_file() or file_sha256(path) != manifest["sha256"]:
        raise UserError(f"{path}: not the rollouts that {MANIFEST} describes; run opd_gen again")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()], manifest


def counts(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    graded = [row for row in rows if row["correct"] is not None]
    return {
        "samples": len(rows),
        "finished": sum(row["finish_reason"] == "stop" for row in rows),
        "graded": len(graded),
        "correct": sum(row["correct"] for row in graded),
        "tokens": sum(row["tokens"] for row in rows),
    }


def write_rollouts(
    out: Path, rows: Sequence[dict[str, Any]], chosen: Sequence[dict[str, Any]], settings: dict[str, Any],
    choice: dict[str, bool], seconds: float, tokens: int,
) -> dict[str, Any]:  # fmt: skip
    """The kept rollouts, the cost of all, and the manifest, which is returned."""
    with atomic_path(out / ROLLOUTS) as temporary:
        lines = [json.dumps(row, ensure_ascii=False, allow_nan=False) for row in chosen]
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
    manifest = {"format": 1, "settings": settings, "choice": choice, "all": counts(rows), "kept": counts(chosen)}
    manifest |= {"settings_sha256": sha256_json(settings), "sha256": file_sha256(out / ROLLOUTS)}
    write_phase(out, "opd_gen", seconds, tokens)
    write_json(out / MANIFEST, manifest)  # last: its presence says that the phase is complete
    return manifest


def encode_rollout(tokenizer: Any, row: dict[str, Any]) -> tuple[list[int], int]:
    """(token ids of prompt, completion and, where it finished, the end of turn; tokens of the prompt)."""
    prompt, text = (tokenizer(row[key], add_special_tokens=False)["input_ids"] for key in ("prompt", "text"))
    end = [tokenizer.eos_token_id] if row["finish_reason"] == "stop" else []
    return prompt + text + end, len(prompt)


class Example(NamedTuple):
    """One rollout with its scores: ids [T], the prompt's length P, and for the T - P completion tokens the teacher's top-k."""

    ids: Tensor
    prompt: int
    teacher: TopK


class ScoredRollouts:
    """The scores of a directory, read rollout by rollout. ``lengths``: tokens of each rollout, ``answers``: those scored."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.index = read_json(directory / INDEX)
        if self.index.get("format") != FORMAT:
            raise UserError(f"{directory / INDEX}: format {self.index.get('format')!r}, expected {FORMAT}")
        self.places: list[tuple[Path, int, int, int]] = []  # file, first id, first position, length of the prompt
        self.lengths: list[int] = []
        for shard in self.index["shards"]:
            path = directory / shard["file"]
            if not path.is_file():
                raise UserError(f"{path}: missing; run opd_score again")
            with safe_open(path, "pt") as tensors:
                starts, prompts = tensors.get_tensor("starts").tolist(), tensors.get_tensor("prompts").tolist()
            position = 0
            for start, end, prompt in zip(starts[:-1], starts[1:], prompts, strict=True):
                self.places.append((path, start, position, prompt))
                self.lengths.append(end - start)
                position += end - start - prompt
        self.answers = [length - place[3] for length, place in zip(self.lengths, self.places, strict=True)]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, number: int) -> Example:
        path, start, position, prompt = self.places[number]
        length = self.lengths[number]
        own = slice(position, position + length - prompt)
        with safe_open(path, "pt") as tensors:
            ids = tensors.get_slice("ids")[start : start + length].long()
            top, logp, tail = (tensors.get_slice(name)[own] for name in ("top", "logp", "tail"))
        return Example(ids, prompt, TopK(top.long(), logp, tail))


def check_belongs(scores: ScoredRollouts, rollouts: dict[str, Any], tokenizer: Any) -> None:
    """Raise :class:`UserError` unless the scores are of these rollouts and in this tokenizer's ids."""
    index = scores.index
    if index["rollouts_sha256"] != rollouts["sha256"]:
        raise UserError(
            f"{scores.directory}: scores of other rollouts ({index['rollouts_sha256'][:12]}, these are "
            f"{rollouts['sha256'][:12]}); run opd_score on these rollouts"
        )
    if index["tokenizer_sha256"] != tokenizer_sha256(tokenizer):
        raise UserError(f"{scores.directory}: scored with another tokenizer than the student's; run opd_score again")


class Batch(NamedTuple):
    """Right-padded rollouts: ids and mask [B, T]; where a token is predicted that counts [B, T]; those tokens and the
    teacher's view of them, in the order of the mask."""

    ids: Tensor
    mask: Tensor
    predicts: Tensor
    targets: Tensor
    teacher: TopK

    def to(self, device: torch.device) -> Batch:
        teacher = TopK(*(part.to(device) for part in self.teacher))
        return Batch(*(part.to(device) for part in self[:4]), teacher)


def collate(examples: Sequence[Example]) -> Batch:
    """One batch of rollouts."""
    width = max(len(example.ids) for example in examples)
    ids = torch.zeros(len(examples), width, dtype=torch.long)
    mask, predicts = torch.zeros_like(ids), torch.zeros_like(ids, dtype=torch.bool)
    for row, example in enumerate(examples):
        ids[row, : len(example.ids)] = example.ids
        mask[row, : len(example.ids)] = 1
        predicts[row, example.prompt - 1 : len(example.ids) - 1] = True
    targets = torch.cat([example.ids[example.prompt :] for example in examples])
    teacher = TopK(*(torch.cat(parts) for parts in zip(*[example.teacher for example in examples], strict=True)))
    return Batch(ids, mask, predicts, targets, teacher)


def row_order(count: int, rows: int, steps: int, seed: int) -> Iterator[list[int]]:
    """The rollouts of each step: ``rows`` from a new seeded permutation of all ``count`` whenever one is used up."""
    waiting: list[int] = []
    epoch = 0
    for _ in range(steps):
        while len(waiting) < rows:
            order = list(range(count))
            random.Random(f"{seed}:{epoch}").shuffle(order)
            waiting += order
            epoch += 1
        yield waiting[:rows]
        waiting = waiting[rows:]


def peak_memory() -> dict[str, int | None]:
    """Peak resident memory of this process, what its tensors took on its GPU, and what the allocator held for them."""
    peaks = (torch.cuda.max_memory_allocated() >> 20, torch.cuda.max_memory_reserved() >> 20)
    tensors, held = peaks if torch.cuda.is_available() else (None, None)
    return {"peak_rss_mib": peak_rss_mib(), "peak_vram_mib": tensors, "peak_reserved_mib": held}


def write_phase(directory: Path, name: str, seconds: float, tokens: int, **facts: Any) -> None:
    """What a phase cost, beside its output: seconds, tokens, peak memory of its process."""
    value = {"phase": name, "seconds": round(seconds, 2), "tokens": tokens}
    value |= {"tokens_per_second": round(tokens / max(seconds, 1e-9), 1)}
    write_json(directory / PHASE, value | peak_memory() | facts)


def shown(path: Path) -> str:
    """A path as records name it."""
    return public_path(str(path.resolve()))
