"""Safetensors straight to a GGUF for stock llama.cpp: calibrated, rounded and written layer by layer in one pass.

    python src/quant/gguf_pack.py --model models/razor-tiny --out work/iq3 --base-type IQ3_XXS --method ldlq \
        [--tensor-types configs/gguf_tensor_types_iq3.txt] [--calib FILE] [--dequant-out DIR] [--result F --tag T]
    python src/quant/gguf_pack.py --model work/recovered --out work/gguf --base-type BF16 --method nearest \
        --blocks work/recovered/ggml.safetensors

Types: the first pattern of --tensor-types that matches a tensor's name, else --base-type. Methods: ldlq (error feedback over
the second moments of the inputs) and nearest (their diagonal as importance, or --imatrix FILE without any calibration).
--blocks takes the experts as merge_adapter packed them, byte for byte, and rounds the rest to nearest without calibration. OUT
holds NAME-TYPE.gguf, recipe.json and, for a model with a vision tower, NAME-mmproj-f16.gguf. It appears when it is complete;
after `kill -9` the same command goes on where it stopped and ends with the same bytes.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from calibrated_pass import files_behind
from calibration import Calibration, LayerStream
from calibration_text import add_calibration_arguments, calibration_of
from checkpoint import Checkpoint
from console import UserError, file_sha256, progress, run_cli, write_json
from families import Role, roles_of
from ggml_codecs import CastCodec, decode_rows, encode
from ggml_types import TYPES, row_bytes
from gguf_format import Entry, GgufWriter, make_header, padded, read_imatrix, run_converter, tensor_bytes
from gguf_layout import (
    NEED_IMPORTANCE,
    Piece,
    file_type,
    pieces_of,
    read_parameter,
    read_patterns,
    to_gguf,
    type_named,
    types_of,
)
from gguf_pass import DAMPING, METHODS, GgufPass, is_quantized
from overlap import OneBehind
from recipe import RECIPE_FILE
from records import add_record_arguments, check_record_arguments, describe_model, header_sha256, write_result
from run_dir import RUN, check_output, check_resume, staged_directory
from token_weights import kept_bytes, token_weights

STATE, HEADER = "written.json", "header.bin"
TOKEN_POWER = 0.4


class Blocks:
    """Parameters that are packed already, in the file that merge_adapter writes: uint8 [E, O, row bytes] by parameter."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with safe_open(path, "pt") as file:
                kind = (file.metadata() or {}).get("type", "")
                self.shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
        except (OSError, SafetensorError) as error:
            raise UserError(f"--blocks {path}: not the ggml.safetensors of merge_adapter ({error})") from None
        self.kind, self.sha256 = type_named(kind, f"--blocks {path}"), file_sha256(path)

    def check(self, pieces: Sequence[Piece]) -> None:
        """Raise :class:`UserError` unless every packed parameter is one of ``pieces`` in its shape."""
        known: dict[str, tuple[int, ...]] = {}
        for piece in pieces:
            rows = piece.shape[-2] * (1 if piece.half is None else 2) if len(piece.shape) > 1 else 0
            known[piece.parameter] = (*piece.shape[:-2], rows, piece.shape[-1])
        for name, shape in self.shapes.items():
            own = known.get(name)
            if own is None or (*own[:-1], row_bytes(self.kind, own[-1])) != shape:
                raise UserError(f"--blocks {self.path}: {name} {list(shape)} does not fit the checkpoint; pack its own one")

    def data(self, piece: Piece) -> Tensor:
        """The bytes of a piece."""
        with safe_open(self.path, "pt") as file:
            whole = file.get_tensor(piece.parameter)
        return (whole if piece.half is None else whole.chunk(2, -2)[piece.half == "up"]).contiguous()


