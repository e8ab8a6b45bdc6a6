"""Which cells a study measures, where what it finds decides that."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from study_cells import figures_of, without_work

from sparsec.data import load_model, load_text
from sparsec.study.plan import Effort, plan
from sparsec.sweep import tables
from sparsec.sweep.grid import Cell, grid_cells
from sparsec.sweep.planners import FixedCells
from sparsec.sweep.run import DENSE, CellResult, measure_cells, settled


@pytest.fixture
def unmeasured(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Cells that cost nothing, and how often each step of the work was taken."""
    return without_work(monkeypatch)


class _Halving:
    """Wants the second cell once it sees the first, and the third where the second has no error."""

    def __init__(self, cells: Sequence[Cell]) -> None:
        self.candidates = cells

    def next(self, results: Mapping[str, CellResult]) -> Sequence[Cell]:
        known = [cell for cell in self.candidates if settled(cell, results) is not None]
        return self.candidates[len(known) : len(known) + 1]

    def left(self, results: Mapping[str, CellResult]) -> int:
        return len(self.candidates) - len([cell for cell in self.candidates if settled(cell, results)])


def _measure(planner: Any, done: dict[str, CellResult]) -> list[tuple[str, int, int]]:
    """Into `done`; what the progress was told."""
    told: list[tuple[str, int, int]] = []

    def show(what: str, count: int, total: int) -> None:
        told.append((what, count, total))

    planned: Any = None
    model = SimpleNamespace(model=torch.nn.Linear(2, 2))
    measure_cells(model, planner, planned, None, dict(done), lambda r: done.__setitem__(r.spec, r), show)  # type: ignore[arg-type]
    return told


def test_cells_are_found_while_measuring(unmeasured: Counter[str]) -> None:
    cells = grid_cells(["magnitude({zeros})"], {"zeros": ["0.1", "0.2", "0.3"]})
    done: dict[str, CellResult] = {}
    told = _measure(_Halving(cells), done)
    assert list(done) == [DENSE, *(cell.spec for cell in cells)]
    assert [step for step in told if step[0] == "cells"] == [("cells", i, 3) for i in range(4)]
    assert unmeasured["dense"] == 1
    assert _measure(_Halving(cells), done) == []  # nothing is left


@pytest.mark.parametrize("first", [True, False])
def test_a_cell_of_quality_alone_is_measured_again_when_its_times_are_wanted(
    unmeasured: Counter[str], first: bool
) -> None:
    (timed,) = grid_cells(["magnitude(0.5)"], {})
    untimed = replace(timed, timed=False)
    done: dict[str, CellResult] = {}
    _measure(FixedCells([timed if first else untimed]), done)
    assert done[DENSE].timed == done[timed.spec].timed == first
    _measure(FixedCells([untimed if first else timed]), done)
    assert done[DENSE].timed
    assert done[timed.spec].timed
    assert unmeasured["cell"] == unmeasured["dense"] == (1 if first else 2)
    assert (
        "-"
        in tables.text([replace(done[DENSE]), CellResult("a", (), figures_of(1, 1, 2.0, False))], ()).split("\n")[-1]
    )


def test_quality_alone_leaves_times_unknown() -> None:
    """On a model that is really measured."""
    loaded = load_model("tiny")
    planned = plan(loaded, load_text(None), Effort(windows=1, length=32, prompt_tokens=8, new_tokens=4, repeats=2))
    done: dict[str, CellResult] = {}
    cells = grid_cells(["magnitude(0.5),freeze{rest}"], {"rest": ["", ",lower(csr)"]})
    measure_cells(
        loaded,
        FixedCells([replace(cell, timed=False) for cell in cells]),
        planned,
        None,
        {},
        lambda r: done.__setitem__(r.spec, r),
    )
    dense, *pruned = [result.figures for result in done.values()]
    assert dense is not None
    assert len(pruned) == 2
    for figures in pruned:
        assert figures is not None
        assert None is not figures.perplexity != dense.perplexity
        assert (figures.decode_ms, figures.prefill_ms, figures.speedup_decode, figures.speedup_predicted) == (None,) * 4
