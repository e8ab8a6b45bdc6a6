"""What pruning did to each weight, kept while the passes run: how large its values were, which of them stayed, where the zeros lie.

Before the first pass every matrix that could be pruned is sampled: each value drawn leaves one byte, the number of its bin. So
the histogram of what stayed is that of the values as they came, also where a pass (SparseGPT) changes those that it keeps.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.weak import TensorWeakRef

from sparsec.ir.facts import Weight
from sparsec.ir.graph import Graph
from sparsec.ir.verifier import TensorState
from sparsec.pipeline import Pass
from sparsec.pipeline.base import Effect
from sparsec.report.views import LayerView, bands

BINS = 48
COMMON, REACH = 0.99, 1.25
"""The last bin begins at REACH times the |w| below which the share COMMON of the values lies, where the largest is further off."""
SAMPLE = 1 << 18
"""Values of a weight that are drawn at most: 50 MB for the 196 matrices of a model of 1.5 billion weights."""
CORNER = 64
"""Rows and columns shown one by one, at most."""
_PIECE = 1 << 20  # values that are looked at together, so that little memory is taken beside the weight


class LayerViews:
    """An instrument: `views = LayerViews(); sparsec.compile(model, ..., instruments=[views]); views.found()`.

    It tells of the last compilation that it watched, `extend` of the same model included. Fused experts [experts, out, in] are
    one matrix [experts * out, in], one expert below the other. What a pass makes anew under another shape is left out.
    """

    def __init__(self) -> None:
        self._watched: dict[str, _Watched] = {}

    @property
    def nbytes(self) -> int:
        """Bytes held by the samples."""
        return sum(w.bins.nbytes for w in self._watched.values())

    @contextmanager
    def around(self, index: int, p: Pass, graph: Graph) -> Iterator[None]:
        """Samples what it has not seen yet; afterwards looks at every mask that is another one."""
        if index == 1:
            self._watched.clear()
        for weight in list(graph.weights.values()):
            if (watched := self._watched.get(weight.name)) is not None:
                watched.enter(graph)
            elif (first := _Watched.first(graph, weight)) is not None:
                self._watched[weight.name] = first
        yield
        for watched in self._watched.values():
            watched.leave(graph, changing=p.effect is Effect.LOSSY)

    def found(self) -> tuple[LayerView, ...]:
        """Of every weight that was pruned, in the order of the graph."""
        return tuple(w.view for w in self._watched.values() if w.view is not None)


@dataclass(eq=False)
class _Watched:
    """One weight."""

    name: str
    shape: tuple[int, int]  # [out, in], experts one below the other
    top: float  # the largest |w|
    last: float  # where the last bin begins: the others are equal, and a few large values shall not press all into the first
    bins: Tensor  # uint8 [sample], by value drawn
    state: TensorState  # when a pass was last left
    original: bool = True  # whether what is kept has the values that it came with
    largest: float = 0.0  # |w| of what was pruned, as long as that is known
    mask: TensorWeakRef | None = None  # the last one that was looked at
    kept: int = -1
    view: LayerView | None = None

    @classmethod
    def first(cls, graph: Graph, weight: Weight) -> _Watched | None:
        """As it is before a pass; None for what is no matrix that could be pruned, or holds no numbers to sort into bins."""
        if weight.packed is not None or not weight.numel or not graph.prunable(weight.name):
            return None
        tensor = graph.tensor(weight.name)
        if tensor.is_meta or not tensor.is_floating_point():
            return None
        matrices = graph.matrices(weight.name)
        low, high = zip(*(map(float, torch.aminmax(m)) for m in matrices), strict=True)
        top = max(abs(min(low)), abs(max(high)))
        if not top < float("inf"):  # NaN too
            return None
        shape = (sum(len(m) for m in matrices), matrices[0].shape[1])
        size = _drawn(matrices, shape).float().abs()
        last = min(top * (BINS - 1) / BINS, REACH * float(size.kthvalue(max(1, round(COMMON * len(size)))).values))
        last = last or top * (BINS - 1) / BINS  # nearly all are 0
        return cls(weight.name, shape, top, last, _bins(size, last), TensorState(tensor))

    def enter(self, graph: Graph) -> None:
        """Whoever held it since the last pass may have changed it: to zeros under its mask, or in training."""
        weight = self._held(graph)
        if weight is None or not self.original or self.state == (now := TensorState(graph.tensor(weight.name))):
            return
        self.state = now
        same = _bins(_drawn(graph.matrices(weight.name), self.shape).float().abs(), self.last) == self.bins
        if weight.mask is not None:
            masks = [mask for mask in graph.mask_matrices(weight.name) if mask is not None]
            same |= ~_drawn(masks, self.shape).cpu()
        self.original = bool(same.all())

    def leave(self, graph: Graph, changing: bool) -> None:
        """After a pass. changing: it may have written other values than zeros under a mask."""
        weight = self._held(graph)
        if weight is None:
            return
        state = TensorState(graph.tensor(weight.name))
        self.original &= not changing or self.state == state
        self.state = state
        if weight.mask is None or (self.mask is not None and self.mask() is weight.mask):
            return
        self.mask = TensorWeakRef(weight.mask)
        kept = graph.kept(weight.name)
        if kept == self.kept:  # a copy: a mask that another pass made keeps fewer
            return
        self.kept = kept
        masks = [mask for mask in graph.mask_matrices(weight.name) if mask is not None]
        if kept == weight.numel:
            self.view = None
            return
        threshold = self._threshold(graph.matrices(weight.name), masks) if self.original else None
        self.view = self._view(masks, threshold)

    def _held(self, graph: Graph) -> Weight | None:
        weight = graph.weights.get(self.name)
        if weight is None or weight.packed is not None:
            return None
        rows, columns = self.shape
        stacked = weight.numel == rows * columns and weight.matrix_shape[1] == columns
        return weight if stacked and not graph.tensor(self.name).is_meta else None

    def _threshold(self, matrices: Sequence[Tensor], masks: Sequence[Tensor]) -> float | None:
        least = float("inf")
        for matrix, mask in zip(matrices, masks, strict=True):
            step = max(1, _PIECE // matrix.shape[1])
            for values, kept in zip(torch.split(matrix, step), torch.split(mask, step), strict=True):
                size = values.abs()
                self.largest = max(self.largest, float(size.masked_fill(kept, 0.0).amax()))
                least = min(least, float(size.masked_fill_(~kept, float("inf")).amin()))
        if self.largest > least:
            return None
        return least if least < float("inf") else self.largest

    def _view(self, masks: Sequence[Tensor], threshold: float | None) -> LayerView:
        kept = _drawn(masks, self.shape).cpu()
        rows, columns = self.shape
        corner = torch.cat([mask[:CORNER, :CORNER] for mask in masks])[:CORNER].cpu()
        return LayerView(
            name=self.name,
            edges=(*(self.last * i / (BINS - 1) for i in range(BINS)), self.top),
            counts=_counts(self.bins),
            kept=_counts(self.bins[kept]),
            threshold=threshold,
            zeros=_zeros(masks, self.shape),
            corner=tuple("".join("#" if stayed else "." for stayed in row) for row in corner.tolist()),
            sampled=len(self.bins) if len(self.bins) < rows * columns else None,
            shape=self.shape,
        )


def _bins(size: Tensor, last: float) -> Tensor:
    """The bin of each |value|, uint8."""
    return (size * ((BINS - 1) / last) if last else size).clamp_(max=BINS - 1).to(torch.uint8).cpu()


def _counts(bins: Tensor) -> tuple[int, ...]:
    return tuple(torch.bincount(bins.int(), minlength=BINS).tolist())


def _drawn(matrices: Sequence[Tensor], shape: tuple[int, int]) -> Tensor:
    """At most SAMPLE of the values, always at the same places of one shape: one at random out of every stretch of equal length.

    Not every n-th: a pattern such as 2:4 would show one of its four places alone.
    """
    rows, columns = shape
    numel = rows * columns
    drawn = min(SAMPLE, numel)
    places = torch.arange(drawn, dtype=torch.float64)
    if drawn < numel:
        places += torch.rand(drawn, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    places = (places * (numel / drawn)).long().clamp_(max=numel - 1)
    found, begin = [], 0
    for matrix in matrices:
        end = begin + matrix.numel()
        own = (places[(places >= begin) & (places < end)] - begin).to(matrix.device)
        found.append(matrix[own // columns, own % columns])
        begin = end
    return torch.cat(found)


def _zeros(masks: Sequence[Tensor], shape: tuple[int, int]) -> tuple[tuple[float, ...], ...]:
    """Share of zeros in each cell; cell i of n along a side of length l goes from i * l // n to (i + 1) * l // n."""
    down, across = bands(shape[0]), bands(shape[1])
    sums = torch.zeros(len(down), shape[1], dtype=torch.int64)
    begin = 0
    for mask in masks:
        for i, (top, bottom) in enumerate(down):
            own = mask[max(0, top - begin) : max(0, bottom - begin)]
            if len(own):
                sums[i] += len(own) - own.sum(dim=0, dtype=torch.int64).cpu()
        begin += len(mask)
    ends = sums.cumsum(dim=1)[:, [right - 1 for _, right in across]]
    grid = ends.diff(dim=1, prepend=torch.zeros_like(ends[:, :1])).tolist()
    return tuple(
        tuple(zeros / ((bottom - top) * (right - left)) for zeros, (left, right) in zip(row, across, strict=True))
        for row, (top, bottom) in zip(grid, down, strict=True)
    )
