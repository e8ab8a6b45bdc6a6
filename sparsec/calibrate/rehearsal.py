"""A calibration without its numbers: which bytes it would hold, span by span, from shapes alone.

The graph is run once on torch's device meta, on the largest call. What is alive where follows from the dataflow, by the rules of
the walker (sparsec/calibrate/walk.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from sparsec.calibrate.data import CalibrationData
from sparsec.calibrate.sites import Site, Span, find_sites, spans_by_block, spans_by_value
from sparsec.calibrate.statistics import SAMPLE
from sparsec.calibrate.walk import Walker
from sparsec.cost.phase import Attended, Phase
from sparsec.errors import TraceError
from sparsec.ir.graph import Graph
from sparsec.private import pytree

_META = torch.device("meta")
_BANDED = 10 / 16
"""Share of a Gram matrix that is computed."""
_Storages = dict[int, int]
"""Bytes by storage: views of one count once."""


@dataclass(frozen=True)
class Rehearsed:
    """nbytes: at most, beside what was alive before. flops, moved, attention: as in `Phase`."""

    nbytes: int
    flops: Mapping[torch.dtype, float]
    moved: float
    attention: Mapping[Attended, float]


class Rehearsal:
    """A graph's values on one call, by shape. Raises TraceError where a shape depends on numbers."""

    def __init__(self, graph: Graph, data: CalibrationData, sites: Sequence[Site]) -> None:
        self.graph, self.data = graph, data
        self.call = max(data.calls, key=lambda call: call[0].numel())
        self.tokens = self.call[0].numel()
        # Two calls that differ tell what varies from call to call.
        alike = [c for c in data.calls if all(a.shape == b.shape for a, b in zip(c, self.call, strict=True))]
        other = tuple(t if all(c[i] is t for c in alike) else t.clone() for i, t in enumerate(self.call))
        self.walker = Walker(graph, CalibrationData((self.call, other), ""), sites)
        self.storages: dict[fx.Node, _Storages] = {}
        self.shapes: dict[fx.Node, Tensor] = {}
        self._kept: list[Any] = []  # a storage that is freed would lend its address to the next one
        self._run()

    def nbytes(self, nodes: Iterable[fx.Node]) -> int:
        """Of these values, each storage once."""
        found: _Storages = {}
        for node in nodes:
            found.update(self.storages.get(node, {}))
        return sum(found.values())

    def shape(self, node: fx.Node) -> Tensor:
        """A meta tensor of a node's shape and dtype."""
        return self.shapes[node]

    def between(self, weights: Iterable[str]) -> list[fx.Node]:
        """What is made from the first to the last product of these weights."""
        read = set(weights)
        places = [self.walker.position[n] for n in self.walker.steps if read & _read(n)]
        return self.walker.steps[min(places) : max(places) + 1] if places else []

    def alive(self, place: int, end: int) -> list[fx.Node]:
        """Values that are made before `place` and read at it or later, as the walker keeps them between two spans."""
        w = self.walker
        return [n for n in w.needed - w.views if w.position[n] < place <= w.last_read[n] and w.position[n] < end]

    def held_between(self, place: int) -> int:
        """Bytes of what is alive there for all calls: what varies by their tokens, the rest once."""
        alive = self.alive(place, place)
        varies = [n for n in alive if n in self.walker.varying]
        tokens = sum(call[0].numel() for call in self.data.calls)
        return self.nbytes(varies) * tokens // self.tokens + self.nbytes(set(alive) - set(varies))

    def forward(self, span: Span, watched: Mapping[fx.Node, int], keep: bool) -> Rehearsed:
        """One run of a span's nodes, on one call.

        watched: values that statistics look at once they are made, and the bytes that looking takes. keep: the values alive at the
        span's end are made, not only those that are watched.
        """
        w = self.walker
        goals = set(self.alive(span.end, span.end)) if keep else set()
        wanted = w.ancestors([*goals, *watched], span.start)
        steps = [n for n in w.steps[span.start : span.end] if n in wanted]
        last = {n: max((w.position[u] for u in n.users if u in wanted), default=-1) for n in wanted}
        own: dict[fx.Node, _Storages] = {}
        most, moved, flops, attention = 0, 0.0, dict[torch.dtype, float](), dict[Attended, float]()
        for node in steps:
            work = self._flops(node)
            if work and (attended := self._attended(node)) is not None:
                attention[attended] = attention.get(attended, 0.0) + work
            elif work:
                dtype = self.shapes[node].dtype
                flops[dtype] = flops.get(dtype, 0.0) + work
            elif self.storages.get(node):
                moved += self.nbytes([node]) + sum(self.nbytes([used]) for used in node.all_input_nodes)
            own[node] = self.storages.get(node, {})
            held: _Storages = {}
            for storages in own.values():
                held.update(storages)
            most = max(most, sum(held.values()) + self._within(node) + watched.get(node, 0))
            for used in node.all_input_nodes:
                if last.get(used, -1) == w.position[node] and used not in goals:
                    own.pop(used, None)
        return Rehearsed(most, flops, moved, attention)

    def _attended(self, node: fx.Node) -> Attended | None:
        op = self.graph.ops.get(node.name)
        if op is None or op.kind != "attention":
            return None
        made, keys = self.shapes[node], self.shapes[node.all_input_nodes[1]]
        return Attended(made.dtype, made.shape[-2], keys.shape[-2], made.shape[-1])

    def _flops(self, node: fx.Node) -> float:
        """Of a product, or of attention, all of whose scores are counted though half of them may be hidden; else 0."""
        op = self.graph.ops.get(node.name)
        made = self.shapes.get(node)
        if op is None or made is None:
            return 0.0
        if op.kind == "attention":
            keys = node.all_input_nodes[1]
            return 4.0 * made.numel() * self.shapes[keys].shape[-2]
        if op.kind == "matmul":
            first = self.shapes.get(node.all_input_nodes[0])
            return 0.0 if first is None else 2.0 * made.numel() * first.shape[-1]
        names = [name for name in op.matrices if name in self.graph.weights]
        if op.kind not in ("linear", "conv1d", "grouped_linear") or not names:
            return 0.0
        return 2.0 * made.numel() * self.graph.weights[names[0]].matrix_shape[1]

    def _within(self, node: fx.Node) -> int:
        """What a kernel takes while it runs: of attention, the logarithms of sums."""
        if "scaled_dot_product" not in str(node.target):
            return 0
        made = self.shapes[node]
        return 4 * made.numel() // max(1, made.shape[-1])

    def _run(self) -> None:
        inputs = dict(zip(self.graph.inputs, (t.to(_META) for t in self.call), strict=True))
        values: dict[fx.Node, Any] = {}
        stored: set[int] = set()

        def value(node: fx.Node) -> Any:
            if node.op == "get_attr" and node not in values:
                held: Any = self.graph.module
                for part in str(node.target).split("."):
                    held = getattr(held, part)
                values[node] = held.detach().to(_META) if isinstance(held, Tensor) else held
                if isinstance(held, Tensor):
                    self._kept.append(values[node])
                    stored.add(_address(values[node]))
            return values[node]

        for node in self.walker.steps:
            if node not in self.walker.needed and node.op != "placeholder":
                continue
            if node.op == "placeholder":
                made: Any = inputs[str(node.target)]
            else:
                args, kwargs = fx.map_arg((node.args, node.kwargs), value)
                args, kwargs = pytree.tree_map(_on_meta, (args, kwargs))
                try:
                    made = node.target(*args, **kwargs)  # type: ignore[operator]
                except (RuntimeError, NotImplementedError, TypeError, IndexError) as error:
                    first = (str(error).strip() or type(error).__name__).splitlines()[0]
                    raise TraceError(
                        f"{node.name}: its shape is not known without its numbers ({first}), so that nothing can be planned"
                    ) from error
            values[node] = made
            self._kept.append(made)
            if isinstance(made, Tensor):
                self.shapes[node] = made
                if _address(made) not in stored:
                    self.storages[node] = {_address(made): made.untyped_storage().nbytes()}
            elif isinstance(made, list | tuple):
                parts = [t for t in made if isinstance(t, Tensor) and _address(t) not in stored]
                self.storages[node] = {_address(t): t.untyped_storage().nbytes() for t in parts}


