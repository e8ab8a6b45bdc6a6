"""Storage formats of sparse matrices, in one explicit table."""

from __future__ import annotations

from sparsec.formats.base import Packed
from sparsec.formats.bitmap import Bitmap
from sparsec.formats.bsr import BSR
from sparsec.formats.csr import CSR
from sparsec.formats.nm import NM
from sparsec.formats.wcsr import WarpCSR

FORMATS: dict[str, type[Packed]] = {kind.format: kind for kind in (CSR, Bitmap, BSR, NM, WarpCSR)}

__all__ = ["BSR", "CSR", "FORMATS", "NM", "Bitmap", "Packed", "WarpCSR"]
