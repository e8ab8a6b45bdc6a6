"""Runs a graph span by span over calibration calls, so that each block is fed by the pruned ones before it.

Only what is alive between two spans is kept for each call. The graph itself is run, not the model, so nothing here knows any
architecture: blocks, values and what is alive are read off the dataflow.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, fx

from sparsec.arguments import checked
from sparsec.calibrate.attention import CausalAttention
from sparsec.calibrate.data import CalibrationData, spread
from sparsec.calibrate.dataflow import varying, views_of_weights, writes
from sparsec.calibrate.jobs import learnt
from sparsec.calibrate.kept import Place, flat, gone, whole
from sparsec.calibrate.sites import Operand, Site, find_sites, spans_by_block, spans_by_value, steps_of
from sparsec.calibrate.statistics import SAMPLE, Statistics
from sparsec.errors import ActivationError, DataError
from sparsec.ir.graph import Graph
from sparsec.memory import trim
from sparsec.ranks import ALONE, Ranks
from sparsec.spill import Keep, Made

_Due = dict[fx.Node, list[tuple[Operand, Sequence[Sequence[Statistics]]]]]
"""What can be looked at once a node is computed: for each read the statistics of the sites that it belongs to."""
FEEDS = ("pruned", "dense")
ORDERS = ("block", "true")


@dataclass
class Profile:
    """Where the time of this rank went, in seconds; and the most bytes that were held, beside the model: activations between two
    blocks, and the statistics of one."""

    forward: float = 0.0
    statistics: float = 0.0
    pruning: float = 0.0
    ranks: int = 1
    activation_bytes: int = 0
    statistics_bytes: int = 0

    def __str__(self) -> str:
        shared = f"on each of {self.ranks} ranks " if self.ranks > 1 else ""
        return (
            f"{shared}{self.forward:.1f} s in forward passes, {self.statistics:.1f} s in statistics, {self.pruning:.1f} s in "
            f"pruning; held at most {self.activation_bytes / 1e6:.1f} MB of activations and {self.statistics_bytes / 1e6:.1f} MB "
            "of statistics"
        )

    @property
    def spent(self) -> dict[str, float]:
        """Seconds by kind of work."""
        return {kind: getattr(self, kind) for kind in ("forward", "statistics", "pruning")}

    @contextmanager
    def timed(self, what: str) -> Iterator[None]:
        """Adds to one of the fields."""
        start = perf_counter()
        yield
        setattr(self, what, getattr(self, what) + perf_counter() - start)


@torch.no_grad()
@checked
def calibrate(
    graph: Graph,
    data: CalibrationData,
    weights: Sequence[str],
    learn: Callable[[Site, Sequence[Statistics]], Made],
    settle: Callable[[Site, Made], None],
    *,
    gram: bool = False,
    feed: str = "pruned",
    order: str = "block",
    step: Callable[[int, int], None] | None = None,
    store: Keep | None = None,
    ranks: Ranks = ALONE,
) -> Profile:
    """Calls `learn` for every site of the weights, in order of execution, with the statistics of what it reads (of fused experts,
    those of every expert), and then `settle` with what that made.

    learn: changes nothing. settle: changes masks and weights in the graph, or keeps what was learnt. gram: with Gram matrices.
    feed: `pruned` lets each block read what the pruned blocks before it make, `dense` what the unpruned ones make. order: `block`
    shows every linear of a block the inputs of the unpruned block, as the papers' code does; `true` prunes linear by linear. step:
    called with (done, spans). store: keeps what was learnt, and what is alive between two spans, so that a killed run goes on.
    ranks: each runs its share of the calls, and each site is learnt by one of them; all settle all.

    Raises ActivationError for NaN or inf in what a linear reads.
    """
    unknown = [name for name in weights if name not in graph.weights or not graph.prunable(name)]
    if unknown or not weights:
        what = f"{unknown[0]!r} is no weight of a linear product in this graph" if unknown else "weights names none"
        raise DataError(f"calibrate: {what}; the names are the keys of graph.weights")
    sites = find_sites(graph, weights)
    walker = Walker(graph, data, sites, ranks)
    by_value = order == "true" and feed == "pruned"
    spans = spans_by_value(sites, walker.position) if by_value else spans_by_block(sites, walker.lives)
    trim()  # what tracing and tokenising left
    store = store or Keep()
    begun = walker.resumed(store, len(spans))
    for span in spans[:begun]:
        for site in span.sites:
            settle(site, store.made(site.key, gone))
    for i, span in enumerate(spans[begun:], begun):
        if step is not None:
            step(i, len(spans))
        last = i + 1 == len(spans)
        again = span.again and feed == "pruned"
        seen: dict[Site, list[Statistics]] = {}
        if not all(ranks.told(all(store.has(site.key) for site in span.sites))):
            seen = {site: _statistics(graph, site, gram, walker.data, len(walker.calls)) for site in span.sites}
        watched: dict[Operand, list[Sequence[Statistics]]] = {}
        for site, statistics in seen.items():
            for read in site.reads:
                watched.setdefault(read, []).append(statistics)
        held = sum(each.nbytes for statistics in seen.values() for each in statistics)
        walker.profile.statistics_bytes = max(walker.profile.statistics_bytes, held)
        if seen or not (again or last):
            walker.run(span.start, span.end, watched, keep=None if again or last else Place(store, i + 1))
        # Masks stay and temporaries go, so that the heap is in pieces: without this it grows by half of a 135M model.
        watched.clear()
        trim()
        with walker.profile.timed("pruning"):
            for site, made in learnt(
                graph, span.sites, seen, partial(_settled, learn, data), ranks, store, data.device
            ):
                settle(site, made)
                del made
        trim()
        if again and not last:
            walker.run(span.start, span.end, {}, keep=Place(store, i + 1))
            trim()
        walker.done(store, i + 1)
    if step is not None:
        step(len(spans), len(spans))
    return walker.profile


def _settled(
    learn: Callable[[Site, Sequence[Statistics]], Made],
    data: CalibrationData,
    site: Site,
    statistics: Sequence[Statistics],
) -> Made:
    trim()  # what the solve before this one left: Qwen2.5-Coder-1.5B held up to 200 MB of it
    for each in statistics:
        each.settle()
    if not all(each.finite for each in statistics):
        raise ActivationError(_not_finite(site, data))
    return learn(site, statistics)


class Walker:
    """A graph and, for each call that falls to this rank, the values that are alive where it stands."""

    def __init__(self, graph: Graph, data: CalibrationData, sites: Iterable[Site], ranks: Ranks = ALONE) -> None:
        data = spread(data, graph, ranks.count)
        self.graph, self.data, self.profile, self.ranks = graph, data, Profile(ranks=ranks.count), ranks
        self.calls = [data.calls[i] for i in ranks.mine([call[0].numel() for call in data.calls])]
        self.steps = steps_of(graph)
        self.position = {node: i for i, node in enumerate(self.steps)}
        self.views = views_of_weights(self.steps)
        values = {value for site in sites for value in site.values}
        self.needed = self.ancestors([*values, *self._writing(0, max(self.position[v] for v in values))], 0)
        self.varying = varying(self.steps, data, values)
        self.written = any(writes(node) for node in self.needed)
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
        self.states: list[dict[fx.Node, Any]] = [{} for _ in self.calls]
        self.attention = CausalAttention()
        self.rooms: dict[tuple[torch.Size, torch.dtype], list[Tensor]] = {}

    def run(
        self,
        start: int,
        end: int,
        watched: Mapping[Operand, Sequence[Sequence[Statistics]]],
        keep: Place | None,
    ) -> None:
        """Runs [start, end) for every call. keep: the walker then stands at `end`; else it stays at `start`."""
        alive = (n for n in self.needed - self.views if keep and self.position[n] < end <= self.last_read[n])
        goals = set(alive)
        shown = [node for read in watched for node in read.nodes]
        seen = max((self.position[v] for v in shown), default=start)
        wanted = self.ancestors([*goals, *shown, *self._writing(start, end if keep else seen)], start)
        steps = [n for n in self.steps[:end] if n in wanted and (self.position[n] >= start or n in self.views)]
        until = {n: max((self.position[u] for u in n.users if u in wanted), default=-1) for n in wanted}
        due: _Due = {}
        for read, statistics in watched.items():
            last = max(read.nodes, key=self.position.__getitem__)
            due.setdefault(last, []).append((read, statistics))
            until.update((node, max(until[node], self.position[last])) for node in read.nodes)
        written = any(writes(node) for node in steps)
        tensors: dict[fx.Node, Any] = {}  # stored ones, read through their masks; dropped at the end
        shared = dict(self.shared) if keep or not written else _cloned(self.shared)
        changing = [node for node in steps if node in self.varying]
        forget = {n: p for n, p in until.items() if n in self.varying and n not in goals}
        for i, call in enumerate(self.calls):
            self.ranks.check()
            # A copy: what was alive before stays, for another run or for its memory.
            values = _cloned(self.states[i]) if written and not keep else dict(self.states[i])

            for node in due:
                if self.position[node] < start:
                    self._watch(due, node, values)
            # The first call makes what is the same for all.
            self._execute(changing if i else steps, call, tensors, shared, values, due, forget)
            if keep:
                self.states[i] = self._stored(i, {n: v for n, v in values.items() if n in goals}, keep)
        if keep:
            self.shared = {n: v for n, v in shared.items() if n in goals}
            if keep.store.lasting and self.lasting:
                # As a run finds them that goes on from here: a product's last bit may follow from where a tensor lies in memory.
                named = {node.name: node for node in self.shared}
                self.shared = whole(keep.store.made(keep.key("shared"), partial(flat, self.shared)), named)
            kept = (v for state in self.states for v in state.values() if isinstance(v, Tensor))
            self.profile.activation_bytes = max(
                self.profile.activation_bytes, sum(v.numel() * v.itemsize for v in kept)
            )

    def _execute(
        self,
        steps: Sequence[fx.Node],
        call: tuple[Tensor, ...],
        tensors: dict[fx.Node, Any],
        shared: dict[fx.Node, Any],
        values: dict[fx.Node, Any],
        due: _Due,
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
                    result = inputs[str(node.target)]
                else:
                    args, kwargs = fx.map_arg((node.args, node.kwargs), value)
                    args, kwargs = self.attention.arguments(node, args, kwargs)
                    try:
                        result = node.target(*args, **kwargs)  # type: ignore[operator]
                    except (IndexError, RuntimeError) as error:
                        sizes = ", ".join(str(list(t.shape)) for t in call)
                        raise ActivationError(
                            f"the model cannot run on calibration data of {sizes}: {node.name}: {error}; are its sequences "
                            "longer than the model takes?"
                        ) from error
            (values if node in self.varying else shared)[node] = result
            self._watch(due, node, values)
            for used in node.all_input_nodes:
                if forget.get(used, -1) == self.position[node]:
                    values.pop(used, None)

    def resumed(self, store: Keep, spans: int) -> int:
        """Goes to the last span that an earlier run came to, and says which: 0 where there was none."""
        reached = next((i for i in range(spans, 0, -1) if store.has(Place(store, i).reached)), 0)
        begun = min(self.ranks.told(reached))
        if 0 < begun < spans:
            kept = Place(store, begun)
            named = {node.name: node for node in self.steps}
            self.states = [whole(store.made(kept.key(call), gone), named) for call in range(len(self.states))]
            self.shared = whole(store.made(kept.key("shared"), gone), named)
        return begun

    def done(self, store: Keep, span: int) -> None:
        """Everything before a span is settled, and what is alive there is kept: a killed run goes on from it."""
        if not (store.lasting and self.lasting):
            return
        store.made(Place(store, span).reached, lambda: ({}, {}))
        self.ranks.told(span)  # nobody drops what another one, which was killed here, goes on from
        before = Place(store, span - 1)
        for call in (*range(len(self.states)), "shared"):
            store.drop(before.key(call))

    @property
    def lasting(self) -> bool:
        """Whether what is alive can be kept in a file: not where a value is written to, which others may see."""
        return not self.written

    def _stored(self, call: int, values: dict[fx.Node, Any], keep: Place) -> dict[fx.Node, Any]:
        """What is alive after a span: kept by a lasting store, else in the memory of what was alive before it where that fits.

        New tensors, one by one between the temporaries of a forward pass, leave the heap in pieces. That of a GPU is another.
        """
        if keep.store.lasting and self.lasting:
            named = {node.name: node for node in values}
            return whole(keep.store.made(keep.key(call), partial(flat, values)), named)
        if any(isinstance(v, Tensor) and v.device.type != "cpu" for v in values.values()):
            return values
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

    def _watch(self, due: _Due, node: fx.Node, values: Mapping[fx.Node, Any]) -> None:
        """Looks at what is complete now that `node` is computed."""
        for read, sites in due.get(node, ()):
            with self.profile.timed("statistics"):
                x = values[read.x]
                ends = () if read.ends is None else values[read.ends].tolist()
                parts = [x[a:b] for a, b in pairwise((0, *ends))] if ends else [x]
                for statistics in sites:
                    for each, part in zip(statistics, parts, strict=True):
                        each.add(part)

    def _writing(self, start: int, end: int) -> list[fx.Node]:
        """Steps that write to a tensor in place: what they change may be read through another view of it."""
        return [node for node in self.steps[start:end] if writes(node)]

    def ancestors(self, nodes: Iterable[fx.Node], start: int) -> set[fx.Node]:
        """The nodes and all that they are computed from, from position `start` on; those before it that are read are in it too.

        What is made of stored tensors alone is made anew, since pruning may have changed them.
        """
        found: set[fx.Node] = set()
        waiting = list(nodes)
        while waiting:
            node = waiting.pop()
            if node in found or node not in self.position:
                continue
            found.add(node)
            if self.position[node] >= start or node in self.views:
                waiting += node.all_input_nodes
        return found


def _cloned(values: Mapping[fx.Node, Any]) -> dict[fx.Node, Any]:
    return {node: value.clone() if isinstance(value, Tensor) else value for node, value in values.items()}


def _statistics(graph: Graph, site: Site, gram: bool, data: CalibrationData, mine: int) -> list[Statistics]:
    """One, or one for every expert. mine: of the calls, how many are looked at here."""
    weight = graph.weights[site.weights[0]]
    experts, calls = weight.shape[0] if weight.kind == "experts" else 1, len(data.calls)
    rows = -(-SAMPLE // (calls * experts))
    return [Statistics(weight.matrix_shape[1], gram, rows, mine * len(site.reads), data.device) for _ in range(experts)]


def _not_finite(site: Site, data: CalibrationData) -> str:
    return (
        f"{site.name}: what {', '.join(site.weights)} read holds NaN or inf on {data.source}, so nothing can be learned from it; "
        "look for inf or NaN in the weights of the blocks before it, or run in bfloat16 or float32 where float16 overflows"
    )
