"""A corpus of real text from pinned packages of the Python package index and of Debian (bash pipelines/make_text.sh):

    python src/distill/tiny_corpus.py --sources configs/text_sources.txt --out work/text [--result F --tag T]

A line of the list is "SPLIT INDEX NAME VERSION SHA256"; a package is of one split, so nothing of a held-out one is seen in
training. What an index no longer has is said and skipped. OUT gets packages/ (the archives, kept), SPLIT.jsonl.gz (one
document a line: package, path, stratum, text), tokenizer/ (byte-level BPE trained on the training split) and, per split,
SPLIT.bin (uint16, an end of text behind each document) with SPLIT.json: where each begins, its stratum and its package.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import gzip
import hashlib
import html.parser
import io
import itertools
import json
import logging
import os
import random
import re
import shutil
import subprocess
import tarfile
import tempfile
import time
import unicodedata
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerFast

from console import UNWRITABLE, UserError, atomic_path, file_sha256, progress, read_text, run_cli, write_json
from records import add_record_arguments, check_record_arguments, write_result
from tasks_text import read_rows
from tiny_data import STRATA, ids_entry, trained_bpe

SPLITS = ("train", "calibration", "heldout")
SUFFIXES = {
    "prose": "rst txt md adoc html htm pod",
    "code": "py pyx pxd c h cc cpp hpp js ts java f f90 go rs sh sql pl pm rb php lua el m",
    "structured data": "json yaml yml toml cfg ini csv xml proto css",
}  # fmt: skip
STRATUM = {suffix: stratum for stratum, suffixes in SUFFIXES.items() for suffix in suffixes.split()}
MANUAL = re.compile(r"(?:^|/)man/(?:([a-z]{2}(?:_[A-Z]{2})?)(?:\.[^/]+)?/)?man\d/|\.([1-8])$")
LANGUAGE = re.compile(  # a folder or a suffix; "_id_" and "-id." are words of names
    r"(?:[/.]|-(?=[a-z]+/))(?:de|fr|es|it|ja|pl|pt|ru|zh|ko|nl|cs|da|sv|fi|tr|id|uk|el|hu|ro)(?:[_-][a-z]{2})?[/.]", re.I
)
DOCUMENT = 64 << 10  # characters: longer ones are cut where a paragraph ends
SHORTEST, LARGEST = 300, 4 << 20  # characters of a document, bytes of a file
SHARE = 12 << 20  # characters of one stratum that one package may give: no package is most of the corpus
Counts = dict[str, dict[str, dict[str, int]]]
COPIED = 0.3  # of its long lines that a training document may share with a held-out package


@dataclasses.dataclass(frozen=True)
class Source:
    """A line of the list."""

    split: str
    index: str
    name: str
    version: str
    sha256: str


@dataclasses.dataclass(frozen=True)
class Document:
    package: str
    path: str
    stratum: str
    text: str


def read_sources(path: Path) -> list[Source]:
    """The packages of a list; :class:`UserError` on a line that is none, or a package that stands in two splits."""
    found = []
    for number, line in enumerate(read_text(path).splitlines(), 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        if len(words) != 5 or words[0] not in SPLITS or words[1] not in ("pypi", "debian") or len(words[4]) != 64:
            raise UserError(f"{path}:{number}: expected 'SPLIT pypi|debian NAME VERSION SHA256', SPLIT of {', '.join(SPLITS)}")
        found.append(Source(*words))
    if twice := [key for key, n in collections.Counter((s.index, s.name) for s in found).items() if n > 1]:
        raise UserError(f"{path}: {' '.join(twice[0])} stands there twice")
    return found


def fetched(source: Source, directory: Path) -> Path | None:
    """The archive of a source package, fetched unless it is there; None where its index no longer has it. One whose digest is
    another than the list's is a :class:`UserError`, and is not kept."""
    kept = directory / f"{source.index}-{source.name}-{source.sha256[:12]}"
    if kept.exists():
        return kept
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".fetching-", dir=directory) as part:
        file = FETCH[source.index](source, Path(part))
        if file and (digest := file_sha256(file)) != source.sha256:
            raise UserError(
                f"{source.index} {source.name} {source.version}: its SHA-256 is {digest}, and the list says {source.sha256}"
            )
        return file and file.rename(kept)


