"""A synthetic checkpoint of a published MoE's shape: config, tensor names, sizes; weights drawn from a seed, shard by shard.

    python src/quant/synthetic_moe.py --shape 122b --layers 6 --out work/synthetic-122b [--seed 0] [--experts 256 ...]
    python src/quant/synthetic_moe.py --shape 122b --out work/synthetic-122b --empty    # headers only: 245 GB that take no disk

Shapes: 122b and 35b are Qwen3.5-122B-A10B and Qwen3.5-35B-A3B (experts fused, [E, 2I, H] and [E, H, I], names nested under
model.language_model), without vision tower and multi-token prediction; tiny is for tests. Every size is an argument. A tensor
depends on its name, its shape and the seed alone (and on whether a CPU or a GPU draws it), so any shard can be made at any
time: `fill_shard` makes one, and `quant_save --consume-source` frees those that it is done with, so that a small
disk can stream all.

Weights are normal times a log-normal spread for every weight (excess kurtosis 1.3), for every row (heavy-tailed rows) and for a
few loud inputs that all layers share (outlier channels), scaled as trained networks are: 1/sqrt(inputs), less at the way out.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import threading
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from checkpoint import Checkpoint
from console import UserError, progress, read_json, run_cli, write_json
from devices import Stopped, each_device, parse_devices
from safetensors_file import CheckpointWriter, Plan, TensorInfo, release

MARK = "synthetic.json"  # beside config.json: this directory was made here, with this seed, and these shards are empty
SHARD_BYTES = 4 << 30
CHUNK_BYTES = 256 << 20  # drawn at once
WEIGHT_SPREAD, ROW_SPREAD = 0.3, 0.35  # of the logarithm
LOUD_SHARE, LOUD = 0.004, 5.0  # inputs that are larger, and how much
BF16, F32 = torch.bfloat16, torch.float32


@dataclasses.dataclass(frozen=True)
class Shape:
    """The sizes of a Qwen3.5 MoE text model. ``interval``: every such layer has full attention, the others Gated DeltaNet."""

    layers: int = 48
    hidden: int = 3072
    experts: int = 256
    top_k: int = 8
    inner: int = 1024
    shared_inner: int = 1024
    vocab: int = 248320
    heads: int = 32
    kv_heads: int = 2
    head_dim: int = 256
    key_heads: int = 16
    value_heads: int = 64
    linear_dim: int = 128
    conv: int = 4
    interval: int = 4

    def kind(self, layer: int) -> str:
        return "linear_attention" if (layer + 1) % self.interval else "full_attention"


# Model cards of Qwen3.5-122B-A10B and Qwen3.5-35B-A3B, and transformers' Qwen3_5MoeTextConfig, whose defaults are the 35B's.
SHAPES = {
    "122b": Shape(),
    "35b": Shape(layers=40, hidden=2048, inner=512, shared_inner=512, heads=16, value_heads=32),
    "tiny": Shape(
        layers=4, hidden=256, experts=8, top_k=2, inner=256, shared_inner=256, vocab=1024, heads=4, head_dim=64,
        key_heads=2, value_heads=4, linear_dim=64,
    ),
}  # fmt: skip


def config_of(shape: Shape) -> dict[str, Any]:
    """config.json, as the published checkpoints nest it."""
    half = shape.head_dim // 8  # a quarter of a head turns, in pairs
    sections = [half - 2 * (half // 3), half // 3, half // 3]
    text = {
        "model_type": "qwen3_5_moe_text", "attention_bias": False, "attention_dropout": 0.0, "dtype": "bfloat16",
        "eos_token_id": shape.vocab - 1, "pad_token_id": None, "full_attention_interval": shape.interval,
        "head_dim": shape.head_dim, "hidden_act": "silu", "hidden_size": shape.hidden, "initializer_range": 0.02,
        "layer_types": [shape.kind(index) for index in range(shape.layers)],
        "linear_conv_kernel_dim": shape.conv, "linear_key_head_dim": shape.linear_dim, "linear_num_key_heads": shape.key_heads,
        "linear_num_value_heads": shape.value_heads, "linear_value_head_dim": shape.linear_dim,
        "max_position_embeddings": 262144, "moe_intermediate_size": shape.inner, "num_attention_heads": shape.heads,
        "num_experts": shape.experts, "num_experts_per_tok": shape.top_k, "num_hidden_layers": shape.layers,
        "num_key_value_heads": shape.kv_heads, "output_router_logits": False, "partial_rotary_factor": 0.25,
        "rms_norm_eps": 1e-6, "router_aux_loss_coef": 0.001, "shared_expert_intermediate_size": shape.shared_inner,
        "tie_word_embeddings": False, "use_cache": True, "vocab_size": shape.vocab,
        "rope_parameters": {
            "mrope_interleaved": True, "mrope_section": sections, "partial_rotary_factor": 0.25, "rope_theta": 10_000_000,
            "rope_type": "default",
        },
    }  # fmt: skip
    return {
        "architectures": ["Qwen3_5MoeForConditionalGeneration"], "model_type": "qwen3_5_moe", "text_config": text,
        "tie_word_embeddings": False,
    }  # fmt: skip


def layer_plan(shape: Shape, index: int) -> Iterator[tuple[str, torch.dtype, tuple[int, ...]]]:
    at = f"model.language_model.layers.{index}."
    h, qkv = shape.hidden, (2 * shape.key_heads + shape.value_heads) * shape.linear_dim
    values = shape.value_heads * shape.linear_dim
    yield at + "input_layernorm.weight", BF16, (h,)
    if shape.kind(index) == "linear_attention":
        yield at + "linear_attn.A_log", F32, (shape.value_heads,)
        yield at + "linear_attn.conv1d.weight", BF16, (qkv, 1, shape.conv)
        yield at + "linear_attn.dt_bias", BF16, (shape.value_heads,)
        for name, rows in (("a", shape.value_heads), ("b", shape.value_heads), ("qkv", qkv), ("z", values)):
            yield at + f"linear_attn.in_proj_{name}.weight", BF16, (rows, h)
        yield at + "linear_attn.norm.weight", F32, (shape.linear_dim,)
        yield at + "linear_attn.out_proj.weight", BF16, (h, values)
    else:
        yield at + "self_attn.k_norm.weight", BF16, (shape.head_dim,)
        yield at + "self_attn.k_proj.weight", BF16, (shape.kv_heads * shape.head_dim, h)
        yield at + "self_attn.o_proj.weight", BF16, (h, shape.heads * shape.head_dim)
        yield at + "self_attn.q_norm.weight", BF16, (shape.head_dim,)
        yield at + "self_attn.q_proj.weight", BF16, (2 * shape.heads * shape.head_dim, h)  # queries and their gates
        yield at + "self_attn.v_proj.weight", BF16, (shape.kv_heads * shape.head_dim, h)
    yield at + "mlp.experts.down_proj", BF16, (shape.experts, h, shape.inner)
    yield at + "mlp.experts.gate_up_proj", BF16, (shape.experts, 2 * shape.inner, h)
    yield at + "mlp.gate.weight", BF16, (shape.experts, h)
    yield at + "mlp.shared_expert.down_proj.weight", BF16, (h, shape.shared_inner)
    yield at + "mlp.shared_expert.gate_proj.weight", BF16, (shape.shared_inner, h)
    yield at + "mlp.shared_expert.up_proj.weight", BF16, (shape.shared_inner, h)
    yield at + "mlp.shared_expert_gate.weight", BF16, (1, h)
    yield at + "post_attention_layernorm.weight", BF16, (h,)


def plan_of(shape: Shape) -> Plan:
    """(name, dtype, shape) of every tensor, in the order of the shards."""
    plan = [("model.language_model.embed_tokens.weight", BF16, (shape.vocab, shape.hidden))]
    for index in range(shape.layers):
        plan += layer_plan(shape, index)
    return [*plan, ("model.language_model.norm.weight", BF16, (shape.hidden,)), ("lm_head.weight", BF16, plan[0][2])]


# ---------------------------------------------------------------- values


def generator_of(text: str, seed: int, device: torch.device) -> torch.Generator:
    return torch.Generator(device).manual_seed(zlib.crc32(f"{seed}:{text}".encode()) + (seed << 32))


def loud_inputs(inputs: int, seed: int, device: torch.device) -> Tensor:
    """[I]: 1, and LOUD for a few inputs: the same ones in every matrix with so many inputs, as a residual stream has."""
    draw = torch.rand(inputs, generator=generator_of(f"inputs {inputs}", seed, torch.device("cpu")))
    return torch.where(draw < LOUD_SHARE, LOUD, 1.0).to(device)


def special(name: str, shape: tuple[int, ...], noise: Tensor) -> Tensor | None:
    """Values of what is no matrix: norms (stored minus one, but for linear attention's), decay, step size, convolution."""
    if name.endswith("linear_attn.norm.weight"):
        return 1 + 0.1 * noise
    if name.endswith("norm.weight"):
        return 0.1 * noise
    if name.endswith("A_log"):
        return torch.special.ndtr(noise).mul(15).add(1).log()
    if name.endswith("dt_bias"):
        step = torch.exp(torch.special.ndtr(noise) * math.log(100) + math.log(1e-3))  # 0.001 to 0.1, as Mamba-2
        return step + torch.log(-torch.expm1(-step))
    if name.endswith("conv1d.weight"):
        return noise / math.sqrt(shape[-1])
    return None


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


def device_at_hand() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def prepare(out: Path, shape: Shape, seed: int, shard_bytes: int = SHARD_BYTES) -> list[Path]:
    """Make ``out`` with config, index and every shard as its header before a hole: names and sizes are there, weights read
    as zero and take no disk. Returns the shards, all of them still to be filled."""
    if out.exists() and any(out.iterdir()):
        raise UserError(f"{out}: exists; remove it or choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    plan = plan_of(shape)
    breaks = {name for name, _, _ in plan if name.endswith("input_layernorm.weight")}  # a layer begins a shard
    writer = CheckpointWriter(out, plan, shard_bytes, breaks)
    writer.write_empty()
    write_json(out / "config.json", config_of(shape))
    shards = [file.name for file in writer.files]
    write_json(out / MARK, {"seed": seed, "shape": dataclasses.asdict(shape), "empty": shards, "device": device_at_hand().type})
    return writer.files


def is_synthetic(model: Path) -> bool:
    return (model / MARK).is_file()


def tensors_of(file: Path, tensors: Mapping[str, TensorInfo]) -> list[tuple[str, TensorInfo]]:
    found = [(name, info) for name, info in tensors.items() if info.file.name == file.name]
    return sorted(found, key=lambda item: item[1].begin)


def fill_shard(
    model: Path, file: Path, tensors: Mapping[str, TensorInfo], advance: Any = None, device: torch.device | None = None
) -> None:
    """Write the weights of one shard into its place; the disk holds them when this returns."""
    mark, device = read_json(model / MARK), device or device_at_hand()
    with file.open("r+b", buffering=0) as stream:
        for name, info in tensors_of(file, tensors):
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
        mark = read_json(model / MARK)
        write_json(model / MARK, mark | {"empty": [name for name in mark["empty"] if name != file.name]})


def fill_all(model: Path, devices: Sequence[torch.device] = ()) -> None:
    """Every shard that is still empty; several devices (or one, named several times) each every so many-th."""
    checkpoint = Checkpoint(model)
    devices = tuple(devices) or (device_at_hand(),)
    empty = [file for file in checkpoint.files if file.name in read_json(model / MARK)["empty"]]
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


def shape_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shape", choices=sorted(SHAPES), default="122b", help="published sizes (default 122b)")
    for field in dataclasses.fields(Shape):
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=int, help="instead of the shape's")


def shape_from(args: argparse.Namespace) -> Shape:
    given = {f.name: getattr(args, f.name) for f in dataclasses.fields(Shape) if getattr(args, f.name) is not None}
    if bad := [name for name, value in given.items() if value < 1]:
        raise UserError(f"--{bad[0].replace('_', '-')} must be at least 1")
    return dataclasses.replace(SHAPES[args.shape], **given)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="directory to make")
    shape_arguments(parser)
    parser.add_argument("--seed", type=int, default=0, help="of the weights (default 0)")
    parser.add_argument(
        "--devices", default="", help="cuda:0,cuda:0,cuda:1,cuda:1: that many shards at a time, to the same bytes"
    )
    parser.add_argument("--empty", action="store_true", help="headers only: no weights, no disk")
    args = parser.parse_args()
    shape, devices, started = shape_from(args), parse_devices(args.devices), time.time()
    prepare(args.out, shape, args.seed)
    if not args.empty:
        fill_all(args.out, devices)
    checkpoint = Checkpoint(args.out)
    parameters = sum(info.numel for info in checkpoint.tensors.values())
    print(f"{args.out}: {parameters:,} parameters, {checkpoint.bytes / 1e9:.2f} GB, {time.time() - started:.1f} s", flush=True)


if __name__ == "__main__":
    run_cli(main)
