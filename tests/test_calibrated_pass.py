"""The calibrated pass: statistics against a whole-model forward, every family, and what bad calibration says."""

import json
import shutil
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_quant_save import FAMILIES, TINY
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from calibrated_pass import CalibratedPass
from calibration import Calibration, Collector, LayerStream
from calibration_text import calibration_ids, default_source
from checkpoint import Checkpoint
from console import UserError
from families import roles_of
from hf_model import prefix_ids
from kl import batches, text_windows
from moe_ptq import Grid, Statistics, round_weight
from quant_save import quantize_checkpoint
from recipe import Recipe
from safetensors_file import CheckpointWriter
from token_weights import token_weights

REPO = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")


def calibration(vocabulary, sequences=4, length=48, **more):
    ids = torch.randint(0, vocabulary, (sequences, length), generator=torch.Generator().manual_seed(0))
    return Calibration(ids, {"name": "random"}, device=CPU, **more)


def test_streamed_activations_and_statistics_are_those_of_the_whole_model(random_tiny):
    ids, _ = calibration_ids(None, random_tiny, 2, 64)
    model = AutoModelForCausalLM.from_pretrained(random_tiny, dtype=torch.float32)
    with torch.no_grad():
        expected = model.model(ids, output_hidden_states=True, use_cache=False).hidden_states
    stream = LayerStream(Checkpoint(random_tiny), CPU, torch.float32)
    kwargs, hidden = stream.arguments(ids), stream.embed([ids])[0]
    for index, layer in enumerate(stream.layers[:2]):
        stream.fill(layer, f"model.layers.{index}.")
        collector = Collector(layer, {"linear_attn.out_proj.weight", "mlp.experts.gate_up_proj", "mlp.experts.down_proj"})
        torch.testing.assert_close(hidden, expected[index], atol=1e-5, rtol=1e-4)
        (after,) = stream.run(layer, [hidden], kwargs[index])
        collector.remove()
        whole = model.model.layers[index]
        with torch.no_grad():  # the definition, for one expert: inputs weighted by their routing weight
            seen = []
            handle = whole.mlp.register_forward_pre_hook(lambda m, a, seen=seen: seen.append(a[0].flatten(0, 1)))
            whole(hidden, **kwargs[index])
            handle.remove()
            _, weights, chosen = whole.mlp.gate(seen[0])
        token, place = torch.where(chosen == 3)
        x, w = seen[0][token], weights[token, place][:, None]
        moments = collector.moments["mlp.experts.gate_up_proj"].statistics(0)
        torch.testing.assert_close(moments.hessian[3], (x * w).T @ (x * w) / (w**2).sum(), atol=1e-5, rtol=1e-4)
        assert moments.tokens[3] == pytest.approx(((w**2).sum() ** 2 / (w**4).sum()).item(), rel=1e-4)
        assert collector.routed["mlp.experts"].sum() == ids.numel() * 2
        hidden = after
        stream.empty(layer)
        assert all(p.is_meta for p in layer.parameters())
    torch.testing.assert_close(hidden, expected[2], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gemma2", "olmoe", "qwen3_5_text"])
def test_moments_of_values_are_those_of_what_the_attention_averages(family):
    config = AutoConfig.for_model(family, **TINY | {"num_attention_heads": 4, "hidden_size": 128, "head_dim": 32})
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    layer = next(layer for layer in model.model.layers if hasattr(layer, "self_attn"))
    own = layer.self_attn
    seen: list = []
    own.register_forward_pre_hook(lambda m, a, k: seen.append(k["hidden_states"]), with_kwargs=True)
    own.register_forward_hook(lambda m, a, out: seen.append(out[1]))
    collector = Collector(layer, {"self_attn.q_proj.weight", "self_attn.v_proj.weight"})
    with torch.no_grad():
        model(torch.randint(0, 128, (2, 24)), use_cache=False)
    collector.remove()
    x = seen[0].flatten(0, 1)
    torch.testing.assert_close(collector.moments["self_attn.q_proj.weight"].statistics(0).hessian[0], x.T @ x / len(x))  # once
    if family != "qwen3_5_text":  # its attention has a gate
        x = (seen[1] @ seen[0][:, None]).flatten(0, 2)  # probabilities [B, heads, T, T] of positions [B, 1, T, I]
    found = collector.moments["self_attn.v_proj.weight"].statistics(0).hessian[0]
    torch.testing.assert_close(found, x.T @ x / len(x), rtol=1e-4, atol=1e-5)


def test_what_is_read_ahead_is_what_is_read(random_tiny, monkeypatch):
    read, plain = [], LayerStream(Checkpoint(random_tiny), CPU, torch.float32, ahead=False)
    stream = LayerStream(Checkpoint(random_tiny), CPU, torch.float32, ahead=True)
    one = stream.checkpoint.read
    monkeypatch.setattr(stream.checkpoint, "read", lambda name: read.append(name) or one(name))
    stream.read_ahead(1)
    stream.read_ahead(len(stream.layers))  # there is none
    for index in (0, 1):
        for each in (plain, stream):
            each.fill(each.layers[index], f"model.layers.{index}.")
        values = [dict(each.layers[index].state_dict()) for each in (plain, stream)]
        assert values[0].keys() == values[1].keys() and all(torch.equal(values[0][n], values[1][n]) for n in values[0])
    assert len(read) == len(set(read)) and not stream._coming  # nothing twice, and nothing that is not asked for
    stream.close()


@pytest.mark.parametrize("family", [*FAMILIES, "gemma3_text"])
def test_every_family_is_quantized_layer_by_layer(family, tmp_path):
    rotary = {"head_dim": 16} if family == "deepseek_v3" else {}  # there it is qk_rope_head_dim
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **TINY | rotary))
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 0.05) if p.ndim > 1 else None
    model.save_pretrained(tmp_path / "m")
    report = quantize_checkpoint(
        tmp_path / "m", tmp_path / "q", Recipe(3, 4, 32, 4, method="gptq"), calibration=calibration(128, token_power=0.4)
    )
    before, after = Checkpoint(tmp_path / "m"), Checkpoint(tmp_path / "q")
    assert before.tensors.keys() == after.tensors.keys()
    recipe = Recipe(3, 4, 32, 4)
    for name, role in roles_of({n: i.shape for n, i in before.tensors.items()}, before.config).items():
        same = torch.equal(before.read(name), after.read(name))
        assert same == (recipe.bits_for(role) is None), name
    assert all(0 < entry.relative_error < 0.2 for entry in report.roles.values() if entry.bits)
    _, info = AutoModelForCausalLM.from_pretrained(tmp_path / "q", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m", "q"]
    assert not list((tmp_path / "q").glob("activations*"))


@pytest.mark.parametrize("method", ["wclip", "awq", "gptq", "gptq_refit"])
def test_a_tied_embedding_is_rounded_as_the_head(method, tmp_path):
    """Against the whole model: its layers as they were rounded, behind the embedding as it was."""
    torch.manual_seed(0)
    config = AutoConfig.for_model("llama", **TINY | {"vocab_size": 384, "tie_word_embeddings": True})
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "m")
    text = calibration(384, 8, damping=0.01)
    quantize_checkpoint(tmp_path / "m", tmp_path / "q", Recipe(16, 3, 32, 8, method=method), calibration=text)
    name = "model.embed_tokens.weight"
    original, made = (Checkpoint(tmp_path / path).read(name).float() for path in "mq")
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "q", dtype=torch.float32)
    with torch.no_grad():
        whole.get_input_embeddings().weight.copy_(original)
        x = whole.model(text.ids).last_hidden_state.flatten(0, 1)
        moments = x.T @ x / len(x)
        moments += 0.01 * moments.diagonal().mean() * torch.eye(len(moments))
        statistics = Statistics(moments[None], torch.tensor([float(len(x))]))
        expected = round_weight(original, Grid(3, 32, 8), statistics, method)
    assert (made == expected).float().mean() > 0.99  # a near tie may fall otherwise
    clip = round_weight(original, Grid(3, 32, 8), None, "clip")
    errors = [((value - original) @ moments * (value - original)).sum() for value in (made, clip)]
    assert errors[0] < errors[1]


