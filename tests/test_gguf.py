"""The direct path to GGUF: equal to llama.cpp's converter, decoded exactly, the same bytes after kills; bad input."""

import contextlib
import dataclasses
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import textwrap
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import llama_cpp
import pack_plan
import sensitivity
from calibration import Calibration
from calibration_text import calibration_ids
from checkpoint import Checkpoint, source_identity
from console import UserError
from ggml_codecs import decode_rows
from gguf_dequant import dequantize
from gguf_format import (
    Entry,
    GgufFile,
    GgufWriter,
    describe_gguf,
    part_path,
    run_converter,
    split_header,
    text_bytes,
    write_imatrix,
)
from gguf_layout import (
    check_config,
    check_header,
    check_strict,
    exact_patterns,
    extra_keys,
    fallback_notes,
    pieces_of,
    read_parameter,
    read_patterns,
    to_gguf,
    types_of,
)
from gguf_pack import check_loads, write_pack
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
    types, fallbacks = types_of(shapes, "q3_K", patterns)
    assert list(types.values()) == ["q6_K", "iq4_nl", "q8_0", "f16", "f32", "f32", "f32", "f32", "q3_K"]
    assert [one.name for one in fallbacks] == ["blk.0.ffn_down_exps.weight", "blk.0.attn_q.weight"]
    again = fallbacks[0]._replace(name="blk.1.ffn_down_exps.weight")
    stated = 8 * 256 * 96 * (4.5 - 98 / 32) / 8 / 1e6  # iq4_nl: 18 bytes for 32 weights; iq3_xxs: 98 for 256
    assert fallback_notes([*fallbacks, again]) == [
        f"blk.*.ffn_down_exps.weight: 2 of rows of 96, no multiple of the 256 of iq3_xxs: iq4_nl, {2 * stated:+.2f} MB",
        "blk.*.attn_q.weight: 1 of rows of 250, no multiple of the 256 of q3_K: f16, +0.03 MB",  # 110 bytes for 256
    ]
    with pytest.raises(UserError, match=r"ffn_down_exps.weight has rows of 96.*\(2 tensors in all\).*=iq4_nl\), or leave"):
        check_strict(fallbacks)
    check_strict([])
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
        ([*base[:2], tmp_path / "llama", *base[3:]], "no rule for it in model_type llama"),
        ([*dequant, tmp_path / "short.gguf"], "truncated"),
        ([*dequant, tmp_path / "text.gguf"], "not a GGUF file"),
        ([*dequant, tmp_path / "i.gguf"], "architecture"),
    ):
        done = command(*arguments)
        assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert not (tmp_path / "o").exists()


