"""The evaluation commands on a checkpoint with random weights: resuming, batching, KL, bad input."""

import json

import pytest
import torch

from backend import HfBackend, Sampling
from hf_model import load_model, load_tokenizer, text_ids
from kl import divergence, summarize_kl, tiny_texts
from page_results import AXES
from quant_save import quantize_checkpoint
from recipe import Recipe
from runner import get_benchmarks


def test_a_batch_generates_what_each_prompt_generates_alone(random_tiny):
    task = get_benchmarks(["tiny_math"])[0]
    backend = HfBackend(random_tiny, batch=5)
    prompts = [backend.render(task.messages(item)) for item in task.load(5)]
    assert len({len(prompt) for prompt in prompts}) > 1  # padding is exercised
    together = dict(backend.generate(prompts, Sampling(max_tokens=12)))
    backend.batch = 1
    assert together == dict(backend.generate(prompts, Sampling(max_tokens=12)))
    assert all(completion.tokens <= 12 for completion in together.values())


def test_divergence_is_that_of_torch_and_zero_for_equal_models():
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(50, 30, generator=generator) * 3 for _ in range(2))
    kl, agree = divergence(a, b)
    expected = torch.distributions.kl_divergence(*(torch.distributions.Categorical(logits=x) for x in (a, b)))
    torch.testing.assert_close(kl, expected, rtol=1e-4, atol=1e-5)
    assert agree.equal(a.argmax(-1) == b.argmax(-1))
    zero, same = divergence(a, a)
    assert not zero.any() and same.all()
    assert summarize_kl(kl.numpy(), agree.numpy())["mean"] == pytest.approx(expected.mean().item(), rel=1e-4)


def test_an_interrupted_run_resumes_to_the_same_log(random_tiny, tmp_path, command):
    arguments = ["src/eval/vllm_eval8.py", "--model", random_tiny, "--tag", "a", "--benchmarks", "tiny_know,tiny_math"]
    arguments += ["--limit", "3", "--backend", "hf", "--out", tmp_path]
    done = command(*arguments)
    assert done.returncode == 0 and "tiny_know" in done.stdout, done.stderr
    log, result = tmp_path / "a.samples.jsonl", tmp_path / "a.json"
    rows, record = log.read_text().splitlines(keepends=True), json.loads(result.read_text())
    assert record["metrics"]["tiny_know"]["n"] == 3 and len(rows) == 7 and record["model"]["weights_sha256"]
    again = command(*arguments)
    assert again.returncode == 2 and again.stderr.startswith("error: ") and "exists" in again.stderr
    planned = command(*arguments, "--dry-run")  # a plan is shown all the same
    assert planned.returncode == 0 and "a.json: exists; give another --tag" in planned.stdout and "at most" in planned.stdout
    result.unlink()
    log.write_text("".join(rows[:5]) + rows[5][:20])  # killed in the second benchmark, while a sample was written
    assert command(*arguments).returncode == 0
    assert sorted(log.read_text().splitlines()) == sorted("".join(rows).splitlines())
    assert [entry["chosen"] for entry in record["data"]] == ["first of a seeded generator"] * 2
    assert json.loads(result.read_text())["metrics"] == record["metrics"]


def test_kl_of_a_quantized_model(random_tiny, tmp_path, command):
    quantize_checkpoint(random_tiny, tmp_path / "q", Recipe(3, 4, 128, 1))
    arguments = ["--reference", random_tiny, "--items", "1", "--out", tmp_path]
    for tag, model in (("same", random_tiny), ("q", tmp_path / "q")):
        done = command("src/eval/moe_eval.py", "--model", model, "--tag", tag, *arguments)
        assert done.returncode == 0, done.stderr
    same, quantized = (json.loads((tmp_path / f"{tag}.json").read_text()) for tag in ("same", "q"))
    assert same["metrics"]["kl"]["mean"] == 0 and same["metrics"]["kl"]["top1"] == 1
    assert quantized["metrics"]["kl"]["mean"] > 1e-4 and quantized["recipe"]["expert_bits"] == 3
    routing = same["metrics"]["routing"]
    assert routing["layers"] == 4 and 0 < routing["entropy_min"] <= routing["entropy_mean"] <= 1
    assert same["judge"] == "transformers, float32"


