"""A checkpoint directory: its config, and its tensors by name, read whole or in chunks; a packed one as what it unpacks to.

Not a command. `Checkpoint(directory)` reads and checks headers only; `read(name)` is in memory of its own. packed.json, beside
packed weights, lists the tensors of the dequantized checkpoint in their order with what else writes it again, byte for byte:

    {"format": 2, "group": G, "shards": [tensors of each file], "config": text of config.json,
     "tensors": [[name, dtype, shape, bits of its codes or 0 where it is not packed], ...]}

In format 1 the last was whether it is packed, in 4 bits.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fnmatch
import functools
import hashlib
import math
import os
import re
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from console import UserError, file_sha256, files_sha256, read_json, read_object, write_json
from families import FAMILIES, Family, Place, family_of, place_of
from hub import remote_of, spelled
from safetensors_file import DTYPES, TensorInfo, open_tensors, read_header
from source_formats import ScaledInfo, describe, source_tensors, without_quantization, word_count

PACKED = "packed.json"  # in a packed checkpoint: what it unpacks to
FORMAT = 2
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
    """A tensor of the dequantized checkpoint that lies in ``matrices``, in the order of its rows, packed or not. ``begin`` and
    ``end`` only say its size."""

    matrices: tuple[TensorInfo, ...] = ()

    def stored(self) -> tuple[TensorInfo, ...]:
        return tuple(info for matrix in self.matrices for info in matrix.stored())

    def read(self, start: int = 0, count: int | None = None) -> Tensor:
        count = self.shape[0] if count is None else count
        across = math.prod(self.shape[1:-1])  # rows of matrices in a row of the first axis
        out = torch.empty(count * across, self.shape[-1], dtype=self.dtype)
        place, first, last = 0, start * across, (start + count) * across
        for matrix in self.matrices:
            low, high = max(first, place), min(last, place + matrix.shape[0])
            if low < high:
                out[low - first : high - first] = matrix.read(low - place, high - low)
            place += matrix.shape[0]
        return out.view(count, *self.shape[1:])


def read_manifest(directory: Path) -> dict[str, Any]:
    """packed.json, checked as far as this module relies on it."""
    value = read_json(directory / PACKED)
    if not isinstance(value, dict) or value.get("format") not in (1, FORMAT):
        raise UserError(f"{directory / PACKED}: not of format 1 or {FORMAT}; pack the checkpoint again")
    try:
        for name, dtype, shape, packed in value["tensors"]:
            fits = isinstance(name, str) and dtype in DTYPES and all(type(size) is int and size >= 0 for size in shape)
            known = not packed or len(shape) == 2 or len(shape) == 3 and FUSED.fullmatch(name)
            if not fits or not known or packed not in (range(9) if value["format"] == FORMAT else (False, True)):
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
        dtype, shape, bits = DTYPES[kind], tuple(sizes), int(packed) if manifest["format"] == FORMAT else 4 * packed
        if not packed and (name in rest or len(shape) < 3 or not FUSED.fullmatch(name)):
            found[name] = take(name, dtype, shape)
            continue
        matrices: list[TensorInfo] = []
        inputs, group = shape[-1], manifest["group"]
        for module, rows in matrices_of(name, shape):
            if not packed:
                matrices.append(take(f"{module}.weight", dtype, (rows, inputs)))
                continue
            words = take(f"{module}.weight_packed", torch.int32, (rows, word_count(inputs, bits)))
            scale = take(f"{module}.weight_scale", torch.bfloat16, (rows, inputs // group))
            take(f"{module}.weight_shape", torch.int64, (2,))
            size = rows * inputs * dtype.itemsize
            matrices.append(
                ScaledInfo(dtype, (rows, inputs), words.file, 0, size, codes=words, scale=scale, block=(1, group), bits=bits)
            )
        size = math.prod(shape) * dtype.itemsize
        found[name] = PackedInfo(dtype, shape, matrices[0].file, 0, size, tuple(matrices))
    if rest:
        raise UserError(f"{directory}: {min(rest)} is not in {PACKED}; pack the checkpoint again")
    return found


SYNTHETIC = "synthetic.json"  # beside the config.json of what synthetic_moe made: its seed, its shape, the shards still empty
CONSUMED = "consumed.json"  # in a checkpoint whose weights were given up while it was read: {"out": the output that has them}


class Checkpoint:
    """A checkpoint directory: ``config`` (config.json), ``tensors`` (name -> :class:`TensorInfo`, in the order of the
    shards and of their bytes), ``files`` (the shards). Opening reads and checks headers only. A packed checkpoint shows the
    tensors that it unpacks to, one published in another format than BF16 (``source_format``, else None) those that it stands
    for, with the ``config`` of those; what is read is decoded. One of the hub (``remote``) holds headers; what is read is
    fetched."""

    source_format: str | None = None

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.exists():
            more = "; quantize.sh, pack_gguf.sh and moe_probe read from the hub" if spelled(path) else ""
            raise UserError(f"{self.path}: no such model directory{more}")
        if not self.path.is_dir():
            raise UserError(f"{self.path}: not a directory; give the directory that holds config.json")
        if not (self.path / "config.json").is_file():
            raise UserError(f"{self.path}: no config.json in it; is this a model directory?")
        self.config: dict[str, Any] = read_object(self.path / "config.json")
        self.files, self.tensors = open_tensors(self.path)
        self.remote = remote_of(self.path)
        if self.remote:
            self.tensors = {name: self.remote.tensor(info) for name, info in self.tensors.items()}
        if self.is_packed:
            self.tensors = unpacked_tensors(self.path, self.tensors)
        else:
            self.tensors = source_tensors(self.path, self.config, self.tensors)
            self.source_format, self.config = describe(self.config), without_quantization(self.config)

    @property
    def is_packed(self) -> bool:
        return (self.path / PACKED).is_file()

    @property
    def bytes(self) -> int:
        """Size of the weight files on disk."""
        return sum(file.stat().st_size for file in self.files)

    @property
    def hub(self) -> dict[str, str]:
        """The entry of a recipe for a model of the hub: its name and commit. Empty for another."""
        return {"hub": self.remote.uri} if self.remote else {}

    @functools.cached_property
    def config_sha256(self) -> str:
        return hashlib.sha256((self.path / "config.json").read_bytes()).hexdigest()

    @functools.cached_property
    def identity(self) -> dict[str, str]:
        """:func:`source_identity`; where the weights were given up while they were read, what they were."""
        mark = self.path / CONSUMED
        kept = read_object(mark, "out").get("identity") if mark.exists() else None
        return kept or source_identity(self.path)

    def sha256(self) -> str:
        """One digest of all weight files: console.files_sha256."""
        if not self.remote:
            return files_sha256(self.files)
        told = [self.remote.files[file.name]["digest"] for file in self.files]
        return told[0] if len(told) == 1 else hashlib.sha256("".join(told).encode()).hexdigest()

    @functools.cached_property
    def model_type(self) -> str:
        if not isinstance(found := self.config.get("model_type"), str):
            raise UserError(f"{self.path / 'config.json'}: has no model_type")
        return found

    @property
    def known_family(self) -> Family | None:
        """What families.py says of the model; None of one that it does not know."""
        return FAMILIES.get(self.model_type.removesuffix("_text"))

    @property
    def family(self) -> Family:
        return FAMILIES[family_of(self.model_type)]

    @functools.cached_property
    def places(self) -> dict[str, Place]:
        """Where each tensor lies in transformers' module tree."""
        return {name: place_of(name, self.model_type) for name in self.tensors}

    @functools.cached_property
    def sources(self) -> dict[str, list[str]]:
        """The tensors of each parameter of transformers' module tree, in the checkpoint's order."""
        found: dict[str, list[str]] = {}
        for name, place in self.places.items():
            found.setdefault(place.parameter, []).append(name)
        return found

    def parameter_shape(self, parameter: str) -> tuple[int, ...]:
        """The shape of a parameter that is one tensor on disk, or the stack of its experts' matrices."""
        sources = self.sources.get(parameter)
        if not sources:
            raise UserError(f"{self.path}: has no tensor for {parameter}")
        shape, places = self.tensors[sources[0]].shape, [self.places[source] for source in sources]
        if places[0].expert is None:
            return shape
        experts, halves = 1 + max(place.expert or 0 for place in places), 2 if places[0].part else 1
        if len(sources) != experts * halves:
            raise UserError(f"{self.path}: {parameter}: {len(sources)} matrices for {experts} experts; some are missing")
        return experts, shape[0] * halves, shape[1]

    def info(self, name: str) -> TensorInfo:
        if name not in self.tensors:
            raise UserError(f"{self.path}: no tensor {name}")
        return self.tensors[name]

    def read(self, name: str) -> Tensor:
        """The whole tensor, in memory of its own."""
        return self.info(name).read()

    def on_disk(self, names: Iterable[str]) -> contextlib.AbstractContextManager[None]:
        """Another program can read these tensors in the directory: those of the hub lie there meanwhile."""
        return self.remote.filled(self.tensors[name] for name in names) if self.remote else contextlib.nullcontext()

    def expect(self, groups: Iterable[Iterable[str]], budget: int | None = None, whole: bool = False) -> None:
        """What will be read next, in this order, groups of neighbours (a layer) in that of the files: hub.Remote.expect."""
        if self.remote:
            self.remote.expect([[self.tensors[name] for name in names] for names in groups], budget, whole)

    def read_chunks(self, name: str, max_bytes: int) -> Iterator[tuple[int, Tensor]]:
        """(start, slice along axis 0) pieces of at most ``max_bytes``, never less than one row of axis 0."""
        info = self.info(name)
        if not info.shape or not info.numel:
            yield 0, self.read(name)
            return
        row = info.bytes // info.shape[0]
        step = max(1, max_bytes // row)
        for start in range(0, info.shape[0], step):
            yield start, info.read(start, min(step, info.shape[0] - start))


# The files beside the weights that decide what a checkpoint answers; a README or a licence may change.
DECIDING = (
    "config.json", "generation_config.json", "*tokenizer*", "vocab.*", "merges.txt", "special_tokens_map.json",
    "added_tokens.json", "chat_template*", "*.jinja", "*.tiktoken", "*processor_config.json", PACKED,
)  # fmt: skip
WHOLE_BYTES = 64 << 20  # a file of at most this size is digested whole
SAMPLE_BYTES, SAMPLES, SAMPLE_EVERY = 4096, 3, 16 << 20  # of a matrix: pieces of this size, so many and one for each 16 MiB
MATRIX_BYTES = 64 << 10  # a tensor of smaller slices (a convolution) is sampled as one matrix
SAMPLERS = 32  # reads at once: a disk answers many small ones together


def sample_spans(begin: int, shape: Sequence[int], size: int) -> Iterator[tuple[int, int]]:
    """(offset, bytes) of the pieces read of a tensor of ``size`` bytes at ``begin``: first, last and evenly between, in each of
    its matrices (an expert of a fused tensor may be replaced alone)."""
    matrices = shape[0] if len(shape) > 2 and size >= shape[0] * MATRIX_BYTES and size % shape[0] == 0 else 1
    each = size // matrices
    for start in range(begin, begin + size, each) if each else ():
        count, room = max(SAMPLES, each // SAMPLE_EVERY), each - SAMPLE_BYTES
        if room <= SAMPLE_BYTES * (count - 2):
            yield start, each
            continue
        for place in range(count):
            yield start + room * place // (count - 1), SAMPLE_BYTES


def _layout(file: Path) -> tuple[int, Iterable[tuple[int, Sequence[int], int]]] | None:
    """(bytes before the first tensor, (begin, shape, bytes) of every tensor) of a safetensors file or a GGUF; None: another
    file."""
    if file.suffix in (".safetensors", ".st"):
        infos = read_header(file).values()
        return min((i.begin for i in infos), default=file.stat().st_size), [(i.begin, i.shape, i.bytes) for i in infos]
    if file.suffix != ".gguf":
        return None
    from gguf import GGUFReader

    try:
        found = [(int(t.data_offset), tuple(map(int, t.shape[::-1])), int(t.n_bytes)) for t in GGUFReader(file).tensors]
    except (ValueError, IndexError, KeyError, OverflowError) as error:
        raise UserError(f"{file}: truncated, or not a GGUF file ({error}); write it again") from None
    return min((begin for begin, _, _ in found), default=file.stat().st_size), found


def file_identity(file: Path) -> str:
    """ "SIZE:DIGEST" of one file: of all its bytes if it is small or holds no tensors, else of its header and of pieces of
    every tensor (300 to 500 reads of 4 KiB a GB of a mixture of experts)."""
    try:
        size = file.stat().st_size
        layout = _layout(file) if size > WHOLE_BYTES else None
        if layout is None:
            return f"{size}:{file_sha256(file)}"
        head, tensors = layout
        spans = [(0, head), *(span for tensor in tensors for span in sample_spans(*tensor))]
        digest = hashlib.sha256()
        with file.open("rb") as stream, ThreadPoolExecutor(SAMPLERS, "sample") as pool:
            descriptor = stream.fileno()
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
            for piece in pool.map(lambda span: os.pread(descriptor, span[1], span[0]), spans):
                digest.update(piece)
        return f"{size}:{digest.hexdigest()}"
    except OSError as error:
        raise UserError(f"{file}: cannot read ({error.strerror or error})") from None


def source_identity(path: str | Path) -> dict[str, str]:
    """What makes a model, or any input file, this one and no other, wherever it lies: "SIZE:DIGEST" by file name, of all shards
    and of the files beside them that change what it answers. Seconds for 250 GB: see :func:`file_identity`."""
    path = Path(path)
    told = {}
    if path.is_dir():
        names = sorted(f.name for f in path.iterdir() if f.is_file() and any(fnmatch.fnmatch(f.name, p) for p in DECIDING))
        remote = remote_of(path)
        told = remote.identity if remote else {}
        files = [*(() if remote else open_tensors(path)[0]), *(path / name for name in names)]
    elif parts := re.fullmatch(r"(.+)-\d{5}-of-(\d{5})\.gguf", path.name):
        files = [path.with_name(f"{parts[1]}-{n:05d}-of-{parts[2]}.gguf") for n in range(1, int(parts[2]) + 1)]
    else:
        files = [path]
    return told | {file.name: file_identity(file) for file in files}


def different_file(before: Any, now: Mapping[str, str]) -> str | None:
    """How the first file in which two identities differ does, in words; None where they are equal. A single file may have
    another name. ``before`` was read from a file: what is no identity differs."""
    if not isinstance(before, Mapping) or not before:
        return "there is no identity of it"
    if len(before) == len(now) == 1:
        before = dict(zip(now, before.values()))
    for name in sorted(before.keys() | now.keys()):
        if name not in now or name not in before:
            return f"{name} is {'new' if name in now else 'gone'}"
        if before[name] != now[name]:
            if name == "commit":
                return f"it was {before[name]}, now it is {now[name]}"
            size, other = str(before[name]).partition(":")[0], now[name].partition(":")[0]
            return f"{name} differs ({f'{size} bytes, now {other}' if size != other else 'same size, other content'})"
    return None


def model_name(path: Path) -> str:
    """What a model directory is called: its own name, or in the hub's cache (models--OWNER--NAME/snapshots/COMMIT) NAME."""
    found = path.resolve()
    cached = re.fullmatch(r"models--(?:.+?--)?(.+)", found.parent.parent.name)
    return cached[1] if cached and found.parent.name == "snapshots" else found.name


def is_synthetic(model: Path) -> bool:
    """Whether a checkpoint is one of synthetic_moe, which can be made again."""
    return (model / SYNTHETIC).is_file()


class ShardWriter(Protocol):
    """What the writers of plain and packed checkpoints have in common here."""

    def is_complete(self, name: str) -> bool:
        """Whether the shard of this tensor is whole and on the disk by now."""


class SourceShards:
    """The shards of a checkpoint that is consumed: each gives its disk back once all its tensors lie in complete shards of the
    output. Its header and size stay until :meth:`remove`, so that a killed run goes on; the weights then read as zeros. Only
    what no run that resumes reads again may be given up: the calibrated pass needs whole layers."""

    def __init__(self, checkpoint: Checkpoint, out: Path) -> None:
        self.checkpoint, self.out = checkpoint, out
        self.lock = threading.Lock()  # several writers sweep
        self.left: dict[Path, list[str]] = {}
        for name, info in checkpoint.tensors.items():
            self.left.setdefault(info.file, []).append(name)

    def begin(self, resumed: bool) -> None:
        """Raise :class:`UserError` where another run has consumed the checkpoint; else say that this one will, and what the
        weights were."""
        mark, identity = self.checkpoint.path / CONSUMED, self.checkpoint.identity
        if mark.exists() and not (resumed and read_object(mark, "out")["out"] == str(self.out)):
            raise UserError(f"{self.checkpoint.path}: its weights were consumed by a run into {read_object(mark)['out']}")
        write_json(mark, {"out": str(self.out), "identity": identity})

    def sweep(self, writer: ShardWriter) -> None:
        """Give back what the output holds by now."""
        with self.lock:
            for file, names in list(self.left.items()):
                if all(writer.is_complete(name) for name in names):
                    size, start = file.stat().st_size, min(self.checkpoint.tensors[name].begin for name in names)
                    os.truncate(file, start)
                    os.truncate(file, size)
                    del self.left[file]

    def remove(self) -> None:
        """Delete the shards, when the output is complete."""
        for file in self.checkpoint.files:
            file.unlink()
