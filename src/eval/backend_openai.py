"""Evaluate a model behind any server with OpenAI's /v1/completions (vLLM, SGLang, llama-server):

    bash pipelines/eval.sh --backend openai --base-url http://localhost:8000/v1 --model NAME --tokenizer DIR --tag TAG

Not a command by itself. The chat template is ours, so that the prompt is the same on all backends; token ids are sent, or the
rendered text with --prompt-text, and the server's count of prompt tokens must be ours (no second BOS). The answer is the ids
that the server says it generated (vLLM, llama-server), else its text, which must hold as many tokens as it counted. Of several
servers (OpenAIServers) each answers what it has room for; docs/CLUSTER.md.
"""

from __future__ import annotations

import copy
import http.client
import json
import math
import os
import queue
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from backend import Backend, Completion, Sampling, completion_of, seed_of
from console import UserError, read_json, say
from families import text_config
from graders import THOUGHTS, opens_thinking
from hf_model import CHAT, end_token_ids, ids_sha256, load_tokenizer, render_chat, tokenizer_files_sha256
from settings import setting
from tasks_tools import Dialogue, Episode, Turn

# A server that is loading, full, failed once, or lies behind a proxy that lost it for a moment.
BUSY = (408, 425, 429, 500, 502, 503, 504, 520, 521, 522, 523, 524, 529)
FIRST_WORD = 60.0  # seconds of silence until it is said; then after twice as many
DAY = 86_400.0
START, PER_TOKEN = 600.0, 1.0  # seconds that an answer may take, by default: to begin, and for each token that was asked for
LOOK = 5.0  # seconds between two looks at each of several servers; longer at one that failed often
BRIEFLY = 5.0  # seconds for which one of several servers may be busy or unreachable before its item goes to another
LOSSES = 5  # times that an item may be lost by servers that were well before: it may be what ends them
# Greedy answers of one model: log-probabilities of a token lie no further apart, in nats (BF16 rounds logits of 16 to 32 to
# eighths), and where two tokens differ they were about as likely, at most a half each.
APART = 0.25
TIE = math.log(0.5) + APART / 2
PENALTIES = {"presence_penalty": 0.0, "frequency_penalty": 0.0}
# No other filter, penalty or order than the sampling that is declared: a server fills what is left out from its own options or
# the model's generation_config. Names of llama-server, then of vLLM and SGLang; each ignores those of the other.
NEUTRAL = {
    **PENALTIES, "min_p": 0.0, "typical_p": 1.0, "top_n_sigma": -1.0, "mirostat": 0, "dynatemp_range": 0.0,
    "xtc_probability": 0.0, "dry_multiplier": 0.0, "repeat_penalty": 1.0, "samplers": ["temperature", "top_k", "top_p"],
    "logit_bias": {}, "ignore_eos": False, "repetition_penalty": 1.0, "min_tokens": 0,
}  # fmt: skip
UNREAD = "model produced output that does not match"  # llama-server, of a reply that its parser of calls does not understand
IDENTITY = ("id", "root", "owned_by")  # of a model in /models; vLLM's root is its path
IDENTITY_META = ("n_vocab", "n_ctx_train", "n_embd", "n_params", "size", "ftype")  # llama-server's
FIXED, FIXED_TOKENS = "Write one sentence about each of three cities.", 16  # asked of each of several servers
T = TypeVar("T")


class Unavailable(UserError):
    """A server that does not answer, or says that it cannot now; it may later."""


def refusal(error: urllib.error.HTTPError) -> str:
    """What a server said when it refused a request, in one line."""
    try:
        body = error.read().decode("utf-8", "replace")
    except (OSError, http.client.HTTPException):
        body = "no text"
    try:
        told = json.loads(body)["error"]
        body = told["message"] if isinstance(told, dict) else str(told)
    except (ValueError, KeyError, TypeError):
        pass
    return f"HTTP {error.code}: {' '.join(body.split())[:300]}"


