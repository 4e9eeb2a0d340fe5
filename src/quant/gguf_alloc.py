"""Types for a GGUF of a given size: measure what each type costs each tensor in KL, then spend the bytes exactly.

    python src/quant/gguf_alloc.py --model models/razor-tiny --target-gib 0.008 --out work/types.txt \
        [--tensor-types configs/gguf_protected.txt] [--candidates iq2_xs,iq3_xxs,...] [--result F --tag T]

OUT is a file of PATTERN=TYPE lines for gguf_pack. What --tensor-types names is fixed. The checkpoint is streamed once.
Sensitivity of a tensor to a type: the error tr(D H D^T) of its output (on a sample of its rows) times nats per error, which is
measured for every group of a layer (experts' gate and up, experts' down, shared expert, attention): the group is rounded to
--probe, the activations that this changes are carried to the end beside the true ones, and the KL of the predictions taken.
All rounding is by the method that the file will be rounded by.
The types of least summed KL within the size come from dynamic programming over all choices.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from calibration import Calibration, Collector, LayerStream
from calibration_text import add_calibration_arguments, calibration_of
from checkpoint import Checkpoint
from console import UserError, atomic_path, progress, run_cli, scratch_folder
from families import Role
from ggml_codecs import decode_rows
from ggml_types import fallback
from gguf_format import make_header, padded, tensor_bytes
from gguf_layout import Piece, into_parameter, ordered_hessian, pieces_of, to_gguf
from gguf_recipe import chosen_type, exact_patterns, file_type, keeps_float32, read_patterns, type_named
from kl import divergence
from moe_alloc import solve
from records import add_record_arguments, check_record_arguments, describe_model, write_result
from round_ggml import DAMPING, RoundingSettings, encoded, is_quantized, output_error
from settings import add_settings, settings_of
from token_weights import token_weights

CANDIDATES = "iq2_xs,iq3_xxs,iq3_s,iq4_xs,q4_K,q5_K,q6_K,q8_0"
STEPS = 1_000_000  # of the budget in the dynamic program
SAMPLE_EXPERTS, SAMPLE_ROWS = 8, 32
OPEN = ""  # the chosen type of a piece that no pattern names


def group_of(piece: Piece) -> tuple[int, str]:
    """Pieces whose nats per error are measured together."""
    part = piece.parameter.rpartition(".")[2] if piece.role is Role.ROUTED_EXPERT else str(piece.role)
    return piece.layer, "attention" if piece.role in (Role.ATTENTION, Role.LINEAR_ATTENTION) else part


def sampled(value: Tensor, hessian: Tensor) -> tuple[Tensor, Tensor, float]:
    """Some rows of some matrices of [E, O, I], their second moments, and how many times more rows there are."""
    experts = torch.linspace(0, len(value) - 1, min(SAMPLE_EXPERTS, len(value))).round().long().to(value.device)
    rows = torch.linspace(0, value.shape[1] - 1, min(SAMPLE_ROWS, value.shape[1])).round().long().to(value.device)
    part = value[experts][:, rows]
    return part, hessian[experts], value.shape[0] * value.shape[1] / (part.shape[0] * part.shape[1])


@dataclasses.dataclass(frozen=True)
class Rounding:
    """How the file will be rounded: what a type costs depends on it."""

    method: str = "ldlq"
    damping: float = DAMPING

    def __call__(self, value: Tensor, kind: str, hessian: Tensor) -> Tensor:
        """``value`` [E, O, I] as ``kind`` gives it back."""
        return decode_rows(encoded(value.contiguous(), kind, self.method, hessian, self.damping), kind)


def weights_of_tokens(stream: LayerStream, calibration: Calibration, path: Path | None) -> Tensor | None:
    with scratch_folder() as work:
        return token_weights(stream, calibration, work, path)


class Sensitivities:
    """Streams the layers. ``errors``: by piece and type; ``nats``: by group, the KL that rounding it to the probe costs, on
    the first ``probed`` sequences (None: all)."""

    def __init__(
        self, checkpoint: Checkpoint, calibration: Calibration, pieces: Sequence[Piece], probe: str,
        rounded: Callable[[Tensor, str, Tensor], Tensor], weights_file: Path | None = None,
        probed: int | None = None,
    ) -> None:  # fmt: skip
        self.stream = LayerStream(checkpoint, calibration.device, calibration.dtype)
        self.floor, self.probe, self.pieces, self.rounded = calibration.floor, probe, pieces, rounded
        self.weights = weights_of_tokens(self.stream, calibration, weights_file)
        self.kwargs = self.stream.arguments(calibration.batches()[0])
        self.hidden = self.stream.embed(calibration.batches())
        self.probed = None if probed is None else -(-probed // len(self.hidden[0]))  # batches
        self.changed: dict[tuple[int, str], list[Tensor]] = {}
        self.errors: dict[str, dict[str, float]] = {}
        self.probe_errors: dict[tuple[int, str], float] = {}
        self.nats: dict[tuple[int, str], float] = {}

    @torch.no_grad()
    def layer(self, index: int, options: Mapping[str, Sequence[str]]) -> None:
        stream, prefix = self.stream, f"model.layers.{index}."
        layer = stream.layers[index]
        stream.fill(layer, prefix)
        pieces = [piece for piece in self.pieces if piece.layer == index]
        wanted = {piece.parameter.removeprefix(prefix) for piece in pieces}
        collector = Collector(layer, wanted, None if self.weights is None else self.weights[index])
        after = [out.cpu() for out in stream.run(layer, self.hidden, self.kwargs[index])]
        collector.remove()
        for key, carried in self.changed.items():
            self.changed[key] = [out.cpu() for out in stream.run(layer, carried, self.kwargs[index])]
        groups: dict[tuple[int, str], list[Piece]] = {}
        for piece in pieces:
            groups.setdefault(group_of(piece), []).append(piece)
        for key, members in groups.items():
            self._group(key, members, layer, prefix, collector, options)
        self.hidden = after
        stream.empty(layer)

    def _group(
        self, key: tuple[int, str], members: Sequence[Piece], layer: torch.nn.Module, prefix: str, collector: Collector,
        options: Mapping[str, Sequence[str]],
    ) -> None:  # fmt: skip
        originals: dict[str, Tensor] = {}
        error = 0.0
        for piece in members:
            name = piece.parameter.removeprefix(prefix)
            if name not in collector.moments:
                raise UserError(f"{piece.parameter}: no calibration activation reached it; give more calibration text")
            moments = collector.moments[name]
            hessian = ordered_hessian(piece, moments.statistics(self.floor * moments.total.shape[-1]).hessian)
            parameter = layer.get_parameter(name)
            originals.setdefault(name, parameter.detach().clone())
            value = to_gguf(piece, originals[name]).float()
            value = value if value.ndim == 3 else value[None]
            part, own, share = sampled(value, hessian)
            kinds = options[piece.name]
            self.errors[piece.name] = {k: share * output_error(part - self.rounded(part, k, own), own) for k in kinds}
            probe = self.rounded(value.contiguous(), fallback(self.probe, value.shape[-1]), hessian)
            error += output_error(value - probe, hessian)
            into_parameter(piece, probe.view(piece.shape), parameter)
        self.changed[key] = [out.cpu() for out in self.stream.run(layer, self.hidden[: self.probed], self.kwargs[key[0]])]
        self.probe_errors[key] = error
        for name, original in originals.items():
            layer.get_parameter(name).copy_(original)

    @torch.no_grad()
    def finish(self) -> None:
        """The KL of the predictions behind every changed group, by the family's own norm and head."""
        stream = self.stream
        norm, head = stream.decoder.norm, stream.model.lm_head
        stream.fill(norm, "model.norm.")
        tied = "lm_head.weight" not in stream.by_parameter
        stream.fill(head, "model.embed_tokens." if tied else "lm_head.")
        sums = dict.fromkeys(self.changed, 0.0)
        count = 0
        for place, hidden in enumerate(self.hidden[: self.probed]):
            expected = head(norm(hidden.to(stream.device))).flatten(0, 1)
            count += len(expected)
            for key, carried in self.changed.items():
                kl, _ = divergence(expected, head(norm(carried[place].to(stream.device))).flatten(0, 1))
                sums[key] += kl.double().sum().item()
        self.nats = {key: total / count for key, total in sums.items()}
        stream.empty(norm)
        stream.empty(head)

    def losses(self) -> dict[str, dict[str, float]]:
        """Predicted KL by piece and type."""
        found = {}
        for piece in self.pieces:
            key = group_of(piece)
            nats = self.nats[key] / max(self.probe_errors[key], 1e-30)
            found[piece.name] = {kind: error * nats for kind, error in self.errors[piece.name].items()}
        return found


