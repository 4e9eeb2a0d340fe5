"""Every family: a tiny checkpoint as its publisher lays it out, quantized with and without text, loads in transformers and
predicts alike; its router is watched; adapters on it train and merge."""

import json

import pytest
import torch
from safetensors.torch import save_file

from checkpoint import Checkpoint
from console import UserError
from families import Role
from gguf_layout import Piece
from quant_save import quantize_checkpoint
from recipe import Recipe
from rounders import is_fed
from speed_families import FAMILY, as_gguf, calibration, checks, same_tensors, tiny_family


@pytest.mark.parametrize("name", FAMILY)
def test_a_family_works_from_end_to_end(name, tmp_path, capsys):
    found = dict(checks(tiny_family(tmp_path / name, name), tmp_path))
    assert found["layers"]["difference"] < 1e-5  # the layers one by one are transformers' own model
    for method in ("clip", "gptq"):
        assert 0 < found[method]["kl_mean"] <= 1e-3 and found[method]["positions"] == 2000 and found[method]["tensors"] > 10
    assert found["adapter"]["start"] < 1e-5 and found["adapter"]["merged"] < 1e-4 < found["adapter"]["moved"]


@pytest.mark.parametrize("name", ["qwen3_5_moe_text", "glm4_moe_lite", "minimax_m2"])
def test_a_family_becomes_a_gguf(name, quick_converter, tmp_path, capsys):
    """Traced, the same bytes as llama.cpp's tools; with error feedback it says in llama-server what transformers says of the
    same weights. Here: reordered heads, latent attention, stacks of experts."""
    found = as_gguf(tiny_family(tmp_path / name, name), tmp_path / "gguf")
    assert not {step: said for step, said in found.items() if isinstance(said, str)} and found["equal"] == []
    assert found["ldlq"]["fed"] > 10 and not found["ldlq"]["nearest"]
    assert found["served"]["positions"] == 512 and found["served"]["difference"] <= 0.01


def test_error_feedback_is_for_what_meets_the_inputs_of_its_parameter():
    def piece(*shape, **how):
        return Piece("n", shape, "p", ("s",), Role.ATTENTION, 0, **{"width": shape[-1]} | how)

    swapped = torch.tensor([1, 0, 2, 3])
    assert is_fed(piece(4, 6), (4, 6)) and is_fed(piece(4, 6, rows=swapped), (4, 6))
    assert is_fed(piece(4, 6, columns=torch.arange(5, -1, -1)), (4, 6)) and is_fed(piece(2, 6, span=(1, 3)), (4, 6))
    assert is_fed(piece(2, 1, 6, rows=torch.tensor([1, 3])), (4, 6))  # heads of one matrix
    assert not is_fed(piece(2, 6, 1, rows=torch.tensor([0, 2]), width=6, transposed=True), (4, 6))  # from the other side
    assert is_fed(piece(2, 3, 6), (2, 3, 6)) and is_fed(piece(2, 2, 6, rows=torch.tensor([0, 2, 3, 5])), (2, 3, 6))
    assert not is_fed(piece(2, 2, 6, rows=torch.tensor([0, 3, 1, 4])), (2, 3, 6))  # of two experts
    assert is_fed(piece(2, 6, 3, width=6, transposed=True), (2, 3, 6), turned=True) and not is_fed(
        piece(2, 3, 6), (2, 3, 6), True
    )
    assert not is_fed(piece(4, 6, function="converter"), (4, 6)) and not is_fed(piece(8, 3, width=3), (4, 6))


def test_without_a_class_in_transformers_what_needs_no_text_works(tmp_path, capsys):
    """bailing_moe, as Ling and Ring lay it out."""
    generator = torch.Generator().manual_seed(0)
    layer = {
        "input_layernorm": (64,), "post_attention_layernorm": (64,), "attention.query_key_value": (128, 64),
        "attention.dense": (64, 64), "mlp.gate": (4, 64),
    }  # fmt: skip
    for module in ("shared_experts", *(f"experts.{e}" for e in range(4))):
        layer |= {f"mlp.{module}.{part}_proj": (32, 64) for part in ("gate", "up")} | {f"mlp.{module}.down_proj": (64, 32)}
    shapes = {"model.word_embeddings": (99, 64), "model.norm": (64,), "lm_head": (99, 64)}
    shapes |= {f"model.layers.{index}.{name}": shape for index in range(2) for name, shape in layer.items()}
    tensors = {f"{name}.weight": torch.randn(shape, generator=generator).bfloat16() for name, shape in shapes.items()}
    (tmp_path / "m").mkdir()
    save_file(tensors, tmp_path / "m/model.safetensors", metadata={"format": "pt"})
    config = {"model_type": "bailing_moe", "num_hidden_layers": 2, "vocab_size": 99, "hidden_size": 64}
    (tmp_path / "m/config.json").write_text(json.dumps(config))
    report = quantize_checkpoint(tmp_path / "m", tmp_path / "out", Recipe(3, 4, 32, 4))
    assert report.roles[Role.ROUTED_EXPERT].tensors == 24 and report.roles[Role.SHARED_EXPERT].bits == 4
    same_tensors(Checkpoint(tmp_path / "m"), Checkpoint(tmp_path / "out"))
    with pytest.raises(UserError, match="no class of model_type 'bailing_moe'.*clip"):
        quantize_checkpoint(tmp_path / "m", tmp_path / "out2", Recipe(3, 4, 32, 1, method="gptq"), calibration=calibration())
    assert not (tmp_path / "out2").exists()
