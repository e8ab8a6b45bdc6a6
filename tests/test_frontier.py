"""The fronts of quality against bytes and time, and which dense model beats a sparse one."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from study_cells import LITTLE, figures_of, without_work

import sparsec.study.__main__ as study
from sparsec.report.variant import Variant
from sparsec.sweep import frontier
from sparsec.sweep.grid import Cell
from sparsec.sweep.run import DENSE, CellResult

_FEW = st.sampled_from([1.0, 2.0, 3.0, 4.0, float("inf"), float("nan")])
POINTS = st.lists(st.tuples(_FEW, _FEW) | st.tuples(st.floats(), st.floats()), max_size=12)


@given(POINTS)
def test_a_point_is_on_the_front_where_no_other_beats_it(points: list[tuple[float, float]]) -> None:
    def beats(one: tuple[float, float], other: tuple[float, float]) -> bool:
        return all(a <= b for a, b in zip(one, other, strict=True)) and one != other

    expected = [not any(x != x for x in point) and not any(beats(other, point) for other in points) for point in points]
    assert frontier.pareto_front(points) == expected


def test_the_output_marks_which_cells_are_on_which_front(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def figures(cell: Cell) -> Variant:
        values = dict(cell.values)
        zeros = float(values["zeros"])
        if values["method"] == "magnitude":  # worse, as small, faster
            return figures_of(1 - zeros, 1 - zeros, 40 + 20 * zeros)
        return figures_of(1 - zeros, 2.0, 20 + 20 * zeros)

    without_work(monkeypatch, figures)
    grid = ["--grid", "method=magnitude,wanda", "--grid", "zeros=0.25,0.5"]
    passes = ["--passes", "{method}({zeros}),freeze,fuse,lower(auto)"]
    assert study.main(["tiny", "--preset", "frontier", *passes, *grid, *LITTLE]) == 0
    out = capsys.readouterr().out.split("== The fronts")[1]
    rows = [line.split() for line in out.splitlines() if line.startswith(("dense ", "magnitude ", "wanda "))]
    assert rows == [
        ["dense", "20.00", "0.0", "front", "1.00x", "front"],
        ["magnitude", "0.25", "45.00", "0.0", "1.33x", "front"],
        ["magnitude", "0.5", "50.00", "0.0", "2.00x", "front"],
        ["wanda", "0.25", "25.00", "0.0", "front", "0.50x"],
        ["wanda", "0.5", "30.00", "0.0", "front", "0.50x"],
    ]


def test_a_cell_with_zeros_is_told_which_dense_one_beats_it() -> None:
    def cell(spec: str, nbytes: int, perplexity: float, nnz: int) -> CellResult:
        figures = replace(figures_of(nbytes / 1000, 1.0, perplexity, False), nnz=nnz)
        return CellResult(spec, (), figures)

    results = [
        cell(DENSE, 1000, 20.0, 1000),
        cell("lower('dense:int8')", 300, 20.1, 1000),
        cell("lower('dense:int4g64')", 150, 24.0, 1000),
    ]
    results += [
        cell("small", 140, 30.0, 500),
        cell("good", 250, 22.0, 500),
        cell("poor", 400, 22.0, 500),
        cell("equal", 150, 24.0, 500),
    ]
    found = frontier.fronts(results)
    beaten = {"small": None, "good": None, "poor": "lower('dense:int8')", "equal": "lower('dense:int4g64')"}
    assert dict(found.beaten) == beaten
    said = " ".join(found.lines({r.spec: r for r in results}, 200))
    assert "as good as: small (0.0 MB); good (0.0 MB)." in said
    assert "Beaten by a dense one: poor (0.0 MB) by lower('dense:int8') (0.0 MB);" in said
