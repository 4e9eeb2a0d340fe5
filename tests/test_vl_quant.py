"""The vision tower through quantization: byte-identical beside quantized text experts, in both passes, and reloadable."""

import pytest
import torch
from conftest import untrained_vl
from transformers import AutoModelForImageTextToText

from calibration import Calibration
from checkpoint import Checkpoint
from families import Role, roles_of
from moe_quant import fake_quant
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
