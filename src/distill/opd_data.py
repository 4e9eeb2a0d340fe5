"""The settings of the phases of distillation, the files that pass between them, and the checks that they belong together.

Not a command; docs/OPD_INTEGRATION.md describes the formats.

    rollouts   samples.jsonl (every sample, resumable), rollouts.jsonl (the kept ones), rollouts.json (counts, digest)
    scores     index.json, scores-00000.safetensors, ...: token ids and the teacher's top-k for every completion token
    adapter    adapter.safetensors (A, B and growth of every parameter), adapter.json (what it belongs to, the loss curve)
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from backend_openai import ServerSettings
from checkpoint import Checkpoint, model_name
from console import UserError, atomic_path, file_sha256, read_json, write_json
from hf_model import all_finite
from moe_lora import MODES
from opd_losses import LOSSES, TopK
from recipe import Recipe
from records import header_sha256, peak_rss_mib, public_path, sha256_json
from settings import part, setting

ROLLOUTS, MANIFEST, INDEX, PHASE = "rollouts.jsonl", "rollouts.json", "index.json", "phase.json"
ADAPTER, ADAPTER_JSON = "adapter.safetensors", "adapter.json"
FORMAT = 1  # of an adapter
DATA_FORMAT = 2  # of rollouts and scores; those of format 1 hold no token ids: their text was tokenized again, with another end
ROW = {
    "benchmark": str,
    "id": str,
    "prompt": str,
    "text": str,
    "finish_reason": str,
    "tokens": int,
    "ids": list,
    "prompt_ids": list,
}


TURNS = ("system", "developer", "user", "assistant", "tool")
FORMS = '{"prompt": "..."}, {"messages": [...]} or {"text": "..."}'


def tokenizer_sha256(tokenizer: Any) -> str:
    """Digest of the vocabulary: two tokenizers that agree here give a token id the same meaning."""
    return sha256_json(sorted(tokenizer.get_vocab().items()))


def model_identity(model: str | Path) -> dict[str, str]:
    """What makes a checkpoint this one and no other: its name, and digests of config.json, tensor headers and weights."""
    checkpoint = Checkpoint(model)
    return {
        "name": model_name(checkpoint.path),
        "config_sha256": checkpoint.config_sha256,
        "header_sha256": header_sha256(checkpoint),
        "weights_sha256": checkpoint.sha256(),
    }


def named(identity: dict[str, str]) -> str:
    """A model's identity in an error's text."""
    return f"{identity.get('name')}, weights {str(identity.get('weights_sha256'))[:12]}"


def same_model(a: dict[str, str], b: dict[str, str]) -> bool:
    """Whether two identities are of one checkpoint, wherever it lies."""
    return all(a.get(key) == b.get(key) for key in ("config_sha256", "header_sha256", "weights_sha256"))


def wrong_text(value: Any) -> str:
    """Why a value is no text to show a model; empty if it is one."""
    if not isinstance(value, str):
        return f"is {json.dumps(value)[:40]}, not a text"
    if not value.strip():
        return "is empty"
    return "holds half of a surrogate pair, which is no character" if any("\ud800" <= c <= "\udfff" for c in value) else ""


def wrong_prompt(row: Any) -> str:
    """What is wrong with a row of a prompt file, in words; empty if nothing is."""
    forms = row.keys() & {"prompt", "messages", "text"} if isinstance(row, dict) else set()
    if len(forms) != 1:
        return f"expected one of {FORMS}"
    form = next(iter(forms))
    if unknown := sorted(row.keys() - {form, "id"}):
        return f"unknown key {', '.join(unknown)}; known: id beside one of {FORMS}"
    if "id" in row and (type(row["id"]) not in (str, int) or wrong_text(str(row["id"]))):
        return f"id {json.dumps(row['id'])[:40]}: expected a text or a whole number"
    if form != "messages":
        why = wrong_text(row[form])
        # a text of spaces alone has tokens to go on from
        return "" if form == "text" and why == "is empty" and row["text"] else f"{form} {why}" if why else ""
    turns = row["messages"]
    if not isinstance(turns, list) or not turns:
        return "messages: expected a list of turns"
    for number, turn in enumerate(turns, 1):
        if not isinstance(turn, dict) or turn.keys() != {"role", "content"}:
            return f'turn {number}: expected {{"role": "...", "content": "..."}}'
        if turn["role"] not in TURNS:
            return f"turn {number}: role {json.dumps(turn['role'])[:40]}; known: {', '.join(TURNS)}"
        if why := wrong_text(turn["content"]):
            return f"turn {number}: content {why}"
    return "" if turns[-1]["role"] in ("user", "tool") else f"ends with {turns[-1]['role']}; the last turn must be the user's"


def read_prompts(path: Path) -> list[dict[str, Any]]:
    """The rows of a jsonl file of prompts, each with its id (its number where it names none). The first that is none, or has
    the id of another, is a :class:`UserError` with its line."""
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror}); --prompts (PROMPTS) names a jsonl file of {FORMS}"
        ) from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 ({error.reason} at byte {error.start})") from None
    found: dict[str, tuple[int, dict[str, Any]]] = {}
    for line, text in enumerate(lines, 1):
        if not text.strip():
            continue
        try:
            row = json.loads(text)
        except (ValueError, RecursionError) as error:  # a number of thousands of digits too
            raise UserError(f"{path}:{line}: not JSON ({error})") from None
        if why := wrong_prompt(row):
            raise UserError(f"{path}:{line}: {why}")
        own = str(row.get("id", f"{len(found) + 1:06d}"))
        if own in found:
            raise UserError(f"{path}:{line}: id {own!r} is that of line {found[own][0]} too; every prompt needs one of its own")
        found[own] = line, row | {"id": own}
    if not found:
        raise UserError(f"{path}: holds no prompts")
    return [row for _, row in found.values()]


@contextlib.contextmanager
def opened(path: Path, mend: str) -> Iterator[Any]:
    """A safetensors file. One that is missing, cut short or without the tensor that is asked of it is a :class:`UserError`
    that ends with ``mend``."""
    try:
        with safe_open(path, "pt") as tensors:
            yield tensors
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be read ({error}); {mend}") from None


def members(value: Any, keys: Sequence[str], path: Path, mend: str) -> Any:
    """``value``, read from ``path``, if it is an object that has the ``keys``."""
    if missing := [key for key in keys if not isinstance(value, dict) or key not in value]:
        raise UserError(f"{path}: has no {missing[0]!r}; {mend}")
    return value


def check_row(row: Any, where: str) -> None:
    """Raise :class:`UserError` unless a sample has what later phases read: texts, and the token ids of prompt and answer."""
    wrong = [key for key, kind in ROW.items() if not isinstance(row, dict) or not isinstance(row.get(key), kind)]
    if not wrong:
        wrong += [key for key in ("ids", "prompt_ids") if not row[key] or any(type(i) is not int or i < 0 for i in row[key])]
        wrong += ["tokens"] if row["tokens"] != len(row["ids"]) else []
        wrong += ["finish_reason"] if row["finish_reason"] not in ("stop", "length") else []
    if wrong:
        raise UserError(f"{where}: no sample of opd_gen ({wrong[0]}); remove the file and run opd_gen again")


def read_rollouts(directory: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """(kept rollouts, manifest), the digest of the former checked against the latter, and each row for what it must hold."""
    path, again = directory / ROLLOUTS, "remove the directory and run opd_gen again"
    keys = ("format", "sha256", "settings", "all", "kept", "choice")
    manifest = members(read_json(directory / MANIFEST), keys, directory / MANIFEST, again)
    if manifest["format"] != DATA_FORMAT:
        raise UserError(
            f"{directory / MANIFEST}: format {manifest['format']!r}, expected {DATA_FORMAT}, which holds token ids; {again}"
        )
    if not path.is_file() or file_sha256(path) != manifest["sha256"]:
        raise UserError(f"{path}: not the rollouts that {MANIFEST} describes; run opd_gen again")
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    # not splitlines, which also breaks a line at U+2028
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n")[:-1], 1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}:{number}: not JSON ({error}); {again}") from None
        check_row(row, f"{path}:{number}")
        if rows.setdefault((row["benchmark"], row["id"]), row) is not row:
            raise UserError(f"{path}:{number}: a second rollout of {row['benchmark']} {row['id']}; {again}")
    if not rows:
        raise UserError(f"{path}: holds no rollouts; {again}")
    return list(rows.values()), manifest


def counts(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    graded = [row for row in rows if row["correct"] is not None]
    return {
        "samples": len(rows),
        "finished": sum(row["finish_reason"] == "stop" for row in rows),
        "graded": len(graded),
        "correct": sum(row["correct"] for row in graded),
        "tokens": sum(row["tokens"] for row in rows),
    }


def write_rollouts(
    out: Path, rows: Sequence[dict[str, Any]], chosen: Sequence[dict[str, Any]], settings: dict[str, Any],
    choice: dict[str, bool], seconds: float, tokens: int, **cost: Any,
) -> dict[str, Any]:  # fmt: skip
    """The kept rollouts, the cost of all (``cost``: more of it), and the manifest, which is returned."""
    with atomic_path(out / ROLLOUTS) as temporary:
        lines = [json.dumps(row, ensure_ascii=False, allow_nan=False) for row in chosen]
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
    manifest = {"format": DATA_FORMAT, "settings": settings, "choice": choice, "all": counts(rows), "kept": counts(chosen)}
    manifest |= {"settings_sha256": sha256_json(settings), "sha256": file_sha256(out / ROLLOUTS)}
    write_phase(out, "opd_gen", seconds, tokens, **cost)
    write_json(out / MANIFEST, manifest)  # last: its presence says that the phase is complete
    return manifest


def rollout_ids(row: dict[str, Any]) -> tuple[list[int], int]:
    """(token ids of prompt and answer as they were generated, the end of turn among them; tokens of the prompt)."""
    return row["prompt_ids"] + row["ids"], len(row["prompt_ids"])


class Example(NamedTuple):
    """One rollout with its scores: ids [T], the prompt's length P, for the T - P completion tokens the teacher's top-k, and
    whether the text is the student's own."""

    ids: Tensor
    prompt: int
    teacher: TopK
    own: bool = False


