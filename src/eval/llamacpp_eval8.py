"""Evaluate a GGUF file through llama.cpp's own server: bash pipelines/eval.sh --model model.gguf --tag TAG

Not a command by itself: vllm_eval8.py picks this backend for a .gguf file. The server is started on a free port of this machine
and never outlives the run. It is sent token ids, which are checked against its own tokenizer, so that a prompt is the same on
all backends. llama_cpp.py finds or builds the server.
"""

from __future__ import annotations

import atexit
import ctypes
import math
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch

from backend import Completion, Sampling, seed_of, stuck
from backend_openai import NEUTRAL, Client, ServerBackend
from console import UserError
from gguf_format import architecture_value, gguf_files, metadata, open_gguf, token_text
from hf_model import end_token_ids, ids_sha256, load_tokenizer, render_chat, tokenizer_files_sha256
from llama_cpp import tool

PR_SET_PDEATHSIG = 1
# How a file names its special tokens, and how a template does.
NAMES = {"bos": "bos", "eos": "eos", "unknown": "unk", "seperator": "sep", "padding": "pad", "cls": "cls", "mask": "mask"}
END_KEYS = ("eot", "eom", "fim_pad", "fim_rep", "fim_sep")  # beside eos: each token of these ends an answer in llama.cpp
STOPS = {"limit": "length", "eos": "stop", "word": "stop"}
LIBC = ctypes.CDLL(None)  # loaded before any fork: loading between fork and exec may deadlock


def die_with_parent(parent: int) -> Callable[[], None]:
    """For ``preexec_fn``: the kernel kills the child when ``parent`` ends in any way, kill -9 included."""

    def prepare() -> None:
        LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:  # it ended before the request was made
            os._exit(1)

    return prepare


def thread_arguments() -> list[str]:
    """--threads when this process may use fewer cores than there are: llama.cpp counts the machine's, and would spin."""
    allowed = len(os.sched_getaffinity(0))
    return ["--threads", str(allowed)] if allowed < (os.cpu_count() or allowed) else []


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class LocalServer:
    """A server program on a loopback port, of this process alone; a context manager that always stops it.

    ``command`` is everything but --host and --port; ``loading``: seconds that it may take to answer under the path ``ready``.
    A free ``port`` is taken where none is named, and a key made, without which no other program is answered.
    Start it from the main thread: the kernel ties the child to the thread that forked it.
    """

    def __init__(
        self, model: str | Path, command: Sequence[str], loading: float, port: int | None = None, ready: str = "/health"
    ) -> None:
        self.model, self.command, self.loading, self.port, self.ready = Path(model), list(command), loading, port, ready
        self.name = Path(command[0]).name
        self.log = tempfile.TemporaryFile()
        self.process: subprocess.Popen[bytes] | None = None
        self.stopped = False
        self.told = threading.Lock()  # many requests fail at once; one explains
        self.key = None if port else secrets.token_hex(16)
        atexit.register(self.stop)
        try:
            self._start()
        except BaseException:
            self.stop()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _start(self) -> None:
        for attempt in range(3):
            port = self.port or free_port()
            self.client = Client(f"http://127.0.0.1:{port}", self.key, check=self.check)
            self.process = subprocess.Popen(
                [*self.command, "--host", "127.0.0.1", "--port", str(port)], stdin=subprocess.DEVNULL,
                stdout=self.log, stderr=subprocess.STDOUT, env=os.environ | ({"LLAMA_API_KEY": self.key} if self.key else {}),
                start_new_session=True,  # Ctrl-C reaches this program alone, which then stops the server
                preexec_fn=die_with_parent(os.getpid()),
            )  # fmt: skip
            if self._wait_until_ready():
                return
            if attempt == 2 or self.port or "couldn't bind" not in self.tail(4000):  # else another program took the port
                self.check()

    def _wait_until_ready(self) -> bool:
        """True when it answers, False when it ended."""
        deadline = time.monotonic() + self.loading
        while self.process.poll() is None:
            try:
                answer = self.client.once(self.ready, timeout=5)
                if answer.get("status") == "ok" or "data" in answer:
                    return True
            except OSError:  # not listening yet, or 503 while it loads
                pass
            if time.monotonic() > deadline:
                raise UserError(f"{self.model}: {self.name} was not ready after {self.loading:.0f} s")
            time.sleep(0.05)
        return False

    def tail(self, size: int = 1500) -> str:
        """The end of what the server printed."""
        end = os.fstat(self.log.fileno()).st_size
        return os.pread(self.log.fileno(), size, max(0, end - size)).decode("utf-8", "replace")

    def check(self) -> None:
        """Raise :class:`UserError` when the server has ended; its last lines go to stderr."""
        if self.stopped:
            raise UserError(f"{self.name} was stopped")
        try:
            code = self.process.wait(timeout=0.5)  # a connection breaks a moment before its process is gone
        except subprocess.TimeoutExpired:
            return
        if self.told.acquire(blocking=False):
            lines = self.tail().splitlines()[-12:]
            print("\n".join(f"{self.name}: {line}" for line in lines), file=sys.stderr, flush=True)
        if found := re.search(r"tensor '(.+?)' has invalid data", self.tail(8000)):
            raise UserError(f"{self.model}: {found[1]} holds NaN or infinity (llama.cpp's --check-tensors); make the file anew")
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        raise UserError(f"{self.model}: {self.name} {how} (its last lines are above); the same command goes on from here")

    def stop(self) -> None:
        """Stop the server; it holds nothing worth a farewell, so that a slow one is killed after 3 s."""
        self.stopped = True
        atexit.unregister(self.stop)
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(timeout=3)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()