def with_config(model, path, changes):
    """The checkpoint with other fields in its config.json: the same weights, another function."""
    path.mkdir(exist_ok=True)
    for file in model.iterdir():
        if not (path / file.name).exists():
            (path / file.name).symlink_to(file)
    (path / "config.json").unlink()
    config = json.loads((model / "config.json").read_text())
    config["rope_parameters"] |= changes.pop("rope", {})
    (path / "config.json").write_text(json.dumps(config | changes))
    return Checkpoint(path)


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
YARN_KEYS = {"type": "yarn", "factor": 4.0, "original_context_length": 512}
LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize(
    "changes,keys,message",
    [
        ({}, {}, None),
        ({"rms_norm_eps": 1e-5}, {}, "layer_norm_rms_epsilon"),
        ({"num_experts_per_tok": 3}, {}, "expert_used_count 2, but transformers computes with 3"),
        ({"max_position_embeddings": 4096}, {}, "context_length"),
        ({"num_key_value_heads": 4}, {}, "head_count_kv"),
        ({"linear_value_head_dim": 32}, {}, "ssm.inner_size"),
        ({"layer_types": ["full_attention", *["linear_attention"] * 3]}, {}, "layer_types"),
        ({"rope": {"partial_rotary_factor": 0.5}}, {}, "rope.dimension_count 16, but transformers computes with 32"),
        ({"rope": {"mrope_section": [4, 2, 2]}}, {}, "rope.dimension_sections"),
        ({"rope": {"rope_theta": 5e5}}, {}, "cannot rotate"),
        ({"rope": {"rope_type": "linear", "factor": 4.0}}, {"type": "linear", "factor": 4.0}, None),
        ({"rope": {"rope_type": "linear", "factor": 4.0}}, {}, "differ by a factor of up to 4"),
        ({"rope": YARN}, YARN_KEYS, None),
        ({"rope": YARN | {"beta_fast": 16.0, "beta_slow": 2.0}}, YARN_KEYS, "cannot rotate"),
        ({"rope": YARN | {"beta_fast": 16.0}}, YARN_KEYS | {"yarn_beta_fast": 16.0}, None),
        ({"rope": YARN | {"attention_factor": 1.0}}, YARN_KEYS | {"yarn_attn_factor": 1.0}, "sizes by 1.139"),
        ({"rope": YARN | {"attention_factor": 1.0}}, YARN_KEYS | {"attn_factor": 1 / (1 + 0.1 * np.log(4))}, None),
        ({"rope": YARN | {"mscale": 1.0, "mscale_all_dim": 0.5}}, YARN_KEYS, "cannot rotate"),
        ({"rope": YARN | {"truncate": False}}, YARN_KEYS, "cannot rotate"),
        ({"rope": LLAMA3 | {"original_max_position_embeddings": 512}}, {}, "cannot rotate"),
    ],
)  # fmt: skip
def test_a_header_that_would_change_the_function_is_refused(random_tiny, mixed, tmp_path, changes, keys, message):
    fields = GgufFile(mixed[0]).fields | {f"qwen35moe.rope.scaling.{key}": value for key, value in keys.items()}
    checkpoint = with_config(random_tiny, tmp_path / "m", dict(changes))
    if message is None:
        check_header(fields, checkpoint)
    else:
        with pytest.raises(UserError, match=message):
            check_header(fields, checkpoint)
    extra = extra_keys(checkpoint)
    assert set(extra) == (
        {"rope.scaling.attn_factor"} if {"attention_factor", "mscale"} & set(changes.get("rope", {})) else set()
    )
    if extra and "truncate" not in changes["rope"]:
        made = fields | {f"qwen35moe.rope.scaling.{key}": value for key, value in YARN_KEYS.items()}
        check_header(made | {f"qwen35moe.{key}": value for key, value in extra.items()}, checkpoint)


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"attention_bias": True}, "attention_bias is True, and llama.cpp's qwen35moe computes with False only"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"attn_output_gate": False}, "attn_output_gate is False"),
        ({"norm_topk_prob": False}, "norm_topk_prob is False"),
        ({"routed_scaling_factor": 2.5}, "routed_scaling_factor is 2.5"),
        ({"mlp_only_layers": [0]}, "mlp_only_layers"),
        ({"sliding_window": 4096}, "sliding_window = '4096' is no field that a GGUF of qwen35moe is known to carry"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        ({"query_pre_attn_scalar": 256}, "query_pre_attn_scalar"),
        ({"n_group": 2}, "n_group"),
        ({"embedding_multiplier": 2.0}, "embedding_multiplier"),
        ({"sliding_window": None, "attn_output_gate": True, "mlp_only_layers": []}, None),
    ],
)
def test_every_field_of_the_config_is_known(random_tiny, changes, message):
    config = json.loads((random_tiny / "config.json").read_text())
    nested = {"model_type": "qwen3_5_moe", "text_config": config | changes, "vision_config": {}, "tie_word_embeddings": False}
    for found in (config | changes, nested):
        if message is None:
            check_config(found)
        else:
            with pytest.raises(UserError, match=re.escape(message)):
                check_config(found)


