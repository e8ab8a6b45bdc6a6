"""What a phase of work takes: the bytes that it holds at its peak, and its arithmetic, in units that a machine's constants time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Phase:
    """held: bytes at the worst moment of it, by what takes them. where: the block or layer that is worked on."""

    what: str  # "forward", "solving", ...
    where: str
    held: Mapping[str, int] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """All that is held."""
        return sum(self.held.values())
