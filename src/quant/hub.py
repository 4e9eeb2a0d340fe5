"""A model of the hub, read where it lies: `hf:ORG/NAME@COMMIT` is a directory whose shards hold their headers and nothing else.

Not a command. `opened(settings)` makes that directory once, in $MOE_LOWBIT_CACHE or ~/.cache/moe-lowbit: the small files by
huggingface_hub, of every shard the header by ranged requests before a hole of the right size, and .hub.json with the commit and
every file's size and digest as the hub tells them. Whatever reads a directory works on it, tools of others included; a
:class:`Checkpoint` of it fetches each tensor when it is read. What a pass is about to read (:meth:`Remote.expect`) is fetched
ahead of it, in several ranges at once, and let go when it was read, unless HUB_CACHE_GIB keeps it.

The requests are huggingface_hub's session, token, links and errors. Its own readers do not fit: http_get loses up to 10 MiB of
what a cut answer has brought and gives up on 5xx, and HfFileSystem asks the hub for a new link with every range.
"""

from __future__ import annotations

import bisect
import collections
import contextlib
import dataclasses
import hashlib
import os
import queue
import re
import shutil
import sys
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import filelock
import torch

from console import SourceError, UserError, read_json, read_object, write_json, writing
from safetensors_file import INDEX, SINGLE, TensorInfo
from settings import setting

T = TypeVar("T")
MARK = ".hub.json"
SPELLED = re.compile(r"hf:([^/@\s]+/[^/@\s]+)(?:@([^@\s]+))?")
WEIGHT_SUFFIXES = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".npz"}
MAX_SIDECAR_BYTES = 64 << 20  # the largest tokenizers are about half of it
HEADER_BYTES = 256 << 10  # asked for first: most headers are smaller
RANGE_BYTES, CONNECTIONS = 16 << 20, 8  # of one request, and requests at once
AHEAD_BYTES = 1 << 30  # fetched ahead of a pass that reads tensor by tensor
READ_BYTES = 1 << 18
LINK_SECONDS = 600  # a hub's links expire, after an hour or so
WAITS = (1, 2, 4, 8, 16, 32, 60, 60)  # seconds between tries that brought nothing
SAID_SECONDS = 8  # a wait of this length is said
FINAL = (400, 401, 403, 404, 410, 416, 451)  # answers that another try does not change, with a fresh link


@dataclasses.dataclass(frozen=True)
class HubSettings:
    """How a model of the hub is read."""

    hub_cache_gib: float = setting(
        0.0, "with `MODEL=hf:ORG/NAME@COMMIT`: disk for what is read more than once; 0 fetches it again"
    )

    def __post_init__(self) -> None:
        if not 0 <= self.hub_cache_gib < float("inf"):
            raise UserError(f"--hub-cache-gib {self.hub_cache_gib} must be 0 or above")


# ---------------------------------------------------------------- requests


def client_errors() -> tuple[type[Exception], ...]:
    """What huggingface_hub's HTTP client raises: its own errors, no network, no answer, a broken one."""
    from huggingface_hub.errors import HfHubHTTPError

    return tuple(kind for kind in HfHubHTTPError.__bases__ if issubclass(kind, Exception))


