"""Read and write safetensors files tensor by tensor, in bounded memory (plain reads, no mmap).

Not a command. Format: https://github.com/huggingface/safetensors (8 bytes little-endian header length, JSON header,
data without holes). Every header is checked, by the library, and compared with the index before anything is read.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from console import UserError, WriteError, atomic_path, read_json, write_json, writing

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
READERS, SLICE_BYTES = 4, 8 << 20  # threads that fill one large read together: one alone neither keeps a fast disk nor a page
# cache busy, since the memory that it reads into is new and has to be mapped


def release(descriptor: int, begin: int, size: int) -> None:
    """Start writing these bytes of a file to disk and let go of those that are there: what is streamed once should not fill the
    page cache, nor wait in it for one long flush at the end. ``size`` 0: to the end."""
    os.posix_fadvise(descriptor, begin, size, os.POSIX_FADV_DONTNEED)


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies: ``begin`` and ``end`` are byte offsets from the start of ``file``."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    file: Path
    begin: int
    end: int

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        return self.end - self.begin

    def stored(self) -> tuple[TensorInfo, ...]:
        """The tensors of the file that are read for it: itself, or the codes and scales that it is decoded from."""
        return (self,)

    def read(self, start: int = 0, count: int | None = None) -> Tensor:
        """The tensor, or ``count`` rows of its first axis from ``start``, in memory of its own."""
        offset, shape = self.begin, self.shape
        if count is not None:
            offset, shape = offset + start * (self.bytes // shape[0]), (count, *shape[1:])
        buffer = torch.empty(math.prod(shape) * self.dtype.itemsize, dtype=torch.uint8)
        self._load(memoryview(buffer.numpy()), offset)
        return buffer.view(self.dtype).view(shape)

    def _load(self, view: memoryview, offset: int) -> None:
        """Fill ``view`` with the bytes of the file from ``offset`` on."""
        size = len(view)
        parts = [(first, min(first + SLICE_BYTES, size)) for first in range(0, size, SLICE_BYTES)]

        def read(part: tuple[int, int]) -> int:
            first, stop = part
            while first < stop and (got := os.preadv(descriptor, [view[first:stop]], offset + first)):
                first += got
            return stop - first

        with self.file.open("rb") as stream:
            descriptor = stream.fileno()
            if len(parts) < 2:
                missing = sum(map(read, parts))
            else:
                os.posix_fadvise(descriptor, offset, size, os.POSIX_FADV_WILLNEED)  # all of it is asked of the disk at once
                with ThreadPoolExecutor(READERS, "read") as pool:
                    missing = sum(pool.map(read, parts))
        if missing:
            raise UserError(f"{self.file}: became shorter while it was read")


def read_header(file: Path) -> dict[str, TensorInfo]:
    """The tensors of one safetensors file in the order of their bytes. Raises :class:`UserError` on a file that is
    truncated, too long, or whose tensors overlap or leave a hole."""
    try:
        with safe_open(file, "pt"), file.open("rb") as stream:  # the library has checked it all
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(length))
    except SafetensorError as error:
        raise UserError(f"{file}: truncated, or not a safetensors file ({error}); download it again") from None
    except OSError as error:
        raise UserError(f"{file}: cannot read ({error.strerror or error})") from None
    header.pop("__metadata__", None)
    infos = {}
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        if entry["dtype"] not in DTYPES:
            raise UserError(f"{file}: tensor {name} has dtype {entry['dtype']!r}; known: {', '.join(DTYPES)}")
        begin, end = (8 + length + offset for offset in entry["data_offsets"])
        infos[name] = TensorInfo(DTYPES[entry["dtype"]], tuple(entry["shape"]), file, begin, end)
    return infos


def open_tensors(directory: Path) -> tuple[list[Path], dict[str, TensorInfo]]:
    """(the shards in order of name, the tensors in the order of the shards and of their bytes) of a directory."""
    single, index = directory / SINGLE, directory / INDEX
    if single.is_file() and index.is_file():
        raise UserError(f"{directory}: has both {SINGLE} and {INDEX}; remove the one that does not belong")
    if single.is_file():
        return [single], read_header(single)
    if not index.is_file():
        raise UserError(f"{directory}: has neither {SINGLE} nor {INDEX}; other weight formats are not read")
    found = read_json(index)
    weight_map = found.get("weight_map") if isinstance(found, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index}: has no weight_map; download it again")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise UserError(f"{index}: {name} is said to lie in {shard!r}, which is not a file name in this directory")
    shards = [directory / shard for shard in sorted(set(weight_map.values()))]
    if missing := [shard.name for shard in shards if not shard.is_file()]:
        raise UserError(f"{directory}: {len(missing)} of {len(shards)} shards missing: {missing[0]}; download again")
    tensors: dict[str, TensorInfo] = {}
    for shard in shards:
        for name, info in read_header(shard).items():
            if weight_map.get(name) != shard.name:
                raise UserError(f"{directory}: {shard.name} holds {name}, which the index places in {weight_map.get(name)}")
            tensors[name] = info
    if lost := weight_map.keys() - tensors.keys():
        name = min(lost)
        raise UserError(f"{directory}: the index lists {name} in {weight_map[name]}, which does not hold it")
    return shards, tensors


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file in one go, atomically; a full disk is a :class:`WriteError`."""
    with atomic_path(path) as temporary:
        try:
            save_file(dict(tensors), temporary, dict(metadata) if metadata else None)
        except SafetensorError as error:
            raise WriteError(f"{path}: cannot write ({error})") from None


