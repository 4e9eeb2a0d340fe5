"""Draw the README's picture and those of the documents from the records: python src/eval/page_plots.py

docs/razor_tiny_gguf.png: KL of GGUF files against their size, ours beside those of llama-quantize with the same types, and KL
of the integer grids at 3 bits. docs/razor_tiny_methods.png: KL against packed bytes for every quantized razor-tiny that has
both records. A picture without records is not drawn.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from console import UserError, atomic_path, run_cli
from page_tables import made_of, method_of, records

COLORS = ("#888888", "#0b6e99", "#d1495b")


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


def drawing(width: float, height: float, columns: int = 1) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, [figure.add_subplot(1, columns, place) for place in range(1, columns + 1)]


def tags_kl(results: Path) -> dict[str, dict[str, Any]]:
    """{tag: what moe_eval measured of its KL}."""
    return {r["tag"]: r["metrics"]["kl"] for _, r in records(results, "kl") if "kl" in r["metrics"]}


def methods_picture(results: Path, path: Path) -> None:
    """KL (mean, and the 99.9th percentile above it) against packed bytes, one colour a method."""
    kl = tags_kl(results)
    made = [r for r in quantized(results) if r["tag"] in kl]
    figure, (axes,) = drawing(9, 4.5)
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


GGUF_METHODS = {"llama-quantize": "llama-quantize, imatrix", "nearest": "ours, nearest", "ldlq": "ours, error feedback"}


def gguf_points(results: Path) -> dict[str, dict[str, tuple[float, float, float]]]:
    """{method: {base type: (MB, mean KL, 99.9 % KL)}} of the types that llama-quantize has a file of; ours are those with its
    type of every tensor, the least KL where there are several."""
    kl = {r["tag"]: r["metrics"]["tool"] for _, r in records(results, "kl") if "tool" in r["metrics"]}
    made = [r for _, r in records(results, "pack") if r["tag"] in kl and r["recipe"]["method"] in GGUF_METHODS]
    types = {r["recipe"]["base_type"]: r["recipe"]["types"] for r in made if r["recipe"]["method"] == "llama-quantize"}
    found: dict[str, dict[str, tuple[float, float, float]]] = {method: {} for method in GGUF_METHODS}
    for record in made:
        kind, size, judged = record["recipe"]["base_type"], record["metrics"]["file_bytes"], kl[record["tag"]]
        if types.get(kind) == record["recipe"]["types"]:
            own = found[record["recipe"]["method"]]
            point = (size / 1e6, judged["mean"], judged["p99_9"])
            own[kind] = min(own.get(kind, point), point, key=lambda values: values[1])
    return found


def gguf_picture(results: Path, path: Path) -> None:
    """On the left KL against the size of the file, a line a method; on the right KL of each method of int3 experts."""
    figure, (left, right) = drawing(10, 3.8, 2)
    for color, (method, points_of) in zip(COLORS, gguf_points(results).items()):
        own = sorted(points_of.items(), key=lambda item: item[1])
        left.plot([p[0] for _, p in own], [p[1] for _, p in own], "o-", ms=5, lw=1.2, color=color, label=GGUF_METHODS[method])
        if method == "llama-quantize":
            for kind, (size, mean, _) in own:
                left.annotate(kind.upper(), (size, mean), xytext=(5, 5), textcoords="offset points", fontsize=8)
    left.set(yscale="log", xlabel="size of the GGUF, MB", ylabel="mean KL to the original, nats")
    left.legend(frameon=False, fontsize=8)
    kl = tags_kl(results)
    bars = {}
    for record in quantized(results):
        recipe, tag = record["recipe"], record["tag"]
        uniform = recipe["expert_bits"] == 3 and not recipe.get("experts") and not recipe.get("overrides")
        if tag in kl and uniform:
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
    parser.add_argument("--out", type=Path, default=Path("docs"), help="directory of the pictures (default docs)")
    args = parser.parse_args()
    made, packed = quantized(args.results), records(args.results, "pack")
    if not made and not packed:
        raise UserError(f"{args.results}: holds no record to draw")
    if packed:
        gguf_picture(args.results, args.out / "razor_tiny_gguf.png")
    if made:
        methods_picture(args.results, args.out / "razor_tiny_methods.png")


if __name__ == "__main__":
    run_cli(main)