def test_damping_takes_gptq_to_the_clip_search(random_tiny, tmp_path):
    """With moments that are nearly a multiple of the unit matrix no error goes anywhere: what is left is a data-free search."""
    ids, record = calibration_ids(None, random_tiny, 2, 64)
    text = Calibration(ids, record, device=CPU, damping=1e12)
    quantize_checkpoint(random_tiny, tmp_path / "gptq", Recipe(3, 4, 128, 16, method="gptq"), calibration=text)
    quantize_checkpoint(random_tiny, tmp_path / "clip", Recipe(3, 4, 128, 16))
    original, found, expected = (Checkpoint(path) for path in (random_tiny, tmp_path / "gptq", tmp_path / "clip"))
    for name in expected.tensors:
        value, gptq, clip = (checkpoint.read(name).float() for checkpoint in (original, found, expected))
        # not the same bits: of two scales that are nearly as good, the searches may take another
        torch.testing.assert_close((gptq - value).norm(), (clip - value).norm(), rtol=2e-3, atol=0.0)
    settings = json.loads((tmp_path / "gptq" / "recipe.json").read_text())["calibration"]
    assert settings["damping"] == 1e12 and "token_power" not in settings


def test_a_fraction_of_a_bit_goes_to_the_experts_that_gain_most(random_tiny, tmp_path):
    reports, values = {}, {}
    for bits in (2, 2.5, 3):
        out = tmp_path / str(bits)
        reports[bits] = quantize_checkpoint(
            random_tiny, out, Recipe(bits, 4, 128, 4, method="gptq"), calibration=calibration(512), shard_bytes=1 << 20
        )
        values[bits] = Checkpoint(out).read("model.layers.0.mlp.experts.0.gate_proj.weight")
    errors = [reports[bits].roles["routed_expert"].relative_error for bits in (2, 2.5, 3)]
    assert errors[0] > errors[1] > errors[2]
    packed = [reports[bits].packed_bytes for bits in (2, 2.5, 3)]
    assert 2 * packed[1] == pytest.approx(packed[0] + packed[2], abs=4)
    levels = []
    checkpoint = Checkpoint(tmp_path / "2.5")
    for expert in range(8):
        row = checkpoint.read(f"model.layers.0.mlp.experts.{expert}.down_proj.weight")[:, :128].float().abs()
        levels.append(max(len(r.unique()) for r in row))
    assert sorted(level <= 2 for level in levels) == [False] * 4 + [True] * 4  # |codes|: 0, 1 at two bits


