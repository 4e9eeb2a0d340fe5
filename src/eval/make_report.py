"""Write results/report.html from the records in results/: python src/eval/make_report.py [--results results] [--data-dir DIR]

One page that needs no network: tables of accuracy (with the gate), differences, fidelity and sizes, plots of KL and accuracy
against bytes, and samples to browse. All text of a model is escaped or set as text. The questions beside the samples come from
the generated tiny tasks and, with --data-dir, from benchmarks whose files lie there.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from itertools import zip_longest
from pathlib import Path
from typing import Any

from console import UserError, atomic_path, run_cli
from eval_settings import GATED, NO_TARGET, EvalSettings, eval_records, gate_axis, load_settings
from make_results import method_of, records
from pictures import Picture, pictures_of
from records import is_original
from sample_log import find_log, read_samples
from svg_plot import Point, Series, scatter
from task import Benchmark
from task_list import recorded_benchmarks
from tasks_tiny import TINY_TASKS, TINY_VISION_TASKS

TEMPLATE = Path(__file__).with_name("report_template.html")
SAMPLE_BYTES = 2_000_000  # of all samples on the page; the rest of it is far smaller
EACH = 40  # samples of one benchmark of one evaluation at most, half of them wrong where there are so many
CLIP = 6000  # characters of one answer
PICTURE_BYTES = 20_000  # of the pictures of one question
Found = list[tuple[str, dict[str, Any]]]
Question = tuple[str | None, Sequence[Picture]]
NOT_READ: Question = (None, ())


def percent(value: float, digits: int = 1) -> str:
    return f"{100 * value:.{digits}f}"


def notes(*lines: str) -> str:
    """Small lines under a cell's figure."""
    return "".join(f"<small>{escape(line)}</small>" for line in lines if line)


def cell(content: str, *small: str) -> str:
    """A table cell of plain text with optional small lines."""
    return f"<td>{escape(content)}{notes(*small)}</td>"


