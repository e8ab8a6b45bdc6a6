"""Which cells a study measures: all of a list, or those that a search by halves leads to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sparsec.sweep.grid import Cell
from sparsec.sweep.run import CellResult, settled


@dataclass(frozen=True)
class FixedCells:
    """A planner that wants all of its cells, whatever they give."""

    candidates: Sequence[Cell]

    def next(self, results: Mapping[str, CellResult]) -> Sequence[Cell]:
        """Those without a result."""
        return [cell for cell in self.candidates if settled(cell, results) is None]

    def left(self, results: Mapping[str, CellResult]) -> int:
        """How many those are."""
        return len(self.next(results))