class ScoredRollouts:
    """The scores of a directory, read rollout by rollout. ``lengths``: tokens of each rollout, ``answers``: those scored."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        again = "remove the directory and run opd_score again"
        keys = ("format", "rollouts_sha256", "tokenizer_sha256", "teacher", "k", "temperature", "shards")
        self.index = members(read_json(directory / INDEX), keys, directory / INDEX, again)
        if self.index["format"] != DATA_FORMAT:
            raise UserError(
                f"{directory / INDEX}: format {self.index['format']!r}, expected {DATA_FORMAT}: scores of the ids that were "
                f"generated; run opd_gen and opd_score again"
            )
        self.places: list[tuple[Path, int, int, int]] = []  # file, first id, first position, length of the prompt
        self.lengths: list[int] = []
        for shard in self.index["shards"]:
            path = directory / members(shard, ("file", "sha256", "rollouts"), directory / INDEX, again)["file"]
            if not path.is_file():
                raise UserError(f"{path}: missing; run opd_score again")
            with opened(path, again) as tensors:
                starts, prompts = tensors.get_tensor("starts").tolist(), tensors.get_tensor("prompts").tolist()
            position = 0
            for start, end, prompt in zip(starts[:-1], starts[1:], prompts, strict=True):
                self.places.append((path, start, position, prompt))
                self.lengths.append(end - start)
                position += end - start - prompt
        self.answers = [length - place[3] for length, place in zip(self.lengths, self.places, strict=True)]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, number: int) -> Example:
        path, start, position, prompt = self.places[number]
        length = self.lengths[number]
        own = slice(position, position + length - prompt)
        with opened(path, "remove the directory and run opd_score again") as tensors:
            ids = tensors.get_slice("ids")[start : start + length].long()
            top, logp, tail = (tensors.get_slice(name)[own] for name in ("top", "logp", "tail"))
        return Example(ids, prompt, TopK(top.long(), logp, tail))

    def check_bytes(self) -> str:
        """Raise :class:`UserError` unless every shard has the bytes that the index lists; returns the digest of the index."""
        for shard in self.index["shards"]:
            if file_sha256(self.directory / shard["file"]) != shard["sha256"]:
                raise UserError(f"{self.directory / shard['file']}: not the scores that {INDEX} lists; run opd_score again")
        return file_sha256(self.directory / INDEX)


class Texts:
    """What is trained on, rollout by rollout: the teacher's texts, then the student's own; either may be absent."""

    def __init__(self, teacher: ScoredRollouts | None, student: ScoredRollouts | None) -> None:
        self.parts = [(scores, scores is student) for scores in (teacher, student) if scores is not None]
        self.theirs, self.mine = (0 if scores is None else len(scores) for scores in (teacher, student))
        self.lengths = [length for scores, _ in self.parts for length in scores.lengths]
        self.answers = [count for scores, _ in self.parts for count in scores.answers]

    def __getitem__(self, number: int) -> Example:
        scores, own = self.parts[-1 if number >= self.theirs else 0]
        return scores[number - self.theirs if own else number]._replace(own=own)

    def order(self, settings: TrainSettings) -> list[list[int]]:
        """The rollouts of each step: ``rows`` from seeded permutations, of a mixture so many of the student's that their share
        of all steps so far is that of the settings."""
        theirs, mine = (drawn(count, settings.seed) for count in (self.theirs, self.mine))
        plan, share, before = [], 0.0, 0
        for step in range(settings.steps):
            share += settings.share(step)
            count = min(settings.rows, math.floor(settings.rows * share + 0.5) - before)
            before += count
            own = [self.theirs + number for number in itertools.islice(mine, count)]
            plan.append([*itertools.islice(theirs, settings.rows - count), *own])
        return plan


def check_belongs(scores: ScoredRollouts, rollouts: dict[str, Any], tokenizer: Any) -> None:
    """Raise :class:`UserError` unless the scores are of these rollouts and in this tokenizer's ids."""
    index = scores.index
    if index["rollouts_sha256"] != rollouts["sha256"]:
        raise UserError(
            f"{scores.directory}: scores of other rollouts ({index['rollouts_sha256'][:12]}, these are "
            f"{rollouts['sha256'][:12]}); run opd_score on these rollouts"
        )
    if index["tokenizer_sha256"] != tokenizer_sha256(tokenizer):
        raise UserError(f"{scores.directory}: scored with another tokenizer than the student's; run opd_score again")


