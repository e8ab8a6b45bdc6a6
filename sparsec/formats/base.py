"""What every storage format promises: the bytes it holds, the work it asks for, and the matrix that comes back out.

A format gives bytes and FLOPs; a kernel gives speed. Only the `lower` pass joins the two.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar, Self

import torch
from torch import Tensor


class Packed(ABC):
    """One sparse matrix [out_features, in_features] in packed form.

    Subclasses are frozen dataclasses (`eq=False`, since they hold tensors). Each also has

        @classmethod
        def pack(cls, weight: Tensor, mask: Tensor, **options) -> Self

    where weight is [out, in], mask is a bool tensor of the same shape with True where a weight is kept, and the kept values
    are stored bit for bit, whatever they are (zeros, NaN and inf included).
    """

    format: ClassVar[str]

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """Every tensor held, by name, in the order in which the operator takes them."""

    @abstractmethod
    def scalars(self) -> dict[str, int]:
        """The integers that the tensors do not tell, in the order in which the operator takes them."""

    @classmethod
    @abstractmethod
    def from_parts(cls, tensors: Mapping[str, Tensor], scalars: Mapping[str, int]) -> Self:
        """The inverse of `tensors()` and `scalars()`; does not check."""

    @property
    @abstractmethod
    def nnz(self) -> int:
        """Number of kept weights (the mask's sum, not a count of values that differ from zero)."""

    @abstractmethod
    def unpack(self) -> Tensor:
        """The dense matrix [out, in]: `where(mask, weight, 0)` bit for bit."""

    @abstractmethod
    def check(self) -> None:
        """Raises FormatError, naming the field, when the tensors do not form a valid matrix."""

    @abstractmethod
    def describe(self) -> str:
        """The format with its parameters, such as `csr16`."""

    @property
    def dtype(self) -> torch.dtype:
        """dtype of the values."""
        return self.tensors()["values"].dtype

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors held."""
        return sum(t.numel() * t.element_size() for t in self.tensors().values())

    @property
    def sparsity(self) -> float:
        """Share of zeros, 0 for an empty matrix."""
        total = self.shape[0] * self.shape[1]
        return 1.0 - self.nnz / total if total else 0.0

    @property
    def flops_per_token(self) -> int:
        """Multiply-adds count 2."""
        return 2 * self.nnz
