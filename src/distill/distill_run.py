"""What pipelines/distill.sh runs: a configs/*.env file with overrides from the environment -> the four phases and their record.

    STEPS=50 WORK=work/mine python src/distill/distill_run.py --config configs/opd_tiny.env [--smoke]

Each phase is the command that a user would type; it is skipped where its output is complete, so the same command goes on after
a kill. WORK remembers its settings and refuses others. --smoke takes two steps end to end on a few short rollouts, in
WORK-smoke.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from console import UserError, read_json, run_cli, run_script, write_json
from opd_data import MANIFEST, PHASE, shown
from opd_train_fsdp import ADAPTER_JSON
from recipe import RECIPE_FILE, recipe_record
from records import describe_model, read_result, write_result
from settings import from_environment, load_config

SMOKE = {"LIMIT": "4", "REPEATS": "1", "MAX_TOKENS": "64", "FINISHED_ONLY": "0", "STEPS": "2", "WARMUP": "0", "KL_ITEMS": "2"}
SMOKE |= {"MICRO_ROWS": "2", "EVAL_LIMIT": "0", "SAVE_EVERY": "1"}


@dataclass(frozen=True)
class DistillConfig:
    """The keys of configs/opd_tiny.env."""

    student: str
    teacher: str
    work: str
    tag: str
    expert_bits: float
    linear_bits: int
    group: int
    clip_steps: int
    method: str
    cache: str
    trajectories: str
    tasks: str
    prompts: str
    limit: int
    repeats: int
    backend: str
    chunk: int
    rollout_model: str
    finished_only: bool
    max_tokens: int
    temperature: float
    k: int
    score_temperature: float
    score_batch: int
    score_prompts: bool
    init: str
    steps: int
    rows: int
    micro_rows: int
    rank: int
    mode: str
    linears: bool
    base: str
    ggml: str
    loss: str
    lr: float
    warmup: int
    save_every: int
    recompute: bool
    processes: int
    seed: int
    kl_items: int
    eval_limit: int

    def __post_init__(self) -> None:
        if self.trajectories not in ("student", "teacher"):
            raise UserError(f"TRAJECTORIES={self.trajectories}: expected student or teacher")
        if self.init and not self.cache and self.trajectories == "student" and not self.rollout_model:
            raise UserError("INIT with rollouts of the student: set ROLLOUT_MODEL to what INIT's run recovered")
        if self.processes < 1:
            raise UserError(f"PROCESSES={self.processes}: must be at least 1")


class Run:
    """The directories of a run and its phases in order; ``step(script, *arguments, processes=N)`` runs a command."""

    def __init__(self, config: DistillConfig, result: Path, step: Callable[..., None]) -> None:
        self.config, self.result, self.step = config, result, step
        self.work, self.teacher = Path(config.work), Path(config.teacher)
        self.student = Path(config.student) if config.student else self.work / "student"
        off_policy = Path(config.cache) if config.cache else self.work / ("teacher" if config.trajectories == "teacher" else "")
        self.rollouts, self.scores = off_policy / "rollouts", off_policy / "scores"
        self.adapter, self.recovered = self.work / "adapter", self.work / "recovered"
        # what is recovered: on a block type of llama.cpp that is not the student's file, but its weights on that grid
        self.before = self.work / "before" if config.ggml else self.student

    def claim(self) -> None:
        """Note the settings in WORK, or refuse a WORK with others."""
        path, settings = self.work / "settings.json", dataclasses.asdict(self.config)
        if path.exists():
            before = read_json(path)
            changed = sorted(key.upper() for key in settings.keys() | before.keys() if settings.get(key) != before.get(key))
            if changed:
                raise UserError(f"{self.work}: made with other {', '.join(changed)}; give another WORK or remove it")
        else:
            write_json(path, settings)

    def quantize(self) -> None:
        config = self.config
        if config.student or (self.student / RECIPE_FILE).exists():
            return
        bits = ["--expert-bits", f"{config.expert_bits:g}", "--linear-bits", config.linear_bits, "--group", config.group]
        method = ["--clip-steps", config.clip_steps, "--method", config.method]
        self.step("src/quant/quant_save.py", "--model", self.teacher, "--out", self.student, *bits, *method)

    def generation(self) -> list[object]:
        config = self.config
        source = ["--tasks", config.tasks] if config.tasks else []
        source += ["--prompts", config.prompts] if config.prompts else []
        sampling = ["--temperature", config.temperature, "--max-tokens", config.max_tokens, "--seed", config.seed]
        counts = ["--limit", config.limit, "--repeats", config.repeats, "--backend", config.backend]
        return [*source, *counts, *sampling, "--chunk", config.chunk, *(["--finished-only"] if config.finished_only else [])]

    def scoring(self) -> list[object]:
        config = self.config
        size = ["--k", config.k, "--score-temperature", config.score_temperature, "--batch", config.score_batch]
        return [*size, *(["--score-prompts"] if config.score_prompts else [])]

    def cache(self) -> None:
        """Phases A and B, unless CACHE names the output of another run."""
        if self.config.cache:
            return
        if self.config.trajectories == "teacher":
            if not (self.scores / "index.json").exists():
                made = ["--teacher", self.teacher, "--out", self.rollouts.parent]
                self.step("src/distill/cache_teacher.py", *made, *self.generation(), *self.scoring())
            return
        if not (self.rollouts / MANIFEST).exists():
            model = self.config.rollout_model or self.student
            self.step("src/distill/opd_gen.py", "--model", model, "--out", self.rollouts, *self.generation())
        if not (self.scores / "index.json").exists():
            paths = ["--teacher", self.teacher, "--rollouts", self.rollouts, "--out", self.scores]
            self.step("src/distill/opd_score.py", *paths, *self.scoring())

    def start(self) -> None:
        """The weights of a block type before training: an adapter of no steps, merged."""
        if self.config.ggml and not (self.before / RECIPE_FILE).exists():
            self.fit(self.work / "start", 0)
            self.bake(self.work / "start", self.before)

    def train(self) -> None:
        """Phase C."""
        self.fit(self.adapter, self.config.steps)

    def fit(self, out: Path, steps: int) -> None:
        config = self.config
        if (out / ADAPTER_JSON).exists():
            return
        paths = ["--student", self.student, "--teacher", self.teacher, "--rollouts", self.rollouts, "--scores", self.scores]
        size = ["--steps", steps, "--rows", config.rows, "--micro-rows", config.micro_rows, "--seed", config.seed]
        kind = ["--rank", config.rank, "--mode", config.mode, "--base", config.base, "--loss", config.loss]
        rate = ["--lr", config.lr, "--warmup", config.warmup, "--save-every", config.save_every]
        more = ["--ggml", config.ggml] if config.ggml else []
        more += ["--init", config.init] if config.init and steps else []
        more += [flag for flag, on in (("--linears", config.linears), ("--no-recompute", not config.recompute)) if on]
        arguments = [*paths, "--out", out, *size, *kind, *rate, *more]
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
        for tag, model in (("before", self.before), ("after", self.recovered)):
            if not (self.work / f"kl/{tag}.json").exists():
                items = ["--items", self.config.kl_items, "--out", self.work / "kl", "--tag", tag]
                self.step("src/eval/moe_eval.py", "--model", model, "--reference", self.teacher, *items)
            if self.config.eval_limit and not (self.work / f"eval/{tag}.json").exists():
                items = [
                    "--limit",
                    self.config.eval_limit,
                    "--batch",
                    self.config.chunk,
                    "--out",
                    self.work / "eval",
                    "--tag",
                    tag,
                ]
                self.step("src/eval/vllm_eval8.py", "--model", model, "--benchmarks", self.config.tasks, *items)

    def phases(self) -> dict[str, Any]:
        """What each phase cost, from the files that they left."""
        found = {}
        for directory in (self.rollouts, self.scores, self.adapter, self.recovered):
            value = read_json(directory / PHASE)
            found[value.pop("phase")] = value
        return found

    def all(self) -> dict[str, Any]:
        """Every phase that is not done yet, and the record; returns its metrics."""
        started = time.time()
        self.claim()
        for phase in (self.quantize, self.cache, self.start, self.train, self.merge, self.measure):
            phase()
        return self.record(started)

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
        write_result(
            self.result, kind="distill", tag=self.config.tag, started=started, model=describe_model(self.recovered),
            seconds=sum(phase["seconds"] for phase in metrics["phases"].values()), recipe=recipe_record(self.recovered),
            data=[{"name": "rollouts", "revision": self.config.trajectories, "sha256": manifest["sha256"],
                   "n": manifest["kept"]["samples"]}],
            sampling=manifest["settings"]["sampling"], metrics=metrics, extra={"settings": public(self.config)},
        )  # fmt: skip
        return metrics


EVAL_KEYS = ("n", "acc", "acc_low", "acc_high", "acc_finished", "trunc", "mean_tokens")


def public(config: DistillConfig) -> dict[str, Any]:
    """The settings as a record may hold them: paths relative to the repository."""
    paths = ("student", "teacher", "work", "cache", "prompts", "rollout_model", "init")
    values = dataclasses.asdict(config)
    return values | {key: shown(Path(values[key])) for key in paths if values[key]}


def step(script: str, *arguments: object, processes: int = 1) -> None:
    """Run one of the project's commands, printed first; several processes by torchrun."""
    start = ["torchrun", "--standalone", "--nproc_per_node", str(processes)] if processes > 1 else ["python"]
    print("+ " + shlex.join([*start, script, *map(str, arguments)]), flush=True)
    if processes == 1:
        run_script(script, *arguments)
        return
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, "-m", "torch.distributed.run", *start[1:], str(root / script), *map(str, arguments)]
    if code := subprocess.run(command, env=os.environ | shared_cores(processes)).returncode:
        sys.exit(code)


