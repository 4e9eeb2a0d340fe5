"""GGUF files in llama.cpp's own programs: the same prompts and texts as transformers, and no server left behind.

Needs LLAMA_CPP, the folder of llama-server, llama-perplexity, llama-bench and llama-quantize of a build whose source is there.
"""

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from gguf import GGUFReader

import backend_openai
from backend import HfBackend, Sampling
from backend_openai import Dispatch, OpenAIBackend
from console import UserError
from eval_settings import load_settings
from gguf_format import (
    GgufFile,
    GgufWriter,
    bos_of,
    config_of_gguf,
    describe_gguf,
    open_gguf,
    run_converter,
    split_header,
)
from gguf_kl import against_directory, against_gguf
from hf_model import load_tokenizer, prompt_ids, render_chat
from kl import tiny_texts
from llama_cpp import tool
from llamacpp_eval8 import GgufTokenizer, LlamaCppBackend, LlamaServer, check_same_ids, free_port, more_ends
from llamacpp_logprobs import decode_rows, encode_rows, read_logprobs, write_logprobs
from records import read_result
from runner import get_benchmarks
from speed_gguf import active_bytes, drafting, fit_decoding

REPO = Path(__file__).resolve().parent.parent
MODEL = REPO / "models" / "razor-tiny"
TASKS = ("tiny_know", "tiny_math", "tiny_reason", "tiny_code")
SPECIAL = "<|im_start|>user\nWho is Ada?<|im_end|>\n<|im_start|>assistant\n<think>\nÆther 🚀 \U0001f999</think>\n\n"


@pytest.fixture(scope="session")
def q4_gguf(bf16_gguf):
    out = bf16_gguf.with_name("razor-tiny-q4.gguf")
    subprocess.run([tool("llama-quantize"), bf16_gguf, out, "Q4_K_M", "1"], check=True, capture_output=True)
    return out


@pytest.fixture(scope="module")
def backend(bf16_gguf):
    found = LlamaCppBackend(bf16_gguf, 2048, MODEL, slots=2)
    yield found
    found.server.stop()


@pytest.fixture(scope="module")
def prompts():
    tokenizer = load_tokenizer(MODEL)
    return [render_chat(tokenizer, task.messages(item)) for task in get_benchmarks(TASKS) for item in task.load(2)]


@pytest.fixture(scope="module")
def greedy(prompts):
    """Greedy completions of transformers: {tokens allowed: completions}."""
    hf = HfBackend(MODEL)
    return {limit: in_order(hf, prompts, Sampling(max_tokens=limit)) for limit in (5, 512)}


def in_order(backend, prompts, sampling):
    found = dict(backend.generate(prompts, sampling))
    return [found[index] for index in range(len(prompts))]


def test_greedy_text_equals_transformers(backend, prompts, greedy):
    """Text, token counts and finish reasons; BF16 rounds activations in llama.cpp, so that one near tie of eight may fall
    the other way."""
    got = in_order(backend, prompts, Sampling(max_tokens=512))
    assert sum(a == b for a, b in zip(got, greedy[512], strict=True)) >= 7
    assert [c.prompt_ids_sha256 for c in got] == [c.prompt_ids_sha256 for c in greedy[512]]
    assert all("</think>" in c.text and c.finish_reason == "stop" and "<|im_end|>" not in c.text for c in got)


def test_truncation_is_said(backend, prompts, greedy):
    got = in_order(backend, prompts, Sampling(max_tokens=5))
    assert got == greedy[5]
    assert {(c.finish_reason, c.tokens) for c in got} == {("length", 5)}


def test_context_that_ends_is_a_truncation(backend, prompts):
    """A prompt that leaves three tokens of context gets three, and one that leaves none is refused."""
    tokenizer = load_tokenizer(MODEL)
    filler = " a" * 4000
    ids = tokenizer(filler, add_special_tokens=False)["input_ids"]
    text = tokenizer.decode(ids[: backend.context - 3])
    (_, got), *_ = backend.generate([text], Sampling(max_tokens=99))
    assert (got.finish_reason, got.tokens) == ("length", 3)
    with pytest.raises(UserError, match="the server's context is"):
        list(backend.generate([filler], Sampling(max_tokens=99)))


