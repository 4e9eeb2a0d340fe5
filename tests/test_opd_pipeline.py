"""The phases of recovery end to end on an untrained model: kills, two processes, what does not belong together."""

import hashlib
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time

import pytest
import torch
from conftest import REPO
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import merge_adapter
import opd_score
from console import UserError, file_sha256
from fsdp_setup import World, own_rows
from opd_budget import Plan, memory, shape_of
from opd_data import AdapterSettings, ScoredRollouts, read_rollouts
from opd_student import build_student
from quant_save import quantize_checkpoint
from recipe import Recipe, read_recipe

GENERATE = ["--tasks", "tiny_know,tiny_math", "--limit", 4, "--max-tokens", 12, "--backend", "hf", "--temperature", 1.0]
TRAIN = ["--steps", 5, "--rows", 4, "--micro-rows", 2, "--rank", 4, "--lr", 0.1, "--save-every", 1, "--warmup", 0]
ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def cached(random_tiny, tmp_path_factory, one_thread):
    """A 2-bit student with its rollouts and scores."""
    path = tmp_path_factory.mktemp("opd")
    quantize_checkpoint(random_tiny, path / "q", Recipe(2, 4, 128, 1))
    for script, arguments in (
        ("opd_gen", ["--model", path / "q", "--out", path / "rollouts", *GENERATE]),
        ("opd_score", ["--teacher", random_tiny, "--rollouts", path / "rollouts", "--out", path / "scores", "--k", 20]),
    ):
        assert run(script, *arguments) == (0, "")
    return path


