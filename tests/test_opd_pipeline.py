"""The phases of recovery end to end on an untrained model: kills, two processes, what does not belong together."""

import hashlib
import importlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from conftest import REPO
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import distill_run
import merge_adapter
import opd_score
from checkpoint import Checkpoint, read_manifest
from console import UserError, file_sha256
from families import Role, roles_of
from fsdp_setup import World, own_rows
from hf_model import load_tokenizer
from opd_budget import Plan, memory, shape_of
from opd_data import AdapterSettings, DistillSettings, ScoredRollouts, read_rollouts
from opd_student import build_student
from quant_save import quantize_checkpoint
from recipe import Recipe, read_recipe
from sample_log import log_line, sealed
from settings import parse_settings

GENERATE = ["--tasks", "tiny_know,tiny_math", "--limit", 4, "--max-tokens", 12, "--backend", "hf", "--temperature", 1.0]
TRAIN = ["--steps", 5, "--rows", 4, "--micro-rows", 2, "--rank", 4, "--lr", 0.1, "--save-every", 1, "--warmup", 0, "--norms"]
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
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(directory.glob("*.*")) if p.name != "phase.json"}


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


def wait_for_state(out, process):
    while not list(out.glob("state/*/.metadata")) and process.poll() is None:
        time.sleep(0.001)


@pytest.mark.slow
def test_killed_training_ends_with_the_same_bytes_and_merges(cached, whole, random_tiny, tmp_path, capsys):
    process = started(REPO / "src/distill/opd_train_fsdp.py", *training(cached, random_tiny, tmp_path / "cut"))
    wait_for_state(tmp_path / "cut", process)
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


def test_scores_and_merge_go_on_after_a_crash(cached, whole, random_tiny, tmp_path, monkeypatch, capsys):
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
    all_tokens, part = (json.loads((tmp_path / name / "phase.json").read_text())["tokens"] for name in ("s1", "s2"))
    assert 0 < part < all_tokens  # of the shards that were missing
    assert run(*score, tmp_path / "s2") == (0, "") and "nothing is left to score" in capsys.readouterr().out
    refused(*score[:1], [*score[1:4], cached / "rollouts", "--k", 19, "--out", tmp_path / "s2"], "scores of something else (k ")
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


def same_within_rounding(whole, other):
    """The losses, the norms and the adapter of two runs."""
    one, two = (json.loads((path / "adapter.json").read_text())["curve"] for path in (whole, other))
    assert len(one) == 5 and one[-1][0] == 5
    for (_, loss, norm), (_, other_loss, other_norm) in zip(one, two, strict=True):
        assert loss == pytest.approx(other_loss, abs=1e-4) and norm == pytest.approx(other_norm, rel=1e-3, abs=1e-4)
    a, b = (load_file(path / "adapter.safetensors") for path in (whole, other))
    assert a.keys() == b.keys()
    assert all(torch.allclose(a[name], b[name], atol=1e-4) for name in a), max((a[n] - b[n]).abs().max() for n in a)


NODE = """
import sys, distill_run as d
rank, meet, processes, *command = sys.argv[1:]
nodes = d.Nodes(2, int(rank), meet) if meet else d.ONE_NODE
d.run_cli(lambda: d.step(*command, processes=int(processes), nodes=nodes))
"""


@pytest.mark.slow
def test_two_processes_with_fsdp_equal_one(cached, whole, random_tiny, tmp_path):
    script = "src/distill/opd_train_fsdp.py"
    process = started("-c", NODE, 0, "", 2, script, *training(cached, random_tiny, tmp_path / "two"))
    _, errors = process.communicate(timeout=200)
    assert process.returncode == 0, errors[-3000:]
    same_within_rounding(whole, tmp_path / "two")
    bake = ["merge_adapter", "--student", cached / "q", "--teacher", random_tiny, "--adapter", tmp_path / "two"]
    assert run(*bake, "--out", tmp_path / "merged") == (0, "")  # to the digests that the processes took in turn


