"""A panel: frozen tokens in strata with what a model says of them, kept as hidden states; others are judged on the same tokens.

    bash pipelines/panel.sh --reference MODEL [--text wikitext-2=wiki.test.raw] [--corpus work/text] [--positions 20000]
    bash pipelines/panel.sh --reference MODEL --judge CHECKPOINT_OR_GGUF --tag TAG

MODEL may be hf:ORG/NAME@COMMIT. WORK/NAME/panel.safetensors is made once (docs/EVAL_PROTOCOL.md has its layout): the model's
own answers to prompts, prose, WikiText-2, code, other languages, long context; what a model or missing data leaves out is
named; --text NAME=FILE adds a stratum later. Of the model only the inputs of its head are kept, made layer by layer, so that no
checkpoint is ever in memory; the head makes of them the logits of the whole vocabulary. A checkpoint, plain or packed, is
judged in the same way, a GGUF by llama-perplexity's file of log-probabilities, and with --engine vllm a checkpoint by vLLM's
log-probabilities of a prompt, which tell the likeliest --top-k only: their KL is a lower bound, and the record says so.

The floor is the KL of the model itself with noise of BF16's size behind every layer, or that of a model judged before (--floor
TAG: the BF16 GGUF for GGUFs). A result whose difference to it no bootstrap over windows shows, in pairs, claims nothing. Every
figure but `first_halves` stands on positions that every judge sees, the second half of each window. A killed run goes on.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import hashlib
import itertools
import json
import os
import shlex
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from backend import HfBackend, Sampling
from calibration import LayerStream
from checkpoint import Checkpoint, different_file, model_name, source_identity
from console import UserError, file_sha256, progress, read_text, run_cli, scratch_folder
from devices import default_device, free_memory
from gguf_format import bos_of, describe_gguf, is_gguf
from hf_model import (
    context_of,
    load_tokenizer,
    prefix_ids,
    prompt_ids,
    render_chat,
    scaled_logits,
    text_ids,
    tokenizer_files_sha256,
)
from hub import make_directory, spelled
from intervals import by_confidence, by_document, resampled, stratum_metrics
from kl import EXACT, compared, compared_top, split_documents
from llamacpp_logprobs import DEPTH, decode_rows, dump_logprobs, first_scored, with_parsed_control_tokens
from recipe import recipe_record
from records import REPO, data_entry, describe_model, tagged_record, write_result
from run_dir import RUN, check_output, staged_directory
from runner import recorded_benchmarks
from safetensors_file import save_tensors
from sample_log import read_samples
from task_text import TASK_TEXTS
from tasks_text import by_stratum, read_rows
from vllm_eval import prompt_logprobs

VERSION, FILE, VALUES = 1, "panel.safetensors", "values.safetensors"
CORPUS = ("prose", "code", "other languages")  # strata that make_text.sh's held-out text has
STRATA = ("answers", "prose", "wikitext-2", "code", "other languages", "long", "pictures")
SIZE, LEAST, ANSWER = 512, 64, 4096  # tokens of a window of text; of an answer's, at least and at most
LONG, LONG_LEAST, LONG_WINDOWS, LONG_SCORED = 32_768, 4096, 8, 2048  # long windows, of which the last tokens count
COUNTS, EVERYWHERE = 1, 2  # how a token is scored: by judges that see it, or by all (the second half of a window)
NOISE = 2.0**-8  # relative, even: the distance of two neighbours in BF16
SEED, PROMPTS = 29, 64  # prompts that are answered together
SAVE_SECONDS = 60.0  # of work that a kill may lose
ROWS_BYTES = 8 << 30  # of llama-perplexity's file at once
POSITIONS, MAX_TOKENS = 20_000, 1024  # of each stratum, that every judge sees; of an answer made here
FEWEST = 8  # windows of a stratum, below which an interval by bootstrap says nothing
WANTED = 0.03  # standard error of a mean KL, as a share of it, below which a ruler is long enough


class Window(NamedTuple):
    """Token ids, padded to a size that many windows have; predictions count from place ``first`` to before ``last``."""

    ids: list[int]
    first: int
    last: int


@dataclasses.dataclass(frozen=True)
class Panel:
    """``tensors`` and ``facts`` of the file. A position is a scored token, in the order of the windows."""

    facts: dict[str, Any]
    tensors: dict[str, Tensor]

    def of(self, name: str, window: int) -> Tensor:
        """ids or scored of a window."""
        start, end = self.tensors["starts"][window : window + 2].tolist()
        return self.tensors[name][start:end]

    @functools.cached_property
    def marks(self) -> Tensor:
        """COUNTS or EVERYWHERE [positions]."""
        return self.tensors["scored"][self.tensors["scored"] > 0]

    @functools.cached_property
    def owner(self) -> np.ndarray:
        """The window of each position."""
        sizes = self.tensors["starts"].diff()
        return torch.arange(len(sizes)).repeat_interleave(sizes)[self.tensors["scored"] > 0].numpy()

    @functools.cached_property
    def first_places(self) -> np.ndarray:
        """The first position of each window, and the number of all."""
        return np.searchsorted(self.owner, np.arange(len(self.tensors["starts"])))

    @functools.cached_property
    def targets(self) -> Tensor:
        return self.tensors["ids"][self.tensors["scored"] > 0].long()

    def groups(self, tokens: int) -> list[list[int]]:
        """Windows of one size that are read together, ``tokens`` at most or one window."""
        sizes = self.tensors["starts"].diff().tolist()
        found = []
        for size in sorted(set(sizes)):
            own, step = [w for w, n in enumerate(sizes) if n == size], max(1, tokens // size)
            found += [own[start : start + step] for start in range(0, len(own), step)]
        return found


def frozen(strata: Mapping[str, Sequence[Window]]) -> dict[str, Tensor]:
    """ids, starts, stratum and scored of the windows."""
    windows = [(number, window) for number, own in enumerate(strata.values()) for window in own]
    scored = []
    for _, (ids, first, last) in windows:
        place = torch.arange(len(ids))
        counts = (place >= max(1, first)) & (place < last)
        scored.append(torch.where(place > first_scored(len(ids)), EVERYWHERE, COUNTS).mul_(counts).to(torch.uint8))
    starts = [0, *itertools.accumulate(len(window.ids) for _, window in windows)]
    return {
        "ids": torch.tensor([token for _, window in windows for token in window.ids], dtype=torch.int32),
        "starts": torch.tensor(starts), "scored": torch.cat(scored),
        "stratum": torch.tensor([number for number, _ in windows], dtype=torch.uint8),
    }  # fmt: skip


def joined(old: Panel, new: Panel) -> Panel:
    """A panel with the strata of another behind its own."""
    mine, more = old.tensors, dict(new.tensors)
    more["starts"] = more["starts"][1:] + mine["starts"][-1]
    more["stratum"] = more["stratum"] + len(old.facts["strata"])
    facts = new.facts | {key: old.facts[key] + new.facts[key] for key in ("strata", "data")}
    facts |= {"texts": old.facts["texts"] | new.facts["texts"]}
    left = old.facts["left_out"] | new.facts["left_out"]
    facts["left_out"] = {name: why for name, why in left.items() if name not in facts["strata"]}
    return Panel(facts, {name: torch.cat([own, more[name]]) for name, own in mine.items()})


def save(path: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    save_tensors(path, tensors, {"format": "moe-lowbit panel", "facts": json.dumps(facts, sort_keys=True)})


def load(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(facts, tensors) of a file of :func:`save`."""
    try:
        with safe_open(path, "pt") as file:
            return json.loads((file.metadata() or {})["facts"]), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise UserError(f"{path}: not a file of a panel ({error!r:.120}); remove it, and it is made again") from None