@pytest.fixture
def tokenizer_with(tmp_path):
    """Make a copy of razor-tiny's tokenizer (and config) that puts these tokens before, and behind, a text."""

    def make(before=(), behind=(), template=True):
        path = Path(tempfile.mkdtemp(dir=tmp_path))
        for name in ("config.json", "tokenizer_config.json", *(["chat_template.jinja"] if template else [])):
            shutil.copy(REPO / "models/razor-tiny" / name, path)
        made = json.loads((REPO / "models/razor-tiny/tokenizer.json").read_text())
        ids = {token["content"]: token["id"] for token in made["added_tokens"]}
        pieces = (
            [{"SpecialToken": {"id": token, "type_id": 0}} for token in before],
            [{"SpecialToken": {"id": token, "type_id": 0}} for token in behind],
        )
        made["post_processor"]["single"] = [*pieces[0], {"Sequence": {"id": "A", "type_id": 0}}, *pieces[1]]
        made["post_processor"]["special_tokens"] = {
            token: {"id": token, "ids": [ids[token]], "tokens": [token]} for token in {*before, *behind}
        }
        (path / "tokenizer.json").write_text(json.dumps(made))
        return path, [ids[token] for token in before]

    return make


BEGINNINGS = [  # before, behind: Qwen, Gemma and Llama, GLM, one that also ends a text
    ((), ()),
    (("<|im_start|>",), ()),
    (("<|im_start|>", "<think>"), ()),
    (("<|endoftext|>",), ("<|im_end|>",)),
]


