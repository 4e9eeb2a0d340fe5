"""Answers by vLLM's offline engine, on one GPU or several: the settings that all its engines here have in common.

Not a command; `bash pipelines/eval.sh --backend vllm [--tensor-parallel N]` uses it (docs/EVAL_PROTOCOL.md).
"""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from backend import PROMPT_ROOM, Backend, Completion, Sampling, completion_of, say_not_applied, seed_of, stuck
from console import UserError, read_json
from families import text_config
from hf_model import end_token_ids, load_tokenizer, prompt_ids, render_chat
from pictures import Prompt, load_processor, render_messages

IMAGE_ROOM = 16_384  # context beyond budget and text, for the tokens of the images of one prompt
LOOK = "look"  # the name of a request that asks for the log-probability of one more token
ENGINE_ENVIRONMENT = {  # vLLM: no plugin that happens to be installed, no report home, no look-up of what is on disk
    "VLLM_PLUGINS": "",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "2",  # GiB, read by the CPU engine only
}


def set_engine_environment() -> None:
    """What vLLM reads when it is imported, where it is not set."""
    for key, value in ENGINE_ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    if not importlib.util.find_spec("flashinfer"):  # vLLM 0.22 takes its kernels on a Hopper card without asking for them
        os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")


def vllm_engine(model: str | Path, context: int, tensor_parallel: int, **options: Any) -> tuple[Any, int]:
    """(vLLM's offline engine on ``tensor_parallel`` GPUs, its context), with what all engines here have in common
    (docs/EVAL_PROTOCOL.md). The context is the model's own where that is shorter."""
    set_engine_environment()
    from vllm import LLM

    if not importlib.util.find_spec("flashinfer"):  # nor its kernel of a prompt's Gated DeltaNet
        options["additional_config"] = {"gdn_prefill_backend": "triton"}

    text = text_config(read_json(Path(model) / "config.json"))
    context = min(context, int(text.get("max_position_embeddings", context)))
    eager = str(text.get("model_type")).startswith("gemma") or not torch.cuda.is_available()  # a CPU only loses time
    options = {"enforce_eager": eager, "gpu_memory_utilization": 0.88} | options
    engine = LLM(
        model=str(model), max_model_len=context, tensor_parallel_size=tensor_parallel, generation_config="vllm",
        trust_remote_code=False, **options,
    )  # fmt: skip
    return engine, context


def sampling_params(sampling: Sampling, seed: int, max_tokens: int, ends: Sequence[int], **more: Any) -> Any:
    from vllm import SamplingParams

    return SamplingParams(
        temperature=sampling.temperature, top_p=sampling.top_p, top_k=sampling.top_k or -1, seed=seed, max_tokens=max_tokens,
        stop_token_ids=ends, detokenize=False, **more,
    )  # fmt: skip


def check_finite(output: Any, model: str | Path) -> None:
    """Raise :class:`UserError` when the log-probability of a token is no number: vLLM goes on with NaN logits in silence."""
    if not all(math.isfinite(entry.logprob) for row in output.logprobs for entry in row.values()):
        raise UserError(f"{model}: vLLM's logits are NaN or infinite; --backend hf names the layer and tensor where it began")