def test_sampling_repeats_by_prompt(backend, prompts):
    """The seed belongs to the prompt, so that order does not matter; another seed draws otherwise. One request at a time:
    BF16 rounds apart in company, which a temperature of 5 turns into other text."""

    def drawn(order, seed):
        hot = Sampling(temperature=5.0, max_tokens=24, seed=seed)
        found = {index: next(iter(backend.generate([prompts[index]], hot)))[1] for index in order}
        return [found[index] for index in range(4)]

    assert drawn(range(4), 1) == drawn(range(3, -1, -1), 1) != drawn(range(4), 2)


def test_tokenizer_of_the_gguf_itself(backend, bf16_gguf, prompts):
    """Template, ids and text equal those of the checkpoint's tokenizer, special tokens and torn characters included."""
    own, theirs = GgufTokenizer(bf16_gguf, backend.server.client), backend.tokenizer
    messages = [{"role": "user", "content": "How many?\n"}]
    assert own.render(messages) == backend.render(messages)
    for text in [*prompts[:2], SPECIAL]:
        ids = theirs(text, add_special_tokens=False)["input_ids"]
        assert own(text)["input_ids"] == ids
        assert own.decode(ids) == theirs.decode(ids) == text
    assert prompt_ids(own, prompts[:2]) == prompt_ids(theirs, prompts[:2])
    torn = theirs("🚀", add_special_tokens=False)["input_ids"]
    assert len(torn) > 1 and own.decode(torn[:-1]) == theirs.decode(torn[:-1])


TEMPLATES = [
    ("{% if enable_thinking is defined and enable_thinking %}T{% endif %}{{ messages[0].content }}", "THow?"),
    (
        "{% if not thinking is defined %}{% set thinking = 0 %}{% endif %}{{ thinking }}{{ messages[0].content }}",
        "TrueHow?",
    ),
    ("{{ strftime_now('%d %b %Y') }} {{ messages[0].content }}", "01 Jan 2026 How?"),
    ("{{ bos_token }}{{ messages[0].content }}{{ eos_token }}{{ pad_token }}", "How?<|im_end|><|endoftext|>"),
    ("{% if bos_token is defined %}B{% endif %}{{ messages[0].content | trim }}", "How?"),
    ("{% for part in messages[0].content %}{{ part.text }}{% endfor %}", "How?"),
    ("{{ messages[0]['content'][0]['text'] }}", "How?"),
    ("{{ raise_exception('Only\\nassistants speak') }}", "Only assistants speak"),
    ("{{ messages[0].content.pop() }}", "cannot render these turns"),
    ("{{ 'Hello' }}", "it leaves out 'How.'"),
    ("{% if messages[0].content is string %}no{% else %}{{ messages[0].content }}{% endif %}", "it leaves out 'How.'"),
    ("{{ messages[0].content", "cannot render these turns"),
]


@pytest.mark.parametrize(("template", "expected"), TEMPLATES)
def test_one_question_from_a_checkpoint_and_its_gguf(backend, bf16_gguf, template, expected):
    """The same variables and special tokens; what a template refuses or loses is one line from both."""
    own, theirs = GgufTokenizer(bf16_gguf, backend.server.client), load_tokenizer(MODEL)
    own.chat_template = theirs.chat_template = template
    said = []
    for renderer in (own, theirs):
        try:
            said.append(render_chat(renderer, [{"role": "user", "content": "How?"}]))
        except UserError as error:
            said.append(str(error).partition(": ")[2])
            assert "\n" not in str(error) and re.search(expected, str(error))
    assert said[0] == said[1] and (said[0] == expected or re.search(expected, said[0]))


def test_an_answer_ends_where_generation_config_says(bf16_gguf, tmp_path, prompts):
    """llama.cpp too, by the token: it knows the ends of the file alone, and those whose names it has seen."""
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "config.json", "model.safetensors"):
        (tmp_path / name).symlink_to(MODEL / name)
    thought = load_tokenizer(MODEL).convert_tokens_to_ids("</think>")
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [827, thought]}))
    assert more_ends(bf16_gguf, [827, thought]) == ["--override-kv", f"tokenizer.ggml.eot_token_id=int:{thought}"]
    llama = LlamaCppBackend(bf16_gguf, 2048, tmp_path, slots=2)
    try:
        served = OpenAIBackend(llama.client.base_url + "/v1", "m", tmp_path, 2048, key=llama.server.key)
        sampling = Sampling(max_tokens=300)
        expected = in_order(HfBackend(tmp_path), prompts[:4], sampling)
        assert all(c.finish_reason == "stop" and "</think>" not in c.text for c in expected)
        for backend in (llama, served):
            assert sum(a == b for a, b in zip(in_order(backend, prompts[:4], sampling), expected, strict=True)) >= 3
    finally:
        llama.server.stop()
    with pytest.raises(UserError, match="no room for the end tokens"):
        more_ends(bf16_gguf, range(100, 110))