# ---------------------------------------------------------------- what is frozen


def settled(tokenizer: Any, row: list[int], size: int, end: int) -> tuple[list[int], int]:
    """A row of at most ``size`` tokens without the last few, if its text is read as other tokens with them (half a word at the
    end), padded with ``end``; and the tokens before the padding. llama-perplexity reads text alone."""
    for last in range(len(row), max(0, len(row) - 8), -1):
        if text_ids(tokenizer, text_of(tokenizer, row[:last])) == row[:last]:
            break
    else:
        last = len(row)
    return row[:last] + [end] * (size - last), last


def text_of(tokenizer: Any, ids: Sequence[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def packed(texts: Iterable[list[int]], head: Sequence[int], end: int, size: int) -> Iterator[list[int]]:
    """Rows of ``size`` tokens, each of documents that no other row has; what does not fit of the last is left out."""
    row = list(head)
    for ids in texts:
        row = [*row, *ids]
        if len(row) >= size:
            yield row[:size]
            row = list(head)
        else:
            row.append(end)


def spread(ids: Sequence[int], head: Sequence[int], size: int, count: int) -> list[list[int]]:
    """At most ``count`` rows of a text, evenly spread over it."""
    body = size - len(head)
    whole = len(ids) // body
    places = [whole * number // min(count, whole) for number in range(min(count, whole))]
    return [[*head, *ids[place * body : (place + 1) * body]] for place in places]


class Source:
    """Where the windows of a panel come from: :meth:`stratum` makes one, or says in words why it cannot."""

    def __init__(self, args: argparse.Namespace, model: Path) -> None:
        self.args, self.model, self.tokenizer = args, model, load_tokenizer(model, chat=False)
        self.end = self.tokenizer.get_vocab().get("<|endoftext|>", self.tokenizer.eos_token_id)
        if self.end is None:
            raise UserError(f"{model}: its tokenizer has no token that ends a text")
        self.head = prefix_ids(self.tokenizer) or [self.end]
        self.context = context_of(model)
        self.files = dict(given_texts(args.text))
        self.corpus = args.corpus / "heldout.jsonl.gz"

    @functools.cached_property
    def documents(self) -> dict[str, list[Any]]:
        return by_stratum(read_rows(self.corpus), SEED) if self.corpus.exists() else {}

    def names(self, known: Sequence[str]) -> list[str]:
        """The strata to make: all, or those of --text that a panel with the ``known`` ones lacks."""
        answers = ["answers"] if self.args.answers else []
        asked = [*(pair.partition("=")[0] for pair in self.args.text), *answers] if known else (*STRATA, *self.files)
        return [name for name in dict.fromkeys(asked) if name not in known]

    def stratum(self, name: str) -> list[Window] | str:
        size, scored = min(SIZE, self.context), 0
        count = -(-self.args.positions // (size - 1 - first_scored(size)))
        if name == "answers":
            return self.answers()
        if name == "pictures":
            seeing = "vision_config" in Checkpoint(self.model).config
            return "only its decoder is read; moe_eval --pictures judges all of it" if seeing else "no vision tower"
        if name == "long":
            size, count, scored = min(LONG, self.context), LONG_WINDOWS, LONG_SCORED
            if size < LONG_LEAST:
                return f"the model reads {size:,} positions"
        if file := self.files.get(name) or (self.files.get("wikitext-2") if name == "long" else None):
            rows = spread(text_ids(self.tokenizer, read_text(file)), self.head, size, count)
        elif own := self.documents.get("prose" if name == "long" else name):
            texts = (text_ids(self.tokenizer, row["text"]) for row in own)
            rows = list(itertools.islice(packed(texts, self.head, self.end, size), count))
        else:
            made = ", or make_text.sh's corpus (--corpus) and make the panel again (--force)" if name in CORPUS else ""
            return f"no text; give --text {shlex.quote(name)}=FILE{made}"
        if len(rows) < count:
            print(f"{name}: {len(rows):,} windows, not {count:,}: the text has no more", flush=True)
        whole = [settled(self.tokenizer, row, size, self.end) for row in rows]
        first = len(self.head)
        return [Window(ids, max(first, last - (scored or last)), last) for ids, last in whole] or f"no text of {size:,} tokens"

    def answers(self) -> list[Window] | str:
        if not self.tokenizer.chat_template:
            return "the tokenizer has no chat template"
        checkpoint, gpu = Checkpoint(self.model), default_device().type == "cuda"
        free = free_memory(default_device()) if gpu else os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
        if not self.args.answers and (checkpoint.remote or checkpoint.bytes * (1 if gpu else 2) > 0.8 * free):
            return "the model is not in memory here; give --answers LOG, the samples of its evaluation elsewhere"
        made, positions = [], 0
        most = min(ANSWER, self.context)
        with progress(self.args.positions, "answers", "position", True) as bar:
            for prompt, answer in self.logged() if self.args.answers else self.generated():
                ids = [*prompt, *answer][:most]
                if positions >= self.args.positions:
                    break
                size = max(LEAST, 1 << (len(ids) - 1).bit_length())
                if (seen := len(ids) - max(len(prompt), first_scored(size) + 1)) > 0:  # by every judge
                    made.append(Window(ids + [self.end] * (size - len(ids)), len(prompt), len(ids)))
                    positions += seen
                    bar.update(seen)
        if positions < self.args.positions:
            print(f"answers: {positions:,} positions, not {self.args.positions:,}: there are no more prompts", flush=True)
        return made or "no prompt was answered"

    def generated(self) -> Iterator[tuple[list[int], list[int]]]:
        """(prompt, answer) by the model, drawn from its own distribution."""
        if self.args.prompts:
            questions = split_documents(read_text(self.args.prompts))
        else:
            loaded = [[item.question for item in kind().load()] for kind in TASK_TEXTS]
            questions = [question for part in zip(*loaded, strict=True) for question in part]
        backend = HfBackend(self.model, PROMPTS)
        for start in range(0, len(questions), PROMPTS):
            turns = [[{"role": "user", "content": question}] for question in questions[start : start + PROMPTS]]
            prompts = [render_chat(self.tokenizer, turn) for turn in turns]
            made = dict(backend.generate(prompts, Sampling(1.0, seed=SEED, max_tokens=self.args.max_tokens)))
            yield from ((ids, list(made[i].ids)) for i, ids in enumerate(prompt_ids(self.tokenizer, prompts)))

    def logged(self) -> Iterator[tuple[list[int], list[int]]]:
        """(prompt, answer) of a log of samples, whose benchmarks say what was asked."""
        _, rows = read_samples(self.args.answers)
        ended = self.tokenizer.eos_token or ""
        for benchmark in recorded_benchmarks(sorted({row["benchmark"] for row in rows})):
            items = {item.id: item for item in benchmark.load(None)}
            for row in rows:
                if row["benchmark"] == benchmark.name:
                    prompt = render_chat(self.tokenizer, benchmark.messages(items[row["id"]])) if row["id"] in items else ""
                    if hashlib.sha256(prompt.encode()).hexdigest() != row["prompt_sha256"]:
                        raise UserError(f"{self.args.answers}: {row['id']} was asked otherwise than {self.model} is asked")
                    text = row["text"] + (ended if row["finish_reason"] == "stop" else "")
                    yield text_ids(self.tokenizer, prompt), text_ids(self.tokenizer, text)


def given_texts(pairs: Sequence[str]) -> Iterator[tuple[str, Path]]:
    """--text NAME=FILE; without one the test file of WikiText-2 is taken where it lies in the scratch folder."""
    default = Path(os.environ.get("SCRATCH", "work")) / "wiki.test.raw"
    if default.exists():
        yield "wikitext-2", default
    for pair in pairs:
        name, equals, path = pair.partition("=")
        if not equals or not name or name in ("answers", "pictures") or not Path(path).is_file():
            raise UserError(f"--text {pair}: give NAME=FILE, a stratum ({', '.join(STRATA)}, or one of your own) and its text")
        yield name, Path(path)


# ---------------------------------------------------------------- what a model makes of it


@torch.no_grad()
def streamed_states(stream: LayerStream, panel: Panel, folder: Path, noise: bool = False) -> list[Tensor]:
    """The head's inputs [positions, width] that predict the scored tokens, in the dtype of the computation; with ``noise`` also
    those of a copy that gets even noise of :data:`NOISE` behind every layer. One layer is in memory; the activations go to
    ``folder`` at times, and a killed run goes on from there."""
    device, file, begun = stream.device, folder / "layers.st", 0
    groups = panel.groups(1 << (15 if device.type == "cuda" else 13))
    batches = [torch.stack([panel.of("ids", window) for window in group]).long() for group in groups]
    kwargs = {ids.shape: stream.arguments(ids) for ids in {ids.shape: ids for ids in batches}.values()}
    copies = range(1 + noise)
    if file.exists():
        facts, kept = load(file)
        begun, hidden = facts["layer"], [[kept[f"{copy}.{i}"] for i in range(len(batches))] for copy in copies]
    else:
        embedded = stream.embed(batches)
        hidden = [list(embedded) for _ in copies]
    saved, total = time.monotonic(), int(panel.tensors["starts"][-1]) * len(copies)
    with progress(total * len(stream.layers), f"states {stream.checkpoint.path.name}", "token", True, begun * total) as bar:
        for index in range(begun, len(stream.layers)):
            layer = stream.layers[index]
            stream.fill(layer, f"model.layers.{index}.")
            stream.read_ahead(index + 1)
            for copy, (i, ids) in itertools.product(copies, enumerate(batches)):
                (out,) = stream.run(layer, [hidden[copy][i]], kwargs[ids.shape][index])
                if copy:
                    generator = torch.Generator(device).manual_seed(SEED + index * len(batches) + i)
                    drawn = torch.rand(out.shape, generator=generator, device=device, dtype=torch.float32)
                    out = (out.float() * (1 + NOISE * (2 * drawn - 1))).to(out.dtype)
                hidden[copy][i] = out.cpu()
                bar.update(ids.numel())
            stream.empty(layer)
            if time.monotonic() - saved > SAVE_SECONDS:
                rows = {f"{copy}.{i}": hidden[copy][i].contiguous() for copy in copies for i in range(len(batches))}
                save(file, rows, {"layer": index + 1})
                saved = time.monotonic()
    stream.close()
    width = hidden[0][0].shape[-1]
    found = [torch.empty(len(panel.owner), width, dtype=stream.dtype) for _ in copies]
    with stream.ending() as inputs_of:
        for copy, (i, group) in itertools.product(copies, enumerate(groups)):
            for row, window in zip(hidden[copy][i], group, strict=True):
                own = slice(*panel.first_places[window : window + 2].tolist())
                found[copy][own] = inputs_of(row[None].to(device))[0, :-1].cpu()[panel.of("scored", window)[1:] > 0]
    return found


def head_of(stream: LayerStream) -> Callable[[Tensor], Tensor]:
    """Logits [N, V] in float32 of the head's inputs [N, width], scaled and capped as the model does it."""
    head, config = stream.model.lm_head, stream.model.config.get_text_config()
    stream.fill(head, stream.head_prefix)
    head.float()
    return torch.no_grad()(lambda states: scaled_logits(head(states.to(stream.device).float()), config))


def opened_stream(model: Path, dtype: torch.dtype) -> LayerStream:
    torch.backends.cudnn.allow_tf32 = dtype is not torch.float32  # what convolutions take by default
    return LayerStream(Checkpoint(model), default_device(), dtype)


def chunks(panel: Panel, made: Callable[[Tensor], Tensor], vocabulary: int) -> Iterator[tuple[Tensor, Tensor]]:
    """(positions, logits) in pieces that fit into memory."""
    size = max(1, (1 << (28 if torch.cuda.is_available() else 24)) // vocabulary)
    for places in torch.arange(len(panel.owner)).split(size):
        yield places, made(places)


Told: TypeAlias = Tensor | tuple[Tensor, Tensor]  # logits or log-probabilities [N, V]; or ids [N, K] with theirs


def positions(
    panel: Panel, states: Tensor, head: Callable[[Tensor], Tensor], made: Iterable[tuple[Tensor, Told]],
    found: dict[str, np.ndarray], depth: float = float("inf"), keep: Callable[[], None] = lambda: None,
) -> dict[str, np.ndarray]:  # fmt: skip
    """What kl.compared tells of the reference and a model, [positions] into ``found``; KL is NaN where the model told nothing.
    Of vocabularies padded to two sizes the tokens that both have count. ``keep`` is called now and then."""
    found.setdefault("kl", np.full(len(panel.owner), np.nan))
    saved = time.monotonic()
    for places, told in made:
        logits, target = head(states[places]), panel.targets[places]
        target = target.to(logits.device)
        if isinstance(told, Tensor):
            known = min(logits.shape[-1], told.shape[-1])
            p, q = logits[:, :known].log_softmax(-1), told[:, :known].to(logits.device)
            own = compared(p, q if depth < np.inf and told.shape[-1] == known else q.float().log_softmax(-1), target, depth)
        else:
            ids, likely = (each.to(logits.device) for each in told)
            own = compared_top(logits.log_softmax(-1), ids, likely, target)
        if not bool(torch.isfinite(own["kl"]).all()):
            raise UserError(f"position {int(places[0]):,} on: predictions are NaN or infinite; a tensor is damaged")
        for key, value in own.items():
            empty = np.zeros(len(panel.owner), np.float64 if value.is_floating_point() else np.bool_)
            found.setdefault(key, empty)[places.numpy()] = value.cpu().numpy()
        if time.monotonic() - saved > SAVE_SECONDS:
            keep()
            saved = time.monotonic()
    return found


def told_by_llama(
    panel: Panel, tokenizer: Any, path: Path, done: np.ndarray, options: Sequence[str]
) -> Iterator[tuple[Tensor, Tensor]]:  # fmt: skip
    """(positions, log-probabilities) of a GGUF at the second halves of windows, those ``done`` [positions] left out. The text
    of each window is read by llama.cpp's own tokenizer, behind the last: a window begins with a token of its own, so that
    nothing runs into another, and what is read is compared with the panel."""
    bos, left = bos_of(path), list[int]()
    late = (panel.marks == EVERYWHERE).numpy()
    with scratch_folder() as folder:
        copy, names = with_parsed_control_tokens(path, folder / "gguf")
        for group in panel.groups(1 << 62):
            ids = {window: panel.of("ids", window).tolist() for window in group}
            size, texts, waiting = len(ids[group[0]]), dict[int, str](), list[int]()
            for window in group:
                texts[window] = text_of(tokenizer, ids[window])
                own = slice(*panel.first_places[window : window + 2].tolist())
                if (late[own] & ~done[own]).any():
                    same = text_ids(tokenizer, texts[window]) == ids[window]
                    (waiting if same else left).append(window)
            if waiting and bos is not None and any(ids[window][0] != bos for window in waiting):
                raise UserError(f"{path}: llama.cpp puts token {bos} before a text, the panel begins with {ids[waiting[0]][0]}")
            step = max(1, ROWS_BYTES // (size * len(tokenizer)))
            for start in range(0, len(waiting), step):
                part = waiting[start : start + step]
                asked = part if len(part) > 1 else part * 2  # the tool wants two chunks at least
                first = text_of(tokenizer, ids[asked[0]][1:]) if bos is not None else texts[asked[0]]
                text = first + "".join(texts[window] for window in asked[1:])
                for old, new in names.items():
                    text = text.replace(old, new)
                (folder / "text").write_text(text, encoding="utf-8")
                logs = dump_logprobs(copy, folder / "text", folder / "rows", size, 0, options)
                if not np.array_equal(logs.tokens, [ids[window] for window in asked]):
                    raise UserError(f"{path} reads the panel's text as other tokens; it was made with another tokenizer")
                for number, window in enumerate(part):
                    places = np.arange(*panel.first_places[window : window + 2])
                    places = places[late[places]]
                    rows = (panel.of("scored", window)[first_scored(size) + 1 :] == EVERYWHERE).numpy()
                    for own, chosen in zip(*(torch.from_numpy(each).split(256) for each in (places, np.flatnonzero(rows)))):
                        yield own, decode_rows(logs.rows[number][chosen.numpy()], logs.vocabulary)
                (folder / "rows").unlink()
    if left:
        print(f"{path}: {len(left):,} windows are left out, whose text is read as other tokens than the panel's (drawn answers "
              "may be written in tokens that no tokenizer makes)", flush=True)  # fmt: skip


def told_by_vllm(panel: Panel, path: Path, top: int, parallel: int) -> Iterator[tuple[Tensor, tuple[Tensor, Tensor]]]:
    """(positions, the likeliest tokens and the target with log-probabilities)."""
    count = len(panel.tensors["starts"]) - 1
    ends = [int((panel.of("scored", window) > 0).nonzero()[-1]) + 1 for window in range(count)]
    rows = [panel.of("ids", window)[:end].tolist() for window, end in enumerate(ends)]
    for window, (ids, likely) in enumerate(prompt_logprobs(path, rows, top, parallel)):
        counts = panel.of("scored", window)[1 : ends[window]] > 0
        places = torch.arange(*panel.first_places[window : window + 2].tolist())
        for place, own, told in zip(*(each.split(256) for each in (places, ids[counts], likely[counts])), strict=True):
            yield place, (own, told)


# ---------------------------------------------------------------- the panel and its judgements


def located(name: Path) -> Path:
    """A model's directory, also of one of the hub."""
    return make_directory(str(name)) if spelled(name) else name


def make_panel(args: argparse.Namespace, model: Path, out: Path) -> Panel:
    """The panel of a model: read where it is there, with the strata that it lacks of --text, else made."""
    checkpoint, source, old = Checkpoint(model), Source(args, model), None
    made_of: dict[str, Any] = {"source": checkpoint.identity, "version": VERSION}
    made_of |= {"tokenizer_sha256": tokenizer_files_sha256(model)}
    if (out / FILE).exists() and (args.judge or not args.force):
        old = Panel(*load(out / FILE))
        if different := different_file(old.facts.get("source"), made_of["source"]):
            raise UserError(f"{out / FILE}: the panel of another model ({different}); give another --work, or remove it")
        if old.facts["version"] != VERSION:
            raise UserError(f"{out / FILE}: a panel of version {old.facts['version']}; give another --work, or remove it")
    names = source.names(old.facts["strata"] if old else ())
    files = {**source.files, "corpus": source.corpus, "prompts": args.prompts, "answers": args.answers}
    texts = {name: file_sha256(file) for name, file in files.items() if file and file.exists()}
    sizes = {"positions": args.positions or POSITIONS, "max_tokens": args.max_tokens or MAX_TOKENS}
    if old:  # what is given must be what the panel has; what is not given is as it was
        given = {key: value for key, value in sizes.items() if getattr(args, key)}
        given |= {
            name: texts[name] for name in {**source.files, "prompts": 0, "answers": 0} if name in texts and name not in names
        }
        had = old.facts["sizes"] | old.facts["texts"]
        if differing := sorted(key for key, value in given.items() if had.get(key, value) != value):
            raise UserError(f"{out / FILE}: made with another {', '.join(differing)}; --force without --judge makes it again")
        sizes = old.facts["sizes"] | given
    if old and not names:
        return identified(old, out)
    args.positions, args.max_tokens = sizes["positions"], sizes["max_tokens"]
    job = made_of | {"sizes": sizes, "texts": texts, "strata": names, "panel": old and old.facts["strata"]}
    check_place(model, out, FILE)
    gpu = default_device().type == "cuda"
    dtype = torch.bfloat16 if gpu and checkpoint.bytes > EXACT else torch.float32
    if old:
        dtype = getattr(torch, old.facts["dtype"])
    with staged_directory(out, True, job) as folder:
        windows = folder / RUN / "windows.st"
        if windows.exists():
            panel = Panel(*load(windows))
        else:
            found = {name: source.stratum(name) for name in names}
            strata = {name: made for name, made in found.items() if not isinstance(made, str)}
            left = {name: made for name, made in found.items() if isinstance(made, str)}
            if not strata:
                raise UserError(f"{model}: no stratum can be made: {'; '.join(f'{n}: {why}' for n, why in left.items())}")
            data = [data_entry(name, str(source.files.get(name, source.corpus).name), [w.ids for w in own])
                    for name, own in strata.items()]  # fmt: skip
            facts = made_of | {"strata": list(strata), "left_out": left, "data": data, "reference": describe_model(model)}
            facts |= {"sizes": sizes, "texts": texts}
            panel = Panel(facts | {"dtype": str(dtype).removeprefix("torch.")}, frozen(strata))
            save(windows, panel.tensors, panel.facts)
        stream = opened_stream(model, dtype)
        states, noisy = streamed_states(stream, panel, folder / RUN, noise=True)
        head = head_of(stream)
        made = chunks(panel, lambda places: head(noisy[places]), stream.model.config.vocab_size)
        noise = positions(panel, states, head, made, {})
        panel.tensors.update(states=states, floor_kl=torch.from_numpy(noise["kl"]).float())
        panel = joined(old, panel) if old else panel
        save(folder / FILE, panel.tensors, panel.facts)
    return identified(panel, out)


def identified(panel: Panel, out: Path) -> Panel:
    """The panel with the digest of its file among its facts."""
    return Panel(panel.facts | {"sha256": file_sha256(out / FILE)}, panel.tensors)


def check_place(model: Path, out: Path, mark: str) -> None:
    """Raise :class:`UserError` where a panel or judgement would take the place of a directory of anything else."""
    check_output(model, out.resolve(), (out / mark).exists(), 0, mark)


def engine_of(args: argparse.Namespace, panel: Panel, path: Path) -> str:
    """What judges, in words."""
    if is_gguf(path):
        return "llama-perplexity"
    return f"vllm, top {args.top_k}: KL is a lower bound" if args.engine == "vllm" else f"transformers, {panel.facts['dtype']}"


def judged(args: argparse.Namespace, panel: Panel, model: Path, path: Path, out: Path) -> dict[str, np.ndarray]:
    """What a model says of the panel, [positions]: kept in ``out``, and read there when it was judged before."""
    made_of = {"source": source_identity(path), "panel": panel.facts["sha256"], "judge": engine_of(args, panel, path)}
    made_of |= {"options": args.tool_args} if is_gguf(path) else {}
    if (out / VALUES).exists() and not args.force:
        facts, found = load(out / VALUES)
        if facts == made_of:
            return {name: value.numpy() for name, value in found.items()}
    check_place(path, out, VALUES)
    with staged_directory(out, True, made_of) as folder:
        stream, kept = opened_stream(model, getattr(torch, panel.facts["dtype"])), folder / RUN / VALUES
        head, states = head_of(stream), panel.tensors["states"]
        found = {name: value.numpy() for name, value in load(kept)[1].items()} if kept.exists() else {}

        def keep(file: Path = kept) -> None:
            save(file, {name: torch.from_numpy(value) for name, value in found.items()}, made_of)

        if is_gguf(path):
            done = ~np.isnan(found.get("kl", np.full(len(panel.owner), np.nan)))
            made = told_by_llama(panel, load_tokenizer(model, chat=False), path, done, shlex.split(args.tool_args))
            positions(panel, states, head, made, found, DEPTH, keep)
        elif args.engine == "vllm":
            positions(panel, states, head, told_by_vllm(panel, path, args.top_k, args.tensor_parallel), found, keep=keep)
        else:
            own = opened_stream(path, stream.dtype)
            if (known := own.model.config.vocab_size) <= (largest := int(panel.tensors["ids"].max())):
                raise UserError(f"{path}: has {known:,} tokens, the panel has token {largest:,}: KL between them means nothing")
            (mine,) = streamed_states(own, panel, folder / RUN)
            logits = head_of(own)
            made = chunks(panel, lambda places: logits(mine[places]), known)
            positions(panel, states, head, made, found)
        keep(folder / VALUES)
    return found


def metrics_of(panel: Panel, found: Mapping[str, np.ndarray], floor: np.ndarray) -> dict[str, Any]:
    """Statistics by stratum of the positions that every judge sees; ``floor``: KL of an unquantized copy [positions].
    ``above_floor`` is the mean difference, whose interval, in pairs, says whether anything is ``claimed``."""
    seen = ~np.isnan(found["kl"]) & ~np.isnan(floor)
    late = (panel.marks == EVERYWHERE).numpy()

    def of(mask: np.ndarray) -> tuple[dict[str, Any], np.ndarray, np.ndarray]:
        windows, owner = np.unique(panel.owner[mask], return_inverse=True)
        names = [name.replace(" ", "_") for name in panel.facts["strata"]]  # fit to be cited
        codes = panel.tensors["stratum"].numpy()[windows]
        kl, base, own = (found[key][mask] for key in ("kl", "base_right", "right"))
        more = {"flips": base != own, "lost": base & ~own, "floor": floor[mask], "above_floor": kl - floor[mask]}
        made = stratum_metrics(
            owner, [names[code] for code in codes], resampled(codes.tolist()), found["loss"][mask], found["base_loss"][mask],
            kl, found["agree"][mask], more,
        )  # fmt: skip
        for entry in made.values():
            entry["claimed"] = entry["documents"] >= FEWEST and entry["above_floor_low"] > 0
        return made, windows, by_document(owner, kl, len(windows))

    if not (seen & late).any():
        raise UserError("no position of the panel was told by this judge")
    strata, windows, sums = of(seen & late)
    made: dict[str, Any] = {"strata": strata}
    made |= {"confidence": by_confidence(found["likeliest"][seen & late], found["kl"][seen & late])}
    made |= {"windows": windows.tolist(), "kl_sums": [float(f"{value:.6g}") for value in sums]}
    return made | ({"first_halves": of(seen & ~late)[0]["all"]} if (seen & ~late).any() else {})


def table(strata: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    yield (f"{'stratum':<16}{'positions':>10}{'windows':>8}  {'mean KL, 95 %':<29}{'median':>9}{'99 %':>9}{'99.9 %':>9}"
           f"{'top-1':>8}{'flips':>8}  {'floor':>8}")  # fmt: skip
    for name, m in strata.items():
        mean = f"{m['mean']:.6f} ({m['low']:.6f} to {m['high']:.6f})"
        line = f"{name:<16}{m['positions']:>10,}{m['documents']:>8,}  {mean:<29}{m['median']:>9.6f}{m['p99']:>9.5f}"
        line += f"{m['p99_9']:>9.5f}{100 * m['top1']:>7.2f}%{100 * m['flips']:>7.2f}%  {m['floor']:.6f}"
        why = "not above the floor" if m["documents"] >= FEWEST else f"fewer than {FEWEST} windows"
        yield line + ("" if m["claimed"] else f"  {why}: nothing is claimed")


def error_bar(m: Mapping[str, Any]) -> str:
    """Whether the ruler is long enough, in words."""
    share = m["standard_error"] / m["mean"] if m["mean"] > 0 else 0.0
    longer = f"; --positions times {(share / WANTED) ** 2:.1f} would make it {100 * WANTED:.0f} %" if share > WANTED else ""
    return f"standard error {100 * share:.1f} % of the mean{longer}"


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    scratch = Path(os.environ.get("SCRATCH", REPO / "work"))
    parser.add_argument("--reference", type=Path, required=True, help="the original: a directory, or hf:ORG/NAME@COMMIT")
    parser.add_argument("--judge", type=Path, help="a checkpoint or GGUF of it")
    parser.add_argument("--tag", help="name of the judgement: OUT/TAG.json")
    parser.add_argument("--out", type=Path, default=Path("results/panel"), help="directory of it (default results/panel)")
    parser.add_argument("--work", type=Path, default=scratch / "panel", help="directory of panels (default $SCRATCH/panel)")
    parser.add_argument("--force", action="store_true", help="judge again, or without --judge make the panel again")
    parser.add_argument("--text", action="append", default=[], metavar="NAME=FILE", help="text of a stratum; again for more")
    parser.add_argument("--corpus", type=Path, default=scratch / "text", help="directory of make_text.sh")
    parser.add_argument("--prompts", type=Path, help="prompts, between empty lines (default: the tiny tasks' questions)")
    parser.add_argument("--max-tokens", type=int, help="of an answer made here (default 1,024)")
    parser.add_argument("--answers", type=Path, help="a log of samples of the original, instead of answers made here")
    parser.add_argument("--positions", type=int, help="of each stratum, that every judge sees (default 20,000)")
    parser.add_argument("--floor", metavar="TAG", help="the floor is the KL of this judgement (an unquantized copy)")
    parser.add_argument("--engine", choices=("auto", "vllm"), default="auto", help="what judges a checkpoint")
    parser.add_argument("--top-k", type=int, default=20, help="tokens whose log-probability vLLM tells (default 20)")
    parser.add_argument("--tensor-parallel", type=int, default=1, help="GPUs of vLLM")
    parser.add_argument("--tool-args", default="", help='options for llama.cpp, as "-ngl 99"')
    return parser.parse_args()


def main() -> None:
    args, started = parse_args(), time.time()
    if min(args.top_k, *(1 if given is None else given for given in (args.positions, args.max_tokens))) < 1:
        raise UserError("--positions, --top-k and --max-tokens must be at least 1")
    if bool(args.judge) != bool(args.tag):
        raise UserError("--judge and --tag go together")
    result, model = tagged_record(args) if args.tag else None, located(args.reference)
    path = located(args.judge) if args.judge else None
    described = None if path is None else describe_gguf(path) if is_gguf(path) else describe_model(path)
    out = args.work / model_name(model)
    panel = make_panel(args, model, out)
    strata, marks = np.array(panel.facts["strata"])[panel.tensors["stratum"].numpy()][panel.owner], panel.marks.numpy()
    for name in panel.facts["strata"]:
        own = strata == name
        noise = f"floor {panel.tensors['floor_kl'].numpy()[own].mean():.2e}"
        print(f"{name:<16}{own.sum():>9,} positions, {(own & (marks == EVERYWHERE)).sum():,} seen by every judge; {noise}")
    for name, why in panel.facts["left_out"].items():
        print(f"{name:<16}left out: {why}")
    if path is None or result is None:
        return
    floor = panel.tensors["floor_kl"].double().numpy()
    if args.floor:
        place = out.with_name(f"{out.name}.{args.floor}") / VALUES
        if not place.exists():
            raise UserError(f"--floor {args.floor}: no judgement of that tag ({place}); judge an unquantized copy first")
        facts, values = load(place)
        if facts["panel"] != panel.facts["sha256"]:
            raise UserError(f"--floor {args.floor}: was judged on another panel; judge it again")
        if facts["judge"] != engine_of(args, panel, path):
            raise UserError(f"--floor {args.floor}: judged by {facts['judge']}, this by {engine_of(args, panel, path)}")
        floor = values["kl"].numpy()
    found = judged(args, panel, model, path, out.with_name(f"{out.name}.{args.tag}"))
    metrics = metrics_of(panel, found, floor)
    print("\n".join(table(metrics["strata"])), flush=True)
    print(error_bar(metrics["strata"]["all"]), flush=True)
    write_result(
        result, kind="panel", tag=args.tag, started=started, model=described, data=panel.facts["data"], metrics=metrics,
        recipe=None if is_gguf(path) else recipe_record(path),
        extra={
            "judge": engine_of(args, panel, path), "options": args.tool_args, "reference": panel.facts["reference"],
            "floor": args.floor or "the original with noise of BF16's size behind every layer",
            "panel": {key: value for key, value in panel.facts.items() if key not in ("data", "reference", "source")},
        },
    )  # fmt: skip


if __name__ == "__main__":
    run_cli(main)
