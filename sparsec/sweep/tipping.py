"""The sparsity at which a model collapses, for each way to prune it: found by halves, by one simple criterion."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

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
AXES = {"method": ("magnitude", "wanda", "sparsegpt")}
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
    return Asked(Searches(searches), lambda results, width: tipping_points(searches, results, width))


def collapse(own: Variant, dense: Variant) -> list[str]:
    """What of a model has collapsed: `perplexity`, `top-1`; empty where it stands. A perplexity beyond floating point has."""
    found = []
    if dense.perplexity is not None and not (own.perplexity or float("inf")) <= WORSE * dense.perplexity:
        found.append("perplexity")
    if own.top1 is not None and not own.top1 >= AGREES:
        found.append("top-1")
    return found


def tipping_points(searches: Sequence[Search], results: Results, width: int) -> list[str]:
    """Lines: the criterion, and for each search where it tips, by what, and the figures on both sides."""
    dense = results[DENSE].figures if DENSE in results else None
    if dense is None:
        return []
    limit = "" if dense.perplexity is None else f" (so {short_perplexity(WORSE * dense.perplexity)})"
    lines = heading("Where the model collapses", width)
    lines += paragraph(
        f"Collapsed: a perplexity of more than {WORSE:g} times that of dense{limit}, or a top-1 agreement with dense below "
        f"{AGREES:g}, whichever comes first.",
        width=width,
    )
    lines += paragraph(
        f"Searched by halves among the sparsities {LADDER[0]}, {LADDER[1]}, ..., {LADDER[-1]} of the pruned weights, in the belief "
        "that what has collapsed stays so with more zeros.",
        width=width,
    )
    header = ["", "tips between", "by", "perplexity", "", "top-1", "", "cells"]
    rows = [_row(search, dense, results) for search in searches]
    lines += ["", *fitted(header, rows, width, left=(0, 1, 2))]
    for search in searches:
        if stopped := search.found(results).stopped:
            lines += paragraph(f"{search.name}: the search stopped at {stopped}", "", "  ", width)
    return lines


def _row(search: Search, dense: Variant, results: Results) -> list[str]:
    found = search.found(results)
    last = len(search.ladder)
    below = dense if found.low < 0 else _figures(search.ladder[found.low], results)
    above = None if found.high == last else _figures(search.ladder[found.high], results)
    if found.middle is not None or found.stopped:
        where = "not found"
    elif found.high == last:
        where = f"not up to {LADDER[-1]}"
    elif found.low < 0:
        where = f"at {LADDER[0]} already"
    else:
        where = f"{LADDER[found.low]} and {LADDER[found.high]}"
    by = "-" if above is None else ", ".join(collapse(above, dense))
    numbers = [_perplexity(below), _perplexity(above), _top1(below), _top1(above)]
    return [search.name, where, by, *numbers, str(found.used)]


def _collapsed(result: CellResult, results: Results) -> bool | None:
    dense = results[DENSE].figures if DENSE in results else None
    if dense is None or result.figures is None:
        return None
    return bool(collapse(result.figures, dense))


def _figures(cell: Cell, results: Results) -> Variant | None:
    result = results.get(cell.spec)
    return None if result is None else result.figures


def _perplexity(own: Variant | None) -> str:
    if own is None:
        return "-"
    return "beyond" if own.perplexity is None else short_perplexity(own.perplexity)


def _top1(own: Variant | None) -> str:
    return "-" if own is None or own.top1 is None else f"{own.top1:.3f}"