class Client:
    """``patience``: seconds that a server may be busy or unreachable before a request is given up, with growing pauses.
    ``check`` is called after each failure and may raise: the owner of the server knows whether waiting makes sense.
    ``limit``: seconds without a byte of the answer to one request, after which the server is given up."""

    def __init__(
        self, base_url: str, key: str | None = None, patience: float = 60.0, check: Callable[[], None] = lambda: None
    ) -> None:
        url = urllib.parse.urlsplit(base_url)
        if url.scheme not in ("http", "https") or not url.hostname:
            raise UserError(f"{base_url}: not a server's address; expected http://HOST:PORT")
        self.base_url = base_url.rstrip("/")
        self.headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        self.patience, self.check, self.limit = patience, check, DAY
        # a proxy of the environment knows nothing of this machine's own ports
        loopback = url.hostname in ("127.0.0.1", "localhost", "::1")
        self.opener = urllib.request.build_opener(*([urllib.request.ProxyHandler({})] if loopback else []))

    def once(self, path: str, body: Any = None, timeout: float | None = None) -> Any:
        """One request, no retry: GET without a body, else POST."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.base_url + path, data, self.headers)
        with self.opener.open(request, timeout=timeout) as answer:
            return json.load(answer)

    def call(self, path: str, body: Any = None, limit: float | None = None) -> Any:
        """The answer's JSON. A generation may take hours, so that silence is waited for, up to ``limit`` (default: the
        client's); a lost connection and an error of the server are tried again."""
        begun, pause, where = time.monotonic(), 0.1, self.base_url + path
        limit = limit or self.limit
        while True:
            least = 0.0
            try:
                return self.once(path, body, limit)
            except urllib.error.HTTPError as error:
                problem = refusal(error)
                if error.code not in BUSY or UNREAD in problem:
                    raise UserError(f"{where}: {problem}") from None
                least = float(wanted) if (wanted := error.headers.get("Retry-After") or "").isdigit() else 0.0
            except TimeoutError:
                raise Unavailable(f"{where}: no answer to a request within {limit:,.0f} s; see to the server, or give "
                                "--timeout SECONDS") from None  # fmt: skip
            except (OSError, http.client.HTTPException) as error:  # refused, reset, closed before an answer
                problem = str(error) or type(error).__name__
            except ValueError as error:  # not JSON, not UTF-8
                raise UserError(f"{where}: the answer is not JSON ({' '.join(str(error).split())[:200]})") from None
            self.check()
            pause = max(pause, least)
            if time.monotonic() + pause > begun + self.patience:
                raise Unavailable(f"{where}: no answer within {self.patience:.0f} s ({problem})")
            time.sleep(pause)
            pause = min(2 * pause, 8.0)


def in_parallel(
    work: Callable[[int], T], count: int, workers: int, silent: Callable[[float], None] = lambda _: None
) -> Iterator[tuple[int, T]]:
    """(index, work(index)) for 0..count-1 as they finish, ``workers`` at a time; the first failure is raised here. ``silent``
    is told the seconds in which nothing finished, when they become FIRST_WORD and at each doubling.

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
            waited, word = 0.0, FIRST_WORD
            while True:
                try:
                    index, result, error = finished.get(timeout=word - waited)
                    break
                except queue.Empty:
                    silent(word)
                    waited, word = word, 2 * word
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


class ServerBackend(Backend):
    """Prompts rendered here, as many requests at once as ``parallel``. A subclass sends one in ``_complete``.

    ``context``: tokens of a prompt and its answer on any backend; ``served``: the server's, which may be shorter.
    ``timeout``: seconds for one answer (default: START and PER_TOKEN).
    """

    tokenizer: Any
    client: Client
    parallel: int
    context: int
    served: int | None = None
    timeout: float | None = None
    model: str | Path
    takes_tools = False  # the look at its template is done

    def render(self, messages: list[dict[str, str]]) -> str:
        return render_chat(self.tokenizer, messages)

    def generate(self, prompts: Sequence[str], sampling: Sampling) -> Iterator[tuple[int, Completion]]:
        self._limit(sampling)
        if self.served is not None and self.served < min(self.context, sampling.max_tokens):
            say(
                f"{self.client.base_url}: its context is {self.served:,} tokens where {self.context:,} are asked for; an "
                "answer that it cuts short will end the run"
            )
        work = lambda index: self._answer(prompts[index], sampling)  # noqa: E731
        return in_parallel(work, len(prompts), self.parallel, self._silent)

    def _limit(self, sampling: Sampling) -> None:
        self.client.limit = self.timeout or START + PER_TOKEN * sampling.max_tokens

    def _silent(self, seconds: float) -> None:
        limit = self.client.limit
        say(f"{self.client.base_url}: no answer for {seconds:,.0f} s; a request is given up after {limit:,.0f} s")

    def _complete(self, prompt: str, sampling: Sampling) -> Completion:
        raise NotImplementedError

    def _answer(self, prompt: str, sampling: Sampling) -> Completion:
        return self._converse(prompt, sampling) if isinstance(prompt, Dialogue) else self._complete(prompt, sampling)

    def _converse(self, dialogue: Dialogue, sampling: Sampling) -> Completion:
        """A dialogue with tools by the server's own chat template, whose calls are executed here; the text is its transcript.
        Where the server's context has no room for another reply it is cut: of new messages a token has a byte at least."""
        if not self.takes_tools:
            self._check_tools(dialogue)
        episode, tokens, first, held, known = Episode(dialogue.item), 0, 0, 0, 0
        while episode.open:
            messages, room = episode.sent(), sampling.max_tokens
            if held and self.served:
                room = min(room, self.served - held - len(json.dumps(messages[known:])))
            if room < 1:
                return Completion(episode.transcript(), tokens, first, "length")
            message, read, made = self._chat(messages, dialogue.tools, sampling, room)
            episode.take(message)
            tokens, first, held, known = tokens + made, first or read, read + made, len(messages) + 1
        return Completion(episode.transcript(), tokens, first, "length" if message.get("cut") == "length" else "stop")

    def _check_tools(self, dialogue: Dialogue) -> None:
        """Raise :class:`UserError` unless the chat template puts tools into the prompt, which then has more tokens."""
        hello: list[Turn] = [{"role": "user", "content": "Hello"}]
        (first, more, _), (_, less, _) = (self._chat(hello, tools, Sampling(), 1) for tools in (dialogue.tools, []))
        if more <= less and first.get("cut") != "unreadable":  # such a reply has a parser of calls, and no count
            raise UserError(
                f"{self.model}: its chat template does not know tools ({less} tokens of a prompt with and without them at "
                f"{self.client.base_url}); take another model, or serve it with a template that does (llama-server: "
                '--server-args "--chat-template-file FILE")'
            )
        self.takes_tools = True

    def _chat(self, messages: list[Turn], tools: Sequence[Any], sampling: Sampling, room: int) -> tuple[Turn, int, int]:
        """(the reply to a dialogue, tokens of the prompt, tokens generated)."""
        fields: dict[str, Any] = self._chat_fields() | {"messages": messages, "max_tokens": room, "top_p": sampling.top_p}
        fields |= {"temperature": sampling.temperature, "seed": seed_of(json.dumps(messages), sampling.seed) & 0x7FFFFFFF}
        fields |= ({"tools": list(tools)} if tools else {}) | ({"top_k": sampling.top_k} if sampling.top_k is not None else {})
        try:
            answer = self.client.call("/chat/completions", fields)
        except UserError as error:
            if UNREAD not in str(error):
                raise
            return {"role": "assistant", "content": "", "cut": "unreadable", "why": str(error)}, 0, 0
        return read_reply(answer, f"{self.client.base_url}/chat/completions", f"call{len(messages):03d}")

    def _chat_fields(self) -> dict[str, Any]:
        """What every request of a dialogue holds. Thinking is on where a template leaves the choice, as :data:`CHAT` has it."""
        known = {key: value for key, value in CHAT.items() if isinstance(value, bool)}
        return NEUTRAL | {"cache_prompt": False, "chat_template_kwargs": known}

    def _room(self, ids: Sequence[int], sampling: Sampling) -> tuple[int, int]:
        """(tokens that may follow, how many of them the server has room for)."""
        room = min(sampling.max_tokens, self.context - len(ids))
        held = room if self.served is None else min(room, self.served - len(ids))
        if held < 1:
            least = self.context if self.served is None else min(self.context, self.served)
            raise UserError(f"a prompt has {len(ids)} tokens; the server's context is {least}")
        return room, held

    def _checked_length(self, done: Completion, room: int) -> Completion:
        """Raise :class:`UserError` when an answer was cut before the length that was asked for."""
        if done.finish_reason == "length" and done.tokens < room:
            context = f"its context is {self.served:,}" if self.served else "a limit of its own"
            raise UserError(
                f"{self.client.base_url}: an answer was cut at {done.tokens:,} tokens where {room:,} were asked: {context}; "
                "raise the server's limit, else answers that it cuts would count as wrong"
            )
        return done


