"""The multimodal benchmarks: mmmu, mmmu_pro (standard-10 and vision), mathvision, medxpert. One small class each.

Not a command. `python src/eval/mm_eval.py --model DIR --tag TAG --benchmarks mmmu,mathvision` runs them. docs/MULTIMODAL.md
has the table: data set, revision, prompt and its source, extraction, deviations. Rows come from the hub at a fixed commit, or
from `--data-dir`: NAME.jsonl of the same columns, where an image column holds a path beside the file, or base64.
"""

from __future__ import annotations

import ast
import re
import zipfile
from collections.abc import Mapping, Sequence
from string import ascii_uppercase as LETTERS
from typing import Any

from console import UserError
from graders import extract_boxed, extract_letter, extract_math, said_from
from math_answers import MAX_LENGTH, clean, exact_number, judge_open, units_differ, without_units
from pictures import Picture, image_part, interleave, text_part, unmatched
from task import HubBenchmark, Row, Source, reachable
from task_text import Item

MMMU_PRO_REVISION = "b037bbe72fe851ae9c9a792c7b34722542d4dc78"
SUBJECTS = (
    "Accounting Agriculture Architecture_and_Engineering Art Art_Theory Basic_Medical_Science Biology Chemistry "
    "Clinical_Medicine Computer_Science Design Diagnostics_and_Laboratory_Medicine Economics Electronics Energy_and_Power "
    "Finance Geography History Literature Manage Marketing Materials Math Mechanical_Engineering Music Pharmacy Physics "
    "Psychology Public_Health Sociology"
).split()


def option_texts(value: Any, where: str) -> list[str]:
    """The options of a row: a list, or the text of a Python list, as MMMU publishes them."""
    if isinstance(value, str):
        try:
            value = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            raise UserError(f"{where}: options {value[:60]!r} are not a list") from None
    if not isinstance(value, (list, tuple)):
        raise UserError(f"{where}: options are a {type(value).__name__}, not a list")
    return [str(option) for option in value]


class MmBenchmark(HubBenchmark):
    """A question with pictures, multiple choice unless a class says otherwise."""

    one_file = True

    def load(self, n: int | None = None) -> list[Item]:
        items = super().load(n)
        if faults := sum(item.meta["unmatched"] for item in items):
            print(f"{self.name}: {faults} items whose <image k> and images do not match; see docs/MULTIMODAL.md", flush=True)
        return items

    def asked(self, row: Row, text: str, pictures: Mapping[int, Picture], gold: str, letters: str, **more: Any) -> Item:
        """The item of a row; ``letters``: its options, none for an open question."""
        meta = {"parts": interleave(text, pictures), "unmatched": unmatched(text, pictures), "letters": letters}
        return Item(str(row["id"]), text, str(gold), meta | more)

    def picture(self, value: Any, where: str) -> Picture:
        return Picture.of_column(value, f"{self.name} {where}", self.data_dir)

    def numbered_pictures(self, row: Row, where: str) -> dict[int, Picture]:
        """The columns image_1 to image_7 that are filled."""
        found = {k: row.get(f"image_{k}") for k in range(1, 8)}
        return {k: self.picture(value, f"{where}: image_{k}") for k, value in found.items() if value}

    def messages(self, item: Item) -> list[dict[str, Any]]:
        return [{"role": "user", "content": item.meta["parts"]}]

    def extract(self, item: Item, answer: str) -> str | None:
        return extract_letter(answer, item.meta["letters"])


class Mmmu(MmBenchmark):
    """MMMU validation: 900 questions of 30 subjects; options as published, a few open questions."""

    name = "mmmu"
    source = Source("MMMU/MMMU", "98e6ac0cb9b7b2cd2c991b85a50762edc4aedc68", split="validation")
    columns = ("id", "question", "options", "question_type", "answer")
    configs = SUBJECTS

    def item(self, row: Row, number: int, config: str | None) -> Item:
        where = f"row {number + 1}"
        options = option_texts(row["options"], f"{self.name} {where}")
        if row["question_type"] == "multiple-choice":
            lines = "".join(f"({letter}) {option}\n" for letter, option in zip(LETTERS, options))
            text = f"{row['question']}\n{lines}\nAnswer with the option's letter from the given choices directly."
        else:
            options = []
            text = f"{row['question']}\nAnswer the question using a single word or phrase."
        return self.asked(row, text, self.numbered_pictures(row, where), row["answer"], LETTERS[: len(options)])

    def extract(self, item: Item, answer: str) -> str | None:
        return extract_letter(answer, item.meta["letters"]) if item.meta["letters"] else short_answer(answer)

    def right(self, item: Item, answer: str) -> bool:
        if item.meta["letters"]:
            return answer == item.gold
        golds = option_texts(item.gold, item.id) if item.gold.startswith("[") else [item.gold]
        return any(same_phrase(answer, gold) for gold in golds)


