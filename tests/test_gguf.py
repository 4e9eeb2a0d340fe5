"""The direct path to GGUF: equal to llama.cpp's converter, decoded exactly, the same bytes after kills; bad input."""

import json
import shutil
import subprocess
import sys
import textwrap

import gguf
import numpy as np
import pytest
import torch

from calibration import Calibration
from calibration_text import calibration_ids
from checkpoint import Checkpoint
from console import UserError
from ggml_codecs import decode_rows
from gguf_dequant import dequantize
from gguf_format import Entry, GgufFile, run_converter, write_imatrix
from gguf_layout import exact_patterns, pieces_of, read_parameter, read_patterns, to_gguf, types_of
from gguf_pack import write_pack
from pack_plan import plan_pack

PATTERNS = [("_shexp", "q8_0"), ("attn_gate|ssm_out", "f16"), ("token_embd|^output", "q8_0")]


def calibration(model):
    return Calibration(*calibration_ids(None, model, 4, 128))


@pytest.fixture(scope="module")
def mixed(random_tiny, tmp_path_factory):
    """A file of many types: (its path, its pack)."""
    out = tmp_path_factory.mktemp("mixed") / "out"
    pack, _ = plan_pack(Checkpoint(random_tiny), "q4_K", PATTERNS, "nearest", calibration(random_tiny))
    write_pack(pack, out)
    return out / pack.file_name, pack


def test_a_bf16_file_is_that_of_the_converter(random_tiny, tmp_path):
    run_converter("convert", random_tiny, "--outfile", tmp_path / "theirs.gguf", "--outtype", "bf16", "--no-mtp")
    pack, notes = plan_pack(Checkpoint(random_tiny), "bf16", [], "nearest")
    assert not notes
    write_pack(pack, tmp_path / "ours")
    theirs, ours = (gguf.GGUFReader(path) for path in (tmp_path / "theirs.gguf", tmp_path / "ours" / pack.file_name))
    assert list(theirs.fields) == list(ours.fields)
    assert [key for key in theirs.fields if theirs.fields[key].contents() != ours.fields[key].contents()] == []
    found = {tensor.name: tensor for tensor in ours.tensors}
    assert len(found) == len(theirs.tensors)
    for tensor in theirs.tensors:
        own = found[tensor.name]
        assert own.tensor_type == tensor.tensor_type and list(own.shape) == list(tensor.shape), tensor.name
        assert np.array_equal(own.data, tensor.data), tensor.name


def test_the_dequantized_checkpoint_is_what_the_file_holds(random_tiny, mixed, tmp_path):
    path, pack = mixed
    dequantize(path, random_tiny, tmp_path / "bf16")
    made, original, file = Checkpoint(tmp_path / "bf16"), Checkpoint(random_tiny), GgufFile(path)
    assert {n: (i.dtype, i.shape) for n, i in made.tensors.items()} == {
        n: (i.dtype, i.shape) for n, i in original.tensors.items()
    }
    changed = 0
    for piece in pieces_of(made):
        expected = decode_rows(file.data(piece.name), file.kind(piece.name)).view(piece.shape)
        value = to_gguf(piece, read_parameter(made, piece))
        cast = expected if value.dtype == torch.float32 else expected.to(value.dtype)
        assert (value.float() - cast.float()).abs().max() == 0, piece.name
        changed += not torch.equal(value, to_gguf(piece, read_parameter(original, piece)))
    assert changed >= sum(kind == "q4_K" for kind in pack.types.values())


def test_activations_go_on_through_the_decoded_layers(random_tiny, mixed):
    """The same importance comes from a whole model with the file's weights in the layers before: the last layer's bytes."""
    path, pack = mixed
    error = json.loads((path.parent / "recipe.json").read_text())["report"]["calibration"]["relative_output_error"]
    assert 0 < error["shared_expert"] < 1e-3 < error["routed_expert"] < 0.1
    piece = next(p for p in pack.pieces if p.name == "blk.3.ffn_down_exps.weight")
    plain = decode_rows(GgufFile(path).data(piece.name), "q4_K")
    weight = read_parameter(pack.checkpoint, piece).float()
    assert ((plain - weight) ** 2).sum() < 0.02 * (weight**2).sum()


def test_types_follow_the_patterns_and_llama_cpps_rules(tmp_path):
    (tmp_path / "types.txt").write_text("# a comment\n\nffn_up_exps=Q6_k  # higher\n^output\\.weight=q8_0\nexps=iq3_xxs\n")
    patterns = read_patterns(tmp_path / "types.txt")
    shapes = {
        "blk.0.ffn_up_exps.weight": (8, 64, 256), "blk.0.ffn_down_exps.weight": (8, 256, 96), "output.weight": (320, 256),
        "blk.0.attn_q.weight": (64, 250), "blk.0.attn_norm.weight": (256,), "blk.0.ffn_gate_inp.weight": (8, 256),
        "blk.0.ssm_conv1d.weight": (512, 4), "blk.0.ffn_gate_inp_shexp.weight": (1, 256),
        "blk.0.attn_output.weight": (256, 256),
    }  # fmt: skip
    types, notes = types_of(shapes, "q3_K", patterns)
    assert list(types.values()) == ["q6_K", "iq4_nl", "q8_0", "f16", "f32", "f32", "f32", "f32", "q3_K"]
    assert [note.split(":")[0] for note in notes] == ["blk.0.ffn_down_exps.weight", "blk.0.attn_q.weight"]
    (tmp_path / "exact.txt").write_text(exact_patterns(types))
    assert types_of(shapes, "f16", read_patterns(tmp_path / "exact.txt"))[0] == types
    for text, message in (
        ("a=iq9", "type 'iq9' is unknown"),
        ("exps", "expected PATTERN=TYPE"),
        ("(=q8_0", "regular expression"),
    ):
        (tmp_path / "bad.txt").write_text(text)
        with pytest.raises(UserError, match=message):
            read_patterns(tmp_path / "bad.txt")


