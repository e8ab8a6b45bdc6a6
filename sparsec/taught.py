"""The dense model that a user gives beside a pruned one, for passes that learn from it."""

from __future__ import annotations

from torch import Tensor, nn

from sparsec.errors import CompileError
from sparsec.ir.graph import Graph
from sparsec.kernels import SparseLinear
from sparsec.pipeline import Pipeline
from sparsec.wrapped import refuse_meta


def taught_by(pipeline: Pipeline, graph: Graph, teacher: nn.Module | None) -> dict[str, Tensor]:
    """Its parameters by their names in the graph, in the graph's dtypes and on its device; none where no pass looks at them.
    CompileError without one that is needed, and for one of other shapes."""
    needing = next((p.name for p in pipeline.passes if p.needs_dense), None)
    if teacher is None:
        if needing is not None:
            raise CompileError(
                f"the pass {needing!r} learns from the dense model, which extend does not have: give it as teacher=, for instance "
                "the model that was compiled"
            )
        return {}
    if any(isinstance(m, SparseLinear) for m in teacher.modules()):
        raise CompileError("teacher must be the dense model, and this one is lowered; give the model that was compiled")
    refuse_meta(teacher)
    held = parameters(teacher)
    for weight in graph.weights.values():
        found = next((held[name] for name in (weight.name, *weight.aliases) if name in held), None)
        if found is None or tuple(found.shape) != weight.shape:
            has = "has none of that name" if found is None else f"has {list(found.shape)}"
            what = " (another vocabulary)" if weight.group in ("embedding", "lm_head") and found is not None else ""
            raise CompileError(
                f"teacher: {weight.name} is {list(weight.shape)} in the pruned model, and the teacher {has}{what}; the teacher "
                "must be the dense model that was pruned, or one of its shapes"
            )
        stored = graph.tensor(weight.name)
        held[weight.name] = found.to(stored.device, stored.dtype)
    return held if any(p.uses_dense for p in pipeline.passes) else {}


def parameters(model: nn.Module) -> dict[str, Tensor]:
    """By every first name, without their gradients."""
    return {name: parameter.detach() for name, parameter in model.named_parameters()}
