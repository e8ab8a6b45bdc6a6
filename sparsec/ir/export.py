"""torch.export with a ladder of fallbacks: dynamic batch and length, then dynamic batch, then the very shapes of the example.

A trace under `no_grad` in eval mode keeps `aten.linear` whole and names the module that makes each call. The model gets back every
flag it had.
"""

from __future__ import annotations

import inspect
import traceback
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram

from sparsec import private
from sparsec.errors import TraceError
from sparsec.ir.example_inputs import Call
from sparsec.ir.inline import inline_regions
from sparsec.ir.isolation import one_at_a_time, traceable
from sparsec.ir.parts import way_out

RUNGS: dict[str, tuple[str, ...]] = {"dynamic": ("batch", "length"), "dynamic batch": ("batch",), "static": ()}
"""Names of the sizes that a rung leaves open, by the dimension they stand at."""


@dataclass(frozen=True, eq=False)
class Exported:
    """A flat fx graph, and what the call looked like."""

    module: fx.GraphModule
    inputs: tuple[str | None, ...]  # one per placeholder; None for a constant, which no node reads
    output: Any  # the pytree spec of what the model returns
    rung: str
    dims: tuple[tuple[str, int, str], ...]  # (input, dimension, name) of every open size

    def fixed_sizes(self, name: str, example: Tensor) -> tuple[int | None, ...] | None:
        """The sizes that an input must have, None for an open one; None when all are open."""
        opened = {dim for key, dim, _ in self.dims if key == name}
        sizes = tuple(None if dim in opened else size for dim, size in enumerate(example.shape))
        return sizes if len(opened) < len(sizes) else None


def export(model: nn.Module, call: Call) -> Exported:
    """The highest rung that works. Raises TraceError with the failure of each."""
    failures: list[str] = []
    tried: list[tuple[tuple[str, int, str], ...]] = []
    for rung, names in RUNGS.items():
        dims = _open_dims(call, names)
        if (not dims and names) or dims in tried:
            continue  # the inputs have no such dimension
        tried.append(dims)
        try:
            # Of the graphs on the way to the last one nobody runs the code, so that none is written: a tenth of the time.
            uncoded = private.optional("torch.fx._lazy_graph_module._use_lazy_graph_module") or nullcontext
            with one_at_a_time(), traceable(model), uncoded(True):
                return _flat(_export(model, call, dims), call, rung, dims)
        except Exception as error:
            failures.append(f"  {rung}: {_reason(error)}")
    raise TraceError(
        f"{type(model).__name__} cannot be traced; each rung of the ladder failed:\n" + "\n".join(failures) + "\n"
        "A forward that decides by the values of tensors, or calls code outside of torch, has no graph; "
        + way_out(model)
    )


def _open_dims(call: Call, names: tuple[str, ...]) -> tuple[tuple[str, int, str], ...]:
    """Every size of an input that may vary: dimension 0, and 1 where it can be a length (in [batch, features] it is none)."""
    dims = []
    for key, tensor in call.tensors.items():
        sequence = tensor.dim() >= 3 or (tensor.dim() == 2 and not tensor.is_floating_point())
        for dim, name in enumerate(names):
            if dim < tensor.dim() and (dim == 0 or sequence) and tensor.shape[dim] != 0:
                dims.append((key, dim, name))
    return tuple(dims)


def _export(model: nn.Module, call: Call, dims: tuple[tuple[str, int, str], ...]) -> ExportedProgram:
    shapes: dict[str, Any] = dict.fromkeys(call.arguments)
    for key, dim, _ in dims:
        shapes[key] = (shapes[key] or {}) | {dim: Dim.DYNAMIC}
    if call.arguments.keys() - inspect.signature(model.forward).parameters.keys():
        _name_arguments(model, call)
    return torch.export.export(model, (), _grown(call, dims), dynamic_shapes=shapes, strict=False)


def _name_arguments(model: nn.Module, call: Call) -> None:
    """Lets forward(**kwargs) take this call's arguments by name: export has no open sizes for others. `traceable` takes it off."""
    forward = model.forward

    def named(**arguments: Any) -> Any:
        return forward(**arguments)

    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    named.__signature__ = inspect.Signature([inspect.Parameter(name, kind) for name in call.arguments])  # type: ignore[attr-defined]
    object.__setattr__(model, "forward", named)


def _grown(call: Call, dims: tuple[tuple[str, int, str], ...]) -> dict[str, Any]:
    """The arguments, with each open size of 1 made 2 by repetition: a size of 1 would be taken for a constant."""
    arguments = dict(call.arguments)
    for key, dim, _ in dims:
        if arguments[key].shape[dim] == 1:
            arguments[key] = torch.cat([arguments[key]] * 2, dim=dim)
    return arguments


def _flat(program: ExportedProgram, call: Call, rung: str, dims: tuple[tuple[str, int, str], ...]) -> Exported:
    module = program.module(check_guards=False)
    assert isinstance(module, fx.GraphModule)
    inline_regions(module)
    keys = program.call_spec.in_spec.child(1).context
    inputs = tuple(key if isinstance(call.arguments[key], Tensor) else None for key in keys)
    return Exported(module, inputs, program.call_spec.out_spec, rung, dims)


def _reason(error: Exception) -> str:
    """What went wrong in one line, and the last line outside of torch that led there."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = f"{type(error).__name__}: {lines[0] if lines else 'no message'}"
    torch_folder = str(Path(torch.__file__).parent)
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith((torch_folder, "<"))]
    frames = [f for f in frames if f.filename != __file__]
    if not frames:
        return text[:400]
    last = frames[-1]
    return f"{text[:400]} (at {Path(last.filename).name}:{last.lineno} in {last.name}: {(last.line or '').strip()})"
