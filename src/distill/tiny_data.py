"""What razor-tiny and razor-tiny-vl learn from: their tokenizers, and batches as a pure function of (seed, step).

Not a command. Resuming needs no state of the data; tiny_train reads the batches through a DataLoader with many workers. The
tokenizers are built from generated text (seeded, so the same file every time).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerFast

from console import UserError, file_sha256
from gguf_convert import QWEN2_PATTERN
from task_text import RELATIONS, TASK_TEXTS, TaskText, default_world, letters_of, option_list
from tasks_tiny import TINY_VISION_TASKS, Scene, TinyBars, TinyCount, TinyDigits, TinyVision

END_OF_TEXT, _, IM_END = SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
VISION_START, VISION_END, IMAGE, _ = VISION_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
THINKING = ("<think>", "</think>")
VOCABULARY, VL_VOCABULARY = 832, 384
PATCH, MERGE = 8, 2  # pixels of a patch; patches a side of a token
# the rows of a batch in turn: counting takes the most practice
VL_MIX: tuple[type[TinyVision], ...] = (TinyCount, TinyDigits, TinyCount, TinyBars)
TYPICAL_TOKENS = {"statements": 91, "options": 60, "tiny_know": 80, "tiny_math": 185, "tiny_reason": 233, "tiny_code": 186}
TEMPLATE = """\
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}
"""
VL_TEMPLATE = """\
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' }}
{%- if message.content is string %}
{{- message.content }}
{%- else %}
{%- for part in message.content %}
{%- if part.type == 'image' %}
{{- '<|vision_start|><|image_pad|><|vision_end|>' }}
{%- else %}
{{- part.text }}
{%- endif %}
{%- endfor %}
{%- endif %}
{{- '<|im_end|>\\n' }}
{%- endfor %}
"""
GENERATION = """\
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n<think>\\n' }}
{%- endif %}"""


# ---------------------------------------------------------------- tokenizers


def trained_bpe(texts: Iterable[str], size: int, specials: Sequence[str] = (), normalizer: Any = None) -> Tokenizer:
    """A byte-level BPE of ``size`` tokens, ``specials`` first, with the Qwen2 pre-tokenizer's pattern, which llama.cpp knows by
    name."""
    tokenizer = Tokenizer(models.BPE())
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    split = pre_tokenizers.Split(Regex(QWEN2_PATTERN), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=list(specials), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def byte_bpe(texts: Sequence[str], size: int, specials: Sequence[str], template: str) -> PreTrainedTokenizerFast:
    """The tokenizer of such a training (seconds on one core), in NFC, with special tokens and a chat template with thinking."""
    tokenizer = trained_bpe(texts, size - len(specials) - len(THINKING), normalizer=normalizers.NFC())
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=IM_END, pad_token=END_OF_TEXT, model_max_length=2048)
    fast.add_special_tokens({"additional_special_tokens": list(specials)})
    fast.add_tokens(list(THINKING))
    fast.chat_template = template + GENERATION
    return fast


def build_tokenizer(samples: int = 6000) -> PreTrainedTokenizerFast:
    """razor-tiny's, from training-split texts of every task and statements of the world."""
    rng, world = random.Random("tokenizer:0"), default_world()
    texts = [world.statement(person, rng) for person in rng.sample(world.people, samples)]
    for task in TASK_TEXTS:
        instance = task()
        for _ in range(samples):
            item, solution = instance.generate(rng, "train")
            texts += [item.question, solution]
    return byte_bpe(texts, VOCABULARY, SPECIALS, TEMPLATE)


def vl_texts(count: int = 2000) -> list[str]:
    """Training-split questions and solutions, and the names of the two speakers."""
    rng = random.Random("tokenizer:tiny-vl")
    scenes = [task().scene_of(rng, "train") for task in TINY_VISION_TASKS for _ in range(count)]
    return [text for scene in scenes for text in ("user", scene.question, "assistant", scene.solution)]


def build_vl_tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """razor-tiny-vl's, with the vision tokens and a template for content parts."""
    return byte_bpe(texts, VL_VOCABULARY, SPECIALS + VISION_TOKENS, VL_TEMPLATE)


def encoded(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> list[list[int]]:
    return [e.ids for e in tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False)]


# ---------------------------------------------------------------- text


