"""What a study's cells have in common: cells of one series differ in how much they prune, and in nothing else."""

from __future__ import annotations

from collections.abc import Iterable

from sparsec.errors import SparsecError
from sparsec.pipeline import Effect, Pipeline
from sparsec.report.variant import Variant
from sparsec.sweep.run import DENSE, CellResult


def series_of(results: Iterable[CellResult], lowering: bool = True) -> dict[str, list[Variant]]:
    """By name of the series; those cells that gave figures. lowering: whether cells that differ in that alone are parted."""
    found: dict[str, list[Variant]] = {}
    for result in results:
        if result.figures is not None and result.spec != DENSE:
            found.setdefault(series_name(result.spec, lowering), []).append(result.figures)
    return found


def series_name(spec: str, lowering: bool = True) -> str:
    """The pruning passes without the share that they prune, and how they are lowered: `wanda 2:4, bitmap`, `magnitude, masked`."""
    try:
        passes = Pipeline.parse(spec).passes
    except SparsecError:  # a pass of somebody else's, which is not installed here
        return spec
    names = []
    for p in passes:
        if p.effect is Effect.LOSSY:
            pattern = getattr(p, "pattern", "unstructured")
            names.append(p.name if str(pattern) == "unstructured" else f"{p.name} {pattern}")
    if lowering:
        names += [str(getattr(p, "layout", "lowered")) for p in passes if p.name == "lower"] or ["masked"]
    return ", ".join(names)
