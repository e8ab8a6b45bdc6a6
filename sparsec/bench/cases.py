"""What the kernel table measures: every shape, dtype, number of rows and mask, each with the formats that are tried on it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sparsec.errors import SpecError
from sparsec.patterns import Pattern

KNOWN = "csr8, csr16, csr32, wcsr8 and wcsr16 (for GPUs), bitmap, bsr16x16 (any block), nm2:4 (any N:M), dense, auto"
_FORMAT = re.compile(r"w?csr(?P<bits>8|16|32)|bitmap|bsr(?P<r>\d+)x(?P<c>\d+)|nm(?P<n>\d+):(?P<m>\d+)|dense|auto")


def random_mask(
    pattern: Pattern, out_features: int, in_features: int, sparsity: float, generator: torch.Generator
) -> Tensor:
    """Bool [out, in], True where kept, on the generator's device.

    Blocks and N:M hold their sparsity exactly; SpecError where they do not divide.
    """
    for why in pattern.misfits(out_features, in_features):
        raise SpecError(why)
    scores = torch.rand(out_features, in_features, generator=generator, device=generator.device)
    return scores >= sparsity if pattern == Pattern() else pattern.mask(scores, sparsity)


@dataclass(frozen=True)
class Format:
    """A way to hold a weight, as `--formats` names it."""

    label: str
    name: str  # key of FORMATS, "dense", or "auto"
    options: dict[str, Any] = field(default_factory=dict)  # of pack
    pattern: Pattern | None = None  # of the masks that it is measured on; None: whatever the others are measured on

    @classmethod
    def parse(cls, label: str) -> Format:
        """SpecError for what is no format."""
        found = _FORMAT.fullmatch(label)
        if found is None or label == "wcsr32":
            raise SpecError(f"--formats takes {KNOWN}, by commas; got {label!r}")
        numbers = {key: int(text) for key, text in found.groupdict().items() if text is not None}
        match label[:3]:
            case "csr":
                return cls(label, "csr", {"index_bits": numbers["bits"]}, Pattern())
            case "wcs":
                return cls(label, "wcsr", {"index_bits": numbers["bits"]}, Pattern())
            case "bit":
                return cls(label, "bitmap", {}, Pattern())
            case "bsr":
                block = (numbers["r"], numbers["c"])
                _require(block[0] > 0 and block[0] % 8 == 0, f"--formats: {label}: a block has a multiple of 8 rows")
                _require(block[1] > 0, f"--formats: {label}: a block has at least one column")
                return cls(label, "bsr", {"block": block}, Pattern(block=block))
        if label.startswith("nm"):
            n, m = numbers["n"], numbers["m"]
            _require(m in (4, 8) and 0 < n < m, f"--formats: {label}: N:M is packed for M of 4 and 8 and 0 < N < M")
            return cls(label, "nm", {}, Pattern(nm=(n, m)))
        return cls(label, label)


@dataclass(frozen=True)
class Case:
    """One weight to be multiplied by, in all the formats that take turns on it."""

    out_features: int
    in_features: int
    pattern: Pattern
    sparsity: float
    dtype: str  # key of DTYPES
    rows: int
    formats: tuple[Format, ...]
    count: int | None = None  # how often the model has this shape


def cases(
    shapes: dict[tuple[int, int], int | None],
    formats: Sequence[Format],
    sparsities: Iterable[float],
    dtypes: Iterable[str],
    rows: Iterable[int],
) -> list[Case]:
    """All combinations. An N:M mask has its own sparsity, so it comes once."""
    everywhere = tuple(f for f in formats if f.pattern is None)
    patterns = list(dict.fromkeys(f.pattern for f in formats if f.pattern is not None)) or [Pattern()]
    shares = list(sparsities)
    return [
        Case(*shape, pattern, share, dtype, tokens, (*(f for f in formats if f.pattern == pattern), *everywhere), n)
        for dtype in dtypes
        for shape, n in shapes.items()
        for tokens in rows
        for pattern in patterns
        for share in (shares if pattern.sparsity is None else [pattern.sparsity])
    ]


def _require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise SpecError(otherwise)
