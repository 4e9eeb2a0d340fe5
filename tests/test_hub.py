"""Models of the hub, read where they lie: the same bytes as from a directory, the disk that it takes, faults, resuming, speed.
The hub is a server of its interface."""

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import hub
from checkpoint import Checkpoint, different_file
from console import SourceError, UserError
from hub import Remote, make_directory
from run_dir import partial_of
from safetensors_file import CheckpointWriter

REPO = Path(__file__).resolve().parent.parent
QUANTIZE = ("src/quant/quant_save.py", "--expert-bits", 3, "--linear-bits", 4, "--group", 128)
TEXT = ("--calib-sequences", 4, "--calib-length", 64)
ZEROS, ONES = "0" * 40, "1" * 40


def sharded(model, out, shard_bytes):
    """The checkpoint in several shards; returns ``out``."""
    shutil.copytree(model, out, ignore=shutil.ignore_patterns("*.safetensors"))
    source = Checkpoint(model)
    plan = [(name, info.dtype, info.shape) for name, info in source.tensors.items()]
    with CheckpointWriter(out, plan, shard_bytes) as writer:
        for name in source.tensors:
            writer.append(name, source.read(name))
    return out


def start(root, work, *more):
    """(a running server, its address)."""
    port = work / f"port{len(list(work.glob('port*')))}"
    server = subprocess.Popen([sys.executable, REPO / "tests/hub_server.py", root, port, work / "log", *map(str, more)])
    while not port.exists() or not port.read_text():
        time.sleep(0.02)
    return server, f"http://127.0.0.1:{port.read_text()}"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """(address, root): razor-tiny in five shards, another commit of it, and razor-tiny-vl."""
    work = tmp_path_factory.mktemp("hub")
    root = work / "root"
    tiny = sharded(REPO / "models/razor-tiny", root / "me/razor-tiny", 7 << 20)
    shutil.copytree(tiny, root / f"me/razor-tiny@{ONES}")
    shutil.copytree(REPO / "models/razor-tiny-vl", root / "me/razor-tiny-vl")
    (root / "me/old.moved").write_text("razor-tiny")
    process, address = start(root, work)
    yield address, root
    process.kill()
    process.wait()


@pytest.fixture
def local(server, tmp_path, monkeypatch):
    """The server's root, with this process and those that it starts asking the server, and an empty cache."""
    from huggingface_hub import constants

    import llama_cpp

    llama_cpp.source()  # of the real cache
    address, root = server
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 2)
    for key, value in {"HF_ENDPOINT": address, "MOE_LOWBIT_CACHE": str(tmp_path / "cache"), "HF_TOKEN": "hf_secret"}.items():
        monkeypatch.setenv(key, value)
    (root / "faults.json").unlink(missing_ok=True)
    (root / "me/razor-tiny.commit").unlink(missing_ok=True)
    return root


def files(directory):
    """The digest of every file of an output; of recipe.json without the name of the hub's model."""
    found = {path.name: path.read_bytes() for path in sorted(directory.iterdir()) if path.is_file()}
    recipe = json.loads(found["recipe.json"])
    assert recipe["source"].pop("hub", None) in (None, f"hf:me/{recipe['source']['name']}@{ZEROS}")
    return {name: hashlib.sha256(data).hexdigest() for name, data in found.items() if name != "recipe.json"} | {"r": recipe}


def disk(directory):
    """Bytes on disk of everything in a directory."""
    return sum(path.stat().st_blocks * 512 for path in directory.rglob("*"))


def told(stdout):
    """(MB that the plan says are fetched, MB that were) of a command's output."""
    planned, fetched = re.search(r"([\d.,]+) GB to fetch", stdout), re.search(r": ([\d.,]+) MB fetched", stdout)
    return 1e3 * float(planned[1]), float(fetched[1])