def options_of(pieces: Sequence[Piece], candidates: Sequence[str]) -> dict[str, list[str]]:
    """The types that each piece may have: the candidates, or what llama.cpp takes for its row length, without repeats."""
    return {p.name: list(dict.fromkeys(fallback(kind, p.shape[-1]) for kind in candidates)) for p in pieces}


def choose(pieces: Sequence[Piece], losses: Mapping[str, Mapping[str, float]], budget: int) -> dict[str, str]:
    """The type of each piece: least summed loss within ``budget`` bytes, counted in steps of a millionth of it."""
    unit = max(1, budget // STEPS)
    kinds = [list(losses[piece.name]) for piece in pieces]
    costs = [[-(-padded(tensor_bytes(p.shape, kind)) // unit) for kind in row] for p, row in zip(pieces, kinds, strict=True)]
    values = [[losses[p.name][kind] for kind in row] for p, row in zip(pieces, kinds, strict=True)]
    floor = unit * sum(min(row) for row in costs)
    if floor > budget:
        raise UserError(
            f"--target-gib leaves {budget / 2**30:.4f} GiB for the open tensors, the smallest need {floor / 2**30:.4f}"
        )
    picked = solve(costs, values, budget // unit)
    return {piece.name: row[index] for piece, row, index in zip(pieces, kinds, picked, strict=True)}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", required=True, type=Path, help="checkpoint directory")
    parser.add_argument("--target-gib", required=True, type=float, help="size of the whole file, at most")
    parser.add_argument("--out", required=True, type=Path, help="file of PATTERN=TYPE lines for gguf_pack")
    parser.add_argument("--tensor-types", type=Path, help="PATTERN=TYPE lines of tensors whose types are fixed")
    parser.add_argument("--candidates", default=CANDIDATES, help=f"types to choose from (default {CANDIDATES})")
    parser.add_argument("--probe", default="q3_K", help="type at which the KL of a group is measured (default q3_K)")
    shown = "of the calibration sequences, on how many KL is taken (default 32)"
    parser.add_argument("--probe-sequences", type=int, default=32, help=shown)
    add_calibration_arguments(parser)
    add_settings(parser, RoundingSettings)
    parser.add_argument("--force", action="store_true", help="replace an earlier output")
    add_record_arguments(parser, force=False)
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    check_record_arguments(args)
    how = settings_of(RoundingSettings, args)
    if args.probe_sequences < 1:
        raise UserError("--probe-sequences must be at least 1")
    if args.out.exists() and not args.force:
        raise UserError(f"{args.out}: exists; use --force to replace it")
    candidates = [type_named(text, "--candidates") for text in args.candidates.split(",")]
    fixed_patterns = read_patterns(args.tensor_types) if args.tensor_types else []
    checkpoint, started = Checkpoint(args.model), time.time()
    pieces = pieces_of(checkpoint)
    wanted = {p.name: "f32" if keeps_float32(p.name, p.shape) else chosen_type(p.name, OPEN, fixed_patterns) for p in pieces}
    unmeasured = next((p.name for p in pieces if not wanted[p.name] and p.role in (Role.EMBEDDING, Role.LM_HEAD)), None)
    if unmeasured:
        raise UserError(f"--tensor-types: {unmeasured} needs a type; its sensitivity is not measured")
    fixed = {p.name: fallback(wanted[p.name], p.shape[-1]) for p in pieces if wanted[p.name]}
    open_pieces = [piece for piece in pieces if piece.name not in fixed]
    options = options_of(open_pieces, candidates)
    with tempfile.TemporaryDirectory() as work:  # the size of a header does not depend on the types
        rows = [(p.name, p.shape, fixed.get(p.name, "f16")) for p in pieces]
        header = len(make_header(checkpoint.path, rows, file_type("iq3_xxs"), Path(work)))
    taken = header + sum(padded(tensor_bytes(p.shape, fixed[p.name])) for p in pieces if p.name in fixed)
    budget = int(args.target_gib * 2**30) - taken
    choose(open_pieces, {n: dict.fromkeys(kinds, 0.0) for n, kinds in options.items()}, budget)  # too small: said now
    ids, entry = calibration_of(args)
    calibration = Calibration(ids, entry, token_power=0.0 if how.method == "nearest" else how.moments.token_power)
    rounding = Rounding(how.method, how.moments.damping)
    probe = type_named(args.probe, "--probe")
    found = Sensitivities(checkpoint, calibration, open_pieces, probe, rounding, how.token_weights, args.probe_sequences)
    with progress(len(found.stream.layers), "sensitivity", "layer") as bar:
        for index in range(len(found.stream.layers)):
            found.layer(index, options)
            bar.update()
    found.finish()
    losses = found.losses()
    chosen = choose(open_pieces, losses, budget)
    types = {piece.name: fixed.get(piece.name) or chosen[piece.name] for piece in pieces}
    size = taken + sum(padded(tensor_bytes(p.shape, types[p.name])) for p in open_pieces)
    with atomic_path(args.out) as temporary:
        temporary.write_text(
            f"# {size / 2**30:.6f} GiB of at most {args.target_gib}\n" + exact_patterns(types), encoding="utf-8"
        )
    metrics = summary(open_pieces, types, losses, size, args.target_gib)
    metrics |= {"nats": {f"{layer}.{group}": value for (layer, group), value in found.nats.items()}, "losses": losses}
    if args.result:
        described = describe_model(args.model)
        write_result(args.result, kind="probe", tag=args.tag, started=started, model=described, data=[entry], metrics=metrics)
    for kind, count in metrics["types"].items():
        print(f"{count:>6} {kind}")
    share, seconds = 100 * size / (args.target_gib * 2**30), time.time() - started
    print(f"{size / 2**30:.6f} GiB ({share:.3f} % of the budget), predicted KL {metrics['predicted_kl']:.5f}")
    print(f"wrote {args.out} in {seconds:.1f} s", flush=True)


def summary(
    pieces: Sequence[Piece], types: Mapping[str, str], losses: Mapping[str, Mapping[str, float]], size: int, target: float
) -> dict[str, Any]:
    counts: dict[str, int] = {}
    for piece in pieces:
        counts[types[piece.name]] = counts.get(types[piece.name], 0) + 1
    predicted = sum(losses[piece.name][types[piece.name]] for piece in pieces)
    chosen = {piece.name: types[piece.name] for piece in pieces if is_quantized(types[piece.name])}
    return {"target_gib": target, "file_bytes": size, "predicted_kl": predicted, "types": counts, "chosen": chosen}


if __name__ == "__main__":
    run_cli(main)
