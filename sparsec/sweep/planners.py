"""Which cells a study measures: all of a list, or those that a search by halves leads to."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from sparsec.sweep.grid import Cell
from sparsec.sweep.run import CellResult, Planner, settled

Results = Mapping[str, CellResult]
"""By specification."""


class Outcome(Protocol):
    """What a preset found: a dataclass of plain values, which JSON takes as it is. Cells stand in it by specification."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    def lines(self, results: Results, width: int) -> list[str]:
        """In words and tables, at most `width` columns wide."""
        ...


@dataclass(frozen=True)
class Asked:
    """What a study was asked for: how it finds its cells, and what it makes of them in the end."""

    planner: Planner
    outcome: Callable[[Results], Outcome | None] = lambda results: None

    def told(self, results: Results, width: int) -> list[str]:
        """The lines below a study's table."""
        found = self.outcome(results)
        return [] if found is None else found.lines(results, width)


@dataclass(frozen=True)
class FixedCells:
    """A planner that wants all of its cells, whatever they give."""

    candidates: Sequence[Cell]

    def next(self, results: Results) -> Sequence[Cell]:
        """Those without a result."""
        return [cell for cell in self.candidates if settled(cell, results) is None]

    def left(self, results: Results) -> int:
        """How many those are."""
        return len(self.next(results))


@dataclass(frozen=True)
class Bracket:
    """How far a search is: something is known not to hold up to step `low` of a ladder, and to hold from step `high` on.

    low is -1 where it was never seen not to hold, high the number of steps where it was never seen to hold.
    """

    low: int
    high: int
    used: int  # cells looked at
    stopped: str = ""  # the reason where one of them could not be told

    @property
    def middle(self) -> int | None:
        """The step to look at next; None at the end."""
        return None if self.stopped or self.high - self.low <= 1 else (self.low + self.high) // 2

    @property
    def left(self) -> int:
        """How many looks are left at most."""
        return 0 if self.middle is None else (self.high - self.low - 1).bit_length()


@dataclass(frozen=True)
class Search:
    """The first step of a ladder of cells at which something holds, which is taken to hold at all steps above it."""

    name: str
    ladder: Sequence[Cell]
    holds: Callable[[CellResult, Results], bool | None]
    """Of a cell without an error; None where that cannot be told."""

    def found(self, results: Results) -> Bracket:
        """Goes by halves through what is known, so that a study that was stopped takes the same way again."""
        found = Bracket(-1, len(self.ladder), 0)
        while (middle := found.middle) is not None:
            result = settled(self.ladder[middle], results)
            if result is None:
                break
            holds = None if result.error else self.holds(result, results)
            used = found.used + 1
            if holds is None:
                found = Bracket(found.low, found.high, used, f"{result.spec}: {result.error or 'it has no figure'}")
            elif holds:
                found = Bracket(found.low, middle, used)
            else:
                found = Bracket(middle, found.high, used)
        return found


@dataclass(frozen=True)
class Searches:
    """A planner that measures some cells first, and then one of every search at a time."""

    searches: Sequence[Search]
    first: Sequence[Cell] = ()

    @property
    def candidates(self) -> Sequence[Cell]:
        """The first ones and all ladders, each specification once."""
        every = [*self.first, *(cell for search in self.searches for cell in search.ladder)]
        return list({cell.spec: cell for cell in reversed(every)}.values())[::-1]

    def next(self, results: Results) -> Sequence[Cell]:
        """None of the searches is begun before the first cells are measured."""
        if first := FixedCells(self.first).next(results):
            return first
        middles = [(search, search.found(results).middle) for search in self.searches]
        return [search.ladder[middle] for search, middle in middles if middle is not None]

    def left(self, results: Results) -> int:
        """At most so many: a search may find a cell of its own among those that are measured."""
        return FixedCells(self.first).left(results) + sum(search.found(results).left for search in self.searches)