@pytest.mark.parametrize("before,behind", BEGINNINGS)
def test_sequences_begin_as_the_tokenizer_begins_a_text(tokenizer_with, tmp_path, before, behind):
    model, prefix = tokenizer_with(before, behind)
    (tmp_path / "a+b.txt").write_text("one two three\n  \nfour five six seven\n\n" * 9, encoding="utf-8-sig")
    tokenizer = AutoTokenizer.from_pretrained(model)
    assert prefix_ids(tokenizer) == prefix
    ids, entry = calibration_ids(tmp_path / "a+b.txt", model, 5, 16)
    stream = [i for part in ["one two three\n\n", "four five six seven\n\n"] * 9
              for i in tokenizer(part, add_special_tokens=False)["input_ids"]]  # fmt: skip
    own = 16 - len(prefix)
    assert ids.tolist() == [prefix + stream[own * i : own * (i + 1)] for i in range(5)]
    assert entry.get("prefix", []) == prefix and entry["name"] == "a+b.txt"
    chat, _ = calibration_ids("tiny", model, 2, 64)  # razor-tiny's template writes <|im_start|> itself
    twice = tokenizer("<|im_start|>" * 2, add_special_tokens=False)["input_ids"]
    assert chat[0].tolist()[: len(twice)] != twice and chat[:, : len(prefix)].tolist() == [prefix] * 2
    pairs = [("", "one two three"), ("<|im_start|>one", " two")]
    found = {tuple(row[real].tolist()): (scored, answer) for batch in batches(tokenizer, pairs, 1, 9)
             for row, real, scored, answer in zip(*batch)}  # fmt: skip
    words = tokenizer("one two three", add_special_tokens=False)["input_ids"]
    scored, answer = found[(*prefix, *words)[:9]]
    assert scored.tolist() == answer.tolist() == ([False] * len(prefix) + [True] * len(words))[:9]
    assert tuple(tokenizer("<|im_start|>one two", add_special_tokens=False)["input_ids"]) in found  # a prompt has its own
    for half, first in ((True, 9), (False, max(1, len(prefix)))):
        window = text_windows(stream[: 40 - len(prefix)], prefix, 16, half, 8)[0]
        text = [*prefix, *stream]
        assert window.ids.tolist() == [prefix + text[16 * i + len(prefix) : 16 * (i + 1)] for i in range(2)]
        assert window.scored.tolist() == [[place >= first for place in range(16)]] * 2 and window.real.all()


def test_what_a_calibration_text_lacks_is_said(tokenizer_with, tmp_path, random_tiny, command):
    (tmp_path / "rows").mkdir()
    text, rows = tmp_path / "text.txt", tmp_path / "rows" / "train.jsonl"
    text.write_text("word " * 900)
    rows.write_text(json.dumps({"messages": [{"role": "user", "content": "hello there"}]}) + "\n")
    plain, _ = tokenizer_with(template=False)
    assert calibration_ids(text, plain, 2, 32)[0].shape == (2, 32)  # no template is needed for text
    empty, picky, parts = (tokenizer_with()[0] for _ in range(3))
    (empty / "tokenizer.json").unlink()
    (picky / "chat_template.jinja").write_text("{{ raise_exception('no system turn') }}")
    (parts / "chat_template.jinja").write_text(
        "{% for m in messages %}{% for part in m.content %}{{ part.text }}{% endfor %}{% endfor %}"
    )
    assert calibration_ids(f"hf:{rows.parent}:train", parts, 1, 2)[0].shape == (1, 2)  # it gets a list of parts
    for source, model, message in (
        (text, empty, "knows no words; copy tokenizer.json"),
        (f"hf:{rows.parent}:train", plain, "no chat template, which chat turns need"),
        (f"hf:{rows.parent}:train", picky, "cannot render these turns: no system turn"),
    ):
        with pytest.raises(UserError, match=message):
            calibration_ids(source, model, 1, 8)
    for more, message in (
        (["--calib", text, "--calib-length", 4096], "reads at most 2048 positions"),
        (["--calib", f"{text}+nothing.txt", "--dry-run"], "--calib nothing.txt: no such file"),
    ):
        base = ["--model", random_tiny, "--out", tmp_path / "q", "--expert-bits", 3, "--linear-bits", 4, "--method", "gptq"]
        done = command("src/quant/quant_save.py", *base, *more)
        assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1, done.stderr


