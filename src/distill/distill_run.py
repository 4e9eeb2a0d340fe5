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
import itertools
import json
import shlex
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from backend_openai import read_addresses
from checkpoint import PACKED, Checkpoint, different_file, read_manifest, source_identity
from console import UserError, read_json, run_cli, run_script, write_json
from fsdp_setup import ONE_NODE, Nodes, launch
from hf_model import load_tokenizer
from opd_budget import budget
from opd_data import (
    ADAPTER,
    ADAPTER_JSON,
    INDEX,
    MANIFEST,
    PHASE,
    DistillSettings,
    Generation,
    ScoredRollouts,
    Scoring,
    TrainSettings,
    check_scored,
    members,
    model_identity,
    read_adapter,
    read_prompts,
    read_rollouts,
    same_model,
    shown,
    tokenizer_sha256,
)
from opd_student import check_adapters
from recipe import RECIPE_FILE, read_recipe, recipe_record
from records import REPO, describe_model, read_result, write_result
from runner import training_benchmarks
from settings import parse_settings, typed, values_of
from size_model import RESULTS, Rates, duration, machine, records_of

SMOKE = {"repeats": 1, "max_tokens": 64, "finished_only": False, "steps": 2, "warmup": 0, "kl_items": 2}
SMOKE |= {"micro_rows": 2, "eval_limit": 0, "save_every": 1}
SETTINGS = "settings.json"
PACK = "src/quant/packed_export.py"
EVAL_KEYS = ("n", "acc", "acc_low", "acc_high", "acc_finished", "trunc", "mean_tokens")
# what a run may be resumed with otherwise
HERE = ("processes", "nnodes", "node_rank", "rdzv", "base_url", "parallel", "timeout", "api_key_env")
Step = Callable[..., None]  # step(script, *arguments, processes=N, nodes=ONE_NODE) runs a command


def step(script: str, *arguments: object, processes: int = 1, nodes: Nodes = ONE_NODE) -> None:
    """Run one of the project's commands, printed first; several processes as torchrun would. Each has a process of its own, so
    that an engine's GPU memory goes with it and a phase's peak memory is its own."""
    several = processes * nodes.nnodes > 1
    meet = ["--nnodes", nodes.nnodes, "--rdzv_backend", "c10d", "--rdzv_endpoint", nodes.rdzv]
    start = ["torchrun", *(meet if nodes.nnodes > 1 else ["--standalone"]), "--nproc_per_node", processes]
    print("+ " + shlex.join(map(str, [*(start if several else ["python"]), script, *arguments])), flush=True)
    if several:
        launch([str(REPO / script), *map(str, arguments)], processes, nodes)
    else:
        run_script(script, *arguments)


def packing(packed: Path) -> list[object]:
    """The options of packed_export that give a checkpoint of the same recipe the codes of this one."""
    manifest = read_manifest(packed)
    bits = {name: own if manifest["format"] > 1 else 4 for name, _, _, own in manifest["tensors"] if own}
    return ["--packed-bits", min(bits.values()), *([] if any(".experts." in name for name in bits) else ["--keep-experts"])]


class Source(NamedTuple):
    """Whose texts; what the names of a mixture's second begin with; where its rollouts and scores lie; whether this run makes
    them."""

    whose: str
    own: str
    rollouts: Path
    scores: Path
    made: bool


