"""KL divergence of a GGUF file to the BF16 model, by llama.cpp's own tool and by ours on the same tokens.

    python src/eval/gguf_kl.py --model F.gguf --reference models/razor-tiny --tag TAG [--text FILE] [--items 8] [--chunks N]
    python src/eval/gguf_kl.py --model F.gguf --reference BF16.gguf --text FILE --tag TAG

A reference directory runs in transformers: its log-probabilities are written in llama.cpp's format, llama-perplexity judges
the GGUF by them, and ours compares transformers' own logits with those that llama-server gives for the GGUF. A reference GGUF
is judged by llama-perplexity, and ours compares the log-probabilities that it writes for both files. llama-perplexity reads
a text without special tokens, so that the second way needs plain text.

The format (llama.cpp tools/perplexity/perplexity.cpp): "_logits_", uint32 context, int32 vocabulary, int32 chunks, int32
tokens [chunks, context]; then for each chunk and each position context/2 .. context-2 one row of uint16: float32 scale and
float32 minimum (4 uint16), then one q a token of the vocabulary (padded to an even number): log p = scale * q + minimum.
16 nats below the likeliest token all probabilities are one: q = 0.
"""

from __future__ import annotations

import argparse
import re
import shlex
import subprocess
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from backends import load_model, load_tokenizer
from console import UserError, progress, run_cli
from gguf_info import describe_gguf, is_gguf, metadata, open_gguf
from llamacpp_eval8 import LlamaServer, llama_tool, thread_arguments
from moe_eval import divergence, file_texts, summarize_kl, tiny_texts
from results_store import data_entry, describe_model, write_result

MAGIC = b"_logits_"
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
RUNNING = re.compile(r"^ *(\d+) +\S+ ± +\S+ +\S+ ± +\S+ +(\S+) ± +\S+ ", re.MULTILINE)


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


def run_tool(arguments: Sequence[object], batch: int) -> str:
    """llama-perplexity's output; it ends with 0 after most failures, so that callers look for what they need."""
    command = [llama_tool("llama-perplexity"), *map(str, arguments), "--batch-size", str(batch), *thread_arguments()]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace")
    if done.returncode:
        last = " | ".join((done.stdout + done.stderr).strip().splitlines()[-3:])
        raise UserError(f"llama-perplexity ended with {done.returncode}: {last}")
    return done.stdout + done.stderr


