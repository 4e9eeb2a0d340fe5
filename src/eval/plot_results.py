"""Draw the README's picture and the training curve from the records: python src/eval/plot_results.py

docs/razor_tiny_bits.png: accuracy (Wilson intervals) and KL to BF16 against the bits of the whole model, for the checkpoints
that were evaluated on the most items. docs/razor_tiny_methods.png: KL against packed bytes for every quantized model that
has both records. docs/razor_tiny_training.png: loss by training tokens. A picture without records is not drawn.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from console import UserError, atomic_path, run_cli
from make_results import records

COLORS = ("#0b6e99", "#d1495b", "#2e8b57", "#b8860b")
BF16_BITS = 16.0


def points(results: Path) -> list[dict[str, Any]]:
    """One entry a checkpoint that was evaluated on as many items as any: tag, bits of the whole model, accuracies, KL (None
    for BF16). GGUF files have tables of their own; those of fewer items would crowd the picture."""
    bits = {r["tag"]: r["metrics"]["overall_bits"] for _, r in records(results, "quantize")}
    kl = {r["tag"]: r["metrics"].get("kl", {}).get("mean") for _, r in records(results, "kl")}
    evaluated = [r for _, r in records(results, "eval") if not r["model"]["path"].endswith(".gguf")]
    most = max((m["n"] for r in evaluated for m in r["metrics"].values()), default=0)
    found = [
        {"tag": r["tag"], "bits": bits.get(r["tag"], BF16_BITS), "axes": r["metrics"], "kl": kl.get(r["tag"])}
        for r in evaluated
        if any(m["n"] == most for m in r["metrics"].values())
    ]
    return sorted(found, key=lambda point: point["bits"])


def save(figure: plt.Figure, path: Path) -> None:
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=130, format="png", metadata={"Software": None})
    plt.close(figure)
    print(f"wrote {path}", flush=True)


def bits_picture(found: list[dict[str, Any]], path: Path) -> None:
    """Accuracy on the left, KL (logarithmic) on the right, both against bits a parameter."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), constrained_layout=True)
    names = list(dict.fromkeys(name for point in found for name in point["axes"]))
    for index, name in enumerate(names):
        has = [point for point in found if name in point["axes"]]
        metrics = [point["axes"][name] for point in has]
        acc = [100 * m["acc"] for m in metrics]
        errors = [[100 * (m["acc"] - m["acc_low"]) for m in metrics], [100 * (m["acc_high"] - m["acc"]) for m in metrics]]
        offset = 1 + 0.012 * (index - (len(names) - 1) / 2)  # side by side where records share their bits
        at = [point["bits"] * offset for point in has]
        left.errorbar(at, acc, yerr=errors, fmt="o", ms=4, capsize=2, color=COLORS[index % len(COLORS)], label=name)
    left.set(xscale="log", xlabel="bits per parameter, whole model", ylabel="accuracy, %", ylim=(-3, 103))
    left.legend(frameon=False, fontsize=8)
    measured = [point for point in found if point["kl"] and point["bits"] < BF16_BITS]
    right.plot([p["bits"] for p in measured], [p["kl"] for p in measured], "o", color="#333333")
    for point in measured:
        worst = max(other["kl"] for other in measured if abs(other["bits"] - point["bits"]) < 0.05)
        label = point["tag"].removeprefix("razor_tiny_").replace("_", " ")
        shift = (7, 3) if point["kl"] == worst else (7, -10)  # of two at the same size, one label above, one below
        right.annotate(label, (point["bits"], point["kl"]), xytext=shift, textcoords="offset points", fontsize=8)
    right.set(yscale="log", xlabel="bits per parameter, whole model", ylabel="mean KL to BF16, nats")
    right.margins(x=0.25, y=0.15)
    for axes in (left, right):
        ticks = sorted({round(point["bits"], 1) for point in (found if axes is left else measured)})
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    save(figure, path)


def methods_picture(results: Path, path: Path) -> None:
    """KL (mean, and the 99.9th percentile above it) against packed bytes, one colour a method."""
    kl = {r["tag"]: r["metrics"]["kl"] for _, r in records(results, "kl") if "kl" in r["metrics"]}
    made = [r for _, r in records(results, "quantize") if r["tag"] in kl]
    figure, axes = plt.subplots(figsize=(9, 4.5), constrained_layout=True)
    palette = plt.get_cmap("tab20")
    names = {}
    for record in made:
        recipe = record["recipe"]
        method = "absmax" if recipe["clip_steps"] == 1 else recipe["method"]
        names[record["tag"]] = f"{method}, by measured KL" if recipe.get("overrides") else method
        if recipe.get("experts"):
            names[record["tag"]] = f"{method}, by signals"
    for index, method in enumerate(dict.fromkeys(names.values())):
        mine = [r for r in made if names[r["tag"]] == method]
        own = sorted(((r["metrics"]["packed_bytes"] / 1e6, kl[r["tag"]]) for r in mine), key=lambda pair: pair[0])
        size = [x for x, _ in own]
        line = "o" if method.endswith("signals") else "o-"
        axes.plot(size, [k["mean"] for _, k in own], line, ms=5, lw=1, color=palette(index), label=method)
        axes.plot(size, [k["p99_9"] for _, k in own], "^", ms=4, alpha=0.45, color=palette(index))
    axes.set(yscale="log", xlabel="packed size, MB", ylabel="KL to BF16, nats: mean (dots), 99.9 % (triangles)")
    axes.legend(frameon=False, fontsize=8, bbox_to_anchor=(1.01, 1), loc="upper left")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    save(figure, path)


def training_picture(record: dict[str, Any], path: Path) -> None:
    curve, recipe = record["metrics"]["curve"], record["recipe"]
    tokens = [point["step"] * recipe["rows"] * recipe["length"] / 1e6 for point in curve]
    figure, axes = plt.subplots(figsize=(7, 3.5), constrained_layout=True)
    axes.plot(tokens, [point["loss"] for point in curve], color=COLORS[0])
    axes.set(xlabel="training tokens, millions", ylabel="loss, nats per weighted token")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    save(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--results", type=Path, default=Path("results"))
    parser.add_argument("--out", type=Path, default=Path("docs"))
    args = parser.parse_args()
    found, runs = points(args.results), records(args.results, "train")
    if not found and not runs:
        raise UserError(f"{args.results}: holds no record to draw")
    if found:
        bits_picture(found, args.out / "razor_tiny_bits.png")
    if records(args.results, "quantize"):
        methods_picture(args.results, args.out / "razor_tiny_methods.png")
    for _, record in runs:
        training_picture(record, args.out / f"{record['tag']}_training.png")


if __name__ == "__main__":
    run_cli(main)
