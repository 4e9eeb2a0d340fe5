"""The text that calibration reads: a local file, data sets of the hub at a pinned revision, or the tiny tasks' training split.

Not a command; `--calib` of quant_save, gguf_pack and moe_probe takes one of these, or several joined by "+" and read in turn:

    notes.txt                                                      a UTF-8 file; empty lines separate documents
    hf:HuggingFaceH4/ultrachat_200k@8049631c405a...:train_sft      a data set: REPOSITORY@COMMIT:SPLIT[:CONFIG]
    hf:work/my_texts:train                                         a directory of jsonl or parquet files
    tiny, tiny:7                                                   the tiny tasks' training split, other items for each seed

Sequences begin as the model saw them in training: with what its tokenizer puts before a text, where it does.
The default is `tiny` for a model with razor-tiny's vocabulary, and :data:`DEFAULT` for any other.
Rows have a column `messages` (chat turns, rendered by the model's template) or `text`. Only training splits are read:
calibrating on what a benchmark asks would make its score worth nothing.
"""

from __future__ import annotations

import dataclasses
import json
import random
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from console import UserError, read_text
from hf_model import context_of, load_tokenizer, prefix_ids, render_chat, templated, text_ids
from kl import split_documents
from records import data_entry
from settings import setting
from task_text import GENERATOR_REVISION, TASK_TEXTS

HUB = re.compile(r"hf:(?P<name>[^@:]+)(?:@(?P<revision>[^@:]+))?:(?P<split>[^@:]+)(?::(?P<config>[^@:]+))?")
TINY = re.compile(r"tiny(:(?P<seed>\d+))?")
DEFAULT = "hf:HuggingFaceH4/ultrachat_200k@8049631c405ae6576f93f445c6b8166f76f5505a:train_sft"
RAZOR_TINY = Path(__file__).resolve().parents[2] / "models/razor-tiny/tokenizer.json"
COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclasses.dataclass(frozen=True)
class CalibrationSettings:
    """The text that a calibrated method reads."""

    calib: str | None = setting(
        None,
        "the text of a calibrated method: a file, `hf:REPOSITORY@COMMIT:SPLIT[:CONFIG]`, or several joined by `+`; empty: the "
        "training split of the tiny tasks for razor-tiny, else `DEFAULT` of calibration_text.py",
        file=True,
    )
    calib_sequences: int = setting(128, "how much of it is used: sequences")
    calib_length: int = setting(512, "and the tokens of each")

    def __post_init__(self) -> None:
        if min(self.calib_sequences, self.calib_length) < 1:
            raise UserError("--calib-sequences and --calib-length must be at least 1")

    def ids(self, model: Path) -> tuple[Tensor, dict[str, Any]]:
        """:func:`calibration_ids` of the settings."""
        self.check(model)
        return calibration_ids(self.calib, model, self.calib_sequences, self.calib_length)

    def check(self, model: Path) -> None:
        """What can be known of the text before it is read: sequences that the model can read, and files that are there."""
        if self.calib_length > (context := context_of(model)):
            raise UserError(f"--calib-length {self.calib_length}: {model} reads at most {context} positions")
        for source in sources_of(self.calib or ""):
            if source and not source.startswith("hf:") and not TINY.fullmatch(source) and not Path(source).is_file():
                raise UserError(f"--calib {source}: no such file (other texts are written hf:REPOSITORY@COMMIT:SPLIT, or tiny)")

    def size(self, model: Path) -> tuple[Tensor, dict[str, Any]]:
        """Ids and a record of the same size, for a plan that reads no text."""
        self.check(model)
        return torch.zeros(self.calib_sequences, self.calib_length, dtype=torch.long), {}


def calibration_ids(source: str | Path | None, model: Path, count: int, length: int) -> tuple[Tensor, dict[str, Any]]:
    """Token ids [count, length] of ``source`` (module docstring; None is the default) and their record.

    Documents follow one another without padding, cut into sequences that each begin with the tokenizer's own prefix; a text
    that is too short is a :class:`UserError`.
    """
    tokenizer = load_tokenizer(model, chat=False)
    prefix = prefix_ids(tokenizer)
    if length <= len(prefix):
        raise UserError(
            f"--calib-length {length}: no longer than the {len(prefix)} tokens that the tokenizer puts before a text"
        )
    ids: list[int] = []
    used: list[str] = []
    rows: list[list[int]] = []
    opened = [documents(part, tokenizer) for part in sources_of(str(source or default_source(tokenizer)))]
    for text in in_turn([texts for texts, _, _ in opened]):
        ids += text_ids(tokenizer, text)
        used.append(text)
        if len(ids) >= count * (length - len(prefix)) and len(rows := sequences(ids, count, length, prefix)) == count:
            break
    name, revision = ("; ".join(dict.fromkeys(each)) for each in ([n for _, n, _ in opened], [r for _, _, r in opened]))
    if len(rows) < count:
        raise UserError(f"{source or name}: {len(ids)} tokens; {count} sequences of {length} need {count * length}")
    return torch.tensor(rows), data_entry(name, revision, used) | ({"prefix": prefix} if prefix else {})


