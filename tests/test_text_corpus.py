"""A corpus from packages that the test packs itself, and models trained on it: killed and resumed, and on two processes."""

import gzip
import hashlib
import io
import json
import os
import random
import re
import signal
import subprocess
import sys
import tarfile
import time

import numpy as np
import pytest
from conftest import REPO

from check_results import check_text
from page_results import page
from records import read_result
from tiny_corpus import manual_text, page_text, pieces, read_documents, stratum_of
from tiny_data import STRATA

WORDS = "the of model reads every option file that a user names and writes what it found into one table of results".split()


def lines_of(seed, count=12):
    rng = random.Random(seed)
    return [f"{seed} {n}: " + " ".join(rng.choices(WORDS, k=12)) for n in range(count)]


def text_of(seed, count=12):
    return "\n".join(lines_of(seed, count))


def mdoc(seed):
    return f".Dd today\n.Dt X 2\n.Sh NAME\n.Nm {seed}\n.Nd reads\n.Sh DESCRIPTION\n{text_of(seed)}\n"


PACKAGES = {
    ("train", "pypi", "alpha"): {
        "src/a.py": text_of("a"), "docs/b.rst": text_of("b"), "c.json": text_of("c"), "docs/de/d.rst": text_of("d"),
        "copy.py": text_of("held"), "near.py": "\n".join([*lines_of("held")[:6], *lines_of("own")[:9]]),
        "same.txt": text_of("a").replace(",", ";"), "tiny.py": "x = 1", "bad.py": b"\xff\xfe" * 400,
        **{f"p{n}.html": f"<nav>menu</nav><p>One footer of every page</p><p>{text_of(f'page{n}')}</p>" for n in range(12)},
    },
    ("train", "debian", "manuals"): {
        "./usr/share/man/man2/one.2.gz": gzip.compress(mdoc("one").encode()), "./usr/share/man/fr/man1/deux.1": mdoc("deux"),
        "./usr/share/doc/manuals/menu.js": text_of("js"), "./usr/share/doc/manuals/changes.1": text_of("no roff"),
    },
    ("calibration", "pypi", "beta"): {"beta/e.py": text_of("e", 40)},
    ("heldout", "pypi", "gamma"): {"gamma/f.py": text_of("held"), "gamma/g.md": text_of("g", 60)},
}  # fmt: skip


def tar_of(files):
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w:xz") as tar:
        for name, content in files.items():
            content = content if isinstance(content, bytes) else content.encode()
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return data.getvalue()


def deb_of(files):
    """An ar archive of two parts, the first of an odd size."""
    parts = {"debian-binary": b"2.0", "data.tar.xz": tar_of(files)}
    heads = {name: f"{name:<16}{0:<12}{0:<6}{0:<6}{0:<8}{len(part):<10}`\n".encode() for name, part in parts.items()}
    return b"!<arch>\n" + b"".join(heads[name] + part + b"\n" * (len(part) % 2) for name, part in parts.items())


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """(list of packages, folder of the corpus, environment): an index of files for pip, and a .deb fetched before."""
    root = tmp_path_factory.mktemp("packages")
    (root / "corpus/packages").mkdir(parents=True)
    listed = ["# SPLIT INDEX NAME VERSION SHA256"]
    for (split, index, name), files in PACKAGES.items():
        data = deb_of(files) if index == "debian" else tar_of(files)
        digest = hashlib.sha256(data).hexdigest()
        listed.append(f"{split} {index} {name} 1.0 {digest}")
        if index == "debian":
            (root / f"corpus/packages/debian-{name}-{digest[:12]}").write_bytes(data)
        else:
            (root / "index" / name).mkdir(parents=True)
            (root / "index" / name / f"{name}-1.0.tar.xz").write_bytes(data)
            (root / "index" / name / "index.html").write_text(f'<a href="{name}-1.0.tar.xz">{name}-1.0.tar.xz</a>')
    (root / "list.txt").write_text("\n".join([*listed, f"train pypi gone 1.0 {'0' * 64}"]))
    alone = {"PIP_CONFIG_FILE": os.devnull, "PIP_EXTRA_INDEX_URL": "", "PIP_FIND_LINKS": ""}
    return root / "list.txt", root / "corpus", alone | {"PIP_INDEX_URL": (root / "index").as_uri()}


def make(command, listed, corpus, *more):
    return command("src/distill/tiny_corpus.py", "--sources", listed, "--out", corpus, "--vocabulary", 300, *more)


@pytest.fixture
def corpus(packed, command, monkeypatch):
    listed, made, environment = packed
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    if not (made / "train.bin").exists():
        done = make(command, listed, made, "--result", made / "records/train/text.json", "--tag", "text")
        assert done.returncode == 0, done.stderr
        assert "pypi gone 1.0: its index no longer has it; skipped" in done.stdout
    return made


