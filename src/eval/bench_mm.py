"""The multimodal benchmarks: mmmu, mmmu_pro (standard-10 and vision), mathvision, medxpert. One small class each.

Not a command. `python src/eval/mm_eval.py --model DIR --tag TAG --benchmarks mmmu,mathvision` runs them. docs/MULTIMODAL.md
has the table: data set, revision, prompt and its source, extraction, deviations. Rows come from the hub at a fixed commit, or
from `--data-dir`: NAME.jsonl of the same columns, where an image column holds a path beside the file, or base64.
"""

from __future__ import annotations

import ast
import json
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from console import UserError
from graders import extract_boxed, extract_letter, parse_integer
from pictures import Picture, image_part, interleave, text_part, unmatched
from task import Benchmark, check_data_dir
from task_list import get_benchmarks
from task_text import Item

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
SUBJECTS = (
    "Accounting Agriculture Architecture_and_Engineering Art Art_Theory Basic_Medical_Science Biology Chemistry "
    "Clinical_Medicine Computer_Science Design Diagnostics_and_Laboratory_Medicine Economics Electronics Energy_and_Power "
    "Finance Geography History Literature Manage Marketing Materials Math Mechanical_Engineering Music Pharmacy Physics "
    "Psychology Public_Health Sociology"
).split()


def column(row: Mapping[str, Any], name: str, where: str) -> Any:
    if name not in row:
        raise UserError(f"{where}: no column {name!r}; the published set has it")
    return row[name]


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


def numbered_pictures(row: Mapping[str, Any], where: str, directory: Path | None) -> dict[int, Picture]:
    """The columns image_1 to image_7 that are filled."""
    found = {k: row.get(f"image_{k}") for k in range(1, 8)}
    return {k: Picture.of_column(value, f"{where}: image_{k}", directory) for k, value in found.items() if value}


class MmBenchmark(Benchmark):
    """Rows from the hub or a file, made into items. Subclasses set the data set and fill in ``item``."""

    dataset: str
    configs: Sequence[str | None] = (None,)
    split = "test"
    pinned: str  # commit of the data set
    letters = LETTERS

    def __init__(self, data_dir: Path | None = None) -> None:
        self.data_dir = data_dir
        self.revision = self.pinned

    def load(self, n: int | None = None) -> list[Item]:
        items, faults = [], 0
        for number, row in enumerate(self.rows()):
            if n is not None and number >= n:
                break
            item = self.item(row, f"{self.name} row {number + 1}")
            faults += item.meta["unmatched"]
            items.append(item)
        if not items:
            raise UserError(f"{self.name}: no rows")
        if faults:
            print(f"{self.name}: {faults} items whose <image k> and images do not match; see docs/MULTIMODAL.md", flush=True)
        return items

    def rows(self) -> Iterator[Mapping[str, Any]]:
        """The rows with undecoded images."""
        if self.data_dir is not None:
            yield from self.local_rows(self.data_dir / f"{self.name}.jsonl")
            return
        for config in self.configs:
            yield from hub_rows(self.dataset, config, self.split, self.revision)

    def local_rows(self, path: Path) -> Iterator[Mapping[str, Any]]:
        self.revision = "local file"
        if not path.is_file():
            raise UserError(f"{path}: no such file; --data-dir needs {path.name} with the columns of {self.dataset}")
        with path.open(encoding="utf-8") as stream:
            for number, line in enumerate(stream, 1):
                try:
                    row = json.loads(line) if line.strip() else None
                except json.JSONDecodeError as error:
                    raise UserError(f"{path}:{number}: not JSON ({error})") from None
                if row is not None:
                    yield row

    def item(self, row: Mapping[str, Any], where: str) -> Item:
        """An item whose meta holds ``parts`` (the content of the user turn) and ``unmatched``."""
        raise TypeError(f"{type(self).__name__} does not define item")

    def messages(self, item: Item) -> list[dict[str, Any]]:
        return [{"role": "user", "content": item.meta["parts"]}]

    def extract(self, item: Item, answer: str) -> str | None:
        return extract_letter(answer, item.meta["letters"])


