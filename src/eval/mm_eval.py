"""Measure a vision-language model's accuracy: the multimodal counterpart of vllm_eval8, with its log, resume and record.

    python src/eval/mm_eval.py --model models/razor-tiny-vl --tag razor_tiny_vl_bf16 [--benchmarks tiny_count,tiny_digits]
        [--data-dir DIR] [--backend auto|vllm|hf] [--budget 32k|64k|80k] [--samples N] [--limit N] [--batch N]
        [--family NAME] [--out results/eval] [--temperature T --top-p P --top-k K --seed S] [--tensor-parallel N] [--force]

Images keep their place in the prompt and their size: scaling is left to the model's processor (its min and max pixels,
which the record names). Sampling is the vendor's for the model's family (configs/eval.env). docs/MULTIMODAL.md.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from backend import Completion, Sampling, choose_backend, completion_of, seed_of
from bench_mm import get_mm_benchmarks
from checkpoint import Checkpoint
from console import UserError, run_cli
from hf_model import end_token_ids, load_weights
from pictures import Prompt, load_processor, pictures_of
from records import describe_model
from vllm_eval import vllm_engine
from vllm_eval8 import PROMPT_ROOM, Runner, add_run_arguments, check_args, evaluate, finish, make_plan, start_log

IMAGE_ROOM = 16_384  # vLLM's context beyond budget and text, for the tokens of the images of one prompt


def render_messages(processor: Any, messages: Sequence[Mapping[str, Any]]) -> Prompt:
    """Chat turns by the processor's template: each image stands as its placeholder, where the turn has it."""
    plain = [
        {**message, "content": message["content"] if isinstance(message["content"], str) else
         [{"type": "image"} if part["type"] == "image" else part for part in message["content"]]}
        for message in messages
    ]  # fmt: skip
    known = {"enable_thinking": True} if "enable_thinking" in str(processor.chat_template) else {}  # others draw a warning each
    text = processor.apply_chat_template(plain, add_generation_prompt=True, tokenize=False, **known)
    return Prompt(text, pictures_of(messages))


def pixel_limits(processor: Any) -> dict[str, Any]:
    """The processor's own limits on an image, beyond which it scales."""
    known = processor.image_processor.to_dict()
    return {key: known[key] for key in ("size", "min_pixels", "max_pixels") if known.get(key) is not None}


class HfMmBackend:
    """transformers with a KV cache; prompts of like length in a batch, padded on the left; float32 on a CPU."""

    name = "hf"

    def __init__(self, model: Path, batch: int = 16) -> None:
        from transformers import AutoModelForImageTextToText

        self.processor = load_processor(model)
        self.tokenizer = self.processor.tokenizer
        self.tokenizer.padding_side = "left"
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.ends = end_token_ids(model, self.tokenizer)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        self.model = load_weights(AutoModelForImageTextToText, model, dtype).to(device).eval()
        text = self.model.config.get_text_config()
        text.output_router_logits = False  # its loss fails with a KV cache
        self.batch, self.context = batch, int(getattr(text, "max_position_embeddings", 1 << 30))

    def render(self, messages: list[dict[str, Any]]) -> Prompt:
        return render_messages(self.processor, messages)

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> Iterator[tuple[int, Completion]]:
        order = sorted(range(len(prompts)), key=lambda index: (len(prompts[index].pictures), len(prompts[index].text), index))
        for start in range(0, len(order), self.batch):
            part = order[start : start + self.batch]
            yield from zip(part, self._batch([prompts[index] for index in part], sampling), strict=True)

    @torch.inference_mode()
    def _batch(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Completion]:
        pictures = [[picture.open() for picture in prompt.pictures] for prompt in prompts]
        inputs = self.processor(
            text=[prompt.text for prompt in prompts], images=pictures if any(pictures) else None, padding=True,
            add_special_tokens=False, return_tensors="pt",
        ).to(self.model.device)  # fmt: skip
        width = inputs["input_ids"].shape[1]
        room = min(sampling.max_tokens, self.context - width)
        if room < 1:
            raise UserError(f"a prompt has {width} tokens with its images; the model's context is {self.context}")
        draw = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        if sampling.temperature > 0:
            torch.manual_seed(seed_of(prompts[0], sampling.seed))
            draw = {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k}
        out = self.model.generate(
            **inputs, max_new_tokens=room, eos_token_id=self.ends, pad_token_id=self.tokenizer.pad_token_id, **draw
        )
        kept = [row[mask.bool()].tolist() for row, mask in zip(inputs["input_ids"], inputs["attention_mask"])]
        return [completion_of(self.tokenizer, row[width:], ids, self.ends) for row, ids in zip(out.tolist(), kept, strict=True)]


