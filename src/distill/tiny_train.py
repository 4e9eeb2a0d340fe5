"""Train razor-tiny from nothing (bash pipelines/make_tiny.sh):

    python src/distill/tiny_train.py --config configs/make_tiny.env --out models/razor-tiny --work work/make_tiny \
        --result results/train/razor_tiny.json

Seeded and resumable (state in --work, batches are a function of the step). Ends with the checkpoint, its loss curve and
a probe of how full the model is: teacher-forced exact match of the test answers under round-to-nearest experts.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast, Qwen3_5MoeForCausalLM

from console import UserError, atomic_path, progress, run_cli
from moe_quant import fake_quant
from records import describe_model, write_result
from settings import from_environment, load_config
from task_text import GENERATOR_REVISION, TASK_TEXTS, WORLD_SEED
from tiny_data import TinyBatches, completion_text, prompt_text
from tiny_model import decoder_layer, init_weights, tiny_config, train_forward
from tiny_tokenizer import build_tokenizer


@dataclass(frozen=True)
class Schedule:
    """What the trainings of both tiny models have in common."""

    seed: int
    steps: int
    rows: int
    length: int
    learning_rate: float
    warmup: int
    decay_from: float
    weight_decay: float
    balance: float
    prompt_weight: float

    def progress(self, step: int, seconds: float = 0.0) -> float:
        """How far the run is, 0 to 1."""
        return step / self.steps

    def rate(self, step: int, seconds: float = 0.0) -> float:
        """Learning rate of a step: linear warm-up, flat, linear decay to 2 % of the peak."""
        decay = 1 - 0.98 * max(0.0, (self.progress(step, seconds) - self.decay_from) / (1 - self.decay_from))
        return self.learning_rate * min((step + 1) / self.warmup, 1.0) * decay


@dataclass(frozen=True)
class TrainConfig(Schedule):
    """Everything that decides the weights. Shares are of training tokens; tiny_code takes what is left."""

    share_statements: float
    share_options: float
    share_know: float
    share_math: float
    share_reason: float

    def shares(self) -> dict[str, float]:
        shares = {
            "statements": self.share_statements,
            "options": self.share_options,
            "tiny_know": self.share_know,
            "tiny_math": self.share_math,
            "tiny_reason": self.share_reason,
        }
        rest = 1 - sum(shares.values())
        if min(shares.values()) <= 0 or rest <= 0:
            raise UserError("training shares must be positive and leave something for tiny_code")
        return shares | {"tiny_code": rest}


def token_loss(model: torch.nn.Module, hidden: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Weighted mean cross-entropy. hidden [B, T, H], targets and weights [B, T]."""
    logits = F.linear(hidden, model.lm_head.weight.to(hidden.dtype)).float()
    losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    return (losses * weights.flatten()).sum() / weights.sum()


