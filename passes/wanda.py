"""Wanda: score |W| * ||X_col||, compared per output row (Sun et al. 2023, arXiv:2306.11695)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from sparsec.calibrate import Statistics
from sparsec.pipeline.pruning import CalibratedPruning


@dataclass(frozen=True)
class Wanda(CalibratedPruning):
    """Masks, in every output row, the weights whose magnitude times the norm of their input column is smallest.

    Weights keep their values. `round(sparsity * in_features)` go in each row; N:M and blocks as the pattern says.
    """

    name: ClassVar[str] = "wanda"
    examples: ClassVar[tuple[str, ...]] = ("wanda(0.5)", "wanda(0.5, feed='dense')", "wanda(0.5, order='true')")

    def scores(self, matrix: Tensor, statistics: Statistics) -> Tensor:
        """By the norms alone."""
        return matrix.detach().float().abs() * statistics.norms
