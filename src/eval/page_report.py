"""Write results/report.html and the documents' pictures from the records: python src/eval/page_report.py [--results results]

One page that needs no network: the tables of RESULTS.md, accuracy with its intervals and the gate, how reasoning drifts, the KL
panel with its floor, plots of them and of KL and accuracy against bytes, and samples to browse. All text of a model is escaped
or set as text. The questions beside the samples come from the generated tiny tasks and, with --data-dir DIR, from benchmarks
whose files lie there. Where docs/ lies beside the records: docs/razor_tiny_gguf.png, KL of GGUF files against their size, ours
beside those of llama-quantize with the same types, and KL of the integer grids at 3 bits; docs/razor_tiny_methods.png, KL
against packed bytes for every quantized razor-tiny that has both records.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import math
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
from matplotlib.figure import Figure

from console import UserError, atomic_path, run_cli
from eval_settings import EvalSettings, gate_axis, load_settings
from page_tables import Cell, Found, Record, Section, accuracy, axes_of, made_of, method_of, percent, records, sections
from pictures import pictures_of
from reasoning import MEASURES, described, direction
from records import is_original
from runner import recorded_benchmarks
from sample_log import find_log, read_evaluation
from tasks_tiny import TINY_TASKS, TINY_VISION_TASKS

TEMPLATE = "report_template.html"
SAMPLE_BYTES = 2_000_000  # of all samples on the page; the rest of it is far smaller
EACH = 40  # samples of one benchmark of one evaluation at most, half of them wrong where there are so many
CLIP = 6000  # characters of one answer
PICTURE_BYTES = 20_000  # of the pictures of one question
CHIPS = {"gated": "good", "no target": ""}
FOREST = 6  # pairs in the plot of lengths
COLORS = ("#888888", "#0b6e99", "#d1495b")
GGUF_METHODS = {"llama-quantize": "llama-quantize, imatrix", "nearest": "ours, nearest", "ldlq": "ours, error feedback"}
Question = tuple[str | None, Sequence[str]]  # and its pictures as data URIs
Bar = tuple[str, float, tuple[float, float] | None, str]  # row, value, its interval, what the pointer shows
Points = dict[str, list[tuple[float, float, str]]]  # name of a series: (x, y, what the pointer shows)


# ---------------------------------------------------------------- plots


def svg(figure: Figure, titles: Mapping[str, str]) -> str:
    """The figure as an element of a page. ``titles``: what the pointer shows over the mark of that gid."""
    out = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": next(iter(titles))}):
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>| xmlns(:\w+)?=\"[^\"]*\"", "", out.getvalue(), flags=re.S)
    text = re.sub(
        r'<g id="([^"]+)">', lambda m: f"{m[0]}<title>{escape(titles[m[1]])}</title>" if m[1] in titles else m[0], text
    )
    return text[text.index("<svg") :]


def scatter(points: Points, name: str, y_label: str, *, lines: bool = False, bars: Mapping[str, tuple[float, float]] = {},
            **axis: Any) -> str:  # fmt: skip
    """Marks of every series against megabytes; ``name``: of the plot, and unlike that of any other on the page. ``bars``: the
    interval of a mark, by its title; series that have them stand side by side. ``axis``: as of matplotlib's Axes.set."""
    figure = Figure(figsize=(5.2, 3.9), layout="constrained")
    axes, titles = figure.add_subplot(), {}
    floor = axis.get("ylim", (None,))[0]
    for index, (series, own) in enumerate(points.items()):
        own, color = sorted(own), matplotlib.colormaps["tab20"](index % 20)
        apart = 1 + 0.012 * (index - (len(points) - 1) / 2) if bars else 1.0
        axes.plot([], [], "o", color=color, label=series)
        if lines and series != "gguf":
            axes.plot([x for x, _, _ in own], [y for _, y, _ in own], lw=1.2, alpha=0.55, color=color)
        for x, y, title in own:
            gid, below = f"{name}-{len(titles)}", floor is not None and y < floor
            titles[gid], marker = title, "^" if below else "o"
            shown = floor if below else y
            axes.scatter(x * apart, shown, 26, color=color, marker=marker, gid=gid, clip_on=False, zorder=3)
            if title in bars and not below:
                axes.plot([x * apart] * 2, bars[title], lw=1.4, alpha=0.6, color=color)
    axes.set(xlabel="packed size, MB", ylabel=y_label, **axis)
    if axis.get("xscale") == "log":
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter("{x:g}")
    plain(axes)
    figure.legend(loc="outside lower center", ncols=3 if max(map(len, points)) < 20 else 2, frameon=False, fontsize=8.5)
    return svg(figure, titles)


