"""Compiled: what `compiled.sparsec` holds, true of the model as it is now."""

from __future__ import annotations

import copy as copying
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from torch import nn

from sparsec.checkpoint.loaded import pickled
from sparsec.checkpoint.record import History
from sparsec.checkpoint.saving import Saveable, encoded
from sparsec.emitter import follower
from sparsec.ir.carry import rebind
from sparsec.ir.graph import Graph
from sparsec.ir.parts import usual_rows
from sparsec.ir.settle import settle
from sparsec.kernels import Problem, select
from sparsec.kernels.modules.packed_layer import PackedLayer
from sparsec.memory import held
from sparsec.pipeline import PassRecord, Pipeline
from sparsec.program.told import told_decoding
from sparsec.recover.holding import Holding
from sparsec.reference import ModelReference
from sparsec.report.collect import Report, collect
from sparsec.report.predict import known_constants, predict
from sparsec.wrapped import odd_text


@dataclass(eq=False, repr=False)
class Compiled(Saveable):
    """What `compiled.sparsec` holds: how the model came to be what it is. A plain object, no submodule."""

    kept: Graph  # as it was when somebody last asked for `graph`
    pipeline: Pipeline
    records: tuple[PassRecord, ...]
    trace_seconds: float
    emit_seconds: float
    notes: tuple[str, ...]  # what tracing and emission had to say
    model: ModelReference  # the compiled model
    calibration: Mapping[str, str] = field(default_factory=dict)  # what passes learnt from: its source and its hash
    shares: bool = False  # it holds tensors of the model that it was compiled from, and writes to none of them
    holding: Holding | None = None  # what keeps the zeros, since `sparsec.masked`

    @property
    def graph(self) -> Graph:
        """The graph, true of the model as it is now: it may have been moved, converted or trained since it was compiled."""
        self._follow()
        return self.kept

    def report(self) -> Report:
        """Per layer, group and pass: sparsity, bytes, FLOPs, kernels, and reasons. `print()` it, or read its fields.

        Of the model as it is now: it may have been moved, converted or trained since it was compiled.
        """
        now, changes, odd = self._now()
        predicted = predict(now, known_constants(now), usual_rows(self.model()))
        notes, model = (*self.notes, *changes, *odd), self.model()
        return collect(now, self.records, notes, held(model).total, predicted, told_decoding(model))

    def _now(self) -> tuple[Graph, tuple[str, ...], list[str]]:
        """The graph, with records of its own; what became of its weights since; what it does not show."""
        odd = self._follow()
        now = self.kept.view()
        return now, settle(now), odd_text(odd, "lowered" in now.facts)

    def _follow(self) -> list[str]:
        """Lets the graph hold what the model holds now; returns the names that no longer mean the same."""
        if self.holding is not None:
            self.holding.hold()
        odd = rebind(self.kept, self.model())
        _refresh(self.kept)
        return odd

    def save_pretrained(self, folder: Any, **options: Any) -> None:
        """As `Saveable` has it, and says what became of the masks since the model was compiled."""
        for change in self._now()[1]:
            warnings.warn(f"{type(self.whole()).__name__}.save_pretrained: {change}", stacklevel=2)
        super().save_pretrained(folder, **options)

    def whole(self) -> nn.Module:
        """The model."""
        return self.model()

    @property
    def lowered(self) -> bool:
        """Whether the pass lower ran."""
        return "lowered" in self.kept.facts

    def history(self, report: Report | None = None) -> History:
        """What a saved model tells of how it came to be. report: with what was measured; default: what is counted."""
        passes = tuple(
            {"spec": r.spec, "name": r.name, "effect": r.effect.value, "summary": r.summary} for r in self.records
        )
        reasons = {
            op.owner_of(w.name): w.reason or ""
            for w in self.kept.weights.values()
            for op in self.kept.products_of(w.name)
        }
        return History(passes, self.calibration, reasons, encoded(report or self.report()))

    def __deepcopy__(self, memo: dict[int, Any]) -> Compiled:
        # With the memo of the model that is being copied, so that the copy's graph holds the copy's tensors.
        model = self.model()
        left = ("model", "holding")
        copied = {f.name: copying.deepcopy(getattr(self, f.name), memo) for f in fields(self) if f.name not in left}
        for module in model.modules():
            if isinstance(module, PackedLayer) and module.follow is not None and id(module) in memo:
                memo[id(module)].follow = follower(copied["kept"], module.follow.args[1])
        twin = memo.get(id(model), model)
        if self.holding is not None and twin is not model:
            copied["holding"] = self.holding.twin(copied["kept"], memo)
        return Compiled(**copied, model=ModelReference(twin))

    def __reduce__(self) -> tuple[Any, ...]:
        return pickled(self)

    def __repr__(self) -> str:
        lowered = sum(w.packed is not None for w in self.kept.weights.values())
        return f"<sparsec {str(self.pipeline)!r}: {lowered} weights lowered; .report() tells more>"


def _refresh(graph: Graph) -> None:
    """Takes dtypes and kernels anew from the tensors."""
    for weight in list(graph.weights.values()):
        held = graph.tensor(weight.name) if weight.packed is None else next(iter(weight.packed.tensors().values()))
        dtype = held.dtype if weight.packed is None else weight.packed.dtype
        if dtype != weight.dtype:
            graph.update(weight.name, dtype=dtype)
        for op in graph.products_of(weight.name):
            if op.kernel_of(weight.name) is None:  # torch's own, whatever becomes of the weight
                continue
            if weight.packed is None:
                problem = Problem("dense", *weight.matrix_shape, 1, dtype, held.device.type)
            else:
                problem = Problem.of(weight.packed)
            kernel = select(problem).name
            if kernel != op.kernel_of(weight.name):
                graph.ops[op.node] = op.with_kernel(weight.name, kernel)
