"""Puts the three source folders on the import path, for the tests and for the processes that they start."""

import atexit
import contextlib
import json
import os
import runpy
import shutil
import subprocess
import sys
import tempfile
import traceback
import unittest.mock
import warnings
from collections import Counter
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent
SOURCES = [str(REPO / "src" / folder) for folder in ("quant", "eval", "distill")]
sys.path[:0] = SOURCES
os.environ["PYTHONPATH"] = os.pathsep.join([*SOURCES, *filter(None, [os.environ.get("PYTHONPATH")])])
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # before torch is imported: waiting threads give the core to other workers


def pytest_collection_modifyitems(items):
    """Files with the most slow tests first: a worker takes a file at a time, and the last ones should be short."""
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])


@pytest.fixture(scope="session")
def random_tiny(tmp_path_factory):
    """A checkpoint of razor-tiny's architecture and tokenizer with untrained weights and four layers instead of eight."""
    from transformers import Qwen3_5MoeForCausalLM

    from hf_model import load_tokenizer
    from tiny_model import init_weights, tiny_config

    path = tmp_path_factory.mktemp("models") / "random-tiny"
    tokenizer = load_tokenizer(REPO / "models/razor-tiny")
    model = Qwen3_5MoeForCausalLM(tiny_config(len(tokenizer), tokenizer.eos_token_id, tokenizer.pad_token_id, layers=4))
    init_weights(model, seed=0)
    model.bfloat16().save_pretrained(path)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):  # saved anew it would split text otherwise
        shutil.copy(REPO / "models/razor-tiny" / name, path)
    return path


def untrained_vl(path, texts, layers):
    """An untrained Qwen3_5MoeForConditionalGeneration with its processor, as transformers writes it; returns ``path``."""
    from tiny_data import build_vl_tokenizer, vl_texts
    from tiny_model import build_vl_model, save_processor, vl_config

    tokenizer = build_vl_tokenizer(vl_texts(texts))
    build_vl_model(vl_config(tokenizer, layers, 1), 0).bfloat16().save_pretrained(path)
    save_processor(tokenizer, path)
    return path


def log_row(benchmark, item, **more):
    """A row of a sample log, answered rightly."""
    row = {"benchmark": benchmark, "id": str(item), "prompt_sha256": f"prompt {item}", "tokens": 3, "finish_reason": "stop"}
    return row | {"text": "a\u2028b", "extracted": "4", "gold": "4", "correct": True} | more


def write_evaluation(directory, tag, rows, settings=None, **fields):
    """A finished evaluation in ``directory``/eval: its log, and the record that counts the log's rows."""
    from records import write_result
    from runner import summarize
    from sample_log import SampleLog

    log = directory / f"eval/{tag}.samples.jsonl"
    log.unlink(missing_ok=True)
    with SampleLog(log, {"sampling": {}, "limit": None} | (settings or {})) as kept:
        kept.append(rows)
    names = dict.fromkeys(row["benchmark"] for row in rows)
    metrics = {name: summarize([row for row in rows if row["benchmark"] == name]) for name in names}
    fields = {"started": 1e9, "model": {"path": "gone", "config_sha256": "0", "family": None}, "metrics": metrics} | fields
    fields |= {"sampling": {"temperature": 0.0}, "extra": {"samples": log.name}}
    write_result(directory / f"eval/{tag}.json", kind="eval", tag=tag, **fields)
    return log


