"""Download from a hub: killed and resumed, checked, one clear line on each failure. The hub is a server of its interface."""

import hashlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import gguf
import numpy as np
import pytest

REPO = Path(__file__).resolve().parent.parent
RATE = 6e6


def write_gguf(path, size, experts=True):
    """A GGUF of random weights of about ``size`` bytes."""
    writer = gguf.GGUFWriter(path, "qwen35moe")
    name = "blk.0.ffn_up_exps.weight" if experts else "blk.0.attn_q.weight"
    writer.add_tensor(name, np.random.default_rng(0).standard_normal((4, size // 16 // 256, 256), dtype=np.float32))
    writer.add_tensor("output_norm.weight", np.ones(256, dtype=np.float32))
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """(address, root of its repositories, log of its requests)."""
    work = tmp_path_factory.mktemp("hub")
    root = work / "root"
    for name in ("one", "several", "split", "liar"):
        (root / "me" / name).mkdir(parents=True)
    write_gguf(root / "me/one/model-IQ3_XXS.gguf", 48_000_000)
    write_gguf(root / "me/liar/wrong.gguf", 100_000)
    (root / "wrong.gguf.digest").write_text("0" * 64)
    for name in ("a.gguf", "b.gguf"):
        write_gguf(root / "me/several" / name, 20_000, experts=False)
    for part in (1, 2):
        write_gguf(root / f"me/split/m-0000{part}-of-00002.gguf", 20_000)
    server = subprocess.Popen(
        [sys.executable, REPO / "tests/hub_server.py", root, work / "port", work / "log", "--rate", str(RATE)]
    )
    while not (work / "port").exists() or not (work / "port").read_text():
        time.sleep(0.02)
    yield f"http://127.0.0.1:{(work / 'port').read_text()}", root, work / "log"
    server.kill()
    server.wait()


def fetch(address, *arguments, cwd=REPO, **environment):
    """A started command."""
    environment = {"HF_ENDPOINT": address, "HF_HOME": str(cwd), "HF_TOKEN": "hf_secret", **environment}
    command = [sys.executable, REPO / "src/eval/fetch_gguf.py", *map(str, arguments)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, cwd=cwd, env=os.environ | environment)


@pytest.mark.slow
def test_a_killed_download_goes_on_and_is_checked(hub, tmp_path):
    address, root, log = hub
    out, source = tmp_path / "out", root / "me/one/model-IQ3_XXS.gguf"
    size, digest = source.stat().st_size, hashlib.sha256(source.read_bytes()).hexdigest()
    partial = out / f"{source.name}.{digest[:12]}.partial"
    first = fetch(address, "me/one", "--out", out, cwd=tmp_path)
    while not (partial.exists() and partial.stat().st_size > 1 << 20):
        assert first.poll() is None, first.communicate()
        time.sleep(0.05)
    _, stderr = fetch(address, "me/one", "--out", out, cwd=tmp_path).communicate(timeout=120)
    assert f"error: {out / source.name}: another run is fetching it" in stderr and partial.stat().st_size > 1 << 20
    first.send_signal(signal.SIGKILL)
    first.wait()
    kept = partial.stat().st_size
    assert 1 << 20 < kept < size and not (out / source.name).exists()
    time.sleep(0.3)  # the server notes what it sent
    before = len(log.read_text().splitlines())
    stdout, stderr = fetch(address, "me/one", "--out", out, cwd=tmp_path).communicate(timeout=120)
    file = out / source.name
    assert f"goes on at {kept:,}" in stdout, stderr
    assert hashlib.sha256(file.read_bytes()).hexdigest() == digest and not partial.exists()
    stored = [line.split() for line in log.read_text().splitlines()[before:] if " /storage/" in line]
    assert [(line[2], int(line[3])) for line in stored] == [(f"bytes={kept}-{size - 1}", size - kept)]
    assert (out / f"{source.name}.sha256").read_text() == f"{digest}  {source.name}\n"
    assert f"bash pipelines/deploy.sh --model {file} --serve" in stdout
    again, _ = fetch(address, "me/one", source.name, "--out", out, cwd=tmp_path).communicate(timeout=120)
    assert "is there" in again and "goes on" not in again
    assert {path.name for path in out.iterdir()} == {source.name, f"{source.name}.sha256"}
    told = file.stat()
    with file.open("r+b") as stream:
        stream.seek(size // 2)
        stream.write(bytes(4096))
    os.utime(file, ns=(told.st_atime_ns, told.st_mtime_ns))
    _, damaged = fetch(address, "me/one", source.name, "--out", out, cwd=tmp_path).communicate(timeout=120)
    assert f"{file}: damaged since it was fetched" in damaged and file.stat().st_size == size


@pytest.mark.slow
def test_each_failure_is_one_line_and_leaves_nothing(hub, tmp_path):
    address = hub[0]
    other = tmp_path / "out/a.gguf"
    other.parent.mkdir()
    other.write_bytes(b"something else")
    cases = {
        ("me/gated",): f"me/gated: gated; accept its terms on {address}/me/gated, then hf auth login",
        ("me/none",): "me/none: no such repository",
        ("me/one", "other.gguf"): "has no other.gguf; it has model-IQ3_XXS.gguf",
        ("me/one", "--revision", "v9"): "no such revision",
        ("me/several",): "2 models; name one of its files",
        ("me/several", "a.gguf"): "another file than the hub's a.gguf",
        ("me/split", "m-00002-of-00002.gguf"): "give the first, m-00001-of-00002.gguf",
        ("me/liar",): f"expected {'0' * 64}; it was removed, run again",
        ("me/one", "--sha256", "1" * 64): "one of them is of another file",
        ("me one",): "not the name of a repository",
    }
    out = ("--out", tmp_path / "out")
    started = {fetch(address, *case, *out, cwd=tmp_path): wanted for case, wanted in cases.items()}
    started[fetch("http://127.0.0.1:9", "me/one", *out, cwd=tmp_path)] = "cannot be fetched from http://127.0.0.1:9"
    started[fetch(address, "me/one", *out, cwd=tmp_path, HF_HUB_OFFLINE="1")] = "HF_HUB_OFFLINE is set"
    for process, wanted in started.items():
        _, stderr = process.communicate(timeout=180)
        lines = [line for line in stderr.splitlines() if line.startswith("error: ")]
        assert process.returncode == 2 and len(lines) == 1 and wanted in stderr and "Traceback" not in stderr, (wanted, stderr)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["a.gguf"]


def test_a_split_model_is_fetched_whole(hub, tmp_path):
    stdout, stderr = fetch(hub[0], "me/split", "--out", tmp_path, cwd=tmp_path).communicate(timeout=120)
    names = sorted(path.name for path in tmp_path.glob("*.gguf"))
    assert names == ["m-00001-of-00002.gguf", "m-00002-of-00002.gguf"], stderr
    assert f"bash pipelines/deploy.sh --model {tmp_path / names[0]} --serve" in stdout
    assert all((tmp_path / f"{name}.sha256").is_file() for name in names)


def test_a_full_disk_is_said_before_anything_is_fetched(tmp_path):
    from console import UserError
    from fetch_gguf import Remote, check_disk

    remote = Remote("me/huge", "huge.gguf", "main", 10**18, "0" * 64)
    with pytest.raises(UserError, match="1000000000.00 GB are to come"):
        check_disk([remote], tmp_path)
    remote.partial(tmp_path).touch()
    os.truncate(remote.partial(tmp_path), 10**12)  # sparse: what is there counts
    with pytest.raises(UserError, match="999999000.00 GB are to come"):
        check_disk([remote], tmp_path)
