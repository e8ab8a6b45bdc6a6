"""A product that stays dense, by sparsec's own dense kernel: the operator changes, the weight stays what and where it is."""

from __future__ import annotations

import torch

from sparsec.ir.graph import Graph
from sparsec.kernels.dense import dense_linear


def no_dense_kernel(graph: Graph, name: str) -> str:
    """Why a dense weight's products cannot use the dense kernel, "" when they can. Whether the modules that hold it can be
    swapped is for the caller to know (`Context.unswappable`)."""
    weight = graph.weights[name]
    if weight.packed is not None:
        return f"it is packed as {weight.format}"
    products = graph.products_of(name)
    if not products:
        return "no product multiplies by it"
    if any(op.kind not in ("linear", "fused_linear") for op in products):
        return f"it is stored as [in, out] ({weight.kind})"
    if not graph.tensor(name).is_contiguous():
        return "its rows do not lie one after the other in memory"
    return ""


def use_dense_kernel(graph: Graph, name: str, kernel: str) -> None:
    """Lets every product of a dense weight call `dense_linear`, and writes down which kernel serves it.

    A part of a fused product calls it already. Call `graph.module.recompile()` when all weights are done.
    """
    reason = no_dense_kernel(graph, name)
    assert not reason, f"{name}: {reason}"
    for op in graph.products_of(name):
        graph.ops[op.node] = op.with_kernel(name, kernel)
        node = graph.node(op.node)
        if op.members or node.target is dense_linear:
            continue
        assert node.target is torch.ops.aten.linear.default, node.target
        bias = node.args[2] if len(node.args) > 2 else node.kwargs.get("bias")
        node.target, node.args, node.kwargs = dense_linear, (*node.args[:2], bias), {}
