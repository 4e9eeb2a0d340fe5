"""The validation gate: does the harness reproduce what a model's vendor published?  bash pipelines/eval.sh --gate [TAG ...]

Status of every axis of every evaluation in results/eval, from its record and configs/eval.env: gated, not gated (and why), no
target. A quantized model has the status that its unquantized original reached with the same sampling: the gate judges the
harness, not the quantization. Where the vendor published the mean of two settings (mmmu_pro), both have the status of that
mean. Behind the reason stand the items, the chance that so many answers of an exact harness pass, the chance if it is a point
further off than the gate allows, and the items of which an exact one passes in four of five cases. --strict ends with 1 when
an axis that has a target is not gated.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from console import UserError, run_cli
from eval_settings import NOT_GATED, EvalSettings, eval_records, gate_axis, gate_text, load_settings


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
