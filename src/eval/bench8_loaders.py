"""The published text benchmarks, one small class each. docs/BENCHMARKS.md has the table: data, prompt, grader, deviations.

Not a command: `python src/eval/vllm_eval8.py --benchmarks gpqa,math500` runs them. Data sets are pinned to a commit of
the hub; with --data-dir (see task) local files of the same columns are read instead, and nothing else ever is.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from string import ascii_uppercase as LETTERS

from console import UserError
from graders import extract_letter, extract_math, grade_integer, parse_integer, said_from
from math_answers import judge_math, judge_open, latex
from task import Benchmark, HubBenchmark, Row, Source
from task_text import Item
from tasks_code import CODE_BENCHMARKS

MMMLU_LANGUAGES = tuple("AR_XY BN_BD DE_DE ES_LA FR_FR HI_IN ID_ID IT_IT JA_JP KO_KR PT_BR SW_KE YO_NG ZH_CN".split())
# openai/simple-evals, common.py: QUERY_TEMPLATE_MULTICHOICE
SIMPLE_EVALS_CHOICE = (
    "Answer the following multiple choice question. The last line of your response should be of the following format: "
    "'Answer: $LETTER' (without quotes) where LETTER is one of ABCD. Think step by step before answering.\n\n"
    "{question}\n\nA) {options[0]}\nB) {options[1]}\nC) {options[2]}\nD) {options[3]}"
)
# TIGER-AI-Lab/MMLU-Pro, cot_prompt_lib/initial_prompt.txt
MMLU_PRO_OPENING = (
    "The following are multiple choice questions (with answers) about {subject}. Think step by step and then finish your "
    'answer with "the answer is (X)" where X is the correct letter choice.'
)
# the appendix of arXiv:2502.19187
BBEH_SUFFIX = (
    'Think step by step, and when you provide the final answer, please use the prefix "The answer is:"\n'
    "without any modification, and provide the answer directly, with no formatting, no bolding, and\n"
    'no markup. For instance: "The answer is: 42" or "The answer is: yes". If the question is multiple\n'
    "choice with a single correct answer, the final answer must only be the letter corresponding to\n"
    'the correct answer. For example, "The answer is: (a)".'
)
# Qwen2.5-Math and MathArena (configs/competitions) use the same sentence
BOXED = "Please reason step by step, and put your final answer within \\boxed{}."
AIME_RANGE = "The answer is an integer between 0 and 999 inclusive."  # MathArena, aime configurations
# centerforaisafety/hle, hle_eval/run_model_predictions.py: the one system prompt of the leaderboard
HLE_SYSTEM = (
    "Your response should be in the following format:\n"
    "Explanation: {your explanation for your answer choice}\n"
    "Answer: {your chosen answer}\n"
    "Confidence: {your confidence score between 0% and 100% for your answer}"
)


def row_id(*texts: object) -> str:
    """A name for a row that has none: the digest of what it says."""
    return hashlib.sha256("\x1f".join(map(str, texts)).encode()).hexdigest()[:16]


class LetterBenchmark(HubBenchmark):
    """Multiple choice: the gold answer is a letter, ``meta["letters"]`` are the options that exist."""

    def extract(self, item: Item, answer: str) -> str | None:
        return extract_letter(answer, item.meta["letters"])


class MmluPro(LetterBenchmark):
    """12,032 questions with up to ten options, 5-shot from the validation split of the same category, as published."""

    name = "mmlu_pro"
    source = Source("TIGER-Lab/MMLU-Pro", "527feea0afed1de15a8c115abf7be4c912123315")
    columns = ("question_id", "question", "options", "answer", "category", "cot_content")
    order_by_stratum = True
    shots = 5

    def load(self, n: int | None = None) -> list[Item]:
        self.examples: dict[str, list[Row]] = {}
        for row in self.rows(split="validation", suffix="_validation"):
            self.examples.setdefault(row["category"], []).append(row)
        return super().load(n)

    @staticmethod
    def shown(row: Row, ending: str) -> str:
        """One question as evaluate_from_local.py formats it; options "N/A" are left out there and here."""
        options = [option for option in row["options"] if option != "N/A"]
        listed = "".join(f"{letter}. {option}\n" for letter, option in zip(LETTERS, options, strict=False))
        return f"Question:\n{row['question']}\nOptions:\n{listed}{ending}"

    def item(self, row: Row, number: int, config: str | None) -> Item:
        subject = row["category"]
        if len(self.examples.get(subject, [])) < self.shots:
            raise UserError(f"mmlu_pro: the validation rows hold fewer than {self.shots} examples of category {subject!r}")
        thought = "Answer: Let's think step by step."
        examples = [
            self.shown(example, example["cot_content"].replace("A: Let's think step by step.", thought)) + "\n\n"
            for example in self.examples[subject][: self.shots]
        ]
        question = MMLU_PRO_OPENING.format(subject=subject) + "\n" + "".join(examples) + self.shown(row, thought)
        letters = LETTERS[: sum(option != "N/A" for option in row["options"])]
        return Item(f"mmlu_pro-{row['question_id']}", question, row["answer"], {"letters": letters, "stratum": subject})


class Gpqa(LetterBenchmark):
    """GPQA diamond, 198 questions. Options are shuffled for each item with a seed of its record id."""

    name = "gpqa"
    source = Source(
        "Idavidrein/gpqa", "633f5ee89ab8ad4522a9f850766b73f62147ffdd", split="train", config="gpqa_diamond", gated=True
    )
    columns = ("Record ID", "Question", "Correct Answer", "Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3")

    def item(self, row: Row, number: int, config: str | None) -> Item:
        texts = [row[column].strip() for column in self.columns[2:]]
        order = random.Random(f"gpqa:{row['Record ID']}").sample(range(4), 4)
        question = SIMPLE_EVALS_CHOICE.format(question=row["Question"].strip(), options=[texts[place] for place in order])
        meta = {"letters": "ABCD", "stratum": row.get("High-level domain")}
        return Item(f"gpqa-{row['Record ID']}", question, "ABCD"[order.index(0)], meta)


class Mmmlu(LetterBenchmark):
    """MMLU in fourteen languages, 14,042 questions each; --limit takes a sample stratified by language and subject."""

    name = "mmmlu"
    source = Source("openai/MMMLU", "325a01dc3e173cac1578df94120499aaca2e2504")
    columns = ("Question", "A", "B", "C", "D", "Answer", "Subject")
    configs = MMMLU_LANGUAGES
    order_by_stratum = True

    def item(self, row: Row, number: int, config: str | None) -> Item:
        options = [str(row[letter]) for letter in "ABCD"]
        question = SIMPLE_EVALS_CHOICE.format(question=str(row["Question"]), options=options)
        meta = {"letters": "ABCD", "stratum": config, "subject": row["Subject"]}
        return Item(f"mmmlu-{config}-{number:06d}", question, row["Answer"], meta)

    def sampling_stratum(self, item: Item) -> str:
        return f"{item.meta['stratum']}/{item.meta['subject']}"

    def headline(self, accuracies: Mapping[str, float]) -> dict[str, float]:
        return {"mean_of_languages": sum(accuracies.values()) / len(accuracies)}


class Bbeh(HubBenchmark):
    """BIG-Bench Extra Hard: 23 tasks; the headline is the harmonic mean over tasks of accuracy plus one per cent."""

    name = "bbeh"
    local_name = "bbeh"
    source = Source("BBEH/bbeh", "08e07a803851822c04399782ece3c4a07ce419f9", split="train")
    columns = ("input", "target", "task", "mini")
    order_by_stratum = True

    def all_rows(self) -> Iterator[tuple[str | None, Row]]:
        """The published file holds one row twice (spatial reasoning); it counts once."""
        seen = set()
        for config, row in super().all_rows():
            if (key := row_id(row["task"], row["input"], row["target"])) not in seen:
                seen.add(key)
                yield config, row

    def item(self, row: Row, number: int, config: str | None) -> Item:
        name = row_id(row["task"], row["input"], row["target"])
        return Item(f"bbeh-{name}", f"{row['input']} {BBEH_SUFFIX}", row["target"], {"stratum": row["task"]})

    def headline(self, accuracies: Mapping[str, float]) -> dict[str, float]:
        return {"harmonic_mean": len(accuracies) / sum(1 / (acc + 0.01) for acc in accuracies.values())}

    def extract(self, item: Item, answer: str) -> str | None:
        return bbeh_answer(answer)

    def right(self, item: Item, answer: str) -> bool:
        return bbeh_match(answer, item.gold)


class BbehMini(Bbeh):
    """The 460 rows marked mini; the paper's headline there is plain accuracy."""

    name = "bbeh_mini"

    def keep(self, row: Row) -> bool:
        return bool(row["mini"])

    def headline(self, accuracies: Mapping[str, float]) -> dict[str, float]:
        return {}