# What an evaluation wants otherwise than whoever talks to a model: no page, no cache on the side. Not --special: a reply that
# ends in its end token is none that the parser of tool calls reads.
EVALUATING = ("--no-ui", "--no-slots", "--cache-ram", "0")


class LlamaServer(LocalServer):
    """llama-server with ``slots`` of ``context`` tokens each. ``loading`` by default: 2 minutes and 20 s a GB. ``own``: what is
    not said in ``arguments``."""

    def __init__(
        self, model: str | Path, context: int, slots: int = 4, arguments: Sequence[str] = (), loading: float | None = None,
        port: int | None = None, own: Sequence[str] = EVALUATING,
    ) -> None:  # fmt: skip
        self.slots, size = slots, sum(file.stat().st_size for file in gguf_files(model))
        threads = [] if "--threads" in arguments else thread_arguments()
        sizes = ["--ctx-size", str(context * slots), "--parallel", str(slots), "--offline"]
        command = [str(tool("llama-server")), "--model", str(model), *sizes, *own, *threads, *arguments]
        super().__init__(model, command, loading or 120 + 20 * size / 1e9, port)
        self.context = int(self.client.call("/props")["default_generation_settings"]["n_ctx"])


def server_logprobs(server: LlamaServer, ids: np.ndarray, vocabulary: int, first: int) -> torch.Tensor:
    """Log-probabilities [positions, V] that llama-server gives after each position of ``ids`` but the last, from ``first`` on:
    one request a position, of which the prompt cache leaves one token to compute. It tells them before its sampler, which is
    made to take a token of whole characters: to another it answers without them."""
    table = torch.full((len(ids) - 1 - first, vocabulary), -torch.inf)
    whole = server.client.call("/tokenize", {"content": "0", "add_special": False})["tokens"][-1]
    fixed: dict[str, Any] = {"n_predict": 1, "n_probs": vocabulary, "temperature": 0.0, "cache_prompt": True, "id_slot": 0}
    fixed |= {"logit_bias": [[whole, 1e6]]}
    for row, position in zip(table, range(first, len(ids) - 1), strict=True):
        answer = server.client.call("/completion", fixed | {"prompt": ids[: position + 1].tolist()})
        likely = answer["completion_probabilities"][0]["top_logprobs"]
        row[torch.tensor([entry["id"] for entry in likely])] = torch.tensor([entry["logprob"] for entry in likely])
    return table


class GgufTokenizer:
    """The chat template and the tokens of a GGUF file itself, as a tokenizer of transformers: ids by the server."""

    def __init__(self, model: str | Path, client: Client, renders: bool = True) -> None:
        reader = open_gguf(model)
        self.chat_template, self.client, self.name_or_path = metadata(reader, "tokenizer.chat_template"), client, str(model)
        if renders and not self.chat_template:
            raise UserError(f"{model}: holds no chat template; give --tokenizer DIR")
        told = {f"{name}_token": token_text(reader, kind) for kind, name in NAMES.items()}
        self.names = {name: text for name, text in told.items() if text is not None}  # transformers leaves out the others too

    def apply_chat_template(self, messages: Sequence[Mapping[str, Any]], tokenize: bool = False, **variables: Any) -> str:
        """As a tokenizer of transformers does; :func:`render_chat` calls both."""
        from transformers.utils.chat_template_utils import render_jinja_template

        texts, _ = render_jinja_template([messages], chat_template=self.chat_template, **(self.names | variables))
        return texts[0]

    def render(self, messages: Sequence[Mapping[str, Any]]) -> str:
        return render_chat(self, messages)

    def __call__(self, text: str | list[str], add_special_tokens: bool = False) -> dict[str, Any]:
        """Ids of a text, or of each of a list, as transformers has it; the server would run a list into one."""
        if isinstance(text, list):
            return {"input_ids": [self(each, add_special_tokens)["input_ids"] for each in text]}
        return {"input_ids": self.client.call("/tokenize", {"content": text, "add_special": add_special_tokens})["tokens"]}

    def decode(self, ids: list[int], skip_special_tokens: bool = False) -> str:
        return self.client.call("/detokenize", {"tokens": ids})["content"]


