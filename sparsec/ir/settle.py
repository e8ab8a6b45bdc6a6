"""Weights change after they were pruned: training, merged adapters, loaded states. Here records are made true of them again.

Every pipeline starts with it, and every report is made of records that went through it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from sparsec import serial
from sparsec.errors import SpecError, some
from sparsec.ir.facts import Pruned, Rounded, Weight
from sparsec.ir.foreign import quantised_kind
from sparsec.ir.graph import Graph
from sparsec.patterns import Pattern

COUNTED = frozenset({"sparsity", "flops"})
"""Facts that are counts of what is kept."""
_NO_MASK: dict[str, Any] = {
    "mask": None,
    "pattern": None,
    "frozen": False,
    "grown": 0,
    "nnz": None,
    "pruned": None,
    "rounded": None,
}


def settle(graph: Graph) -> tuple[str, ...]:
    """Makes every record true of its weight as it is now; returns what the user should know.

    What came back under a frozen mask is kept from here on, and what was counted and measured before is dropped. A mask that no
    longer has its pattern is unstructured. One of another shape than its weight goes, and one of a weight that was quantised. A
    weight that no longer holds the numbers that it was rounded to counts as not rounded.
    """
    grown: list[tuple[Weight, int]] = []
    patterns: list[str] = []
    misfits: list[str] = []
    quantised: list[str] = []
    moved: list[Weight] = []
    for weight in list(graph.weights.values()):
        if weight.packed is not None:
            continue
        tensor = graph.tensor(weight.name)
        told = weight.mask is not None or weight.rounded is not None
        if told and (kind := quantised_kind(tensor)):
            quantised.append(f"{weight.name} is a {kind} now")
            graph.update(weight.name, **_NO_MASK)
            continue
        graph.update(weight.name, dtype=tensor.dtype, shape=tuple(tensor.shape))
        if weight.mask is not None and weight.mask.shape != tensor.shape:
            misfits.append(f"{weight.name} is {_sizes(tensor)} now, its mask {_sizes(weight.mask)}")
            graph.update(weight.name, **_NO_MASK)
            continue
        if not told or tensor.is_meta:  # it holds no values
            continue
        if weight.mask is not None:
            graph.update(weight.name, mask=weight.mask.to(tensor.device))
        if weight.rounded is not None and not _settle_rounded(graph, weight, weight.rounded):
            moved.append(weight)
        if weight.mask is None:
            continue
        more = graph.kept(weight.name) - serial.count(weight.mask)
        if more:
            grown.append((weight, more))
            if _take(graph, weight, more):
                patterns.append(f"{weight.name} lost its pattern {weight.pattern}")
    if grown or misfits or quantised:
        graph.forget(COUNTED)
    return (
        *_grown_text(grown, patterns),
        *_misfit_text(misfits),
        *_quantised_text(quantised),
        *_moved_text(moved),
    )


def _take(graph: Graph, weight: Weight, more: int) -> bool:
    """Writes down that `more` values came back; returns whether the mask lost its pattern by that."""
    mask = graph.mask(weight.name)
    graph.update(weight.name, mask=mask, grown=weight.grown + more, nnz=None, pruned=_unmeasured(weight))
    lost = not _holds(weight.pattern, graph.mask_matrices(weight.name))
    if lost:
        graph.update(weight.name, pattern="unstructured")
    return lost


def _settle_rounded(graph: Graph, weight: Weight, rounded: Rounded) -> bool:
    """Whether a weight still holds the numbers that it was rounded to; if not, nothing says so any more."""
    graph.update(weight.name, rounded=rounded.to(graph.tensor(weight.name).device))
    holds = graph.rounded(weight.name) is not None
    if not holds:
        graph.update(weight.name, rounded=None)
    return holds


def _unmeasured(weight: Weight) -> Pruned | None:
    """The errors were those of the weight as it was."""
    return None if weight.pruned is None else replace(weight.pruned, error_masked=None, error=None)


def _holds(pattern: str | None, masks: Sequence[Tensor | None]) -> bool:
    """Whether masks [out, in] have a pattern; of one that nobody here can read nothing is said."""
    try:
        known = Pattern.parse(pattern or "unstructured")
    except SpecError:
        return True
    return all(known.holds(mask) for mask in masks if mask is not None)


def _grown_text(grown: Sequence[tuple[Weight, int]], patterns: Sequence[str]) -> list[str]:
    if not grown:
        return []
    total = sum(more for _, more in grown)
    where = some([f"{more:,} in {weight.name}" for weight, more in grown])
    lost = f" ({some(patterns)})" if patterns else ""
    return [
        f"{total:,} pruned values are no longer zero and count as kept: {where}{lost}. They came back after freeze, by training, a "
        "merged adapter or a loaded state. Prune again to be rid of them; sparsec.masked(model) keeps the zeros of a model that is "
        "to be trained. The zeros that a loaded state has are found by the pass 'zeros'"
    ]


def _misfit_text(misfits: Sequence[str]) -> list[str]:
    if not misfits:
        return []
    return [f"masks that do not fit their weights are dropped: {some(misfits)}. Compile the model again"]


def _quantised_text(quantised: Sequence[str]) -> list[str]:
    if not quantised:
        return []
    return [
        f"weights that were quantised count as dense, their masks are dropped: {some(quantised)}. Report on the model, or lower "
        "it, before it is quantised"
    ]


def _moved_text(moved: Sequence[Weight]) -> list[str]:
    if not moved:
        return []
    names = some([f"{w.name} ({w.rounded.values})" for w in moved if w.rounded is not None])
    return [
        f"weights that were rounded hold other numbers now: {names}. They were trained, merged or loaded since. The pass 'round' "
        "rounds them again; lower(..., values=) takes the nearest numbers"
    ]


def _sizes(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape))
