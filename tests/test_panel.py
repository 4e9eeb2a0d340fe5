"""The panel: its KL against that of whole logits, tokens that stay frozen, judges on the same positions, a floor below which
nothing is claimed."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import REPO
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

import panel as module
from calibration import LayerStream
from kl import compared_top, divergence, log_divergence, tiny_texts
from panel import (
    EVERYWHERE,
    Panel,
    Window,
    chunks,
    frozen,
    head_of,
    load,
    metrics_of,
    opened_stream,
    positions,
    settled,
    streamed_states,
)
from panel import packed as packed_rows
from quant_save import quantize_checkpoint
from recipe import Recipe
from task_text import TASK_TEXTS
from vllm_eval import top_rows

SIZES = {"vocab_size": 320, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 256, "initializer_range": 0.2}  # fmt: skip
FAMILIES = {
    "gemma2": {"final_logit_softcapping": 3.0, "query_pre_attn_scalar": 16, "tie_word_embeddings": True},
    "qwen3": {"tie_word_embeddings": True},
    "llama": {"tie_word_embeddings": False},
}


def made_model(path, family, seed, **more):
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SIZES | FAMILIES[family] | more))
    model.bfloat16().save_pretrained(path)
    return path


def moved(path, out, size=0.03):
    """A copy of a checkpoint with noise on its weights."""
    shutil.copytree(path, out)
    weights = load_file(out / "model.safetensors")
    generator = torch.Generator().manual_seed(1)
    noisy = {n: (w.float() * (1 + size * torch.randn(w.shape, generator=generator))).to(w.dtype) for n, w in weights.items()}
    save_file(noisy, out / "model.safetensors", {"format": "pt"})
    return out


def drawn(sizes, vocabulary=300):
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(5, vocabulary, (size,), generator=generator).tolist() for size in sizes]
    made = frozen(
        {"a": [Window(row, 1, len(row)) for row in rows[:2]], "b": [Window(row, 9, len(row) - 3) for row in rows[2:]]}
    )
    return Panel({"strata": ["a", "b"]}, made)


def told(panel, model, dtype, tmp_path):
    stream = opened_stream(model, dtype)
    (states,) = streamed_states(stream, panel, tmp_path)
    return states, head_of(stream)


@pytest.mark.parametrize(("family", "dtype"), [(name, "float32") for name in FAMILIES] + [("qwen3", "bfloat16")])
def test_the_head_replays_the_kl_of_whole_logits(family, dtype, tmp_path):
    """Capped, scaled, tied: to 1e-6 of the whole vocabulary's KL, with states in the dtype of the computation. In BF16 whole
    logits would be rounded once more, so that there the model's own last states are the measure."""
    reference, dtype = made_model(tmp_path / "m", family, 0), getattr(torch, dtype)
    other, frozen_panel = moved(reference, tmp_path / "other"), drawn([32, 48, 32, 48, 48])
    states, head = told(frozen_panel, reference, dtype, tmp_path)
    mine, logits = told(frozen_panel, other, dtype, tmp_path)
    found = positions(frozen_panel, states, head, chunks(frozen_panel, lambda places: logits(mine[places]), 320), {})
    assert states.dtype == dtype and len(found["kl"]) == int((frozen_panel.tensors["scored"] > 0).sum())
    slow = np.zeros(len(frozen_panel.owner))
    models = [AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval() for path in (reference, other)]
    for group in frozen_panel.groups(1 << 13):  # in the same batches: BF16's sums depend on them
        ids, scored = (torch.stack([frozen_panel.of(name, window) for window in group]) for name in ("ids", "scored"))
        with torch.no_grad():
            outs = [model(ids.long(), output_hidden_states=True) for model in models]
            if dtype is torch.float32:
                p, q = (out.logits for out in outs)
            else:
                heads = [model.get_output_embeddings().weight.float() for model in models]
                p, q = (out.hidden_states[-1].float() @ head.T for head, out in zip(heads, outs))
        slow[np.isin(frozen_panel.owner, group)] = divergence(p[:, :-1], q[:, :-1])[0][scored[:, 1:] > 0]
    assert np.abs(found["kl"] - slow).max() < 1e-6 and slow.mean() > 1e-3
    if dtype is torch.float32:  # BF16 states of a model that computes in float32 are another reference
        rounded = positions(frozen_panel, states.bfloat16(), head, chunks(frozen_panel, lambda at: logits(mine[at]), 320), {})
        assert np.abs(rounded["kl"] - slow).max() > 1e-6


