"""The architectures of razor-tiny and razor-tiny-vl, and fast training forwards over transformers' own module trees.

Not a command. transformers holds the parameters (so what is saved loads anywhere); the forwards here compute the same
functions for training: all experts as two dense matrix products (at 8 experts cheaper than a gather), the gated delta
rule in chunks, pictures of one size at one place. tests/test_tiny_model.py and test_tiny_vl.py compare them with transformers.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers import (
    PreTrainedTokenizerFast,
    Qwen3_5ForCausalLM,
    Qwen3_5MoeConfig,
    Qwen3_5MoeForCausalLM,
    Qwen3_5MoeForConditionalGeneration,
    Qwen3_5MoeTextConfig,
    Qwen3_5TextConfig,
)
from transformers.vision_utils import get_vision_interpolation_indices_and_weights, get_vision_position_ids

from console import UserError
from mtp import MtpBlock
from tiny_data import MERGE, PATCH, VISION_TOKENS

FRAMES = 2  # copies of a still picture
IMAGE_PROCESSOR: dict[str, Any] = {
    "image_processor_type": "Qwen2VLImageProcessor",
    "patch_size": PATCH,
    "merge_size": MERGE,
    "temporal_patch_size": FRAMES,
    "size": {"shortest_edge": 32 * 32, "longest_edge": 128 * 128},  # pixels of a picture, in and beyond which it is scaled
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}


def text_settings(vocab_size: int, eos_token_id: int, pad_token_id: int, layers: int) -> dict[str, Any]:
    """Of both models: hidden and inner sizes 256 so that i-quants fit."""
    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25}
    return {
        "vocab_size": vocab_size, "hidden_size": 256, "num_hidden_layers": layers,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64,
        "linear_key_head_dim": 64, "linear_value_head_dim": 64, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
        "moe_intermediate_size": 256, "shared_expert_intermediate_size": 128, "num_experts": 8, "num_experts_per_tok": 2,
        "max_position_embeddings": 2048,
        "rope_parameters": rope | {"mrope_interleaved": True, "mrope_section": [3, 3, 2]},
        "eos_token_id": eos_token_id, "pad_token_id": pad_token_id,
    }  # fmt: skip


def tiny_config(vocab_size: int, eos_token_id: int, pad_token_id: int, layers: int = 8) -> Qwen3_5MoeTextConfig:
    """15.9 M parameters, 79 % of them in routed experts."""
    own = text_settings(vocab_size, eos_token_id, pad_token_id, layers)
    return Qwen3_5MoeTextConfig(**own, tie_word_embeddings=False, bos_token_id=None)


@dataclass(frozen=True)
class TextShape:
    """Of a model that reads real text: ``experts`` of inner size ``inner`` (0: none, a dense one of inner size ``dense``)."""

    hidden: int
    inner: int
    experts: int
    top_k: int
    layers: int
    dense: int


def text_model(shape: TextShape, tokenizer: PreTrainedTokenizerFast, context: int) -> torch.nn.Module:
    """An untrained qwen3_5_moe (or dense qwen3_5) in float32: every fourth layer, and the last, of full attention."""
    if shape.hidden % 128 or min(shape.hidden, shape.layers) < 1:
        raise UserError(f"HIDDEN={shape.hidden}: must be a multiple of 128, two heads of 64; LAYERS at least 1")
    if not (0 < shape.top_k <= shape.experts and shape.inner > 0 or not shape.experts and shape.dense > 0):
        raise UserError("a mixture needs INNER and TOP_K between 1 and EXPERTS; a dense model EXPERTS=0 and DENSE")
    kinds = ["full_attention" if i % 4 == 3 or i == shape.layers - 1 else "linear_attention" for i in range(shape.layers)]
    own = text_settings(len(tokenizer), tokenizer.eos_token_id, tokenizer.pad_token_id, shape.layers)
    heads = shape.hidden // 64
    own |= {"hidden_size": shape.hidden, "num_attention_heads": heads, "linear_num_value_heads": heads, "layer_types": kinds}
    own |= {"linear_num_key_heads": heads // 2, "max_position_embeddings": context, "tie_word_embeddings": False}
    mixture = {name: own.pop(name) for name in tuple(own) if "expert" in name or name.startswith("moe_")}
    if not shape.experts:
        return Qwen3_5ForCausalLM(Qwen3_5TextConfig(**own, intermediate_size=shape.dense, bos_token_id=None)).float()
    mixture |= {"moe_intermediate_size": shape.inner, "shared_expert_intermediate_size": shape.inner}
    mixture |= {"num_experts": shape.experts, "num_experts_per_tok": shape.top_k}
    return Qwen3_5MoeForCausalLM(Qwen3_5MoeTextConfig(**own, **mixture, bos_token_id=None)).float()


def vl_config(tokenizer: PreTrainedTokenizerFast, layers: int, vision_layers: int) -> Qwen3_5MoeConfig:
    """Every second text layer is full attention; a vision tower of 128."""
    text = text_settings(len(tokenizer), tokenizer.eos_token_id, tokenizer.pad_token_id, layers)
    text |= {"layer_types": ["full_attention" if i % 2 else "linear_attention" for i in range(layers)]}
    vision = {
        "depth": vision_layers, "hidden_size": 128, "num_heads": 4, "intermediate_size": 256, "patch_size": PATCH,
        "spatial_merge_size": MERGE, "temporal_patch_size": FRAMES, "out_hidden_size": 256, "num_position_embeddings": 64,
    }  # fmt: skip
    ids = dict(zip(("vision_start", "vision_end", "image", "video"), map(tokenizer.convert_tokens_to_ids, VISION_TOKENS)))
    return Qwen3_5MoeConfig(
        text_config=text | {"full_attention_interval": 2}, vision_config=vision,
        **{f"{key}_token_id": value for key, value in ids.items()},
    )  # fmt: skip


@torch.no_grad()
def init_weights(model: torch.nn.Module, seed: int) -> None:
    """Normal(0.02), residual outputs scaled by 1/sqrt(2 layers), decays spread as in Mamba-2 (dt 0.001 to 0.1).

    transformers' own initial dt_bias makes every head forget within one token, which trains slowly.
    """
    generator = torch.Generator().manual_seed(seed)
    depth_scale = 1 / math.sqrt(2 * model.config.num_hidden_layers)
    for name, weight in model.named_parameters():
        if name.endswith(("out_proj.weight", "o_proj.weight", "down_proj", "down_proj.weight")):
            weight.normal_(0, 0.02 * depth_scale, generator=generator)
        elif name.endswith("dt_bias"):
            dt = torch.exp(torch.empty_like(weight).uniform_(math.log(0.001), math.log(0.1), generator=generator))
            weight.copy_(dt + torch.log(-torch.expm1(-dt)))
        elif name.endswith("A_log"):
            weight.copy_(torch.empty_like(weight).uniform_(1, 16, generator=generator).log())
        elif name.endswith("conv1d.weight"):
            weight.uniform_(-0.5, 0.5, generator=generator)
        elif weight.ndim >= 2:
            weight.normal_(0, 0.02, generator=generator)


def linear(layer: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The layer in the dtype of ``x``."""
    bias = getattr(layer, "bias", None)
    return F.linear(x, layer.weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """RMSNorm in float32 with ``weight`` as the full factor; returns the dtype of ``x``."""
    y = x.float()
    return (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + eps) * weight.float()).to(x.dtype)


