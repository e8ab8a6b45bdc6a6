"""A dense model's logits on disk, so that others can be compared with them when the model itself is gone."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from sparsec.errors import DataError
from sparsec.evaluate.logits import logits_in_parts


@dataclass
class KeptLogits:
    """Gives logits in parts: it runs `model` and keeps what that gives; after `forget()` it gives that again, in order.

    The file is nameless and gone when this is.
    """

    model: Any

    def __post_init__(self) -> None:
        self._anchor: Tensor = next(self.model.parameters()).detach().new_empty(0)  # tells device and dtype
        self.config = getattr(self.model, "config", None)
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 - it lives as long as this
        self._row: tuple[int, torch.dtype] = 0, self._anchor.dtype  # vocabulary and type of what was kept

    def forget(self) -> Self:
        """Lets go of the model, and begins again at the first window."""
        self.model = None
        self._file.seek(0)
        return self

    def parameters(self) -> Iterator[Tensor]:
        """One without values."""
        yield nn.Parameter(self._anchor, requires_grad=False)

    def logits_in_parts(self, window: Tensor, rows: int) -> Iterator[Tensor]:
        """[rows, vocabulary] and fewer in the last one, of the next window. window: tokens [length]."""
        if self.model is not None:
            for part in logits_in_parts("dense", self.model, window, rows):
                self._keep(part)
                yield part
            return
        for start in range(0, len(window), rows):
            yield self._read(min(rows, len(window) - start))

    def _keep(self, logits: Tensor) -> None:
        self._row = logits.shape[-1], logits.dtype
        try:
            self._file.write(logits.detach().contiguous().cpu().flatten().view(torch.uint8).numpy().data)
        except OSError as error:
            raise DataError(
                f"the dense model's logits do not fit into {tempfile.gettempdir()} ({error.strerror or error}); set TMPDIR to a "
                "folder with more room, or take fewer --eval-windows"
            ) from error

    def _read(self, rows: int) -> Tensor:
        vocabulary, dtype = self._row
        raw = bytearray(rows * vocabulary * dtype.itemsize)
        if not raw or self._file.readinto(raw) != len(raw):
            raise DataError(
                "the dense model's logits were kept for fewer windows than are compared with them; take the same ones"
            )
        return torch.frombuffer(raw, dtype=dtype).view(rows, vocabulary).to(self._anchor.device)
