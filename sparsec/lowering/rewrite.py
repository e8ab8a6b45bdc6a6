"""One weight from dense to packed: its tensors enter the graph, its products call the sparse operator, the dense tensor goes.

The choice of the format and of the kernel is the pass's; nothing here asks whether the weight should be packed.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import fx

from sparsec.formats.base import Packed
from sparsec.formats.parts import Part, flatten, unflatten
from sparsec.ir.facts import Op, Weight
from sparsec.ir.graph import Graph
from sparsec.kernels import Problem, operator, select
from sparsec.kernels.embedding import embedding_operator


def lower_weight(graph: Graph, name: str, packed: Packed, kernel: str) -> Weight:
    """Puts `packed` in the place of a dense weight and of its mask, wherever it is read; returns the new record.

    packed: the matrix [out, in], whatever layout the weight is stored in. kernel: name of the kernel that serves it. The
    dense tensor's memory goes back when nobody else holds it: it is never taken away, since others may read it past torch.

    Call `graph.module.recompile()` when all weights are done.
    """
    weight = graph.weights[name]
    _register(graph.module, name, packed)
    for op in graph.products_of(name):
        if op.members:
            _rewrite_part(graph, op, name, packed, kernel)
        else:
            _rewrite(graph, op, weight, packed, kernel)
    for op in graph.lookups_of(name):
        _look_up(graph, op, graph.node(op.node).args[1], name, packed)
    _drop(graph, name)
    return graph.update(name, packed=packed, mask=None, rounded=None, nnz=packed.nnz)


def repack(graph: Graph, name: str, packed: Packed, device: str) -> Packed:
    """Puts the same matrix in another format in the place of a packed one wherever it is read; returns what the graph holds.

    The module that was moved to another device tells the graph so; of several modules that share a weight the first one does, and
    the others take over what that one left. `graph.run` follows; call `graph.module.recompile()` to call the module itself.
    """
    held = graph.weights[name].packed
    assert held is not None
    if held.describe() == packed.describe():
        return held
    kernel = select(replace(Problem.of(packed), device=device)).name
    _register(graph.module, name, packed)
    for op in graph.products_of(name):
        if op.members:
            _rewrite_part(graph, op, name, packed, kernel)
        else:
            node = graph.node(op.node)
            parts = _packed_nodes(graph, node, name, packed)
            bias = node.args[1 + len(held.tensors())]
            node.target, node.args = operator(packed), (node.args[0], *parts, bias, *packed.scalars().values())
            graph.ops[op.node] = replace(op, kernel=kernel)
    for op in graph.lookups_of(name):
        _look_up(graph, op, graph.node(op.node).args[0], name, packed)
    for node in [n for n in graph.module.graph.nodes if n.op == "get_attr" and not n.users]:
        if any(_reads(node, buffer_name(name, part)) for part in held.tensors()):
            graph.module.graph.erase_node(node)
    for part in set(held.tensors()) - set(packed.tensors()):
        owner, _, leaf = buffer_name(name, part).rpartition(".")
        delattr(graph.module.get_submodule(owner), leaf)
    graph.update(name, packed=packed)
    return packed


def dense_readers(graph: Graph, name: str) -> tuple[str, ...]:
    """Nodes that read a weight as a dense tensor, so that it cannot be packed: everything but its products and look-ups."""
    products = {op.node for op in (*graph.products_of(name), *graph.lookups_of(name))}
    reads = [(user, node) for node in graph.module.graph.nodes if _reads(node, name) for user in node.users]
    others = {user.name for user, _ in reads if user.name not in products}
    # x @ (w @ w.T): the product's other operand is the weight itself
    others |= {user.name for user, node in reads if sum(a is node for a in user.args) > 1}
    return tuple(sorted(others))


def never_packed(graph: Graph, weight: Weight) -> str:
    """Why a weight cannot be packed at all, "" when it can."""
    if weight.kind == "experts":
        return "no kernel multiplies by fused experts that are sparse, so their zeros save neither bytes nor time yet"
    if not graph.is_linear(weight.name):
        return "no product reads it itself, but what the model makes of it at every call; make the weight plain first"
    others = dense_readers(graph, weight.name)
    return f"it is also read as a dense tensor, by %{', %'.join(others)}" if others else ""


def buffer_name(weight: str, part: str) -> str:
    """Where a packed tensor lives: beside the bias of the module that owned the weight."""
    owner, _, name = weight.rpartition(".")
    # `...up_proj.weight` -> `...up_proj.values`; a second weight of one module keeps its name apart
    leaf = part if name == "weight" else f"{name}_{part}"
    return f"{owner}.{leaf}" if owner else leaf


def _reads(node: fx.Node, name: str) -> bool:
    return node.op == "get_attr" and node.target == name


def _register(module: fx.GraphModule, weight: str, packed: Packed) -> None:
    for part, tensor in packed.tensors().items():
        owner, _, leaf = buffer_name(weight, part).rpartition(".")
        module.get_submodule(owner).register_buffer(leaf, tensor)


def _rewrite(graph: Graph, op: Op, weight: Weight, packed: Packed, kernel: str) -> None:
    """The same node, under the same name, now calls the sparse operator."""
    node = graph.node(op.node)
    if weight.kind == "conv1d":
        bias, x = node.args[0], node.args[1]  # addmm(bias, x, weight)
    else:
        x = node.args[0]
        bias = node.args[2] if len(node.args) > 2 else node.kwargs.get("bias")
    parts = _packed_nodes(graph, node, weight.name, packed)
    node.target = operator(packed)
    node.args = (x, *parts, bias, *packed.scalars().values())
    node.kwargs = {}
    graph.ops[op.node] = replace(op, kind="sparse_linear", kernel=kernel)


def _look_up(graph: Graph, op: Op, ids: Any, name: str, packed: Packed) -> None:
    node = graph.node(op.node)
    parts = _packed_nodes(graph, node, name, packed)
    node.target, node.args, node.kwargs = embedding_operator(packed), (ids, *parts, *packed.scalars().values()), {}


def _rewrite_part(graph: Graph, op: Op, name: str, packed: Packed, kernel: str) -> None:
    """A fused product stays one; of its parts only that of this weight changes."""
    node = graph.node(op.node)
    x, tensors, layout = node.args
    parts = unflatten(tensors, layout)  # type: ignore[arg-type]
    at = op.members.index(name)
    nodes = _packed_nodes(graph, node, name, packed)
    parts[at] = Part(packed.format, tuple(nodes), parts[at].bias, tuple(packed.scalars().values()))
    node.args = (x, *flatten(parts))
    graph.ops[op.node] = op.with_kernel(name, kernel)


def _packed_nodes(graph: Graph, before: fx.Node, name: str, packed: Packed) -> list[fx.Node]:
    with graph.module.graph.inserting_before(before):
        return [graph.module.graph.get_attr(buffer_name(name, part)) for part in packed.tensors()]


def _drop(graph: Graph, name: str) -> None:
    """Takes the dense tensor out of the graph."""
    for node in [n for n in graph.module.graph.nodes if _reads(n, name)]:
        graph.module.graph.erase_node(node)
    owner, _, leaf = name.rpartition(".")
    delattr(graph.module.get_submodule(owner), leaf)
