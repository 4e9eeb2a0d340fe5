"""Compare two evaluated models item by item: bash pipelines/eval.sh --compare BASE OTHER   (tags of results/eval)

Both must have answered the same prompts with the same sampling, limit and grader. Per benchmark: the difference in
accuracy with its paired bootstrap interval, McNemar's exact p, items lost and won, and a verdict, which is given only when
the interval excludes zero. Writes results/compare/BASE__OTHER.json.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from console import UserError, run_cli
from paired_stats import discordant, mcnemar, minimum_detectable, paired_bootstrap
from results_store import data_entry, read_samples, write_result

COMPARABLE = ("sampling", "limit", "grader")  # settings that must agree


def load(directory: Path, tag: str) -> tuple[dict[str, Any], dict[str, dict[str, dict[str, Any]]]]:
    """(settings, {benchmark: {item id: row}}) of a finished evaluation."""
    log = directory / f"{tag}.samples.jsonl"
    if not (directory / f"{tag}.json").is_file() or not log.is_file():
        raise UserError(f"{directory}: holds no finished evaluation {tag!r}; bash pipelines/eval.sh --tag {tag} makes one")
    settings, rows = read_samples(log)
    grouped: dict[str, dict[str, dict[str, Any]]] = {}
    for row in rows:
        grouped.setdefault(row["benchmark"], {})[row["id"]] = row
    return settings, grouped


def paired(base: dict[str, dict[str, Any]], other: dict[str, dict[str, Any]], where: str) -> tuple[list[bool], list[bool]]:
    """Verdicts of both models in the same order of items; a :class:`UserError` unless they saw the same prompts."""
    if base.keys() != other.keys() or any(base[key]["prompt_sha256"] != other[key]["prompt_sha256"] for key in base):
        raise UserError(f"{where}: the two evaluations saw different prompts; evaluate both with the same --limit")
    return [base[key]["correct"] for key in base], [other[key]["correct"] for key in base]


def compare(base: Sequence[bool], other: Sequence[bool]) -> dict[str, Any]:
    """Metrics of one benchmark from two aligned lists of verdicts; differences are other minus base."""
    difference, low, high = paired_bootstrap(base, other)
    lost, won = discordant(base, other)
    n = len(base)
    verdict = "loss" if high < 0 else "gain" if low > 0 else "no difference shown"
    return {
        "n": n,
        "acc_base": sum(base) / n,
        "acc_other": sum(other) / n,
        "difference": difference,
        "difference_low": low,
        "difference_high": high,
        "lost": lost,
        "won": won,
        "p": mcnemar(base, other),
        "minimum_detectable": minimum_detectable(n, (lost + won) / n),
        "verdict": verdict,
    }


def table(base: str, other: str, metrics: dict[str, dict[str, Any]]) -> str:
    lines = [f"{base} -> {other}, percentage points with 95 % paired interval"]
    for name, m in metrics.items():
        low, high = 100 * m["difference_low"], 100 * m["difference_high"]
        verdict = m["verdict"]
        if verdict == "no difference shown":
            verdict += f" (n {m['n']}, minimum detectable {100 * m['minimum_detectable']:.1f})"
        lines.append(
            f"{name:14} {100 * m['acc_base']:5.1f} -> {100 * m['acc_other']:5.1f}  {100 * m['difference']:+6.1f} "
            f"[{low:+.1f}, {high:+.1f}]  lost {m['lost']} won {m['won']} p {m['p']:.2g}  {verdict}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("base", help="tag of the model compared with, such as the unquantized one")
    parser.add_argument("other", help="tag of the model that is judged")
    parser.add_argument("--results", type=Path, default=Path("results"))
    args = parser.parse_args()
    started = time.time()
    settings_a, base = load(args.results / "eval", args.base)
    settings_b, other = load(args.results / "eval", args.other)
    if changed := [key for key in COMPARABLE if settings_a.get(key) != settings_b.get(key)]:
        raise UserError(f"{args.base} and {args.other} differ in {', '.join(changed)}; evaluate both with the same settings")
    if base.keys() != other.keys():
        raise UserError(f"benchmarks {sorted(base)} and {sorted(other)} differ; evaluate both with the same --benchmarks")
    metrics = {name: compare(*paired(base[name], other[name], name)) for name in base}
    data = [data_entry(name, "prompts", [[key, row["prompt_sha256"]] for key, row in base[name].items()]) for name in base]
    tag = f"{args.base}__{args.other}"
    write_result(
        args.results / "compare" / f"{tag}.json", kind="compare", tag=tag, started=started, metrics=metrics, data=data,
        sampling=settings_a["sampling"], extra={"base": args.base, "other": args.other},
    )  # fmt: skip
    print(table(args.base, args.other, metrics), flush=True)


if __name__ == "__main__":
    run_cli(main)
