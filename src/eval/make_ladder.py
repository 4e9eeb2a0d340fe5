"""Write docs/LADDER_RESULTS.md, the bit ladder, from the records in results/: python src/eval/make_ladder.py

One rung a number of bits of the experts, one row a checkpoint of razor-tiny that has a record of its size and one of its KL;
accuracy where it was evaluated. Every figure is a citation that check_results verifies:

    python src/eval/check_results.py docs/LADDER_RESULTS.md
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from console import atomic_path, run_cli
from expert_signals import STRATEGIES
from make_results import cite, records, table

HEADER = """# The bit ladder

Written by `python src/eval/make_ladder.py` from the records of runs; each figure links to its record, and
`python src/eval/check_results.py docs/LADDER_RESULTS.md` compares them. Never edited by hand. All of it is razor-tiny: `256`
wide, `8` experts a layer, two of them a token. What it says about a large model is not measured.

A rung is the bits of the routed experts; attention, shared experts, embedding and head have `4` throughout. KL is to the BF16
model over the whole vocabulary, in nats, mean and `99.9` % percentile; accuracy is the share of right answers, truncated
ones counted wrong. `absmax`, `clip16`: no text. `gptq_refit`: calibrated. `mix`: bits of each matrix by measured KL, at the
same bytes.
"""
READING = """
How each row is made: `bash pipelines/tiny_results.sh`, `bash pipelines/study.sh` and `bash pipelines/gguf_results.sh`; the
command of every record stands in it and in [results/RESULTS.md](../results/RESULTS.md). razor-tiny-vl is in
[MULTIMODAL.md](MULTIMODAL.md). Allocations by signals are in
[MOE_FINDINGS.md](MOE_FINDINGS.md): none of them is on the ladder, because each is worse than the uniform rung of its size.
"""
MODEL = "razor-tiny"  # razor-tiny-vl has other tasks and texts: docs/MULTIMODAL.md
AXES = ("tiny_know", "tiny_math", "tiny_reason", "tiny_code")
EXPERT_BITS = "metrics.roles.routed_expert.bits"
Found = Mapping[str, tuple[str, dict[str, Any]]]


def by_tag(results: Path, kind: str) -> dict[str, tuple[str, dict[str, Any]]]:
    """{tag: (file relative to docs/, record)}."""
    return {record["tag"]: (f"../{results.name}/{file}", record) for file, record in records(results, kind)}


def accuracies(evaluated: Found, tag: str) -> list[str]:
    """The accuracy on each axis, or blanks."""
    if tag not in evaluated:
        return [""] * len(AXES)
    file, record = evaluated[tag]
    return [cite(record, file, f"metrics.{axis}.acc", 1, " %") if axis in record["metrics"] else "" for axis in AXES]


def by_signal(tag: str) -> bool:
    """Whether a tag is that of an allocation by signals (the study's, not the ladder's)."""
    return any(strategy in tag for strategy in STRATEGIES)


def made_of(record: Mapping[str, Any], model: str = MODEL) -> bool:
    """Whether a record is of this model, or of what was made of it."""
    return Path(record["model"]["path"]).name == model


def integer_ladder(sizes: Found, kl: Found, evaluated: Found) -> list[str]:
    """The rungs of the integer grids, from most to least bits; within a rung the least KL first."""
    rows = []
    for tag, (file, record) in sizes.items():
        expert = record["metrics"]["roles"].get("routed_expert")
        if tag not in kl or not expert or by_signal(tag) or "kl" not in kl[tag][1]["metrics"]:
            continue
        if not made_of(record):
            continue
        kl_file, kl_record = kl[tag]
        cells = [f"`{tag}`", cite(record, file, EXPERT_BITS, 2), cite(record, file, "metrics.overall_bits", 2)]
        cells.append(cite(record, file, "metrics.packed_bytes", 2, " MB"))
        cells += [cite(kl_record, kl_file, f"metrics.kl.{path}", 5) for path in ("mean", "p99_9")]
        cells += accuracies(evaluated, tag)
        rows.append(((-expert["bits"], kl_record["metrics"]["kl"]["mean"]), cells))
    head = ["model", "bits of the experts", "of the whole model", "packed", "mean KL", "`99.9` %", *(f"`{a}`" for a in AXES)]
    return ["## Integer grids", "", *table(head, [cells for _, cells in sorted(rows)])]


def gguf_ladder(packs: Found, kl: Found, evaluated: Found) -> list[str]:
    """GGUF files in the order of their sizes; of one size the least KL first."""
    rows = []
    for tag, (file, record) in packs.items():
        if tag not in kl or "tool" not in kl[tag][1]["metrics"]:
            continue
        kl_file, kl_record = kl[tag]
        cells = [f"`{tag}`", f"`{record['recipe']['base_type']}`", f"`{record['recipe']['method']}`"]
        cells += [cite(record, file, "metrics.bits_per_weight", 2), cite(record, file, "metrics.file_bytes", 2, " MB")]
        cells += [cite(kl_record, kl_file, f"metrics.tool.{path}", 5) for path in ("mean", "p99_9")]
        cells += accuracies(evaluated, tag)
        rows.append(((-record["metrics"]["file_bytes"], kl_record["metrics"]["tool"]["mean"]), cells))
    note = "KL by `llama-perplexity` on chunks of its own: it compares files with one another, not with the table above."
    head = ["file", "base type", "method", "bits a weight", "size", "mean KL", "`99.9` %", *(f"`{a}`" for a in AXES)]
    return ["## GGUF files", "", note, "", *table(head, [cells for _, cells in sorted(rows)])]


def page(results: Path) -> str:
    kl, evaluated = by_tag(results, "kl"), by_tag(results, "eval")
    lines = [HEADER, *integer_ladder(by_tag(results, "quantize"), kl, evaluated)]
    lines += gguf_ladder(by_tag(results, "pack"), kl, evaluated)
    return "\n".join(lines).rstrip() + "\n" + READING


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--results", type=Path, default=Path("results"), help="folder of the records (default results)")
    parser.add_argument("--out", type=Path, default=Path("docs/LADDER_RESULTS.md"), help="page to write")
    args = parser.parse_args()
    with atomic_path(args.out) as temporary:
        temporary.write_text(page(args.results), encoding="utf-8")
    print(f"wrote {args.out}", flush=True)


if __name__ == "__main__":
    run_cli(main)
