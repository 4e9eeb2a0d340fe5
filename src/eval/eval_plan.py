"""What an evaluation would do, before it does it: eval.sh --dry-run.

Not a command: `bash pipelines/eval.sh --model DIR --tag TAG --dry-run`. Reads headers, configs/eval.env, a log that an earlier
run left and the records in results/eval; loads no model, downloads nothing and writes nothing.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from backend import Sampling
from hub_data import HubBenchmark
from sample_log import read_log, sample_key
from size_model import RESULTS, Rates, duration, machine, records_of
from task import Benchmark


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


def evaluation_plan(
    benchmarks: Sequence[Benchmark], sampling: Sampling, samples: int, limit: int | None, backend: str, log: Path
) -> str:
    """Items, tokens and time of each benchmark; times at the recorded rates of the same backend."""
    done, total, known = answered(log), 0.0, True
    lines = [f"{'benchmark':<16}{'items':>8}{'samples':>9}{'in the log':>12}{'tokens each, as recorded':>26}{'at most':>9}"]
    for benchmark in benchmarks:
        count, tokens = counted(benchmark, limit), usual_tokens(RESULTS, benchmark.name)
        most = min(sampling.max_tokens, benchmark.max_tokens or sampling.max_tokens)
        if count is None or tokens is None:
            known = False
        else:
            total += max(0, count * samples - done.get(benchmark.name, 0)) * tokens
        items = "?" if count is None else f"{count:,}"
        each = "no record" if tokens is None else f"{tokens:.0f}"
        lines.append(f"{benchmark.name:<16}{items:>8}{samples:>9}{done.get(benchmark.name, 0):>12,}{each:>26}{most:>9,}")
    if not known:
        lines.append("?: known after the download. Without a record of its tokens a benchmark's time is not estimated.")
    rates = token_rates(RESULTS, backend)
    lines.append(
        f"about {total:,.0f} tokens" + (" without those" if not known else "") + ", at recorded rates of this backend:"
    )
    lines += [
        f"  {duration(total / rate):>8}  {name} ({rate:,.0f} tokens/s, {file})" for name, (rate, file) in sorted(rates.items())
    ]
    lines += [] if rates else [f"  no recorded rate of {backend}; the run shows its own after a few seconds"]
    return "\n".join(
        [*lines, f"writes {log} and {log.name.removesuffix('.samples.jsonl')}.json", "dry run: nothing was written"]
    )


def planned_config(model: Path, backend: str, tokenizer: Any) -> dict[str, Any]:
    """config.json of the model or what stands for it, without reading its weights."""
    from checkpoint import Checkpoint
    from console import read_json
    from gguf_info import config_of_gguf

    if backend == "llamacpp":
        return config_of_gguf(model)
    if backend == "openai":
        config = Path(tokenizer) / "config.json"
        return read_json(config) if config.is_file() else {}
    return Checkpoint(model).config
