"""A graph cut into stretches that are run one after the other, with gradients: a block's attention, its MLP, the next block's.

Nothing here knows an architecture: where a stretch ends and what is alive there is read off the dataflow.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, fx

from sparsec.calibrate.attention import CausalAttention
from sparsec.calibrate.dataflow import views_of_weights, writes
from sparsec.calibrate.sites import find_sites, spans_by_block, steps_of
from sparsec.ir.graph import Graph

Read = Callable[[str], Any]
"""From the name of a stored tensor to the tensor that is computed with."""
Values = dict[fx.Node, Any]
Run = Callable[[Values], Values]
"""A part of a graph, from what is alive where it begins to what is alive where it ends."""
_BY_TOKEN = ("add", "sub", "mul", "div", "tanh", "to", "_to_copy", "slice", "alias", "clone", "clamp")
"""What may stand between the head's product and the logits, for them to be made from some tokens at a time."""


@dataclass(frozen=True, eq=False)
class Stretch:
    """Nodes [start, end). weights: of the linear products in it. name: in words."""

    start: int
    end: int
    weights: tuple[str, ...]
    name: str


@dataclass(eq=False)
class _Run:
    """One run of a stretch. An object and no closures, which would hold every activation until the garbage collector comes."""

    values: Values
    read: Read
    attention: CausalAttention
    own: Values = field(default_factory=dict)

    def value(self, node: fx.Node) -> Any:
        if node in self.own:
            return self.own[node]
        if node in self.values:
            return self.values[node]
        if node.op == "get_attr":
            return self.read(str(node.target))
        self.own[node] = self.execute(node)  # a view of stored tensors, made where it is read: they may have changed
        return self.own[node]

    def execute(self, node: fx.Node) -> Any:
        args, kwargs = fx.map_arg((node.args, node.kwargs), self.value)
        args, kwargs = self.attention.arguments(node, args, kwargs)
        return node.target(*args, **kwargs)  # type: ignore[operator]


class Stretches:
    """A graph that is run stretch by stretch."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        output = next(node for node in graph.module.graph.nodes if node.op == "output")
        self._wanted = list(output.all_input_nodes)
        steps = steps_of(graph)
        needed = _ancestors([*self._wanted, *(node for node in steps if writes(node))])
        self.steps = [node for node in steps if node in needed or node.op == "placeholder"]
        self.position = {node: i for i, node in enumerate(self.steps)}
        self.views = views_of_weights(self.steps)
        self.in_place = any(writes(node) for node in self.steps)
        self.last_read = {
            node: max((self.position[u] for u in node.users if u in self.position), default=-1) for node in self.steps
        }
        self.last_read.update(dict.fromkeys(self._wanted, len(self.steps)))
        self._attention = CausalAttention()
        self._alive: dict[int, set[fx.Node]] = {}
        self.stretches = self._cut()

    def alive(self, place: int) -> set[fx.Node]:
        """What is made before a place and read there or later."""
        if place not in self._alive:
            before = (node for node in self.steps[:place] if node not in self.views)
            self._alive[place] = {node for node in before if self.last_read[node] >= place}
        return self._alive[place]

    def run(self, start: int, end: int, call: Sequence[Tensor], values: Values, read: Read) -> Values:
        """Runs [start, end) on what is alive at `start`, and gives what is alive at `end`. `values` stays what it is."""
        run = _Run(values, read, self._attention)
        inputs = dict(zip(self.graph.inputs, call, strict=True))
        for i in range(start, end):
            node = self.steps[i]
            if node in self.views:
                continue
            run.own[node] = inputs[str(node.target)] if node.op == "placeholder" else run.execute(node)
            for used in node.all_input_nodes:
                if self.last_read.get(used, -1) == i:
                    run.own.pop(used, None)
        kept = self.alive(end)
        return {node: value for node, value in {**values, **run.own}.items() if node in kept}

    def outputs(self, values: Values) -> list[Tensor]:
        """The floating tensors that the graph returns, in order."""
        found = [values[node] for node in self._wanted if node in values]
        return [value for value in found if isinstance(value, Tensor) and value.is_floating_point()]

    def head(self) -> tuple[int, fx.Node] | None:
        """(where the head begins, what it reads), of a language model whose logits come from some tokens at a time; else None.

        Its stretch, from there to the end, computes each token's logits from that token's hidden state alone.
        """
        products = [op for op in self.graph.ops.values() if op.group == "lm_head" and op.matrices]
        places = {node.name: node for node in self.steps}
        found = [places[op.node] for op in products if op.node in places and op.kind == "linear"]
        if len(found) != 1:
            return None
        hidden, at = found[0].args[0], self.position[found[0]]
        after = self.steps[at + 1 :]
        if not isinstance(hidden, fx.Node) or self._wanted[:1] != [self.steps[-1]]:
            return None
        by_token = all(
            n.target.__class__.__name__ == "OpOverload" and str(n.target).split(".")[1] in _BY_TOKEN for n in after
        )
        read_again = any(self.last_read[n] > at for n in self.alive(at) if n is hidden)
        return (at, hidden) if by_token and not read_again else None

    def cuts(self) -> list[int]:
        """Where stretches begin and end, up to the head."""
        head = self.head()
        stop = len(self.steps) if head is None else head[0]
        return [0, *(stretch.end for stretch in self.stretches if stretch.end < stop), stop]

    def _cut(self) -> list[Stretch]:
        """At the fewest values alive between a block's attention and its MLP, and between blocks; the last one holds the head."""
        linear = [w.name for w in self.graph.weights.values() if self.graph.prunable(w.name)]
        sites = [site for site in find_sites(self.graph, linear) if all(v in self.position for v in site.values)]
        if not sites or self.in_place:
            return [Stretch(0, len(self.steps), tuple(linear), "the whole model")]
        own = {node: i for i, node in enumerate(steps_of(self.graph))}
        at = {own[node]: i for node, i in self.position.items()}
        placed = []
        for site in sites:
            op = (self.graph.products_of(site.weights[0]) or self.graph.ops_of(site.weights[0]))[0]
            products = tuple(at[p] for p in site.products)
            placed.append(replace(site, block=f"{site.block} {op.group}".strip(), products=products))
        lives = [0] * (len(self.steps) + 1)
        for node, until in self.last_read.items():
            if node not in self.views:
                for place in range(self.position[node] + 1, min(until, len(self.steps)) + 1):
                    lives[place] += 1
        spans = spans_by_block(placed, lives)
        ends = [span.end for span in spans[:-1]] + [len(self.steps)]
        starts = [0, *ends[:-1]]
        weights = (tuple(name for site in span.sites for name in site.weights) for span in spans)
        return [
            Stretch(start, end, names, span.name)
            for start, end, names, span in zip(starts, ends, weights, spans, strict=True)
        ]


def _ancestors(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    found: set[fx.Node] = set()
    waiting = list(nodes)
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            waiting += node.all_input_nodes
    return found