def prompt_logprobs(
    model: str | Path, rows: Sequence[Sequence[int]], top: int, tensor_parallel: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """What vLLM says of every token of ``rows`` but the first of each: :func:`top_rows`."""
    longest = max(map(len, rows))
    engine, context = vllm_engine(model, longest + 1, tensor_parallel, max_logprobs=top)
    if context <= longest:
        raise UserError(f"{model}: reads {context:,} positions, one of the rows has {longest:,}")
    params = sampling_params(Sampling(), 0, 1, [], prompt_logprobs=top)
    for start in range(0, len(rows), 16):  # its answers are objects for every token
        for request in engine.generate([{"prompt_token_ids": list(row)} for row in rows[start : start + 16]], params):
            yield top_rows(request.prompt_logprobs, model)


def top_rows(told: Sequence[Any], model: str | Path) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids, log-probabilities) [T - 1, K] of vLLM's answer for a prompt of T tokens: None for the first, then by id the
    likeliest and the token itself; -1 and -inf fill up."""
    rows = [[(token, entry.logprob) for token, entry in row.items()] for row in told[1:]]
    if not all(math.isfinite(value) for row in rows for _, value in row):
        raise UserError(f"{model}: vLLM's logits are NaN or infinite; --backend hf names the layer and tensor where it began")
    widest = max(map(len, rows))
    filled = [row + [(-1, -math.inf)] * (widest - len(row)) for row in rows]
    return tuple(torch.tensor([[pair[part] for pair in row] for row in filled]) for part in (0, 1))


class VllmBackend(Backend):
    """vLLM's offline engine. Memory and length settings follow docs/EVAL_PROTOCOL (64k: gpu-mem 0.88, 32 sequences).
    ``options``: more arguments of vLLM's LLM."""

    name = "vllm"
    ignore_ends = False

    def __init__(
        self, model: str | Path, max_model_len: int, max_num_seqs: int = 32, tensor_parallel: int = 1, **options: Any
    ) -> None:
        self.tokenizer, self.model = load_tokenizer(model), model
        self.ends, self.facts = end_token_ids(model, self.tokenizer), say_not_applied(model)
        if "vision_config" in read_json(Path(model) / "config.json"):
            options["limit_mm_per_prompt"] = {"image": 0, "video": 0}
        engine, self.context = vllm_engine(model, max_model_len, tensor_parallel, max_num_seqs=max_num_seqs, **options)
        self.engine = engine.llm_engine

    def describe(self) -> dict[str, Any]:
        return self.facts

    def render(self, messages: list[dict[str, str]]) -> str:
        return render_chat(self.tokenizer, messages)

    def generate(self, prompts: Sequence[str], sampling: Sampling) -> Iterator[tuple[int, Completion]]:
        """All prompts are queued at once and each is yielded when it is finished, while the others run on."""
        ids = prompt_ids(self.tokenizer, prompts)
        for index, (prompt, tokens) in enumerate(zip(prompts, ids, strict=True)):
            params = self._params(len(tokens), sampling, seed_of(prompt, sampling.seed))
            self.engine.add_request(str(index), {"prompt_token_ids": tokens}, params)
        while self.engine.has_unfinished_requests():
            for request in self.engine.step():
                if request.finished and request.request_id.startswith(LOOK):
                    check_finite(request.outputs[0], self.model)
                elif request.finished:
                    index = int(request.request_id)
                    if list(request.prompt_token_ids) != ids[index]:
                        raise RuntimeError(f"vLLM changed the ids of prompt {index}")
                    new = list(request.outputs[0].token_ids)
                    if stuck(new) and not self.ignore_ends:
                        look = sampling_params(Sampling(), 0, 1, self.ends, logprobs=0)
                        seen = (ids[index] + new)[: self.context - 1]
                        self.engine.add_request(f"{LOOK}{index}", {"prompt_token_ids": seen}, look)
                    yield index, completion_of(self.tokenizer, new, ids[index], self.ends)

    def _params(self, prompt_tokens: int, sampling: Sampling, seed: int) -> Any:
        room = min(sampling.max_tokens, self.context - prompt_tokens)
        if room < 1:
            raise UserError(f"a prompt has {prompt_tokens} tokens; the engine's context is {self.context}")
        return sampling_params(sampling, seed, room, self.ends, ignore_eos=self.ignore_ends)


class VllmMmBackend:
    """vLLM's offline engine with image inputs; it expands each placeholder by the model's own processor. ``images``: the most
    in one prompt."""

    name = "vllm"

    def __init__(self, model: Path, budget: int, images: int, tensor_parallel: int, max_num_seqs: int = 32) -> None:
        self.processor, self.model = load_processor(model), model
        self.ends, self.facts = end_token_ids(model, self.processor.tokenizer), say_not_applied(model)
        self.engine, _ = vllm_engine(
            model, budget + PROMPT_ROOM + IMAGE_ROOM, tensor_parallel, max_num_seqs=max_num_seqs,
            limit_mm_per_prompt={"image": images, "video": 0},
        )  # fmt: skip

    def describe(self) -> dict[str, Any]:
        return self.facts

    def render(self, messages: list[dict[str, Any]]) -> Prompt:
        return render_messages(self.processor, messages)

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> Iterator[tuple[int, Completion]]:
        for start in range(0, len(prompts), 64):  # finished samples reach the log, and few images are decoded at once
            part = prompts[start : start + 64]
            params = [sampling_params(sampling, seed_of(p, sampling.seed), sampling.max_tokens, self.ends) for p in part]
            inputs = [vllm_input(prompt) for prompt in part]
            requests = self.engine.generate(inputs, params)
            if suspects := [own for own, request in zip(inputs, requests, strict=True) if stuck(request.outputs[0].token_ids)]:
                for request in self.engine.generate(suspects, sampling_params(Sampling(), 0, 1, self.ends, logprobs=0)):
                    check_finite(request.outputs[0], self.model)
            for offset, request in enumerate(requests):
                new, ids = list(request.outputs[0].token_ids), list(request.prompt_token_ids)
                yield start + offset, completion_of(self.processor.tokenizer, new, ids, self.ends)


def vllm_input(prompt: Prompt) -> dict[str, Any]:
    """One prompt in vLLM's form."""
    images = [picture.open() for picture in prompt.pictures]
    return {"prompt": prompt.text, "multi_modal_data": {"image": images}} if images else {"prompt": prompt.text}
