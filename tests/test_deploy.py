"""The command that serves a model: what fits where on made-up machines, and a server that is really asked."""

import dataclasses
import os
import re
import shutil
import signal
import socket
import subprocess
import sys

import gguf
import numpy as np
import pytest
from conftest import REPO
from gguf import GGUFReader

import deploy
from console import UserError
from deploy import (
    ALL,
    CARD_BYTES,
    GIB,
    Machine,
    beside,
    check_answer,
    facts_of,
    group_size,
    model_file,
    needs,
    place,
    this_machine,
)
from families import text_config
from gguf_format import GgufFile, GgufWriter, split_header
from llamacpp_eval8 import LlamaServer
from size_model import SHAPES, config_of, state_bytes

MODEL = REPO / "models/razor-tiny"


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """Facts of the 48 GiB file of the 122B's shape, from its header before a hole."""
    out = tmp_path_factory.mktemp("large") / "large.gguf"
    made = [sys.executable, REPO / "src/quant/synthetic_moe.py", "--shape", "122b", "--out", out, "--header-only"]
    subprocess.run(list(map(str, made)), check=True, capture_output=True)
    os.truncate(out, 60 * GIB)  # takes no disk
    yield facts_of(GgufFile(out))
    out.unlink()


def test_memory_of_the_122b_is_that_of_its_config(large):
    token, state = state_bytes(text_config(config_of(SHAPES["122b"])))
    assert (sum(large.keys), sum(large.state)) == (token, state) and len(large.dense) == 48 and not large.tied
    assert sum(large.experts) / GIB == pytest.approx(41.34, abs=0.01)  # docs/MOE_PIPELINE.md
    rest = sum(large.dense) + large.rest + large.embedding
    assert rest / GIB == pytest.approx(6.71, abs=0.01) and large.vocabulary == 248_320 and large.trained == 262_144


@pytest.mark.parametrize(
    ("cards", "host", "asked", "slots", "expected"),
    [  # GiB free; (layers on the card, whether experts are in the host's memory, context, batch)
        ((79,), 100, None, 1, (ALL, False, 262_144, 2048)),
        ((54,), 100, None, 1, (ALL, False, 131_072, 2048)),
        ((39, 39), 16, None, 1, (ALL, False, 262_144, 2048)),
        ((79,), 100, 32_768, 16, (ALL, False, 32_768, 2048)),
        ((23,), 60, None, 1, (ALL, True, 32_768, 2048)),
        ((15,), 60, None, 1, (ALL, True, 32_768, 2048)),
        ((23,), 60, 262_144, 1, (ALL, True, 262_144, 2048)),
        ((7,), 60, None, 1, (None, True, 32_768, 512)),
        ((), 60, None, 1, (None, False, 32_768, 512)),
        ((1,), 60, None, 1, (None, False, 32_768, 512)),
    ],
)
def test_the_fastest_placement_that_fits(large, cards, host, asked, slots, expected):
    machine = Machine(tuple(int(card * GIB) for card in cards), host * GIB, 16)
    found = place(large, machine, asked, slots)
    layers, hosted, context, batch = expected
    assert (found.context, found.batch, found.slots) == (context, batch, slots)
    assert found.card <= sum(machine.cards) and found.host <= machine.host
    if layers == ALL:
        assert found.layers == ALL and bool(found.hosted) == hosted
        first = 0
    elif hosted:  # some layers, without any expert
        assert found.layers is not None and 1 < found.layers < 49 and found.hosted == 48
        first = 49 - found.layers
    else:
        assert found.layers is None and found.card == 0
        return
    room = sum(machine.cards) - len(cards) * (CARD_BYTES + 4 * large.vocabulary * batch)
    assert needs(large, context, slots, batch, first, found.hosted)[0] <= room
    if hosted:  # no more would fit
        more = (first, found.hosted - 1) if layers == ALL else (first - 1, 48)
        assert needs(large, context, slots, batch, *more)[0] > room
    command = " ".join(found.options())
    assert ("--n-cpu-moe" in command) == bool(found.hosted) and "--flash-attn on" in command and "--threads 16" in command


