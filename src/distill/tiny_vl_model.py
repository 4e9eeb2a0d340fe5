"""The architecture of razor-tiny-vl, its tokenizer and processor, and a fast training forward over transformers' modules.

Not a command. transformers holds the parameters; the forward here computes the same function for batches whose pictures
have one size and stand at one place. tests/test_tiny_vl.py compares the two.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3_5MoeConfig, Qwen3_5MoeForConditionalGeneration
from transformers.vision_utils import get_vision_interpolation_indices_and_weights, get_vision_position_ids

from gguf_convert import QWEN2_PATTERN
from tiny_model import decoder_layer, init_weights, rms_norm
from tiny_tokenizer import END_OF_TEXT, END_THINK, IM_END, IM_START, THINK

PATCH, MERGE, FRAMES = 8, 2, 2  # pixels of a patch; patches a side of a token; copies of a still picture
VISION_START, VISION_END, IMAGE, VIDEO = VISION_TOKENS = (
    "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"
)  # fmt: skip
VL_VOCAB = 384
CHAT_TEMPLATE = """\
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' }}
{%- if message.content is string %}
{{- message.content }}
{%- else %}
{%- for part in message.content %}
{%- if part.type == 'image' %}
{{- '<|vision_start|><|image_pad|><|vision_end|>' }}
{%- else %}
{{- part.text }}
{%- endif %}
{%- endfor %}
{%- endif %}
{{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n<think>\\n' }}
{%- endif %}"""
IMAGE_PROCESSOR: dict[str, Any] = {
    "image_processor_type": "Qwen2VLImageProcessor",
    "patch_size": PATCH,
    "merge_size": MERGE,
    "temporal_patch_size": FRAMES,
    "size": {"shortest_edge": 32 * 32, "longest_edge": 128 * 128},  # pixels of a picture, in and beyond which it is scaled
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}


def build_vl_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE of razor-tiny's kind on ``texts``, with the vision tokens and a template for content parts."""
    specials = (END_OF_TEXT, IM_START, IM_END, *VISION_TOKENS)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(QWEN2_PATTERN), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    size = VL_VOCAB - len(specials) - 2
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=IM_END, pad_token=END_OF_TEXT, model_max_length=2048)
    fast.add_special_tokens({"additional_special_tokens": list(specials)})
    fast.add_tokens([THINK, END_THINK])
    fast.chat_template = CHAT_TEMPLATE
    return fast


def vl_config(tokenizer: PreTrainedTokenizerFast, layers: int, vision_layers: int) -> Qwen3_5MoeConfig:
    """Every second text layer is full attention; hidden and inner sizes 256 so that i-quants fit; a vision tower of 128."""
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 256,
        "num_hidden_layers": layers,
        "layer_types": ["full_attention" if i % 2 else "linear_attention" for i in range(layers)],
        "full_attention_interval": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "linear_key_head_dim": 64,
        "linear_value_head_dim": 64,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "moe_intermediate_size": 256,
        "shared_expert_intermediate_size": 128,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 2048,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.25,
            "mrope_interleaved": True,
            "mrope_section": [3, 3, 2],
        },
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {
        "depth": vision_layers,
        "hidden_size": 128,
        "num_heads": 4,
        "intermediate_size": 256,
        "patch_size": PATCH,
        "spatial_merge_size": MERGE,
        "temporal_patch_size": FRAMES,
        "out_hidden_size": 256,
        "num_position_embeddings": 64,
    }
    ids = dict(zip(("vision_start", "vision_end", "image", "video"), map(tokenizer.convert_tokens_to_ids, VISION_TOKENS)))
    return Qwen3_5MoeConfig(text_config=text, vision_config=vision, **{f"{key}_token_id": value for key, value in ids.items()})


