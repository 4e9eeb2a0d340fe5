"""What an engine is that continues prompts: how tokens are drawn, what comes back, and which engine a model gets.

Not a command. A backend yields (index, Completion) as sequences finish, so that a killed run loses little. The engines are
backend_hf, vllm_eval, llamacpp_eval8 and backend_openai: same prompts in, same kind of text out.
"""

from __future__ import annotations

import importlib.util
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from console import UserError
from hf_model import ids_sha256

PROMPT_ROOM = 1024  # vLLM's context beyond the budget (64k: 66,560)


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. temperature 0 is greedy; top_k 0 and top_p 1 switch those filters off."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    max_tokens: int = 32768

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Completion:
    """``finish_reason``: stop (end of turn) or length (ran out of tokens). ``tokens``: generated, end token included.
    ``prompt_ids_sha256``: :func:`ids_sha256` of the prompt as the engine got it, equal on every backend."""

    text: str
    tokens: int
    prompt_tokens: int
    finish_reason: str
    prompt_ids_sha256: str | None = None


class Backend(Protocol):
    name: str

    def render(self, messages: list[dict[str, str]]) -> str:
        """:func:`render_chat` of these turns."""

    def generate(self, prompts: Sequence[str], sampling: Sampling) -> Iterator[tuple[int, Completion]]:
        """Continue every prompt, in any order."""


def seed_of(prompt: str, seed: int) -> int:
    """The seed of one prompt: the same wherever it stands in a run, so that a resumed run draws the same tokens."""
    return zlib.crc32(f"{seed}:{prompt}".encode())


def completion_of(tokenizer: Any, new: Sequence[int], prompt: Sequence[int], ends: Sequence[int]) -> Completion:
    """What a backend returns for the ids that it generated after ``prompt``, cut at the first end token."""
    length = next((place for place, token in enumerate(new) if token in ends), len(new))
    finished = length < len(new)
    text = tokenizer.decode(list(new[:length]), skip_special_tokens=False)
    return Completion(text, length + finished, len(prompt), "stop" if finished else "length", ids_sha256(prompt))


def length_batches(ids: Sequence[Sequence[int]], size: int) -> list[list[int]]:
    """Indices of prompts in batches of like length, always the same ones."""
    order = sorted(range(len(ids)), key=lambda index: (len(ids[index]), index))
    return [order[start : start + size] for start in range(0, len(order), size)]


def choose_backend(name: str, model: str | Path = "") -> str:
    """'auto' is llamacpp for a GGUF file, vllm where a GPU and vLLM are, else hf; any other name must exist."""
    if name == "auto":
        if str(model).endswith(".gguf"):
            return "llamacpp"
        return "vllm" if torch.cuda.is_available() and importlib.util.find_spec("vllm") else "hf"
    if name == "vllm" and not importlib.util.find_spec("vllm"):
        raise UserError("--backend vllm: vLLM is not installed here; use --backend hf")
    if name not in ("hf", "vllm", "llamacpp", "openai"):
        raise UserError(f"--backend {name}: expected auto, vllm, hf, llamacpp or openai")
    return name
