"""KL divergence to a reference model over the whole vocabulary on held-out text, perplexity, and the balance of the routers.

    python src/eval/moe_eval.py --model work/w3 --reference models/razor-tiny --tag razor_tiny_w3
        [--model work/iq3.gguf --tag razor_tiny_iq3 ... --pair razor_tiny_iq3/razor_tiny_w3 --pairs razor_tiny_pairs]
        [--items 640 | --text FILE [--window 512] [--scored half] | --pictures] [--server="-ngl 99"] [--out results/kl]

Text: 640 held-out transcripts of each tiny task (prompt and reference turn), read one by one, every position scored;
--pictures: those of the tiny tasks with pictures, by a vision-language model; --text: a file. It is read in windows of 512
tokens whose second halves are scored, as llama-perplexity does (the same figure on the same weights); `--window 2048 --scored
all` is what papers on quantization tabulate; `--window 0` takes the parts between empty lines one by one. The judge is that of
text_judge.py: standard errors and intervals by bootstrap over documents (transcripts), a GGUF as the checkpoint that it decodes
to, or with --server in llama-server, every position asked for. `answer` counts only the positions of the assistant's turn,
`confidence` tells positions apart by the reference's certainty.

Models of one call are judged against the same states of the reference. --pairs NAME keeps the sums of each document in
OUT/NAME.json, with what an earlier call left there on the same text, so that any two of its models are compared in pairs, in
the same samples of the bootstrap: those of --pair (default: each model with the first). Without --reference only perplexity
and routing are measured.
"""

from __future__ import annotations

import argparse
import shlex
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import torch
import torch.nn.functional as F

from console import UserError, progress, run_cli
from gguf_format import is_gguf
from hf_model import load_weights
from kl import divergence, summarize_kl
from pictures import Prompt, config_with_eyes, load_processor, render_messages
from recipe import recipe_record
from records import add_tag_arguments, data_entry, read_result, tagged_record, write_result
from runner import describe_checkpoint, item_record
from tasks_text import paired_kl
from tasks_tiny import TINY_VISION_TASKS, VISION_REVISION
from text_judge import open_judge

Metrics = dict[str, Any]


def held_out(processor: Any, count: int) -> tuple[list[tuple[Prompt, str]], dict[str, Any]]:
    """(prompt, assistant turn) of ``count`` test items of every task, and their record."""
    pairs, rows = [], []
    for task in (kind() for kind in TINY_VISION_TASKS):
        for item, solution in task.load_with_solutions(count):
            turn = solution.removeprefix("<think>\n") + processor.tokenizer.eos_token
            pairs.append((render_messages(processor, task.messages(item)), turn))
            rows.append([*item_record(task, item), turn])
    return pairs, data_entry("tiny vision tasks, held-out transcripts", VISION_REVISION, rows)


def load_with_eyes(path: Path) -> torch.nn.Module:
    from transformers import AutoModelForImageTextToText

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    return load_weights(AutoModelForImageTextToText, path, dtype).to(device).eval()


def inputs_of(processor: Any, pairs: list[tuple[Prompt, str]]) -> tuple[Any, torch.Tensor]:
    """(model inputs padded on the right, mask [N, T] of the tokens of the assistant's turn)."""
    pictures = [[picture.open() for picture in prompt.pictures] for prompt, _ in pairs]
    common = {"images": pictures, "padding": True, "add_special_tokens": False, "return_tensors": "pt"}
    whole = processor(text=[prompt.text + turn for prompt, turn in pairs], **common)
    heads = processor(text=[prompt.text for prompt, _ in pairs], **common)["attention_mask"].sum(1)
    places = torch.arange(whole["input_ids"].shape[1])
    return whole, (places >= heads[:, None]) & whole["attention_mask"].bool()


