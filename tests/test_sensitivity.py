"""Types and bits by budget: the choice is the best of all, within the size; the nats of a parameter are a whole model's."""

import itertools
import math

import numpy as np
import pytest
import torch
from conftest import REPO

import calibration_text
import token_weights
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
from rounders import decoded, squared_error
from sensitivity import CANDIDATES, Sensor, choose, matrices, options_of, outcome, sampled, sampled_errors, solve

KINDS = ("iq2_xs", "q4_K", "q8_0")


def test_the_solver_is_exact():
    rng = np.random.default_rng(0)
    for _ in range(30):
        count, options = int(rng.integers(1, 6)), int(rng.integers(2, 4))
        costs = (rng.integers(1, 9, (count, options)) * 7).tolist()
        losses = rng.random((count, options)).tolist()
        budget = int(sum(min(row) for row in costs) + rng.integers(0, 80))
        picked = solve(costs, losses, budget)
        assert sum(costs[i][o] for i, o in enumerate(picked)) <= budget
        every = itertools.product(range(options), repeat=count)
        fits = [c for c in every if sum(costs[i][o] for i, o in enumerate(c)) <= budget]
        least = min(sum(losses[i][o] for i, o in enumerate(c)) for c in fits)
        assert sum(losses[i][o] for i, o in enumerate(picked)) == pytest.approx(least)
    with pytest.raises(UserError, match="below the 6"):
        solve([[3, 4], [3, 5]], [[1, 0], [1, 0]], 5)


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
    with pytest.raises(UserError, match="too small: what is chosen needs"):
        choose(sizes, losses, least - 1)


def test_a_choice_whose_errors_do_not_add_up_is_measured_and_never_loses_to_the_recipe_by_hand():
    """Of b the prediction is far too low: the second round sees what it costs among the errors of the others."""
    units = dict(zip("abcdefg", "abcdefg"))
    sizes = {name: {"2": 2, "4": 4} if name in "abc" else {"4": 4} for name in units}
    losses = {"a": {"2": 0.5, "4": 0.1}, "b": {"2": 0.3, "4": 0.1}, "c": {"2": 0.4, "4": 0.1}}
    losses |= {name: {"4": 0.1} for name in "defg"}
    chosen, hand, better = (dict(zip(units, f"{way}4444")) for way in ("424", "244", "442"))
    gains = dict.fromkeys(units, 0.1) | {"b": 3.0}
    for kl, kept in (({"424": 3.0, "244": 2.0, "442": 1.0}, better), ({"424": 2.0, "244": 1.0, "442": 3.0}, hand)):
        asked = []

        def measure(ways, around, kl=kl, asked=asked):
            assert around == (not asked)
            asked += (names := ["".join(way.values())[:3] for way in ways])
            return [kl[name] for name in names], gains

        found, facts = outcome(26 / 2**30, 0, sizes, losses, hand, units, measure)
        assert found == kept and asked == ["424", "244", "442"] and facts["measured_kl"] == 1.0
        assert [row["measured_kl"] for row in facts["ways"].values()] == list(kl.values())
    small = {name: {bits: 1e-3 * value for bits, value in row.items()} for name, row in losses.items()}
    found, facts = outcome(26 / 2**30, 0, sizes, small, hand, units, lambda *_: pytest.fail("no need to measure"))
    assert found == chosen and "measured_kl" not in facts


def test_nats_are_the_kl_of_a_whole_model_with_that_parameter_rounded(random_tiny, tmp_path, monkeypatch):
    """Both ends and a matrix of a layer: over the second halves of the sequences, which have something before them."""
    from transformers import AutoModelForCausalLM

    monkeypatch.setenv("SCRATCH", str(tmp_path / "not" / "made"))

    def plain(value, kinds, hessian=None):
        return [decode_rows(encode(value.float(), kind), kind) for kind in kinds]

    checkpoint = Checkpoint(random_tiny)
    ids, entry = calibration_ids(None, random_tiny, 2, 64)
    wanted = {"token_embd.weight", "output.weight", "blk.1.attn_qkv.weight", "blk.2.ffn_gate_exps.weight"}
    pieces = [p for p in pieces_of(checkpoint) if p.name in wanted]
    calibration = Calibration(ids, entry, device=torch.device("cpu"))
    probes = dict.fromkeys(wanted, "q2_K")
    sensor = Sensor(checkpoint, calibration, {p.parameter: [p] for p in pieces}, plain)
    losses, nats = sensor.losses(options_of(pieces, ["q8_0"]), probes)
    assert len(pieces) == len(nats) == 4
    model = AutoModelForCausalLM.from_pretrained(random_tiny, dtype=torch.float32)
    values = {p.parameter: to_gguf(p, read_parameter(checkpoint, p)).float() for p in pieces}
    with torch.no_grad():
        expected = model(ids).logits[:, 32:].flatten(0, 1)

        def kl(rounded):
            """With these pieces rounded, and the others as they are."""
            originals = {piece.parameter: model.get_parameter(piece.parameter).detach().clone() for piece in rounded}
            for piece in rounded:
                own = model.get_parameter(piece.parameter)
                into_parameter(piece, plain(values[piece.parameter], ["q2_K"])[0], own.data)
            found, _ = divergence(expected, model(ids).logits[:, 32:].flatten(0, 1))
            for name, original in originals.items():
                model.get_parameter(name).copy_(original)
            return found.double().mean().item()

        for piece in pieces:
            assert nats[piece.parameter] == pytest.approx(kl([piece]), rel=0.01), piece.name
            assert 0 < losses[piece.name]["q8_0"] < 0.05 * nats[piece.parameter]
        choices = [dict.fromkeys(wanted, "q2_K"), dict.fromkeys(wanted, "q8_0")]
        (low, high), gains = sensor.measure(choices, True)
        assert low == pytest.approx(kl(pieces), rel=0.01) and 0 < high < 0.05 * low
        for piece in pieces:
            assert low - gains[piece.parameter] == pytest.approx(kl([p for p in pieces if p is not piece]), rel=0.01)


