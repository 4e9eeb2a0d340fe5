"""Block types of ggml against gguf-py's decoder, llama.cpp's C library (where $LLAMA_CPP names a build), and plain loops."""

import ctypes
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf.quants import dequantize

from checkpoint import Checkpoint
from console import UserError
from ggml_codecs import balanced, codec, decode_rows, encode
from ggml_round import ldlq
from ggml_types import CHUNK_WEIGHTS, LATTICE, TYPES, fallback, half, half_bytes, row_bytes

ROOT = Path(__file__).resolve().parent.parent
CASTS = ("f32", "f16", "bf16")
SCALAR = [name for name in TYPES if name not in LATTICE and name not in CASTS]


def random_blocks(name, count, seed=0):
    """Random bytes uint8 [count, bytes]; half floats and casts hold random finite numbers."""
    generator = torch.Generator().manual_seed(seed)
    kind = TYPES[name]
    numbers = torch.randn(count, 2, generator=generator) * torch.tensor([[0.01, 0.3]])
    if name in CASTS:
        return encode(numbers[:, :1], name)
    data = torch.randint(0, 256, (count, kind.bytes), generator=generator, dtype=torch.uint8)
    for i, start in enumerate(half_places(name)):
        data[:, start : start + 2] = half_bytes(numbers[:, i])
    return data


def half_places(name):
    """Where the half floats of a block start."""
    return {"q5_1": (0, 2), "q4_K": (0, 2), "q5_K": (0, 2), "q2_K": (80, 82), "q6_K": (208,), "q3_K": (108,)}.get(name, (0,))


def importance_of(inputs, seed=3):
    """Like an imatrix: positive, over several powers of ten."""
    return torch.exp(1.5 * torch.randn(inputs, generator=torch.Generator().manual_seed(seed)))


def heavy_tailed(rows=64, inputs=512, seed=1):
    generator = torch.Generator().manual_seed(seed)
    normal, chi = (torch.randn(rows, inputs, 4, generator=generator) for _ in range(2))
    return 0.02 * normal[..., 0] / chi[..., 1:].square().mean(-1).sqrt()


@pytest.fixture(scope="module")
def library():
    """llama.cpp's C library of types."""
    folder = os.environ.get("LLAMA_CPP")
    if not folder:
        pytest.skip("LLAMA_CPP is not set")
    found = [path for name in ("libggml-base.so", "libggml-base.dylib") for path in Path(folder).rglob(name)]
    if not found:
        pytest.skip(f"no libggml-base in {folder}")
    return ctypes.CDLL(str(found[0]))


def pointer(tensor):
    return ctypes.c_void_p(tensor.data_ptr())


def library_decode(library, data, name):
    """float32 [N, block] as llama.cpp decodes the blocks."""
    out = torch.empty(len(data), TYPES[name].block)
    data = data.contiguous()
    getattr(library, f"dequantize_row_{name}")(pointer(data), pointer(out), ctypes.c_int64(out.numel()))
    return out


def library_encode(library, weight, name, importance):
    """uint8 [rows, row bytes] as llama-quantize writes the rows; importance [I] or None."""
    library.ggml_quantize_init(ctypes.c_int(int(TYPES[name].ggml)))
    weight, rows = weight.contiguous(), weight.shape
    out = torch.empty(rows[0], row_bytes(name, rows[1]), dtype=torch.uint8)
    quantize = getattr(library, f"quantize_{name}")
    quantize.restype = ctypes.c_size_t
    shape = (ctypes.c_int64(rows[0]), ctypes.c_int64(rows[1]))
    quantize(pointer(weight), pointer(out), *shape, pointer(importance) if importance is not None else None)
    return out


# ---------------------------------------------------------------- decoding


@pytest.mark.parametrize("name", TYPES)
def test_decode_is_ggufs_bit_for_bit(name):
    data = random_blocks(name, 300)
    reference = torch.from_numpy(np.ascontiguousarray(dequantize(data.numpy(), TYPES[name].ggml)))
    assert torch.equal(decode_rows(data, name).view(torch.int32), reference.view(torch.int32))


@pytest.mark.parametrize("name", [name for name in TYPES if name not in CASTS])
def test_decode_is_llama_cpps_bit_for_bit(name, library):
    data = random_blocks(name, 300, seed=7)
    assert torch.equal(decode_rows(data, name).view(torch.int32), library_decode(library, data, name).view(torch.int32))


@pytest.mark.parametrize("name", SCALAR)
def test_blocks_survive_unpacking_and_nearest_finds_their_own_codes(name):
    kind, data = codec(name), random_blocks(name, 100, seed=2)
    scales, codes = kind.unpack(data)
    assert torch.equal(kind.pack(scales, codes), data)
    values = kind.decode(data)
    if name == "q8_0":
        values = values.where(codes > 0, 0.0)  # -128 is read but never written
    assert torch.equal(kind.block_codes(values, scales, torch.ones_like(values))[1], values)


