"""KL divergence of a GGUF file to the BF16 model, by llama.cpp's own tool and by ours on the same tokens.

    python src/eval/gguf_kl.py --model F.gguf --reference models/razor-tiny --tag TAG [--text FILE] [--items 8] [--chunks N]
    python src/eval/gguf_kl.py --model F.gguf --reference BF16.gguf --tokenizer models/razor-tiny --tag TAG

A reference directory runs in transformers and its log-probabilities are written in llama.cpp's format; a reference GGUF writes
them itself. llama-perplexity judges the GGUF by them. Ours takes the GGUF's own log-probabilities, as llama-perplexity writes
them, and transformers' logits. llama-perplexity reads a text as if it held no special tokens, which makes chat transcripts
foreign to the model (razor-tiny at Q4_K_M: KL 0.051 instead of 0.0013); it is therefore given a temporary copy of the file
whose control tokens are marked as user-defined. Only the second half of each chunk is scored; `moe_eval --server=` asks
llama-server for every position, and copies nothing.
"""

from __future__ import annotations

import argparse
import re
import shlex
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from console import UserError, progress, read_text, run_cli, scratch_folder
from gguf_format import bos_of, describe_gguf, is_gguf, metadata, open_gguf
from hf_model import finite_logits, load_model, load_tokenizer, prefix_ids, text_ids
from kl import log_divergence, summarize_kl, tiny_texts
from llama_cpp import Incomplete, asked
from llamacpp_logprobs import (
    DEPTH,
    LogProbs,
    as_evaluated,
    dump_logprobs,
    first_scored,
    last_lines,
    run_tool,
    with_parsed_control_tokens,
    write_logprobs,
)
from records import add_tag_arguments, data_entry, describe_model, tagged_record, write_result

JUDGE = "llama-perplexity, second halves of windows of"
PRINTED = {
    "mean": r"Mean\s+KLD:\s+(\S+) ± +(\S+)",
    "max": r"Maximum KLD:\s+(\S+)",
    "p99_9": r"99\.9%\s+KLD:\s+(\S+)",
    "p99": r"99\.0%\s+KLD:\s+(\S+)",
    "median": r"Median\s+KLD:\s+(\S+)",
    "ppl": r"Mean PPL\(Q\)\s+:\s+(\S+) ± +(\S+)",
    "ppl_reference": r"Mean PPL\(base\)\s+:\s+(\S+) ± +(\S+)",
    "top1": r"Same top p:\s+(\S+) ± +(\S+) %",
}


def tool_kl(model: Path, base: Path, context: int, options: Sequence[str] = ()) -> dict[str, float]:
    """llama-perplexity's statistics of ``model`` against a file of log-probabilities."""
    fixed = ["--model", model, "--kl-divergence", "--kl-divergence-base", base]
    return asked(lambda: parse_tool(run_tool(context, *fixed, *options)))


def parse_tool(output: str) -> dict[str, float]:
    """Numbers in nats; top1 as a fraction; NAME_error is the standard error that the tool prints."""
    found: dict[str, float] = {}
    for name, pattern in PRINTED.items():
        match = re.search(pattern, output)
        if not match:
            raise Incomplete(f"llama-perplexity printed no {name} (it needs 100 positions): {last_lines(output)}")
        unit = 0.01 if name == "top1" else 1.0
        found[name] = float(match[1]) * unit
        if match.lastindex == 2:
            found[f"{name}_error"] = float(match[2]) * unit
    return found


@torch.inference_mode()
def transformers_logits(model: torch.nn.Module, tokens: np.ndarray) -> Iterator[torch.Tensor]:
    """Logits [positions, V] of the scored positions of every chunk."""
    with progress(tokens.size, "reference", "token", True) as bar:
        for chunk in tokens:
            ids = torch.from_numpy(chunk.astype(np.int64))[None].to(model.device)
            yield finite_logits(model, input_ids=ids)[0, first_scored(len(chunk)) : -1].float().cpu()
            bar.update(len(chunk))