@pytest.mark.parametrize("token_power", [0.0, 0.4])
def test_a_layer_whose_output_is_not_finite_stops_the_pass(random_tiny, tmp_path, token_power):
    stream = LayerStream(Checkpoint(random_tiny), CPU, torch.float32)
    one = stream.checkpoint.read
    bad = "model.layers.2.mlp.experts.down_proj"
    names = set(stream.checkpoint.sources[bad])
    stream.checkpoint.read = lambda name: one(name) * (torch.nan if name in names else 1)
    with pytest.raises(UserError, match="layers.2.mlp.experts.0.down_proj.weight: the weight contains NaN"):
        given = calibration(800, token_power=token_power)
        weights = token_weights(stream, given, tmp_path)
        hidden, kwargs = stream.embed(given.batches()), stream.arguments(given.batches()[0])
        for index, layer in enumerate(stream.layers):
            stream.fill(layer, f"model.layers.{index}.")
            collector = Collector(layer, {"mlp.experts.down_proj"}, None if weights is None else weights[index])
            hidden = list(stream.run(layer, hidden, kwargs[index]))
            collector.remove()


def test_bad_calibration_is_one_line_and_leaves_nothing(random_tiny, tmp_path, command):
    base = ["--model", random_tiny, "--out", tmp_path / "q", "--expert-bits", 3, "--linear-bits", 4]
    (tmp_path / "short.txt").write_text("too short\n")
    for more, message in (
        (["--method", "gptq", "--calib", tmp_path / "short.txt"], "short.txt: "),
        (["--method", "gptq", "--calib", tmp_path / "none.txt"], "none.txt: no such file"),
        (["--method", "gtpq"], "method 'gtpq' is unknown"),
        (["--expert-bits", 2.5], "a mix of two grids needs a calibrated method"),
    ):
        done = command("src/quant/quant_save.py", *base, *more)
        assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["short.txt"]


def test_a_layer_that_cannot_be_written_ends_the_run(random_tiny, tmp_path, monkeypatch):
    """A thread writes it: its error is that of the run, which begins no third layer."""
    layers, append = [], CheckpointWriter.append

    def full(self, name, value):
        if ".layers.0." in name:
            raise UserError("model-00001: cannot write (No space left on device)")
        append(self, name, value)

    one = CalibratedPass.layer
    monkeypatch.setattr(CheckpointWriter, "append", full)
    monkeypatch.setattr(CalibratedPass, "layer", lambda self, index, behind: layers.append(index) or one(self, index, behind))
    with pytest.raises(UserError, match="No space left"):
        quantize_checkpoint(random_tiny, tmp_path / "q", Recipe(3, 4, 128, 4, method="gptq"), calibration=calibration(512))
    assert layers in ([0], [0, 1]) and not list(tmp_path.iterdir())


def never_routed(model, length):
    """Experts of a model that none of the calibration's tokens is sent to, counted in a plain forward pass."""
    from transformers import AutoModelForCausalLM

    loaded, seen = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), []
    for layer in loaded.model.layers:
        layer.mlp.experts.register_forward_pre_hook(lambda module, args: seen.append(args[1].unique().numel()))
    with torch.no_grad():
        loaded(calibration(length).ids)
    return sum(8 - count for count in seen)


