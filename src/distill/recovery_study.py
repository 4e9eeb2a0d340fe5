"""One part of the study of recovery on razor-tiny: bash pipelines/recovery_study.sh runs them all, several at once.

    python src/distill/recovery_study.py --part NAME [--list]

Keys: configs/recovery_study.env, or the environment. Every run of a part is configs/opd_tiny.env with a few changes, in a WORK
of its own under WORK, and leaves results/distill/TAG.json; where it is evaluated also results/eval/TAG.json. The commands run
in this process, which saves their starts. What exists is kept: a killed part goes on with the same command.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import importlib
import json
import shlex
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from console import UserError, atomic_path, run_cli
from distill_run import DistillConfig, Run, summary
from opd_data import INDEX
from recipe import RECIPE_FILE
from settings import from_environment, load_config
from task_text import TASK_TEXTS
from tiny_tokenizer import END_OF_TEXT

ROOT = Path(__file__).resolve().parents[2]
STUDY, BASE = Path("configs/recovery_study.env"), Path("configs/opd_tiny.env")
FINISHED = ["--finished-only"]  # of the teacher's texts
TASKS = ",".join(task.name for task in TASK_TEXTS)


@dataclass(frozen=True)
class StudyConfig:
    """The keys of configs/recovery_study.env."""

    teacher: str
    work: str
    results: str
    steps: int
    rows: int
    limit: int
    free: int
    max_tokens: int
    chunk: int
    rank: int
    mode: str
    lr: float
    second_lr: float
    fine_lr: float
    warmup: int
    kl_items: int
    eval_limit: int
    grid: int
    wait: int
    long_steps: int
    wide_steps: int
    long_rows: int
    long_limit: int
    long_free: int
    long_rank: int

    def path(self, *parts: str) -> Path:
        return Path(self.work).joinpath(*parts)

    def student(self, bits: int) -> Path:
        return self.path(f"int{bits}")


@dataclass(frozen=True)
class Stage:
    """One run of distill_run: its tag, what differs from the study's settings, whether its model answers the tasks, and the
    file of another part that it waits for."""

    tag: str
    changes: dict[str, object]
    evaluate: bool = True
    after: Path | None = None


def stages(study: StudyConfig) -> dict[str, list[Stage]]:
    """The runs of every part, in the order of their importance."""
    tiny, cached = f"recovery_int{study.grid}", {"CACHE": study.path("cache"), "STUDENT": study.student(study.grid)}
    whole = {"CACHE": study.path("cache_whole"), "LOSS": "forward_kl"}
    own = {"TRAJECTORIES": "student", "STUDENT": study.student(study.grid), "LOSS": "reverse_kl"}
    half, warm = study.steps // 2, study.path(f"{tiny}_warm")
    second = own | {"STEPS": study.steps - half, "INIT": warm / "adapter", "ROLLOUT_MODEL": warm / "recovered"}
    second["LR"] = study.second_lr
    long = {"CACHE": study.path("cache_long"), "STUDENT": study.student(study.grid), "LOSS": "forward_kl"}
    long |= {"RANK": study.long_rank, "ROWS": study.long_rows, "MICRO_ROWS": study.long_rows}
    blocks = {"MODE": "lora", "LR": study.fine_lr, "STUDENT": study.student(3)}
    return {
        "policy": [
            Stage(f"{tiny}_warm", cached | {"LOSS": "forward_kl", "STEPS": half}, False),
            Stage(f"{tiny}_policy", second),
        ],
        "teacher": [Stage(f"{tiny}_teacher", cached | {"LOSS": "forward_kl"})],
        "int3": [Stage("recovery_int3", whole | {"STUDENT": study.student(3), "LR": study.fine_lr})],
        "iq2_xs": [Stage("recovery_iq2_xs", whole | blocks | {"GGML": "iq2_xs"}, False)],
        "entropy": [Stage(f"{tiny}_cross_entropy", cached | {"LOSS": "cross_entropy"})],
        "iq3_xxs": [Stage("recovery_iq3_xxs", whole | blocks | {"GGML": "iq3_xxs"}, False)],
        "policy_all": [Stage(f"{tiny}_policy_all", second | {"FINISHED_ONLY": 0}, after=warm / "recovered" / RECIPE_FILE)],
        "cold": [Stage(f"{tiny}_cold", own)],
        "cold_all": [Stage(f"{tiny}_cold_all", own | {"FINISHED_ONLY": 0})],
        "long": [Stage(f"{tiny}_long", long | {"STEPS": study.long_steps})],
        "wide": [Stage(f"{tiny}_wide", long | {"STEPS": study.wide_steps, "LINEARS": 1})],
    }


def inside(script: str, *arguments: object, processes: int = 1) -> None:
    """Run one of the project's commands in this process, printed first; its memory is counted from here."""
    if processes != 1:
        raise UserError("the parts of the study run in one process each")
    print("+ " + shlex.join(["python", script, *map(str, arguments)]), flush=True)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    before, sys.argv = sys.argv, [str(ROOT / script), *map(str, arguments)]
    try:
        importlib.import_module(Path(script).stem).main()
    finally:
        sys.argv = before


