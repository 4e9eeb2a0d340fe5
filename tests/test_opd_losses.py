"""The losses on tiny tensors: equal to KL over the whole vocabulary for K = V, a lower bound below, gradients checked."""

import dataclasses
import itertools
import json
import math
import re
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import REPO
from transformers import LlamaConfig, LlamaForCausalLM

from console import UserError
from distill_run import DistillSettings, Run, prompts
from opd_budget import budget, shape_of
from opd_data import Example, Generation, Scoring, Texts, TrainSettings, collate, read_prompts
from opd_gen import kept, none_kept
from opd_losses import LOSSES, TopK, forward_kl, gathered, losses_by_source, position_losses, reverse_kl, top_k_of
from quant_save import quantize_checkpoint
from recipe import Recipe
from settings import parse_settings, typed


def logits_pair(n=5, v=23, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (3 * torch.randn(n, v, generator=generator) for _ in range(2))


@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.5])
def test_kl_is_that_of_the_whole_vocabulary_and_a_lower_bound_below(temperature):
    teacher, student = logits_pair()
    p, q = F.log_softmax(teacher / temperature, -1), F.log_softmax(student / temperature, -1)
    full = {"forward_kl": (p.exp() * (p - q)).sum(-1), "reverse_kl": (q.exp() * (q - p)).sum(-1)}
    for kind, exact in full.items():
        before = torch.zeros(len(teacher))
        for k in (1, 4, 12, 22, 23):
            kept = gathered(teacher, teacher.topk(k).indices, temperature)
            value = position_losses(student, torch.zeros(5, dtype=torch.long), kept, kind, temperature) / temperature**2
            assert (value >= before - 1e-5).all() and (value <= exact + 1e-5).all()  # finer events never lose divergence
            before = value
        torch.testing.assert_close(value, exact, rtol=1e-5, atol=1e-6)
    targets = torch.arange(5)
    torch.testing.assert_close(
        position_losses(student, targets, None, "cross_entropy", 1.0), F.cross_entropy(student, targets, reduction="none")
    )


