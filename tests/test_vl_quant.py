"""The vision tower through quantization: byte-identical beside quantized text experts, in both passes, and reloadable."""

import gguf
import pytest
import torch
from conftest import untrained_vl
from transformers import AutoModelForImageTextToText

import pack_plan
from calibration import Calibration
from checkpoint import Checkpoint
from console import UserError
from families import Role, roles_of
from hf_model import check_complete
from moe_quant import fake_quant
from pack_plan import left_out, write_mmproj
from pictures import load_processor
from quant_save import quantize_checkpoint
from recipe import Recipe


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """An untrained vision-language checkpoint as transformers writes it."""
    return untrained_vl(tmp_path_factory.mktemp("vlq") / "model", 100, 2)


def calibration():
    ids = torch.randint(0, 300, (4, 64), generator=torch.Generator().manual_seed(0))
    return Calibration(ids, {"name": "random", "revision": "0", "sha256": None, "n": 4}, batch=4, device=torch.device("cpu"))


@pytest.mark.parametrize("method", ["clip", "gptq"])
def test_vision_is_kept_and_text_is_quantized(model, tmp_path, method):
    recipe = Recipe(expert_bits=3, linear_bits=4, group=128, clip_steps=4, method=method)
    report = quantize_checkpoint(model, tmp_path / "q", recipe, calibration=calibration() if method == "gptq" else None)
    source, made = Checkpoint(model), Checkpoint(tmp_path / "q")
    roles = roles_of({name: info.shape for name, info in source.tensors.items()}, source.config)
    assert set(source.tensors) == set(made.tensors)
    changed = {name for name in roles if not torch.equal(source.read(name), made.read(name))}
    vision = {name for name in roles if ".visual." in name}
    assert len(vision) > 15 and all(roles[name] is Role.VISION for name in vision) and not changed & vision
    kept = {Role.VISION, Role.ROUTER, Role.NORM, Role.SSM_STATE}
    assert changed == {name for name, role in roles.items() if role not in kept}
    experts = [name for name in changed if roles[name] is Role.ROUTED_EXPERT]
    assert experts and all(name.startswith("model.language_model.layers.") for name in experts)
    if method == "clip":
        assert torch.equal(made.read(experts[0]), fake_quant(source.read(experts[0]), 3, 128, 4))
    groups = made.read(experts[0]).float().reshape(-1, 128)
    assert max(len(group.unique()) for group in groups[:64]) <= 8
    assert report.roles["vision"].bits is None and report.roles["routed_expert"].relative_error > 0


@pytest.mark.parametrize(
    "old,new,message",
    [
        ("model.visual.", "vision_tower.", "tensors are missing: visual.*; it has vision_tower."),
        ("model.visual.", "model.vision_tower.", "tensors are missing: visual."),
        ("model.visual.blocks.0.attn.", "", "tensors are missing: visual.blocks.0.attn."),
        ("model.visual.", "", "tensors are missing: visual."),
        ("model.visual.", "visual.", None),
        ("model.language_model.", "language_model.model.", None),
    ],
)
def test_every_tensor_of_the_tower_is_wanted_by_its_name(model, old, new, message):
    checkpoint = Checkpoint(model)
    for name in [name for name in checkpoint.tensors if name.startswith(old)]:
        info = checkpoint.tensors.pop(name)
        if new:
            checkpoint.tensors[name.replace(old, new)] = info
    if message is None:
        check_complete(checkpoint)
    else:
        with pytest.raises(UserError, match=message):
            check_complete(checkpoint)


def test_a_tower_that_the_converter_drops_is_no_file(model, tmp_path, monkeypatch):
    def converter(kind, source, out, path, *more):
        writer = gguf.GGUFWriter(path, "clip")
        writer.add_tensor("v.patch_embd.weight", torch.ones(4, 4).numpy())
        writer.write_header_to_file(), writer.write_kv_data_to_file(), writer.write_tensors_to_file(), writer.close()

    monkeypatch.setattr(pack_plan, "run_converter", converter)
    with pytest.raises(UserError, match=r"put 16 of the vision tower's [\d,]+ weights into"):
        write_mmproj(Checkpoint(model), tmp_path)
    assert not list(tmp_path.iterdir())
    roles = roles_of({name: info.shape for name, info in Checkpoint(model).tensors.items()}, Checkpoint(model).config)
    count = sum(role is Role.VISION for role in roles.values())
    checkpoint = Checkpoint(model)
    assert left_out(checkpoint)[0].startswith(f"in a file of their own (mmproj): {count} tensors, ")
    checkpoint.tensors["mtp.fc.weight"] = checkpoint.tensors["lm_head.weight"]
    assert left_out(checkpoint)[0].startswith("left out: 1 tensors, 0.1")


@pytest.mark.parametrize("method", ["absmax", "gptq_refit"])
def test_the_quantized_checkpoint_loads_whole_and_sees(model, tmp_path, method):
    recipe = Recipe(expert_bits=4, linear_bits=4, group=128, clip_steps=1, method=method)
    quantize_checkpoint(model, tmp_path / "q", recipe, calibration=calibration() if method != "absmax" else None)
    loaded, info = AutoModelForImageTextToText.from_pretrained(tmp_path / "q", dtype=torch.float32, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert load_processor(tmp_path / "q").image_processor.patch_size == 8
    original = AutoModelForImageTextToText.from_pretrained(model, dtype=torch.float32)
    patches = torch.rand(64, 384, generator=torch.Generator().manual_seed(1)) * 2 - 1
    grid = torch.tensor([[1, 8, 8]])
    with torch.no_grad():
        first, second = (m.model.visual(patches, grid_thw=grid).pooler_output for m in (original, loaded))
    assert torch.equal(first, second)
