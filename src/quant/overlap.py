"""Reading, work and writing at the same time: one thread a step ahead, one a step behind, the order unchanged.

Not a command; the data-free pass of quant_save uses both ends, so that it waits for the slowest of disk and arithmetic only.
The calibrated passes write one layer while the next is worked on. On a GPU the thread behind has a stream of its own: it would
wait for what the other has queued.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import torch

T = TypeVar("T")


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
    Leaving it by an error sets ``stop``, at which a long call looks. ``device``: what the calls may use of a GPU."""

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
