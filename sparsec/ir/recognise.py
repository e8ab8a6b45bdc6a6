"""What an exported node is: which kind of op, which parameters it reads, and through which harmless views.

Recognition is by operator name and by what the operands are, so it holds for every model that torch.export can write down.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx, nn

from sparsec import private
from sparsec.formats.parts import unflatten
from sparsec.ir.facts import OpKind

LINEAR_KINDS: frozenset[OpKind] = frozenset({"linear", "conv1d", "sparse_linear", "fused_linear", "grouped_linear"})
_SAME = frozenset({"detach", "alias", "lift_fresh_copy", "contiguous"})
_VIEWS = _SAME | {
    "transpose",
    "t",
    "permute",
    "view",
    "reshape",
    "select",
    "slice",
    "index",
    "unsqueeze",
    "squeeze",
    "expand",
    "clone",
}
_PRODUCTS = frozenset({"mm", "bmm", "matmul", "addmm", "baddbmm", "einsum", "mv", "dot"})
_TRANSPOSES: tuple[tuple[str, tuple[Any, ...]], ...] = (
    ("t", ()),
    ("numpy_T", ()),
    ("mT", ()),
    *(("transpose", dims) for dims in ((0, 1), (1, 0), (-1, -2), (-2, -1))),
    ("permute", ([1, 0],)),
)
"""The ways to write the transpose of a matrix."""
_EMBEDDINGS = frozenset({"embedding", "embedding_bag", "_embedding_bag"})


@dataclass(frozen=True, eq=False)
class Recognised:
    """One node: its kind and the nodes it takes its weights from."""

    node: fx.Node
    kind: OpKind
    owner: str  # as export says it
    matrix: fx.Node | None = None  # the get_attr of the matrix, None where there is none or where it is computed
    computed: fx.Node | None = None  # the node that computes the weight of a linear product
    parameters: tuple[fx.Node, ...] = ()  # every parameter the node reads, the matrix first
    members: tuple[fx.Node, ...] = ()  # of a fused product: the first tensor of each part
    views: tuple[fx.Node, ...] = ()  # calls between the node and its parameters that only look at them another way


def read(node: fx.Node, parameters: frozenset[fx.Node], modules: Mapping[str, nn.Module]) -> Recognised | None:
    """Facts of one call; None where it is neither a product, a norm nor a reader of parameters.

    `parameters` are the get_attr nodes of parameters, `modules` are the model's modules by every path.
    """
    owner = owner_of(node, modules)
    is_norm = "norm" in type(modules.get(owner)).__name__.lower()
    namespace, name = op_name(node)
    kind: OpKind
    direct = tuple(p for n in node.all_input_nodes if (p := _behind(n, _SAME)) in parameters)
    matrix: fx.Node | None = None
    computed: fx.Node | None = None
    members: tuple[fx.Node, ...] = ()
    if (namespace, name) == ("sparsec", "fused_linear"):
        kind, members = "fused_linear", _members(node)
    elif namespace == "sparsec" and name.endswith("_linear") and name != "dense_linear":
        kind = "sparse_linear"
    elif namespace == "sparsec" and name.endswith("_embedding"):
        kind = "embedding"
    elif (namespace, name) in (("aten", "linear"), ("sparsec", "dense_linear")):
        weight = _node(node.args[1])
        matrix, kind = _behind(weight, _SAME), "linear"
        if matrix not in parameters:
            stacked = _stacked(weight, parameters)
            matrix, kind = (stacked, "grouped_linear") if stacked is not None else (None, "linear")
            computed = weight if stacked is None else None
    elif (
        namespace == "aten"
        and name == "addmm"
        and not node.kwargs
        and (weight := _behind(_node(node.args[2]), _SAME)) in parameters
    ):
        matrix, kind = weight, "conv1d"
    elif namespace == "aten" and name in _EMBEDDINGS:
        source = _behind(_node(node.args[0]), _SAME)
        matrix, kind = (source if source in parameters else None), "embedding"
    elif "grouped_mm" in name or (namespace == "aten" and name in _PRODUCTS):
        matrix = next((s for n in node.all_input_nodes if (s := _stacked(n, parameters)) is not None), None)
        kind = "grouped_linear" if matrix is not None or "grouped_mm" in name else "matmul"
    elif "attention" in name:
        kind = "attention"
    elif re.search(r"(layer|rms|group|batch|instance)_norm", name) or (direct and is_norm):
        kind = "norm"
    elif direct:
        kind = "other"
    else:
        return None
    rest = tuple(p for p in dict.fromkeys(direct) if p is not matrix)
    through = _VIEWS if kind == "grouped_linear" else _SAME
    views = tuple(v for n in node.all_input_nodes if _behind(n, through) in parameters for v in _between(n, through))
    found = rest if matrix is None else (matrix, *rest)
    return Recognised(node, kind, owner, matrix, computed, found, members, views)


def _members(node: fx.Node) -> tuple[fx.Node, ...]:
    """The first tensor of each part of a fused product: a dense weight, or a packed one's values."""
    tensors, layout = node.args[1:]
    firsts = (part.tensors[0] for part in unflatten(tensors, layout))  # type: ignore[arg-type]
    return tuple(first for tensor in firsts if (first := _behind(_node(tensor), _SAME)) is not None)


