"""Engines that continue prompts: transformers (any machine) and vLLM (GPU). Same prompts in, same kind of text out.

Not a command. A backend yields (index, Completion) as sequences finish, so that a killed run loses little.
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
    """``finish_reason``: stop (end of turn) or length (ran out of tokens). ``tokens``: generated, end token included."""

    text: str
    tokens: int
    prompt_tokens: int
    finish_reason: str


class Backend(Protocol):
    name: str

    def render(self, messages: list[dict[str, str]]) -> str:
        """:func:`render_chat` of these turns."""

    def generate(self, prompts: Sequence[str], sampling: Sampling) -> Iterator[tuple[int, Completion]]:
        """Continue every prompt, in any order."""


def seed_of(prompt: str, seed: int) -> int:
    """The seed of one prompt: the same wherever it stands in a run, so that a resumed run draws the same tokens."""
    return zlib.crc32(f"{seed}:{prompt}".encode())


def load_tokenizer(model: str | Path) -> Any:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(model), local_files_only=True)
    if not tokenizer.chat_template:
        raise UserError(f"{model}: the tokenizer has no chat template")
    return tokenizer


def load_model(path: str | Path) -> torch.nn.Module:
    """A causal language model for inference: bfloat16 on a GPU, float32 on a CPU."""
    from transformers import AutoModelForCausalLM

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    return AutoModelForCausalLM.from_pretrained(str(path), dtype=dtype, local_files_only=True).to(device).eval()


def render_chat(tokenizer: Any, messages: list[dict[str, str]]) -> str:
    """The prompt text of chat turns with the generation prompt, by the model's own template."""
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


class HfBackend:
    """transformers with a KV cache, in batches of prompts of like length, padded on the left; float32 on a CPU."""

    name = "hf"

    def __init__(self, model: str | Path, batch: int = 64) -> None:
        self.tokenizer = load_tokenizer(model)
        self.tokenizer.padding_side = "left"
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.model = load_model(model)
        self.model.config.output_router_logits = False  # its loss fails with a KV cache
        self.batch = batch
        self.context = int(getattr(self.model.config.get_text_config(), "max_position_embeddings", 1 << 30))

    def render(self, messages: list[dict[str, str]]) -> str:
        return render_chat(self.tokenizer, messages)

    def generate(self, prompts: Sequence[str], sampling: Sampling) -> Iterator[tuple[int, Completion]]:
        ids = self.tokenizer(list(prompts), add_special_tokens=False)["input_ids"]
        order = sorted(range(len(ids)), key=lambda index: (len(ids[index]), index))
        for start in range(0, len(order), self.batch):
            part = order[start : start + self.batch]
            seed = seed_of(prompts[part[0]], sampling.seed)
            yield from zip(part, self._batch([ids[index] for index in part], sampling, seed), strict=True)

    @torch.inference_mode()
    def _batch(self, ids: list[list[int]], sampling: Sampling, seed: int) -> list[Completion]:
        width = max(map(len, ids))
        room = min(sampling.max_tokens, self.context - width)
        if room < 1:
            raise UserError(f"a prompt has {width} tokens; the model's context is {self.context}")
        padded = self.tokenizer.pad({"input_ids": ids}, return_tensors="pt").to(self.model.device)
        draw = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        if sampling.temperature > 0:
            torch.manual_seed(seed)
            draw = {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k}
        end = self.tokenizer.eos_token_id
        out = self.model.generate(
            **padded, max_new_tokens=room, eos_token_id=end, pad_token_id=self.tokenizer.pad_token_id, **draw
        )
        return [self._completion(row[width:].tolist(), len(prompt), end) for row, prompt in zip(out, ids, strict=True)]

    def _completion(self, new: list[int], prompt_tokens: int, end: int) -> Completion:
        finished = end in new
        length = new.index(end) if finished else len(new)
        text = self.tokenizer.decode(new[:length], skip_special_tokens=False)
        return Completion(text, length + finished, prompt_tokens, "stop" if finished else "length")


class VllmBackend:
    """vLLM's offline engine. Memory and length settings follow docs/EVAL_PROTOCOL (64k: gpu-mem 0.88, 32 sequences)."""

    name = "vllm"

    def __init__(self, model: str | Path, max_model_len: int, max_num_seqs: int = 32, gpu_memory: float = 0.88) -> None:
        from vllm import LLM

        self.tokenizer = load_tokenizer(model)
        eager = "gemma" in str(getattr(self.tokenizer, "name_or_path", model)).lower()
        self.engine = LLM(
            model=str(model), max_model_len=max_model_len, max_num_seqs=max_num_seqs,
            gpu_memory_utilization=gpu_memory, enforce_eager=eager, limit_mm_per_prompt={"image": 0, "video": 0},
        )  # fmt: skip

    def render(self, messages: list[dict[str, str]]) -> str:
        return render_chat(self.tokenizer, messages)

    def generate(self, prompts: Sequence[str], sampling: Sampling) -> Iterator[tuple[int, Completion]]:
        from vllm import SamplingParams

        for start in range(0, len(prompts), 256):  # so that finished samples reach the log while the rest runs
            part = list(prompts[start : start + 256])
            params = [
                SamplingParams(
                    temperature=sampling.temperature, top_p=sampling.top_p, top_k=sampling.top_k or -1,
                    seed=seed_of(prompt, sampling.seed), max_tokens=sampling.max_tokens, skip_special_tokens=False,
                )
                for prompt in part
            ]  # fmt: skip
            for offset, request in enumerate(self.engine.generate(part, params)):
                best = request.outputs[0]
                text = best.text.removesuffix(self.tokenizer.eos_token or "")
                reason = "length" if best.finish_reason == "length" else "stop"
                yield start + offset, Completion(text, len(best.token_ids), len(request.prompt_token_ids), reason)


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