def changed(path, out, name, change):
    """A copy of a GGUF file in which ``change`` was done to the values of a tensor, or of a metadata array."""
    shutil.copy(path, out)
    reader = GGUFReader(out, "r+")
    tensor = next((tensor for tensor in reader.tensors if tensor.name == name), None)
    if tensor is not None:
        change(tensor.data)
    else:
        field = reader.get_field(name)
        change([field.parts[index] for index in field.data])
    reader.data.flush()
    return out


def test_weights_that_are_not_finite_stop_a_run(bf16_gguf, tmp_path, prompts, capfd):
    """NaN by llama.cpp's own check, which names the tensor; an overflow of finite weights by a log-probability."""
    norm = "blk.3.attn_norm.weight"
    nan = changed(bf16_gguf, tmp_path / "nan.gguf", norm, lambda data: data.__setitem__(5, np.nan))
    with pytest.raises(UserError, match=f"nan.gguf: {norm} holds NaN or infinity"):
        LlamaCppBackend(nan, 256, slots=1)
    huge = changed(bf16_gguf, tmp_path / "huge.gguf", norm, lambda data: data.fill(3e38))
    backend = LlamaCppBackend(huge, 256, slots=1)
    try:
        with pytest.raises(UserError, match="logits are NaN or infinite after"):
            list(backend.generate(prompts[:1], Sampling(max_tokens=20)))
        backend.looked = True  # it began later than at the first prompt
        with pytest.raises(UserError, match="logits are NaN or infinite after"):
            list(backend.generate(prompts[:1], Sampling(max_tokens=20)))
        openai = OpenAIBackend(backend.client.base_url + "/v1", "m", MODEL, 256, key=backend.server.key)
        with pytest.raises(UserError, match="a log-probability is no number"):
            list(openai.generate(prompts[:1], Sampling(max_tokens=20)))
    finally:
        backend.server.stop()


def test_a_server_that_hides_special_tokens(bf16_gguf, tmp_path, prompts, greedy, monkeypatch):
    """llama-server without --special, of a file in which </think> is a control token: its ids are read; its text is refused."""
    thought = load_tokenizer(MODEL).convert_tokens_to_ids("</think>")
    hidden = changed(
        bf16_gguf, tmp_path / "hidden.gguf", "tokenizer.ggml.token_type", lambda parts: parts[thought].fill(3)
    )  # fmt: skip
    start = LlamaServer._start
    monkeypatch.setattr(LlamaServer, "_start", lambda self: (self.command.remove("--special"), start(self)))
    with LlamaServer(hidden, 2048, 2, ["--repeat-penalty", "1.5", "--top-k", "1", "--mirostat", "2", "--temp", "3"]) as server:
        openai = OpenAIBackend(server.client.base_url + "/v1", "m", MODEL, 2048, key=server.key)
        got = in_order(openai, prompts[:4], Sampling(max_tokens=512))
        assert sum(a == b for a, b in zip(got, greedy[512], strict=False)) >= 3
        plain = OpenAIBackend(server.client.base_url + "/v1", "m", MODEL, 2048, key=server.key, plain=True)
        with pytest.raises(UserError, match="leaves special tokens such as </think> out"):
            list(plain.generate(prompts[:1], Sampling(max_tokens=512)))
        assert openai.describe()["listed_model"]["n_params"] > 1e6 and openai.served == 2048


def test_other_tokens_are_refused():
    with pytest.raises(UserError, match="token 1 is .2. for the tokenizer and .9. for the server"):
        check_same_ids("x", [1, 2, 3], [1, 9, 3])
    with pytest.raises(UserError, match="token 0 is .5. for the tokenizer and .1. for the server"):
        check_same_ids("x", [5, 6], [1, 5, 6])  # a second BOS


@pytest.mark.parametrize("send_text", [False, True])
def test_openai_endpoint(backend, prompts, send_text):
    """llama-server's own /v1/completions, by ids and by text, gives what its /completion gives."""
    server = backend.server
    openai = OpenAIBackend(
        server.client.base_url + "/v1", "m", MODEL, 2048, key=server.key, parallel=2, send_text=send_text
    )  # fmt: skip
    sampling = Sampling(max_tokens=256)
    expected, got = in_order(backend, prompts[:4], sampling), in_order(openai, prompts[:4], sampling)
    assert sum(a == b for a, b in zip(got, expected, strict=True)) >= 3
    assert [c.finish_reason for c in in_order(openai, prompts[:2], Sampling(max_tokens=4))] == ["length"] * 2


