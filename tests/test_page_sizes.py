"""The arithmetic of docs/MOE_PIPELINE.md is its script's, agrees with what was published, and follows the shape."""

import json
import math

import pytest

from check_results import check_text
from console import UserError
from page_results import ladder
from page_sizes import BEGIN, END, model_tables, put_into, skeleton_of
from records import REPO
from size_model import state_bytes


@pytest.fixture(scope="module")
def shape():
    return json.loads((REPO / "configs/shape_122b.json").read_text())


def test_the_document_holds_the_scripts_tables_and_the_published_sizes(shape):
    made = model_tables(shape)
    document = (REPO / "docs/MOE_PIPELINE.md").read_text()
    assert put_into(document, made) == document, "run python src/quant/page_sizes.py --write"
    assert "122,111,526,912 parameters" in made  # 122.11 B, as the model's pages say
    file = next(line for line in made.splitlines() if "experts: the file" in line)
    gib, bits = (float(cell) for cell in file.split("|")[3:5])
    assert abs(gib - 48.04) < 0.03 and bits == 3.38  # InstinctRazor's release
    # by hand: 48 layers of 256 experts of three matrices of 1024 x 3072, at 3 bits
    assert f"| {48 * 256 * 3 * 1024 * 3072 * 3 / 8 / 1e9:.1f} |" in made and "| 43.5 |" in made
    with pytest.raises(UserError, match="marks"):
        put_into(document.replace(END, ""), made)


def test_state_of_a_context_by_hand(shape):
    a_token, state = state_bytes(shape["text_config"])
    assert a_token == 12 * 2 * 2 * 256 * 2  # full-attention layers, keys and values, heads, width, bytes
    assert state == 36 * 4 * (64 * 128 * 128 + 3 * (2 * 16 * 128 + 64 * 128))


def test_a_skeleton_is_a_checkpoint_that_takes_no_disk(shape, tmp_path):
    small = shape["text_config"] | {"num_hidden_layers": 4, "num_experts": 8}
    checkpoint = skeleton_of(small, tmp_path / "skeleton")
    experts = sum(info.numel for name, info in checkpoint.tensors.items() if ".experts." in name)
    assert experts == 4 * 8 * 3 * 1024 * 3072
    assert checkpoint.bytes > 2 * sum(math.prod(info.shape) for info in checkpoint.tensors.values())
    assert sum(file.stat().st_blocks * 512 for file in checkpoint.files) < 1 << 20
    assert not checkpoint.read("model.norm.weight").any()


def test_the_ladder_is_current_and_every_figure_is_cited():
    document = (REPO / "docs/LADDER_RESULTS.md").read_text()
    assert ladder(REPO / "results") == document, "run python src/eval/page_results.py"
    count, faults = check_text(document, REPO / "docs")
    assert not faults and count > 100
    assert BEGIN not in document
