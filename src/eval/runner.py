"""An evaluation from its options to its record: plan it, generate what its log lacks, grade, keep log and clock, write.

Not a command: vllm_eval8 and mm_eval are its `run_evaluation`; regrade and opd_gen grade by it. All benchmarks are opened and
counted before an engine starts. `--dry-run` stops after the plan, which reads headers, configs/eval.env, a log that an earlier
run left and the records in results/eval; it loads no model, downloads nothing and writes nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from backend import Backend, Completion, Sampling
from bench8_loaders import TEXT_BENCHMARKS
from bench_mm import MM_BENCHMARKS
from checkpoint import Checkpoint
from console import UserError, progress
from eval_settings import GROUPS, EvalSettings, check_sampling, eval_records, gate_axis, gate_text, load_settings, names_of
from graders import GRADER_VERSION, opens_thinking, split_thinking
from hf_model import ids_sha256
from intervals import clustered_interval
from pictures import pictures_of
from recipe import recipe_record
from records import data_entry, describe_model, sha256_json, sha256_text, write_result
from sample_log import SampleLog, WorkClock, find_log, read_log, read_samples, sample_key
from size_model import RESULTS, Rates, duration, machine, records_of
from task import Benchmark, HubBenchmark
from task_text import Item
from tasks_tiny import TINY_TASKS, TINY_VISION_TASKS
from tasks_tools import ToolCalls

OF_TEXT = {kind.name: kind for kind in (*TINY_TASKS, *TEXT_BENCHMARKS, ToolCalls)}
OF_PICTURES = {kind.name: kind for kind in (*MM_BENCHMARKS, *TINY_VISION_TASKS)}


def get_benchmarks(names: Sequence[str], data_dir: Path | None = None, pictures: bool = False) -> list[Benchmark]:
    """Instances of the named benchmarks, or one line that lists the known ones. ``data_dir``: local rows, see task."""
    if data_dir is not None and not data_dir.is_dir():
        raise UserError(f"--data-dir {data_dir}: no such directory")
    known, groups = (OF_PICTURES, GROUPS) if pictures else (OF_TEXT, {})
    members = [member for name in names for member in groups.get(name, (name,))]
    if unknown := [name for name in members if name not in known]:
        raise UserError(f"unknown benchmark {', '.join(map(repr, unknown))}; known: {', '.join([*known, *groups])}")
    return [known[name](data_dir) for name in dict.fromkeys(members)]


def training_benchmarks(names: Sequence[str]) -> list[Any]:
    """The named benchmarks; one without a training split is a :class:`UserError`."""
    found = get_benchmarks(names)
    for benchmark in found:
        if not hasattr(benchmark, "load_with_solutions"):
            raise UserError(f"--tasks {benchmark.name}: has no training split; give prompts as --prompts FILE.jsonl")
    return found


def recorded_benchmarks(names: Sequence[str], data_dir: Path | None = None) -> list[Benchmark]:
    """Instances of the benchmarks of a record, of text or of pictures, in the order of the names."""
    return [get_benchmarks([name], data_dir, name in OF_PICTURES)[0] for name in names]


BUDGETS = {"32k": 32_768, "64k": 65_536, "80k": 81_920}
FLUSH_ROWS, FLUSH_SECONDS = 64, 30.0  # finished samples that a kill may cost; programs are graded many at a time
SAMPLE_STEP = 1_000_003  # seeds of the samples of an item lie this far apart


# ---- the plan ----


def add_run_arguments(parser: argparse.ArgumentParser, benchmarks: str, backends: str, batch: int) -> None:
    """The options of every evaluation; the last three arguments are what text and pictures differ in."""
    parser.add_argument("--tag", required=True, help="name of the run: results/eval/TAG.json")
    parser.add_argument("--benchmarks", default=benchmarks, help="comma-separated names")
    parser.add_argument("--backend", default="auto", help=backends)
    parser.add_argument("--budget", default="32k", choices=list(BUDGETS), help="tokens a sample may generate; 80k for contests")
    parser.add_argument("--samples", type=int, default=1, help="answers to each item (small sets); the interval is by item")
    parser.add_argument("--limit", type=int, help="N items of each benchmark, always the same: a seeded sample")
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
    parser.add_argument("--dry-run", action="store_true", help="print the plan with items, tokens and times, and write nothing")


def check_args(args: argparse.Namespace) -> None:
    if not args.tag or any(not (c.isalnum() or c in "._-") for c in args.tag) or args.tag.startswith("."):
        raise UserError(f"--tag {args.tag!r}: use letters, digits, '.', '_' and '-'")
    for name in ("limit", "samples", "batch", "tensor_parallel"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} {value}: must be at least 1")
    if file := next((part for part in (args.out, *args.out.parents) if part.exists() and not part.is_dir()), None):
        raise UserError(f"--out {args.out}: {file} is a file; give a directory")
    if (text := record_exists(args)) and not args.dry_run:
        raise UserError(text)


def record_exists(args: argparse.Namespace) -> str:
    """What to do about a record of the same tag, if there is one."""
    result = args.out / f"{args.tag}.json"
    there = result.exists() and not args.force
    return f"{result}: exists; give another --tag, or --force to run again and replace it" if there else ""


@dataclasses.dataclass(frozen=True)
class Plan:
    """``source``: where the sampling stands; ``path``: how the record names the model."""

    args: argparse.Namespace
    rules: EvalSettings
    backend: str
    path: str
    family: str | None
    sampling: Sampling
    source: str

    def settings(self, model: dict[str, Any]) -> dict[str, Any]:
        """The first line of the log, which every sample of it shares. ``model``: the record's entry of the model."""
        args = self.args
        found = {"model": model["path"], "weights_sha256": model["weights_sha256"], "backend": self.backend}
        found |= {"sampling": self.sampling.to_json(), "limit": args.limit, "samples": args.samples, "grader": GRADER_VERSION}
        found |= {"chosen": "seeded"} if args.limit else {}  # logs without it hold the first rows of a file
        return found | ({"server_args": args.server_args} if getattr(args, "server_args", None) else {})


