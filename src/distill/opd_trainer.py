"""The training itself: student, optimizer, steps and loss curve, a state that survives a kill, the adapter as it is written.

Not a command; opd_train_fsdp gives it students and scores.
"""

from __future__ import annotations

import contextlib
import json
import math
import shutil
import statistics
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException

from console import UserError, WriteError, file_sha256, progress, read_object, write_json
from fsdp_setup import World, from_each, full, gathered, gathered_layer, own_share, put, release_layer, summed
from hf_model import all_finite, first_nonfinite
from moe_lora import adapters_of, digest, trainable
from opd_data import (
    ADAPTER,
    ADAPTER_JSON,
    FORMAT,
    Texts,
    TrainSettings,
    collate,
    opened,
    peak_memory,
    write_phase,
)
from opd_student import Student
from safetensors_file import save_tensors

DIGEST_THREADS = 8  # baked parameters in memory while they are digested, over all processes
STATE = "state"  # a directory for each saved step, whole once it has the file that torch.distributed.checkpoint writes last
FACTS, LAST = "state.json", ".metadata"


class Trainer:
    """Student, optimizer, step and loss curve; saved to and restored from a directory of any number of processes."""

    def __init__(self, student: Student, config: TrainSettings, world: World, out: Path, settings: dict[str, Any]) -> None:
        self.student, self.config, self.world, self.out, self.settings = student, config, world, out, settings
        self.parameters: dict[str, nn.Parameter] = trainable(student)
        self.optimizer = torch.optim.AdamW(self.parameters.values(), lr=config.lr, betas=(0.9, 0.95), weight_decay=0.0)
        self.step, self.seconds, self.tokens, self.saved = 0, 0.0, 0, 0
        self.curve: list[list[float]] = []  # step, loss, norm of the gradient
        self.step_seconds: list[float] = []  # of the steps of this process
        if saved := from_each(sorted((out / STATE).glob(f"*/{LAST}")), world)[0]:
            self.restore(saved[-1].parent)

    def micro_batches(self, rows: Sequence[int], scores: Texts) -> Iterator[list[int]]:
        """This process's share of a step's rollouts, longest first, ``micro_rows`` at a time; equally many on each process."""
        ordered = sorted(rows, key=lambda row: (-scores.lengths[row], row))
        size = self.config.micro_rows
        pieces = [ordered[start : start + size] for start in range(0, len(ordered), size)]
        yield from pieces[self.world.rank :: self.world.size]

    def train_step(self, rows: Sequence[int], scores: Texts) -> None:
        """One update; raises on a loss or gradient that is not finite, before anything is changed."""
        answers = sum(scores.answers[row] for row in rows)
        total = torch.zeros((), device=self.world.device)
        for piece in self.micro_batches(rows, scores):
            batch = collate([scores[row] for row in piece]).to(self.world.device)
            loss = self.student(batch) / answers
            (loss * self.world.size).backward()  # FSDP averages over the processes
            total += loss.detach()
        loss = summed(total, self.world).item()
        norm = full(nn.utils.clip_grad_norm_(self.parameters.values(), self.config.clip)).item()
        if not (math.isfinite(loss) and math.isfinite(norm)):
            kept = f"the last good state is {self.out / STATE}, step {self.saved}" if self.saved else "no state was saved yet"
            raise UserError(
                f"step {self.step + 1}: the loss is {loss}, its gradient {norm}; {kept}; {self.cause(rows, scores)}"
            )
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.rate(self.step)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.tokens += sum(scores.lengths[row] for row in rows)
        self.curve.append([self.step, round(loss, 6), round(norm, 6)])

    def cause(self, rows: Sequence[int], scores: Texts) -> str:
        """Why a loss may not be finite: before anything was trained it is the student; afterwards, the size of the steps."""
        if self.step or self.world.size > 1:
            return "lower --lr"
        model = self.student.model
        for row in rows:
            inputs = {"input_ids": scores[row].ids[None].to(self.world.device), "use_cache": False}
            if not all_finite(model(**inputs).logits):
                return f"nothing was trained yet: in the student, {first_nonfinite(model, **inputs)}"
        return "nothing was trained yet, and the student alone is finite: look at --score-temperature and --init"

    def state(self) -> dict[str, torch.Tensor]:
        """The trained tensors and both of Adam's moments, of each this process's share, for reading and writing in place."""
        found = {}
        for name, parameter in self.parameters.items():
            moments = self.optimizer.state[parameter]
            found |= {f"value:{name}": parameter.detach()} | {f"{m}:{name}": moments[m] for m in ("exp_avg", "exp_avg_sq")}
        return found

    def save(self) -> None:
        """The state of this step, of which every process writes its share; then the one before it goes."""
        path = self.out / STATE / f"{self.step:08d}"
        if self.world.first:
            facts = {"settings": self.settings, "step": self.step, "seconds": self.seconds, "tokens": self.tokens}
            write_json(path / FACTS, facts | {"curve": self.curve})
        with checkpointing(WriteError, f"{path}: cannot write"):
            dcp.save(self.state(), checkpoint_id=path)
        if self.world.first:
            for other in path.parent.iterdir():
                if other != path:
                    shutil.rmtree(other)
        self.saved = self.step

    def restore(self, path: Path) -> None:
        mend = f"remove {path.parent}, to train from the start, or give another --out"
        facts = read_object(path / FACTS, "settings", "step", "seconds", "tokens", "curve")
        if facts["settings"] != json.loads(json.dumps(self.settings)):
            changed = sorted(k for k in self.settings if facts["settings"].get(k) != self.settings[k])
            raise UserError(f"{path}: made with other settings ({', '.join(changed)}); {mend}")
        for parameter in self.parameters.values():
            moments = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
            self.optimizer.state[parameter] = {"step": torch.tensor(float(facts["step"]))} | moments
        state = self.state()
        with checkpointing(UserError, f"{path}: cannot be read", f"; {mend}"):
            dcp.load(state, checkpoint_id=path)
        for name, value in state.items():
            if not all_finite(own_share(value)):
                raise UserError(f"{path}: {name} holds NaN or infinity; {mend}")
        self.step = self.saved = facts["step"]
        self.seconds, self.tokens, self.curve = facts["seconds"], facts["tokens"], facts["curve"]

    def run(self, scores: Texts, stop: int | None = None) -> None:
        """The remaining steps (up to ``stop``), with one line a step on the first process."""
        config = self.config
        last = config.steps if stop is None else min(stop, config.steps)
        plan = scores.order(config)
        before, began = self.seconds, time.monotonic()
        bar = progress(config.steps, "train", "step") if self.world.first else None
        if bar is not None:
            bar.update(self.step)
        while self.step < last:
            started, tokens = time.monotonic(), self.tokens
            self.train_step(plan[self.step], scores)
            self.step_seconds.append(time.monotonic() - started)
            self.seconds = before + time.monotonic() - began
            if self.world.first:
                rate = (self.tokens - tokens) / self.step_seconds[-1]
                _, loss, norm = self.curve[-1]
                print(f"step {self.step}/{config.steps} loss {loss:.5f} grad {norm:.4f} {rate:.0f} tokens/s", flush=True)
                bar.update()
            if self.step % config.save_every == 0 or self.step == last:
                self.save()
        if bar is not None:
            bar.close()


