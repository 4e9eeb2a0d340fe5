"""What an engine is that continues prompts, how tokens are drawn, which engine a model gets; and the engine of transformers.

Not a command. A backend yields (index, Completion) as sequences finish, so that a killed run loses little. The engines are
HfBackend here, vllm_eval, llamacpp_eval8 and backend_openai: same prompts in, same kind of text out.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
import queue
import signal
import sys
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from console import UserError, read_json
from devices import on_device
from hf_model import (
    end_token_ids,
    first_nonfinite,
    ids_sha256,
    load_model,
    load_tokenizer,
    load_weights,
    prompt_ids,
    render_chat,
)
from pictures import Prompt, load_processor, render_messages

PROMPT_ROOM = 1024  # vLLM's context beyond the budget (64k: 66,560)


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn: by these and nothing else, on every backend. temperature 0 is greedy; top_k 0 and top_p 1 switch
    those filters off, top_k None is not sent to a server that does not know it."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int | None = 0
    seed: int = 0
    max_tokens: int = 32768

    def to_json(self) -> dict[str, Any]:
        return {key: value for key, value in asdict(self).items() if value is not None}


@dataclass(frozen=True)
class Completion:
    """``finish_reason``: stop (end of turn) or length (ran out of tokens). ``tokens``: generated, end token included.
    ``prompt_ids_sha256``: :func:`ids_sha256` of the prompt as the engine got it, equal on every backend. ``ids``: what was
    generated, end token included; empty where an engine tells its text alone."""

    text: str
    tokens: int
    prompt_tokens: int
    finish_reason: str
    prompt_ids_sha256: str | None = None
    ids: tuple[int, ...] = ()


class Backend(Protocol):
    name: str

    def render(self, messages: list[dict[str, str]]) -> str:
        """:func:`render_chat` of these turns."""

    def generate(self, prompts: Sequence[str], sampling: Sampling) -> Iterator[tuple[int, Completion]]:
        """Continue every prompt, in any order."""

    def describe(self) -> dict[str, Any]:
        """What belongs to the settings of a log beside model and sampling: of another engine or server it is another log."""
        return {}


def seed_of(prompt: str, seed: int) -> int:
    """The seed of one prompt: the same wherever it stands in a run, so that a resumed run draws the same tokens."""
    return zlib.crc32(f"{seed}:{prompt}".encode())


def completion_of(tokenizer: Any, new: Sequence[int], prompt: Sequence[int], ends: Sequence[int]) -> Completion:
    """What a backend returns for the ids that it generated after ``prompt``, cut at the first end token."""
    length = next((place for place, token in enumerate(new) if token in ends), len(new))
    finished = length < len(new)
    text = tokenizer.decode(list(new[:length]), skip_special_tokens=False)
    made = tuple(new[: length + finished])
    return Completion(text, len(made), len(prompt), "stop" if finished else "length", ids_sha256(prompt), made)


def stuck(new: Sequence[Any]) -> bool:
    """Whether an answer is or ends in one token over and over: what engines that do not look make of NaN logits."""
    return len(set(new[-16:])) <= 1


IDS_AND_DRAWING = {"do_sample", "temperature", "top_p", "top_k", "max_length", "max_new_tokens", "use_cache"}


def not_applied(model: str | Path) -> dict[str, Any]:
    """What generation_config.json would change about drawing tokens, were it obeyed: penalties, forbidden words and the like.
    No backend here does: transformers alone reads them, so that its numbers would be of another question."""
    from transformers import GenerationConfig

    path = Path(model) / "generation_config.json"
    given = read_json(path) if path.is_file() else {}
    neutral = GenerationConfig._get_default_generation_params()
    return {
        key: value for key, value in given.items()
        if key not in IDS_AND_DRAWING and not key.endswith(("_token_id", "_version")) and not key.startswith(("_", "output_"))
        and value is not None and value != neutral.get(key)
    }  # fmt: skip


def say_not_applied(model: str | Path) -> dict[str, Any]:
    """:func:`not_applied`, said on stderr; the entry of :meth:`Backend.describe`."""
    found = not_applied(model)
    if found and multiprocessing.parent_process() is None:
        shown = ", ".join(f"{key} {value}" for key, value in found.items())
        print(f"{model}/generation_config.json: not applied, here or on any backend: {shown}", file=sys.stderr, flush=True)
    return {"generation_config_not_applied": found} if found else {}


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


POLL_SECONDS = 2.0  # between looks at whether the other side still lives


class HfBackend(Backend):
    """transformers with a KV cache, in batches of prompts of like length, padded on the left; float32 on a CPU. Several
    ``devices`` hold its layers between them."""

    name = "hf"

    def __init__(self, model: str | Path, batch: int = 64, devices: Sequence[torch.device] = ()) -> None:
        self._open(model, load_tokenizer(model), load_model(model, devices), batch)

    def _open(self, path: str | Path, tokenizer: Any, model: torch.nn.Module, batch: int) -> None:
        self.tokenizer, self.model, self.batch = tokenizer, model, batch
        tokenizer.padding_side = "left"
        self.ends, self.path, self.facts = end_token_ids(path, tokenizer), path, say_not_applied(path)
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(self.ends[0])
        self._take_no_defaults()
        text = model.config.get_text_config()
        text.output_router_logits = model.config.output_router_logits = False  # its loss fails with a KV cache
        self.context = int(getattr(text, "max_position_embeddings", 1 << 30))

    def _take_no_defaults(self) -> None:
        """generate() fills whatever its arguments leave open from the checkpoint's generation_config."""
        from transformers import GenerationConfig

        self.model.generation_config = GenerationConfig(eos_token_id=self.ends, pad_token_id=self.tokenizer.pad_token_id)

    def describe(self) -> dict[str, Any]:
        return self.facts

    def render(self, messages: list[dict[str, str]]) -> str:
        return render_chat(self.tokenizer, messages)

    def generate(self, prompts: Sequence[str], sampling: Sampling) -> Iterator[tuple[int, Completion]]:
        ids = prompt_ids(self.tokenizer, prompts)
        for part in length_batches(ids, self.batch):
            seed = seed_of(prompts[part[0]], sampling.seed)
            yield from zip(part, self.complete([ids[index] for index in part], sampling, seed), strict=True)

    def complete(self, ids: list[list[int]], sampling: Sampling, seed: int) -> list[Completion]:
        """One batch of prompts."""
        return self._continue(self.tokenizer.pad({"input_ids": ids}, return_tensors="pt"), ids, sampling, seed)

    @torch.inference_mode()
    def _continue(self, inputs: Any, ids: list[list[int]], sampling: Sampling, seed: int) -> list[Completion]:
        """Completions of padded ``inputs``, whose prompts are ``ids``."""
        width, rows = inputs["input_ids"].shape[1], self.model.get_input_embeddings().weight.shape[0]
        if (largest := int(inputs["input_ids"].max())) >= rows:
            token = self.tokenizer.convert_ids_to_tokens(largest)
            raise UserError(f"{self.path}: the prompt's token {token!r} is {largest}; the model has {rows} embeddings")
        room = min(sampling.max_tokens, self.context - width)
        if room < 1:
            raise UserError(f"a prompt has {width} tokens; the model's context is {self.context}")
        draw: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        if sampling.temperature > 0:
            torch.manual_seed(seed)
            draw = {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k}
        inputs = inputs.to(self.model.device)
        out = self.model.generate(
            **inputs, max_new_tokens=room, eos_token_id=self.ends, pad_token_id=self.tokenizer.pad_token_id,
            logits_processor=[lambda seen, logits: self._finite(inputs, seen, logits)], **draw,
        )  # fmt: skip
        rows = zip(out.tolist(), ids, strict=True)
        return [completion_of(self.tokenizer, row[width:], prompt, self.ends) for row, prompt in rows]

    def _finite(self, inputs: Any, seen: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """``logits`` [N, V] of the token after ``seen`` [N, T]; a NaN, an infinity or nothing to choose is a UserError."""
        finite = torch.isfinite(logits.amax(-1))  # -inf is how a model masks tokens; NaN wins every comparison here
        if finite.all():
            return logits
        row, width = int(finite.logical_not().nonzero()[0]), inputs["input_ids"].shape[1]
        whole = seen[row, width - int(inputs["attention_mask"][row].sum()) :]
        alone = {"input_ids": whole[None], "attention_mask": torch.ones_like(whole[None])}
        pictures = inputs.keys() - alone.keys()  # they belong to the whole batch and its prompts
        where = first_nonfinite(self.model, **(inputs if pictures else alone), use_cache=False)
        raise UserError(f"{self.path}: the logits of token {seen.shape[1] - width + 1} of an answer are not finite. {where}")


class HfMmBackend(HfBackend):
    """The same for prompts with pictures."""

    def __init__(self, model: Path, batch: int = 16) -> None:
        from transformers import AutoModelForImageTextToText

        self.processor = load_processor(model)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        loaded = load_weights(AutoModelForImageTextToText, model, dtype).to(device).eval()
        self._open(model, self.processor.tokenizer, loaded, batch)

    def render(self, messages: list[dict[str, Any]]) -> Prompt:
        return render_messages(self.processor, messages)

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> Iterator[tuple[int, Completion]]:
        order = sorted(range(len(prompts)), key=lambda index: (len(prompts[index].pictures), len(prompts[index].text), index))
        for start in range(0, len(order), self.batch):
            part = order[start : start + self.batch]
            yield from zip(part, self._batch([prompts[index] for index in part], sampling), strict=True)

    def _batch(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Completion]:
        pictures = [[picture.open() for picture in prompt.pictures] for prompt in prompts]
        inputs = self.processor(
            text=[prompt.text for prompt in prompts], images=pictures if any(pictures) else None, padding=True,
            add_special_tokens=False, return_tensors="pt",
        )  # fmt: skip
        ids = [row[mask.bool()].tolist() for row, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)]
        return self._continue(inputs, ids, sampling, seed_of(prompts[0], sampling.seed))


