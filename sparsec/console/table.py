"""Plain tables: columns as wide as their content, numbers to the right, readable in a terminal and in a pipe alike."""

from __future__ import annotations

import re
import shutil
import textwrap
from collections.abc import Iterable, Sequence

WIDTH = 120
LEAST = 40
"""Columns that a table is fitted into at least, whatever a terminal says of itself."""


def terminal_width() -> int:
    """Columns of the terminal, or what COLUMNS says; WIDTH in a pipe."""
    return max(LEAST, shutil.get_terminal_size((WIDTH, 24)).columns)


def table(header: Sequence[str], rows: Iterable[Sequence[str]], left: Sequence[int] = (0,), gap: int = 2) -> list[str]:
    """Lines of a table. left: indices of the columns that are text; all others are numbers and stand to the right."""
    grid = [list(header), *[list(row) for row in rows]]
    widths = [max(len(row[i]) for row in grid) for i in range(len(header))]
    lines = [
        (" " * gap)
        .join(
            cell.ljust(w) if i in left else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        .rstrip()
        for row in grid
    ]
    return [lines[0], "-" * max(len(line) for line in lines), *lines[1:]]


def fitted(
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    width: int,
    left: Sequence[int] = (0,),
    keys: int = 1,
    gap: int = 2,
) -> list[str]:
    """The lines of `table`, none longer than `width`: one that is wider becomes several below each other, each with the first
    `keys` columns. Where those, or any other text, take more than half of the width, a number stands for each long text, and these
    are listed below. A column of numbers by itself may be wider.
    """
    grid = [list(row) for row in rows]
    widths = [max(map(len, column)) for column in zip(header, *grid, strict=True)]
    half = width // 2 - 2
    crowded = sum(widths[:keys]) + gap * (keys - 1) > half
    named: dict[str, str] = {}
    for row in grid:
        for i in left:
            room = half // keys - 2 if i < keys and crowded else half
            if len(row[i]) > room:
                row[i] = named.setdefault(row[i], f"[{len(named) + 1}]")
    lines: list[str] = []
    for columns in _parts([max(map(len, column)) for column in zip(header, *grid, strict=True)], width, keys, gap):
        chosen = [[row[i] for i in columns] for row in (list(header), *grid)]
        lines += ["", *table(chosen[0], chosen[1:], [at for at, i in enumerate(columns) if i in left], gap)]
    for text, name in named.items():
        lines += paragraph(text, f"{name} ", width=width)
    return lines[1:]


def _parts(widths: Sequence[int], width: int, keys: int, gap: int) -> list[list[int]]:
    """The columns of each table: the keys, and as many others as there is room for."""
    first = list(range(keys))
    found = [list(first)]
    used = room = sum(widths[:keys]) + gap * (keys - 1)
    for i in range(keys, len(widths)):
        if used + gap + widths[i] > width and len(found[-1]) > keys:
            found.append(list(first))
            used = room
        found[-1].append(i)
        used += gap + widths[i]
    return found


def heading(title: str, width: int | None = None) -> list[str]:
    """A section's first lines; a title that is wider goes on below. width: None is that of the terminal."""
    width = terminal_width() if width is None else width
    lines = paragraph(f"== {title}", "", "   ", width)
    return ["", *lines[:-1], f"{lines[-1]} ".ljust(min(width, WIDTH), "=")]


def paragraph(text: str, first: str = "", rest: str | None = None, width: int | None = None) -> list[str]:
    """Wrapped at the terminal's width, or another, and never wider than a report; `rest` indents the lines after the first, by
    default as deep as `first`.

    A word that is longer than a line, such as passes, is broken behind its commas, so never within a number.
    """
    indent = " " * len(first) if rest is None else rest
    width = min(terminal_width() if width is None else width, WIDTH)
    room = width - max(len(first), len(indent))
    text = re.sub(rf"\S{{{room + 1},}}", lambda word: re.sub(r",(?=\S)", ", ", word[0]), text)
    return textwrap.wrap(
        text, width, initial_indent=first, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )


def shorten(name: str, width: int) -> str:
    """The end of a long name, which tells more than its beginning."""
    return name if len(name) <= width else ".." + name[2 - width :]


def mega(value: float | None, digits: int = 2) -> str:
    """In millions."""
    return "-" if value is None else f"{value / 1e6:,.{digits}f}"


def times(value: float | None) -> str:
    """A speedup."""
    return "-" if value is None else f"{value:.2f}x"


def percent(value: float, digits: int = 1) -> str:
    """A share between 0 and 1."""
    return f"{100 * value:.{digits}f}%"
