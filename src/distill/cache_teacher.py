"""The teacher's own trajectories with its scores, in the format of phases A and B: distillation off policy, and the baseline.

    python src/distill/cache_teacher.py --teacher models/razor-tiny --tasks tiny_know,tiny_math --out work/teacher
        [options of opd_gen and opd_score]

Writes OUT/rollouts and OUT/scores, which opd_train_fsdp reads like the student's.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from console import run_cli
from opd_data import INDEX
from opd_gen import add_generation_arguments, check_generation_arguments, make_rollouts, summary
from opd_score import add_score_arguments, check_score_arguments, score_rollouts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--teacher", type=Path, required=True, help="the original checkpoint")
    add_generation_arguments(parser)
    add_score_arguments(parser)
    args = parser.parse_args()
    check_generation_arguments(args)
    check_score_arguments(args)
    rollouts, scores = args.out / "rollouts", args.out / "scores"
    args.model, args.out = args.teacher, rollouts
    make_rollouts(args)
    if not (scores / INDEX).exists():
        settings = args.k, args.score_temperature, args.batch, args.shard_rollouts, args.score_prompts
        score_rollouts(args.teacher, rollouts, scores, *settings)
    print(f"{summary(rollouts)}; scores in {scores}", flush=True)


if __name__ == "__main__":
    run_cli(main)
