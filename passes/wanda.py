"""Wanda: score |W| * ||X_col||, compared per output row (Sun et al. 2023, arXiv:2306.11695)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from sparsec.calibrate import Statistics
from sparsec.patterns import Pattern, unstructured_rows
from sparsec.pipeline.pruning import CalibratedPruning


@dataclass(frozen=True)
class Wanda(CalibratedPruning):
    """Masks, in every output row, the weights whose magnitude times the norm of their input column is smallest.

    Weights keep their values. `round(sparsity * in_features)` go in each row; N:M and blocks as the pattern says.
    """

    name: ClassVar[str] = "wanda"

    def prune(
        self, matrices: Sequence[Tensor], old: Sequence[Tensor | None], shares: Sequence[float], statistics: Statistics
    ) -> tuple[list[Tensor], None, list[str]]:
        """By the norms alone."""
        pattern, norms = Pattern.parse(self.pattern), statistics.norms
        masks = []
        for matrix, before, share in zip(matrices, old, shares, strict=True):
            scores = matrix.detach().float().abs() * norms
            free = pattern == Pattern()
            masks.append(unstructured_rows(scores, share, before) if free else pattern.mask(scores, share, before))
        dead = int((norms == 0).sum())
        return masks, None, [f"{dead} of {len(norms)} input columns are zero in all of the text"] if dead else []
