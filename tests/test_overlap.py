"""One step ahead, one step behind: the order stays, the work overlaps, and an error comes out where it can be handled."""

import threading
import time

import pytest

from overlap import OneBehind, one_ahead


def test_order_overlap_and_bound():
    made, used, written = [], [], []

    def items():
        for i in range(6):
            assert i <= len(used) + 2, "more than one ahead"
            made.append((i, threading.current_thread().name))
            yield i

    with one_ahead(items()) as ahead, OneBehind() as later:
        for i in ahead:
            deadline = time.monotonic() + 5
            while i < 5 and len(made) < i + 2 and time.monotonic() < deadline:
                time.sleep(0.001)
            assert i == 5 or len(made) == i + 2  # the next is there before this one is used
            used.append(i)
            later(lambda i=i: (time.sleep(0.005), written.append(i)))
    assert written == used == list(range(6)) and all(name.startswith("ahead") for _, name in made)


def test_errors_come_out():
    def broken():
        yield 1
        raise ValueError("reading failed")

    with pytest.raises(ValueError, match="reading failed"), one_ahead(broken()) as ahead:
        assert next(ahead) == 1
        next(ahead)

    def fail():
        raise OSError("writing failed")

    with pytest.raises(OSError, match="writing failed"), OneBehind() as later:
        later(fail)
    with pytest.raises(OSError, match="writing failed"), OneBehind() as later:
        later(fail)
        later(print, "never")