def hub_rows(dataset: str, config: str | None, split: str, revision: str) -> Iterable[Mapping[str, Any]]:
    """Rows of a hub data set at a commit, images as the bytes of their files."""
    from datasets import Image, load_dataset

    try:
        rows = load_dataset(dataset, config, split=split, revision=revision)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{dataset}@{revision}: cannot be loaded ({reason}); use --data-dir with local rows") from None
    for name, feature in rows.features.items():
        if isinstance(feature, Image):
            rows = rows.cast_column(name, Image(decode=False))
    return rows


class Mmmu(MmBenchmark):
    """MMMU validation: 900 questions of 30 subjects; options as published, a few open questions."""

    name = "mmmu"
    dataset = "MMMU/MMMU"
    configs = SUBJECTS
    split = "validation"
    pinned = "98e6ac0cb9b7b2cd2c991b85a50762edc4aedc68"

    def item(self, row: Mapping[str, Any], where: str) -> Item:
        options = option_texts(column(row, "options", where), where)
        if column(row, "question_type", where) == "multiple-choice":
            lines = "".join(f"({letter}) {option}\n" for letter, option in zip(LETTERS, options))
            text = f"{row['question']}\n{lines}\nAnswer with the option's letter from the given choices directly."
        else:
            options = []
            text = f"{row['question']}\nAnswer the question using a single word or phrase."
        pictures = numbered_pictures(row, where, self.data_dir)
        gold = column(row, "answer", where)
        meta = {"parts": interleave(text, pictures), "unmatched": unmatched(text, pictures)}
        meta["letters"] = LETTERS[: len(options)]
        return Item(str(column(row, "id", where)), text, str(gold), meta)

    def extract(self, item: Item, answer: str) -> str | None:
        return extract_letter(answer, item.meta["letters"]) if item.meta["letters"] else short_answer(answer)

    def grade(self, item: Item, extracted: str | None) -> bool:
        if extracted is None or item.meta["letters"]:
            return extracted is not None and extracted == item.gold
        golds = option_texts(item.gold, item.id) if item.gold.startswith("[") else [item.gold]
        return any(same_phrase(extracted, gold) for gold in golds)


def short_answer(answer: str) -> str | None:
    """The final phrase of an open answer: a box, what follows "answer is" or "answer:", else the last line."""
    if boxed := extract_boxed(answer):
        return boxed
    lines = [line.strip(" *") for line in answer.splitlines() if line.strip(" *")]
    if not lines:
        return None
    for mark in ("answer is", "answer:"):
        head, found, tail = lines[-1].lower().rpartition(mark)
        if found and tail.strip():
            return lines[-1][len(head) + len(found) :].strip(" *:")
    return lines[-1]


def same_phrase(answer: str, gold: str) -> bool:
    """MMMU's open questions: numbers to two decimals, else the same words without case and outer punctuation."""
    numbers = []
    for text in (answer, gold):
        plain = text.replace(",", "").replace("\\%", "%").strip(" $%.")
        try:
            numbers.append(round(float(plain), 2))
        except ValueError:
            whole = parse_integer(text)
            numbers.append(None if whole is None else float(whole))
    if None not in numbers:
        return numbers[0] == numbers[1]
    return " ".join(answer.lower().strip(" .$'\"").split()) == " ".join(gold.lower().strip(" .$'\"").split())


LAST_LINE = (
    "The last line of your response should be of the following format: 'Answer: $LETTER' (without quotes) where LETTER is "
    "one of options. Think step by step before answering."
)


