"""The benchmarks by name: text, pictures, and the tiny tasks.

Not a command. `python src/eval/vllm_eval8.py --benchmarks tiny_math,tiny_know` runs the classes that register here.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench8_loaders import TEXT_BENCHMARKS
from console import UserError
from task import Benchmark, check_data_dir
from tasks_tiny import TINY_TASKS


def get_benchmarks(names: Sequence[str], data_dir: Path | None = None) -> list[Benchmark]:
    """Instances of the named benchmarks, or one line that lists the known ones. ``data_dir``: local rows, see hub_data."""
    check_data_dir(data_dir)
    known: dict[str, Any] = {task.name: task for task in TINY_TASKS}
    known |= {task.name: functools.partial(task, data_dir) for task in TEXT_BENCHMARKS}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise UserError(f"unknown benchmark {', '.join(map(repr, unknown))}; known: {', '.join(known)}")
    return [known[name]() for name in names]
