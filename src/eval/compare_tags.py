"""Compare two evaluated models item by item: bash pipelines/eval.sh --compare BASE OTHER [--teacher TAG]

The tags are those of results/eval. Both must have answered the same questions (of two limits the smaller one's count) with
the same budget, number of samples and grader, and have sampled alike or each as its vendor recommends. Models of one family,
or of none that is known, must also have seen the same tokens: another chat template is no other model (--other-templates).
Per benchmark: the difference in accuracy with Tango's score interval, McNemar's exact p, items lost and won, and a verdict,
which is given only when the interval excludes zero and the exact p is below 0.05. With --teacher its accuracy stands beside
them, and the record says how far each is behind it. A second table tells how the reasoning drifted: length, loops, answers
that were there and not emitted, words of self-correction, truncation. Writes results/compare/BASE__OTHER.json
(TEACHER__BASE__OTHER.json).
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
from intervals import clustered_mcnemar, discordance, fewest_items, items_needed, minimum_detectable, paired_interval
from reasoning import MEASURES, described, drift
from records import data_entry, write_result
from sample_log import ASKED, changed_fields, find_log, read_evaluation

SHOWN = 0.05  # level of the exact test
Rows = dict[str, list[dict[str, Any]]]


@dataclass(frozen=True)
class Evaluation:
    """A finished evaluation: ``rows`` {benchmark: {item id: its samples}}, each with its ``line`` in the log; ``vendor``: it
    sampled as configs/eval.env says; ``family``: of that file, None for none or an older record."""

    tag: str
    settings: dict[str, Any]
    vendor: bool
    family: str | None
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
    record, settings, rows = read_evaluation(result)
    source = (record["sampling"] or {}).get("source", "")  # none in records from before configs/eval.env
    grouped: dict[str, Rows] = {}
    for line, row in enumerate(rows, 2):
        grouped.setdefault(row["benchmark"], {}).setdefault(row["id"], []).append(row | {"line": line})
    by_vendor = "SAMPLING__" in source and "command line" not in source
    return Evaluation(tag, settings, by_vendor, (record["model"] or {}).get("family"), grouped)


def check_comparable(a: Evaluation, b: Evaluation) -> bool:
    """Raise unless the two may be compared; True when they sampled differently, each as its vendor recommends."""
    changed = ["grader"] if a.settings.get("grader") != b.settings.get("grader") else []
    changed += ["samples"] if a.samples != b.samples else []
    drawn_a, drawn_b = (settings.get("sampling") or {} for settings in (a.settings, b.settings))
    same_budget = drawn_a.get("max_tokens") == drawn_b.get("max_tokens")
    by_vendor = drawn_a != drawn_b and a.vendor and b.vendor and same_budget
    changed += ["sampling"] if drawn_a != drawn_b and not by_vendor else []
    if changed:
        mend = "evaluate both with the same settings"
        if changed == ["grader"]:
            mend = "grade the older one again: bash pipelines/eval.sh --regrade TAG"
        raise UserError(f"{a.tag} and {b.tag} differ in {', '.join(changed)}; {mend}")
    if a.rows.keys() != b.rows.keys():
        names = f"{', '.join(sorted(a.rows))} and {', '.join(sorted(b.rows))}"
        raise UserError(f"{a.tag} and {b.tag} were asked {names}; evaluate both with the same --benchmarks")
    return by_vendor


def paired(base: Evaluation, other: Evaluation, name: str) -> list[tuple[str, list[dict[str, Any]], list[dict[str, Any]]]]:
    """(item id, samples of both models) of one benchmark. Of two limits the items of the smaller one; a :class:`UserError`
    unless both were asked and judged alike: by the chat turns, before any template, where both logs have them."""
    ours, theirs = base.rows[name], other.rows[name]
    both = [key for key in ours if key in theirs]
    where = f"{name}, {base.tag} and {other.tag}"
    if len(both) != min(len(ours), len(theirs)):
        lone = next(key for key in min(ours, theirs, key=len) if key not in both)
        raise UserError(
            f"{where}: saw different prompts, {lone} is in one of them only; evaluate both with the same data and --limit"
        )
    for key in both:
        a, b = ours[key][0], theirs[key][0]
        changed = changed_fields(a, b)
        asked = "messages_sha256" if "messages_sha256" in a and "messages_sha256" in b else "prompt_sha256"
        if found := [field for field in changed if field in (asked, "gold", "standard_sha256")]:
            raise UserError(
                f"{where}: saw different prompts or golds: {key} (lines {a['line']} and {b['line']} of their logs) has another "
                f"{ASKED[found[0]]}; evaluate both with the same data"
            )
    return [(key, ours[key], theirs[key]) for key in both]


def other_prompts(base: Evaluation, other: Evaluation, name: str, allowed: bool) -> int:
    """The number of items that the two models got as other tokens (as other text, where a log has no token ids). A
    :class:`UserError` unless that is ``allowed`` or the models are known to be of two families."""
    found = []
    for key, ours, theirs in paired(base, other, name):
        changed = changed_fields(ours[0], theirs[0])
        known = None not in (ours[0].get("prompt_ids_sha256"), theirs[0].get("prompt_ids_sha256"))
        if ("prompt_ids_sha256" if known else "prompt_sha256") in changed:
            found.append((key, ours[0]["line"], theirs[0]["line"]))
    apart = base.family and other.family and base.family != other.family
    if found and not apart and not allowed:
        key, line, other_line = found[0]
        raise UserError(
            f"{name}: {base.tag} and {other.tag} got {len(found)} of {len(base.rows[name])} questions as other tokens, first "
            f"{key} (lines {line} and {other_line}): another chat template, tokenizer or thinking switch, whose effect is not "
            "the weights'; evaluate both with one --tokenizer DIR, or compare with --other-templates"
        )
    return len(found)


def right_answers(base: Evaluation, other: Evaluation, name: str) -> tuple[list[int], list[int]]:
    """Right answers of both models to each item of one benchmark, in the same order."""
    pairs = paired(base, other, name)
    counts = [[sum(row["correct"] for row in rows) for rows in side] for side in list(zip(*pairs, strict=True))[1:]]
    return counts[0], counts[1]


def compare(base: Sequence[int], other: Sequence[int], samples: int = 1) -> dict[str, Any]:
    """Metrics of one benchmark from two aligned lists of right answers to each item; differences are other minus base."""
    shares = [[count / samples for count in counts] for counts in (base, other)]
    difference, low, high = paired_interval(*shares)
    n, p, share = len(base), clustered_mcnemar(base, other), discordance(*shares)
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
        "minimum_detectable": minimum_detectable(n, share),
        "items_needed": items_needed(difference, share) if difference else None,
        "verdict": verdict(low, high, p),
    }


def verdict(low: float, high: float, p: float) -> str:
    """What the difference shows: its interval excludes zero and the exact test agrees. With few items that differ an interval
    alone is too sure (lost 4, won 0 excludes zero at p = 0.125)."""
    if p >= SHOWN:
        return "no difference shown"
    return "loss" if high < 0 else "gain" if low > 0 else "no difference shown"


def verdict_text(m: dict[str, Any]) -> str:
    if m["verdict"] != "no difference shown":
        return m["verdict"]
    if m["n"] < fewest_items():
        return f"{m['verdict']} (n {m['n']} can show none: {fewest_items()} items at least)"
    needed = f"; {100 * abs(m['difference']):.1f} would need n {m['items_needed']:,}" if m["items_needed"] else ""
    return f"{m['verdict']} (n {m['n']}, minimum detectable {100 * m['minimum_detectable']:.1f}{needed})"


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
    return "\n".join([f"difference: {other} - {base}, percentage points with 95 % paired interval", *columns(rows)])


def columns(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def reasoning_table(base: str, other: str, metrics: dict[str, dict[str, Any]]) -> str:
    """How the other model reasons, a row a measure and benchmark; ``n``: the items that both logs tell it of."""
    rows = [["reasoning", "benchmark", f"{base} -> {other}", "change with 95 % paired interval", "n"]]
    for measure, (heading, *_) in MEASURES.items():
        for name, m in metrics.items():
            made = m["reasoning"][measure]
            rows.append([heading, name, *described(measure, made), f"{made['n']}" if made else ""])
    return "\n".join(columns(rows))


def behind_teacher(teacher: Evaluation, judged: dict[str, Evaluation], name: str) -> dict[str, Any]:
    """The teacher's accuracy on one benchmark, and each judged model compared with it."""
    found: dict[str, Any] = {}
    for role, evaluation in judged.items():
        made = compare(*right_answers(teacher, evaluation, name), teacher.samples)
        made["reasoning"] = drift([(a, b) for _, a, b in paired(teacher, evaluation, name)])
        found["acc_teacher"] = made["acc_base"]
        found[f"{role}_to_teacher"] = {key: value for key, value in made.items() if not key.startswith("acc_")}
    return found


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("base", help="tag of the model compared with, such as the unquantized one")
    parser.add_argument("other", help="tag of the model that is judged")
    parser.add_argument("--teacher", help="tag of the unquantized model, shown beside the two")
    templates = "compare although one family's prompts differ in their tokens; each table says in how many"
    parser.add_argument("--other-templates", action="store_true", help=templates)
    parser.add_argument("--results", type=Path, default=Path("results"), help="folder of the records (default results)")
    return parser.parse_args()


