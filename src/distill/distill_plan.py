"""What distill.sh would do, before it does it: bash pipelines/distill.sh --dry-run

    STEPS=50 python src/distill/distill_plan.py --config configs/opd_tiny.env [--smoke]

Sizes are upper bounds from the config and the teacher's headers (a rollout may end early); times are those tokens at the rates
that results/distill records for each phase, the machine beside them. Nothing is written and no weight is read.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from console import UserError, run_cli
from distill_run import SMOKE, DistillConfig, overrides
from opd_budget import Shape, shape_of
from settings import load_config
from size_model import RESULTS, Rates, duration, machine, records_of

DONE = {"opd_gen": "rollouts/rollouts.json", "opd_score": "scores/index.json", "opd_train": "adapter/adapter.json"}
NAMES = {"opd_gen": "A rollouts", "opd_score": "B scores", "opd_train": "C training"}


def phase_rates(results: Path, phase: str) -> Rates:
    """The best recorded tokens a second of a phase on each machine."""
    found: Rates = {}
    for file, record in records_of(results, "distill"):
        rate = record["metrics"].get("phases", {}).get(phase, {}).get("tokens_per_second", 0)
        if rate:
            found[machine(record)] = max(found.get(machine(record), (rate, file)), (rate, file))
    return found


def prompts(config: DistillConfig) -> int:
    """Prompts that get a rollout: of a file its lines, of the tiny tasks LIMIT each."""
    if not config.prompts:
        return config.limit * len(config.tasks.split(","))
    try:
        return min(config.limit, sum(1 for line in Path(config.prompts).open(encoding="utf-8") if line.strip()))
    except OSError as error:
        raise UserError(f"{config.prompts}: cannot be read ({error.strerror}); PROMPTS names a jsonl file") from None


def plan(config: DistillConfig) -> str:
    shape: Shape = shape_of(Path(config.teacher))
    rollouts = prompts(config) * config.repeats
    tokens = {"opd_gen": rollouts * config.max_tokens, "opd_score": rollouts * config.max_tokens}
    tokens["opd_train"] = config.steps * config.rows * config.max_tokens
    adapters = 0 if config.mode == "scales" else shape.adapter_parameters(config.rank)
    sizes = {
        "scores": tokens["opd_score"] * (8 * config.k + 8),
        "adapter": 4 * adapters,
        "training state": 12 * adapters,
        "recovered checkpoint": 2 * shape.parameters,
    }
    work = Path(config.work)
    student = config.student or f"{work / 'student'} (int{config.expert_bits:g}/int{config.linear_bits}, {config.method})"
    share = 100 * shape.routed / shape.parameters
    lines = [f"teacher {config.teacher}: {shape.parameters:,.0f} parameters, {share:.1f} % in experts"]
    lines += [f"student {student}; {config.trajectories}'s trajectories; loss {config.loss}; {config.processes} process(es)"]
    for phase, count in tokens.items():
        there = (work / DONE[phase]).exists() or (work / "teacher" / DONE[phase]).exists()
        what = f"{rollouts:,} rollouts" if phase != "opd_train" else f"{config.steps:,} steps of {config.rows} rollouts"
        lines.append(f"{NAMES[phase]}: {what}, at most {count:,} tokens" + (" (done: skipped)" if there else ""))
        rates = phase_rates(RESULTS, phase)
        lines += [
            f"  {duration(count / rate):>8}  {name} ({rate:,.0f} tokens/s, {file})" for name, (rate, file) in rates.items()
        ]
        lines += [] if rates else ["  no recorded rate; the phase shows its own after a few seconds"]
    lines.append(
        f"D merge: writes {work / 'recovered'}" + (" (done: skipped)" if (work / "recovered/recipe.json").exists() else "")
    )
    lines.append("disk, at most: " + ", ".join(f"{name} {size / 1e6:,.1f} MB" for name, size in sizes.items()))
    judged = f", and {config.eval_limit} test items of each task" if config.eval_limit else ""
    lines.append(
        f"judged by the KL of {config.kl_items} transcripts of each task{judged}; record results/distill/{config.tag}.json"
    )
    return "\n".join([*lines, "dry run: nothing was written"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--config", type=Path, required=True, help="settings, as configs/opd_tiny.env")
    parser.add_argument("--smoke", action="store_true", help=f"the plan of --smoke ({SMOKE['STEPS']} steps, short rollouts)")
    args = parser.parse_args()
    config = load_config(DistillConfig, args.config, overrides(False))
    if args.smoke:
        config = load_config(DistillConfig, args.config, overrides(True, config))
    print(plan(config), flush=True)


if __name__ == "__main__":
    run_cli(main)
