"""Measure a model's accuracy on benchmarks: bash pipelines/eval.sh --model models/razor-tiny --tag razor_tiny_bf16

    python src/eval/vllm_eval8.py --model DIR|FILE.gguf --tag TAG [--benchmarks tiny_know,tiny_math]
        [--backend auto|vllm|hf|llamacpp|openai]
        [--budget 32k|64k|80k] [--samples N] [--limit N] [--data-dir DIR] [--family NAME] [--out results/eval]
        [--temperature T --top-p P --top-k K --seed S] [--tensor-parallel N | --devices all [--spread]] [--force]

Samples are appended to results/eval/TAG.samples.jsonl as they finish: a killed run goes on where it stopped, to the same
result. A truncated answer counts as wrong; acc_finished and trunc stand beside acc. Tokens are drawn as the vendor of the model
recommends (configs/eval.env) unless an option says otherwise. docs/EVAL_PROTOCOL.md has the rules.
"""

from __future__ import annotations

import argparse
import dataclasses
import shlex
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from backend import Backend, Completion, Sampling, choose_backend
from backend_hf import HfBackend
from backend_openai import OpenAIBackend, api_key
from checkpoint import Checkpoint
from console import UserError, progress, read_json, run_cli
from devices import parse_devices
from eval_settings import EvalSettings, check_sampling, load_settings
from gate import eval_records, gate_axis, gate_text
from gguf_info import config_of_gguf, describe_gguf, is_gguf
from graders import GRADER_VERSION, opens_thinking, split_thinking
from llamacpp_eval8 import LlamaCppBackend, add_server_arguments
from paired_stats import clustered_interval
from pictures import pictures_of
from recipe import recipe_record
from records import data_entry, describe_model, sha256_json, sha256_text, write_result
from replicas import Replicas
from sample_log import SampleLog, WorkClock, find_log, packed_path
from task import Benchmark
from task_list import get_benchmarks
from task_text import Item
from vllm_eval import VllmBackend

BUDGETS = {"32k": 32_768, "64k": 65_536, "80k": 81_920}
PROMPT_ROOM = 1024  # vLLM's context beyond the budget (64k: 66,560)
FLUSH_ROWS, FLUSH_SECONDS = 64, 30.0  # finished samples that a kill may cost; programs are graded many at a time
SAMPLE_STEP = 1_000_003  # seeds of the samples of an item lie this far apart


def extract_answer(benchmark: Benchmark, item: Item, text: str, finish_reason: str, opened: bool = True) -> str | None:
    """The answer in a completion; None when it ran out of tokens or never ended its thinking, whatever it contains.
    ``opened``: the prompt ended inside a thought."""
    _, answer = split_thinking(text, opened)
    return benchmark.extract(item, answer) if finish_reason == "stop" and answer is not None else None


def graded_rows(
    benchmark: Benchmark, items: Sequence[Item], prompts: Sequence[str], completions: Sequence[Completion], sample: int = 0
) -> list[dict[str, Any]]:
    """Log rows of finished samples, graded."""
    pairs = list(zip(items, completions, strict=True))
    opened = [opens_thinking(prompt) for prompt in prompts]
    extracted = [
        extract_answer(benchmark, item, done.text, done.finish_reason, inside)
        for (item, done), inside in zip(pairs, opened, strict=True)
    ]
    verdicts = benchmark.grade_all(items, extracted)
    rows = zip(items, prompts, opened, completions, extracted, verdicts, strict=True)
    return [
        {
            "benchmark": benchmark.name,
            "id": item.id,
            "sample": sample,
            "messages_sha256": sha256_json(benchmark.messages(item)),
            "prompt_sha256": sha256_text(prompt),
            "prompt_ids_sha256": completion.prompt_ids_sha256,
            "prompt_opens_thinking": inside,
            "prompt_tokens": completion.prompt_tokens,
            "tokens": completion.tokens,
            "finish_reason": completion.finish_reason,
            "text": completion.text,
            "extracted": answer,
            "gold": item.gold,
            "correct": bool(verdict),
            "grader": GRADER_VERSION,
        }
        for item, prompt, inside, completion, answer, verdict in rows
    ]


