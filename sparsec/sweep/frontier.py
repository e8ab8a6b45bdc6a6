"""Quality against bytes and against time: the cells that no other one beats in both."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import compress

from sparsec.console.table import fitted, heading, mega, paragraph, times
from sparsec.report.variant import short_perplexity
from sparsec.sweep.grid import grid_cells, places
from sparsec.sweep.planners import Asked, FixedCells, Results
from sparsec.sweep.run import DENSE, CellResult
from sparsec.sweep.tables import naming

PASSES = (
    "{method}({zeros}),freeze,fuse,lower(auto)",
    "{method}(pattern='2:4'),freeze,fuse,lower(auto)",
    "fuse,lower(dense, values='{values}')",
    "{method}({zeros}),freeze,fuse,lower(bitmap, values='{values}')",
    "{method}(pattern='2:4'),freeze,fuse,lower(bitmap, values='{values}')",
)
AXES = {"method": ("admm",), "zeros": ("0.3", "0.5", "0.6", "0.7"), "values": ("int8", "int4g64")}
ON = "front"
"""Stands behind a figure by which a cell is on a front."""


def frontier(templates: Sequence[str], axes: Mapping[str, Sequence[str]]) -> Asked:
    """All cells of a grid, by default methods and sparsities. SpecError."""
    templates = templates or PASSES
    used = {name for template in templates for name in places(template)}
    cells = grid_cells(templates, {name: values for name, values in AXES.items() if name in used} | dict(axes))
    shown = [DENSE, *(cell.spec for cell in cells)]
    return Asked(FixedCells(cells), lambda results: fronts([results[s] for s in shown if s in results]))


def pareto_front(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Whether each point is on the front, where less is better in both: no other is as good in both and better in one.

    Equal points are on it together; one with a NaN is not, and beats none.
    """
    order = sorted((i for i, point in enumerate(points) if not any(map(math.isnan, point))), key=lambda i: points[i])
    found = [False] * len(points)
    least, edge = math.inf, (math.inf, math.inf)
    for i in order:
        if points[i][1] < least or points[i] == edge or not found.count(True):
            found[i] = True
            least, edge = points[i][1], points[i]
    return found


@dataclass(frozen=True)
class Fronts:
    """The cells that were compared, and those of them that no other one beats in quality and bytes, or in quality and time."""

    compared: tuple[str, ...]
    by_bytes: tuple[str, ...]
    by_time: tuple[str, ...]
    beaten: tuple[tuple[str, str | None], ...] = ()
    """Of each cell with zeros the best dense one, quantised or not, that is as good in at most its bytes; None where none is."""

    def lines(self, results: Results, width: int) -> list[str]:
        """Every measured cell with its perplexity, bytes and speed, and on which front it is."""
        done = [results[spec] for spec in self.compared]
        encodes = any(r.figures is not None and r.figures.cosine is not None for r in done)
        better, what = ("higher cosine", "a window") if encodes else ("lower perplexity", "decoding")
        lines = heading("The fronts of quality against bytes, and against time", width)
        lines += paragraph(
            f"`{ON}`: no other cell has both a {better} and fewer bytes (or less time). Time is told by the speedup of {what}, "
            "which is measured by turns with dense.",
            width=width,
        )
        keys, named = naming(done)
        rows = []
        for result, name in zip(done, named, strict=True):
            own = result.figures
            assert own is not None
            quality = "-" if own.perplexity is None else short_perplexity(own.perplexity)
            if own.cosine is not None:
                quality = f"{own.cosine:.4f}"
            speed = "-" if math.isnan(_time(result)) else times(1 / _time(result)) + ("?" if result.disturbed else "")
            small, fast = (ON if result.spec in front else "" for front in (self.by_bytes, self.by_time))
            rows.append([*name, quality, mega(own.bytes, 1), small, speed, fast])
        header = [*keys, "cosine" if encodes else "perplexity", "MB", "", what, ""]
        left = (*range(len(keys)), len(keys) + 2, len(keys) + 4)
        return [
            *lines,
            "",
            *fitted(header, rows, width, left=left, keys=len(keys)),
            *self._against_dense(results, width),
        ]

    def _against_dense(self, results: Results, width: int) -> list[str]:
        """Which cells with zeros are worth their bytes, in words."""
        if not self.beaten:
            return []

        def named(spec: str) -> str:
            own = results[spec].figures
            assert own is not None
            return f"{spec} ({mega(own.bytes, 1)} MB)"

        kept = [named(spec) for spec, by in self.beaten if by is None]
        lost = [f"{named(spec)} by {named(by)}" for spec, by in self.beaten if by is not None]
        lines = [
            "",
            *paragraph(
                f"No dense model of at most as many bytes is as good as: {'; '.join(kept) or 'none'}.", width=width
            ),
        ]
        return lines + (paragraph(f"Beaten by a dense one: {'; '.join(lost)}.", width=width) if lost else [])


def fronts(results: Sequence[CellResult]) -> Fronts:
    """Of the cells that have figures."""
    done = [result for result in results if result.figures is not None]
    small = pareto_front([(_harm(r), _bytes(r)) for r in done])
    fast = pareto_front([(_harm(r), _time(r)) for r in done])
    every = [r.spec for r in done]
    dense = [r for r in done if r.figures is not None and not r.figures.sparsity]
    beaten = tuple((r.spec, _better(r, dense)) for r in done if r not in dense)
    return Fronts(tuple(every), tuple(compress(every, small)), tuple(compress(every, fast)), beaten)


def _better(result: CellResult, others: Sequence[CellResult]) -> str | None:
    """The best of those that are as good in at most as many bytes."""
    found = [r for r in others if _bytes(r) <= _bytes(result) and _harm(r) <= _harm(result)]
    return min(found, key=_harm).spec if found else None


def _harm(result: CellResult) -> float:
    """Less is better: the perplexity, of an encoder what the cosine of its embeddings to dense lacks of 1."""
    own = result.figures
    if own is None or (own.perplexity is None and own.cosine is None):
        return math.nan
    return 1 - own.cosine if own.cosine is not None else own.perplexity or math.nan


def _bytes(result: CellResult) -> float:
    return math.nan if result.figures is None else float(result.figures.bytes)


def _time(result: CellResult) -> float:
    """Of a decoded token or of an encoder's window, as a share of dense."""
    speed = None if result.figures is None else result.figures.speedup
    return math.nan if speed is None else 1 / speed.median