Plan = Sequence[tuple[str, torch.dtype, tuple[int, ...]]]


Shard = list[tuple[str, torch.dtype, tuple[int, ...], int]]  # of a plan, with sizes in bytes


def split_plan(plan: Plan, shard_bytes: int, breaks: Collection[str]) -> list[Shard]:
    """Tensors with their sizes, in plan order, in shards of at most ``shard_bytes`` (a larger tensor has its own); a
    tensor in ``breaks`` begins a shard."""
    shards: list[Shard] = [[]]
    filled = 0
    for name, dtype, shape in plan:
        size = math.prod(shape) * dtype.itemsize
        if shards[-1] and (filled + size > shard_bytes or name in breaks):
            shards.append([])
            filled = 0
        shards[-1].append((name, dtype, tuple(shape), size))
        filled += size
    return shards


def partial_name(file: Path) -> Path:
    """The name of a shard while it is being written."""
    return file.with_name(file.name + ".partial")


class CheckpointWriter:
    """Write safetensors from a plan [(name, dtype, shape)]: :meth:`append` tensors, or slices of them along axis 0, in
    plan order. Use as a context manager: leaving it without an error checks that all of the plan was written and writes
    the index if there are several shards.

    A shard has the suffix .partial until it is complete and synced, so a file under its own name is whole. Opening a
    directory that holds complete shards of the same plan resumes: :meth:`is_done` says which tensors need no append.
    Within a shard wider dtypes lie first, so that every tensor is aligned, whatever the order of the plan.

    ``share`` (n, of): one of several writers at the same time, which has every of-th shard from the n-th on; another writer
    that finds them complete writes the index.
    """

    def __init__(
        self, out_dir: str | Path, plan: Plan, shard_bytes: int, breaks: Collection[str] = (), share: tuple[int, int] = (0, 1),
        stem: str = "model",
    ) -> None:  # fmt: skip
        self.out_dir = Path(out_dir)
        shards = split_plan(plan, shard_bytes, breaks)
        count = len(shards)
        self.files = [
            self.out_dir / (SINGLE if count == 1 and stem == "model" else f"{stem}-{number:05d}-of-{count:05d}.safetensors")
            for number in range(1, count + 1)
        ]
        self.tensors: dict[str, TensorInfo] = {}
        self._starts: dict[Path, bytes] = {}
        for file, shard in zip(self.files, shards, strict=True):
            self._lay_out(file, shard)
        if len(self.tensors) != len(plan):
            raise ValueError("a tensor is planned twice")
        self._whole = share[1] == 1
        self._own = set(self.files[share[0] :: share[1]])
        self._done = {file for file in self.files if file.exists()}
        self.closed: set[Path] = set()  # shards that this run has completed
        names = (name for name, info in self.tensors.items() if info.numel and self.is_own(name))
        self._pending = iter([name for name in names if not self.is_done(name)])
        self._name = next(self._pending, None)
        self._written = 0  # bytes of the current tensor
        self._stream: BinaryIO | None = None
        self._open: Path | None = None  # the shard that is being written

    def is_done(self, name: str) -> bool:
        """Whether the shard of this tensor was complete when the writer was made."""
        return self.tensors[name].file in self._done

    def read(self, name: str) -> Tensor:
        """A tensor of a complete shard."""
        return self.tensors[name].read()

    def is_own(self, name: str) -> bool:
        """Whether this writer is the one that writes the tensor."""
        return self.tensors[name].file in self._own

    def is_complete(self, name: str) -> bool:
        """Whether the shard of this tensor is whole and on the disk by now."""
        file = self.tensors[name].file
        if file not in self._done and file not in self.closed and file not in self._own and file.exists():
            self.closed.add(file)  # by another writer
        return file in self._done or file in self.closed

    def write_empty(self) -> None:
        """Make every shard as its header before a hole that reads as zeros, and the index: a plan that takes no disk."""
        for file in self.files:
            with writing(file), file.open("wb") as stream:
                stream.write(self._starts[file])
                stream.truncate(max(info.end for info in self.tensors.values() if info.file == file))
        self._write_index()

    def _lay_out(self, file: Path, shard: Shard) -> None:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for name, dtype, shape, size in sorted(shard, key=lambda item: -item[1].itemsize):
            header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [offset, offset + size]}
            offset += size
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # the format aligns the data to 8 bytes
        self._starts[file] = len(text).to_bytes(8, "little") + text
        for name, dtype, shape, _ in shard:
            begin, end = (8 + len(text) + value for value in header[name]["data_offsets"])
            self.tensors[name] = TensorInfo(dtype, shape, file, begin, end)

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            if self._stream:
                with contextlib.suppress(OSError):  # of a full disk, again
                    self._stream.close()
            return
        self._close_shard()
        if self._name is not None:
            raise ValueError(f"{self._name} was planned but not written in full")
        for file in self.files:  # a shard of empty tensors only has had no append
            if file in self._own and not file.exists():
                self._open_shard(file)
                self._close_shard()
        if self._whole:
            self._write_index()

    def _write_index(self) -> None:
        if self.files[0].name != SINGLE:
            total = sum(info.bytes for info in self.tensors.values())
            weight_map = {name: info.file.name for name, info in self.tensors.items()}
            with writing(self.out_dir / INDEX):
                write_json(self.out_dir / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})

    def _open_shard(self, file: Path) -> None:
        with writing(file):
            self._stream = partial_name(file).open("wb")
            self._stream.write(self._starts[file])
        self._open = file

    def _close_shard(self) -> None:
        if self._stream and self._open:
            with writing(self._open):
                with self._stream as stream:
                    stream.flush()
                    os.fsync(stream.fileno())
                    release(stream.fileno(), 0, 0)
                partial_name(self._open).rename(self._open)
            self.closed.add(self._open)
        self._stream = self._open = None

    def encode(self, name: str, value: Tensor) -> Tensor:
        """What :meth:`append` takes for ``value``: itself. The writer of a packed checkpoint makes codes of it."""
        return value.cpu()

    def append(self, name: str, tensor: Tensor) -> None:
        """Write the next rows of ``name``, which must be the plan's current tensor, in its dtype and trailing shape."""
        info = self.tensors[name]
        if not info.numel:
            return
        if name != self._name or tensor.dtype != info.dtype or tensor.shape[1:] != info.shape[1:]:
            raise ValueError(f"{name} {tensor.dtype} {list(tensor.shape)} is not next in the plan (next: {self._name})")
        data = memoryview(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        if self._written + len(data) > info.bytes:
            raise ValueError(f"{name}: more rows than planned")
        if self._open != info.file:
            self._close_shard()
            self._open_shard(info.file)
        with writing(info.file):
            self._stream.seek(info.begin + self._written)
            self._stream.write(data)
            if len(data) >= SLICE_BYTES:
                self._stream.flush()
                release(self._stream.fileno(), info.begin + self._written, len(data))
        self._written += len(data)
        if self._written == info.bytes:
            self._name, self._written = next(self._pending, None), 0
            if self._name is None or self.tensors[self._name].file != info.file:
                self._close_shard()