def wait_for(path: Path, seconds: int) -> None:
    """Wait until another part has made ``path``."""
    started = time.monotonic()
    while not path.exists():
        if time.monotonic() - started > seconds:
            raise UserError(f"{path}: not made within {seconds} s; its part has failed or is slow (WAIT)")
        time.sleep(1)


def make_students(study: StudyConfig) -> None:
    """The students of the published recipe: 2 bits by absmax, 3 by the clipped search; int4 backbone, groups of 128."""
    for bits, clip in ((2, 1), (3, 16)):
        if not (study.student(bits) / RECIPE_FILE).exists():
            kind = ["--expert-bits", bits, "--linear-bits", 4, "--group", 128, "--clip-steps", clip, "--method", "clip"]
            inside("src/quant/quant_save.py", "--model", study.teacher, "--out", study.student(bits), *kind)


def free_prompts(study: StudyConfig) -> None:
    """Prompts of nothing: what the teacher writes after the end of a text, which is where it tells what it knows."""
    for name, count in (("free", study.free), ("free_long", study.long_free)):
        rows = [json.dumps({"id": f"free-{number:05d}", "text": END_OF_TEXT}) for number in range(count)]
        with atomic_path(study.path(f"{name}.jsonl")) as temporary:
            temporary.write_text("\n".join(rows) + "\n", encoding="utf-8")


def scoring(study: StudyConfig) -> list[object]:
    return ["--k", 32, "--batch", min(256, study.chunk)]


def teacher_texts(study: StudyConfig, name: str, limit: int, prompts: str, free: int) -> None:
    """The teacher's texts in the directory ``name`` of WORK, scored in the answers."""
    if (study.path(name, "scores") / INDEX).exists():
        return
    sampling = ["--temperature", 1.0, "--max-tokens", study.max_tokens, "--backend", "hf", *FINISHED]
    source = ["--tasks", TASKS, "--limit", limit, *(["--prompts", study.path(prompts)] if free else [])]
    made = ["--teacher", study.teacher, "--out", study.path(name), *source, "--chunk", study.chunk]
    inside("src/distill/cache_teacher.py", *made, *sampling, *scoring(study))


def make_cache(study: StudyConfig) -> None:
    """The teacher's texts, scored once in the answers and once in all tokens."""
    teacher_texts(study, "cache", study.limit, "free.jsonl", study.free)
    if not (study.path("cache_whole", "scores") / INDEX).exists():
        copy = ["--rollouts", study.path("cache", "rollouts"), "--out", study.path("cache_whole", "scores")]
        inside("src/distill/opd_score.py", "--teacher", study.teacher, *copy, *scoring(study), "--score-prompts")
        study.path("cache_whole", "rollouts").unlink(missing_ok=True)
        study.path("cache_whole", "rollouts").symlink_to(study.path("cache", "rollouts").resolve())