@dataclasses.dataclass(frozen=True)
class Pack:
    """What is made of a checkpoint: the pieces of the file in order, their types, and how they are rounded."""

    checkpoint: Checkpoint
    base: str
    method: str
    pieces: Sequence[Piece]
    types: Mapping[str, str]
    calibration: Calibration | None = None
    importance: Mapping[str, Entry] | None = None
    blocks: Blocks | None = None
    damping: float = DAMPING
    weights_file: Path | None = None

    @property
    def file_name(self) -> str:
        return f"{self.checkpoint.path.resolve().name}-{self.base.upper()}.gguf"

    def bytes_of(self, piece: Piece) -> int:
        return tensor_bytes(piece.shape, self.types[piece.name])

    @property
    def data_bytes(self) -> int:
        return sum(padded(self.bytes_of(piece)) for piece in self.pieces)

    def recipe(self) -> dict[str, Any]:
        more = {"damping": self.damping} if self.method == "ldlq" else {}
        return {"format": "gguf", "base_type": self.base, "method": self.method, **more, "types": dict(self.types)}

    def settings(self) -> dict[str, Any]:
        """What must be the same for an unfinished run to go on."""
        calibration = self.calibration.settings() if self.calibration else None
        sums = {name: float(entry.sums.sum()) for name, entry in (self.importance or {}).items()}
        source = {"config_sha256": self.checkpoint.config_sha256, "header_sha256": header_sha256(self.checkpoint)}
        made = {"recipe": self.recipe(), **source, "calibration": calibration, "importance": sums}
        return made | ({"blocks": self.blocks.sha256} if self.blocks else {})

    def packed(self, piece: Piece) -> bool:
        """Whether a piece is packed already."""
        return self.blocks is not None and piece.parameter in self.blocks.shapes


def plan_pack(
    checkpoint: Checkpoint, base: str, patterns: Sequence[tuple[str, str]], method: str,
    calibration: Calibration | None = None, importance: Mapping[str, Entry] | None = None, blocks: Blocks | None = None,
) -> tuple[Pack, list[str]]:  # fmt: skip
    """(the pack, notes on substituted types); raises :class:`UserError` on whatever cannot be done."""
    if method not in METHODS:
        raise UserError(f"method {method!r} is unknown; known: {', '.join(METHODS)}")
    if importance is not None and method != "nearest":
        raise UserError(f"--imatrix holds no second moments; use --method nearest, or {method} without it")
    if checkpoint.config.get("quantization_config"):
        raise UserError(f"{checkpoint.path}: already quantized (quantization_config in config.json); use the original")
    pieces = pieces_of(checkpoint)
    types, notes = types_of({piece.name: piece.shape for piece in pieces}, base, patterns)
    if blocks is not None:
        if method != "nearest" or importance is not None:
            raise UserError("--blocks holds rounded weights; the rest goes to nearest: --method nearest and no --imatrix")
        blocks.check(pieces)
        types |= {piece.name: blocks.kind for piece in pieces if piece.parameter in blocks.shapes}
    pack = Pack(checkpoint, base, method, pieces, types, calibration, importance, blocks)
    if importance is not None:
        _check_importance(pack, importance)
    return pack, notes


def _check_importance(pack: Pack, importance: Mapping[str, Entry]) -> None:
    for piece in pack.pieces:
        entry, kind = importance.get(piece.name), pack.types[piece.name]
        if entry is None and kind in NEED_IMPORTANCE and piece.role not in (Role.EMBEDDING, Role.LM_HEAD):
            raise UserError(
                f"the imatrix has no entry for {piece.name}, and {kind} needs one; compute it again from this model"
            )
        shape = (piece.shape[0] if len(piece.shape) == 3 else 1, piece.shape[-1])
        if entry is not None and entry.sums.shape != shape:
            raise UserError(
                f"the imatrix has {list(entry.sums.shape)} for {piece.name}, not {list(shape)}; it is another model's"
            )