def serve(model: str, device: torch.device, batch: int, tasks: Any, results: Any) -> None:
    """A worker: (number, token ids, sampling, seed) in, (number, completions) out; (None, text) says what a user can mend."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's, which ends its workers
    parent = multiprocessing.parent_process()
    try:
        with on_device(device):
            backend = HfBackend(model, batch, [device])
            results.put((-1, []))
            while parent is None or parent.is_alive():
                try:
                    task = tasks.get(timeout=POLL_SECONDS)
                except queue.Empty:
                    continue
                number, ids, sampling, seed = task
                results.put((number, backend.complete(ids, sampling, seed)))
    except UserError as error:
        results.put((None, str(error)))


class Replicas(Backend):
    """The backend "hf" with a copy of the model on each of ``devices``."""

    name = "hf"

    def __init__(self, model: str | Path, devices: Sequence[torch.device], batch: int = 64) -> None:
        self.tokenizer, self.facts = load_tokenizer(model), say_not_applied(model)
        self.batch = batch
        context = multiprocessing.get_context("spawn")
        self.tasks, self.results = context.Queue(), context.Queue()
        self.tasks.cancel_join_thread()  # an error may leave tasks that no worker will take
        self.workers = [
            context.Process(target=serve, args=(str(model), device, batch, self.tasks, self.results), daemon=True)
            for device in devices
        ]
        for worker in self.workers:
            worker.start()
        for _ in self.workers:  # until every copy is loaded
            self._result()

    def describe(self) -> dict[str, Any]:
        return self.facts

    def render(self, messages: list[dict[str, str]]) -> str:
        return render_chat(self.tokenizer, messages)

    def generate(self, prompts: Sequence[str], sampling: Sampling) -> Iterator[tuple[int, Completion]]:
        ids = prompt_ids(self.tokenizer, prompts)
        batches = length_batches(ids, self.batch)
        for number, part in reversed(list(enumerate(batches))):  # the longest first: the last to end should be short
            seed = seed_of(prompts[part[0]], sampling.seed)
            self.tasks.put((number, [ids[index] for index in part], sampling, seed))
        for _ in batches:
            number, done = self._result()
            yield from zip(batches[number], done, strict=True)

    def _result(self) -> tuple[int, list[Completion]]:
        while True:
            try:
                number, value = self.results.get(timeout=POLL_SECONDS)
            except queue.Empty:
                ended = next((worker for worker in self.workers if not worker.is_alive()), None)
                if ended is not None:
                    raise UserError(f"a copy of the model ended with code {ended.exitcode}; its error stands above") from None
                continue
            if number is None:
                raise UserError(value)
            return number, value

    def close(self) -> None:
        """End the workers; otherwise they end with this process."""
        for worker in self.workers:
            worker.terminate()
            worker.join()
        for channel in (self.tasks, self.results):
            channel.close()
