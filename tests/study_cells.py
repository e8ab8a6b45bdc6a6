"""Cells of a study that cost nothing to measure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from sparsec.report.variant import Variant
from sparsec.sweep import run
from sparsec.sweep.grid import Cell
from sparsec.sweep.run import DENSE, CellResult
from sparsec.timing.spread import Spread

LITTLE = ["--windows", "1", "--length", "32", "--prompt-tokens", "8", "--new-tokens", "4", "--repeats", "2"]
"""Options of a study that is done in a moment."""


def figures_of(size: float, slow: float, perplexity: float, timed: bool = True) -> Variant:
    """Of half a million of weights, half of them zero. size, slow: shares of dense."""
    told = Spread(1 / slow, 1 / slow, 1 / slow, 3) if timed else None
    return Variant(
        parameters=1000,
        nnz=500,
        bytes=int(1000 * size),
        bytes_masks=0,
        perplexity=perplexity,
        prefill_ms=told,
        speedup_decode=told,
    )


def without_work(
    monkeypatch: pytest.MonkeyPatch,
    told: Callable[[Cell], Variant] = lambda cell: figures_of(0.5, 0.5, 30.0, cell.timed),
) -> Counter[str]:
    """Cells get the figures that are told, and dense a perplexity of 20; how often each step of the work was taken."""
    counted: Counter[str] = Counter()

    def taken(name: str, *result: Any) -> None:
        def step(self: Any, *given: Any) -> Any:
            counted[name] += 1
            return result[0](*given) if result else None

        monkeypatch.setattr(run._Run, name, step)

    taken("begin")
    taken("dense", lambda timed: CellResult(DENSE, (), figures_of(1, 1, 20.0, timed)))
    taken("pruned", lambda pruning: pruning)
    taken("cell", lambda cell, pruned, start: CellResult(cell.spec, cell.values, told(cell), template=cell.template))
    monkeypatch.setattr(run, "warm_up", lambda: None)
    monkeypatch.setattr(run, "known_machine", lambda *_: counted.update(["known_machine"]))
    return counted