@pytest.mark.slow
def test_ends_and_a_factor_of_yarn_are_in_the_file_and_it_loads(random_tiny, tmp_path, command):
    rope = YARN | {"attention_factor": 1.0}
    checkpoint = with_config(random_tiny, tmp_path / "m", {"rope": rope})
    own = checkpoint.config["eos_token_id"]
    (tmp_path / "m/generation_config.json").unlink()  # a link
    (tmp_path / "m/generation_config.json").write_text(json.dumps({"eos_token_id": [own, 5, 6]}))
    flags = ["--base-type", "q8_0", "--method", "nearest", "--model", tmp_path / "m"]
    done = command("src/quant/gguf_pack.py", *flags, "--out", tmp_path / "q", "--calib-sequences", 2, "--calib-length", 64)
    assert done.returncode == 0 and "m-Q8_0.gguf was loaded by llama.cpp" in done.stdout, done.stderr
    fields = GgufFile(tmp_path / "q/m-Q8_0.gguf").fields
    ends = {fields[f"tokenizer.ggml.{key}_token_id"] for key in ("eos", "eot", "eom")}
    assert ends == {own, 5, 6} and fields["qwen35moe.rope.scaling.attn_factor"] == pytest.approx(1 / (1 + 0.1 * np.log(4)))
    (tmp_path / "m/generation_config.json").write_text(json.dumps({"eos_token_id": [own, 5, 6, 7]}))
    done = command("src/quant/gguf_pack.py", *flags, "--out", tmp_path / "r")
    assert done.returncode == 2 and "no place for the ends [7]" in done.stderr
    broken = tmp_path / "broken.gguf"
    broken.write_bytes((tmp_path / "q/m-Q8_0.gguf").read_bytes().replace(b"blk.0.attn_norm", b"blk.0.attn_nerm"))
    with pytest.raises(UserError, match=r"broken.gguf: llama.cpp does not load it \(.*attn_norm"):
        check_loads(broken)


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
    from checkpoint import Checkpoint, source_identity
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


def killed(*_):
    raise OSError("stands for a kill")


def packed(model, out, *more, method="nearest"):
    text = ["--calib-sequences", 2, "--calib-length", 32]
    return ["src/quant/gguf_pack.py", "--model", model, "--out", out, "--base-type", "Q8_0", "--method", method, *text, *more]


def test_a_killed_pack_of_chosen_types_goes_on_and_only_with_its_own(random_tiny, tmp_path, command, monkeypatch):
    (tmp_path / "fixed.txt").write_text("token_embd|^output=q8_0\nattn|ssm|shexp=q8_0\n")
    monkeypatch.setattr(
        sensitivity.Sensor,
        "losses",
        lambda self, options, _: ({n: dict.fromkeys(k, 0.0) for n, k in options.items()}, {}),
    )
    sized = ["--target-gib", 0.004, "--protected", tmp_path / "fixed.txt"]
    with monkeypatch.context() as patch:
        patch.setattr(pack_plan.GgufSink, "write", killed)
        done = command(*packed(random_tiny, tmp_path / "o", *sized))
    assert done.returncode == 1 and "stands for a kill" in done.stderr and (tmp_path / "o.types.txt").exists(), done.stderr
    other = command(*packed(random_tiny, tmp_path / "o", "--target-gib", 0.0041, *sized[2:]))
    assert other.returncode == 2 and "o.types.txt: made with other settings" in other.stderr
    done = command(*packed(random_tiny, tmp_path / "o", *sized))
    assert done.returncode == 0 and f"kept {tmp_path}/o.types.txt" in done.stdout and "(resumed)" in done.stdout, done.stderr
    assert not list(tmp_path.glob(".*")) and len(made := list((tmp_path / "o").glob("*.gguf"))) == 1
    experts = {line.rpartition("=")[2] for line in (tmp_path / "o.types.txt").read_text().splitlines() if "exps" in line}
    assert made[0].stem.removeprefix("random-tiny-").lower() in experts  # Q8_0, which no expert has, would mislead


