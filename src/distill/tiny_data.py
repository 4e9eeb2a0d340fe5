"""Training batches of razor-tiny, a pure function of (seed, step): resuming needs no state of the data.

Not a command. tiny_train reads `TinyBatches` through a DataLoader with many workers.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

import torch
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerFast

from task_text import RELATIONS, TASK_TEXTS, TaskText, default_world, letters_of, option_list
from tiny_tokenizer import END_OF_TEXT, IM_END


def prompt_text(question: str) -> str:
    """The chat template's rendering of one user turn, with the generation prompt (a test compares the two)."""
    return f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n<think>\n"


def completion_text(solution: str) -> str:
    """What the model should continue with: the reference turn without the `<think>` that the prompt already opened."""
    return solution.removeprefix("<think>\n") + IM_END + "\n"


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


class TinyBatches(Dataset):
    """Item ``step`` is one batch: (token ids [rows, length + 1], loss weights [rows, length + 1])."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        seed: int,
        steps: int,
        rows: int,
        length: int,
        shares: dict[str, float],
        prompt_weight: float,
    ) -> None:
        self.tokenizer, self.seed, self.steps, self.rows, self.length = tokenizer, seed, steps, rows, length
        self.prompt_weight = prompt_weight
        self.tasks: dict[str, TaskText] = {task.name: task() for task in TASK_TEXTS}
        self.shares = shares

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        if not 0 <= step < self.steps:
            raise IndexError(step)
        rng = random.Random(f"batch:{self.seed}:{step}")
        size = self.length + 1
        documents, filler = self.documents(rng), self.filler(rng)
        ids, weights = [], []
        row_ids: list[int] = []
        row_weights: list[float] = []
        while len(ids) < self.rows:
            tokens, prompt = next(documents)
            if len(tokens) > size:
                continue
            if len(row_ids) + len(tokens) > size:
                room = size - len(row_ids)
                ids.append(row_ids + [next(filler) for _ in range(room)])
                weights.append(row_weights + [1.0] * room)
                row_ids, row_weights = [], []
            row_ids = row_ids + tokens
            row_weights = row_weights + [self.prompt_weight] * prompt + [1.0] * (len(tokens) - prompt)
        return torch.tensor(ids), torch.tensor(weights)

    def encode(self, texts: list[str]) -> list[list[int]]:
        return [e.ids for e in self.tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

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
            encoded = self.encode([part for pair in pairs for part in pair])
            for prompt, rest in zip(encoded[::2], encoded[1::2], strict=True):
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
            yield from self.encode([self.text_of("statements", rng)[1]])[0]


TYPICAL_TOKENS = {"statements": 91, "options": 60, "tiny_know": 80, "tiny_math": 185, "tiny_reason": 233, "tiny_code": 186}
