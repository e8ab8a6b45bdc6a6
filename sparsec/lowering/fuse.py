"""Several linears of one value become one node: a call of `fused_linear` and, where each product was, the getting of its result."""

from __future__ import annotations

import operator
from collections.abc import Sequence

from torch import fx

from sparsec.formats.parts import DENSE, Part, flatten
from sparsec.ir.facts import Op
from sparsec.ir.graph import Graph
from sparsec.kernels.fused import fused_linear


def fuse_products(graph: Graph, products: Sequence[Op]) -> Op:
    """Fuses dense linears `aten.linear(x, weight, bias)`, in order of execution, into one op at the place of the first.

    All must read the same x, and nothing may write to it between the first and the last. Each weight is read by its own
    product alone and is called `weight` in the module that owns the product; biases are stored tensors. The old nodes stay,
    under their names, as the results. Call `graph.module.recompile()` when all is done.
    """
    nodes = [graph.node(op.node) for op in products]
    first = nodes[0]
    x = first.args[0]
    assert all(node.args[0] is x for node in nodes)
    parts = [Part(DENSE, (_node(node.args[1]),), bias_of(node)) for node in nodes]
    tensors, layout = flatten(parts)
    _move_before(first, tensors)
    with graph.module.graph.inserting_before(first):
        fused = graph.module.graph.create_node(
            "call_function", fused_linear, (x, tensors, layout), name=f"{first.name}_fused"
        )
    for i, node in enumerate(nodes):
        node.target, node.args, node.kwargs = operator.getitem, (fused, i), {}
    op = _record(fused.name, products)
    # At the place of the first: the table is in order of execution.
    graph.ops = {
        (op.node if name == products[0].node else name): (op if name == products[0].node else other)
        for name, other in graph.ops.items()
        if name not in {p.node for p in products[1:]}
    }
    return op


def bias_of(linear: fx.Node) -> fx.Node | None:
    """The bias of an `aten.linear` node."""
    bias = linear.args[2] if len(linear.args) > 2 else linear.kwargs.get("bias")
    return None if bias is None else _node(bias)


def _record(name: str, products: Sequence[Op]) -> Op:
    first = products[0]
    members = tuple(op.weights[0] for op in products)
    biases = tuple(bias for op in products for bias in op.weights[1:])
    dense = [op.flops_dense for op in products if op.flops_dense is not None]
    kept = [op.flops for op in products if op.flops is not None]
    return Op(
        node=name,
        kind="fused_linear",
        owner=first.owner,
        group=first.group,
        weights=tuple(dict.fromkeys((*members, *biases))),
        block=first.block,
        flops_dense=sum(dense) if len(dense) == len(products) else None,
        flops=sum(kept) if len(kept) == len(products) else None,
        members=members,
        member_kernels=(None,) * len(members),
    )


def _move_before(first: fx.Node, tensors: Sequence[fx.Node]) -> None:
    """Stored tensors may be got anywhere; those of later products have to be there by now."""
    order = {node: i for i, node in enumerate(first.graph.nodes)}
    for node in tensors:
        assert node.op == "get_attr", node
        if order[node] > order[first]:
            first.prepend(node)


def _node(argument: object) -> fx.Node:
    assert isinstance(argument, fx.Node), argument
    return argument