def test_models_of_several_calls_are_compared_on_the_same_transcripts(random_tiny, tmp_path, command):
    """Against logits of the whole model, each transcript by itself; what one call leaves, the next compares with."""
    for name, steps in (("a", 1), ("b", 16), ("c", 4)):
        quantize_checkpoint(random_tiny, tmp_path / name, Recipe(3, 4, 128, steps))

    def run(*more):
        return command("src/eval/moe_eval.py", "--reference", random_tiny, "--out", tmp_path, "--pairs", "p", *more)

    def models(*names):
        return [word for name in names for word in ("--model", tmp_path / name, "--tag", name)]

    first = run(*models("a", "b"), "--items", 2)
    assert first.returncode == 0 and "b / a: KL " in first.stdout, first.stderr
    done = run(*models("c"), "--items", 2, "--pair", "c/a")
    assert done.returncode == 0 and "c / a: KL " in done.stdout and "b / a" not in done.stdout, done.stderr
    records = {name: json.loads((tmp_path / f"{name}.json").read_text()) for name in "abcp"}
    means = {name: records[name]["metrics"]["kl"]["mean"] for name in "abc"}
    for base, other in ("ab", "ac"):
        found = records["p"]["metrics"]["pairs"][f"{base}__{other}"]
        assert found["ratio"] == pytest.approx(means[other] / means[base], rel=1e-3) and found["documents"] == 8
        assert found["ratio_low"] <= found["ratio"] <= found["ratio_high"]
    metrics, tokenizer, values, answers = records["a"]["metrics"], load_tokenizer(random_tiny), [], []
    both = [load_model(path) for path in (random_tiny, tmp_path / "a")]
    for prompt, turn in tiny_texts(tokenizer, 2)[0]:
        head = text_ids(tokenizer, prompt)
        ids = torch.tensor([head + text_ids(tokenizer, turn)])
        with torch.inference_mode():
            p, q = (model(ids, use_cache=False).logits[0, :-1].double().log_softmax(-1) for model in both)
        values.append((p.exp() * (p - q)).sum(-1))
        answers.append(values[-1][len(head) - 1 :])
    whole, answer = torch.cat(values), torch.cat(answers)
    assert metrics["tokens"] == len(whole) and metrics["kl"]["mean"] == pytest.approx(whole.mean().item(), rel=1e-3)
    assert metrics["kl_answer"]["mean"] == pytest.approx(answer.mean().item(), rel=1e-3)
    buckets = metrics["confidence"].values()
    assert sum(own["positions"] for own in buckets) == len(whole)
    assert sum(own.get("share", 0) for own in buckets) == pytest.approx(1)
    assert {name: own["documents"] for name, own in metrics["strata"].items()} == dict.fromkeys(AXES, 2)
    for more, message in (
        ((*models("c"), "--items", 1, "--force"), "judged on another data"),
        ((*models("c"), "--items", 2, "--force", "--pair", "c/z"), "--pair c/z: give TAG/BASE, two of a, b, c"),
        ((*models("c"), "--model", random_tiny), "2 --model and 1 --tag"),
    ):
        refused = run(*more)
        assert refused.returncode == 2 and message in refused.stderr, refused.stderr


@pytest.mark.parametrize(
    "change,message",
    [
        (["--benchmarks", "gsm9k"], "unknown benchmark 'gsm9k'"),
        (["--model", "nowhere"], "nowhere: no such model directory"),
        (["--backend", "vlm"], "--backend vlm: expected auto, vllm"),
        (["--tag", "../x"], "--tag"),
        (["--limit", "0"], "--limit 0"),
        (["--benchmarks", "gsm8k,math500", "--data-dir", "data"], "data: has no math500.jsonl"),  # gsm8k is there
        (["--benchmarks", "tiny_know,tau2"], "tau2 is a dialogue"),
        (
            ["--benchmarks", "tiny_know,tool_calls", "--backend", "hf"],
            "tool_calls: a dialogue with tools, which a server holds",
        ),
        (["--out", "data/gsm8k.jsonl"], "--out data/gsm8k.jsonl: data/gsm8k.jsonl is a file"),
        (["--out", "data/gsm8k.jsonl/eval"], "data/gsm8k.jsonl is a file"),
        (["--model", "data"], "data: a directory that holds a GGUF; give the file, --model data/x.gguf"),
    ],
)
def test_bad_input_is_one_line(random_tiny, tmp_path, command, change, message):
    """Before an engine starts and anything is written; all benchmarks are opened first."""
    out, data = tmp_path / "out", tmp_path / "data"
    data.mkdir()
    (data / "gsm8k.jsonl").write_text(json.dumps({"question": "1+1?", "answer": "#### 2"}) + "\n")
    (data / "x.gguf").touch()
    done = command("src/eval/vllm_eval8.py", "--model", random_tiny, "--tag", "a", "--out", out, *change, cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: ") and message in done.stderr and not out.exists()