def test_padding_of_a_vocabulary_does_not_matter(tmp_path):
    """The same weights with 64 rows more than there are tokens: no KL in either direction, though the rows have mass."""
    reference, frozen_panel = made_model(tmp_path / "m", "llama", 0), drawn([32, 32, 32])
    wide = shutil.copytree(reference, tmp_path / "wide")
    weights = load_file(wide / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        weights[name] = torch.cat([weights[name], torch.zeros(64, 64, dtype=torch.bfloat16)])
    save_file(weights, wide / "model.safetensors", {"format": "pt"})
    config = json.loads((wide / "config.json").read_text())
    (wide / "config.json").write_text(json.dumps(config | {"vocab_size": 384}))
    for one, two in ((reference, wide), (wide, reference)):
        states, head = told(frozen_panel, one, torch.float32, tmp_path)
        mine, logits = told(frozen_panel, two, torch.float32, tmp_path)
        found = positions(frozen_panel, states, head, chunks(frozen_panel, lambda at: logits(mine[at]), 384), {})  # noqa: B023
        assert found["kl"].max() < 1e-6 and found["agree"].all()


def test_a_few_tokens_bound_the_kl_from_below():
    """Of vLLM's answer as it was recorded: by id the likeliest and the token itself, None for the first."""
    generator = torch.Generator().manual_seed(0)
    p, q = (torch.randn(40, 50, generator=generator, dtype=torch.float64).mul(2).log_softmax(-1) for _ in range(2))
    target, whole = torch.randint(0, 50, (40,), generator=generator), log_divergence(p, q)
    before = torch.zeros(40, dtype=torch.float64)
    for top in (1, 5, 20, 50):
        answer = [None]
        for row, own in zip(q, target.tolist()):
            listed = dict.fromkeys([*row.topk(top).indices.tolist(), own])
            answer.append({i: SimpleNamespace(logprob=float(row[i]), rank=1, decoded_token=None) for i in listed})
        found = compared_top(p, *top_rows(answer, "m"), target)
        assert (found["kl"] <= whole + 1e-6).all() and (found["kl"] >= before - 1e-2).all()
        assert torch.allclose(found["loss"], -q.gather(1, target[:, None])[:, 0], atol=1e-6)
        assert torch.equal(found["agree"], p.argmax(-1) == q.argmax(-1))
        before = found["kl"]
    assert torch.allclose(before, whole, atol=1e-5)


def test_windows():
    rows = list(packed_rows([[1] * 5, [2] * 9, [3] * 2, [4] * 30, [5] * 4], [7], 0, 12))
    assert rows == [[7, 1, 1, 1, 1, 1, 0, 2, 2, 2, 2, 2], [7, 3, 3, 0, 4, 4, 4, 4, 4, 4, 4, 4]]  # a document in one row only
    made = frozen({"a": [Window([9] * 8, 2, 7)]})
    assert made["scored"].tolist() == [0, 0, 1, 1, 1, 2, 2, 0]  # 2: what llama-perplexity tells, place context / 2 + 1 on
    tokenizer = module.load_tokenizer(REPO / "models/razor-tiny")
    ids = module.text_ids(tokenizer, "Ada keeps a cat. " * 8)
    row, last = settled(tokenizer, [828, *ids][:24], 32, 828)
    assert row[last:] == [828] * (32 - last) and module.text_ids(tokenizer, module.text_of(tokenizer, row)) == row


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    words = [f"{a} {b} is near {c}." for a in ("Ada", "Bo", "Cy") for b in ("cat", "dog", "owl") for c in ("oak", "elm", "ash")]
    for number, name in enumerate(("prose", "wikitext-2", "code")):
        (folder / name).write_text(" ".join(words[(i * (7 + number)) % 27] for i in range(900)))
    (folder / "prompts").write_text("Who is Ada?\n\nWhere is the oak?")
    return folder


def test_a_panel_from_end_to_end(random_tiny, texts, tmp_path, command, monkeypatch):
    """Made, killed and resumed, extended, judged: the model itself claims nothing, a worse one does."""

    monkeypatch.setenv("SCRATCH", str(tmp_path))

    def run(*arguments, fails=0):
        fixed = ["--work", tmp_path / "w", "--out", tmp_path / "out", "--positions", 500, "--max-tokens", 48]
        fixed += ["--reference", random_tiny, "--corpus", tmp_path / "none", "--prompts", texts / "prompts"]
        done = command("src/eval/panel.py", *fixed, *arguments)
        assert done.returncode == fails, done.stderr
        return done.stdout + done.stderr

    given = ["--text", f"prose={texts / 'prose'}", "--text", f"wikitext-2={texts / 'wikitext-2'}"]
    said = run(*given)
    file = tmp_path / "w/random-tiny/panel.safetensors"
    facts, tensors = load(file)
    assert "pictures        left out: no vision tower" in said and "code            left out: no text" in said
    assert facts["strata"] == ["answers", "prose", "wikitext-2"] and "long" in facts["left_out"]
    assert (tensors["scored"] == EVERYWHERE).sum() >= 1000 and len(tensors["states"]) == (tensors["scored"] > 0).sum()

    before = file.read_bytes()
    run()  # reused
    assert file.read_bytes() == before

    assert "the panel has" not in run("--text", f"code={texts / 'code'}")  # another stratum, behind the others
    more, added = load(file)
    assert more["strata"] == [*facts["strata"], "code"]
    assert torch.equal(added["states"][: len(tensors["states"])], tensors["states"])

    said = run("--judge", random_tiny, "--tag", "same")
    same = json.loads((tmp_path / "out/same.json").read_text())["metrics"]
    assert same["strata"]["all"]["mean"] == 0 and not same["strata"]["all"]["claimed"] and "nothing is claimed" in said
    worse, packed = tmp_path / "worse", tmp_path / "packed"
    quantize_checkpoint(random_tiny, packed, Recipe(2, 2, 64, 1), packed=True)
    assert command("src/quant/packed_export.py", "--unpack", packed, "--out", worse).returncode == 0
    for out in (worse, packed):
        run("--judge", out, "--tag", out.name)
    record = json.loads((tmp_path / "out/worse.json").read_text())
    metrics = record["metrics"]["strata"]
    assert json.loads((tmp_path / "out/packed.json").read_text())["metrics"] == record["metrics"]
    assert record["kind"] == "panel" and metrics["all"]["claimed"] and metrics["all"]["flips"] >= metrics["all"]["lost"] > 0
    assert set(metrics) == {"all", *more["strata"]} and metrics["all"]["low"] < metrics["all"]["mean"] < metrics["all"]["high"]
    assert sum(own["positions"] for name, own in metrics.items() if name != "all") == metrics["all"]["positions"]
    assert record["metrics"]["first_halves"]["positions"] > 0
    assert "exists; give another --tag" in run("--judge", worse, "--tag", "worse", fails=2)
    said = run("--judge", random_tiny, "--tag", "by_worse", "--floor", "worse")  # against that floor nothing is left
    assert "nothing is claimed" in said
    assert "give NAME=FILE" in run("--text", "nothing", fails=2)
    assert "the panel of another model" in run("--reference", moved(random_tiny, tmp_path / "x/random-tiny"), fails=2)


def test_killed_it_goes_on_where_it_was(random_tiny, tmp_path, monkeypatch):
    frozen_panel = drawn([64, 64, 128, 128], 800)
    stream = opened_stream(random_tiny, torch.float32)
    (tmp_path / "a").mkdir()
    expected = streamed_states(stream, frozen_panel, tmp_path / "a", noise=True)
    monkeypatch.setattr(module, "SAVE_SECONDS", -1)
    seen, whole = [], LayerStream.run

    def counted(self, layer, *more):
        seen.append(self.layers.index(layer))
        if len(seen) == 11:  # two batches of two copies a layer: in the third
            raise OSError("stands for a kill")
        return whole(self, layer, *more)

    monkeypatch.setattr(LayerStream, "run", counted)
    with pytest.raises(OSError, match="stands for a kill"):
        streamed_states(opened_stream(random_tiny, torch.float32), frozen_panel, tmp_path, noise=True)
    found = streamed_states(opened_stream(random_tiny, torch.float32), frozen_panel, tmp_path, noise=True)
    assert seen[11:] == [2] * 4 + [3] * 4 and all(torch.equal(a, b) for a, b in zip(expected, found))
    assert not torch.equal(*found)  # the copy has its noise
    flat = {"kl": 1e-5, "loss": 1.0, "base_loss": 1.0, "likeliest": 0.5, "agree": True, "right": True, "base_right": True}
    filled = {name: np.full(len(frozen_panel.owner), value) for name, value in flat.items()}
    kl = metrics_of(frozen_panel, filled, np.full(len(frozen_panel.owner), 1e-4))
    assert not any(entry["claimed"] for entry in kl["strata"].values())  # below the floor


@pytest.mark.slow
def test_a_gguf_is_judged_on_the_same_tokens(bf16_gguf, tmp_path, command, monkeypatch):
    """llama.cpp's BF16 file says what transformers says, at every second half, in windows of two sizes."""
    monkeypatch.setenv("SCRATCH", str(tmp_path))
    pairs, _ = tiny_texts(module.load_tokenizer(REPO / "models/razor-tiny"), 12)
    (tmp_path / "text").write_text("".join(prompt + turn for prompt, turn in pairs))
    (tmp_path / "prompts").write_text("\n\n".join(item.question for item in TASK_TEXTS[0]().load(8)))
    fixed = ["--reference", REPO / "models/razor-tiny", "--work", tmp_path / "w", "--out", tmp_path / "out", "--positions", 600]
    fixed += ["--text", f"prose={tmp_path / 'text'}", "--prompts", tmp_path / "prompts", "--corpus", tmp_path / "none"]
    done = command("src/eval/panel.py", *fixed, "--max-tokens", 200, "--judge", bf16_gguf, "--tag", "bf16")
    assert done.returncode == 0, done.stderr
    _, tensors = load(tmp_path / "w/razor-tiny/panel.safetensors")
    metrics = json.loads((tmp_path / "out/bf16.json").read_text())["metrics"]
    assert (
        metrics["strata"]["all"]["positions"] == int((tensors["scored"] == EVERYWHERE).sum()) and "first_halves" not in metrics
    )
    assert abs(metrics["strata"]["all"]["mean"]) < 1e-3 and metrics["strata"]["all"]["top1"] > 0.98
    assert (tmp_path / "w/razor-tiny.bf16/values.safetensors").exists()
