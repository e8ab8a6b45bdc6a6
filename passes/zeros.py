"""Zeros: takes the zeros that a checkpoint already holds as the mask. For models that were pruned elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar

from sparsec import serial
from sparsec.cost.phase import Phase
from sparsec.ir.graph import Graph
from sparsec.pipeline.base import Context, Effect, Pass, PassResult
from sparsec.pipeline.foreseen import Foreseen
from sparsec.pipeline.options import check_ignore, check_patterns
from sparsec.pipeline.selection import select_weights
from sparsec.spill import Made


@dataclass(frozen=True)
class Zeros(Pass):
    """Masks the entries that are 0.0 or -0.0 (pruning by `w * mask` leaves -0.0). NaN and inf are kept.

    EXACT: what is masked is zero already. An earlier mask stays.
    """

    name: ClassVar[str] = "zeros"
    examples: ClassVar[tuple[str, ...]] = ("zeros",)
    effect: ClassVar[Effect] = Effect.EXACT
    produces: ClassVar[frozenset[str]] = frozenset({"mask", "pattern"})
    invalidates: ClassVar[frozenset[str]] = frozenset({"frozen", "sparsity", "flops"})
    excludes: ClassVar[frozenset[str]] = frozenset({"lowered"})

    targets: tuple[str, ...] | None = field(default=None, kw_only=True)
    ignore: tuple[str, ...] = field(default=(), kw_only=True)

    def __post_init__(self) -> None:
        object.__setattr__(self, "targets", check_patterns(self.targets, "targets"))
        object.__setattr__(self, "ignore", check_ignore(self.ignore))

    def phases(self, graph: Graph, foreseen: Foreseen) -> Iterator[Phase]:
        """How many zeros a checkpoint holds is not known from shapes: none is taken for granted."""
        chosen = select_weights(graph, self.targets, self.ignore)
        for weight in chosen:
            yield Phase("looking for zeros", weight.name, {"a mask": 2 * weight.numel}, files=weight.numel)
        foreseen.granted(
            f"{self.name}: the zeros of the checkpoint are not known without its weights; as if there were none"
        )
        foreseen.pruned(graph, dict.fromkeys((w.name for w in chosen), 0.0), "unstructured")

    def run(self, graph: Graph, context: Context) -> PassResult:
        """Raises SelectionError for patterns that match nothing."""
        chosen = select_weights(graph, self.targets, self.ignore)
        total = zeros = 0
        for weight in context.each_of("zeros", chosen):
            mask = context.store.made(f"mask {weight.name}", partial(_mask, graph, weight.name))[0]["mask"]
            graph.put_mask(weight.name, mask)
            total += mask.numel()
            zeros += mask.numel() - serial.count(mask)
        share = zeros / total if total else 0.0
        notes: tuple[str, ...] = ()
        if share < 0.05:
            notes = (
                f"the checkpoint holds only {100 * share:.2f} % zeros in these weights, which no format turns into speed; "
                "prune it first, for instance with magnitude(0.5)",
            )
        return PassResult(
            changed=bool(chosen),
            summary=f"{zeros:,} of {total:,} weights in {len(chosen)} matrices are zero ({100 * share:.2f} %)",
            notes=notes,
        )


def _mask(graph: Graph, name: str) -> Made:
    mask, old = serial.present(graph.tensor(name).detach()), graph.mask(name)
    return {"mask": mask if old is None else mask.logical_and_(old)}, {}
