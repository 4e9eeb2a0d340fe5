"""Evaluate a model behind any server with OpenAI's /v1/completions (vLLM, SGLang, llama-server):

    bash pipelines/eval.sh --backend openai --base-url http://localhost:8000/v1 --model NAME --tokenizer DIR --tag TAG

Not a command by itself. The chat template is ours, so that the prompt is the same on all backends; token ids are sent, or the
rendered text with --prompt-text, and the server's count of prompt tokens must be ours (no second BOS).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from backend import Completion, Sampling, seed_of
from console import UserError
from hf_model import ids_sha256, load_tokenizer, render_chat
from http_client import Client, in_parallel


def api_key(name: str | None) -> str | None:
    """The key in the environment variable ``name``: a key on a command line would be seen by everybody."""
    if not name:
        return None
    if not os.environ.get(name):
        raise UserError(f"--api-key-env {name}: that environment variable is not set")
    return os.environ[name]


class OpenAIBackend:
    """``plain`` leaves out the fields that OpenAI's own API does not know; then its defaults for top-k and min-p hold, and
    special tokens such as </think> may be missing from the text."""

    name = "openai"

    def __init__(
        self, base_url: str, model: str, tokenizer: str | Path, context: int, *, key: str | None = None, parallel: int = 4,
        send_text: bool = False, plain: bool = False,
    ) -> None:  # fmt: skip
        self.tokenizer = load_tokenizer(tokenizer)
        self.client = Client(base_url, key)
        self.model, self.parallel, self.context = model, parallel, context
        self.send_text, self.plain = send_text, plain

    def render(self, messages: list[dict[str, str]]) -> str:
        return render_chat(self.tokenizer, messages)

    def generate(self, prompts: Sequence[str], sampling: Sampling) -> Iterator[tuple[int, Completion]]:
        return in_parallel(lambda index: self._complete(prompts[index], sampling), len(prompts), self.parallel)

    def _fields(self, prompt: str, ids: list[int], sampling: Sampling) -> dict[str, Any]:
        room = min(sampling.max_tokens, self.context - len(ids))
        if room < 1:
            raise UserError(f"a prompt has {len(ids)} tokens; the context is {self.context}")
        fields = {
            "model": self.model, "prompt": prompt if self.send_text else ids, "max_tokens": room,
            "temperature": sampling.temperature, "top_p": sampling.top_p, "seed": seed_of(prompt, sampling.seed) & 0x7FFFFFFF,
        }  # fmt: skip
        return fields if self.plain else fields | {"top_k": sampling.top_k, "min_p": 0.0, "skip_special_tokens": False}

    def _complete(self, prompt: str, sampling: Sampling) -> Completion:
        ids = self.tokenizer(prompt, add_special_tokens=False)["input_ids"]
        answer = self.client.call("/completions", self._fields(prompt, ids, sampling))
        try:
            choice, usage = answer["choices"][0], answer["usage"]
            text, reason = choice["text"], choice["finish_reason"]
            counted, generated = int(usage["prompt_tokens"]), int(usage["completion_tokens"])
        except (KeyError, IndexError, TypeError) as error:
            raise UserError(f"{self.client.base_url}: the answer of /completions lacks {error}") from None
        if counted != len(ids):
            raise UserError(
                f"{self.client.base_url}: the server read {counted} prompt tokens where the tokenizer has {len(ids)}; "
                f"{'send ids, without --prompt-text' if self.send_text else 'give the tokenizer of its model'}"
            )
        if reason not in ("stop", "length"):
            raise UserError(f"{self.client.base_url}: finish_reason {reason!r}; expected stop or length")
        text = text.removesuffix(self.tokenizer.eos_token or "")
        return Completion(text, generated, len(ids), reason, ids_sha256(ids))
