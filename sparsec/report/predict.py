"""What the cost model expects of a graph's products, for one decoded token, or for as many as an encoder reads at once: in
seconds, dense as they came and as they are now."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from sparsec.cost.choice import TORCH
from sparsec.cost.constants import Constants, machine_constants
from sparsec.cost.model import Roof, Work
from sparsec.ir.facts import MATRIX_KINDS, Op, Weight
from sparsec.ir.graph import Graph
from sparsec.lowering.setting import unpredicted


@dataclass(frozen=True)
class Predicted:
    """One executed product; of a fused one all its weights together, since they share its call."""

    weights: tuple[str, ...]
    dense: float  # seconds with F.linear, one call each
    seconds: float  # as it is executed now
    binds: tuple[Roof, ...]  # by weight
    shares: tuple[float, ...]  # of the seconds, by weight, in proportion to its FLOPs

    @property
    def speedup(self) -> float:
        """Dense / now."""
        return self.dense / self.seconds


def known_constants(graph: Graph) -> Constants | None:
    """What is known of this machine without measuring; None where nothing is, or the cost model has nothing to say."""
    weights = [w for w in graph.weights.values() if graph.is_linear(w.name)]
    devices = sorted({_device(graph, w) for w in weights})
    if not weights or unpredicted(devices):
        return None
    dtypes = list(dict.fromkeys(w.dtype for w in weights))
    found = machine_constants(dtypes, device=devices[0], measuring=False)
    return None if found is None else found.constants


def predict(graph: Graph, known: Constants | None, rows: int = 1) -> tuple[Predicted, ...]:
    """Every product whose constants are known, in order of execution. rows: tokens of a call."""
    if known is None:
        return ()
    products = [op for op in graph.ops.values() if op.kind in MATRIX_KINDS and op.matrices]
    working_set = sum(graph.weights[name].nbytes for name in dict.fromkeys(n for op in products for n in op.matrices))
    found = (_product(graph, op, known, working_set, rows) for op in products)
    return tuple(p for p in found if p is not None)


def by_weight(predicted: Iterable[Predicted]) -> dict[str, tuple[float, Roof, float]]:
    """(speedup, the roof that binds, milliseconds now) of every weight."""
    return {
        name: (p.speedup, roof, 1e3 * p.seconds * share)
        for p in predicted
        for name, roof, share in zip(p.weights, p.binds, p.shares, strict=True)
    }


def _product(graph: Graph, op: Op, known: Constants, working_set: int, rows: int) -> Predicted | None:
    dense = seconds = 0.0
    calls: list[float] = []
    binds: list[Roof] = []
    kept: list[int] = []
    for name in op.matrices:
        weight = graph.weights[name]
        work, kernel = _work(weight), op.kernel_of(name) or TORCH
        cost = known.cost(kernel, weight.format, weight.dtype)
        before = known.predict(TORCH, "dense", weight.dtype, Work.dense(*weight.matrix_shape, weight.dtype), rows)
        now = known.predict(kernel, weight.format, weight.dtype, work, rows, working_set)
        if cost is None or before is None or now is None or _device(graph, weight) != known.key.device:
            return None
        dense, seconds = dense + before.seconds, seconds + now.seconds
        calls.append(cost.call)
        binds.append(now.binds)
        kept.append(weight.numel if weight.packed is None else weight.packed.nnz)
    # One call serves all; each of the others is still a module that is called and a matrix that is looked at.
    shared = 0.0 if known.member is None else max(0.0, sum(calls) - max(calls) - known.member * (len(calls) - 1))
    shares = tuple(own / sum(kept) if sum(kept) else 1 / len(kept) for own in kept)
    return Predicted(op.matrices, dense, seconds - shared, tuple(binds), shares)


def _work(weight: Weight) -> Work:
    return Work.dense(*weight.matrix_shape, weight.dtype) if weight.packed is None else Work.of(weight.packed)


def _device(graph: Graph, weight: Weight) -> str:
    held = graph.tensor(weight.name) if weight.packed is None else weight.packed.values
    return held.device.type
