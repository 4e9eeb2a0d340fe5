"""The fused kernel of the clip search gives the bits of the plain search: on a GPU, or in Triton's interpreter without one."""

import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton")

CHECK = """
import torch
from clip_kernel import clip_fake_quant
from moe_quant import MIN_SCALE, clip_factors, dequantize, quantize_group
device = "cuda" if torch.cuda.is_available() else "cpu"
torch.manual_seed(0)
weight = torch.randn(5, 4, 256).bfloat16()
weight[0, 0], weight[1, 0, :128], weight[2, 1] = 0, 1e-35, weight[2, 1] * 1e4
weight[0, 1] *= 2.0**100
weight[0, 2, 5], weight[0, 3] = 1e30, weight[0, 3] * 2.0**-90
weight[3, 2, ::2] = weight[3, 2, 1::2]  # ties
for bits, group, steps in ((2, 32, 16), (3, 128, 16), (4, 128, 1), (8, 256, 5)):
    qmax = 2 ** (bits - 1) - 1
    # float32 output: the interpreter truncates where a GPU rounds to bfloat16
    made, bad = clip_fake_quant(weight.to(device), clip_factors(bits, steps, 0.65), qmax, group, MIN_SCALE, torch.float32)
    expected = dequantize(quantize_group(weight, bits, group, steps), group, torch.float32)
    assert torch.equal(made.cpu().view(torch.int32), expected.view(torch.int32)) and not bad.item(), (bits, group, steps)
for value in (float("nan"), float("inf"), -float("inf")):
    weight[4, 3, 200] = value
    assert clip_fake_quant(weight.to(device), [1 / 3], 3, 128, MIN_SCALE, torch.float32)[1].item(), value
print("same bits")
"""


def test_the_fused_kernel_gives_the_bits_of_the_plain_search():
    environment = os.environ if torch.cuda.is_available() else {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", CHECK], capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and done.stdout.strip() == "same bits", done.stderr
