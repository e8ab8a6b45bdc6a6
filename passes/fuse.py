"""Fuse: linears that read the same value (q, k and v; gate and up) become one product, found in the dataflow, not by name.

Why: at one token a small product costs little more than its call and the waking of the threads, which one call pays once.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import fx

from sparsec import private
from sparsec.cost.phase import Phase
from sparsec.ir.facts import Op
from sparsec.ir.graph import Graph
from sparsec.lowering import dense_readers, fuse_products
from sparsec.lowering.fuse import bias_of
from sparsec.pipeline.base import Context, Effect, Pass, PassResult
from sparsec.pipeline.foreseen import Foreseen
from sparsec.pipeline.options import check_ignore, check_patterns
from sparsec.pipeline.selection import select_weights
from sparsec.private import OpOverload

_Key = tuple[fx.Node, str, torch.dtype, int]


@dataclass(frozen=True)
class Fuse(Pass):
    """Makes one product of all selected linears that read the very same value, are of one group and dtype, and own their weight.

    Every weight stays a weight of its own: masks, formats and rows of the report are per weight, before and after. targets and
    ignore select linears; by default all. With or without masks, before `lower`.
    """

    name: ClassVar[str] = "fuse"
    examples: ClassVar[tuple[str, ...]] = ("fuse",)
    effect: ClassVar[Effect] = Effect.NUMERIC
    excludes: ClassVar[frozenset[str]] = frozenset({"lowered"})

    targets: tuple[str, ...] | None = field(default=None, kw_only=True)
    ignore: tuple[str, ...] = field(default=(), kw_only=True)

    def __post_init__(self) -> None:
        object.__setattr__(self, "targets", check_patterns(self.targets, "targets"))
        object.__setattr__(self, "ignore", check_ignore(self.ignore))

    def phases(self, graph: Graph, foreseen: Foreseen) -> Iterator[Phase]:
        """Products change, and no tensor does."""
        yield from ()

    def run(self, graph: Graph, context: Context) -> PassResult:
        """Raises SelectionError for patterns that match nothing."""
        places = {name: graph.tensor(name).device.type for name in self._chosen(graph)}
        chosen = {name for name, device in places.items() if device == "cpu"}
        elsewhere = sorted(set(places.values()) - {"cpu"})
        notes = [f"nothing on {device} is fused: every product is a kernel of its own there" for device in elsewhere]
        fused = count = 0
        for products in self._candidates(graph, chosen).values():
            if len(products) < 2:
                continue
            reasons = {op.node: _reason(graph, op, context) for op in products}
            notes += [
                f"{op.owner or 'the root module'} is not fused with the linears that read the same value: {reasons[op.node]}"
                for op in products
                if reasons[op.node]
            ]
            members = [op for op in products if not reasons[op.node]]
            if len(members) > 1:
                fuse_products(graph, members)
                fused, count = fused + 1, count + len(members)
        graph.module.graph.lint()
        graph.module.recompile()
        return PassResult(
            changed=fused > 0,
            summary=f"{count} linears became {fused} products"
            if fused
            else "no two linears read the same value, so nothing was fused",
            notes=tuple(notes),
        )

    def _candidates(self, graph: Graph, chosen: Collection[str]) -> dict[_Key, list[Op]]:
        """Linears by what they must share, in order of execution."""
        nodes = {node.name: node for node in graph.module.graph.nodes}
        writes = _writes_before(graph.module.graph)
        found: dict[_Key, list[Op]] = {}
        for op in graph.ops.values():
            node = nodes[op.node]
            if op.kind != "linear" or node.target is not torch.ops.aten.linear.default:
                continue
            x = node.args[0]
            if isinstance(x, fx.Node) and op.weights and op.weights[0] in chosen:
                key = (x, op.group, graph.weights[op.weights[0]].dtype, writes[node])
                found.setdefault(key, []).append(op)
        return found

    def _chosen(self, graph: Graph) -> set[str]:
        linears = [w for w in graph.weights.values() if graph.is_linear(w.name)]
        if self.targets is None and not self.ignore:
            return {w.name for w in linears}
        everything = self.targets or tuple(dict.fromkeys(w.group for w in linears))
        return {w.name for w in select_weights(graph, everything, self.ignore)}


def _reason(graph: Graph, op: Op, context: Context) -> str:
    """Why a linear cannot be part of a fused product, "" when it can."""
    weight = graph.weights[op.weights[0]]
    node = graph.node(op.node)
    if reason := context.unswappable.get(weight.name) or context.keep_dense.get(weight.name):
        return reason
    if len(graph.products_of(weight.name)) > 1:
        return "its weight is multiplied by more than once"
    if others := dense_readers(graph, weight.name):
        return f"its weight is also read by %{', %'.join(others)}"
    if weight.name != f"{op.owner}.weight" or weight.aliases:
        return f"its weight is {', '.join((weight.name, *weight.aliases))}, not that of its own module alone"
    if not isinstance(node.args[1], fx.Node) or node.args[1].op != "get_attr":
        return "its weight passes through another operation first"
    bias = bias_of(node)
    if bias is not None and bias.op != "get_attr":
        return "its bias is computed"
    if not graph.tensor(weight.name).is_contiguous():
        return "the rows of its weight do not lie one after the other in memory"
    return ""


def _writes_before(graph: fx.Graph) -> dict[fx.Node, int]:
    """For each node, how many nodes before it may write to a tensor in place: linears around one do not see the same value."""
    count, found = 0, {}
    for node in graph.nodes:
        found[node] = count
        count += _may_write(node.target) if node.op == "call_function" else 0
    return found


def _may_write(target: Any) -> bool:
    if isinstance(target, OpOverload):
        return bool(target._schema.is_mutable)
    return isinstance(target, private.HigherOrderOperator)