def of_kind(value: Any, kind: type | tuple[type, ...], where: str) -> Any:
    """``value``, or a :class:`UserError` when a server's JSON has something else there."""
    if not isinstance(value, kind) or isinstance(value, bool):
        raise UserError(f"{where} is {json.dumps(value)[:80]}; expected what /completions of OpenAI's API answers")
    return value


def logprobs_of(told: Any, rows: Sequence[dict[str, Any]]) -> list[Any]:
    """Of each generated token: from llama-server's rows, else as vLLM and SGLang tell them; [] where they are not told."""
    listed = told.get("token_logprobs") if isinstance(told, dict) else None
    return [row.get("logprob") for row in rows] or listed or []


def finite_rows(told: Any, url: str) -> list[dict[str, Any]]:
    """The rows of an answer's log-probabilities, where it has some; :class:`UserError` if one is no number."""
    rows = told.get("content") if isinstance(told, dict) else None  # llama-server's form
    rows = rows if isinstance(rows, list) and all(isinstance(row, dict) for row in rows) else []
    if not all(isinstance(value, int | float) and math.isfinite(value) for value in logprobs_of(told, rows)):  # NaN is null
        raise UserError(f"{url}: a log-probability is no number: the server's logits are NaN or infinite, check its weights")
    return rows


def opened_answer(answer: Any, url: str) -> tuple[dict[str, Any], dict[str, Any], list[int]]:
    """(an answer, its choice, tokens of prompt and completion); anything else than one is a :class:`UserError`."""
    body = of_kind(answer, dict, f"{url}: the answer")
    if told := body.get("error"):
        message = told.get("message", told) if isinstance(told, dict) else told
        raise UserError(f"{url}: the server answered with an error: {' '.join(str(message).split())[:300]}")
    choices = of_kind(body.get("choices"), list, f"{url}: choices")
    choice = of_kind(choices[0] if choices else None, dict, f"{url}: choices[0]")
    usage = of_kind(body.get("usage"), dict, f"{url}: usage")
    return body, choice, [of_kind(usage.get(key), int, f"{url}: usage.{key}") for key in ("prompt_tokens", "completion_tokens")]


