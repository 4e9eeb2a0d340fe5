"""The grids of moe_quant against a plain loop over groups and steps, bit for bit, and their properties."""

import math
import struct

import pytest
import torch

import moe_quant
from console import UserError
from moe_quant import average_bits, dequantize, effective_bits, fake_quant, quantize_group, ternary


def f32(value: float) -> float:
    return struct.unpack("f", struct.pack("f", value))[0]


def bf16(value: float) -> float:
    return torch.tensor(value, dtype=torch.float32).to(torch.bfloat16).item()


def add_in_tree(values: list[torch.Tensor]) -> torch.Tensor:
    values = values + [torch.zeros(())] * (2 ** math.ceil(math.log2(len(values))) - len(values))
    while len(values) > 1:
        half = len(values) // 2
        values = [values[i] + values[half + i] for i in range(half)]
    return values[0]


def reference(weight, bits, group, clip_steps, clip_low=0.65):
    """(codes, scales) by one loop over groups and one over ratios, scalars in Python, sums one addition at a time."""
    qmax = 2 ** (bits - 1) - 1
    codes, scales = [], []
    for w in weight.float().reshape(-1, group):
        best = None
        for step in range(max(1, clip_steps)):
            ratio = 1.0 - (1.0 - clip_low) * step / (clip_steps - 1) if clip_steps > 1 else 1.0
            scale = bf16(f32(w.abs().max().item() * f32(ratio / qmax)))
            inverse = f32(1 / scale) if scale else 0.0
            code = torch.round(w * inverse).clamp(-qmax, qmax)
            error = (w - code * scale) ** 2
            total = add_in_tree(list(error)).item()
            if best is None or total < best[0]:
                best = total, scale, code
        scales.append(best[1])
        codes.append(best[2])
    return torch.stack(codes).to(torch.int8).view(weight.shape), torch.tensor(scales).view(*weight.shape[:-1], -1)


def heavy_tailed(shape, seed, dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * torch.randn(shape, generator=generator).exp() * 0.02).to(dtype)


CASES = [
    (bits, group, shape, dtype)
    for bits, group, shape, dtype in [
        (2, 32, (3, 4, 64), torch.bfloat16),
        (3, 32, (6, 64), torch.float32),
        (3, 128, (2, 3, 256), torch.bfloat16),
        (4, 64, (5, 128), torch.bfloat16),
        (5, 96, (4, 96), torch.float32),  # not a power of two: the tree is padded
        (6, 128, (3, 128), torch.float32),
        (7, 64, (4, 64), torch.float16),
        (8, 32, (2, 2, 96), torch.bfloat16),
    ]
]


@pytest.mark.parametrize("steps", [1, 16])
@pytest.mark.parametrize("bits,group,shape,dtype", CASES)
def test_bit_identical_to_the_plain_loop(bits, group, shape, dtype, steps):
    weight = heavy_tailed(shape, seed=bits * group, dtype=dtype)
    weight.view(-1, group)[1] = 0
    weight.view(-1, group)[2, 1:] = 0  # a single value: every ratio below 1 is worse
    before = weight.clone()
    codes, scales = reference(weight, bits, group, steps)
    for chunk in (None, group, 3 * group):
        q = quantize_group(weight, bits, group, steps, chunk=chunk)
        assert torch.equal(q.codes, codes) and torch.equal(q.scale, scales) and torch.equal(weight, before)
    assert torch.equal(fake_quant(weight, bits, group, steps), dequantize(q, group, dtype))
    expected = codes.float().view(-1, group) * scales.view(-1, 1)
    assert torch.equal(dequantize(q, group), expected.to(torch.bfloat16).view(shape))


def test_ties_keep_the_larger_ratio():
    weight = torch.zeros(1, 32)
    weight[0, :2] = torch.tensor([1.0, -1.0])
    q = quantize_group(weight, 2, 32, 2, clip_low=0.999)  # 0.999 rounds to the bfloat16 1.0: same error, same scale
    assert q.scale.item() == 1.0
    torch.testing.assert_close(dequantize(q, 32, torch.float32), weight, rtol=0, atol=0)
    low = quantize_group(torch.tensor([[1.0, 0.0]]), 2, 2, 3, clip_low=1e-9)
    assert low.scale.item() == 1.0


