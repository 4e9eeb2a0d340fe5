"""Train razor-tiny-vl from nothing (bash pipelines/make_tiny_vl.sh):

    python src/distill/tiny_vl_train.py --config configs/make_tiny_vl.env --out models/razor-tiny-vl \
        --work work/make_tiny_vl --result results/train/razor_tiny_vl.json

Seeded and resumable (state in --work, batches are a function of the step). The learning rate follows steps, or the clock
where MAX_SECONDS would be reached first: one run ends within its time with a rate that has decayed, and saves. Ends with
the checkpoint, its processor, and the share of test items whose reference turn greedy decoding would reproduce.
"""

from __future__ import annotations

import argparse
import random
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedTokenizerFast

from console import UserError, progress, run_cli
from settings import from_environment, load_config
from tasks_tiny import TINY_VISION_TASKS, VISION_REVISION, Scene, TinyBars, TinyCount, TinyDigits, TinyVision
from tiny_data import completion_text
from tiny_model import decoder_layer
from tiny_train import Run, Schedule, add_training_arguments, log, token_loss, write_training
from tiny_vl_model import (
    IMAGE,
    MERGE,
    PATCH,
    VISION_END,
    VISION_START,
    Layout,
    build_vl_model,
    build_vl_tokenizer,
    patches_of,
    save_processor,
    sparse_mixture,
    vision_forward,
    vl_config,
    vl_forward,
    vl_layout,
)

MIX = (TinyCount, TinyDigits, TinyCount, TinyBars)  # the rows of a batch in turn: counting takes the most practice


@dataclass(frozen=True)
class VlTrainConfig(Schedule):
    """Everything that decides the weights, but for the clock of a run that MAX_SECONDS ends."""

    layers: int
    vision_layers: int
    max_seconds: int

    def progress(self, step: int, seconds: float = 0.0) -> float:
        """How far the run is, 0 to 1: by steps, or by the clock when that is further."""
        return max(step / self.steps, seconds / self.max_seconds if self.max_seconds else 0.0)


def vl_prompt(question: str, tokens: int) -> str:
    """The template's rendering of a picture and a question, the picture's place widened to its ``tokens``."""
    picture = VISION_START + IMAGE * tokens + VISION_END
    return f"<|im_start|>user\n{picture}{question}<|im_end|>\n<|im_start|>assistant\n<think>\n"


def vl_texts(count: int = 2000) -> list[str]:
    """Training-split questions and solutions, and the names of the two speakers, for the BPE trainer."""
    rng = random.Random("tokenizer:tiny-vl")
    scenes = [task().scene_of(rng, "train") for task in TINY_VISION_TASKS for _ in range(count)]
    return [text for scene in scenes for text in ("user", scene.question, "assistant", scene.solution)]


