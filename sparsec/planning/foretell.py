"""A plan: bytes before and after, memory, arithmetic and time of every pass, tokens a second, from a model's shapes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod

import torch
from torch import fx

from sparsec import memory
from sparsec.calibrate import CalibrationData, takes_tokens
from sparsec.cost.choice import OWN, TORCH, Candidate, Setting
from sparsec.cost.constants import Constants
from sparsec.cost.model import Work
from sparsec.errors import DataError, FormatError
from sparsec.formats.layout import Layout
from sparsec.ir.facts import Weight
from sparsec.ir.graph import Graph
from sparsec.pipeline import Pipeline
from sparsec.pipeline.foreseen import Foreseen
from sparsec.pipeline.spec import unparse_one
from sparsec.planning.memory import Footprint, Moment, peak
from sparsec.planning.sizes import chosen_layout, planned_bytes
from sparsec.planning.times import TimeOf

MOST_CALLS = 20_000
"""Of a calibration."""
LAYOUTS = ("dense", "bitmap", "csr16", "bitmap:int8", "bitmap:int4g64")
"""That every plan tells the bytes of."""


@dataclass(frozen=True)
class PassPart:
    """What a pass does of one kind, in all: "forward", "solving", ..."""

    spec: str
    what: str
    flops: float
    seconds: float  # on one rank of those that there are


@dataclass(frozen=True)
class Foretold:
    """bytes_by_layout: of the whole model, its pruned weights in one layout each; a layout that cannot hold them is left out."""

    name: str
    architecture: str
    weights: int
    pruned_weights: int
    dtype: str
    bytes_dense: int
    bytes_after: int
    layouts_after: dict[str, int]  # how many weights get which
    bytes_by_layout: dict[str, int]
    footprint: Footprint  # of each rank, streaming
    in_memory: Footprint  # all of the model held
    bytes_beside: int  # of files that a streamed run keeps beside its result until it is done
    parts: tuple[PassPart, ...]
    tokens_dense: float  # decoded in a second
    tokens_after: float
    tokens_of_text: int
    ranks: int
    notes: tuple[str, ...]

    @property
    def seconds(self) -> float:
        """Of all passes."""
        return sum(part.seconds for part in self.parts)


def meta_calls(graph: Graph, sequences: int, length: int) -> CalibrationData:
    """Calls without numbers, as many tokens together as a calibration takes. DataError for a graph that takes more than tokens."""
    if not takes_tokens(graph):
        raise DataError(
            f"this graph takes {', '.join(graph.inputs)}, and a plan knows how to calibrate on tokens alone"
        )
    some = max(1, min(sequences, 1024 // length))
    if sequences > MOST_CALLS * some:
        raise DataError(
            f"{sequences:,} sequences of {length:,} tokens: a plan takes {MOST_CALLS * some:,} of them at most: "
            "plan with fewer, since time grows with them and memory hardly"
        )
    mask = torch.ones(some, length, dtype=torch.int64, device="meta")
    calls = []
    for _ in range(-(-sequences // some)):
        given = {"input_ids": torch.zeros(some, length, dtype=torch.int64, device="meta"), "attention_mask": mask}
        calls.append(tuple(given[name] for name in graph.inputs))
    return CalibrationData(tuple(calls), f"{sequences} sequences of {length} tokens")


def foretell(
    graph: Graph,
    pipeline: Pipeline,
    data: CalibrationData | None,
    constants: Constants,
    *,
    name: str,
    architecture: str,
    ranks: int = 1,
    context: int = 1024,
    now: int | None = None,
) -> Foretold:
    """A plan of a pipeline on a graph, which may be on torch's device meta. ranks: processes that share text and solves. context:
    tokens that a decoded one attends to. now: as of `peak`. Raises what `peak` raises, FormatError where a layout cannot hold a
    mask."""
    mine = data
    if data is not None and ranks > 1:
        mine = replace(data, calls=data.calls[: -(-len(data.calls) // ranks)])
    footprint = peak(graph, pipeline, mine, now=now, ranks=ranks)
    in_memory = peak(graph, pipeline, mine, streaming=False, process=footprint.process, ranks=ranks)
    parts = _parts(pipeline, footprint, TimeOf(constants), ranks)
    view, foreseen = graph.view(), Foreseen(data, True, ranks)
    lower = next((p for p in pipeline.passes if p.name == "lower"), None)
    for p in pipeline.passes:
        if p is lower:
            break
        for _ in p.phases(view, foreseen):
            pass
        view.facts |= p.produces
    linear = [w for w in view.weights.values() if view.is_linear(w.name)]
    setting = Setting("latency", constants=constants, working_set=sum(w.nbytes_dense for w in linear))
    layout = getattr(lower, "layout", "dense")
    values = getattr(lower, "values", "")
    if values and values != "auto" and layout not in ("auto", "dense"):
        layout = f"{layout}:{values}"
    if layout == "auto" and values and values != "auto":
        setting = replace(setting, values=(values,))
    prunable = [w for w in linear if w.name in foreseen.zeros and w.kind in ("linear", "conv1d")]
    after: dict[str, Candidate] = {}
    for w in prunable:
        after[w.name] = chosen_layout(
            layout, w.matrix_shape, w.dtype, foreseen.zeros[w.name], w.pattern or "unstructured", setting
        ).best
    whole = memory.held(graph.module).total
    kept = whole - sum(w.nbytes_dense for w in prunable)
    by_layout: dict[str, int] = {}
    for each in dict.fromkeys((*LAYOUTS, *(str(c.layout) for c in after.values()))):
        try:
            plans = [
                planned_bytes(
                    Layout.parse(each), w.matrix_shape, w.dtype, foreseen.zeros[w.name], w.pattern or "unstructured"
                )
                for w in prunable
            ]
        except FormatError:
            continue
        by_layout[each] = kept + sum(plan.nbytes for plan in plans)
    cache = _cache_bytes(graph, context)
    return Foretold(
        name,
        architecture,
        sum(w.numel for w in graph.weights.values()),
        sum(w.numel for w in prunable),
        str(next(iter(graph.weights.values())).dtype).removeprefix("torch."),
        whole,
        kept + sum(c.nbytes for c in after.values()),
        dict(Counter(str(c.layout) for c in after.values())),
        by_layout,
        footprint,
        in_memory,
        footprint.files + sum(c.nbytes for c in after.values() if not c.layout.stays),
        parts,
        _tokens(linear, {}, constants, setting, cache),
        _tokens(linear, after, constants, setting, cache),
        0 if data is None else sum(call[0].numel() for call in data.calls),
        ranks,
        footprint.notes,
    )


def _parts(pipeline: Pipeline, footprint: Footprint, clock: TimeOf, ranks: int) -> tuple[PassPart, ...]:
    """Phases of one kind together. Solves and their like are shared out: no rank is done before the largest of a block is."""
    found: dict[tuple[str, str], tuple[float, float]] = {}
    by_spec = {unparse_one(p): p for p in pipeline.passes}
    shared: dict[str, list[tuple[Moment, float]]] = {}
    for moment in footprint.moments:
        phase = moment.phase
        seconds = clock.seconds(by_spec[moment.spec], phase)
        if phase.what == "solving" and ranks > 1:  # each rank rounds to the nearest by itself
            shared.setdefault(moment.spec, []).append((moment, seconds))
            continue
        before = found.get((moment.spec, phase.what), (0.0, 0.0))
        found[moment.spec, phase.what] = (before[0] + phase.arithmetic, before[1] + seconds)
    for spec, solves in shared.items():
        total, longest = sum(s for _, s in solves), max(s for _, s in solves)
        blocks = sum(m.phase.what == "forward" for m in footprint.moments if m.spec == spec)
        found[spec, "solving"] = (0.0, max(total / ranks, longest * max(1, blocks)))
    return tuple(PassPart(spec, what, flops, seconds) for (spec, what), (flops, seconds) in found.items())


def _tokens(
    linear: Sequence[Weight], after: dict[str, Candidate], constants: Constants, setting: Setting, cache: int
) -> float:
    """Decoded in a second: the products one by one, and the bytes of what was attended to before."""
    seconds = cache / (constants.bandwidth or float("inf"))
    held = sum(after[w.name].nbytes if w.name in after else w.nbytes_dense for w in linear)
    for w in linear:
        best = after.get(w.name)
        label, kernel = ("dense", OWN if after else TORCH) if best is None else (str(best.layout), best.kernel)
        rows, columns = w.matrix_shape
        work = Work.dense(rows, columns, w.dtype)
        if best is not None and not best.layout.stays:
            work = Work(rows, columns, _stored(best, w), best.nbytes)
        one = constants.predict(kernel, label, w.dtype, work, 1, held)
        one = one or constants.predict(TORCH, "dense", w.dtype, work, 1, held)
        seconds += one.seconds if one is not None else work.nbytes / (constants.bandwidth or float("inf"))
    return 1 / seconds if seconds else 0.0


def _stored(best: Candidate, weight: Weight) -> int:
    return min(weight.numel, best.nbytes // max(1, weight.dtype.itemsize))


def _cache_bytes(graph: Graph, context: int) -> int:
    """Of keys and values that a decoded token reads. Several heads may share them: then the product that makes the values is
    narrower than what attention gives."""
    nodes = {node.name: node for node in graph.module.graph.nodes}
    total = 0
    for op in graph.ops.values():
        if op.kind != "attention" or op.shape is None:
            continue
        heads = prod(size for size in (*op.shape[1:-2], op.shape[-1]) if isinstance(size, int))
        made = _maker(graph, nodes[op.node].all_input_nodes[2])
        total += 2 * context * min(heads, heads if made is None else made.matrix_shape[0])
    return total * next(iter(graph.weights.values())).dtype.itemsize


def _maker(graph: Graph, node: fx.Node) -> Weight | None:
    """The weight of the nearest linear product before a node."""
    waiting, seen = [node], set[fx.Node]()
    while waiting:
        node = waiting.pop(0)
        op = graph.ops.get(node.name)
        if op is not None and op.kind == "linear" and op.matrices and op.matrices[0] in graph.weights:
            return graph.weights[op.matrices[0]]
        if node not in seen:
            seen.add(node)
            waiting += node.all_input_nodes
    return None
