"""A pruned weight drawn in characters: its first rows and columns, its density, and how large what went and what stayed was."""

from __future__ import annotations

import difflib
from bisect import bisect_right
from collections.abc import Iterable, Sequence

from sparsec.console.table import percent
from sparsec.errors import SelectionError
from sparsec.pipeline.selection import path_matches
from sparsec.report.views import LayerView

COLUMNS = 80
SIDE = 32  # rows and columns of the corner that are shown
HEIGHT = 12  # of the histogram, in lines
RAMP = ".:-=+*#%@"


def drawable(patterns: Sequence[str], names: Iterable[str]) -> tuple[str, ...]:
    """The names that one of the patterns names, as `targets=` does: a path, its end, or a module around it, with `*`.

    Raises SelectionError for a pattern that names none.
    """
    known = list(names)
    found: dict[str, None] = {}
    for pattern in patterns:
        own = [name for name in known if path_matches(name, pattern)]
        if not own:
            words = dict.fromkeys(w for n in known for w in (n, n.removesuffix(".weight"), *n.split(".")[-2:-1]))
            near = difflib.get_close_matches(pattern, words, n=4, cutoff=0.5) or known[:3]
            raise SelectionError(
                f"--picture: {pattern!r} names no matrix of this model; near names: {', '.join(map(repr, near))}; `*` stands for "
                "any characters"
            )
        found |= dict.fromkeys(own)
    return tuple(name for name in known if name in found)


def pictures(views: Sequence[LayerView], names: Sequence[str]) -> list[str]:
    """Of the weights of these names, one below the other, and how many of them have none; 80 columns at most."""
    chosen = [view for view in views if view.name in names]
    lines = [line for view in chosen for line in picture(view)]
    if missing := len(names) - len(chosen):
        lines += ["", f"no picture: no pass pruned {missing} of the {len(names)} weights that --picture names"]
    return lines


def picture(view: LayerView) -> list[str]:
    """One weight."""
    out, inside = view.shape
    about = f"{out} x {inside}, {percent(view.sparsity)} zero"
    name = view.name if len(view.name) + len(about) <= COLUMNS - 8 else f"..{view.name[-(COLUMNS - 10 - len(about)) :]}"
    title = f"== {name}: {about} "
    return ["", title + "=" * (COLUMNS - len(title)), "", *_places(view), "", *_histogram(view)]


def _places(view: LayerView) -> list[str]:
    """The corner on the left, the density on the right."""
    corner = [row[:SIDE] for row in view.corner[:SIDE]]
    density = [[1.0 - zeros for zeros in row] for row in view.zeros]
    low, high = min(map(min, density)), max(map(max, density))
    drawn = ["".join(shade(share, low, high) for share in row) for row in density]
    left = [f"first {len(corner)} x {len(corner[0])} weights", "", *corner, "", "# kept  . zero"]
    legend = (
        f"all {percent(low)} kept" if high == low else f"{RAMP[0]} {percent(low)} kept .. {RAMP[-1]} {percent(high)}"
    )
    right = [f"density of the whole, in {len(drawn)} x {len(drawn[0])} cells", "", *drawn, "", legend]
    both = max(len(left), len(right))
    padded = [column + [""] * (both - len(column)) for column in (left, right)]
    return [f"{one:<{SIDE + 4}}{two}".rstrip() for one, two in zip(*padded, strict=True)]


def shade(value: float, low: float, high: float) -> str:
    """A character of RAMP for a value from low to high."""
    return RAMP[round((value - low) / (high - low) * (len(RAMP) - 1))] if high > low else RAMP[len(RAMP) // 2]


def _histogram(view: LayerView) -> list[str]:
    """A column for each bin, what stayed below what went."""
    total, most = sum(view.counts), max(view.counts)
    heights = [_height(count, most) for count in view.counts]
    stayed = [min(_height(kept, most), height) for kept, height in zip(view.kept, heights, strict=True)]
    lines = []
    for line in range(HEIGHT, 0, -1):
        label = percent(most / total) if line == HEIGHT else ""
        row = "".join(_cell(line, *column) for column in zip(view.counts, heights, stayed, strict=True))
        lines.append(f"{label:>7} |{row}".rstrip())
    number = f"{view.sampled:,} of them drawn" if view.sampled is not None else "all of them"
    last, top = f"{view.edges[-2]:.4g} |", f".. {view.edges[-1]:.4g}"
    return [
        f"|w|, {number}, in {len(view.counts)} bins; # kept  . zero  _ fewer than a line",
        *lines,
        f"{'':>8}+{'-' * len(view.counts)}",
        f"{'':>8} 0{last:>{len(view.counts) - 2}} {top}",
        *_threshold(view),
    ]


def _height(count: int, most: int) -> int:
    return round(HEIGHT * count / most)


def _cell(line: int, count: int, height: int, stayed: int) -> str:
    if line > height:
        return "_" if line == 1 and count else " "
    return "#" if line <= stayed else "."


def _threshold(view: LayerView) -> list[str]:
    if view.threshold is None:
        return ["no threshold: |w| alone does not tell what went from what stayed"]
    at = max(0, min(bisect_right(view.edges, view.threshold), len(view.counts)) - 1)
    return [
        f"{'':>9}{' ' * at}^",
        f"threshold {view.threshold:.4g}: every |w| below it went, every one above it stayed",
    ]