def make_plan(args: argparse.Namespace, backend: str, path: str, config: dict[str, Any]) -> Plan:
    """Family and sampling of a run, printed. ``config``: config.json of the model or what stands for it."""
    rules = load_settings()
    family = rules.check_family(args.family) if args.family else rules.family_of(config, names_of(path))
    if not family and not args.family and (alike := rules.shaped_as(config)):
        print(
            f"{path}: of the shape of {alike}, but not of its name: no published numbers; --family {alike} if it is that model"
        )
    sampling, source = choose_sampling(args, rules, family, config)
    print(f"{path}: family {family or 'unknown'}, {backend}; {sampling} ({source})", flush=True)
    return Plan(args, rules, backend, path, family, sampling, source)


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


def counted(benchmark: Benchmark, limit: int | None) -> int | None:
    """Items of a benchmark that are at hand; None for one that would have to be downloaded to be counted."""
    if isinstance(benchmark, HubBenchmark) and benchmark.data_dir is None:
        return limit
    return len(benchmark.load(limit))


def usual_tokens(results: Path, name: str) -> float | None:
    """Median of the mean number of tokens of an answer over the recorded evaluations; None without one."""
    found = [record["metrics"][name]["mean_tokens"] for _, record in records_of(results, "eval") if name in record["metrics"]]
    return statistics.median(found) if found else None


LIKE_SIZED = 2.0  # weights up to so many times larger or smaller generate as fast, as far as a plan knows


def weights_bytes(model: Path) -> int | None:
    """Bytes of a checkpoint's or a GGUF's weights; None for a model that a server holds."""
    return Checkpoint(model).bytes if model.is_dir() else model.stat().st_size if model.is_file() else None


def token_rates(results: Path, backend: str, size: int | None) -> Rates:
    """The best recorded tokens a second of each machine with this backend. A model of another size than ``size`` bytes reads so
    many more for a token: its rate is scaled, which is said."""
    found: Rates = {}
    for file, record in records_of(results, "eval"):
        if record["sampling"].get("backend") == backend and record["seconds"] > 0:
            answers = record["metrics"].values()
            tokens = sum(m["n"] * m.get("samples", 1) * m["mean_tokens"] for m in answers)
            own = record["model"].get("bytes")
            scale = own / size if own and size else 1.0
            if max(scale, 1 / scale) <= LIKE_SIZED:
                scale = 1.0
            note = file if scale == 1 else f"{file}, of a model of {own / 1e9:.3g} GB: scaled to {size / 1e9:.3g} GB"
            entry = (scale * tokens / record["seconds"], note)
            found[machine(record)] = max(found.get(machine(record), entry), entry)
    return found


def answered(log: Path) -> dict[str, int]:
    """Samples of each benchmark that an unfinished run of the tag has left in its log, whose last line may be torn."""
    found: dict[str, int] = {}
    log = find_log(log)
    for benchmark, _, _ in [sample_key(row) for row in read_log(log)[0][1:]] if log.exists() else ():
        found[benchmark] = found.get(benchmark, 0) + 1
    return found


