"""Sparsity: how many weights are kept, per weight, per group, in all. Zeros are what a mask took away and nobody brought back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from sparsec.ir.graph import Graph
from sparsec.pipeline.base import Context, Effect, Pass, PassResult


@dataclass(frozen=True)
class Sparsity(Pass):
    """Counts nnz of every weight; one without a mask keeps all. Tied weights are one weight and are counted once."""

    name: ClassVar[str] = "sparsity"
    examples: ClassVar[tuple[str, ...]] = ("magnitude(0.5),sparsity",)
    effect: ClassVar[Effect] = Effect.ANALYSIS
    produces: ClassVar[frozenset[str]] = frozenset({"sparsity"})

    def run(self, graph: Graph, context: Context) -> PassResult:
        """Fills `Weight.nnz`."""
        for weight in list(graph.weights.values()):
            if weight.packed is None:
                graph.update(weight.name, nnz=graph.kept(weight.name))
        total = sum(w.numel for w in graph.weights.values())
        kept = sum(w.nnz or 0 for w in graph.weights.values())
        groups = []
        for group in dict.fromkeys(w.group for w in graph.weights.values()):
            members = [w for w in graph.weights.values() if w.group == group]
            zeros = sum(w.numel - (w.nnz or 0) for w in members)
            if zeros:
                groups.append(f"{group} {100 * zeros / sum(w.numel for w in members):.2f} %")
        share = 1 - kept / total if total else 0.0
        inside = f" ({', '.join(groups)})" if groups else ""
        return PassResult(changed=False, summary=f"{100 * share:.2f} % of all {total:,} parameters are zero{inside}")
