"""One thread for each of several devices: which there are, and work that is dealt out to them.

Not a command. A device may be named more than once (cuda:0,cuda:0 keeps two chunks at work on one GPU; cpu,cpu tests without
any). What a piece of work gives may not depend on its device, so the kinds must not be mixed.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from typing import Any

import torch
from torch import Tensor

from console import UserError


class Stopped(Exception):
    """Raised in a thread whose work is of no use any more, because another thread failed or Ctrl-C was pressed."""


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


def device_peaks(devices: Sequence[torch.device]) -> dict[str, int]:
    """MiB that tensors took at most on each GPU, in this process."""
    gpus = {device for device in devices if device.type == "cuda"}
    return {str(gpu): torch.cuda.max_memory_allocated(gpu) >> 20 for gpu in sorted(gpus, key=str)}


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
