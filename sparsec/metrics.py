"""How far the outputs of two models are apart."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

LOGITS = 1 << 20
"""Looked at together, 4 MB of float32: the few copies that this makes are small beside the logits themselves."""


def in_parts(*tensors: Tensor, vocabulary: int) -> Iterator[tuple[Tensor, ...]]:
    """The same few rows of each tensor in turn, so many that their logits are at most LOGITS.

    Results go into one of the tensors: kept each by itself, they would hold the memory apart that the next copies want.
    """
    return zip(*(torch.split(tensor, max(1, LOGITS // vocabulary)) for tensor in tensors), strict=True)


def kl_rows(dense: Tensor, other: Tensor) -> Tensor:
    """KL(dense || other) of the next-token distributions, in nats.

    dense, other: logits [rows, vocabulary] of any float dtype. Returns float32 [rows].
    """
    found = torch.empty(len(dense), device=dense.device)
    for a, b, rows in in_parts(dense, other, found, vocabulary=dense.shape[-1]):
        p, q = F.log_softmax(a.float(), dim=-1), F.log_softmax(b.float(), dim=-1)
        rows.copy_(F.kl_div(q, p, reduction="none", log_target=True).sum(dim=-1))
    return found


def divergence(dense: Any, other: Any) -> float:
    """Of what two models return for the same call: mean KL divergence where there are `logits`, else relative squared error."""
    if hasattr(dense, "logits"):
        a, b = dense.logits, other.logits
        mean = float(kl_rows(a.reshape(-1, a.shape[-1]), b.reshape(-1, b.shape[-1])).double().mean())
        return max(mean, 0.0)  # in this order, for which NaN stays NaN
    a, b = first_tensor(dense).double(), first_tensor(other).double()
    scale = float(a.square().sum())
    return float((a - b).square().sum()) / scale if scale else 0.0


def first_tensor(output: Any) -> Tensor:
    """The first float tensor in a tensor, a sequence or a mapping. Raises TypeError where there is none."""
    for item in (output,) if isinstance(output, Tensor) else tuple(getattr(output, "values", lambda: output)()):
        if isinstance(item, Tensor) and item.is_floating_point():
            return item
    raise TypeError(f"no float tensor in a {type(output).__name__}")
