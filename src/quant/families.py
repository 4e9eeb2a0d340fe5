"""What is known of each model family, in one entry of a table: what its tensors are, and what they become in a GGUF.

Not a command. `role_of("model.layers.0.mlp.gate.weight", (256, 3072), "qwen3_5_moe")` is `Role.ROUTER`; a tensor that no rule
names is an error. Experts are matched both as stored by most checkpoints (one matrix per expert) and fused ([E, 2I, H],
[E, H, I]); `place_of` says where a tensor lies in transformers' module tree, which has them fused.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

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
# How llama.cpp stores a parameter that ends so, where not as it is; the first that fits (gguf_layout.py says what it means).
STORED_HYBRID = (
    ("linear_attn.norm.weight", {}),
    ("norm.weight", {"function": "plus_one"}),
    ("linear_attn.A_log", {"function": "negative_exp", "rows": "heads"}),
    ("linear_attn.dt_bias", {"rows": "heads"}),
    ("linear_attn.in_proj_a.weight", {"rows": "heads"}),
    ("linear_attn.in_proj_b.weight", {"rows": "heads"}),
    ("linear_attn.in_proj_z.weight", {"rows": "values"}),
    ("linear_attn.in_proj_qkv.weight", {"rows": "keys and values"}),
    ("linear_attn.conv1d.weight", {"rows": "keys and values"}),
    ("linear_attn.out_proj.weight", {"columns": "values"}),
)


@dataclasses.dataclass(frozen=True)
class Family:
    """``layer``: the rules of a decoder layer's tensors; ``ggml``: llama.cpp's name of the architecture; ``stored``: what is
    otherwise in a GGUF than in the checkpoint, None where this project writes no GGUF."""

    layer: Rules
    ggml: str
    stored: tuple[tuple[str, Mapping[str, str]], ...] | None = None


FAMILIES = {
    "qwen3_5_moe": Family(QWEN_HYBRID + EXPERTS + SHARED_EXPERT, "qwen35moe", STORED_HYBRID),
    "qwen3_5": Family(QWEN_HYBRID + MLP, "qwen35", STORED_HYBRID),
    "qwen3_next": Family(QWEN_HYBRID + EXPERTS + SHARED_EXPERT + MLP, "qwen3next"),
    "qwen3_moe": Family(BLOCK + QK_NORM + EXPERTS + MLP, "qwen3moe"),
    "mixtral": Family(BLOCK + MIXTRAL, "llama"),
    "olmoe": Family(BLOCK + QK_NORM + EXPERTS, "olmoe"),
    "deepseek_v3": Family(BLOCK + DEEPSEEK + EXPERTS + MLP, "deepseek2"),
    "llama": Family(BLOCK + MLP, "llama"),
    "qwen2": Family(BLOCK + MLP, "qwen2"),
    "qwen3": Family(BLOCK + QK_NORM + MLP, "qwen3"),
    "gemma2": Family(BLOCK + GEMMA_NORMS + MLP, "gemma2"),
    "gemma3": Family(BLOCK + QK_NORM + GEMMA_NORMS + MLP, "gemma3"),
}
# The matrices of an expert by their names on disk, and where they lie among the rows of the fused parameter.
PARTS = {"gate_proj": "gate", "up_proj": "up", "down_proj": "down", "w1": "gate", "w3": "up", "w2": "down"}
EXPERT = re.compile(rf"(.*\.mlp\.experts)\.(\d+)\.({'|'.join(PARTS)})\.weight")
VISION_PREFIX = re.compile(r"(model\.)?(visual|vision_tower|multi_modal_projector)\.")
MTP_PREFIX = re.compile(r"(model\.)?mtp\.")
LAYER_PREFIX = re.compile(r"model\.layers\.(\d+)\.")
# A multimodal checkpoint nests its text model: model.language_model.* (transformers 5) or language_model.model.*.
NESTINGS = ((r"^model\.language_model\.", "model."), (r"^language_model\.(model\.|lm_head\.)", r"\1"))


@functools.cache
def _compiled(rules: Rules) -> list[tuple[re.Pattern[str], Role]]:
    return [(re.compile(pattern), role) for pattern, role in rules]


def family_of(model_type: str) -> str:
    """The key of the table for config.json's model_type; the text part of a multimodal model has its family."""
    family = model_type.removesuffix("_text")
    if family not in FAMILIES:
        raise UserError(f"model_type {model_type!r} is not supported; supported: {', '.join(FAMILIES)}")
    return family


def text_name(name: str) -> str:
    """The name a tensor of a text model has without the nesting of a multimodal checkpoint."""
    for pattern, replacement in NESTINGS:
        name = re.sub(pattern, replacement, name)
    return name


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a tensor of the checkpoint lies in transformers' module tree: a parameter, and for an expert's matrix on disk
    which expert and which rows ("gate", "up" or "down") of the fused parameter."""

    parameter: str
    expert: int | None = None
    part: str | None = None

    def view(self, fused: Tensor) -> Tensor:
        """The part of the parameter that this tensor is; shares its memory."""
        if self.expert is None:
            return fused
        rows = fused[self.expert]
        return rows if self.part == "down" else rows.chunk(2)[self.part == "up"]


def place_of(name: str) -> Place:
    """The place of a checkpoint tensor, by its name alone."""
    text = text_name(name).replace(".block_sparse_moe.", ".mlp.")
    if not (match := EXPERT.fullmatch(text)):
        return Place(text)
    part = PARTS[match[3]]
    return Place(f"{match[1]}.{'down_proj' if part == 'down' else 'gate_up_proj'}", int(match[2]), part)


def role_of(name: str, shape: Sequence[int], model_type: str, num_layers: int | None = None) -> Role:
    """The role of tensor ``name``. A decoder layer at or past ``num_layers`` is multi-token prediction (deepseek_v3
    stores it there). Raises :class:`UserError` on an unknown model_type, tensor, or number of dimensions."""
    family = FAMILIES[family_of(model_type)]
    if VISION_PREFIX.match(name):
        return Role.VISION
    if MTP_PREFIX.match(name):
        return Role.MTP
    text = text_name(name)
    prefix = LAYER_PREFIX.match(text)
    if prefix and num_layers is not None and int(prefix[1]) >= num_layers:
        return Role.MTP
    rules, rest = (family.layer, text[prefix.end() :]) if prefix else (TOP, text)
    role = next((role for pattern, role in _compiled(rules) if pattern.fullmatch(rest)), None)
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
