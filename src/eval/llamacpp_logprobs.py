"""What llama-perplexity says of every token: its file of log-probabilities, written and read, and the tool that fills one.

Not a command; gguf_kl and panel read GGUFs by it. The tool reads a text as if it held no special tokens, so that it is given a
temporary copy of the GGUF whose control tokens are marked as user-defined. Only the second half of each chunk is told.

The format (llama.cpp tools/perplexity/perplexity.cpp): "_logits_", uint32 context, int32 vocabulary, int32 chunks, int32
tokens [chunks, context]; then for each chunk and each position context/2 .. context-2 one row of uint16: float32 scale and
float32 minimum (4 uint16), then one q a token of the vocabulary (padded to an even number): log p = scale * q + minimum.
16 nats below the likeliest token all probabilities are one: q = 0.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from gguf import GGUFReader, TokenType

from console import UserError
from gguf_format import gguf_files
from llama_cpp import tool, watched
from llamacpp_eval8 import die_with_parent, thread_arguments

MAGIC = b"_logits_"
DEPTH = 16.0  # nats below the likeliest token that the format resolves


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


def as_evaluated(tokens: np.ndarray, bos: int | None) -> np.ndarray:
    """Chunks as llama-perplexity evaluates them."""
    if bos is None:
        return tokens
    tokens = tokens.copy()
    tokens[:, 0] = bos
    return tokens
