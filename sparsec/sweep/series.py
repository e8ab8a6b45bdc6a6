"""What a study's cells have in common: cells of one series differ in how much they prune, and in nothing else."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import MISSING, fields

from sparsec.errors import SparsecError
from sparsec.pipeline import Effect, Pass, Pipeline
from sparsec.report.variant import Variant
from sparsec.sweep.run import DENSE, CellResult

SHORT = ("pattern", "layout")
"""Options that are named by their value alone."""


def series_of(results: Iterable[CellResult], lowering: bool = True) -> dict[str, list[Variant]]:
    """By name of the series; those cells that gave figures. lowering: whether cells that differ in that alone are parted."""
    found: dict[str, list[Variant]] = {}
    for result in results:
        if result.figures is not None and result.spec != DENSE:
            found.setdefault(series_name(result.spec, lowering), []).append(result.figures)
    return found


def series_name(spec: str, lowering: bool = True) -> str:
    """The passes that change what is computed, without the share that they prune: `wanda 2:4, bitmap`, `magnitude, masked`."""
    try:
        passes = Pipeline.parse(spec).passes
    except SparsecError:  # a pass of somebody else's, which is not installed here
        return spec
    names = [_named(p) for p in passes if p.effect is Effect.LOSSY]
    if lowering:
        names += [_named(p) for p in passes if p.effect is Effect.NUMERIC] or ["masked"]
    return ", ".join(names)


def _named(p: Pass) -> str:
    """`lower` goes by its layout. Options that have their defaults are left out."""
    words = [] if p.name == "lower" else [p.name]
    for option in fields(p):
        value = getattr(p, option.name)
        default = option.default if option.default_factory is MISSING else option.default_factory()
        if option.name == "sparsity" or (value == default and not (p.name == "lower" and option.name == "layout")):
            continue
        words.append(str(value) if option.name in SHORT else f"{option.name}={value}")
    return " ".join(words)
