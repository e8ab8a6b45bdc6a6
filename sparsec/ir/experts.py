"""Products of fused experts: one call multiplies rows, sorted by expert, with a stack of matrices."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import fx

from sparsec.ir.recognise import op_name

_SAME = frozenset({"detach", "alias", "contiguous", "to", "_to_copy"})
_LAST_TWO = ({-1, -2}, {1, 2})


@dataclass(frozen=True, eq=False)
class GroupedProduct:
    """What such a call reads.

    x: [rows, in], those of the first expert first. ends: int [experts], where the rows of each one end. transposed: whether the
    stack is stored as [experts, in, out].
    """

    x: fx.Node
    ends: fx.Node
    transposed: bool


def grouped_product(node: fx.Node) -> GroupedProduct | None:
    """None for every call whose rows cannot be told apart by expert, or whose stack is looked at in another way than transposed."""
    if "grouped_mm" not in op_name(node)[1]:
        return None
    given: list[Any] = [*node.args[:3], *[None] * (3 - len(node.args))]
    x, stack, ends = given[0], given[1], given[2] if given[2] is not None else node.kwargs.get("offs")
    if not (isinstance(x, fx.Node) and isinstance(stack, fx.Node) and isinstance(ends, fx.Node)):
        return None
    transposed = True  # x @ stack takes [in, out]
    while stack.op == "call_function":
        name = op_name(stack)[1]
        if name == "transpose" and set(stack.args[1:3]) in _LAST_TWO:
            transposed = not transposed
        elif name not in _SAME:
            return None
        stack = stack.all_input_nodes[0]
    return GroupedProduct(x, ends, transposed) if stack.op == "get_attr" else None
