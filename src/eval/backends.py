"""Engines that continue prompts: transformers (any machine) and vLLM (GPU). Same prompts in, same kind of text out.

Not a command. A backend yields (index, Completion) as sequences finish, so that a killed run loses little.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from checkpoint import PACKED, Checkpoint
from console import UserError, read_json
from device_pool import default_device
from model_layout import text_config

ENGINE_ENVIRONMENT = {  # vLLM: no plugin that happens to be installed, no report home, no look-up of what is on disk
    "VLLM_PLUGINS": "",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "2",  # GiB, read by the CPU engine only
}


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


def prompt_ids(tokenizer: Any, prompts: Sequence[str]) -> list[list[int]]:
    """Token ids of rendered prompts. Nothing is put before them: a template writes its own beginning-of-text token."""
    return tokenizer(list(prompts), add_special_tokens=False)["input_ids"] if prompts else []


def ids_sha256(ids: Sequence[int]) -> str:
    return hashlib.sha256(" ".join(map(str, ids)).encode()).hexdigest()


def end_token_ids(model: str | Path, tokenizer: Any) -> list[int]:
    """Tokens that end a turn: the tokenizer's, and those of generation_config.json (Gemma's end of turn stands only there)."""
    found = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    path = Path(model) / "generation_config.json"
    more = read_json(path).get("eos_token_id") if path.is_file() else None
    found += more if isinstance(more, list) else [] if more is None else [more]
    if not found:
        raise UserError(f"{model}: neither the tokenizer nor generation_config.json names an end-of-turn token")
    return sorted(set(found))


def completion_of(tokenizer: Any, new: Sequence[int], prompt: Sequence[int], ends: Sequence[int]) -> Completion:
    """What a backend returns for the ids that it generated after ``prompt``, cut at the first end token."""
    length = next((place for place, token in enumerate(new) if token in ends), len(new))
    finished = length < len(new)
    text = tokenizer.decode(list(new[:length]), skip_special_tokens=False)
    return Completion(text, length + finished, len(prompt), "stop" if finished else "length", ids_sha256(prompt))


def load_tokenizer(model: str | Path) -> Any:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(model), local_files_only=True)
    if not tokenizer.chat_template:
        raise UserError(f"{model}: the tokenizer has no chat template")
    return tokenizer


def load_weights(
    auto: Any, path: str | Path, dtype: torch.dtype, places: Mapping[str, str | int] | None = None
) -> torch.nn.Module:
    """The model of a checkpoint by one of transformers' Auto classes, its modules at ``places``. A packed checkpoint
    (docs/PACKED.md) is unpacked here, in memory: transformers would need the package compressed-tensors for it."""
    if not (Path(path) / PACKED).is_file():
        return auto.from_pretrained(str(path), dtype=dtype, device_map=places, local_files_only=True)
    from accelerate import init_empty_weights
    from transformers import AutoConfig

    checkpoint, config = Checkpoint(path), AutoConfig.from_pretrained(str(path), local_files_only=True)
    del config.quantization_config
    with init_empty_weights():
        kind = type(auto.from_config(config))
    values = {name: checkpoint.read(name) for name in checkpoint.tensors}
    return kind.from_pretrained(None, config=config, state_dict=values, dtype=dtype, device_map=places)


def load_model(path: str | Path, devices: Sequence[torch.device] = ()) -> torch.nn.Module:
    """A causal language model for inference: bfloat16 on a GPU, float32 on a CPU; its layers in equal runs on ``devices``
    where there are several (default: the first GPU, or the CPU)."""
    from transformers import AutoModelForCausalLM

    devices = tuple(devices) or (default_device(),)
    dtype = torch.bfloat16 if devices[0].type == "cuda" else torch.float32
    places = {name: place(own) for name, own in spread_map(path, devices).items()} if len(devices) > 1 else None
    model = load_weights(AutoModelForCausalLM, path, dtype, places)
    return (model if places else model.to(devices[0])).eval()


def place(device: torch.device) -> str | int:
    """As accelerate wants it: a GPU by its number, else it takes the first of a set of names for the main one."""
    return device.index if device.type == "cuda" else str(device)


def spread_map(path: str | Path, devices: Sequence[torch.device]) -> dict[str, torch.device]:
    """Which device holds which module: decoder layers in runs of equal length, the embedding before the first, norm and head
    after the last (a head that is the embedding with it)."""
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(str(path), local_files_only=True)
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config)
    decoder = model.get_decoder()
    prefix = next(name for name, module in model.named_modules() if module is decoder)
    first, last, count = devices[0], devices[-1], len(decoder.layers)
    places = {}
    for name, module in decoder.named_children():
        if module is decoder.layers:
            places |= {f"{prefix}.{name}.{i}": devices[i * len(devices) // count] for i in range(count)}
        else:
            places[f"{prefix}.{name}"] = last if name == "norm" else first
    tied = config.get_text_config().tie_word_embeddings
    return places | {name: first if tied else last for name, module in model.named_children() if module is not decoder}


def render_chat(tokenizer: Any, messages: list[dict[str, str]]) -> str:
    """The prompt text of chat turns with the generation prompt, by the model's own template. Where the template leaves the
    choice (Gemma 4: off unless asked for), thinking is on, as in the vendors' published numbers."""
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, enable_thinking=True)


def length_batches(ids: Sequence[Sequence[int]], size: int) -> list[list[int]]:
    """Indices of prompts in batches of like length, always the same ones."""
    order = sorted(range(len(ids)), key=lambda index: (len(ids[index]), index))
    return [order[start : start + size] for start in range(0, len(order), size)]


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


class VllmBackend:
    """vLLM's offline engine. Memory and length settings follow docs/EVAL_PROTOCOL (64k: gpu-mem 0.88, 32 sequences).
    ``options``: more arguments of vLLM's LLM."""

    name = "vllm"
    ignore_ends = False

    def __init__(
        self, model: str | Path, max_model_len: int, max_num_seqs: int = 32, tensor_parallel: int = 1, **options: Any
    ) -> None:
        self.tokenizer = load_tokenizer(model)
        self.ends = end_token_ids(model, self.tokenizer)
        if "vision_config" in read_json(Path(model) / "config.json"):
            options["limit_mm_per_prompt"] = {"image": 0, "video": 0}
        engine, self.context = vllm_engine(model, max_model_len, tensor_parallel, max_num_seqs=max_num_seqs, **options)
        self.engine = engine.llm_engine

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
                if request.finished:
                    index = int(request.request_id)
                    if list(request.prompt_token_ids) != ids[index]:
                        raise RuntimeError(f"vLLM changed the ids of prompt {index}")
                    new = list(request.outputs[0].token_ids)
                    yield index, completion_of(self.tokenizer, new, ids[index], self.ends)

    def _params(self, prompt_tokens: int, sampling: Sampling, seed: int) -> Any:
        from vllm import SamplingParams

        room = min(sampling.max_tokens, self.context - prompt_tokens)
        if room < 1:
            raise UserError(f"a prompt has {prompt_tokens} tokens; the engine's context is {self.context}")
        return SamplingParams(
            temperature=sampling.temperature, top_p=sampling.top_p, top_k=sampling.top_k or -1, seed=seed,
            max_tokens=room, stop_token_ids=self.ends, ignore_eos=self.ignore_ends, detokenize=False,
        )  # fmt: skip


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