def make_optimizer(model: torch.nn.Module, config: Schedule, fused: bool) -> torch.optim.Optimizer:
    """AdamW; matrices decay, vectors (norms, biases, decays) do not."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.95), fused=fused)


class Run:
    """Model, optimizer, step and loss curve; saved to and restored from one file, atomically. ``free``: settings that may
    differ from those of the file."""

    free: tuple[str, ...] = ()

    def __init__(self, config: Schedule, tokenizer: PreTrainedTokenizerFast, work: Path, device: torch.device) -> None:
        self.config, self.path, self.device = config, work / "state.pt", device
        self.model = self.build(tokenizer).to(device)
        self.optimizer = make_optimizer(self.model, config, fused=device.type == "cuda")
        self.step, self.seconds, self.curve = 0, 0.0, []
        if self.path.exists():
            self.restore()

    def build(self, tokenizer: PreTrainedTokenizerFast) -> torch.nn.Module:
        """The untrained model, in float32."""
        model = Qwen3_5MoeForCausalLM(tiny_config(len(tokenizer), tokenizer.eos_token_id, tokenizer.pad_token_id)).float()
        init_weights(model, self.config.seed)
        return model

    def save(self) -> None:
        state = {
            "config": dataclasses.asdict(self.config),
            "step": self.step,
            "seconds": self.seconds,
            "curve": self.curve,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        with atomic_path(self.path) as temporary:
            torch.save(state, temporary)

    def restore(self) -> None:
        state = torch.load(self.path, map_location=self.device, weights_only=True)
        settings = dataclasses.asdict(self.config)
        if state["config"] | {name: settings[name] for name in self.free} != settings:
            raise UserError(f"{self.path}: made with other settings; remove it or give another --work")
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.seconds, self.curve = state["step"], state["seconds"], state["curve"]


def train(
    run: Run, tokenizer: PreTrainedTokenizerFast, workers: int, save_every: int, probe_every: int, probe_items: int,
    stop: int | None = None,
) -> None:  # fmt: skip
    """Run the remaining steps (up to ``stop``, if given), logging every 50, saving and probing at the given intervals and
    at the end."""
    config, device = run.config, run.device
    last = config.steps if stop is None else stop
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    data = TinyBatches(tokenizer, config.seed, config.steps, config.rows, config.length, config.shares(), config.prompt_weight)
    loader = DataLoader(
        data, batch_size=None, sampler=range(run.step, last), num_workers=workers,
        prefetch_factor=4 if workers else None, pin_memory=device.type == "cuda",
    )  # fmt: skip

    layer_fn, loss_fn = decoder_layer, token_loss
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
        layer_fn, loss_fn = (torch.compile(function, dynamic=False) for function in (layer_fn, loss_fn))

    def objective(ids: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        hidden, balance, load = train_forward(run.model, ids[:, :-1], dtype, layer_fn)
        loss = loss_fn(run.model, hidden, ids[:, 1:], weights[:, 1:])
        return loss + config.balance * balance, loss, load

    probes = make_probes(tokenizer, probe_items) if probe_items else {}
    started, before, bar = time.monotonic(), run.seconds, progress(config.steps, "train", "step")
    bar.update(run.step)
    for ids, weights in loader:
        for group in run.optimizer.param_groups:
            group["lr"] = config.rate(run.step)
        total, loss, load = objective(ids.to(device, non_blocking=True), weights.to(device, non_blocking=True))
        total.backward()
        norm = torch.nn.utils.clip_grad_norm_(run.model.parameters(), 1.0)
        run.optimizer.step()
        run.optimizer.zero_grad(set_to_none=True)
        run.step += 1
        run.seconds = before + time.monotonic() - started
        bar.update(1)
        if run.step % 50 == 0 or run.step == last:
            log(run, loss.item(), norm.item(), load)
        if probe_items and (run.step % probe_every == 0 or run.step == last):
            run.curve[-1]["probe"] = probe(run.model, probes, dtype)
            print(json.dumps({"step": run.step, **run.curve[-1]["probe"]}), flush=True)
        if run.step % save_every == 0 or run.step == last:
            run.save()
    bar.close()


def log(run: Run, loss: float, norm: float, load: torch.Tensor, rate: float | None = None) -> None:
    """One line and one point of the curve; a loss that is not finite stops the run before it is saved."""
    if not math.isfinite(loss):
        raise UserError(f"step {run.step}: the loss is {loss}; the last good state is {run.path}")
    tokens = run.config.rows * run.config.length
    entry = {"step": run.step, "loss": round(loss, 5), "grad_norm": round(norm, 4), "lr": rate or run.config.rate(run.step - 1)}
    entry |= {"min_load": round(load.min().item() * load.shape[1], 4), "seconds": round(run.seconds, 1)}
    speed = tokens * 50 / (run.seconds - run.curve[-1]["seconds"]) if run.curve else 0
    run.curve.append(entry)
    print(" ".join(f"{key} {value}" for key, value in entry.items()), f"tokens/s {speed:.0f}", flush=True)


def make_probes(tokenizer: PreTrainedTokenizerFast, count: int) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """For each task: (ids [count, T] right-padded to a multiple of 64, mask of the completion tokens)."""
    probes = {}
    for task in TASK_TEXTS:
        rows, starts = [], []
        for item, solution in task().load_with_solutions(count):
            prompt, rest = (tokenizer(text)["input_ids"] for text in (prompt_text(item.question), completion_text(solution)))
            rows.append(prompt + rest[:-1])  # without the newline after the end of turn: generation stops before it
            starts.append(len(prompt))
        width = -(-max(map(len, rows)) // 64) * 64 + 1
        ids = torch.full((count, width), tokenizer.pad_token_id)
        mask = torch.zeros(count, width, dtype=torch.bool)
        for i, (row, start) in enumerate(zip(rows, starts, strict=True)):
            ids[i, : len(row)] = torch.tensor(row)
            mask[i, start : len(row)] = True
        probes[task.name] = ids, mask
    return probes


PROBE_RECIPES = {"bf16": (16, 16), "int4": (4, 4), "int3/4": (3, 4), "int2/4": (2, 4), "int2/16": (2, 16)}


@torch.no_grad()
def probe(model: torch.nn.Module, probes: dict, dtype: torch.dtype) -> dict[str, dict[str, float]]:
    """Share of test items whose every reference token is the argmax, per task, for round-to-nearest recipes (g128)."""
    original = {name: p.detach().clone() for name, p in model.named_parameters()}
    results = {}
    for recipe, (expert_bits, linear_bits) in PROBE_RECIPES.items():
        for name, p in model.named_parameters():
            bits = expert_bits if ".experts." in name else linear_bits
            value = original[name].bfloat16()
            router = ".gate." in name or "shared_expert_gate" in name
            if bits < 16 and p.ndim >= 2 and not router and "conv1d" not in name:
                value = fake_quant(value, bits, 128, clip_steps=1)
            p.copy_(value)
        results[recipe] = {task: exact_match(model, ids, mask, dtype) for task, (ids, mask) in probes.items()}
    for name, p in model.named_parameters():
        p.copy_(original[name])
    return results


def exact_match(model: torch.nn.Module, ids: torch.Tensor, mask: torch.Tensor, dtype: torch.dtype) -> float:
    """Teacher-forced: an item counts when greedy decoding would reproduce its reference turn."""
    device = model.lm_head.weight.device
    right = 0
    for rows, kept in zip(ids.split(64), mask.split(64), strict=True):
        hidden, _, _ = train_forward(model, rows[:, :-1].to(device), dtype)
        guess = F.linear(hidden, model.lm_head.weight.to(dtype)).argmax(-1).cpu()
        right += ((guess == rows[:, 1:]) | ~kept[:, 1:]).all(1).sum().item()
    return right / len(ids)


def add_training_arguments(parser: argparse.ArgumentParser, config: str) -> None:
    """The arguments that the trainings of both tiny models have in common."""
    parser.add_argument("--config", type=Path, default=Path(config), help=f"settings (default {config})")
    parser.add_argument("--out", type=Path, required=True, help="directory of the checkpoint")
    parser.add_argument("--work", type=Path, required=True, help="directory of the training state")
    parser.add_argument("--result", type=Path, required=True, help="JSON of the training record; its name is the tag")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add_training_arguments(parser, "configs/make_tiny.env")
    parser.add_argument("--workers", type=int, default=2, help="processes that make batches")
    parser.add_argument("--save-every", type=int, default=1000, help="steps between saved states (default 1000)")
    parser.add_argument("--probe-every", type=int, default=1000, help="steps between probes (default 1000)")
    parser.add_argument("--probe-items", type=int, default=256, help="held-out items of each task in a probe; 0: none")
    parser.add_argument("--length", help="override LENGTH of the config (for a trial)")
    parser.add_argument("--steps", help="override STEPS of the config (for a trial)")
    parser.add_argument("--rows", help="override ROWS of the config (for a trial)")
    return parser.parse_args()


def write_training(args: argparse.Namespace, run: Run, started: float, data: dict[str, str], metrics: dict[str, Any]) -> None:
    """The record of a training; ``metrics``: what it has beside what every training has."""
    shared = {
        "parameters": sum(p.numel() for p in run.model.parameters()), "train_seconds": round(run.seconds, 1),
        "final_loss": run.curve[-1]["loss"], "probe_items": args.probe_items, "curve": run.curve,
    }  # fmt: skip
    write_result(
        args.result, kind="train", tag=args.result.stem, started=started, seconds=run.seconds, model=describe_model(args.out),
        recipe=dataclasses.asdict(run.config), data=[data | {"sha256": None, "n": None}], metrics=metrics | shared,
    )  # fmt: skip


def main() -> None:
    args = parse_args()
    overrides = {key: getattr(args, key.lower()) for key in ("STEPS", "ROWS", "LENGTH") if getattr(args, key.lower())}
    config = load_config(TrainConfig, args.config, from_environment(TrainConfig) | overrides)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    started = time.time()
    args.work.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer()
    run = Run(config, tokenizer, args.work, device)
    count = sum(p.numel() for p in run.model.parameters())
    print(f"{count / 1e6:.2f} M parameters on {device}; from step {run.step} of {config.steps}; {config}", flush=True)
    train(run, tokenizer, args.workers, args.save_every, args.probe_every, args.probe_items)
    run.model.to("cpu", torch.bfloat16).save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    write_training(
        args, run, started, {"name": "tiny_tasks", "revision": f"{GENERATOR_REVISION}, world {WORLD_SEED}"},
        {"tokens": config.steps * config.rows * config.length,
         "tokens_per_second": round(config.steps * config.rows * config.length / run.seconds)},
    )  # fmt: skip


if __name__ == "__main__":
    run_cli(main)