class MmmuProStandard(MmBenchmark):
    """MMMU-Pro, 1,730 questions with up to ten options, images interleaved. The official chain-of-thought prompt."""

    name = "mmmu_pro_standard"
    dataset = "MMMU/MMMU_Pro"
    configs = ("standard (10 options)",)
    pinned = "b037bbe72fe851ae9c9a792c7b34722542d4dc78"

    def item(self, row: Mapping[str, Any], where: str) -> Item:
        options = option_texts(column(row, "options", where), where)
        lines = "\n".join(f"{letter}. {option}" for letter, option in zip(LETTERS, options))
        text = f"{column(row, 'question', where)}\n{lines}\nAnswer the preceding multiple choice question. {LAST_LINE}"
        pictures = numbered_pictures(row, where, self.data_dir)
        meta = {"parts": interleave(text, pictures), "unmatched": unmatched(text, pictures)}
        meta["letters"] = LETTERS[: len(options)]
        return Item(str(column(row, "id", where)), text, str(column(row, "answer", where)), meta)


class MmmuProVision(MmBenchmark):
    """MMMU-Pro, the same questions photographed or captured: the picture holds question and options."""

    name = "mmmu_pro_vision"
    dataset = "MMMU/MMMU_Pro"
    configs = ("vision",)
    pinned = "b037bbe72fe851ae9c9a792c7b34722542d4dc78"
    prompt = f"Write out the multiple-choice question in the image and then solve it. {LAST_LINE}"

    def item(self, row: Mapping[str, Any], where: str) -> Item:
        options = option_texts(column(row, "options", where), where)
        picture = Picture.of_column(column(row, "image", where), f"{where}: image", self.data_dir)
        parts = [text_part(self.prompt), image_part(picture)]
        meta = {"parts": parts, "unmatched": False, "letters": LETTERS[: len(options)]}
        return Item(str(column(row, "id", where)), self.prompt, str(column(row, "answer", where)), meta)


class MathVision(MmBenchmark):
    """MathVision (MATH-V) test, 3,040 questions: five options, or a free-form answer judged as in the text benchmarks."""

    name = "mathvision"
    dataset = "MathLLMs/MathVision"
    pinned = "0c681f39d3dacd336abf62ceb833e40320c8599f"
    letters = "ABCDE"

    def item(self, row: Mapping[str, Any], where: str) -> Item:
        options = option_texts(column(row, "options", where), where)
        shown = options if "".join(options) != "ABCDE" else []  # else they stand in the picture
        lines = "".join(f"({letter}) {option}\n" for letter, option in zip(self.letters, shown))
        text = (
            'Please solve the problem step by step and put your answer in one "\\boxed{}". If it is a multiple choice '
            f'question, only one letter is allowed in the "\\boxed{{}}".\n{column(row, "question", where)}\n{lines}'
        )
        value = row.get("decoded_image") or column(row, "image", where)
        pictures = {1: Picture.of_column(value, f"{where}: image", self.data_dir)}
        gold = str(column(row, "answer", where))
        meta = {"parts": interleave(text, pictures), "unmatched": unmatched(text, pictures)}
        meta |= {"letters": self.letters if options else "", "options": options}
        return Item(str(column(row, "id", where)), text, gold, meta)

    def extract(self, item: Item, answer: str) -> str | None:
        letter = extract_letter(answer, self.letters) if item.meta["letters"] else None
        return letter or extract_boxed(answer)

    def grade(self, item: Item, extracted: str | None) -> bool:
        return self.grade_all([item], [extracted])[0]

    def grade_all(self, items: Sequence[Item], extracted: Sequence[str | None]) -> list[bool]:
        """Letters by themselves; everything else, also an option given by its value, by the judge of mathematics."""
        verdicts = [answer is not None and answer == item.gold for item, answer in zip(items, extracted, strict=True)]
        open_places = [
            place for place, (item, answer) in enumerate(zip(items, extracted, strict=True))
            if answer is not None and not verdicts[place] and not (item.meta["letters"] and answer in self.letters)
        ]  # fmt: skip
        if open_places:
            from math_judge import judge_math

            pairs = [(extracted[place], gold_value(items[place])) for place in open_places]
            for place, verdict in zip(open_places, judge_math(pairs), strict=True):
                verdicts[place] = verdict
        return verdicts