def plain(axes: Any) -> None:
    axes.tick_params(which="both", color="#888888")
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#888888")
    axes.grid(alpha=0.25, color="#888888")


def forest(series: Mapping[str, Sequence[Bar]], name: str, **axis: Any) -> str:
    """A value with its interval for each row, from above; the bars of several series lie side by side in their row. A bar
    without an interval is a tick."""
    rows = list(dict.fromkeys(row for bars in series.values() for row, *_ in bars))
    figure = Figure(figsize=(5.2, 1.4 + 0.15 * len(rows) * (1 + len(series))), layout="constrained")
    axes, titles = figure.add_subplot(), {}
    for index, (label, bars) in enumerate(series.items()):
        color, apart = matplotlib.colormaps["tab20"](index % 20), 0.7 * ((index + 0.5) / len(series) - 0.5)
        axes.plot([], [], "o", color=color, label=label)
        for row, value, ends, title in bars:
            gid, place = f"{name}-{len(titles)}", rows.index(row) + apart
            titles[gid] = title
            axes.scatter(value, place, 26, color=color if ends else "#888888", marker="o" if ends else "|", gid=gid, zorder=3)
            if ends:
                axes.plot(ends, [place] * 2, lw=1.4, alpha=0.6, color=color)
    axes.set(yticks=range(len(rows)), yticklabels=rows, ylim=(len(rows) - 0.5, -0.5), **axis)
    if axes.get_xscale() == "linear":
        axes.locator_params("x", nbins=4)
    plain(axes)
    figure.legend(loc="outside lower center", ncols=2 if max(map(len, series)) < 25 else 1, frameon=False, fontsize=8.5)
    return svg(figure, titles)


def size_of(record: Record, packed: Mapping[str, tuple[float, str]]) -> tuple[float, str] | None:
    """(megabytes, name of its series) of the model that a record is about: packed, a GGUF file, or an original."""
    model = record["model"] or {}
    if file := model if model.get("format") == "gguf" else model.get("decoded_from"):
        return file["bytes"] / 1e6, "gguf"
    if record["tag"] in packed:
        return packed[record["tag"]]
    return (model["bytes"] / 1e6, "original") if "bytes" in model and is_original(record) else None


def kl_plots(kls: Found, packed: Mapping[str, tuple[float, str]]) -> Iterator[dict[str, str]]:
    """Mean KL against megabytes, one colour a method; a plot for every text on which KL was taken, most models first."""
    texts: dict[str, Points] = {}
    for _, r in kls:
        size, mean = size_of(r, packed), r["metrics"].get("kl", {}).get("mean", 0)
        if size and mean > 0 and size[1] != "original":
            points = texts.setdefault(f"{r['data'][0]['name']}, {r['metrics']['tokens']:,} tokens" if r["data"] else "", {})
            points.setdefault(size[1], []).append((size[0], mean, f"{r['tag']}: {size[0]:.2f} MB, KL {mean:.5f}"))
    for number, (text, own) in enumerate(sorted(texts.items(), key=lambda text: -sum(map(len, text[1].values())))):
        plot = scatter(own, f"kl{number}", "mean KL to the original, nats", lines=True, yscale="log")
        yield {"title": f"KL against bytes ({text})", "svg": plot}