class Run:
    """The directories of a run and its phases in order."""

    def __init__(self, config: DistillSettings, result: Path, step: Step) -> None:
        self.config, self.result, self.step = config, result, step
        self.work, self.teacher = config.work, config.teacher
        self.packed = config.student is not None and (config.student / PACKED).is_file()
        self.student = self.work / "student" if self.packed or not config.student else config.student
        self.sources: list[Source] = []
        for whose, own, given in zip(config.losses, ("", "own_"), (config.cache, config.own_cache), strict=False):
            place = given or self.work / ("teacher" if whose == "teacher" else "")
            self.sources.append(Source(whose, own, place / "rollouts", place / "scores", not given))
        self.adapter, self.recovered = self.work / "adapter", self.work / "recovered"
        # what is recovered: on a block type of llama.cpp that is not the student's file, but its weights on that grid
        self.before = self.work / "before" if config.ggml else self.student

    def join(self) -> None:
        """The part of a node that is not the first: to score and to train, as soon as the first has made what that needs."""
        texts = [source.rollouts / MANIFEST for source in self.sources]
        self.wait(self.work / SETTINGS, self.student / RECIPE_FILE, *texts)
        self.check()
        self.claim()
        for source in self.sources:
            self.score(source)
        self.wait(self.before / RECIPE_FILE)
        self.train()

    @staticmethod
    def wait(*paths: Path) -> None:
        """Until node 0 has written these."""
        for path in paths:
            if not path.exists():
                print(f"waiting until node 0 has written {path}, in a directory that every node sees", flush=True)
            while not path.exists():
                time.sleep(1)

    def all(self) -> dict[str, Any]:
        """Every phase that is not done yet, and the record; returns its metrics."""
        started = time.time()
        self.check()
        self.claim()
        for phase in (self.quantize, self.cache, self.start, self.train, self.merge, self.measure):
            phase()
        return self.record(started)

    def check(self) -> None:
        """Raise :class:`UserError` on what a later phase would refuse, by headers and prompts alone."""
        config, teacher = self.config, Checkpoint(self.teacher)
        student = Checkpoint(config.student) if config.student else None
        check_adapters(student, teacher, read_recipe(config.student) if config.student else config.recipe, config)
        if config.student:
            same_texts(config.student, self.teacher)
        for source in self.sources:
            if not source.made:
                check_scored(source.scores, read_rollouts(source.rollouts)[1])
        if making := [source for source in self.sources if source.made]:
            training_benchmarks(config.tasks.split(",") if config.tasks else [])
        if config.base_url and not all((source.rollouts / MANIFEST).exists() for source in making):
            read_addresses(config.base_url)
        if making and (most := prompts(config) * config.repeats) < config.rows:
            raise UserError(f"ROWS={config.rows}: there will be only {most} rollouts; raise LIMIT or REPEATS, or lower ROWS")

    def inputs(self) -> dict[str, dict[str, str]]:
        """By key the identity of the files that the settings name."""
        config = self.config
        models = {"teacher": self.teacher, "student": config.student, "rollout_model": config.rollout_model}
        models["prompts"] = config.prompts if any(source.made for source in self.sources) else None
        found = {key: source_identity(path) for key, path in models.items() if path}
        if config.init:
            found["init"] = source_identity(config.init / ADAPTER)
        for own, rollouts, scores in (
            (source.own, source.rollouts, source.scores) for source in self.sources if not source.made
        ):
            found[f"{own}cache"] = source_identity(rollouts / MANIFEST) | source_identity(scores / INDEX)
        return found

    def claim(self) -> None:
        """Note the settings and what their files hold in WORK, or refuse a WORK with others."""
        path, settings = self.work / SETTINGS, json.loads(json.dumps(values_of(self.config), default=str))
        settings["inputs"] = self.inputs()
        if not path.exists():
            write_json(path, settings)
            return
        before = members(
            read_json(path), ("inputs",), path, "made before the contents of inputs were noted; give another WORK or remove it"
        )
        held, now = before.pop("inputs"), settings.pop("inputs")
        for key, values in itertools.product(HERE, (before, settings)):
            values.pop(key, None)
        if changed := sorted(key.upper() for key in settings.keys() | before.keys() if settings.get(key) != before.get(key)):
            raise UserError(f"{self.work}: made with other {', '.join(changed)}; give another WORK or remove it")
        for key in sorted(now):
            if why := different_file(held[key] if isinstance(held, dict) and key in held else None, now[key]):
                raise UserError(f"{self.work}: made with another {key.upper()}: {why}; give another WORK or remove it")

    def quantize(self) -> None:
        if (self.student / RECIPE_FILE).exists():
            return
        if self.packed:  # what is trained and judged is what it unpacks to: transformers reads no experts of several widths
            self.step(PACK, "--unpack", self.config.student, "--out", self.student)
        else:
            self.step("src/quant/quant_save.py", "--model", self.teacher, "--out", self.student, *typed(self.config.recipe))

    def cache(self) -> None:
        """Phases A and B, unless CACHE names the output of another run; what is there must be of these models and settings."""
        for source in self.sources:
            config, rollouts = self.config, source.rollouts
            model = self.teacher if source.whose == "teacher" else config.rollout_model or self.student
            if source.made and not (rollouts / MANIFEST).exists():
                if config.base_url and model.suffix == ".gguf" and not config.tokenizer:
                    config = dataclasses.replace(config, tokenizer=self.student)
                self.step("src/distill/opd_gen.py", "--model", model, "--out", rollouts, *typed(config, Generation))
            _, manifest = read_rollouts(rollouts)
            if why := different_file(manifest["settings"].get("identity"), source_identity(model)) if source.made else None:
                raise UserError(f"{rollouts}: not of {model} as it is now: {why}; give another WORK or remove {self.work}")
            if (kept := manifest["kept"]["samples"]) < config.rows:
                mend = "lower ROWS, or raise LIMIT, REPEATS or MAX_TOKENS, in another WORK"
                raise UserError(f"ROWS={config.rows}: only {kept} rollouts are kept in {rollouts}; {mend}")
            self.score(source)

    def score(self, source: Source) -> None:
        """Phase B, which every node has a part in: each scores what is missing."""
        if not (source.scores / INDEX).exists():
            paths = ["--teacher", self.teacher, "--rollouts", source.rollouts, "--out", source.scores]
            self.step("src/distill/opd_score.py", *paths, *typed(self.config, Scoring))
        check_scored(source.scores, read_rollouts(source.rollouts)[1], self.config if source.made else None)

    def start(self) -> None:
        """The weights of a block type before training: an adapter of no steps, merged."""
        if self.config.ggml and not (self.before / RECIPE_FILE).exists():
            self.fit(self.work / "start", dataclasses.replace(self.config, steps=0, init=None, nnodes=1, node_rank=0))
            self.bake(self.work / "start", self.before)

    def train(self) -> None:
        """Phase C."""
        self.fit(self.adapter, self.config)

    def fit(self, out: Path, config: DistillSettings) -> None:
        if not (out / ADAPTER_JSON).exists():
            paths = ["--student", self.student, "--teacher", self.teacher]
            for source in self.sources:
                own = source.own.replace("_", "-")
                paths += [f"--{own}rollouts", source.rollouts, f"--{own}scores", source.scores]
            arguments = [*paths, "--out", out, *typed(config, TrainSettings)]
            nodes = Nodes(config.nnodes, config.node_rank, config.rdzv) if config.nnodes > 1 else ONE_NODE
            self.step("src/distill/opd_train_fsdp.py", *arguments, processes=config.processes, nodes=nodes)

    def merge(self) -> None:
        """Phase D."""
        if not (self.recovered / RECIPE_FILE).exists():
            self.bake(self.adapter, self.recovered)
        again = self.work / "packed"
        if self.packed and not self.config.ggml:
            if not (again / RECIPE_FILE).exists():
                self.step(PACK, "--model", self.recovered, "--out", again, *packing(self.config.student))
            if read_json(again / RECIPE_FILE).get("recovery") != read_json(self.recovered / RECIPE_FILE).get("recovery"):
                raise UserError(f"{again}: not made of {self.recovered} as it is now; remove it, and run again")

    def bake(self, adapter: Path, out: Path) -> None:
        paths = ["--student", self.student, "--teacher", self.teacher, "--adapter", adapter]
        self.step("src/distill/merge_adapter.py", *paths, "--out", out)

    def measure(self) -> None:
        """KL to the teacher (and accuracy, where asked for) before and after."""
        config = self.config
        for tag, model in (("before", self.before), ("after", self.recovered)):
            of, now = self.work / f"measured_{tag}.json", source_identity(model)
            if why := different_file(read_json(of), now) if of.exists() else None:
                measured = ", ".join(str(self.work / name) for name in (of.name, "kl", "eval"))
                raise UserError(f"{model}: is not what was measured: {why}; remove {measured}")
            write_json(of, now)
            if not (self.work / f"kl/{tag}.json").exists():
                items = ["--items", config.kl_items, "--out", self.work / "kl", "--tag", tag]
                self.step("src/eval/moe_eval.py", "--model", model, "--reference", self.teacher, *items)
            if config.eval_limit and not (self.work / f"eval/{tag}.json").exists():
                items = ["--limit", config.eval_limit, "--batch", config.chunk, "--out", self.work / "eval", "--tag", tag]
                self.step("src/eval/vllm_eval8.py", "--model", model, "--benchmarks", config.tasks, *items)

    def phases(self) -> dict[str, Any]:
        """What each phase cost, from the files that they left."""
        found = {}
        texts = [(source.own, place) for source in self.sources for place in (source.rollouts, source.scores)]
        for own, directory in (*texts, ("", self.adapter), ("", self.recovered)):
            value = read_json(directory / PHASE)
            found[own + value.pop("phase")] = value
        return found

    def chain(self) -> tuple[list[dict[str, Any]], list[float | None]]:
        """(the manifests of the rollouts, the losses of training); raises :class:`UserError` unless each output in WORK was
        made of the one before it as that is now."""
        manifests = [read_rollouts(source.rollouts)[1] for source in self.sources]
        adapter, merged = read_adapter(self.adapter), self.recovered / RECIPE_FILE
        recovery = members(read_json(merged), ("recovery",), merged, f"remove {self.recovered} and run again")["recovery"]
        teacher, student = model_identity(self.teacher), model_identity(self.student)
        links: list[tuple[Path, Path, bool]] = []
        for source, manifest in zip(self.sources, manifests, strict=True):
            scores, trained = ScoredRollouts(source.scores), adapter["data"].get("own", {}) if source.own else adapter["data"]
            links += [
                (source.scores, source.rollouts, scores.index["rollouts_sha256"] == manifest["sha256"]),
                (source.scores, self.teacher, same_model(scores.index["teacher"], teacher)),
                (self.adapter, source.scores, trained.get("scores_sha256") == scores.check_bytes()),
            ]
        for made, of, same in (
            *links,
            (self.adapter, self.teacher, same_model(adapter["teacher"], teacher)),
            (self.adapter, self.student, same_model(adapter["student"], student)),
            (self.recovered, self.adapter, recovery["adapter_sha256"] == adapter.get("adapter_sha256")),
        ):  # fmt: skip
            if not same:
                raise UserError(f"{made}: not made of {of} as it is now; remove {made} and what was made of it, and run again")
        return manifests, [loss for _, loss, _ in adapter["curve"]] or [None]

    def record(self, started: float) -> dict[str, Any]:
        """Write the record of the run; returns its metrics."""
        before, after = (read_result(self.work / f"kl/{tag}.json", "kl")["metrics"] for tag in ("before", "after"))
        manifests, losses = self.chain()
        texts = list(zip(self.sources, manifests, strict=True))
        metrics: dict[str, Any] = {
            "kl_before": before["kl"], "kl_after": after["kl"],
            "kl_removed": 1 - after["kl"]["mean"] / before["kl"]["mean"] if before["kl"]["mean"] else 0.0,
            "kl_answer_before": before["kl_answer"]["mean"], "kl_answer_after": after["kl_answer"]["mean"],
            **{f"{source.own}rollouts": {key: made[key] for key in ("all", "kept", "choice")} for source, made in texts},
            "loss_first": losses[0], "loss_last": losses[-1], "phases": self.phases(),
            "changed_weights": read_json(self.recovered / RECIPE_FILE)["recovery"]["changed_weights"],
        }  # fmt: skip
        if self.config.eval_limit:
            for tag in ("before", "after"):
                scores = read_result(self.work / f"eval/{tag}.json", "eval")["metrics"]
                metrics[f"eval_{tag}"] = {name: {k: m[k] for k in EVAL_KEYS} for name, m in scores.items()}
        public = {
            name: shown(value) if isinstance(value, Path) else value
            for name, value in values_of(self.config).items()
            if name not in ("node_rank", "rdzv", "base_url", "api_key_env")  # of these machines
        }
        write_result(
            self.result, kind="distill", tag=self.config.tag, started=started, model=describe_model(self.recovered),
            seconds=sum(phase["seconds"] for phase in metrics["phases"].values()), recipe=recipe_record(self.recovered),
            data=[{"name": "rollouts", "revision": source.whose, "sha256": made["sha256"], "n": made["kept"]["samples"]}
                  for source, made in texts],
            sampling=manifests[0]["settings"]["sampling"], metrics=metrics, extra={"settings": public},
        )  # fmt: skip
        return metrics


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
    """Prompts that get a rollout: LIMIT of each task, and of a file all, or LIMIT where there is no task."""
    tasks = [task for task in config.tasks.split(",") if task]
    rows = len(read_prompts(config.prompts)) if config.prompts else 0
    return config.limit * len(tasks) + rows if tasks else min(config.limit, rows)