class VllmMmBackend:
    """vLLM's offline engine with image inputs; it expands each placeholder by the model's own processor."""

    name = "vllm"

    def __init__(self, model: Path, max_model_len: int, images: int, tensor_parallel: int, max_num_seqs: int = 32) -> None:
        self.processor = load_processor(model)
        self.ends = end_token_ids(model, self.processor.tokenizer)
        limits = {"image": images, "video": 0}
        self.engine, _ = vllm_engine(
            model, max_model_len, tensor_parallel, max_num_seqs=max_num_seqs, limit_mm_per_prompt=limits
        )

    def render(self, messages: list[dict[str, Any]]) -> Prompt:
        return render_messages(self.processor, messages)

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> Iterator[tuple[int, Completion]]:
        from vllm import SamplingParams

        for start in range(0, len(prompts), 64):  # finished samples reach the log, and few images are decoded at once
            part = prompts[start : start + 64]
            params = [
                SamplingParams(
                    temperature=sampling.temperature, top_p=sampling.top_p, top_k=sampling.top_k or -1,
                    seed=seed_of(prompt, sampling.seed), max_tokens=sampling.max_tokens, stop_token_ids=self.ends,
                    detokenize=False,
                )
                for prompt in part
            ]  # fmt: skip
            requests = self.engine.generate([vllm_input(prompt) for prompt in part], params)
            for offset, request in enumerate(requests):
                new, ids = list(request.outputs[0].token_ids), list(request.prompt_token_ids)
                yield start + offset, completion_of(self.processor.tokenizer, new, ids, self.ends)


def vllm_input(prompt: Prompt) -> dict[str, Any]:
    """One prompt in vLLM's form."""
    images = [picture.open() for picture in prompt.pictures]
    return {"prompt": prompt.text, "multi_modal_data": {"image": images}} if images else {"prompt": prompt.text}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", type=Path, required=True, help="checkpoint directory with its processor")
    add_run_arguments(parser, "tiny_count,tiny_digits,tiny_bars", "auto, vllm or hf", 16)
    return parser.parse_args()


def described(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """(model entry of the record, config.json) of a checkpoint, which must have eyes."""
    checkpoint = Checkpoint(path)
    if "vision_config" not in checkpoint.config:
        raise UserError(f"{path}: config.json has no vision_config; use vllm_eval8.py for a text model")
    return describe_model(path) | {"weights_sha256": checkpoint.sha256()}, checkpoint.config


def make_backend(name: str, args: argparse.Namespace, budget: int, images: int) -> HfMmBackend | VllmMmBackend:
    if name == "hf":
        return HfMmBackend(args.model, args.batch)
    return VllmMmBackend(args.model, budget + PROMPT_ROOM + IMAGE_ROOM, images, args.tensor_parallel)


def main() -> None:
    args = parse_args()
    check_args(args)
    benchmarks, name = get_mm_benchmarks(args.benchmarks.split(","), args.data_dir), choose_backend(args.backend)
    if name not in ("hf", "vllm"):
        raise UserError(f"--backend {name}: pictures go through hf or vllm")
    plan = make_plan(args, name, *described(args.model))
    loaded = [(benchmark, benchmark.load(args.limit)) for benchmark in benchmarks]
    images = max(len(pictures_of(b.messages(item))) for b, items in loaded for item in items)
    log, clock = start_log(args, plan.settings)
    runner = Runner(make_backend(name, args, plan.sampling.max_tokens, images), plan.sampling, args.samples, log, clock)
    finish(plan, runner, *evaluate(loaded, runner), pixels=pixel_limits(runner.backend.processor))


if __name__ == "__main__":
    run_cli(main)
