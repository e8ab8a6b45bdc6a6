"""Tensors of a checkpoint that no module of its model owns: they are named when it is loaded, and in what is saved of it."""

from __future__ import annotations

import warnings
from collections.abc import Iterable

from torch import nn

from sparsec.errors import SparsecWarning, some

_KEPT = "_sparsec_unowned"


def name_unowned(where: str, model: nn.Module, names: Iterable[str], told: bool = False) -> tuple[str, ...]:
    """Has the model and its copies remember them, and warns of them unless that was told already."""
    found = remember_unowned(model, names)
    if found and not told:
        they = "they are" if len(found) > 1 else "it is"
        warnings.warn(
            f"{where}: no module of {type(model).__name__} owns {some(found)}, so {they} not loaded, nor in what is "
            "saved of the model",
            SparsecWarning,
            stacklevel=2,
        )
    return found


def remember_unowned(model: nn.Module, names: Iterable[str]) -> tuple[str, ...]:
    """Has the model and its copies remember them; returns them in order."""
    found = tuple(sorted(names))
    if found:
        object.__setattr__(model, _KEPT, found)
    return found


def unowned(model: nn.Module) -> tuple[str, ...]:
    """What `name_unowned` named."""
    return tuple(vars(model).get(_KEPT, ()))