@pytest.mark.parametrize("bits", range(2, 9))
def test_search_is_never_worse_than_absmax_in_any_group(bits):
    weight = heavy_tailed((64, 512), seed=bits, dtype=torch.float32)

    def error(steps):
        difference = dequantize(quantize_group(weight, bits, 64, steps), 64, torch.float32) - weight
        return difference.double().square().view(-1, 64).sum(-1)

    searched, absmax = error(16), error(1)
    assert bool((searched <= absmax * (1 + 1e-6)).all())
    assert bits == 8 or bool((searched < absmax).any())  # at 8 bits nothing is worth clipping


@pytest.mark.parametrize("bits", range(2, 9))
def test_codes_stay_on_the_grid_and_absmax_error_within_half_a_step(bits):
    qmax = 2 ** (bits - 1) - 1
    weight = heavy_tailed((32, 256), seed=100 + bits, dtype=torch.float32)
    q = quantize_group(weight, bits, 128, 1)
    assert q.codes.dtype == torch.int8 and q.codes.abs().max() == qmax
    assert torch.equal(q.scale, q.scale.bfloat16().float())
    difference = (dequantize(q, 128, torch.float32) - weight).abs().view(-1, 128)
    # A scale rounded down by up to 2**-9 leaves the largest value up to qmax * 2**-9 of a step beyond the grid.
    assert bool((difference <= q.scale.view(-1, 1) * (0.5 + qmax * 2**-8)).all())
    negated = quantize_group(-weight, bits, 128, 16)
    assert torch.equal(negated.codes, -quantize_group(weight, bits, 128, 16).codes)


def test_zero_and_tiny_groups_dequantize_to_exact_zero():
    weight = torch.zeros(2, 64)
    weight[1] = 1e-40  # below the smallest scale
    for q in (quantize_group(weight, 3, 64, 16), ternary(weight, 64)):
        assert not q.codes.any() and not q.scale.any()
        assert torch.equal(dequantize(q, 64, torch.float32), torch.zeros(2, 64))


def test_ternary_is_absmean():
    weight = heavy_tailed((8, 128), seed=7, dtype=torch.float32)
    q = ternary(weight, 64)
    groups = weight.view(-1, 64)
    scale = groups.abs().mean(-1, keepdim=True).bfloat16().float()
    assert torch.equal(q.scale.view(-1, 1), scale)
    assert torch.equal(q.codes.view(-1, 64).float(), (groups / scale).round().clamp(-1, 1))


def test_bits_of_the_seed_recipe():
    assert effective_bits(3, 128) == (3.0, 3.125)
    assert effective_bits(16, None) == (16.0, 16.0)
    weight_bits, stored_bits = average_bits([(946, 3, 128), (54, 4, 128)])  # 94.6 % of the 122B are experts
    assert weight_bits == pytest.approx(3.054) and stored_bits == pytest.approx(3.054 + 0.125)
    assert average_bits([]) == (0.0, 0.0)


@pytest.mark.parametrize("bits,group", [(1, 32), (9, 32), (3, 48), (3, 0), (3, -32)])
def test_refuses_grids_that_do_not_fit(bits, group):
    with pytest.raises(UserError, match=r"outside 2\.\.8|does not divide the last axis of shape \[2, 64\]"):
        quantize_group(torch.ones(2, 64), bits, group, 1)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf"), 3.4e38])
@pytest.mark.parametrize("quantize", [lambda w: quantize_group(w, 2, 32, 16), lambda w: ternary(w, 32)])
def test_refuses_what_is_not_finite(bad, quantize):
    weight = torch.ones(4, 64)
    weight[3, 40 if not math.isfinite(bad) else slice(None)] = bad
    with pytest.raises(UserError, match="NaN"):
        quantize(weight)


def test_chunks_bound_the_memory(monkeypatch):
    sizes = []
    search = moe_quant._search
    monkeypatch.setattr(moe_quant, "_search", lambda w, *rest: sizes.append(w.numel()) or search(w, *rest))
    quantize_group(torch.ones(100, 64), 3, 64, 16, chunk=1000)
    assert max(sizes) <= 1000 and sum(sizes) == 6400
