"""Who gets how many bits: from measured KL under a byte budget, or by the signals of a probe.

    python src/quant/moe_alloc.py --model models/razor-tiny --expert-bits 3 --out work/alloc.json [--items 8]
        [--result results/probe/T.json --tag T]
    python src/quant/moe_alloc.py --model models/razor-tiny --expert-bits 3 --strategy frequency --out work/freq.json
    python src/quant/quant_save.py ... --expert-bits 3 --allocation work/alloc.json --method gptq_refit

--strategy budget (default). Sensitivity: the experts' gate_up or down matrices of one layer alone are rounded (clip search)
to each of --options bits, all else stays BF16, and the mean KL to the BF16 model is measured on training transcripts or --text.
The model is loaded whole. Allocation: the bits of least summed KL whose size is at most that of --expert-bits everywhere, by
dynamic programming over all choices (exact for summed KL).
--strategy frequency, wmass, asal, wfro, composite, inverse, random, blind (expert_signals.py). Every layer's experts are
ordered by a signal, and the best get more of the --options; one decoder layer is in memory at a time.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from calibration import Calibration, place_of
from calibration_text import add_calibration_arguments, calibration_of
from checkpoint import Checkpoint
from console import UserError, progress, run_cli, write_json
from expert_signals import STRATEGIES, bits_by_score, scores
from hf_model import load_model, load_tokenizer
from kl import batches, divergence, file_texts, tiny_texts
from moe_probe import probe
from moe_quant import fake_quant
from records import add_record_arguments, check_record_arguments, describe_model, read_result, write_result


def solve(costs: Sequence[Sequence[int]], losses: Sequence[Sequence[float]], budget: int) -> list[int]:
    """For each item the index of its option so that the summed loss is least and the summed cost at most ``budget``.

    Exact dynamic programming over the cost in units of its greatest common divisor. Raises :class:`UserError` when even
    the cheapest options cost more.
    """
    floor = sum(min(row) for row in costs)
    if floor > budget:
        raise UserError(f"the budget of {budget} is below the {floor} of the cheapest choice; raise --expert-bits")
    unit = int(np.gcd.reduce([cost for row in costs for cost in row]))
    size = budget // unit + 1
    best = np.zeros(size)
    choices = np.zeros((len(costs), size), dtype=np.int8)
    for index, (row, loss) in enumerate(zip(costs, losses, strict=True)):
        table = np.full((len(row), size), np.inf)
        for option, (cost, value) in enumerate(zip(row, loss, strict=True)):
            step = cost // unit
            if step < size:
                table[option, step:] = best[: size - step] + value
        choices[index], best = table.argmin(0), table.min(0)
    picked, left = [0] * len(costs), int(best.argmin())
    for index in reversed(range(len(costs))):
        picked[index] = int(choices[index, left])
        left -= costs[index][picked[index]] // unit
    return picked


class Sensitivity:
    """Mean KL of a model with some parameters replaced, to itself as loaded, on held-out text."""

    def __init__(self, model: torch.nn.Module, data: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]) -> None:
        self.model, self.data = model, data
        self.expected = [self._logits(*batch) for batch in data]

    @torch.no_grad()
    def _logits(self, ids: torch.Tensor, real: torch.Tensor, answer: torch.Tensor) -> torch.Tensor:
        mask = real.to(self.model.device)
        logits = self.model(input_ids=ids.to(self.model.device), attention_mask=mask, use_cache=False).logits
        return logits[:, :-1][real[:, 1:]]

    @torch.no_grad()
    def of(self, name: str, bits: int, group: int, clip_steps: int) -> float:
        """KL with the parameter ``name`` rounded, which is put back afterwards."""
        parameter = self.model.get_parameter(name)
        original = parameter.detach().clone()
        parameter.copy_(fake_quant(original.bfloat16(), bits, group, clip_steps))
        kl = [divergence(old, self._logits(*b))[0] for old, b in zip(self.expected, self.data, strict=True)]
        parameter.copy_(original)
        return torch.cat(kl).double().mean().item()


def expert_norms(checkpoint: Checkpoint) -> dict[str, list[float]]:
    """Frobenius norm of each expert's matrices together, by module of experts; one tensor in memory at a time."""
    squares: dict[str, torch.Tensor] = {}
    for name, info in checkpoint.tensors.items():
        place = place_of(name)
        module = place.parameter.rpartition(".")[0]
        if place.expert is None and not (module.endswith(".experts") and len(info.shape) == 3):
            continue
        own = torch.linalg.vector_norm(checkpoint.read(name).float().flatten(-2), dim=-1).double() ** 2
        row = squares.setdefault(module, torch.zeros(0, dtype=torch.float64))
        if place.expert is None:
            squares[module] = own + (row if len(row) else 0)
            continue
        if len(row) <= place.expert:
            row = squares[module] = torch.nn.functional.pad(row, (0, place.expert + 1 - len(row)))
        row[place.expert] += own
    return {module: row.sqrt().tolist() for module, row in squares.items()}