def gated_delta_rule(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor, beta: torch.Tensor, chunk: int = 64
) -> torch.Tensor:
    """Gated delta rule (Yang et al. 2024, "Gated Delta Networks") by chunks, float32 inside.

    q, k, v: [B, T, heads, D]; g (log decay, <= 0), beta: [B, T, heads]; T a multiple of ``chunk``. Returns [B, T, heads, D].
    """
    batch, length, heads, dim = q.shape
    n = length // chunk

    def split(x: torch.Tensor) -> torch.Tensor:
        return x.float().reshape(batch, n, chunk, heads, -1).permute(0, 3, 1, 2, 4)  # [B, heads, n, chunk, D]

    q, k, v = split(q), split(k), split(v)
    g, beta = split(g[..., None])[..., 0], split(beta[..., None])
    q = F.normalize(q, dim=-1, eps=1e-6) * dim**-0.5
    k = F.normalize(k, dim=-1, eps=1e-6)
    g = g.cumsum(-1)
    causal = torch.ones(chunk, chunk, dtype=torch.bool, device=q.device).tril()
    decay = (g[..., :, None] - g[..., None, :]).masked_fill(~causal, float("-inf")).exp()
    scores = k @ k.transpose(-1, -2)
    eye = torch.eye(chunk, device=q.device)
    system = eye + (beta * scores * decay).tril(-1)
    right = torch.cat([beta * v, beta * k * g.exp()[..., None]], -1)
    solved = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)
    new_v, k_decayed = solved[..., : v.shape[-1]], solved[..., v.shape[-1] :]
    within = (q @ k.transpose(-1, -2)) * decay
    q_in = q * g.exp()[..., None]
    k_out = k * (g[..., -1:] - g).exp()[..., None]
    last = g[..., -1].exp()[..., None, None]
    state, outputs = torch.zeros(batch, heads, dim, v.shape[-1], device=q.device), []
    for i in range(n):
        written = new_v[:, :, i] - k_decayed[:, :, i] @ state
        outputs.append(q_in[:, :, i] @ state + within[:, :, i] @ written)
        state = state * last[:, :, i] + k_out[:, :, i].transpose(-1, -2) @ written
    return torch.stack(outputs, 2).permute(0, 2, 3, 1, 4).reshape(batch, length, heads, -1)


