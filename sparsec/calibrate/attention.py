"""Attention without its mask where that only hides the future: the kernel then skips that half of the work."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

_ATTENTION = torch.ops.aten.scaled_dot_product_attention.default


class CausalAttention:
    """Looks at each mask once."""

    def __init__(self) -> None:
        self._seen: tuple[Tensor, bool] | None = None  # the last mask, and whether it only hides the future

    def arguments(
        self, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Those to call a node with; other nodes keep theirs."""
        mask: Any = args[3] if len(args) > 3 else kwargs.get("attn_mask")
        if node.target is not _ATTENTION or len(args) > 4 or kwargs.get("is_causal"):
            return args, kwargs
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            return args, kwargs
        if self._seen is None or self._seen[0] is not mask:
            hides = mask.shape[-1] == mask.shape[-2] and torch.equal(mask, torch.ones_like(mask).tril())
            self._seen = (mask, hides)
        if not self._seen[1]:
            return args, kwargs
        return args[:3], {**kwargs, "attn_mask": None, "is_causal": True}