def by_signal(args: argparse.Namespace, options: list[int]) -> tuple[dict[str, list[int]], dict[str, Any]]:
    """(bits of each expert by module, data entry) for a strategy of expert_signals."""
    checkpoint = Checkpoint(args.model)
    ids, entry = calibration_of(args)
    reports, _ = probe(checkpoint, Calibration(ids, entry))
    if not reports:
        raise UserError(f"{args.model}: has no routed experts to allocate bits to")
    found = {}
    for module, norms in expert_norms(checkpoint).items():
        report = reports[module.split(".")[2]]
        signals = {"frequency": report["frequency"], "wmass": report["mass"], "asal": report["salience"], "wfro": norms}
        if args.strategy == "blind":
            found[module] = [int(args.expert_bits)] * len(norms)
        else:
            values = scores(args.strategy, signals, args.seed)
            found[module] = bits_by_score(values, args.expert_bits, options, args.share)
    return found, entry


def allocate_by_signal(args: argparse.Namespace, options: list[int]) -> None:
    """Write the allocation of a signal, and the record of it."""
    started = time.time()
    if args.strategy == "blind" and args.expert_bits != int(args.expert_bits):
        raise UserError(f"--strategy blind: --expert-bits {args.expert_bits:g} must be a whole number")
    experts, entry = by_signal(args, options)
    write_json(args.out, {"experts": experts})
    each = [bits for row in experts.values() for bits in row]
    metrics = {"strategy": args.strategy, "experts": experts, "mean_bits": sum(each) / len(each)}
    record(args, started, entry, metrics)
    print("\n".join(f"{module}: {' '.join(map(str, bits))}" for module, bits in experts.items()))
    print(f"{metrics['mean_bits']:.4f} bits an expert", flush=True)


def record(args: argparse.Namespace, started: float, entry: dict[str, Any], metrics: dict[str, Any]) -> None:
    """The record of the run, where one was asked for."""
    if args.result:
        model = describe_model(args.model)
        write_result(args.result, kind="probe", tag=args.tag, started=started, model=model, data=[entry], metrics=metrics)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", required=True, type=Path, help="checkpoint directory")
    parser.add_argument("--expert-bits", required=True, type=float, help="the budget: the size of this everywhere")
    parser.add_argument("--out", required=True, type=Path, help="JSON for quant_save --allocation")
    parser.add_argument("--options", default="2,3,4", help="bits to choose from")
    parser.add_argument("--group", type=int, default=128, help="inputs that share a scale (default 128)")
    parser.add_argument("--clip-steps", type=int, default=16, help="ratios tried by the clip search (default 16)")
    parser.add_argument("--items", type=int, default=8, help="training transcripts a task, or paragraphs of --text")
    parser.add_argument("--text", type=Path, help="measure on this text file instead")
    parser.add_argument("--strategy", default="budget", choices=("budget", *STRATEGIES), help="how (default: budget)")
    parser.add_argument("--share", type=float, default=0.25, help="of three options: the experts raised, and lowered")
    parser.add_argument("--seed", type=int, default=0, help="of --strategy random")
    add_calibration_arguments(parser)
    parser.add_argument("--measured", type=Path, help="record of an earlier run: take its sensitivities, another budget")
    parser.add_argument("--force", action="store_true", help="replace an earlier output")
    add_record_arguments(parser, force=False)
    return parser.parse_args()


