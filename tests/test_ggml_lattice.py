"""The lattice types against llama.cpp (LLAMA_CPP: the folder of libggml-base.so), brute force, all scales.

That all types decode as gguf-py and llama.cpp do is in test_ggml_types.
"""

import ctypes
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from ggml_codecs import balanced, codec, decode_rows, encode
from ggml_types import LATTICE, TYPES

REPO = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def library():
    folder = os.environ.get("LLAMA_CPP")
    if not folder:
        pytest.skip("LLAMA_CPP is unset: the folder of llama.cpp's libggml-base.so")
    return ctypes.CDLL(str(Path(folder) / "libggml-base.so"))


def address(tensor):
    return ctypes.c_void_p(tensor.data_ptr())


def llama_encode(library, name, weight, importance):
    library.ggml_quantize_init(ctypes.c_int(int(TYPES[name].ggml)))
    out = torch.zeros(len(weight), weight.shape[1] // 256 * TYPES[name].bytes, dtype=torch.uint8)
    rows, inputs = (ctypes.c_int64(n) for n in weight.shape)
    getattr(library, f"quantize_{name}")(address(weight), address(out), rows, inputs, address(importance))
    return out


def random_blocks(name, count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    data = torch.randint(0, 256, (count, TYPES[name].bytes), dtype=torch.uint8, generator=generator)
    data[:, 1] &= 0xFB  # the half float d is finite, of either sign
    return data


def expert_rows(count):
    with safe_open(REPO / "models/razor-tiny/model.safetensors", "pt") as file:
        names = [name for name in file.keys() if ".experts." in name][::12]
        rows = torch.cat([file.get_tensor(name).float() for name in names])
    return rows[:: len(rows) // count][:count].contiguous()


def rows_of(kind, count=192):
    generator = torch.Generator().manual_seed(1)
    normal = torch.randn(count, 256, generator=generator) * 0.02
    if kind == "expert":
        return expert_rows(count)
    if kind == "gaussian":
        return normal
    chi = torch.randn(3, count, 256, generator=generator).square().mean(0)
    return normal / chi.sqrt()  # Student's t, three degrees of freedom


def weighted_error(data, name, weight, importance):
    return float(((decode_rows(data, name) - weight).double().square() * importance).sum())


@pytest.mark.parametrize("name", LATTICE)
def test_packing_loses_nothing(name):
    kind, data, w = codec(name), random_blocks(name, 200), rows_of("heavy")
    assert torch.equal(kind.pack(*kind.unpack(data)), data)
    importance = torch.rand(w.shape, generator=torch.Generator().manual_seed(2))
    scales = kind.fit(w, importance)
    codes, values = kind.block_codes(w, scales, importance)
    packed = kind.pack(scales, codes)
    assert torch.equal(kind.decode(packed), values)
    assert torch.equal(kind.unpack(packed)[1], codes)
    assert torch.equal(values.view(-1, kind.type.group), kind.units(codes).view(-1, kind.type.group) * scales.scale.view(-1, 1))


def brute_force(name, x, scale, importance):
    """The least weighted squared error of each x [M, 8] over every pattern of signs and every point, in float64."""
    kind, grid = codec(name), codec(name).grid(CPU)
    signs = grid.signs.double()
    if kind.layout.even:
        signs = signs[(signs < 0).sum(1) % 2 == 0]
    points = grid.points.double() * scale
    best = torch.full((len(x),), torch.inf, dtype=torch.float64)
    for sign in signs:
        parts = (x * sign).view(len(x), -1, 1, kind.width)
        error = ((parts - points).square() * importance.view(len(x), -1, 1, kind.width)).sum(-1)
        best = torch.minimum(best, error.amin(2).sum(1))
    return best


@pytest.mark.parametrize("name", LATTICE)
def test_nearest_is_the_best_of_all_signs_and_points(name):
    generator = torch.Generator().manual_seed(3)
    kind, grid = codec(name), codec(name).grid(CPU)
    count = 48 * 1024 // len(grid.points)  # brute force takes as long for each type
    x = torch.randn(count, 8, generator=generator).double() * grid.largest / 3
    x[:8] /= 20  # below the smallest size: every sign is cheap
    x[8:16] *= 5  # beyond the largest: every flip is dear
    x[16] = 0
    importance = torch.randn(count, 8, generator=generator).mul(1.5).exp().double()
    importance[17, 3], importance[18, :7] = 0, 0
    for scale in (1.0, 2e-4):
        rows = [t.float() for t in (x * scale, torch.full((count, 1), scale), torch.zeros(count, 1), importance)]
        _, values = kind.nearest(*rows)
        error = ((values.double() - rows[0].double()).square() * importance).sum(1)
        best = brute_force(name, rows[0].double(), float(rows[1][0]), importance)
        assert (error <= best * (1 + 1e-5) + 1e-12 * scale**2).all()
        whole = kind.nearest(rows[0].view(-1, 16), rows[1][::2], rows[2][::2], importance.float().view(-1, 16))[1]
        assert torch.equal(whole.view(-1, 8), values)


@pytest.mark.parametrize("name", LATTICE)
def test_transposed_weights_and_none(name):
    kind, x = codec(name), torch.randn(8, 5, generator=torch.Generator().manual_seed(4))
    one, zero = torch.ones(5, 1), torch.zeros(5, 1)
    assert torch.equal(
        kind.nearest(x.T, one, zero, torch.ones(1, 1).expand(5, 8))[1],
        kind.nearest(x.T.clone(), one, zero, torch.ones(5, 8))[1],
    )
    w, importance = rows_of("heavy", 256), torch.ones(1, 1).expand(256, 256)
    for mine, expected in zip(kind.fit(w.T, importance), kind.fit(w.T.clone(), importance.clone())):
        assert torch.equal(mine, expected) if torch.is_tensor(mine) else all(map(torch.equal, mine, expected))
    codes, values = kind.nearest(x.T[:0], one[:0], zero[:0], torch.ones(0, 8))
    assert codes.shape == (0, 1) and values.shape == (0, 8)


def exhaustive_error(name, w, importance):
    """The least error of one block [256] over 200 values of d and every level of every group, with exact codes."""
    kind, step = codec(name), codec(name).layout.step
    top = float(w.abs().max()) / (kind.grid(CPU).largest * step * 31)
    d = torch.linspace(0.3 * top, 1.6 * top, 200).half().float().unique()
    scale = (d[:, None] * step * torch.arange(1, 32, 2)).view(-1, 1, 1).expand(-1, 256 // kind.type.group, 1)
    x, weight = (t.view(1, -1, kind.type.group).expand(len(scale), -1, -1) for t in (w, importance))
    _, values = kind.nearest(x.flatten(0, 1), scale.flatten(0, 1), scale.flatten(0, 1) * 0, weight.flatten(0, 1))
    error = ((values - x.flatten(0, 1)).square() * weight.flatten(0, 1)).view(len(d), 16, -1, kind.type.group).sum(3)
    return float(error.amin(1).sum(1).min())


@pytest.mark.parametrize("name", LATTICE)
def test_fit_is_near_the_best_of_all_scales(name):
    w = torch.cat([rows_of("gaussian", 2), rows_of("heavy", 2)])
    importance = balanced(torch.randn(4, 256, generator=torch.Generator().manual_seed(5)).exp())
    best = sum(exhaustive_error(name, *pair) for pair in zip(w, importance))
    assert best * 0.999 < weighted_error(encode(w, name, importance), name, w, importance) < best * 1.03


@pytest.mark.parametrize("name", LATTICE)
def test_error_is_well_below_that_of_llama_cpp(name, library):
    generator = torch.Generator().manual_seed(6)
    for kind in ("expert", "gaussian", "heavy"):
        w = rows_of(kind)
        for importance in (torch.ones(256), torch.randn(256, generator=generator).exp()):
            mine = weighted_error(encode(w, name, importance), name, w, importance)
            theirs = weighted_error(llama_encode(library, name, w, importance), name, w, importance)
            print(f"{name} {kind} {'ones' if importance.min() == 1 else 'log-normal'}: {mine / theirs:.4f}")
            assert mine < 0.97 * theirs, kind


@pytest.mark.parametrize("name", LATTICE)
def test_zero_and_tiny_blocks_stay_finite(name):
    normal = torch.randn(6, 256, generator=torch.Generator().manual_seed(7))
    size = torch.tensor([0.0, 1e-41, 1e-30, 1e-6, 1.0, 1e4])[:, None]
    w = normal * size
    w[4, :32] = 0  # a group of zeros in a block that is not
    importance = torch.ones(256)
    importance[::3] = 0
    decoded = decode_rows(encode(w, name, importance), name)
    assert torch.isfinite(decoded).all()
    assert (decoded[:3] == 0).all()  # nothing that a half float could scale
    assert decoded[4, :32].abs().max() < 0.2
    error = ((decoded - w).square() * importance).sum(1) / (w.square() * importance).sum(1).clamp_min(1e-38)
    assert (error[3:] < 0.2).all()


@pytest.mark.parametrize("name", LATTICE)
def test_rescaled_multiplies_what_the_format_stores(name):
    kind, w = codec(name), rows_of("gaussian", 3)
    scales = kind.fit(w, torch.ones_like(w))
    doubled = kind.rescaled(scales, torch.tensor([2.0, 1.0, 1e30]))
    assert torch.equal(doubled.scale[0], scales.scale[0] * 2) and torch.equal(doubled.scale[1], scales.scale[1])
    assert torch.isfinite(doubled.scale).all()
    codes, _ = kind.block_codes(w, doubled, torch.ones_like(w))
    units = kind.units(codes).view(3, -1, kind.type.group)
    assert torch.equal(kind.decode(kind.pack(doubled, codes)), (units * doubled.scale[..., None]).view(3, -1))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", LATTICE)
def test_a_gpu_encodes_as_well(name):
    w = rows_of("heavy")
    own, other = (weighted_error(encode(t, name).cpu(), name, w, 1.0) for t in (w, w.cuda()))
    assert abs(own / other - 1) < 1e-3