CASES = {
    "absmax": (*QUANTIZE, "--method", "absmax"),
    "gptq": (*QUANTIZE, "--method", "gptq", *TEXT, "--token-power", 0.4),
    "ldlq": ("src/quant/gguf_pack.py", "--base-type", "Q4_K", "--method", "ldlq", *TEXT),
    "vision": ("src/quant/gguf_pack.py", "--base-type", "Q8_0", "--method", "nearest", *TEXT, "--calib", REPO / "README.md"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_the_same_bytes_as_from_a_directory(local, tmp_path, command, name):
    script, *more = CASES[name]
    model = "razor-tiny-vl" if name == "vision" else "razor-tiny"
    done = command(script, "--model", f"hf:me/{model}@{ZEROS}", "--out", tmp_path / "remote", *more)
    assert done.returncode == 0, done.stderr
    assert command(script, "--model", local / "me" / model, "--out", tmp_path / "plain", *more).returncode == 0
    assert files(tmp_path / "remote") == files(tmp_path / "plain")
    assert disk(tmp_path / "cache") < 1 << 20
    planned, fetched = told(done.stdout)
    assert 0.98 * planned - 1 < fetched < 1.02 * planned + 1, done.stdout
    checked = re.search(r"(\d) of (\d) shards passed whole", done.stdout)
    assert bool(checked) == (name == "absmax") and (not checked or checked[1] == checked[2])


def test_a_probe_sees_the_same(local, tmp_path, command):
    reports = []
    for model in ("hf:me/razor-tiny", local / "me/razor-tiny"):
        done = command(
            "src/quant/moe_probe.py", "--model", model, *TEXT, "--result", tmp_path / "p.json", "--tag", "p", "--force"
        )
        assert done.returncode == 0, done.stderr
        reports.append(json.loads((tmp_path / "p.json").read_text())["metrics"])
    assert reports[0] == reports[1] and disk(tmp_path / "cache") < 1 << 20


def test_what_is_read_twice_lies_in_the_cache(local, tmp_path, command):
    script, *more = CASES["gptq"]
    more = ("--model", f"hf:me/razor-tiny@{ZEROS}", *more, "--hub-cache-gib")
    done = command(script, "--out", tmp_path / "all", *more, 1)
    assert told(done.stdout)[1] < 33 < told(done.stdout)[0] < 200
    part = command(script, "--out", tmp_path / "part", *more, 0.02)
    assert disk(tmp_path / "cache") < (0.02 * 2**30) + (1 << 20) and told(part.stdout)[1] < told(part.stdout)[0] - 20
    assert files(tmp_path / "all") == files(tmp_path / "part")


FAULTS = [
    {"path": "/api/", "kind": 503, "times": 1},
    {"path": "config.json", "kind": 429, "times": 1},
    {"path": "/resolve/", "kind": 503, "times": 2},
    {"path": "storage/me/razor-tiny/model-00001", "kind": 503, "times": 2},
    {"path": "storage/me/razor-tiny/model-00002", "kind": 429, "times": 2},
    {"path": "storage/me/razor-tiny/model-00003", "kind": "cut", "times": 3},
    {"path": "storage/me/razor-tiny/model-00004", "kind": "stall", "times": 1},
    {"path": "storage/me/razor-tiny/model-00005", "kind": 403, "times": 1},
]


def test_faults_change_no_byte(local, tmp_path, command):
    (local / "faults.json").write_text(json.dumps(FAULTS))
    record = tmp_path / "record.json"
    done = command(*CASES["absmax"], "--model", "hf:me/razor-tiny", "--out", tmp_path / "o", "--result", record, "--tag", "hub")
    assert done.returncode == 0 and f"taken as hf:me/razor-tiny@{ZEROS}" in done.stdout, done.stderr
    assert not any(fault["times"] for fault in json.loads((local / "faults.json").read_text()))
    assert "5 of 5 shards passed whole" in done.stdout
    written = json.loads(record.read_text())
    assert written["model"]["path"] == f"hf:me/razor-tiny@{ZEROS}" and written["model"]["path"] in written["command"]
    command(*CASES["absmax"], "--model", local / "me/razor-tiny", "--out", tmp_path / "p")
    assert files(tmp_path / "o") == files(tmp_path / "p")


WRONG = {
    "me/gated": "gated; accept its terms",
    "me/none": "no such repository",
    f"me/razor-tiny@{'2' * 40}": "no such revision",
    "me/old": f"is now called me/razor-tiny; give hf:me/razor-tiny@{ZEROS}",
    "razor-tiny": "expected hf:ORG/NAME@COMMIT",
}


def test_each_failure_is_one_line(local, tmp_path, command, monkeypatch):
    for name, wanted in WRONG.items():
        done = command(*CASES["absmax"], "--model", f"hf:{name}", "--out", tmp_path / "o")
        assert done.returncode == 2 and wanted in done.stderr and done.stderr.count("\n") == 1, done.stderr
    monkeypatch.setattr(hub, "WAITS", (0, 0))
    for kind, wanted, kept in (("whole", "does not know ranges", False), ("flip", "the hub tells", False), (503, "503", True)):
        (local / "faults.json").unlink(missing_ok=True)
        directory = make_directory(f"hf:me/razor-tiny@{ZEROS}")
        faults = [{"path": "storage/me/razor-tiny/model-00002", "kind": kind, "times": 99}]
        (local / "faults.json").write_text(json.dumps(faults))
        done = command(*CASES["absmax"], "--model", f"hf:me/razor-tiny@{ZEROS}", "--out", tmp_path / "o")
        errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert done.returncode == 2 and len(errors) == 1 and wanted in errors[0] and "Traceback" not in done.stderr
        assert partial_of(tmp_path / "o").exists() == kept and not (tmp_path / "o").exists(), kind
    (local / "faults.json").unlink()
    assert command(*CASES["absmax"], "--model", directory, "--out", tmp_path / "o").returncode == 0  # it goes on
    done = command("src/quant/gguf_pack.py", "--model", "hf:me/razor-tiny", "--out", tmp_path / "r", "--base-type", "Q8_0",
                   "--reference")  # fmt: skip
    assert done.returncode == 2 and "read weights from a disk" in done.stderr


def test_without_a_network_or_off_line(local, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(SourceError, match="HF_HUB_OFFLINE is set"):
        make_directory("hf:me/razor-tiny")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(SourceError, match="cannot be fetched from http://127.0.0.1:9"):
        make_directory("hf:me/razor-tiny")


def test_another_file_under_the_same_commit_is_refused(local, monkeypatch):
    checkpoint = Checkpoint(make_directory(f"hf:me/razor-tiny@{ZEROS}"))
    name = next(iter(checkpoint.tensors))
    link = checkpoint.remote.links[checkpoint.tensors[name].file.name]
    link.digest = "3" * 64
    with pytest.raises(UserError, match="the hub now has another file under this commit"):
        checkpoint.read(name)


@pytest.mark.slow
def test_a_killed_run_goes_on_and_another_commit_is_refused(server, local, tmp_path, command):
    process, address = start(local, tmp_path, "--rate", 12e6)
    out = tmp_path / "o"
    run = [sys.executable, *map(str, CASES["absmax"]), "--model", "hf:me/razor-tiny", "--out", str(out), "--shard-gib", "0.005"]
    first = subprocess.Popen(run, cwd=REPO, env=os.environ | {"HF_ENDPOINT": address}, stdout=subprocess.DEVNULL)
    while len(list(partial_of(out).glob("*.safetensors"))) < 2:
        assert first.poll() is None
        time.sleep(0.02)
    first.send_signal(signal.SIGKILL)
    first.wait()
    process.kill()
    process.wait()
    assert len(list(partial_of(out).glob("*.safetensors"))) < 7
    (local / "me/razor-tiny.commit").write_text(ONES)
    (local / f"me/razor-tiny@{ZEROS}").symlink_to(local / "me/razor-tiny")
    done = command(*run[1:])
    assert done.returncode == 2 and f"it was hf:me/razor-tiny@{ZEROS}, now it is hf:me/razor-tiny@{ONES}" in done.stderr
    done = command(*[text.replace("hf:me/razor-tiny", f"hf:me/razor-tiny@{ZEROS}") for text in run[1:]])
    assert done.returncode == 0 and "(resumed)" in done.stdout and told(done.stdout)[1] < 28, done.stderr
    command(*CASES["absmax"], "--model", local / "me/razor-tiny", "--out", tmp_path / "p", "--shard-gib", 0.005)
    assert files(out) == files(tmp_path / "p")


def test_the_identity_is_the_commit_and_what_the_hub_tells(local):
    remote, plain = Checkpoint(make_directory("hf:me/razor-tiny")), Checkpoint(local / "me/razor-tiny")
    other = Checkpoint(make_directory(f"hf:me/razor-tiny@{ONES}"))
    assert different_file(remote.identity, other.identity).startswith(f"it was hf:me/razor-tiny@{ZEROS}")
    shards = {file.name: f"{file.stat().st_size}:{hashlib.sha256(file.read_bytes()).hexdigest()}" for file in plain.files}
    assert remote.identity == shards | {"commit": remote.remote.uri} | {
        name: value for name, value in plain.identity.items() if name not in shards
    }
    assert remote.sha256() == plain.sha256() and remote.bytes == plain.bytes


@pytest.mark.parametrize("cache", [0, 5 << 20, 1 << 30])
def test_any_span_in_any_order_is_that_of_the_file(local, monkeypatch, cache):
    """Expected or not, in pieces that fit no request, by several threads, from a cache that forgets."""
    from concurrent.futures import ThreadPoolExecutor

    monkeypatch.setattr(hub, "RANGE_BYTES", 1 << 20)
    directory = make_directory("hf:me/razor-tiny")
    remote, plain = Remote(directory, cache), Checkpoint(local / "me/razor-tiny")
    infos = [remote.tensor(info) for info in plain.tensors.values()]
    draw = torch.Generator().manual_seed(0)
    pick = [int(i) for i in torch.randint(0, len(infos), (60,), generator=draw)]
    remote.expect([[infos[i] for i in pick[:20]], [infos[i] for i in pick[10:40]]], 2 << 20)

    def check(number):
        info = infos[number]
        start = number % info.shape[0]
        assert torch.equal(info.read(start, 1), plain.read(info_names[number])[start : start + 1])
        assert torch.equal(info.read(), plain.read(info_names[number]))

    info_names = list(plain.tensors)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(check, pick))
    remote.expect([])
    kept = sum(file.stat().st_size for file in (directory / "cache").iterdir()) if cache else 0
    assert kept <= cache and remote.held == 0 and not any(remote.window.values())


@pytest.mark.slow
def test_the_pass_takes_what_the_line_gives(local, tmp_path, monkeypatch):
    """At least 90 % of a server's rate."""
    from huggingface_hub import constants

    rate = 16e6
    process, address = start(local, tmp_path, "--rate", rate)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    checkpoint = Checkpoint(make_directory("hf:me/razor-tiny"))
    started = time.perf_counter()
    checkpoint.expect([list(checkpoint.tensors)], hub.AHEAD_BYTES, whole=True)
    for name in checkpoint.tensors:
        checkpoint.read(name)
    seconds = time.perf_counter() - started
    process.kill()
    process.wait()
    assert checkpoint.remote.right == 5 and checkpoint.bytes / seconds > 0.9 * rate, seconds


@pytest.mark.slow
def test_the_plan_of_a_published_model_takes_seconds(local, tmp_path, command):
    from size_model import SHAPES
    from synthetic_moe import prepare

    directory = local / "me/huge"
    prepare(directory, SHAPES["122b"], 0, published="3.5")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(REPO / "models/razor-tiny" / name, directory)
    shards = list(directory.glob("*.safetensors"))
    for file in shards:
        (local / f"{file.name}.digest").write_text("4" * 64)
    started = time.perf_counter()
    done = command(*QUANTIZE, "--method", "absmax", "--model", "hf:me/huge", "--out", tmp_path / "o", "--dry-run")
    seconds = time.perf_counter() - started
    for file in shards:
        (local / f"{file.name}.digest").unlink()
    assert done.returncode == 0 and "GB; 250.1" in done.stdout and seconds < 60, (seconds, done.stdout, done.stderr)
    assert disk(tmp_path / "cache") < 30 << 20
