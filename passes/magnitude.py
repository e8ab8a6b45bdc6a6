"""Magnitude pruning: the smallest |W| go (Han et al. 2015, arXiv:1506.02626).

Global scope compares all layers with each other, as in Gale et al. 2019, arXiv:1902.09574.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from sparsec.errors import WeightError
from sparsec.ir.facts import Weight
from sparsec.ir.graph import Graph
from sparsec.patterns import CHUNK, unstructured, unstructured_rows
from sparsec.pipeline.base import Context, Effect, Pass, PassResult
from sparsec.pipeline.options import check_choice, check_ignore, check_patterns, check_sparsity
from sparsec.pipeline.selection import select

SCOPES = ("global", "layer", "row")


@dataclass(frozen=True)
class Magnitude(Pass):
    """Masks exactly `round(sparsity * n)` weights of the smallest magnitude; ties fall by position, the earlier first.

    scope: which weights are compared with each other: `global` all selected ones, `layer` those of one matrix, `row` those of one
    output. What an earlier mask removed counts towards the target and stays removed.
    """

    name: ClassVar[str] = "magnitude"
    effect: ClassVar[Effect] = Effect.LOSSY
    produces: ClassVar[frozenset[str]] = frozenset({"mask", "pattern"})
    invalidates: ClassVar[frozenset[str]] = frozenset({"frozen", "sparsity", "flops"})
    excludes: ClassVar[frozenset[str]] = frozenset({"lowered"})

    sparsity: float
    scope: str = field(default="global", kw_only=True)
    targets: tuple[str, ...] | None = field(default=None, kw_only=True)
    ignore: tuple[str, ...] = field(default=(), kw_only=True)

    def __post_init__(self) -> None:
        object.__setattr__(self, "sparsity", check_sparsity(self.sparsity))
        check_choice(self.scope, "scope", SCOPES)
        object.__setattr__(self, "targets", check_patterns(self.targets, "targets"))
        object.__setattr__(self, "ignore", check_ignore(self.ignore))

    def run(self, graph: Graph, context: Context) -> PassResult:
        """Raises WeightError for NaN or inf, SelectionError for patterns that match nothing."""
        chosen = select(graph, self.targets, self.ignore)
        for weight in chosen:
            _check_finite(graph.tensor(weight.name), weight)
        masks = self._masks(graph, chosen, context)
        for weight, mask in zip(chosen, masks, strict=True):
            graph.update(weight.name, mask=mask, pattern="unstructured", frozen=False, nnz=None)
        total = sum(w.numel for w in chosen)
        zeros = total - sum(int(m.count_nonzero()) for m in masks)
        share = zeros / total if total else 0.0
        return PassResult(
            changed=bool(chosen),
            summary=f"{zeros:,} of {total:,} weights in {len(chosen)} matrices masked ({100 * share:.2f} %, scope {self.scope})",
        )

    def _masks(self, graph: Graph, chosen: list[Weight], context: Context) -> list[Tensor]:
        if self.scope == "global":
            scores = [partial(graph.tensor, w.name) for w in chosen]
            return unstructured(scores, self.sparsity, [w.mask for w in chosen])
        masks = []
        for i, weight in enumerate(chosen):
            context.step("magnitude", i, len(chosen))
            if self.scope == "layer":
                masks += unstructured([partial(graph.tensor, weight.name)], self.sparsity, [weight.mask])
            else:
                mask = unstructured_rows(graph.matrix(weight.name), self.sparsity, graph.mask_matrix(weight.name))
                masks.append(mask.t().contiguous() if weight.kind == "conv1d" else mask)
        return masks


def _check_finite(tensor: Tensor, weight: Weight) -> None:
    # A piece at a time: isfinite of a whole weight would take more scratch than the threshold search.
    parts = torch.split(tensor.detach().reshape(-1), CHUNK)
    bad = sum(int(part.isfinite().logical_not().count_nonzero()) for part in parts)
    if bad:
        where = weight.owners[0] if weight.owners else weight.name
        raise WeightError(
            f"{weight.name}: holds {bad} NaN or inf among {tensor.numel()} values, which have no magnitude to compare; "
            f"repair the checkpoint, or leave it out with ignore=({where!r},)"
        )