@pytest.mark.parametrize(("cards", "asked", "slots"), [((23,), None, 1), ((), None, 1), ((39,), 262_144, 2)])
def test_what_cannot_fit_is_refused_with_the_least_that_would(large, cards, asked, slots):
    cards = tuple(card * GIB for card in cards)
    with pytest.raises(UserError, match="does not fit .* the least that would: a card with") as caught:
        place(large, Machine(cards, 16 * GIB, 8), asked, slots)
    said = str(caught.value)
    assert "\n" not in said and ("shorter --context" in said) == (asked is not None)
    card, other, memory, alone = (float(x) for x in re.findall(r"([\d.]+) (?:GiB|beside)", said.split("least")[1]))
    for able in (
        Machine((int((card + 0.1) * GIB),), 2 * GIB, 8),
        Machine((int((other + 0.1) * GIB),), int((memory + 0.1) * GIB), 8),
        Machine((), int((alone + 0.1) * GIB), 8),
    ):
        place(large, able, asked, slots)
        less = dataclasses.replace(able, cards=tuple(c - GIB // 2 for c in able.cards), host=able.host - GIB // 2)
        with pytest.raises(UserError, match="does not fit"):
            place(large, less, asked, slots)


def test_a_head_for_drafting_and_windows_count(large):
    drafting = dataclasses.replace(large, drafts=True)
    assert drafting.cache(0, 1024, 2, 512) == 2 * 4 * large.state[0] and large.cache(3, 1024, 2, 512) == 2048 * large.keys[3]
    local = dataclasses.replace(large, windows=(256,) * 48)
    assert local.cache(3, 4096, 2, 512) == (2 * 256 + 512) * large.keys[3]


def test_cache_is_what_llama_server_takes(bf16_gguf):
    facts = facts_of(GgufFile(bf16_gguf))
    with LlamaServer(bf16_gguf, 1024, 2, ["-lv", "4"]) as server:
        log = server.tail(1 << 20)
    keys = re.findall(r"llama_kv_cache: size = +([\d.]+) MiB", log)[-1]
    state = re.findall(r"llama_memory_recurrent: size = +([\d.]+) MiB", log)[-1]
    assert sum(facts.keys) * 2048 / 2**20 == pytest.approx(float(keys), abs=0.01)
    assert sum(facts.state) * 2 / 2**20 == pytest.approx(float(state), abs=0.01)


def damaged(source, out, name, value):
    """A copy with one tensor of float32 filled with a value."""
    shutil.copy(source, out)
    tensor = next(tensor for tensor in GGUFReader(out, "r+").tensors if tensor.name == name)
    tensor.data[:] = np.float32(value)
    tensor.data.base.flush() if hasattr(tensor.data.base, "flush") else None
    return out


def test_a_file_is_served_and_asked(bf16_gguf, tmp_path, command):
    run = ("src/eval/deploy.py", "--check", "--model")
    done = command(*run, bf16_gguf)
    assert done.returncode == 0, done.stderr
    assert re.search(
        r"llama-server --model \S+razor-tiny-BF16.gguf --ctx-size 2048 --parallel 1 --ubatch-size 512", done.stdout
    )
    assert re.search(r"What is 17 \+ 25\? .*\d.*\nanswered in \d+ tokens, [\d.]+ tokens/s", done.stdout), done.stdout
    reader = GGUFReader(bf16_gguf)
    tensors = [(t.name, tuple(reversed(t.shape.tolist())), t.tensor_type.name.lower()) for t in reader.tensors]
    parts = split_header(bf16_gguf.read_bytes()[: reader.data_offset], tensors, 8_000_000)
    (tmp_path / "split").mkdir()
    plan = [(tensor.name, int(tensor.n_bytes)) for tensor in reader.tensors]
    with GgufWriter(tmp_path / "split" / bf16_gguf.name, parts, plan, tmp_path / "state") as writer:
        whole = GgufFile(bf16_gguf)
        for name, _ in plan:
            writer.append(name, whole.data(name))
    split = command(*run, tmp_path / "split", "--context", 512, "--parallel", 2)
    answer = re.search(r"What is 17 \+ 25\? .*", done.stdout)[0]
    assert split.returncode == 0 and answer in split.stdout and "2 x 512 tokens" in split.stdout, split.stderr
    for value, message in ((float("nan"), "NaN or infinite"), (0.0, "one token over and over|has none")):
        bad = command(*run, damaged(bf16_gguf, tmp_path / "bad.gguf", "output_norm.weight", value))
        assert bad.returncode == 1 and re.search(message, bad.stderr) and "Traceback" not in bad.stderr, bad.stderr


def test_it_serves_until_ctrl_c(bf16_gguf):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    run = [sys.executable, REPO / "src/eval/deploy.py", "--model", bf16_gguf, "--serve", "--port", port]

    def heard():  # the tests may run in the background, where a shell has SIGINT ignored
        signal.signal(signal.SIGINT, signal.default_int_handler)

    process = subprocess.Popen(list(map(str, run)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=heard)
    lines = []
    while not lines or "until Ctrl-C" not in lines[-1]:
        lines.append(process.stdout.readline())
        assert lines[-1], process.communicate()
    second = subprocess.run(list(map(str, run)), capture_output=True, text=True)
    assert second.returncode == 2 and f"error: --port {port}: cannot be used" in second.stderr
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == 0 and "Traceback" not in stderr, stderr
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", port))  # the server is gone


def test_bad_input_is_one_line(tmp_path, command):
    (tmp_path / "text.gguf").write_text("nothing of the kind, though long enough to be read as a header")
    (tmp_path / "empty").mkdir()
    for arguments, message in (
        (["--model", tmp_path / "none"], "no such file or directory"),
        (["--model", tmp_path / "empty"], "no checkpoint and no GGUF"),
        (["--model", tmp_path / "text.gguf"], "not a GGUF file"),
        (["--model", MODEL, "--check"], "vLLM cannot be imported here: pip install vllm"),
    ):
        done = command("src/eval/deploy.py", *arguments)
        assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1, done.stderr
    shown = command("src/eval/deploy.py", "--model", MODEL, "--context", 1024, "--parallel", 2)
    assert shown.returncode == 0 and "missing: vLLM cannot be imported here" in shown.stdout
    assert f"vllm serve {MODEL} --max-model-len 1024 --max-num-seqs 2 --host 127.0.0.1 --port 8080" in shown.stdout


@pytest.mark.parametrize(
    ("others", "expected"),
    [
        (["m-mmproj-f16.gguf", "mtp-m-IQ3_XXS.gguf"], ("m-mmproj-f16.gguf", "mtp-m-IQ3_XXS.gguf")),
        (["mmproj-F16.gguf", "m-mtp-Q8_0.gguf"], ("mmproj-F16.gguf", "m-mtp-Q8_0.gguf")),
        (["mmproj-F16.gguf", "other-Q4_K.gguf"], (None, None)),  # of which of the two?
        (["mtp-m-Q8_0.gguf", "mtp-m-IQ3_XXS.gguf", "m-IQ3_XXS-00001-of-00002.gguf"], (None, "mtp-m-IQ3_XXS.gguf")),
        ([], (None, None)),
    ],
)
def test_what_lies_beside_a_model(tmp_path, others, expected):
    for name in ("m-IQ3_XXS.gguf", *others):
        head(tmp_path / name, 48 if "mtp" in name else 0)
    assert tuple(other and other.name for other in beside(tmp_path / "m-IQ3_XXS.gguf")) == expected
    if not any("other" in name or "00001" in name for name in others):
        assert model_file(tmp_path).name == "m-IQ3_XXS.gguf"


def test_a_model_named_after_its_block_is_no_head_for_drafting(tmp_path):
    head(tmp_path / "tiny-mtp-IQ3_XXS.gguf", 0)
    assert beside(tmp_path / "tiny-mtp-IQ3_XXS.gguf") == (None, None)
    assert model_file(tmp_path).name == "tiny-mtp-IQ3_XXS.gguf"


def head(path, layer):
    """A GGUF with one tensor, of this layer."""
    writer = gguf.GGUFWriter(path, "qwen35moe")
    writer.add_tensor(f"blk.{layer}.attn_norm.weight", np.ones(32, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize(
    ("text", "tokens", "message"),
    [
        ("17 + 25 is 42.", ["a", "b"], None),
        ("<think>\n17 + 25 = 42", [str(n) for n in range(40)], None),
        (" \n", [], "the answer is empty"),
        ("7 7 7", ["7"] * 16, "one token over and over"),
        ("the the moon", ["a"], "the answer has none: 'the the moon'"),
        ("\ufffd\ufffd1\ufffd", ["a"], "is no text"),
    ],
)
def test_an_answer_that_is_none_is_said(text, tokens, message):
    if message is None:
        check_answer(text, tokens)
    else:
        with pytest.raises(UserError, match=message):
            check_answer(text, tokens)


def test_a_machine_is_what_is_free(tmp_path, monkeypatch):
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho 24000; echo 80000\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert this_machine().cards == (24000 << 20, 80000 << 20) and this_machine(False).cards == ()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    found = this_machine()
    assert found.cards == () and 0 < found.cores <= os.cpu_count() and found.host > GIB
    groups = {"memory.max": [str(4 * GIB)], "memory.current": [str(GIB)], "cpu.max": ["100000", "100000"]}
    monkeypatch.setattr(deploy, "group_limit", lambda name: groups[name])
    assert this_machine() == Machine((), 3 * GIB, 1)


def test_cards_of_a_checkpoint_divide_its_heads_and_groups(monkeypatch, tmp_path):
    args = type("Args", (), {"context": 1024, "parallel": 1})
    shutil.copytree(MODEL, tmp_path / "m")
    monkeypatch.setattr(deploy, "VLLM_BYTES", 0)
    size = (MODEL / "model.safetensors").stat().st_size
    for share, expected in ((2.0, 1), (0.8, 2)):
        monkeypatch.setattr(deploy, "this_machine", lambda card=int(share * size): Machine((card,) * 4, GIB, 2))
        found = deploy.deploy_checkpoint(tmp_path / "m", args)
        assert (f"--tensor-parallel-size {expected}" in found.command) == (expected > 1), found.command
    monkeypatch.setattr(deploy, "this_machine", lambda: Machine((size // 10,), GIB, 2))
    with pytest.raises(UserError, match="does not fit .*the least that would: 0.0 GiB free on a card"):
        deploy.deploy_checkpoint(tmp_path / "m", args)
    assert group_size({"quantization_config": {"config_groups": {"a": {"weights": {"group_size": 128}}, "b": {}}}}) == 128