def mean_square(entry: Entry | None, piece: Piece) -> Tensor | None:
    """Importance of a piece's inputs, [I] or [E, 1, I]; an expert without a token counts all inputs alike, as llama.cpp."""
    if entry is None:
        return None
    counts = torch.from_numpy(entry.counts)[:, None]
    mean = torch.where(counts > 0, torch.from_numpy(entry.sums) / counts.clamp_min(1e-30), 1.0)
    return mean[:, None] if len(piece.shape) == 3 else mean[0]


def on(value: Tensor, importance: Tensor | None) -> Tensor | None:
    return None if importance is None else importance.to(value.device)


def cast(value: Tensor, kind: str) -> Tensor:
    """The bytes of a value in f32, f16 or bf16 (encode gives the same ones in small pieces, slower)."""
    stored = value.to(CastCodec.DTYPES[kind][0])
    if not bool(torch.isfinite(stored).all()):
        raise UserError(f"a weight to be written as {kind} is NaN or infinite")
    return stored.contiguous().view(torch.uint8)


class Sink:
    """Writes the pieces of the plan in order: those that the pass has encoded, the others as the checkpoint has them."""

    def __init__(self, pack: Pack, writer: GgufWriter, bar: Any) -> None:
        self.pack, self.writer, self.bar = pack, writer, bar
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.place = {piece.name: index for index, piece in enumerate(pack.pieces)}

    def written(self, piece: Piece) -> bool:
        return self.place[piece.name] < self.writer.done

    def put(self, piece: Piece, data: Tensor) -> None:
        self.writer.append(piece.name, data)
        self.bar.update(self.pack.bytes_of(piece))

    def stream(self, piece: Piece) -> Tensor:
        """Write a piece without calibration; returns its bytes."""
        data = self.data(piece)
        self.put(piece, data)
        return data

    def data(self, piece: Piece) -> Tensor:
        """The bytes of a piece encoded without calibration."""
        kind = self.pack.types[piece.name]
        if self.pack.packed(piece):
            return self.pack.blocks.data(piece)
        value = to_gguf(piece, read_parameter(self.pack.checkpoint, piece)).to(self.device)
        importance = mean_square((self.pack.importance or {}).get(piece.name), piece)
        try:
            data = cast(value, kind) if not is_quantized(kind) else encode(value, kind, on(value, importance))
        except UserError as error:
            raise UserError(f"tensor {piece.name}: {error}") from None
        return data

    def part(self, pieces: Sequence[Piece], values: Mapping[str, Tensor]) -> None:
        for piece in pieces:
            self.put(piece, values[piece.name]) if piece.name in values else self.stream(piece)
        self.writer.sync()


def in_parts(pieces: Sequence[Piece]) -> list[list[Piece]]:
    """The pieces before the decoder, of each of its layers, and after it."""
    parts: list[list[Piece]] = [[] for _ in range(pieces[-1].layer + 2)]
    for piece in pieces:
        parts[piece.layer + 1].append(piece)
    return parts


def write_data_free(pack: Pack, sink: Sink) -> None:
    for part in in_parts(pack.pieces):
        if sink.written(part[-1]):
            sink.bar.update(sum(map(pack.bytes_of, part)))
        else:
            sink.part(part, {})


def write_calibrated(pack: Pack, sink: Sink, partial: Path) -> dict[str, Any]:
    """Write all pieces, calibrating layer by layer; returns the facts of the calibration."""
    assert pack.calibration is not None
    stream = LayerStream(pack.checkpoint, pack.calibration.device, pack.calibration.dtype)
    targets: dict[str, list[Piece]] = {}
    for piece in pack.pieces:
        if piece.role is not Role.EMBEDDING:
            targets.setdefault(piece.parameter, []).append(piece)
    targets = {name: ps for name, ps in targets.items() if any(is_quantized(pack.types[p.name]) for p in ps)}
    work = GgufPass(stream, pack.calibration, targets, pack.types, pack.method, pack.damping)
    work.weights = token_weights(stream, pack.calibration, partial / RUN, pack.weights_file)
    first, *layers, last = in_parts(pack.pieces)
    begin = _begin(pack, sink, work, first, partial)

    def write(
        part: list[Piece], values: Mapping[str, Tensor], errors: dict[str, list[float]], obsolete: Sequence[Path] = ()
    ) -> None:
        sink.writer.facts = {"errors": errors}
        sink.part(part, values)
        for path in obsolete:
            path.unlink(missing_ok=True)

    with contextlib.closing(stream), OneBehind(pack.calibration.device) as later:
        for index, part in enumerate(layers):
            if not sink.written(part[-1]):
                values = work.layer(index, later)
                work.save(partial, index)
                # while the next layer is calibrated
                later(write, part, values, dict(work.errors), files_behind(partial, index - 1))
                del values
        if begin < len(pack.pieces):
            values = work.head()
            later(write, last, values, dict(work.errors))
    return work.facts() | {"relative_output_error": _relative_errors(pack, work.errors)}


