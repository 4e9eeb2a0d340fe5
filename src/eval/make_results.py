"""Write results/RESULTS.md from the records in results/: python src/eval/make_results.py

Every figure is a citation that check_results verifies. Tables: accuracy (eval), differences (compare), fidelity (kl), sizes
(quantize), GGUF files (pack), speed (bench), training.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

from check_results import lookup, render
from console import atomic_path, run_cli
from results_store import read_result

HEADER = """# Results

Written by `python src/eval/make_results.py`; each figure links to the record that holds it, and
`python src/eval/check_results.py` compares them. Never edited by hand.
"""


def cite(record: dict[str, Any], file: str, path: str, decimals: int, unit: str = "") -> str:
    return f"[{render(lookup(record, path), decimals, unit)}]({file}#{path})"


def records(directory: Path, kind: str) -> list[tuple[str, dict[str, Any]]]:
    """(file relative to ``directory``, record) of a kind, by start time: the order in which they were made."""
    found = []
    for file in sorted(directory.glob("*/*.json")):
        record = read_result(file)
        if record["kind"] == kind:
            found.append((str(file.relative_to(directory)), record))
    return sorted(found, key=lambda item: item[1]["started"])


def row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    return [row(head), row(["---"] * len(head)), *(row(cells) for cells in rows), ""]


def commands(found: list[tuple[str, dict[str, Any]]]) -> list[str]:
    return ["Commands, in the order of the rows:", "```", *(shlex.join(record["command"]) for _, record in found), "```", ""]


def benchmark_table(found: list[tuple[str, dict[str, Any]]], label: str, cell: Callable[..., str]) -> list[str]:
    """One row a record, named by its fields in ``label``, one column a benchmark;
    ``cell(record, file, path of the metrics)``."""
    names = list(dict.fromkeys(name for _, record in found for name in record["metrics"]))
    rows = []
    for file, record in found:
        cells = [cell(record, file, f"metrics.{name}") if name in record["metrics"] else "" for name in names]
        rows.append([f"`{label.format_map(record)}`", *cells])
    return table(["model", *(f"`{name}`" for name in names)], rows)


def accuracy_cell(record: dict[str, Any], file: str, at: str) -> str:
    return (
        f"{cite(record, file, at + '.acc', 1, ' %')} ({cite(record, file, at + '.acc_low', 1, ' %')} to "
        f"{cite(record, file, at + '.acc_high', 1, ' %')}; n {cite(record, file, at + '.n', 0)}, "
        f"truncated {cite(record, file, at + '.trunc', 1, ' %')})"
    )


def accuracy(found: list[tuple[str, dict[str, Any]]]) -> list[str]:
    note = "Share of right answers, its Wilson interval, items, and truncated answers (counted wrong)."
    return ["## Accuracy", "", note, "", *benchmark_table(found, "{tag}", accuracy_cell), *commands(found)]


def difference_cell(record: dict[str, Any], file: str, at: str) -> str:
    return (
        f"{cite(record, file, at + '.difference', 1, ' %')} ({cite(record, file, at + '.difference_low', 1, ' %')} to "
        f"{cite(record, file, at + '.difference_high', 1, ' %')}), {lookup(record, at + '.verdict')}"
    )


def differences(found: list[tuple[str, dict[str, Any]]]) -> list[str]:
    note = "Change in accuracy from the first model to the second on the same items, with its paired bootstrap interval."
    return ["## Differences", "", note, "", *benchmark_table(found, "{base} -> {other}", difference_cell), *commands(found)]


KL_COLUMNS = (("mean", 5, ""), ("standard_error", 5, ""), ("p99", 4, ""), ("p99_9", 4, ""), ("top1", 2, " %"))


def fidelity(found: list[tuple[str, dict[str, Any]]]) -> list[str]:
    rows, files = [], [item for item in found if "tool" in item[1]["metrics"]]
    found = [item for item in found if item not in files]
    for file, record in found:
        cells = [f"`{record['tag']}`", cite(record, file, "metrics.ppl", 4)]
        for path, decimals, unit in KL_COLUMNS:
            cells.append(cite(record, file, f"metrics.kl.{path}", decimals, unit) if "kl" in record["metrics"] else "")
        rows.append(cells)
    note = "KL divergence to the unquantized model over the whole vocabulary, in nats, on held-out transcripts."
    head = ["model", "perplexity", "mean KL", "standard error", "percentile `99`", "percentile `99.9`", "same top token"]
    lines = ["## Fidelity", "", note, "", *table(head, rows), *commands(found)] if found else []
    return lines + (gguf_fidelity(files) if files else [])


def gguf_fidelity(found: list[tuple[str, dict[str, Any]]]) -> list[str]:
    """KL of GGUF files, by llama.cpp's tool and by ours on the same chunks."""
    paths = (
        ("tool.mean", 5, ""), ("tool.mean_error", 5, ""), ("tool.p99", 4, ""), ("tool.p99_9", 4, ""), ("tool.top1", 2, " %"),
        ("kl.mean", 5, ""), ("kl.p99_9", 4, ""),
    )  # fmt: skip
    rows = [
        [f"`{r['tag']}`", *(cite(r, file, f"metrics.{path}", decimals, unit) for path, decimals, unit in paths)]
        for file, r in found
    ]
    note = "KL of GGUF files to the unquantized model: by `llama-perplexity`, and by our own reading of the same logits."
    head = ["file", "mean KL", "error", "percentile `99`", "percentile `99.9`", "same top token", "ours: mean", "ours: `99.9`"]
    return ["## Fidelity of GGUF files", "", note, "", *table(head, rows), *commands(found)]


