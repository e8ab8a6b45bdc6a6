"""Freeze: the mask's zeros become zeros in the stored weight.

`where(mask, w, 0)`, since `w * mask` would keep NaN and make -0.0.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from sparsec import serial
from sparsec.cost.phase import Phase
from sparsec.ir.graph import Graph
from sparsec.pipeline.base import Context, Effect, Pass, PassResult
from sparsec.pipeline.foreseen import Foreseen
from sparsec.spill import Made


@dataclass(frozen=True)
class Freeze(Pass):
    """Writes every mask into its weight. Outputs stay bit-identical, because a graph's meaning includes its masks."""

    name: ClassVar[str] = "freeze"
    examples: ClassVar[tuple[str, ...]] = ("magnitude(0.5),freeze",)
    effect: ClassVar[Effect] = Effect.EXACT
    requires: ClassVar[frozenset[str]] = frozenset({"mask"})
    produces: ClassVar[frozenset[str]] = frozenset({"frozen"})

    def phases(self, graph: Graph, foreseen: Foreseen) -> Iterator[Phase]:
        """One weight with its zeros after the other, where it cannot be written in place."""
        for weight in graph.masked():
            copied = weight.numel * weight.dtype.itemsize if foreseen.streaming else 0
            yield Phase(
                "writing zeros",
                weight.name,
                {"a weight with its zeros": copied},
                moved=3.0 * weight.nbytes_dense,
                files=copied,
            )
            graph.update(weight.name, frozen=True)

    def run(self, graph: Graph, context: Context) -> PassResult:
        """In place where that is allowed, else into new tensors."""
        waiting = [w for w in graph.masked() if not w.frozen]
        for weight in context.each_of("freeze", waiting):
            tensor = graph.tensor(weight.name)
            assert weight.mask is not None
            if context.may_overwrite(weight.name, tensor):
                with torch.no_grad():
                    serial.masked(tensor, weight.mask, out=tensor)
            else:
                made, _ = context.store.made(f"weight {weight.name}", partial(_frozen, tensor, weight.mask))
                context.write(graph, weight.name, made["weight"])
            graph.update(weight.name, frozen=True)
        return PassResult(changed=bool(waiting), summary=f"{len(waiting)} masks written into their weights")


def _frozen(tensor: Tensor, mask: Tensor) -> Made:
    return {"weight": serial.masked(tensor.detach(), mask)}, {}