def _from_pypi(source: Source, directory: Path) -> Path | None:
    """The source archive from where pip would take it (its index, links, certificates), by pip's own parts: `pip download`
    would run the package's build to learn its metadata."""
    try:
        from pip._internal.commands import create_command
    except ImportError:
        raise UserError("this environment has no pip, whose settings say where packages are: python -m ensurepip") from None
    logging.getLogger("pip").setLevel(logging.ERROR)  # what an index lacks is said below
    command: Any = create_command("download")
    options, _ = command.parse_args(["--no-deps", "--no-binary", ":all:", source.name])
    with command.main_context():
        session = command.get_default_session(options)
        finder = command._build_package_finder(options, session, ignore_requires_python=True)
        found = [own.link for own in finder.find_all_candidates(source.name) if str(own.version) == source.version]
        try:
            if not found:  # a package that is gone, or an index that is not reached, of which pip only warns?
                for page in finder.search_scope.get_index_urls_locations(source.name):
                    if not page.startswith("file:") and session.get(page).status_code not in (200, 404):
                        raise UserError(f"{source.name}: the package index does not answer now; the same command goes on")
                return None
            link = next((link for link in found if link.hash == source.sha256), found[0])
            as_it_is = {"Accept-Encoding": "identity"}
            with session.get(link.url, stream=True, headers=as_it_is) as answer, open(directory / "archive", "wb") as file:
                answer.raise_for_status()
                file.writelines(answer.iter_content(1 << 20))
        except OSError as error:  # what requests raises too
            if error.errno in UNWRITABLE:
                raise
            raise UserError(f"{source.name}: cannot be fetched now ({error}); the same command goes on") from None
    return directory / "archive"


def _from_debian(source: Source, directory: Path) -> Path | None:
    if not shutil.which("apt-get"):
        return None
    command = ["apt-get", "download", "-qq", f"{source.name}={source.version}"]
    done = subprocess.run(command, cwd=directory, stdin=subprocess.DEVNULL, capture_output=True, text=True, env=os.environ | C)
    if done.returncode and not re.search("Unable to locate|was not found|find a source|404", done.stderr):
        raise UserError(f"{source.name}: apt-get: {' '.join(done.stderr.split())}; the same command goes on")
    return next(directory.glob("*.deb"), None)


C = {"LC_ALL": "C"}  # apt-get's words
FETCH = {"pypi": _from_pypi, "debian": _from_debian}
NONE_OF = {
    "pypi": "see whether pip's index is reached (pip config list)",
    "debian": "apt-get must know Debian 12 (apt-get update); elsewhere leave its packages out of the list",
}


def fetch_all(sources: Sequence[Source], directory: Path) -> tuple[dict[Source, Path], list[str]]:
    """(archive of each package that there is, those that are gone). An index without a single one is a :class:`UserError`."""
    found = {}
    for stale in directory.glob(".fetching-*"):  # of a run that was killed
        shutil.rmtree(stale)
    with progress(len(sources), "fetch", "package") as bar:
        for source in sorted(sources, key=lambda source: source.index):
            if archive := fetched(source, directory):
                found[source] = archive
            else:
                print(f"{source.index} {source.name} {source.version}: its index no longer has it; skipped", flush=True)
            bar.update(1)
    for index, hint in NONE_OF.items():
        if (asked := [source for source in sources if source.index == index]) and not any(source in found for source in asked):
            raise UserError(f"none of the {len(asked)} packages of {index} can be had: {hint}")
    return found, [f"{source.index} {source.name} {source.version}" for source in sources if source not in found]


def members(source: Source, archive: Path) -> Iterator[tuple[str, bytes]]:
    """(path, content) of the files of an archive, in its order; none is unpacked to disk."""
    if source.index == "debian":
        with tarfile.open(fileobj=_deb_data(archive), mode="r|*") as tar:
            yield from _tar_members(tar)
    elif zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as packed:
            for info in packed.infolist():
                if 0 < info.file_size <= LARGEST:
                    yield info.filename, packed.read(info)
    else:
        with tarfile.open(archive, "r|*") as tar:
            yield from _tar_members(tar)


