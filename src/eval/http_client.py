"""Requests to a completion server: JSON over HTTP with retries, and many of them at once. Standard library only.

Not a command. ``Client(url).call("/completion", {...})``; ``in_parallel(work, count, workers)`` yields results as they finish.
"""

from __future__ import annotations

import http.client
import json
import queue
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from console import UserError

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