def same_texts(student: Path, teacher: Path) -> None:
    """Raise :class:`UserError` unless student and teacher read and are asked alike: one tokenizer, one chat template."""
    mine, others = load_tokenizer(student), load_tokenizer(teacher)
    if tokenizer_sha256(mine) != tokenizer_sha256(others):
        raise UserError(f"{student}: has another tokenizer than {teacher}; recovery needs one for both")
    if mine.chat_template != others.chat_template:
        raise UserError(f"{student}: has another chat template than {teacher}; give both the same, the one that is deployed")


def plan(config: DistillSettings, result: Path) -> str:
    """What the run would do, with sizes and times; no weight is read."""
    run, rollouts = Run(config, result, step), prompts(config) * config.repeats
    run.check()
    needs = budget(config.teacher, rank=config.rank, rollouts=rollouts, tokens=config.max_tokens, k=config.k)
    shape, disk, recipe = needs["shape"], needs["disk"], config.recipe
    if config.mode == "scales":
        disk |= {"adapter": 0, "training state": 0}
    student = config.student or f"{run.student} (int{recipe.expert_bits:g}/int{recipe.linear_bits}, {recipe.method})"
    lines = [
        f"teacher {config.teacher}: {shape['parameters']:,.0f} parameters, "
        f"{100 * shape['routed'] / shape['parameters']:.1f} % in experts",
        f"student {student}; " + ", ".join(f"{loss} on the {whose}'s texts" for whose, loss in config.losses.items()) + "; "
        f"{config.nnodes * config.processes} process(es)",
    ]
    texts, trained = rollouts * config.max_tokens, config.steps * config.rows * config.max_tokens
    for name, phase, done, what, tokens in (
        *(
            (f"{what} ({s.whose}'s texts)", phase, place, f"{rollouts:,} rollouts", texts)
            for s in run.sources
            for what, phase, place in (
                ("A rollouts", "opd_gen", s.rollouts / MANIFEST),
                ("B scores", "opd_score", s.scores / INDEX),
            )
        ),
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
        if config.nnodes > 1:
            raise UserError(f"--smoke with NNODES={config.nnodes}: it runs on one node; leave NNODES out")
        work = config.work.with_name(f"{config.work.name}-smoke")
        rows = 2 * config.processes
        config = dataclasses.replace(config, **SMOKE, rows=rows, limit=max(4, rows), work=work)
        result = config.work / "distill/smoke.json"
    if args.dry_run:
        print(plan(config, result), flush=True)
        return
    if args.smoke:
        shutil.rmtree(config.work, ignore_errors=True)
    if config.node_rank:
        Run(config, result, step).join()
        print(f"node {config.node_rank}: trained; node 0 goes on", flush=True)
        return
    recover(config, result)
    print("SMOKE OK" if args.smoke else f"recovered model: {config.work / 'recovered'}\nrecord: {result}", flush=True)


if __name__ == "__main__":
    run_cli(main)
