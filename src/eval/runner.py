"""The body of an evaluation: generate what the log lacks, grade it, keep log and clock together, write the record.

Not a command. `Runner(backend, ...).run(benchmark, items)` gives metrics; vllm_eval8, mm_eval, regrade and opd_gen share what
is here. The statistics of accuracies are in intervals.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from backend import Backend, Completion, Sampling
from checkpoint import Checkpoint
from console import progress
from eval_plan import Plan
from eval_settings import eval_records, gate_axis, gate_text
from graders import GRADER_VERSION, opens_thinking, split_thinking
from intervals import clustered_interval
from pictures import pictures_of
from recipe import recipe_record
from records import data_entry, describe_model, sha256_json, sha256_text, write_result
from sample_log import SampleLog, WorkClock, find_log, packed_path
from task import Benchmark
from task_text import Item

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
    return summarize(rows) | benchmark.aggregate(items, rows)


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


def describe_checkpoint(path: Path) -> dict[str, Any]:
    """The record's entry of a model that was evaluated: describe_model and the digest of its weights."""
    return describe_model(path) | {"weights_sha256": Checkpoint(path).sha256()}


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


def start_log(args: argparse.Namespace, settings: dict[str, Any]) -> tuple[SampleLog, WorkClock]:
    """The sample log and the clock of this tag; --force begins both anew."""
    log_path, clock_path = args.out / f"{args.tag}.samples.jsonl", args.out / f".{args.tag}.clock"
    if args.force:
        for path in (log_path, packed_path(log_path), clock_path, args.out / f"{args.tag}.json"):
            path.unlink(missing_ok=True)
    elif not find_log(log_path).exists():
        clock_path.unlink(missing_ok=True)
    return SampleLog(log_path, settings), WorkClock(clock_path)


def finish(
    plan: Plan, model: dict[str, Any], runner: Runner, metrics: dict[str, Any], data: Sequence[dict[str, Any]], **extra: Any
) -> None:
    """Write the record, and print the table with the gate of every axis. ``model``: its entry in the record."""
    args, log, clock = plan.args, runner.log, runner.clock
    record = write_result(
        args.out / f"{args.tag}.json", kind="eval", tag=args.tag, started=clock.started, seconds=clock.seconds,
        model=model | {"family": plan.family}, recipe=recipe_record(args.model), data=data, metrics=metrics,
        sampling=plan.sampling.to_json() | {"budget": args.budget, "backend": plan.backend, "source": plan.source},
        extra={"samples": log.path.name, "settings_sha256": sha256_json(plan.settings(model)), "parts": clock.parts, **extra},
    )  # fmt: skip
    clock.remove()
    others = eval_records(args.out)
    print(table(metrics, {axis: gate_text(gate_axis(record, axis, plan.rules, others)) for axis in metrics}), flush=True)
