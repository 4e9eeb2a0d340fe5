"""Every setting of recovery, declared once: what each phase takes, and what distill.sh takes, which is all of them.

Not a command. A phase is given the class of its own settings; :class:`DistillSettings` is each of them.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from console import UserError
from moe_lora import MODES
from opd_losses import LOSSES
from recipe import Recipe
from settings import keys_of, part, setting


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
    method: str = setting("clip", "of the rounding")
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
