"""Magnitude pruning: the smallest |W| go (Han et al. 2015, arXiv:1506.02626).

Global scope compares all layers with each other, as in Gale et al. 2019, arXiv:1902.09574.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar

from torch import Tensor

from sparsec.errors import SpecError
from sparsec.ir.facts import Pruned, Weight
from sparsec.ir.graph import Graph
from sparsec.patterns import Pattern, blocks, unstructured, unstructured_rows
from sparsec.pipeline.base import Context, PassResult
from sparsec.pipeline.options import check_choice
from sparsec.pipeline.pruning import PruningPass

SCOPES = ("global", "layer", "row")


@dataclass(frozen=True)
class Magnitude(PruningPass):
    """Masks exactly `round(sparsity * n)` weights of the smallest magnitude; ties fall by position, the earlier first.

    scope: which weights are compared with each other: `global` all selected ones, `layer` those of one matrix, `row` those of one
    output; N:M compares each group of M whatever the scope. What an earlier mask removed counts towards the target and stays
    removed.
    """

    name: ClassVar[str] = "magnitude"

    scope: str = field(default="global", kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self.scope, "scope", SCOPES)
        if self.scope == "row" and Pattern.parse(self.pattern).block is not None:
            raise SpecError("a block spans rows, so scope='row' cannot choose among blocks; use scope='layer'")

    def run(self, graph: Graph, context: Context) -> PassResult:
        """Raises WeightError for NaN, inf and shapes that the pattern does not fit, SelectionError for what matches nothing."""
        chosen = self.selected(graph)
        masks = self._masks(graph, chosen, context)
        for weight, mask in zip(chosen, masks, strict=True):
            self.record(graph, weight, mask, Pruned(self.name, self.share))
        how = f"{self.pattern}" if Pattern.parse(self.pattern).nm is not None else f"scope {self.scope}"
        return self.result(graph, chosen, how)

    def _masks(self, graph: Graph, chosen: list[Weight], context: Context) -> list[Tensor]:
        """Of each weight [out, in]."""
        pattern = Pattern.parse(self.pattern)
        scores = [partial(graph.matrix, w.name) for w in chosen]
        old = [graph.mask_matrix(w.name) for w in chosen]
        if self.scope == "global" and pattern.nm is None:
            return (
                blocks(scores, self.share, old, pattern.block)
                if pattern.block
                else unstructured(scores, self.share, old)
            )
        masks = []
        for i, (score, before) in enumerate(zip(scores, old, strict=True)):
            context.step("magnitude", i, len(chosen))
            if self.scope == "row" and pattern.nm is None:
                masks.append(unstructured_rows(score(), self.share, before))
            else:
                masks.append(pattern.mask(score(), self.share, before))
        return masks