class VlBatches(Dataset):
    """Item ``step`` is one batch: (ids [rows, length + 1], loss weights of the same shape, pictures uint8 [rows, S, S, 3])."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, config: VlTrainConfig) -> None:
        if config.length % 16:
            raise UserError(f"LENGTH={config.length}: the gated delta rule takes chunks of 16 tokens; give a multiple of it")
        self.tokenizer, self.config = tokenizer, config
        self.tasks: list[TinyVision] = [task() for task in MIX]

    def __len__(self) -> int:
        return self.config.steps

    def __getitem__(self, step: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        if not 0 <= step < self.config.steps:
            raise IndexError(step)
        rng = random.Random(f"vl-batch:{self.config.seed}:{step}")
        scenes = [self.tasks[row % len(self.tasks)].scene_of(rng, "train") for row in range(self.config.rows)]
        return encode_scenes(self.tokenizer, scenes, self.config.length + 1, self.config.prompt_weight)


def encode_scenes(
    tokenizer: PreTrainedTokenizerFast, scenes: list[Scene], size: int, prompt_weight: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Scenes as ids, loss weights (padding and the picture's tokens 0) and pictures."""
    ids = torch.full((len(scenes), size), tokenizer.pad_token_id)
    weights = torch.zeros(len(scenes), size)
    pixels = torch.from_numpy(np.stack([np.asarray(scene.image, dtype=np.uint8) for scene in scenes]))
    tokens = (pixels.shape[1] // (PATCH * MERGE)) ** 2
    texts = [text for s in scenes for text in (vl_prompt(s.question, tokens), completion_text(s.solution))]
    encoded = [e.ids for e in tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
    for row, (prompt, rest) in enumerate(zip(encoded[::2], encoded[1::2], strict=True)):
        rest = rest[:-1]  # without the newline after the end of turn: generation stops before it
        if len(prompt) + len(rest) > size:
            raise UserError(f"LENGTH: an item has {len(prompt) + len(rest)} tokens; {size} fit")
        ids[row, : len(prompt) + len(rest)] = torch.tensor(prompt + rest)
        weights[row, tokens + 5 : len(prompt)] = prompt_weight  # after the picture
        weights[row, len(prompt) : len(prompt) + len(rest)] = 1.0
    return ids, weights, pixels


class VlRun(Run):
    """tiny_train.Run with this model. STEPS and MAX_SECONDS may be larger than they were: that extends a finished run."""

    free = ("steps", "max_seconds")

    def build(self, tokenizer: PreTrainedTokenizerFast) -> torch.nn.Module:
        return build_vl_model(vl_config(tokenizer, self.config.layers, self.config.vision_layers), self.config.seed)

    @property
    def finished(self) -> bool:
        return self.config.progress(self.step, self.seconds) >= 1


def cpu_layer(*args: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return decoder_layer(*args, mix=sparse_mixture)


def functions(device: torch.device) -> tuple:
    """(decoder layer, vision tower, loss): compiled on a GPU, sparse experts on a CPU."""
    if device.type == "cpu":
        return cpu_layer, vision_forward, token_loss
    torch.set_float32_matmul_precision("high")
    return tuple(torch.compile(function, dynamic=False) for function in (decoder_layer, vision_forward, token_loss))


def train(run: VlRun, tokenizer: PreTrainedTokenizerFast, workers: int, save_every: int, stop: int | None = None) -> None:
    """Run the remaining steps (up to ``stop``, if given), logging every 50, saving at the given interval and at the end."""
    config, device = run.config, run.device
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    loader = DataLoader(
        VlBatches(tokenizer, config), batch_size=None, sampler=range(run.step, config.steps), num_workers=workers,
        prefetch_factor=4 if workers else None, pin_memory=device.type == "cuda",
    )  # fmt: skip
    layer_fn, vision_fn, loss_fn = functions(device)
    layout: Layout | None = None
    started, before, bar = time.monotonic(), run.seconds, progress(config.steps, "train", "step")
    bar.update(run.step)
    for ids, weights, pixels in loader:
        rate = config.rate(run.step, run.seconds)
        for group in run.optimizer.param_groups:
            group["lr"] = rate
        ids, weights = ids.to(device, non_blocking=True), weights.to(device, non_blocking=True)
        patches = patches_of(pixels.to(device, non_blocking=True))
        layout = layout or vl_layout(run.model, ids[:, :-1], patches)
        hidden, balance, load = vl_forward(run.model, ids[:, :-1], patches, dtype, layer_fn, vision_fn, layout)
        loss = loss_fn(run.model, hidden, ids[:, 1:], weights[:, 1:])
        (loss + config.balance * balance).backward()
        norm = torch.nn.utils.clip_grad_norm_(run.model.parameters(), 1.0)
        run.optimizer.step()
        run.optimizer.zero_grad(set_to_none=True)
        run.step += 1
        run.seconds = before + time.monotonic() - started
        bar.update(1)
        last = run.finished or run.step == stop
        if run.step % 50 == 0 or last:
            log(run, loss.item(), norm.item(), load, rate)
        if run.step % save_every == 0 or last:
            run.save()
        if last:
            break
    bar.close()


@torch.no_grad()
def exact_match(run: VlRun, tokenizer: PreTrainedTokenizerFast, items: int) -> dict[str, float]:
    """Per task, the share of test items whose every reference token is the argmax: greedy decoding would write it."""
    dtype = torch.bfloat16 if run.device.type == "cuda" else torch.float32
    layer_fn = cpu_layer if run.device.type == "cpu" else decoder_layer
    shares = {}
    for task in (task() for task in TINY_VISION_TASKS):
        rng, right = random.Random(f"probe:{task.name}"), 0
        scenes = [task.scene_of(rng, "test") for _ in range(items)]
        for start in range(0, items, 50):
            ids, weights, pixels = encode_scenes(tokenizer, scenes[start : start + 50], run.config.length + 1, 0.0)
            patches = patches_of(pixels.to(run.device))
            hidden, _, _ = vl_forward(run.model, ids[:, :-1].to(run.device), patches, dtype, layer_fn)
            guess = F.linear(hidden, run.model.lm_head.weight.to(dtype)).argmax(-1).cpu()
            right += ((guess == ids[:, 1:]) | (weights[:, 1:] == 0)).all(1).sum().item()
        shares[task.name] = right / items
    return shares


def export(run: VlRun, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """The checkpoint in BF16 with its processor."""
    run.model.to("cpu", torch.bfloat16).save_pretrained(out)
    save_processor(tokenizer, out)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add_training_arguments(parser, "configs/make_tiny_vl.env")
    parser.add_argument("--workers", type=int, default=12, help="processes that draw batches; 0: this one")
    parser.add_argument("--save-every", type=int, default=500, help="steps between saved states (default 500)")
    parser.add_argument("--probe-items", type=int, default=200, help="held-out items of each task at the end")
    for name in ("steps", "rows", "max-seconds"):
        parser.add_argument(f"--{name}", help=f"override {name.upper().replace('-', '_')} of the config")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    given = {key.upper(): getattr(args, key) for key in ("steps", "rows", "max_seconds") if getattr(args, key)}
    config = load_config(VlTrainConfig, args.config, from_environment(VlTrainConfig) | given)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    started = time.time()
    args.work.mkdir(parents=True, exist_ok=True)
    tokenizer = build_vl_tokenizer(vl_texts())
    run = VlRun(config, tokenizer, args.work, device)
    count = sum(p.numel() for p in run.model.parameters())
    print(f"{count / 1e6:.2f} M parameters on {device}; from step {run.step} of {config.steps}; {config}", flush=True)
    if not run.finished:
        train(run, tokenizer, args.workers, args.save_every)
    shares = exact_match(run, tokenizer, args.probe_items)
    print(shares, flush=True)
    export(run, tokenizer, args.out)
    write_training(
        args, run, started, {"name": "tiny_vision_tasks", "revision": VISION_REVISION},
        {"steps": run.step, "pictures": run.step * config.rows, "exact_match": shares},
    )  # fmt: skip


if __name__ == "__main__":
    run_cli(main)