def gold_value(item: Item) -> str:
    """The gold answer as a value: the text of the gold option where there are options."""
    options, place = item.meta["options"], LETTERS.find(item.gold)
    return options[place] if len(item.gold) == 1 and 0 <= place < len(options) else item.gold


class MedXpert(MmBenchmark):
    """MedXpertQA MM test, 2,000 questions with five options and one or more pictures, which lie in images.zip."""

    name = "medxpert"
    dataset = "TsinghuaC3I/MedXpertQA"
    configs = ("MM",)
    pinned = "f4e6fe7e5a9e13d6c97d7aa2b91cdd8b80c9cc61"
    archive: zipfile.ZipFile | None = None

    def item(self, row: Mapping[str, Any], where: str) -> Item:
        options = {key: text for key, text in dict(column(row, "options", where)).items() if text is not None}
        text = f"Q: {column(row, 'question', where)}\nA: Let's think step by step."
        names = column(row, "images", where)
        pictures = [self.picture(name, f"{where}: {name}") for name in names]
        parts = [*map(image_part, pictures), text_part(text)]
        meta = {"parts": parts, "unmatched": False, "letters": "".join(sorted(options))}
        return Item(str(column(row, "id", where)), text, str(column(row, "label", where)), meta)

    def picture(self, name: str, where: str) -> Picture:
        """A picture by the name that the row gives: beside the local rows (or in images/ there), or in the hub's archive."""
        if self.data_dir is not None:
            inside = self.data_dir / "images" / name
            return Picture.of_column(f"images/{name}" if inside.is_file() else name, where, self.data_dir)
        if self.archive is None:
            from huggingface_hub import hf_hub_download

            path = hf_hub_download(self.dataset, "images.zip", repo_type="dataset", revision=self.revision)
            self.archive = zipfile.ZipFile(path)
        found = [entry for entry in self.archive.namelist() if entry.rpartition("/")[2] == name]
        if not found:
            raise UserError(f"{where}: not in images.zip")
        return Picture(self.archive.read(found[0])).checked(where)

    def messages(self, item: Item) -> list[dict[str, Any]]:
        system = {"role": "system", "content": "You are a helpful medical assistant."}
        return [system, *super().messages(item)]


MM_BENCHMARKS = (Mmmu, MmmuProStandard, MmmuProVision, MathVision, MedXpert)
GROUPS = {"mmmu_pro": ("mmmu_pro_standard", "mmmu_pro_vision")}  # the official score is the mean of the two


def mm_names() -> list[str]:
    """Every multimodal benchmark that a record may hold."""
    from tasks_tiny_vision import TINY_VISION_TASKS

    return [benchmark.name for benchmark in (*MM_BENCHMARKS, *TINY_VISION_TASKS)]


def recorded_benchmarks(names: Sequence[str], data_dir: Path | None = None) -> list[Benchmark]:
    """Instances of the benchmarks of a record, of text or of pictures, in the order of the names."""
    seen = [name for name in names if name in mm_names()]
    text = [name for name in names if name not in seen]
    found = [*(get_mm_benchmarks(seen, data_dir) if seen else []), *(get_benchmarks(text, data_dir) if text else [])]
    return sorted(found, key=lambda benchmark: names.index(benchmark.name))


def get_mm_benchmarks(names: Sequence[str], data_dir: Path | None = None) -> list[Benchmark]:
    """Instances of the named benchmarks, or one line that lists the known ones."""
    from tasks_tiny_vision import TINY_VISION_TASKS

    published = {benchmark.name: benchmark for benchmark in MM_BENCHMARKS}
    drawn = {task.name: task for task in TINY_VISION_TASKS}
    names = [member for name in names for member in GROUPS.get(name, (name,))]
    known = [*published, *GROUPS, *drawn]
    if unknown := [name for name in names if name not in published and name not in drawn]:
        raise UserError(f"unknown benchmark {', '.join(map(repr, unknown))}; known: {', '.join(known)}")
    check_data_dir(data_dir)
    return [published[name](data_dir) if name in published else drawn[name]() for name in dict.fromkeys(names)]
