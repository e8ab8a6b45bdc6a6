"""Storage formats of sparse matrices, in one explicit table.

A package offers a format by an entry point of the group `sparsec.formats` that names its class, a subclass of `Packed`:

    [project.entry-points."sparsec.formats"]
    my_format = "my_package.my_module:MyFormat"

It is lowered to as any other, `lower(my_format)`, and runs on its reference kernel until a package offers another one
(sparsec/kernels/registry.py).
"""

from __future__ import annotations

import functools
import inspect
import re
import warnings

from sparsec.errors import FormatError
from sparsec.formats.base import Packed
from sparsec.formats.bitmap import Bitmap
from sparsec.formats.bsr import BSR
from sparsec.formats.coded import QUANTISED
from sparsec.formats.csr import CSR
from sparsec.formats.nm import NM
from sparsec.formats.promises import attribute_faults
from sparsec.formats.wcsr import WarpCSR
from sparsec.offered import offered

FORMATS: dict[str, type[Packed]] = {kind.format: kind for kind in (CSR, Bitmap, BSR, NM, WarpCSR)}

ENTRY_POINTS = "sparsec.formats"


def kinds() -> dict[str, type[Packed]]:
    """Every class of packed matrices by its own `format`, which its operator and kernels are named after: those of FORMATS, and
    those with quantised values."""
    return {**FORMATS, **{kind.format: kind for kind in QUANTISED.values()}}


def add(kind: type[Packed]) -> None:
    """Puts a format into the table. FormatError for what is no format, or one whose name is taken."""
    if not (isinstance(kind, type) and issubclass(kind, Packed)) or inspect.isabstract(kind):
        raise FormatError(f"{kind!r} is no format: it must be a subclass of sparsec.formats.Packed that lacks nothing")
    if faults := attribute_faults(kind):
        raise FormatError(f"{kind.__qualname__} is no format: {'; '.join(faults)}")
    if re.fullmatch("[a-z_]+", kind.format) is None or kind.format == "dense":
        raise FormatError(f"the format {kind.format!r} must be called by small letters, and not dense")
    if (other := kinds().get(kind.format, kind)) is not kind:
        raise FormatError(f"the name {kind.format!r} is taken by {other.__name__}")
    FORMATS[kind.format] = kind


@functools.cache
def take_offered() -> None:
    """Puts the formats of installed packages into the table, once; one that cannot be is left out with a warning."""
    for what, kind in offered(ENTRY_POINTS):
        try:
            add(kind)
        except FormatError as error:
            warnings.warn(f"{what} is left out: {error}", stacklevel=2)


__all__ = ["BSR", "CSR", "FORMATS", "NM", "QUANTISED", "Bitmap", "Packed", "WarpCSR", "add"]
