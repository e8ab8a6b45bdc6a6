"""Storage formats of sparse matrices, in one explicit table."""

from __future__ import annotations

from sparsec.formats.base import Packed
from sparsec.formats.csr import CSR

FORMATS: dict[str, type[Packed]] = {CSR.format: CSR}

__all__ = ["CSR", "FORMATS", "Packed"]