def _deb_data(archive: Path) -> io.BytesIO:
    """The files of a .deb: an ar archive, whose parts have a head of 60 bytes each and begin at even places."""
    with open(archive, "rb") as file:
        file.seek(8)
        while len(head := file.read(60)) == 60:
            size = int(head[48:58])
            if head.startswith(b"data.tar"):
                return io.BytesIO(file.read(size))
            file.seek(size + size % 2, os.SEEK_CUR)
    raise UserError(f"{archive}: a .deb without data")


def _tar_members(tar: tarfile.TarFile) -> Iterator[tuple[str, bytes]]:
    for member in tar:
        if member.isfile() and 0 < member.size <= LARGEST and (file := tar.extractfile(member)):
            data = file.read()
            if member.name.endswith(".gz"):
                try:
                    data = gzip.GzipFile(fileobj=io.BytesIO(data)).read(LARGEST)
                except (OSError, EOFError):
                    continue
            yield member.name.removesuffix(".gz"), data


def stratum_of(path: str) -> str | None:
    """The stratum of a file by its path alone; None for what is no text that we want."""
    if manual := MANUAL.search(path):
        return "other languages" if manual[1] and manual[1] != "en" else "manual pages"
    suffix = PurePosixPath(path).suffix[1:].lower()
    if path.startswith("./usr/") and suffix in ("js", "css"):  # the furniture of a package's pages
        return None
    stratum = STRATUM.get(suffix)
    return "other languages" if stratum == "prose" and LANGUAGE.search(path) else stratum


class _Text(html.parser.HTMLParser):
    """The text of a page: blocks become lines and paragraphs, white space counts in <pre> alone, what is no text vanishes."""

    HIDDEN = frozenset("script style title nav svg".split())
    BREAKS = dict.fromkeys("p pre h1 h2 h3 h4 h5 h6 table ul ol dl blockquote section".split(), 2)
    BREAKS |= dict.fromkeys("div li tr br dt dd hr".split(), 1)

    def __init__(self) -> None:
        super().__init__()
        self.text, self.hidden, self.pre = io.StringIO(), 0, 0
        self.tail = "\n\n"  # the last two characters

    def put(self, text: str) -> None:
        self.text.write(text)
        self.tail = (self.tail + text)[-2:]

    def ended(self, tag: str) -> None:
        if tag in ("td", "th") and self.tail[-1] not in " \n":
            self.put(" ")
        newlines = 2 if self.tail == "\n\n" else int(self.tail[-1] == "\n")
        self.put("\n" * (self.BREAKS.get(tag, 0) - newlines))

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.hidden, self.pre = self.hidden + (tag in self.HIDDEN), self.pre + (tag == "pre")
        self.ended(tag)

    def handle_endtag(self, tag: str) -> None:
        self.hidden, self.pre = max(self.hidden - (tag in self.HIDDEN), 0), max(self.pre - (tag == "pre"), 0)
        self.ended(tag)

    def handle_data(self, data: str) -> None:
        if not self.hidden:
            data = data if self.pre else re.sub(r"\s+", " ", data)
            self.put(data.lstrip(" ") if self.tail[-1] in " \n" and not self.pre else data)


def page_text(text: str) -> str | None:
    """Of an HTML page; None for a template of one."""
    if "{%" in text or "{{" in text:
        return None
    parser = _Text()
    parser.feed(text)
    return parser.text.getvalue().replace("¶", "")  # Sphinx's link to a heading


# ---------------------------------------------------------------- manual pages: roff with the macros of man(7) and mdoc(7)

GLYPHS = dict(zip(
    "aq oq cq lq rq dq em en hy mi ga ti ha rs bu co rg tm sh at sl ba bv lB rB lC rC <- -> <= >= +- mu de sc ss ae AE".split(),
    "' ‘ ’ “ ” \" — – - - ` ~ ^ \\ • © ® ™ # @ / | | [ ] { } ← → ≤ ≥ ± × ° § ß æ Æ".split(), strict=True,
))  # fmt: skip
ACCENTS = {":": "\u0308", "'": "\u0301", "`": "\u0300", "^": "\u0302", "~": "\u0303", ",": "\u0327", "o": "\u030a"}
STRINGS = {"Aq": "'", 'L"': "“", 'R"': "”", "lq": "“", "rq": "”", "--": "-"}  # of pod2man and man(7); others are fonts or empty
ONE = {"-": "-", "e": "\\", "\\": "\\", " ": " ", "~": " ", "0": " ", "t": "\t", "'": "'", "`": "`", ".": "."}
ESCAPE = re.compile(
    r"""\\(?:["#].*|\*(?:\((?P<string>..)|\[(?P<long>[^]]*)\]|.)|[fmMFgkYVn][-+]?(?:\(..|\[[^]]*\]|.)|s[-+]?\d"""
    r"""|[hvwlLNobDCzXAZRHSx]'[^']*'|\((?P<two>..)|\[(?P<name>[^]]*)\]|(?P<one>.)|$)"""
)