@contextlib.contextmanager
def checkpointing(kind: type[UserError], what: str, mend: str = "") -> Iterator[None]:
    """A failure of torch.distributed.checkpoint, which gathers those of all processes, is a ``kind`` with the first one's."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # one process
        try:
            yield
        except CheckpointException as error:
            failure, _ = next(iter(error.failures.values()))
            reason = (str(failure).strip() or type(failure).__name__).splitlines()[-1]
            raise kind(f"{what} ({reason}){mend}") from None


def read_trained(file: Any, name: str, shape: Sequence[int], path: Path, mend: str) -> torch.Tensor:
    """A tensor of an adapter; one of another shape, or that is not finite, is a :class:`UserError`."""
    value = file.get_tensor(name)
    if value.shape != torch.Size(shape):
        raise UserError(f"{path}: {name} is {list(value.shape)}, these settings need {list(shape)}; {mend}")
    if not all_finite(value):
        raise UserError(f"{path}: {name} holds NaN or infinity; {mend}")
    return value


def start_from(parameters: Mapping[str, nn.Parameter], directory: Path) -> str:
    """Copy the tensors of an earlier adapter of the same student into ``parameters``; returns the SHA-256 of its file."""
    path, mend = directory / ADAPTER, "start from one of the same rank"
    with opened(path, "train it again") as file:
        names = set(file.keys())
        for name in sorted(names ^ parameters.keys()):
            raise UserError(f"{path}: {'adapts' if name in names else 'lacks'} {name}; start from one of the same settings")
        for name, parameter in parameters.items():
            put(parameter, read_trained(file, name, parameter.shape, path, mend))
    return file_sha256(path)


def baked_digests(student: Student, world: World) -> dict[str, str]:
    """SHA-256 of every adapted parameter as merge_adapter must write it, layer by layer. Each goes to the process that has
    the least to do so far; threads digest some while the next are made."""
    found: dict[str, Future[str]] = {}
    threads, work = max(1, DIGEST_THREADS // world.size), [0] * world.size
    with ThreadPoolExecutor(threads, "digest") as pool:
        for layer in student.layers:
            gathered_layer(layer)
            for name, adapter in adapters_of(layer).items():
                turn = work.index(min(work))
                work[turn] += math.prod(adapter.grid.shape)
                if turn == world.rank:
                    wait_for(found.values(), threads - 1)
                    found[name] = pool.submit(digest, adapter.baked())
            release_layer(layer)
    shares = from_each({name: future.result() for name, future in found.items()}, world)
    return {name: value for share in shares for name, value in share.items()}


def wait_for(futures: Iterable[Future[Any]], left: int) -> None:
    """Until at most ``left`` of them are pending: their tensors are in memory."""
    pending = [future for future in futures if not future.done()]
    while len(pending) > left:
        pending = list(wait(pending, return_when=FIRST_COMPLETED).not_done)


def write_adapter(trainer: Trainer, identities: dict[str, Any], data: dict[str, Any]) -> None:
    """adapter.safetensors (A, B, growth of every parameter) and, at last, adapter.json, which says what it belongs to."""
    ranks = from_each(peak_memory(), trainer.world)  # of training, before the digests
    tensors = gathered({name: parameter.detach() for name, parameter in trainer.parameters.items()}, trainer.world.first)
    if bad := sorted(name for name, value in tensors.items() if not all_finite(value)):
        raise UserError(f"{bad[0]} holds NaN or infinity after step {trainer.step}; lower --lr")
    digests = baked_digests(trainer.student, trainer.world)
    if not trainer.world.first:
        return
    save_tensors(trainer.out / ADAPTER, tensors)
    grids = {name: adapter.grid.describe() for name, adapter in adapters_of(trainer.student).items()}
    described = {"format": FORMAT, **identities, "adapter": trainer.config.adapter(), "data": data}
    described |= {"training": trainer.config.training(), "device": trainer.world.device.type, "curve": trainer.curve}
    described["adapter_sha256"] = file_sha256(trainer.out / ADAPTER)
    described["parameters"] = {name: grids[name] | {"sha256": digests[name]} for name in grids}
    facts: dict[str, Any] = {
        "steps": trainer.step,
        "processes": trainer.world.size,
        "loss": trainer.curve[-1][1] if trainer.curve else None,
    }
    facts |= {"median_step_seconds": median_after_first(trainer.step_seconds), "ranks": ranks}
    write_phase(trainer.out, "opd_train", trainer.seconds, trainer.tokens, **facts)
    write_json(trainer.out / ADAPTER_JSON, described)


def median_after_first(seconds: Sequence[float]) -> float | None:
    """The median of all but the first, which compiles and fills caches."""
    return round(statistics.median(seconds[1:]), 4) if len(seconds) > 1 else None
