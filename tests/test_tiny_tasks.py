"""The generator of the tiny tasks: disjoint splits, right solutions, prompts as the chat template renders them."""

import random

import pytest

from console import UserError
from graders import split_thinking
from runner import get_benchmarks
from task_text import split_of
from tasks_tiny import TINY_TASKS
from tiny_data import TinyBatches, build_tokenizer, completion_text, prompt_text


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


@pytest.mark.parametrize("task", [kind() for kind in TINY_TASKS], ids=lambda task: task.name)
def test_reference_solutions_are_graded_right_and_splits_are_disjoint(task, tokenizer):
    pairs = task.load_with_solutions(60)
    assert pairs == task.load_with_solutions(60)
    items = [item for item, _ in pairs]
    answers = [split_thinking(solution.removeprefix("<think>\n"))[1] for _, solution in pairs]
    extracted = [task.extract(item, answer) for item, answer in zip(items, answers, strict=True)]
    assert all(task.grade_all(items, extracted))
    wrong = extracted[1:] + extracted[:1]
    assert not all(task.grade_all(items, wrong))
    rng = random.Random(5)
    seen = {task.generate(rng, "train")[0].question for _ in range(300)}
    assert not seen & {item.question for item in items}
    longest = max(len(tokenizer(completion_text(solution))["input_ids"]) for _, solution in pairs)
    assert longest < task.max_tokens


def test_the_split_is_a_function_of_the_key_alone():
    share = sum(split_of(f"key {i}") == "test" for i in range(8000)) / 8000
    assert 0.05 < share < 0.075
    know = get_benchmarks(["tiny_know"])[0]
    rng = random.Random(1)
    for split in ("train", "test"):
        keys = [know.draw(rng)[0] for _ in range(50)]
        assert {split_of(key) for key in keys} <= {"train", "test"}
        item, solution = know.generate(rng, split)
        person, relation = solution.removeprefix("<think>\n").split(":")[0], solution.split(": ")[1].split()[0]
        assert split_of(f"{person}:{relation}") == split and person in item.question


def test_prompts_equal_the_chat_template(tokenizer):
    messages = [{"role": "user", "content": "What is 1 + 1?"}]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert rendered == prompt_text("What is 1 + 1?")
    assert len(tokenizer) <= 1024
    text = "Zoë said: x[3] == 1,024 (A)\n"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_batches_are_a_function_of_the_step(tokenizer):
    shares = {"statements": 0.2, "options": 0.1, "tiny_know": 0.1, "tiny_math": 0.2, "tiny_reason": 0.2, "tiny_code": 0.2}
    data = TinyBatches(tokenizer, 1, 10, 4, 128, 0.1, shares=shares)
    ids, weights = data[3]
    again, _ = TinyBatches(tokenizer, 1, 10, 4, 128, 0.1, shares=shares)[3]
    assert ids.shape == weights.shape == (4, 129) and ids.equal(again) and not ids.equal(data[4][0])


def test_unknown_benchmarks_are_named():
    with pytest.raises(UserError, match="unknown benchmark 'gsm9k'; known: tiny_know"):
        get_benchmarks(["gsm9k"])
