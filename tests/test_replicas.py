"""The engine of transformers: on several devices (here processes on the CPU) the same completions in one log; no default of a
checkpoint; a logit that is not finite, and what cannot be done, in one line. And vLLM's look at such logits."""

import json
import shutil
import sys
import time
import types

import pytest
import torch

import vllm_eval8
from backend import HfBackend, Replicas, Sampling, not_applied, stuck
from console import UserError
from hf_model import load_model, load_tokenizer, spread_map
from runner import get_benchmarks
from vllm_eval import VllmBackend

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def copies(random_tiny):
    found = Replicas(random_tiny, [CPU, CPU], batch=3)
    yield found
    found.close()


def test_two_copies_complete_what_one_does(random_tiny, copies):
    task = get_benchmarks(["tiny_math"])[0]
    one = HfBackend(random_tiny, batch=3)
    prompts = [one.render(task.messages(item)) for item in task.load(8)]
    for sampling in (Sampling(max_tokens=8), Sampling(temperature=1.0, max_tokens=8, seed=3)):
        expected = dict(one.generate(prompts, sampling))
        assert dict(copies.generate(prompts, sampling)) == expected and len(expected) == 8
    assert copies.render(task.messages(task.load(1)[0])) == prompts[0]


def test_what_a_copy_cannot_do_is_one_line(copies):
    with pytest.raises(UserError, match="the model's context is 2048"):
        list(copies.generate(["x " * 4000], Sampling(max_tokens=8)))
    for worker in copies.workers:  # the one that failed ends by itself
        worker.kill()
        worker.join()
    started = time.monotonic()
    with pytest.raises(UserError, match="a copy of the model ended with code"):
        list(copies.generate(["a"] * 7, Sampling(max_tokens=2)))
    assert time.monotonic() - started < 30


def test_the_evaluation_command_takes_devices(random_tiny, tmp_path, monkeypatch):
    arguments = ["vllm_eval8", "--model", str(random_tiny), "--benchmarks", "tiny_know", "--limit", "4", "--backend", "hf"]
    arguments += ["--out", str(tmp_path), "--temperature", "0"]
    for tag, more in (("one", []), ("copies", ["--devices", "cpu,cpu"]), ("spread", ["--devices", "cpu,cpu", "--spread"])):
        monkeypatch.setattr(sys, "argv", [*arguments, "--tag", tag, *more])
        vllm_eval8.main()
    logs = [(tmp_path / f"{tag}.samples.jsonl").read_text().splitlines() for tag in ("one", "copies", "spread")]
    assert sorted(logs[0]) == sorted(logs[1]) == sorted(logs[2]) and len(logs[0]) == 5
    assert json.loads((tmp_path / "copies.json").read_text())["devices"] == "cpu,cpu"


OBEYED_BY_TRANSFORMERS_ALONE = {
    "repetition_penalty": 5.0, "no_repeat_ngram_size": 1, "suppress_tokens": [3], "bad_words_ids": [[5], [6, 7]],
    "min_new_tokens": 6, "num_beams": 2, "forced_eos_token_id": 9, "typical_p": 0.2, "min_p": 0.9, "epsilon_cutoff": 0.3,
    "exponential_decay_length_penalty": [2, 3.0], "renormalize_logits": True, "begin_suppress_tokens": [3, 4], "max_time": 0.01,
    "sequence_bias": [[[8], 10.0]], "guidance_scale": 2.0,
}  # fmt: skip


def copied(source, out):
    for path in source.iterdir():
        (out / path.name).symlink_to(path)
    return out


def test_generation_config_changes_no_answer(random_tiny, tmp_path, capfd):
    """Each field alone, greedy and drawn: the answers of a checkpoint without it; what is not applied is said and recorded."""
    prompts = ["a b c a b c a b", "1 + 1 = 2, 1 + 1 ="]
    sampling = (Sampling(max_tokens=12), Sampling(temperature=1.0, top_k=50, max_tokens=12))
    backend = HfBackend(random_tiny)
    expected = [dict(backend.generate(prompts, each)) for each in sampling]
    assert backend.describe() == {} and "not applied" not in capfd.readouterr().err
    out = copied(random_tiny, tmp_path)
    (out / "generation_config.json").unlink(missing_ok=True)
    known = {"eos_token_id": 827, "temperature": 0.3, "top_k": 3, "top_p": 0.1, "do_sample": True, "max_length": 4}
    for name, value in OBEYED_BY_TRANSFORMERS_ALONE.items():
        (out / "generation_config.json").write_text(json.dumps({name: value, **known}))
        assert not_applied(out) == ({name: value} if name != "forced_eos_token_id" else {}), name
    known |= {name: OBEYED_BY_TRANSFORMERS_ALONE[name] for name in ("repetition_penalty", "no_repeat_ngram_size", "num_beams")}
    (out / "generation_config.json").write_text(json.dumps(known))
    backend = HfBackend(out)
    assert [dict(backend.generate(prompts, each)) for each in sampling] == expected
    told = backend.describe()["generation_config_not_applied"]
    assert set(told) == {"repetition_penalty", "no_repeat_ngram_size", "num_beams"}
    assert "generation_config.json: not applied, here or on any backend: repetition_penalty 5.0" in capfd.readouterr().err


