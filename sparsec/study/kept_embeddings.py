"""A dense encoder's embeddings, so that others can be compared with them when the model itself is gone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Self

from torch import Tensor

from sparsec.evaluate.embeddings import embedding


@dataclass(eq=False)
class KeptEmbeddings:
    """Gives embeddings: it runs `model` and keeps what that gives; after `forget()` it gives that again, in order."""

    model: Any
    _kept: list[tuple[Tensor, str]] = field(default_factory=list)
    _again: Iterator[tuple[Tensor, str]] = field(init=False)

    def forget(self) -> Self:
        """Lets go of the model, and begins again at the first window."""
        self.model, self._again = None, iter(self._kept)
        return self

    def embedding(self, window: Tensor) -> tuple[Tensor, str]:
        """[hidden], and the dtype of the states, of the next window. window: tokens [length]."""
        if self.model is None:
            return next(self._again)
        self._kept.append(embedding("dense", self.model, window))
        return self._kept[-1]