@torch.inference_mode()
def measure_pictures(
    model: torch.nn.Module, reference: torch.nn.Module, processor: Any, pairs: list[tuple[Prompt, str]], batch: int
) -> dict[str, Any]:
    """Metrics over all pairs; the last position of a row predicts nothing and is left out."""
    found: list[tuple[torch.Tensor, ...]] = []
    with progress(len(pairs), "kl", "picture") as bar:
        for start in range(0, len(pairs), batch):
            part = pairs[start : start + batch]
            inputs, answer = inputs_of(processor, part)
            kept, target = inputs["attention_mask"].bool()[:, 1:], inputs["input_ids"][:, 1:]
            inputs = inputs.to(model.device)
            own, expected = (m(**inputs, use_cache=False).logits[:, :-1].float().cpu()[kept] for m in (model, reference))
            loss = F.cross_entropy(own, target[kept], reduction="none").double()
            found.append((loss, *divergence(expected, own), answer[:, 1:][kept]))
            bar.update(len(part))
    loss, kl, agree, answer = (torch.cat(each).numpy() for each in zip(*found, strict=True))
    metrics: Metrics = {"pictures": len(pairs), "tokens": len(loss), "ppl": float(np.exp(loss.mean()))}
    metrics |= {"ppl_answer": float(np.exp(loss[answer].mean())), "kl": summarize_kl(kl.astype(np.float64), agree)}
    return metrics | {"kl_answer": summarize_kl(kl[answer].astype(np.float64), agree[answer])}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", type=Path, action="append", required=True, help="a checkpoint or GGUF; may be given again")
    parser.add_argument("--reference", type=Path, help="the BF16 model that KL is taken to")
    add_tag_arguments(parser, "kl", several=True)
    parser.add_argument(
        "--pair", action="append", default=[], metavar="TAG/BASE", help="two tags to compare; may be given again"
    )
    parser.add_argument("--pairs", metavar="NAME", help="keep the comparisons in OUT/NAME.json")
    parser.add_argument("--items", type=int, help="held-out transcripts of each tiny task (default 640), or pictures (64); of "
                        "--text: at most so many windows, or documents (default: all)")  # fmt: skip
    text = parser.add_mutually_exclusive_group()
    text.add_argument("--text", type=Path, help="measure on this text file instead")
    text.add_argument(
        "--pictures", action="store_true", help="measure on the tiny tasks with pictures instead; needs --reference"
    )
    parser.add_argument("--window", type=int, help="tokens of a window of --text (default 512); 0: one document at a time")
    parser.add_argument("--scored", choices=("half", "all"), help="of each window: its second half (default), or all")
    parser.add_argument("--server", metavar="OPTIONS", help="judge GGUFs in llama-server with these options (may be empty)")
    parser.add_argument("--batch", type=int, default=16, help="pictures at once (default 16)")
    return parser.parse_args()


def of_pictures(args: argparse.Namespace) -> tuple[Metrics, dict[str, Any]]:
    """(metrics, data entry) on pictures, by the whole model."""
    if not args.reference or len(args.model) > 1:
        raise UserError("--pictures: the KL of one --model is taken to a --reference")
    (model,) = args.model
    config, other = config_with_eyes(model), config_with_eyes(args.reference)
    if config["text_config"]["vocab_size"] != other["text_config"]["vocab_size"]:
        raise UserError(f"{model} and {args.reference} have different vocabularies: KL between them means nothing")
    processor = load_processor(args.reference)
    processor.tokenizer.padding_side = "right"
    pairs, entry = held_out(processor, args.items or 64)
    models = (load_with_eyes(model), load_with_eyes(args.reference))
    return measure_pictures(*models, processor, pairs, args.batch), entry


def metrics_of(made: Mapping[str, Any]) -> Metrics:
    """What a record of this kind says, of what the judge found."""
    whole, answer = dict(made["strata"]["all"]), dict(made["answer"] or {})
    metrics: Metrics = {"tokens": whole["positions"], **{key: whole.pop(key) for key in ("ppl", "ppl_error")}}
    metrics |= {"ppl_answer": answer.pop("ppl")} if answer else {}
    if "mean" in whole:
        metrics |= {"kl": whole} | ({"kl_answer": answer} if answer else {})
        metrics |= {"strata": {name: own for name, own in made["strata"].items() if name != "all"}}
        metrics |= {"confidence": made["confidence"]}
    return metrics | ({"routing": made["routing"]} if made.get("routing") else {})


def shown(metrics: Metrics) -> str:
    line = f"ppl {metrics['ppl']:.4f} on {metrics['tokens']:,} positions"
    if kl := metrics.get("kl"):
        line += f"  KL {kl['mean']:.5f} +- {kl['standard_error']:.5f}"
        line += f"  median {kl['median']:.6f}" if "median" in kl else ""
        line += f"  99 % {kl['p99']:.4f}  99.9 % {kl['p99_9']:.4f}  top-1 {100 * kl['top1']:.2f} %"
    return line


