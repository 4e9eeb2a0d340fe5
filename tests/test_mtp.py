"""Multi-token prediction: the block against llama.cpp's graph and a plain formula, its names, and what is refused."""

import argparse
import json
import os
import re
import shutil
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import speed_gguf
from calibrated_pass import CalibratedPass
from calibration import Calibration, LayerStream
from checkpoint import Checkpoint
from console import UserError
from gguf_format import GgufFile, run_converter
from hf_model import load_weights, model_config
from llamacpp_eval8 import LlamaServer
from moe_ptq import CALIBRATED, shrink
from mtp import MtpBlock, load_mtp
from packed_format import codes_of
from quant_save import quantize_checkpoint
from recipe import Recipe, read_recipe
from run_dir import RUN
from size_model import SHAPES, mtp_plan
from synthetic_moe import fill_all, prepare
from tiny_model import decoder_layer, draft_forward, rms_norm

MODEL = Path(__file__).resolve().parent.parent / "models" / "razor-tiny"
CPU = torch.device("cpu")


def write_shards(directory, tensors, trunk=MODEL):
    """``trunk`` and a shard with other tensors, as one checkpoint; the trunk's files are links."""
    directory.mkdir()
    for file in trunk.glob("*.json*"):
        shutil.copy(file, directory)
    config = json.loads((trunk / "config.json").read_text()) | {"mtp_num_hidden_layers": 1}
    (directory / "config.json").write_text(json.dumps(config))
    first, second = (f"model-0000{n}-of-00002.safetensors" for n in (1, 2))
    (directory / first).symlink_to(trunk / "model.safetensors")
    save_file(tensors, directory / second)
    index = dict.fromkeys(Checkpoint(trunk).tensors, first) | dict.fromkeys(tensors, second)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return directory


def drawn():
    """The weights of an untrained block that fits razor-tiny, by name."""
    generator = torch.Generator().manual_seed(0)
    shapes = {name: value.shape for name, value in MtpBlock(model_config(MODEL), torch.bfloat16).own().items()}
    scales = {name: 0.3 if len(shape) == 1 else 1.5 * shape[-1] ** -0.5 for name, shape in shapes.items()}
    return {name: (torch.randn(shape, generator=generator) * scales[name]).bfloat16() for name, shape in shapes.items()}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return Checkpoint(write_shards(tmp_path_factory.mktemp("mtp") / "m", drawn()))


@pytest.fixture(scope="module")
def trunk():
    from transformers import AutoModelForCausalLM

    return load_weights(AutoModelForCausalLM, MODEL, torch.float32)


@torch.no_grad()
def test_the_block_is_what_llama_cpp_drafts_with(checkpoint, trunk, tmp_path):
    """Every drafted token's three best, and their probabilities among the best ten."""
    if not os.environ.get("LLAMA_CPP"):
        pytest.skip("LLAMA_CPP is not set: the folder of llama.cpp's programs (bash pipelines/test.sh sets it)")
    run_converter("convert", checkpoint.path, "--outfile", tmp_path / "m.gguf", "--outtype", "f32")
    prompt, kinds = list(range(40, 64)), [f"--cache-type-{at}" for at in ("k", "v", "k-draft", "v-draft")]
    arguments = ["--spec-type", "draft-mtp", "--spec-draft-n-max", "1", "--no-spec-draft-backend-sampling", "--verbosity", "5"]
    arguments += ["--flash-attn", "off", *(word for kind in kinds for word in (kind, "f32"))]
    with LlamaServer(tmp_path / "m.gguf", 256, slots=1, arguments=arguments) as server:
        asked = {"prompt": prompt, "n_predict": 16, "temperature": 0, "return_tokens": True, "ignore_eos": True}
        tokens = server.client.call("/completion", asked)["tokens"]
        for _ in range(50):
            found = re.findall(r"draft candidate +\d, pos +0: +(\d+) \( *([\d.]+)\)", server.tail(1 << 24))
            if len(found) >= 3 * 13:
                break
            time.sleep(0.1)  # its log is written behind
    ids = torch.tensor([prompt + tokens])
    logits = load_mtp(checkpoint, CPU, torch.float32)(ids, trunk.model(ids).last_hidden_state, lead=True)[0]
    best = logits[len(prompt) - 1 :].topk(10)
    assert len(found) >= 3 * 13 and len(tokens) == 16
    for place in range(13):
        own, theirs = best.values[place].softmax(-1), found[3 * place : 3 * place + 3]
        assert [int(token) for token, _ in theirs] == best.indices[place, :3].tolist()
        assert [float(share) for _, share in theirs] == pytest.approx(own[:3].tolist(), abs=2e-3)