def evaluate(study: StudyConfig, model: Path | str, tag: str) -> None:
    if study.eval_limit and not Path(study.results, f"eval/{tag}.json").exists():
        how = ["--backend", "hf", "--batch", study.chunk, "--limit", study.eval_limit, "--out", Path(study.results, "eval")]
        inside("src/eval/vllm_eval8.py", "--model", model, "--tag", tag, *how)


def run_stage(study: StudyConfig, stage: Stage) -> None:
    result = Path(study.results, "distill", f"{stage.tag}.json")
    work = study.path(stage.tag)
    if not result.exists():
        keys = {
            "TEACHER": study.teacher,
            "WORK": work,
            "TAG": stage.tag,
            "BACKEND": "hf",
            "SAVE_EVERY": 100,
            "EVAL_LIMIT": 0,
        }
        names = ("steps", "rows", "limit", "max_tokens", "chunk", "rank", "mode", "lr", "warmup", "kl_items")
        keys |= {name.upper(): getattr(study, name) for name in names} | {"MICRO_ROWS": study.rows}
        keys |= {"SCORE_BATCH": min(256, study.chunk), "TASKS": TASKS}
        keys |= {"PROMPTS": study.path("free.jsonl") if study.free else ""} | stage.changes
        config = load_config(DistillConfig, BASE, {key: str(value) for key, value in keys.items()})
        print(summary(Run(config, result, inside).all()), flush=True)
    if stage.evaluate:
        evaluate(study, work / "recovered", stage.tag)


def compare(study: StudyConfig) -> None:
    """What was evaluated, in pairs: each model with the teacher, and recovered ones with their students and one another."""
    tiny, teacher = f"recovery_int{study.grid}", "recovery_bf16"
    first = f"{tiny}_teacher"
    pairs = [(f"{tiny}_before", first), (first, f"{tiny}_policy"), (first, f"{tiny}_cross_entropy")]
    tags = [f"{tiny}_before", *(stage.tag for part in stages(study).values() for stage in part if stage.evaluate)]
    for base, other, options in [(teacher, tag, []) for tag in tags] + [(*pair, ["--teacher", teacher]) for pair in pairs]:
        if all(Path(study.results, f"eval/{tag}.json").exists() for tag in (teacher, base, other)):
            inside("src/eval/compare_tags.py", "--results", study.results, base, other, *options)


def run_part(study: StudyConfig, part: str) -> None:
    if part == "students":
        make_students(study)
        free_prompts(study)
    elif part == "cache":
        make_cache(study)
    elif part == "cache_long":
        teacher_texts(study, "cache_long", study.long_limit, "free_long.jsonl", study.long_free)
    elif part == "before":
        evaluate(study, study.student(study.grid), f"recovery_int{study.grid}_before")
        evaluate(study, study.teacher, "recovery_bf16")
    elif part == "compare":
        compare(study)
    else:
        for stage in stages(study)[part]:
            cache = stage.changes.get("CACHE")
            for path in (stage.after, Path(cache, "scores", INDEX) if cache else None):
                if path is not None:
                    wait_for(path, study.wait)
            run_stage(study, stage)


def main() -> None:
    study = load_config(StudyConfig, STUDY, from_environment(StudyConfig))
    names = ["students", "cache", "before", "cache_long", *stages(study), "compare"]
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--part", choices=names, help="which one; --list names them")
    parser.add_argument("--list", action="store_true", help="the names of the parts, in their order")
    args = parser.parse_args()
    if bool(args.part) == args.list:
        raise UserError("give either --part NAME or --list")
    if args.list:
        print("\n".join(names))
        return
    print(f"part {args.part}: {dataclasses.asdict(study)}", flush=True)
    started = time.monotonic()
    run_part(study, args.part)
    print(f"part {args.part}: {time.monotonic() - started:.0f} s", flush=True)


if __name__ == "__main__":
    run_cli(main)
