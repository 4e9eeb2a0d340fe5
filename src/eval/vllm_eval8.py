"""Measure a model's accuracy on benchmarks: bash pipelines/eval.sh --model models/razor-tiny --tag razor_tiny_bf16

    python src/eval/vllm_eval8.py --model DIR|FILE.gguf --tag TAG [--benchmarks tiny_know,tiny_math]
        [--backend auto|vllm|hf|llamacpp|openai]
        [--budget 32k|64k] [--limit N] [--out results/eval] [--temperature T --top-p P --top-k K --seed S] [--force]

Samples are appended to results/eval/TAG.samples.jsonl as they finish: a killed run goes on where it stopped, to the same
result. A truncated answer counts as wrong; acc_finished and trunc stand beside acc. Greedy unless --temperature is given.
"""

from __future__ import annotations

import argparse
import shlex
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from backends import Backend, Completion, HfBackend, Sampling, VllmBackend, choose_backend
from benchmarks import Benchmark, Item, get_benchmarks
from checkpoint import Checkpoint
from console import UserError, progress, run_cli
from gguf_info import describe_gguf, is_gguf
from graders import GRADER_VERSION, split_thinking
from llamacpp_eval8 import LlamaCppBackend, add_server_arguments
from openai_eval8 import OpenAIBackend, api_key
from paired_stats import wilson
from recipe import recipe_record
from results_store import SampleLog, data_entry, describe_model, sha256_json, sha256_text, write_result

BUDGETS = {"32k": 32_768, "64k": 65_536}
PROMPT_ROOM = 1024  # vLLM's context beyond the budget (64k: 66,560)


def graded_rows(
    benchmark: Benchmark, items: Sequence[Item], prompts: Sequence[str], completions: Sequence[Completion]
) -> list[dict[str, Any]]:
    """Log rows of finished samples, graded; a sample that ran out of tokens is wrong whatever it contains."""
    extracted = []
    for item, completion in zip(items, completions, strict=True):
        _, answer = split_thinking(completion.text)
        whole = completion.finish_reason == "stop" and answer is not None
        extracted.append(benchmark.extract(item, answer) if whole else None)
    verdicts = benchmark.grade_all(items, extracted)
    rows = zip(items, prompts, completions, extracted, verdicts, strict=True)
    return [
        {
            "benchmark": benchmark.name,
            "id": item.id,
            "prompt_sha256": sha256_text(prompt),
            "prompt_tokens": completion.prompt_tokens,
            "tokens": completion.tokens,
            "finish_reason": completion.finish_reason,
            "text": completion.text,
            "extracted": answer,
            "gold": item.gold,
            "correct": bool(verdict),
            "grader": GRADER_VERSION,
        }
        for item, prompt, completion, answer, verdict in rows
    ]