def test_bad_input_is_one_line(random_tiny, mixed, tmp_path, command):
    path, pack = mixed
    checkpoint = Checkpoint(random_tiny)
    write_imatrix(tmp_path / "i.gguf", {"blk.0.attn_q.weight": Entry(np.ones((1, 256)), np.ones(1))}, ["x"], 1, 512)
    (tmp_path / "short.gguf").write_bytes(path.read_bytes()[:-4096])
    (tmp_path / "text.gguf").write_text("nothing of the kind, though long enough to be read as a header")
    shutil.copytree(random_tiny, tmp_path / "llama")
    config = checkpoint.config | {"model_type": "llama"}
    (tmp_path / "llama/config.json").write_text(json.dumps(config))
    base = ["src/quant/gguf_pack.py", "--model", random_tiny, "--out", tmp_path / "o", "--base-type", "iq3_xxs"]
    dequant = ["src/quant/gguf_dequant.py", "--model", random_tiny, "--out", tmp_path / "o", "--gguf"]
    for arguments, message in (
        ([*base, "--method", "nearest", "--imatrix", tmp_path / "i.gguf"], "the imatrix has no entry for blk.0."),
        ([*base, "--imatrix", tmp_path / "i.gguf"], "holds no second moments"),
        ([*base[:-1], "iq9"], "type 'iq9' is unknown"),
        ([*base[:2], tmp_path / "llama", *base[3:]], "written directly for qwen3_5_moe"),
        ([*dequant, tmp_path / "short.gguf"], "truncated"),
        ([*dequant, tmp_path / "text.gguf"], "not a GGUF file"),
        ([*dequant, tmp_path / "i.gguf"], "architecture"),
    ):
        done = command(*arguments)
        assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert not (tmp_path / "o").exists()


@pytest.mark.slow
def test_the_reference_path_gives_the_same_types(random_tiny, tmp_path, command):
    (tmp_path / "types.txt").write_text("".join(f"{pattern}={kind}  # a comment\n" for pattern, kind in PATTERNS))
    flags = ["--calib-sequences", 4, "--calib-length", 64, "--tensor-types", tmp_path / "types.txt", "--base-type", "Q4_K"]
    run = ["src/quant/gguf_pack.py", "--reference", "--model", random_tiny, "--out", tmp_path / "o", *flags]
    done = command(*run)
    assert done.returncode == 0, done.stderr  # the command itself checks every type
    again = command(*run)
    assert again.returncode == 0 and again.stdout.count("kept ") == 4
    other = command(*run[:-1], "Q5_K")
    assert other.returncode == 0 and other.stdout.count("kept ") == 3 and len(list((tmp_path / "o").glob("*-Q?_K.gguf"))) == 2


KILLER = textwrap.dedent("""
    # Imports once, then forks a child for each attempt and kills it a random moment after it has saved something.
    import hashlib, os, random, shutil, signal, sys, time, traceback
    from pathlib import Path
    import torch, transformers
    from calibration import Calibration
    from calibration_text import calibration_ids
    from checkpoint import Checkpoint
    from gguf_pack import write_pack
    from pack_plan import plan_pack
    import ggml_scalar, transformers.models.qwen3_5_moe.modeling_qwen3_5_moe

    model, out, kills = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    partial = out / ".killed.partial"

    def attempt(target):
        torch.set_num_threads(1)
        try:
            text = Calibration(*calibration_ids(None, model, 4, 128), token_power=0.4)  # gradients first, then the layers
            pack, _ = plan_pack(Checkpoint(model), "q8_0", [], "nearest", text)
            write_pack(pack, target)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)

    def saved():
        run = partial / "run"
        try:
            return {(p.name, p.stat().st_mtime_ns) for p in run.iterdir() if p.suffix in (".st", ".json")}
        except FileNotFoundError:
            return set()

    def run(target, delay=None):
        before, child, until = saved(), os.fork(), None
        if child == 0:
            attempt(target)
        while until is None or time.monotonic() < until:
            pid, status = os.waitpid(child, os.WNOHANG)
            if pid:
                assert status == 0, "an attempt failed"
                return True
            if delay is not None and until is None and saved() - before:
                until = time.monotonic() + delay
            time.sleep(0.001)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        return False

    def digest(directory):
        (file,) = directory.glob("*.gguf")
        return hashlib.sha256(file.read_bytes()).hexdigest()

    run(out / "alone")
    expected, rng, killed = digest(out / "alone"), random.Random(0), 0
    while killed < kills:
        if run(out / "killed", rng.choice((0, 0.02, 0.1, 0.3)) * rng.random()):
            assert digest(out / "killed") == expected, "bytes differ"
            shutil.rmtree(out / "killed")
        else:
            killed += 1
    run(out / "killed")
    assert digest(out / "killed") == expected, "bytes differ"
    assert sorted(p.name for p in out.iterdir()) == ["alone", "killed"]
""")


@pytest.mark.slow
def test_kills_end_with_the_same_bytes(random_tiny, tmp_path):
    run = [sys.executable, "-c", KILLER, str(random_tiny), str(tmp_path), "12"]
    done = subprocess.run(run, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
