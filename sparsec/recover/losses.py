"""How far a pruned model is from its teacher, with gradients; logits are made for a few tokens at a time, so that a vocabulary of
50,000 takes no memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

LOGITS = 1 << 22
"""Looked at together: 16 MB of float32, a few times."""


def relative_error(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """Sum over pairs of the mean squared difference over the teacher's mean square (SquareHead, Kurtic et al. 2023,
    arXiv:2310.06927)."""
    total = torch.zeros((), device=student[0].device if student else None)
    for a, b in zip(student, teacher, strict=True):
        scale = b.detach().float().square().mean()
        total = total + (a.float() - b.detach().float()).square().mean() / torch.where(scale > 0, scale, 1.0)
    return total


def kl_sum(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Sum over rows of KL(teacher || student), times temperature**2, in nats. Logits [rows, vocabulary]."""
    p = F.log_softmax(teacher.float() / temperature, dim=-1)
    q = F.log_softmax(student.float() / temperature, dim=-1)
    return F.kl_div(q, p, reduction="sum", log_target=True) * temperature**2


def head_loss(
    hidden: Tensor,
    of_teacher: Tensor | None,
    student: Callable[[Tensor], Tensor],
    teacher: Callable[[Tensor], Tensor] | None,
    next_ids: Tensor,
    *,
    cross_entropy: float,
    temperature: float,
    scale: float | None,
) -> tuple[float, float, Tensor | None]:
    """(divergence, cross-entropy, the gradient of their mixture by `hidden` times `scale`); without a scale there is no gradient.

    A part whose share is 0 is not computed for a gradient, and is then 0.

    hidden, of_teacher: [sequences, length, features], what the heads read; student, teacher: give logits of some tokens.
    next_ids: [sequences, length - 1]. cross_entropy: its share, the rest is the divergence from the teacher, both means per token.
    What else the student's head reads gets its gradients here.
    """
    sequences, length, features = hidden.shape
    tokens = sequences * length
    following = torch.full((sequences, length), -100, dtype=torch.int64, device=hidden.device)
    following[:, :-1] = next_ids
    rows = hidden.detach().reshape(1, tokens, features)
    others = None if of_teacher is None else of_teacher.reshape(1, tokens, features)
    flat = following.reshape(tokens)
    predicted = max(1, sequences * (length - 1))
    gradient = torch.empty_like(rows) if scale is not None else None
    looks = scale is None
    apart, unseen, at, step = 0.0, 0.0, 0, 0
    while at < tokens:
        with torch.set_grad_enabled(scale is not None):
            end = min(tokens, at + (step or 64))
            part = rows[:, at:end].clone().requires_grad_(scale is not None)
            logits = student(part).flatten(0, -2)
            step = max(16, LOGITS // logits.shape[-1])
            here = logits.new_zeros((), dtype=torch.float32)
            if (cross_entropy < 1 or looks) and others is not None and teacher is not None:
                with torch.no_grad():
                    wanted = teacher(others[:, at:end]).flatten(0, -2)
                away = kl_sum(logits, wanted, temperature) / tokens
                here, apart = here + (1 - cross_entropy) * away, apart + float(away.detach())
            if cross_entropy > 0 or looks:
                missed = F.cross_entropy(logits.float(), flat[at:end], ignore_index=-100, reduction="sum") / predicted
                here, unseen = here + cross_entropy * missed, unseen + float(missed.detach())
            if gradient is not None and scale is not None:
                torch.autograd.backward(here * scale)
                assert part.grad is not None
                gradient[:, at:end] = part.grad
        at = end
    return apart, unseen, None if gradient is None else gradient.reshape(hidden.shape)


def finite(*values: Any) -> bool:
    """Whether no value is NaN or inf."""
    return all(bool(torch.isfinite(torch.as_tensor(value)).all()) for value in values)