@pytest.mark.parametrize("where", ["model", "o", "o/inside", "model/inside", ".", "file/x"])
def test_a_place_that_cannot_hold_the_decoded_checkpoint_is_said_before_the_pack(random_tiny, tmp_path, command, where):
    shutil.copytree(random_tiny, tmp_path / "model")
    (tmp_path / "file").touch()
    before = sorted(tmp_path.rglob("*"))
    done = command(*packed(tmp_path / "model", tmp_path / "o", "--dequant-out", tmp_path / where))
    assert done.returncode == 2 and done.stderr.startswith("error: DEQUANT_OUT: ") and done.stderr.count("\n") == 1, done.stderr
    assert sorted(tmp_path.rglob("*")) == before


def test_what_the_reference_kept_is_of_the_same_weights(random_tiny, tmp_path, command, monkeypatch):
    """A tool that writes its arguments stands for llama.cpp's; the steps are the same."""
    import pack_reference

    monkeypatch.setattr(pack_reference, "run_converter", lambda *a: a[3].write_text("bf16"))
    monkeypatch.setattr(
        pack_reference, "run_tool", lambda name, arguments, log: Path(arguments[-1 if "imatrix" in name else -2]).touch()
    )
    monkeypatch.setattr(pack_reference, "GgufFile", lambda path: path)
    monkeypatch.setattr(pack_reference, "check_types", lambda *_: None)
    model = shutil.copytree(random_tiny, tmp_path / "model")
    steps = lambda force=False: pack_reference.make_reference(  # noqa: E731
        plan_pack(Checkpoint(model), "q8_0", [], "nearest")[0], calibration(random_tiny), tmp_path / "o", force=force
    )
    with contextlib.suppress(AttributeError):  # a path is no GgufFile
        steps()
    made = {file.name for file in (tmp_path / "o").iterdir()}
    assert {"model-BF16.gguf", "imatrix.gguf", "model-Q8_0.gguf", "steps.json"} <= made
    tensors = load_file(model / "model.safetensors")
    tensors["model.norm.weight"] += 1
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="model-BF16.gguf: made of another model .model.safetensors differs"):
        steps()


# ---------------------------------------------------------------- split files


@pytest.fixture(scope="module")
def whole(random_tiny, tmp_path_factory):
    """(a BF16 file, its pack, its header)."""
    work = tmp_path_factory.mktemp("whole")
    pack, _ = plan_pack(Checkpoint(random_tiny), "bf16", [], "nearest")
    (work / "run").mkdir()
    header = pack.header(work / "run")
    write_pack(pack, work / "out", header=header)
    return work / "out" / pack.file_name, pack, header


@pytest.fixture(scope="module")
def splitter(tmp_path_factory):
    """llama.cpp's llama-gguf-split, compiled from its one source file against the libraries of the build."""
    if not (compiler := shutil.which("c++")) or not os.environ.get("LLAMA_CPP"):
        pytest.skip("no C++ compiler, or no LLAMA_CPP")
    tool, tree, libraries = tmp_path_factory.mktemp("tool") / "split", llama_cpp.source(), llama_cpp.tools()
    options = ["-std=c++17", "-w", *(f"-I{tree / part}" for part in ("include", "ggml/include", "common")), f"-L{libraries}"]
    linked = ["-lllama", "-lllama-common", "-lggml", "-lggml-base", f"-Wl,-rpath,{libraries}", "-o", tool]
    subprocess.run([compiler, *options, tree / "tools/gguf-split/gguf-split.cpp", *linked], check=True)
    return tool


def split_of(whole, out, limit):
    path, pack, header = whole
    made = write_pack(dataclasses.replace(pack, split=limit), out, header=header)
    return out / made["file"], made