def test_a_corpus_keeps_what_is_held_out_apart(corpus):
    found = {split: list(read_documents(corpus / f"{split}.jsonl.gz")) for split in ("train", "calibration", "heldout")}
    strata = {document.path: document.stratum for document in found["train"]}
    assert {path: stratum for path, stratum in strata.items() if not path.startswith("p")} == {
        "src/a.py": "code", "docs/b.rst": "prose", "c.json": "structured data", "docs/de/d.rst": "other languages",
        "./usr/share/man/man2/one.2": "manual pages", "./usr/share/man/fr/man1/deux.1": "other languages",
    }  # fmt: skip
    for document in found["train"]:
        assert not any(line in document.text for line in lines_of("held")), document.path
        assert "footer" not in document.text and "menu" not in document.text
    assert {document.package for document in found["heldout"]} == {"gamma"}
    ids, index = np.fromfile(corpus / "heldout.bin", "<u2"), json.loads((corpus / "heldout.json").read_text())
    assert index["starts"][0] == 0 and [int(ids[start - 1]) for start in index["starts"][1:]] == [0] and ids[-1] == 0
    assert sorted(STRATA[kind] for kind in index["strata"]) == ["code", "prose"]


def test_the_record_says_sizes_and_digests(corpus):
    record = read_result(corpus / "records/train/text.json", "train")
    metrics, data = record["metrics"], {entry["name"]: entry for entry in record["data"]}
    assert metrics["gone"] == ["pypi gone 1.0"] and metrics["packages"] == 4
    assert metrics["dropped"] == {"the same text again": 2, "lines of a held-out package": 1}
    assert metrics["strata"]["train"]["manual_pages"]["documents"] == 1
    for split, strata in metrics["strata"].items():
        assert data[f"tokens, {split}"]["n"] == sum(entry["tokens"] for entry in strata.values())
        assert data[f"tokens, {split}"]["sha256"] == hashlib.sha256((corpus / f"{split}.bin").read_bytes()).hexdigest()
        lines = gzip.open(corpus / f"{split}.jsonl.gz").read()
        assert (
            data[f"documents, {split}"] | {"sha256": hashlib.sha256(lines).hexdigest(), "n": lines.count(b"\n")}
            == (data[f"documents, {split}"])
        )
    shown = page(corpus / "records")
    assert "## Text" in shown and "## Training" not in shown and not check_text(shown, corpus / "records")[1]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda text: text.replace("train pypi gone 1.0 00", "train pypi gone 1.0 0"), "expected 'SPLIT"),
        (lambda text: text.replace("heldout pypi gamma", "train pypi beta"), "pypi beta stands there twice"),
        (lambda text: text[:-64] + "1" * 64, None),
        (lambda text: text.replace(text.split("beta 1.0 ")[1][:64], "1" * 64), "pypi beta 1.0: its SHA-256 is"),
        (lambda text: re.sub(r"(pypi \w+) 1.0 \w+", r"\1 2.0 " + "2" * 64, text), "packages of pypi can be had: see whether"),
    ],
    ids=["no line", "twice", "another that is gone", "another digest", "an index without any"],
)  # fmt: skip
def test_a_list_is_refused(corpus, packed, command, tmp_path, change, said):
    (tmp_path / "list.txt").write_text(change(packed[0].read_text()))
    (tmp_path / "out").mkdir()
    (tmp_path / "out/packages").symlink_to(corpus / "packages")
    done = make(command, tmp_path / "list.txt", tmp_path / "out")
    if said:
        assert done.returncode == 2 and said in done.stderr and not (tmp_path / "out/train.bin").exists()
    else:  # from what was fetched before alone, to the same bytes
        assert done.returncode == 0 and (tmp_path / "out/train.bin").read_bytes() == (corpus / "train.bin").read_bytes()
    assert not list((corpus / "packages").glob(".*"))


def test_what_cannot_be_read_or_made_is_said(packed, command, tmp_path):
    (tmp_path / "file").touch()
    for listed, out, word in ((packed[0], "file/out", "file"), (tmp_path / "none.txt", "out", "none.txt")):
        done = make(command, listed, tmp_path / out)
        assert done.returncode == 2 and word in done.stderr and done.stderr.count("\n") == 1


ROFF = {
    ".SH NAME\nls \\- list\n.SH OPTIONS\n.TP\n.BR \\-a \", \" \\-\\-all\nshow\nall\n.PP\nSee\n.BR cp (1).": (
        "NAME\n\nls - list\n\nOPTIONS\n\n-a, --all\nshow all\n\nSee cp(1)."
    ),
    ".de XX\n.B no\n..\n.SH A\nx\\fBbold\\fP \\(bu \\(:a \\[u00DF] \\*(Aq\\*(C`q\\*(C'\\h'1n'.\n.IX Index no": (
        "A\n\nxbold • ä ß 'q."
    ),
    ".Sh A\n.Nm frob\n.Op Fl a Ar file .\nThe\n.Nm\nutility, see\n.Xr frob 8 ,\n.Fn call \"int a\" b .": (
        "A\n\nfrob [-a file]. The frob utility, see frob(8), call(int a, b)."
    ),
    ".SH A\n.nf\nint  a;\n  b;\n.fi\none\ntwo": "A\n\nint  a;\n  b;\none two",
    "1.2.3\nno roff": None,
}  # fmt: skip


