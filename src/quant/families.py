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


def layer_count(config: Mapping[str, Any]) -> int | None:
    """Decoder layers by a config.json: nemotron_h lists their kinds instead of a number."""
    inner = text_config(config)
    kinds = inner.get("layers_block_type") or inner.get("hybrid_override_pattern")
    layers = inner.get("num_hidden_layers")
    if layers is not None and type(layers) is not int:
        raise UserError(f"config.json: num_hidden_layers {layers!r} is not a whole number")
    return layers or (len(kinds) if kinds else None)


TOP_K = ("num_experts_per_tok", "top_k_experts", "moe_k", "num_experts_per_token")
EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


def check_routing(config: Mapping[str, Any]) -> None:
    """Raise :class:`UserError` where a config.json sends a token to more experts than there are."""
    inner = text_config(config)
    counts = [inner[key] for key in EXPERT_COUNTS if type(inner.get(key)) is int]
    for key in TOP_K:
        if counts and type(inner.get(key)) is int and inner[key] > max(counts):
            raise UserError(f"config.json: {key} {inner[key]} is more than the {max(counts)} experts; correct it")


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
    (r"model\.rotary_emb\.inv_freq", Role.BIAS),  # a buffer that some checkpoints keep; every model makes it anew
)
BLOCK: Rules = (
    (r"(input|post_attention)_layernorm\.weight", Role.NORM),
    (r"self_attn\.[qkvo]_proj\.weight", Role.ATTENTION),
    (r"self_attn\.[qkvo]_proj\.bias", Role.BIAS),
    (r"self_attn\.rotary_emb\.inv_freq", Role.BIAS),
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
SHARED_EXPERTS: Rules = (
    (r"mlp\.(shared_experts|shared_mlp)\.(gate|up|down)_proj\.weight", Role.SHARED_EXPERT),
    (r"mlp\.(gate|moe_statics)\.e_score_correction_bias", Role.ROUTER),
)
MIXTRAL: Rules = (
    (r"block_sparse_moe\.experts\.\d+\.w[123]\.weight", Role.ROUTED_EXPERT),
    (r"block_sparse_moe\.(gate\.weight|e_score_correction_bias)", Role.ROUTER),
    *EXPERTS,  # the names transformers 5 holds in memory
    (r"mlp\.(router\.weight|e_score_correction_bias)", Role.ROUTER),
)
LATENT_ATTENTION: Rules = (
    (r"self_attn\.(q_a_proj|q_b_proj|kv_a_proj_with_mqa|kv_b_proj)\.weight", Role.ATTENTION),
    (r"self_attn\.(q_a_proj|kv_a_proj_with_mqa)\.bias", Role.BIAS),
    (r"self_attn\.(q_a|kv_a)_layernorm\.weight", Role.NORM),
)
INDEXER: Rules = (  # which positions attention looks at: a choice, like that of experts
    (r"self_attn\.indexer\.(wq_b|wk|weights_proj)\.weight", Role.ROUTER),
    (r"self_attn\.indexer\.k_norm\.weight", Role.NORM),
    (r"self_attn\.indexer\.k_norm\.bias", Role.BIAS),
)
GEMMA4: Rules = (
    (r"(pre|post)_feedforward_layernorm_[12]\.weight", Role.NORM),
    (r"experts\.(gate_up|down)_proj", Role.ROUTED_EXPERT),
    (r"router\.(proj\.weight|scale|per_expert_scale)", Role.ROUTER),
    (r"layer_scalar", Role.NORM),
)
MAMBA: Rules = (
    (r"(mamba|mixer)\.(in_proj|out_proj)\.weight", Role.LINEAR_ATTENTION),
    (r"(mamba|mixer)\.(A_log|D|dt_bias|conv1d\.(weight|bias)|x_proj\.weight|dt_proj\.(weight|bias))", Role.SSM_STATE),
    (r"(mamba|mixer)\.(norm|(dt|b|c)_layernorm)\.weight", Role.NORM),
)
GRANITE: Rules = (
    (r"block_sparse_moe\.(input_linear|output_linear)\.weight", Role.ROUTED_EXPERT),
    (r"block_sparse_moe\.router\.layer\.weight", Role.ROUTER),
    (r"shared_mlp\.(input|output)_linear\.weight", Role.SHARED_EXPERT),
)
FEED_FORWARD: Rules = (  # jamba, llama4
    (r"feed_forward\.(gate|up|down)_proj\.weight", Role.MLP),
    (r"feed_forward\.experts\.\d+\.(gate|up|down)_proj\.weight", Role.ROUTED_EXPERT),
    (r"feed_forward\.experts\.(gate_up|down)_proj", Role.ROUTED_EXPERT),
    (r"feed_forward\.shared_expert\.(gate|up|down)_proj\.weight", Role.SHARED_EXPERT),
    (r"feed_forward\.router\.weight", Role.ROUTER),
    (r"pre_ff_layernorm\.weight", Role.NORM),
)
GPT_OSS: Rules = (
    (r"mlp\.experts\.(gate_up|down)_proj_bias", Role.ROUTER),  # [E, O]: as many as the experts, and as small as a router
    (r"mlp\.router\.(weight|bias)", Role.ROUTER),
    (r"self_attn\.sinks", Role.BIAS),
)
NEMOTRON: Rules = (
    (r"norm\.weight", Role.NORM),
    (r"mixer\.[qkvo]_proj\.weight", Role.ATTENTION),
    (r"mixer\.(up|down)_proj\.weight", Role.MLP),
    (r"mixer\.experts\.\d+\.(up|down)_proj\.weight", Role.ROUTED_EXPERT),
    (r"mixer\.experts\.(up|down)_proj", Role.ROUTED_EXPERT),
    (r"mixer\.shared_experts\.(up|down)_proj\.weight", Role.SHARED_EXPERT),
    (r"mixer\.fc[12]_latent_proj\.weight", Role.MLP),
    (r"mixer\.gate\.(weight|e_score_correction_bias)", Role.ROUTER),
)
HYPER: Rules = (  # qwen4_exp: how the streams of the residual are mixed
    (r"(attn|mlp)_hyper_connection\.(block_inject_weight|input_mix_weight_(up|down))\.weight", Role.ROUTER),
    (r"(attn|mlp)_hyper_connection\.hc_norm\.weight", Role.NORM),
)
BAILING: Rules = (
    (r"(input|post_attention)_layernorm\.weight", Role.NORM),
    (r"attention\.(query_key_value|dense)\.weight", Role.ATTENTION),
    (r"attention\.(query|key)_layernorm\.weight", Role.NORM),
    (r"mlp\.gate\.expert_bias", Role.ROUTER),
)

QWEN_HYBRID = BLOCK + QK_NORM + DELTA_NET
# The fields of config.json that llama.cpp computes with, by the key of the file's header that must say the same.
CARRIED_HYBRID = {
    "block_count": "num_hidden_layers", "context_length": "max_position_embeddings", "embedding_length": "hidden_size",
    "attention.head_count": "num_attention_heads", "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim", "attention.value_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps", "ssm.conv_kernel": "linear_conv_kernel_dim",
    "ssm.state_size": "linear_key_head_dim", "ssm.group_count": "linear_num_key_heads",
    "ssm.time_step_rank": "linear_num_value_heads",
}  # fmt: skip
CARRIED_DENSE = CARRIED_HYBRID | {"feed_forward_length": "intermediate_size"}
CARRIED_MOE = CARRIED_HYBRID | {
    "expert_count": "num_experts", "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
}  # fmt: skip
# The one value of a field that llama.cpp's graph is written for.
FIXED_HYBRID = {
    "hidden_act": "silu", "attention_bias": False, "attn_output_gate": True, "mlp_only_layers": [], "decoder_sparse_step": 1,
    "norm_topk_prob": True, "use_sliding_window": False, "linear_attn_bias": False, "is_encoder_decoder": False,
    "routed_scaling_factor": 1.0,
}  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """``layer``: the rules of a decoder layer's tensors, ``top``: of the others. ``ggml``: llama.cpp's name of the
    architecture. Where every field is accounted for, ``carried``: the keys of a GGUF's header that must have the value of a
    field of config.json; ``fixed``: the fields that must have this value.

    ``renames``: where a tensor lies in transformers' module tree, as (pattern, replacement) pairs on its name, where that is
    another than on disk. ``transposed``: experts lie as [E, I, O]; without ``gated`` an expert has up_proj alone. ``carries``:
    the argument by which a decoder layer gives its second output to the next. ``alias``: the model_type whose classes
    transformers has, where it knows this one by no name of its own. ``packed_ends``: which of embedding and head vLLM 0.33
    reads from packed codes (a quantization config reaches them in its models/)."""

    layer: Rules
    ggml: str = ""
    top: Rules = ()
    renames: tuple[tuple[str, str], ...] = ()
    transposed: bool = False
    gated: bool = True
    carries: str = ""
    alias: str = ""
    packed_ends: tuple[Role, ...] = (Role.LM_HEAD,)

    def is_turned(self, shape: Sequence[int]) -> bool:
        """Whether a tensor or parameter of this shape is a stack of experts as [E, I, O]."""
        return self.transposed and len(shape) == 3

    carried: Mapping[str, str] = dataclasses.field(default_factory=dict)
    fixed: Mapping[str, Any] = dataclasses.field(default_factory=dict)


BOTH_ENDS = (Role.EMBEDDING, Role.LM_HEAD)
DEEPSEEK = BLOCK + LATENT_ATTENTION + SHARED_EXPERTS + EXPERTS + MLP
SPARSE_MOE = ((r"\.block_sparse_moe\.", ".mlp."),)
FAMILIES = {
    "qwen3_5_moe": Family(
        layer=QWEN_HYBRID + EXPERTS + SHARED_EXPERT,
        ggml="qwen35moe",
        carried=CARRIED_MOE,
        fixed=FIXED_HYBRID,
    ),
    "qwen3_5": Family(layer=QWEN_HYBRID + MLP, ggml="qwen35", carried=CARRIED_DENSE, fixed=FIXED_HYBRID),
    "qwen3_next": Family(layer=QWEN_HYBRID + EXPERTS + SHARED_EXPERT + MLP, ggml="qwen3next", packed_ends=()),
    "qwen3_moe": Family(layer=BLOCK + QK_NORM + EXPERTS + MLP, ggml="qwen3moe", packed_ends=BOTH_ENDS),
    "mixtral": Family(layer=BLOCK + MIXTRAL, ggml="llama", renames=SPARSE_MOE),
    "olmoe": Family(layer=BLOCK + QK_NORM + EXPERTS, ggml="olmoe", packed_ends=BOTH_ENDS),
    "deepseek_v3": Family(layer=DEEPSEEK, ggml="deepseek2", packed_ends=BOTH_ENDS),
    "llama": Family(layer=BLOCK + MLP, ggml="llama", packed_ends=BOTH_ENDS),
    "qwen2": Family(layer=BLOCK + MLP, ggml="qwen2", packed_ends=BOTH_ENDS),
    "qwen3": Family(layer=BLOCK + QK_NORM + MLP, ggml="qwen3", packed_ends=BOTH_ENDS),
    "gemma2": Family(layer=BLOCK + GEMMA_NORMS + MLP, ggml="gemma2"),
    "gemma3": Family(layer=BLOCK + QK_NORM + GEMMA_NORMS + MLP, ggml="gemma3", packed_ends=BOTH_ENDS),
    "kimi_k2": Family(layer=DEEPSEEK, ggml="deepseek2", alias="deepseek_v3", packed_ends=BOTH_ENDS),
    "deepseek_v2": Family(layer=DEEPSEEK, ggml="deepseek2", packed_ends=BOTH_ENDS),
    "deepseek_v32": Family(layer=DEEPSEEK + INDEXER, ggml="deepseek2", packed_ends=BOTH_ENDS),
    "glm_moe_dsa": Family(layer=DEEPSEEK + INDEXER, ggml="glm-dsa", carries="prev_topk_indices", packed_ends=BOTH_ENDS),
    "glm4_moe": Family(layer=BLOCK + QK_NORM + EXPERTS + SHARED_EXPERTS + MLP, ggml="glm4moe"),
    "glm4_moe_lite": Family(layer=DEEPSEEK, ggml="deepseek2", packed_ends=BOTH_ENDS),
    "qwen2_moe": Family(layer=BLOCK + EXPERTS + SHARED_EXPERT + MLP, ggml="qwen2moe", packed_ends=BOTH_ENDS),
    "mistral": Family(layer=BLOCK + MLP, ggml="llama", packed_ends=BOTH_ENDS),
    "hunyuan_v1_moe": Family(
        layer=(
            *BLOCK + EXPERTS + SHARED_EXPERTS + MLP,
            (r"self_attn\.(query|key)_layernorm\.weight", Role.NORM),
            (r"mlp\.gate\.wg\.weight", Role.ROUTER),
        ),
        ggml="hunyuan-moe",
        packed_ends=(),
    ),
    "minimax_m2": Family(layer=BLOCK + QK_NORM + MIXTRAL, ggml="minimax-m2", renames=SPARSE_MOE, packed_ends=BOTH_ENDS),
    "ernie4_5_moe": Family(
        layer=BLOCK + EXPERTS + SHARED_EXPERTS + MLP,
        ggml="ernie4_5-moe",
        renames=((r"\.mlp\.moe_statics\.", ".mlp.gate.moe_statics."),),
        packed_ends=BOTH_ENDS,
    ),
    "phimoe": Family(
        layer=(*BLOCK + MIXTRAL, (r"(input|post_attention)_layernorm\.bias", Role.BIAS)),
        ggml="phimoe",
        top=((r"(lm_head|model\.norm)\.bias", Role.BIAS),),
        renames=((r"\.block_sparse_moe\.gate\.", ".mlp.router."), *SPARSE_MOE),
    ),
    "gemma4": Family(layer=BLOCK + QK_NORM + GEMMA_NORMS + MLP + GEMMA4, ggml="gemma4", packed_ends=BOTH_ENDS),
    "granitemoehybrid": Family(
        layer=BLOCK + MAMBA + GRANITE,
        ggml="granitehybrid",
        renames=(
            (r"\.block_sparse_moe\.input_linear\.weight", ".block_sparse_moe.experts.gate_up_proj"),
            (r"\.block_sparse_moe\.output_linear\.weight", ".block_sparse_moe.experts.down_proj"),
            (r"\.router\.layer\.", ".router."),
        ),
    ),
    "jamba": Family(
        layer=BLOCK + MAMBA + FEED_FORWARD,
        ggml="jamba",
        top=((r"model\.final_layernorm\.weight", Role.NORM),),
        packed_ends=(),
    ),
    "gpt_oss": Family(layer=BLOCK + EXPERTS + GPT_OSS, ggml="gpt-oss", transposed=True, packed_ends=()),
    "llama4": Family(layer=BLOCK + FEED_FORWARD, ggml="llama4", transposed=True),
    "qwen4_exp": Family(
        layer=QWEN_HYBRID + EXPERTS + SHARED_EXPERT + INDEXER + HYPER,
        top=(
            (r"model\.hyper_connection_mixer\.hc_norm\.weight", Role.NORM),
            (r"model\.hyper_connection_mixer\.input_mix_weight_(up|down)\.weight", Role.ROUTER),
        ),
        packed_ends=(),
    ),
    "nemotron_h": Family(
        layer=MAMBA + NEMOTRON,
        ggml="nemotron_h_moe",
        top=((r"model\.embeddings\.weight", Role.EMBEDDING), (r"model\.norm_f\.weight", Role.NORM)),
        gated=False,
        packed_ends=BOTH_ENDS,
    ),
    "bailing_moe": Family(  # no class of it in transformers: only what needs no calibration
        layer=BAILING + EXPERTS + SHARED_EXPERTS + MLP,
        ggml="bailingmoe",
        top=((r"model\.word_embeddings\.weight", Role.EMBEDDING),),
        packed_ends=BOTH_ENDS,
    ),
}
# The matrices of an expert by their names on disk, and where they lie among the rows of the fused parameter.
PARTS = {"gate_proj": "gate", "up_proj": "up", "down_proj": "down", "w1": "gate", "w3": "up", "w2": "down"}
EXPERT = re.compile(rf"(.*\.experts)\.(\d+)\.({'|'.join(PARTS)})\.weight")
SEEING = "visual|vision_tower|vision_model|multi_modal_projector|mm_projector|embed_vision|audio_tower|embed_audio"
VISION_PREFIX = re.compile(rf"(model\.)?(language_model\.)?(?P<part>{SEEING})\.")
MTP_PREFIX = re.compile(r"(model\.)?mtp\.")
LAYER_PREFIX = re.compile(r"model\.layers\.(\d+)\.")
# A multimodal checkpoint nests its text model: model.language_model.* (transformers 5) or language_model.model.*; nemotron_h
# calls it backbone.
NESTINGS = (
    (r"^model\.language_model\.", "model."),
    (r"^language_model\.(model\.|lm_head\.)", r"\1"),
    (r"^backbone\.", "model."),
)


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
    which expert and which rows ("gate", "up", None for all) of the fused parameter."""

    parameter: str
    expert: int | None = None
    part: str | None = None

    def view(self, fused: Tensor) -> Tensor:
        """The part of the parameter that this tensor is; shares its memory."""
        if self.expert is None:
            return fused
        rows = fused[self.expert]
        return rows.chunk(2)[self.part == "up"] if self.part in ("gate", "up") else rows


def place_of(name: str, model_type: str) -> Place:
    """The place of a checkpoint tensor, by its name alone."""
    family, text = FAMILIES[family_of(model_type)], text_name(name)
    for pattern, replacement in family.renames:
        text = re.sub(pattern, replacement, text)
    if not (match := EXPERT.fullmatch(text)):
        return Place(text)
    part = PARTS[match[3]]
    if part == "down" or not family.gated:
        return Place(f"{match[1]}.{part}_proj", int(match[2]))
    return Place(f"{match[1]}.gate_up_proj", int(match[2]), part)


def role_of(name: str, shape: Sequence[int], model_type: str, num_layers: int | None = None, predictors: int = 0) -> Role:
    """The role of tensor ``name``. The ``predictors`` decoder layers behind ``num_layers`` are multi-token prediction
    (deepseek_v3 stores it there). Raises :class:`UserError` on an unknown model_type, tensor, layer or number of dimensions."""
    family = FAMILIES[family_of(model_type)]
    if VISION_PREFIX.match(name):
        return Role.VISION
    if MTP_PREFIX.match(name):
        return Role.MTP
    text = text_name(name)
    prefix = LAYER_PREFIX.match(text)
    if prefix and num_layers is not None and int(prefix[1]) >= num_layers:
        if int(prefix[1]) < num_layers + predictors:
            return Role.MTP
        raise UserError(
            f"tensor {name}: config.json says num_hidden_layers {num_layers}, so no layer {prefix[1]} would ever run; "
            "correct the config, or remove the tensor"
        )
    rules, rest = (family.layer, text[prefix.end() :]) if prefix else (family.top + TOP, text)
    role = next((role for pattern, role in _compiled(rules) if pattern.fullmatch(rest)), None)
    if role is None:
        raise UserError(f"tensor {name} {list(shape)}: no rule for it in model_type {model_type} (families.py)")
    if len(shape) not in DIMENSIONS.get(role, (len(shape),)):
        raise UserError(f"tensor {name}: shape {list(shape)} is not that of a {role} (families.py)")
    return role


def role_in_block(name: str, model_type: str) -> Role | None:
    """What a tensor of multi-token prediction is within its block: a decoder layer, behind the matrix (MLP) that joins its two
    inputs. None for the norms around them and for copies of the embedding and the head."""
    rest = re.sub(r"^(model\.)?layers\.\d+\.", "", MTP_PREFIX.sub("", text_name(name)))
    if rest in ("fc.weight", "eh_proj.weight"):
        return Role.MLP
    rules = _compiled(FAMILIES[family_of(model_type)].layer)
    return next((role for pattern, role in rules if pattern.fullmatch(rest)), None)


def roles_of(shapes: Mapping[str, Sequence[int]], config: Mapping[str, Any]) -> dict[str, Role]:
    """The role of every tensor of a checkpoint with this config.json; raises like :func:`role_of`."""
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise UserError("config.json has no model_type")
    layers, predictors = layer_count(config), text_config(config).get("num_nextn_predict_layers") or 0
    if not any(name.endswith(".eh_proj.weight") for name in shapes):
        predictors = 0  # such a layer begins with it; another is a decoder layer that the config does not count
    return {name: role_of(name, shape, model_type, layers, predictors) for name, shape in shapes.items()}
