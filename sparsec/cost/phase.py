"""What a phase of work takes: the bytes that it holds at its peak, and its arithmetic, in units that a machine's constants time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch


@dataclass(frozen=True, eq=False)
class Looked:
    """A piece of the work, to be timed on the machine at hand. key: the same for the same piece. scale: the work in such pieces."""

    key: str
    run: Callable[[], object]
    scale: float


@dataclass(frozen=True)
class Phase:
    """held: bytes at the worst moment of it, by what takes them. where: the block or layer that is worked on.

    flops: multiply-adds count 2, by dtype. moved: bytes that everything else reads and writes. solve: rows of the matrices, and
    their columns, that a pass's own `prune` works on. sample: what is told by trying it.
    """

    what: str  # "forward", "solving", ...
    where: str
    held: Mapping[str, int] = field(default_factory=dict)
    flops: Mapping[torch.dtype, float] = field(default_factory=dict)
    moved: float = 0.0
    solve: tuple[tuple[int, ...], int] | None = None
    sample: Looked | None = field(default=None, compare=False)
    seconds: float = 0.0  # that the pass is told to take

    @property
    def nbytes(self) -> int:
        """All that is held."""
        return sum(self.held.values())
