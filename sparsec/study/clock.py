"""How long each stage of a report takes, and the time that it may take: a budget in seconds, shared out as the stages come."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from time import perf_counter

from sparsec.report.records import Stage


@dataclass(eq=False)
class Clock:
    """What a stage does not use is left to those after it. The least that makes sense is done in every stage."""

    seconds: float  # for all the stages that take a share
    stages: list[Stage] = field(default_factory=list)

    def share(self, part: float) -> float:
        """Of what is left."""
        return max(0.0, self.seconds) * part

    @contextmanager
    def stage(self, name: str, budgeted: bool = False) -> Iterator[None]:
        """Writes down how long the block took; a stage of one name comes once. budgeted: it is taken from the budget."""
        start = perf_counter()
        yield
        took = perf_counter() - start
        if budgeted:
            self.seconds -= took
        self._add(Stage(name, took))

    def counted(self, name: str, done: int, wanted: int, unit: str) -> None:
        """Of a stage that ended: how much of what was wanted it did."""
        at = next(i for i, stage in enumerate(self.stages) if stage.name == name)
        self.stages[at] = replace(self.stages[at], done=done, wanted=wanted, unit=unit)

    def _add(self, new: Stage) -> None:
        for i, stage in enumerate(self.stages):
            if stage.name == new.name:
                self.stages[i] = replace(stage, seconds=stage.seconds + new.seconds)
                return
        self.stages.append(new)

    def sampled(self) -> str | None:
        """In words, what did not fit into the budget; None where all did."""
        cut = [f"{s.name}: {s.done} of {s.wanted} {s.unit}" for s in self.stages if s.cut]
        return "sampled, to keep within the time budget: " + "; ".join(cut) if cut else None
