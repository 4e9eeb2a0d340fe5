"""A packed checkpoint seen as the dequantized one: the same names, shapes and values, unpacked as they are read.

Not a command; Checkpoint opens packed directories through it. packed.json, beside the weights, lists the tensors of the
dequantized checkpoint in their order with what else is needed to write it again, byte for byte:

    {"format": 1, "group": G, "shards": [tensors of each file], "config": text of config.json,
     "tensors": [[name, dtype, shape, whether it is packed], ...]}
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from console import UserError, read_json
from safetensors_file import DTYPES, TensorInfo

PACKED = "packed.json"  # in a packed checkpoint: what it unpacks to
BITS = 4
CODES_A_WORD = 32 // BITS
CHUNK = {"cpu": 1 << 19, "cuda": 1 << 26}  # values worked on at once


FORMAT = 1
FUSED = re.compile(r"(.*\.experts)\.(gate_up|down)_proj")
PARTS = {"gate_up": ("gate_proj", "up_proj"), "down": ("down_proj",)}


def matrices_of(name: str, shape: tuple[int, ...]) -> list[tuple[str, int]]:
    """(module, rows) of the matrices that a tensor is stored as, in the order of its rows: itself, or for the fused tensor of
    all experts, [E, 2I, H] or [E, H, I], one for each expert and projection, as loaders of packed experts expect them."""
    if len(shape) == 2:
        return [(name.removesuffix(".weight"), shape[0])]
    experts, parts = FUSED.fullmatch(name).groups()
    names = [f"{experts}.{expert}.{part}" for expert in range(shape[0]) for part in PARTS[parts]]
    return [(module, shape[1] // len(PARTS[parts])) for module in names]


@dataclasses.dataclass(frozen=True)
class PackedInfo(TensorInfo):
    """A tensor of the dequantized checkpoint that lies packed: (packed, scale) of its matrices, in the order of its rows.
    ``begin`` and ``end`` only say its size."""

    matrices: tuple[tuple[TensorInfo, TensorInfo], ...] = ()

    def read(self, start: int = 0, count: int | None = None) -> Tensor:
        count = self.shape[0] if count is None else count
        across = math.prod(self.shape[1:-1])  # rows of matrices in a row of the first axis
        out = torch.empty(count * across, self.shape[-1], dtype=self.dtype)
        place, first, last = 0, start * across, (start + count) * across
        for packed, scale in self.matrices:
            low, high = max(first, place), min(last, place + packed.shape[0])
            if low < high:
                part = (low - place, high - low)
                out[low - first : high - first] = unpacked_values(packed.read(*part), scale.read(*part), self.dtype)
            place += packed.shape[0]
        return out.view(count, *self.shape[1:])


def read_manifest(directory: Path) -> dict[str, Any]:
    """packed.json, checked as far as this module relies on it."""
    value = read_json(directory / PACKED)
    if not isinstance(value, dict) or value.get("format") != FORMAT:
        raise UserError(f"{directory / PACKED}: not of format {FORMAT}; pack the checkpoint again")
    try:
        for name, dtype, shape, packed in value["tensors"]:
            fits = isinstance(name, str) and dtype in DTYPES and all(type(size) is int and size >= 0 for size in shape)
            known = not packed or len(shape) == 2 or len(shape) == 3 and FUSED.fullmatch(name)
            if not fits or not known or type(packed) is not bool:
                raise ValueError(name)
        if not isinstance(value["config"], str) or sum(value["shards"]) != len(value["tensors"]) or value["group"] < 1:
            raise ValueError("config, shards, group")
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{directory / PACKED}: malformed ({error}); pack the checkpoint again") from None
    return value


def unpacked_tensors(directory: Path, stored: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    """The tensors that the packed checkpoint with these stored tensors unpacks to; raises :class:`UserError` unless the two
    agree in every name, dtype and shape."""
    manifest, rest, found = read_manifest(directory), dict(stored), {}

    def take(name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> TensorInfo:
        info = rest.pop(name, None)
        if info is None or (info.dtype, info.shape) != (dtype, shape):
            has = "there is none" if info is None else f"it is {info.dtype} {list(info.shape)}"
            raise UserError(f"{directory}: {PACKED} needs {name} {dtype} {list(shape)}, but {has}; pack it again")
        return info

    for name, kind, sizes, packed in manifest["tensors"]:
        dtype, shape = DTYPES[kind], tuple(sizes)
        if not packed:
            found[name] = take(name, dtype, shape)
            continue
        matrices, inputs = [], shape[-1]
        for module, rows in matrices_of(name, shape):
            words = take(f"{module}.weight_packed", torch.int32, (rows, inputs // CODES_A_WORD))
            scale = take(f"{module}.weight_scale", torch.bfloat16, (rows, inputs // manifest["group"]))
            take(f"{module}.weight_shape", torch.int64, (2,))
            matrices.append((words, scale))
        size = math.prod(shape) * dtype.itemsize
        found[name] = PackedInfo(dtype, shape, matrices[0][0].file, 0, size, tuple(matrices))
    if rest:
        raise UserError(f"{directory}: {min(rest)} is not in {PACKED}; pack the checkpoint again")
    return found


def unpack_codes(packed: Tensor) -> Tensor:
    """int32 [..., I/8] -> int8 [..., I] in -8..7."""
    pairs = packed.contiguous().view(torch.uint8)
    return (torch.stack((pairs & 15, pairs >> 4), -1).flatten(-2).view(torch.int8)) - 8


def unpacked_values(packed: Tensor, scale: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """The values [O, I] of packed [O, I/8] int32 and scale [O, I/G]: code * scale in float32 (exact), rounded once."""
    rows, groups = scale.shape
    out = torch.empty(rows, packed.shape[1] * CODES_A_WORD, dtype=dtype, device=packed.device)
    count = max(1, CHUNK.get(packed.device.type, CHUNK["cpu"]) // max(1, out.shape[1]))
    for start in range(0, rows, count):
        piece = slice(start, start + count)
        codes = unpack_codes(packed[piece])
        out[piece] = (codes.view(len(codes), groups, -1) * scale[piece].float()[..., None]).flatten(1)
    return out
