"""The compared models: dense, masked, dense on sparsec's kernels, and lowered, built so that they share every tensor that is equal.

Where memory does not hold the dense model and a lowered one together (`scarce`), each comes after the other and takes its place.
"""

from __future__ import annotations

import copy as copying
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import nn

from sparsec import memory
from sparsec.calibrate.draw import CalibrationInput
from sparsec.compiler import compile, extend
from sparsec.emitter import put
from sparsec.machine import memory_bytes
from sparsec.pipeline import Pipeline
from sparsec.pipeline.base import Effect
from sparsec.progress import Progress
from sparsec.report.collect import Report
from sparsec.study.views import LayerViews

SCARCE = 0.4  # of the machine's memory, from which on the dense model has it for itself
ON_SPARSEC = "fuse,lower(dense)"
TRIM = 16
"""Weights that are unpacked between two times that freed memory is handed back."""

T = TypeVar("T")
K = TypeVar("K")
Model = TypeVar("Model", bound=nn.Module)


@dataclass(eq=False)
class Built:
    """What was counted of each variant when it was built, by key of VARIANTS."""

    reports: dict[str, Report] = field(default_factory=dict)
    held: dict[str, int] = field(default_factory=dict)
    resident: dict[str, int | None] = field(default_factory=dict)
    trace_seconds: float = 0.0
    emit_seconds: float = 0.0

    @property
    def report(self) -> Report:
        """Of the model that all the passes made."""
        return self.reports["lowered" if "lowered" in self.reports else "masked"]


@dataclass(eq=False)
class Builder:
    """Builds variants of one dense model. `watching`: residence is measured too."""

    dense: Any
    before: Pipeline
    rest: Pipeline | None  # from `lower` on; None where the passes have no `lower`
    calibration: Any
    watched: Mapping[str, Any]
    watching: bool
    built: Built = field(default_factory=Built)

    @property
    def device(self) -> str:
        """Type of it."""
        return str(next(self.dense.parameters()).device.type)

    def prune(self, copy: Any = "changed") -> Any:
        """Everything before `lower`."""
        pruned, grown = self._watched(
            lambda: compile(self.dense, self.before, calibration=self.calibration, copy=copy, **self.watched)
        )
        own = pruned.sparsec
        self.built.reports["masked"] = own.report()
        self.built.held["masked"] = memory.held(pruned).total
        self.built.trace_seconds, self.built.emit_seconds = own.trace_seconds, own.emit_seconds
        self._resident("masked", pruned, grown if own.shares else None)
        return pruned

    def lower(self, pruned: Any) -> Any:
        """The rest of the passes; consumes what `prune` gave."""
        assert self.rest is not None
        rest, shares = self.rest, pruned.sparsec.shares
        already = self._beyond(pruned) if self.watching and shares else 0
        lowered, grown = self._watched(lambda: extend(pruned, rest, copy=False, **self.watched))
        self._count("lowered", lowered)
        self.built.emit_seconds += lowered.sparsec.emit_seconds
        self._resident("lowered", lowered, None if grown is None or not shares else grown + already)
        return lowered

    def on_sparsec(self) -> Any:
        """The dense model on sparsec's kernels, sharing all its tensors; None where it would run on torch's own."""
        if self.device != "cpu":
            return None
        own, grown = self._watched(
            lambda: compile(self.dense, ON_SPARSEC, copy="changed", progress=self.watched.get("progress"))
        )
        self._count("dense_on_sparsec", own)
        self._resident("dense_on_sparsec", own, grown)
        return own

    def _count(self, name: str, model: Any) -> None:
        self.built.reports[name] = model.sparsec.report()
        self.built.held[name] = memory.held(model).total

    def _beyond(self, pruned: Any) -> int:
        """Bytes of a pruned model that the dense one does not hold, masks included."""
        own = memory.held(pruned).total - memory.shared(self.dense, pruned)
        return own + self.built.reports["masked"].bytes_masks

    def _resident(self, name: str, model: Any, grown: int | None) -> None:
        """What was added, and what it holds together with the dense model."""
        self.built.resident[name] = None if grown is None else grown + memory.shared(self.dense, model)

    def _watched(self, build: Callable[[], T]) -> tuple[T, int | None]:
        if not self.watching:
            return build(), None
        noted, before = self._noted(), memory.resident(self.device)
        built = build()
        after = memory.resident(self.device)
        return built, None if before is None or after is None else after - before - (self._noted() - noted)

    def _noted(self) -> int:
        """Bytes that belong to what watches, and not to the model."""
        views = (i for i in self.watched.get("instruments", ()) if isinstance(i, LayerViews))
        return sum(v.nbytes for v in views) if self.device == "cpu" else 0


