"""Weights of calibration tokens: the streamed gradients are those of a whole model, and second moments use them."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

import token_weights
from calibration import Calibration, Collector, LayerStream
from calibration_text import calibration_ids
from checkpoint import Checkpoint
from console import UserError
from hf_model import finite_logits, load_model
from token_weights import powered, score

CPU = torch.device("cpu")
CLOSE = {"atol": 1e-4, "rtol": 1e-4}


def test_streamed_gradients_are_those_of_the_whole_model(random_tiny, tmp_path):
    ids, entry = calibration_ids(None, random_tiny, 4, 48)
    calibration = Calibration(ids, entry, batch=2, device=CPU, token_power=1.0)
    stream = LayerStream(Checkpoint(random_tiny), CPU, torch.float32)
    found = token_weights.token_weights(stream, calibration, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [token_weights.FILE]
    assert all(parameter.is_meta for parameter in stream.model.parameters())
    model = AutoModelForCausalLM.from_pretrained(random_tiny, dtype=torch.float32)
    kept = []

    def keep(module, args, out):
        out.retain_grad()
        kept.append(out)

    for layer in model.model.layers:
        layer.register_forward_hook(keep)
    model.model.embed_tokens.register_forward_hook(lambda m, a, out: out.requires_grad_(True))
    logits, generator = model(ids, use_cache=False).logits, torch.Generator().manual_seed(0)
    logits.backward(torch.stack([score(row.detach(), generator) for row in logits]))
    expected = torch.stack([out.grad.square().sum(-1).flatten() for out in kept])
    torch.testing.assert_close(found, expected / expected.mean(-1, keepdim=True), rtol=1e-3, atol=1e-4)
    again = token_weights.token_weights(stream, calibration, tmp_path)  # what a run that goes on finds
    assert torch.equal(again, found)
    with pytest.raises(UserError, match="of another text or power"):
        token_weights.token_weights(stream, dataclasses.replace(calibration, token_power=0.5), tmp_path)


def test_moments_weigh_each_token(random_tiny):
    ids, _ = calibration_ids(None, random_tiny, 4, 48)
    parts, weights = ids.split(2), torch.rand(ids.numel(), generator=torch.Generator().manual_seed(1))
    stream = LayerStream(Checkpoint(random_tiny), CPU, torch.float32)
    hidden, kwargs, layer = stream.embed(parts), stream.arguments(parts[0]), stream.layers[0]
    stream.fill(layer, "model.layers.0.")
    names = {"linear_attn.in_proj_qkv.weight", "mlp.experts.gate_up_proj", "mlp.experts.down_proj"}
    collector, seen, routed = Collector(layer, names, weights), [], []
    layer.linear_attn.in_proj_qkv.register_forward_pre_hook(lambda m, a: seen.append(a[0].flatten(0, 1)))
    layer.mlp.experts.register_forward_pre_hook(lambda m, a: routed.append(a[:3]))
    list(stream.run(layer, hidden, kwargs[0]))
    x = torch.cat(seen)
    torch.testing.assert_close(
        collector.moments["linear_attn.in_proj_qkv.weight"].total[0], (x * weights[:, None]).T @ x, **CLOSE
    )
    x, chosen, share = (torch.cat(values) for values in zip(*routed))
    token, place = torch.where(chosen == 2)
    x, w = x[token], weights[token] * share[token, place] ** 2
    moments = collector.moments["mlp.experts.gate_up_proj"]
    torch.testing.assert_close(moments.sums(torch.tensor([2]))[0], (x * w[:, None]).T @ x, **CLOSE)
    gate, up = F.linear(x, layer.mlp.experts.gate_up_proj[2]).chunk(2, -1)
    inner = F.silu(gate) * up
    counted = collector.moments["mlp.experts.down_proj"].sums(torch.tensor([2]))[0]
    torch.testing.assert_close(counted, (inner * w[:, None]).T @ inner, **CLOSE)
    assert moments.weight[2] == pytest.approx(w.sum().item(), rel=1e-4)


def test_powers_and_gradients_that_cannot_be_used():
    sizes = torch.tensor([[0.0, 1.0, 16.0], [0.0, 0.0, 0.0]])
    assert powered(sizes, 0.25).tolist() == [[0.0, 1.0, 2.0], [1.0, 1.0, 1.0]]
    with pytest.raises(UserError, match="NaN or infinite"):
        powered(torch.tensor([[1.0, torch.inf]]), 0.25)


@pytest.mark.parametrize(
    "name,value,said",
    [
        (
            "model.layers.1.mlp.experts.down_proj",
            torch.nan,
            r"layers.1.mlp.experts .*: model.layers.1.mlp.experts.down_proj holds",
        ),
        ("model.layers.2.mlp.gate.weight", torch.nan, r"layers.2.mlp.gate .*: model.layers.2.mlp.gate.weight holds NaN, 8 of"),
        ("model.layers.0.linear_attn.dt_bias", torch.nan, r"model.layers.0.linear_attn.dt_bias holds NaN"),  # between modules
        ("model.norm.weight", torch.inf, r"at model.norm .*: model.norm.weight holds infinity, 8 of 256"),
        ("model.layers.3.input_layernorm.weight", 3e38, r"layers.3.input_layernorm .*: its weights are finite and overflow"),
    ],
)
def test_the_first_number_that_is_not_finite_is_named(random_tiny, name, value, said):
    model, ids = load_model(random_tiny), torch.arange(24).view(2, 12)
    held = model.get_parameter(name).detach()
    held.view(-1)[:8] = value
    with pytest.raises(UserError, match=said):
        finite_logits(model, input_ids=ids)
    held.view(-1)[:8] = 0.5
    assert finite_logits(model, input_ids=ids).shape == (2, 12, model.config.vocab_size)  # and no hook is left
    assert not any(module._forward_hooks for module in model.modules())


def test_scores_have_the_covariance_of_the_predictions():
    logits = torch.tensor([4.0, 1.0, 0.0, -2.0])
    drawn = score(logits.repeat(200_000, 1), torch.Generator().manual_seed(0))
    p = logits.softmax(-1)
    torch.testing.assert_close(drawn.T @ drawn / len(drawn), p.diag() - p.outer(p), atol=2e-3, rtol=0.02)
    assert drawn.sum(-1).abs().max() < 1e-5