def compare_all(
    base: Evaluation, other: Evaluation, teacher: Evaluation | None, directory: Path, templates: bool
) -> dict[str, Any]:
    """Metrics of every benchmark. ``templates``: prompts may differ in their tokens."""
    metrics, settings, records = {}, load_settings(), eval_records(directory)
    judged = [record for record in records if record["tag"] in (base.tag, other.tag)]
    for name in base.rows:
        pairs = [(base, other)] + ([(teacher, base), (teacher, other)] if teacher else [])
        differing = max(other_prompts(*pair, name, templates) for pair in pairs)
        metrics[name] = compare(*right_answers(base, other, name), base.samples) | {"other_prompts": differing}
        metrics[name]["reasoning"] = drift([(a, b) for _, a, b in paired(base, other, name)])
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
    metrics = compare_all(base, other, teacher, directory, args.other_templates)
    tag = "__".join(filter(None, (args.teacher, args.base, args.other)))
    extra = {"base": args.base, "other": args.other, "sampling_by_vendor": by_vendor}
    data = [data_entry(n, "prompts", [[k, row[0]["prompt_sha256"]] for k, row in base.rows[n].items()]) for n in base.rows]
    write_result(
        args.results / "compare" / f"{tag}.json", kind="compare", tag=tag, started=started, metrics=metrics, data=data,
        sampling=base.settings.get("sampling"), extra=extra | ({"teacher": args.teacher} if teacher else {}),
    )  # fmt: skip
    shown = (args.base, args.other, metrics)
    made = mission_table(args.teacher, *shown) if teacher else table(*shown)
    notes = ["sampling differs: each as its vendor recommends"] if by_vendor else []
    for name, m in metrics.items():
        if m["other_prompts"]:
            notes.append(f"{name}: {m['other_prompts']} of {m['n']} items reached the two as other tokens (templates differ)")
    print("\n".join([made, *notes, reasoning_table(*shown)]), flush=True)


if __name__ == "__main__":
    run_cli(main)
