"""The child side of math_judge: compares pairs of answers, one after the other, until its input ends.

Not a command: math_judge starts it. Frames are those of the code sandbox. When its libraries are loaded it enters the
sandbox's jail (reads files, computes, nothing else), since the answers are a model's and a parser reads them.
"""

from __future__ import annotations

import logging
import os
import sys

import math_verify  # noqa: F401  loaded before the clock of the first answer starts

from math_answers import grade_math
from sandbox_child import enter_jail, read_frame, write_frame


def verdict(answer: str, gold: str) -> bool:
    """A comparison that the libraries cannot finish is not a proof of equality; memory is limited by the jail."""
    try:
        return grade_math(answer, gold)
    except (ArithmeticError, AttributeError, LookupError, MemoryError, NotImplementedError, RecursionError, TypeError, ValueError):
        return False


def main() -> None:
    """``math_worker.py MEMORY_MIB``: a frame says ready, then one frame [answer, gold] in, one true or false out."""
    logging.disable(logging.CRITICAL)  # math-verify logs each answer that it cannot read
    sys.setrecursionlimit(5000)
    enter_jail({"cpu_seconds": 86_400, "memory_mib": int(sys.argv[1])}, os.getppid())
    write_frame(1, "ready")
    while True:
        try:
            answer, gold = read_frame(0)
        except EOFError:
            return
        write_frame(1, verdict(answer, gold))


if __name__ == "__main__":
    main()
