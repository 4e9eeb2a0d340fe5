"""The tiny tasks as benchmarks: tiny_know, tiny_math, tiny_reason, tiny_code; and of sight: tiny_count, tiny_digits, tiny_bars.

Not a command; the same interface as the real benchmarks (task.Benchmark). The text of the first four is src/quant/task_text.py.
The pictures of the others, 64 x 64, are drawn here by a seeded generator. Their splits cannot overlap: as in task_text, a hash
of what defines an item (the shapes by cell, the number, the heights; each with its question) says to which it belongs.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image, ImageDraw

from code_sandbox import run_many
from graders import extract_boxed, extract_code, extract_letter, grade_integer
from pictures import Picture, image_part, text_part
from task import Benchmark
from task_text import CodeText, Item, KnowText, MathText, ReasonText, TaskText, letters_of, split_of

SIZE, CELL = 64, 16
VISION_REVISION = "tiny-vision-2"  # 2: the reference turns of tiny_count name every cell; pictures and questions are those of 1
VISION_TEST_ITEMS = 250  # of tiny_bars' 6,048 questions about 380 are test questions
INKS = {"red": (210, 40, 40), "green": (30, 140, 50), "blue": (40, 70, 210)}
SHAPES = ("circle", "square", "triangle")
# Segments of a digit, top to bottom and left to right: x0, y0, x1, y1 in units of its width and half its height.
SEGMENTS = {
    "a": (0, 0, 1, 0), "f": (0, 0, 0, 1), "b": (1, 0, 1, 1), "g": (0, 1, 1, 1),
    "e": (0, 1, 0, 2), "c": (1, 1, 1, 2), "d": (0, 2, 1, 2),
}  # fmt: skip
LIT = ("abcdef", "bc", "abged", "abgcd", "fgbc", "afgcd", "afgedc", "abc", "abcdefg", "abcdfg")


class BoxedInteger(Benchmark):
    """The answer is an integer in a box."""

    def extract(self, item: Item, answer: str) -> str | None:
        return extract_boxed(answer)

    def right(self, item: Item, answer: str) -> bool:
        return grade_integer(answer, int(item.gold))


class OptionLetter(Benchmark):
    """The answer is the letter of one of so many options."""

    options: int

    def extract(self, item: Item, answer: str) -> str | None:
        return extract_letter(answer, letters_of(self.options))


class TinyKnow(KnowText, OptionLetter):
    """The letter of the memorised fact."""


class TinyMath(MathText, BoxedInteger):
    """The integer in the box."""


class TinyReason(ReasonText, OptionLetter):
    """The letter of the age."""


class TinyCode(CodeText, Benchmark):
    """The function, run against its asserts."""

    def extract(self, item: Item, answer: str) -> str | None:
        return extract_code(answer, item.meta["entry_point"])

    def standard(self, item: Item) -> Any:
        return item.meta["tests"]

    def grade_all(self, items: Sequence[Item], extracted: Sequence[str | None]) -> list[bool]:
        """Run every program in the sandbox, two at a time; an answer without a program is wrong."""
        pairs = zip(items, extracted, strict=True)
        jobs = [(program, item.meta["tests"], item.meta["entry_point"]) for item, program in pairs if program]
        verdicts = iter(run_many(jobs))
        return [next(verdicts).passed if program else False for program in extracted]


@dataclass(frozen=True)
class Scene:
    """A drawn item. ``key`` decides its split; ``solution`` is the reference assistant turn with its thinking."""

    key: str
    image: Any
    question: str
    gold: str
    solution: str


def canvas(rng: random.Random) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    """A nearly white page of a random tint."""
    image = Image.new("RGB", (SIZE, SIZE), tuple(rng.randint(225, 255) for _ in range(3)))
    return image, ImageDraw.Draw(image)


def ink(rng: random.Random, name: str | None = None) -> tuple[int, ...]:
    """A shade of a named ink, of a random one by default."""
    return tuple(max(0, min(255, c + rng.randint(-25, 25))) for c in INKS[name or rng.choice(list(INKS))])


class TinyVision(TaskText, Benchmark):
    """Shared part: draw scenes of a split, one item for each key, the picture before the question."""

    max_tokens = 64  # the longest reference solution has about 45
    revision = VISION_REVISION

    def scene(self, rng: random.Random) -> Scene:
        """One random scene."""
        raise TypeError(f"{type(self).__name__} does not define scene")

    def scene_of(self, rng: random.Random, split: str) -> Scene:
        """One scene of ``split``, drawn from ``rng``."""
        while True:
            scene = self.scene(rng)
            if split_of(f"{self.name}:{scene.key}") == split:
                return scene

    def load_with_solutions(self, n: int | None = None, split: str = "test") -> list[tuple[Item, str]]:
        """The first ``n`` items of a split, no key twice, with their reference turns; the same on every machine."""
        rng = random.Random(f"{self.name}:{self.revision}:{split}")
        found: dict[str, Scene] = {}
        while len(found) < (VISION_TEST_ITEMS if n is None else min(n, VISION_TEST_ITEMS)):
            scene = self.scene_of(rng, split)
            found.setdefault(scene.key, scene)
        scenes = enumerate(found.values())
        return [
            (Item(f"{self.name}-{split}-{i:05d}", s.question, s.gold, {"picture": Picture.of_image(s.image)}), s.solution)
            for i, s in scenes
        ]

    def messages(self, item: Item) -> list[dict[str, Any]]:
        return [{"role": "user", "content": [image_part(item.meta["picture"]), text_part(item.question)]}]


class TinyCount(BoxedInteger, TinyVision):
    """Shapes in a 4 x 4 grid: how many are of a kind, or of a colour. Thinking names what is asked about in every cell and
    counts row by row."""

    name = "tiny_count"

    def scene(self, rng: random.Random) -> Scene:
        image, draw = canvas(rng)
        fill = rng.uniform(0.2, 0.8)
        cells = [(rng.choice(SHAPES), rng.choice(list(INKS))) if rng.random() < fill else None for _ in range(16)]
        for place, cell in enumerate(cells):
            if cell:
                self.draw_shape(rng, draw, place, *cell)
        by_kind = rng.random() < 0.5
        asked = rng.choice(SHAPES) if by_kind else rng.choice(list(INKS))
        seen = ["." if cell is None else cell[0 if by_kind else 1] for cell in cells]
        rows = [seen[start : start + 4] for start in range(0, 16, 4)]
        total = seen.count(asked)
        question = f"How many {asked}s are there?" if by_kind else f"How many shapes are {asked}?"
        written = "\n".join(" " + " ".join(row) + f" ={row.count(asked)}" for row in rows)
        solution = f"<think>\n{written}\n</think>\n\nThe answer is \\boxed{{{total}}}."
        key = "|".join("-" if cell is None else " ".join(cell) for cell in cells) + f":{question}"
        return Scene(key, image, question, str(total), solution)

    @staticmethod
    def draw_shape(rng: random.Random, draw: ImageDraw.ImageDraw, place: int, shape: str, colour: str) -> None:
        """A shape of 9 to 12 pixels, somewhere in its cell."""
        side = rng.randint(9, 12)
        x = place % 4 * CELL + rng.randint(1, CELL - side - 1)
        y = place // 4 * CELL + rng.randint(1, CELL - side - 1)
        box, tone = (x, y, x + side, y + side), ink(rng, colour)
        if shape == "circle":
            draw.ellipse(box, fill=tone)
        elif shape == "square":
            draw.rectangle(box, fill=tone)
        else:
            draw.polygon([(x + side // 2, y), (x, y + side), (x + side, y + side)], fill=tone)


class TinyDigits(BoxedInteger, TinyVision):
    """A four-digit number in seven-segment digits; the test numbers never occur in training."""

    name = "tiny_digits"

    def scene(self, rng: random.Random) -> Scene:
        image, draw = canvas(rng)
        number, tone = str(rng.randint(1000, 9999)), ink(rng)
        for place, digit in enumerate(number):
            self.draw_digit(rng, draw, place * CELL, int(digit), tone)
        solution = f"<think>\n{number}\n</think>\n\nThe answer is \\boxed{{{number}}}."
        return Scene(number, image, "What number is shown?", number, solution)

    @staticmethod
    def draw_digit(rng: random.Random, draw: ImageDraw.ImageDraw, left: int, digit: int, tone: tuple[int, ...]) -> None:
        """A digit of 8 or 9 by 20 to 28 pixels in its column of 16, at any height of the picture."""
        width, half = rng.randint(8, 9), rng.randint(10, 14)
        x, y = left + rng.randint(2, 13 - width), rng.randint(3, SIZE - 2 * half - 4)
        for segment in LIT[digit]:
            x0, y0, x1, y1 = SEGMENTS[segment]
            draw.line((x + x0 * width, y + y0 * half, x + x1 * width, y + y1 * half), fill=tone, width=2)


class TinyBars(OptionLetter, TinyVision):
    """Four bars of different heights: which is the tallest, the shortest. Thinking reads the heights, 1 to 9."""

    name = "tiny_bars"
    options = 4

    def scene(self, rng: random.Random) -> Scene:
        image, draw = canvas(rng)
        heights = rng.sample(range(1, 10), 4)
        for place, height in enumerate(heights):
            width = rng.randint(8, 12)
            x = place * CELL + rng.randint(1, CELL - width - 1)
            draw.rectangle((x, SIZE - 2 - height * 6 - rng.randint(0, 1), x + width, SIZE - 2), fill=ink(rng))
        word = rng.choice(("tallest", "shortest"))
        pick = max if word == "tallest" else min
        gold = letters_of(self.options)[heights.index(pick(heights))]
        written = "".join(map(str, heights))
        solution = f"<think>\n{written}\n</think>\n\nThe answer is {gold}."
        return Scene(f"{written}:{word}", image, f"Which bar is {word}: A, B, C or D?", gold, solution)


TINY_TASKS = (TinyKnow, TinyMath, TinyReason, TinyCode)
TINY_VISION_TASKS = (TinyCount, TinyDigits, TinyBars)
