"""Magnitude pruning: the smallest |W| go (Han et al. 2015, arXiv:1506.02626).

Global scope compares all layers with each other, as in Gale et al. 2019, arXiv:1902.09574.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from sparsec.cost.phase import Looked, Phase
from sparsec.errors import SpecError
from sparsec.ir.facts import Weight
from sparsec.ir.graph import Graph
from sparsec.patterns import SEARCH, Compared, Pattern
from sparsec.pipeline.allocation import Share, stored_mask
from sparsec.pipeline.base import Context, PassResult
from sparsec.pipeline.foreseen import Foreseen
from sparsec.pipeline.options import check_choice
from sparsec.pipeline.pruning import PruningPass
from sparsec.spill import Made

SCOPES = ("global", "layer", "row")
TRIED = 1 << 20
"""Weights of the piece that tells how long the choice of a mask takes."""


@dataclass(frozen=True)
class Magnitude(PruningPass):
    """Masks exactly `round(sparsity * n)` weights of the smallest magnitude; ties fall by position, the earlier first.

    scope: which weights are compared with each other: `global` all selected ones (the default, unless an allocation says how sparse
    each layer shall be), `layer` those of one matrix, `row` those of one output; N:M compares each group of M whatever the scope.
    What an earlier mask removed counts towards the target and stays removed.
    """

    name: ClassVar[str] = "magnitude"
    examples: ClassVar[tuple[str, ...]] = (
        "magnitude(0.5)",
        "magnitude(0.5, scope='layer')",
        "magnitude(0.5, scope='row')",
    )

    scope: str | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scope is not None:
            check_choice(self.scope, "scope", SCOPES)
        if self.scope == "global" and self.sharing not in ("uniform", "global"):
            raise SpecError(
                f"scope='global' compares all layers with each other, so nothing is left to allocate by {self.allocation!r}; "
                "leave one out"
            )
        if self.scope == "row" and Pattern.parse(self.pattern).block is not None:
            raise SpecError("a block spans rows, so scope='row' cannot choose among blocks; use scope='layer'")

    def run(self, graph: Graph, context: Context) -> PassResult:
        """Raises WeightError for NaN, inf and shapes that the pattern does not fit, SelectionError for what matches nothing."""
        chosen = self.selected(graph)
        shares = self.settled_shares(graph, chosen, context)
        known = all(context.store.has(f"mask {w.name}") for w in chosen)
        masks = iter(()) if known else self._masks(graph, chosen, shares, context)
        for weight in context.each_of("magnitude", chosen):
            mask = [next(masks) for _ in graph.matrices(weight.name)] if not known else []
            made = partial(_stored, weight, mask)
            tensors, _ = context.store.made(f"mask {weight.name}", made)
            self.record(graph, weight, tensors["mask"], self.pruned(shares[weight.name]))
        how = f"{self.pattern}" if Pattern.parse(self.pattern).nm is not None else f"scope {self._scope}"
        return self.result(graph, chosen, how)

    def phases(self, graph: Graph, foreseen: Foreseen) -> Iterator[Phase]:
        """A mask is chosen for one weight after the other; what is kept of it is the mask."""
        chosen = self.fitting(graph)
        pattern = Pattern.parse(self.pattern)
        for weight in chosen:
            per_weight = pattern.scratch(weight.dtype.itemsize, weight.mask is not None)
            yield Phase(
                "choosing",
                weight.name,
                {"a mask and what it takes to choose it": int(per_weight * weight.numel) + SEARCH},
                sample=Looked(f"mask {self.pattern}", partial(_tried, pattern, self.share), weight.numel / TRIED),
                files=weight.numel,
            )
        self.foresee(graph, chosen, foreseen)

    @property
    def _scope(self) -> str:
        """As given, or what the allocation leaves."""
        return self.scope or ("global" if self.allocation is None else "layer")

    def _masks(
        self, graph: Graph, chosen: list[Weight], shares: dict[str, Share], context: Context
    ) -> Iterator[Tensor]:
        """Of each matrix [out, in] of each weight, one after the other."""
        pattern = Pattern.parse(self.pattern)
        if self._scope == "global" and pattern.nm is None:
            matrices = [m for w in chosen for m in graph.matrices(w.name)]
            old: list[Tensor | None] = [m for w in chosen for m in graph.mask_matrices(w.name)]
            yield from pattern.masks([partial(_same, m) for m in matrices], self.share, old)
            return
        compared: Compared = "row" if self._scope == "row" else "layer"
        for weight in chosen:
            for matrix, before in zip(graph.matrices(weight.name), graph.mask_matrices(weight.name), strict=True):
                yield pattern.mask(matrix, shares[weight.name].sparsity, before, compared)


def _tried(pattern: Pattern, share: float) -> Tensor:
    return pattern.mask(torch.randn(1024, TRIED // 1024), share)


def _same(matrix: Tensor) -> Tensor:
    return matrix


def _stored(weight: Weight, masks: list[Tensor]) -> Made:
    return {"mask": stored_mask(weight, masks)}, {}