def prompt_text(question: str) -> str:
    """The chat template's rendering of one user turn, with the generation prompt (a test compares the two)."""
    return f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n<think>\n"


def completion_text(solution: str) -> str:
    """What the model should continue with: the reference turn without the `<think>` that the prompt already opened."""
    return solution.removeprefix("<think>\n") + IM_END + "\n"


def encode_pairs(
    tokenizer: PreTrainedTokenizerFast, pairs: Sequence[tuple[str, str]], size: int | None = None,
    prompt_weight: float = 0.0, skipped: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """(ids [N, size] right-padded, loss weights) of (prompt, solution) pairs, a row each: the solution counts 1, the prompt
    ``prompt_weight`` after its ``skipped`` first tokens. Without a ``size``: one more than a multiple of 64."""
    parts = encoded(tokenizer, [text for prompt, solution in pairs for text in (prompt, completion_text(solution))])
    # without the newline after the end of turn: generation stops before it
    rows = [(prompt, prompt + rest[:-1]) for prompt, rest in zip(parts[::2], parts[1::2], strict=True)]
    longest = max(len(row) for _, row in rows)
    size = size or -(-longest // 64) * 64 + 1
    if longest > size:
        raise UserError(f"LENGTH: an item has {longest} tokens; {size} fit")
    ids, weights = torch.full((len(rows), size), tokenizer.pad_token_id), torch.zeros(len(rows), size)
    for i, (prompt, row) in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
        weights[i, skipped : len(prompt)] = prompt_weight
        weights[i, len(prompt) : len(row)] = 1.0
    return ids, weights


def options_drill(rng: random.Random) -> tuple[str, str]:
    """(prompt, completion): a list of 4 to 8 options, and the same options with their letters in another order.

    A question asks for one letter; this asks for all of them, which is what teaches a small model to look one up.
    """
    pool = default_world().values[rng.choice(RELATIONS)] if rng.random() < 0.5 else [str(n) for n in range(1, 200)]
    options = rng.sample(pool, rng.randint(4, 8))
    pairs = list(zip(options, letters_of(len(options)), strict=True))
    rng.shuffle(pairs)
    answer = ", ".join(f"{option}({letter})" for option, letter in pairs)
    return option_list(options) + "\n", answer + "." + END_OF_TEXT


@dataclass
class Batches(Dataset):
    """Item ``step`` is one batch, drawn by ``batch``: (token ids [rows, length + 1], loss weights of the same shape, ...)."""

    tokenizer: PreTrainedTokenizerFast
    seed: int
    steps: int
    rows: int
    length: int
    prompt_weight: float
    name: ClassVar[str]  # of the random numbers
    batch: ClassVar[Callable[..., tuple[torch.Tensor, ...]]]

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> tuple[torch.Tensor, ...]:
        if not 0 <= step < self.steps:
            raise IndexError(step)
        return self.batch(random.Random(f"{self.name}:{self.seed}:{step}"))


@dataclass
class TinyBatches(Batches):
    """Of razor-tiny: rows packed with documents in the given ``shares``."""

    shares: dict[str, float]
    name = "batch"

    def __post_init__(self) -> None:
        self.tasks: dict[str, TaskText] = {task.name: task() for task in TASK_TEXTS}

    def batch(self, rng: random.Random) -> tuple[torch.Tensor, ...]:
        size = self.length + 1
        documents, filler = self.documents(rng), self.filler(rng)
        rows: list[list[tuple[int, float]]] = [[]]  # the token and its weight
        while len(rows) <= self.rows:
            tokens, prompt = next(documents)
            if len(tokens) > size:
                continue
            if (room := size - len(rows[-1])) < len(tokens):
                rows[-1] += [(next(filler), 1.0) for _ in range(room)]
                rows.append([])
            rows[-1] += zip(tokens, [self.prompt_weight] * prompt + [1.0] * (len(tokens) - prompt))
        ids, weights = zip(*(zip(*row) for row in rows[:-1]))
        return torch.tensor(ids), torch.tensor(weights)

    def documents(self, rng: random.Random, burst: int = 64) -> Iterator[tuple[list[int], int]]:
        """Endless (token ids, length of the prompt part) in the proportions of ``shares``, counted in tokens."""
        spent = {name: rng.random() * 1000 for name in self.shares}
        while True:
            kinds = []
            for _ in range(burst):
                kind = min(spent, key=lambda name: spent[name] / self.shares[name])
                spent[kind] += TYPICAL_TOKENS[kind]
                kinds.append(kind)
            rng.shuffle(kinds)
            pairs = [self.text_of(kind, rng) for kind in kinds]
            parts = encoded(self.tokenizer, [part for pair in pairs for part in pair])
            for prompt, rest in zip(parts[::2], parts[1::2], strict=True):
                yield prompt + rest, len(prompt)

    def text_of(self, kind: str, rng: random.Random) -> tuple[str, str]:
        """(prompt, completion) of one document; statements of the world have no prompt."""
        if kind == "statements":
            world = default_world()
            people = [rng.choice(world.people) for _ in range(4)]
            return "", "\n".join(world.statement(person, rng) for person in people) + END_OF_TEXT
        if kind == "options":
            return options_drill(rng)
        item, solution = self.tasks[kind].generate(rng, "train")
        return prompt_text(item.question), completion_text(solution)

    def filler(self, rng: random.Random) -> Iterator[int]:
        """Endless tokens of statements, to fill what a row has left."""
        while True:
            yield from encoded(self.tokenizer, [self.text_of("statements", rng)[1]])[0]


# ---------------------------------------------------------------- real text

STRATA = ("prose", "code", "manual pages", "other languages", "structured data")  # of a corpus (tiny_corpus.py)


@dataclass
class TextBatches(Batches):
    """Of a corpus: windows of its training tokens, ``rows`` of them for each of ``world`` processes."""

    ids: Path
    rank: int
    world: int
    name = "text-batch"

    def batch(self, rng: random.Random) -> tuple[torch.Tensor, ...]:
        ids, size = np.memmap(self.ids, "<u2", "r"), self.length + 1
        starts = [rng.randrange(len(ids) - size + 1) for _ in range(self.rows * self.world)][self.rank :: self.world]
        rows = torch.from_numpy(np.stack([ids[start : start + size] for start in starts]).astype(np.int64))
        return rows, torch.ones(rows.shape)


def ids_entry(corpus: Path, split: str) -> dict[str, Any]:
    """The record's entry of the tokens of a split: their digest and number, and whose tokens they are."""
    file = corpus / f"{split}.bin"
    if not file.is_file():
        raise UserError(f"{file}: there is none; bash pipelines/make_text.sh makes a corpus, and goes on where it was stopped")
    tokenizer = file_sha256(corpus / "tokenizer/tokenizer.json")
    return {
        "name": f"tokens, {split}", "revision": f"tokenizer {tokenizer}", "sha256": file_sha256(file),
        "n": file.stat().st_size // 2,
    }  # fmt: skip


# ---------------------------------------------------------------- pictures


def vl_prompt(question: str, tokens: int) -> str:
    """The template's rendering of a picture and a question, the picture's place widened to its ``tokens``."""
    return prompt_text(VISION_START + IMAGE * tokens + VISION_END + question)


@dataclass
class VlBatches(Batches):
    """Of razor-tiny-vl, a scene a row; third the pictures, uint8 [rows, S, S, 3]."""

    name = "vl-batch"

    def __post_init__(self) -> None:
        if self.length % 16:
            raise UserError(f"LENGTH={self.length}: the gated delta rule takes chunks of 16 tokens; give a multiple of it")
        self.tasks: list[TinyVision] = [task() for task in VL_MIX]

    def batch(self, rng: random.Random) -> tuple[torch.Tensor, ...]:
        scenes = [self.tasks[row % len(self.tasks)].scene_of(rng, "train") for row in range(self.rows)]
        return encode_scenes(self.tokenizer, scenes, self.length + 1, self.prompt_weight)


def encode_scenes(
    tokenizer: PreTrainedTokenizerFast, scenes: list[Scene], size: int, prompt_weight: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Scenes as ids, loss weights (padding and the picture's tokens 0) and pictures."""
    pixels = torch.from_numpy(np.stack([np.asarray(scene.image, dtype=np.uint8) for scene in scenes]))
    tokens = (pixels.shape[1] // (PATCH * MERGE)) ** 2
    pairs = [(vl_prompt(scene.question, tokens), scene.solution) for scene in scenes]
    return *encode_pairs(tokenizer, pairs, size, prompt_weight, tokens + 5), pixels
