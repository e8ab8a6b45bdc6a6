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


def _divergence(student: Tensor, teacher: Tensor, temperature: float) -> tuple[float, Tensor]:
    """Sum over rows of KL(teacher || student), times temperature**2, in nats, and its gradient by the student's logits.

    Logits [rows, vocabulary]. The gradient is written down: autograd would go over the vocabulary twice as often.
    """
    if temperature != 1:
        student, teacher = student / temperature, teacher / temperature
    p, q = F.log_softmax(teacher.float(), dim=-1), F.log_softmax(student.float(), dim=-1)
    chance = p.exp()
    apart = torch.dot(chance.flatten(), p.sub_(q).flatten())
    return float(apart) * temperature**2, q.exp_().sub_(chance).mul_(temperature)


def _missed(student: Tensor, following: Tensor) -> tuple[float, Tensor]:
    """Sum of the cross-entropy, in nats, and its gradient by logits [rows, vocabulary]. following: ids [rows]; negative: none."""
    q = F.log_softmax(student.float(), dim=-1)
    rows = (following >= 0).nonzero().squeeze(1)
    ids = following[rows]
    missed = -float(q[rows, ids].sum())
    gradient = q.exp_()
    gradient[rows, ids] -= 1
    gradient[following < 0] = 0
    return missed, gradient


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
    rows = hidden.detach().reshape(tokens, features)
    others = None if of_teacher is None else of_teacher.reshape(tokens, features)
    flat = following.reshape(tokens)
    predicted = max(1, sequences * (length - 1))
    trains = scale is not None
    gradient = torch.empty_like(rows) if trains else None
    apart, unseen, at, step = 0.0, 0.0, 0, 0
    while at < tokens:
        end = min(tokens, at + (step or 64))
        part = rows[at:end].clone()[None].requires_grad_(trains)
        with torch.set_grad_enabled(trains):
            logits = student(part).flatten(0, -2)
        step = max(16, LOGITS // logits.shape[-1])
        with torch.no_grad():
            steepest = torch.zeros((), device=hidden.device)
            if (cross_entropy < 1 or not trains) and others is not None and teacher is not None:
                value, by_logits = _divergence(logits, teacher(others[at:end][None]).flatten(0, -2), temperature)
                apart += value / tokens
                steepest = by_logits.mul_((1 - cross_entropy) / tokens)
            if cross_entropy > 0 or not trains:
                value, by_logits = _missed(logits, flat[at:end])
                unseen += value / predicted
                steepest = by_logits.mul_(cross_entropy / predicted).add_(steepest)
        if gradient is not None and scale is not None:
            torch.autograd.backward(logits, steepest.mul_(scale).to(logits.dtype))
            assert part.grad is not None
            gradient[at:end] = part.grad[0]
        at = end
    return apart, unseen, None if gradient is None else gradient.reshape(hidden.shape)


def finite(*values: Any) -> bool:
    """Whether no value is NaN or inf."""
    return all(bool(torch.isfinite(torch.as_tensor(value)).all()) for value in values)
