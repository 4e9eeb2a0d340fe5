"""What each tensor of a checkpoint is, decided in one place per model family; a tensor that no rule names is an error.

Not a command. `role_of("model.layers.0.mlp.gate.weight", (256, 3072), "qwen3_5_moe")` is `Role.ROUTER`.
Experts are matched both as stored by most checkpoints (one matrix per expert) and fused ([E, 2I, H], [E, H, I]).
"""

from __future__ import annotations

import enum
import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any

from console import UserError


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The language model's part of a config.json: a multimodal one keeps it under text_config."""
    inner = config.get("text_config")
    return inner if isinstance(inner, dict) else config


class Role(enum.StrEnum):
    ROUTED_EXPERT = "routed_expert"
    SHARED_EXPERT = "shared_expert"
    ATTENTION = "attention"
    LINEAR_ATTENTION = "linear_attention"
    SSM_STATE = "ssm_state"  # decay, step size and convolution of a recurrent mixer
    ROUTER = "router"
    NORM = "norm"
    EMBEDDING = "embedding"
    LM_HEAD = "lm_head"
    MLP = "mlp"
    BIAS = "bias"
    VISION = "vision"
    MTP = "mtp"  # multi-token prediction


# Dimensions that a tensor of this role may have; a surprise means that the name was misread. Others are free.
DIMENSIONS = {
    Role.ROUTED_EXPERT: (2, 3),
    Role.SHARED_EXPERT: (2,),
    Role.ATTENTION: (2,),
    Role.LINEAR_ATTENTION: (2,),
    Role.EMBEDDING: (2,),
    Role.LM_HEAD: (2,),
    Role.MLP: (2,),
    Role.NORM: (1,),
    Role.BIAS: (1,),
}

Rules = tuple[tuple[str, Role], ...]

# Patterns are matched in full against the name: TOP as it is, LAYER after "model.layers.N.".
TOP: Rules = (
    (r"model\.embed_tokens\.weight", Role.EMBEDDING),
    (r"lm_head\.weight", Role.LM_HEAD),
    (r"model\.norm\.weight", Role.NORM),
)
BLOCK: Rules = (
    (r"(input|post_attention)_layernorm\.weight", Role.NORM),
    (r"self_attn\.[qkvo]_proj\.weight", Role.ATTENTION),
    (r"self_attn\.[qkvo]_proj\.bias", Role.BIAS),
)
QK_NORM: Rules = ((r"self_attn\.[qk]_norm\.weight", Role.NORM),)
GEMMA_NORMS: Rules = ((r"(pre|post)_feedforward_layernorm\.weight", Role.NORM),)
MLP: Rules = (
    (r"mlp\.(gate|up|down)_proj\.weight", Role.MLP),
    (r"mlp\.(gate|up|down)_proj\.bias", Role.BIAS),
)
DELTA_NET: Rules = (
    (r"linear_attn\.in_proj_(qkv|z|b|a|qkvz|ba)\.weight", Role.LINEAR_ATTENTION),
    (r"linear_attn\.out_proj\.weight", Role.LINEAR_ATTENTION),
    (r"linear_attn\.(A_log|dt_bias|conv1d\.weight)", Role.SSM_STATE),
    (r"linear_attn\.norm\.weight", Role.NORM),
)
EXPERTS: Rules = (
    (r"mlp\.experts\.\d+\.(gate|up|down)_proj\.weight", Role.ROUTED_EXPERT),
    (r"mlp\.experts\.(gate_up|down)_proj", Role.ROUTED_EXPERT),
    (r"mlp\.gate\.weight", Role.ROUTER),
)
SHARED_EXPERT: Rules = (
    (r"mlp\.shared_expert\.(gate|up|down)_proj\.weight", Role.SHARED_EXPERT),
    (r"mlp\.shared_expert_gate\.weight", Role.ROUTER),
)
MIXTRAL: Rules = (
    (r"block_sparse_moe\.experts\.\d+\.w[123]\.weight", Role.ROUTED_EXPERT),
    (r"block_sparse_moe\.gate\.weight", Role.ROUTER),
    *EXPERTS,  # the names transformers 5 holds in memory
)
DEEPSEEK: Rules = (
    (r"self_attn\.(q_a_proj|q_b_proj|kv_a_proj_with_mqa|kv_b_proj)\.weight", Role.ATTENTION),
    (r"self_attn\.(q_a_proj|kv_a_proj_with_mqa)\.bias", Role.BIAS),
    (r"self_attn\.(q_a|kv_a)_layernorm\.weight", Role.NORM),
    (r"mlp\.shared_experts\.(gate|up|down)_proj\.weight", Role.SHARED_EXPERT),
    (r"mlp\.gate\.e_score_correction_bias", Role.ROUTER),
)