@torch.no_grad()
@pytest.mark.parametrize("lead", [False, True])
def test_the_block_is_its_formula(checkpoint, trunk, lead):
    block = load_mtp(checkpoint, CPU, torch.float32)
    ids = torch.randint(0, 800, (2, 16), generator=torch.Generator().manual_seed(1))
    hidden = trunk.model(ids).last_hidden_state
    pairs = [(ids[:, t + 1], hidden[:, t]) for t in range(15)]
    pairs = [(ids[:, 0], torch.zeros_like(hidden[:, 0])), *pairs] if lead else pairs
    weights = {name: value.float() for name, value in drawn().items()}

    def normed(x, name):
        return rms_norm(x, 1 + weights[f"mtp.{name}.weight"], 1e-6)

    table = trunk.model.embed_tokens.weight
    halves = [[normed(table[token], "pre_fc_norm_embedding"), normed(state, "pre_fc_norm_hidden")] for token, state in pairs]
    rows = torch.stack([torch.cat(half, -1) @ weights["mtp.fc.weight"].T for half in halves], 1)
    cos, sin = (part[0] for part in trunk.model.rotary_emb(rows, torch.arange(len(pairs))[None]))
    out, _, _ = decoder_layer(block.layers[0], rows, cos, sin, 1e-6, 2)
    expected = normed(out, "norm")[:, int(lead) :] @ trunk.lm_head.weight.T
    torch.testing.assert_close(block(ids, hidden, lead), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("generation", ["3.5", "3.6"])
def test_the_names_are_the_published_ones(generation, tmp_path):
    prepare(tmp_path / "m", SHAPES["tiny"], 0, published=generation)
    fill_all(tmp_path / "m")
    found = Checkpoint(tmp_path / "m")
    block = load_mtp(found, CPU, torch.bfloat16)
    own = block.own()
    assert {name: tuple(value.shape) for name, value in own.items()} == {n: s for n, _, s in mtp_plan(SHAPES["tiny"], True)}
    assert not any(value.requires_grad for value in block.parameters())
    for name in (name for name in found.tensors if name.startswith("mtp.")):
        place = found.places[name]
        assert torch.equal(place.view(own[place.parameter]), found.read(name)), name


@pytest.mark.parametrize("change, message", [
    (lambda own: own.clear(), "has no multi-token prediction"),
    (lambda own: own.pop("mtp.fc.weight"), "not whole: it lacks mtp.fc.weight"),
    (lambda own: own.update({"mtp.layers.1.mlp.gate.weight": torch.zeros(8, 256)}), "another kind: mtp.layers.1.mlp.gate"),
    (lambda own: own.update({"mtp.fc.weight": torch.zeros(9, 9)}), r"mtp.fc.weight is \[9, 9\] instead of \[256, 512\]"),
    (lambda own: own["mtp.norm.weight"].fill_(torch.nan), "mtp.norm.weight: the weight contains NaN"),
])  # fmt: skip
def test_another_block_is_refused(change, message, tmp_path):
    own = drawn()
    change(own)
    with pytest.raises(UserError, match=message):
        load_mtp(Checkpoint(write_shards(tmp_path / "m", own)), CPU, torch.float32)


@torch.no_grad()
@pytest.mark.parametrize("lead", [False, True])
def test_the_trained_forward_is_the_block(checkpoint, trunk, lead):
    """The second draft reads the state and the guess of the first, with the same drafts behind it."""
    block = load_mtp(checkpoint, CPU, torch.float32)
    ids = torch.randint(0, 800, (2, 17), generator=torch.Generator().manual_seed(2))
    hidden = trunk.model(ids[:, :-1]).last_hidden_state
    (first, *_), (second, *_) = draft_forward(block, ids, hidden, 2, lead)
    expected = block.normed(block.joined(ids[:, :-1], hidden, lead))[:, int(lead) :]
    torch.testing.assert_close(first[:, :15], expected, rtol=1e-4, atol=1e-4)
    expected = block.normed(block.joined(ids[:, 1:-1], expected))
    torch.testing.assert_close(second[:, :14], expected, rtol=1e-4, atol=1e-4)


def test_the_command_trains_a_block_beside_its_model(tmp_path, command, trunk):
    flags = "--steps 2 --rows 2 --length 64 --probe-items 2 --workers 0 --max-seconds 0".split()
    paths = ["--out", tmp_path / "m", "--work", tmp_path / "w", "--result", tmp_path / "mtp.json"]
    config = MODEL.parent.parent / "configs/make_tiny_mtp.env"
    done = command("src/distill/tiny_train.py", "--config", config, *flags, *paths)
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "mtp.json").read_text())
    assert record["metrics"]["parameters"] == sum(value.numel() for value in drawn().values())
    assert {len(shares) for shares in record["metrics"]["accepted"].values()} == {2}
    made = Checkpoint(tmp_path / "m")
    links = [file.name for file in made.path.iterdir() if file.is_symlink()]
    assert {"tokenizer.json", "chat_template.jinja", "model-00001-of-00002.safetensors"} <= set(links)
    block, ids = load_mtp(made, CPU, torch.float32), torch.arange(50, 66)[None]
    state = torch.load(tmp_path / "w/state.pt", weights_only=True)["model"]
    assert all(torch.equal(value, state[name.removeprefix("mtp.")].bfloat16().float()) for name, value in block.own().items())
    from transformers import AutoModelForCausalLM

    same = load_weights(AutoModelForCausalLM, made.path, torch.float32)  # which leaves the block unread
    assert torch.equal(same(ids).logits, trunk(ids).logits)