def read_adapter(directory: Path) -> dict[str, Any]:
    """adapter.json, checked against the bytes of the adapter and for the names, ranks and values of its tensors."""
    keys, path, again = (
        ("student", "teacher", "adapter", "data", "training", "device", "parameters"),
        directory / ADAPTER_JSON,
        "train again",
    )
    described = members(read_json(path), keys, path, "not an adapter of opd_train_fsdp")
    config, parameters = described["adapter"], described["parameters"]
    try:
        AdapterSettings(**config)
        known = described.get("format") == FORMAT and all({"grid", "sha256"} <= entry.keys() for entry in parameters.values())
    except (TypeError, AttributeError):  # an unknown setting, or what is no object
        known = False
    if not known:
        raise UserError(f"{path}: not an adapter of opd_train_fsdp of format {FORMAT}; {again}")
    by_mode = {"lora": ("a", "b"), "scales": ("growth",)}.get(config["mode"], ("a", "b", "growth"))
    leaves = {name: ("growth",) if entry["grid"] == "none" else by_mode for name, entry in parameters.items()}
    path = directory / ADAPTER
    with opened(path, again) as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}
        if set(shapes) != {f"{name}.{leaf}" for name in parameters for leaf in leaves[name]}:
            raise UserError(f"{path}: its tensors are not those that {ADAPTER_JSON} lists; {again}")
        for name, shape in shapes.items():
            rank = {"a": shape[1], "b": shape[-1]}.get(name.rpartition(".")[2], config["rank"])
            if rank != config["rank"]:
                raise UserError(f"{path}: {name} has rank {rank}, {ADAPTER_JSON} says {config['rank']}")
            if not all_finite(file.get_tensor(name)):
                raise UserError(f"{path}: {name} holds NaN or infinity; restore the adapter from a copy, or {again}")
    if described.get("adapter_sha256", file_sha256(path)) != file_sha256(path):
        raise UserError(f"{path}: not the bytes that were trained: damaged or edited; restore it from a copy, or {again}")
    return described