def summarize(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Metrics of one benchmark from its log rows."""
    n, correct = len(rows), sum(row["correct"] for row in rows)
    finished = [row for row in rows if row["finish_reason"] == "stop"]
    low, high = wilson(correct, n)
    return {
        "n": n,
        "correct": correct,
        "acc": correct / n,
        "acc_low": low,
        "acc_high": high,
        "acc_finished": sum(row["correct"] for row in finished) / len(finished) if finished else 0.0,
        "trunc": (n - len(finished)) / n,
        "no_answer": sum(row["extracted"] is None for row in finished) / n,
        "mean_tokens": sum(row["tokens"] for row in rows) / n,
        "max_tokens": max(row["tokens"] for row in rows),
    }


def run_benchmark(
    benchmark: Benchmark, items: Sequence[Item], backend: Backend, sampling: Sampling, log: SampleLog
) -> dict[str, Any]:
    """Generate and grade what the log lacks, then summarize all items."""
    prompts = [backend.render(benchmark.messages(item)) for item in items]
    missing = [index for index, item in enumerate(items) if (benchmark.name, item.id) not in log.done]
    limit = min(sampling.max_tokens, benchmark.max_tokens or sampling.max_tokens)
    own = Sampling(sampling.temperature, sampling.top_p, sampling.top_k, sampling.seed, limit)
    pending: list[tuple[int, Completion]] = []

    def flush() -> None:
        chosen = [missing[index] for index, _ in pending]
        log.append(graded_rows(benchmark, [items[i] for i in chosen], [prompts[i] for i in chosen], [c for _, c in pending]))
        pending.clear()

    with progress(len(items), benchmark.name, "sample") as bar:
        bar.update(len(items) - len(missing))
        # a tokenizer refuses an empty list: a resumed run may have this benchmark complete
        try:
            for index, completion in backend.generate([prompts[i] for i in missing], own) if missing else ():
                pending.append((index, completion))
                bar.update()
                if len(pending) >= 64:
                    flush()
        finally:  # what is finished stays finished when the server dies
            flush()
    return summarize([log.done[benchmark.name, item.id] for item in items])


def make_backend(name: str, args: argparse.Namespace, budget: int) -> Backend:
    context = budget + PROMPT_ROOM
    if name == "llamacpp":
        return LlamaCppBackend(args.model, context, args.tokenizer, args.parallel, shlex.split(args.server_args))
    if name == "openai":
        return OpenAIBackend(
            args.base_url, str(args.model), args.tokenizer, context, key=api_key(args.api_key_env),
            parallel=args.parallel, send_text=args.prompt_text, plain=args.plain_fields,
        )  # fmt: skip
    return HfBackend(args.model) if name == "hf" else VllmBackend(args.model, context)


def described(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """The model entry of the record; a server tells no more than its name."""
    if name == "openai":
        return {"path": str(args.model), "base_url": args.base_url, "weights_sha256": None}
    if name == "llamacpp":
        return describe_gguf(args.model)
    return describe_model(args.model) | {"weights_sha256": Checkpoint(args.model).sha256()}


def table(metrics: dict[str, dict[str, Any]]) -> str:
    lines = [f"{'benchmark':<14}{'n':>6}{'acc':>8}  {'95 % interval':<16}{'finished':>9}{'trunc':>8}{'tokens':>8}"]
    for name, m in metrics.items():
        interval = f"{100 * m['acc_low']:.1f} - {100 * m['acc_high']:.1f}"
        lines.append(
            f"{name:<14}{m['n']:>6}{100 * m['acc']:>7.1f}%  {interval:<16}{100 * m['acc_finished']:>8.1f}%"
            f"{100 * m['trunc']:>7.1f}%{m['mean_tokens']:>8.0f}"
        )
    return "\n".join(lines)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", type=Path, required=True, help="checkpoint directory, GGUF file, or a server's name for it")
    parser.add_argument("--tag", required=True, help="name of the run: results/eval/TAG.json")
    parser.add_argument("--benchmarks", default="tiny_know,tiny_math,tiny_reason,tiny_code", help="comma-separated names")
    parser.add_argument("--backend", default="auto", help="auto, vllm, hf, llamacpp or openai")
    parser.add_argument("--budget", default="32k", choices=sorted(BUDGETS), help="tokens a sample may generate")
    parser.add_argument("--limit", type=int, help="first N items of each benchmark")
    parser.add_argument("--out", type=Path, default=Path("results/eval"))
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--top-k", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--force", action="store_true", help="run again and replace an earlier result of this tag")
    add_server_arguments(parser)
    return parser.parse_args()


def check_args(args: argparse.Namespace) -> None:
    if not args.tag or any(not (c.isalnum() or c in "._-") for c in args.tag) or args.tag.startswith("."):
        raise UserError(f"--tag {args.tag!r}: use letters, digits, '.', '_' and '-'")
    if args.limit is not None and args.limit < 1:
        raise UserError(f"--limit {args.limit}: must be at least 1")
    if args.temperature < 0 or not 0 < args.top_p <= 1 or args.top_k < 0:
        raise UserError("sampling: temperature >= 0, 0 < top-p <= 1, top-k >= 0")
    if args.parallel < 1:
        raise UserError(f"--parallel {args.parallel}: must be at least 1")
    if args.backend == "openai" and not (args.base_url and args.tokenizer):
        raise UserError("--backend openai needs --base-url and --tokenizer DIR")
    if args.backend in ("hf", "vllm", "llamacpp") and is_gguf(args.model) != (args.backend == "llamacpp"):
        raise UserError(f"{args.model}: not for --backend {args.backend}; llamacpp takes .gguf files, hf and vllm directories")
    result = args.out / f"{args.tag}.json"
    if result.exists() and not args.force:
        raise UserError(f"{result}: exists; give another --tag, or --force to run again and replace it")


def main() -> None:
    args = parse_args()
    check_args(args)
    benchmarks = get_benchmarks(args.benchmarks.split(","))
    name = choose_backend(args.backend, args.model)
    model = described(name, args)
    result, log_path = args.out / f"{args.tag}.json", args.out / f"{args.tag}.samples.jsonl"
    sampling = Sampling(args.temperature, args.top_p, args.top_k, args.seed, BUDGETS[args.budget])
    settings = {"model": model["path"], "weights_sha256": model["weights_sha256"], "backend": name}
    settings |= {"sampling": sampling.to_json(), "limit": args.limit, "grader": GRADER_VERSION}
    if args.server_args:
        settings["server_args"] = args.server_args
    if args.force:
        log_path.unlink(missing_ok=True)
        result.unlink(missing_ok=True)
    log = SampleLog(log_path, settings)
    started, metrics, data = time.time(), {}, []
    backend = make_backend(name, args, sampling.max_tokens)
    for benchmark in benchmarks:
        items = benchmark.load(args.limit)
        metrics[benchmark.name] = run_benchmark(benchmark, items, backend, sampling, log)
        data.append(data_entry(benchmark.name, benchmark.revision, [[i.id, i.question, i.gold] for i in items]))
    write_result(
        result, kind="eval", tag=args.tag, started=started, model=model,
        recipe=recipe_record(args.model), data=data, sampling=sampling.to_json() | {"budget": args.budget, "backend": name},
        metrics=metrics, extra={"samples": log_path.name, "settings_sha256": sha256_json(settings)},
    )  # fmt: skip
    print(table(metrics), flush=True)


if __name__ == "__main__":
    run_cli(main)
