"""One part of the study of recovery on razor-tiny: bash pipelines/recovery.sh runs them all, several at once.

    python src/distill/study_recovery.py --part NAME [--list]

Keys: configs/recovery_study.env, or the environment. Every run of a part is one of distill_run, in a WORK of its own under
WORK, and leaves results/distill/TAG.json; where it is evaluated also results/eval/TAG.json. The commands run in this process,
which saves their starts. What exists is kept: a killed part goes on with the same command.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from console import UserError, atomic_path, run_cli, run_inside
from distill_run import recover
from opd_data import INDEX, AllPhases, DistillSettings, Generation, Scoring
from recipe import RECIPE_FILE, read_recipe
from settings import parse_settings, setting, typed
from tiny_data import END_OF_TEXT

STUDY = Path("configs/recovery_study.env")


@dataclass(frozen=True, kw_only=True)
class StudySettings(AllPhases):
    """The keys of configs/recovery_study.env: what all runs share, and how they differ."""

    results: Path = setting(help="distill/TAG.json and eval/TAG.json")
    free: int = setting(help="texts of the teacher from an empty prompt")
    second_lr: float = setting(help="of the second stage")
    fine_lr: float = setting(help="of int3 and the block types, which start close to the teacher")
    grid: int = setting(help="bits of the experts in the table of stages")
    wait: int = setting(help="seconds that a part waits for what another part makes")
    long_steps: int = setting(help="of part long")
    long_rows: int = setting(help="its rollouts of a step")
    long_limit: int = setting(help="its training prompts of each task")
    long_free: int = setting(help="its texts of the teacher from an empty prompt")
    long_rank: int = setting(help="rank of its adapters")
    seeds: int = setting(help="of the parts recipe_TRAINED_SEED")
    recipe_steps: int = setting(help="of their warm start, and as many of each cell")

    def student(self, bits: int) -> Path:
        return self.work / f"int{bits}"

    @property
    def free_prompts(self) -> Path | None:
        return self.work / "free.jsonl" if self.free else None


@dataclass(frozen=True)
class Stage:
    """One run of distill_run: its tag, what differs from the study's settings, and whether its model answers the tasks."""

    tag: str
    changes: dict[str, Any]
    evaluate: bool = True


TRAINED: dict[str, dict[str, Any]] = {
    "lora": {"mode": "lora"}, "scales": {"mode": "scales", "norms": True}, "both": {"mode": "steps", "norms": True},
}  # fmt: skip
# whose texts with which loss, the most important first; a mixture has of each text the loss that goes with it
CELLS: dict[str, dict[str, Any]] = {
    "teacher_forward": {"trajectories": "teacher", "teacher_loss": "forward_kl"},
    "student_reverse": {"trajectories": "student", "student_loss": "reverse_kl"},
    "mixture": {"trajectories": "mixture"},
    "student_forward": {"trajectories": "student", "student_loss": "forward_kl"},
    "teacher_reverse": {"trajectories": "teacher", "teacher_loss": "reverse_kl"},
}


def recipes(study: StudySettings) -> dict[str, list[Stage]]:
    """By what is trained and seed: a warm start on the teacher's texts (forward KL), and from it every cell by as many steps.
    The warm student writes once, for all cells."""
    found = {}
    for seed, (name, kind) in itertools.product(range(study.seeds), TRAINED.items()):
        part = f"recipe_{name}_{seed}"
        tag = f"recovery_{part}"
        warm, own = study.work / f"{tag}_warm", study.work / f"{tag}_student_reverse"
        shared: dict[str, Any] = {"student": study.student(study.grid), "seed": seed, "steps": study.recipe_steps} | kind
        second: dict[str, Any] = {"lr": study.second_lr, "init": warm / "adapter"}
        texts = dict.fromkeys(CELLS, {"cache": study.work / "cache"}) | {"student_forward": {"cache": own}}
        texts |= {"student_reverse": {"rollout_model": warm / "recovered"}}
        texts["mixture"] = texts["mixture"] | {"own_cache": own}
        found[part] = [Stage(f"{tag}_warm", shared | texts["teacher_forward"], False)]
        found[part] += [Stage(f"{tag}_{cell}", shared | second | how | texts[cell]) for cell, how in CELLS.items()]
    return found


