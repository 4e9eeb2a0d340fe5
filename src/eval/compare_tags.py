"""Compare two evaluated models item by item: bash pipelines/eval.sh --compare BASE OTHER [--teacher TAG]

The tags are those of results/eval. Both must have answered the same questions (of two limits the smaller one's count) with
the same budget, number of samples and grader, and have sampled alike or each as its vendor recommends. Per benchmark: the
difference in accuracy with its paired bootstrap interval (items are resampled), McNemar's exact p, items lost and won, and a
verdict, which is given only when the interval excludes zero and the exact p is below 0.05. With --teacher its accuracy stands
beside them, and the record says how far each is behind it. Writes results/compare/BASE__OTHER.json (TEACHER__BASE__OTHER.json).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from console import UserError, run_cli
from eval_settings import eval_records, gate_axis, load_settings
from intervals import clustered_mcnemar, discordance, minimum_detectable, paired_bootstrap
from records import data_entry, read_result, write_result
from sample_log import find_log, read_samples

SHOWN = 0.05  # level of the exact test
Rows = dict[str, list[dict[str, Any]]]


@dataclass(frozen=True)
class Evaluation:
    """A finished evaluation: ``rows`` {benchmark: {item id: its samples}}; ``vendor``: it sampled as configs/eval.env says."""

    tag: str
    settings: dict[str, Any]
    vendor: bool
    rows: dict[str, Rows]

    @property
    def samples(self) -> int:
        return self.settings.get("samples", 1)


def load(directory: Path, tag: str) -> Evaluation:
    """The evaluation ``tag`` of results/eval."""
    log, result = find_log(directory / f"{tag}.samples.jsonl"), directory / f"{tag}.json"
    if result.is_file() and not log.is_file():
        raise UserError(
            f"{directory}: the samples of {tag!r} are not here ({tag}.samples.jsonl), only its record; run it again"
        )
    if not result.is_file():
        raise UserError(f"{directory}: holds no finished evaluation {tag!r}; bash pipelines/eval.sh --tag {tag} makes one")
    settings, rows = read_samples(log)
    source = (read_result(result)["sampling"] or {}).get("source", "")  # none in records from before configs/eval.env
    grouped: dict[str, Rows] = {}
    for row in rows:
        grouped.setdefault(row["benchmark"], {}).setdefault(row["id"], []).append(row)
    return Evaluation(tag, settings, "SAMPLING__" in source and "command line" not in source, grouped)


def check_comparable(a: Evaluation, b: Evaluation) -> bool:
    """Raise unless the two may be compared; True when they sampled differently, each as its vendor recommends."""
    changed = ["grader"] if a.settings.get("grader") != b.settings.get("grader") else []
    changed += ["samples"] if a.samples != b.samples else []
    drawn_a, drawn_b = a.settings["sampling"], b.settings["sampling"]
    same_budget = drawn_a.get("max_tokens") == drawn_b.get("max_tokens")
    by_vendor = drawn_a != drawn_b and a.vendor and b.vendor and same_budget
    changed += ["sampling"] if drawn_a != drawn_b and not by_vendor else []
    if changed:
        raise UserError(f"{a.tag} and {b.tag} differ in {', '.join(changed)}; evaluate both with the same settings")
    if a.rows.keys() != b.rows.keys():
        names = f"{', '.join(sorted(a.rows))} and {', '.join(sorted(b.rows))}"
        raise UserError(f"{a.tag} and {b.tag} were asked {names}; evaluate both with the same --benchmarks")
    return by_vendor


def question(rows: Sequence[dict[str, Any]], other: Sequence[dict[str, Any]]) -> str:
    """The digest by which two models' prompts are compared: of the chat turns, before any template, where both logs have it."""
    both = "messages_sha256" in rows[0] and "messages_sha256" in other[0]
    return rows[0]["messages_sha256" if both else "prompt_sha256"]


def paired(base: Rows, other: Rows, where: str) -> tuple[list[int], list[int]]:
    """Right answers of both models to each item, in the same order. Of two limits the items of the smaller one; a
    :class:`UserError` unless both saw the same prompts."""
    both = [key for key in base if key in other]
    if len(both) != min(len(base), len(other)) or any(question(base[k], other[k]) != question(other[k], base[k]) for k in both):
        raise UserError(f"{where}: the two evaluations saw different prompts; evaluate both with the same data")
    return [sum(row["correct"] for row in base[k]) for k in both], [sum(row["correct"] for row in other[k]) for k in both]


def compare(base: Sequence[int], other: Sequence[int], samples: int = 1) -> dict[str, Any]:
    """Metrics of one benchmark from two aligned lists of right answers to each item; differences are other minus base."""
    shares = [[count / samples for count in counts] for counts in (base, other)]
    difference, low, high = paired_bootstrap(*shares)
    n, p = len(base), clustered_mcnemar(base, other)
    return {
        "n": n,
        "acc_base": sum(base) / (n * samples),
        "acc_other": sum(other) / (n * samples),
        "difference": difference,
        "difference_low": low,
        "difference_high": high,
        "lost": sum(x > y for x, y in zip(base, other, strict=True)),
        "won": sum(x < y for x, y in zip(base, other, strict=True)),
        "p": p,
        "minimum_detectable": minimum_detectable(n, discordance(*shares)),
        "verdict": verdict(low, high, p),
    }