@pytest.mark.parametrize("name", ("q4_K", "q3_K", "iq4_xs"))
def test_nearest_is_the_argmin_over_all_codes(name):
    kind = codec(name)
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(200, 16, generator=generator)
    scale = torch.randn(200, 1, generator=generator) * 0.2 * (0.01 if name == "iq4_xs" else 1)
    offset = torch.rand(200, 1, generator=generator) if name == "q4_K" else torch.zeros(200, 1)
    every = kind.units(torch.arange(kind.layout.levels))[None, None] * scale[..., None] - offset[..., None]
    best = (every - x[..., None]).abs().amin(-1)
    codes, values = kind.nearest(x, scale, offset, torch.ones_like(x))
    assert torch.allclose((values - x).abs(), best, atol=1e-6)
    assert torch.equal(values, every.expand(200, 16, -1).gather(2, codes[..., None].long())[..., 0])


# ---------------------------------------------------------------- encoding


@pytest.mark.parametrize("name", ("f16", "bf16", "f32"))
def test_casts_are_torchs(name):
    weight = heavy_tailed() * 100
    cast = weight.to({"f16": torch.float16, "bf16": torch.bfloat16, "f32": torch.float32}[name])
    assert torch.equal(encode(weight, name), cast.view(torch.uint8))
    assert torch.equal(decode_rows(encode(weight, name), name), cast.float())


def weighted_error(weight, data, name, importance):
    return ((weight - decode_rows(data, name)).double().square() * (1.0 if importance is None else importance)).sum().item()


def real_rows():
    """Rows of razor-tiny: an expert, and an attention projection."""
    checkpoint = Checkpoint(ROOT / "models" / "razor-tiny")
    names = ("model.layers.4.mlp.experts.2.down_proj.weight", "model.layers.1.linear_attn.in_proj_qkv.weight")
    return torch.cat([checkpoint.read(name).float()[:64] for name in names])


@pytest.mark.parametrize("name", SCALAR)
def test_encode_beats_llama_quantize(name, library):
    for weight in (real_rows(), heavy_tailed(), heavy_tailed(32, 256) + 0.05):
        for importance in (None, importance_of(weight.shape[1])):
            own = weighted_error(weight, encode(weight, name, importance), name, importance)
            theirs = weighted_error(weight, library_encode(library, weight, name, importance), name, importance)
            assert own <= theirs, (weight.shape, importance is None, own / theirs)


@pytest.mark.parametrize("name", ("iq3_xxs", "iq2_xs", "q3_K", "q4_K"))
def test_error_feedback_halves_llama_quantizes_output_error(name, library):
    """On an expert of razor-tiny and correlated inputs; llama-quantize knows their diagonal."""
    weight, generator = real_rows()[:64], torch.Generator().manual_seed(9)
    x = torch.randn(4000, 64, generator=generator) @ torch.randn(64, 256, generator=generator) / 8
    x += 0.5 * torch.randn(4000, 256, generator=generator)
    hessian = x.T @ x / len(x)
    theirs = decode_rows(library_encode(library, weight, name, hessian.diagonal().contiguous()), name)
    own = decode_rows(ldlq(weight[None], name, hessian[None]), name)[0]
    errors = [((weight - values) @ hessian * (weight - values)).sum().item() for values in (own, theirs)]
    assert errors[0] < 0.5 * errors[1]


