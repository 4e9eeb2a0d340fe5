"""Rollouts of random tokens and random scores of them, in the formats of phases A and B: to try phase C at a size.

    python src/distill/synthetic_rollouts.py --teacher work/synthetic-35b --out work/synthetic-35b-data
        [--rollouts 8 --tokens 1024 --prompt 32 --k 32 --seed 0]

OUT/rollouts and OUT/scores come from the writers of opd_gen and opd_score and belong to the teacher as its own would, so
opd_train_fsdp takes them without knowing; its losses then mean nothing. A teacher without a tokenizer gets razor-tiny's: fewer
tokens than its vocabulary has, which changes no size that matters.
"""

from __future__ import annotations

import argparse
import random
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from backend import Completion
from console import UserError, run_cli
from hf_model import ids_sha256, load_tokenizer
from opd_gen import Prompt, ungraded_row, write_rollouts
from opd_score import score_rollouts
from records import REPO

WIDTH = 16  # of the random hidden states whose products with a random head are the scores
HEAD_TOKENS = 4096  # of the vocabulary that can be likely


class RandomTeacher(nn.Module):
    """What opd_score asks of a model: a decoder and a head, here noise of a small width."""

    def __init__(self, vocabulary: int, seed: int) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(seed)
        self.head = nn.Linear(WIDTH, min(vocabulary, HEAD_TOKENS), bias=False)
        self.head.weight.data.normal_(generator=self.generator)

    def get_input_embeddings(self) -> nn.Module:
        return self.head

    get_output_embeddings = get_input_embeddings

    def get_decoder(self) -> Any:
        return self.hidden

    def hidden(self, input_ids: Tensor, **_: Any) -> tuple[Tensor]:
        return (torch.randn(*input_ids.shape, WIDTH, generator=self.generator),)


def random_row(tokenizer: Any, name: str, number: int, prompt: int, tokens: int, draw: random.Random) -> dict[str, Any]:
    """A row of phase A: random words of the vocabulary; the completion ran out of tokens."""
    special = set(tokenizer.all_special_ids)
    words = [token for token in sorted(tokenizer.get_vocab().values()) if token not in special]
    texts = [tokenizer.decode(draw.choices(words, k=count)) for count in (prompt, tokens)]
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    done = Completion(texts[1], len(ids[1]), len(ids[0]), "length", ids_sha256(ids[0]))
    return ungraded_row(Prompt(name, f"{number:06d}", texts[0]), done) | {"prompt": texts[0]}


def give_tokenizer(teacher: Path) -> None:
    """razor-tiny's tokenizer for a checkpoint that has none."""
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        source = REPO / "models/razor-tiny" / name
        if not (teacher / name).exists() and source.exists():
            shutil.copyfile(source, teacher / name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--teacher", type=Path, required=True, help="a checkpoint, synthetic or not")
    parser.add_argument("--out", type=Path, required=True, help="directory to make")
    parser.add_argument("--rollouts", type=int, default=8, help="how many (default 8)")
    parser.add_argument("--tokens", type=int, default=1024, help="of a completion, about")
    parser.add_argument("--prompt", type=int, default=32, help="tokens of a prompt, about")
    parser.add_argument("--k", type=int, default=32, help="tokens kept at each position (default 32)")
    parser.add_argument("--seed", type=int, default=0, help="of everything that is drawn (default 0)")
    args = parser.parse_args()
    if min(args.rollouts, args.tokens, args.prompt, args.k) < 1:
        raise UserError("--rollouts, --tokens, --prompt and --k must be at least 1")
    started = time.monotonic()
    give_tokenizer(args.teacher)
    tokenizer, draw = load_tokenizer(args.teacher), random.Random(args.seed)
    rows = [random_row(tokenizer, "random", i, args.prompt, args.tokens, draw) for i in range(args.rollouts)]
    settings = {"model": "random tokens", "seed": args.seed, "tokens": args.tokens, "prompt": args.prompt}
    choice = {"finished_only": False, "correct_only": False}
    tokens = sum(row["tokens"] for row in rows)
    write_rollouts(args.out / "rollouts", rows, rows, settings, choice, time.monotonic() - started, tokens)
    index = score_rollouts(
        args.teacher, args.out / "rollouts", args.out / "scores", args.k, 1.0, 4, 512,
        load=lambda _: RandomTeacher(len(tokenizer), args.seed),
    )  # fmt: skip
    print(f"{len(rows)} rollouts, {index['positions']:,} positions in {args.out}", flush=True)


if __name__ == "__main__":
    run_cli(main)
