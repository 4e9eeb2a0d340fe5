"""KL divergence of a GGUF file to the BF16 model, by llama.cpp's own tool and by ours on the same tokens.

    python src/eval/gguf_kl.py --model F.gguf --reference models/razor-tiny --tag TAG [--text FILE] [--items 8] [--chunks N]
    python src/eval/gguf_kl.py --model F.gguf --reference BF16.gguf --tokenizer models/razor-tiny --tag TAG

A reference directory runs in transformers and its log-probabilities are written in llama.cpp's format; a reference GGUF writes
them itself. llama-perplexity judges the GGUF by them. Ours takes the GGUF's own log-probabilities, as llama-perplexity writes
them, and transformers' logits. llama-perplexity reads a text as if it held no special tokens, which makes chat transcripts
foreign to the model (razor-tiny at Q4_K_M: KL 0.051 instead of 0.0013); it is therefore given a temporary copy of the file
whose control tokens are marked as user-defined. Only the second half of each chunk is scored; `moe_eval --server=` asks
llama-server for every position, and copies nothing.

The format (llama.cpp tools/perplexity/perplexity.cpp): "_logits_", uint32 context, int32 vocabulary, int32 chunks, int32
tokens [chunks, context]; then for each chunk and each position context/2 .. context-2 one row of uint16: float32 scale and
float32 minimum (4 uint16), then one q a token of the vocabulary (padded to an even number): log p = scale * q + minimum.
16 nats below the likeliest token all probabilities are one: q = 0.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFReader, TokenType

from console import UserError, progress, read_text, run_cli, scratch_folder
from gguf_format import bos_of, describe_gguf, gguf_files, is_gguf, metadata, open_gguf
from hf_model import finite_logits, load_model, load_tokenizer, prefix_ids, text_ids
from kl import summarize_kl, tiny_texts
from llama_cpp import Incomplete, asked, tool, watched
from llamacpp_eval8 import die_with_parent, thread_arguments
from records import add_tag_arguments, data_entry, describe_model, tagged_record, write_result

MAGIC = b"_logits_"
JUDGE = "llama-perplexity, second halves of windows of"
DEPTH = 16.0  # nats below the likeliest token that the format resolves
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


def first_scored(context: int) -> int:
    """The first position whose prediction counts: the second half of a chunk, which has context to predict from."""
    return context // 2


def encode_rows(logits: torch.Tensor) -> np.ndarray:
    """llama.cpp's rows for logits [N, V] -> uint16 [N, 4 + V rounded up to even]."""
    logits = logits.float().cpu()
    top = logits.amax(-1, keepdim=True)
    low = torch.maximum(logits.amin(-1, keepdim=True), top - DEPTH)
    scale = (top - low) / 65535
    q = ((logits - low) / scale.clamp_min(1e-30)).round_().clamp_(0, 65535)
    minimum = low - torch.logsumexp(logits, -1, keepdim=True)
    vocabulary = logits.shape[1]
    rows = np.zeros((len(logits), 4 + vocabulary + vocabulary % 2), dtype=np.uint16)
    rows[:, :4] = torch.cat([scale, minimum], -1).numpy().view(np.uint16)
    rows[:, 4 : 4 + vocabulary] = q.numpy().astype(np.uint16)
    return rows


def decode_rows(rows: np.ndarray, vocabulary: int) -> torch.Tensor:
    """Log-probabilities [N, V] of llama.cpp's rows."""
    scale, minimum = torch.from_numpy(np.ascontiguousarray(rows[:, :4]).view(np.float32)).split(1, -1)
    return torch.from_numpy(rows[:, 4 : 4 + vocabulary].astype(np.float32)) * scale + minimum


@dataclass(frozen=True)
class LogProbs:
    """A file of log-probabilities: ``tokens`` int32 [chunks, context], ``rows`` uint16 [chunks, positions, 4 + V]."""

    tokens: np.ndarray
    vocabulary: int
    rows: np.ndarray

    def chunk(self, index: int) -> torch.Tensor:
        return decode_rows(self.rows[index], self.vocabulary)


