"""Runs a graph span by span over calibration calls, so that each block is fed by the pruned ones before it.

Only what is alive between two spans is kept for each call. The graph itself is run, not the model, so nothing here knows any
architecture: blocks, values and what is alive are read off the dataflow.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import OpOverload

from sparsec.calibrate.data import CalibrationData
from sparsec.calibrate.sites import Site, find_sites, spans_by_block, spans_by_value, steps_of
from sparsec.calibrate.statistics import SAMPLE, Statistics
from sparsec.errors import ActivationError
from sparsec.ir.graph import Graph
from sparsec.memory import trim

_ATTENTION = torch.ops.aten.scaled_dot_product_attention.default
FEEDS = ("pruned", "dense")
ORDERS = ("block", "true")


@dataclass
class Profile:
    """Where the time went, in seconds."""

    forward: float = 0.0
    statistics: float = 0.0
    pruning: float = 0.0

    def __str__(self) -> str:
        return f"{self.forward:.1f} s in forward passes, {self.statistics:.1f} s in statistics, {self.pruning:.1f} s in pruning"

    @contextmanager
    def timed(self, what: str) -> Iterator[None]:
        """Adds to one of the fields."""
        start = perf_counter()
        yield
        setattr(self, what, getattr(self, what) + perf_counter() - start)


@torch.no_grad()
def calibrate(
    graph: Graph,
    data: CalibrationData,
    weights: Sequence[str],
    prune: Callable[[Site, Statistics], None],
    *,
    gram: bool = False,
    feed: str = "pruned",
    order: str = "block",
    step: Callable[[int, int], None] | None = None,
) -> Profile:
    """Calls `prune` for every site of the weights, in order of execution, with the statistics of what it reads.

    prune: changes masks and weights in the graph. gram: with Gram matrices. feed: `pruned` lets each block read what the pruned
    blocks before it make, `dense` what the unpruned ones make. order: `block` shows every linear of a block the inputs of the
    unpruned block, as the papers' code does; `true` prunes linear by linear. step: called with (done, spans).

    Raises ActivationError for NaN or inf in what a linear reads.
    """
    sites = find_sites(graph, weights)
    walker = _Walker(graph, data, sites)
    by_value = order == "true" and feed == "pruned"
    spans = spans_by_value(sites, walker.position) if by_value else spans_by_block(sites, walker.lives)
    per_call = -(-SAMPLE // len(data.calls))
    trim()  # what tracing and tokenising left
    for i, span in enumerate(spans):
        if step is not None:
            step(i, len(spans))
        seen = {site: Statistics(_width(graph, site), gram, per_call, data.device) for site in span.sites}
        watched: dict[fx.Node, list[Statistics]] = {}
        for site, statistics in seen.items():
            for value in site.values:
                watched.setdefault(value, []).append(statistics)
        last = i + 1 == len(spans)
        again = span.again and feed == "pruned"
        walker.run(span.start, span.end, watched, keep=not (again or last))
        # Masks stay and temporaries go, so that the heap is in pieces: without this it grows by half of a 135M model.
        watched.clear()
        trim()
        for site in span.sites:
            statistics = seen.pop(site)
            statistics.settle()
            if not statistics.finite:
                raise ActivationError(_not_finite(site, data))
            with walker.profile.timed("pruning"):
                prune(site, statistics)
        trim()
        if again and not last:
            walker.run(span.start, span.end, {}, keep=True)
            trim()
    if step is not None:
        step(len(spans), len(spans))
    return walker.profile


class _Walker:
    """A graph and, for each call, the values that are alive where it stands."""

    def __init__(self, graph: Graph, data: CalibrationData, sites: Iterable[Site]) -> None:
        self.graph, self.data, self.profile = graph, data, Profile()
        self.steps = steps_of(graph)
        self.position = {node: i for i, node in enumerate(self.steps)}
        values = {value for site in sites for value in site.values}
        self.needed = self._ancestors([*values, *self._writing(0, max(self.position[v] for v in values))], 0)
        self.varying = _varying(self.steps, data, values)
        self.written = any(_writes(node) for node in self.needed)
        self.last_read = {
            node: max((self.position[u] for u in node.users if u in self.needed), default=-1) for node in self.needed
        }
        for site in sites:
            for value in site.values:  # is looked at when its product's turn comes, even if that is in a later span
                self.last_read[value] = max(self.last_read[value], site.products[0])
        self.lives = [0] * (len(self.steps) + 1)
        for node, until in self.last_read.items():
            for p in range(self.position[node] + 1, until + 1):
                self.lives[p] += node in self.varying
        self.shared: dict[fx.Node, Any] = {}
        self.states: list[dict[fx.Node, Any]] = [{} for _ in data.calls]
        # The last attention mask seen, and whether it only hides the future.
        self.mask: tuple[Tensor, bool] | None = None
        self.rooms: dict[tuple[torch.Size, torch.dtype], list[Tensor]] = {}

    def run(self, start: int, end: int, watched: Mapping[fx.Node, Sequence[Statistics]], keep: bool) -> None:
        """Runs [start, end) for every call. keep: the walker then stands at `end`; else it stays at `start`."""
        goals = {node for node in self.needed if keep and self.position[node] < end <= self.last_read[node]}
        seen = max((self.position[v] for v in watched), default=start)
        wanted = self._ancestors([*goals, *watched, *self._writing(start, end if keep else seen)], start)
        steps = [node for node in self.steps[start:end] if node in wanted]
        until = {n: max((self.position[u] for u in n.users if u in wanted), default=-1) for n in wanted}
        written = any(_writes(node) for node in steps)
        tensors: dict[fx.Node, Any] = {}  # stored ones, read through their masks; dropped at the end
        shared = dict(self.shared) if keep or not written else _cloned(self.shared)
        varying = [node for node in steps if node in self.varying]
        forget = {n: p for n, p in until.items() if n in self.varying and n not in goals}
        for i, call in enumerate(self.data.calls):
            # A copy: what was alive before stays, for another run or for its memory.
            values = _cloned(self.states[i]) if written and not keep else dict(self.states[i])
            for node, statistics in watched.items():
                if self.position[node] < start:
                    self._watch(statistics, values[node])
            # The first call makes what is the same for all.
            self._execute(varying if i else steps, call, tensors, shared, values, watched, forget)
            if keep:
                self.states[i] = self._stored(i, {n: v for n, v in values.items() if n in goals})
        if keep:
            self.shared = {n: v for n, v in shared.items() if n in goals}

    def _execute(
        self,
        steps: Sequence[fx.Node],
        call: tuple[Tensor, ...],
        tensors: dict[fx.Node, Any],
        shared: dict[fx.Node, Any],
        values: dict[fx.Node, Any],
        watched: Mapping[fx.Node, Sequence[Statistics]],
        forget: Mapping[fx.Node, int],
    ) -> None:
        """Runs steps; results go to `values`, or to `shared` where they are the same for every call."""

        def value(node: fx.Node) -> Any:
            if node.op == "get_attr":
                if node not in tensors:
                    tensors[node] = self.graph.read(str(node.target))
                return tensors[node]
            return values[node] if node in values else shared[node]

        inputs = dict(zip(self.graph.inputs, call, strict=True))
        for node in steps:
            with self.profile.timed("forward"):
                if node.op == "placeholder":
                    result = inputs[node.name]
                else:
                    args, kwargs = fx.map_arg((node.args, node.kwargs), value)
                    if node.target is _ATTENTION:
                        args, kwargs = self._causal(args, kwargs)
                    result = node.target(*args, **kwargs)  # type: ignore[operator]
            (values if node in self.varying else shared)[node] = result
            if node in watched:
                self._watch(watched[node], result)
            for used in node.all_input_nodes:
                if forget.get(used, -1) == self.position[node]:
                    values.pop(used, None)

    def _causal(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The same attention without its mask, where that only hides the future: the kernel then skips that half of the work."""
        mask: Any = args[3] if len(args) > 3 else kwargs.get("attn_mask")
        if len(args) > 4 or kwargs.get("is_causal") or not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            return args, kwargs
        if self.mask is None or self.mask[0] is not mask:
            hides = mask.shape[-1] == mask.shape[-2] and torch.equal(mask, torch.ones_like(mask).tril())
            self.mask = (mask, hides)
        if not self.mask[1]:
            return args, kwargs
        return args[:3], {**kwargs, "attn_mask": None, "is_causal": True}

    def _stored(self, call: int, values: dict[fx.Node, Any]) -> dict[fx.Node, Any]:
        """What is alive after a span, in the memory of what was alive before it where that fits.

        New tensors, one by one between the temporaries of a forward pass, leave the heap in pieces.
        """
        if self.written:  # what is written to may be seen through another value: both must stay where they are
            return values
        old = self.states[call]
        used = {v.untyped_storage().data_ptr() for v in values.values() if isinstance(v, Tensor)}
        free = [v for v in old.values() if isinstance(v, Tensor) and v.untyped_storage().data_ptr() not in used]
        kept: dict[fx.Node, Any] = {}
        for node, value in values.items():
            if not isinstance(value, Tensor) or old.get(node) is value:
                kept[node] = value
                continue
            place = next((t for t in free if t.shape == value.shape and t.dtype == value.dtype), None)
            free = [t for t in free if t is not place]
            kept[node] = (self._room(value) if place is None else place).copy_(value)
        return kept

    def _room(self, like: Tensor) -> Tensor:
        """Uninitialised memory, taken for all calls one after the other where they have the same shapes."""
        key = (like.shape, like.dtype)
        if not self.rooms.get(key):
            count = len(self.states) if self.data.uniform else 1
            self.rooms[key] = [torch.empty_like(like, memory_format=torch.contiguous_format) for _ in range(count)]
        return self.rooms[key].pop()

    def _watch(self, statistics: Sequence[Statistics], x: Tensor) -> None:
        with self.profile.timed("statistics"):
            for each in statistics:
                each.add(x)

    def _writing(self, start: int, end: int) -> list[fx.Node]:
        """Steps that write to a tensor in place: what they change may be read through another view of it."""
        return [node for node in self.steps[start:end] if _writes(node)]

    def _ancestors(self, nodes: Iterable[fx.Node], start: int) -> set[fx.Node]:
        """The nodes and all that they are computed from, from position `start` on; those before it that are read are in it too."""
        found: set[fx.Node] = set()
        waiting = list(nodes)
        while waiting:
            node = waiting.pop()
            if node in found or node not in self.position:
                continue
            found.add(node)
            if self.position[node] >= start:
                waiting += node.all_input_nodes
        return found


def _cloned(values: Mapping[fx.Node, Any]) -> dict[fx.Node, Any]:
    return {node: value.clone() if isinstance(value, Tensor) else value for node, value in values.items()}


def _varying(steps: Sequence[fx.Node], data: CalibrationData, values: set[fx.Node]) -> set[fx.Node]:
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
                if _writes(node):  # what it writes to, through whatever views, is no longer the same for all
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


def _writes(node: fx.Node) -> bool:
    return isinstance(node.target, OpOverload) and bool(node.target._schema.is_mutable)


def _width(graph: Graph, site: Site) -> int:
    return graph.weights[site.weights[0]].matrix_shape[1]


def _not_finite(site: Site, data: CalibrationData) -> str:
    return (
        f"{site.name}: what {', '.join(site.weights)} read holds NaN or inf on {data.source}, so nothing can be learned from it; "
        "look for inf or NaN in the weights of the blocks before it, or run in bfloat16 or float32 where float16 overflows"
    )
