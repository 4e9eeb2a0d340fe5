"""Checkpoints exactly as Qwen publishes them: every name, dtype and shape; quantized, packed, unpacked and loaded."""

import gzip

import pytest
import torch
from conftest import REPO
from transformers import AutoModelForImageTextToText

from checkpoint import Checkpoint
from families import Role, roles_of
from hf_model import load_model
from packed_export import unpack
from quant_save import quantize_checkpoint
from recipe import Recipe
from safetensors_file import DTYPE_NAMES
from size_model import SHAPES, Tower, published_plan
from synthetic_moe import fill_all, prepare

LAYOUTS = REPO.parent / "shared" / "data" / "layouts"
# Tensors and bytes as the hub counts them; the mtp head and the vision tower with 333 tensors among them.
PUBLISHED = {
    "qwen3.5-122b-a10b": ("122b", "3.5", 1949, 250_173_007_840, 785),
    "qwen3.5-35b-a3b": ("35b", "3.5", 1811, 71_903_655_008, 785),
    "qwen3.6-35b-a3b": ("35b", "3.6", 1045, 71_903_645_408, 19),
}


@pytest.mark.parametrize("model", PUBLISHED)
def test_full_sized_headers_are_the_published_ones(model, tmp_path):
    shape, generation, tensors, size, mtp = PUBLISHED[model]
    prepare(tmp_path / "m", SHAPES[shape], 0, published=generation)  # holes: takes no disk
    checkpoint = Checkpoint(tmp_path / "m")
    assert len(checkpoint.tensors) == tensors and sum(t.bytes for t in checkpoint.tensors.values()) == size
    assert checkpoint.files[0].name.startswith("model.safetensors-00001-of-00")
    roles = list(roles_of({name: info.shape for name, info in checkpoint.tensors.items()}, checkpoint.config).values())
    assert (roles.count(Role.VISION), roles.count(Role.MTP)) == (333, mtp)


@pytest.mark.skipif(not LAYOUTS.is_dir(), reason="the published lists are not beside this checkout")
@pytest.mark.parametrize("model", PUBLISHED)
def test_every_name_dtype_and_shape_is_the_published_one(model):
    shape, generation, *_ = PUBLISHED[model]
    plan = published_plan(SHAPES[shape], generation, Tower())
    with gzip.open(LAYOUTS / f"{model}.tsv.gz", "rt") as lines:
        wanted = {tuple(line.rstrip("\n").split("\t")) for line in lines}
    assert {(name, DTYPE_NAMES[dtype], "x".join(map(str, size))) for name, dtype, size in plan} == wanted


@pytest.mark.parametrize("generation", ["3.5", "3.6"])
def test_a_tiny_one_is_quantized_packed_and_loaded(generation, tmp_path, capsys):
    prepare(tmp_path / "m", SHAPES["tiny"], 0, published=generation)
    fill_all(tmp_path / "m")
    for name, packed in (("plain", False), ("packed", True)):
        quantize_checkpoint(tmp_path / "m", tmp_path / name, Recipe(4, 4, 128, 1), packed=packed)
    unpack(tmp_path / "packed", tmp_path / "again")
    plain, again = Checkpoint(tmp_path / "plain"), Checkpoint(tmp_path / "again")
    assert {name: info.shape for name, info in plain.tensors.items()} == {name: t.shape for name, t in again.tensors.items()}
    ids = torch.arange(5, 45)[None]
    with torch.no_grad():
        logits = [load_model(tmp_path / name)(ids).logits for name in ("again", "packed")]
    assert torch.equal(*logits)
    _, said = AutoModelForImageTextToText.from_pretrained(tmp_path / "plain", output_loading_info=True)
    assert not said["missing_keys"] and not said["unexpected_keys"]
