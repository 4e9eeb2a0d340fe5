"""Types and bits by budget: the choice is the best of all, within the size; the nats of a parameter are a whole model's."""

import itertools

import pytest
import torch
from conftest import REPO

from calibration import Calibration
from calibration_text import calibration_ids
from checkpoint import Checkpoint
from console import UserError, read_json
from families import Role
from ggml_codecs import decode_rows, encode
from gguf_format import padded, tensor_bytes
from gguf_layout import Piece, into_parameter, pieces_of, read_parameter, to_gguf
from kl import divergence
from packed_format import unit_of
from recipe import read_recipe
from records import read_result
from sensitivity import choose, kl_of_choices, options_of, outcome, type_losses

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
        chosen = choose(sizes, losses, budget)
        ways = [dict(zip(options, way)) for way in itertools.product(*options.values())]
        fits = [way for way in ways if sum(sizes[name][kind] for name, kind in way.items()) <= budget]
        best = min(fits, key=lambda way: sum(losses[name][kind] for name, kind in way.items()))
        assert chosen == best
    with pytest.raises(UserError, match="the smallest need"):
        choose(sizes, losses, least - 1)


def test_a_choice_whose_errors_do_not_add_up_never_loses_to_the_recipe_by_hand():
    sizes, losses = {"a": {"2": 2, "4": 4}, "b": {"2": 2, "4": 4}}, {"a": {"2": 0.5, "4": 0.1}, "b": {"2": 0.4, "4": 0.1}}
    chosen, hand = {"a": "4", "b": "2"}, {"a": "2", "b": "4"}
    for own, other, kept in ((3.0, 2.0, hand), (2.0, 3.0, chosen)):
        found, facts = outcome(6 / 2**30, 0, sizes, losses, chosen, hand, lambda ways, kl=(own, other): list(kl))
        assert found == kept and facts["measured_kl"] == 2.0 and facts["by_hand"]["measured_kl"] == other
    small = {name: {bits: 1e-3 * value for bits, value in row.items()} for name, row in losses.items()}
    found, facts = outcome(6 / 2**30, 0, sizes, small, chosen, hand, lambda ways: pytest.fail("no need to measure"))
    assert found == chosen and "measured_kl" not in facts


def test_nats_are_the_kl_of_a_whole_model_with_that_parameter_rounded(random_tiny, tmp_path, monkeypatch):
    """Both ends and a matrix of a layer: over the second halves of the sequences, which have something before them."""
    from transformers import AutoModelForCausalLM

    monkeypatch.setenv("SCRATCH", str(tmp_path / "not" / "made"))

    def plain(value, kind, hessian=None):
        return decode_rows(encode(value.float(), kind), kind)

    checkpoint = Checkpoint(random_tiny)
    ids, entry = calibration_ids(None, random_tiny, 2, 64)
    wanted = {"token_embd.weight", "output.weight", "blk.1.attn_qkv.weight", "blk.2.ffn_gate_exps.weight"}
    pieces = [p for p in pieces_of(checkpoint) if p.name in wanted]
    calibration = Calibration(ids, entry, device=torch.device("cpu"))
    probes = dict.fromkeys(wanted, "q2_K")
    losses, nats = type_losses(checkpoint, calibration, pieces, options_of(pieces, ["q8_0"]), probes, plain)
    assert len(pieces) == len(nats) == 4
    model = AutoModelForCausalLM.from_pretrained(random_tiny, dtype=torch.float32)
    with torch.no_grad():
        expected = model(ids).logits[:, 32:].flatten(0, 1)
        for piece in pieces:
            parameter = model.get_parameter(piece.parameter)
            original = parameter.detach().clone()
            value = to_gguf(piece, read_parameter(checkpoint, piece)).float()
            into_parameter(piece, plain(value, "q2_K"), parameter.data)
            kl, _ = divergence(expected, model(ids).logits[:, 32:].flatten(0, 1))
            parameter.copy_(original)
            assert nats[piece.parameter] == pytest.approx(kl.double().mean().item(), rel=0.01), piece.name
            assert 0 < losses[piece.name]["q8_0"] < 0.05 * nats[piece.parameter]
        choices = [dict.fromkeys(wanted, "q2_K"), dict.fromkeys(wanted, "q8_0")]
        inner = [p for p in pieces if p.layer in (1, 2)]
        for piece in inner:
            value = to_gguf(piece, read_parameter(checkpoint, piece)).float()
            into_parameter(piece, plain(value, "q2_K"), model.get_parameter(piece.parameter).data)
        kl, _ = divergence(expected, model(ids).logits[:, 32:].flatten(0, 1))
        low, high = kl_of_choices(checkpoint, calibration, inner, choices, plain, 2)
        assert low == pytest.approx(kl.double().mean().item(), rel=0.01) and 0 < high < 0.05 * low


@pytest.mark.parametrize("method,packed", [("wclip", False), ("clip", True)])
def test_bits_of_a_checkpoint_fit_its_size_and_beat_the_recipe_by_hand(random_tiny, tmp_path, command, method, packed):
    from transformers import AutoModelForCausalLM

    flags = ["--model", random_tiny, "--expert-bits", 3, "--linear-bits", 4, "--method", method, "--clip-steps", 2]
    flags += ["--calib-sequences", 2, "--calib-length", 64, *(["--packed"] if packed else [])]
    hand, out = tmp_path / "hand", tmp_path / "solved"
    assert command("src/quant/quant_save.py", *flags, "--out", hand).returncode == 0

    def bytes_of(made):
        report = read_json(made / "recipe.json")["report"]
        return report["container"]["bytes"] if packed else report["packed_bytes"]

    flags += ["--target-gib", bytes_of(hand) / 2**30]
    done = command("src/quant/quant_save.py", *flags, "--out", out)
    assert done.returncode == 0, done.stderr
    assert 0.98 * bytes_of(hand) < bytes_of(out) <= bytes_of(hand)
    bits = dict(read_recipe(out).overrides)
    units = {unit_of(Checkpoint(random_tiny).sources[name][0]): width for name, width in bits.items()}
    assert all(units[unit_of(Checkpoint(random_tiny).sources[name][0])] == width for name, width in bits.items())
    assert len(set(bits.values())) > 1 and ("lm_head.weight" in bits) and ("model.embed_tokens.weight" in bits) != packed
    if packed:
        again = command("src/quant/quant_save.py", *flags, "--out", out, "--force")
        assert again.returncode == 0 and f"kept {out}.bits.json" in again.stdout, again.stderr
    again = command("src/quant/quant_save.py", *flags, "--out", out, "--target-gib", 0.001)
    assert again.returncode == 2 and "solved: exists" in again.stderr
    if not packed:
        ids = calibration_ids("tiny:1", random_tiny, 4, 64)[0]
        with torch.no_grad():
            expected, *found = (
                AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32)(ids).logits.flatten(0, 1)
                for place in (random_tiny, hand, out)
            )
        by_hand, solved = (divergence(expected, logits)[0].mean().item() for logits in found)
        assert solved < by_hand


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
    assert set(metrics["chosen"].values()) > {"q8_0"} and metrics["bytes"] <= target * 2**30
    done = command("src/quant/gguf_pack.py", *text, "--base-type", "q4_K", "--tensor-types", out, "--out", tmp_path / "o")
    assert done.returncode == 0, done.stderr
    (file,) = (tmp_path / "o").glob("*.gguf")
    assert file.stat().st_size == metrics["bytes"]