@pytest.mark.parametrize("roff", ROFF, ids=["man", "escapes", "mdoc", "as it is", "no page"])
def test_a_manual_page_reads_as_it_is_shown(roff):
    shown = manual_text(roff)
    assert shown == ROFF[roff] or re.sub(r"\n{3,}", "\n\n", shown).strip() == ROFF[roff]


def test_a_page_is_its_text():
    shown = page_text("<title>t</title><script>x</script><div><p>One\n  <b>line</b> &amp;<li>two<pre>a\n  b</pre><td>c<td>d")
    assert shown.strip() == "One line &\ntwo\n\na\n  b\n\nc d"
    assert page_text("<p>{% block %}</p>") is None


def test_paths_tell_the_stratum_and_long_texts_are_cut():
    told = {
        "x/README.rst": "prose", "x/patch-id.txt": "prose", "doc-fr/x.html": "other languages", "x.fr.md": "other languages",
        "usr/share/man/pt_BR/man1/x.1": "other languages", "man/man3/x.3": "manual pages", "x.png": None,
    }  # fmt: skip
    assert {path: stratum_of(path) for path in told} == told
    parts = list(pieces("\n\n".join(f"{n} " + "word " * 200 for n in range(200))))
    assert max(map(len, parts)) <= 64 << 10 and [part.split()[0] for part in parts[1:]] == [
        str(1 + int(part.split("\n\n")[-1].split()[0])) for part in parts[:-1]
    ]


# ---------------------------------------------------------------- models that read it

SHAPE = "--hidden 128 --inner 64 --experts 24 --top-k 3 --layers 2 --rows 4 --length 32 --steps 100 --balance 0.3".split()
CONFIG = REPO / "configs/make_text_35m.env"


def training(corpus, out, *more):
    paths = ["--text", corpus, "--out", out / "model", "--work", out / "work", "--result", out / "text_toy.json"]
    flags = [*SHAPE, "--workers", "0", "--save-every", "25", "--probe-items", "2", "--max-seconds", "0"]
    return list(map(str, ["src/distill/tiny_train.py", "--config", CONFIG, *flags, *paths, *more]))


def started(*arguments):
    return subprocess.Popen([sys.executable, *arguments], cwd=REPO, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                            env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""})  # fmt: skip


def curve(out):
    entries = json.loads((out / "text_toy.json").read_text())["metrics"]["curve"]
    return [[entry[key] for key in ("step", "loss", "grad_norm", "min_load")] for entry in entries]


@pytest.mark.slow
def test_a_killed_training_and_two_processes_have_the_curve_of_one(corpus, command, tmp_path):
    one, killed, two = (tmp_path / name for name in ("one", "killed", "two"))
    done = command(*training(corpus, one))
    assert done.returncode == 0, done.stderr
    record = read_result(one / "text_toy.json", "train")
    assert [entry["name"] for entry in record["data"]] == ["tokens, train", "tokens, heldout"]
    assert record["data"][0]["sha256"] == hashlib.sha256((corpus / "train.bin").read_bytes()).hexdigest()
    assert record["metrics"]["heldout"]["prose"]["positions"] == 32 and record["model"]["tensors"]
    losses = [entry[1] for entry in curve(one)]
    assert len(losses) == 2 and losses[-1] < losses[0]

    process = started(*training(corpus, killed))
    deadline = time.monotonic() + 120
    while not (killed / "work/state.pt").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL, said
    done = command(*training(corpus, killed))
    assert done.returncode == 0 and "from step 25 of 100" in done.stdout, done.stdout + done.stderr
    assert curve(killed) == curve(one)
    done = command(*training(corpus, killed, "--balance", "0.5"))
    assert done.returncode == 2 and "made with other settings or data" in done.stderr

    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    process = started(*torchrun, *training(corpus, two))
    said, _ = process.communicate(timeout=200)
    assert process.returncode == 0 and "terminate" not in said, said[-3000:]
    np.testing.assert_allclose(curve(two), curve(one), rtol=1e-3)
    assert read_result(two / "text_toy.json")["metrics"]["processes"] == 2


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--hidden", "192"], "HIDDEN=192: must be a multiple of 128"),
        (["--top-k", "25"], "TOP_K between 1 and EXPERTS"),
        (["--length", "160000"], "LENGTH=160000 needs more"),
        (["--length", "24"], "LENGTH=24: must be a multiple of 16"),
        (["--text", "work/no-such-corpus"], "bash pipelines/make_text.sh makes a corpus"),
    ],
    ids=["hidden", "top_k", "length", "chunks", "no corpus"],
)
def test_a_training_that_cannot_be_is_refused(corpus, command, tmp_path, more, said):
    done = command(*training(corpus, tmp_path, *more))
    assert done.returncode == 2 and said in done.stderr and not (tmp_path / "work/state.pt").exists()