def short_answer(answer: str) -> str | None:
    """The final phrase of an open answer: a box, what follows the last "answer is" or "answer:" on its line, else the last
    line."""
    if boxed := extract_boxed(answer):
        return boxed
    if marks := list(re.finditer(r"(?i)\banswer(?:[ *_]{0,9}(?:is\b|:))[ *_:]{0,9}(?=[^\s*_:])", answer)):
        return said_from(answer, marks[-1].end()).rstrip(". *_`") or None
    lines = [line.strip(" *") for line in answer.splitlines() if line.strip(" *")]
    return lines[-1] if lines else None


def same_phrase(answer: str, gold: str) -> bool:
    """MMMU's open questions: numbers to two decimals, a unit that only one of them has left out, else the same words without
    case and outer punctuation. "1,2" is no number, .5 is 0.5."""
    if len(answer) > MAX_LENGTH:
        return False
    said, want = (
        clean(re.sub(r"\\?%\s*\Z", "", text.replace("**", "").strip(" '\"*`").rstrip("."))) for text in (answer, gold)
    )
    said, want = (re.sub(r"(?<=\d)\s?([VAWmsgJNKFHCTL])\Z", r"\\text{ \1}", text) for text in (said, want))
    number, other = (exact_number(without_units(text)) for text in (said, want))
    if number is not None and other is not None:
        return not units_differ(want, said) and round(float(number), 2) == round(float(other), 2)
    words = [" ".join(text.lower().replace("**", "").strip(" $'\"").rstrip(". $'\"").split()) for text in (answer, gold)]
    return words[0] == words[1]


LAST_LINE = (
    "The last line of your response should be of the following format: 'Answer: $LETTER' (without quotes) where LETTER is "
    "one of options. Think step by step before answering."
)


class MmmuProStandard(MmBenchmark):
    """MMMU-Pro, 1,730 questions with up to ten options, images interleaved. The official chain-of-thought prompt."""

    name = "mmmu_pro_standard"
    source = Source("MMMU/MMMU_Pro", MMMU_PRO_REVISION, config="standard (10 options)")
    columns = ("id", "question", "options", "answer")

    def item(self, row: Row, number: int, config: str | None) -> Item:
        where = f"row {number + 1}"
        options = option_texts(row["options"], f"{self.name} {where}")
        lines = "\n".join(f"{letter}. {option}" for letter, option in zip(LETTERS, options))
        text = f"{row['question']}\n{lines}\nAnswer the preceding multiple choice question. {LAST_LINE}"
        return self.asked(row, text, self.numbered_pictures(row, where), row["answer"], LETTERS[: len(options)])


class MmmuProVision(MmBenchmark):
    """MMMU-Pro, the same questions photographed or captured: the picture holds question and options."""

    name = "mmmu_pro_vision"
    source = Source("MMMU/MMMU_Pro", MMMU_PRO_REVISION, config="vision")
    columns = ("id", "options", "answer", "image")
    prompt = f"Write out the multiple-choice question in the image and then solve it. {LAST_LINE}"

    def item(self, row: Row, number: int, config: str | None) -> Item:
        where = f"row {number + 1}"
        options = option_texts(row["options"], f"{self.name} {where}")
        parts = [text_part(self.prompt), image_part(self.picture(row["image"], f"{where}: image"))]
        return self.asked(row, self.prompt, {}, row["answer"], LETTERS[: len(options)], parts=parts)