def sequences(ids: list[int], count: int, length: int, prefix: list[int]) -> list[list[int]]:
    """The first ``count`` sequences of a stream of tokens, or fewer where it ends. Each begins with ``prefix``, once: a chat
    template may have written it there already."""
    rows, place = [], 0
    while len(rows) < count:
        head = [] if ids[place : place + len(prefix)] == prefix else prefix
        row = head + ids[place : place + length - len(head)]
        if len(row) < length:
            break
        rows.append(row)
        place += length - len(head)
    return rows


def sources_of(text: str) -> list[str]:
    """The texts that are joined by "+"; the name of a file that is there may hold one."""
    parts, found = text.split("+"), []
    while parts:
        most = next((end for end in range(len(parts), 1, -1) if Path("+".join(parts[:end])).is_file()), 1)
        found.append("+".join(parts[:most]))
        parts = parts[most:]
    return found


def default_source(tokenizer: Any) -> str:
    """The text for a model that has this tokenizer."""
    tiny = json.loads(RAZOR_TINY.read_text(encoding="utf-8"))["model"]["vocab"]
    return "tiny" if tiny.items() <= tokenizer.get_vocab().items() else DEFAULT


def in_turn(sources: list[Iterable[str]]) -> Iterator[str]:
    """One text of each source in turn, until all are used up."""
    waiting = [iter(source) for source in sources]
    while waiting:
        for source in list(waiting):
            text = next(source, None)
            if text is None:
                waiting.remove(source)
            else:
                yield text


def documents(source: str, tokenizer: Any) -> tuple[Iterable[str], str, str]:
    """(texts, name, revision) of one source."""
    if found := TINY.fullmatch(source):
        return tiny_documents(tokenizer, int(found["seed"] or 0))
    return hub_documents(source, tokenizer) if source.startswith("hf:") else file_documents(Path(source))


def file_documents(path: Path) -> tuple[Iterable[str], str, str]:
    return [part + "\n\n" for part in split_documents(read_text(path))], path.name, "local file"


def hub_documents(source: str, tokenizer: Any) -> tuple[Iterable[str], str, str]:
    """Rows of a data set, streamed: nothing is downloaded beyond what is read."""
    found = HUB.fullmatch(source)
    if not found:
        raise UserError(f"{source}: expected hf:REPOSITORY@COMMIT:SPLIT[:CONFIG]")
    name, revision, split, config = found["name"], found["revision"], found["split"], found["config"]
    local = Path(name).is_dir()
    if not split.startswith("train"):
        raise UserError(f"{source}: split {split!r} is not a training split; calibration must not see what a benchmark asks")
    if not local and not COMMIT.fullmatch(revision or ""):
        raise UserError(f"{source}: pin the data set, hf:{name}@COMMIT:{split}, with the 40 hex digits of a commit")
    from datasets import load_dataset

    try:
        rows = load_dataset(name, config, split=split, revision=None if local else revision, streaming=True)
    except (OSError, ValueError, RuntimeError) as error:  # no network, no such repository, split or configuration
        raise UserError(f"{source}: cannot be opened ({' '.join(str(error).split())[:200]})") from None
    shown = Path(name).name if local else name
    title = f"{shown}, {config}, {split}" if config else f"{shown}, {split}"
    return (row_text(row, tokenizer, source) for row in rows), title, "local directory" if local else str(revision)


def row_text(row: Mapping[str, Any], tokenizer: Any, source: str) -> str:
    """One row as the model would see it in use."""
    if "messages" in row:
        return templated(tokenizer, row["messages"]) + "\n"
    if "text" in row:
        return row["text"] + "\n\n"
    raise UserError(f"{source}: its rows have {', '.join(row)}; expected a column messages or text")


def tiny_documents(tokenizer: Any, seed: int) -> tuple[Iterable[str], str, str]:
    """Transcripts of the tiny tasks' training split, an equal number of each, in turn, without end."""

    def transcripts() -> Iterator[str]:
        rng, tasks = random.Random(f"calibration:{seed}"), [task() for task in TASK_TEXTS]
        while True:
            for task in tasks:
                item, solution = task.generate(rng, "train")
                prompt = render_chat(tokenizer, task.messages(item))
                yield prompt + solution.removeprefix("<think>\n") + tokenizer.eos_token + "\n"

    return transcripts(), "tiny_tasks training split", f"{GENERATOR_REVISION}, seed {seed}"
