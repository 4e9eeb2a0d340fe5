"""Copies of one model on several GPUs: a process each, batches dealt out as they come free, completions back in one place.

Not a command; `vllm_eval8 --backend hf --devices all` uses it. The batches are those of one GPU, so greedy answers are too, and
so are drawn ones, which are seeded by batch. Processes, not threads: transformers spends its time in Python.
"""

from __future__ import annotations

import multiprocessing
import queue
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from backend import Completion, Sampling, length_batches, seed_of
from backend_hf import HfBackend
from console import UserError
from devices import on_device
from hf_model import load_tokenizer, prompt_ids, render_chat

POLL_SECONDS = 2.0  # between looks at whether the other side still lives


def serve(model: str, device: torch.device, batch: int, tasks: Any, results: Any) -> None:
    """A worker: (number, token ids, sampling, seed) in, (number, completions) out; (None, text) says what a user can mend."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's, which ends its workers
    parent = multiprocessing.parent_process()
    try:
        with on_device(device):
            backend = HfBackend(model, batch, [device])
            results.put((-1, []))
            while parent is None or parent.is_alive():
                try:
                    task = tasks.get(timeout=POLL_SECONDS)
                except queue.Empty:
                    continue
                number, ids, sampling, seed = task
                results.put((number, backend.complete(ids, sampling, seed)))
    except UserError as error:
        results.put((None, str(error)))


class Replicas:
    """The backend "hf" with a copy of the model on each of ``devices``."""

    name = "hf"

    def __init__(self, model: str | Path, devices: Sequence[torch.device], batch: int = 64) -> None:
        self.tokenizer = load_tokenizer(model)
        self.batch = batch
        context = multiprocessing.get_context("spawn")
        self.tasks, self.results = context.Queue(), context.Queue()
        self.tasks.cancel_join_thread()  # an error may leave tasks that no worker will take
        self.workers = [
            context.Process(target=serve, args=(str(model), device, batch, self.tasks, self.results), daemon=True)
            for device in devices
        ]
        for worker in self.workers:
            worker.start()
        for _ in self.workers:  # until every copy is loaded
            self._result()

    def render(self, messages: list[dict[str, str]]) -> str:
        return render_chat(self.tokenizer, messages)

    def generate(self, prompts: Sequence[str], sampling: Sampling) -> Iterator[tuple[int, Completion]]:
        ids = prompt_ids(self.tokenizer, prompts)
        batches = length_batches(ids, self.batch)
        for number, part in reversed(list(enumerate(batches))):  # the longest first: the last to end should be short
            seed = seed_of(prompts[part[0]], sampling.seed)
            self.tasks.put((number, [ids[index] for index in part], sampling, seed))
        for _ in batches:
            number, done = self._result()
            yield from zip(batches[number], done, strict=True)

    def _result(self) -> tuple[int, list[Completion]]:
        while True:
            try:
                number, value = self.results.get(timeout=POLL_SECONDS)
            except queue.Empty:
                ended = next((worker for worker in self.workers if not worker.is_alive()), None)
                if ended is not None:
                    raise UserError(f"a copy of the model ended with code {ended.exitcode}; its error stands above") from None
                continue
            if number is None:
                raise UserError(value)
            return number, value

    def close(self) -> None:
        """End the workers; otherwise they end with this process."""
        for worker in self.workers:
            worker.terminate()
            worker.join()
        for channel in (self.tasks, self.results):
            channel.close()
