"""What `.sparsec` of a model holds that comes from a file or from a pickle."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from sparsec.checkpoint.record import History, Record
from sparsec.checkpoint.saving import Saveable, encoded
from sparsec.checkpoint.writing import describe
from sparsec.errors import CheckpointError, DataError
from sparsec.program.told import told_decoding
from sparsec.reference import ModelReference
from sparsec.report.collect import Report
from sparsec.report.reread import reread


class Loaded(Saveable):
    """How the model came to be what it is, as its file tells. A plain object, no submodule."""

    def __init__(
        self, record: Record, place: str, model: nn.Module | None, report: bytes = b"", lowered: bool = True
    ) -> None:
        self.record, self.place, self._lowered = record, place, lowered
        self._model = None if model is None else ModelReference(model)
        self._report = report

    @property
    def passes(self) -> tuple[Mapping[str, Any], ...]:
        """Those that ran before it was saved, with their options."""
        return self.record.passes

    def report(self) -> Report:
        """Of the model as it was saved, with what was measured then; only how it decodes is told of now.

        CheckpointError where none was saved, or it is damaged.
        """
        if not self._report:
            raise CheckpointError(f"{self.place} holds no report: {_no_report(self.record)}")
        try:
            found = reread(json.loads(self._report))
        except (DataError, ValueError, RecursionError) as error:
            raise CheckpointError(f"the report in {self.place} cannot be read: {error}") from error
        return found if self._model is None else replace(found, decoding=told_decoding(self._model()))

    def history(self, report: Report | None = None) -> History:
        """For the next save. report: with what was measured since; default: the one that was saved."""
        known = self.record
        reasons = {path: stored.reason for path, stored in known.layers.items()}
        told = self._report if report is None else encoded(report)
        return History(known.passes, known.calibration, reasons, told)

    def whole(self) -> nn.Module:
        """The model. CheckpointError where this came without one."""
        if self._model is None:
            raise CheckpointError(f"this tells of a model that is not here; load it again from {self.place}")
        return self._model()

    @property
    def lowered(self) -> bool:
        """Whether the pass lower ran."""
        return self._lowered

    def __deepcopy__(self, memo: dict[int, Any]) -> Loaded:
        model = None if self._model is None else self._model()
        twin = None if model is None else memo.get(id(model), model)
        return Loaded(self.record, self.place, twin, self._report, self._lowered)

    def __reduce__(self) -> tuple[Any, ...]:
        return pickled(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def __repr__(self) -> str:
        return f"<sparsec, loaded from {self.place}: {len(self.record.layers)} packed layers>"


def _no_report(record: Record) -> str:
    if record.report:
        return f"{record.report['file']} was not beside its weights; sparsec.load of the whole folder has it"
    return "sparsec.save writes none, save_pretrained of a compiled model does"


def pickled(saveable: Saveable) -> tuple[Any, ...]:
    """What `__reduce__` gives: a Loaded that tells of the model as it is now. The graph stays behind."""
    model, history = saveable.whole(), saveable.history()
    state = {"record": describe(model, history), "place": "a pickle", "model": model}
    return Loaded.__new__, (Loaded,), {**state, "report": history.report, "lowered": saveable.lowered}
