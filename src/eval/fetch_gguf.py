"""Download a GGUF from the Hugging Face hub, resumable and checked, in all its parts.

    python src/eval/fetch_gguf.py General-Instinct/InstinctRazor-Qwen3.5-122B-A10B-GGUF [FILE.gguf] [--out models]

Without FILE the only model of the repository is taken, or its files are listed. A split model is fetched whole. The size and
the SHA-256 come from the hub; --sha256 gives one of your own, and where the hub has none the repository's FILE.sha256 is
read. A killed run goes on where it stopped with the same command (FILE.DIGEST.partial); a second one beside it is refused. A
file gets its name only when its digest is right; one that is there is digested again. FILE.sha256 is written beside it, for
`sha256sum -c`. HF_ENDPOINT names another hub, HF_TOKEN the account.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import filelock

from console import UserError, atomic_path, file_sha256, progress, run_cli, writing
from gguf_format import is_first, part_names
from hub import Link, explained, patient

# huggingface_hub 2 resumes no download that was killed (its temporary file is removed), hence a file of our own.
PIECE_BYTES = 1 << 30  # bytes of one request: a hub's links expire, and its servers end an answer at 50 GB
SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Remote:
    """A file of a repository: what the hub says of it."""

    repository: str
    name: str
    revision: str
    size: int
    digest: str  # SHA-256

    @property
    def note(self) -> str:
        """The line of its FILE.sha256."""
        return f"{self.digest}  {Path(self.name).name}\n"

    def partial(self, directory: Path) -> Path:
        return directory / f"{Path(self.name).name}.{self.digest[:12]}.partial"


def repository_files(repository: str, revision: str) -> list[str]:
    from huggingface_hub import HfApi

    with explained(repository):  # one request, not retried: a machine without a network hears it at once
        siblings = HfApi().model_info(repository, revision=revision, timeout=30).siblings or []
    return sorted(sibling.rfilename for sibling in siblings if sibling.rfilename.endswith(".gguf"))


def choose(repository: str, revision: str, wanted: str | None) -> list[str]:
    """The files to fetch: ``wanted`` and the other parts of its model, or the only model that is there."""
    found = repository_files(repository, revision)
    models = [name for name in found if "mmproj" not in Path(name).name]
    firsts = [name for name in models if is_first(name)]
    if wanted is None:
        if len(firsts) != 1:
            listed = "\n  ".join(firsts) or "none"
            raise UserError(f"{repository}: {len(firsts)} models; name one of its files:\n  {listed}")
        wanted = firsts[0]
    if wanted not in found:
        raise UserError(f"{repository}: has no {wanted}; it has {', '.join(found) or 'no .gguf file'}")
    names = part_names(wanted)
    if missing := [name for name in names if name not in found]:
        raise UserError(f"{repository}: the split model lacks {', '.join(missing)}")
    return names


def describe(repository: str, name: str, revision: str, given: str | None) -> Remote:
    """Size and SHA-256 of a file; a digest of the user's that the hub contradicts is refused before anything is fetched."""
    with explained(repository, name):
        metadata, _ = patient(Link(repository, name, revision).metadata)
    digest = metadata.etag if SHA256.fullmatch(metadata.etag or "") else None
    if given and digest and given != digest:
        raise UserError(
            f"{repository}/{name}: the hub has SHA-256 {digest}, --sha256 says {given}; one of them is of another file"
        )
    digest = given or digest or sidecar(repository, name, revision)
    if metadata.size is None:
        raise UserError(f"{repository}/{name}: the hub does not say how large it is; try again later")
    return Remote(repository, name, metadata.commit_hash or revision, metadata.size, digest)


def sidecar(repository: str, name: str, revision: str) -> str:
    """The digest in the repository's FILE.sha256, for a file that the hub keeps no digest of."""
    from huggingface_hub import errors, hf_hub_download

    with explained(repository, f"{name}.sha256"):
        try:
            text = Path(hf_hub_download(repository, f"{name}.sha256", revision=revision)).read_text(encoding="utf-8")
        except errors.EntryNotFoundError:
            text = ""
    if not (found := SHA256.match(text.strip().lower())):
        raise UserError(f"{repository}/{name}: neither the hub nor a {name}.sha256 has its SHA-256; give it with --sha256")
    return found[0]


def download(remote: Remote, partial: Path) -> None:
    """Append to ``partial`` what it lacks, in pieces."""
    link = Link(remote.repository, remote.name, remote.revision)
    there = partial.stat().st_size if partial.exists() else 0
    with progress(remote.size, Path(remote.name).name, "B", True, there) as bar, partial.open("ab") as stream:

        def write(data: bytes) -> None:
            with writing(partial):
                stream.write(data)
            bar.update(len(data))

        while (begin := stream.tell()) < remote.size:
            link.stream(begin, min(begin + PIECE_BYTES, remote.size), write)
            with writing(partial):
                stream.flush()


