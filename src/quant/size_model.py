"""What a model weighs and how long a run takes, before it runs: the one place that counts bytes, memory and times.

Not a command. Three parts: the shape of a model and its tensors (every --dry-run on a checkpoint of headers, the synthetic
checkpoints); time and memory as functions of it, fitted to measurements (docs/COST_MODEL.md):

    data-free   bytes of the checkpoint / measured bytes a second                          (the disk decides)
    calibrated  layers * (a * parameters of a layer + b * tokens * parameters that a token uses in it)
                a from the seconds in which a layer is rounded, b from the others
    VRAM        c * (weights of a layer in BF16 + second moments of its experts' inputs in float32), c from the peak
    RAM         d + e * weights of a layer in BF16, d a process with torch, e from the peak
    decode      share of the limit that was reached * copied bytes a second / bytes that a token reads

and the rates of earlier runs from the records in results/, with the machine and the record beside each.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from console import UserError, write_json
from families import Role, role_of
from records import read_result
from safetensors_file import CheckpointWriter, Plan

RESULTS = Path(__file__).resolve().parents[2] / "results"
BASE_BYTES = 600 << 20  # the interpreter with torch
SHARD_BYTES = 4 << 30
BF16, F32 = torch.bfloat16, torch.float32
Rates = dict[str, tuple[float, str]]  # machine: (units a second, the record's file)

# ---------------------------------------------------------------- shapes


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


def shape_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shape", choices=sorted(SHAPES), default="122b", help="published sizes (default 122b)")
    for field in dataclasses.fields(Shape):
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=int, help="instead of the shape's")


def shape_from(args: argparse.Namespace) -> Shape:
    given = {f.name: getattr(args, f.name) for f in dataclasses.fields(Shape) if getattr(args, f.name) is not None}
    if bad := [name for name, value in given.items() if value < 1]:
        raise UserError(f"--{bad[0].replace('_', '-')} must be at least 1")
    return dataclasses.replace(SHAPES[args.shape], **given)


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
    plan: list[tuple[str, torch.dtype, tuple[int, ...]]] = [
        ("model.language_model.embed_tokens.weight", BF16, (shape.vocab, shape.hidden))
    ]
    for index in range(shape.layers):
        plan += layer_plan(shape, index)
    return [*plan, ("model.language_model.norm.weight", BF16, (shape.hidden,)), ("lm_head.weight", BF16, plan[0][2])]


@dataclasses.dataclass(frozen=True)
class Tower:
    """The sizes of the vision tower of Qwen3.5 and 3.6."""

    depth: int = 27
    hidden: int = 1152
    inner: int = 4304
    heads: int = 16
    patch: int = 16
    positions: int = 2304


GENERATIONS = ("3.5", "3.6")  # of the published layout: 3.6 has fused experts in mtp, and BF16 where 3.5 has F32
TINY_TOWER = Tower(depth=2, hidden=64, inner=96, heads=2, patch=8, positions=64)


def tower_plan(tower: Tower, hidden: int) -> Iterator[tuple[str, torch.dtype, tuple[int, ...]]]:
    """The tensors of a vision tower whose outputs have ``hidden`` channels: two frames and 2 x 2 patches make one."""
    at, own, merged = "model.visual.", tower.hidden, 4 * tower.hidden
    matrices = {"attn.qkv": (3 * own, own), "attn.proj": (own, own), "mlp.linear_fc1": (tower.inner, own)}
    blocks = {f"blocks.{i}.{name}": size for i in range(tower.depth) for name, size in (
        *matrices.items(), ("mlp.linear_fc2", (own, tower.inner)), ("norm1", (own,)), ("norm2", (own,)))}  # fmt: skip
    ends = {
        "patch_embed.proj": (own, 3, 2, tower.patch, tower.patch), "pos_embed": (tower.positions, own),
        "merger.norm": (own,), "merger.linear_fc1": (merged, merged), "merger.linear_fc2": (hidden, merged),
    }  # fmt: skip
    for name, size in (blocks | ends).items():
        yield f"{at}{name}.weight", BF16, size
        if name != "pos_embed":
            yield f"{at}{name}.bias", BF16, size[:1]


def mtp_plan(shape: Shape, fused: bool) -> Iterator[tuple[str, torch.dtype, tuple[int, ...]]]:
    """The head that predicts the token after the next: a layer with full attention, its experts one by one unless ``fused``."""
    h = shape.hidden
    yield "mtp.fc.weight", BF16, (h, 2 * h)
    for name in ("norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden"):
        yield f"mtp.{name}.weight", BF16, (h,)
    for name, dtype, size in layer_plan(dataclasses.replace(shape, interval=1), 0):
        name = name.replace("model.language_model.", "mtp.")
        if fused or ".experts." not in name:
            yield name, dtype, size
            continue
        for expert in range(shape.experts):
            at = name.replace(".experts.", f".experts.{expert}.")
            for part in ("gate", "up") if "gate_up" in name else ("down",):
                own = at.replace("gate_up_proj", f"{part}_proj") + ".weight"
                yield own, dtype, (size[1] // (2 if "gate_up" in name else 1), size[2])


def published_plan(shape: Shape, generation: str, tower: Tower) -> Plan:
    """(name, dtype, shape) of every tensor that Qwen publishes of this generation: text, vision and mtp."""
    plan = [*plan_of(shape), *tower_plan(tower, shape.hidden), *mtp_plan(shape, generation == "3.6")]
    return [(name, BF16 if generation == "3.6" else dtype, size) for name, dtype, size in plan]


def published_config(shape: Shape, tower: Tower) -> dict[str, Any]:
    """config.json of the same; the tokens of pictures and frames are the last of the vocabulary."""
    config = config_of(shape)
    config["text_config"]["mtp_num_hidden_layers"] = 1
    vision = {
        "model_type": "qwen3_5_moe_vision", "depth": tower.depth, "hidden_size": tower.hidden, "in_channels": 3,
        "intermediate_size": tower.inner, "num_heads": tower.heads, "num_position_embeddings": tower.positions,
        "out_hidden_size": shape.hidden, "patch_size": tower.patch, "spatial_merge_size": 2, "temporal_patch_size": 2,
        "hidden_act": "gelu_pytorch_tanh", "initializer_range": 0.02,
    }  # fmt: skip
    names = ("vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id")
    tokens = {name: shape.vocab - 2 - len(names) + place for place, name in enumerate(names)}
    return config | {"vision_config": vision} | tokens


def tensor_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a Qwen3.5 mixture of experts, from transformers' own model without its weights."""
    from transformers import Qwen3_5MoeConfig, Qwen3_5MoeForCausalLM, Qwen3_5MoeForConditionalGeneration

    if config.get("model_type") not in ("qwen3_5_moe", "qwen3_5_moe_text"):
        raise UserError(f"model_type {config.get('model_type')!r}: the arithmetic knows qwen3_5_moe only")
    with torch.device("meta"):
        if "vision_config" in config:
            parts = {key: config[key] for key in ("text_config", "vision_config")}
            model = Qwen3_5MoeForConditionalGeneration(Qwen3_5MoeConfig(**parts))
        else:
            model = Qwen3_5MoeForCausalLM(Qwen3_5MoeConfig(text_config=dict(config)).text_config)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def write_skeleton(
    directory: Path, config: Mapping[str, Any], plan: Plan, shard_bytes: int = SHARD_BYTES, stem: str = "model"
) -> list[Path]:
    """A checkpoint without weights in a new directory: config, index and every shard as its header before a hole, which reads
    as zeros and takes no disk. Returns the shards; a layer begins a shard. ``stem``: what their names begin with."""
    if directory.exists() and any(directory.iterdir()):
        raise UserError(f"{directory}: exists; remove it or name another directory")
    directory.mkdir(parents=True, exist_ok=True)
    breaks = {name for name, _, _ in plan if name.endswith("input_layernorm.weight")}
    writer = CheckpointWriter(directory, plan, shard_bytes, breaks, stem=stem)
    writer.write_empty()
    write_json(directory / "config.json", config)
    return writer.files