@pytest.mark.slow
@pytest.mark.parametrize("lost", [1, 0])  # node 0 holds the rendezvous: whether that or a collective fails first is chance
def test_two_nodes_lose_one_and_go_on(cached, whole, random_tiny, tmp_path, lost):
    """kill -9 of one node's agent: its process dies too, the other node ends with one line; the saved state goes on with two
    nodes, and with one process, to the losses and the adapter of a run of one."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        meet = f"localhost:{free.getsockname()[1]}"

    def node(rank):
        script = "src/distill/opd_train_fsdp.py"
        return started("-c", NODE, rank, meet, 1, script, *training(cached, random_tiny, tmp_path / "cut"))

    nodes = [node(0), node(1)]
    wait_for_state(tmp_path / "cut", nodes[0])
    nodes[lost].kill()
    out, errors = nodes[1 - lost].communicate(timeout=60)
    line = errors.strip().splitlines()[-1]
    assert nodes[1 - lost].returncode == 2 and line.startswith("error: training stopped: ") and " gone" in line, errors
    assert line.endswith("the same command on every node goes on from the last saved state") and "Traceback" not in errors
    nodes[lost].communicate(timeout=20)  # ends only when its process, which holds the pipe, is gone too
    assert not (tmp_path / "cut/adapter.json").exists()
    shutil.copytree(tmp_path / "cut", tmp_path / "one")
    assert run("opd_train_fsdp", *training(cached, random_tiny, tmp_path / "one")) == (0, "")
    same_within_rounding(whole, tmp_path / "one")
    if lost == 0:  # one start of two nodes is enough
        return
    nodes = [node(0), node(1)]
    texts = [process.communicate(timeout=200) for process in nodes]
    assert [process.returncode for process in nodes] == [0, 0], texts
    assert "from step 0" not in "".join(out for out, _ in texts) and "on 2 x cpu; from step" in "".join(out for out, _ in texts)
    same_within_rounding(whole, tmp_path / "cut")


def test_a_node_that_is_not_the_first_waits_and_trains(cached, random_tiny, tmp_path, monkeypatch):
    values = {
        "TEACHER": random_tiny,
        "STUDENT": cached / "q",
        "CACHE": cached,
        "WORK": tmp_path / "w",
        "NNODES": 2,
        "RDZV": "a:1",
    }
    values |= {"ROWS": 4, "MICRO_ROWS": 2, "SCORE_TEMPERATURE": 1.0, "K": 20}
    calls = []

    def run_of(**more):
        for key, value in (values | more).items():
            monkeypatch.setenv(key, str(value))
        config, _ = parse_settings(DistillSettings, "", argv=["--config", str(REPO / "configs/opd_tiny.env")])
        return distill_run.Run(config, tmp_path / "r.json", lambda script, *_, **how: calls.append((Path(script).stem, how)))

    def first(_):
        run_of().claim()

    monkeypatch.setattr(distill_run.time, "sleep", first)  # while the other node waits
    run_of(NODE_RANK=1).join()
    assert calls == [("opd_train_fsdp", {"processes": 1, "nodes": (2, 1, "a:1")})]
    run_of(NODE_RANK=0, NNODES=1, PARALLEL=9).claim()  # with another number of processes, or servers, it is the same run
    calls.clear()  # without CACHE it scores too
    shutil.copytree(cached / "rollouts", tmp_path / "w2/rollouts")
    own = run_of(NODE_RANK=1, NNODES=2, CACHE="", TRAJECTORIES="student", WORK=tmp_path / "w2")
    own.claim()
    shown = own.step
    own.step = lambda script, *a, **k: (
        shown(script, **k),
        "score" in script and shutil.copytree(cached / "scores", own.sources[0].scores),
    )
    own.join()
    assert [name for name, _ in calls] == ["opd_score", "opd_train_fsdp"]
    for more, said in (
        ({"NODE_RANK": 2}, "NODE_RANK=2 of NNODES=2: the nodes are numbered from 0"),
        ({"RDZV": "host"}, "RDZV=host: 2 nodes need HOST:PORT"),
        ({"NNODES": 4}, "no multiple of MICRO_ROWS x PROCESSES x NNODES = 8"),
    ):
        with pytest.raises(UserError, match=said):
            run_of(**{"NODE_RANK": 0} | more)


def refused(script, arguments, said):
    code, error = run(script, *arguments)
    assert code == 2 and said in error and "\n" not in error, error


def changed_rollouts(directory, change):
    """The rollouts of a directory with other lines, and a manifest that fits them."""
    lines = (directory / "rollouts.jsonl").read_text().splitlines()
    (directory / "rollouts.jsonl").write_text("\n".join(change(lines)) + "\n")
    manifest = json.loads((directory / "rollouts.json").read_text())
    manifest["sha256"] = file_sha256(directory / "rollouts.jsonl")
    (directory / "rollouts.json").write_text(json.dumps(manifest))


def with_row(**changes):
    return lambda lines: [*lines[:2], json.dumps(json.loads(lines[2]) | changes), *lines[3:]]


def test_what_does_not_belong_together_is_one_line(cached, random_tiny, tmp_path):
    shutil.copytree(cached, tmp_path / "c")
    rollouts, train = tmp_path / "c/rollouts", training(tmp_path / "c", random_tiny, tmp_path / "a")
    lines = (rollouts / "rollouts.jsonl").read_text().splitlines(keepends=True)
    (rollouts / "rollouts.jsonl").write_text("".join(lines[1:]))
    refused("opd_train_fsdp", train, "not the rollouts that rollouts.json describes")
    changed_rollouts(rollouts, lambda lines: lines)
    refused("opd_train_fsdp", train, "scores of other rollouts")
    refused("opd_train_fsdp", training(cached, random_tiny, tmp_path / "a", "--rows", 3), "is no multiple of --micro-rows")
    score = ["--teacher", random_tiny, "--rollouts", rollouts, "--out", tmp_path / "s"]
    ids = json.loads(lines[3])["ids"]
    for change, said in (
        (with_row(ids=None), "rollouts.jsonl:3: no sample of opd_gen (ids)"),
        (with_row(ids=[*ids, 1]), "rollouts.jsonl:3: no sample of opd_gen (tokens)"),
        (with_row(ids=[-1] * len(ids)), "rollouts.jsonl:3: no sample of opd_gen (ids)"),
        (with_row(finish_reason="eos"), "rollouts.jsonl:3: no sample of opd_gen (finish_reason)"),
        (with_row(ids=[9999] * len(ids)), "tokens up to id 9999; "),
        (lambda lines: [*lines, lines[0]], f"rollouts.jsonl:{len(lines)}: a second rollout of "),
        (lambda lines: [*lines[:2], lines[2][:20], *lines[3:]], "rollouts.jsonl:3: not JSON"),
        (lambda lines: [*lines[:2], "", *lines[3:]], "rollouts.jsonl:3: not JSON"),
    ):
        (rollouts / "rollouts.jsonl").write_text("".join(lines[1:]))
        changed_rollouts(rollouts, change)
        refused("opd_score", score, said)
    (rollouts / "rollouts.jsonl").write_text("".join(lines[1:]))
    changed_rollouts(rollouts, lambda lines: lines)
    manifest = json.loads((rollouts / "rollouts.json").read_text())
    for changes, said in (
        ({"format": 1}, "format 1, expected 2, which holds token ids"),
        ({"settings": manifest["settings"] | {"tokenizer_sha256": "0"}}, "generated with another tokenizer than the teacher's"),
    ):
        (rollouts / "rollouts.json").write_text(json.dumps(manifest | changes))
        refused("opd_score", score, said)
    # of a GGUF's server only what the ids say is known
    foreign = manifest["settings"] | {"tokenizer_sha256": None}
    (rollouts / "rollouts.json").write_text(json.dumps(manifest | {"settings": foreign}))
    assert run("opd_score", *score) == (0, "")
    changed_rollouts(rollouts, with_row(text="other"))
    refused("opd_score", [*score[:-1], tmp_path / "s2"], "its ids are other text in the teacher's tokenizer")
    index = json.loads((cached / "scores/index.json").read_text())
    shutil.rmtree(tmp_path / "c")
    shutil.copytree(cached, tmp_path / "c")
    for change, said in ((lambda: index | {"format": 1}, "format 1, expected 2: scores of the ids"), (dict, "has no 'format'")):
        (tmp_path / "c/scores/index.json").write_text(json.dumps(change()))
        refused("opd_train_fsdp", train, said)


def test_a_resumed_run_takes_only_answers_to_its_prompts(cached, tmp_path):
    prompts = tmp_path / "p.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": text, "id": text}) + "\n" for text in "abc"))
    shutil.copytree(cached / "q", tmp_path / "q")
    made = ["--model", tmp_path / "q", "--out", tmp_path / "r", "--prompts", prompts, "--backend", "hf", "--max-tokens", 4]
    assert run("opd_gen", *made) == (0, "")
    log = tmp_path / "r/samples.jsonl"
    lines = log.read_text().splitlines(keepends=True)
    row = json.loads(lines[1])
    for change, said in (
        ([*lines, log_line(sealed(row | {"id": "z"}))], "p.jsonl z answers no prompt of this run"),
        ([lines[0], log_line(sealed(row | {"prompt_ids": [5]})), *lines[2:]], "is of another prompt or chat template"),
        ([lines[0], log_line(sealed(row | {"ids": None})), *lines[2:]], "no sample of opd_gen (ids)"),
        ([lines[0], log_line(row | {"ids": [5] * 4}), *lines[2:]], "line 2 (a) was changed after it was written"),
        ([*lines, lines[1]], "line 5"),
        ([lines[0], lines[1][:30] + "\n", *lines[2:]], "line 2"),
    ):
        log.write_text("".join(change))
        refused("opd_gen", made, said)
    log.write_text("".join([*lines[:-1], lines[-1][:30]]))  # as a kill leaves it
    assert run("opd_gen", *made) == (0, "") and log.read_text() == "".join(lines)
    refused("opd_gen", [*made, "--temperature", 0.5], "holds samples of other settings (sampling)")
    prompts.write_text('{"prompt": "d"}\n')
    refused("opd_gen", made, "holds samples of other settings (prompts)")
    (tmp_path / "q/chat_template.jinja").write_text("{{ messages[0].content }}")
    refused(
        "opd_gen", [*made[:3], tmp_path / "r2", *made[4:], "--correct-only"], "--correct-only with --prompts: nobody grades"
    )
    for backend, said in (
        ("openai", "--base-url (BACKEND, BASE_URL) go together"),
        ("llamacpp", "is for a GGUF file"),
        ("none", "expected auto, vllm"),
    ):
        refused("opd_gen", [*made[:3], tmp_path / "r2", *made[4:], "--backend", backend], said)
    prompts.write_text('{"prompt": "d"}\n{"prompt": null}\n')
    refused("opd_gen", ["--model", "none", *made[2:]], "p.jsonl:2: prompt is null")  # before the model
    prompts.write_text(json.dumps({"text": "1 " * 5000}))
    refused("opd_gen", [*made[:3], tmp_path / "r2", *made[4:]], "tokens; the engine's context is 2048")


def test_the_end_that_was_generated_is_kept_and_scored(cached, random_tiny, tmp_path):
    """Of two ends the second: generation_config.json alone names it. And ids that their text would not give."""
    rows, _ = read_rollouts(cached / "rollouts")
    other = rows[0]["ids"][5]
    shutil.copytree(cached / "q", tmp_path / "q")
    ends = json.loads((tmp_path / "q/generation_config.json").read_text())["eos_token_id"]
    (tmp_path / "q/generation_config.json").write_text(json.dumps({"eos_token_id": [ends, other]}))
    assert run("opd_gen", "--model", tmp_path / "q", "--out", tmp_path / "r", *GENERATE) == (0, "")
    paths = ["--teacher", random_tiny, "--rollouts", tmp_path / "r", "--out", tmp_path / "s", "--k", 20]
    assert run("opd_score", *paths) == (0, "")
    rows, _ = read_rollouts(tmp_path / "r")
    scores = ScoredRollouts(tmp_path / "s")
    assert other in {row["ids"][-1] for row in rows if row["finish_reason"] == "stop"}
    names = [name for shard in scores.index["shards"] for name in shard["rollouts"]]
    own = {row["id"]: row for row in rows}
    tokenizer, otherwise = load_tokenizer(random_tiny), 0
    for name, example in zip(names, (scores[i] for i in range(len(scores))), strict=True):
        row = own[name]
        assert example.ids.tolist() == row["prompt_ids"] + row["ids"] and example.prompt == len(row["prompt_ids"])
        ids = row["ids"][: len(row["ids"]) - (row["finish_reason"] == "stop")]
        assert tokenizer.decode(ids) == row["text"] and (other not in row["ids"][:-1])
        otherwise += tokenizer(row["text"], add_special_tokens=False)["input_ids"] != ids
    assert otherwise and scores.index["retokenized"] == otherwise / len(rows)


def with_nan(model, out, pattern):
    """A copy of a checkpoint with one NaN, in the first tensor that ends with ``pattern``; its name."""
    shutil.copytree(model, out)
    tensors = load_file(out / "model.safetensors")
    name = min(name for name in tensors if name.endswith(pattern))
    tensors[name].view(-1)[7] = float("nan")
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    return name


def test_a_teacher_or_student_with_a_nan_is_named(cached, random_tiny, tmp_path):
    with_nan(random_tiny, tmp_path / "t", "layers.1.mlp.experts.0.gate_proj.weight")
    score = ["--teacher", tmp_path / "t", "--rollouts", cached / "rollouts", "--out", tmp_path / "s", "--k", 20]
    refused("opd_score", score, "model.layers.1.mlp.experts.gate_up_proj: the weight contains NaN")
    assert not (tmp_path / "s").exists()
    shutil.copytree(cached, tmp_path / "c")
    shutil.rmtree(tmp_path / "c/q")
    with_nan(cached / "q", tmp_path / "c/q", "layers.2.post_attention_layernorm.weight")
    train = training(tmp_path / "c", random_tiny, tmp_path / "a")
    refused("opd_train_fsdp", train, "c/q: model.layers.2.post_attention_layernorm.weight holds NaN or infinity")
    train.remove("--norms")
    refused("opd_train_fsdp", train, "model.layers.2.post_attention_layernorm.weight: the weight contains NaN")


def test_a_loss_that_is_not_finite_keeps_the_last_good_state(cached, whole, random_tiny, tmp_path):
    shutil.copytree(whole, tmp_path / "a")
    (tmp_path / "a/adapter.json").unlink()
    state = tmp_path / "a/state/00000005"
    facts = json.loads((state / "state.json").read_text())
    (state / "state.json").write_text(json.dumps(facts | {"step": 2}))
    edited_state(state, lambda t: t[max(t)].fill_(3e38))  # a trained value: what a rate far too high makes of it
    good = digests(state)
    code, error = run("opd_train_fsdp", *training(cached, random_tiny, tmp_path / "a"))
    assert code == 2 and error.startswith("step 3: the loss is ") and "a/state, step 2; lower --lr" in error
    assert digests(state) == good and not (tmp_path / "a/adapter.json").exists()
    shards = sorted((cached / "scores").glob("*.safetensors"))
    shutil.copytree(cached, tmp_path / "c")
    (tmp_path / "c/scores" / shards[0].name).write_bytes(shards[0].read_bytes()[:-4] + b"abcd")
    refused("opd_train_fsdp", training(tmp_path / "c", random_tiny, tmp_path / "b"), "not the scores that index.json lists")


def edited(path, change):
    """A safetensors file with ``change`` made to its tensors; what it says of itself stays."""
    with safe_open(path, "pt") as file:
        facts = file.metadata()
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, facts)


def edited_state(directory, change):
    """A saved state of training with ``change`` made to its tensors."""
    read = dcp.FileSystemReader(directory)
    tensors = {name: torch.empty(m.size) for name, m in read.read_metadata().state_dict_metadata.items()}
    dcp.load(tensors, storage_reader=read, no_dist=True)
    change(tensors)
    dcp.save(tensors, checkpoint_id=directory, no_dist=True)


def first_value(value):
    def change(tensors):
        tensors[min(tensors)].view(-1)[0] = value

    return change


def test_a_damaged_adapter_or_state_is_one_line(cached, whole, random_tiny, tmp_path):
    train = training(cached, random_tiny, tmp_path / "a")
    merge = ["--student", cached / "q", "--teacher", random_tiny, "--adapter", tmp_path / "a", "--out", tmp_path / "r"]
    start = training(cached, random_tiny, tmp_path / "b", "--init", tmp_path / "a")
    state, adapter = tmp_path / "a/state/00000005", tmp_path / "a/adapter.safetensors"
    share, facts, last = state / "__0_0.distcp", state / "state.json", state / ".metadata"
    cut = slice(0, -100)

    def described(**changes):
        value = json.loads((tmp_path / "a/adapter.json").read_text())
        value["parameters"][min(value["parameters"])]["sha256"] = "0"
        (tmp_path / "a/adapter.json").write_text(json.dumps(value | changes))

    for damage, script, arguments, said in (
        (lambda: adapter.write_bytes(adapter.read_bytes()[cut]), "merge_adapter", merge, "adapter.safetensors: cannot be read"),
        (lambda: adapter.write_bytes(b""), "merge_adapter", merge, "adapter.safetensors: cannot be read ("),
        (adapter.unlink, "merge_adapter", merge, "adapter.safetensors: cannot be read ("),
        (lambda: edited(adapter, first_value(torch.nan)), "merge_adapter", merge, "holds NaN or infinity; restore the adapter"),
        (lambda: edited(adapter, first_value(0.5)), "merge_adapter", merge, "not the bytes that were trained: damaged or edi"),
        (lambda: edited(adapter, lambda t: t.pop(min(t))), "merge_adapter", merge, "tensors are not those that adapter.json"),
        (lambda: (tmp_path / "a/adapter.json").write_text("{}"), "merge_adapter", merge, "adapter.json: has no 'student'"),
        (lambda: described(device="cuda"), "merge_adapter", merge, "trained on cuda, merged on cpu: merge on cuda"),
        (
            lambda: described(device="cpu"),
            "merge_adapter",
            merge,
            "on the same kind of device: the adapter was edited, or made",
        ),
        (lambda: described(student={}), "merge_adapter", merge, "trained on another student than"),
        (lambda: described(adapter={"rang": 4}), "merge_adapter", merge, "adapter.json: not an adapter of opd_train_fsdp"),
        (lambda: described(parameters=[]), "merge_adapter", merge, "adapter.json: not an adapter of opd_train_fsdp"),
        (lambda: adapter.write_bytes(adapter.read_bytes()[cut]), "opd_train_fsdp", start, "cannot be read ("),
        (lambda: edited(adapter, first_value(torch.inf)), "opd_train_fsdp", start, "holds NaN or infinity"),
        (lambda: edited(adapter, lambda t: t.pop(min(t))), "opd_train_fsdp", start, "adapter.safetensors: lacks "),
        (
            lambda: share.write_bytes(share.read_bytes()[: share.stat().st_size // 2]),
            "opd_train_fsdp",
            train,
            "cannot be read (",
        ),
        (lambda: share.write_bytes(b"garbage"), "opd_train_fsdp", train, "state/00000005: cannot be read ("),
        (share.unlink, "opd_train_fsdp", train, "state/00000005: cannot be read ("),
        (lambda: last.write_bytes(last.read_bytes()[cut]), "opd_train_fsdp", train, "state/00000005: cannot be read ("),
        (lambda: last.write_bytes(b"garbage"), "opd_train_fsdp", train, "state/00000005: cannot be read ("),
        (lambda: edited_state(state, lambda t: t.pop(min(t))), "opd_train_fsdp", train, "state/00000005: cannot be read ("),
        (lambda: edited_state(state, first_value(torch.nan)), "opd_train_fsdp", train, "holds NaN or infinity; remove "),
        (lambda: facts.write_text("{}"), "opd_train_fsdp", train, "state.json: has no 'settings'"),
        (lambda: facts.write_text("{"), "opd_train_fsdp", train, "state.json: not valid JSON"),
    ):
        shutil.rmtree(tmp_path / "a", ignore_errors=True)
        shutil.copytree(whole, tmp_path / "a")
        damage()
        refused(script, arguments, said)
        assert not (tmp_path / "r").exists() and not (tmp_path / "b/adapter.json").exists()


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
    shutil.copytree(cached / "q", tmp_path / "q")
    (tmp_path / "q/config.json").write_text((tmp_path / "q/config.json").read_text() + " ")
    swapped = ["--student", tmp_path / "q"]
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
    student = build_student(cached / "q", random_tiny, AdapterSettings(rank=4), world, ("forward_kl",) * 2, 1.0, False)
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

    def step(script, *arguments, **_):
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
    marks = ("rollouts/samples.jsonl", ".scores.partial/job.json", "adapter/state/*/.metadata", ".recovered.partial/job.json")
    environment = ONE_THREAD | {key: str(value) for key, value in small.items()}
    environment["PYTHONPATH"] += os.pathsep + str(REPO / "tests")
    process = subprocess.run([sys.executable, "-c", PHASES, tmp_path, *marks], env=environment, cwd=REPO, capture_output=True,
                             text=True, timeout=400)  # fmt: skip
    assert process.returncode == 0, process.stderr[-3000:]
    for name in ("rollouts/rollouts.jsonl", "adapter/adapter.safetensors", "recovered/model.safetensors"):
        assert file_sha256(tmp_path / "cut" / name) == file_sha256(tmp_path / "whole" / name), name


def test_a_mixture_recovers_a_packed_student_of_several_widths(random_tiny, tmp_path, monkeypatch):
    """Both texts, norms too; what comes out is packed as what went in was, and only what was trained differs."""
    experts = tuple((f"model.layers.{layer}.mlp.experts", (2, 3, 4, 3, 2, 3, 2, 4)) for layer in (0, 2))
    recipe = Recipe(3, 4, overrides=(("*.shared_expert.down_proj.weight", 5),), experts=experts)
    quantize_checkpoint(random_tiny, tmp_path / "q", recipe, packed=True, packed_bits=4)
    values = {"TEACHER": random_tiny, "STUDENT": tmp_path / "q", "WORK": tmp_path / "w", "TRAJECTORIES": "mixture", "NORMS": 1}
    values |= {"TASKS": "tiny_math", "LIMIT": 4, "MAX_TOKENS": 8, "FINISHED_ONLY": 0, "K": 8, "STEPS": 2, "ROWS": 4, "RANK": 2}
    values |= {"MICRO_ROWS": 2, "LR": 0.5, "WARMUP": 0, "KL_ITEMS": 1, "BACKEND": "hf", "LINEARS": 1}
    for key, value in values.items():
        monkeypatch.setenv(key, str(value))
    config, _ = parse_settings(DistillSettings, "", argv=["--config", str(REPO / "configs/opd_tiny.env")])
    called = []

    def step(script, *arguments, **_):
        called.append(Path(script).stem)
        assert run(Path(script).stem, *arguments) == (0, ""), script

    distill_run.recover(config, tmp_path / "r.json", step)
    assert [called.count(name) for name in ("packed_export", "opd_gen", "opd_score", "quant_save")] == [2, 2, 2, 0]
    before, plain, after = (Checkpoint(tmp_path / name) for name in ("q", "w/recovered", "w/packed"))
    listed = [{name: rest for name, *rest in read_manifest(packed.path)["tensors"]} for packed in (before, after)]
    assert listed[0] == listed[1] and {rest[-1] for rest in listed[0].values()} == {0, 4, 5}  # 2 and 3 bits in codes of 4
    roles = roles_of({name: info.shape for name, info in before.tensors.items()}, before.config)
    changed = [name for name in before.tensors if not torch.equal(before.read(name), after.read(name))]
    norms = [name for name in changed if roles[name] is Role.NORM]
    assert (
        len(norms) > 8
        and "model.norm.weight" not in norms
        and {Role.ROUTED_EXPERT, Role.ATTENTION} < {*map(roles.get, changed)}
    )
    assert all(roles[name] is Role.NORM or recipe.bits_of(name, roles[name]) for name in changed)
    assert all(torch.equal(plain.read(name), after.read(name)) for name in before.tensors)
    record = json.loads((tmp_path / "r.json").read_text())
    assert [data["revision"] for data in record["data"]] == ["teacher", "student"] and record["metrics"]["own_rollouts"]["kept"]
    adapter = json.loads((tmp_path / "w/adapter/adapter.json").read_text())
    assert adapter["training"]["losses"] == {"teacher": "forward_kl", "student": "reverse_kl"} and adapter["data"]["own"]
    (tmp_path / "r.json").unlink()
    called.clear()
    distill_run.recover(config, tmp_path / "r.json", step)  # nothing but the record
    assert called == []
    texts = ["--rollouts", tmp_path / "w/teacher/rollouts", "--scores", tmp_path / "w/teacher/scores", "--out", tmp_path / "a"]
    models = ["--student", tmp_path / "w/student", "--teacher", random_tiny, *TRAIN]
    refused("opd_train_fsdp", [*models, *texts], "are the teacher's own texts; give --trajectories")
    refused("opd_train_fsdp", [*models, *texts, "--trajectories", "mixture"], "give all or none")
