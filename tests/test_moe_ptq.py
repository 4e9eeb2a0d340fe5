"""Rounding against plain loops and against what it promises: the output error falls from method to method."""

import numpy as np
import pytest
import torch

from console import UserError
from moe_ptq import (
    METHODS,
    Codes,
    Grid,
    Statistics,
    descend,
    gptq,
    gptq_codes,
    inverse_factor,
    output_error,
    refit_scales,
    round_weight,
    shrink,
)
from moe_quant import fake_quant


def problem(experts=3, outputs=24, inputs=64, tokens=300, seed=0):
    """Weights [E, O, I] and second moments of correlated inputs with a few loud channels."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(experts, outputs, inputs, generator=generator)
    mix = torch.randn(experts, inputs, inputs, generator=generator) / inputs**0.5
    loud = torch.rand(experts, 1, inputs, generator=generator) ** 4 * 5
    x = (torch.randn(experts, tokens, inputs, generator=generator) @ mix) * loud
    return weight, Statistics(x.transpose(1, 2) @ x / tokens, torch.full((experts,), float(tokens)))


@pytest.mark.parametrize("method", [name for name in METHODS if name not in ("hqq", "awq")])  # which know a unit
def test_magnitudes_far_beyond_float32s_squares_change_nothing(method):
    weight, statistics = problem()
    weight, grid = weight.bfloat16().float(), Grid(3, 16)
    plain = round_weight(weight, grid, statistics, method)
    for power in (60, 100, 120):
        assert torch.equal(round_weight(weight * 2.0**power, grid, statistics, method), plain * 2.0**power)
    moments = Statistics(statistics.hessian * 2.0**80, statistics.tokens)  # inputs of 1e12
    assert torch.equal(round_weight(weight, grid, moments, method), plain)
    mixed = weight.clone()
    mixed[:, 3] *= 2.0**100  # an output of its own
    mixed[:, 5, 7] = 1e30  # one weight among others
    rounded = round_weight(mixed, grid, statistics, method)
    others = [row for row in range(24) if row not in (3, 5)]
    assert torch.equal(rounded[:, others], plain[:, others]) and torch.equal(rounded[:, 3], plain[:, 3] * 2.0**100)
    assert rounded[0, 5, 7].item() == pytest.approx(1e30, rel=0.01)
    assert (rounded[:, 5].view(3, 4, 16).abs().amax(-1) > 0).all(), "a group beside it became zeros"


@pytest.mark.parametrize("method", list(METHODS))
def test_no_magnitude_gives_what_is_not_finite(method):
    weight, statistics = problem()
    for power in (-120, 60, 100, 124):
        assert torch.isfinite(round_weight(weight.bfloat16().float() * 2.0**power, Grid(4, 16), statistics, method)).all()


def plain_gptq(weight, hessian, bits, group, damping):
    """GPTQ as its paper writes it, in float64: one matrix, one input at a time, the scale of each group by search."""
    w, h = weight.double().numpy().copy(), hessian.double().numpy().copy()
    h[np.diag_indices_from(h)] += damping * np.diag(h).mean()
    upper = np.linalg.cholesky(np.linalg.inv(h)).T  # H^-1 = U^T U
    qmax, out = 2 ** (bits - 1) - 1, np.zeros_like(w)

    def bf16(value):
        return torch.tensor(value, dtype=torch.float32).bfloat16().double().numpy()

    for j in range(w.shape[1]):
        if j % group == 0:
            block, loss = w[:, j : j + group], np.diag(upper)[j : j + group] ** -2
            best, scale = np.full(len(w), np.inf), np.zeros(len(w))
            for step in range(16):
                trial = bf16(np.abs(block).max(1) * ((1 - 0.35 * step / 15) / qmax))
                code = np.clip(np.round(block / trial[:, None]), -qmax, qmax)
                error = ((block - bf16(code * trial[:, None])) ** 2 * loss).sum(1)
                scale, best = np.where(error < best, trial, scale), np.minimum(error, best)
        out[:, j] = bf16(np.clip(np.round(w[:, j] / scale), -qmax, qmax) * scale)
        w[:, j + 1 :] -= np.outer((w[:, j] - out[:, j]) / upper[j, j], upper[j, j + 1 :])
    return torch.tensor(out).float()


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_batched_gptq_equals_a_plain_loop_over_experts(bits):
    weight, statistics = problem()
    made = gptq(weight, Grid(bits, 32), statistics, damping=0.01)
    expected = torch.stack([plain_gptq(w, h, bits, 32, 0.01) for w, h in zip(weight, statistics.hessian, strict=True)])
    # A value on the edge between two codes may fall either way in float32; then the whole row differs from there on.
    same = (made - expected).abs().amax(-1) < 1e-3
    assert same.float().mean() > 0.95
    errors = [output_error(weight.transpose(1, 2), v.transpose(1, 2), statistics.hessian).sum() for v in (made, expected)]
    assert abs(errors[0] / errors[1] - 1) < 1e-3


def test_the_factor_inverts_the_damped_moments():
    _, statistics = problem()
    factor = inverse_factor(statistics.hessian, 0.01)
    assert torch.equal(factor, factor.triu())
    damped = statistics.hessian.clone()
    mean = damped.diagonal(dim1=1, dim2=2).mean(-1, keepdim=True)
    damped.diagonal(dim1=1, dim2=2).add_(0.01 * mean)
    identity = (factor.transpose(1, 2) @ factor) @ damped
    torch.testing.assert_close(identity, torch.eye(64).expand(3, 64, 64), atol=2e-3, rtol=0)
    singular = torch.zeros(1, 8, 8)
    singular[0, 0, 0] = 1.0
    assert torch.isfinite(inverse_factor(singular, 0.0)).all()
    with pytest.raises(UserError, match="NaN"):
        inverse_factor(torch.full((1, 4, 4), torch.nan), 0.01)


def test_methods_are_ordered_by_output_error():
    weight, statistics = problem(outputs=64, inputs=128, tokens=2000)
    errors = {}
    for method in METHODS:
        made = round_weight(weight, Grid(3, 64), statistics, method)
        assert made.shape == weight.shape and torch.isfinite(made).all()
        errors[method] = output_error(weight.transpose(1, 2), made.transpose(1, 2), statistics.hessian).sum().item()
    assert errors["gptq_refit"] < errors["gptq"] < errors["wclip"] < errors["clip"], errors
    assert errors["awq"] < errors["clip"] and errors["gptq"] < 0.8 * errors["wclip"], errors


def test_scales_and_codes_descend():
    weight, statistics = problem()
    wt, grid = weight.transpose(1, 2).contiguous(), Grid(3, 32)
    codes = gptq_codes(wt, statistics.hessian, grid, 0.01, act_order=True)
    # Least squares: no scale of a random row can be moved to a lower error (the rounding to bfloat16 aside).
    refit = refit_scales(wt, codes, statistics.hessian, 32)
    error = output_error(wt, codes.codes * refit.scale.repeat_interleave(32, 1), statistics.hessian)
    for factor in (0.97, 1.03):
        moved = output_error(wt, codes.codes * (refit.scale * factor).repeat_interleave(32, 1), statistics.hessian)
        assert (moved > error).all()
    lower = descend(wt, refit, statistics.hessian, grid)
    before, after = (output_error(wt, c.values(32), statistics.hessian) for c in (refit, lower))
    assert (after <= before).all() and lower.codes.abs().max() <= grid.qmax
    assert torch.equal(lower.codes, lower.codes.round()) and isinstance(lower, Codes)


def test_identity_moments_make_gptq_the_clip_search():
    weight = torch.randn(2, 16, 64).bfloat16().float()
    statistics = Statistics(torch.eye(64).expand(2, 64, 64).contiguous(), torch.ones(2))
    expected = fake_quant(weight, 3, 32, 16, dtype=torch.bfloat16).float()
    for method in ("gptq", "wclip"):
        made = round_weight(weight, Grid(3, 32), statistics, method)
        # Their search sees the values after their rounding to bfloat16, the pure grid's before: near ties may differ.
        errors = [((value - weight) ** 2).sum().item() for value in (made, expected)]
        assert errors[0] == pytest.approx(errors[1], rel=2e-3)


def test_shrinking_draws_poor_statistics_to_the_mean():
    _, statistics = problem()
    hessian = statistics.hessian.clone()
    hessian[2] = 0
    mean = (hessian * torch.tensor([0.99, 0.01, 0.0])[:, None, None]).sum(0)
    out = shrink(hessian.clone(), mean, [0.0, 0.9, 1.0])
    assert torch.equal(out[0], hessian[0])
    scale = hessian[1].trace() / mean.trace()
    torch.testing.assert_close(out[1], 0.1 * hessian[1] + 0.9 * scale * mean)
    torch.testing.assert_close(out[2], mean)


@pytest.mark.parametrize(
    "change,message",
    [
        ({"method": "magic"}, "method 'magic' is unknown"),
        ({"statistics": None}, "needs calibration statistics"),
        ({"weight": torch.full((2, 4, 32), torch.nan)}, "NaN"),
        ({"grid": Grid(3, 48)}, "group 48 does not divide"),
        ({"grid": Grid(9, 32)}, "bits 9 is outside"),
    ],
)
def test_bad_input(change, message):
    weight, statistics = problem(experts=2, outputs=4, inputs=32)
    values = {"weight": weight, "grid": Grid(3, 32), "statistics": statistics, "method": "gptq"} | change
    with pytest.raises(UserError, match=message):
        round_weight(**values)
