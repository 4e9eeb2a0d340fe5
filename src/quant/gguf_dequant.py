"""What a GGUF holds, as a BF16 checkpoint of the original's names and shapes: the same weights for transformers and vLLM.

    python src/quant/gguf_dequant.py --gguf work/iq3/razor-tiny-IQ3_XXS.gguf --model models/razor-tiny --out work/iq3-bf16

Every tensor that the file stores in a lossy type is decoded, put back into transformers' order and rounded to the original's
dtype; what it stores in float32 or bfloat16, and what is not in the file (vision), is copied.
"""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from checkpoint import Checkpoint, source_identity
from console import UserError, progress, run_cli, write_json
from families import FAMILIES, family_of
from ggml_codecs import decode_rows
from gguf_format import GgufFile
from gguf_layout import Piece, into_parameter, pieces_of
from plans import copy_sidecars, sidecars
from records import DECODED_MARK, header_sha256
from run_dir import check_output, staged_directory
from safetensors_file import CheckpointWriter

LOSSLESS = ("f32", "bf16")  # what is stored so is as the checkpoint has it


def check_match(file: GgufFile, checkpoint: Checkpoint, pieces: list[Piece]) -> None:
    """Raise :class:`UserError` unless the file is one of this model."""
    expected = FAMILIES[family_of(checkpoint.config["model_type"])].ggml
    if file.architecture() != expected:
        raise UserError(f"{file.path}: architecture {file.architecture()}, but {checkpoint.path} is {expected}")
    for piece in pieces:
        if piece.name not in file.tensors or file.shape(piece.name) != piece.shape:
            found = list(file.shape(piece.name)) if piece.name in file.tensors else "absent"
            raise UserError(f"{file.path}: {piece.name} is {found}, {checkpoint.path} needs {list(piece.shape)}")


def decoded(file: GgufFile, checkpoint: Checkpoint, by_parameter: Mapping[str, Sequence[Piece]]) -> Callable[[str], Tensor]:
    """What gives a tensor of the checkpoint as the file has it. It keeps two parameters: an expert's matrices alternate."""
    kept: dict[str, Tensor] = {}

    def value(name: str) -> Tensor:
        info, place = checkpoint.info(name), checkpoint.places[name]
        if place.parameter not in by_parameter:
            return checkpoint.read(name)
        if place.parameter not in kept:
            pieces = by_parameter[place.parameter]
            if len(kept) > 1:
                kept.pop(next(iter(kept)))
            full = kept[place.parameter] = torch.empty(checkpoint.parameter_shape(place.parameter))
            for piece in pieces:
                into_parameter(piece, decode_rows(file.data(piece.name), file.kind(piece.name)).view(piece.shape), full)
        return place.view(kept[place.parameter]).to(info.dtype).reshape(info.shape)

    return value


def dequantize(path: Path, model: Path, out: Path, force: bool = False, shard_bytes: int = 4 << 30) -> None:
    """Write the checkpoint ``out``; it appears when it is complete."""
    file, checkpoint, out = GgufFile(path), Checkpoint(model), Path(out).resolve()
    pieces = pieces_of(checkpoint, "file" if file.fields.get(f"{file.architecture()}.nextn_predict_layers") else "none")
    check_match(file, checkpoint, pieces)
    by_parameter: dict[str, list[Piece]] = {}
    for piece in pieces:
        by_parameter.setdefault(piece.parameter, []).append(piece)
    by_parameter = {name: ps for name, ps in by_parameter.items() if any(file.kind(p.name) not in LOSSLESS for p in ps)}
    check_output(checkpoint.path, out, force, checkpoint.bytes, DECODED_MARK)
    head = path.open("rb").read(1 << 20)
    made_from = {"file": path.name, "bytes": path.stat().st_size, "head_sha256": hashlib.sha256(head).hexdigest()}
    mark = {"gguf": made_from, "config_sha256": checkpoint.config_sha256, "header_sha256": header_sha256(checkpoint)}
    job = {"gguf": source_identity(path), "source": checkpoint.identity}
    plan = [(name, info.dtype, info.shape) for name, info in checkpoint.tensors.items()]
    with staged_directory(out, force, job) as partial:
        copy_sidecars(checkpoint, sidecars(checkpoint.path), partial)
        with (
            progress(sum(info.bytes for info in checkpoint.tensors.values()), "dequantize", "B", True) as bar,
            CheckpointWriter(partial, plan, shard_bytes) as writer,
        ):
            value = decoded(file, checkpoint, by_parameter)
            for name, info in checkpoint.tensors.items():
                if not writer.is_done(name):
                    writer.append(name, value(name))
                bar.update(info.bytes)
        write_json(partial / DECODED_MARK, mark)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--gguf", required=True, type=Path, help="the file to decode")
    parser.add_argument("--model", required=True, type=Path, help="the checkpoint that the file was made from")
    parser.add_argument("--out", required=True, type=Path, help="directory to make")
    parser.add_argument("--force", action="store_true", help="replace an earlier output once the new one is complete")
    args = parser.parse_args()
    dequantize(args.gguf, args.model, args.out, args.force)
    print(f"wrote {args.out}", flush=True)


if __name__ == "__main__":
    run_cli(main)
