"""The architecture of razor-tiny and a fast training forward over transformers' own module tree.

Not a command. transformers holds the parameters (so what is saved loads anywhere); the forward here computes the same
function for training: all experts as two dense matrix products (at 8 experts cheaper than a gather), the gated delta
rule in chunks. tests/test_tiny_model.py compares it with transformers' forward.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from transformers import Qwen3_5MoeForCausalLM, Qwen3_5MoeTextConfig


def tiny_config(vocab_size: int, eos_token_id: int, pad_token_id: int, layers: int = 8) -> Qwen3_5MoeTextConfig:
    """15.9 M parameters, 79 % of them in routed experts; hidden and inner sizes 256 so that i-quants fit."""
    return Qwen3_5MoeTextConfig(
        vocab_size=vocab_size,
        hidden_size=256,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        linear_key_head_dim=64,
        linear_value_head_dim=64,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        moe_intermediate_size=256,
        shared_expert_intermediate_size=128,
        num_experts=8,
        num_experts_per_tok=2,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.25,
            "mrope_interleaved": True,
            "mrope_section": [3, 3, 2],
        },
        eos_token_id=eos_token_id,
        pad_token_id=pad_token_id,
        bos_token_id=None,
    )


@torch.no_grad()
def init_weights(model: Qwen3_5MoeForCausalLM, seed: int) -> None:
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
    qkv = F.linear(x, layer.in_proj_qkv.weight.to(x.dtype))
    taps = layer.conv1d.weight[:, 0].to(x.dtype)  # [channels, 4]
    width = taps.shape[1]
    padded = F.pad(qkv, (0, 0, width - 1, 0))
    qkv = F.silu(sum(padded[:, j : j + length] * taps[:, j] for j in range(width)))
    q, k, v = qkv.split([layer.key_dim, layer.key_dim, layer.value_dim], -1)
    heads, repeat = layer.num_v_heads, layer.num_v_heads // layer.num_k_heads
    q, k = (y.reshape(batch, length, layer.num_k_heads, -1).repeat_interleave(repeat, 2) for y in (q, k))
    beta = F.linear(x, layer.in_proj_b.weight.to(x.dtype)).float().sigmoid()
    a = F.linear(x, layer.in_proj_a.weight.to(x.dtype)).float()
    g = -layer.A_log.exp() * F.softplus(a + layer.dt_bias)
    chunk = 64 if length % 64 == 0 else 16
    out = gated_delta_rule(q, k, v.reshape(batch, length, heads, -1), g, beta, chunk).to(x.dtype)
    z = F.linear(x, layer.in_proj_z.weight.to(x.dtype)).reshape(out.shape)
    out = rms_norm(out, layer.norm.weight, layer.layer_norm_epsilon) * F.silu(z)
    return F.linear(out.reshape(batch, length, -1), layer.out_proj.weight.to(x.dtype))


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of the first ``cos.shape[-1]`` channels of [B, heads, T, D]."""
    turned, kept = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    a, b = turned.chunk(2, -1)
    return torch.cat([turned * cos + torch.cat([-b, a], -1) * sin, kept], -1)