def check_args(args: argparse.Namespace) -> list[int]:
    check_record_arguments(args)
    if args.out.exists() and not args.force:
        raise UserError(f"{args.out}: exists; give another --out, or --force to replace it")
    try:
        options = sorted({int(text) for text in args.options.split(",")})
    except ValueError:
        raise UserError(f"--options {args.options}: expected whole numbers separated by commas") from None
    if options[0] < 2 or options[-1] > 8 or args.items < 1:
        raise UserError(f"--options {args.options}: 2..8; --items {args.items}: at least 1")
    return options


def measured(path: Path, options: list[int]) -> tuple[list[str], list[list[float]], dict[str, Any]]:
    """(parameters, losses, data entry) of an earlier record, which must have the same options."""
    record = read_result(path, "probe")
    if record["metrics"].get("options") != options:
        raise UserError(f"{path}: measured for options {record['metrics'].get('options')}, not {options}")
    return *zip(*record["metrics"]["sensitivity"].items(), strict=True), record["data"][0]


def measure(
    args: argparse.Namespace, model: torch.nn.Module, options: list[int]
) -> tuple[list[str], list[list[float]], dict[str, Any]]:
    """(parameters, losses by option, data entry) by rounding one parameter of ``model`` at a time."""
    tokenizer = load_tokenizer(args.model)
    pairs, entry = file_texts(args.text, args.items) if args.text else tiny_texts(tokenizer, args.items, "train")
    names = [name for name, p in model.named_parameters() if ".experts." in name and p.ndim == 3]
    if not names:
        raise UserError(f"{args.model}: has no routed experts to allocate bits to")
    context = int(getattr(model.config.get_text_config(), "max_position_embeddings", 4096))
    sensitivity = Sensitivity(model, list(batches(tokenizer, pairs, 16, min(context, 4096))))
    losses: list[list[float]] = []
    with progress(len(names) * len(options), "sensitivity", "rounding") as bar:
        for name in names:
            losses.append([])
            for bits in options:
                losses[-1].append(sensitivity.of(name, bits, args.group, args.clip_steps))
                bar.update()
    return names, losses, entry


def main() -> None:
    args = parse_args()
    options = check_args(args)
    Checkpoint(args.model)
    if args.strategy != "budget":
        return allocate_by_signal(args, options)
    started = time.time()
    model = load_model(args.model)
    names, losses, entry = measured(args.measured, options) if args.measured else measure(args, model, options)
    sizes = [model.get_parameter(name).numel() for name in names]
    costs = [[bits * size for bits in options] for size in sizes]
    budget = int(args.expert_bits * sum(sizes))
    picked = solve(costs, losses, budget)
    overrides = {name: options[index] for name, index in zip(names, picked, strict=True)}
    spent = sum(row[index] for row, index in zip(costs, picked, strict=True))
    metrics = {
        "options": options,
        "sensitivity": dict(zip(names, losses, strict=True)),
        "overrides": overrides,
        "bits_spent": spent / sum(sizes),
        "predicted_kl": sum(row[index] for row, index in zip(losses, picked, strict=True)),
    }
    write_json(args.out, {"overrides": overrides})
    record(args, started, entry, metrics)
    print("\n".join(f"{bits} bits  {name}" for name, bits in overrides.items()))
    print(f"{spent / sum(sizes):.4f} bits an expert weight, predicted KL {metrics['predicted_kl']:.5f}", flush=True)


if __name__ == "__main__":
    run_cli(main)
