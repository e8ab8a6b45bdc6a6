"""The sparsity at which a model collapses, for each way to prune it: found by halves, by one simple criterion."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from sparsec.console.table import fitted, heading, paragraph
from sparsec.errors import SpecError
from sparsec.report.variant import Variant, short_perplexity
from sparsec.sweep.grid import Cell, grid_cells, places
from sparsec.sweep.planners import Asked, Results, Search, Searches
from sparsec.sweep.run import DENSE, CellResult

PLACE = "zeros"
LADDER = tuple(f"{percent / 100:.2f}" for percent in range(5, 96, 2))
"""The sparsities among which a search looks: six cells tell 46 of them apart, and `never` from them."""
PASSES = ("{method}({zeros}),freeze",)
AXES = {"method": ("magnitude", "wanda", "admm")}
WORSE = 2.0
"""Times the dense model's perplexity: with more it has collapsed."""
AGREES = 0.5
"""Top-1 agreement with dense: with less it has collapsed."""


def tipping(templates: Sequence[str], axes: Mapping[str, Sequence[str]]) -> Asked:
    """A search for each of the templates with each combination of the values of its other placeholders. SpecError."""
    templates = templates or PASSES
    used = {name for template in templates for name in places(template)}
    axes = {name: values for name, values in AXES.items() if name in used} | dict(axes)
    if PLACE in axes:
        raise SpecError(f"--preset tipping searches the values of {{{PLACE}}} itself; leave out --grid {PLACE}")
    for template in templates:
        if PLACE not in places(template):
            raise SpecError(
                f"{template}: --preset tipping searches the values of the placeholder {{{PLACE}}}, and these passes have none; "
                f'write for instance "wanda({{{PLACE}}}),freeze"'
            )
    grid_cells(templates, axes | {PLACE: LADDER})  # refuses what does not fit together
    searches = []
    for template in templates:
        own = {name: axes.get(name, LADDER) for name in places(template)}
        ladders: dict[tuple[tuple[str, str], ...], list[Cell]] = {}
        for cell in grid_cells([template], own):
            others = tuple(pair for pair in cell.values if pair[0] != PLACE)
            ladders.setdefault(others, []).append(replace(cell, timed=False))
        for others, ladder in ladders.items():
            name = ", ".join(value for _, value in others)
            if not others or len(templates) > 1:
                name = template.replace("{" + PLACE + "}", "x") + (f" {name}" if name else "")
            searches.append(Search(name, sorted(ladder, key=lambda cell: dict(cell.values)[PLACE]), _collapsed))
    return Asked(Searches(searches), lambda results: tipping_points(searches, results))


def collapse(own: Variant, dense: Variant) -> list[str]:
    """What of a model has collapsed: `perplexity`, `top-1`; empty where it stands. A perplexity beyond floating point has."""
    found = []
    if dense.perplexity is not None and not (own.perplexity or float("inf")) <= WORSE * dense.perplexity:
        found.append("perplexity")
    if own.top1 is not None and not own.top1 >= AGREES:
        found.append("top-1")
    return found


@dataclass(frozen=True)
class TippingPoint:
    """Of one way to prune: the last cell that stands and the first one that collapses, as far as they were found."""

    name: str
    sparsity_stands: float | None  # None where all of them collapse
    sparsity_collapses: float | None  # None where none does
    stands: str | None  # the cell
    collapses: str | None
    by: tuple[str, ...]  # what collapses first: perplexity, top-1
    cells: int  # looked at
    ended: bool  # False: the search is not at its end
    stopped: str  # the reason where it could not go on


@dataclass(frozen=True)
class TippingPoints:
    """With the criterion: more than so many times the perplexity of dense, or less than that top-1 agreement."""

    perplexity_times: float
    top1: float
    points: tuple[TippingPoint, ...]

    def lines(self, results: Results, width: int) -> list[str]:
        """The criterion, and for each search where it tips, by what, and the figures on both sides."""
        dense = results[DENSE].figures
        assert dense is not None
        limit = ""
        if dense.perplexity is not None:
            limit = f" (so {short_perplexity(self.perplexity_times * dense.perplexity)})"
        lines = heading("Where the model collapses", width)
        lines += paragraph(
            f"Collapsed: a perplexity of more than {self.perplexity_times:g} times that of dense{limit}, or a top-1 agreement with "
            f"dense below {self.top1:g}, whichever comes first.",
            width=width,
        )
        lines += paragraph(
            f"Searched by halves among the sparsities {LADDER[0]}, {LADDER[1]}, ..., {LADDER[-1]} of the pruned weights, in the "
            "belief that what has collapsed stays so with more zeros.",
            width=width,
        )
        header = ["", "tips between", "by", "perplexity", "", "top-1", "", "cells"]
        rows = [_row(point, dense, results) for point in self.points]
        lines += ["", *fitted(header, rows, width, left=(0, 1, 2))]
        for point in self.points:
            if point.stopped:
                lines += paragraph(f"{point.name}: the search stopped at {point.stopped}", "", "  ", width)
        return lines


def tipping_points(searches: Sequence[Search], results: Results) -> TippingPoints | None:
    """None without a dense reference."""
    dense = results[DENSE].figures if DENSE in results else None
    if dense is None:
        return None
    return TippingPoints(WORSE, AGREES, tuple(_point(search, dense, results) for search in searches))


def _point(search: Search, dense: Variant, results: Results) -> TippingPoint:
    found = search.found(results)
    below = search.ladder[found.low] if found.low >= 0 else None
    above = search.ladder[found.high] if found.high < len(search.ladder) else None
    figures = None if above is None else results[above.spec].figures
    return TippingPoint(
        search.name,
        None if below is None else _zeros(below),
        None if above is None else _zeros(above),
        None if below is None else below.spec,
        None if above is None else above.spec,
        () if figures is None else tuple(collapse(figures, dense)),
        found.used,
        found.middle is None and not found.stopped,
        found.stopped,
    )


def _row(point: TippingPoint, dense: Variant, results: Results) -> list[str]:
    below = dense if point.stands is None else results[point.stands].figures
    above = None if point.collapses is None else results[point.collapses].figures
    if not point.ended:
        where = "not found"
    elif point.sparsity_collapses is None:
        where = f"not up to {LADDER[-1]}"
    elif point.sparsity_stands is None:
        where = f"at {LADDER[0]} already"
    else:
        where = f"{point.sparsity_stands:.2f} and {point.sparsity_collapses:.2f}"
    numbers = [_perplexity(below), _perplexity(above), _top1(below), _top1(above)]
    return [point.name, where, ", ".join(point.by) or "-", *numbers, str(point.cells)]


def _collapsed(result: CellResult, results: Results) -> bool | None:
    dense = results[DENSE].figures if DENSE in results else None
    if dense is None or result.figures is None:
        return None
    return bool(collapse(result.figures, dense))


def _zeros(cell: Cell) -> float:
    return float(dict(cell.values)[PLACE])


def _perplexity(own: Variant | None) -> str:
    if own is None:
        return "-"
    return "beyond" if own.perplexity is None else short_perplexity(own.perplexity)


def _top1(own: Variant | None) -> str:
    return "-" if own is None or own.top1 is None else f"{own.top1:.3f}"
