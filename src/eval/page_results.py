"""Write results/RESULTS.md and docs/LADDER_RESULTS.md from the records in results/: python src/eval/page_results.py

Every figure is a citation that check_results verifies. RESULTS.md has the tables of page_tables.py; below each stand the
commands of its rows, and the pipeline that makes a row from nothing. The bit ladder, which is written where docs/ lies beside
the records, has one row a checkpoint of razor-tiny that has a record of its size and one of its KL, and its accuracy.
"""

from __future__ import annotations

import argparse
import itertools
import re
import shlex
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from console import atomic_path, run_cli
from page_tables import (
    BLANK,
    Cell,
    Found,
    Record,
    Section,
    cite,
    figure,
    judge,
    made_of,
    markdown,
    pipeline_of,
    records,
    sections,
)  # fmt: skip
from records import lookup

HEADER = """# Results

Written by `python src/eval/page_results.py`; each figure links to the record that holds it, and
`python src/eval/check_results.py` compares them. Never edited by hand.

Below each table stand the commands that wrote its records, in the order of the rows. They read files under `work/` that are not
in the repository: to reproduce a row from nothing, run the pipeline that is named above its command. A pipeline keeps records
that are there: remove the one to make again. In minutes, for the KL of a row:

    rm results/kl/razor_tiny_int4.json; bash pipelines/results.sh tiny; git diff results/RESULTS.md

A command is shown as it was recorded. Since then {renamed}.
"""
RENAMED = {
    "gguf_bench": "speed_gguf", "gguf_sweep": "speed_gguf", "gguf_spread": "study_spread", "eval_bench": "speed_eval",
    "quant_bench": "speed_quant kernels", "size_bench": "speed_quant", "multi_gpu_run": "speed_multi_gpu",
    "recovery_study": "study_recovery", "tiny_vl_train": "tiny_train", "gguf_reference": "gguf_pack --reference",
    "mm_kl": "moe_eval --pictures", "moe_alloc": "quant_save --target-gib",
}  # fmt: skip


LADDER = """# The bit ladder

Written by `python src/eval/page_results.py` from the records of runs; each figure links to its record, and `python
src/eval/check_results.py docs/LADDER_RESULTS.md` compares them. Never edited by hand. All of it is razor-tiny: `256`
wide, `8` experts a layer, two of them a token. What it says about a large model is not measured.

A rung is the bits of the routed experts; attention, shared experts, embedding and head have `4` throughout. KL is to
the BF16 model over the whole vocabulary, in nats, mean and `99.9` % percentile, where it stands with its `95` %
interval by bootstrap over transcripts; accuracy is the share of right answers, truncated ones counted wrong.
`absmax`, `clip16`: no text. `gptq_refit`: calibrated. `mix`: bits of each matrix by measured KL, at the same bytes.
"""
READING = """
How each row is made: `bash pipelines/results.sh tiny study gguf`; the command of every record stands in it and in
[results/RESULTS.md](../results/RESULTS.md). razor-tiny-vl is in [MULTIMODAL.md](MULTIMODAL.md). Allocations by
signals are in [MOE_FINDINGS.md](MOE_FINDINGS.md): none of them is on the ladder, because each is worse than the
uniform rung of its size.
"""
AXES = ("tiny_know", "tiny_math", "tiny_reason", "tiny_code")


def header() -> str:
    return HEADER.format(renamed=", ".join(f"`{old}` became `{new}`" for old, new in RENAMED.items()))


def commands(found: Found) -> list[str]:
    """The commands of the rows, in their order, each group under the pipeline that makes it."""
    lines = ["How to reproduce:", "```"]
    for pipeline, group in itertools.groupby((record for _, record in found), pipeline_of):
        lines.append(f"# bash pipelines/{pipeline}" if pipeline else "# by hand")
        lines += [shlex.join(record["command"]) for record in group]
    return [*lines, "```", ""]