# ---------------------------------------------------------------- time and memory by the shape


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What is counted of a shape: parameters, those of the largest layer and those that a token uses in it, elements of the
    second moments of a layer."""

    parameters: int
    layer: int
    layer_active: int
    moments: int


def sizes_of(shape: Shape) -> Sizes:
    share = shape.top_k / shape.experts
    layers = [
        [(role_of(name, size, "qwen3_5_moe"), math.prod(size)) for name, _, size in layer_plan(shape, index)]
        for index in range(shape.layers)
    ]
    active = max(sum(n * share if role is Role.ROUTED_EXPERT else n for role, n in layer) for layer in layers)
    return Sizes(
        parameters=sum(math.prod(size) for _, _, size in plan_of(shape)), layer=max(sum(n for _, n in own) for own in layers),
        layer_active=int(active), moments=shape.experts * (shape.hidden**2 + shape.inner**2),
    )  # fmt: skip


def state_bytes(text: Mapping[str, Any]) -> tuple[int, int]:
    """(bytes of keys and values that a token adds, in 16 bits; bytes of the recurrent state of a sequence, in float32)."""
    layers = text["num_hidden_layers"]
    full = text["layer_types"].count("full_attention") if "layer_types" in text else layers // text["full_attention_interval"]
    a_token = full * 2 * text["num_key_value_heads"] * text["head_dim"] * 2
    keys, values = text["linear_num_key_heads"], text["linear_num_value_heads"]
    width, depth = text["linear_value_head_dim"], text["linear_key_head_dim"]
    window = (2 * keys * depth + values * width) * (text["linear_conv_kernel_dim"] - 1)
    return a_token, (layers - full) * 4 * (values * width * depth + window)


def read_records(directory: Path, name: str) -> dict[str, dict[str, Any]]:
    """The metrics of the records that are there, by the part of bench.sh h100 that made them."""
    found = {part: directory / f"{name}_{part}.json" for part in ("disk", "gptq", "ldlq", "gguf", "gguf_offload")}
    return {part: read_result(file, "bench")["metrics"] for part, file in found.items() if file.is_file()}


def calibrated_fit(records: Mapping[str, Any], method: str, at: Sizes) -> tuple[float, float] | None:
    """(a, b) of the module's head."""
    if method not in records:
        return None
    made = records[method]["size_layers"]
    rounding = made["worst_rounding_seconds"]
    return rounding / at.layer, (made["worst_layer_seconds"] - rounding) / (made["tokens"] * at.layer_active)