def check_scored(directory: Path, rollouts: dict[str, Any], settings: Scoring | None = None) -> None:
    """Raise :class:`UserError` unless the scores there are of these rollouts and, if given, made with these settings."""
    index = ScoredRollouts(directory).index
    wanted = {"rollouts_sha256": rollouts["sha256"]} | (settings.scores() if settings else {})
    if changed := sorted(key for key in wanted if index.get(key) != wanted[key]):
        raise UserError(f"{directory}: scores of other rollouts or settings ({', '.join(changed)}); remove it to score again")


class Batch(NamedTuple):
    """Right-padded rollouts: ids and mask [B, T]; where a token is predicted that counts [B, T]; those tokens, the teacher's
    view of them and whether the student wrote them, in the order of the mask."""

    ids: Tensor
    mask: Tensor
    predicts: Tensor
    targets: Tensor
    teacher: TopK
    own: Tensor

    def to(self, device: torch.device) -> Batch:
        teacher = TopK(*(part.to(device) for part in self.teacher))
        return Batch(*(part.to(device) for part in self[:4]), teacher, self.own.to(device))


def collate(examples: Sequence[Example]) -> Batch:
    """One batch of rollouts."""
    width = max(len(example.ids) for example in examples)
    ids = torch.zeros(len(examples), width, dtype=torch.long)
    mask, predicts = torch.zeros_like(ids), torch.zeros_like(ids, dtype=torch.bool)
    for row, example in enumerate(examples):
        ids[row, : len(example.ids)] = example.ids
        mask[row, : len(example.ids)] = 1
        predicts[row, example.prompt - 1 : len(example.ids) - 1] = True
    targets = torch.cat([example.ids[example.prompt :] for example in examples])
    teacher = TopK(*(torch.cat(parts) for parts in zip(*[example.teacher for example in examples], strict=True)))
    own = torch.cat([torch.full((len(example.ids) - example.prompt,), example.own) for example in examples])
    return Batch(ids, mask, predicts, targets, teacher, own)