def without_views(reads: Sequence[Recognised]) -> tuple[Recognised, ...]:
    """Leaves out the calls that only hand a parameter on to products: a cast to the dtype it has, a transposed stack of experts."""
    views = {view for r in reads for view in r.views}
    readers = {r.node for r in reads} | views
    return tuple(r for r in reads if not (r.node in views and all(user in readers for user in r.node.users)))


def as_one_layout(reads: Sequence[Recognised]) -> tuple[Recognised, ...]:
    """A matrix that is [out, in] to one product cannot be [in, out] to another: the latter becomes a plain matrix product."""
    straight = {r.matrix for r in reads if r.kind == "linear"}
    return tuple(replace(r, kind="matmul") if r.kind == "conv1d" and r.matrix in straight else r for r in reads)


def transposed_weight(node: fx.Node, parameters: frozenset[fx.Node]) -> fx.Node | None:
    """The weight [out, in] of a product written `x @ weight.T`; None for every other node."""
    if op_name(node) not in (("aten", "matmul"), ("aten", "mm")) or len(node.args) != 2:
        return None
    x, turned = _node(node.args[0]), _node(node.args[1])
    if x is None or turned is None or turned.op != "call_function" or x.meta["val"].dim() < 2:
        return None
    source = turned.all_input_nodes[0] if len(turned.all_input_nodes) == 1 else None
    if source not in parameters or source is None or source.meta["val"].dim() != 2:
        return None
    return source if (op_name(turned)[1], turned.args[1:]) in _TRANSPOSES else None


def sources(node: fx.Node, parameters: frozenset[fx.Node]) -> list[fx.Node]:
    """Parameters that a computed weight is made from."""
    seen: dict[fx.Node, None] = {}
    queue = [node]
    while queue:
        current = queue.pop()
        if current not in seen:
            seen[current] = None
            queue += current.all_input_nodes
    return [n for n in node.graph.nodes if n in seen and n in parameters]


def owner_of(node: fx.Node, modules: Mapping[str, nn.Module]) -> str:
    """Path of the innermost module whose forward made this call; "" for the root. A second call of a module reads `path@1`."""
    stack = node.meta.get("nn_module_stack") or {}
    if not stack:
        return ""
    path = _whole(str(list(stack.values())[-1][0]), modules)
    if path.startswith("_empty_nn_module_stack"):
        return ""
    first = re.sub(r"@\d+$", "", path)
    return next((known for known in (path, first) if known in modules), re.sub(r"@\d+", "", path))


_PART = re.compile(r"([^()]*?)((?:\.slice\([^()]*\))+)\.(\d+)")


def _whole(path: str, modules: Mapping[str, nn.Module]) -> str:
    """A path through a part of a list, `layers.slice(1, None, None).0`, as one through the list: `layers.1`.

    So torch writes it where the model holds some module twice, as it does below an adapter that others share.
    """
    while (found := _PART.match(path)) is not None:
        whole, parts, number = found.groups()
        numbers = range(len(list(modules[whole].children())))
        for ends in re.findall(r"\(([^()]*)\)", parts):
            numbers = numbers[slice(*(None if end == "None" else int(end) for end in ends.split(", ")))]
        path = f"{whole}.{numbers[int(number)]}{path[found.end() :]}"
    return path


def op_name(node: fx.Node) -> tuple[str, str]:
    """(namespace, name) of the operator a node calls: ("aten", "linear"); ("", "getitem") for a Python function."""
    target: Any = node.target
    if isinstance(target, private.OpOverload):
        namespace, _, name = target._schema.name.partition("::")
        return namespace, name
    return "", getattr(target, "__name__", str(target))


def _behind(node: fx.Node | None, through: frozenset[str]) -> fx.Node | None:
    """The node behind calls that hand on the same values: those in `through`, and casts to the dtype it already has."""
    while node is not None and _hands_on(node, through):
        node = node.all_input_nodes[0]
    return node


def _between(node: fx.Node, through: frozenset[str]) -> Iterator[fx.Node]:
    """The calls that `_behind` looks through."""
    while _hands_on(node, through):
        yield node
        node = node.all_input_nodes[0]


def _hands_on(node: fx.Node, through: frozenset[str]) -> bool:
    if node.op != "call_function" or not node.all_input_nodes:
        return False
    namespace, name = op_name(node)
    cast = name in ("to", "_to_copy") and _dtype(node) == _dtype(node.all_input_nodes[0])
    return namespace == "aten" and (cast or name in through)


def _stacked(node: fx.Node | None, parameters: frozenset[fx.Node]) -> fx.Node | None:
    """The 3-D parameter (one matrix per expert) behind any views of this node."""
    source = _behind(node, _VIEWS)
    return source if source in parameters and source is not None and source.meta["val"].dim() == 3 else None


def _dtype(node: fx.Node) -> torch.dtype | None:
    value = node.meta.get("val")
    return value.dtype if isinstance(value, torch.Tensor) else None


def _node(argument: Any) -> fx.Node | None:
    return argument if isinstance(argument, fx.Node) else None