def test_a_broken_activation_names_its_tensor_and_cold_experts_are_counted(random_tiny, tmp_path):
    shutil.copytree(random_tiny, tmp_path / "nan")
    tensors = load_file(tmp_path / "nan/model.safetensors")
    tensors["model.layers.1.input_layernorm.weight"][:] = 3e38
    save_file(tensors, tmp_path / "nan/model.safetensors", {"format": "pt"})
    recipe = Recipe(3, 4, 128, 1, method="gptq")
    with pytest.raises(UserError, match=r"at model\.layers\.1\.input_layernorm .*: its weights are finite and overflow"):
        quantize_checkpoint(tmp_path / "nan", tmp_path / "q", recipe, calibration=calibration(512))
    tensors = load_file(random_tiny / "model.safetensors")
    gate = tensors["model.layers.0.mlp.gate.weight"]
    gate[4:] = 0  # of a pair of opposite rows one logit is above zero: the first two are always among experts 0 to 3
    gate[1], gate[3] = -gate[0], -gate[2]
    save_file(tensors, tmp_path / "nan/model.safetensors", {"format": "pt"})
    report = quantize_checkpoint(tmp_path / "nan", tmp_path / "q", recipe, calibration=calibration(512))
    # of eight experts four are never chosen in this layer; in the others the text may miss some too, by a hook's count
    assert report.calibration["experts_never_routed"] == never_routed(tmp_path / "nan", 512) >= 4
    assert report.calibration["experts_never_routed"] <= report.calibration["experts_below_floor"] <= 32
    assert json.loads((tmp_path / "q/recipe.json").read_text())["report"]["calibration"] == report.calibration


def test_calibration_text_from_files_and_data_sets(random_tiny, tmp_path):
    (tmp_path / "chats").mkdir()
    turns = [{"role": "user", "content": "What is 2 + 2?"}, {"role": "assistant", "content": "It is 4."}]
    (tmp_path / "chats/train.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    (tmp_path / "notes.txt").write_text("one note\n\nanother note\n")
    source = f"hf:{tmp_path / 'chats'}:train+{tmp_path / 'notes.txt'}+tiny"
    ids, entry = calibration_ids(source, random_tiny, 2, 64)
    assert entry["name"] == "chats, train; notes.txt; tiny_tasks training split" and entry["revision"].startswith("local dir")
    tokenizer = AutoTokenizer.from_pretrained(random_tiny)
    text = tokenizer.decode(ids.flatten())
    assert default_source(tokenizer) == "tiny" and default_source(SimpleNamespace(get_vocab=lambda: {"a": 0})).startswith("hf:")
    assert "<|im_start|>user\nWhat is 2 + 2?<|im_end|>" in text
    assert text.index("It is 4.") < text.index("one note") < text.index("another note")  # in turn
    default, first, other = (calibration_ids(name, random_tiny, 2, 64) for name in ("tiny", "tiny:0", "tiny:1"))
    assert torch.equal(default[0], first[0]) and not torch.equal(first[0], other[0]) and other[1]["revision"].endswith("seed 1")
    for bad, message in (
        ("hf:HuggingFaceH4/ultrachat_200k:train_sft", "pin the data set"),
        ("hf:HuggingFaceH4/ultrachat_200k@main:train_sft", "pin the data set"),
        (f"hf:openai/gsm8k@{'0' * 40}:test", "not a training split"),
        ("hf:openai/gsm8k", "expected hf:"),
        (f"hf:{tmp_path / 'chats'}:train_other", "cannot be opened"),
    ):
        with pytest.raises(UserError, match=message):
            calibration_ids(bad, random_tiny, 2, 64)
    (tmp_path / "chats/train.jsonl").write_text(json.dumps({"question": "?"}) + "\n")
    with pytest.raises(UserError, match="its rows have question"):
        calibration_ids(f"hf:{tmp_path / 'chats'}:train", random_tiny, 2, 64)