def delta_net(layer: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The Gated-DeltaNet mixer of a layer on normed input [B, T, H]."""
    batch, length, _ = x.shape
    qkv = linear(layer.in_proj_qkv, x)
    taps = layer.conv1d.weight[:, 0].to(x.dtype)  # [channels, 4]
    width = taps.shape[1]
    padded = F.pad(qkv, (0, 0, width - 1, 0))
    qkv = F.silu(sum(padded[:, j : j + length] * taps[:, j] for j in range(width)))
    q, k, v = qkv.split([layer.key_dim, layer.key_dim, layer.value_dim], -1)
    heads, repeat = layer.num_v_heads, layer.num_v_heads // layer.num_k_heads
    q, k = (y.reshape(batch, length, layer.num_k_heads, -1).repeat_interleave(repeat, 2) for y in (q, k))
    beta = linear(layer.in_proj_b, x).float().sigmoid()
    a = linear(layer.in_proj_a, x).float()
    g = -layer.A_log.exp() * F.softplus(a + layer.dt_bias)
    chunk = 64 if length % 64 == 0 else 16
    out = gated_delta_rule(q, k, v.reshape(batch, length, heads, -1), g, beta, chunk).to(x.dtype)
    z = linear(layer.in_proj_z, x).reshape(out.shape)
    out = rms_norm(out, layer.norm.weight, layer.layer_norm_epsilon) * F.silu(z)
    return linear(layer.out_proj, out.reshape(batch, length, -1))


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of the first ``cos.shape[-1]`` channels of [B, heads, T, D]."""
    turned, kept = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    a, b = turned.chunk(2, -1)
    return torch.cat([turned * cos + torch.cat([-b, a], -1) * sin, kept], -1)


def attention(layer: torch.nn.Module, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """The gated full-attention mixer of a layer on normed input [B, T, H]."""
    batch, length, _ = x.shape
    dim = layer.head_dim
    query, gate = linear(layer.q_proj, x).view(batch, length, -1, 2 * dim).chunk(2, -1)
    key = linear(layer.k_proj, x).view(batch, length, -1, dim)
    value = linear(layer.v_proj, x).view(batch, length, -1, dim)
    query = rms_norm(query, 1 + layer.q_norm.weight, layer.q_norm.eps).transpose(1, 2)
    key = rms_norm(key, 1 + layer.k_norm.weight, layer.k_norm.eps).transpose(1, 2)
    query, key, value = rotate(query, cos, sin), rotate(key, cos, sin), value.transpose(1, 2)
    out = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    out = out.transpose(1, 2) * torch.sigmoid(gate)
    return linear(layer.o_proj, out.reshape(batch, length, -1))


def gated_mlp(block: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    return linear(block.down_proj, F.silu(linear(block.gate_proj, x)) * linear(block.up_proj, x))


DENSE_UP_TO = 16  # experts: fewer run faster as one dense product than gathered


def dense_experts(experts: torch.nn.Module, x: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
    """All experts on all tokens [N, H], weighted by ``gates`` [N, E], zero for those not chosen."""
    count, inner = experts.num_experts, experts.intermediate_dim
    up = F.linear(x, experts.gate_up_proj.to(x.dtype).flatten(0, 1)).view(-1, count, 2 * inner)
    hidden = F.silu(up[..., :inner]) * up[..., inner:] * gates.to(x.dtype)[..., None]
    down = experts.down_proj.to(x.dtype).permute(1, 0, 2).reshape(-1, count * inner)
    return F.linear(hidden.flatten(1), down)


def grouped_experts(experts: torch.nn.Module, x: torch.Tensor, weight: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """Each token's ``chosen`` experts [N, k] alone, with their ``weight`` [N, k]: tokens in the order of experts, two grouped
    matrix products."""
    inner, order = experts.intermediate_dim, chosen.flatten().argsort(stable=True)
    tokens = order // chosen.shape[1]
    ones = torch.ones_like(order, dtype=torch.int32)
    ends = ones.new_zeros(experts.num_experts).scatter_add(0, chosen.flatten(), ones).cumsum(0, dtype=torch.int32)
    up = F.grouped_mm(x[tokens], experts.gate_up_proj.to(x.dtype).transpose(1, 2), offs=ends)
    hidden = F.silu(up[:, :inner]) * up[:, inner:] * weight.flatten()[order].to(x.dtype)[:, None]
    down = F.grouped_mm(hidden, experts.down_proj.to(x.dtype).transpose(1, 2), offs=ends)
    places = torch.empty_like(order).scatter(0, order, torch.arange(len(order), device=x.device))
    return down[places].view(*chosen.shape, -1).sum(1)  # a gather, whose sum has one order: index_add's differs between runs


def mixture(block: torch.nn.Module, x: torch.Tensor, top_k: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The MoE block on [N, H]: (output, mean probability per expert [E], share of assignments per expert [E]); a dense one is
    one expert."""
    if not hasattr(block, "experts"):
        return gated_mlp(block, x), *x.new_ones(2, 1, dtype=torch.float32)
    count = block.experts.num_experts
    probs = linear(block.gate, x).softmax(-1, dtype=torch.float32)
    weight, chosen = probs.topk(top_k, -1)
    weight = weight / weight.sum(-1, keepdim=True)
    gates = torch.zeros_like(probs).scatter(-1, chosen, weight)
    load = (gates > 0).float().mean(0) / top_k
    own = dense_experts(block.experts, x, gates) if count <= DENSE_UP_TO else grouped_experts(block.experts, x, weight, chosen)
    shared = gated_mlp(block.shared_expert, x) * linear(block.shared_expert_gate, x).sigmoid()
    return own + shared, probs.mean(0), load


def balance_loss(probs: torch.Tensor, load: torch.Tensor) -> torch.Tensor:
    """E * sum_e f_e p_e (Switch Transformer, eq. 4), 1 when balanced; mean over the layers [layers, E]."""
    return load.shape[-1] * (load * probs).sum(-1).mean()


def decoder_layer(
    layer: torch.nn.Module, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, eps: float, top_k: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One layer on [B, T, H]: (output, mean probability and load of the experts, [E] each). Compiled alone it serves all
    layers of a kind: two graphs instead of one of the whole model, a quarter of the compilation time."""
    normed = rms_norm(x, 1 + layer.input_layernorm.weight, eps)
    mixer = getattr(layer, "linear_attn", None)
    x = x + (delta_net(mixer, normed) if mixer is not None else attention(layer.self_attn, normed, cos, sin))
    normed = rms_norm(x, 1 + layer.post_attention_layernorm.weight, eps)
    out, probs, load = mixture(layer.mlp, normed.flatten(0, 1), top_k)
    return x + out.view_as(x), probs, load


def text_positions(length: int, device: torch.device) -> torch.Tensor:
    """[3, 1, T]: of text, the same along time, height and width; transformers before 5.19 asks for all three."""
    return torch.arange(length, device=device).expand(3, 1, -1)


def train_forward(
    model: Qwen3_5MoeForCausalLM, ids: torch.Tensor, dtype: torch.dtype, layer_fn: Callable = decoder_layer
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Token ids [B, T] -> (final hidden states [B, T, H], mean probability and load of the experts, [layers, E] each).

    ``layer_fn``: :func:`decoder_layer` or its compiled form.
    """
    x = F.embedding(ids, model.model.embed_tokens.weight).to(dtype)
    cos, sin = (table[0] for table in model.model.rotary_emb(x, text_positions(ids.shape[1], ids.device)))
    return through_layers(model.model, model.config, x, cos, sin, layer_fn)


def draft_forward(
    block: MtpBlock, ids: torch.Tensor, hidden: torch.Tensor, depths: int, lead: bool, layer_fn: Callable = decoder_layer
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Token ids [B, T + 1], the trunk's final states of all but the last [B, T, H] -> for each drafted token d = 0, 1, ...
    (states [B, T, H], mean probability and load of the experts, [1, E] each): row t guesses token t + 2 + d; the last 1 + d
    rows are of no use, so that all batches have one shape. Each drafted token has read the tokens before it, as where all
    drafts were right. ``lead``: the row that llama.cpp puts before the others (mtp.py)."""
    width, config = hidden.shape[1], block.config
    cos, sin = (table[0] for table in block.rotary_emb(hidden, text_positions(width, ids.device)))
    for depth in range(depths):
        first = lead and not depth
        tokens = (ids if first else ids.roll(-1 - depth, 1))[:, :width]
        before = F.pad(hidden, (0, 0, 1, 0))[:, :-1] if first else hidden
        embedded = F.embedding(tokens, block.embed_tokens.weight).to(hidden.dtype)
        halves = zip((embedded, before), (block.pre_fc_norm_embedding, block.pre_fc_norm_hidden))
        rows = linear(block.fc, torch.cat([rms_norm(half, 1 + norm.weight, norm.eps) for half, norm in halves], -1))
        out, probs, load = layer_fn(block.layers[0], rows, cos, sin, config.rms_norm_eps, config.num_experts_per_tok)
        hidden = rms_norm(out, 1 + block.norm.weight, config.rms_norm_eps)
        hidden = hidden.roll(-1, 1) if first else hidden
        yield hidden, probs[None], load[None]


def through_layers(
    text: torch.nn.Module, config: Qwen3_5MoeTextConfig, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor,
    layer_fn: Callable,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """Embeddings [B, T, H] through all layers and the final norm."""
    shares = []
    for layer in text.layers:
        x, *share = layer_fn(layer, x, cos, sin, config.rms_norm_eps, getattr(config, "num_experts_per_tok", 1))
        shares.append(share)
    probs, loads = map(torch.stack, zip(*shares))
    return rms_norm(x, 1 + text.norm.weight, config.rms_norm_eps), probs, loads


# ---------------------------------------------------------------- pictures


@torch.no_grad()
def build_vl_model(config: Qwen3_5MoeConfig, seed: int) -> Qwen3_5MoeForConditionalGeneration:
    """The model in float32 with seeded weights; those of the tower Normal(1/sqrt(inputs)), what a block adds scaled down by its
    depth, the picture's tokens of the size of a word's."""
    model = Qwen3_5MoeForConditionalGeneration(config).float()
    init_weights(model.model.language_model, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    model.lm_head.weight.normal_(0, 0.02, generator=generator)
    visual = model.model.visual
    for name, weight in visual.named_parameters():
        if weight.ndim < 2:
            continue
        std = 0.3 if name.startswith("pos_embed") else 1 / math.sqrt(weight[0].numel())
        if name.endswith(("attn.proj.weight", "mlp.linear_fc2.weight")):
            std *= 1 / math.sqrt(2 * len(visual.blocks))
        weight.normal_(0, 0.005 if name == "merger.linear_fc2.weight" else std, generator=generator)
    return model


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


def two_layers(block: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    return linear(block.linear_fc2, block.act_fn(linear(block.linear_fc1, x)))


def vision_attention(layer: torch.nn.Module, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Attention of every patch of a picture to every other, [B, N, D]."""
    batch, count, _ = x.shape
    q, k, v = linear(layer.qkv, x).view(batch, count, 3, layer.num_heads, -1).permute(2, 0, 3, 1, 4)
    q, k = (y * cos + torch.cat([-y.chunk(2, -1)[1], y.chunk(2, -1)[0]], -1) * sin for y in (q, k))
    out = F.scaled_dot_product_attention(q, k, v)
    return linear(layer.proj, out.transpose(1, 2).reshape(batch, count, -1))


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
    mean probability and load of the experts, [layers, E] each). ``layout``: that of all batches of this shape."""
    text, config = model.model.language_model, model.config.text_config
    layout = layout or vl_layout(model, ids, patches)
    tokens = vision_fn(model.model.visual, patches, layout.vision, dtype)
    cos, sin = layout.cos.to(dtype), layout.sin.to(dtype)
    x = F.embedding(ids, text.embed_tokens.weight).to(dtype)
    x = torch.cat([x[:, : layout.start], tokens, x[:, layout.start + layout.count :]], 1)
    return through_layers(text, config, x, cos, sin, layer_fn)