def summarize(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Metrics of one benchmark from its log rows: the mean over items of the share of right answers, and its interval."""
    verdicts: dict[str, list[bool]] = {}
    for row in rows:
        verdicts.setdefault(row["id"], []).append(row["correct"])
    samples, correct = len(rows) // len(verdicts), sum(row["correct"] for row in rows)
    finished = [row for row in rows if row["finish_reason"] == "stop"]
    low, high = clustered_interval([sum(own) / samples for own in verdicts.values()], samples)
    return {
        "n": len(verdicts),
        "samples": samples,
        "correct": correct,
        "acc": correct / len(rows),
        "acc_low": low,
        "acc_high": high,
        "acc_finished": sum(row["correct"] for row in finished) / len(finished) if finished else 0.0,
        "trunc": (len(rows) - len(finished)) / len(rows),
        "no_answer": sum(row["extracted"] is None for row in finished) / len(rows),
        "mean_tokens": sum(row["tokens"] for row in rows) / len(rows),
        "max_tokens": max(row["tokens"] for row in rows),
    }


def benchmark_metrics(benchmark: Benchmark, items: Sequence[Item], rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What every benchmark reports, and what this one adds (strata, an official aggregate)."""
    aggregate = getattr(benchmark, "aggregate", None)
    return summarize(rows) | (aggregate(items, rows) if aggregate else {})


class Runner:
    """Generates and grades what a log lacks, and keeps the log and the clock of the work together."""

    def __init__(self, backend: Backend, sampling: Sampling, samples: int, log: SampleLog, clock: WorkClock) -> None:
        self.backend, self.sampling, self.samples, self.log, self.clock = backend, sampling, samples, log, clock

    def run(self, benchmark: Benchmark, items: Sequence[Item]) -> dict[str, Any]:
        """Metrics of all items of one benchmark."""
        prompts = [self.backend.render(benchmark.messages(item)) for item in items]
        keys = [(benchmark.name, item.id, sample) for sample in range(self.samples) for item in items]
        with progress(len(keys), benchmark.name, "sample") as bar:
            bar.update(sum(key in self.log.done for key in keys))
            for sample in range(self.samples):
                self._one_sample_each(benchmark, items, prompts, sample, bar)
        return benchmark_metrics(benchmark, items, [self.log.done[key] for key in keys])

    def _one_sample_each(
        self, benchmark: Benchmark, items: Sequence[Item], prompts: Sequence[str], sample: int, bar: Any
    ) -> None:
        missing = [i for i, item in enumerate(items) if (benchmark.name, item.id, sample) not in self.log.done]
        if not missing:  # a resumed run; a tokenizer refuses an empty list
            return
        limit = min(self.sampling.max_tokens, benchmark.max_tokens or self.sampling.max_tokens)
        own = dataclasses.replace(self.sampling, seed=self.sampling.seed + SAMPLE_STEP * sample, max_tokens=limit)
        pending: list[tuple[int, Completion]] = []
        flushed = time.monotonic()

        def flush() -> None:
            chosen = [missing[index] for index, _ in pending]
            done = [completion for _, completion in pending]
            own_items, own_prompts = [items[i] for i in chosen], [prompts[i] for i in chosen]
            self.log.append(graded_rows(benchmark, own_items, own_prompts, done, sample))
            self.clock.save()
            pending.clear()

        try:
            for index, completion in self.backend.generate([prompts[i] for i in missing], own):
                pending.append((index, completion))
                bar.update()
                if len(pending) >= FLUSH_ROWS or time.monotonic() - flushed > FLUSH_SECONDS:
                    flush()
                    flushed = time.monotonic()
        finally:  # what is finished stays finished when a server dies
            flush()


def make_backend(name: str, args: argparse.Namespace, budget: int) -> Backend:
    context = budget + PROMPT_ROOM
    if name == "llamacpp":
        return LlamaCppBackend(args.model, context, args.tokenizer, args.parallel, shlex.split(args.server_args))
    if name == "openai":
        return OpenAIBackend(
            args.base_url, str(args.model), args.tokenizer, context, key=api_key(args.api_key_env),
            parallel=args.parallel, send_text=args.prompt_text, plain=args.plain_fields,
        )  # fmt: skip
    if name == "vllm":
        return VllmBackend(args.model, context, tensor_parallel=args.tensor_parallel)
    devices = parse_devices(args.devices)
    copies = len(devices) > 1 and not args.spread
    return Replicas(args.model, devices, args.batch) if copies else HfBackend(args.model, args.batch, devices)


def described(name: str, args: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any]]:
    """(model entry of the record, config.json or what stands for it); a server tells no more of its model than the name."""
    if name == "llamacpp":
        return describe_gguf(args.model), config_of_gguf(args.model)
    if name == "openai":
        config = args.tokenizer / "config.json"
        entry = {"path": str(args.model), "base_url": args.base_url, "weights_sha256": None}
        return entry, read_json(config) if config.is_file() else {}
    checkpoint = Checkpoint(args.model)
    return describe_model(args.model) | {"weights_sha256": checkpoint.sha256()}, checkpoint.config