def ours(reference: Iterable[torch.Tensor], model: Iterable[torch.Tensor]) -> dict[str, Any]:
    """Our statistics over chunks of log-probabilities [positions, V] of both, in double precision.

    Not normalised again: a file's floor 16 nats down would add its mass (832 tokens: 7.5e-5 nats to every KL). As in
    llama-perplexity, tokens below e^-16 in the reference count nothing.
    """
    kls, agrees = [], []
    for number, (expected, got) in enumerate(zip(reference, model, strict=True)):
        if not bool(torch.isfinite(got).all()):
            raise UserError(
                f"chunk {number}: the GGUF's predictions are NaN or infinite: a tensor of the file overflows or is damaged"
            )
        p, q = expected.double(), got.double()
        kls.append(log_divergence(p, q, DEPTH))
        agrees.append(p.argmax(-1) == q.argmax(-1))
    return summarize_kl(torch.cat(kls).numpy(), torch.cat(agrees).numpy())


def chunked(ids: Sequence[int], context: int, limit: int) -> np.ndarray:
    """Token ids cut into [chunks, context]."""
    count = min(len(ids) // context, limit or len(ids))
    if count * (context - 1 - first_scored(context)) < 100:
        raise UserError(
            f"{len(ids)} tokens make {count} chunks of {context}: too few for statistics; give more --items or --text"
        )
    return np.array(ids[: count * context], dtype=np.int32).reshape(count, context)


def text_of(args: argparse.Namespace, tokenizer: Path | None) -> tuple[str, dict[str, Any]]:
    """The text to measure on and its record."""
    if args.text:
        text = read_text(args.text)
        return text, data_entry(args.text.name, "file", [text])
    if not tokenizer:
        raise UserError("give --text FILE, or --tokenizer DIR for transcripts of the tiny tasks")
    pairs, entry = tiny_texts(load_tokenizer(tokenizer), args.items)
    return "".join(prompt + turn for prompt, turn in pairs), entry


def own_logprobs(args: argparse.Namespace, model: Path, text: str, work: Path, name: str) -> LogProbs:
    """What llama.cpp predicts for the text, special tokens included."""
    model, names = with_parsed_control_tokens(model, work / f"{name}.gguf")
    for old, new in names.items():
        text = text.replace(old, new)
    (work / "text").write_text(text, encoding="utf-8")
    return dump_logprobs(model, work / "text", work / name, args.context, args.chunks, shlex.split(args.tool_args))


def token_chunks(args: argparse.Namespace, tokenizer: Path, text: str) -> np.ndarray:
    """The text as [chunks, context] by the checkpoint's own tokenizer."""
    own = load_tokenizer(tokenizer, chat=False)
    bos, prefix, ids = bos_of(args.model), prefix_ids(own), text_ids(own, text)
    if prefix != ([] if bos is None else [bos]):
        begun = "no token" if bos is None else f"token {bos}"
        print(f"{args.model}: llama.cpp puts {begun} before a text, the tokenizer of {tokenizer} {prefix}; "
              "both models are judged on what llama.cpp reads", file=sys.stderr, flush=True)  # fmt: skip
    return chunked(ids if bos is None else [bos, *ids], args.context, args.chunks)


def check_same_tokens(model: Path, found: np.ndarray, expected: np.ndarray) -> None:
    if not np.array_equal(found, expected):
        raise UserError(f"{model} reads the text as other tokens than the checkpoint's tokenizer does")


def reference_logits(args: argparse.Namespace, tokens: np.ndarray, out: Path) -> list[torch.Tensor]:
    """Write transformers' log-probabilities of all chunks, and return them."""
    model = load_model(args.reference)
    vocabulary = int(model.config.get_text_config().vocab_size)
    known = len(metadata(open_gguf(args.model), "tokenizer.ggml.tokens"))
    if known != vocabulary:
        raise UserError(f"{args.model} has {known} tokens and {args.reference} {vocabulary}: KL between them means nothing")
    kept: list[torch.Tensor] = []

    def remembered() -> Iterator[torch.Tensor]:
        for logits in transformers_logits(model, as_evaluated(tokens, bos_of(args.model))):
            kept.append(logits.log_softmax(-1))
            yield logits

    write_logprobs(out, tokens, vocabulary, remembered())
    return kept


def against_directory(args: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Metrics with transformers as the reference."""
    text, entry = text_of(args, args.reference)
    tokens = token_chunks(args, args.reference, text)
    kept = reference_logits(args, tokens, work / "reference")
    tool = tool_kl(args.model, work / "reference", args.context, shlex.split(args.tool_args))
    own = own_logprobs(args, args.model, text, work, "model")
    check_same_tokens(args.model, own.tokens, tokens)
    return {"tokens": int(tokens.size), "kl": ours(kept, map(own.chunk, range(len(tokens)))), "tool": tool, "data": entry}


def against_gguf(args: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Metrics with another GGUF as the reference, by llama-perplexity's own files."""
    text, entry = text_of(args, args.tokenizer)
    reference = own_logprobs(args, args.reference, text, work, "reference")
    model = own_logprobs(args, args.model, text, work, "model")
    if reference.vocabulary != model.vocabulary or not np.array_equal(reference.tokens, model.tokens):
        raise UserError(f"{args.model} and {args.reference} read the text as different tokens: KL between them means nothing")
    if args.tokenizer:
        check_same_tokens(args.model, model.tokens, token_chunks(args, args.tokenizer, text))
    tool = tool_kl(args.model, work / "reference", args.context, shlex.split(args.tool_args))
    count = range(len(reference.tokens))
    mine, size = ours(map(reference.chunk, count), map(model.chunk, count)), int(reference.tokens.size)
    return {"tokens": size, "kl": mine, "tool": tool, "data": entry}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", type=Path, required=True, help="the GGUF file")
    parser.add_argument("--reference", type=Path, required=True, help="directory of the BF16 model, or its GGUF")
    add_tag_arguments(parser, "kl")
    parser.add_argument("--text", type=Path, help="text file (default: held-out transcripts of the tiny tasks)")
    parser.add_argument("--items", type=int, default=8, help="transcripts of each tiny task (default 8)")
    parser.add_argument("--context", type=int, default=512, help="tokens of a chunk; its second half is scored")
    parser.add_argument("--chunks", type=int, default=0, help="at most so many chunks (default: all)")
    parser.add_argument("--tokenizer", type=Path, help="directory whose chat template makes the transcripts (reference GGUF)")
    parser.add_argument("--tool-args", default="", help='options for llama.cpp, as "-ngl 99 -fa off"')
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    if args.context < 16 or args.items < 1 or args.chunks < 0:
        raise UserError("--context must be at least 16, --items at least 1, --chunks not negative")
    result = tagged_record(args)
    started = time.time()
    described = describe_gguf(args.model)
    gguf_reference = is_gguf(args.reference)
    reference = describe_gguf(args.reference) if gguf_reference else describe_model(args.reference)
    with scratch_folder() as work:  # a vocabulary of 250,000 takes 130 MB a chunk of 512 tokens
        metrics = (against_gguf if gguf_reference else against_directory)(args, work)
    entry = metrics.pop("data")
    write_result(
        result, kind="kl", tag=args.tag, started=started, model=described, data=[entry], metrics=metrics,
        extra={"reference": reference, "context": args.context, "judge": f"{JUDGE} {args.context}"},
    )  # fmt: skip
    kl, tool = metrics["kl"], metrics["tool"]
    for name, k, error in (("llama.cpp", tool, tool["mean_error"]), ("ours", kl, kl["standard_error"])):
        shown = f"{k['mean']:.6f} +- {error:.6f}  99 % {k['p99']:.5f}  99.9 % {k['p99_9']:.5f}  max {k['max']:.5f}"
        print(f"{name:<10}KL {shown}  top-1 {100 * k['top1']:.2f} %")


if __name__ == "__main__":
    run_cli(main)
