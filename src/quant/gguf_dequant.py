"""What a GGUF holds, as a BF16 checkpoint of the original's names and shapes: the same weights for transformers and vLLM.

    python src/quant/gguf_dequant.py --gguf work/iq3/razor-tiny-IQ3_XXS.gguf --model models/razor-tiny --out work/iq3-bf16
    python src/quant/gguf_dequant.py --gguf SmolLM2-135M-Instruct.Q4_1.gguf --out work/smollm2     # make_tiny.sh smollm2

Every tensor that the file stores in a lossy type is decoded, put back into the original's order and rounded to its dtype; what
the file holds exactly, and what is not in it (vision), is copied. A function of weights that the file rounds cannot be put
back: it is named. Without --model, where nothing but the file is there, config, tokenizer and weights are those that
transformers reads of it.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from checkpoint import Checkpoint, source_identity
from console import UserError, progress, run_cli, write_json, writing
from ggml_codecs import decode_rows
from gguf_format import GgufFile, without_ones
from gguf_layout import Piece, into_parameter, pieces_of, read_parameter, traced
from hf_model import listed
from plans import copy_sidecars, sidecars
from records import DECODED_MARK, header_sha256
from run_dir import check_output, staged_directory
from safetensors_file import CheckpointWriter

EXACT = {  # what a type holds exactly
    "f32": (torch.float32, torch.bfloat16, torch.float16),
    "bf16": (torch.bfloat16,),
    "f16": (torch.float16,),
}


def check_match(file: GgufFile, checkpoint: Checkpoint, pieces: Sequence[Piece]) -> None:
    """Raise :class:`UserError` unless the file is one of this model."""
    expected = traced(checkpoint, "none")["architecture"]
    if file.architecture() != expected:
        raise UserError(f"{file.path}: architecture {file.architecture()}, but {checkpoint.path} is {expected}")
    for piece in pieces:
        if piece.name not in file.tensors or without_ones(file.shape(piece.name)) != without_ones(piece.shape):
            found = list(file.shape(piece.name)) if piece.name in file.tensors else "absent"
            raise UserError(f"{file.path}: {piece.name} is {found}, {checkpoint.path} needs {list(piece.shape)}")


def is_exact(piece: Piece, kind: str, checkpoint: Checkpoint) -> bool:
    """Whether a file that stores the piece in this type holds what the checkpoint has, or in float32 what it is made of."""
    return (
        kind == "f32"
        or piece.function == "same"
        and all(checkpoint.info(name).dtype in EXACT.get(kind, ()) for name in piece.sources)
    )


class Decoded:
    """The tensors of a checkpoint as a GGUF of it has them. ``kept``: the names of the file's tensors that are rounded
    functions of weights, which cannot be put back: their weights stay as the checkpoint has them."""

    def __init__(self, file: GgufFile, checkpoint: Checkpoint, pieces: Sequence[Piece]) -> None:
        self.file, self.checkpoint = file, checkpoint
        rounded = [piece for piece in pieces if not is_exact(piece, file.kind(piece.name), checkpoint)]
        self.kept = [piece.name for piece in rounded if piece.function != "same"]
        changed = {piece.parameter for piece in rounded if piece.function == "same"}
        self.pieces: dict[str, list[Piece]] = {}
        self.sources: dict[str, tuple[str, ...]] = {}  # the tensors that a parameter, or a row of them, is made of
        self.parameter_of: dict[str, str] = {}
        for piece in pieces:
            if piece.parameter in changed and piece.function == "same":
                self.pieces.setdefault(piece.parameter, []).append(piece)
                own = piece.sources if self._is_row(piece) else tuple(checkpoint.sources[piece.parameter])
                self.sources[piece.parameter] = own
                self.parameter_of |= dict.fromkeys(own, piece.parameter)
        self.values: dict[str, Tensor] = {}

    def _is_row(self, piece: Piece) -> bool:
        """Whether the piece's parameter is none of the module tree, but the rows of its sources, one after the other."""
        known = self.checkpoint.known_family is not None
        return not (known and piece.parameter in self.checkpoint.sources)

    def read(self, name: str) -> Tensor:
        """A tensor. Two parameters are kept: an expert's matrices alternate."""
        info, parameter = self.checkpoint.info(name), self.parameter_of.get(name)
        if parameter is None:
            return self.checkpoint.read(name)
        if parameter not in self.values:
            if len(self.values) > 1:
                self.values.pop(next(iter(self.values)))
            self.values[parameter] = self._parameter(parameter)
        full, sources = self.values[parameter], self.sources[parameter]
        if not self._is_row(self.pieces[parameter][0]):
            full = self.checkpoint.places[name].view(full)
        elif len(sources) > 1:
            sizes = [self.checkpoint.info(source).numel // full.shape[-1] for source in sources]
            full = full.split(sizes)[sources.index(name)]
        return full.to(info.dtype).reshape(info.shape)

    def _parameter(self, parameter: str) -> Tensor:
        pieces = self.pieces[parameter]
        whole = dataclasses.replace(pieces[0], sources=self.sources[parameter])
        if sum(piece.numel for piece in pieces) < sum(self.checkpoint.info(name).numel for name in whole.sources):
            full = read_parameter(self.checkpoint, whole).float()  # the file has only a part of it
        elif self._is_row(whole):
            full = torch.empty(read_shape(self.checkpoint, whole))
        else:
            full = torch.empty(self.checkpoint.parameter_shape(parameter))
        for piece in pieces:
            value = decode_rows(self.file.data(piece.name), self.file.kind(piece.name)).view(piece.shape)
            into_parameter(piece, value, full)
        return full


def read_shape(checkpoint: Checkpoint, piece: Piece) -> tuple[int, ...]:
    """The shape in which gguf_layout.read_parameter gives a piece whose parameter is none of the module tree."""
    if len(piece.sources) == 1:
        return checkpoint.info(piece.sources[0]).shape
    return sum(checkpoint.info(name).numel for name in piece.sources) // piece.width, piece.width


def dequantize(path: Path, model: Path, out: Path, force: bool = False, shard_bytes: int = 4 << 30) -> None:
    """Write the checkpoint ``out``; it appears when it is complete."""
    file, checkpoint, out = GgufFile(path), Checkpoint(model), Path(out).resolve()
    pieces = pieces_of(checkpoint, "file" if file.fields.get(f"{file.architecture()}.nextn_predict_layers") else "none")
    check_match(file, checkpoint, pieces)
    check_output(checkpoint.path, out, force, checkpoint.bytes, DECODED_MARK)
    mark = mark_of(file, checkpoint)
    job = {"gguf": source_identity(path), "source": checkpoint.identity}
    plan = [(name, info.dtype, info.shape) for name, info in checkpoint.tensors.items()]
    decoded = Decoded(file, checkpoint, pieces)
    if decoded.kept:
        print(f"{out}: as the original has them, though the file rounds a function of them: {listed(decoded.kept)}", flush=True)
        mark["not_decoded"] = decoded.kept
    with staged_directory(out, force, job) as partial:
        copy_sidecars(checkpoint, sidecars(checkpoint.path), partial)
        with (
            progress(sum(info.bytes for info in checkpoint.tensors.values()), "dequantize", "B", True) as bar,
            CheckpointWriter(partial, plan, shard_bytes) as writer,
        ):
            for name, info in checkpoint.tensors.items():
                if not writer.is_done(name):
                    writer.append(name, decoded.read(name))
                bar.update(info.bytes)
        write_json(partial / DECODED_MARK, mark)


def read_alone(path: Path, out: Path, force: bool = False) -> None:
    """Write the checkpoint ``out`` of a file whose original is not here; :class:`UserError` where transformers reads no such
    architecture or tokenizer of a GGUF."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    file, out = GgufFile(path), Path(out).resolve()
    check_output(path.resolve(), out, force, 2 * sum(math.prod(file.shape(name)) for name in file.tensors), DECODED_MARK)
    given: dict[str, Any] = {"gguf_file": path.name, "local_files_only": True}
    try:
        tokenizer = AutoTokenizer.from_pretrained(path.parent, **given)
        whole = {"quantization_config": GgufConfig(dequantize=True), "dtype": torch.bfloat16}
        model = AutoModelForCausalLM.from_pretrained(path.parent, **given, **whole)
    except (ValueError, KeyError, NotImplementedError, ImportError) as error:
        said = " ".join(str(error).split())[:300]
        raise UserError(f"{path}: transformers reads no such file ({said}); give --model, what it was made from") from None
    with staged_directory(out, force, {"gguf": source_identity(path)}) as partial, writing(partial):
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        write_json(partial / DECODED_MARK, mark_of(file, Checkpoint(partial)))


def mark_of(file: GgufFile, checkpoint: Checkpoint) -> dict[str, Any]:
    """What a checkpoint that was decoded holds of the file, and of its own headers."""
    head = file.path.open("rb").read(1 << 20)
    made_from = {"file": file.path.name, "bytes": file.bytes, "head_sha256": hashlib.sha256(head).hexdigest()}
    return {"gguf": made_from, "config_sha256": checkpoint.config_sha256, "header_sha256": header_sha256(checkpoint)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--gguf", required=True, type=Path, help="the file to decode")
    parser.add_argument("--model", type=Path, help="the checkpoint that the file was made from (default: the file alone)")
    parser.add_argument("--out", required=True, type=Path, help="directory to make")
    parser.add_argument("--force", action="store_true", help="replace an earlier output once the new one is complete")
    args = parser.parse_args()
    if args.model:
        dequantize(args.gguf, args.model, args.out, args.force)
    else:
        read_alone(args.gguf, args.out, args.force)
    print(f"wrote {args.out}", flush=True)


if __name__ == "__main__":
    run_cli(main)