def run(script, *arguments):
    """A command in this process: (exit code, its one line of error). Starting Python takes longer than what is tested."""
    module, before = importlib.import_module(script), sys.argv
    sys.argv = [script, *map(str, arguments)]
    try:
        return module.main() or 0, ""
    except UserError as error:
        return 2, str(error)
    finally:
        sys.argv = before


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """As in the processes that are started: sums of several threads differ in their last bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def started(*command):
    return subprocess.Popen(list(map(str, [sys.executable, *command])), env=ONE_THREAD, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True)  # fmt: skip


def training(cached, teacher, out, *more):
    paths = ["--student", cached / "q", "--teacher", teacher, "--rollouts", cached / "rollouts", "--scores", cached / "scores"]
    return [*paths, "--out", out, *TRAIN, *more]


def digests(directory):
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(directory.iterdir()) if p.name != "phase.json"}


def test_rollouts_and_scores(cached, random_tiny, tmp_path):
    rows, manifest = read_rollouts(cached / "rollouts")
    scores = ScoredRollouts(cached / "scores")
    assert len(rows) == len(scores) == 8 and manifest["all"]["samples"] == 8
    assert all("-train-" in row["id"] for row in rows)
    example = scores[3]
    assert len(example.teacher.ids) == len(example.ids) - example.prompt == scores.answers[3]
    assert torch.allclose(example.teacher.events().exp().sum(-1), torch.ones(scores.answers[3]), atol=1e-5)
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(random_tiny, dtype=torch.float32)
    with torch.no_grad():
        logits = model(input_ids=example.ids[None], use_cache=False).logits[0, example.prompt - 1 : -1]
    torch.testing.assert_close(example.teacher.logp, logits.log_softmax(-1).gather(-1, example.teacher.ids), rtol=0, atol=1e-4)
    # a run killed between two samples makes the same ones again
    shutil.copytree(cached / "rollouts", tmp_path / "cut")
    lines = (cached / "rollouts/samples.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "cut/samples.jsonl").write_text("".join(lines[:3]) + lines[3][:20])
    (tmp_path / "cut/rollouts.jsonl").unlink()
    assert run("opd_gen", "--model", cached / "q", "--out", tmp_path / "cut", *GENERATE) == (0, "")
    assert file_sha256(tmp_path / "cut/rollouts.jsonl") == manifest["sha256"]
    assert sorted((tmp_path / "cut/samples.jsonl").read_text().splitlines(keepends=True)) == sorted(lines)


@pytest.fixture(scope="module")
def whole(cached, random_tiny, tmp_path_factory):
    """The adapter of an undisturbed run."""
    path = tmp_path_factory.mktemp("adapter") / "whole"
    assert run("opd_train_fsdp", *training(cached, random_tiny, path)) == (0, "")
    return path


@pytest.mark.slow
def test_killed_training_ends_with_the_same_bytes_and_merges(cached, whole, random_tiny, tmp_path, capsys):
    process = started(REPO / "src/distill/opd_train_fsdp.py", *training(cached, random_tiny, tmp_path / "cut"))
    while not (tmp_path / "cut/state.safetensors").exists() and process.poll() is None:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL and not (tmp_path / "cut/adapter.json").exists()
    assert run("opd_train_fsdp", *training(cached, random_tiny, tmp_path / "cut")) == (0, "")
    assert "from step 0" not in capsys.readouterr().out
    assert digests(whole)["adapter.safetensors"] == digests(tmp_path / "cut")["adapter.safetensors"]
    assert digests(whole)["adapter.json"] == digests(tmp_path / "cut")["adapter.json"]
    facts = json.loads((whole / "phase.json").read_text())
    assert facts["peak_rss_mib"] > 0 and facts["tokens"] > 0 and facts["steps"] == 5
    curve = json.loads((whole / "adapter.json").read_text())["curve"]
    assert all(norm > 0 for _, _, norm in curve)
    models = ["--student", cached / "q", "--teacher", random_tiny]
    assert run("merge_adapter", *models, "--adapter", tmp_path / "cut", "--out", tmp_path / "r") == (0, "")
    assert read_recipe(tmp_path / "r") == read_recipe(cached / "q")
    recovery = json.loads((tmp_path / "r/recipe.json").read_text())["recovery"]
    assert recovery["changed_weights"] > 0 and recovery["adapter_sha256"] == file_sha256(tmp_path / "cut/adapter.safetensors")
    # an adapter of another rank, and of another model
    described = json.loads((tmp_path / "cut/adapter.json").read_text())
    described["adapter"]["rank"] = 8
    (tmp_path / "cut/adapter.json").write_text(json.dumps(described))
    code, error = run("merge_adapter", *models, "--adapter", tmp_path / "cut", "--out", tmp_path / "r2")
    assert code == 2 and "has rank 4, adapter.json says 8" in error and "\n" not in error
    other = ["--student", tmp_path / "r", "--teacher", random_tiny]
    code, error = run("merge_adapter", *other, "--adapter", whole, "--out", tmp_path / "r2")
    assert code == 2 and "trained on another student" in error and "\n" not in error
    assert not (tmp_path / "r2").exists()


def test_scores_and_merge_go_on_after_a_crash(cached, whole, random_tiny, tmp_path, monkeypatch):
    def dies(*_):
        raise OSError("stands for a kill")

    score = [
        "opd_score",
        "--teacher",
        random_tiny,
        "--rollouts",
        cached / "rollouts",
        "--k",
        20,
        "--shard-rollouts",
        3,
        "--out",
    ]
    assert run(*score, tmp_path / "s1") == (0, "")
    with monkeypatch.context() as patch:
        original, calls = opd_score.write_shard, []

        def once(*arguments):
            calls.append(1)
            return original(*arguments) if len(calls) == 1 else dies()

        patch.setattr(opd_score, "write_shard", once)
        with pytest.raises(OSError, match="stands for a kill"):
            run(*score, tmp_path / "s2")
    assert run(*score, tmp_path / "s2") == (0, "")
    assert digests(tmp_path / "s1") == digests(tmp_path / "s2") and len(digests(tmp_path / "s1")) == 4
    bake = [
        "merge_adapter",
        "--student",
        cached / "q",
        "--teacher",
        random_tiny,
        "--adapter",
        whole,
        "--shard-gib",
        0.001,
        "--out",
    ]
    assert run(*bake, tmp_path / "r1") == (0, "")
    with monkeypatch.context() as patch:
        patch.setattr(merge_adapter, "recovery_record", dies)
        with pytest.raises(OSError, match="stands for a kill"):
            run(*bake, tmp_path / "r2")
    assert not (tmp_path / "r2").exists() and run(*bake, tmp_path / "r2") == (0, "")
    assert digests(tmp_path / "r1") == digests(tmp_path / "r2")


@pytest.mark.parametrize(("rows", "size"), [(256, 4), (16, 3), (4, 3), (1, 2)])
def test_own_rows_are_those_of_the_shard(rows, size):
    found = [torch.arange(rows)[own_rows(rows, World(rank, size, torch.device("cpu")))].tolist() for rank in range(size)]
    chunks = [chunk.tolist() for chunk in torch.arange(rows).chunk(size)]
    assert found == chunks + [[]] * (size - len(chunks))


@pytest.mark.slow
def test_two_processes_with_fsdp_equal_one(cached, whole, random_tiny, tmp_path):
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    process = started(*torchrun, REPO / "src/distill/opd_train_fsdp.py", *training(cached, random_tiny, tmp_path / "two"))
    _, errors = process.communicate(timeout=200)
    assert process.returncode == 0, errors[-3000:]
    one, two = (json.loads((path / "adapter.json").read_text())["curve"] for path in (whole, tmp_path / "two"))
    assert len(one) == 5 and one[-1][0] == 5
    for (_, loss, norm), (_, other_loss, other_norm) in zip(one, two, strict=True):
        assert loss == pytest.approx(other_loss, abs=1e-4) and norm == pytest.approx(other_norm, rel=1e-3, abs=1e-4)
    a, b = (load_file(path / "adapter.safetensors") for path in (whole, tmp_path / "two"))
    assert a.keys() == b.keys()
    assert all(torch.allclose(a[name], b[name], atol=1e-4) for name in a), max((a[n] - b[n]).abs().max() for n in a)
    bake = ["merge_adapter", "--student", cached / "q", "--teacher", random_tiny, "--adapter", tmp_path / "two"]
    assert run(*bake, "--out", tmp_path / "merged") == (0, "")  # to the digests that the processes took in turn


def test_what_does_not_belong_together_is_one_line(cached, random_tiny, tmp_path):
    def refused(message, cached, *more):
        code, error = run("opd_train_fsdp", *training(cached, random_tiny, tmp_path / "a", *more))
        assert code == 2 and message in error and "\n" not in error

    shutil.copytree(cached, tmp_path / "c")
    lines = (tmp_path / "c/rollouts/rollouts.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "c/rollouts/rollouts.jsonl").write_text("".join(lines[1:]))
    refused("not the rollouts that rollouts.json describes", tmp_path / "c")
    manifest = json.loads((tmp_path / "c/rollouts/rollouts.json").read_text())
    manifest["sha256"] = file_sha256(tmp_path / "c/rollouts/rollouts.jsonl")
    (tmp_path / "c/rollouts/rollouts.json").write_text(json.dumps(manifest))
    refused("scores of other rollouts", tmp_path / "c")
    refused("is no multiple of --micro-rows", cached, "--rows", 3)


def test_a_loss_that_is_not_finite_keeps_the_last_good_state(cached, whole, random_tiny, tmp_path):
    shutil.copytree(whole, tmp_path / "a")
    (tmp_path / "a/adapter.json").unlink()
    with safe_open(tmp_path / "a/state.safetensors", "pt") as file:
        facts = json.loads(file.metadata()["state"])
    state = load_file(tmp_path / "a/state.safetensors")
    save_file(state, tmp_path / "a/state.safetensors", {"state": json.dumps(facts | {"step": 2})})
    good = file_sha256(tmp_path / "a/state.safetensors")
    shutil.copytree(cached, tmp_path / "c")
    for shard in (tmp_path / "c/scores").glob("*.safetensors"):
        tensors = load_file(shard)
        tensors["logp"][:, 0] = float("nan")
        save_file(tensors, shard)
    code, error = run("opd_train_fsdp", *training(tmp_path / "c", random_tiny, tmp_path / "a"))
    assert code == 2 and error.startswith("step 3: the loss is nan") and "state.safetensors, step 2;" in error
    assert file_sha256(tmp_path / "a/state.safetensors") == good and not (tmp_path / "a/adapter.json").exists()


def test_an_adapter_goes_on_from_another_of_its_kind(cached, whole, random_tiny, tmp_path):
    start = ["--init", whole, "--steps", 0]
    assert run("opd_train_fsdp", *training(cached, random_tiny, tmp_path / "same"), *start) == (0, "")
    one, two = (load_file(path / "adapter.safetensors") for path in (whole, tmp_path / "same"))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    first, second = (json.loads((path / "adapter.json").read_text()) for path in (whole, tmp_path / "same"))
    assert first["parameters"] == second["parameters"]  # the same weights on the grid
    assert second["data"]["init_sha256"] == file_sha256(whole / "adapter.safetensors")
    code, error = run("opd_train_fsdp", *training(cached, random_tiny, tmp_path / "other"), *start, "--rank", 8)
    assert code == 2 and "these settings need" in error and "same rank" in error and "\n" not in error
    swapped = ["--student", random_tiny]
    code, error = run("opd_train_fsdp", *training(cached, random_tiny, tmp_path / "other"), *start, *swapped)
    assert code == 2 and "an adapter for another student" in error and "\n" not in error


def test_prompts_are_scored_where_that_is_asked_for(cached, random_tiny, tmp_path):
    paths = ["--teacher", random_tiny, "--rollouts", cached / "rollouts", "--out", tmp_path / "s", "--k", 20]
    assert run("opd_score", *paths, "--score-prompts") == (0, "")
    part, all_of_it = ScoredRollouts(cached / "scores"), ScoredRollouts(tmp_path / "s")
    assert part.lengths == all_of_it.lengths and all_of_it.answers == [length - 1 for length in part.lengths]
    assert part.index["retokenized"] == all_of_it.index["retokenized"]
    for number in (0, 5):
        own, other = part[number].teacher, all_of_it[number].teacher
        torch.testing.assert_close(other.logp[-len(own.logp) :], own.logp)


def test_the_budget_counts_the_bytes_of_a_student(cached, random_tiny):
    world = World(0, 1, torch.device("cpu"))
    student = build_student(cached / "q", random_tiny, AdapterSettings(rank=4), world, "forward_kl", 1.0, False)
    held = {True: 0, False: 0}
    for parameter in student.parameters():
        size = 2 if parameter.dtype is torch.float32 and not parameter.requires_grad else parameter.element_size()
        held[parameter.requires_grad] += parameter.numel() * size  # what is not on a grid is bfloat16 on a GPU
    plan = Plan(gpus=1, rank=4)
    frozen, adapters = list(memory(shape_of(random_tiny), plan).values())[:2]
    assert (held[False], 4 * held[True]) == (frozen, adapters)  # value, gradient and two moments


PHASES = textwrap.dedent("""
    # The phases in forks of one process: each attempt costs what it computes, not the start of five processes.
    import os, runpy, sys
    from pathlib import Path
    from killer import attempt
    import distill_run as d, merge_adapter, moe_eval, opd_gen, opd_score, opd_train_fsdp, quant_save
    import transformers.models.qwen3_5_moe.modeling_qwen3_5_moe
    from settings import parse_settings

    def step(script, *arguments, processes=1):
        sys.argv = [script, *map(str, arguments)]
        try:
            runpy.run_path(script, run_name="__main__")
        except SystemExit as end:
            assert not end.code, script

    def run(name, mark=None):
        os.environ["WORK"] = str(work := Path(sys.argv[1]) / name)
        config, _ = parse_settings(d.DistillSettings, "", argv=["--config", "configs/opd_tiny.env"])
        act = lambda: d.recover(config, work / "record.json", step)
        return attempt(act, work, mark and (lambda number: any(work.glob(mark))))[0]

    for mark in sys.argv[2:]:
        assert not run("cut", mark) and not (Path(sys.argv[1]) / "cut/recovered").exists(), mark
    assert run("cut") and run("whole")
