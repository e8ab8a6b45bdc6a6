"""Shapes as text and numbers: an open size is `batch`, `length`, or an expression of them such as `batch*length`."""

from __future__ import annotations

from typing import Any

import sympy  # type: ignore[import-untyped]
import torch
from torch import fx

from sparsec.ir.facts import Dim


def size_names(
    placeholders: dict[str, fx.Node], dims: tuple[tuple[str, int, str], ...]
) -> dict[sympy.Symbol, sympy.Symbol]:
    """The name of every symbol that export made for the open sizes of the inputs.

    Sizes that were equal in the example and stand at the same dimension share a name, as tokens and attention mask do; others
    are named after their input.
    """
    names: dict[sympy.Symbol, sympy.Symbol] = {}
    hints: dict[str, int] = {}
    for key, dim, name in dims:
        size = placeholders[key].meta["val"].shape[dim]
        if not isinstance(size, torch.SymInt) or not isinstance(size.node.expr, sympy.Symbol):
            continue
        same = hints.setdefault(name, size.node.hint) == size.node.hint
        names.setdefault(size.node.expr, sympy.Symbol(name if same else f"{key}_{name}", integer=True, positive=True))
    return names


def shape_of(value: Any, names: dict[sympy.Symbol, sympy.Symbol]) -> tuple[Dim, ...] | None:
    """The shape of a node's traced value; None for what is not one tensor."""
    if not isinstance(value, torch.Tensor):
        return None
    return tuple(_dim(size, names) for size in value.shape)


def _dim(size: int | torch.SymInt, names: dict[sympy.Symbol, sympy.Symbol]) -> Dim:
    if isinstance(size, int):
        return size
    expression = size.node.expr.xreplace(names)
    return int(expression) if expression.is_number else str(expression)
