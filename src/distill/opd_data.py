"""The settings of the phases of distillation, the files that pass between them, and the checks that they belong together.

Not a command; docs/OPD_INTEGRATION.md describes the formats.

    rollouts   samples.jsonl (every sample, resumable), rollouts.jsonl (the kept ones), rollouts.json (counts, digest)
    scores     index.json, scores-00000.safetensors, ...: token ids and the teacher's top-k for every completion token
    adapter    adapter.safetensors (A, B and growth of every parameter), adapter.json (what it belongs to, the loss curve)
"""

from __future__ import annotations

import argparse
import json
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from checkpoint import Checkpoint
from console import UserError, atomic_path, file_sha256, read_json, write_json
from moe_lora import MODES
from opd_losses import LOSSES, TopK
from recipe import Recipe
from records import header_sha256, peak_rss_mib, public_path, sha256_json
from settings import keys_of, part, setting

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
    # not splitlines, which also breaks a line at U+2028
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line], manifest


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


class Checked:
    """Settings that make sense; each class below adds its own conditions."""

    def __post_init__(self) -> None:
        """Raise :class:`UserError` on values that do not."""


@dataclass(frozen=True, kw_only=True)
class Seed(Checked):
    seed: int = setting(0, "of everything that is drawn")


@dataclass(frozen=True, kw_only=True)
class Generation(Seed):
    """Phase A."""

    tasks: str = setting("", "benchmarks with a training split, comma-separated")
    prompts: Path | None = setting(None, "jsonl file of prompts beside or instead of the tasks")
    limit: int = setting(64, "prompts of each task, or of the file without tasks")
    repeats: int = setting(1, "samples of each prompt; above 1 needs a temperature")
    backend: str = setting("auto", "auto, hf, vllm or llamacpp")
    # a resumed run must make the same batches: a chunk is made whole or not at all
    chunk: int = setting(64, "prompts generated together; a GPU takes many")
    finished_only: bool = setting(False, "keep only rollouts that ended by themselves")
    correct_only: bool = setting(False, "keep only those that the grader accepts")
    max_tokens: int = setting(32768, "of a rollout")
    temperature: float = setting(1.0, "of the rollouts")
    top_p: float = setting(1.0, "1.0 is off")
    top_k: int = setting(0, "0 is off")

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.limit, self.repeats, self.max_tokens, self.chunk) < 1:
            raise UserError("--limit, --repeats, --max-tokens and --chunk must be at least 1")
        if self.temperature < 0 or not 0 < self.top_p <= 1 or self.top_k < 0:
            raise UserError("sampling: temperature >= 0, 0 < top-p <= 1, top-k >= 0")
        if self.repeats > 1 and self.temperature == 0:
            raise UserError("--repeats above 1 at temperature 0 would repeat the same text")


@dataclass(frozen=True, kw_only=True)
class Scoring(Checked):
    """Phase B."""

    k: int = setting(32, "tokens kept at each position (20 to 64 are usual)")
    score_temperature: float = setting(1.0, "divides the logits; training uses the same")
    score_batch: int = setting(16, "rollouts scored at once")
    shard_rollouts: int = setting(512, "rollouts in one file of scores")
    score_prompts: bool = setting(False, "also score (and so train on) the tokens of the prompts")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.score_temperature <= 0 or min(self.k, self.score_batch, self.shard_rollouts) < 1:
            raise UserError("--k, --score-batch and --shard-rollouts must be at least 1, --score-temperature above 0")


def batch_option(parser: argparse.ArgumentParser) -> None:
    """The short form of --score-batch, for commands that know no other batch."""
    parser.add_argument("--batch", dest="score_batch", help="the same as --score-batch")


