"""An evaluation on disk, brought up to date after every window, so that one that was stopped goes on where it was."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from sparsec import files
from sparsec.errors import DataError

_VERSION = 1
_SAMPLES = 64


class Sums(Protocol):
    """What is known of one model so far."""

    windows: list[list[float]]
    positions: torch.Tensor
    dtype: str


class Saved:
    """A file of sums by model name.

    of: what they are sums of; a file of anything else is refused.
    """

    def __init__(self, path: str | Path, of: Mapping[str, Any]) -> None:
        """Raises DataError for a file that is damaged or of another evaluation, and for a place that cannot be written to."""
        self.path, self.of = Path(path), dict(of)
        self._models: dict[str, Any] = {}
        self.done = 0
        if self.path.exists():
            self._read()
        elif not self.path.absolute().parent.is_dir():
            raise DataError(f"{self.path}: its folder does not exist; make it, or give another file")

    def restore(self, sums: Mapping[str, Sums], count: int) -> int:
        """Fills in what the file holds; returns how many windows that are."""
        if self.done > count:
            raise DataError(
                f"{self.path}: holds {self.done} windows, {count} were asked for; take as many, or another file"
            )
        if self.done and set(self._models) != set(sums):
            raise DataError(
                f"{self.path}: holds {', '.join(self._models)}, asked for are {', '.join(sums)}; give another file"
            )
        for name, held in self._models.items():
            sums[name].windows[:] = held["windows"]
            sums[name].positions.copy_(torch.tensor(held["positions"], dtype=torch.float64))
            sums[name].dtype = held["dtype"]
        return self.done

    def keep(self, sums: Mapping[str, Sums], done: int) -> None:
        """Writes everything, in one step: a stop in between leaves the file as it was."""
        models = {
            name: {"windows": each.windows, "positions": each.positions.tolist(), "dtype": each.dtype}
            for name, each in sums.items()
        }
        text = json.dumps({"sparsec_evaluation": _VERSION, "of": self.of, "done": done, "models": models})
        try:
            files.write(self.path, text.encode())
        except OSError as error:
            raise DataError(f"{self.path}: cannot be written ({error.strerror}); give another file") from error

    def _read(self) -> None:
        try:
            found = json.loads(self.path.read_text(encoding="utf-8"))
            version, of, done, models = (found[key] for key in ("sparsec_evaluation", "of", "done", "models"))
            shapes = {len(each["windows"]) == done and len(each["positions"]) == 3 for each in models.values()}
            sound = version == _VERSION and isinstance(of, dict) and shapes <= {True}
        except (OSError, ValueError, KeyError, TypeError):
            sound = False
        if not sound:
            raise DataError(
                f"{self.path}: is no evaluation of this version of sparsec, or it is damaged; delete it, or give another file"
            )
        for key in dict.fromkeys((*self.of, *of)):
            if self.of.get(key) != of.get(key):
                raise DataError(
                    f"{self.path}: is of another evaluation: {key} is {of.get(key)!r} there and {self.of.get(key)!r} here; give "
                    "another file, or delete it"
                )
        self.done, self._models = done, models


def fingerprint(model: nn.Module) -> str:
    """A hash of names, shapes, dtypes and some values of all parameters: the same for a checkpoint that is loaded again."""
    found = hashlib.sha256()
    for name, parameter in model.named_parameters():
        values = parameter.detach().reshape(-1)
        some = values[:: max(1, len(values) // _SAMPLES)].double().cpu()
        found.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        found.update(some.numpy().tobytes())
    return found.hexdigest()[:16]
