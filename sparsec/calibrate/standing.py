"""One run of a graph that stops where it is told, and can be finished from there again and again: what changes only the rest of a
model costs no more than the rest."""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx

from sparsec.calibrate.dataflow import views_of_weights, writes
from sparsec.ir.graph import Graph, MaskedInterpreter


class Standing:
    """A graph at one call. It holds what is alive where it stands; a graph that writes in place is always run from its start."""

    def __init__(self, graph: Graph, call: tuple[Tensor, ...]) -> None:
        self._graph, self._call = graph, call
        self._nodes = list(graph.module.graph.nodes)
        position = {node: i for i, node in enumerate(self._nodes)}
        self._until = {node: max((position[u] for u in node.users), default=-1) for node in self._nodes}
        # Stored tensors and views of them are read when they are needed, since their masks may have changed.
        self._read = {n for n in self._nodes if n.op == "get_attr"} | views_of_weights(self._nodes)
        self._fixed = any(writes(node) for node in self._nodes)
        self._values: dict[fx.Node, Any] = {}
        self._at = 0

    def go(self, name: str) -> None:
        """Computes what stands before the node of that name, with weights and masks as they are now.

        KeyError for one that it has passed.
        """
        inputs = dict(zip(self._graph.inputs, self._call, strict=True))
        end = next((i for i, node in enumerate(self._nodes) if node.name == name), None)
        if end is None or end < self._at:
            raise KeyError(f"{name}: no node that is still ahead")
        while not self._fixed and self._at < end:
            node = self._nodes[self._at]
            if node.op == "placeholder":
                self._values[node] = inputs[str(node.target)]
            elif node not in self._read:
                self._values[node] = self._value(node)
            for used in node.all_input_nodes:
                if self._until[used] == self._at:
                    self._values.pop(used, None)
            self._at += 1

    def finish(self) -> Any:
        """What the model returns, with weights and masks as they are now from here on."""
        passed = [node for node in self._nodes[: self._at] if node not in self._read]
        return MaskedInterpreter(self._graph).run(*self._call, initial_env={**dict.fromkeys(passed), **self._values})

    def _value(self, node: fx.Node) -> Any:
        if node in self._values:
            return self._values[node]
        if node.op == "get_attr":
            return self._graph.read(str(node.target))
        args, kwargs = fx.map_arg((node.args, node.kwargs), self._value)
        return node.target(*args, **kwargs)  # type: ignore[operator]
