"""Regions of a forward under `torch.autocast` or another gradient mode: export makes subgraphs of them, here they are taken apart.

A region without autocast, or with another gradient mode, computes what its calls say. In a region with autocast every call says
by itself which of its tensors torch would cast: it is asked, and the casts are written down.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from sparsec import private
from sparsec.private import FakeTensorMode, HigherOrderOperator, TorchDispatchMode

_Casts = Callable[[fx.Node], dict[fx.Node, torch.dtype]]


@dataclass(frozen=True, eq=False)
class _Region:
    """What stands for a region in a graph: its calls, and which of their tensors are cast."""

    calls: fx.GraphModule
    arguments: tuple[fx.Node, ...]
    casts: _Casts


def inline_regions(module: fx.GraphModule) -> None:
    """Puts the calls of every such region in its place, in order, with what they say of themselves."""
    for node in list(module.graph.nodes):
        region = _region(node, module, _no_casts)
        if region is None:
            continue
        with module.graph.inserting_before(node):
            results = _copied(module.graph, region, region.arguments)
        for user in list(node.users):  # each takes one of the results
            user.replace_all_uses_with(results[user.args[1]])
            module.graph.erase_node(user)
        module.graph.erase_node(node)
    module.graph.eliminate_dead_code()


def _region(node: fx.Node, module: fx.GraphModule, around: _Casts) -> _Region | None:
    name = str(node.target) if isinstance(node.target, HigherOrderOperator) else ""
    given: tuple[Any, ...] = node.args
    casts = around
    if name == "wrap_with_autocast":
        device, dtype, enabled, _, body, *arguments = given
        casts = partial(_casts, device, dtype) if enabled else _no_casts
    elif name == "wrap_with_set_grad_enabled":
        _, body, *arguments = given
    else:
        return None
    return _Region(getattr(module, body.target), tuple(arguments), casts)


def _copied(graph: fx.Graph, region: _Region, arguments: tuple[fx.Node, ...]) -> list[fx.Node]:
    """Writes the calls of a region into a graph; returns its results."""
    new: dict[fx.Node, fx.Node] = {}
    inner: dict[fx.Node, list[fx.Node]] = {}
    given = iter(arguments)
    for call in region.calls.graph.nodes:
        within = _region(call, region.calls, region.casts)
        if within is not None:
            inner[call] = _copied(graph, within, tuple(new[a] for a in within.arguments))
        elif call.op == "placeholder":
            new[call] = next(given)
        elif call.op == "output":
            return [new[result] for result in call.args[0]]
        elif call.op == "call_function" and call.args and call.args[0] in inner:
            new[call] = inner[call.args[0]][call.args[1]]
        elif call.op == "call_function":
            cast = {old: _cast(graph, new[old], call, dtype) for old, dtype in region.casts(call).items()}
            new[call] = graph.node_copy(call, (new | cast).__getitem__)
    raise AssertionError("a graph without an output")


def _cast(graph: fx.Graph, source: fx.Node, call: fx.Node, dtype: torch.dtype) -> fx.Node:
    node = graph.call_function(torch.ops.aten.to.dtype, (source, dtype))
    value = source.meta["val"]
    with value.fake_mode, torch.no_grad():
        node.meta = {**call.meta, "val": value.to(dtype)}
    return node


def _no_casts(call: fx.Node) -> dict[fx.Node, torch.dtype]:
    return {}


def _casts(device: str, dtype: torch.dtype, call: fx.Node) -> dict[fx.Node, torch.dtype]:
    """Which tensors of a call torch casts under autocast, and to what, by calling it once with tensors without contents."""
    if not isinstance(call.target, private.OpOverload):
        return {}
    with FakeTensorMode() as mode:
        values = {node: _example(node.meta.get("val")) for node in call.all_input_nodes}
        args, kwargs = fx.map_arg((call.args, call.kwargs), values.__getitem__)
        seen = _Seen()
        with torch.no_grad(), mode, seen, torch.autocast(device, dtype=dtype, cache_enabled=False):
            call.target(*args, **kwargs)
    return {node: seen.casts[id(value)] for node, value in values.items() if id(value) in seen.casts}


def _example(value: Any) -> Any:
    """As the traced value, with every open size at what it was in the example."""
    if isinstance(value, Tensor):
        sizes = [size if isinstance(size, int) else size.node.hint for size in value.shape]
        return torch.empty(sizes, dtype=value.dtype, device=value.device)
    return value if not isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool) else value.node.hint


class _Seen(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The casts that come before anything else is called."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.casts: dict[int, torch.dtype] = {}
        self._ended = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and not self._ended:
            self.casts[id(args[0])] = result.dtype
        elif func.namespace == "aten":
            self._ended = True
        return result