def slow_loss(teacher, student, target, kind, k, temperature):
    """Of one position, in double and word by word: over the whole vocabulary, or the teacher's k likeliest and all others."""
    if kind == "cross_entropy":
        return -math.log(math.exp(student[target]) / sum(map(math.exp, student)))
    p, q = (
        [math.exp(x / temperature) / sum(math.exp(y / temperature) for y in own) for x in own] for own in (teacher, student)
    )
    likely = sorted(range(len(p)), key=lambda token: -p[token])[:k]
    p, q = ([own[token] for token in likely] + [1 - sum(own[token] for token in likely)] * (k < len(own)) for own in (p, q))
    a, b = (p, q) if kind == "forward_kl" else (q, p)
    return temperature**2 * sum(x * math.log(x / y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("k", [3, 23])
@pytest.mark.parametrize("kinds", list(itertools.product(LOSSES, repeat=2)))
def test_the_loss_of_a_position_is_that_of_whose_text_it_stands_in(kinds, k):
    teacher, student = logits_pair(6)
    own, targets = torch.tensor([False, True, True, False, True, False]), torch.arange(6)
    student.requires_grad_()
    found = losses_by_source(student, targets, gathered(teacher, teacher.topk(k).indices, 1.5), own, kinds, 1.5)
    rows = zip(teacher.double().tolist(), student.double().tolist(), targets.tolist(), own.tolist(), strict=True)
    expected = [slow_loss(a, b, target, kinds[mine], k, 1.5) for a, b, target, mine in rows]
    torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-4, atol=1e-5)
    (gradient,) = torch.autograd.grad(found.sum(), student)
    for mine in (False, True):  # each position has the gradient of its own loss alone
        alone = position_losses(student, targets, gathered(teacher, teacher.topk(k).indices, 1.5), kinds[mine], 1.5)
        torch.testing.assert_close(gradient[own == mine], torch.autograd.grad(alone.sum(), student)[0][own == mine])


class FakeScores(list):
    """Rollouts of which only the length of the answer matters."""

    def __init__(self, answers):
        made = [Example(torch.arange(n + 2), 2, TopK(*(torch.zeros(n, 1),) * 2, torch.zeros(n))) for n in answers]
        super().__init__(made)
        self.lengths, self.answers = [n + 2 for n in answers], list(answers)


def test_a_mixture_takes_a_growing_share_of_the_students_texts():
    theirs, mine = FakeScores(range(1, 8)), FakeScores(range(11, 16))
    texts = Texts(theirs, mine)
    assert texts.answers == theirs.answers + mine.answers
    batch = collate([texts[number] for number in (6, 7)])  # the last of the one, the first of the other
    assert batch.own.tolist() == [False] * 7 + [True] * 11
    settings = TrainSettings(steps=11, rows=4, trajectories="mixture")
    plan = texts.order(settings)
    counts = [sum(number >= 7 for number in step) for step in plan]
    assert counts[0] == 0 and counts[-1] == 4 and counts == sorted(counts) and sum(counts) == 22
    assert all(len(step) == 4 for step in plan) and set(sum(plan, [])) == set(range(12))
    steady = texts.order(dataclasses.replace(settings, share_first=0.3, share_last=0.3))
    assert [sum(number >= 7 for number in step) for step in steady] == [1, 1, 2, 1, 1, 1, 1, 2, 1, 1, 1]
    for trajectories, alone in (("teacher", Texts(theirs, None)), ("student", Texts(None, mine))):
        plan = alone.order(TrainSettings(steps=7, rows=3, trajectories=trajectories))
        every = sum(plan, [])
        count = len(alone.answers)
        assert all(sorted(every[i : i + count]) == list(range(count)) for i in range(0, 21 - count, count))
        assert alone[0].own is (trajectories == "student")


def test_gradients():
    teacher, student = (logits.double() for logits in logits_pair(3, 9))
    student.requires_grad_()
    for k in (2, 9):
        kept = gathered(teacher, teacher.topk(k).indices)
        for loss in (forward_kl, reverse_kl):

            def value(logits, kept=kept, loss=loss):  # gathered works in float32: the check needs double throughout
                logp = F.log_softmax(logits, -1)
                own = logp.gather(-1, kept.ids)
                rest = logp.scatter(-1, kept.ids, float("-inf")).logsumexp(-1) if kept.ids.shape[1] < 9 else kept.tail.double()
                return loss(TopK(kept.ids, kept.logp.double(), kept.tail.double()), TopK(kept.ids, own, rest))

            assert torch.autograd.gradcheck(value, student)
            single = student.detach().float().requires_grad_()
            loss(kept, gathered(single, kept.ids)).sum().backward()
            (exact,) = torch.autograd.grad(value(student).sum(), student)
            torch.testing.assert_close(single.grad, exact.float(), rtol=1e-4, atol=1e-5)
            assert single.grad.isfinite().all()


@pytest.mark.parametrize("chunk", [7, 16, 1000])
def test_the_streamed_top_k_is_that_of_all_logits(chunk):
    generator = torch.Generator().manual_seed(1)
    hidden, head = torch.randn(6, 8, generator=generator), torch.randn(50, 8, generator=generator)
    hidden[0] *= 6  # its tail has almost no mass
    for k in (3, 20, 50):
        found = top_k_of(hidden, head, k, 0.9, chunk)
        expected = gathered(hidden @ head.T, (hidden @ head.T).topk(k).indices, 0.9)
        assert torch.equal(found.ids, expected.ids)
        torch.testing.assert_close(found.logp, expected.logp, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found.tail, expected.tail, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found.events().exp().sum(-1), torch.ones(6))


def test_the_budget_counts_what_is_trained():
    shape = shape_of(REPO / "models/razor-tiny")
    assert (shape.routed, shape.parameters) == (8 * 8 * 3 * 256 * 256, 15_940_528)
    made = sum(16 * (o + i) * 8 * 8 for o, i in ((512, 256), (256, 256)))  # A and B of both parameters of 64 experts
    assert shape.adapter_parameters(16) == made
    found = budget(None)
    assert found["shape"]["routed"] == 115_964_116_992
    assert found["disk"]["scores"] == 2000 * 8192 * (64 * 8 + 8)


def tiny_work(tmp_path, **changes):
    """A run on razor-tiny whose every input lies in ``tmp_path``, so that it can be changed."""
    for name in ("teacher", "student"):
        if not (tmp_path / name).exists():
            shutil.copytree(REPO / "models/razor-tiny", tmp_path / name)
    for name, text in (("prompts.jsonl", PROMPT * 16), ("init/adapter.safetensors", "x"), ("model.gguf", "x")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        if not (tmp_path / name).exists():
            (tmp_path / name).write_text(text)
    argv = ["--config", str(REPO / "configs/opd_tiny.env"), "--work", str(tmp_path / "work"), "--tasks", ""]
    for key, path in (("teacher", "teacher"), ("student", "student"), ("prompts", "prompts.jsonl"), ("init", "init"),
                      ("rollout-model", "model.gguf")):  # fmt: skip
        argv += [f"--{key}", str(tmp_path / path)]
    config, _ = parse_settings(DistillSettings, "", argv=argv)
    return Run(dataclasses.replace(config, **changes), tmp_path / "r.json", print)


PROMPT = '{"prompt": "1 + 1"}\n'
INPUTS = (
    ("PROMPTS", "prompts.jsonl"), ("INIT", "init/adapter.safetensors"), ("ROLLOUT_MODEL", "model.gguf"),
    ("TEACHER", "teacher/model.safetensors"), ("TEACHER", "teacher/generation_config.json"),
    ("STUDENT", "student/model.safetensors"), ("STUDENT", "student/chat_template.jinja"),
)  # fmt: skip


def test_a_work_directory_remembers_its_settings_and_what_they_name(tmp_path):
    for _ in range(2):
        tiny_work(tmp_path).claim()
    with pytest.raises(UserError, match="made with other RANK, STEPS; give another WORK"):
        tiny_work(tmp_path, steps=1, rank=3).claim()
    for key, name in INPUTS:
        before = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(before[:-1] + bytes([before[-1] ^ 1]))  # the same name, the same size
        with pytest.raises(
            UserError, match=f"made with another {key}: .* differs .same size, other content.; give another WORK"
        ):
            tiny_work(tmp_path).claim()
        (tmp_path / name).write_bytes(before)
    tiny_work(tmp_path).claim()
    settings = json.loads((tmp_path / "work/settings.json").read_text())
    del settings["inputs"]
    (tmp_path / "work/settings.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match="has no 'inputs'; made before the contents"):
        tiny_work(tmp_path).claim()


def test_what_a_later_phase_would_refuse_is_said_first(tmp_path, monkeypatch):
    for name in ("opd_tiny", "opd_r1"):
        config, _ = parse_settings(DistillSettings, "", argv=["--config", str(REPO / f"configs/{name}.env")])
        assert config.rows % (config.micro_rows * config.processes) == 0
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        UserError, match='work/prompts.jsonl: cannot be read .No such file.*PROMPTS. names a jsonl file of {"pro'
    ):
        prompts(config)
    for changes, said in (
        ({"rows": 24}, "ROWS=24 is no multiple of MICRO_ROWS x PROCESSES = 16"),
        ({"prompts": None}, "set TASKS, PROMPTS or both"),
        ({"student": None, "tasks": "mmlu_pro"}, "--tasks mmlu_pro: has no training split"),
        ({"student": None, "tasks": "tiny_no"}, "unknown benchmark 'tiny_no'"),
        ({"eval_limit": 4}, "EVAL_LIMIT=4 without TASKS"),
        ({"ggml": "iq3_xxs"}, "the scales of a block type cannot be trained; use mode lora"),
        ({"lr": float("inf")}, "--lr a number"),
        ({"score_temperature": float("nan")}, "--score-temperature above 0"),
        ({"temperature": float("nan")}, "sampling: temperature"),
        ({"student": None, "rows": 32}, "there will be only 16 rollouts"),
        ({"student": None, "recipe": Recipe(2, 4, method="awq")}, "method awq has no symmetric grid"),
        ({"student": None, "recipe": Recipe(16, 4)}, "quantizes no experts, so that nothing"),
        ({}, "student/recipe.json: no such file"),
    ):
        with pytest.raises(UserError, match=re.escape(said)):
            tiny_work(tmp_path, **changes).check()
    tiny_work(tmp_path, student=None).check()
    dense = LlamaConfig(hidden_size=128, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2, vocab_size=64)
    LlamaForCausalLM(dense).save_pretrained(tmp_path / "dense")
    with pytest.raises(UserError, match="dense model, without routed experts; LINEARS=1 .--linears. adapts"):
        tiny_work(tmp_path, student=None, teacher=tmp_path / "dense").check()
    tiny_work(tmp_path, student=None, teacher=tmp_path / "dense", linears=True).check()
    assert shape_of(tmp_path / "dense").active == shape_of(tmp_path / "dense").parameters  # the plan of a dense model
    quantize_checkpoint(REPO / "models/razor-tiny", tmp_path / "q", Recipe(2, 4))
    tiny_work(tmp_path, student=tmp_path / "q").check()
    (tmp_path / "q/chat_template.jinja").write_text("{{ messages[0].content }}")
    with pytest.raises(UserError, match="has another chat template than"):
        tiny_work(tmp_path, student=tmp_path / "q").check()


def test_a_command_is_told_what_differs_from_its_own_defaults():
    config, _ = parse_settings(DistillSettings, "", argv=["--config", str(REPO / "configs/opd_tiny.env")])
    config = dataclasses.replace(config, lr=0.1 + 0.2, recompute=False, finished_only=True)
    for cls in (Generation, Scoring, TrainSettings, Recipe):
        told, _ = parse_settings(cls, "", argv=typed(config, cls))
        assert told == config.recipe if cls is Recipe else all(v == getattr(config, k) for k, v in vars(told).items())
    assert "--no-recompute" in typed(config, TrainSettings) and "0.30000000000000004" in typed(config, TrainSettings)


GOOD = ['{"prompt": "a"}', "", '{"messages": [{"role": "user", "content": "b"}], "id": 7}', '{"text": " ", "id": "x"}']


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"prompt": null}', "prompt is null, not a text"),
        ('{"prompt": ["a"]}', 'prompt is ["a"], not a text'),
        ('{"prompt": " \\n"}', "prompt is empty"),
        ('{"prompt": "\\ud83d"}', "prompt holds half of a surrogate pair"),
        ('{"text": ""}', "text is empty"),
        ('{"text": 3}', "text is 3, not a text"),
        ('{"prompt": "a", "text": "b"}', "expected one of"),
        ('{"id": "z"}', "expected one of"),
        ('["a"]', "expected one of"),
        ('{"prompt": "a", "system": "b"}', "unknown key system"),
        ('{"prompt": "a", "id": null}', "id null: expected a text or a whole number"),
        ('{"prompt": "a", "id": true}', "id true: expected a text"),
        ('{"prompt": "a", "id": "7"}', "id '7' is that of line 3 too"),
        ('{"prompt": "a", "id": "000001"}', "id '000001' is that of line 1 too"),
        ('{"messages": []}', "messages: expected a list of turns"),
        ('{"messages": "a"}', "messages: expected a list of turns"),
        ('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}', "ends with assistant"),
        ('{"messages": [{"role": "system", "content": "a"}]}', "ends with system"),
        ('{"messages": [{"role": "human", "content": "a"}]}', 'turn 1: role "human"; known: system'),
        ('{"messages": [{"role": "user", "content": null}]}', "turn 1: content is null"),
        ('{"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}]}', "turn 1: content is [{"),
        ('{"messages": [{"from": "user", "value": "a"}]}', "turn 1: expected"),
        ('{"prompt": "a"', "not JSON"),
        ("garbage", "not JSON"),
        ("1" * 5000, "not JSON"),
        ("[" * 100_000, "not JSON"),
    ],
)
def test_a_prompt_that_is_none_is_refused_by_its_line(tmp_path, line, said):
    path = tmp_path / "p.jsonl"
    path.write_text("\n".join(GOOD) + "\n")
    assert [row["id"] for row in read_prompts(path)] == ["000001", "7", "x"]
    path.write_text("\n".join([*GOOD, line, "also bad"]) + "\n")
    with pytest.raises(UserError, match=re.escape(f"{path}:5: {said}")) as error:
        read_prompts(path)
    assert "\n" not in str(error.value)


def test_a_prompt_file_that_is_none():
    for path, said in ((REPO, "cannot be read"), (REPO / "no.jsonl", "No such file"), (Path("/dev/null"), "holds no prompts"),
                       (REPO / "models/razor-tiny/model.safetensors", "not UTF-8")):  # fmt: skip
        with pytest.raises(UserError, match=said):
            read_prompts(path)


def test_advice_where_nothing_is_kept():
    settings = Generation(tasks="tiny_know", finished_only=True, correct_only=True)
    reasons = [
        (("", "stop", True), "1 empty (the model ends its turn at once: look at --model, its chat template and the prompts)"),
        (("a", "length", False), "1 unfinished (raise --max-tokens or drop --finished-only)"),
        (("a", "stop", False), "1 wrong (drop --correct-only)"),
    ]
    for own in (reasons[:1], reasons[1:2], reasons[2:], reasons):
        rows = [dict(zip(("text", "finish_reason", "correct"), row, strict=True)) for row, _ in own]
        assert not kept(rows, True, True)
        said = ", ".join(said for _, said in own)
        assert none_kept(rows, settings) == f"none of {len(own)} rollouts is kept: {said}"
