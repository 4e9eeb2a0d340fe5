"""Models of real text judged against their original: bash pipelines/judge_text.sh

    python src/eval/text_judge.py --text work/text --reference M --model W3 [--model F.gguf ...] --result F --tag T
    python src/eval/text_judge.py --text wiki.test.raw --window 2048 --scored all --reference M --model W3

--text DIR is what make_text.sh made. Held-out text, an equal share of every stratum and of each document at most half a window,
is read in windows by the reference's tokenizer: KL(reference || model) over the whole vocabulary, agreement on the likeliest
token and perplexity, in every stratum and over all, with standard errors by bootstrap over documents; models of one call are
compared in pairs, in the same samples. Then three likelihood tasks of four choices (tasks_text.py), answered by the mean
log-probability of a token of the choice (`accuracy`; by its sum: `accuracy_sum`), in pairs with the reference's answers.
--text FILE is one stratum, read in windows of 512 whose second halves are scored as llama-perplexity does; `--window 2048
--scored all` is what papers tabulate. A GGUF is judged as the checkpoint that gguf_dequant makes of it (BF16). Logits are made
in float32 of the model's last hidden states.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import itertools
import random
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from console import UserError, progress, read_object, read_text, run_cli, scratch_folder, write_json
from gguf_dequant import dequantize
from gguf_format import describe_gguf, is_gguf
from hf_model import all_finite, context_of, first_nonfinite, load_model, load_tokenizer, prefix_ids, scaled_logits, text_ids
from intervals import bounds, resampled, weighted_means, weighted_quantiles
from kl import divergence, summarize_kl, text_windows
from recipe import recipe_record
from records import add_record_arguments, check_record_arguments, data_entry, describe_model, write_result
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
SHARES = (0.5, 0.99, 0.999)
TRAINING = "train.jsonl.gz"
FACTS = "facts.json"  # beside the corpus: what recall asks, for machines that have no training text


@dataclasses.dataclass(frozen=True)
class Text:
    """Windows [N, T] of token ids; ``scored`` where the prediction of a token counts; ``owner``: the document [positions] of
    each scored token, in the order of the windows; ``strata``: the stratum of each document."""

    ids: Tensor
    scored: Tensor
    owner: np.ndarray
    strata: list[str]
    entry: dict[str, Any]

    @property
    def targets(self) -> Tensor:
        return self.ids[:, 1:][self.scored[:, 1:]]


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
    return Text(torch.tensor(rows), scored, torch.tensor(owners)[scored].numpy(), strata, entry)


def file_windows(path: Path, tokenizer: Any, window: int, half: bool) -> Text:
    """A text file; a window counts as a document."""
    text, prefix = read_text(path), prefix_ids(tokenizer)
    found = text_windows(text_ids(tokenizer, text), prefix, window, half, 1)
    if not found:
        raise UserError(f"{path}: too short for a window of {window} tokens; give more text, or another --window")
    ids, scored = torch.cat([batch.ids for batch in found]), torch.cat([batch.scored for batch in found])
    scored[:, 0] = False  # nothing predicts it
    owner = np.repeat(np.arange(len(ids)), scored.sum(1).numpy())
    entry = data_entry(path.name, "file", [text]) | {"window": window, "windows": len(ids), "scored": "half" if half else "all"}
    return Text(ids, scored, owner, [path.name] * len(ids), entry)


def kept_facts(directory: Path, count: int) -> list[Fact]:
    """What recall asks: read from the training documents once, and kept beside them."""
    file, source = directory / FACTS, directory / TRAINING
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


class Judged:
    """A loaded model: its last hidden states, and logits in float32 of them."""

    def __init__(self, path: Path, batch: int) -> None:
        self.model, self.batch = load_model(path), batch
        self.config = self.model.config.get_text_config()
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
        size, made = max(1, self.batch // text.ids.shape[1]), []
        with progress(text.ids.numel(), f"text {Path(self.model.name_or_path).name}", "token", True) as bar:
            for ids, scored in zip(text.ids.split(size), text.scored.split(size), strict=True):
                made.append(self.decode(ids).last_hidden_state[:, :-1][scored[:, 1:].to(self.model.device)].cpu())
                bar.update(ids.numel())
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


def by_document(text: Text, values: np.ndarray) -> np.ndarray:
    return np.bincount(text.owner, values, len(text.strata))


def stratum_metrics(
    text: Text, weights: np.ndarray, nll: np.ndarray, base_nll: np.ndarray | None = None, kl: np.ndarray | None = None,
    agree: np.ndarray | None = None,
) -> dict[str, Any]:  # fmt: skip
    """By stratum and for all: positions, documents, perplexity with its standard error and, against a reference, its ratio and
    the statistics of KL, from values [positions]."""
    strata, made = np.array(text.strata), {}
    for name in dict.fromkeys(["all", *text.strata]):
        documents = np.flatnonzero((strata == name) | (name == "all"))
        kept, own = np.isin(text.owner, documents), weights[:, documents]
        counts = by_document(text, np.ones(len(nll)))[documents]
        losses = weighted_means(own, by_document(text, nll)[documents], counts)
        ppl = np.exp(losses)
        entry = {"positions": int(kept.sum()), "documents": len(documents), "ppl": ppl[0], "ppl_error": ppl[1:].std(ddof=1)}
        if kl is not None and agree is not None and base_nll is not None:
            ratio = np.exp(losses - weighted_means(own, by_document(text, base_nll)[documents], counts))
            entry |= dict(zip(("ppl_ratio", "ppl_ratio_low", "ppl_ratio_high"), bounds(ratio), strict=True))
            entry |= summarize_kl(kl[kept], agree[kept]) | {"median": np.median(kl[kept])}
            means = weighted_means(own, by_document(text, kl)[documents], counts)
            entry |= {"standard_error": means[1:].std(ddof=1)}
            places = np.searchsorted(documents, text.owner[kept])
            tails = weighted_quantiles(own, places, kl[kept], SHARES)[1:].std(0, ddof=1)
            entry |= dict(zip(("median_error", "p99_error", "p99_9_error"), tails, strict=True))
        made[name] = {key: value if isinstance(value, int) else float(value) for key, value in entry.items()}
    return made


class Judge:
    """The text, the tasks and what the reference makes of them; :meth:`judged` compares a model with it."""

    def __init__(self, text: Text, tasks: Mapping[str, Sequence[Item]], reference: Path, batch: int) -> None:
        self.text, self.tasks, self.path, self.batch = text, tasks, reference, batch
        codes = {name: number for number, name in enumerate(dict.fromkeys(text.strata))}
        counts = by_document(text, np.ones(len(text.owner))).astype(int)
        self.facts = {"strata": [codes[name] for name in text.strata], "positions": counts.tolist()}
        self.weights = resampled(self.facts["strata"])
        self.reference = Judged(reference, batch)
        self.hidden = self.reference.states(text)
        self.nll, _, _ = self._positions(self.reference, self.hidden)
        made = {"strata": stratum_metrics(text, self.weights, self.nll), "tasks": self._tasks(self.reference)}
        self.made: dict[str, Any] = {"model": describe_model(reference), **made}

    @torch.inference_mode()
    def _positions(self, model: Judged, hidden: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(loss, KL to the reference, agreement with it) [positions]."""
        size = (1 << (28 if model.model.device.type == "cuda" else 24)) // model.config.vocab_size
        parts = []
        for own, base, target in zip(hidden.split(size), self.hidden.split(size), self.text.targets.split(size), strict=True):
            logits = model.logits(own)
            expected = logits if model is self.reference else self.reference.logits(base)
            loss = F.cross_entropy(logits, target.to(logits.device), reduction="none")
            parts.append([each.cpu() for each in (loss, *divergence(expected, logits))])
        loss, kl, agree = (torch.cat(each) for each in zip(*parts, strict=True))
        return loss.double().numpy(), kl.double().numpy(), agree.numpy()

    def _tasks(self, model: Judged) -> dict[str, Any]:
        return {name: answers(items, *model.choices(items, name)) for name, items in self.tasks.items()}

    def judged(self, path: Path) -> dict[str, Any]:
        """The metrics of a checkpoint, or of a GGUF of the reference."""
        if is_gguf(path):
            with scratch_folder() as folder:
                dequantize(path, self.path, folder / path.stem)
                return self.judged(folder / path.stem) | {"model": describe_gguf(path)}
        model = Judged(path, self.batch)
        if model.config.vocab_size != self.reference.config.vocab_size:
            raise UserError(f"{path} and {self.path} have different vocabularies: KL between them means nothing")
        nll, kl, agree = self._positions(model, model.states(self.text))
        tasks = self._tasks(model)
        for name, own in tasks.items():
            own["to_reference"] = paired_answers(self.made["tasks"][name]["right"], own["right"])
        sums = [float(f"{value:.6g}") for value in by_document(self.text, kl)]
        strata = stratum_metrics(self.text, self.weights, nll, self.nll, kl, agree)
        made = {"model": describe_model(path), "recipe": recipe_record(path), "strata": strata, "tasks": tasks}
        return made | {"kl_sums": sums}


def open_judge(args: argparse.Namespace) -> Judge:
    """The judge that the options describe."""
    tokenizer, context = load_tokenizer(args.reference, chat=False), context_of(args.reference)
    whole = args.text.is_dir()
    window = args.window or (min(1024, context) if whole else 512)
    if not 16 <= window <= context:
        raise UserError(f"--window {window}: {args.reference} reads 16 to {context} positions (max_position_embeddings)")
    if whole and args.scored:
        raise UserError("--scored: of a text file")
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
        for name, items in tasks.items():
            if len(items) < args.items:
                print(f"{name}: {len(items):,} items, not {args.items:,}: the text has no more", flush=True)
    else:
        text = file_windows(args.text, tokenizer, window, args.scored != "all")
    print(f"{args.text}: {len(text.owner):,} positions of {len(text.strata):,} documents in windows of {window}", flush=True)
    gpu = torch.cuda.is_available()
    return Judge(text, {name: items for name, items in tasks.items() if items}, args.reference, 1 << (16 if gpu else 13))


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
    parser.add_argument("--window", type=int, help="tokens of a window (default 1,024; of a file 512)")
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
