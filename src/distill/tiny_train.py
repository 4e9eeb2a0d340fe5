"""Train the tiny models: razor-tiny, its multi-token-prediction block, razor-tiny-vl, and models that read real text.

What a config has decides: VISION_LAYERS for razor-tiny-vl, MTP_OF for the block of a model whose own weights stay (bash
pipelines/make_tiny.sh [vl|mtp]); with --text it is a mixture or a dense model on the tokens of a corpus, on one GPU or, under
torchrun, on several (bash pipelines/make_tiny.sh text 35m):

    python src/distill/tiny_train.py --config configs/make_tiny.env --out models/razor-tiny --work work/make_tiny \
        --result results/train/razor_tiny.json

Seeded and resumable (state in --work, batches are a function of the step). The learning rate follows steps, or the clock where
MAX_SECONDS would be reached first: one run ends within its time with a rate that has decayed, and saves. Ends with the
checkpoint, its loss curve and the share of test items whose reference turn greedy decoding would reproduce.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedTokenizerFast, Qwen3_5MoeForCausalLM

import tiny_data
import tiny_model
from console import UserError, atomic_path, progress, read_object, run_cli
from fsdp_setup import World, end_world, start_world, summed
from hf_model import load_tokenizer, load_weights
from mtp import MtpBlock, write_beside
from records import describe_model, write_result
from settings import parse_settings, setting
from task_text import GENERATOR_REVISION, TASK_TEXTS, WORLD_SEED
from tasks_tiny import TINY_VISION_TASKS, VISION_REVISION
from tiny_data import STRATA, encode_pairs, encode_scenes, ids_entry, prompt_text
from tiny_model import balance_loss, decoder_layer, vision_forward

Batch = tuple[torch.Tensor, ...]  # ids [B, T + 1], loss weights of the same shape, and pictures where there are any
Forward = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # hidden states, mean probability and load of the experts


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """Everything that decides the weights, but for the clock of a run that MAX_SECONDS ends."""

    seed: int
    steps: int
    rows: int  # sequences a step
    length: int  # tokens a sequence
    learning_rate: float
    warmup: int
    decay_from: float = setting(help="share of the run after which the rate falls linearly to 2 % of its peak")
    weight_decay: float
    balance: float = setting(help="weight of the load-balancing loss")
    prompt_weight: float = setting(help="loss weight of the tokens of the question")
    layers: int = setting(8, "of the text model")
    hidden: int = setting(256, "size of the hidden state, with a corpus")
    inner: int = setting(256, "inner size of an expert, with a corpus")
    experts: int = setting(8, "with a corpus; 0: a dense model")
    top_k: int = setting(2, "experts of a token, with a corpus")
    dense: int = setting(0, "inner size of the dense model")
    vision_layers: int = setting(0, "of the vision tower; 0: razor-tiny, which has none")
    mtp_of: str = setting("", "the model whose multi-token-prediction block is trained, beside its own frozen weights")
    mtp_depths: int = setting(2, "tokens that the block learns to draft one after another")
    max_seconds: int = setting(0, "the run ends by then with a decayed rate; 0: by steps alone")
    share_statements: float = setting(0.0, "of the tokens of razor-tiny; tiny_code takes what is left")
    share_options: float = setting(0.0, "drills: a list of options repeated in another order")
    share_know: float = setting(0.0, "of the tokens")
    share_math: float = setting(0.0, "of the tokens")
    share_reason: float = setting(0.0, "of the tokens")

    def progress(self, step: int, seconds: float = 0.0) -> float:
        """How far the run is, 0 to 1: by steps, or by the clock when that is further."""
        return max(step / self.steps, seconds / self.max_seconds if self.max_seconds else 0.0)

    def rate(self, step: int, seconds: float = 0.0) -> float:
        """Learning rate of a step: linear warm-up, flat, linear decay to 2 % of the peak."""
        decay = 1 - 0.98 * max(0.0, (self.progress(step, seconds) - self.decay_from) / (1 - self.decay_from))
        return self.learning_rate * min((step + 1) / self.warmup, 1.0) * decay

    def shares(self) -> dict[str, float]:
        """Of each kind of text in the training tokens."""
        shares = {
            "statements": self.share_statements, "options": self.share_options, "tiny_know": self.share_know,
            "tiny_math": self.share_math, "tiny_reason": self.share_reason,
        }  # fmt: skip
        rest = 1 - sum(shares.values())
        if min(shares.values()) <= 0 or rest <= 0:
            raise UserError("training shares must be positive and leave something for tiny_code")
        return shares | {"tiny_code": rest}


def token_loss(model: torch.nn.Module, hidden: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Weighted mean cross-entropy. hidden [B, T, H], targets and weights [B, T]."""
    logits = F.linear(hidden, model.lm_head.weight.to(hidden.dtype)).float()
    losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    return (losses * weights.flatten()).sum() / weights.sum()