@contextlib.contextmanager
def as_a_process(script, arguments, cwd, streams):
    """What a new process would have of its own, and give back: arguments, folder, environment, output, seed, threads, exit
    handlers."""
    argv, environment, where, ends, register = sys.argv, dict(os.environ), os.getcwd(), [], atexit.register

    def at_end(end, *given, **named):
        ours = str(REPO / "src") in (getattr(sys.modules.get(end.__module__), "__file__", None) or "")
        ends.append(end) if ours else register(end, *given, **named)
        return end

    kept = [os.dup(descriptor) for descriptor in (1, 2)]
    sys.stdout.flush()
    sys.stderr.flush()
    for descriptor, stream in zip((1, 2), streams):
        os.dup2(stream.fileno(), descriptor)
    torch = sys.modules.get("torch")
    threads = torch.get_num_threads() if torch else 0
    with (
        warnings.catch_warnings(),
        torch.random.fork_rng(devices=()) if torch else contextlib.nullcontext(),
        os.fdopen(1, "w", buffering=1, closefd=False) as out,
        os.fdopen(2, "w", buffering=1, closefd=False) as err,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        unittest.mock.patch("atexit.register", at_end),
    ):
        if torch:
            torch.manual_seed(0)
        try:
            sys.argv = [str(script), *arguments]
            os.chdir(cwd)
            yield
        finally:
            if torch:
                torch.set_num_threads(threads)
            for end in ends:
                end()
            sys.argv = argv
            os.chdir(where)
            os.environ.clear()
            os.environ.update(environment)
            out.flush()
            err.flush()
            for descriptor, original in zip((1, 2), kept):
                os.dup2(original, descriptor)
                os.close(original)


FORKING = """
import json, os, runpy, sys, tempfile
sys.path[:0] = [sys.argv[1] + "/gguf-py", sys.argv[1]]
import gguf, torch, transformers
from conversion import base
for line in sys.stdin:
    with tempfile.TemporaryFile() as said:
        if not (child := os.fork()):
            code = 1
            try:
                os.dup2(said.fileno(), 1), os.dup2(said.fileno(), 2)
                sys.argv = json.loads(line)
                runpy.run_path(sys.argv[0], run_name="__main__")
                code = 0
            except SystemExit as end:
                print(end.code, file=sys.stderr)
            except BaseException as error:
                print(f"{type(error).__name__}: {error}", file=sys.stderr)
            finally:
                sys.stdout.flush(), sys.stderr.flush()
                os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        said.seek(0)
        print(json.dumps([code, said.read().decode("utf-8", "replace")]), flush=True)
"""


@pytest.fixture(scope="module")
def quick_converter():
    """llama.cpp's converter forked from a process that has imported what it needs, instead of a new one for each call."""
    import gguf_format
    import llama_cpp

    process = subprocess.Popen(
        [sys.executable, "-c", FORKING, llama_cpp.source()], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )

    def watched(command, *rest, **more):
        if str(gguf_format.DRIVER) not in map(str, command):
            return real(command, *rest, **more)
        process.stdin.write(json.dumps(list(map(str, command[1:]))) + "\n")
        process.stdin.flush()
        return tuple(json.loads(process.stdout.readline()))

    real = llama_cpp.watched
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(llama_cpp, "watched", watched)
        yield
    process.stdin.close()
    process.wait()


@pytest.fixture(scope="session")
def bf16_gguf(tmp_path_factory):
    """razor-tiny as llama.cpp's converter writes it."""
    if not os.environ.get("LLAMA_CPP"):
        pytest.skip("LLAMA_CPP is not set: the folder of llama.cpp's programs (bash pipelines/test.sh sets it)")
    from gguf_format import run_converter

    out = tmp_path_factory.mktemp("gguf") / "razor-tiny-BF16.gguf"
    run_converter("convert", REPO / "models/razor-tiny", "--outfile", out, "--outtype", "bf16", "--no-mtp")
    return out


@pytest.fixture
def command():
    """Run one of the project's commands as a user would: command("src/quant/quant_save.py", ...) -> CompletedProcess. In this
    process, since a new one imports torch and transformers for seconds; tests of signals and of memory start their own."""

    def run(script, *arguments, cwd=REPO):
        with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
            arguments, code = list(map(str, arguments)), 0
            with as_a_process(REPO / script, arguments, cwd, (out, err)):
                try:
                    runpy.run_path(str(REPO / script), run_name="__main__")
                except SystemExit as end:
                    code = end.code or 0
                except BaseException:
                    traceback.print_exc()
                    code = 1
            texts = [stream.seek(0) or stream.read() for stream in (out, err)]
        return subprocess.CompletedProcess([str(script), *arguments], code, *texts)

    return run