def chip(text: str, kind: str, title: str = "") -> str:
    return f'<span class="chip {kind}" title="{escape(title, quote=True)}">{escape(text)}</span>'


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """``rows``: cells that are markup already."""
    top = "".join(f"<th>{escape(name)}</th>" for name in head)
    body = "".join(f"<tr>{''.join(row)}</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def section(title: str, anchor: str, note: str, *parts: str) -> str:
    return f'<h2 id="{anchor}">{escape(title)}</h2><p>{escape(note)}</p>{"".join(parts)}'


def axes_of(found: Found) -> list[str]:
    return list(dict.fromkeys(name for _, record in found for name in record["metrics"]))


def accuracy_cell(record: dict[str, Any], axis: str, settings: EvalSettings, others: Sequence[dict[str, Any]]) -> str:
    m = record["metrics"].get(axis)
    if m is None:
        return "<td></td>"
    gate = gate_axis(record, axis, settings, others) if record["model"] else None
    status = gate.status if gate else NO_TARGET
    kind = "good" if status == GATED else "" if status == NO_TARGET else "warn"
    count = f"{m['n']} x {m['samples']}" if m.get("samples", 1) > 1 else f"{m['n']}"
    small = notes(f"{percent(m['acc_low'])} to {percent(m['acc_high'])}", f"n {count}, cut {percent(m['trunc'])} %")
    return f"<td>{percent(m['acc'])} % {chip(status, kind, gate.reason if gate else '')}{small}</td>"


def accuracy(found: Found, settings: EvalSettings, directory: Path) -> str:
    axes, others = axes_of(found), eval_records(directory / "eval")
    rows = [
        [cell(r["tag"]), *(accuracy_cell(r, axis, settings, others) for axis in axes), cell(f"{r['seconds']:.0f} s")]
        for _, r in found
    ]
    note = (
        "Share of right answers with its 95 % interval (Wilson; by item where an item was sampled several times). An answer "
        "that ran out of tokens is wrong. The gate says whether the harness reproduces what the model's vendor published."
    )
    return section("Accuracy", "accuracy", note, table(["model", *axes, "time"], rows))


def difference_cell(m: Mapping[str, Any] | None) -> str:
    if m is None:
        return "<td></td>"
    kind = {"gain": "good", "loss": "bad"}.get(m["verdict"], "")
    low, high = 100 * m["difference_low"], 100 * m["difference_high"]
    detectable = "" if kind else f", detectable {percent(m['minimum_detectable'])}"
    counts = f"lost {m['lost']}, won {m['won']}, p {m['p']:.2g}"
    shown = chip(m["verdict"], kind)
    return f"<td>{100 * m['difference']:+.1f} {shown}{notes(f'{low:+.1f} to {high:+.1f}{detectable}', counts)}</td>"


def differences(found: Found) -> str:
    axes = axes_of(found)
    rows = []
    for _, record in found:
        teacher = f"teacher {record['teacher']}" if record.get("teacher") else ""
        cells = (difference_cell(record["metrics"].get(axis)) for axis in axes)
        rows.append([cell(record["base"], f"-> {record['other']}", teacher), *cells])
    note = (
        "Change in accuracy, in percentage points, from the first model to the second on the same items, with its paired "
        "bootstrap interval and McNemar's exact p. A verdict is given only when the interval excludes zero."
    )
    return section("Differences", "differences", note, table(["models", *axes], rows))


def fidelity(found: Found) -> str:
    rows = []
    for _, record in found:
        m, kl = record["metrics"], record["metrics"].get("kl")
        values = [f"{kl['mean']:.5f}", f"{kl['p99']:.4f}", f"{kl['p99_9']:.4f}", percent(kl["top1"], 2)] if kl else [""] * 4
        rows.append(
            [cell(record["tag"]), cell(f"{m['ppl']:.4f}" if "ppl" in m else ""), *map(cell, values), cell(f"{m['tokens']:,}")]
        )
    head = ["model", "perplexity", "mean KL", "99 %", "99.9 %", "same top token, %", "tokens"]
    note = "KL divergence to the original over the whole vocabulary, in nats, on held-out transcripts."
    return section("Fidelity", "fidelity", note, table(head, rows))


def sizes(found: Found) -> str:
    rows = []
    for _, record in found:
        m = record["metrics"]
        bits = (f"{m[key]:.2f}" for key in ("weight_bits", "stored_bits", "overall_bits"))
        rows.append(
            [cell(record["tag"]), cell(method_of(record)), cell(f"{m['packed_bytes'] / 1e6:,.2f} MB"), *map(cell, bits)]
        )
    note = "Bytes if packed; bits of the quantized tensors without and with their scales, and of the whole model."
    return section("Sizes", "sizes", note, table(["model", "method", "packed", "weight bits", "stored bits", "overall"], rows))


def sizes_by_tag(quantized: Found) -> dict[str, tuple[float, str]]:
    """{tag: (packed megabytes, method)}."""
    return {r["tag"]: (r["metrics"]["packed_bytes"] / 1e6, method_of(r)) for _, r in quantized}


def size_of(record: Mapping[str, Any], packed: Mapping[str, tuple[float, str]]) -> tuple[float, str] | None:
    """(megabytes, name of its series) of the model that a record is about: packed, a GGUF file, or an original."""
    model = record["model"] or {}
    if file := model if model.get("format") == "gguf" else model.get("decoded_from"):
        return file["bytes"] / 1e6, "gguf"
    if record["tag"] in packed:
        return packed[record["tag"]]
    return (model["bytes"] / 1e6, "original") if "bytes" in model and is_original(record) else None


def kl_plots(kls: Found, packed: Mapping[str, tuple[float, str]]) -> str:
    """Mean KL against megabytes, one colour a method; a plot of its own for every text on which KL was taken."""
    texts: dict[str, dict[str, list[Point]]] = {}
    for _, r in kls:
        size, mean = size_of(r, packed), r["metrics"].get("kl", {}).get("mean", 0)
        if size and mean > 0 and size[1] != "original":
            text = texts.setdefault(f"{r['data'][0]['name']}, {r['metrics']['tokens']:,} tokens" if r["data"] else "", {})
            text.setdefault(size[1], []).append(Point(size[0], mean, f"{r['tag']}: {size[0]:.2f} MB, KL {mean:.5f}"))
    figures = []
    for text, points in texts.items():
        series = [Series(name, own, line=name != "gguf") for name, own in points.items()]
        plot = scatter(series, "packed size, MB", "mean KL to the original, nats", log_y=True)
        figures.append(f"<figure><figcaption>KL against bytes ({escape(text)})</figcaption>{plot}</figure>")
    return "".join(figures)


def accuracy_plot(evaluated: Found, packed: Mapping[str, tuple[float, str]]) -> str:
    """Accuracy against megabytes, one colour a benchmark; the original at the size of its files."""
    points: dict[str, list[Point]] = {}
    for _, r in evaluated:
        size = size_of(r, packed)
        for axis, m in r["metrics"].items() if size else ():
            title = f"{r['tag']}, {axis}: {size[0]:.2f} MB, {percent(m['acc'])} %"
            bar = (100 * m["acc_low"], 100 * m["acc_high"])
            points.setdefault(axis, []).append(Point(size[0], 100 * m["acc"], title, *bar))
    if not points:
        return ""
    lows = [point.low for own in points.values() for point in own if point.y >= 50]
    floor = 5.0 * (min(lows) // 5) if lows else 0.0  # models that lost everything must not flatten the others
    plot = scatter(
        [Series(name, own) for name, own in points.items()], "packed size, MB", "accuracy, %", log_x=True, floor=floor
    )
    foot = f" (triangles: below {floor:g} %)" if any(p.y < floor for own in points.values() for p in own) else ""
    return f"<figure><figcaption>Accuracy against bytes{foot}</figcaption>{plot}</figure>"


def runs(found: Found) -> str:
    rows = []
    for _, r in found:
        commit = (r["code"]["commit"] or "")[:10] + (" changed" if r["code"]["dirty"] else "")
        command = f'<td class="text command">{escape(shlex.join(r["command"]))}</td>'
        rows.append(
            [cell(r["tag"]), cell(r["kind"]), cell(r["started"][:10]), cell(f"{r['seconds']:,.0f} s"), cell(commit), command]
        )
    listed = table(["tag", "kind", "day", "time", "commit", "command"], rows)
    folded = f"<details><summary>{len(rows)} records and their commands</summary>{listed}</details>"
    return section("Runs", "runs", "Every record behind this page.", folded)


def readable(names: Sequence[str], data_dir: Path | None) -> list[Benchmark]:
    """Those of the named benchmarks that can be read here without a network: what is generated, and files of ``data_dir``."""
    own = {task.name for task in (*TINY_TASKS, *TINY_VISION_TASKS)}
    chosen = [name for name in names if name in own or data_dir]
    return recorded_benchmarks(chosen, data_dir) if chosen else []


def questions(loaded: Sequence[Benchmark]) -> dict[tuple[str, str], Question]:
    """{(benchmark, item id): what was asked}."""
    return {
        (benchmark.name, item.id): (item.question, pictures_of(benchmark.messages(item)))
        for benchmark in loaded
        for item in benchmark.load()
    }


def shown_pictures(pictures: Sequence[Picture]) -> list[str]:
    """The pictures of a question as the page holds them; large ones are left out."""
    if sum(len(picture.data) for picture in pictures) > PICTURE_BYTES:
        return []
    return [picture.data_uri() for picture in pictures]


def chosen_rows(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """At most EACH rows of one benchmark: wrong and right in turn, each in the order of the items."""
    ordered = sorted(rows, key=lambda row: (row["id"], row.get("sample", 0)))
    wrong, right = ([row for row in ordered if row["correct"] is verdict] for verdict in (False, True))
    return [row for pair in zip_longest(wrong, right) for row in pair if row is not None][:EACH]


def sample_entries(tag: str, path: Path, asked: Mapping[tuple[str, str], Question]) -> Iterator[list[dict[str, Any]]]:
    """For each benchmark of one log the samples that the page may show."""
    grouped: dict[str, list[dict[str, Any]]] = {}
    for row in read_samples(path)[1]:
        grouped.setdefault(row["benchmark"], []).append(row)
    for name, rows in grouped.items():
        yield [
            {
                "tag": tag,
                "benchmark": name,
                "id": row["id"] + (f" sample {row['sample']}" if row.get("sample") else ""),
                "question": asked.get((name, row["id"]), NOT_READ)[0],
                "pictures": shown_pictures(asked.get((name, row["id"]), NOT_READ)[1]),
                "text": row["text"] if len(row["text"]) <= CLIP else row["text"][:CLIP] + "\n[cut here]",
                "extracted": row["extracted"],
                "gold": row["gold"],
                "correct": row["correct"],
                "finish": row["finish_reason"],
                "tokens": row["tokens"],
            }
            for row in chosen_rows(rows)
        ]


def samples(found: Found, directory: Path, asked: Mapping[tuple[str, str], Question]) -> list[dict[str, Any]]:
    """The samples of all evaluations, one of each benchmark of each evaluation in turn until SAMPLE_BYTES are full."""
    groups = []
    for file, record in found:
        log = find_log((directory / file).parent / str(record.get("samples")))
        if log.is_file():
            groups += sample_entries(record["tag"], log, asked)
    kept, used = set(), 0
    for turn in zip_longest(*[[(g, i) for i in range(len(group))] for g, group in enumerate(groups)]):
        for place in filter(None, turn):
            used += len(json.dumps(groups[place[0]][place[1]]))
            if used <= SAMPLE_BYTES:
                kept.add(place)
    return [entry for g, group in enumerate(groups) for i, entry in enumerate(group) if (g, i) in kept]


def script_json(value: Any) -> str:
    """JSON that cannot end the script element that holds it."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")


def body(directory: Path, settings: EvalSettings) -> str:
    """The page up to the samples: title, plots, tables. A kind of record that is missing has no section."""
    found = {kind: records(directory, kind) for kind in ("eval", "compare", "kl", "quantize")}
    everything = sorted((pair for own in found.values() for pair in own), key=lambda pair: pair[1]["started"])
    if not everything:
        raise UserError(f"{directory}: holds no record; bash pipelines/eval.sh --model DIR --tag TAG makes one")
    packed = sizes_by_tag(found["quantize"])
    plots = kl_plots(found["kl"], packed) + accuracy_plot(found["eval"], packed)
    parts = [
        section("Against bytes", "plots", "Hold the pointer over a mark for its record.", f'<div class="plots">{plots}</div>')
        if plots else "",
        accuracy(found["eval"], settings, directory) if found["eval"] else "",
        differences(found["compare"]) if found["compare"] else "",
        fidelity(found["kl"]) if found["kl"] else "",
        sizes(found["quantize"]) if found["quantize"] else "",
        runs(everything),
    ]  # fmt: skip
    anchors = ["plots", "accuracy", "differences", "fidelity", "sizes", "runs", "samples"]
    links = "".join(f'<a href="#{anchor}">{anchor}</a>' for anchor in anchors)
    head = "<h1>moe-lowbit: results</h1><p>What was lost, and what that rests on. Made by src/eval/make_report.py.</p>"
    return f"{head}<nav>{links}</nav>{''.join(parts)}"


def page(directory: Path, settings: EvalSettings, data_dir: Path | None = None) -> str:
    """The whole report."""
    evaluated = records(directory, "eval")
    shown = samples(evaluated, directory, questions(readable(axes_of(evaluated), data_dir)))
    note = (
        f"{len(shown)} samples, at most {EACH} of each benchmark of an evaluation, wrong and right in turn. The logs have all."
    )
    fills = {"body": body(directory, settings), "samples_note": escape(note), "data": script_json(shown)}
    parts = re.split(
        r"\{\{(\w+)\}\}", TEMPLATE.read_text(encoding="utf-8")
    )  # text, name, text, ...: nothing is filled in twice
    return "".join(fills[part] if place % 2 else part for place, part in enumerate(parts))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--results", type=Path, default=Path("results"), help="folder of the records (default results)")
    parser.add_argument("--data-dir", type=Path, help="files of the benchmarks, for the questions beside the samples")
    args = parser.parse_args()
    made, out = page(args.results, load_settings(), args.data_dir), args.results / "report.html"
    with atomic_path(out) as temporary:
        temporary.write_text(made, encoding="utf-8")
    print(f"wrote {out}: {len(made.encode()) / 1e6:.2f} MB", flush=True)


if __name__ == "__main__":
    run_cli(main)
