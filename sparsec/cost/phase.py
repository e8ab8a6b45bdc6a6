"""What a phase of work takes: the bytes that it holds at its peak, and its arithmetic, in units that a machine's constants time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch


@dataclass(frozen=True, eq=False)
class Looked:
    """A piece of the work, to be timed on the machine at hand. key: the same for the same piece. scale: the work in such pieces."""

    key: str
    run: Callable[[], object]
    scale: float


class Attended(NamedTuple):
    """Attention of one size, which is slower than products are: tokens that look, tokens that are looked at."""

    dtype: torch.dtype
    queries: int
    keys: int
    head: int  # numbers of one head


@dataclass(frozen=True)
class Phase:
    """held: bytes at the worst moment of it, by what takes them. where: the block or layer that is worked on.

    flops: multiply-adds count 2, of products by dtype. attention: the same, of attention. moved: bytes that everything else reads
    and writes. solve: rows of the matrices, and their columns, that a pass solves together. sample: what is told by trying.
    files: bytes of files that a streamed run writes and keeps until it is done; passing: of those that it keeps meanwhile.
    """

    what: str  # "forward", "solving", ...
    where: str
    held: Mapping[str, int] = field(default_factory=dict)
    flops: Mapping[torch.dtype, float] = field(default_factory=dict)
    moved: float = 0.0
    attention: Mapping[Attended, float] = field(default_factory=dict)
    solve: tuple[tuple[int, ...], int] | None = None
    sample: Looked | None = field(default=None, compare=False)
    seconds: float = 0.0  # that the pass is told to take
    files: int = 0
    passing: int = 0

    @property
    def arithmetic(self) -> float:
        """FLOPs of products and attention."""
        return sum(self.flops.values()) + sum(self.attention.values())

    @property
    def nbytes(self) -> int:
        """All that is held."""
        return sum(self.held.values())
