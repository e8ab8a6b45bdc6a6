"""Finds the chains of a compiled graph: products and the arithmetic between them that one call can compute (kernels/chain.py).

A node belongs to a chain when it is a product, a pointwise operation on rows, or the mean or variance of a row, over few rows in
all. Nodes are levelled by how many times a path to them has left such nodes: nodes of one level that are connected make up a
chain, and no path leaves a chain and comes back.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from sparsec.inductor.names import stable_topological_sort
from sparsec.kernels.chain import CODES, DTYPES, PRODUCT, chain, single_chain
from sparsec.kernels.fused import inference_linear, inference_single

ROWS = 8
"""At most, in a chain: the arithmetic in one is done by one thread."""

aten = torch.ops.aten
_POINTWISE: dict[Any, str] = {
    aten.add.Tensor: "add",
    aten.sub.Tensor: "sub",
    aten.mul.Tensor: "mul",
    aten.div.Tensor: "div",
    aten.maximum.default: "maximum",
    aten.minimum.default: "minimum",
    aten.neg.default: "neg",
    aten.exp.default: "exp",
    aten.sigmoid.default: "sigmoid",
    aten.tanh.default: "tanh",
    aten.erf.default: "erf",
    aten.sqrt.default: "sqrt",
    aten.rsqrt.default: "rsqrt",
    aten.relu.default: "relu",
    torch.ops.prims.convert_element_type.default: "copy",
}
_VIEWS = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)
_PRODUCTS = (inference_linear, inference_single)


def make_chains(graph: fx.Graph) -> None:
    """Replaces each chain of at least two instructions, one of them a product, by one call."""
    rows = {node: count for node in graph.nodes if (count := _rows_of(node)) is not None}
    # What is in no chain must not part one from another.
    rows = {node: rows[node] for members in _connected(graph, rows) if _pays(members) for node in members}
    for members in _connected(graph, rows):
        if _pays(members):
            _replace(graph, members, rows[members[0]])
    stable_topological_sort(graph)


def _pays(members: Sequence[fx.Node]) -> bool:
    instructions = [n for n in members if n.target is not operator.getitem and n.target not in _VIEWS]
    return len(instructions) > 1 and any(n.target in _PRODUCTS for n in instructions)


def _connected(graph: fx.Graph, rows: dict[fx.Node, int]) -> list[list[fx.Node]]:
    """Connected nodes of one level and one number of rows, in the order of the graph."""
    level: dict[fx.Node, int] = {}
    parent: dict[fx.Node, fx.Node] = {}

    def root(node: fx.Node) -> fx.Node:
        while parent[node] is not node:
            parent[node] = node = parent[parent[node]]
        return node

    for node in graph.nodes:
        read = _read(node) if node in rows else []
        level[node] = max((level[n] + (n in rows and n not in read) for n in node.all_input_nodes), default=0)
        if node in rows:
            parent[node] = node
            for n in read:
                if n in rows and level[n] == level[node] and rows[n] == rows[node]:
                    parent[root(n)] = root(node)
    groups: dict[fx.Node, list[fx.Node]] = {}
    for node in graph.nodes:
        if node in rows:
            groups.setdefault(root(node), []).append(node)
    return list(groups.values())


def _read(node: fx.Node) -> list[fx.Node]:
    """What a node of a chain reads as rows: not a product's weights."""
    if node.target in _PRODUCTS:
        x, tensors, _ = node.args
        return [n for n in node.all_input_nodes if n is x and n not in tensors]  # type: ignore[operator]
    return node.all_input_nodes


# ---- which nodes --------------------------------------------------------------------------------------------------------------


def _rows_of(node: fx.Node) -> int | None:
    """How many rows the values of a node have that a chain can compute; None for other nodes."""
    if node.op != "call_function":
        return None
    if node.target is operator.getitem:
        source = node.args[0]
        assert isinstance(source, fx.Node)
        return _rows_of(source) if source.target is inference_linear or _is_variance(source) else None
    if node.target in _PRODUCTS:
        return _rows_in(_value(node.args[0])) if _read(node) else None
    if _is_variance(node):
        return _rows_in(_value(node.args[0]))
    value = _value(node)
    count = _rows_in(value)
    if value is None or count is None:
        return None
    if node.target in _VIEWS:
        source = _value(node.args[0])
        return (
            count if source is not None and _rows_in(source) == count and source.shape[-1] == value.shape[-1] else None
        )
    if node.target is aten.mean.dim:
        fits = node.args[1:] in (([-1], True), ([_last(node.args[0])], True)) and not node.kwargs
        return count if fits and _rows_in(_value(node.args[0])) == count else None
    if node.target is aten.pow.Tensor_Scalar:
        fits = node.args[1] in (2, 3) and _goes_with(node.args[0], value) and not node.kwargs
        return count if fits else None
    if node.target in _POINTWISE and not node.kwargs:
        operands = node.args[:1] if _POINTWISE[node.target] == "copy" else node.args
        return count if all(_goes_with(a, value) for a in operands) else None
    return None


def _is_variance(node: fx.Node) -> bool:
    """var_mean of the last dimension, as a layer norm has it."""
    if node.target is not aten.var_mean.correction:
        return False
    dims = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    return bool(
        dims in ([-1], [_last(node.args[0])])
        and node.kwargs.get("correction") == 0
        and bool(node.kwargs.get("keepdim"))
        and _rows_in(_value(node.args[0])) is not None
    )