def _escaped(match: re.Match[str]) -> str:
    if (string := match["string"] or match["long"]) is not None:
        return STRINGS.get(string, "")
    if (name := match["two"] or match["name"]) is None:
        return ONE.get(match["one"], "")
    if re.fullmatch("u[0-9A-F]{4,5}", name):
        return chr(int(name[1:], 16))
    if len(name) == 2 and name[0] in ACCENTS and name[1].isalpha():
        return unicodedata.normalize("NFC", name[1] + ACCENTS[name[0]])
    return GLYPHS.get(name, "")


FONTS = frozenset("B I R SM SB".split())
ALTERNATING = frozenset("BR RB BI IB IR RI".split())
BREAKING = frozenset(
    "PP P LP Pp Lp TP TQ HP sp Bl El Bd Ed RS RE nf fi EX EE SS SH Sh Ss IP It D1 Dl TS TE Vb Ve In Ft Cd".split()
)
WORDY = FONTS | ALTERNATING | frozenset("SH SS Sh Ss IP It D1 Dl UR MT SY OP".split())
ENCLOSING = {"Op": "[]", "Pq": "()", "Dq": "“”", "Sq": "‘’", "Aq": "<>", "Bq": "[]", "Qq": '""', "Ql": "‘’", "Brq": "{}"}
OPENED = {"Oo": "[", "Po": "(", "Do": "“", "So": "‘", "Ao": "<", "Bo": "[", "Qo": '"', "Bro": "{"}
CLOSED = {"Oc": "]", "Pc": ")", "Dc": "”", "Sc": "’", "Ac": ">", "Bc": "]", "Qc": '"', "Brc": "}"}
SYSTEMS = {"Fx": "FreeBSD", "Nx": "NetBSD", "Ox": "OpenBSD", "Dx": "DragonFly", "Bx": "BSD", "Ux": "UNIX", "At": "AT&T UNIX"}
PLAIN = frozenset("Ar Nm Pa Cm Em Sy Li Ic Va Vt Fa Ft Fn Fo Fc Xr Ev Dv Er Sx In Lk Mt An Ad Tn Ms Nd Fl No Cd St Lb".split())
INLINE = PLAIN | ENCLOSING.keys() | OPENED.keys() | CLOSED.keys() | SYSTEMS.keys() | {"Ns", "Pf", "Ap", "Xo", "Xc"}


def _inline(tokens: Sequence[str], page: str) -> str:
    """Words of a line of mdoc, whose macros call each other: "Op Fl a Ar file ." is "[-a file]."."""
    out, glued, macro = "", True, ""

    def put(text: str) -> None:
        nonlocal out, glued
        out += text if glued or not out or re.fullmatch(r"[.,;:)\]?!]+", text) else " " + text
        glued = text in ("(", "[")

    for place, token in enumerate(tokens):
        rest = tokens[place + 1 :]
        if token in ENCLOSING:
            end = len(rest) - (bool(rest) and rest[-1] in ".,;:?!")
            put(ENCLOSING[token][0] + _inline(rest[:end], page) + ENCLOSING[token][1] + "".join(rest[end:]))
            return out
        if token in ("Xr", "Fn") and rest and rest[0] not in INLINE:
            end = next((n for n, own in enumerate(rest) if own in INLINE or n and own in (*".,;:)", "")), len(rest))
            put(f"{rest[0]}({', '.join(rest[1:end])})" + _inline(rest[end:], page))
            return out
        if token not in INLINE:
            put(f"-{token}" if macro == "Fl" and token[:1].isalnum() else f"#include <{token}>" if macro == "In" else token)
            glued |= macro == "Pf"
            macro = "" if macro == "Pf" else macro
            continue
        macro = token
        if token in OPENED or token in SYSTEMS:
            put(OPENED.get(token) or SYSTEMS[token])
            glued |= token in OPENED
        elif token in CLOSED or token == "Ap":
            glued = True
            put(CLOSED.get(token, "'"))
            glued = token == "Ap"
        elif token == "Ns":
            glued = True
        elif token in ("Nm", "Nd", "Fl") and (not rest or rest[0] in INLINE or not rest[0][:1].isalnum()):
            put({"Nm": page, "Nd": "-", "Fl": "-"}[token])
        elif token == "Nd":
            put("-")
    return out


