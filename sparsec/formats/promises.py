"""A format of another package, held to what it promises: its faults are told in words that name it, and stop nothing else."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch

from sparsec.errors import OfferedError, SparsecError
from sparsec.formats.base import Packed

Found = TypeVar("Found")

_ATTRIBUTES: Mapping[str, tuple[type, type | None]] = {
    "format": (str, None),
    "title": (str, None),
    "dtypes": (tuple, torch.dtype),
    "tensor_names": (tuple, str),
    "scalar_names": (tuple, str),
    "parameters": (tuple, str),
    "checked": (tuple, str),
    "calibrated": (Mapping, None),
    "twins": (Mapping, None),
}
"""Of the class: what each must be, and what it must hold."""


def attribute_faults(kind: type[Packed]) -> list[str]:
    """What a class lacks to be a format."""
    faults = []
    for name, (wanted, inside) in _ATTRIBUTES.items():
        held: Any = getattr(kind, name, None)
        fits: bool = isinstance(held, wanted)
        if not fits or (inside is not None and not all(isinstance(each, inside) for each in held)):
            of = f" of {inside.__name__}" if inside is not None else ""
            faults.append(f"{name} must be a {wanted.__name__}{of}, got {held!r}")
    return faults


def kept(kind: type[Packed], what: str, call: Callable[[], Found], wanted: type) -> Found:
    """What a call into a format gives. OfferedError, naming both, where another package's raises or gives what it must not."""
    if kind.__module__.startswith("sparsec."):
        return call()
    name = f"the format {kind.format!r} ({kind.__module__}.{kind.__qualname__})"
    try:
        found = call()
    except SparsecError:
        raise
    except Exception as error:  # whatever a stranger's code raises
        raise OfferedError(f"{name}: {what} raised {type(error).__name__}: {error}; {_WAY_OUT}") from error
    if not isinstance(found, wanted):
        raise OfferedError(f"{name}: {what} must give a {wanted.__name__}, got {found!r}; {_WAY_OUT}")
    return found


def sound(packed: Packed, shape: tuple[int, ...]) -> Packed:
    """A matrix that a format has just packed, asked for all that a report or an operator will ask."""

    def asked() -> list[Any]:
        numbers = [packed.nnz, packed.dtype, packed.tensors(), packed.scalars(), packed.describe()]
        faults = packed.layout_faults()
        if not faults and packed.shape != tuple(shape):
            faults = [f"a matrix of {shape[0]}x{shape[1]} came out as {packed.shape[0]}x{packed.shape[1]}"]
        if faults:
            raise ValueError("; ".join(faults))
        return numbers

    if not type(packed).__module__.startswith("sparsec."):
        kept(type(packed), "what pack gave, when looked at,", asked, list)
    return packed


_WAY_OUT = "tell the author of that package, or do without it"