class MathVision(MmBenchmark):
    """MathVision (MATH-V) test, 3,040 questions: five options, or a free-form answer judged as in the text benchmarks."""

    name = "mathvision"
    source = Source("MathLLMs/MathVision", "0c681f39d3dacd336abf62ceb833e40320c8599f")
    columns = ("id", "question", "options", "answer", "image")
    letters = "ABCDE"

    def item(self, row: Row, number: int, config: str | None) -> Item:
        where = f"row {number + 1}"
        options = option_texts(row["options"], f"{self.name} {where}")
        shown = options if "".join(options) != "ABCDE" else []  # else they stand in the picture
        lines = "".join(f"({letter}) {option}\n" for letter, option in zip(self.letters, shown))
        text = (
            'Please solve the problem step by step and put your answer in one "\\boxed{}". If it is a multiple choice '
            f'question, only one letter is allowed in the "\\boxed{{}}".\n{row["question"]}\n{lines}'
        )
        pictures = {1: self.picture(row.get("decoded_image") or row["image"], f"{where}: image")}
        return self.asked(row, text, pictures, row["answer"], self.letters if options else "", options=options)

    def extract(self, item: Item, answer: str) -> str | None:
        letter = extract_letter(answer, self.letters) if item.meta["letters"] else None
        return letter or extract_math(answer)

    def grade_all(self, items: Sequence[Item], extracted: Sequence[str | None]) -> list[bool]:
        """Letters by themselves; everything else, also an option given by its value, by the judge of mathematics."""
        verdicts = [answer is not None and answer == item.gold for item, answer in zip(items, extracted, strict=True)]
        pairs = {
            place: (answer, gold_value(item))
            for place, (item, answer) in enumerate(zip(items, extracted, strict=True))
            if answer is not None and not verdicts[place] and not (item.meta["letters"] and answer in self.letters)
        }
        return judge_open(verdicts, pairs)


def gold_value(item: Item) -> str:
    """The gold answer as a value: the text of the gold option where there are options."""
    options, place = item.meta["options"], LETTERS.find(item.gold)
    return options[place] if len(item.gold) == 1 and 0 <= place < len(options) else item.gold


class MedXpert(MmBenchmark):
    """MedXpertQA MM test, 2,000 questions with five options and one or more pictures, which lie in images.zip."""

    name = "medxpert"
    source = Source("TsinghuaC3I/MedXpertQA", "f4e6fe7e5a9e13d6c97d7aa2b91cdd8b80c9cc61", config="MM")
    columns = ("id", "question", "options", "images", "label")
    archive: zipfile.ZipFile | None = None

    def item(self, row: Row, number: int, config: str | None) -> Item:
        options = {key: text for key, text in dict(row["options"]).items() if text is not None}
        text = f"Q: {row['question']}\nA: Let's think step by step."
        pictures = [self.named_picture(name, f"row {number + 1}: {name}") for name in row["images"]]
        parts = [*map(image_part, pictures), text_part(text)]
        return self.asked(row, text, {}, row["label"], "".join(sorted(options)), parts=parts, unmatched=False)

    def named_picture(self, name: str, where: str) -> Picture:
        """A picture by the name that the row gives: beside the local rows (or in images/ there), or in the hub's archive."""
        if self.data_dir is not None:
            inside = self.data_dir / "images" / name
            return self.picture(f"images/{name}" if inside.is_file() else name, where)
        if self.archive is None:
            from huggingface_hub import hf_hub_download

            repository, revision = self.source.repository, self.source.revision
            with reachable(self.source):
                self.archive = zipfile.ZipFile(
                    hf_hub_download(repository, "images.zip", repo_type="dataset", revision=revision)
                )
        found = [entry for entry in self.archive.namelist() if entry.rpartition("/")[2] == name]
        if not found:
            raise UserError(f"{self.name} {where}: not in images.zip")
        return Picture(self.archive.read(found[0])).checked(f"{self.name} {where}")

    def messages(self, item: Item) -> list[dict[str, Any]]:
        system = {"role": "system", "content": "You are a helpful medical assistant."}
        return [system, *super().messages(item)]


MM_BENCHMARKS = (Mmmu, MmmuProStandard, MmmuProVision, MathVision, MedXpert)
