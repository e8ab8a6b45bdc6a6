"""What `.sparsec` of a loaded model holds."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any, NoReturn

from torch import nn

from sparsec.checkpoint.pretrained import save_pretrained
from sparsec.checkpoint.record import Record
from sparsec.errors import CheckpointError


class Loaded:
    """How the model came to be what it is, as its file tells. A plain object, no submodule; knows the model weakly."""

    def __init__(self, record: Record, place: str, model: nn.Module | None) -> None:
        self.record, self.place = record, place
        self._model = None if model is None else weakref.ref(model)

    @property
    def passes(self) -> tuple[Mapping[str, Any], ...]:
        """Those that ran before it was saved, with their options."""
        return self.record.passes

    def report(self) -> NoReturn:
        """Not there yet for a loaded model. CheckpointError that says what is."""
        raise CheckpointError(
            "the report of a loaded model is not there yet; .sparsec.passes and .sparsec.record.layers tell what was done"
        )

    def save_pretrained(self, folder: Any, **options: Any) -> Record:
        """Saves the model again, as it is packed now."""
        model = None if self._model is None else self._model()
        if model is None:
            raise CheckpointError(
                f"the model is not the one that was loaded; load it again from {self.place}, and save that"
            )
        known = self.record
        reasons = {path: stored.reason for path, stored in known.layers.items()}
        return save_pretrained(
            model,
            folder,
            passes=known.passes,
            reasons=reasons,
            **options,
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> Loaded:
        model = None if self._model is None else self._model()
        return Loaded(self.record, self.place, None if model is None else memo.get(id(model), model))

    def __reduce__(self) -> tuple[Any, ...]:
        return Loaded, (self.record, self.place, None)

    def __repr__(self) -> str:
        return f"<sparsec, loaded from {self.place}: {len(self.record.layers)} packed layers>"