def compiled_by(
    specs: Mapping[K, Pipeline], dense: Any, calibration: CalibrationInput = None, progress: Progress | None = None
) -> dict[K, Any]:
    """What each of several passes makes of one model, sharing every tensor that is equal; those in a row that differ in how they
    lower alone share their pruning."""
    prunings = [split(pipeline)[0] for pipeline in specs.values()]
    found: dict[K, Any] = {}
    last: tuple[Pipeline, Any] | None = None
    for key, pipeline in specs.items():
        before, rest = split(pipeline)
        if not before.passes or prunings.count(before) == 1:
            found[key] = compile(dense, pipeline, calibration=calibration, copy="changed", progress=progress)
            continue
        if last is None or last[0] != before:
            last = before, compile(dense, before, calibration=calibration, copy="changed", progress=progress)
        found[key] = last[1] if rest is None else extend(last[1], rest, progress=progress)
    return found


def masked_stock(dense: Model, made: Any) -> Model:
    """The stock model with the zeros of a pruned or lowered one, on torch's kernels; what has no zeros it shares with `dense`."""
    return filled(memory.shared_copy(dense), made)


def without_values(dense: Model) -> Model:
    """The stock model with empty parameters, to be `filled` when `dense` has become another one."""
    memo: dict[int, Any] = {id(p): nn.Parameter(p.new_empty(0), requires_grad=False) for p in dense.parameters()}
    return copying.deepcopy(dense, memo | {id(buffer): buffer for buffer in dense.buffers()})


def filled(model: Model, made: Any) -> Model:
    """`model` with the weights of a pruned or lowered one, dense."""
    graph = made.sparsec.graph
    for i, weight in enumerate(graph.weights.values()):
        if i % TRIM == 0:
            memory.trim()  # what unpacking took lies between the matrices that stay
        if weight.packed is None:
            tensor = graph.tensor(weight.name)
        else:
            matrix = weight.packed.unpack()
            tensor = matrix.t().contiguous() if weight.transposed else matrix
        put(model, weight, tensor)
    return model


def scarce(dense: nn.Module) -> bool:
    """Whether the dense bytes are more than SCARCE of the memory that they are in."""
    total = memory_bytes(next(dense.parameters()).device)
    return total is not None and memory.held(dense).total > SCARCE * total


def warm_up() -> None:
    """The first trace and the first kernel pay for imports and a build, which are nobody's memory or time."""
    passes = "magnitude(0.5),freeze,lower(csr)"  # not by the cost model, which may know a GPU alone
    compile(nn.Sequential(nn.Linear(8, 8)), passes, example_inputs=torch.ones(2, 8), copy=False)


def split(pipeline: Pipeline) -> tuple[Pipeline, Pipeline | None]:
    """What prunes, and what lowers: from the first `lower` on."""
    before = pipeline.before("lower")
    return before, None if before == pipeline else Pipeline(pipeline.passes[len(before.passes) :])


def lossless(rest: Pipeline | None) -> bool:
    """Whether passes from `lower` on leave the model's outputs what they are within rounding: quantised values do not."""
    return rest is None or all(p.effect is not Effect.LOSSY for p in rest.passes)