def dump_logprobs(model: Path, text: Path, out: Path, context: int, chunks: int, options: Sequence[str] = ()) -> LogProbs:
    """What llama.cpp itself predicts for a text file."""
    fixed = ["--model", model, "--file", text, "--ctx-size", context, "--kl-divergence-base", out]
    output = run_tool([*fixed, *(["--chunks", chunks] if chunks else []), *options], max(2048 // context, 1) * context)
    if not out.exists() or out.stat().st_size < 20:
        raise UserError(f"{model}: llama-perplexity wrote nothing: {' | '.join(output.strip().splitlines()[-3:])}")
    return read_logprobs(out)


def tool_kl(model: Path, base: Path, context: int, options: Sequence[str] = ()) -> tuple[dict[str, float], list[float]]:
    """(llama-perplexity's statistics of ``model`` against a file of log-probabilities, its mean after each chunk)."""
    fixed = ["--model", model, "--ctx-size", context, "--kl-divergence", "--kl-divergence-base", base]
    return parse_tool(run_tool([*fixed, *options], max(2048 // context, 1) * context))


def parse_tool(output: str) -> tuple[dict[str, float], list[float]]:
    """Numbers in nats; top1 as a fraction; NAME_error is the standard error that the tool prints."""
    found: dict[str, float] = {}
    for name, pattern in PRINTED.items():
        match = re.search(pattern, output)
        if not match:
            last = " | ".join(output.strip().splitlines()[-3:])
            raise UserError(f"llama-perplexity printed no {name} (it needs 100 positions): {last}")
        unit = 0.01 if name == "top1" else 1.0
        found[name] = float(match[1]) * unit
        if match.lastindex == 2:
            found[f"{name}_error"] = float(match[2]) * unit
    return found, [float(mean) for _, mean in RUNNING.findall(output)]


@torch.inference_mode()
def transformers_logits(model: torch.nn.Module, tokens: np.ndarray) -> Iterator[torch.Tensor]:
    """Logits [positions, V] of the scored positions of every chunk."""
    with progress(tokens.size, "reference", "token", True) as bar:
        for chunk in tokens:
            ids = torch.from_numpy(chunk.astype(np.int64))[None].to(model.device)
            yield model(input_ids=ids, use_cache=False).logits[0, first_scored(len(chunk)) : -1].float().cpu()
            bar.update(len(chunk))


def server_logprobs(server: LlamaServer, chunk: np.ndarray, vocabulary: int) -> torch.Tensor:
    """Log-probabilities [positions, V] that llama-server gives after each scored position: one request a position, of which
    the prompt cache leaves one token to compute."""
    first = first_scored(len(chunk))
    table = torch.full((len(chunk) - 1 - first, vocabulary), -torch.inf)
    fixed = {"n_predict": 1, "n_probs": vocabulary, "temperature": 0.0, "cache_prompt": True, "id_slot": 0}
    for row, position in zip(table, range(first, len(chunk) - 1), strict=True):
        answer = server.client.call("/completion", fixed | {"prompt": chunk[: position + 1].tolist()})
        likely = answer["completion_probabilities"][0]["top_logprobs"]
        row[torch.tensor([entry["id"] for entry in likely])] = torch.tensor([entry["logprob"] for entry in likely])
    return table


def ours(reference: Iterable[torch.Tensor], model: Iterable[torch.Tensor]) -> dict[str, Any]:
    """Our statistics over chunks of log-probabilities or logits [positions, V] of both."""
    pairs = [divergence(expected, got) for expected, got in zip(reference, model, strict=True)]
    return summarize_kl(torch.cat([kl for kl, _ in pairs]).double().numpy(), torch.cat([a for _, a in pairs]).numpy())


def chunked(ids: Sequence[int], context: int, limit: int, bos: int | None) -> np.ndarray:
    """Token ids cut into [chunks, context]; with ``bos`` each chunk starts with it in place of its first token, as in
    llama-perplexity for a vocabulary that asks for it."""
    count = min(len(ids) // context, limit or len(ids))
    if count * (context - 1 - first_scored(context)) < 100:
        raise UserError(
            f"{len(ids)} tokens make {count} chunks of {context}: too few for statistics; give more --items or --text"
        )
    tokens = np.array(ids[: count * context], dtype=np.int32).reshape(count, context)
    if bos is not None:
        tokens[:, 0] = bos
    return tokens


def against_directory(args: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Metrics with transformers as the reference."""
    tokenizer = load_tokenizer(args.reference)
    pairs, entry = file_texts(args.text, 1 << 30) if args.text else tiny_texts(tokenizer, args.items)
    ids = tokenizer("".join(prompt + turn for prompt, turn in pairs), add_special_tokens=False)["input_ids"]
    reader = open_gguf(args.model)
    bos = metadata(reader, "tokenizer.ggml.bos_token_id") if metadata(reader, "tokenizer.ggml.add_bos_token", False) else None
    tokens = chunked(ids, args.context, args.chunks, bos)
    model = load_model(args.reference)
    vocabulary, known = int(model.config.get_text_config().vocab_size), len(metadata(reader, "tokenizer.ggml.tokens"))
    if known != vocabulary:
        raise UserError(f"{args.model} has {known} tokens and {args.reference} {vocabulary}: KL between them means nothing")
    compared = min(len(tokens), args.ours or (len(tokens) if vocabulary <= 4096 else 1))
    kept: list[torch.Tensor] = []

    def remembered() -> Iterator[torch.Tensor]:
        for logits in transformers_logits(model, tokens):
            if len(kept) < compared:
                kept.append(logits)
            yield logits

    write_logprobs(work / "reference", tokens, vocabulary, remembered())
    del model
    options = shlex.split(args.tool_args)
    tool, running = tool_kl(args.model, work / "reference", args.context, options)
    with LlamaServer(args.model, args.context, 1, options) as server, progress(compared, "ours", "chunk") as bar:

        def measured() -> Iterator[torch.Tensor]:
            for chunk in tokens[:compared]:
                yield server_logprobs(server, chunk, vocabulary)
                bar.update()

        mine = ours(kept, measured())
    same = tool["mean"] if compared == len(tokens) else running[compared - 1]
    return {"tokens": int(tokens.size), "kl": mine, "tool": tool, "tool_mean_same_chunks": same, "data": entry}


def against_gguf(args: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Metrics with another GGUF as the reference, by llama-perplexity's own files."""
    if not args.text:
        raise UserError("--reference F.gguf needs --text FILE: llama-perplexity reads a text without special tokens")
    options = shlex.split(args.tool_args)
    reference, model = (
        dump_logprobs(path, args.text, work / name, args.context, args.chunks, options)
        for path, name in ((args.reference, "reference"), (args.model, "model"))
    )
    if reference.vocabulary != model.vocabulary or not np.array_equal(reference.tokens, model.tokens):
        raise UserError(f"{args.model} and {args.reference} read the text as different tokens: KL between them means nothing")
    tool, _ = tool_kl(args.model, work / "reference", args.context, options)
    count = range(len(reference.tokens))
    mine = ours((reference.chunk(i) for i in count), (model.chunk(i) for i in count))
    entry = data_entry(args.text.name, "file", [args.text.read_text(encoding="utf-8")])
    return {
        "tokens": int(reference.tokens.size),
        "kl": mine,
        "tool": tool,
        "tool_mean_same_chunks": tool["mean"],
        "data": entry,
    }


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", type=Path, required=True, help="the GGUF file")
    parser.add_argument("--reference", type=Path, required=True, help="directory of the BF16 model, or its GGUF")
    parser.add_argument("--tag", required=True)
    parser.add_argument("--text", type=Path, help="text file (default: held-out transcripts of the tiny tasks)")
    parser.add_argument("--items", type=int, default=8, help="transcripts of each tiny task (default 8)")
    parser.add_argument("--context", type=int, default=512, help="tokens of a chunk; its second half is scored")
    parser.add_argument("--chunks", type=int, default=0, help="at most so many chunks (default: all)")
    parser.add_argument(
        "--ours", type=int, default=0, help="chunks for our own measurement (default: all of a small vocabulary)"
    )
    parser.add_argument("--tool-args", default="", help='options for llama.cpp, as "-ngl 99 -fa off"')
    parser.add_argument("--out", type=Path, default=Path("results/kl"))
    parser.add_argument("--force", action="store_true", help="replace an earlier result of this tag")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    if args.context < 16 or args.items < 1 or min(args.chunks, args.ours) < 0:
        raise UserError("--context must be at least 16, --items at least 1, --chunks and --ours not negative")
    result = args.out / f"{args.tag}.json"
    if result.exists() and not args.force:
        raise UserError(f"{result}: exists; give another --tag, or --force to replace it")
    started = time.time()
    described = describe_gguf(args.model)
    gguf_reference = is_gguf(args.reference)
    reference = describe_gguf(args.reference) if gguf_reference else describe_model(args.reference)
    with tempfile.TemporaryDirectory(prefix="gguf-kl-") as work:
        metrics = (against_gguf if gguf_reference else against_directory)(args, Path(work))
    entry = metrics.pop("data")
    write_result(
        result, kind="kl", tag=args.tag, started=started, model=described, data=[entry], metrics=metrics,
        extra={"reference": reference, "context": args.context},
    )  # fmt: skip
    kl, tool = metrics["kl"], metrics["tool"]
    for name, k, error in (("llama.cpp", tool, tool["mean_error"]), ("ours", kl, kl["standard_error"])):
        shown = f"{k['mean']:.6f} +- {error:.6f}  99 % {k['p99']:.5f}  99.9 % {k['p99_9']:.5f}  max {k['max']:.5f}"
        print(f"{name:<10}KL {shown}  top-1 {100 * k['top1']:.2f} %")
    print(f"same chunks: llama.cpp {metrics['tool_mean_same_chunks']:.6f}, ours {kl['mean']:.6f}", flush=True)


if __name__ == "__main__":
    run_cli(main)
