"""What a study prints: tables that fit the terminal, and a chart in plain characters."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from study_cells import LITTLE, figures_of, without_work

import sparsec.study.__main__ as study
from sparsec.console.table import fitted, paragraph
from sparsec.page.study_charts import study_charts
from sparsec.report.variant import Variant
from sparsec.sweep import tables
from sparsec.sweep.chart import MARKS, ROWS, SEVERAL, Axis, Point, chart, scatter
from sparsec.sweep.grid import Cell, grid_cells, places
from sparsec.sweep.run import DENSE, CellResult, renamed

WIDTHS = (80, 120, 200)
NUMBER = st.floats(-1e9, 1e9).map("{:.2f}".format)


@given(
    rows=st.lists(st.lists(NUMBER, min_size=14, max_size=14), min_size=1, max_size=4),
    names=st.lists(st.text("abc,(){}=0.5 ", min_size=1, max_size=150), min_size=4, max_size=4),
    width=st.sampled_from((40, *WIDTHS)),
)
def test_a_wide_table_becomes_several_that_fit_and_lose_nothing(
    rows: list[list[str]], names: list[str], width: int
) -> None:
    header = ["passes", *(f"column {i}" for i in range(14))]
    given_rows = [[name.strip(), *row] for name, row in zip(names, rows, strict=False)]
    lines = fitted(header, given_rows, width)
    assert all(len(line) <= width or " " not in line for line in lines)
    words = [word for line in lines for word in line.split()]
    for row in given_rows:
        assert all(words.count(cell) >= 1 for cell in row[1:])
    assert all(lines.count(line) == 1 for line in lines if "column" in line)
    assert len(re.findall(r"column \d+", "\n".join(lines))) == 14


@pytest.mark.parametrize("width", WIDTHS)
def test_only_texts_that_are_too_long_have_a_number_in_their_place(width: int) -> None:
    header = ["method", "passes", "needed", "MB"]
    rows = [["wanda", "x" * 150, "50%", "1.0"], ["magnitude", "y", "not reached up to 87.5%; best: 75%", "2.0"]]
    lines = fitted(header, rows, width, left=(0, 1, 2), keys=2)
    assert all(len(line) <= width for line in lines if "x" * 150 not in line)
    text = "\n".join(lines)
    assert "[1] " + "x" * 150 in text
    assert "[2]" not in text
    assert "50%" in lines[2]
    assert "not reached up to 87.5%; best: 75%" in lines[3]
    assert "wanda" in lines[2]
    assert "magnitude" in lines[3]


@given(text=st.text("wanda(),.05='2:4 {}", max_size=200), width=st.integers(5, 60))
def test_long_passes_are_broken_behind_commas_alone(text: str, width: int) -> None:
    lines = paragraph(text, width=width)
    assert " ".join(lines).replace(", ", ",").split() == text.replace(", ", ",").split()
    assert all(len(line) <= width or not re.search(r"\s|,\S", line) for line in lines)
    if all(len(word) <= width for word in text.split()):
        assert " ".join(lines).split() == text.split()


POINT = st.builds(Point, st.floats(0.01, 1e6), st.floats(0.5, 1e8), st.sampled_from(["magnitude", "wanda", "dense"]))


@example(points=[Point(1.0, 1.0, name) for name in ("magnitude", "wanda", "dense")], width=40, logarithmic=False)
@given(points=st.lists(POINT, min_size=1, max_size=30), width=st.integers(40, 80), logarithmic=st.booleans())
def test_every_point_has_its_mark_within_the_width(points: list[Point], width: int, logarithmic: bool) -> None:
    lines = scatter(points, Axis("x", "{:.2f}x".format), Axis("y", "{:.4g}".format, logarithmic), width)
    text = "\n".join(lines)
    assert text.isascii()
    assert text.isprintable() or set(re.sub(r"[ -~]", "", text)) == {"\n"}
    assert all(len(line) <= width for line in lines)
    names = list(dict.fromkeys(point.series for point in points))
    legend = [entry for line in lines[ROWS + 4 :] for entry in line.split("   ")]  # of as many lines as it takes
    field = "".join(line.partition("|")[2] for line in lines if "|" in line)
    drawn = {sign for sign in field if sign != " "}
    assert drawn <= {*MARKS[: len(names)], SEVERAL}
    assert drawn
    several = [f"{SEVERAL} several"] if SEVERAL in drawn else []
    assert legend == [f"{MARKS[i]} {name}" for i, name in enumerate(names)] + several
    if len(names) == 1:
        assert SEVERAL not in drawn
    if SEVERAL not in drawn:
        assert drawn == set(MARKS[: len(names)])


def test_lower_and_faster_stand_where_they_belong() -> None:
    points = [Point(1.0, 10.0, "dense"), Point(2.0, 1000.0, "wanda"), Point(1.5, 100.0, "magnitude")]
    lines = scatter(points, Axis("speed", "{:.2f}x".format), Axis("perplexity", "{:.0f}".format, True), 60, rows=11)
    places = {sign: (i, line.index(sign)) for i, line in enumerate(lines[1:12]) for sign in "ox+" if sign in line}
    assert places["o"][0] == 10
    assert places["x"][0] == 0
    assert places["+"][0] == 5  # in the middle of a logarithmic axis
    assert places["o"][1] < places["+"][1] < places["x"][1]
    assert lines[1].split()[0] == "1000"
    assert lines[6].split()[0] == "100"
    assert lines[11].split()[0] == "10"


def test_the_chart_is_against_sparsity_where_no_cell_is_timed() -> None:
    dense = CellResult(DENSE, (), replace(figures_of(1, 1, 20.0), nnz=1000))
    cell = CellResult("magnitude(0.5)", (("zeros", "0.5"),), figures_of(1, 1, 30.0, False))
    assert "sparsity" in chart([dense, cell], 80)[1]
    assert "speedup" in chart([dense, replace(cell, figures=figures_of(1, 0.5, 30.0))], 80)[1]
    beyond = replace(cell, spec="magnitude(0.9)", figures=replace(figures_of(1, 1, 1.0, False), perplexity=None))
    assert chart([dense, cell, beyond], 80)[-1].startswith("1 cell has no place")
    assert chart([dense, beyond], 80) == []


METHODS = st.sampled_from(("magnitude", "wanda", "sparsegpt"))
LAYOUTS = st.sampled_from(("", ",lower(csr)", ",fuse,lower(bitmap)"))


@given(st.lists(st.tuples(METHODS, LAYOUTS, st.sampled_from(("0.5", "0.6"))), min_size=1, max_size=8, unique=True))
def test_the_terminal_and_the_page_name_their_series_alike(asked: list[tuple[str, str, str]]) -> None:
    dense = CellResult(DENSE, (), figures_of(1, 1, 20.0))
    cells = [
        CellResult(f"{method}({zeros}){layout}", (("zeros", zeros),), figures_of(1, float(zeros), 30.0))
        for method, layout, zeros in asked
    ]
    (bytes_,) = (c for c in study_charts([dense, *cells]) if c.name == "bytes")
    legend = [entry for line in chart([dense, *cells], 80)[ROWS + 6 :] for entry in line.split("   ")]
    named = {entry.partition(" ")[2] for entry in legend} - {"several"}
    assert named == {DENSE, *(row[0] for row in bytes_.rows)}


@given(
    st.lists(
        st.sampled_from(("fuse", "{method}({zeros}),freeze", "magnitude({zeros})", "{method}(0.4)", "wanda(0.5)"))
    ),
    st.sampled_from((["wanda"], ["wanda", "magnitude"])),
    st.sampled_from((["0.5"], ["0.5", "0.6"])),
)
def test_every_row_is_named_and_no_two_alike(templates: list[str], methods: list[str], zeros: list[str]) -> None:
    """Passes without a placeholder had nothing to name them beside others that had some."""
    axes = {"method": methods, "zeros": zeros}
    used = {name for template in templates for name in places(template)}
    cells = grid_cells(templates, {name: values for name, values in axes.items() if name in used})
    found = [CellResult(c.spec, c.values, figures_of(1, 1, 30.0), template=c.template) for c in cells]
    header, rows = tables.naming([CellResult(DENSE, (), figures_of(1, 1, 20.0)), *found])
    assert len({tuple(row) for row in rows}) == len(rows) == 1 + len(cells)
    assert all(any(row) and len(row) == len(header) for row in rows)
    assert ("passes" in header) == (len({c.template for c in cells}) > 1 or not used)
    lines = tables.markdown(found, []).splitlines()[2 : 2 + len(found)]
    assert len(set(lines)) == len(found)


def test_a_result_that_was_taken_over_has_the_names_that_are_asked_for_now() -> None:
    (before,) = grid_cells(["magnitude({zeros}),freeze"], {"zeros": ["0.5"]})
    (now,) = grid_cells(["{method}(0.5),freeze"], {"method": ["magnitude"]})
    kept = CellResult(before.spec, before.values, figures_of(1, 1, 30.0), template=before.template)
    dense = CellResult(DENSE, (), figures_of(1, 1, 20.0))
    found = renamed({DENSE: dense, before.spec: kept}, [now])
    assert found == {DENSE: dense, now.spec: replace(kept, values=now.values, template=now.template)}


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("preset", ["seminar", "tipping", "patterns", "frontier"])
def test_what_a_preset_prints_fits_the_terminal(
    preset: str, width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def figures(cell: Cell) -> Variant:
        zeros = float(dict(cell.values).get("zeros", "0"))
        own = figures_of(12_345_678.9 * zeros, 1 / (1 + zeros), 20 * 1000**zeros, cell.timed)
        return replace(own, top1=0.1234, top5=0.98765, kl=0.000123, flops_per_token=123456789.0)

    without_work(monkeypatch, figures)
    monkeypatch.setenv("COLUMNS", str(width))
    assert study.main(["tiny", "--preset", preset, *LITTLE]) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert [line for line in out.splitlines() if len(line) > width] == []


def test_every_figure_of_a_cell_is_in_the_table_the_csv_and_the_json(tmp_path: Path) -> None:
    titles = ("sparsity", "kept M", "MB", "MFLOP", "perplexity", "top-1", "top-5", "KL", "cosine", "least")
    titles += ("prefill ms", "window ms", "decode ms", "by FLOPs", "predicted", "measured")
    assert tuple(column[0] for column in tables.COLUMNS) == titles
    words = ["tiny", "--passes", "magnitude(0.5),freeze,lower(csr)", *LITTLE]
    words += ["--csv", str(tmp_path / "csv"), "--json", str(tmp_path / "json")]
    assert study.main(words) == 0
    named = ("parameters", "nnz", "sparsity", "bytes", "flops_per_token", "perplexity", "top1", "top5", "kl")
    named += ("prefill_ms", "decode_ms", "speedup_theoretical", "speedup_predicted", "speedup_decode", "energy_mj")
    for file in ("csv", "json"):
        text = (tmp_path / file).read_text()
        assert [name for name in named if name not in text] == []
