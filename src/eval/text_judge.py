"""Models of real text judged against their original: bash pipelines/judge_text.sh

    python src/eval/text_judge.py --text work/text --reference M --model W3 [--model F.gguf ...] --result F --tag T
    python src/eval/text_judge.py --text wiki.test.raw --window 2048 --scored all --reference M --model W3

--text DIR is what make_text.sh made. Held-out text, an equal share of every stratum and of each document at most half a window,
is read in windows by the reference's tokenizer: KL(reference || model) over the whole vocabulary, agreement on the likeliest
token and perplexity, in every stratum and over all, with standard errors by bootstrap over documents; models of one call are
compared in pairs, in the same samples. Then three likelihood tasks of four choices (tasks_text.py), answered by the mean
log-probability of a token of the choice (`accuracy`; by its sum: `accuracy_sum`), in pairs with the reference's answers.
--text FILE is one stratum, read in windows of 512 whose second halves are scored as llama-perplexity does; `--window 2048
--scored all` is what papers tabulate, `--window 0` reads the parts between empty lines one by one. A GGUF is judged as the
checkpoint that gguf_dequant makes of it (BF16), or by llama-server, every position asked for. Logits are made in float32 of the
model's last hidden states. moe_eval.py judges on the transcripts of the tiny tasks in the same way.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import itertools
import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from checkpoint import Checkpoint
from console import UserError, progress, read_object, read_text, run_cli, scratch_folder, write_json
from gguf_dequant import dequantize
from gguf_format import describe_gguf, is_gguf
from hf_model import all_finite, context_of, first_nonfinite, load_model, load_tokenizer, prefix_ids, scaled_logits, text_ids
from intervals import by_confidence, by_document, resampled, stratum_metrics
from kl import EXACT, compared, encoded, file_texts, padded, split_documents, summarize_kl, text_windows, tiny_texts
from llamacpp_eval8 import LlamaServer, server_logprobs
from recipe import recipe_record
from records import add_record_arguments, check_record_arguments, data_entry, describe_model, write_result
from task_text import TASK_TEXTS
from tasks_text import (
    CHOICES,
    Encode,
    Fact,
    Item,
    Row,
    answers,
    by_stratum,
    closing_lines,
    continuations,
    fact_items,
    facts,
    pair,
    paired_answers,
    read_rows,
)

SEED = 24
TRAINING = "train.jsonl.gz"
FACTS = "facts-{}.json"  # beside the corpus, by their number: what recall asks, for machines that have no training text
TRANSCRIPTS = 640  # of each tiny task: the ruler by which razor-tiny is judged
LONGEST = 4096  # tokens of a transcript, or of a document of a file


@dataclasses.dataclass(frozen=True)
class Text:
    """Windows [N, T] of token ids, of which the first ``lengths`` [N] are real, shorter ones before longer ones; ``scored``
    where the prediction of a token counts; ``owner``: the document [positions] of each scored token, in the order of the
    windows; ``strata``: the stratum of each document; ``answer``: where a token is of the assistant's turn."""

    ids: Tensor
    scored: Tensor
    owner: np.ndarray
    strata: list[str]
    entry: dict[str, Any]
    lengths: Tensor
    answer: Tensor | None = None

    @property
    def targets(self) -> Tensor:
        return self.ids[:, 1:][self.scored[:, 1:]]

    @property
    def how(self) -> str:
        """What of a window is scored, for the name of the judge."""
        return f", second halves of windows of {self.entry['window']}" if self.entry.get("scored") == "half" else ""

    def parts(self, size: int) -> list[slice]:
        """Windows that are read together: at most ``size`` tokens with their padding, at least one window."""
        found, start, lengths = [], 0, self.lengths.tolist()
        for place in range(1, len(lengths) + 1):
            if place == len(lengths) or (place + 1 - start) * lengths[place] > size:
                found.append(slice(start, place))
                start = place
        return found


def whole_texts(
    tokenizer: Any, pairs: Sequence[tuple[str, str]], strata: Sequence[str], entry: dict[str, Any], context: int
) -> Text:  # fmt: skip
    """(prompt, turn) pairs, each a document that is read from its beginning by itself."""
    rows = encoded(tokenizer, pairs, min(context, LONGEST))
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].ids))
    batch = padded([rows[i] for i in order])
    scored = batch.scored.clone()
    scored[:, 0] = False  # nothing predicts it
    owner, lengths = np.repeat(np.arange(len(rows)), scored.sum(1).numpy()), batch.real.sum(1)
    return Text(batch.ids, scored, owner, [strata[i] for i in order], entry, lengths, batch.answer)