def accuracy_plot(evaluated: Found, packed: Mapping[str, tuple[float, str]]) -> Iterator[dict[str, str]]:
    """Accuracy against megabytes, one colour a benchmark; the original at the size of its files."""
    points: Points = {}
    bars: dict[str, tuple[float, float]] = {}
    for _, r in evaluated:
        size = size_of(r, packed)
        for axis, m in r["metrics"].items() if size else ():
            title = f"{r['tag']}, {axis}: {size[0]:.2f} MB, {percent(m['acc'])} %"
            bars[title] = (100 * m["acc_low"], 100 * m["acc_high"])
            points.setdefault(axis, []).append((size[0], 100 * m["acc"], title))
    if not points:
        return
    lows = [bars[title][0] for own in points.values() for _, y, title in own if y >= 50]
    floor = 5.0 * (min(lows) // 5) if lows else 0.0  # models that lost everything must not flatten the others
    foot = f" (triangles: below {floor:g} %)" if any(y < floor for own in points.values() for _, y, _ in own) else ""
    plot = scatter(points, "accuracy", "accuracy, %", bars=bars, xscale="log", ylim=(floor, 101))
    yield {"title": f"Accuracy against bytes{foot}", "svg": plot}


# ---------------------------------------------------------------- reasoning, the panel


def drifts(found: Found) -> dict[tuple[str, str], dict[str, Any]]:
    """{(pair of models, benchmark): how the second reasons} of the comparisons whose record tells it."""
    made: dict[tuple[str, str], dict[str, Any]] = {}
    for _, r in found:
        for axis, m in r["metrics"].items():
            to_teacher = [(r.get("teacher"), r[role], m.get(f"{role}_to_teacher", {})) for role in ("base", "other")]
            for base, other, own in ((r["base"], r["other"], m), *to_teacher):
                if "reasoning" in own:
                    made[f"{base} -> {other}", axis] = own["reasoning"]
    return made


def reasoning(found: Found) -> Iterator[Section]:
    """One row a benchmark of a comparison."""
    rows = []
    for (pair, axis), made in drifts(found).items():
        cells = [Cell(pair), Cell(axis), Cell(f"{made['length']['n']}" if made["length"] else "")]
        for name in MEASURES:
            values, change = described(name, m := made[name])
            first, _, interval = change.partition(" [")
            way = direction(m)
            chip = (way, "warn" if way == "more" else "good", "the interval excludes no change") if way else None
            cells.append(Cell(first, small=(values, f"[{interval}"), chip=chip) if m else Cell(values))
        rows.append(cells)
    if rows:
        note = (
            "The change from the first model to the second on the same items: of the length the ratio, of the others the "
            "difference, with its 95 % paired interval. Right, not emitted: no final answer, though a line states a right one. "
            "Waits: words of self-correction. What a log lacks is not recorded; no log tells how a program would be judged."
        )
        heads = ["models", "benchmark", "items", *(heading for heading, *_ in MEASURES.values())]
        yield Section("Reasoning", note, heads, rows, found)


def reasoning_plot(found: Found) -> Iterator[dict[str, str]]:
    """Ratios of lengths of the pairs with the largest changes."""
    pairs: dict[str, list[Bar]] = {}
    for (pair, axis), made in drifts(found).items():
        if (m := made["length"]) and m.get("ratio"):
            title = f"{pair}, {axis}: {', '.join(described('length', m))}"
            pairs.setdefault(pair, []).append((axis, m["ratio"], (m["ratio_low"], m["ratio_high"]), title))
    largest = sorted(pairs, key=lambda pair: -max(abs(math.log(bar[1])) for bar in pairs[pair]))[:FOREST]
    if largest:
        plot = forest(
            {pair: pairs[pair] for pair in largest}, "lengths", xlabel="length of the answers, times the first model's"
        )
        yield {"title": f"Longer or shorter reasoning (largest changes, {len(largest)} of {len(pairs)} pairs)", "svg": plot}


def panel_plots(found: Found) -> Iterator[dict[str, str]]:
    """Mean KL by stratum and the floor below which nothing is claimed, a plot for every panel."""
    judged: dict[str, tuple[str, dict[str, list[Bar]]]] = {}
    for _, r in found:
        original = Path(str((r["reference"] or {}).get("path", ""))).name
        bars = judged.setdefault(r["panel"]["sha256"], (original, {}))[1].setdefault(r["tag"], [])
        for name, m in r["metrics"]["strata"].items():
            row = name.replace("_", " ")
            title = f"{r['tag']}, {row}: {m['mean']:.5f} ({m['low']:.5f} to {m['high']:.5f}), floor {m['floor']:.6f}"
            bars += [(row, m["mean"], (m["low"], m["high"]), title), (row, m["floor"], None, title)]
    for number, (original, series) in enumerate(judged.values()):
        plot = forest(series, f"panel{number}", xscale="log", xlabel="mean KL, nats; grey ticks: the floor")
        yield {"title": f"KL panel of {original}", "svg": plot}


# ---------------------------------------------------------------- samples


def questions(names: Sequence[str], data_dir: Path | None) -> dict[tuple[str, str], Question]:
    """{(benchmark, item id): what was asked} of those that can be read here without a network: what is generated, and files of
    ``data_dir``. Large pictures are left out."""
    own = {task.name for task in (*TINY_TASKS, *TINY_VISION_TASKS)}
    asked: dict[tuple[str, str], Question] = {}
    chosen = [name for name in names if name in own or data_dir]
    for benchmark in recorded_benchmarks(chosen, data_dir) if chosen else ():
        for item in benchmark.load():
            pictures = pictures_of(benchmark.messages(item))
            small = sum(len(picture.data) for picture in pictures) <= PICTURE_BYTES
            asked[benchmark.name, item.id] = item.question, [picture.data_uri() for picture in pictures if small]
    return asked


def chosen_rows(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """At most EACH rows of one benchmark: wrong and right in turn, each in the order of the items."""
    ordered = sorted(rows, key=lambda row: (row["id"], row.get("sample", 0)))
    wrong, right = ([row for row in ordered if row["correct"] is verdict] for verdict in (False, True))
    return [row for pair in itertools.zip_longest(wrong, right) for row in pair if row is not None][:EACH]


def sample_entries(tag: str, result: Path, asked: Mapping[tuple[str, str], Question]) -> Iterator[list[dict[str, Any]]]:
    """For each benchmark of one log the samples that the page may show."""
    grouped: dict[str, list[dict[str, Any]]] = {}
    for row in read_evaluation(result)[2]:
        grouped.setdefault(row["benchmark"], []).append(row)
    for name, rows in grouped.items():
        entries = []
        for row in chosen_rows(rows):
            question, pictures = asked.get((name, row["id"]), (None, []))
            entry = {"tag": tag, "id": row["id"] + (f" sample {row['sample']}" if row.get("sample") else "")}
            entry |= {"question": question, "pictures": pictures, "finish": row["finish_reason"]}
            entry |= {"text": row["text"] if len(row["text"]) <= CLIP else row["text"][:CLIP] + "\n[cut here]"}
            entries.append(entry | {key: row[key] for key in ("benchmark", "extracted", "gold", "correct", "tokens")})
        yield entries


def samples(found: Found, directory: Path, asked: Mapping[tuple[str, str], Question]) -> list[dict[str, Any]]:
    """The samples of all evaluations, one of each benchmark of each evaluation in turn until SAMPLE_BYTES are full."""
    groups = []
    for file, record in found:
        log = find_log((directory / file).parent / str(record.get("samples")))
        if log.is_file():
            groups += sample_entries(record["tag"], directory / file, asked)
    turns = sorted((i, g) for g, group in enumerate(groups) for i in range(len(group)))
    used = itertools.accumulate(len(json.dumps(groups[g][i])) for i, g in turns)
    kept = {place for place, total in zip(turns, used) if total <= SAMPLE_BYTES}
    return [entry for g, group in enumerate(groups) for i, entry in enumerate(group) if (i, g) in kept]


def script_json(value: Any) -> str:
    """JSON that cannot end the script element that holds it."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")


def page(directory: Path, settings: EvalSettings, data_dir: Path | None = None) -> str:
    """The whole report."""
    found = {kind: records(directory, kind) for kind in ("eval", "kl", "quantize", "compare", "panel")}
    evaluated = [r for _, r in found["eval"] if r["model"]]

    def gate(record: Record, axis: str) -> tuple[str, str, str] | None:
        if not record["model"]:
            return None
        judged = gate_axis(record, axis, settings, evaluated)
        return judged.status, CHIPS.get(judged.status, "warn"), judged.reason

    tables: list[Section] = sections(directory, lambda own: accuracy(own, gate))
    place = 1 + max((i for i, table in enumerate(tables) if table.title in ("Accuracy", "Differences")), default=-1)
    tables[place:place] = [*reasoning(found["compare"])]
    if not tables:
        raise UserError(f"{directory}: holds no record; bash pipelines/eval.sh --model DIR --tag TAG makes one")
    packed = {r["tag"]: (r["metrics"]["packed_bytes"] / 1e6, method_of(r)) for _, r in found["quantize"]}
    runs = {file: record for table in tables for file, record in table.found}
    shown = samples(found["eval"], directory, questions(axes_of(found["eval"]), data_dir))
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True)
    environment.filters["command"] = shlex.join
    return environment.get_template(TEMPLATE).render(
        plots=[
            *panel_plots(found["panel"]), *kl_plots(found["kl"], packed), *accuracy_plot(found["eval"], packed),
            *reasoning_plot(found["compare"]),
        ],
        tables=tables,
        runs=sorted(runs.values(), key=lambda record: record["started"]), shown=len(shown), each=EACH, data=script_json(shown),
    )  # fmt: skip


# ---------------------------------------------------------------- the documents' pictures


def quantized(results: Path) -> list[dict[str, Any]]:
    """The records of razor-tiny's quantized checkpoints; razor-tiny-vl has tables of its own."""
    return [r for _, r in records(results, "quantize") if made_of(r)]


def save(figure: Figure, path: Path) -> None:
    for axes in figure.axes:
        axes.grid(alpha=0.25, axis="x" if axes.patches else "both")  # bars have names on the other
        axes.spines[["top", "right"]].set_visible(False)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=130, format="png", metadata={"Software": None})
    print(f"wrote {path}", flush=True)


def tags_kl(results: Path) -> dict[str, dict[str, Any]]:
    """{tag: its KL}."""
    return {r["tag"]: r["metrics"]["kl"] for _, r in records(results, "kl") if "kl" in r["metrics"]}


def methods_picture(results: Path, path: Path) -> None:
    """KL (mean, and the 99.9th percentile above it) against packed bytes, one colour a method."""
    kl = tags_kl(results)
    made = [r for r in quantized(results) if r["tag"] in kl]
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.add_subplot()
    palette = matplotlib.colormaps["tab20"]
    names = {record["tag"]: method_of(record) for record in made}
    for index, method in enumerate(dict.fromkeys(names.values())):
        mine = [r for r in made if names[r["tag"]] == method]
        own = sorted(((r["metrics"]["packed_bytes"] / 1e6, kl[r["tag"]]) for r in mine), key=lambda pair: pair[0])
        size = [x for x, _ in own]
        line = "o" if method.endswith("signals") else "o-"
        axes.plot(size, [k["mean"] for _, k in own], line, ms=5, lw=1, color=palette(index), label=method)
        axes.plot(size, [k["p99_9"] for _, k in own], "^", ms=4, alpha=0.45, color=palette(index))
    axes.set(yscale="log", xlabel="packed size, MB", ylabel="KL to BF16, nats: mean (dots), 99.9 % (triangles)")
    axes.legend(frameon=False, fontsize=8, bbox_to_anchor=(1.01, 1), loc="upper left")
    save(figure, path)


def gguf_points(results: Path) -> dict[str, dict[str, tuple[float, float]]]:
    """{method: {base type: (MB, mean KL)}} of the types that llama-quantize has a file of; ours are those with its type of
    every tensor, the least KL where there are several."""
    kl = tags_kl(results)
    made = [r for _, r in records(results, "pack") if r["tag"] in kl and r["recipe"]["method"] in GGUF_METHODS]
    types = {r["recipe"]["base_type"]: r["recipe"]["types"] for r in made if r["recipe"]["method"] == "llama-quantize"}
    found: dict[str, dict[str, tuple[float, float]]] = {method: {} for method in GGUF_METHODS}
    for record in made:
        kind, own = record["recipe"]["base_type"], found[record["recipe"]["method"]]
        if types.get(kind) == record["recipe"]["types"]:
            point = (record["metrics"]["file_bytes"] / 1e6, kl[record["tag"]]["mean"])
            own[kind] = min(own.get(kind, point), point, key=lambda values: values[1])
    return found


def gguf_picture(results: Path, path: Path) -> None:
    """On the left KL against the size of the file, a line a method; on the right KL of each method of int3 experts."""
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    for color, (method, points_of) in zip(COLORS, gguf_points(results).items()):
        own = sorted(points_of.items(), key=lambda item: item[1])
        left.plot([p[0] for _, p in own], [p[1] for _, p in own], "o-", ms=5, lw=1.2, color=color, label=GGUF_METHODS[method])
        if method == "llama-quantize":
            for kind, point in own:
                left.annotate(kind.upper(), point, xytext=(5, 5), textcoords="offset points", fontsize=8)
    left.set(yscale="log", xlabel="size of the GGUF, MB", ylabel="mean KL to the original, nats")
    left.legend(frameon=False, fontsize=8)
    kl, bars = tags_kl(results), {}
    for record in quantized(results):
        recipe, tag = record["recipe"], record["tag"]
        if tag in kl and recipe["expert_bits"] == 3 and not recipe.get("experts") and not recipe.get("overrides"):
            bars[method_of(record).replace(", ", ",\n")] = kl[tag]["mean"]
    ordered = sorted(bars.items(), key=lambda item: -item[1])
    right.barh([name for name, _ in ordered], [value for _, value in ordered], color=COLORS[1], height=0.6)
    for place, (_, value) in enumerate(ordered):
        right.annotate(f"{value:.4f}", (value, place), xytext=(4, -3), textcoords="offset points", fontsize=8)
    right.set(xlabel="mean KL to the original, nats: int3 experts, int4 rest")
    right.margins(x=0.12)
    save(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--results", type=Path, default=Path("results"), help="folder of the records (default results)")
    parser.add_argument("--data-dir", type=Path, help="files of the benchmarks, for the questions beside the samples")
    args = parser.parse_args()
    made, out = page(args.results, load_settings(), args.data_dir), args.results / "report.html"
    with atomic_path(out) as temporary:
        temporary.write_text(made, encoding="utf-8")
    print(f"wrote {out}: {len(made.encode()) / 1e6:.2f} MB", flush=True)
    docs = args.results.absolute().parent / "docs"
    for kind, draw, name in (("pack", gguf_picture, "gguf"), ("quantize", methods_picture, "methods")):
        if docs.is_dir() and records(args.results, kind):
            draw(args.results, docs / f"razor_tiny_{name}.png")


if __name__ == "__main__":
    run_cli(main)
