"""Measured times of lowered layers: equal products are timed once, and enough of them that none is found in a cache."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from sparsec.ir.facts import MATRIX_KINDS
from sparsec.ir.graph import Graph
from sparsec.progress import Progress
from sparsec.timing.latency import PairTime, layer_times

COLD = (
    128 << 20
)  # packed bytes that a round goes through before it comes to the same layer again: more than caches hold
DENSITIES = 20  # layers are equal when their densities are, in steps of 1 / this
WeightNames = tuple[str, ...]  # the names of its weights


@dataclass(frozen=True)
class LayerTimes:
    """By weight. `timed` of `products` were; the others have the median of those that equal them."""

    speedups: dict[str, float]
    ms_dense: dict[str, float]  # of a fused product, the share that a weight has of its FLOPs
    ms: dict[str, float]
    timed: int
    products: int


def time_layers(
    lowered: Any,
    dense: nn.Module | None,
    rounds: int,
    progress: Progress | None = None,
    seconds: float | None = None,
    rows: int = 1,
) -> LayerTimes:
    """Times products of a lowered model against the dense modules of the same names.

    dense: None where it is gone; then the packed matrices are unpacked, one dense layer for each that is timed: zeros do not
    make a dense product faster. rows: tokens of a call.
    """
    graph: Graph = lowered.sparsec.graph
    owners = _products(graph)
    kinds: dict[WeightNames, tuple[Any, ...]] = {product: _kind(graph, product) for product in owners}
    chosen = _chosen(graph, kinds)
    with torch.no_grad():
        pairs = {
            str(i): (
                [_dense(graph, w, o) if dense is None else dense.get_submodule(o) for w, o in _each(product, owners)],
                [lowered.get_submodule(o) for o in owners[product]],
            )
            for i, product in enumerate(chosen)
        }
    found = layer_times(pairs, rounds, progress, seconds, rows)
    by_kind: dict[tuple[Any, ...], list[PairTime]] = {}
    for i, product in enumerate(chosen):
        by_kind.setdefault(kinds[product], []).append(found[str(i)])
    speedups: dict[str, float] = {}
    ms_dense: dict[str, float] = {}
    ms: dict[str, float] = {}
    for product in owners:
        same = by_kind[kinds[product]]
        before, now = median(t.dense_ms for t in same), median(t.ms for t in same)
        speedups |= dict.fromkeys(product, median(t.speedup for t in same))
        ms_dense |= _shared(before, {name: graph.weights[name].numel for name in product})
        ms |= _shared(now, {name: _multiplied(graph, name) for name in product})
    return LayerTimes(speedups, ms_dense, ms, len(chosen), len(owners))


def _multiplied(graph: Graph, name: str) -> int:
    """Values that a product multiplies by."""
    weight = graph.weights[name]
    return weight.numel if weight.packed is None else weight.packed.nnz


def _shared(ms: float, work: Mapping[str, int]) -> dict[str, float]:
    """By name, in proportion to its work; in equal parts where there is none."""
    whole = sum(work.values())
    return {name: ms * own / whole if whole else ms / len(work) for name, own in work.items()}


def _products(graph: Graph) -> dict[WeightNames, tuple[str, ...]]:
    """weights -> owners of every product that runs on kernels of sparsec, in order of execution; a weight goes once."""
    products = [op for op in graph.ops.values() if op.kind in MATRIX_KINDS]
    return {op.matrices: op.owners for op in products if any(op.kernel_of(name) for name in op.matrices)}


def _each(product: WeightNames, owners: Mapping[WeightNames, tuple[str, ...]]) -> list[tuple[str, str]]:
    return list(zip(product, owners[product], strict=True))


def _kind(graph: Graph, product: WeightNames) -> tuple[Any, ...]:
    """What makes products take the same time: shape, dtype, layout, kernel, and about the same density."""
    op = next(op for op in graph.ops.values() if op.kind in MATRIX_KINDS and op.matrices == product)
    found = []
    for name in product:
        weight = graph.weights[name]
        layout, density = "dense", 1.0
        if weight.packed is not None:
            layout, density = weight.packed.describe(), 1.0 - weight.packed.sparsity
        found.append((weight.matrix_shape, weight.dtype, layout, op.kernel_of(name), round(DENSITIES * density)))
    return tuple(found)


def _chosen(graph: Graph, kinds: Mapping[WeightNames, tuple[Any, ...]]) -> list[WeightNames]:
    """One product of each kind, then a second, ... until they hold COLD bytes; in order of execution."""
    members: dict[tuple[Any, ...], list[WeightNames]] = {}
    for product, kind in kinds.items():
        members.setdefault(kind, []).append(product)
    chosen: set[WeightNames] = set()
    held = 0
    for turn in range(max(map(len, members.values()), default=0)):
        if held >= COLD:
            break
        for same in members.values():
            if turn < len(same):
                chosen.add(same[turn])
                held += sum(graph.weights[name].nbytes for name in same[turn])
    return [product for product in kinds if product in chosen]


def _dense(graph: Graph, name: str, owner: str) -> nn.Linear:
    weight = graph.weights[name]
    matrix = weight.packed.unpack() if weight.packed is not None else graph.matrix(name)
    linear = nn.Linear(matrix.shape[1], matrix.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(matrix, requires_grad=False)
    bias = _bias(graph, owner)
    linear.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach(), requires_grad=False))
    return linear


def _bias(graph: Graph, owner: str) -> Tensor | None:
    try:
        module = graph.module.get_submodule(owner)
    except AttributeError:
        return None
    return getattr(module, "bias", None)