def check_disk(remotes: Sequence[Remote], directory: Path) -> None:
    missing = 0
    for remote in remotes:
        partial = remote.partial(directory)
        missing += remote.size - (partial.stat().st_size if partial.exists() else 0)
    free = shutil.disk_usage(directory).free
    if missing > free:
        raise UserError(
            f"{directory}: {missing / 1e9:.2f} GB are to come, {free / 1e9:.2f} GB are free; make room, or give another --out"
        )


def is_there(remote: Remote, file: Path) -> bool:
    """Whether ``file`` is this one, by all its bytes: what was right when it came may have been damaged since."""
    if not file.exists():
        return False
    if file.stat().st_size == remote.size and digest_of(file) == remote.digest:
        write_note(remote, file)
        return True
    note = sidecar_of(file)
    named = note.is_file() and note.read_text(encoding="utf-8", errors="replace").split()[:1] == [remote.digest]
    what = "damaged since it was fetched:" if named else "another file than"
    raise UserError(f"{file}: {what} the hub's {remote.name} ({remote.digest[:12]}); move it away or give another --out")


def write_note(remote: Remote, file: Path) -> None:
    """FILE.sha256 beside the file."""
    if not sidecar_of(file).is_file() or sidecar_of(file).read_text(encoding="utf-8", errors="replace") != remote.note:
        with atomic_path(sidecar_of(file)) as temporary:
            temporary.write_text(remote.note, encoding="utf-8")


@contextlib.contextmanager
def alone(file: Path) -> Iterator[None]:
    """Hold the lock of a file while it is fetched; it ends with the process, however that ends."""
    path = file.with_name(f".{file.name}.lock")
    with writing(path):
        lock = filelock.FileLock(path)
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout:
            raise UserError(f"{file}: another run is fetching it; wait for it or stop it") from None
    try:
        yield
    finally:
        path.unlink(missing_ok=True)  # before it is given free: who waits for it has no timeout
        lock.release()


def sidecar_of(file: Path) -> Path:
    return file.with_name(file.name + ".sha256")


def digest_of(file: Path) -> str:
    with progress(file.stat().st_size, "sha256", "B", True) as bar:
        return file_sha256(file, bar.update)


def fetch(remote: Remote, directory: Path) -> Path:
    """The file in ``directory``, downloaded and checked where it is not there yet, by one run at a time."""
    with alone(directory / Path(remote.name).name):
        return _fetch(remote, directory)


def _fetch(remote: Remote, directory: Path) -> Path:
    file, partial = directory / Path(remote.name).name, remote.partial(directory)
    if is_there(remote, file):
        print(f"{file}: is there ({remote.size:,} bytes, SHA-256 {remote.digest[:12]}...)", flush=True)
        return file
    begun = partial.stat().st_size if partial.exists() else 0
    if begun > remote.size:
        raise UserError(f"{partial}: longer than the hub's file; remove it and run again")
    print(f"{remote.repository}/{remote.name}: {remote.size:,} bytes" + f", goes on at {begun:,}" * bool(begun), flush=True)
    download(remote, partial)
    digest = digest_of(partial)
    if digest != remote.digest:
        partial.unlink()
        raise UserError(
            f"{remote.name}: SHA-256 is {digest}, expected {remote.digest}; it was removed, run again to fetch it anew"
        )
    partial.rename(file)
    write_note(remote, file)
    print(f"{file}: {remote.size:,} bytes, SHA-256 {digest}", flush=True)
    return file


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("repository", help="OWNER/NAME on the hub")
    parser.add_argument("file", nargs="?", help="a .gguf of it (default: the only one); the first part of a split model")
    parser.add_argument("--revision", default="main", help="branch, tag or commit (default main)")
    parser.add_argument("--out", type=Path, default=Path("models"), help="directory of the file (default models)")
    parser.add_argument("--sha256", help="the digest that the file must have (of one file)")
    args = parser.parse_args()
    if args.sha256 and not SHA256.fullmatch(args.sha256.lower()):
        raise UserError(f"--sha256 {args.sha256}: expected 64 hexadecimal digits")
    names = choose(args.repository, args.revision, args.file)
    if args.sha256 and len(names) > 1:
        raise UserError(f"--sha256: the model has {len(names)} parts; leave it out, the hub has their digests")
    given = args.sha256.lower() if args.sha256 else None
    remotes = [describe(args.repository, name, args.revision, given) for name in names]
    with writing(args.out):
        args.out.mkdir(parents=True, exist_ok=True)
    check_disk([remote for remote in remotes if not (args.out / Path(remote.name).name).exists()], args.out)
    files = [fetch(remote, args.out) for remote in remotes]
    print(f"serve it:  bash pipelines/deploy.sh --model {files[0]} --serve")
    print("evaluate it (DIR: the original's directory, for its tokenizer):")
    print(f"  bash pipelines/eval.sh --model {files[0]} --tokenizer DIR --tag TAG", flush=True)


if __name__ == "__main__":
    run_cli(main)