def _begin(pack: Pack, sink: Sink, work: GgufPass, first: Sequence[Piece], partial: Path) -> int:
    """Write the embedding and embed with it, or load what a killed run has left; the number of pieces that were there."""
    begin = sink.writer.done
    if begin < len(first):
        data = {piece: sink.stream(piece) for piece in first}
        sink.writer.sync()
    else:
        sink.bar.update(sum(pack.bytes_of(piece) for piece in pack.pieces[:begin]))
        work.errors = dict(sink.writer.facts.get("errors", {}))
    complete = [piece.layer for piece in pack.pieces[: sink.writer.done] if 0 <= piece.layer]
    if complete:
        work.load(partial, min(max(complete), len(work.stream.layers) - 1))
        return begin
    if begin >= len(first):  # killed between the embedding and the first layer: encoding it again gives the same bytes
        data = {piece: sink.data(piece) for piece in first}
    values = {p.sources[0]: decode_rows(d, pack.types[p.name]).view(p.shape).cpu() for p, d in data.items()}
    work.embed(values)
    return begin


def _relative_errors(pack: Pack, errors: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Squared error of the outputs as a share of the squared outputs, by role."""
    sums: dict[str, list[float]] = {}
    for piece in pack.pieces:
        if piece.name in errors:
            total = sums.setdefault(str(piece.role), [0.0, 0.0])
            for place, value in enumerate(errors[piece.name]):
                total[place] += value
    return {role: float(f"{error / size:.4g}") if size else 0.0 for role, (error, size) in sums.items()}


def report(pack: Pack, file_bytes: int) -> dict[str, Any]:
    """Sizes, bits a weight and the types of each role."""
    roles: dict[str, dict[str, Any]] = {}
    for piece in pack.pieces:
        entry = roles.setdefault(str(piece.role), {"tensors": 0, "parameters": 0, "bytes": 0, "types": {}})
        entry["tensors"] += 1
        entry["parameters"] += piece.numel
        entry["bytes"] += pack.bytes_of(piece)
        kinds, kind = entry["types"], pack.types[piece.name]
        kinds[kind] = kinds.get(kind, 0) + 1
    parameters = sum(piece.numel for piece in pack.pieces)
    bits = {"bits_per_weight": round(8 * file_bytes / parameters, 4)}
    if experts := roles.get(str(Role.ROUTED_EXPERT)):
        bits["expert_bits_per_weight"] = round(8 * experts["bytes"] / experts["parameters"], 4)
    return {"file_bytes": file_bytes, "gib": round(file_bytes / 2**30, 6), "parameters": parameters, **bits, "roles": roles}


def table(made: Mapping[str, Any]) -> str:
    lines = [f"{'role':<17}{'tensors':>8}{'parameters':>17}{'bits':>8}{'MB':>11}  types"]
    for role, entry in made["roles"].items():
        bits = f"{8 * entry['bytes'] / entry['parameters']:.3f}"
        kinds = ", ".join(f"{kind} {count}" for kind, count in sorted(entry["types"].items()))
        lines.append(
            f"{role:<17}{entry['tensors']:>8,}{entry['parameters']:>17,}{bits:>8}{entry['bytes'] / 1e6:>11.2f}  {kinds}"
        )
    size = f"{made['file_bytes'] / 1e6:,.2f} MB ({made['gib']:.3f} GiB)"
    return "\n".join([*lines, f"{size}, {made['bits_per_weight']:.4f} bits a weight over all"])


def write_pack(pack: Pack, out: Path, force: bool = False) -> dict[str, Any]:
    """Write ``pack`` into the directory ``out`` and return its report; a killed run resumes to the same bytes."""
    out = out.resolve()
    extra = pack.checkpoint.config.get("vocab_size", 0) * 64 + (1 << 20)  # the header holds the vocabulary
    check_output(pack.checkpoint.path, out, force, pack.data_bytes + extra + kept_bytes(pack.checkpoint, pack.calibration))
    settings = pack.settings()
    resumed = check_resume(out, settings)
    print(f"{pack.checkpoint.path} -> {out / pack.file_name}{' (resumed)' if resumed else ''}", flush=True)
    print(f"method {pack.method}, base type {pack.base}\n{table(report(pack, pack.data_bytes))}", flush=True)
    with staged_directory(out, force, settings) as partial:
        header = _header(pack, partial / RUN)
        path = partial / pack.file_name
        plan = [(piece.name, pack.bytes_of(piece)) for piece in pack.pieces]
        with (
            progress(sum(size for _, size in plan), "pack", "B", True) as bar,
            GgufWriter(path, header, plan, partial / RUN / STATE) as writer,
        ):
            sink = Sink(pack, writer, bar)
            facts = write_calibrated(pack, sink, partial) if pack.calibration else write_data_free(pack, sink)
        made = report(pack, path.stat().st_size) | {"file": pack.file_name, "calibration": facts}
        with progress(path.stat().st_size, "sha256", "B", True) as bar:
            made["sha256"] = file_sha256(path, bar.update)
        made["mmproj"] = write_mmproj(pack.checkpoint, partial)
        source = {"name": pack.checkpoint.path.resolve().name, "config_sha256": pack.checkpoint.config_sha256}
        calibration = settings["calibration"]
        write_json(
            partial / RECIPE_FILE, {"recipe": pack.recipe(), "source": source, "calibration": calibration, "report": made}
        )
    return made


def _header(pack: Pack, run: Path) -> bytes:
    """The file's header; a resumed run takes the one it began with."""
    kept = run / "header.kept"
    if not kept.exists():
        tensors = [(piece.name, piece.shape, pack.types[piece.name]) for piece in pack.pieces]
        make_header(pack.checkpoint.path, tensors, file_type(pack.base), run)
        (run / HEADER).rename(kept)
    return kept.read_bytes()


def write_mmproj(checkpoint: Checkpoint, directory: Path) -> str | None:
    """The vision tower as NAME-mmproj-f16.gguf, by llama.cpp's converter; None for a model without one."""
    roles = roles_of({name: info.shape for name, info in checkpoint.tensors.items()}, checkpoint.config)
    if Role.VISION not in roles.values():
        return None
    name = f"{checkpoint.path.resolve().name}-mmproj-f16.gguf"
    if not (directory / name).exists():
        temporary = directory / f".{name}"
        run_converter("convert", checkpoint.path, "--outfile", temporary, "--outtype", "f16", "--mmproj")
        temporary.rename(directory / name)
    return name


def add_rounding_arguments(parser: argparse.ArgumentParser) -> None:
    """The --method, --token-power and --damping of gguf_pack and moe_alloc."""
    parser.add_argument("--method", default="ldlq", help=f"{', '.join(METHODS)} (default ldlq)")
    shown = "how much of its gradient a token counts in ldlq's second moments; 0: all tokens alike"
    parser.add_argument("--token-power", type=float, default=TOKEN_POWER, help=f"{shown} (default {TOKEN_POWER})")
    shown = "keep the tokens' weights here, for other runs on the same model and text"
    parser.add_argument("--token-weights", type=Path, help=shown)
    shown = "of ldlq, as a share of the mean second moment"
    parser.add_argument("--damping", type=float, default=DAMPING, help=f"{shown} (default {DAMPING})")


def check_rounding_arguments(args: argparse.Namespace) -> None:
    if args.method not in METHODS:
        raise UserError(f"method {args.method!r} is unknown; known: {', '.join(METHODS)}")
    if not (0 <= args.token_power <= 1 and 0 < args.damping <= 10):
        raise UserError("--token-power must be within 0 and 1, --damping above 0 and at most 10")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True, type=Path, help="checkpoint directory (config.json and safetensors)")
    parser.add_argument("--out", required=True, type=Path, help="directory to make")
    parser.add_argument("--base-type", required=True, help=f"{', '.join(kind for kind in TYPES)} (any case)")
    parser.add_argument("--tensor-types", type=Path, help="file of PATTERN=TYPE lines, as configs/gguf_tensor_types_iq3.txt")
    parser.add_argument("--blocks", type=Path, help="ggml.safetensors of merge_adapter: the experts, as they are there")
    parser.add_argument("--imatrix", type=Path, help="importance of llama-imatrix or moe_probe, instead of calibration")
    add_calibration_arguments(parser)
    add_rounding_arguments(parser)
    parser.add_argument("--dequant-out", type=Path, help="also write what the file holds as a BF16 checkpoint")
    parser.add_argument("--force", action="store_true", help="replace an earlier output once the new one is complete")
    add_record_arguments(parser, force=False)
    return parser.parse_args()


