"""Work at the same time: a thread for each of several devices, one that reads a step ahead, one that writes a step behind.

Not a command. With the two ends a pass waits for the slowest of disk and arithmetic only. A device may be named more than once
(cuda:0,cuda:0 keeps two chunks at work on one GPU; cpu,cpu tests without any). What a piece of work gives may not depend on its
device, so the kinds must not be mixed.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any, TypeVar

import torch
from torch import Tensor

from console import UserError

T = TypeVar("T")
GPU_LANES = 4  # shards at work on a GPU, where no --devices are named (results/bench/h100_122b_disk.json)


class Stopped(Exception):
    """Raised in a thread whose work is of no use any more, because another thread failed or Ctrl-C was pressed."""


def nvidia_smi(*fields: str) -> list[list[str]]:
    """What nvidia-smi says of each GPU that this process may use, by its names of the fields ("memory.free", in MiB); nothing
    where there is none."""
    query = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
    if (chosen := os.environ.get("CUDA_VISIBLE_DEVICES")) == "" or not shutil.which(query[0]):
        return []
    if re.fullmatch(r"\d+(,\d+)*", chosen or ""):
        query += ["-i", str(chosen)]
    done = subprocess.run(query, capture_output=True, text=True)
    return [[field.strip() for field in line.split(",")] for line in done.stdout.splitlines()] if not done.returncode else []


def default_device() -> torch.device:
    """The first GPU where there is one."""
    return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")


@functools.lru_cache(maxsize=64)
def numbers_on(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Numbers in float32, made once: the copy waits for a GPU, and takes as long as a tenth of a kernel."""
    return torch.tensor(values, dtype=torch.float32, device=device)


def parse_devices(text: str, where: str = "--devices") -> tuple[torch.device, ...]:
    """The devices of 'cuda:0,cuda:1', 'all' (every GPU, or the CPU), or '' (the first GPU, or the CPU)."""
    if not text:
        return (default_device(),)
    if text == "all":
        return tuple(torch.device("cuda", i) for i in range(torch.cuda.device_count())) or (torch.device("cpu"),)
    found = []
    for name in text.split(","):
        kind, _, index = name.partition(":")
        if kind not in ("cpu", "cuda") or index and not index.isdecimal() or kind == "cpu" and index:
            raise UserError(f"{where} {text}: {name!r} is no device; expected cuda:0,cuda:1 or all or cpu")
        if kind == "cuda" and int(index or 0) >= torch.cuda.device_count():
            raise UserError(f"{where} {text}: there is no {name}, the machine has {torch.cuda.device_count()} GPUs")
        found.append(torch.device(kind, int(index or 0)) if kind == "cuda" else torch.device("cpu"))
    if len({device.type for device in found}) > 1:
        raise UserError(f"{where} {text}: a CPU beside a GPU could round otherwise; name devices of one kind")
    return tuple(found)


def lanes(device: torch.device) -> tuple[torch.device, ...]:
    """The device as often as shards should be at work on it: a GPU waits for the disk, which one shard does not keep busy."""
    return (device,) * (GPU_LANES if device.type == "cuda" else 1)


def device_peaks(devices: Sequence[torch.device]) -> dict[str, int]:
    """MiB that tensors took at most on each GPU, in this process."""
    gpus = {device for device in devices if device.type == "cuda"}
    return {str(gpu): torch.cuda.max_memory_allocated(gpu) >> 20 for gpu in sorted(gpus, key=str)}


def free_memory(device: torch.device) -> int:
    """Bytes that tensors of this process may still take on a GPU: what others leave, within GPU_MEMORY_GIB of the environment,
    which becomes the limit of its allocator. Asked for first, it also has the allocator join what it frees."""
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    device = torch.device("cuda", torch.cuda.current_device()) if device.index is None else device
    free, total = torch.cuda.mem_get_info(device)
    if text := os.environ.get("GPU_MEMORY_GIB"):
        try:
            share = float(text) * 2**30 / total
        except ValueError:
            share = 0.0
        if not 0 < share < float("inf"):
            raise UserError(f"GPU_MEMORY_GIB={text}: expected a number of GiB above 0")
        torch.cuda.set_per_process_memory_fraction(min(1.0, share), device)
    limit = torch.cuda.get_per_process_memory_fraction(device) * total
    return int(min(free + torch.cuda.memory_reserved(device), limit)) - torch.cuda.memory_allocated(device)


def on_device(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Kernels that take the current device (Triton's) run on this one inside."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def each_device(devices: Sequence[torch.device], work: Callable[[int, torch.device, threading.Event], None]) -> None:
    """``work(number, device, stop)`` for every device at the same time; in this thread where there is but one.

    The first error is raised when all threads have ended. From then on, and on Ctrl-C, ``stop`` is set: long work looks at
    it and raises :class:`Stopped`.
    """
    stop = threading.Event()
    if len(devices) == 1:
        with on_device(devices[0]):
            work(0, devices[0], stop)
        return

    def run(number: int, device: torch.device) -> None:
        with on_device(device):
            work(number, device, stop)

    with ThreadPoolExecutor(len(devices), "device") as pool:
        pending = {pool.submit(run, number, device) for number, device in enumerate(devices)}
        failed: list[BaseException] = []
        try:
            while pending:
                done, pending = wait(pending, return_when=FIRST_COMPLETED)
                failed += [error for future in done if (error := future.exception())]
                if failed:
                    stop.set()
        finally:
            stop.set()
    if failed:
        raise next((error for error in failed if not isinstance(error, Stopped)), failed[0])


@contextlib.contextmanager
def one_ahead(items: Iterator[T]) -> Iterator[Iterator[T]]:
    """The same items, the next of which a thread makes while the last one is used. Its errors appear in turn."""
    end: Any = object()
    with ThreadPoolExecutor(1, "ahead") as pool:

        def run() -> Iterator[T]:
            ahead = pool.submit(next, items, end)
            while (item := ahead.result()) is not end:
                ahead = pool.submit(next, items, end)
                yield item

        yield run()


class OneBehind:
    """Calls made by a thread, in order, at most one at a time: a call waits for the one before. Use as a context manager;
    leaving it waits for the last. An error of a call appears at the next one, on leaving, at :meth:`wait` or :meth:`check`.
    Leaving it by an error sets ``stop``, at which a long call looks. ``device``: what the calls may use of a GPU, on a stream
    of their own: they would wait for what the other thread has queued."""

    def __init__(self, device: torch.device | None = None, stop: threading.Event | None = None) -> None:
        self._pool = ThreadPoolExecutor(1, "behind")
        self._last: Future[Any] | None = None
        self._stream = torch.cuda.Stream(device) if device is not None and device.type == "cuda" else None
        self._stop = stop

    def __call__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.wait()
        self._last = self._pool.submit(self._run, function, *arguments)

    def _run(self, function: Callable[..., Any], *arguments: Any) -> None:
        with torch.cuda.stream(self._stream) if self._stream else contextlib.nullcontext():
            function(*arguments)

    def wait(self) -> None:
        """Until the last call has ended; its error, if it had one."""
        if self._last is not None:
            self._last.result()

    def check(self) -> None:
        """The error of the last call, if it has ended with one."""
        if self._last is not None and self._last.done():
            self._last.result()

    def __enter__(self) -> OneBehind:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None and self._stop is not None:
            self._stop.set()
        self._pool.shutdown(wait=True)
        if kind is None:
            self.wait()