def _value(node: Any) -> Tensor | None:
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return value if isinstance(value, Tensor) else None


def _last(node: Any) -> int:
    value = _value(node)
    return -1 if value is None else value.dim() - 1


def _rows_in(value: Tensor | None) -> int | None:
    """Rows of a value that a chain can hold."""
    if value is None or not _is_plain(value) or not value.dim() or not value.numel():
        return None
    count = value.numel() // value.shape[-1]
    return count if count <= ROWS and value.is_contiguous() else None


def _is_plain(value: Tensor) -> bool:
    return value.dtype in DTYPES and value.device.type == "cpu" and all(isinstance(s, int) for s in value.shape)


def _goes_with(operand: Any, result: Tensor) -> bool:
    """Whether an operand is a number, one row, or rows of which each goes with the same one of the result."""
    if isinstance(operand, int | float):
        return True
    value = _value(operand)
    if value is None or not _is_plain(value):
        return False
    width, lead = (value.shape[-1], _lead(value)) if value.dim() else (1, [])
    return width in (1, result.shape[-1]) and (not lead or lead == _lead(result))


def _lead(value: Tensor) -> list[int]:
    """Sizes of the dimensions before the last, without ones at the front."""
    sizes = list(value.shape[:-1])
    while sizes and sizes[0] == 1:
        sizes.pop(0)
    return sizes


# ---- writing the program --------------------------------------------------------------------------------------------------------


@dataclass
class _Writer:
    """The arguments of a chain, as they grow."""

    inputs: list[fx.Node]
    tensors: list[fx.Node] = field(default_factory=list)
    program: list[int] = field(default_factory=list)
    constants: list[float] = field(default_factory=list)
    places: dict[str, int] = field(default_factory=dict)  # of the constants
    registers: dict[fx.Node, int] = field(init=False)
    count: int = field(init=False)

    def __post_init__(self) -> None:
        self.registers = {node: i for i, node in enumerate(self.inputs)}
        self.count = len(self.inputs)

    def operand(self, argument: Any) -> int:
        if isinstance(argument, fx.Node):
            return self.registers[argument]
        # By its text: 0.0 and -0.0 are equal and two constants, NaN is equal to none and one.
        place = self.places.setdefault(float(argument).hex(), len(self.places))
        if place == len(self.constants):
            self.constants.append(float(argument))
        return -1 - place

    def emit(self, name: str, dtype: torch.dtype, a: int, b: int | None = None) -> int:
        self.program += (CODES[name], DTYPES.index(dtype), a, a if b is None else b)
        self.count += 1
        return self.count - 1

    def write(self, node: fx.Node) -> None:
        if node.target in _PRODUCTS:
            x, tensors, layout = node.args
            self.program += (PRODUCT, self.registers[x], len(tensors), len(layout), *layout)  # type: ignore[index, arg-type, misc]
            self.tensors += tensors  # type: ignore[arg-type]
            value = node.meta["val"]
            self.registers[node] = self.count
            self.count += len(value) if isinstance(value, list | tuple) else 1
        elif node.target is operator.getitem:
            self.registers[node] = self.registers[node.args[0]] + node.args[1]  # type: ignore[index, operator, assignment]
        elif node.target in _VIEWS:
            self.registers[node] = self.registers[node.args[0]]  # type: ignore[index]
        elif _is_variance(node):
            a = self.registers[node.args[0]]  # type: ignore[index]
            dtype = node.meta["val"][0].dtype
            self.registers[node] = self.emit("variance", dtype, a)
            self.emit("mean", dtype, a)
        else:
            self.registers[node] = self._arithmetic(node, node.meta["val"].dtype)

    def _arithmetic(self, node: fx.Node, dtype: torch.dtype) -> int:
        a = self.operand(node.args[0])
        if node.target is aten.mean.dim:
            return self.emit("mean", dtype, a)
        if node.target is aten.pow.Tensor_Scalar:
            square = self.emit("mul", dtype if node.args[1] == 2 else torch.float32, a, a)
            return square if node.args[1] == 2 else self.emit("mul", dtype, square, a)
        name = _POINTWISE[node.target]
        if name == "copy" or len(node.args) == 1:
            return self.emit(name, dtype, a)
        return self.emit(name, dtype, a, self.operand(node.args[1]))


def _replace(graph: fx.Graph, members: Sequence[fx.Node], rows: int) -> None:
    inside = set(members)
    writer = _Writer([n for n in dict.fromkeys(n for node in members for n in _read(node)) if n not in inside])
    for node in members:
        writer.write(node)
    leaving = [n for n in members if any(user not in inside for user in n.users)]
    results = [entry for n in leaving for entry in (writer.registers[n], n.meta["val"].dim(), *n.meta["val"].shape)]
    arguments = (writer.inputs, writer.tensors, rows, writer.program, writer.constants, results)
    with graph.inserting_before(members[0]):
        call = graph.call_function(single_chain if len(leaving) == 1 else chain, arguments)
        replacements = (
            [call]
            if len(leaving) == 1
            else [graph.call_function(operator.getitem, (call, i)) for i in range(len(leaving))]
        )
    if len(leaving) != 1:
        call.meta["val"] = [n.meta["val"] for n in leaving]
    for node, replacement in zip(leaving, replacements, strict=True):
        replacement.meta["val"] = node.meta["val"]
        node.replace_all_uses_with(replacement, delete_user_cb=lambda user: user not in inside)
    for node in reversed(members):
        graph.erase_node(node)