def fit(records: Mapping[str, Any], at: Sizes) -> dict[str, Any]:
    """The constants, from the records of the shape ``at``; those without a record are left out."""
    made = {method: records[method]["size_layers"] for method in ("gptq", "ldlq") if method in records}
    found: dict[str, Any] = {method: calibrated_fit(records, method, at) for method in made}
    if "disk" in records:
        found["bytes_per_s"] = records["disk"]["size_disk"]["bytes_in_per_s"]
    if peaks := [entry["peak_vram_mib"] for entry in made.values() if entry["peak_vram_mib"]]:
        found["vram"] = max(peaks) * 2**20 / layer_bytes(at)
    if made:
        peak = max(entry["peak_rss_mib"] for entry in made.values()) * 2**20
        found["ram"] = max(0.0, peak - BASE_BYTES) / (2 * at.layer)
    metrics = records.get("gguf", {})
    if placed := metrics.get("placements", {}).get("all_on_gpu"):
        found["copy"] = metrics["copy_bytes_per_s"]
        found["decode_share"] = placed["decode"]["1"]["tokens_per_s"] / metrics["limit_tokens_per_s"]
    return found


def layer_bytes(sizes: Sizes) -> int:
    return 2 * sizes.layer + 4 * sizes.moments


def predict(shape: Shape, sizes: Sizes, token_bytes: int, constants: Mapping[str, Any], tokens: int) -> dict[str, float | None]:
    """Seconds, bytes and rates of a model of this shape, of whose GGUF a token reads ``token_bytes``; None where no record
    says it."""

    def calibrated(method: str) -> float | None:
        if method not in constants:
            return None
        a, b = constants[method]
        return shape.layers * (a * sizes.layer + b * tokens * sizes.layer_active)

    known = constants.get
    return {
        "data_free_s": 2 * sizes.parameters / constants["bytes_per_s"] if known("bytes_per_s") else None,
        "gptq_s": calibrated("gptq"), "ldlq_s": calibrated("ldlq"),
        "vram": constants["vram"] * layer_bytes(sizes) if known("vram") else None,
        "ram": BASE_BYTES + constants["ram"] * 2 * sizes.layer if known("ram") is not None else None,
        "limit": constants["copy"] / token_bytes if known("copy") else None,
        "decode": constants["copy"] / token_bytes * constants["decode_share"] if known("copy") else None,
    }  # fmt: skip


def copy_rate(device: torch.device, size: int = 1 << 28) -> float:
    """Bytes read and written a second by a copy of ``size`` bytes, the best of seven."""
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    best = math.inf
    for _ in range(7):
        started = time.perf_counter()
        target.copy_(source)
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started)
    return 2 * size / best


# ---------------------------------------------------------------- rates of earlier runs


def duration(seconds: float) -> str:
    """Seconds as a person says them: "2.3 h", "4 min", "12 s"."""
    if seconds >= 5400:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 60:.0f} min" if seconds >= 120 else f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"


def machine(record: Mapping[str, Any]) -> str:
    hardware = record["hardware"]
    cores = hardware["cores"]
    return hardware["gpu"] or f"{hardware['cpu']}, {cores} core{'s' * (cores > 1)}"


def records_of(results: Path, kind: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(file as a reader finds it, record) of a kind."""
    for file in sorted((results / kind).glob("*.json")):
        record = read_result(file)
        if record["kind"] == kind:
            yield f"{results.name}/{kind}/{file.name}", record


def recorded_rates(results: Path, kind: str, units: Callable[[dict[str, Any]], float]) -> Rates:
    """The best recorded rate of each machine. ``units``: what a record worked off; 0 for one that does not count."""
    found: Rates = {}
    for file, record in records_of(results, kind):
        amount = units(record)
        if amount and record["seconds"] > 0:
            entry = (amount / record["seconds"], file)
            found[machine(record)] = max(found.get(machine(record), entry), entry)
    return found


def times(rates: Rates, amount: float, what: str) -> list[str]:
    """A line for each machine that has a rate."""
    if not rates:
        return [f"  no recorded rate for {what}; the run shows its own after a few seconds"]
    return [f"  {duration(amount / rate):>8}  {name} ({file})" for name, (rate, file) in sorted(rates.items())]
