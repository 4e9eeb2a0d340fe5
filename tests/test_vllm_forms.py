"""razor-tiny in the forms that vLLM runs, and the arithmetic of its part of multi_gpu.sh."""

import time

import pytest
import torch
from conftest import REPO

from console import UserError, write_json
from hf_model import load_model
from records import write_result
from speed_eval import touched_bytes, weights_of_checkpoint, weights_of_model
from speed_multi_gpu import compared_forced, same_tokens
from vllm_form import repeated_key_heads, text_model, write_form

RAZOR = REPO / "models/razor-tiny"


def test_published_form_with_more_key_heads_is_the_same_function(tmp_path):
    write_form("qwen3_5", RAZOR, tmp_path / "m", 4)
    ids = torch.randint(0, 800, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        one, two = (load_model(path)(ids).logits for path in (RAZOR, tmp_path / "m"))
    assert (one - two).abs().max() < 1e-3 * one.abs().max()
    config, tensors = text_model(RAZOR)
    name = "model.layers.0.linear_attn.in_proj_qkv.weight"
    assert len(repeated_key_heads(tensors, config, 4)[name]) == len(tensors[name]) + 2 * 2 * 64
    with pytest.raises(UserError, match="multiple of 2"):
        repeated_key_heads(tensors, config, 3)
    with pytest.raises(UserError, match="exists"):
        write_form("qwen3_5", RAZOR, tmp_path / "m")


def test_the_limit_counts_the_same_weights_from_files_and_in_memory(tmp_path):
    model, config = load_model(RAZOR).to(torch.bfloat16), {"num_experts": 8, "num_experts_per_tok": 2}
    write_form("qwen3_5", RAZOR, tmp_path / "m")
    for batch in (1, 16):
        one, two = (touched_bytes(w, config, batch) for w in (weights_of_model(model), weights_of_checkpoint(tmp_path / "m")))
        assert one == pytest.approx(two, rel=0.01)  # norms of a Gated DeltaNet are float32 in the file
    assert touched_bytes(weights_of_model(model), config, 1) < 0.5 * touched_bytes(weights_of_model(model), config, 64)


def test_same_tokens_counts_up_to_the_first_that_differs():
    found = same_tokens(["1 2 3", "4 5 6", "7 8 9"], ["1 2 3", "4 0 6", "0 8 9"])
    assert found == {"same_tokens": 4, "tokens": 9, "answers": 3, "equal_first_tokens": 2, "equal_answers": 1}


def test_engines_are_compared_with_the_first_and_with_themselves(tmp_path):
    ids = {1: {"1": ["5 6"], "2": ["5 6", "7 8"]}, 2: {"1": ["5 9"], "2": ["5 6", "1 8"]}}
    for parallel, rows in ids.items():
        record = tmp_path / f"forced-{parallel}.json"
        write_json(record.with_suffix(".ids"), rows)
        write_result(record, kind="bench", tag=record.stem, started=time.time(), metrics={"eval_speed": parallel})
    found = compared_forced({parallel: tmp_path / f"forced-{parallel}.json" for parallel in ids})
    assert (found["1"]["same_tokens"], found["1"]["tokens"], found["1"]["among_more"]["same_tokens"]) == (6, 6, 2)
    assert (found["2"]["same_tokens"], found["2"]["equal_first_tokens"], found["2"]["eval_speed"]) == (3, 2, 2)
    assert (found["2"]["among_more"]["same_tokens"], found["2"]["among_more"]["tokens"]) == (1, 2)