def drawn(count: int, seed: int) -> Iterator[int]:
    """Numbers below ``count``, without end: a new seeded permutation of all whenever one is used up."""
    for epoch in itertools.count() if count else ():
        order = list(range(count))
        random.Random(f"{seed}:{epoch}").shuffle(order)
        yield from order


def peak_memory() -> dict[str, int | None]:
    """Peak resident memory of this process, what its tensors took on its GPU, and what the allocator held for them."""
    peaks = (torch.cuda.max_memory_allocated() >> 20, torch.cuda.max_memory_reserved() >> 20)
    tensors, held = peaks if torch.cuda.is_available() else (None, None)
    return {"peak_rss_mib": peak_rss_mib(), "peak_vram_mib": tensors, "peak_reserved_mib": held}


def write_phase(directory: Path, name: str, seconds: float, tokens: int, **facts: Any) -> None:
    """What a phase cost, beside its output: seconds, tokens, peak memory of its process."""
    value = {"phase": name, "seconds": round(seconds, 2), "tokens": tokens}
    value |= {"tokens_per_second": round(tokens / max(seconds, 1e-9), 1)}
    write_json(directory / PHASE, value | peak_memory() | facts)


def shown(path: Path) -> str:
    """A path as records name it."""
    return public_path(str(path.resolve()))


class Checked:
    """Settings that make sense; each class below adds its own conditions."""

    def __post_init__(self) -> None:
        """Raise :class:`UserError` on values that do not."""


@dataclass(frozen=True, kw_only=True)
class Seed(Checked):
    seed: int = setting(0, "of everything that is drawn")


@dataclass(frozen=True, kw_only=True)
class Generation(Seed, ServerSettings):
    """Phase A."""

    tasks: str = setting("", "benchmarks with a training split, comma-separated")
    prompts: Path | None = setting(None, "jsonl file of prompts beside or instead of the tasks")
    limit: int = setting(64, "prompts of each task, or of the file without tasks")
    repeats: int = setting(1, "samples of each prompt; above 1 needs a temperature")
    backend: str = setting("auto", "auto, hf, vllm, llamacpp, or openai with `BASE_URL`")
    served_model: str | None = setting(None, "what servers call the model that generates; empty: as its directory or file")
    # a resumed run must make the same batches: a chunk is made whole or not at all
    chunk: int = setting(64, "prompts generated together; a GPU takes many")
    finished_only: bool = setting(False, "keep only rollouts that ended by themselves")
    correct_only: bool = setting(False, "keep only those that the grader accepts")
    max_tokens: int = setting(32768, "of a rollout")
    temperature: float = setting(1.0, "of the rollouts")
    top_p: float = setting(1.0, "1.0 is off")
    top_k: int = setting(0, "0 is off")

    def __post_init__(self) -> None:
        super().__post_init__()
        ServerSettings.__post_init__(self)
        if (self.backend == "openai") != bool(self.base_url):
            given = f"not {self.backend} and {self.base_url or 'none'}"
            raise UserError(f"--backend openai and --base-url (BACKEND, BASE_URL) go together, {given}")
        if min(self.limit, self.repeats, self.max_tokens, self.chunk) < 1:
            raise UserError("--limit, --repeats, --max-tokens and --chunk must be at least 1")
        if not 0 <= self.temperature < math.inf or not 0 < self.top_p <= 1 or self.top_k < 0:
            raise UserError("sampling: temperature >= 0, 0 < top-p <= 1, top-k >= 0")
        if self.repeats > 1 and self.temperature == 0:
            raise UserError("--repeats above 1 at temperature 0 would repeat the same text")


