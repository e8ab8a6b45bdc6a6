"""N:M of quantised values on a GPU: a bitmap, whose rows keep as many of every m columns."""

from __future__ import annotations

from sparsec.kernels.gpu.bitmap_int import bitmap_int as nm_int

__all__ = ["nm_int"]