def build_vl_model(config: Qwen3_5MoeConfig, seed: int) -> Qwen3_5MoeForConditionalGeneration:
    """The model in float32 with seeded weights."""
    model = Qwen3_5MoeForConditionalGeneration(config).float()
    init_weights(model.model.language_model, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        model.lm_head.weight.normal_(0, 0.02, generator=generator)
        init_vision(model.model.visual, generator)
    return model


def init_vision(visual: torch.nn.Module, generator: torch.Generator) -> None:
    """Normal(1/sqrt(inputs)), what a block adds scaled down by its depth, the picture's tokens of the size of a word's."""
    depth = 1 / math.sqrt(2 * len(visual.blocks))
    for name, weight in visual.named_parameters():
        if weight.ndim < 2:
            continue
        std = 0.3 if name.startswith("pos_embed") else 1 / math.sqrt(weight[0].numel())
        if name.endswith(("attn.proj.weight", "mlp.linear_fc2.weight")):
            std *= depth
        weight.normal_(0, 0.005 if name == "merger.linear_fc2.weight" else std, generator=generator)


def save_processor(tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Tokenizer, template, and the two files that transformers and vLLM read a Qwen3-VL processor from."""
    tokenizer.save_pretrained(out)
    video = IMAGE_PROCESSOR | {"video_processor_type": "Qwen3VLVideoProcessor"}
    video.pop("image_processor_type")
    for name, value in (("preprocessor_config.json", IMAGE_PROCESSOR), ("video_preprocessor_config.json", video)):
        text = json.dumps(value | {"processor_class": "Qwen3VLProcessor"}, indent=2) + "\n"
        (out / name).write_text(text, encoding="utf-8")


def patches_of(pixels: torch.Tensor) -> torch.Tensor:
    """uint8 pictures [B, S, S, 3] -> float32 [B, (S/8)^2, 3*2*8*8], as the image processor lays them out: the four
    patches of a token stand together, values in -1..1, the still picture twice along time."""
    batch, size = pixels.shape[:2]
    side = size // (PATCH * MERGE)
    values = pixels.float() / 127.5 - 1
    blocks = values.view(batch, side, MERGE, PATCH, side, MERGE, PATCH, 3).permute(0, 1, 4, 2, 5, 7, 3, 6)
    twice = blocks[:, :, :, :, :, :, None].expand(*blocks.shape[:6], FRAMES, PATCH, PATCH)  # [B, gh, gw, mh, mw, C, T, p, p]
    return twice.reshape(batch, side * side * MERGE * MERGE, -1)


def vision_tables(visual: torch.nn.Module, count: int, device: torch.device) -> tuple[torch.Tensor, ...]:
    """What the place of ``count`` patches of a square picture decides: rows of the position table and their shares
    [N, corners], cosines and sines [N, D/heads]."""
    side = math.isqrt(count)
    grid = torch.tensor([[1, side, side]], device=device)
    where, share = get_vision_interpolation_indices_and_weights(
        grid, num_grid_per_side=visual.num_grid_per_side, mode=visual.interpolation_mode,
        align_corners=visual.interpolation_align_corners, spatial_merge_size=MERGE, kwargs={},
    )  # fmt: skip
    cos, sin = visual.rotary_pos_emb(share, get_vision_position_ids(grid, MERGE, kwargs={}))
    return where, share, cos, sin


def vision_forward(
    visual: torch.nn.Module, patches: torch.Tensor, tables: tuple[torch.Tensor, ...], dtype: torch.dtype
) -> torch.Tensor:
    """Patches [B, N, C*T*p*p] of square pictures of one size -> picture tokens [B, N/4, H]."""
    batch, count, _ = patches.shape
    where, share, cos, sin = tables
    places = (visual.pos_embed(where) * share[:, :, None]).sum(1)
    embed = visual.patch_embed.proj
    x = F.linear(patches.to(dtype), embed.weight.flatten(1).to(dtype), embed.bias.to(dtype)) + places.to(dtype)
    for block in visual.blocks:
        x = x + vision_attention(block.attn, layer_norm(block.norm1, x), cos.to(dtype), sin.to(dtype))
        x = x + two_layers(block.mlp, layer_norm(block.norm2, x))
    merger = visual.merger
    return two_layers(merger, layer_norm(merger.norm, x).reshape(batch, count // MERGE**2, -1))


def layer_norm(norm: torch.nn.LayerNorm, x: torch.Tensor) -> torch.Tensor:
    return F.layer_norm(x.float(), norm.normalized_shape, norm.weight, norm.bias, norm.eps).to(x.dtype)


def linear(layer: torch.nn.Linear, x: torch.Tensor) -> torch.Tensor:
    return F.linear(x, layer.weight.to(x.dtype), layer.bias.to(x.dtype))


def two_layers(block: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    return linear(block.linear_fc2, block.act_fn(linear(block.linear_fc1, x)))


def vision_attention(layer: torch.nn.Module, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Attention of every patch of a picture to every other, [B, N, D]."""
    batch, count, _ = x.shape
    q, k, v = linear(layer.qkv, x).view(batch, count, 3, layer.num_heads, -1).permute(2, 0, 3, 1, 4)
    q, k = (y * cos + torch.cat([-y.chunk(2, -1)[1], y.chunk(2, -1)[0]], -1) * sin for y in (q, k))
    out = F.scaled_dot_product_attention(q, k, v)
    return linear(layer.proj, out.transpose(1, 2).reshape(batch, count, -1))


def sparse_mixture(block: torch.nn.Module, x: torch.Tensor, top_k: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """tiny_model.mixture with only the chosen experts computed: what a CPU wants."""
    experts = block.experts
    count = experts.num_experts
    probs = F.linear(x, block.gate.weight.to(x.dtype)).softmax(-1, dtype=torch.float32)
    weight, chosen = probs.topk(top_k, -1)
    weight = (weight / weight.sum(-1, keepdim=True)).to(x.dtype)
    load = torch.bincount(chosen.flatten(), minlength=count).float() / chosen.numel()
    balance = count * (load * probs.mean(0)).sum()
    order = chosen.flatten().argsort(stable=True)
    rows, parts = order // top_k, torch.bincount(chosen.flatten(), minlength=count).tolist()
    done = []
    for expert, own in enumerate(x[rows].split(parts)):
        gate, up = F.linear(own, experts.gate_up_proj[expert].to(x.dtype)).chunk(2, -1)
        done.append(F.linear(F.silu(gate) * up, experts.down_proj[expert].to(x.dtype)))
    routed = torch.zeros_like(x).index_add(0, rows, torch.cat(done) * weight.flatten()[order, None])
    shared = block.shared_expert
    inner = F.silu(F.linear(x, shared.gate_proj.weight.to(x.dtype))) * F.linear(x, shared.up_proj.weight.to(x.dtype))
    own = F.linear(inner, shared.down_proj.weight.to(x.dtype))
    return routed + own * F.linear(x, block.shared_expert_gate.weight.to(x.dtype)).sigmoid(), balance, load


@dataclass(frozen=True)
class Layout:
    """What the places of a batch's tokens decide, the same for every batch of one shape: computed once, or each step
    would wait for the GPU a few times. ``start``, ``count``: where the picture's tokens stand."""

    vision: tuple[torch.Tensor, ...]
    cos: torch.Tensor  # [T, rotary]
    sin: torch.Tensor
    start: int
    count: int


def vl_layout(model: Qwen3_5MoeForConditionalGeneration, ids: torch.Tensor, patches: torch.Tensor) -> Layout:
    """The layout of token ids [B, T] with one picture at the same place in every row, patches [B, N, ...]."""
    seen = ids == model.config.image_token_id
    if not bool((seen == seen[0]).all()):
        raise ValueError("the pictures of a training batch must stand at one place")
    count = patches.shape[1]
    grid = torch.tensor([[1, math.isqrt(count), math.isqrt(count)]], device=ids.device)
    positions, _ = model.model.get_rope_index(ids[:1], seen[:1].int(), image_grid_thw=grid)
    cos, sin = (table[0] for table in model.model.language_model.rotary_emb(patches.new_zeros(1), positions))
    tables = vision_tables(model.model.visual, count, patches.device)
    return Layout(tables, cos, sin, int(seen[0].int().argmax()), count // MERGE**2)


def vl_forward(
    model: Qwen3_5MoeForConditionalGeneration, ids: torch.Tensor, patches: torch.Tensor, dtype: torch.dtype,
    layer_fn: Callable = decoder_layer, vision_fn: Callable = vision_forward, layout: Layout | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """Token ids [B, T] with one picture at the same place in every row, patches [B, N, ...] -> (hidden states [B, T, H],
    mean balance loss, expert load [layers, E]). ``layout``: that of all batches of this shape."""
    text, config = model.model.language_model, model.config.text_config
    layout = layout or vl_layout(model, ids, patches)
    tokens = vision_fn(model.model.visual, patches, layout.vision, dtype)
    cos, sin = layout.cos.to(dtype), layout.sin.to(dtype)
    x = F.embedding(ids, text.embed_tokens.weight).to(dtype)
    x = torch.cat([x[:, : layout.start], tokens, x[:, layout.start + layout.count :]], 1)
    balances, loads = [], []
    for layer in text.layers:
        x, balance, load = layer_fn(layer, x, cos, sin, config.rms_norm_eps, config.num_experts_per_tok)
        balances.append(balance)
        loads.append(load)
    return rms_norm(x, 1 + text.norm.weight, config.rms_norm_eps), torch.stack(balances).mean(), torch.stack(loads)