def plan_text(plan: Plan, benchmarks: Sequence[Benchmark]) -> str:
    """Items, tokens and time of each benchmark; times at the recorded rates of the same backend."""
    args, log = plan.args, plan.args.out / f"{plan.args.tag}.samples.jsonl"
    done, total, known = answered(log), 0.0, True
    lines = [f"{'benchmark':<16}{'items':>8}{'samples':>9}{'in the log':>12}{'tokens each, as recorded':>26}{'at most':>9}"]
    for benchmark in benchmarks:
        count, tokens = counted(benchmark, args.limit), usual_tokens(RESULTS, benchmark.name)
        most = min(plan.sampling.max_tokens, benchmark.max_tokens or plan.sampling.max_tokens)
        if count is None or tokens is None:
            known = False
        else:
            total += max(0, count * args.samples - done.get(benchmark.name, 0)) * tokens
        items = "?" if count is None else f"{count:,}"
        each = "no record" if tokens is None else f"{tokens:.0f}"
        lines.append(f"{benchmark.name:<16}{items:>8}{args.samples:>9}{done.get(benchmark.name, 0):>12,}{each:>26}{most:>9,}")
    if not known:
        lines.append("?: known after the download. Without a record of its tokens a benchmark's time is not estimated.")
    without = "" if known else " without those"
    lines.append(f"about {total:,.0f} tokens{without}, at recorded rates of this backend:")
    rates = token_rates(RESULTS, plan.backend, weights_bytes(args.model))
    for name, (rate, file) in sorted(rates.items()):
        lines.append(f"  {duration(total / rate):>8}  {name} ({rate:,.{0 if rate >= 10 else 2}f} tokens/s, {file})")
    if not rates:
        lines.append(f"  no recorded rate of {plan.backend}; the run shows its own after a few seconds")
    lines.append(record_exists(args) or f"writes {log} and {args.tag}.json")
    return "\n".join([*lines, "dry run: nothing was written"])


# ---- samples and their grades ----


def extract_answer(benchmark: Benchmark, item: Item, text: str, finish_reason: str, opened: bool = True) -> str | None:
    """The answer in a completion; None when it ran out of tokens or never ended its thinking, whatever it contains.
    ``opened``: the prompt ended inside a thought."""
    _, answer = split_thinking(text, opened)
    return benchmark.extract(item, answer) if finish_reason == "stop" and answer is not None else None


def asked_fields(benchmark: Benchmark, item: Item) -> dict[str, str]:
    """What of a row says which question was asked and how its answer is judged, whatever the model (sample_log.ASKED)."""
    standard, messages = sha256_json(benchmark.standard(item)), sha256_json(benchmark.messages(item))
    return {"messages_sha256": messages, "gold": item.gold, "standard_sha256": standard}


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
            **asked_fields(benchmark, item),
            "prompt_sha256": sha256_text(prompt),
            "prompt_ids_sha256": completion.prompt_ids_sha256,
            "prompt_opens_thinking": inside,
            "prompt_tokens": completion.prompt_tokens,
            "tokens": completion.tokens,
            "finish_reason": completion.finish_reason,
            "text": completion.text,
            "extracted": answer,
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


Loaded = Sequence[tuple[Benchmark, Sequence[Item]]]


def check_kept(log: SampleLog, loaded: Loaded) -> None:
    """Raise unless every sample in the log answers an item of today, asked and judged as today. The engine is not needed."""
    known = {(benchmark.name, item.id): (benchmark, item) for benchmark, items in loaded for item in items}
    for key in log.done:
        if key[:2] not in known:
            names = f"{log.path}: line {log.line(key)}: {key[1]} of {key[0]} is not asked in this run"
            raise UserError(f"{names}; give the --benchmarks and the data that it was made with, or another --tag")
        log.check(key, asked_fields(*known[key[:2]]))


