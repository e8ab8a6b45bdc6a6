"""Patterns of zeros beside each other, at equal sparsity and at equal speed: what regularity costs, and what it buys."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from sparsec.console.table import fitted, heading, mega, paragraph, times
from sparsec.errors import SpecError
from sparsec.patterns import Pattern
from sparsec.report.variant import Variant, short_perplexity
from sparsec.sweep.grid import Cell, grid_cells, places
from sparsec.sweep.planners import Asked, Results, Search, Searches
from sparsec.sweep.run import DENSE, CellResult

PASSES = "{method}({zeros}, pattern='{pattern}'),freeze,fuse,lower(auto)"
AXES = {
    "method": ("wanda",),
    "pattern": ("unstructured", "2:4", "4:8", "block:16x16", "block:32x32", "block:16x1"),
}
FREE = "unstructured"
EQUAL = 0.5
"""The sparsity at which all are compared, and that of the unstructured zeros whose speed the others have to reach."""
STEPS = tuple(f"{percent / 100:.2f}" for percent in range(5, 96, 5))
"""Sparsities of a pattern that leaves it free."""


def families(templates: Sequence[str], axes: Mapping[str, Sequence[str]]) -> Asked:
    """Every pattern at 50 %, and a search for the least sparsity that is as fast as unstructured zeros. SpecError."""
    template = _template(templates, axes)
    used = places(template)
    axes = {name: values for name, values in AXES.items() if name in used} | dict(axes)
    for name, values in axes.items():
        if name != "pattern" and len(values) != 1:
            raise SpecError(
                f"--preset patterns compares patterns alone, so {{{name}}} has one value, got {len(values)}"
            )
    names = list(dict.fromkeys((FREE, *axes["pattern"])))
    ladders: dict[str, list[Cell]] = {}
    for name in names:
        pattern = Pattern.parse(name)
        family = name if pattern.nm is None else f"N:{pattern.nm[1]}"
        ladders.setdefault(family, _ladder(template, axes, pattern))
    first = [ladder[_equal(ladder)] for ladder in ladders.values()]
    searches = [
        Search(family, ladder, partial(_as_fast, first[0])) for family, ladder in ladders.items() if family != FREE
    ]
    return Asked(Searches(searches, first), lambda results: families_found(first, searches, results))


@dataclass(frozen=True)
class EqualSparsity:
    """A pattern, and its cell with about the sparsity at which all are compared."""

    pattern: str
    cell: str
    sparsity: float


@dataclass(frozen=True)
class EqualSpeed:
    """Of one family: the cell with the least sparsity that is as fast as asked, or the fastest one where none is."""

    family: str
    pattern: str
    cell: str | None  # None: the search did not come to its end
    sparsity: float | None
    reached: bool
    searched_to: float  # sparsity of the last cell
    stopped: str  # the reason where the search could not go on


@dataclass(frozen=True)
class FamiliesFound:
    """Unstructured zeros are the first at equal sparsity, and the others have to reach their speed."""

    equal_sparsity: tuple[EqualSparsity, ...]
    speed: float | None  # of unstructured zeros against dense; None where they were not timed
    equal_speed: tuple[EqualSpeed, ...]
    disturbed: bool  # the machine was busy while the cells of the searches were timed

    def lines(self, results: Results, width: int) -> list[str]:
        """The table at equal sparsity and the one at equal speed."""
        lines = heading(f"At equal sparsity: {EQUAL:.0%} of the pruned weights", width)
        header = ["pattern", "perplexity", "top-1", "MB", "decoding", "layouts"]
        rows = []
        for name, spec in [(DENSE, DENSE), *((each.pattern, each.cell) for each in self.equal_sparsity)]:
            result = results.get(spec)
            if result is not None:
                rows.append([name, *_figures(result), "failed" if result.error else result.layouts])
        lines += fitted(header, rows, width, left=(0, 5))
        lines += heading(f"At equal speed: that of unstructured zeros at {EQUAL:.0%}", width)
        if self.speed is None:
            return [*lines, "unstructured zeros were not timed, so there is no speed for the others to reach"]
        lines += paragraph(
            f"The least sparsity at which decoding is {times(self.speed)} as fast as dense. Searched by halves, in the belief that "
            "more zeros are faster; a few percent are within what the clock wavers.",
            width=width,
        )
        rows = [[FREE, f"{EQUAL:.0%}", *_figures(results[self.equal_sparsity[0].cell])]]
        rows += [_equal_speed(each, results) for each in self.equal_speed]
        lines += ["", *fitted(["pattern", "sparsity needed", *header[1:-1]], rows, width, left=(0, 1))]
        if self.disturbed:
            lines += paragraph(
                "?: the machine was busy while these were timed, which may have led the search astray; measure again idle",
                width=width,
            )
        for each in self.equal_speed:
            if each.stopped:
                lines += paragraph(f"{each.family}: the search stopped at {each.stopped}", "", "  ", width)
        return lines


def families_found(first: Sequence[Cell], searches: Sequence[Search], results: Results) -> FamiliesFound:
    """first: the cells at equal sparsity, unstructured zeros before the others."""
    looked = [first[0], *(cell for search in searches for cell in search.ladder)]
    return FamiliesFound(
        tuple(EqualSparsity(_pattern(cell), cell.spec, _zeros(cell)) for cell in first),
        _speed(results.get(first[0].spec)),
        tuple(_searched(search, results) for search in searches),
        any(results[cell.spec].disturbed for cell in looked if cell.spec in results),
    )


def _template(templates: Sequence[str], axes: Mapping[str, Sequence[str]]) -> str:
    if len(templates) > 1:
        raise SpecError(f"--preset patterns takes one --passes, got {len(templates)}")
    template = templates[0] if templates else PASSES
    for name in ("zeros", "pattern"):
        if name not in places(template):
            raise SpecError(
                f"{template}: --preset patterns fills in the placeholders {{zeros}} and {{pattern}}; write for instance {PASSES!r}"
            )
    if "zeros" in axes:
        raise SpecError("--preset patterns finds the values of {zeros} itself; leave out --grid zeros")
    return template


def _ladder(template: str, axes: Mapping[str, Sequence[str]], pattern: Pattern) -> list[Cell]:
    """From few zeros to many."""
    if pattern.nm is None:
        return grid_cells([template], {**axes, "pattern": [str(pattern)], "zeros": STEPS})
    m = pattern.nm[1]
    found = []
    for n in range(m - 1, 0, -1):
        found += grid_cells([template], {**axes, "pattern": [f"{n}:{m}"], "zeros": [repr(1 - n / m)]})
    return found


def _equal(ladder: Sequence[Cell]) -> int:
    return min(range(len(ladder)), key=lambda i: abs(_zeros(ladder[i]) - EQUAL))


def _as_fast(reference: Cell, result: CellResult, results: Results) -> bool | None:
    own, target = _speed(result), _speed(results.get(reference.spec))
    return None if own is None or target is None else own >= target


def _searched(search: Search, results: Results) -> EqualSpeed:
    found = search.found(results)
    last = _zeros(search.ladder[-1])
    if found.stopped or found.middle is not None:
        return EqualSpeed(search.name, search.name, None, None, False, last, found.stopped)
    known = [cell for cell in search.ladder if _speed(results.get(cell.spec)) is not None]
    reached = found.high < len(search.ladder)
    cell = search.ladder[found.high] if reached else max(known, key=lambda each: _speed(results[each.spec]) or 0.0)
    return EqualSpeed(search.name, _pattern(cell), cell.spec, _zeros(cell), reached, last, "")


def _equal_speed(found: EqualSpeed, results: Results) -> list[str]:
    if found.cell is None or found.sparsity is None:
        return [found.family, "not found", "-", "-", "-", "-"]
    where = _share(found.sparsity)
    if not found.reached:
        where = f"not reached up to {_share(found.searched_to)}; best: {where}"
    return [found.pattern, where, *_figures(results[found.cell])]


def _zeros(cell: Cell) -> float:
    return float(dict(cell.values)["zeros"])


def _share(sparsity: float) -> str:
    return f"{100 * sparsity:g}%"


def _pattern(cell: Cell) -> str:
    return dict(cell.values)["pattern"]


def _speed(result: CellResult | None) -> float | None:
    if result is None or result.figures is None or result.figures.speedup_decode is None:
        return None
    return result.figures.speedup_decode.median


def _figures(result: CellResult) -> list[str]:
    own: Variant | None = result.figures
    if own is None:
        return ["-"] * 4
    perplexity = "-" if own.perplexity is None else short_perplexity(own.perplexity)
    top1 = "-" if own.top1 is None else f"{own.top1:.3f}"
    return [perplexity, top1, mega(own.bytes, 1), times(_speed(result)) + ("?" if result.disturbed else "")]
