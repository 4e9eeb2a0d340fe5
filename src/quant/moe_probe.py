"""What the router does with text, layer by layer: load, mass, salience and cold experts of a checkpoint.

    python src/quant/moe_probe.py --model models/razor-tiny [--calib TEXT] [--imatrix work/imatrix.gguf]
        [--result results/probe/T.json --tag T]

One decoder layer is in memory at a time. Per expert: frequency (share of assignments), router mass (share of the summed
routing weights), activation salience (share of the summed squared inputs of its down projection, weighted by the square of
the routing weight). Per layer: normalised entropy of the frequency (1 is even), the least and greatest load relative to the
mean, experts never routed to and experts with fewer effective tokens than inputs, and how alike the three rankings are.
--imatrix also writes llama.cpp's importance matrix, with experts' inputs weighted by the square of their routing weight.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from calibration import Calibration, Collector, LayerStream
from calibration_text import add_calibration_arguments, calibration_of
from checkpoint import Checkpoint
from console import UserError, progress, run_cli
from families import text_config
from gguf_layout import head_order
from imatrix import Entry, entries_of, write_imatrix
from records import add_record_arguments, check_record_arguments, describe_model, write_result


def rank_correlation(a: Tensor, b: Tensor) -> float:
    """Spearman's rank correlation of two vectors; 1 when there is nothing to order."""
    if len(a) < 2:
        return 1.0
    ranks = [value.argsort().argsort().double() for value in (a, b)]
    return torch.corrcoef(torch.stack(ranks))[0, 1].item()


def layer_report(routed: Tensor, mass: Tensor, energy: Tensor, tokens: Tensor, inputs: int) -> dict[str, Any]:
    """The report of one layer from assignments, routing weights, down-input energy and effective tokens, all [E]."""
    frequency, mass, salience = (value.double().cpu() / value.sum().double().cpu() for value in (routed, mass, energy))
    entropy = -(frequency * frequency.clamp_min(1e-300).log()).sum().item() / math.log(max(2, len(frequency)))
    return {
        "experts": len(frequency),
        "entropy": entropy,
        "min_load": frequency.min().item() * len(frequency),
        "max_load": frequency.max().item() * len(frequency),
        "never_routed": int((routed == 0).sum()),
        "cold": int((tokens < inputs).sum()),
        "rank_frequency_mass": rank_correlation(frequency, mass),
        "rank_frequency_salience": rank_correlation(frequency, salience),
        "frequency": [round(value, 6) for value in frequency.tolist()],
        "mass": [round(value, 6) for value in mass.tolist()],
        "salience": [round(value, 6) for value in salience.tolist()],
    }


@torch.no_grad()
def probe(
    checkpoint: Checkpoint, calibration: Calibration, every_linear: bool = False
) -> tuple[dict[str, dict[str, Any]], dict[str, Entry]]:
    """(report of every decoder layer that has routed experts, by its index; the importance of each weight, by llama.cpp's
    names: of the experts, or of ``every_linear``)."""
    stream = LayerStream(checkpoint, calibration.device, calibration.dtype)
    config = text_config(checkpoint.config)
    order = head_order(config, config.get("linear_value_head_dim", 1))
    kwargs = stream.arguments(calibration.batches()[0])
    hidden = stream.embed(calibration.batches())
    reports, importance = {}, {}
    with progress(len(stream.layers), "probe", "layer") as bar:
        for index, layer in enumerate(stream.layers):
            stream.fill(layer, f"model.layers.{index}.")
            experts = {name for name, p in layer.named_parameters() if p.ndim == 3 and ".experts." in name}
            linears = {f"{name}.weight" for name, m in layer.named_modules() if isinstance(m, torch.nn.Linear)}
            wanted = experts | (linears if every_linear else set())
            collector = Collector(layer, wanted)
            hidden = [out.cpu() for out in stream.run(layer, hidden, kwargs[index])]
            collector.remove()
            for name, routed in collector.routed.items():
                moments = collector.moments[f"{name}.down_proj"]
                energy = moments.total.diagonal(dim1=1, dim2=2).sum(-1)
                tokens = moments.weight**2 / moments.square.clamp_min(1e-30)
                inputs = collector.moments[f"{name}.gate_up_proj"].total.shape[-1]
                reports[str(index)] = layer_report(routed, collector.mass[name], energy, tokens, inputs)
            named = {f"model.layers.{index}.{name}": moments for name, moments in collector.moments.items()}
            importance |= entries_of(named, checkpoint.config["model_type"], len(stream.layers), order)
            stream.empty(layer)
            bar.update()
    return reports, importance


def table(reports: dict[str, dict[str, Any]]) -> str:
    head = f"{'layer':>5}{'experts':>9}{'entropy':>9}{'min load':>10}{'max load':>10}{'cold':>6}{'never':>7}"
    lines = [head + f"{'r(f,mass)':>11}{'r(f,sal)':>10}"]
    for index, r in reports.items():
        lines.append(
            f"{index:>5}{r['experts']:>9}{r['entropy']:>9.4f}{r['min_load']:>10.3f}{r['max_load']:>10.3f}{r['cold']:>6}"
            f"{r['never_routed']:>7}{r['rank_frequency_mass']:>11.3f}{r['rank_frequency_salience']:>10.3f}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", required=True, type=Path, help="checkpoint directory")
    add_calibration_arguments(parser)
    parser.add_argument("--imatrix", type=Path, help="write llama.cpp's importance matrix here")
    add_record_arguments(parser)
    args = parser.parse_args()
    check_record_arguments(args)
    checkpoint, started = Checkpoint(args.model), time.time()
    ids, entry = calibration_of(args)
    reports, importance = probe(checkpoint, Calibration(ids, entry), every_linear=bool(args.imatrix))
    if not reports and not args.imatrix:
        raise UserError(f"{args.model}: has no routed experts to probe")
    print(table(reports), flush=True)
    if args.imatrix:
        write_imatrix(args.imatrix, importance, [entry["name"]], len(ids), args.calib_length)
        print(f"wrote {args.imatrix}: {len(importance)} weights", flush=True)
    if args.result:
        write_result(
            args.result, kind="probe", tag=args.tag, started=started, model=describe_model(args.model), data=[entry],
            metrics={"layers": reports, "tokens": ids.numel()},
        )  # fmt: skip


if __name__ == "__main__":
    run_cli(main)