def choose_sampling(args: argparse.Namespace, settings: EvalSettings, family: str | None, config: dict) -> tuple[Sampling, str]:
    """(sampling, where each of its parts comes from): the vendor's, then what the command line says."""
    vendor, source = settings.sampling_for(family, config)
    given = {key: getattr(args, key) for key in ("temperature", "top_p", "top_k") if getattr(args, key) is not None}
    if given:
        source = f"command line ({', '.join(given)}), else {source}"
    sampling = Sampling(**{**vendor, **given}, seed=args.seed, max_tokens=BUDGETS[args.budget])
    check_sampling(sampling, "sampling")
    if args.samples > 1 and sampling.temperature == 0:
        raise UserError(f"--samples {args.samples}: greedy decoding answers alike each time; give --temperature, or one sample")
    return sampling, source


def table(metrics: dict[str, dict[str, Any]], gates: dict[str, str]) -> str:
    head = f"{'benchmark':<14}{'n':>6}{'acc':>8}  {'95 % interval':<16}{'finished':>9}{'trunc':>8}{'tokens':>8}"
    lines = [head + ("  gate" if gates else "")]
    for name, m in metrics.items():
        interval = f"{100 * m['acc_low']:.1f} - {100 * m['acc_high']:.1f}"
        count = f"{m['n']}x{m['samples']}" if m.get("samples", 1) > 1 else str(m["n"])
        lines.append(
            f"{name:<14}{count:>6}{100 * m['acc']:>7.1f}%  {interval:<16}{100 * m['acc_finished']:>8.1f}%"
            f"{100 * m['trunc']:>7.1f}%{m['mean_tokens']:>8.0f}  {gates.get(name, '')}".rstrip()
        )
    return "\n".join(lines)


