"""Kernels: operators on packed matrices, the table that chooses among them, and SparseLinear.

Importing this package builds nothing; the first product on a CPU, or the first question about kernels, does.
"""

from __future__ import annotations

from sparsec.kernels.library.loader import NativeStatus, force_isa, status
from sparsec.kernels.modules.sparse_linear import SparseLinear
from sparsec.kernels.ops import operator, operator_args
from sparsec.kernels.reference import tolerance
from sparsec.kernels.registry import KERNELS, Kernel, Problem, add, known, select

__all__ = [
    "KERNELS",
    "Kernel",
    "NativeStatus",
    "Problem",
    "SparseLinear",
    "add",
    "force_isa",
    "known",
    "operator",
    "operator_args",
    "select",
    "status",
    "tolerance",
]
