"""The operator `decode_attention`: one query per head over a cache whose heads several queries may share.

Why: of a token of a sparse model attention is a large part, and torch's kernel reads the cache where it is masked, copied for
every head. This one reads what is not masked, once. There are no gradients: it is for compiled graphs, where autograd is done.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparsec.errors import KernelError
from sparsec.kernels.derivatives import without_derivatives
from sparsec.kernels.ops import LIBRARY, loads_native
from sparsec.private import OpOverload

NAME = "decode_attention"

LIBRARY.define(  # type: ignore[no-untyped-call]
    f"{NAME}(Tensor q, Tensor k, Tensor v, Tensor? mask, float scale) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,)
)
decode_attention: OpOverload = torch.ops.sparsec.decode_attention.default


def reference_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """q [batch, heads, 1, width], k and v [batch, shared, length, width] -> [batch, heads, 1, width of v].

    mask [batch or 1, heads or 1, 1, length] is added to the scaled scores. A query that sees nothing gives zeros.
    KernelError for shapes that do not go together.
    """
    batch, heads, queries, width = q.shape
    shared, length = k.shape[1:3]
    if queries != 1 or not shared or heads % shared or k.shape != (batch, shared, length, width):
        raise KernelError(f"{NAME}: q {tuple(q.shape)} and k {tuple(k.shape)} do not go together")
    grouped = q.reshape(batch, shared, heads // shared, width).float()
    scores = (grouped @ k.float().transpose(2, 3) * scale).reshape(batch, heads, 1, length)
    if mask is not None:
        scores = scores + mask.float()
    weights = torch.where(torch.isneginf(scores).all(-1, keepdim=True), 0.0, scores.softmax(-1))
    out = weights.reshape(batch, shared, heads // shared, length) @ v.float()
    return out.reshape(batch, heads, 1, v.shape[3]).to(q.dtype)


def _implementation(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    if loads_native(q, NAME):
        out: Tensor = decode_attention(q, k, v, mask, scale)
        return out
    return reference_attention(q, k, v, mask, scale)


torch.library.impl(LIBRARY, NAME, "CompositeExplicitAutograd")(_implementation)
torch.library.register_fake(f"sparsec::{NAME}", reference_attention, lib=LIBRARY)
without_derivatives(LIBRARY, decode_attention)
