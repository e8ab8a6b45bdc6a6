"""What one pruned weight looks like: how large its values are and which of them stayed, and where its zeros lie."""

from __future__ import annotations

from dataclasses import dataclass

GRID = 32
"""Cells of the grid along a side, at most."""


@dataclass(frozen=True)
class LayerView:
    """Of one matrix [out, in], before it is lowered."""

    name: str  # of the stored weight
    edges: tuple[
        float, ...
    ]  # of the bins of |w|: one more than there are bins, the last one the largest |w|; other bins are equal
    counts: tuple[int, ...]  # weights in each bin before any pass ran
    kept: tuple[int, ...]  # of these, those that the mask keeps
    threshold: (
        float | None
    )  # |w| below which every weight went and above which every one stayed; None where there is none
    zeros: tuple[tuple[float, ...], ...]  # share of zeros in each cell of a grid laid over the whole matrix, row by row
    corner: tuple[str, ...]  # the first rows and columns one by one: `#` is kept, `.` is zero
    sampled: int | None = None  # weights that the bins count, where they are fewer than the matrix has
    shape: tuple[int, int] = (0, 0)  # [out, in]; fused experts one below the other

    @property
    def sparsity(self) -> float:
        """Share of zeros: that of the cells, each weighed by its size."""
        across = [right - left for left, right in bands(self.shape[1])]
        down = [bottom - top for top, bottom in bands(self.shape[0])]
        zeros = sum(
            share * height * width
            for row, height in zip(self.zeros, down, strict=True)
            for share, width in zip(row, across, strict=True)
        )
        return zeros / (self.shape[0] * self.shape[1]) if zeros else 0.0


def bands(length: int) -> list[tuple[int, int]]:
    """(from, to) of the cells of the grid along a side of so many rows or columns."""
    count = min(GRID, length)
    return [(i * length // count, (i + 1) * length // count) for i in range(count)]
