"""A pass of your own: a frozen dataclass. Its fields are its options; its class says what it needs, gives and breaks.

This one prunes at random, the baseline that every pruning method has to beat. An installed package can offer its passes
by name through the entry-point group `sparsec.passes`; then "random_mask(0.5, seed=1)" works on the command line too.

    python examples/write_a_pass.py [MODEL]
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

import sparsec
from sparsec.data import load_model
from sparsec.patterns import Pattern
from sparsec.pipeline import select_weights
from sparsec.pipeline.options import check_sparsity


@dataclass(frozen=True)
class RandomMask(sparsec.Pass):
    """Masks exactly `round(sparsity * n)` of each attention and MLP weight, at random."""

    name: ClassVar[str] = "random_mask"
    effect: ClassVar[sparsec.Effect] = sparsec.Effect.LOSSY  # the verifier holds a pass to what it declares
    produces: ClassVar[frozenset[str]] = frozenset({"mask", "pattern"})
    invalidates: ClassVar[frozenset[str]] = frozenset({"frozen", "sparsity", "flops"})
    excludes: ClassVar[frozenset[str]] = frozenset({"lowered"})  # what is packed has no dense weight left to prune

    sparsity: float
    seed: int = field(default=0, kw_only=True)

    def __post_init__(self) -> None:
        check_sparsity(self.sparsity)

    def run(self, graph: sparsec.Graph, context: sparsec.Context) -> sparsec.PassResult:
        chosen = select_weights(graph, None, ())
        for i, weight in enumerate(chosen):
            context.step(self.name, i, len(chosen))
            mask = Pattern().mask(self._scores(weight.shape, i), self.sparsity, weight.mask)
            graph.update(weight.name, mask=mask, pattern="unstructured", frozen=False, nnz=None)
        return sparsec.PassResult(changed=bool(chosen), summary=f"{len(chosen)} matrices masked at random")

    def _scores(self, shape: tuple[int, ...], index: int) -> Tensor:
        return torch.rand(shape, generator=torch.Generator().manual_seed(1000 * self.seed + index))


def main(name: str = "tiny") -> nn.Module:
    model = load_model(name).model
    # verify="probe" runs the graph before and after each pass and holds the pass to its declared effect.
    passes = [RandomMask(0.5, seed=1), "freeze,sparsity,flops,lower(csr)"]
    compiled = sparsec.compile(model, passes=passes, verify="probe")
    for record in compiled.sparsec.records:
        print(f"{record.spec:>24}  {record.effect.value:<8}  {record.summary}")
    return compiled


if __name__ == "__main__":
    main(*sys.argv[1:])