@dataclass(frozen=True, kw_only=True)
class AdapterSettings(Seed):
    """What is trained."""

    rank: int = setting(16, "of the adapters")
    mode: str = setting("lora", ", ".join(MODES), choices=MODES)
    linears: bool = setting(False, "adapters on the other quantized linears too")
    base: str = setting(
        "teacher", "where a latent weight lies in its cell: towards the teacher's, or (codes) in the middle",
        choices=("teacher", "codes"),
    )  # fmt: skip
    ggml: str = setting("", "block type of llama.cpp as the experts' grid instead of the student's")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mode != "scales" and self.rank < 1:
            raise UserError(f"rank {self.rank} must be at least 1")

    def adapter(self) -> dict[str, Any]:
        """What adapter.json says of an adapter, and merging reads."""
        return {name: getattr(self, name) for name in ("rank", "mode", "linears", "base", "ggml", "seed")}


@dataclass(frozen=True, kw_only=True)
class TrainSettings(AdapterSettings):
    """Phase C."""

    steps: int = setting(help="0: an adapter that changes nothing but the grid")
    init: Path | None = setting(None, "an adapter of the same student and rank to go on from, on other rollouts")
    loss: str = setting("reverse_kl", ", ".join(LOSSES), choices=LOSSES)
    lr: float = setting(0.01, "in steps of the grid")
    warmup: int = setting(5, "steps of the rising rate")
    clip: float = setting(1.0, "largest norm of the gradient")
    rows: int = setting(16, "rollouts of a step, over all processes")
    micro_rows: int = setting(8, "rollouts at once on a process")
    save_every: int = setting(20, "steps between saved states")
    recompute: bool = setting(True, "gradient checkpointing: a third slower, one layer's activations")

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.rows, self.micro_rows, self.save_every) < 1 or min(self.steps, self.warmup) < 0:
            raise UserError("--rows, --micro-rows and --save-every must be at least 1, --steps and --warmup at least 0")
        if not self.lr > 0 or not self.clip > 0:
            raise UserError("--lr and --clip must be above 0")

    def rate(self, step: int) -> float:
        """Learning rate: linear warm-up, then a cosine down to a tenth."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        part_ = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.lr * (0.55 + 0.45 * math.cos(math.pi * part_))

    def training(self) -> dict[str, Any]:
        """What must be the same for a state to be resumed; how often it is saved need not."""
        names = ("steps", "rows", "micro_rows", "lr", "warmup", "loss", "clip", "seed")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True, kw_only=True)
class AllPhases(Generation, Scoring, TrainSettings):
    """Phases A to C, and how the result is judged."""

    teacher: Path = setting(help="the original checkpoint")
    work: Path = setting(help="directory of all phases' output")
    kl_items: int = setting(32, "transcripts of each task that the KL before and after is measured on")
    eval_limit: int = setting(0, "test items of each task before and after; 0: no accuracy")


@dataclass(frozen=True, kw_only=True)
class DistillSettings(AllPhases):
    """One run, as the keys of configs/opd_tiny.env."""

    student: Path | None = setting(None, "a checkpoint of quant_save; empty: quantize the teacher into WORK/student")
    recipe: Recipe = part(Recipe)
    tag: str = setting(help="name of the record, results/distill/TAG.json")
    cache: Path | None = setting(None, "rollouts/ and scores/ of another run instead of phases A and B")
    trajectories: str = setting("student", "whose texts: on-policy, or the teacher's own", choices=("student", "teacher"))
    rollout_model: Path | None = setting(None, "what generates, when it is not the student's checkpoint: its GGUF")
    processes: int = setting(1, "of torchrun: GPUs")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.init and not self.cache and self.trajectories == "student" and not self.rollout_model:
            raise UserError("INIT with rollouts of the student: set ROLLOUT_MODEL to what INIT's run recovered")
        if self.processes < 1:
            raise UserError(f"PROCESSES={self.processes}: must be at least 1")


def options(cls: type, settings: object) -> list[str]:
    """The settings of ``cls`` as options of the command that takes them."""
    found = []
    for key in keys_of(cls):
        value = getattr(settings, key.name)
        if key.kind is bool:
            found += [key.option] if value else [key.option.replace("--", "--no-", 1)] if key.default else []
        elif value not in (None, ""):
            found += [key.option, str(value)]
    return found