def prepare(args: argparse.Namespace) -> tuple[Pack, list[str]]:
    """The pack that the arguments describe."""
    check_rounding_arguments(args)
    base = type_named(args.base_type, "--base-type")
    patterns = read_patterns(args.tensor_types) if args.tensor_types else []
    checkpoint = Checkpoint(args.model)
    if args.imatrix:
        return plan_pack(checkpoint, base, patterns, args.method, importance=read_imatrix(args.imatrix)[0])
    if args.blocks:
        return plan_pack(checkpoint, base, patterns, args.method, blocks=Blocks(args.blocks))
    pack, notes = plan_pack(checkpoint, base, patterns, args.method)  # its errors before the tokenizer's
    if not any(is_quantized(pack.types[p.name]) and p.role is not Role.EMBEDDING for p in pack.pieces):
        return pack, notes
    ids, entry = calibration_of(args)
    power = 0.0 if args.method == "nearest" else args.token_power
    calibration = Calibration(ids, entry, token_power=power)
    return dataclasses.replace(pack, calibration=calibration, damping=args.damping, weights_file=args.token_weights), notes


def main() -> None:
    args = parse_arguments()
    check_record_arguments(args)
    started = time.time()
    pack, notes = prepare(args)
    print("\n".join(notes), end="\n" if notes else "", flush=True)
    skipped = sum(map(_is_mtp, pack.checkpoint.tensors))
    if skipped:
        print(f"left out: {skipped} tensors of multi-token prediction (llama.cpp decodes without them)", flush=True)
    source = describe_model(args.model) if args.result else None
    made = write_pack(pack, args.out, args.force)
    if args.dequant_out:
        from gguf_dequant import dequantize

        dequantize(args.out / pack.file_name, args.model, args.dequant_out, args.force)
    if args.result:
        write_result(
            args.result, kind="pack", tag=args.tag, started=started, model=source, recipe=pack.recipe(),
            data=[pack.calibration.record] if pack.calibration else [], metrics=made,
        )  # fmt: skip
    print(f"{table(made)}\nwrote {args.out / pack.file_name} in {time.time() - started:.1f} s", flush=True)


def _is_mtp(name: str) -> bool:
    return name.startswith(("mtp.", "model.mtp."))


if __name__ == "__main__":
    run_cli(main)
