"""Reading, work and writing at the same time: one thread a step ahead, one a step behind, the order unchanged.

Not a command; the data-free pass of quant_save uses both ends, so that it waits for the slowest of disk and arithmetic only.
The calibrated passes write one layer while the next is worked on.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

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
    leaving it waits for the last. An error of a call appears at the next one, or on leaving."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, "behind")
        self._last: Future[Any] | None = None

    def __call__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.wait()
        self._last = self._pool.submit(function, *arguments)

    def wait(self) -> None:
        """Until the last call has ended; its error, if it had one."""
        if self._last is not None:
            self._last.result()

    def __enter__(self) -> OneBehind:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._pool.shutdown(wait=True)
        if kind is None:
            self.wait()
