"""Which cells a study measures, where what it finds decides that."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from study_cells import LITTLE, figures_of, without_work

import sparsec.study.__main__ as study
from sparsec.data import load_model, load_text
from sparsec.defaults import Effort
from sparsec.pipeline import Pipeline
from sparsec.report.variant import Variant
from sparsec.study.plan import plan
from sparsec.sweep import families, tables, tipping
from sparsec.sweep.grid import Cell, grid_cells
from sparsec.sweep.planners import Bracket, FixedCells, Search, Searches
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
    model = SimpleNamespace(model=torch.nn.Linear(2, 2), is_encoder=False)
    measure_cells(model, planner, planned, None, dict(done), lambda r: done.__setitem__(r.spec, r), show)  # type: ignore[arg-type]
    return told


def test_cells_are_found_while_measuring(unmeasured: Counter[str]) -> None:
    cells = grid_cells(["magnitude({zeros})"], {"zeros": ["0.1", "0.2", "0.3"]})
    done: dict[str, CellResult] = {}
    told = _measure(_Halving(cells), done)
    assert list(done) == [DENSE, *(cell.spec for cell in cells)]
    assert [step for step in told if step[0] == "cells"] == [("cells", i, 3) for i in range(4)]
    assert unmeasured["dense"] == unmeasured["known_machine"] == 1
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
    assert unmeasured["known_machine"] == 1  # for what is timed alone
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


# --- searches


@given(steps=st.integers(0, 200), data=st.data())
def test_a_search_finds_the_first_step_with_few_cells(steps: int, data: st.DataObject) -> None:
    first = data.draw(st.integers(0, steps))
    ladder = [Cell(Pipeline(()), (("step", str(i)),)) for i in range(steps)]
    looked: list[int] = []
    found = Bracket(-1, steps, 0)
    expected = found.left
    while (middle := found.middle) is not None:
        assert found.low < middle < found.high
        looked.append(middle)
        found = Bracket(found.low, middle, 0) if middle >= first else Bracket(middle, found.high, 0)
        assert len(looked) + found.left <= expected
    assert (found.low, found.high) == (first - 1, first)
    assert len(looked) <= expected == len(ladder).bit_length()


def _ladder() -> list[Cell]:
    return grid_cells(["magnitude({zeros})"], {"zeros": tipping.LADDER})


@given(first=st.integers(0, len(tipping.LADDER)), broken=st.integers(0, 6))
def test_a_search_takes_the_same_way_again_and_stops_at_what_failed(first: int, broken: int) -> None:
    ladder = _LADDER
    search = Search("", ladder, lambda result, _: ladder.index(_BY_SPEC[result.spec]) >= first)
    planner = Searches([search])
    results: dict[str, CellResult] = {}
    while cells := planner.next(results):
        assert len(cells) == 1
        assert planner.left(results) >= 1
        error = "no memory" if len(results) == broken else ""
        results[cells[0].spec] = CellResult(cells[0].spec, (), None if error else figures_of(1, 1, 1.0), error)
    found = search.found(results)
    assert found.used == len(results)
    assert planner.left(results) == 0
    if len(results) > broken:
        assert "no memory" in found.stopped
        assert found.low < first <= found.high
    else:
        assert (found.low, found.high, found.stopped) == (first - 1, first, "")


_LADDER = _ladder()
_BY_SPEC = {cell.spec: cell for cell in _LADDER}


# --- the tipping point


@given(perplexity=st.floats(1, 1e9), dense=st.floats(1, 1e3), top1=st.floats(0, 1))
def test_a_model_has_collapsed_by_one_figure_or_the_other(perplexity: float, dense: float, top1: float) -> None:
    own = replace(figures_of(1, 1, perplexity), top1=top1)
    found = tipping.collapse(own, figures_of(1, 1, dense))
    assert ("perplexity" in found) == (perplexity > 2 * dense)
    assert ("top-1" in found) == (top1 < 0.5)
    assert "perplexity" in tipping.collapse(replace(own, perplexity=None), figures_of(1, 1, dense))


@pytest.mark.parametrize(
    ("tips", "where", "by"),
    [
        (0.5, "0.49 and 0.51", "perplexity"),
        (0.95, "0.93 and 0.95", "perplexity"),
        (0.0, "at 0.05 already", "perplexity"),
        (1.0, "not up to 0.95", "-"),
    ],
)
def test_each_method_is_told_where_it_tips(
    tips: float, where: str, by: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def figures(cell: Cell) -> Variant:
        assert not cell.timed
        zeros = float(dict(cell.values)["zeros"])
        return replace(figures_of(1, 1, 41.0 if zeros >= tips else 20.0 + zeros, False), top1=0.75)

    counted = without_work(monkeypatch, figures)
    assert study.main(["tiny", "--preset", "tipping", "--grid", "method=magnitude", *LITTLE]) == 0
    out = capsys.readouterr().out
    row = next(line for line in out.splitlines() if re.match("magnitude .*(and|at|not up)", line))
    cells = row.split()[-1]
    assert re.split("  +", row)[1:3] == [where, by]
    assert counted["cell"] == int(cells) <= 6
    assert "more than 2 times that of dense (so 40.00)" in out


def test_the_tipping_point_of_other_passes_is_searched_on_a_real_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["tiny", "--preset", "tipping", "--passes", "{how}({zeros}),freeze", "--grid", "how=magnitude"]
    words += [*LITTLE, "--json", str(tmp_path / "s.json")]
    assert study.main(words) == 0
    first = capsys.readouterr().out
    assert re.search(r"^magnitude  \S.*  [56]$", first, re.M)
    assert study.main(words) == 0
    assert [line for line in capsys.readouterr().out.splitlines() if "taken over" not in line] == [
        line for line in first.splitlines() if "taken over" not in line
    ]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--passes", "wanda(0.5),freeze"], "these passes have none"),
        (["--grid", "zeros=0.3"], "leave out --grid zeros"),
        (["--grid", "other=0.3"], "no passes have a placeholder {other}"),
        (["--passes", "wanda({zeros}, pattern='2:4'),freeze"], "makes a sparsity of 0.5"),
    ],
)
def test_what_cannot_be_searched_is_refused(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert study.main(["tiny", "--preset", "tipping", *words]) == 2
    assert said in capsys.readouterr().err


# --- patterns


def _fast_from(needed: Mapping[str, float]) -> Callable[[Cell], Variant]:
    """Figures by which each family of patterns is as fast as unstructured zeros from a sparsity on."""

    def figures(cell: Cell) -> Variant:
        values = dict(cell.values)
        zeros, pattern = float(values["zeros"]), values["pattern"]
        family = f"N:{pattern[-1]}" if pattern[1:2] == ":" else pattern
        speed = 1.5 if zeros >= needed.get(family, 0.5) else 1 + zeros / 10
        return replace(figures_of(1 - zeros / 2, 1 / speed, 20 + 10 * zeros), top1=0.9)

    return figures


def test_patterns_are_compared_at_equal_sparsity_and_at_equal_speed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    needed = {"N:4": 0.7, "N:8": 0.5, "block:16x16": 0.35, "block:32x32": 0.99}
    counted = without_work(monkeypatch, _fast_from(needed))
    grid = "pattern=2:4,4:8,block:16x16,block:32x32"
    assert study.main(["tiny", "--preset", "patterns", "--grid", grid, "--grid", "method=magnitude", *LITTLE]) == 0
    lines = capsys.readouterr().out.splitlines()
    tables = "\n".join(lines[next(i for i, line in enumerate(lines) if "At equal sparsity" in line) :])
    equal, fast = tables.split("== At equal speed")
    rows = {row[0]: row[1:] for row in (re.split("  +", line) for line in equal.splitlines()) if len(row) > 4}
    assert list(rows) == ["pattern", DENSE, "unstructured", "2:4", "4:8", "block:16x16", "block:32x32"]
    assert rows["2:4"][:4] == ["25.00", "0.900", "0.0", "1.05x"]
    needs = {row[0]: row[1:] for row in (re.split("  +", line) for line in fast.splitlines()) if len(row) > 4}
    assert needs["unstructured"][0] == "50%"
    assert needs["1:4"][0] == "75%"
    assert needs["4:8"][0] == "50%"
    assert needs["block:16x16"][0] == "35%"
    assert needs["block:32x32"][0] == "not reached up to 95%; best: 95%"
    assert needs["block:32x32"][-1] == "1.09x"
    assert counted["cell"] <= 5 + 1 + 0 + 4 + 4 + 2


@given(needed=st.floats(0, 1), pattern=st.sampled_from(["2:4", "4:8", "block:16x16"]))
def test_the_least_sparsity_as_fast_as_unstructured_zeros_is_found(needed: float, pattern: str) -> None:
    asked = families.families([], {"pattern": [pattern], "method": ["magnitude"]})
    figures = _fast_from({pattern if "block" in pattern else f"N:{pattern[-1]}": needed})
    results = {DENSE: CellResult(DENSE, (), figures_of(1, 1, 20.0))}
    while cells := asked.planner.next(results):
        assert len(results) + asked.planner.left(results) <= 1 + 2 + 5
        results |= {cell.spec: CellResult(cell.spec, cell.values, figures(cell)) for cell in cells}
    m = 0 if "block" in pattern else int(pattern[-1])
    every = [n / m for n in range(1, m)] or [n / 20 for n in range(1, 20)]
    others = [cell for cell in asked.planner.candidates if dict(cell.values)["pattern"] != "unstructured"]
    assert sorted({float(dict(cell.values)["zeros"]) for cell in others}) == every
    enough = [zeros for zeros in every if zeros >= needed]
    line = asked.told(results, 120)[-1]
    assert "busy" not in "".join(asked.told(results, 120))
    busy = {spec: replace(result, disturbed=spec != DENSE) for spec, result in results.items()}
    assert "the machine was busy" in asked.told(busy, 120)[-1]
    assert (f"  {100 * enough[0]:g}%  " in line) if enough else ("not reached" in line)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--passes", "wanda({zeros}),freeze"], "the placeholders {zeros} and {pattern}"),
        (["--grid", "zeros=0.3"], "leave out --grid zeros"),
        (["--grid", "method=magnitude,wanda"], "{method} has one value"),
        (["--grid", "pattern=3:2"], "N between 1 and M - 1"),
    ],
)
def test_what_compares_no_patterns_is_refused(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert study.main(["tiny", "--preset", "patterns", *words]) == 2
    assert said in capsys.readouterr().err


# --- what they found, as JSON


@pytest.mark.parametrize("preset", ["seminar", "tipping", "patterns", "frontier"])
def test_what_a_preset_found_stands_in_the_json(
    preset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def figures(cell: Cell) -> Variant:
        values = dict(cell.values)
        zeros = float(values.get("zeros", "0.5" if "2:4" in cell.spec else "0"))
        return replace(figures_of(1 - zeros / 2, 1 - zeros / 2, 20 * (1 + 2 * zeros), cell.timed), top1=1 - zeros)

    without_work(monkeypatch, figures)
    file = tmp_path / "study.json"
    assert study.main(["tiny", "--preset", preset, *LITTLE, "--json", str(file)]) == 0
    document = json.loads(file.read_text())
    findings = document["findings"]
    assert findings.pop("preset") == preset
    cells = {cell["spec"]: cell for cell in document["cells"]}
    if preset == "seminar":
        assert len(findings["setups"]) == 12
        for setup in findings["setups"]:
            own, dense = (cells[spec]["figures"] for spec in (setup["cell"], DENSE))
            assert setup["bytes"] == own["bytes"] / dense["bytes"]
            assert ("bytes" in setup["missed"]) == any(each.startswith("bytes") for each in setup["reasons"])
    elif preset == "tipping":
        assert (findings["perplexity_times"], findings["top1"]) == (2.0, 0.5)
        assert [point["name"] for point in findings["points"]] == ["magnitude", "wanda", "admm"]
        for point in findings["points"]:
            assert (point["sparsity_stands"], point["sparsity_collapses"]) == (0.49, 0.51)
            assert cells[point["stands"]]["values"]["zeros"] == "0.49"
            assert cells[point["collapses"]]["figures"]["top1"] < 0.5
            assert point["by"] == ["perplexity", "top-1"]
            assert point["ended"]
    elif preset == "patterns":
        assert findings["speed"] == cells[findings["equal_sparsity"][0]["cell"]]["figures"]["speedup_decode"]
        assert {each["sparsity"] for each in findings["equal_sparsity"]} == {0.5}
        for each in findings["equal_speed"]:
            assert each["reached"]
            assert each["sparsity"] == float(cells[each["cell"]]["values"]["zeros"]) == 0.5
    else:
        assert set(findings["compared"]) == set(cells)
        points = {s: (c["figures"]["perplexity"], c["figures"]["bytes"]) for s, c in cells.items()}
        front = [s for s, p in points.items() if not any(_beats(q, p) for q in points.values())]
        assert set(findings["by_bytes"]) == set(front) == set(findings["by_time"])
    assert (
        study.main(["tiny", "--preset", preset, *LITTLE, "--json", str(file)]) == 0
    )  # goes on from a file with findings
    again = json.loads(file.read_text())
    assert (again["findings"], again["cells"]) == ({"preset": preset} | findings, document["cells"])
    capsys.readouterr()


def _beats(one: tuple[float, float], other: tuple[float, float]) -> bool:
    return one != other and one[0] <= other[0] and one[1] <= other[1]