@pytest.mark.parametrize("limit", [300_000, 1_000_000, 3_000_000, 1_000_000_000])
def test_split_files_are_those_of_llama_cpps_tool(whole, splitter, tmp_path, limit):
    """Byte for byte; the tool counts in millions of bytes, so that 0.3 is compared by what it makes of a test of its own."""
    largest = max(whole[1].bytes_of(piece) for piece in whole[1].pieces)
    if limit < max(1_000_000, whole[1].bytes_of(whole[1].pieces[0])):
        with pytest.raises(UserError, match="SPLIT_GIB=.*: the first tensor, token_embd.weight, takes 0.0"):
            split_of(whole, tmp_path / "ours", limit)
        return
    first, made = split_of(whole, tmp_path / "ours", limit)
    (tmp_path / "theirs").mkdir()
    name = whole[0].stem
    size = f"{limit // 1_000_000}M"
    subprocess.run([splitter, "--split-max-size", size, whole[0], tmp_path / "theirs" / name], check=True, capture_output=True)
    ours, theirs = (sorted((tmp_path / who).glob("*.gguf")) for who in ("ours", "theirs"))
    assert [file.name for file in ours] == [file.name for file in theirs] == list(made["parts"])
    assert first == ours[0] and (len(ours) > 1) == (limit < 10_000_000)
    assert all(a.read_bytes() == b.read_bytes() for a, b in zip(ours, theirs))
    assert max(file.stat().st_size for file in ours[1:] or [first]) < max(limit, largest) + (1 << 20)
    assert GgufFile(first).bytes == made["file_bytes"] == sum(file.stat().st_size for file in ours)


def test_a_killed_writer_of_parts_ends_with_the_same_bytes(tmp_path):
    """Killed behind any tensor, with half of the next one and of the next file on the disk."""
    tensors = [(f"blk.{n}.weight", (n % 3 + 1, 8), "f32") for n in range(7)]
    header = b"GGUF" + struct.pack("<IQQ", 3, 7, 0) + text_bytes("blk.0.weight") + bytes(40)
    parts = split_header(header, tensors, 128)
    plan = [(name, 32 * shape[0]) for name, shape, _ in tensors]
    data = [torch.full(shape, float(n)) for n, (_, shape, _) in enumerate(tensors)]

    def run(path, stop):
        with contextlib.suppress(ZeroDivisionError), GgufWriter(path, parts, plan, path.with_suffix(".json")) as writer:
            for n in range(writer.done, len(plan)):
                if n == stop:
                    half = data[n].view(-1)[:4]
                    writer.append(plan[n][0], half)
                    raise ZeroDivisionError
                writer.append(plan[n][0], data[n])
                writer.sync()
        return [file.read_bytes() for file in sorted(path.parent.glob(f"{path.stem}-*.gguf"))]

    expected = run(tmp_path / "alone.gguf", None)
    assert len(expected) == len(parts) > 3
    for first in range(len(plan)):
        path = tmp_path / f"k{first}.gguf"
        run(path, first)
        if first < len(plan) - parts[-1].tensors:  # of a file that is not begun
            part_path(path, len(parts), len(parts)).write_bytes(b"left over")
        run(path, min(first + 2, len(plan) - 1))
        assert run(path, None) == expected
    os.truncate(part_path(path, 1, len(parts)), 10)
    with pytest.raises(UserError, match="00001-of-0000.*shorter than"):
        GgufWriter(path, parts, plan, path.with_suffix(".json"))