def attention(layer: torch.nn.Module, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """The gated full-attention mixer of a layer on normed input [B, T, H]."""
    batch, length, _ = x.shape
    dim = layer.head_dim
    query, gate = F.linear(x, layer.q_proj.weight.to(x.dtype)).view(batch, length, -1, 2 * dim).chunk(2, -1)
    key = F.linear(x, layer.k_proj.weight.to(x.dtype)).view(batch, length, -1, dim)
    value = F.linear(x, layer.v_proj.weight.to(x.dtype)).view(batch, length, -1, dim)
    query = rms_norm(query, 1 + layer.q_norm.weight, layer.q_norm.eps).transpose(1, 2)
    key = rms_norm(key, 1 + layer.k_norm.weight, layer.k_norm.eps).transpose(1, 2)
    groups = layer.num_key_value_groups
    out = F.scaled_dot_product_attention(
        rotate(query, cos, sin),
        rotate(key, cos, sin).repeat_interleave(groups, 1),
        value.transpose(1, 2).repeat_interleave(groups, 1),
        is_causal=True,
    )
    out = out.transpose(1, 2) * torch.sigmoid(gate)
    return F.linear(out.reshape(batch, length, -1), layer.o_proj.weight.to(x.dtype))


def mixture(block: torch.nn.Module, x: torch.Tensor, top_k: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The MoE block on [N, H]: (output, load balance loss, share of assignments per expert [E]).

    The loss is E * sum_e f_e p_e (Switch Transformer, eq. 4), 1 when balanced.
    """
    experts = block.experts
    count, inner = experts.num_experts, experts.intermediate_dim
    probs = F.linear(x, block.gate.weight.to(x.dtype)).softmax(-1, dtype=torch.float32)
    weight, chosen = probs.topk(top_k, -1)
    weight = weight / weight.sum(-1, keepdim=True)
    gates = torch.zeros_like(probs).scatter(-1, chosen, weight)  # [N, E], zero for experts not chosen
    load = (gates > 0).float().mean(0) / top_k
    balance = count * (load * probs.mean(0)).sum()
    up = F.linear(x, experts.gate_up_proj.to(x.dtype).flatten(0, 1)).view(-1, count, 2 * inner)
    hidden = F.silu(up[..., :inner]) * up[..., inner:] * gates.to(x.dtype)[..., None]
    down = experts.down_proj.to(x.dtype).permute(1, 0, 2).reshape(-1, count * inner)
    shared = block.shared_expert
    inner_shared = F.silu(F.linear(x, shared.gate_proj.weight.to(x.dtype))) * F.linear(x, shared.up_proj.weight.to(x.dtype))
    shared_out = F.linear(inner_shared, shared.down_proj.weight.to(x.dtype))
    shared_out = shared_out * F.linear(x, block.shared_expert_gate.weight.to(x.dtype)).sigmoid()
    return F.linear(hidden.flatten(1), down) + shared_out, balance, load


def decoder_layer(
    layer: torch.nn.Module, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, eps: float, top_k: int,
    mix: Callable = mixture,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """One layer on [B, T, H]: (output, load balance loss, expert load [E]). Compiled alone it serves all layers of a
    kind: two graphs instead of one of the whole model, a quarter of the compilation time."""
    normed = rms_norm(x, 1 + layer.input_layernorm.weight, eps)
    mixer = getattr(layer, "linear_attn", None)
    x = x + (delta_net(mixer, normed) if mixer is not None else attention(layer.self_attn, normed, cos, sin))
    normed = rms_norm(x, 1 + layer.post_attention_layernorm.weight, eps)
    out, balance, load = mix(layer.mlp, normed.flatten(0, 1), top_k)
    return x + out.view_as(x), balance, load


def train_forward(
    model: Qwen3_5MoeForCausalLM, ids: torch.Tensor, dtype: torch.dtype, layer_fn: Callable = decoder_layer
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Token ids [B, T] -> (final hidden states [B, T, H], mean balance loss, expert load [layers, E]).

    ``layer_fn``: :func:`decoder_layer` or its compiled form.
    """
    config = model.config
    x = F.embedding(ids, model.model.embed_tokens.weight).to(dtype)
    positions = torch.arange(ids.shape[1], device=ids.device)
    frequencies = torch.cat([positions[:, None].float() * model.model.rotary_emb.inv_freq] * 2, -1)
    cos, sin = frequencies.cos().to(dtype), frequencies.sin().to(dtype)
    balances, loads = [], []
    for layer in model.model.layers:
        x, balance, load = layer_fn(layer, x, cos, sin, config.rms_norm_eps, config.num_experts_per_tok)
        balances.append(balance)
        loads.append(load)
    x = rms_norm(x, 1 + model.model.norm.weight, config.rms_norm_eps)
    return x, torch.stack(balances).mean(), torch.stack(loads)
