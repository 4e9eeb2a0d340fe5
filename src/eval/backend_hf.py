"""Answers by transformers: any machine, batches of prompts of like length, a KV cache.

Not a command; `bash pipelines/eval.sh --backend hf` uses it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from backend import Completion, Sampling, completion_of, length_batches, seed_of
from console import UserError
from hf_model import end_token_ids, load_model, load_tokenizer, prompt_ids, render_chat


class HfBackend:
    """transformers with a KV cache, in batches of prompts of like length, padded on the left; float32 on a CPU. Several
    ``devices`` hold its layers between them."""

    name = "hf"

    def __init__(self, model: str | Path, batch: int = 64, devices: Sequence[torch.device] = ()) -> None:
        self.tokenizer = load_tokenizer(model)
        self.tokenizer.padding_side = "left"
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.ends = end_token_ids(model, self.tokenizer)
        self.model = load_model(model, devices)
        self.model.config.output_router_logits = False  # its loss fails with a KV cache
        self.batch = batch
        self.context = int(getattr(self.model.config.get_text_config(), "max_position_embeddings", 1 << 30))

    def render(self, messages: list[dict[str, str]]) -> str:
        return render_chat(self.tokenizer, messages)

    def generate(self, prompts: Sequence[str], sampling: Sampling) -> Iterator[tuple[int, Completion]]:
        ids = prompt_ids(self.tokenizer, prompts)
        for part in length_batches(ids, self.batch):
            seed = seed_of(prompts[part[0]], sampling.seed)
            yield from zip(part, self.complete([ids[index] for index in part], sampling, seed), strict=True)

    @torch.inference_mode()
    def complete(self, ids: list[list[int]], sampling: Sampling, seed: int) -> list[Completion]:
        """One batch of prompts."""
        width = max(map(len, ids))
        room = min(sampling.max_tokens, self.context - width)
        if room < 1:
            raise UserError(f"a prompt has {width} tokens; the model's context is {self.context}")
        padded = self.tokenizer.pad({"input_ids": ids}, return_tensors="pt").to(self.model.device)
        draw = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        if sampling.temperature > 0:
            torch.manual_seed(seed)
            draw = {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k}
        out = self.model.generate(
            **padded, max_new_tokens=room, eos_token_id=self.ends, pad_token_id=self.tokenizer.pad_token_id, **draw
        )
        rows = zip(out.tolist(), ids, strict=True)
        return [completion_of(self.tokenizer, row[width:], prompt, self.ends) for row, prompt in rows]