@dataclass(frozen=True, kw_only=True)
class Scoring(Checked):
    """Phase B."""

    k: int = setting(32, "tokens kept at each position (20 to 64 are usual)")
    score_temperature: float = setting(1.0, "divides the logits; training uses the same")
    score_batch: int = setting(16, "rollouts scored at once")
    shard_rollouts: int = setting(512, "rollouts in one file of scores")
    score_prompts: bool = setting(False, "also score (and so train on) the tokens of the prompts")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.score_temperature < math.inf or min(self.k, self.score_batch, self.shard_rollouts) < 1:
            raise UserError("--k, --score-batch and --shard-rollouts must be at least 1, --score-temperature above 0")

    def scores(self) -> dict[str, Any]:
        """What index.json says of these settings."""
        return {"k": self.k, "temperature": self.score_temperature, "score_prompts": self.score_prompts}


def batch_option(parser: argparse.ArgumentParser) -> None:
    """The short form of --score-batch, for commands that know no other batch."""
    parser.add_argument("--batch", dest="score_batch", help="the same as --score-batch")


@dataclass(frozen=True, kw_only=True)
class AdapterSettings(Seed):
    """What is trained."""

    rank: int = setting(16, "of the adapters")
    mode: str = setting("lora", ", ".join(MODES), choices=MODES)
    linears: bool = setting(False, "adapters on the other quantized linears too")
    norms: bool = setting(False, "train the weights of the layers' norms too")
    base: str = setting(
        "teacher", "where a latent weight lies in its cell: towards the teacher's, or (codes) in the middle",
        choices=("teacher", "codes"),
    )  # fmt: skip
    ggml: str = setting("", "block type of llama.cpp as the experts' grid instead of the student's")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mode != "scales" and self.rank < 1:
            raise UserError(f"rank {self.rank} must be at least 1")
        if self.ggml and self.mode != "lora":
            raise UserError(
                f"--ggml {self.ggml} with --mode {self.mode}: the scales of a block type cannot be trained; use mode lora"
            )

    def adapter(self) -> dict[str, Any]:
        """What adapter.json says of an adapter, and merging reads."""
        return {name: getattr(self, name) for name in ("rank", "mode", "linears", "norms", "base", "ggml", "seed")}


@dataclass(frozen=True, kw_only=True)
class TrainSettings(AdapterSettings):
    """Phase C."""

    steps: int = setting(help="0: an adapter that changes nothing but the grid")
    init: Path | None = setting(None, "an adapter of the same student and rank to go on from, on other rollouts")
    trajectories: str = setting(
        "student", "whose texts: on-policy, the teacher's own, or a mixture of both", choices=("student", "teacher", "mixture")
    )
    teacher_loss: str = setting("forward_kl", f"on the teacher's texts: {', '.join(LOSSES)}", choices=LOSSES)
    student_loss: str = setting("reverse_kl", "on the student's own texts: one of the same", choices=LOSSES)
    share_first: float = setting(0.0, "share of the student's texts in the first step of a mixture")
    share_last: float = setting(1.0, "the same in the last step; in between it grows evenly")
    lr: float = setting(0.01, "in steps of the grid")
    warmup: int = setting(5, "steps of the rising rate")
    clip: float = setting(1.0, "largest norm of the gradient")
    rows: int = setting(16, "rollouts of a step, over all processes")
    micro_rows: int = setting(8, "rollouts at once on a process")
    save_every: int = setting(20, "steps between saved states")
    recompute: bool = setting(True, "gradient checkpointing: a third slower, one layer's activations")

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.rows, self.micro_rows, self.save_every) < 1 or min(self.steps, self.warmup) < 0:
            raise UserError("--rows, --micro-rows and --save-every must be at least 1, --steps and --warmup at least 0")
        if not (0 <= self.share_first <= 1 and 0 <= self.share_last <= 1):
            raise UserError("--share-first and --share-last must be between 0 and 1")
        if not 0 < self.lr < math.inf or not self.clip > 0:
            raise UserError("--lr and --clip must be above 0, --lr a number")

    def rate(self, step: int) -> float:
        """Learning rate: linear warm-up, then a cosine down to a tenth."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        part_ = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.lr * (0.55 + 0.45 * math.cos(math.pi * part_))

    def share(self, step: int) -> float:
        """The share of the student's texts in a step."""
        if self.trajectories != "mixture":
            return float(self.trajectories == "student")
        return self.share_first + (self.share_last - self.share_first) * step / max(1, self.steps - 1)

    @property
    def losses(self) -> dict[str, str]:
        """The loss by whose text it is computed on, of the sources that there are."""
        both = {"teacher": self.teacher_loss, "student": self.student_loss}
        return {source: loss for source, loss in both.items() if self.trajectories in (source, "mixture")}

    def training(self) -> dict[str, Any]:
        """What must be the same for a state to be resumed; how often it is saved need not."""
        names = ["steps", "rows", "micro_rows", "lr", "warmup", "clip", "seed"]
        names += ["share_first", "share_last"] if self.trajectories == "mixture" else []
        return {name: getattr(self, name) for name in names} | {"losses": self.losses}


