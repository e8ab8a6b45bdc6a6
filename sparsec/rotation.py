"""Copies of a weight to walk through, so that a product measured again and again finds its weight in memory, not in a cache."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

STEP = 1 << 28  # memory grows by this much, so that cases of one run rarely make it grow again


class Rotation:
    """Copies of what contenders read, `nbytes` together for each of them; 0: one copy, warm in the cache.

    The memory is kept from case to case: touching a fresh page costs several times what filling it does.
    """

    def __init__(self, nbytes: int) -> None:
        self._nbytes = nbytes
        self._memory: dict[str, Tensor] = {}  # by contender

    def copies(self, contender: str, tensors: Sequence[Tensor]) -> list[list[Tensor]]:
        """At least one copy of the tensors, contiguous and aligned; overwrites those of the contender's earlier call."""
        count = max(1, -(-self._nbytes // max(1, sum(t.nbytes for t in tensors))))
        memory = self._reserve(contender, count * sum(_aligned(t.nbytes) for t in tensors))
        found, at = [], 0
        for _ in range(count):
            twins = []
            for tensor in tensors:
                twin = memory[at : at + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
                twins.append(twin.copy_(tensor))
                at += _aligned(tensor.nbytes)
            found.append(twins)
        return found

    def _reserve(self, contender: str, nbytes: int) -> Tensor:
        memory = self._memory.get(contender)
        if memory is None or memory.nbytes < nbytes:
            self._memory[contender] = memory = torch.empty(-(-nbytes // STEP) * STEP, dtype=torch.uint8)
        return memory


def _aligned(nbytes: int) -> int:
    return -(-nbytes // 64) * 64
