"""The importance matrix: what the probe measures, written as llama.cpp's GGUF and read back."""

import gguf
import numpy as np
import pytest
import torch

from calibration_text import calibration_ids
from console import UserError
from gguf_format import Entry, read_imatrix, write_imatrix


def test_round_trip_and_foreign_files(tmp_path):
    rng = np.random.default_rng(0)
    entries = {
        "blk.0.ffn_gate_exps.weight": Entry(rng.random((4, 32), np.float32), rng.random(4, np.float32)),
        "blk.0.attn_q.weight": Entry(rng.random((1, 32), np.float32), np.array([512], np.float32)),
    }
    write_imatrix(tmp_path / "i.gguf", entries, ["a text"], chunks=7, length=512)
    back, facts = read_imatrix(tmp_path / "i.gguf")
    assert facts == {"datasets": ["a text"], "chunk_count": 7, "chunk_size": 512} and back.keys() == entries.keys()
    assert all(np.array_equal(back[n].sums, e.sums) and np.array_equal(back[n].counts, e.counts) for n, e in entries.items())
    shapes = {t.name: t.shape.tolist() for t in gguf.GGUFReader(tmp_path / "i.gguf").tensors}  # innermost first
    assert shapes["blk.0.ffn_gate_exps.weight.in_sum2"] == [32, 4] and shapes["blk.0.ffn_gate_exps.weight.counts"] == [1, 4]
    broken = entries | {"blk.0.attn_q.weight": Entry(np.full((1, 32), np.nan, np.float32), np.array([512], np.float32))}
    write_imatrix(tmp_path / "nan.gguf", broken, ["a text"], chunks=7, length=512)
    with pytest.raises(UserError, match="nan.gguf: blk.0.attn_q.weight holds NaN or infinity"):
        read_imatrix(tmp_path / "nan.gguf")
    (tmp_path / "text").write_text("nothing of the kind")
    for name, message in (("text", "not a GGUF file"), ("none", "no such GGUF file")):
        with pytest.raises(UserError, match=message):
            read_imatrix(tmp_path / name)


def test_the_probe_writes_mean_squared_inputs(random_tiny, tmp_path, command):
    flags = ["--calib-sequences", 2, "--calib-length", 64, "--imatrix", tmp_path / "i.gguf"]
    done = command("src/quant/moe_probe.py", "--model", random_tiny, *flags)
    assert done.returncode == 0, done.stderr
    entries, facts = read_imatrix(tmp_path / "i.gguf")
    assert facts["chunk_count"] == 2 and facts["chunk_size"] == 64
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(random_tiny, dtype=torch.float32)
    seen = []
    model.model.layers[3].self_attn.q_proj.register_forward_pre_hook(lambda m, a: seen.append(a[0].flatten(0, 1)))
    with torch.no_grad():
        model(calibration_ids(None, random_tiny, 2, 64)[0])
    entry = entries["blk.3.attn_q.weight"]
    np.testing.assert_allclose(entry.sums[0] / entry.counts[0], seen[0].pow(2).mean(0), rtol=1e-3)
    assert entries["blk.0.ffn_down_exps.weight"].sums.shape == (8, 256)