def add_run_arguments(parser: argparse.ArgumentParser, benchmarks: str, backends: str, batch: int) -> None:
    """The options of every evaluation; the last three arguments are what text and pictures differ in."""
    parser.add_argument("--tag", required=True, help="name of the run: results/eval/TAG.json")
    parser.add_argument("--benchmarks", default=benchmarks, help="comma-separated names")
    parser.add_argument("--backend", default="auto", help=backends)
    parser.add_argument("--budget", default="32k", choices=list(BUDGETS), help="tokens a sample may generate; 80k for contests")
    parser.add_argument("--samples", type=int, default=1, help="answers to each item (small sets); the interval is by item")
    parser.add_argument("--limit", type=int, help="first N items of each benchmark")
    parser.add_argument("--data-dir", type=Path, help="read the benchmarks' rows from files here")
    parser.add_argument("--out", type=Path, default=Path("results/eval"))
    parser.add_argument("--family", help="family of configs/eval.env (default: by the model's shape); none for no family")
    parser.add_argument("--temperature", type=float, help="instead of the vendor's; 0 is greedy")
    parser.add_argument("--top-p", type=float, help="instead of the vendor's")
    parser.add_argument("--top-k", type=int, help="instead of the vendor's; 0 is off")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=batch, help="prompts at once with --backend hf; a GPU takes many")
    parser.add_argument("--tensor-parallel", type=int, default=1, help="GPUs that vLLM spreads the model over")
    parser.add_argument("--force", action="store_true", help="run again and replace an earlier result of this tag")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", type=Path, required=True, help="checkpoint directory, GGUF file, or a server's name for it")
    add_run_arguments(parser, "tiny_know,tiny_math,tiny_reason,tiny_code", "auto, vllm, hf, llamacpp or openai", 64)
    devices = "GPUs for --backend hf, each with a copy of the model and its share of the prompts: cuda:0,cuda:1 or all"
    parser.add_argument("--devices", default="", help=devices)
    parser.add_argument("--spread", action="store_true", help="one copy, its layers in equal runs on --devices")
    parser.add_argument("--dry-run", action="store_true", help="print the plan with items, tokens and times, and write nothing")
    add_server_arguments(parser)
    return parser.parse_args()


def check_args(args: argparse.Namespace) -> None:
    if not args.tag or any(not (c.isalnum() or c in "._-") for c in args.tag) or args.tag.startswith("."):
        raise UserError(f"--tag {args.tag!r}: use letters, digits, '.', '_' and '-'")
    for name in ("limit", "samples", "batch", "tensor_parallel", "parallel"):
        value = getattr(args, name, None)  # mm_eval has no server and no --parallel
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} {value}: must be at least 1")
    if args.backend == "openai" and not (args.base_url and args.tokenizer):
        raise UserError("--backend openai needs --base-url and --tokenizer DIR")
    if args.backend in ("hf", "vllm", "llamacpp") and is_gguf(args.model) != (args.backend == "llamacpp"):
        raise UserError(f"{args.model}: not for --backend {args.backend}; llamacpp takes .gguf files, hf and vllm directories")
    result = args.out / f"{args.tag}.json"
    if result.exists() and not args.force:
        raise UserError(f"{result}: exists; give another --tag, or --force to run again and replace it")


def item_record(benchmark: Benchmark, item: Item) -> list[Any]:
    """What a record's digest of the data covers: question, gold and every picture."""
    pictures = pictures_of(benchmark.messages(item))
    return [item.id, item.question, item.gold, *([pictures] if pictures else [])]


def benchmark_data(benchmark: Benchmark, items: Sequence[Item]) -> dict[str, Any]:
    """The record's entry of the items of one benchmark."""
    return data_entry(benchmark.name, benchmark.revision, [item_record(benchmark, item) for item in items])


def evaluate(loaded: Iterable[tuple[Benchmark, Sequence[Item]]], runner: Runner) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(metrics, data entries) of benchmarks with their items; one is read when it is its turn."""
    metrics, data = {}, []
    for benchmark, items in loaded:
        metrics[benchmark.name] = runner.run(benchmark, items)
        data.append(benchmark_data(benchmark, items))
    return metrics, data


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is decided before an engine starts. ``model``: its entry in the record; ``settings``: the first line of the log,
    which every sample of a log shares; ``source``: where the sampling stands."""

    args: argparse.Namespace
    rules: EvalSettings
    backend: str
    model: dict[str, Any]
    sampling: Sampling
    source: str
    settings: dict[str, Any]