def manual_text(text: str) -> str | None:
    """The words of a manual page in roff, a paragraph a line; None for a file that is none (or only names another)."""
    if not re.search(r"(?m)^[.']\s*(?:SH|Sh)\b", text):
        return None
    out, kept, page, tag, filled = list[str](), list[str](), "", False, True

    def ended(blank: bool) -> None:
        out.extend([" ".join(kept)] * bool(kept) + [""] * blank)
        kept.clear()

    text = re.sub(r"(?ms)^[.']\s*(?:de1?|am|ig)\b.*?^\.\.\s*$", "", text)  # a macro's own definition
    for line in text.replace("\\\n", "").splitlines():
        request = re.match(r"[.']\s*(\w+|%\w)?\s*(.*)", line)
        name, rest = (request[1] or "", request[2]) if request else ("", line)
        rest = ESCAPE.sub(_escaped, rest)
        if not request:
            if not rest.strip():
                ended(True)
            elif filled:
                kept.append(rest.strip())
            else:
                out.append(rest)
            if tag and rest.strip():
                ended(False)
                tag = False
            continue
        if name in BREAKING or name == "br":
            ended(name not in ("br", "It", "RS", "RE", "In", "Ft", "Cd") and filled)
        if name in ("nf", "EX", "Vb", "fi", "EE", "Ve", "Bd", "Ed"):
            filled = name in ("fi", "EE", "Ve", "Ed") or name == "Bd" and not re.search("literal|unfilled", rest)
        tag = tag or name in ("TP", "TQ")
        if name not in WORDY and name not in INLINE and not name.startswith("%"):
            continue
        words = [quoted or plain for quoted, plain in re.findall(r'"((?:[^"]|"")*)"|(\S+)', rest)]
        if name == "Nm" and words and not page:
            page = words[0]
        if name in INLINE or name == "It":
            rest = _inline([name, *words] if name in INLINE else words, page)
        else:
            rest = ("" if name in ALTERNATING else " ").join(words[:1] if name == "IP" else words)
        kept += [rest] * bool(rest)
        if name in ("SH", "SS", "Sh", "Ss", "It", "D1", "Dl") or name == "IP" and len(rest) > 2 or tag or not filled:
            ended(name in ("SH", "SS", "Sh", "Ss"))
            tag = False
    ended(False)
    return "\n".join(out)


def is_page(path: str) -> bool:
    return path.lower().endswith((".html", ".htm"))


