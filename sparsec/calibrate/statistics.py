"""What pruning needs to know of the value that a linear reads: column norms (Wanda), the Gram matrix (SparseGPT), some rows.

All of them are sums over tokens, so that one block's activations are in memory at a time and never the whole text's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from sparsec.ranks import Ranks

SAMPLE = 512
"""Rows of x that are kept, to tell what pruning does to a layer's outputs."""
_BANDS = 4


class Statistics:
    """Of one value x [..., in_features] over the tokens added so far.

    squares: float64 [in], the sum of x**2 by column. gram: float32 [in, in], the sum of x.T @ x, where asked for.
    sample: float32 [rows, in], rows taken at equal distances. blind: nothing but zeros was seen, so all columns count alike.
    """

    def __init__(self, in_features: int, gram: bool, per_call: int, calls: int, device: torch.device) -> None:
        self.tokens = 0
        self.blind = False
        self.squares = torch.zeros(in_features, dtype=torch.float64, device=device)
        self._gram = torch.zeros(in_features, in_features, device=device) if gram else None
        self._per_call = per_call
        # Taken at once: pieces that stay, between the temporaries of forward passes, kept the heap half a 135M model larger.
        self._sample = torch.empty(per_call * calls, in_features, device=device)
        self._sampled = 0

    def add(self, x: Tensor) -> None:
        """x: [..., in_features] of any float dtype."""
        rows = x.detach().reshape(-1, x.shape[-1]).float()
        self.tokens += len(rows)
        some = rows[:: max(1, len(rows) // self._per_call)][: self._per_call]
        self._sample[self._sampled : self._sampled + len(some)] = some
        self._sampled += len(some)
        if self._gram is not None:
            _add_products(self._gram, rows)
        else:
            self.squares += rows.square().sum(0)  # three to five times as fast as a norm down the columns

    def joined(self, counts: Tensor, rank: int) -> Iterator[Tensor]:
        """What is to be added up over the ranks, after this. counts: [2, ranks] of tokens and of sampled rows."""
        rows, before = self._sample[: self._sampled], int(counts[1, :rank].sum())
        self.tokens, self._sampled = (int(n) for n in counts.sum(1))
        self._sample = rows.new_zeros(self._sampled, rows.shape[1])
        self._sample[before : before + len(rows)] = rows
        yield self._sample
        if self._gram is None:
            yield self.squares
        else:
            yield from (self._gram[band, band.start :] for band in _bands(len(self._gram)))

    def settle(self) -> None:
        """After the last `add`: the parts that were left out are filled in."""
        if self._gram is not None:
            for band in _bands(len(self._gram)):
                corner = self._gram[band, band]
                corner.copy_(corner.triu() + corner.triu(1).t())
                self._gram[band.stop :, band] = self._gram[band, band.stop :].t()
            self.squares = self._gram.diagonal().double()
        self.blind = not bool(self.squares.any())
        if self.blind:
            self.squares = torch.ones_like(self.squares)
            if self._gram is not None:
                self._gram.fill_diagonal_(1.0)

    @property
    def gram(self) -> Tensor:
        """[in, in]."""
        assert self._gram is not None, "these statistics were made without a Gram matrix"
        return self._gram

    @property
    def with_gram(self) -> bool:
        """Whether there is one."""
        return self._gram is not None

    @property
    def norms(self) -> Tensor:
        """Root mean square of each column, float32 [in]."""
        return (self.squares / max(1, self.tokens)).sqrt().float()

    @property
    def sample(self) -> Tensor:
        """[rows, in], at most SAMPLE and one for every call."""
        return self._sample[: self._sampled]

    @property
    def nbytes(self) -> int:
        """Held."""
        held = [self.squares, self._sample, *([] if self._gram is None else [self._gram])]
        return sum(t.numel() * t.itemsize for t in held)

    @property
    def finite(self) -> bool:
        """Whether no NaN or inf was in what was added."""
        return bool(self.squares.isfinite().all())


@torch.no_grad()
def join_statistics(parts: Sequence[Statistics], owners: Sequence[int], ranks: Ranks) -> None:
    """Of what every rank saw by itself, the statistics of what all of them saw: each at its owner. Before `settle`."""
    if ranks.alone:
        return
    counts = torch.zeros(len(parts), 2, ranks.count, dtype=torch.int64)
    for of_one, part in zip(counts, parts, strict=True):
        of_one[:, ranks.number] = torch.tensor([part.tokens, part._sampled])
    ranks.sum([counts])
    ranks.add_up(
        (tensor, owner)
        for part, owner, of_one in zip(parts, owners, counts, strict=True)
        for tensor in part.joined(of_one, ranks.number)
    )


def _bands(n: int) -> Iterator[slice]:
    """Of columns: four, whose blocks on and above the diagonal are 10 of 16."""
    size = max(64, -(-n // _BANDS))
    return (slice(start, start + size) for start in range(0, n, size))


def _add_products(gram: Tensor, rows: Tensor) -> None:
    """gram += rows.T @ rows, on and above the diagonal: by bands of columns."""
    for band in _bands(gram.shape[0]):
        gram[band, band.start :].addmm_(rows[:, band].t(), rows[:, band.start :])