def packs(found: list[tuple[str, dict[str, Any]]]) -> list[str]:
    """What was packed into GGUF files."""
    paths = (("metrics.file_bytes", 3, " MB"), ("metrics.bits_per_weight", 3, ""), ("seconds", 0, ""))
    rows = []
    for file, r in found:
        made_by = f"`{r['recipe']['method']}`, `{r['recipe']['base_type']}`"
        rows.append([f"`{r['tag']}`", made_by, *(cite(r, file, path, decimals, unit) for path, decimals, unit in paths)])
    head = ["file", "method, base type", "size", "bits a weight", "seconds"]
    return ["## GGUF files", "", *table(head, rows), *commands(found)]


def sizes(found: list[tuple[str, dict[str, Any]]]) -> list[str]:
    rows = [
        [
            f"`{record['tag']}`",
            cite(record, file, "metrics.packed_bytes", 2, " MB"),
            cite(record, file, "metrics.weight_bits", 2),
            cite(record, file, "metrics.stored_bits", 2),
            cite(record, file, "metrics.overall_bits", 2),
        ]
        for file, record in found
    ]
    note = "Bytes if packed; bits of the quantized tensors without and with their scales, and of the whole model."
    head = ["model", "packed", "weight bits", "stored bits", "overall"]
    return ["## Sizes", "", note, "", *table(head, rows), *commands(found)]


def training(found: list[tuple[str, dict[str, Any]]]) -> list[str]:
    paths = (("metrics.parameters", 0), ("metrics.tokens", 0), ("seconds", 0), ("metrics.final_loss", 3))
    rows = [[f"`{r['tag']}`", *(cite(r, file, path, decimals) for path, decimals in paths)] for file, r in found]
    return ["## Training", "", *table(["model", "parameters", "tokens", "seconds", "final loss"], rows), *commands(found)]


def speed(found: list[tuple[str, dict[str, Any]]]) -> list[str]:
    files = [item for item in found if "placements" in item[1]["metrics"]]
    quantizers = [item for item in found if item not in files]
    return (quantizer_speed(quantizers) if quantizers else []) + (gguf_speed(files) if files else [])


def gguf_speed(found: list[tuple[str, dict[str, Any]]]) -> list[str]:
    """Tokens a second of llama.cpp, one row a placement of the weights."""
    rows = []
    for file, r in found:
        for place, made in r["metrics"]["placements"].items():
            at = f"metrics.placements.{place}"
            prefill, decode = (max(made[kind], key=lambda n: made[kind][n]["tokens_per_s"]) for kind in ("prefill", "decode"))
            rows.append([
                f"`{r['tag']}` (`{r['hardware']['gpu'] or r['hardware']['cpu']}`)", f"`{place}`",
                cite(r, file, f"{at}.prefill.{prefill}.tokens_per_s", 0),
                cite(r, file, f"{at}.decode.1.tokens_per_s", 0),
                cite(r, file, f"{at}.decode.{decode}.tokens_per_s", 0),
                cite(r, file, "metrics.limit_tokens_per_s", 0),
                cite(r, file, f"{at}.peak_rss_mib", 0),
            ])  # fmt: skip
    note = "Tokens a second in llama.cpp; the limit is the bandwidth of a memory copy over the bytes that a token reads."
    head = ["file", "weights", "prefill, best", "decode, one sequence", "decode, best", "limit, one sequence", "memory, MiB"]
    return ["## Speed of GGUF files", "", note, "", *table(head, rows), *commands(found)]


def quantizer_speed(found: list[tuple[str, dict[str, Any]]]) -> list[str]:
    rates = ("limit_copy", "absmax_int4", "clip16_int3", "clip16_int4", "plain_clip16_int3")
    methods = ("wclip", "gptq", "gptq_refit")
    rows = [
        [
            f"`{r['tag']}` ({r['hardware']['gpu'] or r['hardware']['cpu']})".replace("(", "(`").replace(")", "`)"),
            *(cite(r, file, f"metrics.grids.{name}", 2) for name in rates),
            cite(r, file, "metrics.layer.experts", 0),
            *(cite(r, file, f"metrics.layer.{name}.seconds", 1) for name in methods),
        ]
        for file, r in found
    ]
    note = "Data-free grids in billions of parameters a second, beside a copy; one MoE layer of calibrated rounding in seconds."
    head = ["machine", "copy", *(f"`{name}`" for name in rates[1:]), "experts of the layer", *(f"`{name}`" for name in methods)]
    return ["## Speed", "", note, "", *table(head, rows), *commands(found)]


SECTIONS = (
    ("eval", accuracy),
    ("compare", differences),
    ("kl", fidelity),
    ("quantize", sizes),
    ("pack", packs),
    ("bench", speed),
    ("train", training),
)


def page(directory: Path) -> str:
    lines = [HEADER]
    for kind, section in SECTIONS:
        if found := records(directory, kind):
            lines += section(found)
    if len(lines) == 1:
        lines.append("No run has been recorded yet.")
    return "\n".join(lines).rstrip() + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--results", type=Path, default=Path("results"))
    args = parser.parse_args()
    with atomic_path(args.results / "RESULTS.md") as temporary:
        temporary.write_text(page(args.results), encoding="utf-8")
    print(f"wrote {args.results / 'RESULTS.md'}", flush=True)


if __name__ == "__main__":
    run_cli(main)