@pytest.mark.parametrize("name", SCALAR)
def test_encode_beats_nearest_on_the_plain_grid(name):
    """Without llama.cpp: better than minimum-to-maximum (or absolute maximum) scales in full precision, one bit less."""
    weight, kind = heavy_tailed(), codec(name)
    groups = weight.view(-1, kind.type.group)
    low, high = groups.amin(1, keepdim=True).clamp_max(0), groups.amax(1, keepdim=True).clamp_min(0)
    if not kind.layout.has_minimum:
        low, high = -groups.abs().amax(1, keepdim=True), groups.abs().amax(1, keepdim=True)
    step = (high - low) / (kind.layout.levels // 2 - 1)
    plain = (((groups - low) / step).round() * step + low).view_as(weight)
    assert weighted_error(weight, encode(weight, name), name, None) < (weight - plain).square().sum()


@pytest.mark.parametrize("name", ("q4_K", "q3_K", "iq4_nl"))
def test_importance_decides_and_is_broadcast(name):
    weight = heavy_tailed(32, 256).view(2, 16, 256)
    importance = torch.stack([importance_of(256, 1), importance_of(256, 2)])[:, None]
    data = encode(weight, name, importance)
    for e in range(2):
        assert torch.equal(data[e], encode(weight[e], name, importance[e, 0]))
        weighted = weighted_error(weight[e], data[e], name, importance[e, 0])
        assert weighted < weighted_error(weight[e], encode(weight[e], name), name, importance[e, 0])


@pytest.mark.parametrize("name", SCALAR)
def test_degenerate_rows(name):
    """Zeros stay zeros; constants, tiny numbers and dead inputs give finite values near the weights."""
    zeros = torch.zeros(2, 256)
    assert torch.equal(decode_rows(encode(zeros, name), name), zeros)
    ones = decode_rows(encode(zeros + 1, name), name)
    assert (ones - 1).abs().max() < 0.01
    assert (decode_rows(encode(zeros - 1, name), name) + 1).abs().max() < 0.01
    assert (decode_rows(encode(heavy_tailed(2, 256) * 1e-6, name), name)).abs().max() < 1e-4
    for size in (1e-42, 1e4):
        assert torch.isfinite(decode_rows(encode(heavy_tailed(2, 256).clamp(-1, 1) * size, name), name)).all()
    importance = torch.zeros(256)
    importance[:40] = 1
    weight = heavy_tailed(4, 256)
    dead = decode_rows(encode(weight, name, importance), name)
    assert torch.isfinite(dead).all()
    assert torch.isfinite(decode_rows(encode(weight, name, importance * 0), name)).all()


def test_chunks_do_not_matter(monkeypatch):
    weight, importance = heavy_tailed(40, 512), importance_of(512)
    whole = encode(weight, "q4_K", importance)
    monkeypatch.setitem(CHUNK_WEIGHTS, "cpu", 1024)
    assert torch.equal(encode(weight, "q4_K", importance), whole)
    halves = [decode_rows(whole[:, part], "q4_K") for part in (slice(0, 144), slice(144, 288))]
    assert torch.equal(decode_rows(whole, "q4_K"), torch.cat(halves, 1))


def test_rescaled_multiplies_the_values():
    kind = codec("q4_K")
    weight = heavy_tailed(20, 256)
    scales = kind.fit(weight, torch.ones_like(weight))
    factor = torch.linspace(0.5, 2, 20)
    grown = kind.rescaled(scales, factor)
    assert torch.allclose(grown.scale, scales.scale * factor[:, None], rtol=2e-3)
    assert torch.allclose(grown.offset, scales.offset * factor[:, None], rtol=2e-3)
    assert torch.equal(grown.raw[0], half(grown.raw[0]))


# ---------------------------------------------------------------- names, shapes, refusals


def test_sizes_and_fallbacks():
    assert row_bytes("iq3_xxs", 512) == 196 and row_bytes("bf16", 7) == 14
    expected = {"q4_K": "q5_0", "q5_K": "q5_1", "q6_K": "q8_0", "q3_K": "q4_0", "q2_K": "q4_0", "iq4_xs": "iq4_nl"}
    expected |= dict.fromkeys(LATTICE, "iq4_nl") | {"q8_0": "q8_0", "iq4_nl": "iq4_nl", "f16": "f16"}
    for name, other in expected.items():
        assert fallback(name, 512) == name
        assert fallback(name, 96) == other
        assert fallback(name, 100) == ("f16" if name != "bf16" else name)


def test_refusals():
    with pytest.raises(UserError, match="unknown"):
        codec("q4_k")
    with pytest.raises(UserError, match="use q5_0"):
        encode(torch.zeros(2, 96), "q4_K")
    with pytest.raises(UserError, match="no multiple"):
        decode_rows(torch.zeros(2, 145, dtype=torch.uint8), "q4_K")
    with pytest.raises(UserError, match="NaN"):
        encode(torch.full((2, 256), torch.nan), "q4_K")
    with pytest.raises(UserError, match="imatrix"):
        encode(torch.zeros(2, 256), "q4_K", torch.full((256,), -1.0))


@pytest.mark.parametrize("name", [*TYPES])
def test_weights_that_a_type_cannot_hold_are_refused(name):
    """Either the values are as near as those of a common size, or it is said that they do not fit."""
    weight = heavy_tailed(4, 256).clamp(-4, 4).bfloat16().float()
    usual, refused = decode_rows(encode(weight, name), name), 0
    for power in (12, 16, 20, 24, 28, 100):
        try:
            found = decode_rows(encode(weight * 2.0**power, name), name) / 2.0**power
        except UserError as error:
            assert "is beyond what" in str(error)
            refused += 1
            continue
        assert not refused, "a larger one fits"
        assert (found - weight).norm() <= 1.1 * (usual - weight).norm() + 1e-6
    assert (refused == 0) == (name in ("f32", "bf16")), refused


def test_balanced_importance():
    importance = torch.tensor([[0.0, 0.0], [0.0, 2.0], [4.0, 12.0]])
    assert torch.equal(balanced(importance), torch.tensor([[1.0, 1.0], [1e-6, 2.0], [0.5, 1.5]]))
