"""Evaluate a model behind any server with OpenAI's /v1/completions (vLLM, SGLang, llama-server):

    bash pipelines/eval.sh --backend openai --base-url http://localhost:8000/v1 --model NAME --tokenizer DIR --tag TAG

Not a command by itself. The chat template is ours, so that the prompt is the same on all backends; token ids are sent, or the
rendered text with --prompt-text, and the server's count of prompt tokens must be ours (no second BOS).
"""

from __future__ import annotations

import http.client
import json
import os
import queue
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from backend import Completion, Sampling, seed_of
from console import UserError
from hf_model import ids_sha256, load_tokenizer, render_chat

BUSY = (429, 502, 503, 504)  # a server that is loading, full, or behind a proxy that lost it for a moment
T = TypeVar("T")


def refusal(error: urllib.error.HTTPError) -> str:
    """What a server said when it refused a request, in one line."""
    body = error.read().decode("utf-8", "replace")
    try:
        told = json.loads(body)["error"]
        body = told["message"] if isinstance(told, dict) else str(told)
    except (ValueError, KeyError, TypeError):
        pass
    return f"HTTP {error.code}: {' '.join(body.split())[:300]}"


class Client:
    """``patience``: seconds that a server may be busy or unreachable before a request is given up, with growing pauses.
    ``check`` is called after each failure and may raise: the owner of the server knows whether waiting makes sense."""

    def __init__(
        self, base_url: str, key: str | None = None, patience: float = 60.0, check: Callable[[], None] = lambda: None
    ) -> None:
        url = urllib.parse.urlsplit(base_url)
        if url.scheme not in ("http", "https") or not url.hostname:
            raise UserError(f"{base_url}: not a server's address; expected http://HOST:PORT")
        self.base_url = base_url.rstrip("/")
        self.headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        self.patience, self.check = patience, check
        # a proxy of the environment knows nothing of this machine's own ports
        loopback = url.hostname in ("127.0.0.1", "localhost", "::1")
        self.opener = urllib.request.build_opener(*([urllib.request.ProxyHandler({})] if loopback else []))

    def once(self, path: str, body: Any = None, timeout: float | None = None) -> Any:
        """One request, no retry: GET without a body, else POST."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.base_url + path, data, self.headers)
        with self.opener.open(request, timeout=timeout) as answer:
            return json.load(answer)

    def call(self, path: str, body: Any = None) -> Any:
        """The answer's JSON. A generation may take hours, so that no answer is not a failure; a lost connection is."""
        deadline, pause = time.monotonic() + self.patience, 0.1
        while True:
            try:
                return self.once(path, body)
            except urllib.error.HTTPError as error:
                problem = refusal(error)
                if error.code not in BUSY:
                    raise UserError(f"{self.base_url}{path}: {problem}") from None
            except (OSError, http.client.HTTPException) as error:  # refused, reset, closed before an answer
                problem = str(error) or type(error).__name__
            except json.JSONDecodeError as error:
                raise UserError(f"{self.base_url}{path}: the answer is not JSON ({error})") from None
            self.check()
            if time.monotonic() + pause > deadline:
                raise UserError(f"{self.base_url}{path}: no answer within {self.patience:.0f} s ({problem})")
            time.sleep(pause)
            pause = min(2 * pause, 8.0)


def in_parallel(work: Callable[[int], T], count: int, workers: int) -> Iterator[tuple[int, T]]:
    """(index, work(index)) for 0..count-1 as they finish, ``workers`` at a time; the first failure is raised here.

    The threads are daemons: one that waits for an answer must not keep an interrupted program from ending.
    """
    waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
    finished: queue.SimpleQueue[tuple[int, T | None, BaseException | None]] = queue.SimpleQueue()
    stop = threading.Event()

    def run() -> None:
        while not stop.is_set():
            try:
                index = waiting.get_nowait()
            except queue.Empty:
                return
            try:
                finished.put((index, work(index), None))
            except BaseException as error:  # noqa: BLE001 - handed to the caller, who raises it
                finished.put((index, None, error))
                return

    for index in range(count):
        waiting.put(index)
    for _ in range(min(workers, count)):
        threading.Thread(target=run, daemon=True).start()
    try:
        for _ in range(count):
            index, result, error = finished.get()
            if error is not None:
                raise error
            yield index, result
    finally:
        stop.set()


def api_key(name: str | None) -> str | None:
    """The key in the environment variable ``name``: a key on a command line would be seen by everybody."""
    if not name:
        return None
    if not os.environ.get(name):
        raise UserError(f"--api-key-env {name}: that environment variable is not set")
    return os.environ[name]


class ServerBackend:
    """Prompts rendered here, as many requests at once as ``parallel``. A subclass sends one in ``_complete``."""

    tokenizer: Any
    parallel: int
    context: int

    def render(self, messages: list[dict[str, str]]) -> str:
        return render_chat(self.tokenizer, messages)

    def generate(self, prompts: Sequence[str], sampling: Sampling) -> Iterator[tuple[int, Completion]]:
        return in_parallel(lambda index: self._complete(prompts[index], sampling), len(prompts), self.parallel)

    def _complete(self, prompt: str, sampling: Sampling) -> Completion:
        raise TypeError(f"{type(self).__name__} does not define _complete")

    def _room(self, ids: Sequence[int], sampling: Sampling) -> int:
        """How many tokens may follow."""
        room = min(sampling.max_tokens, self.context - len(ids))
        if room < 1:
            raise UserError(f"a prompt has {len(ids)} tokens; the server's context is {self.context}")
        return room


class OpenAIBackend(ServerBackend):
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

    def _complete(self, prompt: str, sampling: Sampling) -> Completion:
        ids = self.tokenizer(prompt, add_special_tokens=False)["input_ids"]
        fields = {
            "model": self.model, "prompt": prompt if self.send_text else ids, "max_tokens": self._room(ids, sampling),
            "temperature": sampling.temperature, "top_p": sampling.top_p, "seed": seed_of(prompt, sampling.seed) & 0x7FFFFFFF,
        }  # fmt: skip
        if not self.plain:
            fields |= {"top_k": sampling.top_k, "min_p": 0.0, "skip_special_tokens": False}
        answer = self.client.call("/completions", fields)
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