def shared_cores(processes: int) -> dict[str, str]:
    """The variable that gives each of ``processes`` its share of the cores, where it is not set; torchrun would give it one."""
    return {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // processes)))}


def overrides(smoke: bool, config: DistillConfig | None = None) -> dict[str, str]:
    """The config's keys that the environment sets; for --smoke also the small sizes, in a WORK of its own."""
    found = from_environment(DistillConfig)
    if smoke and config is not None:
        rows = str(2 * config.processes)
        found |= SMOKE | {"ROWS": rows, "WORK": config.work.rstrip("/") + "-smoke"}
    return found


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--config", type=Path, required=True, help="settings, as configs/opd_tiny.env")
    parser.add_argument("--smoke", action="store_true", help="two steps end to end, in WORK-smoke")
    args = parser.parse_args()
    config = load_config(DistillConfig, args.config, overrides(False))
    result = Path("results/distill") / f"{config.tag}.json"
    if args.smoke:
        config = load_config(DistillConfig, args.config, overrides(True, config))
        result = Path(config.work) / "distill/smoke.json"
        shutil.rmtree(config.work, ignore_errors=True)
    run = Run(config, result, step)
    print(summary(run.all()), flush=True)
    print("SMOKE OK" if args.smoke else f"recovered model: {run.recovered}\nrecord: {run.result}", flush=True)


if __name__ == "__main__":
    run_cli(main)