@dataclass(frozen=True, kw_only=True)
class AllPhases(Generation, Scoring, TrainSettings):
    """Phases A to C, and how the result is judged."""

    teacher: Path = setting(help="the original checkpoint")
    work: Path = setting(help="directory of all phases' output")
    kl_items: int = setting(32, "transcripts of each task that the KL before and after is measured on")
    eval_limit: int = setting(0, "test items of each task before and after; 0: no accuracy")


@dataclass(frozen=True, kw_only=True)
class DistillSettings(AllPhases):
    """One run, as the keys of configs/opd_tiny.env."""

    student: Path | None = setting(None, "a checkpoint of quant_save; empty: quantize the teacher into WORK/student")
    recipe: Recipe = part(Recipe)
    tag: str = setting(help="name of the record, results/distill/TAG.json")
    cache: Path | None = setting(
        None, "rollouts/ and scores/ of another run instead of phases A and B; of a mixture those of the teacher's texts"
    )
    own_cache: Path | None = setting(None, "the same of the student's texts in a mixture")
    rollout_model: Path | None = setting(None, "what generates, when it is not the student's checkpoint: its GGUF")
    processes: int = setting(1, "of torchrun on each node: GPUs")
    nnodes: int = setting(1, "nodes that train together; the same command runs on each, WORK is a directory that all see")
    node_rank: int = setting(0, "the number of this node, from 0, which also does all but the training")
    rdzv: str = setting("", "HOST:PORT of node 0, where the nodes meet")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.own_cache and self.trajectories != "mixture":
            raise UserError(f"OWN_CACHE with TRAJECTORIES={self.trajectories}: it is of a mixture; CACHE names the only texts")
        made = not (self.own_cache if self.trajectories == "mixture" else self.cache)
        if self.init and made and self.trajectories != "teacher" and not self.rollout_model:
            raise UserError("INIT with rollouts of the student: set ROLLOUT_MODEL to what INIT's run recovered")
        if self.processes < 1:
            raise UserError(f"PROCESSES={self.processes}: must be at least 1")
        if not 0 <= self.node_rank < self.nnodes:
            raise UserError(f"NODE_RANK={self.node_rank} of NNODES={self.nnodes}: the nodes are numbered from 0")
        if self.nnodes > 1 and not self.rdzv.rpartition(":")[2].isdigit():
            raise UserError(f"RDZV={self.rdzv}: {self.nnodes} nodes need HOST:PORT of node 0, the same on each")
        if self.rows % (self.micro_rows * self.processes * self.nnodes):
            parts, product = "MICRO_ROWS x PROCESSES", self.micro_rows * self.processes * self.nnodes
            parts += " x NNODES" * (self.nnodes > 1)
            raise UserError(f"ROWS={self.rows} is no multiple of {parts} = {product}")
        if not self.cache and not self.tasks and not self.prompts:
            raise UserError("set TASKS, PROMPTS or both")
        if self.eval_limit and not self.tasks:
            raise UserError(f"EVAL_LIMIT={self.eval_limit} without TASKS: there is nothing to evaluate on")