def test_every_reader_takes_the_first_part_for_all(whole, random_tiny, tmp_path, command):
    first, made = split_of(whole, tmp_path / "split", 2_000_000)
    parts, one, all_ = sorted(first.parent.glob("*.gguf")), GgufFile(whole[0]), GgufFile(first)
    assert len(parts) > 3 and list(all_.tensors) == list(one.tensors)
    assert all(torch.equal(all_.data(name).flatten(), one.data(name).flatten()) for name in one.tensors)
    described, alone = describe_gguf(first), describe_gguf(whole[0])
    assert described["bytes"] == sum(file.stat().st_size for file in parts) and described["weights_sha256"] == made["sha256"]
    assert {key: described[key] for key in ("tensors", "types")} == {key: alone[key] for key in ("tensors", "types")}
    assert source_identity(first).keys() == {file.name for file in parts}
    dequantize(first, random_tiny, tmp_path / "bf16")
    decoded, original = Checkpoint(tmp_path / "bf16"), Checkpoint(random_tiny)
    assert all(torch.equal(decoded.read(name), original.read(name)) for name in original.tensors)
    check_loads(first)  # llama-bench
    other = split_of(whole, tmp_path / "other", 3_000_000)[0]
    middle, end = parts[len(parts) // 2], parts[-1]
    kept = middle.read_bytes()

    def refused(path, message):
        with pytest.raises(UserError, match=message):
            describe_gguf(path)
        done = command("src/quant/gguf_dequant.py", "--gguf", path, "--model", random_tiny, "--out", tmp_path / "o")
        assert done.returncode == 2 and re.search(message, done.stderr) and done.stderr.count("\n") == 1, done.stderr

    refused(end, f"part {len(parts)} of a split model; give the first, .*{first.name}")
    before, key = parts[len(parts) // 2 - 1], text_bytes("split.no") + struct.pack("<I", gguf.GGUFValueType.UINT16)
    head, rest = before.read_bytes().split(key, 1)
    twice = head + key + struct.pack("<H", len(parts) // 2) + rest[2:]
    name = min(tensor.name for tensor in gguf.GGUFReader(before).tensors)  # as in a part of a model that was cut elsewhere
    for place, content, message in (
        (middle, None, f"{first.name}: the split model lacks {middle.name}"),
        (middle, other.read_bytes(), f"{middle.name}: its header says part 1 of .* does not"),
        (middle, end.read_bytes(), f"{middle.name}: its header says part {len(parts)} of {len(parts)}"),
        (middle, whole[0].read_bytes(), f"{middle.name}: its header says no part of a split model"),
        (middle, twice, f"{middle.name}: its header says part .*, with {name} once more"),
        (middle, kept[:-64], f"{middle.name}: .*truncated"),
    ):
        place.unlink(missing_ok=True)
        if content is not None:
            place.write_bytes(content)
        refused(first, message)
    middle.write_bytes(kept)
    shutil.copy(first, tmp_path / "renamed.gguf")
    refused(tmp_path / "renamed.gguf", r"renamed.gguf: its header says part 1 of .*wants the name NAME-00001-of-")


def test_a_split_pack_goes_on_after_a_kill_and_only_as_it_was(random_tiny, tmp_path, command, monkeypatch):
    split = ["--split-gib", 0.002, "--strict"]
    with monkeypatch.context() as patch:
        patch.setattr(pack_plan.GgufSink, "write", killed)
        done = command(*packed(random_tiny, tmp_path / "o", *split))
    assert done.returncode == 1 and "stands for a kill" in done.stderr, done.stderr
    other = command(*packed(random_tiny, tmp_path / "o", "--split-gib", 0.003))
    assert other.returncode == 2 and "other settings (split)" in other.stderr
    done = command(*packed(random_tiny, tmp_path / "o", *split))
    assert done.returncode == 0 and "(resumed)" in done.stdout, done.stderr
    names = sorted(file.name for file in (tmp_path / "o").glob("*.gguf"))
    assert (
        len(names) > 2 and f"{names[0]} was loaded by llama.cpp" in done.stdout and f"split: {len(names)} files" in done.stdout
    )
    again = command(*packed(random_tiny, tmp_path / "p", *split))
    assert again.returncode == 0
    assert all((tmp_path / "o" / name).read_bytes() == (tmp_path / "p" / name).read_bytes() for name in names)