def write_logprobs(path: Path, tokens: np.ndarray, vocabulary: int, chunks: Iterable[torch.Tensor]) -> None:
    """Write logits [positions, V] of every chunk of ``tokens`` [chunks, context] in llama.cpp's format."""
    with path.open("wb") as stream:
        stream.write(MAGIC + np.array([tokens.shape[1], vocabulary, len(tokens)], dtype="<i4").tobytes())
        stream.write(tokens.astype("<i4").tobytes())
        for logits in chunks:
            stream.write(encode_rows(logits).tobytes())


def read_logprobs(path: Path) -> LogProbs:
    """Map a file of log-probabilities; one that is cut short or another format is a :class:`UserError`."""
    with path.open("rb") as stream:
        head = stream.read(20)
    if len(head) < 20 or head[:8] != MAGIC:
        raise UserError(f"{path}: not a file of llama-perplexity's log-probabilities")
    context, vocabulary, count = map(int, np.frombuffer(head[8:], dtype="<i4"))
    positions, width = context - 1 - first_scored(context), 4 + vocabulary + vocabulary % 2
    start = 20 + 4 * count * context
    if path.stat().st_size != start + 2 * count * positions * width:
        raise UserError(f"{path}: {path.stat().st_size:,} bytes do not hold {count} chunks of {context} tokens; write it again")
    tokens = np.fromfile(path, dtype="<i4", count=count * context, offset=20).reshape(count, context)
    rows = np.memmap(path, dtype="<u2", mode="r", offset=start, shape=(count, positions, width))
    return LogProbs(tokens, vocabulary, rows)


def run_tool(context: int, *arguments: object) -> str:
    """llama-perplexity's output; it ends with 0 after most failures, so that callers look for what they need."""
    sizes = ["--ctx-size", str(context), "--batch-size", str(max(2048 // context, 1) * context)]
    command = [tool("llama-perplexity"), *map(str, arguments), *sizes, *thread_arguments()]
    code, output = watched(command, "llama-perplexity", "chunk", preexec_fn=die_with_parent(os.getpid()))
    if code:
        raise UserError(f"llama-perplexity ended with {code}: {last_lines(output)}")
    return output


def last_lines(output: str) -> str:
    return " | ".join(output.strip().splitlines()[-3:])


def dump_logprobs(model: Path, text: Path, out: Path, context: int, chunks: int, options: Sequence[str] = ()) -> LogProbs:
    """What llama.cpp itself predicts for a text file."""
    limit = ["--chunks", chunks] if chunks else []
    output = run_tool(context, "--model", model, "--file", text, "--kl-divergence-base", out, *limit, *options)
    if not out.exists() or out.stat().st_size < 20:
        raise UserError(f"{model}: llama-perplexity wrote nothing: {last_lines(output)}")
    return read_logprobs(out)


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


def with_parsed_control_tokens(model: Path, folder: Path) -> tuple[Path, dict[str, str]]:
    """Copy a GGUF, all of its parts, with its control tokens as user-defined ones, which llama.cpp finds in any text; return
    (the copy, their new names).

    They get names in the other case, as <|IM_END|>: llama.cpp takes <|im_end|> and its like for control tokens in any case.
    """
    folder.mkdir()
    for file in gguf_files(model):
        shutil.copyfile(file, folder / file.name)
    reader = GGUFReader(folder / model.name, "r+")
    types, texts = (reader.get_field(f"tokenizer.ggml.{name}") for name in ("token_type", "tokens"))
    names = {}
    for type_index, text_index in zip(types.data, texts.data, strict=True):
        if types.parts[type_index][0] == TokenType.CONTROL:
            name = bytes(texts.parts[text_index])
            types.parts[type_index][0] = TokenType.USER_DEFINED
            texts.parts[text_index][:] = np.frombuffer(name.swapcase(), dtype=np.uint8)
            names[name.decode("utf-8")] = name.swapcase().decode("utf-8")
    return folder / model.name, names


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
        kls.append(torch.where(p > -DEPTH, p.exp() * (p - q), 0.0).sum(-1))
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


def as_evaluated(tokens: np.ndarray, bos: int | None) -> np.ndarray:
    """Chunks as llama-perplexity evaluates them."""
    if bos is None:
        return tokens
    tokens = tokens.copy()
    tokens[:, 0] = bos
    return tokens


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