def verdict(low: float, high: float, p: float) -> str:
    """What the difference shows: its interval excludes zero and the exact test agrees. With few items that differ the
    bootstrap alone is too sure (lost 4, won 0 excludes zero at p = 0.125)."""
    if p >= SHOWN:
        return "no difference shown"
    return "loss" if high < 0 else "gain" if low > 0 else "no difference shown"


def verdict_text(m: dict[str, Any]) -> str:
    if m["verdict"] != "no difference shown":
        return m["verdict"]
    return f"{m['verdict']} (n {m['n']}, minimum detectable {100 * m['minimum_detectable']:.1f})"


def points(m: dict[str, Any]) -> str:
    """The difference in percentage points with its interval."""
    return f"{100 * m['difference']:+6.1f} [{100 * m['difference_low']:+.1f}, {100 * m['difference_high']:+.1f}]"


def table(base: str, other: str, metrics: dict[str, dict[str, Any]]) -> str:
    lines = [f"{base} -> {other}, percentage points with 95 % paired interval"]
    for name, m in metrics.items():
        lines.append(
            f"{name:14} {100 * m['acc_base']:5.1f} -> {100 * m['acc_other']:5.1f}  {points(m)}"
            f"  lost {m['lost']} won {m['won']} p {m['p']:.2g}  {verdict_text(m)}"
        )
    return "\n".join(lines)


def mission_table(teacher: str, base: str, other: str, metrics: dict[str, dict[str, Any]]) -> str:
    """Teacher, base and other side by side; the verdict names the better of the two, if one is shown to be."""
    names = {"loss": f"{base} better", "gain": f"{other} better"}
    rows = [["benchmark", teacher, base, other, "difference", "verdict", "gate"]]
    for name, m in metrics.items():
        accuracies = [f"{100 * m[key]:.1f}" for key in ("acc_teacher", "acc_base", "acc_other")]
        gates = ", ".join(dict.fromkeys(m["gate"].values()))
        rows.append([name, *accuracies, points(m).strip(), names.get(m["verdict"]) or verdict_text(m), gates])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([f"difference: {other} - {base}, percentage points with 95 % paired interval", *lines])


def behind_teacher(teacher: Evaluation, judged: dict[str, Evaluation], name: str) -> dict[str, Any]:
    """The teacher's accuracy on one benchmark, and each judged model compared with it."""
    found: dict[str, Any] = {}
    for role, evaluation in judged.items():
        counts = paired(teacher.rows[name], evaluation.rows[name], f"{name}, {teacher.tag} and {evaluation.tag}")
        made = compare(*counts, teacher.samples)
        found["acc_teacher"] = made["acc_base"]
        found[f"{role}_to_teacher"] = {key: value for key, value in made.items() if not key.startswith("acc_")}
    return found


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("base", help="tag of the model compared with, such as the unquantized one")
    parser.add_argument("other", help="tag of the model that is judged")
    parser.add_argument("--teacher", help="tag of the unquantized model, shown beside the two")
    parser.add_argument("--results", type=Path, default=Path("results"), help="folder of the records (default results)")
    return parser.parse_args()


def compare_all(base: Evaluation, other: Evaluation, teacher: Evaluation | None, directory: Path) -> dict[str, Any]:
    """Metrics of every benchmark."""
    metrics, settings, records = {}, load_settings(), eval_records(directory)
    judged = [record for record in records if record["tag"] in (base.tag, other.tag)]
    for name in base.rows:
        metrics[name] = compare(*paired(base.rows[name], other.rows[name], name), base.samples)
        if teacher:
            metrics[name] |= behind_teacher(teacher, {"base": base, "other": other}, name)
        metrics[name]["gate"] = {r["tag"]: gate_axis(r, name, settings, records).status for r in judged}
    return metrics


def main() -> None:
    args = parse_args()
    started, directory = time.time(), args.results / "eval"
    base, other = load(directory, args.base), load(directory, args.other)
    teacher = load(directory, args.teacher) if args.teacher else None
    pairs = [(base, other)] + ([(teacher, base), (teacher, other)] if teacher else [])
    by_vendor = any([check_comparable(a, b) for a, b in pairs])
    metrics = compare_all(base, other, teacher, directory)
    tag = "__".join(filter(None, (args.teacher, args.base, args.other)))
    extra = {"base": args.base, "other": args.other, "sampling_by_vendor": by_vendor}
    data = [data_entry(n, "prompts", [[k, row[0]["prompt_sha256"]] for k, row in base.rows[n].items()]) for n in base.rows]
    write_result(
        args.results / "compare" / f"{tag}.json", kind="compare", tag=tag, started=started, metrics=metrics, data=data,
        sampling=base.settings["sampling"], extra=extra | ({"teacher": args.teacher} if teacher else {}),
    )  # fmt: skip
    shown = (args.base, args.other, metrics)
    made = mission_table(args.teacher, *shown) if teacher else table(*shown)
    print(made + ("\nsampling differs: each as its vendor recommends" if by_vendor else ""), flush=True)


if __name__ == "__main__":
    run_cli(main)