QWEN_HYBRID = BLOCK + QK_NORM + DELTA_NET
LAYER: dict[str, Rules] = {
    "qwen3_5_moe": QWEN_HYBRID + EXPERTS + SHARED_EXPERT,
    "qwen3_5": QWEN_HYBRID + MLP,
    "qwen3_next": QWEN_HYBRID + EXPERTS + SHARED_EXPERT + MLP,
    "qwen3_moe": BLOCK + QK_NORM + EXPERTS + MLP,
    "mixtral": BLOCK + MIXTRAL,
    "olmoe": BLOCK + QK_NORM + EXPERTS,
    "deepseek_v3": BLOCK + DEEPSEEK + EXPERTS + MLP,
    "llama": BLOCK + MLP,
    "qwen2": BLOCK + MLP,
    "qwen3": BLOCK + QK_NORM + MLP,
    "gemma2": BLOCK + GEMMA_NORMS + MLP,
    "gemma3": BLOCK + QK_NORM + GEMMA_NORMS + MLP,
}
VISION_PREFIX = re.compile(r"(model\.)?(visual|vision_tower|multi_modal_projector)\.")
MTP_PREFIX = re.compile(r"(model\.)?mtp\.")
LAYER_PREFIX = re.compile(r"model\.layers\.(\d+)\.")
# A multimodal checkpoint nests its text model: model.language_model.* (transformers 5) or language_model.model.*.
NESTINGS = ((r"^model\.language_model\.", "model."), (r"^language_model\.(model\.|lm_head\.)", r"\1"))


@functools.cache
def _compiled(family: str) -> tuple[list[tuple[re.Pattern[str], Role]], list[tuple[re.Pattern[str], Role]]]:
    return tuple([(re.compile(pattern), role) for pattern, role in rules] for rules in (TOP, LAYER[family]))


def family_of(model_type: str) -> str:
    """The key of the table for config.json's model_type; the text part of a multimodal model has its family."""
    family = model_type.removesuffix("_text")
    if family not in LAYER:
        raise UserError(f"model_type {model_type!r} is not supported; supported: {', '.join(LAYER)}")
    return family


def text_name(name: str) -> str:
    """The name a tensor of a text model has without the nesting of a multimodal checkpoint."""
    for pattern, replacement in NESTINGS:
        name = re.sub(pattern, replacement, name)
    return name


def role_of(name: str, shape: Sequence[int], model_type: str, num_layers: int | None = None) -> Role:
    """The role of tensor ``name``. A decoder layer at or past ``num_layers`` is multi-token prediction (deepseek_v3
    stores it there). Raises :class:`UserError` on an unknown model_type, tensor, or number of dimensions."""
    top, layer = _compiled(family_of(model_type))
    if VISION_PREFIX.match(name):
        return Role.VISION
    if MTP_PREFIX.match(name):
        return Role.MTP
    text = text_name(name)
    prefix = LAYER_PREFIX.match(text)
    if prefix and num_layers is not None and int(prefix[1]) >= num_layers:
        return Role.MTP
    rules, rest = (layer, text[prefix.end() :]) if prefix else (top, text)
    role = next((role for pattern, role in rules if pattern.fullmatch(rest)), None)
    if role is None:
        raise UserError(f"tensor {name} {list(shape)}: no rule for it in model_type {model_type} (families.py)")
    if len(shape) not in DIMENSIONS.get(role, (len(shape),)):
        raise UserError(f"tensor {name}: shape {list(shape)} is not that of a {role} (families.py)")
    return role


def roles_of(shapes: Mapping[str, Sequence[int]], config: Mapping[str, Any]) -> dict[str, Role]:
    """The role of every tensor of a checkpoint with this config.json; raises like :func:`role_of`."""
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise UserError("config.json has no model_type")
    layers = config.get("num_hidden_layers", (config.get("text_config") or {}).get("num_hidden_layers"))
    return {name: role_of(name, shape, model_type, layers) for name, shape in shapes.items()}
