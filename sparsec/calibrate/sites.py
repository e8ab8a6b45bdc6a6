"""Where in a graph the chosen weights read their inputs, and in which stretches the graph is run to see them.

Linears that read the same value share a site, so a value's statistics are taken once. A span ends where the fewest values are
alive, which between two blocks of a transformer is its hidden state and nothing else.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import fx

from sparsec.ir.experts import grouped_product
from sparsec.ir.facts import Op
from sparsec.ir.graph import Graph


@dataclass(frozen=True)
class Operand:
    """A value x that weights are multiplied with. ends: of fused experts, where each one's rows end; x is then sorted by expert."""

    x: fx.Node
    ends: fx.Node | None = None

    @property
    def nodes(self) -> tuple[fx.Node, ...]:
        """What has to be computed to see it."""
        return (self.x,) if self.ends is None else (self.x, self.ends)


@dataclass(frozen=True, eq=False)
class Site:
    """Weights that are multiplied with the same values: usually one value, more where a module is called more than once."""

    weights: tuple[str, ...]
    reads: tuple[Operand, ...]
    products: tuple[int, ...]  # positions of the products in the graph, ascending
    block: str

    @property
    def values(self) -> tuple[fx.Node, ...]:
        """What has to be computed to see what the weights read."""
        return tuple(node for read in self.reads for node in read.nodes)

    @property
    def name(self) -> str:
        """For messages."""
        return self.block or self.weights[0]

    @property
    def key(self) -> str:
        """Tells it from all others of a graph, in every process."""
        return f"site {self.weights[0]}"


@dataclass(frozen=True, eq=False)
class Span:
    """Nodes [start, end) of a graph. Its sites are settled at its end; `again`: with their weights changed it must run again."""

    start: int
    end: int
    sites: tuple[Site, ...]
    again: bool

    @property
    def name(self) -> str:
        """Of its blocks."""
        return ", ".join(dict.fromkeys(site.name for site in self.sites))


def steps_of(graph: Graph) -> list[fx.Node]:
    """The nodes that are run, in order; stored tensors are read where they are needed."""
    return [node for node in graph.module.graph.nodes if node.op not in ("get_attr", "output")]


def find_sites(graph: Graph, weights: Iterable[str]) -> list[Site]:
    """Sites of these weights, in order of execution."""
    position = {node: i for i, node in enumerate(steps_of(graph))}
    nodes = {node.name: node for node in position}
    found: dict[tuple[Operand, ...], list[str]] = {}
    products: dict[tuple[Operand, ...], set[int]] = {}
    blocks: dict[tuple[Operand, ...], str] = {}
    for name in weights:
        ops = graph.products_of(name) or graph.ops_of(name)
        key = tuple(dict.fromkeys(_read(op, nodes[op.node]) for op in ops))
        found.setdefault(key, []).append(name)
        products.setdefault(key, set()).update(position[nodes[op.node]] for op in ops)
        blocks.setdefault(key, ops[0].block or "")
    sites = [Site(tuple(found[k]), k, tuple(sorted(products[k])), blocks[k]) for k in found]
    return sorted(sites, key=lambda site: site.products[0])


def spans_by_block(sites: Sequence[Site], lives: Sequence[int]) -> list[Span]:
    """One span for every block, its first product to its last; cut where the fewest values are alive.

    lives: at each position, how many values are made before it and read there or later.
    """
    groups: list[tuple[int, int, list[Site]]] = []
    for site in sites:
        first, last = site.products[0], site.products[-1]
        if groups and (first <= groups[-1][1] or site.block == groups[-1][2][-1].block):
            low, high, members = groups.pop()
            first, last, members = low, max(high, last), [*members, site]
        else:
            members = [site]
        groups.append((first, last, members))
    spans, start = [], 0
    for i, (_, last, members) in enumerate(groups):
        ends = range(last + 1, groups[i + 1][0] + 1) if i + 1 < len(groups) else range(last + 1, last + 2)
        end = min(ends, key=lambda p: (lives[p], p))
        spans.append(Span(start, end, tuple(members), again=i + 1 < len(groups)))
        start = end
    return spans


def spans_by_value(sites: Sequence[Site], position: dict[fx.Node, int]) -> list[Span]:
    """One span for every site, up to its first product, so that it sees everything before it pruned.

    Where a module is called more than once, a span goes on to its last call, and is run again.
    """
    spans: list[Span] = []
    for site in sites:
        seen = max(position[value] for value in site.values)
        plain = seen < site.products[0]
        end = site.products[0] if plain else seen + 1
        if spans and spans[-1].again and site.products[0] < spans[-1].end:
            last = spans.pop()
            spans.append(Span(last.start, max(last.end, end), (*last.sites, site), again=True))
        else:
            start = spans[-1].end if spans else 0
            spans.append(Span(start, max(start, end), (site,), again=not plain))
    return spans


def _read(op: Op, node: fx.Node) -> Operand:
    """The value that a product's matrices are multiplied with."""
    if op.routed:
        product = grouped_product(node)
        assert product is not None, node
        return Operand(product.x, product.ends)
    x = node.args[1] if op.kind == "conv1d" else node.args[0]  # addmm(bias, x, weight)
    assert isinstance(x, fx.Node), node
    return Operand(x)
