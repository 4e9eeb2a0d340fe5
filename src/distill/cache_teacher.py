"""The teacher's own trajectories with its scores, in the format of phases A and B: distillation off policy, and the baseline.

    python src/distill/cache_teacher.py --teacher models/razor-tiny --tasks tiny_know,tiny_math --out work/teacher
        [options of opd_gen and opd_score]

Writes OUT/rollouts and OUT/scores, which opd_train_fsdp reads like the student's.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from console import run_cli
from opd_data import INDEX, Generation, Scoring, batch_option, check_scored, read_rollouts
from opd_gen import make_rollouts
from opd_score import score_rollouts
from settings import parse_settings


@dataclass(frozen=True, kw_only=True)
class Settings(Generation, Scoring):
    teacher: Path
    out: Path


def main() -> None:
    settings, _ = parse_settings(Settings, __doc__, batch_option)
    rollouts, scores = settings.out / "rollouts", settings.out / "scores"
    make_rollouts(settings, settings.teacher, rollouts)
    if (scores / INDEX).exists():
        check_scored(scores, read_rollouts(rollouts)[1], settings)
    else:
        score_rollouts(settings, settings.teacher, rollouts, scores)


if __name__ == "__main__":
    run_cli(main)