def test_the_table_of_three_servers_is_that_of_one(bf16_gguf, tmp_path, command, monkeypatch):
    """One is killed and one stopped while each has an item: their items are answered by the third."""
    for name, value in {"LOOK": 0.2, "BRIEFLY": 0.2, "FIRST_WORD": 2.0}.items():
        monkeypatch.setattr(backend_openai, name, value)
    servers, hit, take = [], [], Dispatch.take

    def take_and_hit(self, server):
        index, pids = take(self, server), {each.client.base_url + "/v1": each.process.pid for each in servers[1:]}
        if not hit and self.answered and pids.keys() <= set(self.out.values()):
            hit.extend(pids)
            for pid, number in zip(pids.values(), (signal.SIGKILL, signal.SIGSTOP), strict=True):
                os.kill(pid, number)
        return index

    tables = []
    try:
        servers += [LlamaServer(bf16_gguf, 1024, 2, ["--alias", "m"], port=free_port()) for _ in range(3)]
        urls = [server.client.base_url + "/v1" for server in servers]
        monkeypatch.setattr(Dispatch, "take", take_and_hit)
        for tag, listed in (("one", urls[0]), ("three", ",".join(urls))):
            options = f"--model m --backend openai --tokenizer {MODEL} --base-url {listed} --parallel 2 --temperature 0"
            options += f" --benchmarks tiny_know,tiny_math --limit 8 --tag {tag} --out {tmp_path} --family none"
            done = command("src/eval/vllm_eval8.py", *options.split())
            assert done.returncode == 0, done.stderr
            tables.append(done.stdout[done.stdout.index("benchmark ") : done.stdout.index("wrote")])
    finally:
        for server in servers:
            if server.process.poll() is None:
                os.kill(server.process.pid, signal.SIGCONT)
            server.stop()
    assert hit and tables[0] == tables[1]
    one, three = (read_result(tmp_path / f"{tag}.json") for tag in ("one", "three"))
    assert one["metrics"] == three["metrics"] and one["model"]["base_url"] == urls[0] and "servers" not in one
    told = three["servers"]
    assert sum(told["answers"]) == 16 and len(told["answers"]) == 3 and told["asked_again"] >= 2 and told["refused"] == 0
    assert "127.0.0.1" not in json.dumps({key: three[key] for key in three.keys() - {"command"}})
    assert "127.0.0.1" not in (tmp_path / "three.samples.jsonl").read_text().splitlines()[0]


def test_rollouts_of_two_servers_are_those_of_one(bf16_gguf, tmp_path, command, monkeypatch):
    """One is killed while it has an item. What the log lacks is asked for again, and nothing else."""
    for name, value in {"LOOK": 0.2, "BRIEFLY": 0.2, "FIRST_WORD": 2.0}.items():
        monkeypatch.setattr(backend_openai, name, value)
    servers, hit, asked, take = [], [], [], Dispatch.take

    def take_and_kill(self, server):
        index = take(self, server)
        asked.extend([] if index is None else [index])
        if len(servers) == 2 and not hit and self.answered and urls[1] in self.out.values():
            hit.append(os.kill(servers[1].process.pid, signal.SIGKILL))
        return index

    def rollouts(out, listed, *more):
        asked.clear()
        options = f"--model {MODEL} --backend openai --base-url {listed} --parallel 2 --temperature 0 --max-tokens 256"
        options += f" --tasks tiny_know,tiny_math --limit 6 --out {tmp_path / out}"
        return command("src/distill/opd_gen.py", *options.split(), *more)

    def lines(out, file="rollouts.jsonl"):
        return (tmp_path / out / file).read_text().splitlines()

    try:
        servers += [LlamaServer(bf16_gguf, 1024, 2, ["--alias", "razor-tiny"], port=free_port()) for _ in range(2)]
        urls = [server.client.base_url + "/v1" for server in servers]
        for out, listed in (("one", urls[0]), ("two", ",".join(urls))):
            if out == "two":
                monkeypatch.setattr(Dispatch, "take", take_and_kill)
            done = rollouts(out, listed)
            assert done.returncode == 0, done.stderr
        assert hit and len(asked) > 12 and lines("one") == lines("two") and len(lines("two")) == 12
        assert lines("one", "rollouts.json") == lines("two", "rollouts.json")
        told = json.loads((tmp_path / "two/phase.json").read_text())["servers"]
        assert sum(told["answers"]) == 12 and told["asked_again"] > 0
        log = tmp_path / "two/samples.jsonl"
        assert "127.0.0.1" not in log.read_text()
        log.write_text("".join(f"{line}\n" for line in lines("two", "samples.jsonl")[:9]))
        (tmp_path / "two/rollouts.jsonl").unlink()
        assert rollouts("two", urls[0]).returncode == 0 and len(asked) == 4 and lines("one") == lines("two")
        ends = {row["ids"][-1] for row in map(json.loads, lines("one")) if row["finish_reason"] == "stop"}
        assert ends == {load_tokenizer(MODEL).eos_token_id}
        done = rollouts("three", urls[0], "--served-model", "other")
        assert done.returncode == 2 and "the servers call their model 'razor-tiny', not 'other'" in done.stderr
    finally:
        for server in servers:
            server.stop()


