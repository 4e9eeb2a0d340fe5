"""The benchmarks by name: text, pictures, and the tiny tasks.

Not a command. `python src/eval/vllm_eval8.py --benchmarks tiny_math,tiny_know` runs classes that the files of tasks list here.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bench8_loaders import TEXT_BENCHMARKS
from bench_mm import MM_BENCHMARKS
from console import UserError
from eval_settings import GROUPS
from task import Benchmark
from tasks_tiny import TINY_TASKS, TINY_VISION_TASKS

OF_TEXT = {kind.name: kind for kind in (*TINY_TASKS, *TEXT_BENCHMARKS)}
OF_PICTURES = {kind.name: kind for kind in (*MM_BENCHMARKS, *TINY_VISION_TASKS)}


def get_benchmarks(names: Sequence[str], data_dir: Path | None = None, pictures: bool = False) -> list[Benchmark]:
    """Instances of the named benchmarks, or one line that lists the known ones. ``data_dir``: local rows, see task."""
    if data_dir is not None and not data_dir.is_dir():
        raise UserError(f"--data-dir {data_dir}: no such directory")
    known, groups = (OF_PICTURES, GROUPS) if pictures else (OF_TEXT, {})
    members = [member for name in names for member in groups.get(name, (name,))]
    if unknown := [name for name in members if name not in known]:
        raise UserError(f"unknown benchmark {', '.join(map(repr, unknown))}; known: {', '.join([*known, *groups])}")
    return [known[name](data_dir) for name in dict.fromkeys(members)]


def recorded_benchmarks(names: Sequence[str], data_dir: Path | None = None) -> list[Benchmark]:
    """Instances of the benchmarks of a record, of text or of pictures, in the order of the names."""
    return [get_benchmarks([name], data_dir, name in OF_PICTURES)[0] for name in names]