def test_logits_that_are_not_finite_stop_a_run(random_tiny, tmp_path):
    """Of one row in a batch, on one copy or several: the module and the tensor; -inf, which masks a token, is none of them."""
    model = load_model(random_tiny)
    prompts = ["a", "a much longer prompt than that"]
    model.get_parameter("model.layers.2.mlp.experts.down_proj").data[:, 3, 4] = float("nan")
    model.save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(random_tiny / name, tmp_path)
    for start in (lambda: HfBackend(tmp_path), lambda: Replicas(tmp_path, [CPU, CPU])):
        with pytest.raises(UserError, match="model.layers.2.mlp.experts.down_proj: the weight contains NaN"):
            start()
    backend = HfBackend(random_tiny)
    backend.model.get_parameter("model.layers.2.mlp.experts.down_proj").data[:, 3, 4] = float("nan")
    with pytest.raises(UserError, match=r"token 1 of an answer.*model.layers.2.mlp.experts.down_proj holds NaN"):
        list(backend.generate(prompts, Sampling(max_tokens=4)))
    backend = HfBackend(random_tiny)
    head = backend.model.lm_head
    head.register_forward_hook(lambda m, a, out: out.masked_fill(torch.arange(out.shape[-1]) == 3, -torch.inf))
    assert len(list(backend.generate(prompts, Sampling(max_tokens=4)))) == 2
    head.weight.data[7] = 3e38
    with pytest.raises(UserError, match=r"begins at lm_head \(Linear\): its weights are finite and overflow"):
        list(backend.generate(prompts, Sampling(temperature=1.0, max_tokens=4)))


def test_vllm_looks_again_at_a_stuck_answer(random_tiny, monkeypatch):
    """One token over and over: the log-probability of one more must be a number. The engine stands for vLLM's."""
    assert stuck([7] * 40) and stuck([]) and stuck([827]) and stuck([1, 2] + [0] * 16) and not stuck([1, 2, 827])
    fake = types.SimpleNamespace(SamplingParams=lambda **given: types.SimpleNamespace(**given))
    monkeypatch.setitem(sys.modules, "vllm", fake)

    class Engine:
        def __init__(self, logprob):
            self.logprob, self.waiting = logprob, []

        def add_request(self, name, prompt, params):
            self.waiting.append((name, prompt["prompt_token_ids"], params))

        def has_unfinished_requests(self):
            return bool(self.waiting)

        def step(self):
            name, prompt, params = self.waiting.pop(0)
            rows = [{0: types.SimpleNamespace(logprob=self.logprob)}] if hasattr(params, "logprobs") else None
            output = types.SimpleNamespace(token_ids=[0] * params.max_tokens, logprobs=rows)
            return [types.SimpleNamespace(request_id=name, finished=True, prompt_token_ids=prompt, outputs=[output])]

    backend = VllmBackend.__new__(VllmBackend)
    backend.tokenizer, backend.model, backend.ends, backend.context = load_tokenizer(random_tiny), random_tiny, [827], 64
    backend.engine = Engine(-0.5)
    ((_, done),) = backend.generate(["a"], Sampling(max_tokens=20))
    assert done.tokens == 20 and done.finish_reason == "length"
    backend.engine = Engine(float("nan"))
    with pytest.raises(UserError, match="vLLM's logits are NaN or infinite"):
        list(backend.generate(["a"], Sampling(max_tokens=20)))


def test_layers_lie_in_equal_runs(random_tiny):
    devices = [torch.device("cuda", index) for index in range(3)]
    places = spread_map(random_tiny, devices)  # four layers
    runs = [places[f"model.layers.{index}"].index for index in range(4)]
    assert runs == [0, 0, 1, 2] and places["model.embed_tokens"].index == 0
    assert places["model.norm"].index == places["lm_head"].index == 2
    modules = {name.split(".layers.")[0] if ".layers." in name else name for name in places}
    state = load_model(random_tiny).state_dict()
    assert all(any(key.startswith(f"{name}.") for name in places) for key in state), modules


def test_a_token_without_an_embedding_is_one_line(random_tiny, monkeypatch):
    """An added token whose id lies beyond the model's vocabulary would be an IndexError, on a GPU a broken device."""
    backend = HfBackend(random_tiny)
    monkeypatch.setattr(backend.model, "get_input_embeddings", lambda: types.SimpleNamespace(weight=torch.zeros(829, 1)))
    with pytest.raises(UserError, match=r"the prompt's token '<\|im_start\|>' is 829; the model has 829 embeddings"):
        list(backend.generate(["<|im_start|>user"], Sampling(max_tokens=2)))