def rehearse(
    graph: Graph,
    data: CalibrationData,
    weights: Sequence[str],
    gram: bool,
    feed: str,
    order: str,
    streaming: bool,
    *,
    scratch: Callable[[Sequence[int], int], int],
    filed: Mapping[str, int],
) -> Iterator[Phase]:
    """The phases of `calibrate` with the same arguments.

    streaming: what is alive between two spans is kept in files, where the walker can. scratch: the bytes that masks and new weights
    of a site take with what is needed to make them, for the rows of its matrices and their columns.
    filed: by weight, the bytes of what is made of it.
    """
    sites = find_sites(graph, weights)
    rehearsal = Rehearsal(graph, data, sites)
    walker = rehearsal.walker
    by_value = order == "true" and feed == "pruned"
    spans = spans_by_value(sites, walker.position) if by_value else spans_by_block(sites, walker.lives)
    masked = {w.name for w in graph.masked() if not w.frozen}
    lasting = streaming and walker.lasting
    calls = sum(call[0].numel() for call in data.calls) / rehearsal.tokens
    for i, span in enumerate(spans):
        last = i + 1 == len(spans)
        again = span.again and feed == "pruned"
        before, after = (rehearsal.held_between(place) for place in (span.start, span.end))
        passing = before + after if lasting else 0
        before, after = (0, 0) if lasting else (before, after)
        statistics = {site: _statistics_bytes(graph, site, gram, data) for site in span.sites}
        watched: dict[fx.Node, int] = {}
        grams = rows_seen = 0.0
        for site in span.sites:
            for read in site.reads:
                x = rehearsal.shape(read.x)
                looking = x.numel() * ((0 if x.dtype == torch.float32 else 4) + (0 if gram else 4))
                watched.update(dict.fromkeys(read.nodes, 0))
                watched[max(read.nodes, key=walker.position.__getitem__)] = looking
                grams += 2.0 * _BANDED * x.numel() * x.shape[-1] if gram else 0.0
                rows_seen += 12.0 * x.numel()  # read, squared and added up in fp32
        keep = not (again or last)
        between, held = max(before, after if keep else 0), sum(statistics.values())
        run = rehearsal.forward(span, watched, keep)
        copies = _masked_bytes(graph, walker, span, masked)
        flops = {dtype: calls * work for dtype, work in run.flops.items()}
        flops[torch.float32] = flops.get(torch.float32, 0.0) + calls * grams
        yield Phase(
            "forward",
            span.name,
            {
                "activations between blocks": between,
                "activations of one call": run.nbytes,
                "statistics": held,
                "masked weights": copies,
            },
            flops,
            calls * (run.moved + rows_seen) + 3 * copies,
            {attended: calls * work for attended, work in run.attention.items()},
            passing=passing,
        )
        for site, own in statistics.items():
            weight = graph.weights[site.weights[0]]
            columns, matrices = weight.matrix_shape[1], weight.shape[0] if weight.kind == "experts" else 1
            rows = [graph.weights[name].matrix_shape[0] for name in site.weights]
            corner = columns**2 if gram else 0  # a part of the triangle that was left out, while it is filled in
            alive = {"activations between blocks": between, "statistics": held}
            made = sum(filed[name] for name in site.weights)
            settled = {**alive, "its other triangle": corner}
            yield Phase("settling", site.name, settled, moved=6.0 * corner * matrices, files=made if streaming else 0)
            taken = max(scratch(rows, columns), _counting(rows, columns, gram, weight.dtype))
            work = {**alive, "masks, weights and workspace of a solve": taken}
            # Outputs on the rows that are kept: before, by the masks, and with new weights.
            counted = {torch.float32: 2.0 * SAMPLE * sum(rows) * columns * (3 if gram else 2)}
            for _ in range(matrices):
                yield Phase("solving", ", ".join(site.weights), work, counted, solve=(tuple(rows), columns))
            held -= own
        masked.update(name for site in span.sites for name in site.weights)
        if again and not last:
            run, copies = rehearsal.forward(span, {}, True), _masked_bytes(graph, walker, span, masked)
            yield Phase(
                "forward again",
                span.name,
                {
                    "activations between blocks": max(before, after),
                    "activations of one call": run.nbytes,
                    "masked weights": copies,
                },
                {dtype: calls * work for dtype, work in run.flops.items()},
                calls * run.moved + 3 * copies,
                {attended: calls * work for attended, work in run.attention.items()},
            )