def read_reply(answer: Any, url: str, mark: str) -> tuple[Turn, int, int]:
    """(message, tokens of the prompt, tokens generated) of /chat/completions. A call without an id gets ``mark`` and two
    digits: nine letters and digits, which is what Mistral's templates ask for."""
    _, choice, counts = opened_answer(answer, url)
    said, reason = of_kind(choice.get("message"), dict, f"{url}: message"), choice.get("finish_reason")
    if reason not in ("stop", "tool_calls", "length"):
        raise UserError(f"{url}: finish_reason {reason!r}; expected stop, tool_calls or length")
    content = of_kind(said.get("content") or "", str, f"{url}: message.content")
    message: Turn = {"role": "assistant", "content": content}
    message |= {key: said[key] for key in ("reasoning_content", "reasoning") if isinstance(said.get(key), str)}
    calls = []
    for place, call in enumerate(of_kind(said.get("tool_calls") or [], list, f"{url}: tool_calls")):
        called = of_kind(of_kind(call, dict, f"{url}: tool_calls").get("function"), dict, f"{url}: tool_calls.function")
        name, arguments = of_kind(called.get("name"), str, f"{url}: function.name"), called.get("arguments")
        function = {"name": name, "arguments": of_kind(arguments, (str, dict), f"{url}: function.arguments")}
        calls.append({"id": call.get("id") or f"{mark}{place:02d}", "type": "function", "function": function})
    message |= ({"tool_calls": calls} if calls else {}) | ({"cut": "length"} if reason == "length" else {})
    return message, counts[0], counts[1]


@dataclass(frozen=True)
class Answer:
    """What /completions said. ``ids``: generated, by a server that tells them; ``model``: as it names what it served."""

    text: str
    reason: str
    prompt_tokens: int
    tokens: int
    ids: list[int] | None
    model: str | None
    logprobs: list[float]

    @classmethod
    def read(cls, answer: Any, url: str) -> Answer:
        """From the JSON of an answer; anything else than one is a :class:`UserError`."""
        body, choice, counts = opened_answer(answer, url)
        text = of_kind(choice.get("text"), str, f"{url}: choices[0].text")
        reason = choice.get("finish_reason")
        if reason not in ("stop", "length"):
            raise UserError(f"{url}: finish_reason {reason!r}; expected stop or length")
        rows = finite_rows(choice.get("logprobs"), url)
        ids = choice.get("token_ids") or [row.get("id") for row in rows]
        ids = ids if isinstance(ids, list) and ids and all(type(each) is int for each in ids) else None
        model = body.get("model")
        model = model if isinstance(model, str) else None
        return cls(text, reason, counts[0], counts[1], ids, model, logprobs_of(choice.get("logprobs"), rows))

    def other_than(self, first: Answer) -> str:
        """What tells that this greedy answer is not of the model that gave the first one to the same prompt; "" where rounding
        may explain it, or a tie of two tokens. Without log-probabilities the texts must be equal."""
        if not (self.ids and first.ids and self.logprobs and first.logprobs):
            return "" if self.text == first.text else f"answers {self.text!r} to a fixed prompt where it has {first.text!r}"
        pairs = zip(self.ids, self.logprobs, first.ids, first.logprobs, strict=False)
        for place, (token, value, expected, reference) in enumerate(pairs, 1):
            if token != expected and max(value, reference) < TIE:
                return ""
            if token != expected or abs(value - reference) > APART:
                told = f"token {token} (log-probability {value:.2f}) where it has {expected} ({reference:.2f})"
                return f"answers a fixed prompt with {told} in place {place}"
        return ""


def listed_identity(entry: dict[str, Any]) -> dict[str, Any]:
    """What tells one model from another in its entry of /models."""
    meta = entry.get("meta") if isinstance(entry.get("meta"), dict) else {}
    identity = {key: entry[key] for key in IDENTITY if key in entry}
    return identity | {key: meta[key] for key in IDENTITY_META if key in meta}