def make_plan(args: argparse.Namespace, backend: str, model: dict[str, Any], config: dict[str, Any]) -> Plan:
    """Family, sampling and settings of a run, printed. ``model``: path and weights_sha256 at least."""
    rules = load_settings()
    family = rules.check_family(args.family) if args.family else rules.family_of(config)
    sampling, source = choose_sampling(args, rules, family, config)
    print(f"{model['path']}: family {family or 'unknown'}, {backend}; {sampling} ({source})", flush=True)
    settings = {"model": model["path"], "weights_sha256": model["weights_sha256"], "backend": backend}
    settings |= {"sampling": sampling.to_json(), "limit": args.limit, "samples": args.samples, "grader": GRADER_VERSION}
    if getattr(args, "server_args", None):
        settings["server_args"] = args.server_args
    return Plan(args, rules, backend, model | {"family": family}, sampling, source, settings)


def finish(plan: Plan, runner: Runner, metrics: dict[str, Any], data: Sequence[dict[str, Any]], **extra: Any) -> None:
    """Write the record, and print the table with the gate of every axis."""
    args, log, clock = plan.args, runner.log, runner.clock
    record = write_result(
        args.out / f"{args.tag}.json", kind="eval", tag=args.tag, started=clock.started, seconds=clock.seconds,
        model=plan.model, recipe=recipe_record(args.model), data=data, metrics=metrics,
        sampling=plan.sampling.to_json() | {"budget": args.budget, "backend": plan.backend, "source": plan.source},
        extra={"samples": log.path.name, "settings_sha256": sha256_json(plan.settings), "parts": clock.parts, **extra},
    )  # fmt: skip
    clock.remove()
    others = eval_records(args.out)
    print(table(metrics, {axis: gate_text(gate_axis(record, axis, plan.rules, others)) for axis in metrics}), flush=True)


def start_log(args: argparse.Namespace, settings: dict[str, Any]) -> tuple[SampleLog, WorkClock]:
    """The sample log and the clock of this tag; --force begins both anew."""
    log_path, clock_path = args.out / f"{args.tag}.samples.jsonl", args.out / f".{args.tag}.clock"
    if args.force:
        for path in (log_path, packed_path(log_path), clock_path, args.out / f"{args.tag}.json"):
            path.unlink(missing_ok=True)
    elif not find_log(log_path).exists():
        clock_path.unlink(missing_ok=True)
    return SampleLog(log_path, settings), WorkClock(clock_path)


def plan(args: argparse.Namespace, rules: EvalSettings, benchmarks: Sequence[Benchmark], name: str) -> str:
    """What --dry-run prints."""
    from eval_plan import evaluation_plan, planned_config

    config = planned_config(args.model, name, args.tokenizer)
    family = rules.check_family(args.family) if args.family else rules.family_of(config)
    sampling, source = choose_sampling(args, rules, family, config)
    head = f"{args.model}: family {family or 'unknown'}, {name}; {sampling} ({source})"
    log = args.out / f"{args.tag}.samples.jsonl"
    return head + "\n" + evaluation_plan(benchmarks, sampling, args.samples, args.limit, name, log)


def main() -> None:
    args = parse_args()
    check_args(args)
    benchmarks = get_benchmarks(args.benchmarks.split(","), args.data_dir)
    name = choose_backend(args.backend, args.model)
    if args.dry_run:
        print(plan(args, load_settings(), benchmarks, name), flush=True)
        return
    run = make_plan(args, name, *described(name, args))
    log, clock = start_log(args, run.settings)
    runner = Runner(make_backend(name, args, run.sampling.max_tokens), run.sampling, args.samples, log, clock)
    made = evaluate(((benchmark, benchmark.load(args.limit)) for benchmark in benchmarks), runner)
    finish(run, runner, *made, devices=args.devices or None, spread=args.spread)


if __name__ == "__main__":
    run_cli(main)