class Watcher:
    """A rounder that keeps the statistics and leaves the weights, and the writer beside it, which halves the embedding."""

    def __init__(self, checkpoint, targets):
        self.targets, self.found, self.stop = dict.fromkeys(targets), {}, threading.Event()
        self.table = {"model.embed_tokens.weight": checkpoint.read("model.embed_tokens.weight") / 2}

    def round(self, parameters, take):
        for name in parameters:
            statistics, _ = take(name)
            self.found[name] = statistics._replace(hessian=statistics.hessian[:])  # made while the weights are there

    def taken(self, parameters):
        return {}

    def begin(self):
        return 0

    def embedding(self):
        return self.table

    def write(self, part, values):
        pass

    def complete(self):
        return False


@torch.no_grad()
def test_calibration_runs_through_the_block(random_tiny, tmp_path):
    """Second moments against plain sums over the inputs of each matrix, expert by expert."""
    from transformers import AutoModelForCausalLM

    own = drawn()
    found = Checkpoint(write_shards(tmp_path / "m", own, random_tiny))
    ids = torch.randint(0, 800, (4, 24), generator=torch.Generator().manual_seed(2))
    at = "mtp.layers.0."
    names = ["mtp.fc.weight", *(f"{at}{name}" for name in ("mlp.experts.gate_up_proj", "mlp.experts.down_proj"))]
    watcher, calibration = Watcher(found, names), Calibration(ids, {}, batch=2, device=CPU)
    (tmp_path / RUN).mkdir()
    facts = CalibratedPass(LayerStream(found, CPU, torch.float32), calibration, watcher, tmp_path).run(watcher)
    whole = load_weights(AutoModelForCausalLM, random_tiny, torch.float32)
    whole.model.embed_tokens.weight.mul_(0.5)
    block = load_mtp(found, CPU, torch.float32)
    block.embed_tokens.weight.mul_(0.5)
    rows, layer = block.joined(ids, whole.model(ids).last_hidden_state), block.layers[0]
    seen = []
    with layer.mlp.register_forward_pre_hook(lambda _, given: seen.append(given[0].flatten(0, 1))):
        block.normed(rows)
    hidden = whole.model(ids).last_hidden_state[:, :-1]
    joined = torch.cat([block.pre_fc_norm_embedding(block.embed_tokens(ids[:, 1:])), block.pre_fc_norm_hidden(hidden)], -1)
    x = joined.flatten(0, 1)
    torch.testing.assert_close(watcher.found["mtp.fc.weight"].hessian[0], x.T @ x / len(x), rtol=1e-4, atol=1e-5)
    assert float(watcher.found["mtp.fc.weight"].tokens[0]) == len(x) == 4 * 23  # of each sequence one less than its tokens
    _, weights, chosen = layer.mlp.gate(seen[0])
    expected = []
    for expert, (first, _) in enumerate(zip(own[names[1]].float(), own[names[2]].float(), strict=True)):
        token, place = torch.where(chosen == expert)
        weight, given = weights[token, place][:, None], seen[0][token]
        gate, up = (given @ first.T).chunk(2, -1)
        inner = torch.nn.functional.silu(gate) * up * weight
        total = (weight**2).sum().clamp_min(1e-30)
        expected.append((given * weight, inner, total, (weight**2).sum() ** 2 / (weight**4).sum().clamp_min(1e-30)))
    for number, name in enumerate(names[1:]):
        means = torch.stack([inputs.T @ inputs / total for *both, total, _ in expected for inputs in [both[number]]])
        tokens = torch.stack([count for *_, count in expected])
        middle = (tokens[:, None, None] * means).sum(0) / tokens.sum()
        shrunk = shrink(means, middle, (1 - tokens / means.shape[-1]).clamp(min=0).tolist())
        torch.testing.assert_close(watcher.found[name].tokens, tokens, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(watcher.found[name].hessian, shrunk, rtol=1e-3, atol=1e-4)
    assert facts["experts_below_floor"] == 8  # all of the block's: 92 tokens for 256 inputs


@pytest.mark.parametrize("method, bits, packed", [("clip", 4, True), ("gptq", 8, False), ("clip", 16, False)])
def test_a_checkpoint_keeps_the_block_in_its_own_bits(method, bits, packed, random_tiny, tmp_path):
    """Its matrices on the grid, its norms and gates byte for byte; MTP_BITS=16 leaves it, and the recipe says what it was."""
    found = Checkpoint(write_shards(tmp_path / "m", drawn(), random_tiny))
    ids = torch.randint(0, 800, (2, 32), generator=torch.Generator().manual_seed(2))
    text = Calibration(ids, {"name": "random"}, device=CPU) if method in CALIBRATED else None
    recipe = Recipe(3, 4, 128, 4, method=method, mtp_bits=bits)
    report = quantize_checkpoint(found.path, tmp_path / "q", recipe, calibration=text, packed=packed)
    made, matrices = Checkpoint(tmp_path / "q"), 0
    for name in (name for name in found.tensors if name.startswith("mtp.")):
        before, after = found.read(name), made.read(name)
        is_matrix = before.ndim > 1 and "gate." not in name and "shared_expert_gate" not in name
        is_matrix &= not (packed and name == "mtp.fc.weight")  # vLLM reads it in BF16
        matrices += is_matrix
        assert torch.equal(before, after) == (bits == 16 or not is_matrix), name
        if is_matrix and bits < 16:
            codes_of(after, (bits,), 128)
            assert 0 < (before - after).norm() / before.norm() < 2.0 ** (2 - bits), name
    assert matrices == 10 - packed and report.roles["mtp"].bits == (bits if bits < 16 else None)
    assert read_recipe(tmp_path / "q") == recipe
    assert json.loads((tmp_path / "q" / "recipe.json").read_text())["recipe"].get("mtp_bits", 16) == bits
    if packed:
        held = json.loads((tmp_path / "q" / "config.json").read_text())["quantization_config"]["ignore"]
        left = ["mtp.fc", "mtp.layers.0.mlp.gate", "mtp.layers.0.mlp.shared_expert_gate"]
        assert [name for name in held if "mtp" in name] == left


TRAINED = MODEL.with_name("razor-tiny-mtp")
needs_llama_cpp = pytest.mark.skipif(
    not os.environ.get("LLAMA_CPP"),
    reason="LLAMA_CPP is not set: the folder of llama.cpp's programs (bash pipelines/test.sh sets it)",
)


def pack_of(model, out, *more):
    types = out.parent / "types.txt"
    types.write_text("^mtp\\.ffn_.*_exps=iq3_s\n^mtp\\.=q4_K\n")
    text = ["--calib-sequences", 2, "--calib-length", 32, "--tensor-types", types]
    return [
        "src/quant/gguf_pack.py",
        "--model",
        model,
        "--out",
        out,
        "--base-type",
        "Q8_0",
        "--method",
        "nearest",
        *text,
        *more,
    ]


def killed(*_):
    raise OSError("stands for a kill")


@needs_llama_cpp
def test_a_gguf_keeps_the_block_and_its_drafts_change_no_answer(tmp_path, command, monkeypatch):
    """In the file, of its own types; the same bytes where the run ends within it; and llama-server drafts with it."""
    with monkeypatch.context() as patch:
        patch.setattr(CalibratedPass, "mtp", killed)
        done = command(*pack_of(TRAINED, tmp_path / "o"))
    assert done.returncode == 1 and "stands for a kill" in done.stderr
    for out in ("o", "whole"):
        done = command(*pack_of(TRAINED, tmp_path / out))
        assert done.returncode == 0 and "left out" not in done.stdout and ("(resumed)" in done.stdout) == (out == "o"), (
            done.stderr
        )
    one, other = (next((tmp_path / out).glob("*.gguf")) for out in ("o", "whole"))
    assert one.read_bytes() == other.read_bytes()
    file = GgufFile(one)
    own = {name: file.kind(name) for name in file.tensors if name.startswith("blk.8.")}
    assert file.fields["qwen35moe.nextn_predict_layers"] == 1 and file.fields["qwen35moe.block_count"] == 9
    assert sorted(kind for kind in own.values() if kind != "f32") == ["iq3_s"] * 3 + ["q4_K"] * 7 + ["q5_0"]  # of 128 inputs
    assert own["blk.8.nextn.eh_proj.weight"] == "q4_K" and own["blk.8.ffn_down_exps.weight"] == "iq3_s"
    errors = json.loads((tmp_path / "o/recipe.json").read_text())["report"]["calibration"]["relative_output_error"]
    assert 0 < errors["mtp"] < 0.01
    asked = ["src/eval/speed_gguf.py", "--draft", "1", "--questions", 4, "--generate", 48, "--repetitions", 1]
    record = tmp_path / "record.json"
    done = command(*asked, "--gguf", one, "--result", record, "--tag", "t")
    assert done.returncode == 0 and "4 of 4" in done.stdout, done.stderr
    found = json.loads(record.read_text())["metrics"]
    assert found["drafts"]["1"]["same_answers"] == 4 and found["drafts"]["1"]["acceptance"] > 0.9
    assert found["mtp_types"].keys() == {"f32", "iq3_s", "q4_k", "q5_0"} and found["tokens"] > 40
    done = command(*pack_of(TRAINED, tmp_path / "without", "--no-mtp"))
    assert done.returncode == 0 and "left out: 41 tensors, 4.14 MB" in done.stdout, done.stdout + done.stderr
    done = command(*asked, "--gguf", tmp_path / "without" / one.name)
    assert done.returncode == 2 and "holds no block of multi-token prediction" in done.stderr
    trunk = GgufFile(tmp_path / "without" / one.name)
    assert set(file.tensors) - set(trunk.tensors) == set(own) and "qwen35moe.nextn_predict_layers" not in trunk.fields
    assert all(torch.equal(file.data(name), trunk.data(name)) for name in trunk.tensors)


def test_drafts_that_are_never_accepted_are_an_error(tmp_path, monkeypatch):
    timings = {"predicted_n": 9, "predicted_ms": 1.0, "draft_n": 8, "draft_n_accepted": 0}
    monkeypatch.setattr(speed_gguf, "answers", lambda *_: ([[1] * 9], timings))
    monkeypatch.setattr(speed_gguf, "mtp_types", lambda _: {"bf16": 1})
    with pytest.raises(UserError, match="of 8 drafted tokens none was accepted"):
        speed_gguf.draft(argparse.Namespace(gguf=tmp_path / "m.gguf", draft=[1], generate=9))