def bbeh_answer(answer: str) -> str | None:
    """What follows the last "The answer is", on its line, without markup. Without that prefix there is no answer."""
    stated = re.findall(r"(?i)the (?:final )?answer is:?\s{0,9}([^\n]*)", answer.replace("**", ""))
    if not stated:
        return None
    text = stated[-1].strip().removesuffix(".").strip()
    for opening, closing in (("$", "$"), ("\\boxed{", "}"), ("\\text{", "}"), ("\\texttt{", "}")):
        if text.startswith(opening) and text.endswith(closing):
            text = text[len(opening) : -len(closing)]
    return text.strip() or None


def bbeh_match(answer: str, gold: str) -> bool:
    """google-deepmind/bbeh, evaluate.py, as rules: letter case, ", " and ",", (a) and a, numbers, quotes, brackets, "?". There
    a full stop is taken from the end of the answer alone; here it counts in neither, else a gold that has one is never met."""
    said, want = (text.strip().lower().replace(", ", ",").removesuffix(".").strip() for text in (answer, gold))
    forms = {said, said.replace("'", ""), f"[{said}]", said.removesuffix("?")}
    if forms & {want, f"[{want}]"} or said.replace("'", "") == want.replace("'", ""):
        return True
    if re.fullmatch(r"\(.\)", said) or re.fullmatch(r"\(.\)", want):
        return said.strip("()") == want.strip("()")
    try:
        return "_" not in said and float(said) == float(want)
    except ValueError:
        return False


