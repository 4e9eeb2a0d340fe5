"""Puts the three source folders on the import path, for the tests and for the processes that they start."""

import os
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent
SOURCES = [str(REPO / "src" / folder) for folder in ("quant", "eval", "distill")]
sys.path[:0] = SOURCES
os.environ["PYTHONPATH"] = os.pathsep.join([*SOURCES, *filter(None, [os.environ.get("PYTHONPATH")])])
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # before torch is imported: waiting threads give the core to other workers


@pytest.fixture(scope="session")
def random_tiny(tmp_path_factory):
    """A checkpoint of razor-tiny's architecture and tokenizer with untrained weights and four layers instead of eight."""
    from transformers import Qwen3_5MoeForCausalLM

    from tiny_model import init_weights, tiny_config
    from tiny_tokenizer import build_tokenizer

    path = tmp_path_factory.mktemp("models") / "random-tiny"
    tokenizer = build_tokenizer()
    model = Qwen3_5MoeForCausalLM(tiny_config(len(tokenizer), tokenizer.eos_token_id, tokenizer.pad_token_id, layers=4))
    init_weights(model, seed=0)
    model.bfloat16().save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def untrained_vl(path, texts, layers):
    """An untrained Qwen3_5MoeForConditionalGeneration with its processor, as transformers writes it; returns ``path``."""
    from tiny_vl_model import build_vl_model, build_vl_tokenizer, save_processor, vl_config
    from tiny_vl_train import vl_texts

    tokenizer = build_vl_tokenizer(vl_texts(texts))
    build_vl_model(vl_config(tokenizer, layers, 1), 0).bfloat16().save_pretrained(path)
    save_processor(tokenizer, path)
    return path


@pytest.fixture
def command():
    """Run one of the project's modules as a user would: command("src/quant/quant_save.py", ...) -> CompletedProcess."""
    import subprocess

    def run(script, *arguments, cwd=REPO):
        return subprocess.run(
            [sys.executable, REPO / script, *map(str, arguments)], capture_output=True, text=True, cwd=cwd, timeout=300
        )

    return run