def check_same_ids(prompt: str, ours: list[int], servers: list[int]) -> None:
    """Raise :class:`UserError` unless a server's tokenizer reads the prompt as ours does."""
    if ours == servers:
        return
    at = next((i for i, (a, b) in enumerate(zip(ours, servers, strict=False)) if a != b), min(len(ours), len(servers)))
    raise UserError(
        f"prompt {prompt[:40]!r}...: token {at} is {ours[at : at + 1]} for the tokenizer and {servers[at : at + 1]} for the "
        "server; the GGUF was made with another tokenizer"
    )


def more_ends(model: str | Path, ends: Sequence[int]) -> list[str]:
    """Options that make llama-server end at ``ends`` too, where the file names them under none of its own keys."""
    reader = open_gguf(model)
    held = {kind: metadata(reader, f"tokenizer.ggml.{kind}_token_id") for kind in ("eos", *END_KEYS)}
    free = [kind for kind, end in held.items() if end is None]
    missing = [end for end in ends if end not in held.values()]
    if len(missing) > len(free):
        raise UserError(f"{model}: llama.cpp has no room for the end tokens {missing[len(free) :]} of generation_config.json")
    places = zip(free, missing, strict=False)
    return [part for kind, end in places for part in ("--override-kv", f"tokenizer.ggml.{kind}_token_id=int:{end}")]


class LlamaCppBackend(ServerBackend):
    """A GGUF file in llama-server; as many requests at once as the server has slots. Its tensors are checked for NaN as they
    are loaded. It ends an answer where the file says and, with ``tokenizer``, where generation_config.json there says."""

    name = "llamacpp"

    def __init__(
        self, model: str | Path, context: int, tokenizer: Path | None = None, slots: int = 4, arguments: Sequence[str] = (),
        timeout: float | None = None,
    ) -> None:  # fmt: skip
        trained = int(architecture_value(open_gguf(model), "context_length", context))
        directory = load_tokenizer(tokenizer) if tokenizer else None  # a bad one fails before the server loads
        ends = more_ends(model, end_token_ids(tokenizer, directory)) if tokenizer else []
        self.context, self.parallel, self.timeout = min(context, trained), slots, timeout
        self.server = LlamaServer(model, self.context, slots, ["--check-tensors", *ends, *arguments])
        self.client, self.served, self.model = self.server.client, self.server.context, model
        self.own = GgufTokenizer(model, self.client, directory is None)
        self.tokenizer, self.looked = directory or self.own, False
        self.facts = {"llama_server": self.client.call("/props").get("build_info")}
        self.facts |= {"tokenizer_sha256": tokenizer_files_sha256(tokenizer)} if tokenizer else {}

    def describe(self) -> dict[str, Any]:
        return self.facts

    def generate(self, prompts: Sequence[str], sampling: Sampling) -> Iterator[tuple[int, Completion]]:
        if prompts and not self.looked:
            self._check_finite(self.tokenizer(prompts[0], add_special_tokens=False)["input_ids"])
            self.looked = True
        return super().generate(prompts, sampling)

    def _check_finite(self, ids: Sequence[int]) -> None:
        """Raise :class:`UserError` when the logits after ``ids`` are NaN or infinite; llama-server draws from them all the
        same."""
        fields = {
            "prompt": list(ids[-self.server.context + 1 :]),
            "n_predict": 1,
            "n_probs": 1,
            "cache_prompt": False,
            "temperature": 0.0,
        }
        rows = self.client.call("/completion", NEUTRAL | fields).get("completion_probabilities") or []
        if any(row["logprob"] is None or not math.isfinite(row["logprob"]) for row in rows):  # its JSON writes NaN as null
            raise UserError(
                f"{self.model}: llama-server's logits are NaN or infinite after {len(ids)} tokens. The tensors of the "
                "file are finite, so it overflows; --backend hf on the checkpoint names the layer"
            )

    def _complete(self, prompt: str, sampling: Sampling) -> Completion:
        ids = self.tokenizer(prompt, add_special_tokens=False)["input_ids"]
        if self.tokenizer is not self.own:
            check_same_ids(prompt, ids, self.own(prompt)["input_ids"])
        room, held = self._room(ids, sampling)
        # temperature first, as transformers and vLLM have it; no filter of the server's defaults (top-k 40, min-p 0.05)
        answer = self.client.call("/completion", NEUTRAL | {
            "prompt": ids, "n_predict": held, "cache_prompt": False, "return_tokens": True,
            "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k,
            "seed": seed_of(prompt, sampling.seed) & 0x7FFFFFFF,  # the highest 32-bit value would mean "random"
        })  # fmt: skip
        new, stop, read = answer["tokens"], answer["stop_type"], answer["tokens_evaluated"]
        if read != len(ids) or stop not in STOPS:
            raise UserError(f"llama-server read {read} prompt tokens of {len(ids)} and stopped by {stop!r}")
        if stuck(new):
            self._check_finite([*ids, *new])
        text = self.tokenizer.decode(new[:-1] if stop == "eos" else new, skip_special_tokens=False)
        done = Completion(text, len(new), len(ids), STOPS[stop], ids_sha256(ids), tuple(new))
        return self._checked_length(done, room)
