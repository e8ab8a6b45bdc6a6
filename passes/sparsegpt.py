"""SparseGPT: prunes column by column and lets the weights that stay make up for those that go.

Frantar and Alistarh 2023, arXiv:2301.00774. Notation as there: H is the Hessian of a layer's squared output error, the Gram matrix
of its inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import ClassVar

import torch
from torch import Tensor

from sparsec.calibrate import Statistics
from sparsec.calibrate.factor import factor_bytes, inverse_factor
from sparsec.errors import SpecError
from sparsec.patterns import Pattern
from sparsec.pipeline.options import check_positive
from sparsec.pipeline.pruning import CalibratedPruning
from sparsec.pipeline.settled import joined_masks

BLOCK_SIZE = 128
"""The paper's."""
_FOR_ONE_THREAD = (1 << 15) - 1
"""Numbers that torch does not share among threads."""


@dataclass(frozen=True)
class SparseGPT(CalibratedPruning):
    """Masks by the error that losing a weight makes once the others have made up for it, and writes those updates.

    block_size: columns whose masks are chosen together; None: 128, or the next multiple of what the pattern groups. damping: share
    of the mean of H's diagonal that is added to it; raised tenfold, and said so, while H cannot be factored.
    """

    name: ClassVar[str] = "sparsegpt"
    examples: ClassVar[tuple[str, ...]] = (
        "sparsegpt(0.5)",
        "sparsegpt(0.5, block_size=2, damping=0.1, feed='dense')",
        "sparsegpt(0.5, order='true')",
    )
    gram: ClassVar[bool] = True

    block_size: int | None = field(default=None, kw_only=True)
    damping: float = field(default=0.01, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.block_size is not None:
            check_positive(self.block_size, "block_size")
        if self._columns % self._wide:
            raise SpecError(
                f"block_size must be a multiple of {self._wide} for pattern {self.pattern!r}, got {self.block_size}"
            )
        if isinstance(self.damping, bool) or not isinstance(self.damping, int | float) or not 0 < self.damping <= 1:
            raise SpecError(f"damping must be in (0, 1], got {self.damping!r}; the paper's is 0.01")

    @property
    def _wide(self) -> int:
        """Columns that the pattern groups."""
        pattern = Pattern.parse(self.pattern)
        return (pattern.nm or pattern.block or (1, 1))[1]

    @property
    def _columns(self) -> int:
        """Whose masks are chosen together."""
        return -(-BLOCK_SIZE // self._wide) * self._wide if self.block_size is None else self.block_size

    def prune(
        self, matrices: Sequence[Tensor], old: Sequence[Tensor | None], shares: Sequence[float], statistics: Statistics
    ) -> tuple[list[Tensor], list[Tensor], list[str]]:
        """All matrices together, since they share the factor; masks are chosen for each by itself."""
        factor, dead, notes = inverse_factor(statistics.gram, self.damping)
        if dead.any():
            notes.insert(
                0, f"{int(dead.sum())} of {len(dead)} input columns are zero in all of the text; their weights go"
            )
        rows = [len(m) for m in matrices]
        weights = torch.cat([m.detach() for m in matrices]).float()
        weights[:, dead] = 0
        before = joined_masks(matrices, old)
        mask = solve(weights, factor, shares, Pattern.parse(self.pattern), self._columns, rows, before)
        return list(torch.split(mask, rows)), list(torch.split(weights, rows)), notes

    def scratch(self, rows: Sequence[int], in_features: int) -> int:
        """The factor while it is made; then that in fp32, the weights in fp32 three times, and the mask."""
        return max(factor_bytes(in_features), (4 * in_features + 13 * sum(rows)) * in_features)

    def enough(self, in_features: int) -> int:
        """Fewer tokens than columns leave the Gram matrix singular."""
        return in_features


def solve(
    weights: Tensor,
    factor: Tensor,
    shares: Sequence[float],
    pattern: Pattern,
    block_size: int,
    rows: Sequence[int],
    old: Tensor | None = None,
) -> Tensor:
    """Prunes weights [out, in] in place and returns the mask; algorithm 1 of the paper.

    factor: upper [in, in] of `inverse_factor`. rows, shares: how many rows each of the matrices has whose masks are chosen for
    itself, and how sparse it shall be. Unstructured masks reach `round(share * seen)` zeros after each block of columns, and so in
    the whole matrix; blocks of the pattern, likewise, and N:M exactly in every group. What `old` removed stays removed and counts.
    """
    out_features, in_features = weights.shape
    mask = torch.empty(weights.shape, dtype=torch.bool, device=weights.device)
    if old is not None:
        weights.masked_fill_(~old, 0)
    turned = weights.t().contiguous()  # a column is then in one piece
    parts = [(slice(top - n, top), share) for top, n, share in zip(accumulate(rows), rows, shares, strict=True)]
    for start in range(0, in_features, block_size):
        end = min(start + block_size, in_features)
        local = factor[start:end, start:end]
        columns = turned[start:end]
        kept = mask[:, start:end]
        wide = pattern.nm[1] if pattern.nm is not None else end - start
        errors = torch.empty(end - start, out_features, dtype=weights.dtype, device=weights.device)
        step = _step(out_features, pattern.nm[1] if pattern.nm is not None else 1)
        for first in range(0, end - start, step):
            last = min(first + step, end - start)
            for i in range(first, last):
                if i % wide == 0:  # N:M masks see the updates of the groups before them
                    group = slice(i, i + wide)
                    scores = columns[group].t() / local.diagonal()[group]
                    these = slice(start + i, min(start + i + wide, end))
                    for part, share in parts:
                        before = None if old is None else old[part, these]
                        pattern.extend(mask[part], these, scores[part], share, before)
                column = columns[i]
                error = column.masked_fill(kept[:, i], 0) / local[i, i]
                columns[i:last] -= torch.outer(local[i, i:last], error)
                columns[i].masked_fill_(~kept[:, i], 0)
                errors[i] = error
            if last < end - start:
                columns[last:].addmm_(local[first:last, last:].t(), errors[first:last], alpha=-1)
        if end < in_features:
            turned[end:].addmm_(factor[start:end, end:].t(), errors, alpha=-1)
    weights.copy_(turned.t())
    return mask


def _step(out_features: int, wide: int) -> int:
    """How many columns, whole groups of `wide`, are updated one by one before the rest of their block is, in one product.

    So few that torch does not share an update among threads, each of which may come late where the machine is busy.
    """
    step = max(_FOR_ONE_THREAD // max(1, out_features), 8)
    return max(1, step // wide) * wide
