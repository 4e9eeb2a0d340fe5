"""Tables of answers that published harnesses have graded wrongly, and the plain ones."""

import pytest

from backend import Completion
from bench8_loaders import Gpqa
from graders import extract_boxed, extract_code, extract_letter, grade_integer, opens_thinking, split_thinking
from runner import graded_rows
from task_text import Item


@pytest.mark.parametrize(
    "answer,letter",
    [
        ("The correct answer is D.", "D"),  # not the A of "answer"
        ("The answer is B.", "B"),
        (r"So \boxed{\text{C}}.", "C"),
        ("**Answer:** (B)", "B"),
        ("Answer: **C**", "C"),
        ("C", "C"),
        ("(C)", "C"),
        ("The answer is A. No, wait: the answer is B.", "B"),
        ("A good try", None),
        ("All of them", None),
        ("The answer is Berlin.", None),
        ("The answer is E.", None),  # not an option
        ("", None),
    ],
)
def test_letters(answer, letter):
    assert extract_letter(answer, "ABCD") == letter


@pytest.mark.parametrize(
    "text,gold,right",
    [
        ("1,234", 1234, True),
        ("1{,}234", 1234, True),
        ("1,2", 12, False),
        ("-5", 5, False),
        ("−5", -5, True),
        ("5.0", 5, True),
        ("5.5", 5, False),
        ("5^\\circ", 5, True),
        ("5^{\\circ}", 5, True),
        ("m+n = 5", 5, True),
        ("\\text{5}", 5, True),
        ("5x=5", 5, False),
        ("x=5,5", 55, False),
        ("12 apples", 12, False),
        ("", 0, False),
        (None, 0, False),
    ],
)
def test_integers(text, gold, right):
    assert grade_integer(text, gold) is right


def test_boxed_takes_the_last_complete_one():
    assert extract_boxed(r"\boxed{1} then \boxed{\frac{1}{2}} and \boxed{3") == r"\frac{1}{2}"
    assert extract_boxed("no box") is None


def test_code_takes_the_block_that_defines_the_function():
    answer = "```python\ndef f(x):\n    return x\n```\nFor example:\n```python\nprint(f(1))\n```"
    assert extract_code(answer, "f") == "def f(x):\n    return x\n"
    assert extract_code("def f(x):\n    return x", "f") == "def f(x):\n    return x"
    assert extract_code("I cannot.", "f") is None


def test_thinking_that_never_ends_is_no_answer():
    assert split_thinking("a </think> b") == ("a ", "b")
    assert split_thinking("The answer is B.") == ("The answer is B.", None)
    assert split_thinking("<think>The answer is B.", opened=False)[1] is None
    assert split_thinking("<|channel>thought\nB?", opened=False)[1] is None


def test_a_model_without_a_thought_answers_and_gemma_ends_its_own():
    """Of models whose prompt opens no thought every answer would else be wrong."""
    assert opens_thinking("<|im_start|>assistant\n<think>\n") and not opens_thinking("<|turn>model\n")
    assert split_thinking("The answer is B.", opened=False)[1] == "The answer is B."
    assert split_thinking("<|channel>thought\nC?<channel|>The answer is B.", opened=False)[1] == "The answer is B."
    item = Item("1", "?", "B", {"letters": "ABCD"})
    rows = graded_rows(
        Gpqa(), [item] * 2, ["<|turn>model\n", "assistant\n<think>\n"], [Completion("Answer: B", 3, 2, "stop")] * 2
    )
    assert [(row["correct"], row["prompt_opens_thinking"]) for row in rows] == [(True, False), (False, True)]