def _statistics_bytes(graph: Graph, site: Site, gram: bool, data: CalibrationData) -> int:
    """As `Statistics` holds them: sums of squares, some rows, and the Gram matrix where asked for; of every expert."""
    weight = graph.weights[site.weights[0]]
    experts, calls = weight.shape[0] if weight.kind == "experts" else 1, len(data.calls)
    columns, rows = weight.matrix_shape[1], -(-SAMPLE // (calls * experts))
    sampled = rows * calls * len(site.reads)
    return experts * (8 * columns + 4 * sampled * columns + (4 * columns**2 if gram else 0))


def _counting(rows: Sequence[int], columns: int, gram: bool, dtype: torch.dtype) -> int:
    """While the errors of a solve are counted: masks, weights in fp32 where they change, and copies of the largest matrix, or one
    and the squares of its outputs on the rows that are kept, in fp32 and fp64."""
    copies = max(
        sum(rows) // max(rows) * dtype.itemsize * columns * gram,
        (8 if dtype == torch.float32 else 12) * columns,
        4 * columns + 12 * SAMPLE,
    )
    return columns * sum(rows) * (5 if gram else 1) + max(rows) * copies


def _masked_bytes(graph: Graph, walker: Walker, span: Span, masked: set[str]) -> int:
    """Of the copies with zeros in them that a span's products read, all until it is through."""
    read = {
        str(n.target)
        for step in walker.steps[span.start : span.end]
        if step in walker.needed
        for n in step.all_input_nodes
        if n.op == "get_attr"
    }
    return sum(w.numel * w.dtype.itemsize for w in graph.weights.values() if w.name in read & masked)


def _read(node: fx.Node) -> set[str]:
    return {str(used.target) for used in node.all_input_nodes if used.op == "get_attr"}


def _address(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _on_meta(value: Any) -> Any:
    return _META if isinstance(value, torch.device) else value
