"""Weights that are cold: memory that calls walk through, so that each finds values that no cache holds."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

MIN_ARENA, MAX_ARENA = 1 << 28, 1 << 30  # bytes
UNKNOWN_CACHE = 1 << 26
FILL = 0x3C  # as every byte: about 0.0115 in fp32 and bf16, 1.06 in fp16, never a subnormal, which some CPUs multiply slowly
LINE = 64


class Arena:
    """Memory several times as large as the last-level cache, handed out in turn, over and over."""

    def __init__(self) -> None:
        size = min(MAX_ARENA, max(MIN_ARENA, 4 * last_level_cache()))
        self._memory = torch.full((size,), FILL, dtype=torch.uint8)
        self._at = 0

    def take(self, like: Tensor) -> Tensor:
        """A tensor of that shape and dtype, not read for an arena's length; its content is not to be changed."""
        nbytes = like.nbytes
        assert nbytes <= self._memory.nbytes
        if self._at + nbytes > self._memory.nbytes:
            self._at = 0
        taken = self._memory[self._at : self._at + nbytes]
        self._at += -(-nbytes // LINE) * LINE
        return taken.view(like.dtype).view(like.shape)

    def flush(self) -> None:
        """Reads all of it, after which nothing else is in a cache."""
        self._memory.view(torch.int64).sum()


def last_level_cache() -> int:
    """Bytes, as the system says."""
    sizes = [p.read_text().strip() for p in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    known = [int(s[:-1]) * units[s[-1]] for s in sizes if s[:-1].isdigit() and s[-1] in units]
    return max(known, default=UNKNOWN_CACHE)
