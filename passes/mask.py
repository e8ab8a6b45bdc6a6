"""Mask: takes masks that the user gives (`sparsec.compile(..., masks={name: bool tensor})`)."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sparsec import serial
from sparsec.cost.phase import Phase
from sparsec.errors import MaskError
from sparsec.ir.facts import Weight
from sparsec.ir.graph import Graph
from sparsec.pipeline.base import Context, Effect, Pass, PassResult
from sparsec.pipeline.foreseen import Foreseen
from sparsec.pipeline.selection import check_dtype


@dataclass(frozen=True)
class Mask(Pass):
    """Sets the masks given to `compile`: name -> bool tensor, True where a weight is kept.

    A name is a weight's (`model.layers.0.mlp.up_proj.weight`) or its module's. The shape is the stored weight's. An earlier mask
    is intersected.
    """

    name: ClassVar[str] = "mask"
    examples: ClassVar[tuple[str, ...]] = ("mask",)
    effect: ClassVar[Effect] = Effect.LOSSY
    produces: ClassVar[frozenset[str]] = frozenset({"mask", "pattern"})
    invalidates: ClassVar[frozenset[str]] = frozenset({"frozen", "sparsity", "flops"})
    excludes: ClassVar[frozenset[str]] = frozenset({"lowered"})

    wants: ClassVar[str] = "masks of your own (masks= in Python)"

    def phases(self, graph: Graph, foreseen: Foreseen) -> Iterator[Phase]:
        """Raises MaskError: masks are given to a run, not to a plan."""
        raise MaskError(
            "the pass 'mask' takes masks of yours, which a plan does not know; plan with magnitude(SPARSITY) in its place"
        )

    def run(self, graph: Graph, context: Context) -> PassResult:
        """Raises MaskError: no masks given, an unknown name, a weight of no linear layer, a wrong dtype, shape or device."""
        if not context.masks:
            raise MaskError(
                "the pass 'mask' needs masks: sparsec.compile(model, passes='mask,freeze,...', masks={name: tensor})"
            )
        total = zeros = 0
        found: dict[str, str] = {}
        for given, mask in context.masks.items():
            weight = _find(graph, given)
            if weight.name in found:
                raise MaskError(
                    f"masks: {found[weight.name]!r} and {given!r} name the same weight, {weight.name}; give one mask"
                )
            found[weight.name] = given
            _check(graph, given, weight, mask)
        for given, mask in context.masks.items():  # nothing is changed before everything is checked
            weight = _find(graph, given)
            old = graph.mask(weight.name)
            kept = mask.clone() if old is None else mask & old
            graph.put_mask(weight.name, kept)
            total += kept.numel()
            zeros += kept.numel() - serial.count(kept)
        share = zeros / total if total else 0.0
        return PassResult(
            changed=True,
            summary=f"{zeros:,} of {total:,} weights in {len(found)} matrices masked ({100 * share:.2f} %, given)",
        )


def _find(graph: Graph, given: str) -> Weight:
    for weight in graph.weights.values():
        if given in (weight.name, *weight.aliases):
            return weight
    matrices = [w for w in graph.weights.values() if graph.is_linear(w.name) and given in w.owners]
    if matrices:
        return matrices[0]
    names = [w.name for w in graph.weights.values() if graph.prunable(w.name)]
    near = difflib.get_close_matches(given, names, n=3, cutoff=0.3) or names[:3]
    raise MaskError(f"masks: no weight or module is called {given!r}; near names: {', '.join(map(repr, near))}")


def _check(graph: Graph, given: str, weight: Weight, mask: Tensor) -> None:
    if not graph.prunable(weight.name):
        raise MaskError(f"masks: {given!r} is no weight of a linear layer (kind {weight.kind}, group {weight.group})")
    check_dtype(weight)
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise MaskError(
            f"masks: {given!r} must be a bool tensor, True where a weight is kept, got {got}; use mask.bool()"
        )
    if tuple(mask.shape) != weight.shape:
        hint = "; it is stored as [in, out]" if weight.transposed else ""
        raise MaskError(
            f"masks: {given!r} has shape {tuple(mask.shape)}, but the weight is stored as {weight.shape}{hint}"
        )
    device = graph.tensor(weight.name).device
    if mask.device != device:
        raise MaskError(
            f"masks: {given!r} is on {mask.device}, but the weight is on {device}; use mask.to({str(device)!r})"
        )