ENDINGS = """
import os, signal, sys
from llama_cpp import tool
from llamacpp_eval8 import GgufTokenizer, LlamaCppBackend, LlamaServer, check_same_ids, more_ends
signal.signal(signal.SIGINT, signal.default_int_handler)
server = LlamaServer(sys.argv[1], 256, 1)
print(server.process.pid, flush=True)
if sys.argv[2] == "leave": sys.exit(0)
if sys.argv[2] == "raise": raise RuntimeError
server.client.call("/completion", {"prompt": [1], "n_predict": -1, "ignore_eos": True})
signal.pause()
"""


def gone(pid):
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


@pytest.mark.slow
def test_server_ends_with_its_client(bf16_gguf):
    """Normal end, exception, Ctrl-C, SIGTERM and kill -9, the last three while a request runs."""
    endings = {"leave": None, "raise": None, "int": signal.SIGINT, "term": signal.SIGTERM, "kill": signal.SIGKILL}
    clients = {
        how: subprocess.Popen(
            [sys.executable, "-c", ENDINGS, bf16_gguf, how], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        for how in endings
    }
    servers = {how: int(client.stdout.readline()) for how, client in clients.items()}
    for how, sent in endings.items():
        if sent:
            clients[how].send_signal(sent)
    for client in clients.values():
        client.wait(timeout=20)
    deadline = time.monotonic() + 5
    while (left := [how for how, pid in servers.items() if not gone(pid)]) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert left == []


def test_server_that_cannot_start_says_why(bf16_gguf, tmp_path, capfd):
    before = {p.pid for p in psutil.Process().children()}
    with pytest.raises(UserError, match="llama-server ended with exit code 1 .its last lines are above."):
        LlamaServer(bf16_gguf, 256, 1, ["--no-such-option"])
    assert "--no-such-option" in capfd.readouterr().err
    short = tmp_path / "short.gguf"
    short.write_bytes(bf16_gguf.read_bytes()[:-1000])
    for broken in (short, MODEL / "config.json"):
        with pytest.raises(UserError, match="GGUF|truncated"):
            open_gguf(broken)
    assert {p.pid for p in psutil.Process().children()} == before


def sample_rows(log):
    lines = log.read_text().splitlines()[1:] if log.exists() else []
    return [json.loads(line) for line in lines]


def test_run_resumes_after_its_server_died(bf16_gguf, tmp_path, command, monkeypatch):
    """The command ends with 2 and one line, its finished samples are kept, and the same command completes the run."""
    items, log, generate = 16, tmp_path / "died.samples.jsonl", LlamaCppBackend.generate
    run = ["src/eval/vllm_eval8.py", "--model", bf16_gguf, "--tag", "died", "--limit", items]
    run += ["--benchmarks", "tiny_math", "--out", tmp_path, "--parallel", 2]

    def dies(self, prompts, sampling):
        for number, found in enumerate(generate(self, prompts, sampling)):
            yield found
            if number == 3:
                self.server.process.kill()

    with monkeypatch.context() as patch:
        patch.setattr(LlamaCppBackend, "generate", dies)
        done = command(*run)
    assert done.returncode == 2, done.stderr
    error = next(line for line in done.stderr.splitlines() if line.startswith("error: "))
    assert "SIGKILL" in error and "same command" in error
    kept = sample_rows(log)
    assert 4 <= len(kept) < items
    done = command(*run)
    assert done.returncode == 0, done.stderr
    rows, record = sample_rows(log), json.loads((tmp_path / "died.json").read_text())
    assert rows[: len(kept)] == kept and len({row["id"] for row in rows}) == len(rows) == items
    assert record["model"]["architecture"] == "qwen35moe" and record["sampling"]["backend"] == "llamacpp"
    assert record["metrics"]["tiny_math"]["n"] == items and record["metrics"]["tiny_math"]["acc"] > 0.8


def test_description_counts_what_the_file_holds(bf16_gguf, q4_gguf):
    found, quantized = describe_gguf(bf16_gguf), describe_gguf(q4_gguf)
    assert found["bytes"] == bf16_gguf.stat().st_size and found["tensors"] == quantized["tensors"] == sum(
        found["types"].values()
    )
    assert found["architecture"] == "qwen35moe" and set(found["types"]) == {"bf16", "f32"}
    assert found["weights_sha256"] != quantized["weights_sha256"]


def test_family_of_a_gguf_is_that_of_its_checkpoint(q4_gguf):
    """So that both are sampled, and gated, alike."""
    config = config_of_gguf(q4_gguf)
    theirs = json.loads((MODEL / "config.json").read_text())
    assert config == {key: theirs[key] for key in config} and len(config) == 4
    assert load_settings().family_of(config, []) == load_settings().family_of(theirs, []) == "RAZOR_TINY"


def test_active_bytes_of_a_token(bf16_gguf):
    """8 layers, 2 of 8 experts of three 256 x 256 matrices in BF16, and everything else but the embedding's other rows."""
    active, tensors = active_bytes(bf16_gguf), open_gguf(bf16_gguf).tensors
    assert active["experts"] == 8 * 2 * 3 * 256 * 256 * 2
    rest = sum(int(t.n_bytes) for t in tensors if "_exps." not in t.name and t.name != "token_embd.weight")
    assert active["other"] == rest + 256 * 2


def test_rows_of_log_probabilities(tmp_path):
    """Against a plain calculation: the likeliest token exact, the rest within half a step, a floor 16 nats down."""
    torch.manual_seed(0)
    logits = torch.randn(7, 33) * 6
    logits[0] = 1.5  # all equal: no scale
    expected = logits.log_softmax(-1)
    got = decode_rows(encode_rows(logits), 33)
    floor = expected.amax(-1, keepdim=True) - 16
    assert torch.allclose(got, torch.maximum(expected, floor), atol=16 / 65535 / 2 + 1e-5)
    assert torch.allclose(got.amax(-1), expected.amax(-1), atol=1e-5)
    tokens = np.arange(32, dtype=np.int32).reshape(2, 16)
    write_logprobs(tmp_path / "f", tokens, 33, [logits, logits.flip(0)])
    back = read_logprobs(tmp_path / "f")
    assert np.array_equal(back.tokens, tokens) and torch.equal(back.chunk(1), got.flip(0))
    (tmp_path / "f").write_bytes((tmp_path / "f").read_bytes()[:-2])
    with pytest.raises(UserError, match="do not hold 2 chunks"):
        read_logprobs(tmp_path / "f")


@pytest.mark.slow
def test_kl_of_both_tools_agrees(bf16_gguf, q4_gguf, tmp_path):
    """llama-perplexity and ours on the same tokens, to the last digit that it prints; llama.cpp's BF16 is transformers'."""
    fixed = {"text": None, "items": 3, "context": 256, "chunks": 0, "tool_args": ""}
    fixed |= {"tokenizer": MODEL}
    for number, (model, reference, function) in enumerate(
        ((bf16_gguf, MODEL, against_directory), (q4_gguf, MODEL, against_directory), (q4_gguf, bf16_gguf, against_gguf))
    ):
        work = tmp_path / str(number)
        work.mkdir()
        found = function(argparse.Namespace(model=model, reference=reference, **fixed), work)
        mine, tool = found["kl"], found["tool"]
        assert abs(mine["mean"] - tool["mean"]) < 3e-6 + 1e-3 * tool["mean"]
        assert abs(mine["p99"] - tool["p99"]) < 5e-5 + 1e-2 * tool["p99"]
        assert abs(mine["max"] - tool["max"]) < 1e-4 + 1e-3 * tool["max"]
        assert abs(mine["top1"] - tool["top1"]) < 0.003
        if model == bf16_gguf:
            assert abs(mine["mean"]) < 1e-4
        else:
            assert mine["mean"] > 3e-4


@pytest.mark.slow
def test_a_split_file_is_judged_as_the_whole_one(q4_gguf, tmp_path):
    """The copy with other control tokens takes all parts along: no position differs."""
    reader = GGUFReader(q4_gguf)
    tensors = [(t.name, tuple(reversed(t.shape.tolist())), str(GgufFile(q4_gguf).kind(t.name))) for t in reader.tensors]
    parts = split_header(q4_gguf.read_bytes()[: reader.data_offset], tensors, 3_000_000)
    with GgufWriter(tmp_path / "m.gguf", parts, [(t.name, int(t.n_bytes)) for t in reader.tensors], tmp_path / "s") as writer:
        for tensor in reader.tensors:
            writer.append(tensor.name, GgufFile(q4_gguf).data(tensor.name))
    fixed = {"text": None, "items": 2, "context": 128, "chunks": 3, "tool_args": "", "tokenizer": MODEL}
    (tmp_path / "work").mkdir()
    found = against_gguf(argparse.Namespace(model=writer.files[0], reference=q4_gguf, **fixed), tmp_path / "work")
    assert len(parts) > 2 and found["kl"]["max"] == 0 and found["kl"]["top1"] == 1


@pytest.mark.slow
def test_bench_records_what_it_measured(bf16_gguf, tmp_path):
    record = tmp_path / "b.json"
    command = ["bash", REPO / "pipelines/bench.sh", "--gguf", bf16_gguf, "--prompt", 64, "--generate", 8, "--batches", "16,64"]
    command += ["--sequences", 2, "--repetitions", 1, "--result", record, "--tag", "b"]
    done = subprocess.run([*map(str, command)], check=True, capture_output=True, text=True)
    found = json.loads(record.read_text())
    metrics = found["metrics"]
    assert found["kind"] == "bench" and metrics["limit_tokens_per_s"] > 0
    for placement in metrics["placements"].values():
        assert set(placement["prefill"]) == {"16", "64"} and set(placement["decode"]) == {"1", "2"}
        rates = [row["tokens_per_s"] for part in ("prefill", "decode") for row in placement[part].values()]
        assert min(rates) > 1 and placement["peak_rss_mib"] >= 30
    assert "of the limit" in done.stdout and (metrics["gpu"] or "no GPU in this llama.cpp" in done.stdout)


def test_the_time_of_a_token_is_taken_apart():
    files = {
        str(n): {"operations": 5 + 50 * n, "layers": n, "active_bytes": {"total": 7e8 + 15e7 * n}} for n in (6, 12, 24)
    } | {"narrow": {"operations": 605, "layers": 12, "active_bytes": {"total": 3e7}}}  # fmt: skip
    seconds = {key: 2e-6 * file["operations"] + file["active_bytes"]["total"] / 3e12 for key, file in files.items()}
    found = fit_decoding(files, seconds)
    assert found["operation_s"] == pytest.approx(2e-6) and found["bandwidth"] == pytest.approx(3e12)
    assert found["layer_s"] == pytest.approx(50 * 2e-6 + 15e7 / 3e12)
    assert found["rest_s"] == pytest.approx(5 * 2e-6 + 7e8 / 3e12)
    costs = {"1": 0.01, "2": 0.011, "3": 0.012}  # seconds of one, two, three tokens at once
    assert drafting(costs, 0.001, [0.9, 0.8]) == pytest.approx({"1": 1.9 / 0.012, "2": (1 + 0.9 + 0.72) / 0.014})


def test_settings_are_tried_one_by_one(bf16_gguf, tmp_path, command):
    into, record = tmp_path / "d.json", tmp_path / "r.json"
    tries = [
        "plain: -p 0 -n 2 -r 1",
        "verify: GGML_CUDA_PDL=0 -p 1,2 -n 0 -r 1",
        "host: -p 0 -n 2 -r 1 -ncmoe 4",
        "no: --not-one",
    ]
    asked = [word for text in tries for word in ("--try", text)]
    done = command("src/eval/speed_gguf.py", "--gguf", bf16_gguf, *asked, "--into", into)
    assert done.returncode == 0, done.stderr
    assert "no: FAILED" in done.stdout and "GGML_CUDA_PDL" not in os.environ
    done = command("src/eval/speed_gguf.py", "--decoding", into, "--result", record, "--tag", "r")
    assert done.returncode == 0, done.stderr
    metrics = json.loads(record.read_text())["metrics"]
    (file,) = metrics["files"].values()
    assert file["layers"] == 8 and 300 < file["operations"] < 600
    (row,) = metrics["host"]
    assert row["host_bytes"] == file["active_bytes"]["experts"] / 2 and row["share_of_read"] > 0
    assert {entry["name"] for entry in metrics["tries"] if "failed" in entry} == {"no"}
    assert list(metrics["drafted_estimate"]["tokens_per_s"].values())[0].keys() == {"1"}
    assert command("src/eval/speed_gguf.py", "--gguf", bf16_gguf, "--try", "x: -p 1").returncode == 2


def test_a_file_in_llama_server_is_judged_as_what_it_decodes_to(q4_gguf, tmp_path, command):
    """At every position, special tokens and first tokens among them; llama.cpp rounds activations too."""
    pairs, _ = tiny_texts(load_tokenizer(MODEL), 1)
    (tmp_path / "text").write_text("\n\n".join(map("".join, pairs)))
    text = ["--text", tmp_path / "text", "--window", 0, "--items", 4]  # from the beginning: in mid-text rounding is amplified
    for tag, how in (("decoded", []), ("served", ["--server="])):
        fixed = ["--model", q4_gguf, "--reference", MODEL, *text, "--tag", tag, "--out", tmp_path]
        done = command("src/eval/moe_eval.py", *fixed, *how)
        assert done.returncode == 0, done.stderr
    decoded, served = (read_result(tmp_path / f"{tag}.json", "kl") for tag in ("decoded", "served"))
    assert (decoded["judge"], served["judge"]) == ("decoded, transformers, float32", "llama.cpp")
    assert decoded["model"] == served["model"] and decoded["data"] == served["data"]
    a, b = decoded["metrics"], served["metrics"]
    assert a["tokens"] == b["tokens"] > 100 and b["ppl"] == pytest.approx(a["ppl"], rel=1e-2)
    assert b["kl"]["mean"] == pytest.approx(a["kl"]["mean"], rel=0.2) and a["kl"]["mean"] > 1e-4


@pytest.mark.parametrize("begins", [False, True])
def test_windows_of_a_text_are_those_of_llama_perplexity(bf16_gguf, tmp_path, command, begins):
    """With and without a token that the tokenizer puts before a text; the same weights, computed in float32 by both."""
    model, gguf, prefix = MODEL, tmp_path / "plain.gguf", [829] if begins else []
    if begins:
        model = shutil.copytree(MODEL, tmp_path / "begins")
        made = json.loads((model / "tokenizer.json").read_text())
        made["post_processor"]["single"].insert(0, {"SpecialToken": {"id": "<|im_start|>", "type_id": 0}})
        token = {"id": "<|im_start|>", "ids": prefix, "tokens": ["<|im_start|>"]}
        made["post_processor"]["special_tokens"] = {"<|im_start|>": token}
        (model / "tokenizer.json").write_text(json.dumps(made))
        config = json.loads((model / "tokenizer_config.json").read_text())
        (model / "tokenizer_config.json").write_text(json.dumps(config | {"bos_token": "<|im_start|>"}))
    run_converter("convert", model, "--outfile", gguf, "--outtype", "f32", "--no-mtp")
    assert bos_of(gguf) == (829 if begins else None)
    text = tmp_path / "text.txt"
    pairs, _ = tiny_texts(load_tokenizer(MODEL), 4)
    text.write_text(re.sub(r"<\|\w+\|>", "", "\n\n".join(prompt + turn for prompt, turn in pairs)))
    exact = ["-c", "512", "-t", "1", "-ctk", "f32", "-ctv", "f32", "-fa", "off"]
    for _ in range(6):  # its log is written by a thread, which on a busy machine is ended before the last line
        done = subprocess.run([tool("llama-perplexity"), "-m", gguf, "-f", text, *exact], capture_output=True, text=True)
        told = done.stdout + done.stderr
        if found := re.search(r"Final estimate: PPL = ([0-9.]+)", told):
            break
    assert found, f"ended with {done.returncode}: {told[-2000:]}"
    theirs = float(found[1])
    done = command("src/eval/moe_eval.py", "--model", model, "--text", text, "--tag", "t", "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    record = read_result(tmp_path / "t.json", "kl")
    assert record["metrics"]["ppl"] == pytest.approx(theirs, rel=1e-4)
    entry = record["data"][0]
    left = entry["tokens"] - 512 * entry["windows"]
    assert 0 <= left < 512 and f"{left:,} tokens behind them are left out" in done.stdout
    assert entry["prefix"] == prefix and record["metrics"]["tokens"] == 255 * entry["windows"]