class Runner:
    """Generates and grades what a log lacks, and keeps the log and the clock of the work together."""

    def __init__(self, backend: Backend, sampling: Sampling, samples: int, log: SampleLog, clock: WorkClock) -> None:
        self.backend, self.sampling, self.samples, self.log, self.clock = backend, sampling, samples, log, clock

    def run_all(self, loaded: Loaded) -> dict[str, Any]:
        """{benchmark: its metrics}. The prompts of all samples that the log has are compared before anything is generated."""
        check_kept(self.log, loaded)
        prompts = [[benchmark.given(item, self.backend.render) for item in items] for benchmark, items in loaded]
        asked = {
            (benchmark.name, item.id): prompt
            for (benchmark, items), own in zip(loaded, prompts, strict=True)
            for item, prompt in zip(items, own, strict=True)
        }
        for key in self.log.done:
            self.log.check(key, self._prompt_fields(asked[key[:2]]))
        return {
            benchmark.name: self._run(benchmark, items, own) for (benchmark, items), own in zip(loaded, prompts, strict=True)
        }

    def _prompt_fields(self, prompt: str) -> dict[str, str]:
        """What of a row says how a question was put to this model; a processor or a server alone knows
        the ids of one with pictures and of a dialogue."""
        fields, tokenizer = {"prompt_sha256": sha256_text(prompt)}, getattr(self.backend, "tokenizer", None)
        if tokenizer is not None and type(prompt) is str:
            fields["prompt_ids_sha256"] = ids_sha256(tokenizer(prompt, add_special_tokens=False)["input_ids"])
        return fields

    def _run(self, benchmark: Benchmark, items: Sequence[Item], prompts: Sequence[str]) -> dict[str, Any]:
        """Metrics of all items of one benchmark."""
        keys = [(benchmark.name, item.id, sample) for sample in range(self.samples) for item in items]
        with progress(len(keys), benchmark.name, "sample", done=sum(key in self.log.done for key in keys)) as bar:
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
    head = (
        f"{'benchmark':<14}{'n':>6}{'acc':>8}  {'95 % interval':<16}{'finished':>9}{'trunc':>8}{'no answer':>11}{'tokens':>8}"
    )
    lines = [head + ("  gate" if gates else "")]
    for name, m in metrics.items():
        interval = f"{100 * m['acc_low']:.1f} - {100 * m['acc_high']:.1f}"
        count = f"{m['n']}x{m['samples']}" if m.get("samples", 1) > 1 else str(m["n"])
        lines.append(
            f"{name:<14}{count:>6}{100 * m['acc']:>7.1f}%  {interval:<16}{100 * m['acc_finished']:>8.1f}%"
            f"{100 * m['trunc']:>7.1f}%{100 * m['no_answer']:>10.1f}%{m['mean_tokens']:>8.0f}  {gates.get(name, '')}".rstrip()
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


def load_all(benchmarks: Sequence[Benchmark], limit: int | None) -> tuple[Loaded, list[dict[str, Any]]]:
    """(benchmarks with their items, the record's entries of them): all are opened, counted and digested here."""
    loaded = [(benchmark, benchmark.load(limit)) for benchmark in benchmarks]
    data = [benchmark_data(*own) | ({"chosen": own[0].chosen} if limit else {}) for own in loaded]
    print("; ".join(f"{entry['name']}: {entry['n']:,} items" for entry in data), flush=True)
    return loaded, data


def start_log(args: argparse.Namespace, settings: dict[str, Any]) -> tuple[SampleLog, WorkClock]:
    """The sample log and the clock of this tag; --force begins both anew."""
    clock_path = args.out / f".{args.tag}.clock"
    log = SampleLog(args.out / f"{args.tag}.samples.jsonl", settings, graded=True, fresh=args.force, settled=False)
    if args.force:
        (args.out / f"{args.tag}.json").unlink(missing_ok=True)
    if not log.done:
        clock_path.unlink(missing_ok=True)
    return log, WorkClock(clock_path)


def run_evaluation(
    plan: Plan,
    benchmarks: Sequence[Benchmark],
    describe: Callable[[], dict[str, Any]],
    start: Callable[[Loaded], Backend],
    extra: Callable[[Any], dict[str, Any]],
) -> None:
    """Everything after the plan. ``describe``: the record's entry of the model; ``start``: the engine; ``extra``: what else the
    record says."""
    args = plan.args
    if args.dry_run:
        print(plan_text(plan, benchmarks), flush=True)
        return
    loaded, data = load_all(benchmarks, args.limit)
    model = describe()
    log, clock = start_log(args, plan.settings(model))
    with log:
        check_kept(log, loaded)
        backend = start(loaded)
        log.settle(backend.describe())
        runner = Runner(backend, plan.sampling, args.samples, log, clock)
        finish(plan, model, runner, runner.run_all(loaded), data, **extra(backend))


def finish(
    plan: Plan, model: dict[str, Any], runner: Runner, metrics: dict[str, Any], data: Sequence[dict[str, Any]], **extra: Any
) -> None:
    """Write the record, and print the table with the gate of every axis. ``model``: its entry in the record."""
    args, log, clock = plan.args, runner.log, runner.clock
    read_samples(log.path)  # no record of a log that another program has written to
    record = write_result(
        args.out / f"{args.tag}.json", kind="eval", tag=args.tag, started=clock.started, seconds=clock.seconds,
        model=model | {"family": plan.family}, recipe=recipe_record(args.model), data=data, metrics=metrics,
        sampling=plan.sampling.to_json() | {"budget": args.budget, "backend": plan.backend, "source": plan.source},
        extra={"samples": log.path.name, "settings_sha256": sha256_json(log.settings), "parts": clock.parts, **extra},
    )  # fmt: skip
    clock.remove()
    others = eval_records(args.out)
    print(table(metrics, {axis: gate_text(gate_axis(record, axis, plan.rules, others)) for axis in metrics}), flush=True)
    print(f"wrote {args.out / args.tag}.json and {log.path.name} beside it", flush=True)