class OpenAIBackend(ServerBackend):
    """``plain`` leaves out the fields that OpenAI's own API does not know, top-k among them; then the server's defaults hold
    for them, and its text must still have every special token such as </think>."""

    name = "openai"

    def __init__(
        self, base_url: str, model: str, tokenizer: str | Path, context: int, *, key: str | None = None, parallel: int = 4,
        send_text: bool = False, plain: bool = False, timeout: float | None = None,
    ) -> None:  # fmt: skip
        self.tokenizer = load_tokenizer(tokenizer)
        self.ends = end_token_ids(tokenizer, self.tokenizer)
        self.directory, self.timeout = Path(tokenizer), timeout
        config = self.directory / "config.json"
        trained = text_config(read_json(config)).get("max_position_embeddings") if config.is_file() else None
        self.client, self.key = Client(base_url, key), key
        self.model, self.parallel, self.context = model, parallel, min(context, trained or context)
        self.send_text, self.plain = send_text, plain
        self.facts: dict[str, Any] = {}

    def describe(self) -> dict[str, Any]:
        return self.facts or self._open(self.render([{"role": "user", "content": "Hello"}]))

    def _open(self, prompt: str) -> dict[str, Any]:
        """The server's identity and what it is sent, by one look at /models and one request for one token, which may raise."""
        entry = self._listed()
        meta = entry.get("meta") if isinstance(entry.get("meta"), dict) else {}
        served = entry.get("max_model_len") or meta.get("n_ctx")  # of vLLM and SGLang; of llama-server
        self.served = served if isinstance(served, int) else None
        self.context = min(self.context, meta.get("n_ctx_train") or self.context)
        fields = self._fields([], "", Sampling(), 1)
        varying = {"prompt", "max_tokens", "temperature", "top_p", "top_k", "seed"}
        self.facts = {
            "base_url": self.client.base_url, "listed_model": listed_identity(entry), "served_model": self._probe(prompt).model,
            "tokenizer_sha256": tokenizer_files_sha256(self.directory), "prompt": "text" if self.send_text else "ids",
            "sent": sorted(fields), "sent_always": {key: fields[key] for key in fields if key not in varying},
        }  # fmt: skip
        return self.facts

    def _listed(self) -> dict[str, Any]:
        """The model's entry in /models: by its name, or the only one. A server without that page has none."""
        try:
            found = self.client.call("/models", limit=FIRST_WORD)
        except Unavailable:
            raise
        except UserError:
            return {}  # no such page; what else is wrong, the probe says
        rows = [row for row in found.get("data") or () if isinstance(row, dict)] if isinstance(found, dict) else []
        named = [row for row in rows if row.get("id") == self.model]
        return (named or rows)[0] if named or len(rows) == 1 else {}

    def _probe(self, prompt: str) -> Answer:
        """One token: the server answers in time, with numbers, and shows the token that ends a thought."""
        spelled = [self.tokenizer(ending, add_special_tokens=False)["input_ids"] for _, ending in THOUGHTS]
        ending = next((ids[0] for ids in spelled if len(ids) == 1 and ids[0] != self.tokenizer.unk_token_id), None)
        ids = self.tokenizer(prompt, add_special_tokens=False)["input_ids"]
        fields = self._fields(ids, prompt, Sampling(), 1)
        if ending is not None:
            fields["logit_bias"] = {str(ending): 100}
        answer = self._read(self.client.call("/completions", fields, START), ids)
        if ending is not None and answer.ids is None and not answer.text and answer.tokens == 1:
            raise UserError(
                f"{self.client.base_url}: the server leaves special tokens such as {self.tokenizer.decode([ending])} out of "
                "its text, so that no thought would end; start llama-server with --special, or leave out --plain-fields"
            )
        return answer

    def _fields(self, ids: Sequence[int], prompt: str, sampling: Sampling, room: int) -> dict[str, Any]:
        """The request. ``stop`` is OpenAI's own name for what vLLM takes by id."""
        fields: dict[str, Any] = {
            "model": self.model, "prompt": prompt if self.send_text else list(ids), "max_tokens": room,
            "temperature": sampling.temperature, "top_p": sampling.top_p, "seed": seed_of(prompt, sampling.seed) & 0x7FFFFFFF,
        }  # fmt: skip
        if self.plain:
            return fields | PENALTIES | {"stop": [self.tokenizer.decode([end]) for end in self.ends[:4]]}
        fields |= NEUTRAL | {"top_k": sampling.top_k, "skip_special_tokens": False, "add_special_tokens": False}
        return fields | {"stop_token_ids": self.ends, "return_token_ids": True, "logprobs": 1}

    def _chat_fields(self) -> dict[str, Any]:
        return {"model": self.model} | (PENALTIES if self.plain else super()._chat_fields())

    def _read(self, answer: Any, ids: Sequence[int]) -> Answer:
        url = self.client.base_url
        read = Answer.read(answer, url)
        if read.prompt_tokens != len(ids):
            raise UserError(
                f"{url}: the server read {read.prompt_tokens} prompt tokens where the tokenizer has {len(ids)}; "
                f"{'send ids, without --prompt-text' if self.send_text else 'give the tokenizer of its model'}"
            )
        served = self.facts.get("served_model")
        if self.facts and read.model != served:
            raise UserError(f"{url}: the server now answers as {read.model!r}, before as {served!r}; two models do not mix")
        return read

    def generate(self, prompts: Sequence[str], sampling: Sampling) -> Iterator[tuple[int, Completion]]:
        if prompts and not self.facts:
            self._open(prompts[0])
        return super().generate(prompts, sampling)

    def _complete(self, prompt: str, sampling: Sampling) -> Completion:
        ids = self.tokenizer(prompt, add_special_tokens=False)["input_ids"]
        room, held = self._room(ids, sampling)
        answer = self._read(self.client.call("/completions", self._fields(ids, prompt, sampling, held)), ids)
        if answer.tokens > held:
            raise UserError(f"{self.client.base_url}: {answer.tokens} tokens were made where at most {held} were asked for")
        if answer.ids is not None and answer.tokens - len(answer.ids) in (0, 1):  # one that ends by a stop tells no id of it
            done = completion_of(self.tokenizer, answer.ids, ids, self.ends)
            if done.finish_reason == "length" and answer.reason == "stop":
                done = replace(done, finish_reason="stop", tokens=answer.tokens)
        else:
            done = self._of_text(prompt, ids, answer)
        return self._checked_length(done, room)

    def _of_text(self, prompt: str, ids: Sequence[int], answer: Answer) -> Completion:
        """The text up to its first end token; it must hold as many tokens as were generated, up to another split of the same
        text into tokens (a fiftieth) and characters that were cut within their bytes."""
        ends, text = [self.tokenizer.decode([end]) for end in self.ends], answer.text
        count = len(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        open_thought = opens_thinking(prompt) and answer.reason == "stop" and not any(end in text for _, end in THOUGHTS)
        slack = (0 if open_thought else max(2, count // 50)) + 3 * text.count("\ufffd")
        if not -slack <= answer.tokens - count <= slack + 1:  # one more: the end token
            raise UserError(
                f"{self.client.base_url}: {answer.tokens} tokens were generated and the text has {count}: "
                f"{text[:40]!r}; the server leaves out special tokens or a thought, or changes the text. Start llama-server "
                "with --special, a server without a parser of thoughts; leave out --plain-fields"
            )
        at = min((place for end in ends if end and (place := text.find(end)) >= 0), default=len(text))
        reason = answer.reason if at == len(text) else "stop"
        return Completion(text[:at], answer.tokens, len(ids), reason, ids_sha256(ids))

    # ---- as one of several ----

    def at(self, base_url: str) -> OpenAIBackend:
        """The same model at another server, which nobody has looked at yet."""
        other = copy.copy(self)
        other.client, other.facts = Client(base_url, self.key, BRIEFLY), {}
        return other

    def look(self) -> tuple[dict[str, Any], Answer]:
        """(what of :meth:`describe` is the model's wherever it is served, the greedy answer to FIXED)."""
        prompt = self.render([{"role": "user", "content": FIXED}])
        facts = self._open(prompt)
        listed = {key: value for key, value in facts["listed_model"].items() if key != "root"}  # a path, of each node's own
        ids = self.tokenizer(prompt, add_special_tokens=False)["input_ids"]
        answer = self._read(self.client.call("/completions", self._fields(ids, prompt, Sampling(), FIXED_TOKENS), START), ids)
        return {key: value for key, value in facts.items() if key != "base_url"} | {"listed_model": listed}, answer

    def ping(self) -> None:
        """Raise :class:`Unavailable` unless the server answers within a minute, :class:`UserError` where it lists another
        model than it did."""
        if (now := listed_identity(self._listed())) != (then := self.facts["listed_model"]):
            raise UserError(f"{self.client.base_url}: lists the model as {now}, before as {then}")


class Dispatch:
    """Which of ``count`` items is where: it waits, is out at a server that is ``up``, or is answered, once. Nothing of threads,
    clocks or networks."""

    def __init__(self, count: int, up: set[str]) -> None:
        self.up, self.waiting = up, deque(range(count))
        self.out: dict[int, str] = {}
        self.answered: dict[int, str] = {}
        self.losses: Counter[int] = Counter()

    def take(self, server: str) -> int | None:
        """The next item for a server; None where none waits or the server is down."""
        if server not in self.up or not self.waiting:
            return None
        self.out[self.waiting[0]] = server
        return self.waiting.popleft()

    def lose(self, server: str, index: int | None = None) -> None:
        """An item waits again, before all others, if it is still out at a server; without an item all that are out there. The
        server gets no more until it is up."""
        self.up.discard(server)
        for each in [each for each, at in reversed(self.out.items()) if at == server and index in (None, each)]:
            del self.out[each]
            self.waiting.appendleft(each)
            self.losses[each] += 1

    def answer(self, server: str, index: int) -> bool:
        """Whether this is the item's first answer. A server that was taken for lost may still give it."""
        if index in self.answered:
            return False
        if self.out.pop(index, None) is None:
            self.waiting.remove(index)
        self.answered[index] = server
        return True


def read_addresses(addresses: str) -> list[str]:
    """The servers of --base-url: URL,URL,... or @FILE with one a line, where # begins a comment."""
    text = addresses
    if addresses.startswith("@"):
        try:
            text = Path(addresses[1:]).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--base-url {addresses}: {getattr(error, 'strerror', None) or 'not UTF-8'}") from None
    found = [line.partition("#")[0].split(",") for line in text.splitlines()]
    urls = list(dict.fromkeys(url.strip().rstrip("/") for line in found for url in line if url.strip()))
    if not urls:
        raise UserError(f"--base-url {addresses}: names no server; expected http://HOST:PORT/v1")
    for url in urls:
        Client(url)
    return urls


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """Servers of one model and how they are asked: options of eval.sh, keys of distill.sh."""

    base_url: str = setting("", "of the backend openai: http://localhost:8000/v1; of several: URL,URL or @FILE", file=True)
    tokenizer: Path | None = setting(None, "directory of tokenizer and chat template, where they are not the model's own")
    parallel: int = setting(4, "requests at once, at each server; slots of llama-server")
    timeout: float | None = setting(None, "seconds that a server may take for one answer (empty: 600, and 1 a token)")
    api_key_env: str = setting("", "environment variable that holds the server's key")

    def __post_init__(self) -> None:
        """Raise :class:`UserError` on values that make no sense."""
        if self.parallel < 1 or self.timeout is not None and not self.timeout > 0:
            raise UserError(f"--parallel {self.parallel}, --timeout {self.timeout}: must be at least 1, and above 0")

    @property
    def several(self) -> bool:
        return "," in self.base_url or self.base_url.startswith("@")

    def one(self, model: str, tokenizer: Path, context: int, **how: Any) -> OpenAIBackend:
        """How the model that servers call ``model`` is asked; it speaks to the first of them."""
        first, key = read_addresses(self.base_url)[0], api_key(self.api_key_env)
        return OpenAIBackend(first, model, tokenizer, context, key=key, parallel=self.parallel, timeout=self.timeout, **how)


Ask = Callable[[OpenAIBackend, int], Completion]
Finished = queue.SimpleQueue[tuple[int, Completion] | BaseException]


class OpenAIServers(Backend):
    """One model at several servers, each with ``one.parallel`` requests at once: an item goes to whichever is free.

    A server that fails or is silent for a minute loses its items to the others until it answers again as the first one did; one
    of another model, or whose answer is damaged, is refused for good. ``one``: how each is asked. A file is read again."""

    name = "openai"

    def __init__(self, addresses: str, one: OpenAIBackend) -> None:
        self.addresses, self.one, self.tokenizer, self.context = addresses, one, one.tokenizer, one.context
        self.servers = {url: one.at(url) for url in read_addresses(addresses)}
        self.change = threading.Condition()  # guards all below
        self.up: set[str] = set()
        self.dispatch = Dispatch(0, self.up)
        self.refused: dict[str, UserError] = {}
        self.silent: dict[str, str] = {}  # what was last said of a server that is down
        self.falls: Counter[str] = Counter()  # since its last answer
        self.epoch: Counter[str] = Counter()  # goes up when a server is lost: who waits for its answers then works no more
        self.answers: Counter[str] = Counter()
        self.lost = 0
        self.first: tuple[str, dict[str, Any], Answer] | None = None
        self.heard = time.monotonic()

    def render(self, messages: list[dict[str, str]]) -> str:
        return self.one.render(messages)

    def describe(self) -> dict[str, Any]:
        """Of the first server that answers, in the order of the list; all others must be like it."""
        while self.first is None:
            self._reread()
            for server in list(self.servers.values()):
                if self.first is None and server.client.base_url not in self.refused:
                    self._look_at(server)
            if self.first is None:
                self._check_any()
                time.sleep(LOOK)
        return self.first[1]

    def tally(self) -> dict[str, Any]:
        """For a record: the answers of each server, how many were refused, how often an item was asked again; of the last part
        of a run that was resumed."""
        return {"answers": sorted((self.answers[url] for url in self.servers.keys() | self.answers.keys()), reverse=True),
                "refused": len(self.refused), "asked_again": self.lost}  # fmt: skip

    def _check_any(self) -> None:
        """Raise when nothing can be hoped for: all are refused, none was up for START seconds, or an item ends them."""
        if self.servers.keys() <= self.refused.keys():
            raise list(self.refused.values())[-1]
        said = next((self.silent[url] for url in self.servers if url in self.silent), "")
        with self.change:
            often = max(self.dispatch.losses.values(), default=0) >= LOSSES
        if often:
            raise UserError(
                f"an item was lost by servers {LOSSES} times; it may be what ends them ({said or 'no answer to it'})"
            )
        if self.up:
            self.heard = time.monotonic()
        elif time.monotonic() > self.heard + START:
            problem = f"none of {len(self.servers)} servers answered for {START:,.0f} s"
            raise UserError(f"{problem} ({said}); the same command goes on from here")

    def _look_at(self, server: OpenAIBackend) -> None:
        """Whether a server is up, down or refused."""
        url = server.client.base_url
        try:
            if url in self.up:
                server.ping()
            else:
                self._compare(url, *server.look())
        except Unavailable as error:
            self._drop(url, error)
        except UserError as error:
            self._drop(url, error, refuse=True)
        else:
            with self.change:
                if url in self.servers and url not in self.up:
                    self.up.add(url)
                    if self.silent.pop(url, None):
                        say(f"{url}: answers again")
                self.change.notify_all()

    def _compare(self, url: str, facts: dict[str, Any], answer: Answer) -> None:
        """Raise unless a server says of its model what the first one says."""
        self.first = self.first or (url, facts, answer)
        where, expected, first = self.first
        told = next((f"{key} is {facts[key]} where it has {expected[key]}" for key in facts if facts[key] != expected[key]), "")
        if told := told or answer.other_than(first):
            raise UserError(f"{url}: not the model of {where}: {told}")

    def _drop(self, url: str, error: UserError, refuse: bool = False) -> None:
        """A server is lost, or refused for good, which is said."""
        with self.change:
            self.falls[url] += url in self.up
            self.dispatch.lose(url)
            self.epoch[url] += 1
            if refuse and url not in self.refused:
                self.refused[url] = error
                say(f"{error}. This server is not used")
            elif not refuse and url not in self.silent:
                self.silent[url] = str(error)
                say(f"{error}. Its items go to others")
            self.change.notify_all()

    def _reread(self) -> None:
        """Servers that are new in the file; those that are gone lose their items. A file without servers changes nothing."""
        if not self.addresses.startswith("@"):
            return
        try:
            urls = read_addresses(self.addresses)
        except UserError as error:
            if str(error) != self.silent.get("@"):
                say(f"{error}; the servers stay as they were")
            self.silent["@"] = str(error)
            return
        self.silent.pop("@", None)
        for url in self.servers.keys() - set(urls):
            with self.change:
                del self.servers[url]
                self.refused.pop(url, None)
            self._drop(url, Unavailable(f"{url}: no longer in {self.addresses[1:]}"))
        self.servers |= {url: self.one.at(url) for url in urls if url not in self.servers}

    def generate(self, prompts: Sequence[str], sampling: Sampling) -> Iterator[tuple[int, Completion]]:
        self.describe()
        own = self.dispatch = Dispatch(len(prompts), self.up)
        finished: Finished = queue.SimpleQueue()
        watched: dict[str, OpenAIBackend] = {}
        waited, word = time.monotonic(), FIRST_WORD

        def ask(server: OpenAIBackend, index: int) -> Completion:
            server._limit(sampling)
            return server._answer(prompts[index], sampling)

        try:
            for _ in prompts:
                while True:
                    self._reread()
                    for url, server in self.servers.items():
                        if watched.get(url) is not server:
                            watched[url] = server
                            threading.Thread(target=self._watch, args=(server, own, ask, finished), daemon=True).start()
                    self._check_any()
                    try:
                        result = finished.get(timeout=LOOK)
                        break
                    except queue.Empty:
                        pass
                    if time.monotonic() > waited + word:
                        say(f"no answer for {word:,.0f} s; {len(self.up)} of {len(self.servers)} servers are up")
                        word *= 2
                if isinstance(result, BaseException):
                    raise result
                yield result
                self.heard, waited, word = time.monotonic(), time.monotonic(), FIRST_WORD
        finally:
            with self.change:
                self.lost += sum(own.losses.values())
                self.dispatch = Dispatch(0, self.up)
                self.change.notify_all()

    def _watch(self, server: OpenAIBackend, own: Dispatch, ask: Ask, finished: Finished) -> None:
        """Looks at a server while ``own`` is what is done, and sets threads to work when it comes up."""
        url, staffed = server.client.base_url, -1
        while self.dispatch is own and self.servers.get(url) is server and url not in self.refused:
            self._look_at(server)
            if url in self.up and staffed != self.epoch[url]:
                staffed = self.epoch[url]
                for _ in range(server.parallel):
                    call = (server, staffed, own, ask, finished)
                    threading.Thread(target=self._work, args=call, daemon=True).start()
            time.sleep(LOOK * 2 ** min(self.falls[url], 6) if url not in self.up else LOOK)

    def _work(self, server: OpenAIBackend, epoch: int, own: Dispatch, ask: Ask, finished: Finished) -> None:
        """One request after another. An answer that comes late, of a server that was taken for lost, is as good."""
        url = server.client.base_url
        while True:
            with self.change:
                while True:
                    if self.dispatch is not own or self.epoch[url] != epoch:
                        return
                    if (index := own.take(url)) is not None:
                        break
                    self.change.wait()
            try:
                done = ask(server, index)
            except Unavailable:  # what is wrong, the next look says
                with self.change:
                    self.falls[url] += url in self.up
                    own.lose(url, index)
                    self.change.notify_all()
            except UserError as error:
                self._drop(url, error, refuse=True)
            except BaseException as error:  # noqa: BLE001 - handed to the caller, who raises it
                finished.put(error)
                return
            else:
                with self.change:
                    first = url not in self.refused and own.answer(url, index)
                    self.falls[url] = 0
                    self.answers[url] += first
                if first:
                    finished.put((index, done))
