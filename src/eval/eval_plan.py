"""What is decided before an engine starts: the options of an evaluation, its family and sampling, and what it would cost.

Not a command: `bash pipelines/eval.sh --model DIR --tag TAG --dry-run` stops after it. Reads headers, configs/eval.env, a log
that an earlier run left and the records in results/eval; loads no model, downloads nothing and writes nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from backend import Sampling
from console import UserError
from eval_settings import EvalSettings, check_sampling, load_settings
from graders import GRADER_VERSION
from sample_log import read_log, sample_key
from size_model import RESULTS, Rates, duration, machine, records_of
from task import Benchmark, HubBenchmark

BUDGETS = {"32k": 32_768, "64k": 65_536, "80k": 81_920}


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
    parser.add_argument("--dry-run", action="store_true", help="print the plan with items, tokens and times, and write nothing")


def check_args(args: argparse.Namespace) -> None:
    if not args.tag or any(not (c.isalnum() or c in "._-") for c in args.tag) or args.tag.startswith("."):
        raise UserError(f"--tag {args.tag!r}: use letters, digits, '.', '_' and '-'")
    for name in ("limit", "samples", "batch", "tensor_parallel", "parallel"):
        value = getattr(args, name, None)  # mm_eval has no server
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} {value}: must be at least 1")
    result = args.out / f"{args.tag}.json"
    if result.exists() and not args.force:
        raise UserError(f"{result}: exists; give another --tag, or --force to run again and replace it")


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
        return found | ({"server_args": args.server_args} if getattr(args, "server_args", None) else {})


def make_plan(args: argparse.Namespace, backend: str, path: str, config: dict[str, Any]) -> Plan:
    """Family and sampling of a run, printed. ``config``: config.json of the model or what stands for it."""
    rules = load_settings()
    family = rules.check_family(args.family) if args.family else rules.family_of(config)
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


def token_rates(results: Path, backend: str) -> Rates:
    """The best recorded tokens a second of each machine with this backend."""
    found: Rates = {}
    for file, record in records_of(results, "eval"):
        if record["sampling"].get("backend") == backend and record["seconds"] > 0:
            answers = record["metrics"].values()
            tokens = sum(m["n"] * m.get("samples", 1) * m["mean_tokens"] for m in answers)
            entry = (tokens / record["seconds"], file)
            found[machine(record)] = max(found.get(machine(record), entry), entry)
    return found


def answered(log: Path) -> dict[str, int]:
    """Samples of each benchmark that an unfinished run of the tag has left in its log, whose last line may be torn."""
    found: dict[str, int] = {}
    for benchmark, _, _ in {sample_key(row) for row in read_log(log)[0][1:]} if log.exists() else ():
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
    rates = token_rates(RESULTS, plan.backend)
    for name, (rate, file) in sorted(rates.items()):
        lines.append(f"  {duration(total / rate):>8}  {name} ({rate:,.0f} tokens/s, {file})")
    if not rates:
        lines.append(f"  no recorded rate of {plan.backend}; the run shows its own after a few seconds")
    return "\n".join([*lines, f"writes {log} and {args.tag}.json", "dry run: nothing was written"])