def cleaned(path: str, stratum: str, data: bytes) -> str | None:
    """The text of a file, or None where it is no text that somebody wrote: not UTF-8, minified, mostly digits."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return None
    if "\0" in text:
        return None
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    if MANUAL.search(path):
        text = manual_text(text)
    elif is_page(path):
        text = page_text(text)
    if text is None:
        return None
    text = re.sub(r"[^\S\n\t]+(?=\n)", "", re.sub(r"[\x00-\x08\x0b-\x1f\x7f]", "", text))
    text = re.sub(r"\n{3,}", "\n\n", text).strip()
    lines = text.splitlines()
    if len(text) < SHORTEST or max(map(len, lines)) > 2000 or len(text) / len(lines) > 400:
        return None
    return text if sum(map(str.isalpha, text)) > 0.4 * len(text) else None


def pieces(text: str) -> Iterator[str]:
    """A text in parts of at most :data:`DOCUMENT` characters that end with a paragraph, or else with a line."""
    while len(text) > DOCUMENT:
        end = (
            max(text.rfind("\n\n", DOCUMENT // 2, DOCUMENT), 0) or max(text.rfind("\n", DOCUMENT // 2, DOCUMENT), 0) or DOCUMENT
        )
        yield text[:end].strip()
        text = text[end:].strip()
    if len(text) >= SHORTEST:
        yield text


def digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest()


def documents_of(source: Source, archive: Path) -> Iterator[Document]:
    """The documents of a package; of a stratum at most :data:`SHARE` characters, taken from files in an order that is random
    and always the same."""
    files = [(path, stratum, data) for path, data in members(source, archive) if (stratum := stratum_of(path))]
    random.Random(source.sha256).shuffle(files)
    given, found = collections.Counter[str](), list[tuple[str, str, str]]()
    for path, stratum, data in files:
        if given[stratum] < SHARE and (text := cleaned(path, stratum, data)):
            given[stratum] += len(text)
            found.append((path, stratum, text))
    pages = collections.defaultdict[str, list[str]](list)  # of the package, and of each folder: a language may have its own
    for path, _, text in found:
        for group in {"", str(PurePosixPath(path).parent)} if is_page(path) else ():
            pages[group].append(text)
    furniture = set[str]().union(*map(repeated_lines, pages.values()))
    for path, stratum, text in found:
        if is_page(path):
            text = re.sub(r"\n{3,}", "\n\n", "\n".join(line for line in text.split("\n") if line not in furniture)).strip()
        for part in pieces(text):
            yield Document(source.name, path, stratum, part)


def repeated_lines(pages: Sequence[str]) -> set[str]:
    """Lines that stand on a fifth of the pages, and on ten at least: their menus and footers."""
    counts = collections.Counter(line for page in pages for line in set(page.split("\n")))
    return {line for line, n in counts.items() if line and n >= max(10, len(pages) / 5)}


class Seen:
    """What is there already: each text once, and of the long lines of held-out packages a training document shares few."""

    def __init__(self) -> None:
        self.texts: set[bytes] = set()
        self.lines: set[bytes] = set()
        self.dropped: collections.Counter[str] = collections.Counter()

    def takes(self, split: str, text: str) -> bool:
        key = digest(re.sub(r"\W+", " ", text).lower())
        if key in self.texts:
            self.dropped["the same text again"] += 1
            return False
        lines = {digest(line) for raw in text.splitlines() if len(line := raw.strip()) >= 40}
        if split != "heldout" and lines and len(lines & self.lines) > COPIED * len(lines):
            self.dropped["lines of a held-out package"] += 1
            return False
        self.texts.add(key)
        if split == "heldout":
            self.lines |= lines
        return True


def write_documents(archives: Mapping[Source, Path], out: Path) -> tuple[Counts, dict[str, str], dict[str, int]]:
    """SPLIT.jsonl.gz of each split, the held-out one first; ({split: {stratum: {documents, bytes}}}, SHA-256 of each split's
    lines, documents dropped by reason). A split without a document is a :class:`UserError`."""
    seen, counts, digests = Seen(), {}, {}
    with progress(len(archives), "text", "package") as bar:
        for split in reversed(SPLITS):
            counted, sha256 = {stratum: {"documents": 0, "bytes": 0} for stratum in STRATA}, hashlib.sha256()
            own = sorted((s for s in archives if s.split == split), key=lambda source: (source.index, source.name))
            with atomic_path(out / f"{split}.jsonl.gz") as temporary, gzip.GzipFile(temporary, "wb", 5, mtime=0) as file:
                for source in own:
                    for document in documents_of(source, archives[source]):
                        if seen.takes(split, document.text):
                            line = json.dumps(dataclasses.asdict(document), ensure_ascii=False).encode() + b"\n"
                            file.write(line)
                            sha256.update(line)
                            counted[document.stratum]["documents"] += 1
                            counted[document.stratum]["bytes"] += len(document.text.encode("utf-8"))
                    bar.update(1)
            if not any(entry["documents"] for entry in counted.values()):
                raise UserError(f"{split}: its {len(own)} packages hold no text; the list must name others")
            counts[split], digests[split] = counted, sha256.hexdigest()
    return counts, digests, dict(seen.dropped)


def read_documents(path: Path) -> Iterator[Document]:
    return (Document(**row) for row in read_rows(path))


def train_tokenizer(texts: Iterable[str], size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE of ``size`` tokens; token 0 ends a text."""
    special = ["<|endoftext|>", "<|pad|>"]
    tokenizer = trained_bpe(texts, size, special)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=special[0], pad_token=special[1])