class MathBenchmark(HubBenchmark):
    """A problem whose answer is compared as mathematics, in worker processes with a time limit."""

    columns = ("problem", "answer")
    instruction = BOXED

    def item(self, row: Row, number: int, config: str | None) -> Item:
        problem = row["problem"].strip().removesuffix(BOXED).strip()  # some copies carry the instruction already
        name = row.get("unique_id", row.get("problem_idx", row.get("id", number)))
        return Item(f"{self.name}-{name}", self.prompt(problem), str(row["answer"]))

    def prompt(self, problem: str) -> str:
        return f"{problem}\n\n{self.instruction}"

    def extract(self, item: Item, answer: str) -> str | None:
        return extract_math(answer)

    def grade_all(self, items: Sequence[Item], extracted: Sequence[str | None]) -> list[bool]:
        return judge_math([(answer, item.gold) for item, answer in zip(items, extracted, strict=True)])


class Gsm8k(MathBenchmark):
    """1,319 school problems; the gold answer follows "####"."""

    name = "gsm8k"
    source = Source("openai/gsm8k", "cc7b047b6e5bb11b4f1af84efc572db110a51b3c", config="main")
    columns = ("question", "answer")

    def item(self, row: Row, number: int, config: str | None) -> Item:
        _, mark, gold = row["answer"].rpartition("####")
        if not mark:
            raise UserError(f"gsm8k: row {number + 1} has no '####' before its answer")
        return Item(f"gsm8k-{number:04d}", self.prompt(row["question"].strip()), gold.strip())


class Math500(MathBenchmark):
    """500 problems of the MATH test set."""

    name = "math500"
    source = Source("HuggingFaceH4/MATH-500", "6e4ed1a2a79af7d8630a6b768ec859cb5af4d3be")


class Aime2025(MathBenchmark):
    """AIME 2025 I and II, 30 problems; answers are integers from 0 to 999 and are compared as such."""

    name = "aime"
    source = Source("math-ai/aime25", "563bb8404243c5f09de6ec262f2db674fe5bce9b")
    year = 2025

    def load(self, n: int | None = None) -> list[Item]:
        items = super().load(n)
        if wrong := [item.id for item in items if parse_integer(item.gold) not in range(1000)]:
            raise UserError(f"{self.name}: the answer of {wrong[0]} is not an integer from 0 to 999; is this AIME {self.year}?")
        return items

    def prompt(self, problem: str) -> str:
        return f"{BOXED}\n{AIME_RANGE}\n\n{problem}"

    def grade_all(self, items: Sequence[Item], extracted: Sequence[str | None]) -> list[bool]:
        return [grade_integer(answer, parse_integer(item.gold)) for item, answer in zip(items, extracted, strict=True)]