def stages(study: StudySettings) -> dict[str, list[Stage]]:
    """The runs of every part, in the order of their importance."""
    tiny, student = f"recovery_int{study.grid}", {"student": study.student(study.grid)}
    cached = student | {"cache": study.work / "cache"}
    whole = {"cache": study.work / "cache_whole"}
    own = student | {"trajectories": "student"}
    half, warm = study.steps // 2, study.work / f"{tiny}_warm"
    second = own | {"steps": study.steps - half, "init": warm / "adapter", "rollout_model": warm / "recovered"}
    second["lr"] = study.second_lr
    long: dict[str, Any] = {"cache": study.work / "cache_long", "rank": study.long_rank, "rows": study.long_rows} | student
    blocks = whole | {"mode": "lora", "lr": study.fine_lr, "student": study.student(3)}
    return {
        "policy": [
            Stage(f"{tiny}_warm", cached | {"steps": half}, False),
            Stage(f"{tiny}_policy", second),
        ],
        "teacher": [Stage(f"{tiny}_teacher", cached)],
        "int3": [Stage("recovery_int3", whole | {"student": study.student(3), "lr": study.fine_lr})],
        "iq2_xs": [Stage("recovery_iq2_xs", blocks | {"ggml": "iq2_xs"}, False)],
        "entropy": [Stage(f"{tiny}_cross_entropy", cached | {"teacher_loss": "cross_entropy"})],
        "cold": [Stage(f"{tiny}_cold", own)],
        "cold_all": [Stage(f"{tiny}_cold_all", own | {"finished_only": False})],
        "long": [Stage(f"{tiny}_long", long | {"steps": study.long_steps})],
    } | recipes(study)


def wait_for(path: Path | None, seconds: int) -> None:
    """Wait until another part has made ``path``."""
    started = time.monotonic()
    while path and not path.exists():
        if time.monotonic() - started > seconds:
            raise UserError(f"{path}: not made within {seconds} s; its part has failed or is slow (WAIT)")
        time.sleep(1)


def make_students(study: StudySettings) -> None:
    """The students of the published recipe, 2 bits by absmax and 3 by the clipped search, int4 backbone, groups of 128; and
    prompts of nothing: what the teacher writes after the end of a text, which is where it tells what it knows."""
    for bits, clip in ((2, 1), (3, 16)):
        if not (study.student(bits) / RECIPE_FILE).exists():
            kind = ["--expert-bits", bits, "--linear-bits", 4, "--group", 128, "--clip-steps", clip, "--method", "clip"]
            run_inside("src/quant/quant_save.py", "--model", study.teacher, "--out", study.student(bits), *kind)
    for name, count in (("free", study.free), ("free_long", study.long_free)):
        rows = [json.dumps({"id": f"free-{number:05d}", "text": END_OF_TEXT}) for number in range(count)]
        with atomic_path(study.work / f"{name}.jsonl") as temporary:
            temporary.write_text("\n".join(rows) + "\n", encoding="utf-8")


def teacher_texts(study: StudySettings, name: str, limit: int, prompts: Path | None) -> None:
    """The teacher's texts in the directory ``name`` of WORK, scored in the answers."""
    if not (study.work / name / "scores" / INDEX).exists():
        own = dataclasses.replace(study, limit=limit, prompts=prompts)
        rollouts, scores = (study.work / name / phase for phase in ("rollouts", "scores"))
        run_inside("src/distill/opd_gen.py", "--model", study.teacher, "--out", rollouts, *typed(own, Generation))
        paths = ["--teacher", study.teacher, "--rollouts", rollouts, "--out", scores]
        run_inside("src/distill/opd_score.py", *paths, *typed(own, Scoring))