@pytest.mark.parametrize("method", ["ldlq", "nearest"])
def test_samples_that_are_rounded_together_have_the_errors_of_each_alone(random_tiny, method):
    """And a parameter rounded several ways at once is what it is one by one."""
    checkpoint, generator = Checkpoint(random_tiny), torch.Generator().manual_seed(0)
    wanted = {"blk.1.attn_qkv.weight", "blk.1.attn_gate.weight", "blk.1.ffn_gate_exps.weight"}
    pieces = [p for p in pieces_of(checkpoint) if p.name in wanted]
    options = {p.name: ["q4_K", "q3_K"] for p in pieces}

    def rounded(value, kinds, hessian):
        return decoded(value.contiguous(), kinds, method, hessian)

    hessians, sources = {}, []
    for piece in pieces:
        shape = checkpoint.parameter_shape(piece.parameter)
        x = torch.randn(shape[0] if len(shape) == 3 else 1, 400, shape[-1], generator=generator)
        hessians.setdefault(piece.parameter, x.mT @ x / 400)
        read = torch.stack([checkpoint.read(name) for name in checkpoint.sources[piece.parameter]])
        sources.append((piece, read.view(shape) if read.numel() == math.prod(shape) else None, hessians[piece.parameter]))
    assert len(sources) == 3 and all(own is not None for _, own, _ in sources)
    together = sampled_errors(sources, options, rounded)
    for piece, own, hessian in sources:
        part, moments, share = sampled(*matrices(piece, own, hessian))
        for kind in options[piece.name]:
            (found,) = rounded(part, [kind], moments)
            assert together[piece.name][kind] == pytest.approx(share * squared_error(part - found, moments), rel=1e-6)


@pytest.mark.parametrize("method,packed", [("wclip", False), ("clip", True)])
def test_bits_of_a_checkpoint_fit_its_size_and_beat_the_recipe_by_hand(
    random_tiny, tmp_path, command, monkeypatch, method, packed
):
    """And the text is read once, its tokens weighed once."""
    from transformers import AutoModelForCausalLM

    calls = []
    for module, name in ((token_weights, "head_gradients"), (calibration_text, "calibration_ids")):
        real = getattr(module, name)
        monkeypatch.setattr(
            module, name, lambda *given, real=real, name=name, **more: (calls.append(name), real(*given, **more))[1]
        )
    flags = ["--model", random_tiny, "--expert-bits", 3, "--linear-bits", 4, "--method", method, "--clip-steps", 2]
    flags += ["--calib-sequences", 2, "--calib-length", 64, *(["--packed"] if packed else [])]
    hand, out = tmp_path / "hand", tmp_path / "solved"
    assert command("src/quant/quant_save.py", *flags, "--out", hand).returncode == 0

    def bytes_of(made):
        report = read_json(made / "recipe.json")["report"]
        return report["container"]["bytes"] if packed else report["packed_bytes"]

    calls.clear()
    flags += ["--target-gib", bytes_of(hand) / 2**30, *([] if packed else ["--token-power", 0.4, "--damping", 0.1])]
    done = command("src/quant/quant_save.py", *flags, "--out", out, "--result", tmp_path / "r.json", "--tag", "t")
    assert done.returncode == 0, done.stderr
    assert calls == ["calibration_ids", *([] if packed else ["head_gradients"])] and not list(tmp_path.glob("*.st"))
    found = read_result(tmp_path / "r.json", "quantize")["metrics"]["allocation"]
    assert found["bytes"] <= bytes_of(hand) == found["ways"]["by_hand"]["bytes"] and found["predicted_kl"] > 0
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


def test_the_file_of_chosen_types_has_the_size_that_was_told(random_tiny, tmp_path, command, monkeypatch):
    """And its record says what was predicted, for which candidates, of the recipe by hand too; after a kill as well."""
    total = sum(piece.numel for piece in pieces_of(Checkpoint(random_tiny)))
    target, record, out = 7 * total / 8 / 2**30, tmp_path / "r.json", tmp_path / "o"

    def losses(sensor, options, probes):
        made = {n: {k: 1e-3 / tensor_bytes((256, 256), k) for k in kinds} for n, kinds in options.items()}
        return made, {piece.parameter: 1e-6 for own in sensor.parameters.values() for piece in own}

    monkeypatch.setattr(Sensor, "losses", losses)
    flags = ["--method", "nearest", "--calib-sequences", 2, "--calib-length", 64, "--model", random_tiny, "--base-type", "q4_K"]
    flags += ["--protected", REPO / "configs/gguf_protected.txt", "--target-gib", target, "--out", out]
    done = command("src/quant/gguf_pack.py", *flags, "--result", record, "--tag", "t")
    assert done.returncode == 0, done.stderr
    metrics = read_result(record, "pack")["metrics"]
    found = metrics["allocation"]
    (file,) = out.glob("*.gguf")
    assert file.stat().st_size == found["bytes"] == metrics["file_bytes"] <= target * 2**30
    assert set(found["ways"]) >= {"chosen", "by_hand"} and set(found["candidates"]) == set(CANDIDATES.split(","))
    assert found["chosen"].keys() <= found["losses"].keys()
    again = command("src/quant/gguf_pack.py", *flags, "--result", record, "--tag", "t", "--force")
    assert again.returncode == 0 and f"kept {out}.types.txt" in again.stdout, again.stderr
    assert read_result(record, "pack")["metrics"]["allocation"] == found
