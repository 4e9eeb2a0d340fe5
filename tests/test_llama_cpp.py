"""llama.cpp is found or built: one build for many runs, a killed one is taken up again, wrong directories are named."""

import os
import subprocess
import sys
import time

import pytest

import llama_cpp
from console import UserError
from settings import read_part

FAKE_NINJA = """#!/bin/sh
echo run >>"$CALLS"
[ "$1" = -C ] && cd "$2"
mkdir -p bin
for i in 1 2 3; do echo "[$i/3] building"; sleep 0.3; done
for tool in {tools}; do printf '#!/bin/sh\\nexit 0\\n' >bin/$tool; chmod +x bin/$tool; done
"""


@pytest.fixture
def build(tmp_path):
    """Start what pipelines/llama_cpp.sh runs, with stand-ins for the compiler and a source that is already in the cache."""
    pinned = read_part(llama_cpp.Pinned, llama_cpp.CONFIG)
    (tmp_path / f"cache/llama.cpp-{pinned.llama_cpp_version}-source").mkdir(parents=True)
    programs = {
        "cmake": "#!/bin/sh\nexit 0\n", "c++": "#!/bin/sh\n", "ninja": FAKE_NINJA.format(tools=" ".join(llama_cpp.TOOLS))
    }  # fmt: skip
    (tmp_path / "bin").mkdir()
    for name, text in programs.items():
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    environment = {key: value for key, value in os.environ.items() if not key.startswith("LLAMA_CPP")}
    environment |= {
        "PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin",
        "MOE_LOWBIT_CACHE": str(tmp_path / "cache"),
        "CALLS": str(tmp_path / "calls"),
    }  # fmt: skip

    def start():
        command = [sys.executable, "-c", "import llama_cpp; from console import run_cli; run_cli(llama_cpp.main)"]
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    start.home = tmp_path / f"cache/llama.cpp-{pinned.llama_cpp_version}-cpu"
    start.calls = tmp_path / "calls"
    return start


def test_two_runs_build_once_and_a_killed_build_is_no_build(build):
    first = build()
    while not build.calls.exists():
        time.sleep(0.05)
    first.kill()
    first.wait()
    assert not build.home.exists()
    runs = [build(), build()]
    outputs = [run.communicate(timeout=60) for run in runs]
    assert [run.returncode for run in runs] == [0, 0], outputs
    assert all(out.splitlines()[-1] == str(build.home) for out, _ in outputs)
    assert len(build.calls.read_text().splitlines()) == 2  # the killed one and one of the two
    started = time.monotonic()
    assert build().wait() == 0 and time.monotonic() - started < 5
    assert sorted(path.name for path in build.home.parent.iterdir() if not path.name.startswith(".")) == [
        build.home.name, build.home.name.replace("-cpu", "-source")
    ]  # fmt: skip


def test_a_directory_without_the_tools_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("LLAMA_CPP", str(tmp_path))
    llama_cpp.tools.cache_clear()
    with pytest.raises(UserError, match=r"LLAMA_CPP=.*no llama-quantize in it"):
        llama_cpp.tools()
    (tmp_path / "build/bin").mkdir(parents=True)
    (tmp_path / "build/bin/llama-quantize").touch(mode=0o755)
    (tmp_path / llama_cpp.CONVERTER).touch()
    llama_cpp.source.cache_clear()
    monkeypatch.delenv("LLAMA_CPP_SOURCE", raising=False)
    assert llama_cpp.tools() == tmp_path / "build/bin" and llama_cpp.source() == tmp_path
    with pytest.raises(UserError, match="llama-bench: no such program"):
        llama_cpp.tool("llama-bench")
    llama_cpp.tools.cache_clear()
    llama_cpp.source.cache_clear()


def test_a_tool_that_lost_its_last_lines_is_asked_again_and_one_that_failed_is_not():
    said = []

    def ask(*errors):
        said.append(None)
        if len(said) <= len(errors):
            raise errors[len(said) - 1]
        return len(said)

    lost = llama_cpp.Incomplete("lost")
    assert llama_cpp.asked(lambda: ask(lost, lost)) == 3
    said.clear()
    with pytest.raises(UserError, match="broken"):
        llama_cpp.asked(lambda: ask(lost, UserError("broken"), lost))
    assert len(said) == 2
    said.clear()
    with pytest.raises(UserError, match="lost"):
        llama_cpp.asked(lambda: ask(*[lost] * 20))
    assert len(said) == llama_cpp.ATTEMPTS
