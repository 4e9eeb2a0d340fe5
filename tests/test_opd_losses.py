"""The losses on tiny tensors: equal to KL over the whole vocabulary for K = V, a lower bound below, gradients checked."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from conftest import REPO

from opd_losses import TopK, forward_kl, gathered, position_losses, reverse_kl, top_k_of


def logits_pair(n=5, v=23, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (3 * torch.randn(n, v, generator=generator) for _ in range(2))


@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.5])
def test_kl_is_that_of_the_whole_vocabulary_and_a_lower_bound_below(temperature):
    teacher, student = logits_pair()
    p, q = F.log_softmax(teacher / temperature, -1), F.log_softmax(student / temperature, -1)
    full = {"forward_kl": (p.exp() * (p - q)).sum(-1), "reverse_kl": (q.exp() * (q - p)).sum(-1)}
    for kind, exact in full.items():
        before = torch.zeros(len(teacher))
        for k in (1, 4, 12, 22, 23):
            kept = gathered(teacher, teacher.topk(k).indices, temperature)
            value = position_losses(student, torch.zeros(5, dtype=torch.long), kept, kind, temperature) / temperature**2
            assert (value >= before - 1e-5).all() and (value <= exact + 1e-5).all()  # finer events never lose divergence
            before = value
        torch.testing.assert_close(value, exact, rtol=1e-5, atol=1e-6)
    targets = torch.arange(5)
    torch.testing.assert_close(
        position_losses(student, targets, None, "cross_entropy", 1.0), F.cross_entropy(student, targets, reduction="none")
    )


def test_gradients():
    teacher, student = (logits.double() for logits in logits_pair(3, 9))
    student.requires_grad_()
    for k in (2, 9):
        kept = gathered(teacher, teacher.topk(k).indices)
        for loss in (forward_kl, reverse_kl):

            def value(logits, kept=kept, loss=loss):  # gathered works in float32: the check needs double throughout
                logp = F.log_softmax(logits, -1)
                own = logp.gather(-1, kept.ids)
                rest = logp.scatter(-1, kept.ids, float("-inf")).logsumexp(-1) if kept.ids.shape[1] < 9 else kept.tail.double()
                return loss(TopK(kept.ids, kept.logp.double(), kept.tail.double()), TopK(kept.ids, own, rest))

            assert torch.autograd.gradcheck(value, student)
            single = student.detach().float().requires_grad_()
            loss(kept, gathered(single, kept.ids)).sum().backward()
            (exact,) = torch.autograd.grad(value(student).sum(), student)
            torch.testing.assert_close(single.grad, exact.float(), rtol=1e-4, atol=1e-5)
            assert single.grad.isfinite().all()


@pytest.mark.parametrize("chunk", [7, 16, 1000])
def test_the_streamed_top_k_is_that_of_all_logits(chunk):
    generator = torch.Generator().manual_seed(1)
    hidden, head = torch.randn(6, 8, generator=generator), torch.randn(50, 8, generator=generator)
    hidden[0] *= 6  # its tail has almost no mass
    for k in (3, 20, 50):
        found = top_k_of(hidden, head, k, 0.9, chunk)
        expected = gathered(hidden @ head.T, (hidden @ head.T).topk(k).indices, 0.9)
        assert torch.equal(found.ids, expected.ids)
        torch.testing.assert_close(found.logp, expected.logp, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found.tail, expected.tail, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found.events().exp().sum(-1), torch.ones(6))


def test_the_budget_counts_what_is_trained():
    from opd_budget import budget, shape_of

    shape = shape_of(REPO / "models/razor-tiny")
    assert (shape.routed, shape.parameters) == (8 * 8 * 3 * 256 * 256, 15_940_528)
    made = sum(16 * (o + i) * 8 * 8 for o, i in ((512, 256), (256, 256)))  # A and B of both parameters of 64 experts
    assert shape.adapter_parameters(16) == made
    found = budget(None)
    assert found["shape"]["routed"] == 115_964_116_992
    assert found["disk"]["scores"] == 2000 * 8192 * (64 * 8 + 8)


def test_a_work_directory_remembers_its_settings(tmp_path):
    from console import UserError
    from distill_run import DistillSettings, Run
    from settings import parse_settings

    for name in ("opd_tiny", "opd_r1"):
        argv = ["--config", str(REPO / f"configs/{name}.env"), "--work", str(tmp_path / name)]
        config, _ = parse_settings(DistillSettings, "", argv=argv)
        assert config.rows % (config.micro_rows * config.processes) == 0
        for _ in range(2):
            Run(config, tmp_path / "r.json", print).claim()
        with pytest.raises(UserError, match="made with other RANK, STEPS; give another WORK"):
            Run(dataclasses.replace(config, steps=1, rank=3), tmp_path / "r.json", print).claim()
