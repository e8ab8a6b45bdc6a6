"""One weight while its matrices are pruned one by one: what was made of them, and what that changes in the outputs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sparsec import serial
from sparsec.ir.graph import Graph


class Settled:
    """One weight while its matrices are pruned one by one."""

    def __init__(self, graph: Graph, name: str, share: float, dense: Tensor | None) -> None:
        self.weight, self.share = graph.weights[name], share
        self.matrices, self.old = graph.matrices(name, dense), graph.mask_matrices(name)
        self.masks: list[Tensor] = []
        self.updated: list[Tensor] = []
        self._dense = self._masked = self._lost = 0.0

    def masked(self, number: int) -> Tensor:
        """A matrix [out, in], zero where its earlier mask removed."""
        return _masked(self.matrices[number], self.old[number])

    def add(self, before: Tensor, mask: Tensor, updated: Tensor | None, sample: Tensor) -> None:
        """The next matrix. sample: rows [rows, in] that it reads."""
        self.masks.append(mask)
        self._dense += _squares(before, sample)
        masked = _squares(before.float() - _masked(before, mask).float(), sample)
        self._masked += masked
        if updated is not None:
            self.updated.append(updated)
            masked = _squares(before.float() - updated.to(self.weight.dtype).float(), sample)
        self._lost += masked

    @property
    def errors(self) -> tuple[float, float]:
        """By the masks, and with the updates: mean square of the change of the outputs over that of the outputs."""
        return (self._masked / self._dense, self._lost / self._dense) if self._dense > 0 else (0.0, 0.0)


def joined_masks(matrices: Sequence[Tensor], old: Sequence[Tensor | None]) -> Tensor | None:
    """Earlier masks of matrices [out, in], one below the other, for those that are solved together; None where there is none."""
    if all(mask is None for mask in old):
        return None
    pairs = zip(matrices, old, strict=True)
    return torch.cat([torch.ones_like(w, dtype=torch.bool) if mask is None else mask for w, mask in pairs])


def _masked(matrix: Tensor, mask: Tensor | None) -> Tensor:
    return matrix if mask is None else serial.masked(matrix, mask)


def _squares(matrix: Tensor, sample: Tensor) -> float:
    """Sum of the squares of matrix @ x over sampled rows x [rows, in]."""
    return float((sample @ matrix.float().t()).square().sum(dtype=torch.float64))
