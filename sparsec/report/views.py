"""What one pruned weight looks like: how large its values are and which of them stayed, and where its zeros lie."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LayerView:
    """Of one matrix [out, in], before it is lowered."""

    name: str  # of the stored weight
    edges: tuple[float, ...]  # of the bins of |w|: one more than there are bins
    counts: tuple[int, ...]  # weights in each bin before any pass ran
    kept: tuple[int, ...]  # of these, those that the mask keeps
    threshold: (
        float | None
    )  # |w| below which every weight went and above which every one stayed; None where there is none
    zeros: tuple[tuple[float, ...], ...]  # share of zeros in each cell of a grid laid over the whole matrix, row by row
    corner: tuple[str, ...]  # the first rows and columns one by one: `#` is kept, `.` is zero
    sampled: int | None = None  # weights that the bins count, where they are fewer than the matrix has