""")


@pytest.mark.slow
def test_killed_in_every_phase_ends_with_the_same_bytes(random_tiny, tmp_path):
    small = {"TEACHER": random_tiny, "TASKS": "tiny_know,tiny_math", "LIMIT": 4, "MAX_TOKENS": 12, "CHUNK": 2, "K": 8}
    small |= {"TRAJECTORIES": "student", "FINISHED_ONLY": 0, "BACKEND": "hf", "SCORE_BATCH": 2, "KL_ITEMS": 1, "TAG": "killed"}
    small |= {"STEPS": 4, "ROWS": 4, "MICRO_ROWS": 4, "RANK": 4, "LR": 0.1, "WARMUP": 0, "SAVE_EVERY": 1}
    marks = ("rollouts/samples.jsonl", ".scores.partial/job.json", "adapter/state.safetensors", ".recovered.partial/job.json")
    environment = ONE_THREAD | {key: str(value) for key, value in small.items()}
    environment["PYTHONPATH"] += os.pathsep + str(REPO / "tests")
    process = subprocess.run([sys.executable, "-c", PHASES, tmp_path, *marks], env=environment, cwd=REPO, capture_output=True,
                             text=True, timeout=400)  # fmt: skip
    assert process.returncode == 0, process.stderr[-3000:]
    for name in ("rollouts/rollouts.jsonl", "adapter/adapter.safetensors", "recovered/model.safetensors"):
        assert file_sha256(tmp_path / "cut" / name) == file_sha256(tmp_path / "whole" / name), name