def encode_split(tokenizer: PreTrainedTokenizerFast, documents: Path, out: Path) -> dict[str, int]:
    """OUT.bin (uint16) and OUT.json {starts, strata, packages} of a split, its documents in an order that is random and always
    the same; tokens by stratum."""
    found = list(read_documents(documents))
    random.Random(documents.name).shuffle(found)
    end, position, tokens = tokenizer.eos_token_id, 0, collections.Counter()
    starts, strata, packages = list[int](), list[int](), list[str]()
    with (
        progress(len(found), f"tokens of {out.name}", "document") as bar,
        atomic_path(out.with_suffix(".bin")) as temporary,
        open(temporary, "wb") as file,
    ):
        for begin in range(0, len(found), 256):
            part = found[begin : begin + 256]
            for document, ids in zip(part, tokenizer([d.text for d in part], add_special_tokens=False)["input_ids"]):
                np.asarray([*ids, end], dtype="<u2").tofile(file)
                starts.append(position)
                strata.append(STRATA.index(document.stratum))
                packages.append(document.package)
                position += len(ids) + 1
                tokens[document.stratum] += len(ids) + 1
            bar.update(len(part))
        write_json(out.with_suffix(".json"), {"starts": starts, "strata": strata, "packages": packages})  # before the .bin is
    return dict(tokens)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--sources", type=Path, default=Path("configs/text_sources.txt"), help="the list of packages")
    parser.add_argument("--out", type=Path, required=True, help="the directory of the corpus")
    parser.add_argument("--vocabulary", type=int, default=12288, help="tokens of the tokenizer (default 12,288)")
    parser.add_argument("--sample-mb", type=int, default=60, help="MB of training text that the tokenizer is trained on")
    add_record_arguments(parser)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    args = parser.parse_args()
    check_record_arguments(args)
    if not 258 <= args.vocabulary <= 1 << 16:
        raise UserError(f"--vocabulary {args.vocabulary}: from 258 (each byte, two marks) to 65,536 (ids of 16 bits)")
    started, sources = time.time(), read_sources(args.sources)
    args.out.mkdir(parents=True, exist_ok=True)
    for split in SPLITS:  # train.bin, which is written last, says that all of it is of one run
        (args.out / f"{split}.bin").unlink(missing_ok=True)
    archives, gone = fetch_all(sources, args.out / "packages")
    counts, digests, dropped = write_documents(archives, args.out)
    total = sum(entry["bytes"] for entry in counts["train"].values())
    chance, rng = args.sample_mb * 1e6 / total, random.Random(1)
    texts = (document.text for document in read_documents(args.out / "train.jsonl.gz") if rng.random() < chance)
    os.environ["TOKENIZERS_PARALLELISM"] = "true"  # env.sh says false, for the sake of data loaders
    tokenizer = train_tokenizer(texts, args.vocabulary)
    tokenizer.save_pretrained(args.out / "tokenizer")
    tokens = {s: encode_split(tokenizer, args.out / f"{s}.jsonl.gz", args.out / s) for s in reversed(SPLITS)}
    strata: Counts = {split: {} for split in SPLITS}
    for split, stratum in itertools.product(SPLITS, STRATA):
        entry = counts[split][stratum] | {"tokens": tokens[split].get(stratum, 0)}
        strata[split][stratum.replace(" ", "_")] = entry
        own = f"{entry['documents']:>8,} documents {entry['bytes'] / 1e6:>8.1f} MB {entry['tokens']:>12,} tokens"
        print(f"{split:<12}{stratum:<17}{own}")
    if args.result:
        data = [{"name": "packages", "revision": None, "sha256": file_sha256(args.sources), "n": len(sources)}]
        for split in SPLITS:
            documents = sum(entry["documents"] for entry in strata[split].values())
            data.append({"name": f"documents, {split}", "revision": None, "sha256": digests[split], "n": documents})
            data.append(ids_entry(args.out, split))
        metrics = {"strata": strata, "gone": gone, "dropped": dropped, "packages": len(archives), "vocabulary": len(tokenizer)}
        write_result(args.result, kind="train", tag=args.tag, started=started, data=data, metrics=metrics)


if __name__ == "__main__":
    run_cli(main)
