"""What pipelines/distill.sh runs: a configs/*.env file with changes from the environment -> the four phases and their record.

    STEPS=50 WORK=work/mine python src/distill/distill_run.py --config configs/opd_tiny.env [--smoke] [--dry-run]

Each phase is the command that a user would type, in a process of its own; it is skipped where its output is complete, so the
same command goes on after a kill. WORK remembers its settings and refuses others. --smoke takes two steps end to end on a few
short rollouts, in WORK-smoke. --dry-run stops after the plan: sizes are upper bounds from the settings and the teacher's
headers (a rollout may end early), times are those tokens at the rates that results/distill records for each phase.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from console import UserError, read_json, run_cli, run_script, write_json
from fsdp_setup import shared_cores
from opd_budget import budget
from opd_data import ADAPTER_JSON, INDEX, MANIFEST, PHASE, DistillSettings, Generation, Scoring, TrainSettings, options, shown
from recipe import RECIPE_FILE, Recipe, recipe_record
from records import REPO, describe_model, read_result, write_result
from settings import parse_settings
from size_model import RESULTS, Rates, duration, machine, records_of

SMOKE = {"limit": 4, "repeats": 1, "max_tokens": 64, "finished_only": False, "steps": 2, "warmup": 0, "kl_items": 2}
SMOKE |= {"micro_rows": 2, "eval_limit": 0, "save_every": 1}
EVAL_KEYS = ("n", "acc", "acc_low", "acc_high", "acc_finished", "trunc", "mean_tokens")
Step = Callable[..., None]  # step(script, *arguments, processes=N) runs a command


def step(script: str, *arguments: object, processes: int = 1) -> None:
    """Run one of the project's commands, printed first; several processes by torchrun. Each has a process of its own, so that
    an engine's GPU memory goes with it and a phase's peak memory is its own."""
    start = ["torchrun", "--standalone", "--nproc_per_node", str(processes)] if processes > 1 else ["python"]
    print("+ " + shlex.join([*start, script, *map(str, arguments)]), flush=True)
    if processes == 1:
        run_script(script, *arguments)
        return
    command = [sys.executable, "-m", "torch.distributed.run", *start[1:], str(REPO / script), *map(str, arguments)]
    if code := subprocess.run(command, env=os.environ | shared_cores(processes)).returncode:
        sys.exit(code)


class Run:
    """The directories of a run and its phases in order."""

    def __init__(self, config: DistillSettings, result: Path, step: Step) -> None:
        self.config, self.result, self.step = config, result, step
        self.work, self.teacher = config.work, config.teacher
        self.student = config.student or self.work / "student"
        off_policy = config.cache or self.work / ("teacher" if config.trajectories == "teacher" else "")
        self.rollouts, self.scores = off_policy / "rollouts", off_policy / "scores"
        self.adapter, self.recovered = self.work / "adapter", self.work / "recovered"
        # what is recovered: on a block type of llama.cpp that is not the student's file, but its weights on that grid
        self.before = self.work / "before" if config.ggml else self.student

    def all(self) -> dict[str, Any]:
        """Every phase that is not done yet, and the record; returns its metrics."""
        started = time.time()
        self.claim()
        for phase in (self.quantize, self.cache, self.start, self.train, self.merge, self.measure):
            phase()
        return self.record(started)

    def claim(self) -> None:
        """Note the settings in WORK, or refuse a WORK with others."""
        path, settings = self.work / "settings.json", json.loads(json.dumps(flat(self.config), default=str))
        if path.exists():
            before = read_json(path)
            changed = sorted(key.upper() for key in settings.keys() | before.keys() if settings.get(key) != before.get(key))
            if changed:
                raise UserError(f"{self.work}: made with other {', '.join(changed)}; give another WORK or remove it")
        else:
            write_json(path, settings)

    def quantize(self) -> None:
        recipe = self.config.recipe
        if not self.config.student and not (self.student / RECIPE_FILE).exists():
            paths = ["--model", self.teacher, "--out", self.student]
            self.step("src/quant/quant_save.py", *paths, *options(Recipe, recipe))

    def cache(self) -> None:
        """Phases A and B, unless CACHE names the output of another run."""
        config, teacher = self.config, ["--teacher", self.teacher]
        if config.cache or (self.scores / INDEX).exists():
            return
        made, scored = options(Generation, config), options(Scoring, config)
        if config.trajectories == "teacher":
            self.step("src/distill/cache_teacher.py", *teacher, "--out", self.rollouts.parent, *made, *scored)
            return
        if not (self.rollouts / MANIFEST).exists():
            model = config.rollout_model or self.student
            self.step("src/distill/opd_gen.py", "--model", model, "--out", self.rollouts, *made)
        self.step("src/distill/opd_score.py", *teacher, "--rollouts", self.rollouts, "--out", self.scores, *scored)

    def start(self) -> None:
        """The weights of a block type before training: an adapter of no steps, merged."""
        if self.config.ggml and not (self.before / RECIPE_FILE).exists():
            self.fit(self.work / "start", dataclasses.replace(self.config, steps=0, init=None))
            self.bake(self.work / "start", self.before)

    def train(self) -> None:
        """Phase C."""
        self.fit(self.adapter, self.config)

    def fit(self, out: Path, config: DistillSettings) -> None:
        if not (out / ADAPTER_JSON).exists():
            paths = ["--student", self.student, "--teacher", self.teacher, "--rollouts", self.rollouts, "--scores", self.scores]
            arguments = [*paths, "--out", out, *options(TrainSettings, config)]
            self.step("src/distill/opd_train_fsdp.py", *arguments, processes=config.processes)

    def merge(self) -> None:
        """Phase D."""
        if not (self.recovered / RECIPE_FILE).exists():
            self.bake(self.adapter, self.recovered)

    def bake(self, adapter: Path, out: Path) -> None:
        paths = ["--student", self.student, "--teacher", self.teacher, "--adapter", adapter]
        self.step("src/distill/merge_adapter.py", *paths, "--out", out)

    def measure(self) -> None:
        """KL to the teacher (and accuracy, where asked for) before and after."""
        config = self.config
        for tag, model in (("before", self.before), ("after", self.recovered)):
            if not (self.work / f"kl/{tag}.json").exists():
                items = ["--items", config.kl_items, "--out", self.work / "kl", "--tag", tag]
                self.step("src/eval/moe_eval.py", "--model", model, "--reference", self.teacher, *items)
            if config.eval_limit and not (self.work / f"eval/{tag}.json").exists():
                items = ["--limit", config.eval_limit, "--batch", config.chunk, "--out", self.work / "eval", "--tag", tag]
                self.step("src/eval/vllm_eval8.py", "--model", model, "--benchmarks", config.tasks, *items)

    def phases(self) -> dict[str, Any]:
        """What each phase cost, from the files that they left."""
        found = {}
        for directory in (self.rollouts, self.scores, self.adapter, self.recovered):
            value = read_json(directory / PHASE)
            found[value.pop("phase")] = value
        return found

    def record(self, started: float) -> dict[str, Any]:
        """Write the record of the run; returns its metrics."""
        before, after = (read_result(self.work / f"kl/{tag}.json", "kl")["metrics"] for tag in ("before", "after"))
        manifest, adapter = read_json(self.rollouts / MANIFEST), read_json(self.adapter / ADAPTER_JSON)
        metrics: dict[str, Any] = {
            "kl_before": before["kl"], "kl_after": after["kl"],
            "kl_removed": 1 - after["kl"]["mean"] / before["kl"]["mean"] if before["kl"]["mean"] else 0.0,
            "kl_answer_before": before["kl_answer"]["mean"], "kl_answer_after": after["kl_answer"]["mean"],
            "rollouts": {"all": manifest["all"], "kept": manifest["kept"], "choice": manifest["choice"]},
            "loss_first": adapter["curve"][0][1], "loss_last": adapter["curve"][-1][1], "phases": self.phases(),
            "changed_weights": read_json(self.recovered / RECIPE_FILE)["recovery"]["changed_weights"],
        }  # fmt: skip
        if self.config.eval_limit:
            for tag in ("before", "after"):
                scores = read_result(self.work / f"eval/{tag}.json", "eval")["metrics"]
                metrics[f"eval_{tag}"] = {name: {k: m[k] for k in EVAL_KEYS} for name, m in scores.items()}
        public = {name: shown(value) if isinstance(value, Path) else value for name, value in flat(self.config).items()}
        write_result(
            self.result, kind="distill", tag=self.config.tag, started=started, model=describe_model(self.recovered),
            seconds=sum(phase["seconds"] for phase in metrics["phases"].values()), recipe=recipe_record(self.recovered),
            data=[{"name": "rollouts", "revision": self.config.trajectories, "sha256": manifest["sha256"],
                   "n": manifest["kept"]["samples"]}],
            sampling=manifest["settings"]["sampling"], metrics=metrics, extra={"settings": public},
        )  # fmt: skip
        return metrics


def flat(config: DistillSettings) -> dict[str, Any]:
    """The settings by name, those of the recipe among them."""
    values = dataclasses.asdict(config)
    return values | values.pop("recipe")


def summary(metrics: dict[str, Any]) -> str:
    lines = [f"{'phase':<12}{'seconds':>9}{'tokens':>10}{'tokens/s':>10}{'MiB':>8}{'GPU MiB':>9}"]
    for name, phase in metrics["phases"].items():
        vram = phase["peak_vram_mib"] if phase["peak_vram_mib"] is not None else "-"
        lines.append(
            f"{name:<12}{phase['seconds']:>9.1f}{phase['tokens']:>10,}{phase['tokens_per_second']:>10.0f}"
            f"{phase['peak_rss_mib']:>8}{vram:>9}"
        )
    before, after = metrics["kl_before"], metrics["kl_after"]
    lines.append(
        f"KL to the teacher {before['mean']:.5f} -> {after['mean']:.5f} nats ({-100 * metrics['kl_removed']:+.1f} %), "
        f"top-1 {100 * before['top1']:.2f} -> {100 * after['top1']:.2f} %"
    )
    return "\n".join(lines)


def recover(config: DistillSettings, result: Path, step: Step = step) -> None:
    """Every phase by ``step``, and the record in ``result``."""
    print(summary(Run(config, result, step).all()), flush=True)


# ---------------------------------------------------------------- the plan


def phase_rates(results: Path, phase: str) -> Rates:
    """The best recorded tokens a second of a phase on each machine."""
    found: Rates = {}
    for file, record in records_of(results, "distill"):
        rate = record["metrics"].get("phases", {}).get(phase, {}).get("tokens_per_second", 0)
        if rate:
            found[machine(record)] = max(found.get(machine(record), (rate, file)), (rate, file))
    return found


def prompts(config: DistillSettings) -> int:
    """Prompts that get a rollout: of a file its lines, of the tiny tasks LIMIT each."""
    if not config.prompts:
        return config.limit * len(config.tasks.split(","))
    try:
        return min(config.limit, sum(1 for line in config.prompts.open(encoding="utf-8") if line.strip()))
    except OSError as error:
        raise UserError(f"{config.prompts}: cannot be read ({error.strerror}); PROMPTS names a jsonl file") from None


def plan(config: DistillSettings, result: Path) -> str:
    """What the run would do, with sizes and times; no weight is read."""
    run, rollouts = Run(config, result, step), prompts(config) * config.repeats
    needs = budget(config.teacher, rank=config.rank, rollouts=rollouts, tokens=config.max_tokens, k=config.k)
    shape, disk, recipe = needs["shape"], needs["disk"], config.recipe
    if config.mode == "scales":
        disk |= {"adapter": 0, "training state": 0}
    student = config.student or f"{run.student} (int{recipe.expert_bits:g}/int{recipe.linear_bits}, {recipe.method})"
    lines = [
        f"teacher {config.teacher}: {shape['parameters']:,.0f} parameters, "
        f"{100 * shape['routed'] / shape['parameters']:.1f} % in experts",
        f"student {student}; {config.trajectories}'s trajectories; loss {config.loss}; {config.processes} process(es)",
    ]
    texts, trained = rollouts * config.max_tokens, config.steps * config.rows * config.max_tokens
    for name, phase, done, what, tokens in (
        ("A rollouts", "opd_gen", run.rollouts / MANIFEST, f"{rollouts:,} rollouts", texts),
        ("B scores", "opd_score", run.scores / INDEX, f"{rollouts:,} rollouts", texts),
        ("C training", "opd_train", run.adapter / ADAPTER_JSON, f"{config.steps:,} steps of {config.rows} rollouts", trained),
    ):
        lines.append(f"{name}: {what}, at most {tokens:,} tokens" + (" (done: skipped)" if done.exists() else ""))
        rates = phase_rates(RESULTS, phase)
        for where, (rate, file) in rates.items():
            lines.append(f"  {duration(tokens / rate):>8}  {where} ({rate:,.0f} tokens/s, {file})")
        lines += [] if rates else ["  no recorded rate; the phase shows its own after a few seconds"]
    lines.append(f"D merge: writes {run.recovered}" + (" (done: skipped)" if (run.recovered / RECIPE_FILE).exists() else ""))
    sizes = ", ".join(f"{name.partition(',')[0]} {size / 1e6:,.1f} MB" for name, size in disk.items())
    judged = f", and {config.eval_limit} test items of each task" if config.eval_limit else ""
    lines.append(f"disk, at most: {sizes}")
    lines.append(f"judged by the KL of {config.kl_items} transcripts of each task{judged}; record {result}")
    return "\n".join([*lines, "dry run: nothing was written"])


def modes(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--smoke", action="store_true", help="two steps end to end, in WORK-smoke")
    parser.add_argument("--dry-run", action="store_true", help="say what the run would do, and stop")


def main() -> None:
    config, args = parse_settings(DistillSettings, __doc__, modes)
    result = Path("results/distill") / f"{config.tag}.json"
    if args.smoke:
        work = config.work.with_name(f"{config.work.name}-smoke")
        config = dataclasses.replace(config, **SMOKE, rows=2 * config.processes, work=work)
        result = config.work / "distill/smoke.json"
    if args.dry_run:
        print(plan(config, result), flush=True)
        return
    if args.smoke:
        shutil.rmtree(config.work, ignore_errors=True)
    recover(config, result)
    print("SMOKE OK" if args.smoke else f"recovered model: {config.work / 'recovered'}\nrecord: {result}", flush=True)


if __name__ == "__main__":
    run_cli(main)
