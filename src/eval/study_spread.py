"""How much of a GGUF's KL is luck: several calibration texts, each rounded by llama-quantize and by us, in pairs.

    python src/eval/study_spread.py --model models/razor-tiny --base-type IQ2_XS --texts tiny:0 tiny:1 tiny:2 --work W --tag T

Which way a near tie rounds decides whether a rare fact survives, and a few such positions make up the tail of the KL: other
text, or another number of threads, moves the 99.9th percentile by a quarter. Both sides get the same text, the same types
and so the same bytes. Each file is judged by moe_eval, as the checkpoint that it decodes to; its record stays in W, and a
killed run goes on behind the last one.
"""

from __future__ import annotations

import argparse
import re
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from console import UserError, progress, run_cli, run_script
from intervals import paired_ratio
from pack_plan import TypeSettings
from records import add_tag_arguments, describe_model, read_result, tagged_record, write_result
from settings import add_settings

SIDES = ("llama", "ours")
FIGURES = ("mean", "p99", "p99_9")
MOST_APART = 0.001  # of the bytes: what metadata may differ by


def measured(args: argparse.Namespace, text: str, side: str) -> dict[str, Any]:
    """The KL record of a file that ``side`` made with a calibration text."""
    name = re.sub(r"\W", "_", text)
    tag = f"{args.base_type}-{name}-{side}".lower()
    record = args.work / f"{tag}.json"
    if not record.exists():
        out = args.work / f"{side}-{name}"  # the next type takes over llama.cpp's imatrix from there
        made = ["--model", args.model, "--calib", text, "--out", out, "--base-type", args.base_type, "--force"]
        made += ["--tensor-types", args.tensor_types]
        weights = args.work / f"token-weights-{name}.st"
        run_script("src/quant/gguf_pack.py", *made, *(["--reference"] if side == "llama" else ["--token-weights", weights]))
        file = out / f"{args.model.resolve().name}-{args.base_type.upper()}.gguf"
        judged = ["--model", file, "--reference", args.model, "--items", args.items]
        run_script("src/eval/moe_eval.py", *judged, "--tag", tag, "--out", args.work)
    return read_result(record, "kl")


def spread(values: Sequence[Sequence[float]]) -> dict[str, Any]:
    """Mean and standard deviation of each of :data:`SIDES` over the texts, and the second's share of the first."""
    found: dict[str, Any] = {}
    for side, own in zip(SIDES, values, strict=True):
        found[side] = {"mean": statistics.fmean(own), "deviation": statistics.stdev(own), "values": list(own)}
    return found | dict(zip(("ratio", "ratio_low", "ratio_high"), paired_ratio(*values)))


def check_pairs(pairs: Sequence[Sequence[dict[str, Any]]]) -> None:
    """A comparison is at equal bytes and on the same positions, or void."""
    for a, b in pairs:
        sizes = [record["model"]["bytes"] for record in (a, b)]
        if abs(sizes[0] - sizes[1]) > MOST_APART * sizes[0]:
            raise UserError(f"{a['tag']} has {sizes[0]:,} bytes, {b['tag']} {sizes[1]:,}: not the same types")
    if len({(record["data"][0]["sha256"], record.get("judge")) for pair in pairs for record in pair}) > 1:
        raise UserError("the records in --work are of different transcripts or judges; give another --work")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", type=Path, required=True, help="directory of the BF16 model")
    add_settings(parser, TypeSettings)
    parser.set_defaults(tensor_types="configs/gguf_tensor_types_iq3.txt")
    parser.add_argument("--texts", nargs="+", required=True, help="calibration texts, each as --calib of gguf_pack")
    parser.add_argument("--items", type=int, default=640, help="transcripts of each tiny task (default 640)")
    parser.add_argument("--work", type=Path, required=True, help="directory for the files and the record of each")
    add_tag_arguments(parser, "spread")
    args = parser.parse_args()
    if not args.base_type:
        raise UserError("--base-type is missing: IQ3_XXS, Q3_K, ...")
    if not 2 <= len(set(args.texts)) == len(args.texts) <= 10:
        raise UserError(f"--texts {' '.join(args.texts)}: give 2 to 10 different ones")
    result, started = tagged_record(args), time.time()
    model = describe_model(args.model)
    pairs = []
    with progress(2 * len(args.texts), args.base_type, "file") as bar:
        for text in args.texts:
            pairs.append([measured(args, text, side) for side in SIDES])
            bar.update(2)
    check_pairs(pairs)
    metrics = {
        figure: spread([[record["metrics"]["kl"][figure] for record in side] for side in zip(*pairs)]) for figure in FIGURES
    }
    extra = {"base_type": args.base_type.upper(), "texts": len(args.texts), "calibration": args.texts}
    extra |= {"judge": pairs[0][0]["judge"], "positions": pairs[0][0]["metrics"]["tokens"]}
    seconds = sum(record["seconds"] for pair in pairs for record in pair)
    write_result(
        result, kind="spread", tag=args.tag, started=started, seconds=max(seconds, time.time() - started), model=model,
        data=pairs[0][0]["data"], metrics=metrics, extra=extra,
    )  # fmt: skip
    for figure in FIGURES:
        m = metrics[figure]
        shown = ", ".join(f"{side} {m[side]['mean']:.5f} +- {m[side]['deviation']:.5f}" for side in SIDES)
        print(f"{figure:<6} {shown}, share {m['ratio']:.2f} ({m['ratio_low']:.2f} to {m['ratio_high']:.2f})", flush=True)


if __name__ == "__main__":
    run_cli(main)
