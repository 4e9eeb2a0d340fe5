"""Tiny untrained checkpoints of every family that transformers has a class of, as their publishers lay them out on disk."""

import json
import shutil

import torch
from conftest import REPO
from transformers import AutoConfig, AutoModelForCausalLM

SIZES = dict(
    vocab_size=832, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    head_dim=16, max_position_embeddings=512, moe_intermediate_size=32, num_experts=4, num_local_experts=4,
    n_routed_experts=4, num_experts_per_tok=2, tie_word_embeddings=False, pad_token_id=0, bos_token_id=None,
    eos_token_id=1, first_k_dense_replace=1, n_group=2, topk_group=1, n_shared_experts=1, initializer_range=0.05,
)  # fmt: skip
LATENT = dict(q_lora_rank=32, kv_lora_rank=32, qk_rope_head_dim=16, qk_nope_head_dim=16, v_head_dim=16, num_key_value_heads=4)
INDEXED = LATENT | dict(index_n_heads=2, index_head_dim=32, index_topk=128)
HYBRID = dict(
    layer_types=["linear_attention", "full_attention"], linear_num_key_heads=2, linear_num_value_heads=4,
    linear_key_head_dim=16, linear_value_head_dim=16, shared_expert_intermediate_size=32, decoder_sparse_step=1,
)  # fmt: skip
MAMBA = dict(
    mamba_n_heads=4, mamba_d_head=32, mamba_d_state=16, mamba_n_groups=1, mamba_expand=2, mamba_dt_rank=4,
    use_mamba_kernels=False,
)  # fmt: skip
FAMILY = {  # model_type of config.json -> what it has beside SIZES
    "qwen3_5_moe_text": HYBRID,
    "qwen3_5_text": HYBRID,
    "qwen3_next": HYBRID,
    "qwen3_moe": {},
    "mixtral": {},
    "olmoe": {},
    "deepseek_v3": LATENT,
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "gemma2": {},
    "gemma3_text": {},
    "kimi_k2": LATENT,
    "deepseek_v2": LATENT | dict(topk_method="greedy"),
    "deepseek_v32": INDEXED,
    "glm_moe_dsa": INDEXED | dict(num_hidden_layers=3, indexer_types=["full", "shared", "full"]),
    "glm4_moe": {},
    "glm4_moe_lite": LATENT,
    "qwen2_moe": dict(shared_expert_intermediate_size=32, decoder_sparse_step=1),
    "mistral": {},
    "hunyuan_v1_moe": {},
    "minimax_m2": {},
    "ernie4_5_moe": dict(
        moe_num_experts=4, moe_k=2, moe_num_shared_experts=1, moe_layer_start_index=1, moe_layer_end_index=1
    ),
    "phimoe": {},
    "gemma4_text": dict(enable_moe_block=True, top_k_experts=2, hidden_size_per_layer_input=0, num_kv_shared_layers=0),
    "granitemoehybrid": MAMBA | dict(layer_types=["mamba", "attention"], shared_intermediate_size=32, embedding_multiplier=3.0),
    "jamba": MAMBA | dict(attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2, expert_layer_offset=1),
    "gpt_oss": {},
    "llama4_text": dict(intermediate_size_mlp=96, interleave_moe_layer_step=2, num_hidden_layers=4),
    "nemotron_h": dict(
        layers_block_type=["mamba", "moe", "attention", "mlp"], num_hidden_layers=4, mamba_num_heads=4, mamba_head_dim=32,
        ssm_state_size=16, n_groups=1, moe_shared_expert_intermediate_size=32, use_mamba_kernels=False,
    ),
}  # fmt: skip
RENAMED = {"kimi_k2": "deepseek_v3"}  # transformers' class of a model_type that it does not know


def tiny_family(path, model_type):
    """Write the checkpoint of ``model_type`` with razor-tiny's tokenizer; returns ``path``."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(RENAMED.get(model_type, model_type), **SIZES | FAMILY[model_type])
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, value in [*model.named_parameters(), *model.named_buffers()]:
            if "correction_bias" in name or name.endswith("sinks"):
                value.normal_(0, 0.02)
            if name.endswith(("router.weight", "router.proj.weight", "mlp.gate.weight", "mixer.gate.weight", "gate.wg.weight")):
                value.mul_(
                    160 if "proj" in name else 20
                )  # decided routing, as of a trained model: a tie that rounding turns is a whole expert's output
    model.bfloat16().save_pretrained(path)
    if model_type in RENAMED:
        text = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps(text | {"model_type": model_type}))
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(REPO / "models/razor-tiny" / name, path)
    return path
