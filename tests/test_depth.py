"""Zeros and time by depth: bars in the summary, a table of roles and blocks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import report_cases
from hypothesis import given
from hypothesis import strategies as st

import sparsec
from sparsec.report import __main__ as command
from sparsec.report.depth import CHARACTERS, by_depth, depth_lines, depth_table
from sparsec.report.layer import LayerRow
from sparsec.report.picture import RAMP
from sparsec.report.predict import Predicted, by_weight
from sparsec.report.summary import summary_lines
from sparsec.report.text import render

ROW = next(row for row in report_cases.report().layers if row.name.endswith("mlp.up_proj.weight"))


def row(block: int, role: str = "mlp.up_proj", **changes: Any) -> LayerRow:
    """Of 100 weights."""
    path = f"model.layers.{block}"
    known = {"name": f"{path}.{role}.weight", "block": path, "parameters": 100, "nnz": 50}
    return replace(ROW, **(known | changes))


@given(blocks=st.integers(0, 200), each=st.integers(1, 3))
def test_blocks_stand_in_order_and_more_than_fit_are_put_together_in_equal_shares(blocks: int, each: int) -> None:
    rows = [row(block, f"mlp.{i}") for block in range(blocks) for i in range(each)]
    depth = by_depth([*rows, replace(ROW, block=None)])
    assert [r for share in depth for r in share] == rows
    assert len(depth) == min(CHARACTERS, blocks)
    sizes = {len({r.block for r in share}) for share in depth}
    assert not sizes or max(sizes) - min(sizes) <= 1


@given(
    nnz=st.lists(st.integers(0, 100), min_size=1, max_size=130),
    ms=st.one_of(st.none(), st.floats(1e-6, 1e4)),
    data=st.data(),
)
def test_bars_fit_80_columns_of_ascii_with_the_ends_of_their_range(
    nnz: list[int], ms: float | None, data: st.DataObject
) -> None:
    times = [None if ms is None else ms * data.draw(st.integers(1, 9)) for _ in nnz]
    rows = [row(i, nnz=kept, ms=time, ms_predicted=None) for i, (kept, time) in enumerate(zip(nnz, times, strict=True))]
    lines = depth_lines(rows)
    assert [line.split()[0] for line in lines] == (["zeros"] if ms is None else ["zeros", "time"])
    for line in lines:
        assert len(line) <= 80
        assert line.isascii()
        bar = line[9 : 9 + min(CHARACTERS, len(nnz))]
        assert set(bar) <= set(RAMP)
        assert (min(bar) == max(bar)) == ("all " in line or len(set(bar)) == 1)
    if len(nnz) <= CHARACTERS and len(set(nnz)) > 1:
        bar = lines[0][9 : 9 + len(nnz)]
        assert bar[nnz.index(min(nnz))] == RAMP[-1], "the most zeros"
        assert bar[nnz.index(max(nnz))] == RAMP[0]
        digits = 0 if len(lines[0].split()[-1].split("%")[0].split(".")) == 1 and " zero" not in lines[0] else 1
        assert f"{100 - min(nnz):.{digits}f}%" in lines[0]
        assert f"{100 - max(nnz):.{digits}f}%" in lines[0]


def test_bars_of_a_few_blocks_word_for_word() -> None:
    rows = [row(0, nnz=70, ms=1.0), row(1, nnz=50, ms=1.0), row(2, nnz=10, ms=2.0), replace(ROW, block=None, ms=96.0)]
    assert depth_lines(rows) == [
        "zeros    .=@  . 30.0% to @ 90.0% zero, by block",
        "time     ..@  . 25.0% to @ 50.0% of the measured time, by block",
    ]
    predicted = [replace(r, ms=None, ms_predicted=1.0) for r in rows]
    assert depth_lines(predicted)[1] == "time     +++  all 33.3% of the predicted time, by block"
    mixed = [replace(rows[0], ms=None, ms_predicted=None), *rows[1:]]
    assert len(depth_lines(mixed)) == 1, "what was measured and what was not are not added up"
    beside = [*rows, row(0, "self_attn.q", nnz=70, ms=None, ms_predicted=None)]
    assert len(depth_lines(beside)) == 1, "a product of a block that was not measured"
    near = [row(i, parameters=100_000, nnz=50_000 + i, ms=None, ms_predicted=None) for i in range(3)]
    assert depth_lines(near) == ["zeros    +++  all 50.0% zero, by block"], "no contrast is drawn where there is none"
    assert depth_lines([replace(r, block=None) for r in rows]) == []
    assert depth_lines([replace(r, criterion=None, ms=None, ms_predicted=None) for r in rows]) == []


def test_roles_and_blocks_word_for_word() -> None:
    rows = [
        row(0, nnz=100, criterion=None),
        row(1, nnz=60),
        row(2, nnz=20),
        row(0, "self_attn.q", nnz=90),
        row(2, "self_attn.q"),
    ]
    assert depth_table(rows)[1:] == [
        f"== Zeros by role and block: . 0.0% to @ 80.0%, blank where a block has none {'=' * 44}",
        "mlp.up_proj  .+@  0.0% to 80.0%",
        "self_attn.q  : *  10.0% to 50.0%",
    ]
    assert depth_table([replace(r, criterion=None) for r in rows]) == []
    full = report_cases.report()
    assert "== Zeros by role and block" in render(full, layers=True)
    assert "== Zeros by role and block" not in render(full)


@pytest.mark.parametrize("blocks", [1, 30, 60, 61, 200])
def test_the_summary_still_fits_a_screen(blocks: int) -> None:
    full = report_cases.report()
    rows = tuple(row(i, nnz=i % 100, ms=1.0 + i) for i in range(blocks))
    busy = replace(full, layers=rows, latency=replace(full.latency, disturbed=True, window_tokens=64, window_repeats=3))
    for report in (replace(full, layers=rows), busy):
        lines = summary_lines(report)
        assert len(lines) <= 24
        assert max(map(len, lines)) <= 80
        assert any(line.startswith("zeros ") for line in lines)
        assert any(line.startswith("- ") for line in lines)


def test_the_predicted_time_of_a_product_is_shared_out_among_its_weights() -> None:
    found = by_weight([Predicted(("a", "b"), 2.0, 1.0, ("bytes", "flops"), (0.25, 0.75))])
    assert found == {"a": (2.0, "bytes", 250.0), "b": (2.0, "flops", 750.0)}


def test_a_compiled_models_predicted_times_add_up_to_those_of_its_products() -> None:
    made = sparsec.compile(report_cases.model(), "magnitude(0.5),freeze,sparsity,flops,fuse,lower(auto)")
    report = made.sparsec.report()
    assert report.linears_ms is not None
    assert sum(r.ms_predicted or 0.0 for r in report.layers) == pytest.approx(report.linears_ms)


def test_the_width_of_the_terminal_breaks_no_number(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for columns in ("80", "120", "200"):
        monkeypatch.setenv("COLUMNS", columns)
        assert command.main(["tiny", "--no-measure", "--layers", "--picture", "layers.0.mlp.up_proj"]) == 0
        out = capsys.readouterr().out
        summary = out.split("\n\n== ")[0].splitlines()
        picture = out[out.index("== model.layers.0.mlp.up_proj") :].splitlines()
        assert max(map(len, (*summary, *picture))) <= 80
        assert [line for line in out.splitlines() if len(line) > int(columns)] == []
