"""Write results/RESULTS.md from the records in results/: python src/eval/page_results.py

Every figure is a citation that check_results verifies; the tables are declared in page_tables.py. Below each stand the
commands of its rows, and the pipeline that makes a row from nothing.
"""

from __future__ import annotations

import argparse
import itertools
import shlex
from pathlib import Path

from console import atomic_path, run_cli
from page_tables import Found, markdown, pipeline_of, sections

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
    "quant_bench": "speed_quant", "size_bench": "speed_size",
}  # fmt: skip


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--results", type=Path, default=Path("results"), help="folder of the records (default results)")
    args = parser.parse_args()
    with atomic_path(args.results / "RESULTS.md") as temporary:
        temporary.write_text(page(args.results), encoding="utf-8")
    print(f"wrote {args.results / 'RESULTS.md'}", flush=True)


if __name__ == "__main__":
    run_cli(main)
