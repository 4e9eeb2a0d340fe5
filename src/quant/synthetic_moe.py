"""A synthetic checkpoint, or GGUF, of a published MoE's shape: names and sizes of the real one, weights drawn from a seed.

    python src/quant/synthetic_moe.py --shape 122b --layers 6 --out work/synthetic-122b [--seed 0] [--experts 256 ...]
    python src/quant/synthetic_moe.py --shape 122b --out work/synthetic-122b.gguf [--encode-experts 8] [--header F] [--keep F]
    python src/quant/synthetic_moe.py --shape 122b --out work/header.bin --header-only  # where llama.cpp's converter is

Shapes: 122b and 35b are Qwen3.5-122B-A10B and Qwen3.5-35B-A3B (experts fused, [E, 2I, H] and [E, H, I], names nested under
model.language_model), without vision tower and multi-token prediction; --published 3.5 or 3.6 adds both, with every name,
dtype, shape and file name as Qwen publishes that generation; tiny is for tests. Every size is an argument. A tensor
depends on its name, its shape and the seed alone (and on whether a CPU or a GPU draws it), so any shard can be made at any
time: `fill_shard` makes one, and `quant_save --consume-source` frees those that it is done with, so that a small
disk can stream all.

Weights are normal times a log-normal spread for every weight (excess kurtosis 1.3), for every row (heavy-tailed rows) and for a
few loud inputs that all layers share (outlier channels), scaled as trained networks are: 1/sqrt(inputs), less at the way out.

A GGUF has the names of gguf_pack and the types of configs/gguf_iq3.env (3.38 bits a weight). Of each kind of tensor one is
drawn and encoded, of a stack of experts --encode-experts of them, of the vocabulary's matrices some rows; their bytes are
repeated in every layer and expert, each at its own place in the file. Decoding reads all of them as it would the real ones, and
says noise. The vocabulary is razor-tiny's, filled up to the real size.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import re
import shutil
import tempfile
import threading
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from checkpoint import SYNTHETIC, Checkpoint
from console import UserError, atomic_path, progress, read_json, run_cli, write_json
from devices import Stopped, default_device, each_device, parse_devices
from families import Role
from ggml_codecs import encode
from gguf_format import make_header, padded
from gguf_layout import Piece, file_type, to_gguf
from pack_plan import Pack, TypeSettings, cast, plan_pack
from records import REPO
from rounders import is_quantized
from safetensors_file import TensorInfo, release
from settings import read_part
from size_model import (
    GENERATIONS,
    SHARD_BYTES,
    TINY_TOWER,
    Shape,
    Tower,
    config_of,
    plan_of,
    published_config,
    published_plan,
    shape_arguments,
    shape_from,
    write_skeleton,
)

TOKENIZER = REPO / "models" / "razor-tiny"
VOCABULARY_ROWS = 4096  # encoded, and repeated
CHUNK_BYTES = 256 << 20  # drawn at once
WEIGHT_SPREAD, ROW_SPREAD = 0.3, 0.35  # of the logarithm
LOUD_SHARE, LOUD = 0.004, 5.0  # inputs that are larger, and how much

# ---------------------------------------------------------------- values


def generator_of(text: str, seed: int, device: torch.device) -> torch.Generator:
    return torch.Generator(device).manual_seed(zlib.crc32(f"{seed}:{text}".encode()) + (seed << 32))


def loud_inputs(inputs: int, seed: int, device: torch.device) -> Tensor:
    """[I]: 1, and LOUD for a few inputs: the same ones in every matrix with so many inputs, as a residual stream has."""
    draw = torch.rand(inputs, generator=generator_of(f"inputs {inputs}", seed, torch.device("cpu")))
    return torch.where(draw < LOUD_SHARE, LOUD, 1.0).to(device)


def special(name: str, shape: tuple[int, ...], noise: Tensor) -> Tensor | None:
    """Values of what is no matrix: norms (stored minus one, but for linear attention's), decay, step size, convolution."""
    if len(shape) == 1 and "norm" in name and name.endswith(".weight"):
        return 0.1 * noise + (name.endswith("linear_attn.norm.weight") or "visual." in name)
    if name.endswith(".bias"):
        return 0.02 * noise
    if name.endswith("A_log"):
        return torch.special.ndtr(noise).mul(15).add(1).log()
    if name.endswith("dt_bias"):
        step = torch.exp(torch.special.ndtr(noise) * math.log(100) + math.log(1e-3))  # 0.001 to 0.1, as Mamba-2
        return step + torch.log(-torch.expm1(-step))
    return noise / math.sqrt(shape[-1]) if name.endswith("conv1d.weight") else None


def scale_of(name: str, inputs: int, layers: int) -> float:
    if name.endswith("embed_tokens.weight"):
        return 0.02
    out = name.endswith(("down_proj", "down_proj.weight", "o_proj.weight", "out_proj.weight"))
    return 1 / math.sqrt(inputs * (2 * layers if out else 1))


def draw(name: str, shape: tuple[int, ...], layers: int, seed: int, device: torch.device) -> Iterator[Tensor]:
    """A tensor in float32, in pieces along axis 0 whose size depends on its shape alone."""
    row = math.prod(shape[1:])
    step = max(1, CHUNK_BYTES // (4 * row)) if shape else 1
    for start in range(0, shape[0], step):
        size = (min(step, shape[0] - start), *shape[1:])
        generator = generator_of(f"{name} {start}", seed, device)
        noise = torch.randn(size, generator=generator, device=device)
        value = special(name, shape, noise)
        if value is None:
            spread = torch.randn(size, generator=generator, device=device).mul_(WEIGHT_SPREAD)
            spread += torch.randn((*size[:-1], 1), generator=generator, device=device).mul_(ROW_SPREAD)
            level = scale_of(name, shape[-1], layers) * math.exp(-(WEIGHT_SPREAD**2) - ROW_SPREAD**2)  # so that squares keep
            value = noise.mul_(spread.exp_()).mul_(loud_inputs(shape[-1], seed, device) * level)
        yield value


# ---------------------------------------------------------------- shards


_marking = threading.Lock()  # several threads fill shards of one directory


def prepare(out: Path, shape: Shape, seed: int, shard_bytes: int = SHARD_BYTES, published: str | None = None) -> list[Path]:
    """Make ``out`` with names, sizes and razor-tiny's tokenizer, without weights. Returns the shards, all to be filled."""
    if published:
        tower = TINY_TOWER if shape.hidden < Tower.hidden else Tower()
        config, plan = published_config(shape, tower), published_plan(shape, published, tower)
        files = write_skeleton(out, config, plan, shard_bytes, stem="model.safetensors")
    else:
        files = write_skeleton(out, config_of(shape), plan_of(shape), shard_bytes)
    mark = {"seed": seed, "shape": dataclasses.asdict(shape), "empty": [file.name for file in files]}
    write_json(out / SYNTHETIC, mark | {"device": default_device().type})
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(TOKENIZER / name, out / name)
    return files


def fill_shard(
    model: Path, file: Path, tensors: Mapping[str, TensorInfo], advance: Any = None, device: torch.device | None = None
) -> None:
    """Write the weights of one shard into its place; the disk holds them when this returns."""
    mark, device = read_json(model / SYNTHETIC), device or default_device()
    own = [(name, info) for name, info in tensors.items() if info.file.name == file.name]
    with file.open("r+b", buffering=0) as stream:
        for name, info in sorted(own, key=lambda item: item[1].begin):
            stream.seek(info.begin)
            for piece in draw(name, info.shape, mark["shape"]["layers"], mark["seed"], device):
                data = memoryview(piece.to(info.dtype).contiguous().cpu().view(-1).view(torch.uint8).numpy())
                while data:
                    data = data[stream.write(data) :]
                if advance:
                    advance(piece.numel() * info.dtype.itemsize)
                release(stream.fileno(), 0, stream.tell())  # starts writing back, and keeps the page cache for others
        os.fsync(stream.fileno())
        release(stream.fileno(), 0, 0)
    with _marking:
        mark = read_json(model / SYNTHETIC)
        write_json(model / SYNTHETIC, mark | {"empty": [name for name in mark["empty"] if name != file.name]})


def fill_all(model: Path, devices: Sequence[torch.device] = ()) -> None:
    """Every shard that is still empty; several devices (or one, named several times) each every so many-th."""
    checkpoint = Checkpoint(model)
    devices = tuple(devices) or (default_device(),)
    empty = [file for file in checkpoint.files if file.name in read_json(model / SYNTHETIC)["empty"]]
    total = sum(info.bytes for info in checkpoint.tensors.values() if info.file in empty)

    def share(number: int, device: torch.device, stop: threading.Event) -> None:
        for file in empty[number :: len(devices)]:
            if stop.is_set():
                raise Stopped
            fill_shard(model, file, checkpoint.tensors, advance, device)

    def advance(size: int) -> None:
        with bar.get_lock():
            bar.update(size)

    with progress(total, "synthetic", "B", True) as bar:
        each_device(devices, share)


# ---------------------------------------------------------------- GGUF


def header_of(pack: Pack) -> bytes:
    tensors = [(piece.name, piece.shape, pack.types[piece.name]) for piece in pack.pieces]
    with tempfile.TemporaryDirectory() as work:
        return make_header(pack.checkpoint.path, tensors, file_type(pack.base), Path(work))


def bytes_of(pack: Pack, piece: Piece, layers: int, experts: int, seed: int) -> Tensor:
    """The encoded bytes, on the CPU, of a piece, or of as many experts or rows of it as fill it a whole number of times."""
    name, kind, device = piece.sources[0], pack.types[piece.name], default_device()
    shape = pack.checkpoint.info(name).shape
    if piece.role in (Role.ROUTED_EXPERT, Role.EMBEDDING, Role.LM_HEAD):
        wanted = experts if piece.role is Role.ROUTED_EXPERT else VOCABULARY_ROWS
        count = next(count for count in range(min(wanted, piece.shape[0]), 0, -1) if piece.shape[0] % count == 0)
        piece, shape = dataclasses.replace(piece, shape=(count, *piece.shape[1:])), (count, *shape[1:])
    value = to_gguf(piece, torch.cat(list(draw(name, shape, layers, seed, device))).bfloat16())
    return (encode(value, kind) if is_quantized(kind) else cast(value, kind)).cpu()


def write_synthetic(pack: Pack, header: bytes, out: Path, experts: int, seed: int, kept: dict[Any, Tensor]) -> None:
    """``kept``: encoded bytes by kind of tensor, which grows; several threads write, each a tensor."""
    layers, jobs, at = pack.pieces[-1].layer, [], len(header)
    for piece in pack.pieces:
        key = (re.sub(r"\d+", "", piece.name), piece.shape, pack.types[piece.name])
        if key not in kept:
            kept[key] = bytes_of(pack, piece, layers, experts, seed).contiguous().view(-1).view(torch.uint8)
        jobs.append((at, pack.bytes_of(piece), memoryview(kept[key].numpy())))
        at += padded(jobs[-1][1])
    with atomic_path(out) as temporary, progress(at, "synthetic", "B", True) as bar, temporary.open("wb") as stream:
        stream.write(header)
        stream.flush()
        os.truncate(stream.fileno(), at)

        def write(job: tuple[int, int, memoryview]) -> None:
            start, size, data = job
            for place in range(start, start + size, len(data)):
                os.pwrite(stream.fileno(), data, place)
            with bar.get_lock():
                bar.update(size)

        with ThreadPoolExecutor(min(16, len(os.sched_getaffinity(0)))) as pool:
            list(pool.map(write, jobs))


def gguf(args: argparse.Namespace, shape: Shape) -> None:
    """--out F.gguf, or the head of one."""
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.out.parent) as work:
        model = Path(work) / f"synthetic-{args.shape}"
        prepare(model, shape, args.seed)
        types = read_part(TypeSettings, REPO / "configs/gguf_iq3.env")
        types = dataclasses.replace(types, tensor_types=REPO / str(types.tensor_types))
        pack = plan_pack(Checkpoint(model), types.base, types.patterns(), "nearest")[0]
        header = args.header.read_bytes() if args.header else header_of(pack)
        if not args.header_only:
            kept = torch.load(args.keep) if args.keep and args.keep.exists() else {}
            known = len(kept)
            write_synthetic(pack, header, args.out, args.encode_experts, args.seed, kept)
            if args.keep and len(kept) > known:
                torch.save(kept, args.keep)
            return
        with atomic_path(args.out) as temporary:
            temporary.write_bytes(header)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="directory to make, or FILE.gguf")
    shape_arguments(parser)
    parser.add_argument("--seed", type=int, default=0, help="of the weights (default 0)")
    parser.add_argument(
        "--devices", default="", help="cuda:0,cuda:0,cuda:1,cuda:1: that many shards at a time, to the same bytes"
    )
    parser.add_argument("--published", choices=GENERATIONS, help="vision and mtp too, every name as Qwen publishes it")
    parser.add_argument("--headers", action="store_true", help="every shard as its header before a hole; takes no disk")
    more = parser.add_argument_group("of a GGUF, whose types are those of configs/gguf_iq3.env")
    more.add_argument("--encode-experts", type=int, default=8, help="experts of a layer that are encoded (default 8)")
    more.add_argument("--keep", type=Path, help="file of the encoded tensors, for the next GGUF of the same sizes")
    more.add_argument("--header", type=Path, help="file of --header-only, where llama.cpp's converter is not at hand")
    more.add_argument("--header-only", action="store_true", help="write only what stands before the first tensor")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    if args.encode_experts < 1:
        raise UserError("--encode-experts must be at least 1")
    shape, devices, started = shape_from(args), parse_devices(args.devices), time.time()
    if args.header_only or args.out.suffix == ".gguf":
        gguf(args, shape)
        size = args.out.stat().st_size
    else:
        prepare(args.out, shape, args.seed, published=args.published)
        if not args.headers:
            fill_all(args.out, devices)
        tensors = Checkpoint(args.out).tensors.values()
        size, count = sum(info.bytes for info in tensors), sum(info.numel for info in tensors)
        print(f"{len(tensors):,} tensors, {count:,} parameters, {size:,} bytes")
    print(f"{args.out}: {size / 1e9:.2f} GB, {time.time() - started:.1f} s", flush=True)


if __name__ == "__main__":
    run_cli(main)
