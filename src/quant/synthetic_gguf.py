"""A GGUF of a published MoE's full size with synthetic weights, for speed and memory: bytes, shapes and types of the real one.

    python src/quant/synthetic_gguf.py --shape 122b --out work/synthetic-122b.gguf [--layers 48 ...] [--encode-experts 8]
        [--header FILE] [--result results/bench/T.json --tag T]
    python src/quant/synthetic_gguf.py --shape 122b --out work/header.bin --header-only     # where llama.cpp's converter is

Types and names are those of gguf_pack (configs/gguf_iq3.env: 3.38 bits a weight). Of each kind of tensor one is drawn and
encoded, of a stack of experts --encode-experts of them, of the vocabulary's matrices some rows; their bytes are repeated in
every layer and expert, each at its own place in the file. Decoding reads all of them as it would the real ones, and says noise.
The vocabulary is razor-tiny's, filled up to the real size.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from checkpoint import Checkpoint
from console import UserError, atomic_path, progress, run_cli
from families import Role
from ggml_codecs import encode
from gguf_format import GgufWriter, make_header
from gguf_layout import Piece, file_type, read_patterns, to_gguf, type_named
from pack_plan import Pack, cast, plan_pack, report
from records import add_record_arguments, check_record_arguments, write_result
from round_ggml import is_quantized
from synthetic_moe import Shape, device_at_hand, draw, prepare, shape_arguments, shape_from

ROOT = Path(__file__).resolve().parents[2]
TOKENIZER = ROOT / "models" / "razor-tiny"
TYPES = ROOT / "configs" / "gguf_tensor_types_iq3.txt"
VOCABULARY_ROWS = 4096  # encoded, and repeated


def empty_model(directory: Path, shape: Shape, seed: int) -> Checkpoint:
    """A checkpoint without weights, with a tokenizer, which is what a plan and a header need."""
    prepare(directory, shape, seed)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(TOKENIZER / name, directory / name)
    return Checkpoint(directory)


def plan(checkpoint: Checkpoint, base: str, types: Path) -> Pack:
    return plan_pack(checkpoint, base, read_patterns(types), "nearest")[0]


def header_of(pack: Pack) -> bytes:
    tensors = [(piece.name, piece.shape, pack.types[piece.name]) for piece in pack.pieces]
    with tempfile.TemporaryDirectory() as work:
        return make_header(pack.checkpoint.path, tensors, file_type(pack.base), Path(work))


def sampled(piece: Piece, experts: int) -> Piece:
    """The part of a piece that is drawn and encoded; its bytes fill the piece a whole number of times."""
    wanted = experts if piece.role is Role.ROUTED_EXPERT else VOCABULARY_ROWS
    if piece.role not in (Role.ROUTED_EXPERT, Role.EMBEDDING, Role.LM_HEAD):
        return piece
    size = next(size for size in range(min(wanted, piece.shape[0]), 0, -1) if piece.shape[0] % size == 0)
    return dataclasses.replace(piece, shape=(size, *piece.shape[1:]))


def bytes_of(pack: Pack, piece: Piece, layers: int, seed: int) -> Tensor:
    """The encoded bytes of a (sampled) piece, on the CPU."""
    name, kind, device = piece.sources[0], pack.types[piece.name], device_at_hand()
    shape = pack.checkpoint.info(name).shape
    if piece.role in (Role.ROUTED_EXPERT, Role.EMBEDDING, Role.LM_HEAD):
        shape = (piece.shape[0], *shape[1:])
    value = to_gguf(piece, torch.cat(list(draw(name, shape, layers, seed, device))).bfloat16())
    return (encode(value, kind) if is_quantized(kind) else cast(value, kind)).cpu()


def write_synthetic(pack: Pack, header: bytes, out: Path, experts: int, seed: int) -> dict[str, Any]:
    """Write the file; what was encoded and what was repeated."""
    layers, kept, encoded = pack.pieces[-1].layer, {}, 0
    sizes = [(piece.name, pack.bytes_of(piece)) for piece in pack.pieces]
    seconds, started = 0.0, time.time()
    with (
        tempfile.TemporaryDirectory() as work,
        progress(sum(size for _, size in sizes), "synthetic", "B", True) as bar,
        GgufWriter(out, header, sizes, Path(work, "state")) as writer,
    ):
        for piece, (name, size) in zip(pack.pieces, sizes):
            key = (re.sub(r"\d+", "", name), piece.shape, pack.types[name])
            if key not in kept:
                begun = time.time()
                kept[key] = bytes_of(pack, sampled(piece, experts), layers, seed)
                seconds, encoded = seconds + time.time() - begun, encoded + kept[key].numel()
            for _ in range(size // kept[key].numel()):
                writer.append(name, kept[key])
            bar.update(size)
    return {
        "seconds": time.time() - started, "encode_seconds": seconds, "encoded_bytes": encoded, "repeated": True,
        "encoded_experts": experts, "seed": seed,
    }  # fmt: skip


def write_header(out: Path, data: bytes) -> None:
    with atomic_path(out) as temporary:
        temporary.write_bytes(data)
    print(f"wrote {out}: {len(data):,} bytes", flush=True)


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="file to write")
    shape_arguments(parser)
    parser.add_argument("--base-type", default="IQ3_XXS", help="of what --tensor-types does not name (default IQ3_XXS)")
    parser.add_argument(
        "--tensor-types", type=Path, default=TYPES, help="file of PATTERN=TYPE lines (default: the published recipe)"
    )
    parser.add_argument("--encode-experts", type=int, default=8, help="experts of a layer that are encoded (default 8)")
    parser.add_argument("--header", type=Path, help="file of --header-only, where llama.cpp's converter is not at hand")
    parser.add_argument("--header-only", action="store_true", help="write only what stands before the first tensor")
    parser.add_argument("--seed", type=int, default=0, help="of the weights (default 0)")
    add_record_arguments(parser)
    return parser.parse_args(arguments)


def main() -> None:
    args = parse_arguments()
    check_record_arguments(args)
    if args.encode_experts < 1:
        raise UserError("--encode-experts must be at least 1")
    started = time.time()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.out.parent) as work:
        checkpoint = empty_model(Path(work) / f"synthetic-{args.shape}", shape_from(args), args.seed)
        pack = plan(checkpoint, type_named(args.base_type, "--base-type"), args.tensor_types)
        header = args.header.read_bytes() if args.header else header_of(pack)
        if args.header_only:
            return write_header(args.out, header)
        made = write_synthetic(pack, header, args.out, args.encode_experts, args.seed)
        metrics = {"synthetic_gguf": made} | report(pack, args.out.stat().st_size)
    if args.result:
        write_result(args.result, kind="bench", tag=args.tag, started=started, recipe=pack.recipe(), metrics=metrics)
    size = f"{metrics['gib']:.2f} GiB, {metrics['bits_per_weight']:.3f} bits a weight"
    print(f"{args.out}: {metrics['parameters']:,} parameters, {size}, {made['seconds']:.1f} s", flush=True)


if __name__ == "__main__":
    run_cli(main)
