"""Types by budget: the choice is the best of all, within the size; the nats of a group are those of a whole model."""

import itertools

import pytest
import torch
from conftest import REPO

from calibration import Calibration
from calibration_text import calibration_ids
from checkpoint import Checkpoint
from console import UserError
from families import Role
from ggml_codecs import decode_rows, encode
from gguf_format import padded, tensor_bytes
from gguf_layout import Piece, into_parameter, pieces_of, read_parameter, to_gguf
from kl import divergence
from moe_alloc import choose, options_of
from records import read_result
from sensitivity import group_of, type_losses

KINDS = ("iq2_xs", "q4_K", "q8_0")


def test_the_choice_is_the_best_of_all_within_the_budget():
    shapes = [(8, 64, 256), (64, 256), (96, 512), (32, 128)]
    pieces = [Piece(f"blk.{i}.x.weight", s, f"p{i}", (f"p{i}",), Role.ATTENTION, i) for i, s in enumerate(shapes)]
    options = options_of(pieces, KINDS)
    assert options["blk.3.x.weight"] == ["iq4_nl", "q5_0", "q8_0"]  # rows of 128
    generator = torch.Generator().manual_seed(0)
    losses = {name: dict(zip(kinds, torch.rand(3, generator=generator).tolist())) for name, kinds in options.items()}
    sizes = {p.name: {kind: padded(tensor_bytes(p.shape, kind)) for kind in options[p.name]} for p in pieces}
    least, most = (sum(f(row.values()) for row in sizes.values()) for f in (min, max))
    for budget in range(least, most + 5000, (most - least) // 7):
        chosen = choose(pieces, losses, budget)
        ways = [dict(zip(options, way)) for way in itertools.product(*options.values())]
        fits = [way for way in ways if sum(sizes[name][kind] for name, kind in way.items()) <= budget]
        best = min(fits, key=lambda way: sum(losses[name][kind] for name, kind in way.items()))
        assert chosen == best
    with pytest.raises(UserError, match="the smallest need"):
        choose(pieces, losses, least - 1)


def test_nats_are_the_kl_of_a_whole_model_with_that_group_rounded(random_tiny, tmp_path, monkeypatch):
    from transformers import AutoModelForCausalLM

    monkeypatch.setenv("SCRATCH", str(tmp_path / "not" / "made"))

    def plain(value, kind, hessian=None):
        return decode_rows(encode(value, kind), kind)

    checkpoint = Checkpoint(random_tiny)
    ids, entry = calibration_ids(None, random_tiny, 2, 64)
    pieces = [p for p in pieces_of(checkpoint) if p.layer in (1, 2) and p.role is Role.LINEAR_ATTENTION]
    pieces = [p for p in pieces if p.shape[0] >= 256]
    calibration = Calibration(ids, entry, device=torch.device("cpu"))
    losses, nats = type_losses(checkpoint, calibration, pieces, options_of(pieces, ["q8_0"]), "q2_K", plain)
    assert set(nats) == {(1, "attention"), (2, "attention")}
    model = AutoModelForCausalLM.from_pretrained(random_tiny, dtype=torch.float32)
    with torch.no_grad():
        expected = model(ids).logits.flatten(0, 1)
        for piece in (piece for piece in pieces if piece.layer == 1):
            value = to_gguf(piece, read_parameter(checkpoint, piece)).float()
            into_parameter(piece, plain(value, "q2_K"), model.get_parameter(piece.parameter).data)
        kl, _ = divergence(expected, model(ids).logits.flatten(0, 1))
    assert nats[1, "attention"] == pytest.approx(kl.double().mean().item(), rel=0.01)
    assert all(0 < losses[p.name]["q8_0"] < 0.05 * nats[group_of(p)] for p in pieces)


def test_the_file_of_chosen_types_has_the_size_that_was_told(random_tiny, tmp_path, command):
    total = sum(piece.numel for piece in pieces_of(Checkpoint(random_tiny)))
    text = ["--method", "nearest", "--calib-sequences", 2, "--calib-length", 64, "--model", random_tiny]
    flags = ["--candidates", "q4_K,q8_0", "--probe-type", "q4_K", "--tensor-types", REPO / "configs/gguf_protected.txt"]
    target = 7 * total / 8 / 2**30
    out, record = tmp_path / "types.txt", tmp_path / "r.json"
    flags += ["--target-gib", target, "--out", out, "--result", record, "--tag", "t"]
    done = command("src/quant/moe_alloc.py", *text, *flags)
    assert done.returncode == 0, done.stderr
    metrics = read_result(record, "probe")["metrics"]
    assert set(metrics["chosen"].values()) > {"q8_0"} and metrics["file_bytes"] <= target * 2**30
    done = command("src/quant/gguf_pack.py", *text, "--base-type", "q4_K", "--tensor-types", out, "--out", tmp_path / "o")
    assert done.returncode == 0, done.stderr
    (file,) = (tmp_path / "o").glob("*.gguf")
    assert file.stat().st_size == metrics["file_bytes"]
