"""Plain tables: columns as wide as their content, numbers to the right, readable in a terminal and in a pipe alike."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence

WIDTH = 120


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


def heading(title: str) -> list[str]:
    """A section's first lines."""
    return ["", f"== {title} " + "=" * max(0, WIDTH - len(title) - 4)]


def paragraph(text: str, first: str = "", rest: str | None = None) -> list[str]:
    """Wrapped at the report's width; `rest` indents the lines after the first, by default as deep as `first`."""
    indent = " " * len(first) if rest is None else rest
    return textwrap.wrap(
        text, WIDTH, initial_indent=first, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
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