def transcripts(tokenizer: Any, count: int, context: int) -> Text:
    """Held-out transcripts of the tiny tasks, ``count`` of each; a task is a stratum."""
    pairs, entry = tiny_texts(tokenizer, count)
    return whole_texts(tokenizer, pairs, [task.name for task in TASK_TEXTS for _ in range(count)], entry, context)


def corpus_windows(
    documents: Mapping[str, Sequence[Row]], encode: Encode, end: int, prefix: Sequence[int], window: int, positions: int,
    seed: int = SEED,
) -> Text:  # fmt: skip
    """At least ``positions`` scored tokens in windows of one stratum each, an equal number of every stratum; ``end`` stands
    behind each document, of which half a window is taken at most, at a random place."""
    first = max(1, len(prefix))
    count = -(-positions // (len(documents) * (window - first)))
    body, rng = window - len(prefix), random.Random(f"windows:{seed}")
    rows, owners, strata, used = list[list[int]](), list[list[int]](), list[str](), list[str]()
    for name, own in documents.items():
        ids, owner = list[int](), list[int]()
        for row in own:
            if len(ids) >= count * body:
                break
            whole = encode(row["text"])
            start = rng.randrange(max(1, len(whole) - window // 2 + 1))
            piece = [*whole[start : start + window // 2], end]
            ids += piece
            owner += [len(strata)] * len(piece)
            strata.append(name)
            used.append(row["text"])
        if len(ids) < count * body:
            raise UserError(f"{name}: {len(ids):,} tokens, {count * body:,} are needed; ask for fewer --positions")
        for place in range(0, count * body, body):
            rows.append([*prefix, *ids[place : place + body]])
            owners.append([*prefix, *owner[place : place + body]])
    scored = (torch.arange(window) >= first).expand(len(rows), window)
    entry = data_entry("held-out text", "make_text.sh", used) | {"window": window, "windows": len(rows)}
    lengths = torch.full((len(rows),), window)
    return Text(torch.tensor(rows), scored, torch.tensor(owners)[scored].numpy(), strata, entry, lengths)


def file_windows(path: Path, tokenizer: Any, window: int, half: bool, most: int | None = None) -> Text:
    """A text file, at most so many windows of it; a window counts as a document."""
    text, prefix = read_text(path), prefix_ids(tokenizer)
    whole, documents = text_ids(tokenizer, text), len(split_documents(text))
    tokens = len(prefix) + len(whole)
    count = min(tokens // window, most or tokens)
    if not count or window < 2 * len(prefix) + 2:
        raise UserError(f"{path}: {tokens:,} tokens make no window of {window}; give more text, or another --window")
    print(f"{path}: {documents:,} documents, {tokens:,} tokens; {count:,} of {tokens // window:,} windows of {window:,}, "
          f"{'the second half of each' if half else 'all of each'} scored; {tokens - count * window:,} tokens behind them are "
          f"left out; {f'each begins with {prefix}' if prefix else 'nothing is put before them'}", flush=True)  # fmt: skip
    (batch,) = text_windows(whole[: count * window - len(prefix)], prefix, window, half, count)
    scored = batch.scored.clone()
    scored[:, 0] = False  # nothing predicts it
    owner = np.repeat(np.arange(count), scored.sum(1).numpy())
    entry = data_entry(path.name, "file", [text]) | {"documents": documents, "tokens": tokens, "prefix": prefix}
    entry |= {"window": window, "windows": count, "scored": "half" if half else "all"}
    return Text(batch.ids, scored, owner, [path.name] * count, entry, torch.full((count,), window))


def kept_facts(directory: Path, count: int) -> list[Fact]:
    """What recall asks: read from the training documents once, and kept beside them."""
    file, source = directory / FACTS.format(count), directory / TRAINING
    made_of = {"count": count, "seed": SEED, "bytes": source.stat().st_size if source.exists() else None}
    if file.exists():
        kept = read_object(file, "made_of", "facts")
        try:
            if kept["made_of"] == made_of | ({} if source.exists() else {"bytes": kept["made_of"]["bytes"]}):
                return [Fact(**fact | {"choices": tuple(fact["choices"])}) for fact in kept["facts"]]
        except (TypeError, KeyError):
            raise UserError(f"{file}: holds no facts; remove it, and it is made again") from None
    found = facts(read_rows(source), count, SEED)
    write_json(file, {"made_of": made_of, "facts": [dataclasses.asdict(fact) for fact in found]})
    return found


class RouterCounter:
    """Counts how often each expert is chosen, by hooks on the routers of a transformers model."""

    def __init__(self, model: torch.nn.Module, top_k: int) -> None:
        self.top_k = top_k
        self.counts: dict[str, Tensor] = {}
        self.mask: Tensor | None = None  # of the tokens that count; none does without one
        for name, module in model.named_modules():
            if name.endswith(".mlp.gate") and hasattr(module, "weight") and module.weight.ndim == 2:
                module.register_forward_hook(lambda m, a, out, name=name: self._count(name, m, a[0]))

    def _count(self, name: str, router: torch.nn.Module, hidden: Tensor) -> None:
        if self.mask is None:
            return
        logits = F.linear(hidden.reshape(-1, hidden.shape[-1]).float(), router.weight.float())
        chosen = logits.topk(self.top_k, -1).indices[self.mask.flatten().to(logits.device)]
        count = torch.bincount(chosen.flatten(), minlength=logits.shape[-1])
        self.counts[name] = self.counts.get(name, 0) + count

    def summary(self) -> dict[str, Any] | None:
        """Normalised entropy of the expert load (1 is even), over layers, and the least load as a share of the mean."""
        if not self.counts:
            return None
        loads = torch.stack([count.cpu() for count in self.counts.values()]).double()
        shares = loads / loads.sum(-1, keepdim=True)
        entropy = -(shares * shares.clamp_min(1e-300).log()).sum(-1) / math.log(shares.shape[-1])
        return {
            "layers": len(shares),
            "experts": shares.shape[-1],
            "entropy_mean": entropy.mean().item(),
            "entropy_min": entropy.min().item(),
            "min_load": (shares.min() * shares.shape[-1]).item(),
        }


class Judged:
    """A loaded model: its last hidden states, and logits in float32 of them."""

    def __init__(self, path: Path, batch: int, dtype: torch.dtype | None = None) -> None:
        self.model, self.batch = load_model(path, dtype=dtype), batch
        self.config = self.model.config.get_text_config()
        self.routers = RouterCounter(self.model, getattr(self.config, "num_experts_per_tok", 0) or 1)
        self.head = copy.deepcopy(self.model.get_output_embeddings()).float()

    def logits(self, hidden: Tensor) -> Tensor:
        return scaled_logits(self.head(hidden.to(self.model.device).float()), self.config)

    def decode(self, ids: Tensor, **more: Any) -> Any:
        made = self.model.get_decoder()(input_ids=ids.to(self.model.device), use_cache=bool(more), **more)
        if not all_finite(made.last_hidden_state):
            raise UserError(f"{self.model.name_or_path}: {first_nonfinite(self.model, input_ids=ids.to(self.model.device))}")
        return made

    @torch.inference_mode()
    def states(self, text: Text) -> Tensor:
        """Hidden states [positions, width] that predict the scored tokens."""
        made = []
        with progress(int(text.lengths.sum()), f"text {Path(self.model.name_or_path).name}", "token", True) as bar:
            for part in text.parts(self.batch):
                lengths = text.lengths[part]
                ids, scored = (each[part, : int(lengths[-1])] for each in (text.ids, text.scored))
                self.routers.mask = torch.arange(ids.shape[1]) < lengths[:, None]
                made.append(self.decode(ids).last_hidden_state[:, :-1][scored[:, 1:].to(self.model.device)].cpu())
                bar.update(int(lengths.sum()))
        self.routers.mask = None
        return torch.cat(made)

    @torch.inference_mode()
    def choices(self, items: Sequence[Item], name: str = "task") -> tuple[np.ndarray, np.ndarray]:
        """(log-probability [items, 4] of each choice behind its prompt, tokens [items, 4]). Prompts are read once, those of one
        length together: a linear attention takes no padding before a text."""
        sums, counts = np.zeros((len(items), CHOICES)), np.array([[len(c) for c in item.choices] for item in items])
        order = sorted(range(len(items)), key=lambda i: (len(items[i].prompt), counts[i].max()))
        with progress(len(items), f"{name} {Path(self.model.name_or_path).name}", "item") as bar:
            for length, group in itertools.groupby(order, lambda i: len(items[i].prompt)):
                places = list(group)
                size = max(1, self.batch // (length + CHOICES * int(counts[places].max())))
                for start in range(0, len(places), size):
                    part = places[start : start + size]
                    sums[part] = self._choices([items[i] for i in part])
                    bar.update(len(part))
        return sums, counts

    def _choices(self, items: Sequence[Item]) -> np.ndarray:
        made = self.decode(torch.tensor([item.prompt for item in items]), past_key_values=None, return_dict=True)
        rows = [torch.tensor(choice) for item in items for choice in item.choices]
        ids = pad_sequence(rows, batch_first=True)
        real = torch.arange(ids.shape[1]) < torch.tensor([len(row) for row in rows])[:, None]
        hidden = made.last_hidden_state[:, -1:].repeat_interleave(CHOICES, 0)
        if ids.shape[1] > 1:
            cache = made.past_key_values
            cache.reorder_cache(torch.arange(len(items)).repeat_interleave(CHOICES).to(hidden.device))
            hidden = torch.cat([hidden, self.decode(ids[:, :-1], past_key_values=cache).last_hidden_state], 1)
        logits = self.logits(hidden[real.to(hidden.device)])
        likely = torch.zeros(ids.shape, dtype=torch.float64)
        likely[real] = -F.cross_entropy(logits, ids[real].to(logits.device), reduction="none").double().cpu()
        return likely.sum(1).view(-1, CHOICES).numpy()


class Judge:
    """The text, the tasks and what the reference makes of them; :meth:`judged` compares a model with it."""

    def __init__(
        self, text: Text, tasks: Mapping[str, Sequence[Item]], reference: Path, batch: int, dtype: torch.dtype | None = None
    ) -> None:
        self.text, self.tasks, self.path, self.batch, self.dtype = text, tasks, reference, batch, dtype
        codes = {name: number for number, name in enumerate(dict.fromkeys(text.strata))}
        counts = by_document(text.owner, np.ones(len(text.owner)), len(text.strata)).astype(int)
        self.facts = {"strata": [codes[name] for name in text.strata], "positions": counts.tolist()}
        self.weights = resampled(self.facts["strata"])
        if dtype is torch.float32:
            torch.backends.cudnn.allow_tf32 = False  # what convolutions take by default
        described = {"model": describe_model(reference), "recipe": recipe_record(reference)}
        self.reference = Judged(reference, batch, dtype)
        self.hidden = self.reference.states(text)
        own = self._positions(self.reference.logits, self.hidden)
        self.nll, self.likeliest = own["loss"], own["likeliest"]
        self.made: dict[str, Any] = described | {"judge": self.name}
        self.made |= {"strata": stratum_metrics(text.owner, text.strata, self.weights, self.nll)}
        self.made |= {"tasks": self._tasks(self.reference)}
        self.made |= {"routing": self.reference.routers.summary(), "answer": self._answer(self.nll)}

    @property
    def name(self) -> str:
        return f"transformers, {str(self.reference.model.dtype).removeprefix('torch.')}{self.text.how}"

    @torch.inference_mode()
    def _positions(self, logits_of: Callable[[Tensor], Tensor], own: Tensor) -> dict[str, np.ndarray]:
        """What kl.compared tells of the reference and of the logits made of the rows of ``own``, [positions]."""
        size = (1 << (28 if self.reference.model.device.type == "cuda" else 24)) // self.reference.config.vocab_size
        parts = []
        for rows, base, target in zip(own.split(size), self.hidden.split(size), self.text.targets.split(size), strict=True):
            p = self.reference.logits(base).log_softmax(-1)
            q = p if own is self.hidden else logits_of(rows).to(p.device).log_softmax(-1)
            parts.append({key: value.cpu() for key, value in compared(p, q, target.to(p.device)).items()})
        found = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
        return {key: (own.double() if own.is_floating_point() else own).numpy() for key, own in found.items()}

    def _answer(self, nll: np.ndarray, kl: np.ndarray | None = None, agree: np.ndarray | None = None) -> dict[str, Any] | None:
        """Perplexity and KL on the tokens of the assistant's turn, where the text has turns."""
        if self.text.answer is None:
            return None
        kept = self.text.answer[:, 1:][self.text.scored[:, 1:]].numpy()
        made = {"ppl": float(np.exp(nll[kept].mean()))}
        return made if kl is None or agree is None else made | summarize_kl(kl[kept], agree[kept])

    def _tasks(self, model: Judged) -> dict[str, Any]:
        return {name: answers(items, *model.choices(items, name)) for name, items in self.tasks.items()}

    def judged(self, path: Path, server: Sequence[str] | None = None) -> dict[str, Any]:
        """The metrics of a checkpoint, or of a GGUF of the reference: as the checkpoint that it decodes to, or in llama-server
        with these options."""
        if is_gguf(path) and server is None:
            with scratch_folder() as folder:
                dequantize(path, self.path, folder / path.stem)
                made = self.judged(folder / path.stem)
            return made | {"model": describe_gguf(path), "judge": f"decoded, {made['judge']}"}
        if server is not None:
            made = {"model": describe_gguf(path), "recipe": None, "judge": f"llama.cpp{self.text.how}", "tasks": {}}
            return made | self._compared(lambda logits: logits, self._served(path, server))
        model = Judged(path, self.batch, self.dtype)
        if model.config.vocab_size != self.reference.config.vocab_size:
            raise UserError(f"{path} and {self.path} have different vocabularies: KL between them means nothing")
        made = {"model": describe_model(path), "recipe": recipe_record(path), "judge": self.name}
        made |= self._compared(model.logits, model.states(self.text)) | {"routing": model.routers.summary()}
        made["tasks"] = self._tasks(model)
        for name, own in made["tasks"].items():
            own["to_reference"] = paired_answers(self.made["tasks"][name]["right"], own["right"])
        return made

    def _compared(self, logits_of: Callable[[Tensor], Tensor], own: Tensor) -> dict[str, Any]:
        found, text = self._positions(logits_of, own), self.text
        nll, kl, agree = found["loss"], found["kl"], found["agree"]
        made = {"strata": stratum_metrics(text.owner, text.strata, self.weights, nll, self.nll, kl, agree)}
        made |= {"confidence": by_confidence(self.likeliest, kl), "answer": self._answer(nll, kl, agree)}
        return made | {"kl_sums": [float(f"{value:.6g}") for value in by_document(text.owner, kl, len(text.strata))]}

    def _served(self, path: Path, options: Sequence[str]) -> Tensor:
        """Log-probabilities [positions, V] that llama-server gives at every scored token."""
        text, vocabulary, made = self.text, self.reference.config.vocab_size, []
        with (
            LlamaServer(path, int(text.lengths.max()) + 8, 1, options) as server,
            progress(int(text.lengths.sum()), f"llama.cpp {path.name}", "token", True) as bar,
        ):
            for ids, scored, length in zip(text.ids.numpy(), text.scored, text.lengths.tolist(), strict=True):
                first = int(scored.nonzero()[0]) - 1
                made.append(server_logprobs(server, ids[:length], vocabulary, first)[scored[first + 1 : length]])
                bar.update(length)
        return torch.cat(made)


def open_judge(args: argparse.Namespace, items: int | None = None) -> Judge:
    """The judge that the options describe: on a corpus, a text file (``items``: at most so many windows or documents of it), or
    without --text on ``items`` transcripts of each tiny task."""
    whole = args.text is not None and args.text.is_dir()
    tokenizer, context = load_tokenizer(args.reference, chat=args.text is None), context_of(args.reference)
    window = (min(1024, context) if whole else 512) if args.window is None else args.window
    if args.text is not None and window and not 16 <= window <= context:
        raise UserError(f"--window {window}: {args.reference} reads 16 to {context} positions (max_position_embeddings)")
    if whole and (args.scored or not window):
        raise UserError("--scored, --window 0: of a text file")
    tasks: dict[str, list[Item]] = {}
    if whole:
        documents = by_stratum(read_rows(args.text / "heldout.jsonl.gz"), SEED)
        end = tokenizer.get_vocab().get("<|endoftext|>", tokenizer.eos_token_id)

        def encode(text: str) -> list[int]:
            return text_ids(tokenizer, text)

        text = corpus_windows(documents, encode, end, prefix_ids(tokenizer), window, args.positions)
        if args.items:
            tasks["continuation"] = continuations(documents, encode, args.items, SEED)
            tasks["recall"] = fact_items(kept_facts(args.text, args.items), encode)
            tasks["closing"] = closing_lines(documents.get("code", ()), encode, args.items, SEED)
        for name, own in tasks.items():
            if len(own) < args.items:
                print(f"{name}: {len(own):,} items, not {args.items:,}: the text has no more", flush=True)
    elif args.text is None:
        text = transcripts(tokenizer, items or TRANSCRIPTS, context)
    elif window:
        text = file_windows(args.text, tokenizer, window, args.scored != "all", items)
    else:
        pairs, entry = file_texts(args.text, items or 1 << 40)
        text = whole_texts(tokenizer, pairs, [args.text.name] * len(pairs), entry, context)
    read = f"windows of {window}" if args.text is not None and window else "one by one, from the beginning of each"
    print(f"{len(text.owner):,} positions are scored, of {len(text.strata):,} documents, {read}", flush=True)
    gpu, small = torch.cuda.is_available(), Checkpoint(args.reference).bytes <= EXACT
    tasks = {name: own for name, own in tasks.items() if own}
    return Judge(text, tasks, args.reference, 1 << (16 if gpu else 13), torch.float32 if args.text is None and small else None)


def shown(name: str, made: Mapping[str, Any]) -> str:
    own = made["strata"]["all"]
    line = f"{name}: ppl {own['ppl']:.4f} +- {own['ppl_error']:.4f}"
    if "mean" in own:
        line += f"  KL {own['mean']:.5f} +- {own['standard_error']:.5f}  median {own['median']:.5f}  99 % {own['p99']:.4f}"
        line += f"  99.9 % {own['p99_9']:.4f}  top-1 {100 * own['top1']:.2f} %"
    for task, m in made["tasks"].items():
        line += f"  {task} {100 * m['accuracy']:.1f} % (by sum {100 * m['accuracy_sum']:.1f}) of {m['items']:,}"
    return line


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What the judge and the study that runs it (study_text.py) share."""
    parser.add_argument("--text", type=Path, required=True, help="directory of make_text.sh, or a text file")
    parser.add_argument("--positions", type=int, default=100_000, help="held-out positions at least (default 100,000)")
    parser.add_argument("--items", type=int, default=2000, help="items of each task (default 2,000; 0: none)")
    parser.add_argument("--window", type=int, help="tokens of a window (default 1,024; of a file 512, or 0: documents)")
    parser.add_argument("--scored", choices=("half", "all"), help="of a file's windows: the second half (default), or all")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--reference", type=Path, required=True, help="directory of the original")
    parser.add_argument("--model", type=Path, action="append", default=[], help="a checkpoint or GGUF; may be given again")
    add_arguments(parser)
    add_record_arguments(parser)
    args = parser.parse_args()
    if args.positions < 1 or args.items < 0:
        raise UserError("--positions must be at least 1, --items not negative")
    check_record_arguments(args)
    started = time.time()
    judge = open_judge(args)
    print(shown(str(args.reference), judge.made), flush=True)
    models = []
    for path in args.model:
        models.append(judge.judged(path))
        print(shown(str(path), models[-1]), flush=True)
    pairs = []
    for (a, base), (b, other) in itertools.combinations(enumerate(models), 2):
        found = pair(judge.facts, base, other)
        pairs.append({"base": a, "other": b, **found})
        if (kl := found["kl"])["ratio"]:
            print(f"{args.model[b]} / {args.model[a]}: KL {kl['ratio']:.3f} ({kl['ratio_low']:.3f} to {kl['ratio_high']:.3f})")
    if args.result:
        write_result(
            args.result, kind="text", tag=args.tag, started=started, model=judge.made["model"], data=[judge.text.entry],
            metrics={"text": judge.facts, "reference": judge.made, "models": models, "pairs": pairs},
        )  # fmt: skip


if __name__ == "__main__":
    run_cli(main)
