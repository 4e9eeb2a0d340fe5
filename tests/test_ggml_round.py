"""Error feedback into ggml block types: against plain loops over rows in float64, and against what it promises."""

import pytest
import torch

from console import UserError
from families import Role
from ggml_codecs import balanced, codec, decode_rows, encode
from ggml_round import SIZES, columns_of, descend, ldlq, packed, row_errors, spans, sweep, vector_importance
from gguf_layout import Piece, into_parameter, ordered_hessian, to_gguf
from moe_ptq import Statistics, even_spans, inverse_factor
from rounders import GgmlRounder, encoded

KINDS = [("iq4_nl", 96), ("q4_0", 96), ("q4_K", 512), ("q3_K", 512), ("iq3_xxs", 512), ("iq2_xs", 512)]


def problem(experts=2, outputs=5, inputs=512, tokens=2000, seed=0):
    """Heavy-tailed weights [E, O, I] and second moments [E, I, I] of correlated inputs with a few loud channels."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(experts, outputs, inputs, generator=generator)
    weight *= 0.02 * torch.rand(experts, outputs, inputs, generator=generator).clamp_min(2.0**-24) ** -0.3  # it may be 0
    mix = torch.randn(experts, 64, inputs, generator=generator)
    x = torch.randn(experts, tokens, 64, generator=generator) @ mix / 8
    x += 0.5 * torch.randn(experts, tokens, inputs, generator=generator)
    x *= 0.3 + 4 * torch.rand(experts, 1, inputs, generator=generator) ** 4
    return weight, x.transpose(1, 2) @ x / tokens


class SlowRow:
    """One row w [I] under one H [I, I] in float64, by the definition: what is behind a vector moves to its optimum."""

    def __init__(self, w, hessian, kind):
        self.w, self.h, self.kind = w.double(), hessian.double(), kind
        self.vectors = spans(len(w), kind.type.vector)
        self.moves, self.metrics = [], []
        for v in self.vectors:
            later = self.h[v.stop :, v.stop :]
            self.moves.append(torch.linalg.solve(later, self.h[v.stop :, v]) if len(later) else self.h[v.stop :, v])
            self.metrics.append(self.h[v, v] - self.h[v, v.stop :] @ self.moves[-1])

    def importance(self, part):
        return torch.cat([self.metrics[i].diagonal() for i in self.inside(part)]).float()

    def inside(self, part):
        return range(part.start // self.kind.type.vector, part.stop // self.kind.type.vector)

    def nearest(self, x, part, scales, group, importance):
        own = (scales.scale[:, group, None], scales.offset[:, group, None])
        code, value = self.kind.nearest(x.float()[None], *own, importance.float()[None])
        return code[0], value[0].double()

    def sweep_block(self, part, target, scales):
        """Codes, loss and the weights of the row that carry the errors."""
        work, loss, codes = target.clone(), 0.0, []
        for i in self.inside(part):
            v = self.vectors[i]
            group = (v.start - part.start) // self.kind.type.group
            code, value = self.nearest(work[v], v, scales, group, self.metrics[i].diagonal())
            d = work[v] - value
            work[v] = value
            work[v.stop :] += self.moves[i] @ d
            loss += float(d @ self.metrics[i] @ d)
            codes.append(code)
        return loss, torch.cat(codes)[None], work

    def sweep(self):
        """Bytes of the row."""
        work, data = self.w.clone(), []
        for part in spans(len(work), self.kind.type.block):
            scales = self.kind.fit(work[part].float()[None], balanced(self.importance(part)[None]))
            tries = [scales if size == 1 else self.kind.rescaled(scales, torch.tensor([size])) for size in SIZES]
            found = [(*self.sweep_block(part, work, trial), trial) for trial in tries]
            _, codes, work, scales = min(found, key=lambda f: f[0])
            data.append(self.kind.pack(scales, codes))
        return torch.cat(data, 1)

    def error(self, values):
        return float((self.w - values) @ self.h @ (self.w - values))

    def changed(self, values, part, new):
        """Values with ``part`` replaced where that lowers the error, and whether it does."""
        trial = values.clone()
        trial[part] = new
        return (trial, True) if self.error(trial) < self.error(values) else (values, False)

    def descend(self, data):
        """Values of the row after one pass over the blocks, from its bytes."""
        kind, size = self.kind, self.kind.type.block
        values = decode_rows(data, kind.type.name)[0].double()
        for index, part in enumerate(spans(len(values), size)):
            scales, codes = kind.unpack(data[:, index * kind.type.bytes : (index + 1) * kind.type.bytes])
            pull, own = (self.h @ (self.w - values))[part], values[part]
            factor = 1 + own @ pull / (own @ self.h[part, part] @ own)
            trial = kind.rescaled(scales, factor.float()[None])
            units = kind.units(codes).view(1, -1, kind.type.group)
            new = (units * trial.scale[..., None] - trial.offset[..., None]).flatten().double()
            values, taken = self.changed(values, part, new)
            raw = [field.clone() for field in (trial if taken else scales).raw]
            for group, place in enumerate(spans(size, kind.type.group)):
                values = self.descend_group(values, raw, group, slice(part.start + place.start, part.start + place.stop))
        return values

    def descend_group(self, values, raw, group, part):
        diagonal = self.h.diagonal()
        for place, limits in self.kind.integers.items():
            for step in (1, -1):
                trial = [field.clone() for field in raw]
                trial[place][:, group] = (trial[place][:, group] + step).clamp(*limits)
                target = values[part] + (self.h @ (self.w - values))[part] / diagonal[part]
                _, new = self.nearest(target, part, self.kind.scales_of(*trial), group, diagonal[part])
                values, taken = self.changed(values, part, new)
                raw[:] = trial if taken else raw
        for i in self.inside(part):
            v = self.vectors[i]
            for together in (False, True)[: self.kind.type.vector]:
                pull = (self.h @ (self.w - values))[v]
                move = torch.linalg.solve(self.h[v, v], pull) if together else pull / diagonal[v]
                _, new = self.nearest(values[v] + move, v, self.kind.scales_of(*raw), group, diagonal[v])
                values, _ = self.changed(values, v, new)
        return values


def swept(weight, hessian, name, passes=0):
    wt = weight.transpose(1, 2).contiguous()
    return wt, sweep(wt, inverse_factor(hessian, 0.0), codec(name), passes)


@pytest.mark.parametrize("name", ["iq3_xxs", "q4_K"])
def test_rows_are_rounded_alone(name):
    """Gates and what they gate have one factor of their moments: encoded together they have the bytes of each."""
    weight, hessian = problem(2, 24, 512)
    together = ldlq(weight, name, hessian)
    assert torch.equal(together, torch.cat([ldlq(part, name, hessian) for part in weight.split(12, 1)], 1))


@pytest.mark.parametrize("name,inputs", KINDS)
def test_sweep_and_descent_are_the_plain_loops(name, inputs):
    """Equal but for near ties, which float32 and float64 may take differently; a row of those ends at another error."""
    kind, (weight, hessian) = codec(name), problem(2, 2, inputs)
    wt, state = swept(weight, hessian, name)
    data = packed(state, kind).view(2, 2, -1)
    after = descend(wt, state, hessian, kind).values
    same, rows = 0, [(0, 1), (1, 0)]  # of four; the plain loops take seconds
    for e, o in rows:
        slow = SlowRow(weight[e, o], hessian[e], kind)
        expected = slow.sweep()[0]
        same += int(torch.equal(expected, data[e, o]))
        slow_values = slow.descend(data[e, o][None])
        same += int(torch.equal(slow_values.float(), after[e, :, o]))
        assert slow.error(after[e, :, o].double()) == pytest.approx(slow.error(slow_values), rel=0.03)
    assert same >= 2


@pytest.mark.parametrize("name", ["iq4_nl", "q8_0", "q6_K", "q4_K", "q3_K", "q2_K", "iq3_xxs", "iq2_xxs"])
def test_never_worse_than_plain_rounding_and_much_better_in_sum(name):
    weight, hessian = problem(2, 24, 512, seed=5)
    plain = encode(weight, name, hessian.diagonal(dim1=1, dim2=2)[:, None])
    data = ldlq(weight, name, hessian)
    wt = weight.transpose(1, 2)
    errors = [row_errors(wt, decode_rows(d, name).transpose(1, 2), hessian) for d in (data, plain)]
    assert bool((errors[0] <= errors[1]).all())
    assert errors[0].sum() < 0.5 * errors[1].sum()


@pytest.mark.parametrize("name", ["q3_K", "iq3_s"])
def test_no_pass_raises_the_error_of_a_row(name):
    weight, hessian = problem(2, 16, 512, seed=6)
    kind = codec(name)
    before = None
    for passes in (0, 1):
        wt, state = swept(weight, hessian, name, passes)
        errors = [row_errors(wt, state.values, hessian)]
        for _ in range(3):
            state = descend(wt, state, hessian, kind)
            errors.append(row_errors(wt, state.values, hessian))
            decoded = decode_rows(packed(state, kind), name)
            assert torch.equal(columns_of(decoded, 2), state.values)  # what is tracked is what is written
        for old, new in zip(errors, errors[1:]):
            assert bool((new <= old * (1 + 1e-4)).all())
        assert before is None or errors[0].sum() < 0.95 * before
        before = errors[0].sum()


def test_uncorrelated_inputs_need_no_feedback():
    """With a diagonal H the sweep is plain rounding."""
    weight, hessian = problem(1, 8, 512)
    hessian = torch.diag_embed(hessian.diagonal(dim1=1, dim2=2))
    importance = vector_importance(inverse_factor(hessian, 0.0), 8)
    assert torch.allclose(importance, hessian.diagonal(dim1=1, dim2=2), rtol=1e-4)
    wt = weight.transpose(1, 2).contiguous()
    state = sweep(wt, inverse_factor(hessian, 0.0), codec("q4_K"), 0, sizes=(1.0,))
    assert torch.equal(packed(state, codec("q4_K")), encode(weight, "q4_K", hessian.diagonal(dim1=1, dim2=2)[:, None])[0])


def test_batches_and_dead_inputs():
    """Matrices rounded together or in parts agree, but for the last bits of sums; inputs that are never active do no harm."""
    weight, hessian = problem(3, 40, 256, seed=8)
    hessian[1, :, 40:60] = 0
    hessian[1, 40:60] = 0
    hessian[2] = 0
    together, one_by_one = ldlq(weight, "iq3_xxs", hessian), ldlq(weight, "iq3_xxs", hessian, working_bytes=1)
    assert (together == one_by_one).float().mean() > 0.98
    values = decode_rows(together, "iq3_xxs")
    assert torch.isfinite(values).all()
    assert (values[2] - weight[2]).square().sum() < 0.05 * weight[2].square().sum()


@pytest.mark.parametrize("working", [None, 200_000, 1])
@pytest.mark.parametrize(
    "shape,how",
    [
        ((3, 12, 64), {}),
        ((3, 8, 64), {"span": (4, 12)}),
        ((3, 6, 64), {"rows": torch.cat([12 * e + torch.tensor([0, 2, 4, 6, 8, 10]) for e in range(3)])}),
        ((3, 12, 64), {"columns": torch.arange(63, -1, -1)}),
        ((3, 12, 64), {"transposed": True}),
        ((12, 64), {"rows": torch.arange(11, -1, -1)}),
    ],
)
def test_a_parameter_is_left_with_what_its_pieces_decode_to(shape, how, working):
    """Experts in batches, rows in parts: in the parameter itself where a piece is a view of it, through a copy elsewhere."""
    weight, moments = problem(3 if len(shape) == 3 else 1, 12, 64)
    parameter = weight.mT.contiguous() if "transposed" in how else weight if len(shape) == 3 else weight[0]
    before, parameter = parameter, parameter.clone()
    piece = Piece("n", shape, "p", ("s",), Role.ROUTED_EXPERT, 0, width=64, **how)
    rounder = GgmlRounder([piece], {"n": "q4_0"}, "ldlq", 0.1, {"n"}, working)
    rounder.round({"p": parameter}, lambda name: (Statistics(moments, torch.ones(len(moments))), torch.ones(len(moments))))
    made = rounder.taken({})["n"]
    whole = to_gguf(piece, before).reshape(len(moments), -1, 64)
    expected = encoded(whole.contiguous(), "q4_0", "ldlq", ordered_hessian(piece, moments), 0.1)
    assert made.data.shape == expected.shape and (made.data == expected).float().mean() > (0.99 if working == 1 else 0.9999)
    values = decode_rows(made.data, "q4_0").reshape(shape)
    assert torch.equal(to_gguf(piece, parameter), values) and 0 < made.errors[0] < 0.02 * made.errors[1]
    into_parameter(piece, values, before)
    assert torch.equal(parameter, before)  # and nothing else of it has changed


def test_casts_and_refusals():
    weight, hessian = problem(1, 4, 256)
    assert torch.equal(ldlq(weight, "bf16", hessian), weight.bfloat16().view(torch.uint8))
    with pytest.raises(UserError, match="do not belong"):
        ldlq(weight, "q4_K", hessian.expand(2, -1, -1))
    with pytest.raises(UserError, match="NaN"):
        ldlq(weight, "q4_K", hessian * torch.nan)
    with pytest.raises(UserError, match="use iq4_nl"):
        ldlq(weight[..., :96], "iq3_s", hessian[:, :96, :96])


def test_block_metric_is_the_loss_after_compensation():
    """(U_bb^T U_bb)^-1 is the Schur complement: H of a block once the inputs behind it are at their optimum."""
    _, hessian = problem(1, 1, 96)
    factor = inverse_factor(hessian, 0.0)
    part = slice(32, 64)
    own = torch.cholesky_inverse(factor[:, part, part], upper=True)[0].double()
    h = hessian[0].double()
    later = slice(64, 96)
    expected = h[part, part] - h[part, later] @ torch.linalg.solve(h[later, later], h[later, part])
    assert torch.allclose(own, expected, rtol=1e-3, atol=1e-5)


def test_spans_of_rows_are_even():
    for length, most in ((3072, 2569), (248_320, 162_760), (100, 1000), (2048, 16), (33, 16)):
        parts = [span.stop - span.start for span in even_spans(length, most)]
        assert sum(parts) == length and max(parts) <= most and max(parts) - min(parts) < len(parts)