class Pairs:
    """The sums of KL of each document, of the models of this call and of earlier ones on the same text, and the comparisons."""

    def __init__(self, args: argparse.Namespace, facts: Mapping[str, Any], entry: dict[str, Any], reference: Mapping[str, Any]):
        self.facts, self.entry, self.reference, self.tag = facts, entry, reference, args.pairs
        self.file = args.out / f"{args.pairs}.json" if args.pairs else None
        self.sums: dict[str, Any] = {}
        self.wanted = [tuple(pair.split("/")) for pair in args.pair] or [(tag, args.tag[0]) for tag in args.tag[1:]]
        known = {*self._kept(), *args.tag}
        if unknown := [pair for pair in self.wanted if len(pair) != 2 or not known.issuperset(pair)]:
            raise UserError(f"--pair {'/'.join(unknown[0])}: give TAG/BASE, two of {', '.join(sorted(known))}")

    def _kept(self) -> dict[str, Any]:
        """Take over what is in the file; its sums."""
        if not self.file or not self.file.exists():
            return {}
        kept = read_result(self.file, "kl")
        if not {"pairs", "sums"} <= kept["metrics"].keys():
            raise UserError(f"{self.file}: holds no pairs but the record of a model; give another --pairs")
        for key, now in (("data", [self.entry]), ("reference", self.reference)):
            if kept.get(key) != now:
                raise UserError(f"{self.file}: its models were judged on another {key}; give another --pairs, or remove it")
        earlier = [(pair["other"], pair["base"]) for pair in kept["metrics"]["pairs"].values()]
        self.wanted = list(dict.fromkeys([*earlier, *self.wanted]))
        return kept["metrics"]["sums"]

    def add(self, tag: str, made: Mapping[str, Any]) -> None:
        self.sums[tag] = {"judge": made["judge"], "kl": " ".join(f"{value:.4g}" for value in made["kl_sums"])}

    def write(self, started: float) -> None:
        """Say each comparison of this call, and keep all where a record is wanted; another call may have written meanwhile."""
        if not self.file:
            return self._write(self.sums, started)
        with filelock.FileLock(self.file.with_name(f".{self.file.name}.lock")):
            self._write(self._kept() | self.sums, started)

    def _write(self, sums: Mapping[str, Any], started: float) -> None:
        made, found = {tag: {"kl_sums": list(map(float, own["kl"].split()))} for tag, own in sums.items()}, {}
        for other, base in self.wanted:
            own = paired_kl(self.facts, made[base], made[other])
            judges = " / ".join(dict.fromkeys(sums[name]["judge"] for name in (other, base)))
            found[f"{base}__{other}".replace(".", "_")] = {"base": base, "other": other, "judge": judges, **own}
            if own["ratio"] and {base, other} & self.sums.keys():
                print(
                    f"{other} / {base}: KL {own['ratio']:.3f} ({own['ratio_low']:.3f} to {own['ratio_high']:.3f})", flush=True
                )
        if self.file:
            text = {key: " ".join(map(str, values)) for key, values in self.facts.items()}
            write_result(
                self.file, kind="kl", tag=self.tag, started=started, model=self.reference, data=[self.entry],
                metrics={"pairs": found, "text": text, "sums": dict(sorted(sums.items()))}, extra={"reference": self.reference},
            )  # fmt: skip


def judge_texts(args: argparse.Namespace, files: Sequence[Path]) -> None:
    """A record of each model on text, and one of their comparisons."""
    started, reference = time.time(), args.reference or args.model[0]
    judge = open_judge(argparse.Namespace(**vars(args) | {"reference": reference, "positions": 0}), args.items)
    pairs = Pairs(args, judge.facts, judge.text.entry, judge.made["model"])
    server = None if args.server is None else shlex.split(args.server)
    for model, tag, file in zip(args.model, args.tag, files, strict=True):
        begun = time.time()
        made = judge.judged(model, server if is_gguf(model) else None) if args.reference else judge.made
        metrics = metrics_of(made)
        print(f"{tag}: {shown(metrics)}" if len(args.model) > 1 else shown(metrics), flush=True)
        write_result(
            file, kind="kl", tag=tag, started=started if model is args.model[0] else begun, model=made["model"],
            recipe=made.get("recipe"), data=[judge.text.entry], metrics=metrics,
            extra={"judge": made["judge"], "reference": judge.made["model"] if args.reference else None},
        )  # fmt: skip
        if args.reference:
            pairs.add(tag, made)
    if args.reference:
        pairs.write(started)


def main() -> None:
    args = parse_args()
    if min(args.items or 1, args.batch) < 1 or args.items == 0:
        raise UserError("--items and --batch must be at least 1")
    if len(args.tag) != len(args.model) or len(set(args.tag)) < len(args.tag):
        raise UserError(f"{len(args.model)} --model and {len(args.tag)} --tag: give each model a tag of its own")
    if (args.window is not None or args.scored) and not args.text or args.scored and args.window == 0:
        raise UserError("--window and --scored: of the windows of --text")
    if args.window is not None and args.window != 0 and args.window < 16:
        raise UserError(f"--window {args.window}: at least 16, or 0 for one document at a time")
    if args.text and args.text.is_dir():
        raise UserError(f"{args.text}: a directory; pipelines/judge_text.sh judges on a corpus")
    if (len(args.model) > 1 or args.pair or args.pairs) and not args.reference:
        raise UserError("several models, --pair and --pairs: models are compared by their KL to a --reference")
    files, started = [tagged_record(args, tag) for tag in args.tag], time.time()
    if not args.pictures:
        return judge_texts(args, files)
    described, other = (describe_checkpoint(path) if path else None for path in (args.model[0], args.reference))
    metrics, entry = of_pictures(args)
    print(shown(metrics), flush=True)
    write_result(
        files[0], kind="kl", tag=args.tag[0], started=started, model=described, recipe=recipe_record(args.model[0]),
        data=[entry], metrics=metrics, extra={"judge": "transformers", "reference": other},
    )  # fmt: skip


if __name__ == "__main__":
    run_cli(main)
