"""The validation gate: does the harness reproduce what a model's vendor published?  bash pipelines/eval.sh --gate [TAG ...]

Status of every axis of every evaluation in results/eval, from its record and configs/eval.env: gated, not gated (and why), no
target. A quantized model has the status that its unquantized original reached with the same sampling: the gate judges the
harness, not the quantization. Where the vendor published the mean of two settings (mmmu_pro), both have the status of that
mean. --strict ends with 1 when an axis that has a target is not gated.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench_mm import GROUPS
from console import UserError, read_json, run_cli
from eval_settings import EvalSettings, GateRules, load_settings
from records import REPO, is_original, read_result

GATED, NOT_GATED, NO_TARGET = "gated", "not gated", "no target"
SAME_SAMPLING = ("temperature", "top_p", "top_k", "max_tokens")


@dataclass(frozen=True)
class Gate:
    """``reason`` says what the status rests on; ``target`` in percent; ``reference``: the tag whose accuracy was judged."""

    status: str
    reason: str
    target: float | None = None
    reference: str | None = None


def gate_status(metrics: Mapping[str, Any], target: float, rules: GateRules) -> tuple[str, str]:
    """(status, reason) of one accuracy beside a published one in percent. Gated needs all three: the accuracy within
    ``points`` of the target; an interval that does not exclude it by more than ``shown``; one at most ``width`` wide."""
    off = 100 * metrics["acc"] - target
    low, high = 100 * metrics["acc_low"] - target, 100 * metrics["acc_high"] - target
    excluded = max(low, -high, 0.0)
    reason = f"{off:+.1f} from {target:g}, interval {low:+.1f} to {high:+.1f}"
    if high - low > rules.width:
        return NOT_GATED, f"{reason}: wider than {rules.width:g}, more items or samples are needed"
    if abs(off) > rules.points:
        return NOT_GATED, f"{reason}: more than {rules.points:g} away"
    if excluded > rules.shown:
        return NOT_GATED, f"{reason}: excludes it by more than {rules.shown:g}"
    return GATED, reason


def family_of_record(record: Mapping[str, Any], records: Sequence[Mapping[str, Any]], settings: EvalSettings) -> str | None:
    """The family that the record names, else that of a model in the repository with the same config.json."""
    if "family" in record["model"]:
        return record["model"]["family"]
    digest = record["model"].get("config_sha256")
    for other in (record, *records):
        if other["model"].get("config_sha256") == digest:
            if "family" in other["model"]:
                return other["model"]["family"]
            path = REPO / other["model"]["path"] / "config.json"
            if path.is_file():
                return settings.family_of(read_json(path))
    return None


def reference_of(
    record: Mapping[str, Any], axis: str, records: Sequence[Mapping[str, Any]], settings: EvalSettings
) -> Mapping[str, Any] | None:
    """The evaluation that the gate judges: the record itself, or the latest of an unquantized model of its family."""
    if is_original(record):
        return record
    family = family_of_record(record, records, settings)
    same = [
        other
        for other in records
        if is_original(other)
        and axis in other["metrics"]
        and family_of_record(other, records, settings) == family
        and all(other["sampling"].get(key) == record["sampling"].get(key) for key in SAME_SAMPLING)
    ]
    return max(same, key=lambda other: other["started"], default=None)


def published_for(axis: str, targets: Mapping[str, float]) -> tuple[float | None, tuple[str, ...]]:
    """(target, the benchmarks whose mean it is): an axis's own number, else that of the group which it belongs to."""
    groups = [name for name, members in GROUPS.items() if axis in members and name in targets]
    if axis in targets or not groups:
        return targets.get(axis), (axis,)
    return targets[groups[0]], GROUPS[groups[0]]


def mean_metrics(metrics: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Accuracy of several settings of the same questions. Answers to one question go together, so the interval is taken as
    wide as if they always did: the mean of the bounds."""
    return {key: sum(m[key] for m in metrics) / len(metrics) for key in ("acc", "acc_low", "acc_high")}


def gate_axis(record: Mapping[str, Any], axis: str, settings: EvalSettings, records: Sequence[Mapping[str, Any]] = ()) -> Gate:
    """The gate of one benchmark of one evaluation; ``records``: the other evaluations, among them its original's."""
    targets = settings.targets.get(family_of_record(record, records, settings) or "", {})
    target, members = published_for(axis, targets)
    if target is None:
        return Gate(NO_TARGET, "no published number in " + settings.source)
    reference = reference_of(record, axis, records, settings)
    if reference is None:
        return Gate(NOT_GATED, "its unquantized original was not evaluated with the same sampling", target)
    if missing := [name for name in members if name not in reference["metrics"]]:
        return Gate(NOT_GATED, f"the target is a mean, and {', '.join(missing)} was not evaluated", target, reference["tag"])
    status, reason = gate_status(mean_metrics([reference["metrics"][name] for name in members]), target, settings.gate)
    together = f"mean of {', '.join(members)}: " if len(members) > 1 else ""
    return Gate(status, together + reason, target, reference["tag"])


def gate_text(gate: Gate) -> str:
    return gate.status if gate.status == NO_TARGET else f"{gate.status} ({gate.reason})"


def eval_records(directory: Path) -> list[dict[str, Any]]:
    """All evaluations of a model in results/eval, by start."""
    found = [read_result(path) for path in sorted(directory.glob("*.json"))]
    return sorted((r for r in found if r["kind"] == "eval" and r["model"]), key=lambda record: record["started"])


def gate_lines(records: Sequence[Mapping[str, Any]], settings: EvalSettings, tags: Sequence[str]) -> tuple[list[str], int]:
    """(table of the tags' axes, all when none is named; number of axes with a target that are not gated)."""
    chosen = [record for record in records if not tags or record["tag"] in tags]
    width = max(len(record["tag"]) for record in chosen)
    lines, failed = [f"{'evaluation':<{width}}  {'benchmark':<14}{'acc':>7}  status"], 0
    for record in chosen:
        for axis, metrics in record["metrics"].items():
            gate = gate_axis(record, axis, settings, records)
            failed += gate.status == NOT_GATED
            by = f", by {gate.reference}" if gate.reference not in (None, record["tag"]) else ""
            lines.append(f"{record['tag']:<{width}}  {axis:<14}{100 * metrics['acc']:>6.1f}%  {gate_text(gate)}{by}")
    return lines, failed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("tags", nargs="*", help="evaluations to show (default: all)")
    parser.add_argument("--results", type=Path, default=Path("results"))
    parser.add_argument("--strict", action="store_true", help="fail when an axis with a target is not gated")
    args = parser.parse_args()
    records = eval_records(args.results / "eval")
    if unknown := sorted(set(args.tags) - {record["tag"] for record in records}):
        raise UserError(f"{args.results / 'eval'}: holds no evaluation {', '.join(unknown)}")
    if not records:
        raise UserError(f"{args.results / 'eval'}: holds no evaluation; bash pipelines/eval.sh --model DIR --tag TAG makes one")
    lines, failed = gate_lines(records, load_settings(), args.tags)
    print("\n".join(lines), flush=True)
    return 1 if args.strict and failed else 0


if __name__ == "__main__":
    run_cli(main)
