"""Copies of a weight to walk through, so that a product measured again and again finds its weight in memory, not in a cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

STEP = 1 << 28  # memory grows by this much, so that cases of one run rarely make it grow again


@dataclass(frozen=True)
class Protocol:
    """Which weights follow each other."""

    nbytes: int = 0  # of the copies that are walked through; 0: one copy, warm in the cache
    layers: int | None = None  # in place of nbytes: so many weights, as a stack of layers that is run again and again

    def count(self, nbytes: int) -> int:
        """How many copies of so many bytes."""
        return self.layers or max(1, -(-self.nbytes // max(1, nbytes)))

    @property
    def cold(self) -> bool:
        """Whether more is walked through than asked for by the weight itself."""
        return self.layers is None and self.nbytes > 0

    def __str__(self) -> str:
        if self.layers is not None:
            return f"{self.layers} in a row, again and again"
        return f"rotated over {self.nbytes >> 20} MiB" if self.nbytes else "cache-warm"


class Rotation:
    """The copies of what contenders read.

    The memory is kept from case to case: touching a fresh page costs several times what filling it does.
    """

    def __init__(self, protocol: Protocol) -> None:
        self.protocol = protocol
        self._memory: dict[str, Tensor] = {}  # by place

    def copies(self, place: str, tensors: Sequence[Tensor]) -> list[list[Tensor]]:
        """At least one copy of the tensors, contiguous and aligned; overwrites those of an earlier call with this place."""
        count = self.protocol.count(sum(t.nbytes for t in tensors))
        memory = self._reserve(place, count * sum(_aligned(t.nbytes) for t in tensors))
        found, at = [], 0
        for _ in range(count):
            twins = []
            for tensor in tensors:
                twin = memory[at : at + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
                twins.append(twin.copy_(tensor))
                at += _aligned(tensor.nbytes)
            found.append(twins)
        return found

    def _reserve(self, place: str, nbytes: int) -> Tensor:
        memory = self._memory.get(place)
        if memory is None or memory.nbytes < nbytes:
            self._memory[place] = memory = torch.empty(-(-nbytes // STEP) * STEP, dtype=torch.uint8)
        return memory


def _aligned(nbytes: int) -> int:
    return -(-nbytes // 64) * 64