def page(directory: Path) -> str:
    lines = [header()]
    for section in sections(directory):
        lines += [*markdown(section), *commands(section.found)]
    if len(lines) == 1:
        lines.append("No run has been recorded yet.")
    return "\n".join(lines).rstrip() + "\n"


# ---------------------------------------------------------------- the bit ladder


def rungs(
    results: Path, kind: str, names: Callable[[Record], Sequence[str]], columns: Sequence[Sequence[Any]],
    order: Callable[[Record], float], wants: Callable[[Record], bool] = lambda record: True,
) -> Iterator[list[Cell]]:  # fmt: skip
    """A row for each record of a kind with a record of KL: its figures, that KL with its judge and its accuracies, blank where
    it was not evaluated; from most to least bits, within a rung the least KL first."""
    sized, kls, evaluated = (
        {r["tag"]: (f"../{results.name}/{file}", r) for file, r in records(results, each)} for each in (kind, "kl", "eval")
    )
    kl = {tag: r["metrics"]["kl"]["mean"] for tag, (_, r) in kls.items() if "kl" in r["metrics"]}
    tags = [tag for tag, (_, r) in sized.items() if tag in kl and wants(r)]
    for tag in sorted(tags, key=lambda tag: (-order(sized[tag][1]), kl[tag])):
        file, record = sized[tag]
        row = [*(Cell(name) for name in (tag, *names(record))), *(cite(record, file, *column) for column in columns)]
        file, record = kls[tag]
        row += [figure(record, file, {}, f"metrics.kl.{path}?", 5) for path in ("mean", "low", "high", "p99_9")]
        row += [Cell(judge(record))]
        file, record = evaluated.get(tag, ("", {"metrics": {}}))
        yield row + [cite(record, file, f"metrics.{a}.acc", 1, " %") if a in record["metrics"] else BLANK for a in AXES]


def ladder(results: Path) -> str:
    bits, judged = (
        "metrics.roles.routed_expert.bits",
        ["mean KL", "from", "to", "`99.9` %", "judge", *(f"`{axis}`" for axis in AXES)],
    )
    columns: list[Sequence[Any]] = [(bits, 2), ("metrics.overall_bits", 2), ("metrics.packed_bytes", 2, " MB")]

    def uniform(r: Record) -> bool:  # allocations by signals (results.sh study once made them) are no rungs of the ladder
        signals = re.search("random|inverse|frequency|wmass|asal|wfro|composite", r["tag"])
        return made_of(r) and "routed_expert" in r["metrics"]["roles"] and not signals

    integer = rungs(results, "quantize", lambda r: (), columns, lambda r: lookup(r, bits), uniform)
    head = ["model", "bits of the experts", "of the whole model", "packed", *judged]
    lines = [LADDER, *markdown(Section("Integer grids", "", head, [*integer]))]
    columns = [("metrics.bits_per_weight", 2), ("metrics.file_bytes", 2, " MB")]
    types, size = lambda r: (r["recipe"]["base_type"], r["recipe"]["method"]), lambda r: r["metrics"]["file_bytes"]
    note = "A figure may be compared with others of the same judge, here and above."
    head = ["file", "base type", "method", "bits a weight", "size", *judged]
    lines += markdown(Section("GGUF files", note, head, [*rungs(results, "pack", types, columns, size)]))
    return "\n".join(lines).rstrip() + "\n" + READING


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--results", type=Path, default=Path("results"), help="folder of the records (default results)")
    results = parser.parse_args().results
    pages: dict[Path, Callable[[Path], str]] = {results / "RESULTS.md": page}
    if (docs := results.absolute().parent / "docs").is_dir():
        pages[docs / "LADDER_RESULTS.md"] = ladder
    for file, made in pages.items():
        with atomic_path(file) as temporary:
            temporary.write_text(made(results), encoding="utf-8")
        print(f"wrote {file}", flush=True)


if __name__ == "__main__":
    run_cli(main)
