"""Every family: a tiny checkpoint as its publisher lays it out, quantized with and without text, loads in transformers and
predicts alike."""

import json

import pytest
import torch
from safetensors.torch import save_file
from tiny_families import FAMILY, tiny_family
from transformers import AutoModelForCausalLM

from calibration import Calibration, LayerStream
from checkpoint import Checkpoint
from console import UserError
from families import Role, roles_of
from fsdp_setup import World
from hf_model import load_model
from kl import divergence
from merge_adapter import merge
from moe_lora import trainable
from opd_data import Example, TrainSettings, collate, model_identity
from opd_losses import gathered
from opd_student import build_student
from opd_train_fsdp import Trainer, write_adapter
from quant_save import quantize_checkpoint
from recipe import Recipe
from sensitivity import probe

IDS = torch.randint(5, 830, (40, 50), generator=torch.Generator().manual_seed(0))  # 2,000 positions
TEXT = Calibration(IDS[:16, :48], {"name": "random"}, token_power=0.4, damping=0.1)


@pytest.fixture(scope="module", params=FAMILY)
def family(request, tmp_path_factory):
    return tiny_family(tmp_path_factory.mktemp("families") / request.param, request.param)


def logits_of(path):
    with torch.no_grad():
        return load_model(path)(IDS).logits.flatten(0, 1)


def same_names(path, other):
    """The tensors of a checkpoint by name, dtype and shape are those of another."""
    one, two = ({name: (t.dtype, t.shape) for name, t in Checkpoint(at).tensors.items()} for at in (path, other))
    assert one == two


def test_the_layers_one_by_one_are_transformers_own_model(family):
    stream = LayerStream(Checkpoint(family), torch.device("cpu"), torch.float32)
    (hidden,), arguments = stream.embed([IDS]), stream.arguments(IDS)
    for index, layer in enumerate(stream.layers):
        stream.fill(layer, f"model.layers.{index}.")
        hidden = next(iter(stream.run(layer, [hidden], arguments[index])))
        stream.empty(layer)
    with stream.predictions() as logits, torch.no_grad():
        assert torch.equal(logits(hidden).flatten(0, 1), logits_of(family))


@pytest.mark.parametrize("method", ["clip", "gptq"])
def test_at_eight_bits_it_predicts_alike(family, tmp_path, method, capsys):
    recipe = Recipe(expert_bits=8, linear_bits=8, group=16, method=method)
    report = quantize_checkpoint(family, tmp_path / "out", recipe, calibration=TEXT if method == "gptq" else None)
    shapes = {name: info.shape for name, info in Checkpoint(family).tensors.items()}
    quantized = [name for name, role in roles_of(shapes, Checkpoint(family).config).items() if recipe.bits_for(role)]
    assert sum(role.tensors for role in report.roles.values() if role.bits) == len(quantized) > 10
    same_names(tmp_path / "out", family)
    changed = [
        name for name in quantized if not torch.equal(Checkpoint(family).read(name), Checkpoint(tmp_path / "out").read(name))
    ]
    assert changed == quantized
    kl, _ = divergence(logits_of(family), logits_of(tmp_path / "out"))
    assert 0 < kl.mean() <= 1e-3
    if json.loads((family / "config.json").read_text())["model_type"] != "kimi_k2":  # whose own code is not run
        _, said = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
        assert not said["missing_keys"] and not said["unexpected_keys"] and not said["mismatched_keys"]


def test_the_router_is_watched(family, capsys):
    checkpoint = Checkpoint(family)
    roles = roles_of({name: info.shape for name, info in checkpoint.tensors.items()}, checkpoint.config)
    layers = {checkpoint.places[name].parameter.split(".")[2] for name, role in roles.items() if role is Role.ROUTED_EXPERT}
    reports, _ = probe(checkpoint, Calibration(IDS[:16, :48], {"name": "random"}))
    assert reports.keys() == layers
    for report in reports.values():
        assert sum(report["frequency"]) == pytest.approx(1, abs=1e-4) and report["never_routed"] < 4


def test_an_adapter_trains_and_merges_to_the_same_logits(family, tmp_path, capsys):
    """LoRA on every role for two steps: the first forward is the student's, the merged checkpoint on its grid is the last."""
    quantize_checkpoint(family, tmp_path / "q", Recipe(3, 4, 16, 1))
    config = TrainSettings(rank=2, linears=True, steps=2, lr=0.5, clip=1e9)
    alone = World(0, 1, torch.device("cpu"))
    student = build_student(tmp_path / "q", family, config, alone, "forward_kl", 1.0, recompute=True)
    ids = IDS[:4]
    with torch.no_grad():
        before, wanted = student.logits(ids), load_model(family)(ids).logits
        torch.testing.assert_close(before, load_model(tmp_path / "q")(ids).logits, rtol=0, atol=1e-6)
    examples = [Example(row, 4, gathered(own[3:-1], own[3:-1].topk(8).indices)) for row, own in zip(ids, wanted)]
    trainer = Trainer(student, config, alone, tmp_path / "a", {})
    for _ in range(2):
        student(collate(examples)).backward()
        assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in trainable(student).values())
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()
    (tmp_path / "a").mkdir()
    trainer.curve = [[1, 0.0, 0.0]]
    write_adapter(trainer, {"student": model_identity(tmp_path / "q"), "teacher": model_identity(family)}, {})
    merge(tmp_path / "q", family, tmp_path / "a", tmp_path / "r", False)
    same_names(tmp_path / "r", family)
    with torch.no_grad():
        after = load_model(tmp_path / "r")(ids).logits
        torch.testing.assert_close(after, student.logits(ids), rtol=0, atol=1e-5)
    assert (after - before).abs().max() > 1e-3


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
    same_names(tmp_path / "out", tmp_path / "m")
    with pytest.raises(UserError, match="no class of model_type 'bailing_moe'.*clip"):
        quantize_checkpoint(tmp_path / "m", tmp_path / "out2", Recipe(3, 4, 32, 1, method="gptq"), calibration=TEXT)
    assert not (tmp_path / "out2").exists()
