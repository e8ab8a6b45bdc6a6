"""What the kernel table measures: every shape, dtype, number of rows and mask, each with the formats that are tried on it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from sparsec.errors import SpecError
from sparsec.formats.layout import Layout
from sparsec.formats.parts import DENSE
from sparsec.patterns import Pattern

AUTO: Literal["auto"] = "auto"
"""What the cost model chooses."""
Asked = Layout | Literal["auto"]
"""A way to hold a weight, as `--formats` names it."""


def asked(text: str) -> Asked:
    """One of `--formats`. SpecError for what is none."""
    if text == AUTO:
        return AUTO
    try:
        return Layout.parse(text)
    except SpecError as error:
        raise SpecError(f"--formats takes layouts and auto, by commas: {error}") from None


def pattern_of(wanted: Asked) -> Pattern | None:
    """Of the masks that it is measured on; None for what is measured on those of the others."""
    return wanted.pattern if isinstance(wanted, Layout) and wanted.format != DENSE else None


@dataclass(frozen=True)
class Case:
    """One weight to be multiplied by, in all the formats that take turns on it."""

    out_features: int
    in_features: int
    pattern: Pattern
    sparsity: float
    dtype: str  # key of DTYPES
    rows: int
    formats: tuple[Asked, ...]
    count: int | None = None  # how often the model has this shape


def cases(
    shapes: dict[tuple[int, int], int | None],
    formats: Sequence[Asked],
    sparsities: Iterable[float],
    dtypes: Iterable[str],
    rows: Iterable[int],
) -> list[Case]:
    """All combinations. An N:M mask has its own sparsity, so it comes once."""
    everywhere = tuple(f for f in formats if pattern_of(f) is None)
    patterns = list(dict.fromkeys(p for f in formats if (p := pattern_of(f)) is not None)) or [Pattern()]
    shares = list(sparsities)
    return [
        Case(*shape, pattern, share, dtype, tokens, (*(f for f in formats if pattern_of(f) == pattern), *everywhere), n)
        for dtype in dtypes
        for shape, n in shapes.items()
        for tokens in rows
        for pattern in patterns
        for share in (shares if pattern.sparsity is None else [pattern.sparsity])
    ]
