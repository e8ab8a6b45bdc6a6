"""What can be read off a graph's dataflow before it is run: what differs from call to call, what is made of weights alone, what
writes in place."""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from sparsec.calibrate.data import CalibrationData
from sparsec.private import OpOverload


def views_of_weights(steps: Sequence[fx.Node]) -> set[fx.Node]:
    """Calls that look at stored tensors alone, such as a transposed stack of experts."""
    found: set[fx.Node] = set()
    for node in steps:
        used = node.all_input_nodes
        if node.op == "call_function" and used and all(n.op == "get_attr" or n in found for n in used):
            found.add(node)
    return found


def varying(steps: Sequence[fx.Node], data: CalibrationData, values: set[fx.Node]) -> set[fx.Node]:
    """Nodes whose values differ from call to call, and `values`. Sizes do not differ, if the calls have the same shapes."""
    if not data.uniform:
        return set(steps)
    placeholders = [node for node in steps if node.op == "placeholder"]
    found = {
        n for i, n in enumerate(placeholders) if any(call[i] is not data.calls[0][i] for call in data.calls)
    } | values
    size = -1
    while size != len(found):
        size = len(found)
        for node in steps:
            if "sym_size" not in str(node.target) and any(used in found for used in node.all_input_nodes):
                found.add(node)
                if writes(node):  # what it writes to, through whatever views, is no longer the same for all
                    found |= _origins(node.all_input_nodes[0])
    return found


def _origins(node: fx.Node) -> set[fx.Node]:
    found: set[fx.Node] = set()
    waiting = [node]
    while waiting:
        node = waiting.pop()
        if node.op == "call_function" and node not in found and "sym_size" not in str(node.target):
            found.add(node)
            waiting += node.all_input_nodes
    return found


def writes(node: fx.Node) -> bool:
    """Whether a call changes one of its arguments in place."""
    return isinstance(node.target, OpOverload) and bool(node.target._schema.is_mutable)