def make_cache(study: StudySettings) -> None:
    """The teacher's texts, scored once in the answers and once in all tokens."""
    teacher_texts(study, "cache", study.limit, study.free_prompts)
    rollouts, whole = study.work / "cache/rollouts", study.work / "cache_whole"
    if not (whole / "scores" / INDEX).exists():
        paths = ["--teacher", study.teacher, "--rollouts", rollouts, "--out", whole / "scores"]
        own = dataclasses.replace(study, score_prompts=True)
        run_inside("src/distill/opd_score.py", *paths, *typed(own, Scoring))
        (whole / "rollouts").unlink(missing_ok=True)
        (whole / "rollouts").symlink_to(rollouts.resolve())


def evaluate(study: StudySettings, model: Path, tag: str) -> None:
    if study.eval_limit and not (study.results / f"eval/{tag}.json").exists():
        how = ["--backend", "hf", "--batch", study.chunk, "--limit", study.eval_limit, "--out", study.results / "eval"]
        run_inside("src/eval/vllm_eval8.py", "--model", model, "--tag", tag, *how)


def run_stage(study: StudySettings, stage: Stage) -> None:
    result, work = study.results / f"distill/{stage.tag}.json", study.work / stage.tag
    if not result.exists():
        own = {field.name: getattr(study, field.name) for field in dataclasses.fields(AllPhases)}
        own |= {"prompts": study.free_prompts, "trajectories": "teacher"} | stage.changes
        own |= {"work": work, "tag": stage.tag, "eval_limit": 0, "recipe": read_recipe(own["student"])}
        recover(DistillSettings(**own | {"micro_rows": own["rows"]}), result, run_inside)


def compare(study: StudySettings) -> None:
    """What was evaluated, in pairs: each model with the teacher, and recovered ones with their students and one another."""
    tiny, teacher = f"recovery_int{study.grid}", "recovery_bf16"
    first = f"{tiny}_teacher"
    recovered = [(f"{tiny}_before", first), (first, f"{tiny}_policy"), (first, f"{tiny}_cross_entropy")]
    cells = [(f"recovery_{part}_teacher_forward", f"recovery_{part}_student_reverse", []) for part in recipes(study)]
    parts = [part for name, part in stages(study).items() if name not in recipes(study)]
    tags = [f"{tiny}_before", *(stage.tag for part in parts for stage in part if stage.evaluate)]
    pairs = [*((teacher, tag, []) for tag in tags), *((*pair, ["--teacher", teacher]) for pair in recovered), *cells]
    for base, other, more in pairs:
        if all((study.results / f"eval/{tag}.json").exists() for tag in (base, other, *more[1:])):
            run_inside("src/eval/compare_tags.py", "--results", study.results, base, other, *more)


def run_part(study: StudySettings, part: str) -> None:
    if part == "students":
        make_students(study)
    elif part == "cache":
        make_cache(study)
    elif part == "cache_long":
        teacher_texts(study, "cache_long", study.long_limit, study.work / "free_long.jsonl" if study.long_free else None)
    elif part == "before":
        evaluate(study, study.student(study.grid), f"recovery_int{study.grid}_before")
        evaluate(study, study.teacher, "recovery_bf16")
    elif part == "compare":
        compare(study)
    else:
        for stage in stages(study)[part]:
            cache = stage.changes.get("cache")
            wait_for(cache and cache / "scores" / INDEX, study.wait)
            run_stage(study, stage)
        for stage in stages(study)[part]:  # the tasks take longer than all that comes before
            if stage.evaluate:
                evaluate(study, study.work / stage.tag / "recovered", stage.tag)


def choice(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(config=STUDY)
    parser.add_argument("--part", help="which one; --list names them")
    parser.add_argument("--list", action="store_true", help="the names of the parts, in their order")


def main() -> None:
    study, args = parse_settings(StudySettings, __doc__, choice)
    names = ["students", "cache", "before", "cache_long", *stages(study), "compare"]
    if bool(args.part) == args.list or args.part not in (None, *names):
        raise UserError(f"give either --list or --part NAME, one of {', '.join(names)}")
    if args.list:
        print("\n".join(names))
        return
    print(f"part {args.part}: {study}", flush=True)
    started = time.monotonic()
    run_part(study, args.part)
    print(f"part {args.part}: {time.monotonic() - started:.0f} s", flush=True)


if __name__ == "__main__":
    run_cli(main)