class Aime2026(Aime2025):
    """AIME 2026 I and II, 30 problems."""

    name = "aime2026"
    source = Source("math-ai/aime26", "79037aebdb6580008fb960d17cb21fd3099083e3")
    year = 2026


class Hmmt(MathBenchmark):
    """HMMT February 2025, 30 problems, from MathArena."""

    name = "hmmt"
    source = Source("MathArena/hmmt_feb_2025", "6fdc4277120810ff75aa22d2d5489b91f7a262a1", split="train")

    def prompt(self, problem: str) -> str:
        return f"{BOXED}\n\n{problem}"


class HmmtNov(Hmmt):
    """HMMT November 2025, 30 problems, from MathArena."""

    name = "hmmt_nov"
    source = Source("MathArena/hmmt_nov_2025", "118dbfb45c4c9467c672268ed55166642897aa46", split="train")


class Hle(HubBenchmark):
    """Humanity's Last Exam, the rows without an image. Graded by rule where the official run asks a judge model."""

    name = "hle"
    source = Source("cais/hle", "5a81a4c7271a2a2a312b9a690f0c2fde837e4c29", gated=True)
    columns = ("id", "question", "image", "answer", "answer_type", "category")
    order_by_stratum = True

    def keep(self, row: Row) -> bool:
        return not row["image"]

    def item(self, row: Row, number: int, config: str | None) -> Item:
        if row["answer_type"] not in ("multipleChoice", "exactMatch"):
            raise UserError(f"hle: row {row['id']} has answer_type {row['answer_type']!r}")
        meta = {"letters": LETTERS if row["answer_type"] == "multipleChoice" else "", "stratum": row["category"]}
        return Item(f"hle-{row['id']}", row["question"], str(row["answer"]), meta)

    def messages(self, item: Item) -> list[dict[str, str]]:
        return [{"role": "system", "content": HLE_SYSTEM}, {"role": "user", "content": item.question}]

    def extract(self, item: Item, answer: str) -> str | None:
        if item.meta["letters"]:
            return extract_letter(answer, item.meta["letters"])
        stated = list(re.finditer(r"(?mi)^[ \t*_#>]{0,20}(?:exact |final )?answer[\s*_]{0,9}[:：][\s*_]{0,9}(?=\S)", answer))
        return said_from(answer, stated[-1].end()) if stated else extract_math(answer)

    def grade_all(self, items: Sequence[Item], extracted: Sequence[str | None]) -> list[bool]:
        """Letters by identity; other answers as text, else as mathematics where the gold answer is any: "ab" is a word."""
        verdicts = [
            answer is not None and (answer == item.gold if item.meta["letters"] else same_text(answer, item.gold))
            for item, answer in zip(items, extracted, strict=True)
        ]
        open_ = [
            place
            for place, item in enumerate(items)
            if not item.meta["letters"] and not verdicts[place] and re.search(r"[\d\\=+*/^<>|]", latex(item.gold))
        ]
        return judge_open(verdicts, {place: (extracted[place], items[place].gold) for place in open_})


def same_text(answer: str, gold: str) -> bool:
    """The same signs but for spaces, quotes, bold marks and dollar signs around them and a full stop behind. Letter case counts
    in formulas and in words of one or two letters: Co is not CO."""
    said, want = (
        re.sub(r"\s+", " ", text).strip(' $*`"\u201c\u201d').removesuffix(".").strip(' $*`"\u201c\u201d')
        for text in (answer, gold)
    )
    words = bool(re.fullmatch(r"[^\d\\=+*/^<>|]*", want)) and bool(re.search(r"[^\W\d_]{3}|\A[Nn][Oo]\Z", want))
    return said == want or (words and said.casefold() == want.casefold())


class Tau2(Benchmark):
    """tau2-bench is a dialogue with tools and a simulated user: tau2_runner runs it through its own package."""

    name = "tau2"
    revision = "tau2-bench"

    def load(self, n: int | None = None) -> list[Item]:
        raise UserError(
            "tau2 is a dialogue and not a list of prompts: serve the model and run python src/eval/tau2_runner.py "
            "--endpoint URL --model NAME --user-endpoint URL --user-model NAME --tag TAG"
        )


TEXT_BENCHMARKS = (
    MmluPro, Gpqa, Mmmlu, Bbeh, BbehMini, Gsm8k, Math500, Aime2025, Aime2026, Hmmt, HmmtNov, *CODE_BENCHMARKS, Hle, Tau2,
)  # fmt: skip