@contextlib.contextmanager
def explained(repository: str, name: str = "") -> Iterator[None]:
    """The hub's errors, each as one line that says what to do."""
    from huggingface_hub import constants, errors

    kinds: tuple[type[Exception], ...] = (errors.EntryNotFoundError, errors.HFValidationError, *client_errors())
    try:
        yield
    except kinds as error:
        if isinstance(error, errors.LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
            error = error.__cause__  # of no connection: the entry may well be there
        what, page = f"{repository}/{name}" if name else repository, f"{constants.ENDPOINT}/{repository}"
        why = " ".join(str(error).split())[:120] or type(error).__name__
        code = getattr(getattr(error, "response", None), "status_code", None)
        mends = (  # the first that fits; the last is of its HTTP client: no network, no answer, a broken one
            (errors.GatedRepoError, f"gated; accept its terms on {page}, then hf auth login (or set HF_TOKEN)"),
            (errors.RevisionNotFoundError, "no such revision (branch, tag or commit); leave it out for main"),
            (errors.EntryNotFoundError, "no such file in the repository; leave the name out to list what is there"),
            (errors.RepositoryNotFoundError, "no such repository, or a private one: check the name, or hf auth login"),
            (errors.HFValidationError, f"not the name of a repository ({why})"),
            (errors.OfflineModeIsEnabled, "HF_HUB_OFFLINE is set; unset it to download"),
            (errors.HfHubHTTPError, f"the hub answered HTTP {code}; run the same command again later to go on"),
            (Exception, f"cannot be fetched from {constants.ENDPOINT} ({why}); get the machine on line (or set HF_ENDPOINT) "
             "and run the same command again: it goes on where it stopped"),
        )  # fmt: skip
        raise SourceError(f"{what}: {next(mend for kind, mend in mends if isinstance(error, kind))}") from None


def patient(ask: Callable[[], T], connected: bool = True) -> T:
    """What ``ask`` answers, asked again, with growing waits, where the hub is busy or (``connected``) cannot be reached."""
    from huggingface_hub.errors import OfflineModeIsEnabled

    for wait in WAITS:
        try:
            return ask()
        except OfflineModeIsEnabled:
            raise
        except client_errors() as error:
            response = getattr(error, "response", None)
            if response.status_code in FINAL if response is not None else not connected:
                raise
            pause(error, wait)
    return ask()


def pause(error: Exception, least: int) -> None:
    """Wait ``least`` seconds, or as long as the hub's answer asks for; a long wait is said."""
    response = getattr(error, "response", None)
    told = response.headers.get("Retry-After", "") if response is not None else ""
    seconds = max(least, int(told) if told.isdecimal() else 0)
    if seconds >= SAID_SECONDS:
        print(f"hub: {' '.join(str(error).split())[:120]}; asked again in {seconds} s", file=sys.stderr, flush=True)
    time.sleep(seconds)


class Link:
    """Where a file of a repository lies for now: the hub's links to its storage expire."""

    def __init__(self, repository: str, name: str, revision: str, size: int | None = None, digest: str | None = None) -> None:
        self.repository, self.name, self.revision, self.size, self.digest = repository, name, revision, size, digest
        self._lock = threading.Lock()
        self._known: tuple[str, dict[str, str]] | None = None
        self._until = 0.0

    def metadata(self) -> tuple[Any, dict[str, str]]:
        """(the hub's metadata with a fresh link, headers to ask that link with)."""
        from huggingface_hub import get_hf_file_metadata, hf_hub_url
        from huggingface_hub.utils import build_hf_headers

        url = hf_hub_url(self.repository, self.name, revision=self.revision)
        metadata = get_hf_file_metadata(url)
        headers = dict(build_hf_headers())
        if urllib.parse.urlsplit(metadata.location).netloc != urllib.parse.urlsplit(url).netloc:
            headers.pop("authorization", None)  # the token is the hub's, not its storage's
        return metadata, headers

    def located(self, fresh: bool = False) -> tuple[str, dict[str, str]]:
        """(address, headers); another file than before is a :class:`UserError`."""
        with self._lock:
            if fresh or self._known is None or time.monotonic() > self._until:
                metadata, headers = self.metadata()
                if self.size is not None and (metadata.size, metadata.etag) != (self.size, self.digest or metadata.etag):
                    raise UserError(
                        f"{self.repository}/{self.name}: the hub now has another file under this commit than it told first "
                        f"({metadata.size} bytes, {metadata.etag}); remove the directory of the model and begin again"
                    )
                self._known, self._until = (metadata.location, headers), time.monotonic() + LINK_SECONDS
            return self._known

    def stream(self, begin: int, end: int, write: Callable[[bytes], Any], wanted: Callable[[], bool] = lambda: True) -> None:
        """Give ``write`` the bytes from ``begin`` to ``end`` in order. What was cut off, is refused for now or stalls goes on
        at the byte, after growing waits while nothing comes."""
        from huggingface_hub import constants
        from huggingface_hub.errors import OfflineModeIsEnabled
        from huggingface_hub.utils import get_session, hf_raise_for_status

        tries, fresh = 0, False
        while begin < end and wanted():
            before = begin
            try:
                url, headers = self.located(fresh)
                asked = headers | {"Range": f"bytes={begin}-{end - 1}", "Accept-Encoding": "identity"}
                timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
                with get_session().stream("GET", url, headers=asked, timeout=timeout) as response:
                    hf_raise_for_status(response)
                    told = response.headers.get("Content-Range", "")
                    if response.status_code != 206 or not told.startswith(f"bytes {begin}-"):
                        raise UserError(f"{self.repository}/{self.name}: the server does not know ranges of a file")
                    for data in response.iter_raw(READ_BYTES):
                        if begin + len(data) > end:
                            raise UserError(f"{self.repository}/{self.name}: the server sends more than it was asked for")
                        write(data)
                        begin += len(data)
                        if not wanted():
                            return
            except client_errors() as error:
                response = getattr(error, "response", None)
                final = response is not None and response.status_code in FINAL and (fresh or self._known is None)
                final = final or isinstance(error, OfflineModeIsEnabled)
                tries = 0 if begin > before else tries + 1
                if final or tries > len(WAITS):
                    with explained(self.repository, self.name):
                        raise
                pause(error, WAITS[max(tries - 1, 0)])
                fresh = True


# ---------------------------------------------------------------- the directory of a model


def spelled(model: object) -> bool:
    """Whether a model is named as one of the hub."""
    return str(model).startswith("hf:")


def directory_of(repository: str, commit: str) -> Path:
    """Called NAME, as a directory of the model would be: llama.cpp's converter writes it into the file."""
    home = Path(os.environ.get("MOE_LOWBIT_CACHE") or Path.home() / ".cache" / "moe-lowbit")
    owner, name = repository.split("/")
    return home / "hub" / owner / commit / name


def make_directory(text: str) -> Path:
    """The directory of ``hf:ORG/NAME[@REVISION]``, made unless it is there. Without a commit the hub is asked for the one that
    the revision (main) has now, which is printed."""
    from huggingface_hub import HfApi

    if not (found := SPELLED.fullmatch(text)):
        raise UserError(f"{text}: not a model of the hub; expected hf:ORG/NAME@COMMIT")
    repository, revision = found[1], found[2] or "main"
    if (directory_of(repository, revision) / MARK).is_file():
        return directory_of(repository, revision)
    with explained(repository):
        told = patient(
            lambda: HfApi().model_info(repository, revision=revision, files_metadata=True, timeout=30), connected=False
        )
    name, commit = told.id, told.sha or ""
    if name != repository:
        raise UserError(f"{text}: the repository is now called {name}; give hf:{name}@{commit}")
    if commit != revision:
        print(f"{text}: taken as hf:{repository}@{commit}", flush=True)
    files = {file.rfilename: file for file in told.siblings or () if "/" not in file.rfilename}
    directory = directory_of(repository, commit)
    with writing(directory):
        directory.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(directory.with_name(f"{directory.name}.lock")):
        if not (directory / MARK).is_file():
            _fill(directory, repository, commit, files)
    return directory


def _fill(directory: Path, repository: str, commit: str, files: Mapping[str, Any]) -> None:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()
    small = [
        name
        for name, file in files.items()
        if Path(name).suffix not in WEIGHT_SUFFIXES and not name.startswith(".") and (file.size or 0) <= MAX_SIDECAR_BYTES
    ]

    def download(name: str) -> None:
        with explained(repository, name):
            patient(lambda: hf_hub_download(repository, name, revision=commit, local_dir=directory))

    with ThreadPoolExecutor(CONNECTIONS) as pool:
        list(pool.map(download, small))
        shutil.rmtree(directory / ".cache", ignore_errors=True)  # hf_hub_download's notes
        named = {SINGLE}
        if (directory / INDEX).is_file() and isinstance(index := read_json(directory / INDEX), dict):
            named |= set(map(str, (index.get("weight_map") or {}).values()))
        shards = {name: files[name] for name in sorted(named & files.keys())}
        told = {
            name: {"size": file.size, "digest": file.lfs.sha256 if file.lfs else file.blob_id} for name, file in shards.items()
        }
        links = [Link(repository, name, commit, file["size"], file["digest"]) for name, file in told.items()]
        list(pool.map(lambda link: _write_header(link, directory / link.name), links))
    write_json(directory / MARK, {"repository": repository, "commit": commit, "files": told})


def _write_header(link: Link, file: Path) -> None:
    """A shard as its header before a hole."""
    size, head = link.size or 0, bytearray()
    link.stream(0, min(size, HEADER_BYTES), head.extend)
    length = 8 + int.from_bytes(head[:8], "little")
    if length > size:
        raise UserError(f"{link.repository}/{link.name}: truncated, or not a safetensors file")
    link.stream(len(head), length, head.extend)
    with writing(file), file.open("wb") as stream:
        stream.write(head[:length])
        stream.truncate(size)


# ---------------------------------------------------------------- tensors


@dataclasses.dataclass(frozen=True, kw_only=True)
class RemoteInfo(TensorInfo):
    """A tensor whose bytes are fetched when they are read."""

    remote: Remote = dataclasses.field(compare=False, repr=False)

    def _load(self, view: memoryview, offset: int) -> None:
        self.remote.read(self.file.name, offset, view)


class Run:
    """Bytes of one file that one request brings. ``left``: those that nobody has read yet."""

    def __init__(self, name: str, begin: int, end: int, view: memoryview | None = None) -> None:
        self.name, self.begin, self.end, self.view = name, begin, end, view
        self.own, self.readers = view is None, 0  # whether its bytes are in memory of its own
        self.left, self.asked, self.wanted = end - begin, False, True
        self.done = threading.Event()
        self.error: BaseException | None = None

    @property
    def key(self) -> tuple[str, int, int]:
        return self.name, self.begin, self.end

    def __enter__(self) -> Run:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> bool:
        self.error = error  # for whoever reads it
        self.done.set()
        return True


def runs_of(infos: Iterable[TensorInfo], seen: set[tuple[str, int]]) -> Iterator[Run]:
    """What is stored of tensors, but for what was ``seen`` before, in the order of the files, neighbours joined, in runs of at
    most RANGE_BYTES."""
    found = {(i.file.name, i.begin): i.end for info in infos for i in info.stored() if i.bytes}
    spans: list[list[Any]] = []
    for name, begin in sorted(found.keys() - seen):
        if spans and spans[-1][0] == name and spans[-1][2] == begin:
            spans[-1][2] = found[name, begin]
        else:
            spans.append([name, begin, found[name, begin]])
    seen |= found.keys()
    for name, begin, end in spans:
        for start in range(begin, end, RANGE_BYTES):
            yield Run(name, start, min(start + RANGE_BYTES, end))


class Cache:
    """Ranges of files on disk, FILE.BEGIN-END each, at most ``limit`` bytes; the one that was used longest ago goes first."""

    def __init__(self, directory: Path, limit: int) -> None:
        self.directory, self.limit, self.lock = directory, limit, threading.Lock()
        self.sizes: collections.OrderedDict[tuple[str, int], int] = collections.OrderedDict()
        self.begins: dict[str, list[int]] = collections.defaultdict(list)
        if not limit:
            shutil.rmtree(directory, ignore_errors=True)
            return
        with writing(directory):
            directory.mkdir(exist_ok=True)
        for file in sorted(directory.iterdir(), key=lambda file: file.stat().st_mtime):
            found = re.fullmatch(r"(.+)\.(\d+)-(\d+)", file.name)
            if found and file.stat().st_size == int(found[3]) - int(found[2]):
                self._enter(found[1], int(found[2]), int(found[3]))
            elif not file.name.endswith(".new") or time.time() - file.stat().st_mtime > LINK_SECONDS:  # of a killed command
                file.unlink(missing_ok=True)
        self._make_room(0)

    def _file(self, name: str, begin: int, size: int) -> Path:
        return self.directory / f"{name}.{begin}-{begin + size}"

    def _enter(self, name: str, begin: int, end: int) -> None:
        self.sizes[name, begin] = end - begin
        bisect.insort(self.begins[name], begin)

    def _make_room(self, size: int) -> None:
        while self.sizes and sum(self.sizes.values()) + size > self.limit:
            (name, begin), old = self.sizes.popitem(last=False)
            self.begins[name].remove(begin)
            self._file(name, begin, old).unlink(missing_ok=True)

    def read(self, name: str, begin: int, view: memoryview) -> int:
        """How many bytes from ``begin`` on are here, and now in ``view``; negative: so many are not."""
        with self.lock:
            place = bisect.bisect_right(self.begins[name], begin)
            if place:
                start = self.begins[name][place - 1]
                size = self.sizes[name, start]
                if begin < start + size:
                    self.sizes.move_to_end((name, start))
                    with contextlib.suppress(FileNotFoundError), self._file(name, start, size).open("rb") as stream:
                        stream.seek(begin - start)
                        return stream.readinto(view[: start + size - begin])
                    del self.sizes[name, start]  # another command made room
                    self.begins[name].remove(start)
                    place -= 1
            following = self.begins[name][place] if place < len(self.begins[name]) else begin + len(view)
            return begin - min(following, begin + len(view))

    def keep(self, name: str, begin: int, view: memoryview) -> None:
        with self.lock:
            if len(view) > self.limit or (name, begin) in self.sizes:
                return
            self._make_room(len(view))
            file = self._file(name, begin, len(view))
            with writing(file):
                new = file.with_name(f".{os.getpid()}.new")  # another command may write here too
                self.directory.mkdir(exist_ok=True)
                new.write_bytes(view)
                new.rename(file)
            self._enter(name, begin, begin + len(view))


class Remote:
    """The shards of one model of the hub, for one command. Several threads may read."""

    def __init__(self, directory: Path, cache_bytes: int = 0) -> None:
        told = read_object(directory / MARK, "repository", "commit", "files")
        self.directory, self.repository, self.commit, self.files = directory, told["repository"], told["commit"], told["files"]
        self.links = {n: Link(self.repository, n, self.commit, f["size"], f["digest"]) for n, f in self.files.items()}
        self.cache = Cache(directory / "cache", cache_bytes)
        self.fetched = 0  # bytes over the network
        self.lock = threading.Lock()
        self.window: dict[str, list[Run]] = {}
        self.coming: collections.deque[Run] = collections.deque()
        self.held, self.budget = 0, 0
        self.requests: queue.PriorityQueue[tuple[int, int, Run]] = queue.PriorityQueue()
        self.count, self.started = 0, False
        self.whole, self.right = False, 0  # whether shards pass whole and in order; how many did and had their SHA-256
        self.passed: dict[str, tuple[int, Any]] = {}

    @property
    def uri(self) -> str:
        return f"hf:{self.repository}@{self.commit}"

    @property
    def identity(self) -> dict[str, str]:
        """The commit, and "SIZE:DIGEST" of every shard, as the hub tells them."""
        shards = {name: f"{file['size']}:{file['digest']}" for name, file in self.files.items()}
        return {"commit": self.uri, **shards}

    def tensor(self, info: TensorInfo) -> TensorInfo:
        return RemoteInfo(info.dtype, info.shape, info.file, info.begin, info.end, remote=self)

    def expect(self, groups: Sequence[Sequence[TensorInfo]], budget: int | None = None, whole: bool = False) -> None:
        """Fetch ahead what will be read next, in this order: all of it, or at most ``budget`` bytes at a time. What an earlier
        call has named and this one does not is let go. ``whole``: it is all that is read, once, so digests can be taken."""
        with self.lock:
            before = {run.key: run for runs in self.window.values() for run in runs if run.error is None}
            seen: set[tuple[str, int]] = set()
            runs = [before.pop(run.key, run) for group in groups for run in runs_of(group, seen)]
            for run in before.values():
                run.wanted = run.readers > 0
            self.window = {}
            for run in runs:
                self.window.setdefault(run.name, []).append(run)
            self.coming = collections.deque(run for run in runs if not run.asked)
            self.held = sum(run.end - run.begin for run in runs if run.asked)
            self.budget = sys.maxsize if budget is None else budget
            self.whole = whole
            self._advance()

    def _advance(self) -> None:
        while self.coming and (self.coming[0].asked or self.held + self.coming[0].left <= self.budget):
            run = self.coming.popleft()
            if not run.asked:
                self.held += run.end - run.begin
                self._ask(run, 1)

    def _ask(self, run: Run, priority: int) -> None:
        if not self.started:
            self.started = True
            for _ in range(CONNECTIONS):  # a process that ends waits for no daemon
                threading.Thread(target=self._work, daemon=True).start()
        run.asked = True
        self.count += 1
        self.requests.put((priority, self.count, run))

    def _work(self) -> None:
        while True:
            with self.requests.get()[2] as run:
                if run.wanted:
                    self._fetch(run)

    def _fetch(self, run: Run) -> None:
        view = run.view = run.view if run.view is not None else memoryview(bytearray(run.end - run.begin))
        place = 0
        while place < len(view) and run.wanted:
            there = self.cache.read(run.name, run.begin + place, view[place:])
            if there < 0:
                first, stop = place, place - there

                def write(data: bytes) -> None:
                    nonlocal place
                    view[place : place + len(data)] = data
                    place += len(data)

                self.links[run.name].stream(run.begin + first, run.begin + stop, write, lambda: run.wanted)
                with self.lock:
                    self.fetched += place - first
                if place == stop:
                    self.cache.keep(run.name, run.begin + first, view[first:stop])
            place += max(there, 0)

    def read(self, name: str, offset: int, view: memoryview) -> None:
        """Fill ``view`` with the bytes of a shard from ``offset`` on."""
        at, end, parts = offset, offset + len(view), []
        with self.lock:
            for run in [run for run in self.window.get(name, ()) if run.begin < end and run.end > offset]:
                parts += self._direct(name, at, max(at, run.begin), offset, view)
                parts.append(run)
                run.readers += 1
                if not run.asked:  # out of its order
                    self.held += run.end - run.begin
                    self._ask(run, 0)
                at = run.end
            parts += self._direct(name, at, end, offset, view)
        for run in parts:
            run.done.wait()
            if run.error is not None:
                raise run.error
            if run.own and run.view is not None:
                low, high = max(offset, run.begin), min(end, run.end)
                view[low - offset : high - offset] = run.view[low - run.begin : high - run.begin]
                with self.lock:
                    run.readers -= 1
                    run.left -= high - low
                    if run.left <= 0 and run in self.window.get(name, ()):
                        self.window[name].remove(run)
                        self.held -= run.end - run.begin
                        self._advance()
        if self.whole:
            self._pass(name, offset, view)

    def _direct(self, name: str, begin: int, end: int, offset: int, view: memoryview) -> list[Run]:
        """Runs that nobody has expected, into their place in ``view``."""
        runs = []
        for start in range(begin, end, RANGE_BYTES):
            stop = min(start + RANGE_BYTES, end)
            runs.append(Run(name, start, stop, view[start - offset : stop - offset]))
            self._ask(runs[-1], 0)
        return runs

    def _pass(self, name: str, offset: int, view: memoryview) -> None:
        """Take the digest of a shard that passes in order; at its end it must be the one that the hub tells."""
        size, digest = self.files[name]["size"], self.files[name]["digest"]
        position, hashed = self.passed.get(name, (0, None))
        if hashed is None:
            with (self.directory / name).open("rb") as stream:
                length = 8 + int.from_bytes(stream.read(8), "little")
                stream.seek(0)
                if offset != length:
                    return
                # a file that is not in LFS has git's digest
                hashed = hashlib.sha256() if len(digest) == 64 else hashlib.sha1(f"blob {size}\0".encode())
                hashed.update(stream.read(length))
                position = length
        if offset != position:
            return
        hashed.update(view)
        self.passed[name] = (position + len(view), hashed)
        if position + len(view) == size:
            if hashed.hexdigest() != digest:
                raise UserError(
                    f"{self.repository}/{name}: what came has SHA-256 {hashed.hexdigest()}, the hub tells {digest}; "
                    "nothing made of it is kept, run the same command again"
                )
            self.right += 1

    def report(self) -> str:
        """What was fetched and checked, as a line of text."""
        count = len(self.files)
        checked = f"; {self.right} of {count} shards passed whole, with the SHA-256 that the hub tells" if self.whole else ""
        return f"{self.uri}: {self.fetched / 1e6:,.2f} MB fetched{checked}"

    @contextlib.contextmanager
    def filled(self, infos: Iterable[TensorInfo]) -> Iterator[None]:
        """The directory with these tensors on disk, for a tool that reads them there; afterwards shards are headers again. One
        command at a time: the next would find holes where this one's shards are headers again."""
        found = [stored for info in infos for stored in info.stored()]
        with filelock.FileLock(self.directory.with_name(f".{self.directory.name}.lock")):
            yield from self._filled(found)

    def _filled(self, found: Sequence[TensorInfo]) -> Iterator[None]:
        try:
            for info in found:
                with writing(info.file), info.file.open("r+b") as stream:
                    stream.seek(info.begin)
                    stream.write(info.read().flatten().view(torch.uint8).numpy().data)
            yield
        finally:
            for file in {info.file for info in found}:
                with file.open("rb") as stream:
                    length = 8 + int.from_bytes(stream.read(8), "little")
                size = file.stat().st_size
                os.truncate(file, length)
                os.truncate(file, size)


_open: dict[Path, Remote] = {}


def remote_of(directory: Path) -> Remote | None:
    """The shards of a directory of :func:`make_directory`: those that this command has opened; None for another directory."""
    if not (directory / MARK).is_file():
        return None
    if (directory := directory.resolve()) not in _open:
        _open[directory] = Remote(directory)
    return _open[directory]


def opened(settings: T) -> T:
    """The settings of a command (with ``model`` and ``hub``) with a model of the hub as its directory; its command line, which
    a record holds, names the commit."""
    given: Any = settings
    if not spelled(given.model):
        return settings
    directory = make_directory(str(given.model))
    _open[directory.resolve()] = remote = Remote(directory.resolve(), int(given.hub.hub_cache_gib * 2**30))
    sys.argv[1:] = [remote.uri if text == str(given.model) else text for text in sys.argv[1:]]
    return dataclasses.replace(given, model=directory)
