"""A study as a picture in plain characters: quality against speed, or against sparsity where nothing was timed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sparsec.console.table import heading, paragraph, percent, times
from sparsec.report.variant import Variant, short_perplexity
from sparsec.sweep.run import DENSE, CellResult
from sparsec.sweep.series import series_name

MARKS = "ox+*#%@abcdefghijklmnpqrstuvwyz"
SEVERAL = "&"
"""Stands where points of several series fall together."""
ROWS = 12
COLUMNS_AT_MOST = 80
SPAN = 10.0
"""Where the largest value is more than so many times the least, an axis is logarithmic."""


@dataclass(frozen=True)
class Axis:
    """What stands along one side."""

    title: str
    show: Callable[[float], str]
    logarithmic: bool = False


@dataclass(frozen=True)
class Point:
    """A mark, by the series that it belongs to."""

    x: float
    y: float
    series: str


def chart(results: Sequence[CellResult], width: int) -> list[str]:
    """Lines, at most 80 columns wide, with a legend; none where fewer than two cells can be shown."""
    names = [DENSE if result.spec == DENSE else series_name(result.spec) for result in results]
    if len(set(names)) > len(MARKS):
        names = [DENSE if result.spec == DENSE else "cells" for result in results]
    done = [(result, name) for result, name in zip(results, names, strict=True) if result.figures]
    if any(_speed(r.figures) is not None for r, _ in done if r.spec != DENSE and r.figures is not None):
        across, title = Axis(f"speedup of {_timed(results)}, measured", times), _speed
    else:
        across, title = Axis("sparsity of all parameters", lambda value: percent(value, 0)), _sparsity
    encodes = any(result.figures is not None and result.figures.cosine is not None for result in results)
    points = []
    for result, name in done:
        assert result.figures is not None
        x, y = title(result.figures), result.figures.cosine if encodes else result.figures.perplexity
        if x is not None and y is not None and math.isfinite(x) and math.isfinite(y):
            points.append(Point(x, y, name))
    if len(points) < 2:
        return []
    most, least = max(p.y for p in points), min(p.y for p in points)
    up = Axis("perplexity", short_perplexity, logarithmic=0 < least < most / SPAN)
    if encodes:
        up = Axis("cosine of embeddings to dense", "{:.4f}".format)
    lines = heading(f"{up.title.capitalize()} and {across.title}", width)
    lines += scatter(points, across, up, min(width, COLUMNS_AT_MOST))
    if missing := len(results) - len(points):
        what = "cell has" if missing == 1 else "cells have"
        lines += paragraph(
            f"{missing} {what} no place in it: failed, not measured, or beyond floating point.", width=width
        )
    return lines


def scatter(points: Sequence[Point], across: Axis, up: Axis, width: int, rows: int = ROWS) -> list[str]:
    """Lines of a chart, and its legend. points: finite, at least one, above 0 along a logarithmic axis."""
    names = list(dict.fromkeys(point.series for point in points))
    marks = {name: MARKS[i % len(MARKS)] for i, name in enumerate(names)}
    (left, right), (low, high) = _ends([p.x for p in points], across), _ends([p.y for p in points], up)
    labels = {0: up.show(_at(high, up)), rows // 2: "", rows - 1: up.show(_at(low, up))}
    labels[rows // 2] = up.show(_at(high - (high - low) * (rows // 2) / (rows - 1), up))
    margin = max(map(len, labels.values()))
    room = width - margin - 3
    field = [[" "] * room for _ in range(rows)]
    for point in points:
        x = round((_along(point.x, across) - left) / (right - left) * (room - 1))
        y = round((high - _along(point.y, up)) / (high - low) * (rows - 1))
        mark = marks[point.series]
        field[y][x] = mark if field[y][x] in (" ", mark) else SEVERAL
    lines = [f"{up.title}{', logarithmic' if up.logarithmic else ''}"]
    lines += [f"{labels.get(i, ''):>{margin}} |{''.join(row)}".rstrip() for i, row in enumerate(field)]
    ends = [across.show(_at(value, across)) for value in (left, (left + right) / 2, right)]
    lines.append(" " * margin + " +" + "-" * room)
    lines.append(" " * (margin + 2) + _spread(ends, room))
    lines.append(" " * (margin + 2) + across.title.rjust(room))
    several = [f"{SEVERAL} several"] if any(SEVERAL in row for row in field) else []
    return [*lines, *_legend([f"{marks[name]} {name}" for name in names] + several, width)]


def _ends(values: Sequence[float], axis: Axis) -> tuple[float, float]:
    low, high = (_along(value, axis) for value in (min(values), max(values)))
    spare = max(abs(low), abs(high), 1e-9) * 0.05
    return (low, high) if high - low > 1e-9 * spare else (low - spare, high + spare)


def _along(value: float, axis: Axis) -> float:
    return math.log(value) if axis.logarithmic else value


def _at(place: float, axis: Axis) -> float:
    return math.exp(place) if axis.logarithmic else place


def _spread(ends: Sequence[str], room: int) -> str:
    """Three labels: at the left, in the middle and at the right."""
    first, middle, last = ends
    line = first.ljust(room - len(last)) + last
    at = (room - len(middle)) // 2
    return line[:at] + middle + line[at + len(middle) :] if at > len(first) else line


def _legend(entries: Sequence[str], width: int) -> list[str]:
    """As many in a line as there is room for."""
    lines = [""]
    for entry in entries:
        if lines[-1] and len(lines[-1]) + 3 + len(entry) > width:
            lines.append("")
        lines[-1] += ("   " if lines[-1] else "") + entry
    return [part for line in lines for part in (paragraph(line, "", "  ", width) if len(line) > width else [line])]


def _timed(results: Sequence[CellResult]) -> str:
    decodes = any(result.figures is not None and result.figures.speedup_decode is not None for result in results)
    return "decoding" if decodes else "a window"


def _speed(own: Variant | None) -> float | None:
    return None if own is None or own.speedup is None else own.speedup.median


def _sparsity(own: Variant | None) -> float | None:
    return None if own is None else own.sparsity
