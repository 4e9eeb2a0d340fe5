"""The evaluation commands on a checkpoint with random weights: resuming, batching, KL, bad input."""

import json

import pytest
import torch

from backend import HfBackend, Sampling
from kl import divergence, summarize_kl
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
