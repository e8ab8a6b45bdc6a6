"""A report at the width of a terminal: no line is wrapped by it, and none of its figures is lost."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import report_cases
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsec.console.table import heading
from sparsec.report.text import render

WIDTHS = (80, 120, 200)
FIGURE = re.compile(r"-?\d[\d,.]*(?:x|%)?")


@pytest.fixture(scope="module")
def full() -> Any:
    report = report_cases.report()
    rows = tuple(
        replace(row, sensitivity=0.0123 + i / 1000, allocation="owl", allocation_measure=1e-7 * (i + 1))
        if row.criterion is not None
        else row
        for i, row in enumerate(report.layers)
    )
    return replace(report, layers=rows)


@pytest.mark.parametrize("layers", [False, True])
@pytest.mark.parametrize("width", WIDTHS)
def test_a_report_fits_the_terminal_and_has_all_its_figures(full: Any, width: int, layers: bool) -> None:
    text = render(full, layers, width)
    assert [line for line in text.splitlines() if len(line) > width] == []
    assert text.isascii()
    for figure, count in _figures(render(full, layers)).items():
        assert _figures(text).get(figure, 0) >= count, figure


def _figures(text: str) -> dict[str, int]:
    """How often each stands as a whole word. Those of names and passes aside: a key column is given once for each table."""
    found: dict[str, int] = {}
    for word in text.split():
        if FIGURE.fullmatch(word.strip("().;,:")):
            found[word.strip("().;,:")] = found.get(word.strip("().;,:"), 0) + 1
    return found


@settings(max_examples=20, deadline=None)
@given(st.text("abz.01_", min_size=1, max_size=120), st.sampled_from((80, 120)))
def test_long_names_leave_room_for_numbers(name: str, width: int) -> None:
    report = report_cases.report()
    rows = tuple(replace(row, name=f"{name}{i}.weight", block=None) for i, row in enumerate(report.layers))
    named = replace(report, layers=rows, machine=None, passes=())
    lines = render(named, layers=True, width=width).splitlines()
    tables = [line for line in lines if re.search(r"\d%|\dx\b", line) and not line.startswith(" ")]
    assert tables
    assert all(len(line) <= width for line in tables)


@given(st.lists(st.text("ab:;,", min_size=1, max_size=9), min_size=1, max_size=30).map(" ".join), st.integers(40, 140))
def test_a_heading_is_no_wider_than_asked(title: str, width: int) -> None:
    lines = heading(title, width)
    assert lines[0] == ""
    assert all(len(line) <= width + 1 for line in lines)
    assert " ".join(lines).replace("=", "").split() == title.replace("=", "").split()
