"""What `.sparsec` of a loaded model holds."""

from __future__ import annotations

import json
import weakref
from collections.abc import Mapping
from typing import Any

from torch import nn

from sparsec.checkpoint.pretrained import save_pretrained
from sparsec.checkpoint.record import History, Record
from sparsec.errors import CheckpointError, DataError
from sparsec.report.collect import Report
from sparsec.report.reread import reread


class Loaded:
    """How the model came to be what it is, as its file tells. A plain object, no submodule; knows the model weakly."""

    def __init__(self, record: Record, place: str, model: nn.Module | None, report: bytes = b"") -> None:
        self.record, self.place = record, place
        self._model = None if model is None else weakref.ref(model)
        self._report = report

    @property
    def passes(self) -> tuple[Mapping[str, Any], ...]:
        """Those that ran before it was saved, with their options."""
        return self.record.passes

    def report(self) -> Report:
        """Of the model as it was saved, with what was measured then. CheckpointError where none was saved, or it is damaged."""
        if not self._report:
            raise CheckpointError(f"{self.place} holds no report: {_no_report(self.record)}")
        try:
            return reread(json.loads(self._report))
        except (DataError, ValueError, RecursionError) as error:
            raise CheckpointError(f"the report in {self.place} cannot be read: {error}") from error

    @property
    def history(self) -> History:
        """For the next save."""
        known = self.record
        reasons = {path: stored.reason for path, stored in known.layers.items()}
        return History(known.passes, known.calibration, reasons, self._report)

    def save_pretrained(self, folder: Any, **options: Any) -> Record:
        """Saves the model again, as it is packed now."""
        model = None if self._model is None else self._model()
        if model is None:
            raise CheckpointError(
                f"the model is not the one that was loaded; load it again from {self.place}, and save that"
            )
        return save_pretrained(model, folder, history=self.history, **options)

    def __deepcopy__(self, memo: dict[int, Any]) -> Loaded:
        model = None if self._model is None else self._model()
        return Loaded(self.record, self.place, None if model is None else memo.get(id(model), model), self._report)

    def __reduce__(self) -> tuple[Any, ...]:
        return Loaded, (self.record, self.place, None, self._report)

    def __repr__(self) -> str:
        return f"<sparsec, loaded from {self.place}: {len(self.record.layers)} packed layers>"


def _no_report(record: Record) -> str:
    if record.report:
        return f"{record.report['file']} was not beside its weights; sparsec.load of the whole folder has it"
    return "sparsec.save writes none, save_pretrained of a compiled model does"