def draft_loss(
    head: torch.Tensor, hidden: torch.Tensor, teacher: torch.Tensor, weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(weighted mean KL divergence, weighted share of equal argmax) of what ``head`` [V, H] makes of the states of the model
    itself, ``teacher``, and of a draft; both [B, T, H], weights [B, T]."""
    own = F.linear(hidden, head.to(hidden.dtype)).float().log_softmax(-1)
    wanted = F.linear(teacher, head.to(teacher.dtype)).float().log_softmax(-1)
    divergence, same = (wanted.exp() * (wanted - own)).sum(-1), wanted.argmax(-1) == own.argmax(-1)
    return (divergence * weights).sum() / weights.sum(), (same * weights).sum() / weights.sum()


def make_optimizer(model: torch.nn.Module, config: TrainSettings, fused: bool) -> torch.optim.Optimizer:
    """AdamW; matrices decay, vectors (norms, biases, decays) do not."""
    matrices, vectors = ([p for p in model.parameters() if p.requires_grad and (p.ndim < 2) == flat] for flat in (False, True))
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.95), fused=fused)


class Run:
    """razor-tiny: its model, optimizer, step and loss curve; saved to and restored from one file, atomically."""

    extends = False  # whether a second call may go on for longer
    data_set = {"name": "tiny_tasks", "revision": f"{GENERATOR_REVISION}, world {WORLD_SEED}"}
    loss_fn: Callable[..., Any] = staticmethod(token_loss)

    def __init__(
        self, config: TrainSettings, tokenizer: PreTrainedTokenizerFast, work: Path, device: torch.device,
        world: World | None = None,
    ) -> None:  # fmt: skip
        self.config, self.path, self.device, self.tokenizer = config, work / "state.pt", device, tokenizer
        self.world = world or World(0, 1, device)
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.model = self.build().to(device)
        self.optimizer = make_optimizer(self.model, config, fused=device.type == "cuda")
        self.step, self.seconds, self.curve = 0, 0.0, []
        if self.path.exists():
            self.restore()

    def build(self) -> torch.nn.Module:
        """The untrained model, in float32."""
        own = self.tokenizer
        config = tiny_model.tiny_config(len(own), own.eos_token_id, own.pad_token_id, self.config.layers)
        model = Qwen3_5MoeForCausalLM(config).float()
        tiny_model.init_weights(model, self.config.seed)
        return model

    def batches(self) -> Dataset:
        c = self.config
        return tiny_data.TinyBatches(self.tokenizer, c.seed, c.steps, c.rows, c.length, c.prompt_weight, shares=c.shares())

    def forward(self, inputs: Batch, layer_fn: Callable[..., Forward], vision_fn: Callable[..., torch.Tensor]) -> Forward:
        """Of ids [B, T] (and pictures)."""
        return tiny_model.train_forward(self.model, *inputs, self.dtype, layer_fn)

    def objective(
        self, batch: Batch, layer_fn: Callable[..., Forward], vision_fn: Callable[..., torch.Tensor], loss_fn: Any
    ) -> Forward:
        """(what is minimised, the loss without the balance of the experts, their load) of a batch."""
        ids, weights, *pictures = batch
        hidden, probs, load = self.forward((ids[:, :-1], *pictures), layer_fn, vision_fn)
        load = summed(load, self.world) / self.world.size  # balanced over the whole step, as one process would
        loss = loss_fn(self.model, hidden, ids[:, 1:], weights[:, 1:])
        return loss + self.config.balance * balance_loss(probs, load), loss, load

    def made_of(self) -> dict[str, Any]:
        """What decides the weights: a state is resumed with the same alone."""
        return dataclasses.asdict(self.config)

    def data(self) -> list[dict[str, Any]]:
        """The record's entries of what was read."""
        return [self.data_set | {"sha256": None, "n": None}]

    def seen(self) -> dict[str, Any]:
        """What a point of the curve says beside what every training has."""
        return {}

    @property
    def finished(self) -> bool:
        return self.config.progress(self.step, self.seconds) >= 1

    def save(self) -> None:
        state = {"config": self.made_of(), "step": self.step, "seconds": self.seconds, "curve": self.curve}
        state |= {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        with atomic_path(self.path) as temporary:
            torch.save(state, temporary)

    def restore(self) -> None:
        """Of a run that the clock may end, STEPS and MAX_SECONDS may be larger than they were: that extends it."""
        state = torch.load(self.path, map_location=self.device, weights_only=True)
        settings = self.made_of()
        free = ("steps", "max_seconds") if self.extends else ()
        if state["config"] | {name: settings[name] for name in free} != settings:
            raise UserError(f"{self.path}: made with other settings or data; remove it or give another --work")
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.seconds, self.curve = state["step"], state["seconds"], state["curve"]

    def log(self, loss: float, norm: float, load: torch.Tensor, rate: float) -> None:
        """One line and one point of the curve; a loss that is not finite stops the run before it is saved."""
        if not math.isfinite(loss):
            raise UserError(f"step {self.step}: the loss is {loss}; the last good state is {self.path}")
        tokens = self.config.rows * self.config.length
        entry = {"step": self.step, "loss": round(loss, 5), "grad_norm": round(norm, 4), "lr": rate}
        entry |= {"min_load": round(load.min().item() * load.shape[1], 4), "seconds": round(self.seconds, 1)}
        entry |= self.seen()
        speed = tokens * 50 / (self.seconds - self.curve[-1]["seconds"]) if self.curve else 0
        self.curve.append(entry)
        print(" ".join(f"{key} {value}" for key, value in entry.items()), f"tokens/s {speed:.0f}", flush=True)

    def held_out(self, items: int) -> dict[str, Batch]:
        """Ids, weights (and pictures) of test items of each task."""
        pairs = {task.name: task().load_with_solutions(items) for task in TASK_TEXTS}
        return {
            name: encode_pairs(self.tokenizer, [(prompt_text(item.question), solution) for item, solution in own])
            for name, own in pairs.items()
        }

    @torch.no_grad()
    def exact_match(self, ids: torch.Tensor, weights: torch.Tensor, *pictures: torch.Tensor) -> float:
        """Share of items whose every reference token is the argmax: greedy decoding would write it."""
        right, head = 0, self.model.lm_head.weight.to(self.dtype)
        for rows, kept, *seen in zip(*(part.split(64) for part in (ids, weights, *pictures)), strict=True):
            inputs = tuple(part.to(self.device) for part in (rows[:, :-1], *seen))
            hidden, _, _ = self.forward(inputs, decoder_layer, vision_forward)
            guess = F.linear(hidden, head).argmax(-1).cpu()
            right += ((guess == rows[:, 1:]) | (kept[:, 1:] == 0)).all(1).sum().item()
        return right / len(ids)

    def metrics(self, items: int) -> dict[str, Any]:
        """What the record of this model says beside what every training has."""
        tokens = self.step * self.config.rows * self.config.length
        if items:
            self.curve[-1]["probe"] = {"bf16": self.exact_matches(items)}
        return {"tokens": tokens, "tokens_per_second": round(tokens / self.seconds)}

    def exact_matches(self, items: int) -> dict[str, float]:
        shares = {name: self.exact_match(*rows) for name, rows in self.held_out(items).items()}
        print(shares, flush=True)
        return shares

    def export(self, out: Path) -> None:
        """The checkpoint in BF16 with its tokenizer, or its processor."""
        self.model.to("cpu", torch.bfloat16).save_pretrained(out)
        self.tokenizer.save_pretrained(out)
        if self.config.vision_layers:
            tiny_model.save_processor(self.tokenizer, out)


class VlRun(Run):
    """The same of razor-tiny-vl."""

    extends = True
    data_set = {"name": "tiny_vision_tasks", "revision": VISION_REVISION}
    layout: tiny_model.Layout | None = None  # of all batches of the training

    def build(self) -> torch.nn.Module:
        config = tiny_model.vl_config(self.tokenizer, self.config.layers, self.config.vision_layers)
        return tiny_model.build_vl_model(config, self.config.seed)

    def batches(self) -> Dataset:
        c = self.config
        return tiny_data.VlBatches(self.tokenizer, c.seed, c.steps, c.rows, c.length, c.prompt_weight)

    def forward(self, inputs: Batch, layer_fn: Callable[..., Forward], vision_fn: Callable[..., torch.Tensor]) -> Forward:
        ids, patches = inputs[0], tiny_model.patches_of(inputs[1])
        self.layout = self.layout or tiny_model.vl_layout(self.model, ids, patches)
        return tiny_model.vl_forward(self.model, ids, patches, self.dtype, layer_fn, vision_fn, self.layout)

    def held_out(self, items: int) -> dict[str, Batch]:
        found = {}
        for task in (task() for task in TINY_VISION_TASKS):
            rng = random.Random(f"probe:{task.name}")
            scenes = [task.scene_of(rng, "test") for _ in range(items)]
            found[task.name] = encode_scenes(self.tokenizer, scenes, self.config.length + 1, 0.0)
        return found

    def metrics(self, items: int) -> dict[str, Any]:
        matched = self.exact_matches(items)
        return {"steps": self.step, "pictures": self.step * self.config.rows, "exact_match": matched}


class MtpRun(Run):
    """The same of the block of multi-token prediction: it learns what the model itself would say, by its distributions."""

    loss_fn = staticmethod(draft_loss)
    accepted: tuple[torch.Tensor, ...] = ()  # of the last batch, of each drafted token

    def build(self) -> torch.nn.Module:
        """The untrained block, in float32, with the model's own embedding and head."""
        trunk = load_weights(Qwen3_5MoeForCausalLM, self.config.mtp_of, torch.float32)
        self.trunk = trunk.to(self.device).requires_grad_(False)
        block = MtpBlock(self.trunk.config, torch.float32)
        for name, value in list(block.named_parameters()):
            block.put(name, torch.zeros(value.shape), trained=f"mtp.{name}" in block.own())
        tiny_model.init_weights(block, self.config.seed)
        block.put("embed_tokens.weight", self.trunk.get_input_embeddings().weight.detach().float())
        block.put("lm_head.weight", self.trunk.lm_head.weight.detach().float())
        return block

    def drafted(self, batch: Batch, lead: bool, layer_fn: Callable[..., Forward], loss_fn: Any) -> Iterator[Forward]:
        """(KL divergence, share of accepted tokens, mean probability and load of the experts) of each drafted token."""
        ids, weights, depths = batch[0], batch[1], self.config.mtp_depths
        with torch.no_grad():
            states, _, _ = tiny_model.train_forward(self.trunk, ids[:, :-1], self.dtype, layer_fn)
        for depth, (hidden, *shares) in enumerate(tiny_model.draft_forward(self.model, ids, states, depths, lead, layer_fn)):
            counted = F.pad(weights[:, 2 + depth :], (0, 1 + depth))
            yield *loss_fn(self.model.lm_head.weight, hidden, states.roll(-1 - depth, 1), counted), *shares

    def objective(
        self, batch: Batch, layer_fn: Callable[..., Forward], vision_fn: Callable[..., torch.Tensor], loss_fn: Any
    ) -> Forward:
        """Every second batch as llama.cpp runs the block, the others as vLLM does."""
        losses, self.accepted, probs, loads = zip(*self.drafted(batch, self.step % 2 == 1, layer_fn, loss_fn))
        loss, load = torch.stack(losses).mean(), torch.cat(loads)
        return loss + self.config.balance * balance_loss(torch.cat(probs), load), loss, load

    def seen(self) -> dict[str, Any]:
        return {"accepted": [round(float(share), 4) for share in self.accepted]}

    def metrics(self, items: int) -> dict[str, Any]:
        tokens, accepted = self.step * self.config.rows * self.config.length, {}
        for name, (ids, weights) in self.held_out(items).items() if items else ():
            with torch.no_grad():
                batch = (ids.to(self.device), (weights == 1).float().to(self.device))
                accepted[name] = [round(float(found[1]), 4) for found in self.drafted(batch, True, decoder_layer, draft_loss)]
        print(accepted, flush=True)
        return {"tokens": tokens, "tokens_per_second": round(tokens / self.seconds), "accepted": accepted}

    def export(self, out: Path) -> None:
        """The block's tensors in BF16, an expert a matrix, beside links to the model's own files."""
        write_beside(Path(self.config.mtp_of), out, self.model)


class TextRun(Run):
    """A model of the given shape on the tokens of a corpus, on one GPU or, under torchrun, on several: each process takes its
    rows of a step, and the gradients are averaged."""

    extends = True

    def __init__(self, config: TrainSettings, corpus: Path, work: Path, world: World) -> None:
        self.corpus, self.read = corpus, [ids_entry(corpus, split) for split in ("train", "heldout")]
        if config.rows % world.size:
            raise UserError(f"ROWS={config.rows}: must be a multiple of the {world.size} GPUs")
        if config.length % 16:
            raise UserError(f"LENGTH={config.length}: must be a multiple of 16, the chunk of Gated DeltaNet")
        if self.read[0]["n"] <= config.length:
            raise UserError(f"{corpus}: {self.read[0]['n']} training tokens; LENGTH={config.length} needs more")
        super().__init__(config, load_tokenizer(corpus / "tokenizer", chat=False), work, world.device, world)

    def build(self) -> torch.nn.Module:
        c = self.config
        shape = tiny_model.TextShape(c.hidden, c.inner, c.experts, c.top_k, c.layers, c.dense)
        model = tiny_model.text_model(shape, self.tokenizer, 2 * c.length)
        tiny_model.init_weights(model, c.seed)
        return model

    def made_of(self) -> dict[str, Any]:
        return super().made_of() | {"corpus": self.read[0]["sha256"]}

    def data(self) -> list[dict[str, Any]]:
        return self.read

    def batches(self) -> Dataset:
        c, world = self.config, self.world
        ids, rows = self.corpus / "train.bin", c.rows // world.size
        return tiny_data.TextBatches(self.tokenizer, c.seed, c.steps, rows, c.length, 1.0, ids, world.rank, world.size)

    @torch.no_grad()
    def metrics(self, items: int) -> dict[str, Any]:
        """Cross-entropy of held-out text by stratum, in nats a token, on at most ``items`` windows of each."""
        places, losses = read_object(self.corpus / "heldout.json", "starts", "strata"), {}
        ids, size = np.memmap(self.corpus / "heldout.bin", "<u2", "r"), self.config.length + 1
        ends = [*places["starts"][1:], len(ids)]
        for number, stratum in enumerate(STRATA):
            own = [a for a, b, kind in zip(places["starts"], ends, places["strata"]) if kind == number and b - a >= size]
            rows = [torch.from_numpy(ids[a : a + size].astype(np.int64)) for a in own[:items]]
            total = 0.0
            for part in torch.stack(rows).to(self.device).split(8) if rows else ():
                hidden, ones = self.forward((part[:, :-1],), decoder_layer, vision_forward)[0], torch.ones(part[:, 1:].shape)
                total += token_loss(self.model, hidden, part[:, 1:], ones.to(self.device)).item() * len(part)
            if rows:
                name, positions = stratum.replace(" ", "_"), len(rows) * self.config.length
                losses[name] = {"positions": positions, "loss": round(total / len(rows), 5)}
        tokens = self.step * self.config.rows * self.config.length
        print(losses, flush=True)
        speed = round(tokens / self.seconds)
        return {"tokens": tokens, "tokens_per_second": speed, "processes": self.world.size, "heldout": losses}


def average_gradients(model: torch.nn.Module, world: World) -> None:
    """Over the processes; those of a parameter are on the way while the next one's are asked for."""
    if world.size > 1:
        for parameter, work in [(p, dist.all_reduce(p.grad, async_op=True)) for p in model.parameters()]:
            work.wait()
            parameter.grad /= world.size


def train(run: Run, workers: int, save_every: int, stop: int | None = None) -> None:
    """Run the remaining steps (up to ``stop``, if given), logging every 50, saving at the given interval and at the end."""
    config, device = run.config, run.device
    loader = DataLoader(
        run.batches(), batch_size=None, sampler=range(run.step, stop or config.steps), num_workers=workers,
        prefetch_factor=4 if workers else None, pin_memory=device.type == "cuda",
    )  # fmt: skip
    layer_fn, vision_fn, loss_fn = decoder_layer, vision_forward, run.loss_fn
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
        layer_fn, vision_fn, loss_fn = (torch.compile(f, dynamic=False) for f in (layer_fn, vision_fn, loss_fn))
    world, started, before, bar = run.world, time.monotonic(), run.seconds, None
    if world.first:
        bar = progress(config.steps, "train", "step")
        bar.update(run.step)
    for batch in loader:
        rate = config.rate(run.step, run.seconds)
        for group in run.optimizer.param_groups:
            group["lr"] = rate
        batch = tuple(part.to(device, non_blocking=True) for part in batch)
        total, loss, load = run.objective(batch, layer_fn, vision_fn, loss_fn)
        total.backward()
        average_gradients(run.model, world)
        norm = torch.nn.utils.clip_grad_norm_(run.model.parameters(), 1.0)
        run.optimizer.step()
        run.optimizer.zero_grad(set_to_none=True)
        run.step += 1
        if world.size == 1:
            run.seconds = before + time.monotonic() - started
        elif run.step % 10 == 0 or run.step == config.steps:  # all go by the first one's clock, or some would end before others
            clock = before + time.monotonic() - started if world.first else 0.0
            run.seconds = summed(torch.tensor(clock, dtype=torch.float64, device=device), world).item()
        last = run.finished or run.step == stop
        if run.step % 50 == 0 or last:
            mean = summed(loss.detach(), world).item() / world.size
            if world.first:
                run.log(mean, norm.item(), load, rate)
        if (run.step % save_every == 0 or last) and world.first:
            run.save()
        if world.first:
            bar.update(1)
        if last:
            break
    if world.first:
        bar.close()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(config=Path("configs/make_tiny.env"))
    parser.add_argument("--out", type=Path, required=True, help="directory of the checkpoint")
    parser.add_argument("--work", type=Path, required=True, help="directory of the training state")
    parser.add_argument("--result", type=Path, required=True, help="JSON of the training record; its name is the tag")
    parser.add_argument("--workers", type=int, default=2, help="processes that make batches; 0: this one")
    parser.add_argument("--text", type=Path, help="directory of a corpus (tiny_corpus.py): a model that reads real text")
    parser.add_argument("--save-every", type=int, default=1000, help="steps between saved states (default 1000)")
    parser.add_argument("--probe-items", type=int, default=256, help="held-out items of each task at the end; 0: none")


def main() -> None:
    config, args = parse_settings(TrainSettings, __doc__, add_arguments)
    started, vision, world = time.time(), config.vision_layers, start_world()
    if world.size > 1 and not args.text:
        raise UserError("torchrun: several processes train what reads real text (--text) alone")
    args.work.mkdir(parents=True, exist_ok=True)
    if args.text:
        run = TextRun(config, args.text, args.work, world)
    else:
        tokenizer = tiny_data.build_vl_tokenizer(tiny_data.vl_texts()) if vision else tiny_data.build_tokenizer()
        run = (VlRun if vision else MtpRun if config.mtp_of else Run)(config, tokenizer, args.work, world.device)
    parameters = sum(p.numel() for p in run.model.parameters() if p.requires_grad)
    if world.first:
        print(f"{parameters / 1e6:.2f} M parameters on {world.size} x {world.device.type}", end="; ")
        print(f"from step {run.step} of {config.steps}; {config}", flush=True)
    if not run.finished:
        train(run, args.workers, args.save_every)
    if world.first:
        record(run, args, parameters, started)
    end_world(world)


def record(run: Run, args: argparse.Namespace, parameters: int, started: float) -> None:
    """The checkpoint of a finished run and its record."""
    metrics = run.metrics(args.probe_items)
    run.export(args.out)
    metrics |= {
        "parameters": parameters, "train_seconds": round(run.seconds, 1), "final_loss": run.curve[-1]["loss"],
        "probe_items": args.probe_items, "curve": run.curve,
    }  # fmt: skip
    write_result(
        args.result, kind="train", tag=args.result.stem, started=started, seconds=run.seconds, model=describe_model(args.out),
        recipe=dataclasses.asdict(run.config), data=run.data(), metrics=metrics,
    )  # fmt: skip


if __name__ == "__main__":
    run_cli(main)
