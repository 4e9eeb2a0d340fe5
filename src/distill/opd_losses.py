"""The losses of distillation on a teacher's top-k log-probabilities and the mass of its tail. Pure functions of tensors.

Not a command. Letters: N positions, V vocabulary, K kept tokens, H hidden. Both distributions are taken over K + 1 events, the
teacher's K likeliest tokens and "any other": KL over them is a lower bound of KL over the vocabulary that rises with K, and
equal to it for K = V. The temperature divides the logits before anything is kept, so a tail is exact at the temperature that
it was scored with and at no other.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

LOSSES = ("reverse_kl", "forward_kl", "cross_entropy")
FLOOR = -60.0  # log of a mass below which a tail counts as empty; keeps -inf out of products


class TopK(NamedTuple):
    """Token ids [N, K], their log-probabilities [N, K] float32, and the log of the mass of all others [N]."""

    ids: Tensor
    logp: Tensor
    tail: Tensor

    def events(self) -> Tensor:
        """Log-probabilities of the K + 1 events, [N, K + 1]."""
        return torch.cat([self.logp, self.tail[:, None]], -1).clamp_min(FLOOR)


def gathered(logits: Tensor, ids: Tensor, temperature: float = 1.0) -> TopK:
    """The log-probabilities of the tokens ``ids`` [N, K] and of the rest under logits [N, V]."""
    scaled = logits.float() / temperature
    total = scaled.logsumexp(-1)
    logp = scaled.gather(-1, ids) - total[:, None]
    if ids.shape[-1] == scaled.shape[-1]:
        return TopK(ids, logp, torch.full_like(total, FLOOR))
    rest = scaled.scatter(-1, ids, float("-inf")).logsumexp(-1)  # not log(1 - sum): that loses small tails to rounding
    return TopK(ids, logp, rest - total)


def top_k_of(hidden: Tensor, head: Tensor, k: int, temperature: float = 1.0, chunk: int = 16384) -> TopK:
    """The top K of  hidden [N, H] @ head [V, H]^T, in pieces of ``chunk`` tokens: no [N, V] is ever held."""
    best = torch.full((len(hidden), k), float("-inf"), device=hidden.device)
    ids = torch.zeros(len(hidden), k, dtype=torch.long, device=hidden.device)
    rest = torch.full((len(hidden),), float("-inf"), device=hidden.device)  # log of the summed exp of what is not kept
    for start in range(0, len(head), chunk):
        logits = F.linear(hidden, head[start : start + chunk]).float() / temperature
        own = torch.arange(start, start + logits.shape[1], device=hidden.device).expand_as(logits)
        values, tokens = torch.cat([best, logits], 1), torch.cat([ids, own], 1)
        best, places = values.topk(k, -1)
        ids = tokens.gather(1, places)
        left = values.scatter(1, places, float("-inf")).logsumexp(-1)
        rest = torch.logaddexp(rest, left)
    total = torch.logaddexp(best.logsumexp(-1), rest)
    return TopK(ids, best - total[:, None], (rest - total).clamp_min(FLOOR))


def forward_kl(teacher: TopK, student: TopK) -> Tensor:
    """KL(teacher || student) over the K + 1 events, nats [N]."""
    p, q = teacher.events(), student.events()
    return (p.exp() * (p - q)).sum(-1)


def reverse_kl(teacher: TopK, student: TopK) -> Tensor:
    """KL(student || teacher) over the K + 1 events, nats [N]."""
    p, q = teacher.events(), student.events()
    return (q.exp() * (q - p)).sum(-1)


def position_losses(logits: Tensor, targets: Tensor, teacher: TopK | None, kind: str, temperature: float) -> Tensor:
    """The loss of each position, [N]. KL at a temperature is multiplied by its square, which keeps the size of gradients
    (Hinton et al. 2015, arXiv 1503.02531); cross_entropy compares with ``targets`` [N] and needs no teacher."""
    if kind == "cross_entropy":
        return F.cross_entropy(logits.float(), targets, reduction="none")
    student = gathered(logits, teacher.ids, temperature)
    divergence = forward_kl if kind == "forward_kl" else reverse_kl
    return temperature**2 * divergence(teacher, student)


def losses_by_source(
    logits: Tensor, targets: Tensor, teacher: TopK | None, own: Tensor, kinds: tuple[str, str], temperature: float
) -> Tensor:
    """The loss of each position, [N]: the first of ``kinds`` in the teacher's text, the second where ``own`` [N] says that the
    text is the student's."""
    theirs, mine = kinds
    found = {kind: position_losses(logits, targets, teacher, kind, temperature) for kind in set(kinds)}
    return found[theirs] if theirs == mine else torch.where(own, found[mine], found[theirs])
