"""Models that something stands around, or that are no longer the modules that were traced."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from sparsec.errors import CompileError, TraceError, some
from sparsec.ir.carry import carry
from sparsec.ir.graph import Graph
from sparsec.ir.tracer import trace

PARALLEL = ("DataParallel", "DistributedDataParallel", "FullyShardedDataParallel")
"""torch's wrappers that hold copies or shards of a model."""


def refuse_wrapper(model: nn.Module, call: str) -> None:
    """What stands around a model and would run past it once it is changed."""
    if not isinstance(model, nn.Module):
        raise CompileError(f"{call} takes a torch.nn.Module, got {type(model).__name__}; {_way_to_a_module(model)}")
    if hasattr(model, "_orig_mod"):
        raise CompileError(
            "this model went through torch.compile; give sparsec the model inside, ._orig_mod, and call torch.compile on the result"
        )
    names = [cls.__name__ for cls in type(model).__mro__]
    if found := next((n for n in names if n in PARALLEL), None):
        raise CompileError(
            f"this is a {found} around the model; give sparsec the model inside, .module, and wrap the result"
        )


def _way_to_a_module(given: Any) -> str:
    if isinstance(getattr(given, "model", None), nn.Module):  # what load_model gives, or a pipeline
        return "give its .model"
    return "load a folder or hub id first: sparsec.data.load_model(...).model"


def refuse_meta(model: nn.Module) -> None:
    """What holds no values."""
    meta = next((name for name, p in model.named_parameters() if p.is_meta), None)
    if meta is not None:
        raise CompileError(
            f"{meta} is on the meta device and holds no values; load the checkpoint into the model first"
        )


def traced_again(model: nn.Module, graph: Graph) -> tuple[Graph, list[str]]:
    """A new graph of a model whose modules are no longer those that were traced, with the masks of the old one."""
    device = next(model.parameters()).device
    try:
        new = trace(model, {n: t.to(device) for n, t in zip(graph.inputs, graph.example, strict=True)})
    except TraceError as error:
        raise CompileError(
            f"{type(model).__name__} is no longer what was compiled, and cannot be traced anew; extend the compiled model before "
            "something is put around it or into it, or extend the compiled model inside and put the result back in its place. "
            f"Tracing said: {error}"
        ) from error
    gone = carry(graph, new)
    said = [
        f"the model was traced anew as {type(model).__name__}, since modules were put around it or into it",
        *new.notes,
    ]
    if gone:
        said.append(
            f"masks of weights that the model holds no more are dropped: {some(gone)}; prune what took their place"
        )
    return new, said


def odd_text(odd: Sequence[str], lowered: bool) -> list[str]:
    """What a report has to say of parameters that are not those that were compiled."""
    if not odd:
        return []
    way_out = "compile the original again" if lowered else "sparsec.extend looks at it anew"
    return [
        f"since the model was compiled parameters came, went or changed, which this report does not show: {some(odd)}; {way_out}"
    ]


def nothing_to_prune(graph: Graph) -> str:
    """Why a graph has no weight that a pass could prune."""
    if not graph.weights:
        return "the model has no parameters, so there is nothing to make sparse"
    kinds = ", ".join(dict.fromkeys(w.kind for w in graph.weights.values()))
    seen = "".join(f"\n  {note}" for note in graph.notes)
    return (
        "the model has no linear layer whose weight is a plain parameter, so there is nothing to make sparse "
        f"(its parameters: {kinds}); sparsec works on nn.Linear and transformers' Conv1D{seen}"
    )
