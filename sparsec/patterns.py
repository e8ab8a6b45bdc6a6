"""Scores in, masks out: the one place where "prune this share" becomes True and False.

A pruning algorithm gives scores (the larger in absolute value, the more a weight matters; so the weights themselves are the scores
of magnitude pruning, with no copy); how many stay, compared with which others, is decided here, so that no algorithm has
variants by pattern. A mask is True where a weight is kept. Scores must not hold NaN: the caller checks, since it knows the name.

Counts are exact: `round(sparsity * total)` entries are zero. Equal scores fall by position: the earlier one is pruned first.
Entries that an earlier mask removed stay removed and count towards the target.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, Self

import numpy as np
import torch
from torch import Tensor

from sparsec.errors import SpecError

CHUNK = 3 << 13
"""Scores looked at together on a CPU: bounds the scratch memory, not the result.

torch gives tensors of 2**15 numbers and more to several threads, and where another process is busy on the machine every such
operation may wait milliseconds for one of them.
"""

SEARCH = 1 << 21
"""Bytes that the search for a threshold takes beside scores and masks: counters, and a chunk of keys."""
_CHUNK_ELSEWHERE = 1 << 20  # where every operation is a launch

Compared = Literal["layer", "row"]

_PATTERN = re.compile(r"(?P<n>\d+):(?P<m>\d+)|block:(?P<r>\d+)x(?P<c>\d+)|unstructured")


@dataclass(frozen=True)
class Pattern:
    """Which weights may go one by one: any, all but n of every m neighbours in a row, or whole blocks of r x c."""

    nm: tuple[int, int] | None = None
    block: tuple[int, int] | None = None

    @classmethod
    def parse(cls, text: str) -> Self:
        """From `unstructured`, `2:4` (two of four kept) or `block:8x8`. Raises SpecError."""
        found = _PATTERN.fullmatch(text) if isinstance(text, str) else None
        if found is None:
            raise SpecError(f"pattern must be 'unstructured', 'N:M' such as '2:4', or 'block:RxC', got {text!r}")
        if found["n"]:
            n, m = int(found["n"]), int(found["m"])
            if not 0 < n < m:
                raise SpecError(f"pattern {text!r}: of M weights, N between 1 and M - 1 are kept, for instance '2:4'")
            return cls(nm=(n, m))
        if found["r"]:
            r, c = int(found["r"]), int(found["c"])
            if r * c < 2:
                raise SpecError(f"pattern {text!r}: a block holds at least 2 weights, for instance 'block:8x8'")
            return cls(block=(r, c))
        return cls()

    def __str__(self) -> str:
        if self.nm is not None:
            return f"{self.nm[0]}:{self.nm[1]}"
        return f"block:{self.block[0]}x{self.block[1]}" if self.block is not None else "unstructured"

    @property
    def sparsity(self) -> float | None:
        """What the pattern fixes: 1 - n / m; None where the sparsity is free."""
        return 1.0 - self.nm[0] / self.nm[1] if self.nm is not None else None

    def misfits(self, out_features: int, in_features: int) -> list[str]:
        """Why a matrix cannot have it; empty when it can."""
        if self.nm is not None and in_features % self.nm[1]:
            return [f"{self} needs in_features divisible by {self.nm[1]}, got {in_features}"]
        if self.block is not None and (out_features % self.block[0] or in_features % self.block[1]):
            return [f"{self} does not divide {out_features}x{in_features}"]
        return []

    def holds(self, mask: Tensor) -> bool:
        """Whether a mask [out, in] has it."""
        if self.misfits(*mask.shape):
            return False
        if self.nm is not None:
            return bool((mask.reshape(-1, self.nm[1]).sum(1) <= self.nm[0]).all())
        if self.block is not None:
            tiles = _tiles(mask, *self.block).transpose(1, 2).flatten(2)
            return torch.equal(tiles.any(2), tiles.all(2))
        return True

    def mask(self, scores: Tensor, sparsity: float, old: Tensor | None = None, compared: Compared = "layer") -> Tensor:
        """Mask of one matrix. scores, old and the result: [out, in].

        compared: weights with all of the matrix, or with those of their row; what a pattern groups goes together either way.
        """
        if self.nm is not None:
            return _nm(scores, *self.nm, old)
        if compared == "row" and self.block is None:
            return _rows(scores, sparsity, old)
        return next(self.masks([lambda: scores], sparsity, [old]))

    def masks(
        self, scores: Sequence[Callable[[], Tensor]], sparsity: float, old: Sequence[Tensor | None]
    ) -> Iterator[Tensor]:
        """Masks of several weights that are compared with each other, `sparsity` in all; each N:M group by itself.

        One after the other: a mask is made when its turn comes, and none is held.
        scores: one function per weight that gives its scores, any shape where the pattern is unstructured. They are called several
        times, one after the other, and their results are never kept together. old: of the same shape, or None, per weight.
        """
        if self.nm is not None:
            return (_nm(score(), *self.nm, before) for score, before in zip(scores, old, strict=True))
        if self.block is not None:
            return _blocks(scores, sparsity, old, self.block)
        return _unstructured(scores, sparsity, old)

    def scratch(self, itemsize: int, earlier: bool = False) -> float:
        """Bytes that `mask` takes for every score of so many bytes, the mask included. earlier: with an old one."""
        if self.nm is not None:  # magnitudes, sorted ones, and their places
            return 2 * itemsize + 9 + earlier
        if self.block is not None:  # squares, in fp32
            return (8 if itemsize < 4 else 4) + 4 * earlier + 0.1
        return 1.1

    def extend(self, mask: Tensor, columns: slice, scores: Tensor, sparsity: float, old: Tensor | None = None) -> None:
        """Chooses further columns of a mask [out, in] that is chosen from left to right, in place.

        So many zeros that all columns up to the last of these have `sparsity` together. scores, old: of these columns.
        """
        if self.nm is None:
            unit = self.block[0] * self.block[1] if self.block is not None else 1
            before, total = mask[:, : columns.start], scores.numel() // unit
            gone = before.numel() - int(before.count_nonzero())
            wanted = prune_count(sparsity, mask[:, : columns.stop].numel() // unit) - gone // unit
            sparsity = min(max(wanted, 0), total) / max(1, total)
        mask[:, columns] = self.mask(scores, sparsity, old)


def prune_count(sparsity: float, total: int) -> int:
    """How many of `total` entries are zero at this sparsity: rounded half to even, as Python's `round` does."""
    return round(sparsity * total)


def _rows(scores: Tensor, sparsity: float, old: Tensor | None) -> Tensor:
    """Mask [rows, n] with exactly `round(sparsity * n)` zeros in every row, more only where `old` has more.

    scores: [rows, n]. old: bool [rows, n] or None.
    """
    n = scores.shape[1]
    mask = torch.empty(scores.shape, dtype=torch.bool, device=scores.device)
    zeros = prune_count(sparsity, n)
    rows = max(1, _chunk(scores) // max(1, n))
    for start in range(0, scores.shape[0], rows):
        part = slice(start, start + rows)
        keys = scores[part].abs()
        if old is not None:
            keys = keys.masked_fill(~old[part], -1.0)
        mask[part] = _above_in_rows(keys, zeros)
    return mask if old is None else mask.logical_and_(old)


def _above_in_rows(keys: Tensor, zeros: int) -> Tensor:
    """Mask [rows, n], False for the `zeros` smallest of each row, the earlier ones where some are equal.

    By selection: 3.5 times as fast as a stable sort.
    """
    if not zeros:
        return torch.ones_like(keys, dtype=torch.bool)
    threshold = keys.kthvalue(zeros, dim=1, keepdim=True).values
    mask = keys > threshold
    equal = keys == threshold
    spare = keys.shape[1] - zeros - mask.sum(dim=1, keepdim=True)  # of the equal ones, how many stay: the last
    if bool(spare.any()):
        after = equal.flip(1).cumsum(dim=1).flip(1)
        mask |= equal & (after <= spare)
    return mask


def _unstructured(
    scores: Sequence[Callable[[], Tensor]], sparsity: float, old: Sequence[Tensor | None]
) -> Iterator[Tensor]:
    """Exactly `round(sparsity * total)` zeros together. Beside scores and masks it holds a chunk of keys and 2**16 counters.

    The threshold is found digit by digit (radix selection): non-negative IEEE numbers order as their bit patterns do, and half
    types widen to float32 without loss.
    """
    pairs = list(zip(scores, old, strict=True))
    wide = any(score().dtype == torch.float64 for score in scores)
    total = removed = 0
    for score, before in pairs:
        if before is None:
            total += score().numel()
        else:
            total += before.numel()
            removed += before.numel() - int(before.count_nonzero())
    zeros = prune_count(sparsity, total) - removed
    if zeros <= 0:
        for score, before in pairs:
            yield before.clone() if before is not None else torch.ones_like(score(), dtype=torch.bool)
        return
    threshold, ties = _kth_key(pairs, zeros, wide)
    for score, before in pairs:
        mask, ties = _above(score(), before, threshold, ties, wide)
        yield mask


def _blocks(
    scores: Sequence[Callable[[], Tensor]], sparsity: float, old: Sequence[Tensor | None], block: tuple[int, int]
) -> Iterator[Tensor]:
    """Masks over several matrices [out, in], whole blocks r x c at a time: `round(sparsity * blocks)` blocks go together.

    A block counts by the mean square of its scores, so by the error that its loss makes. It is gone already when nothing of it is
    left in the old mask; what an old mask removed of the others stays removed.
    """
    r, c = block

    def score_of(score: Callable[[], Tensor], before: Tensor | None) -> Tensor:
        values = score().detach().float()
        values = values if before is None else values * before
        return _tiles(values, r, c).square().mean(dim=(1, 3))

    left = [None if before is None else _tiles(before, r, c).any(dim=3).any(dim=1) for before in old]
    functions = [partial(score_of, s, o) for s, o in zip(scores, old, strict=True)]
    if len(functions) == 1:  # a single matrix's are few enough to be kept
        functions = [partial(_itself, functions[0]())]
    for small, before in zip(_unstructured(functions, sparsity, left), old, strict=True):
        mask = small.repeat_interleave(r, 0).repeat_interleave(c, 1)
        yield mask if before is None else mask & before


def _itself(scores: Tensor) -> Tensor:
    return scores


def _tiles(matrix: Tensor, r: int, c: int) -> Tensor:
    """[out, in] -> [out / r, r, in / c, c]."""
    out_features, in_features = matrix.shape
    return matrix.reshape(out_features // r, r, in_features // c, c)


def _nm(scores: Tensor, n: int, m: int, old: Tensor | None) -> Tensor:
    """The n largest of every m in a row stay, less what an old mask removed. Of equal ones the earlier goes first."""
    groups = scores.detach().abs().reshape(-1, m)
    if old is not None:
        groups = groups.masked_fill(~old.reshape(-1, m), -1.0)
    mask = torch.ones(groups.shape, dtype=torch.bool, device=scores.device)
    mask.scatter_(1, groups.argsort(dim=1, stable=True)[:, : m - n], False)
    mask = mask.view(scores.shape)
    return mask if old is None else mask & old


def _kth_key(pairs: list[tuple[Callable[[], Tensor], Tensor | None]], count: int, wide: bool) -> tuple[int, int]:
    """(key of the count-th smallest entry, how many entries equal to it are among the count smallest)."""
    width = 64 if wide else 32
    prefix, known = 0, 1  # the leading bits settled so far, and how many: the sign is
    while known < width:
        bits = 15 if known == 1 else 16
        shift = width - known - bits
        bins = np.zeros(1 << bits, dtype=np.int64)
        for score, before in pairs:
            for keys in _chunks(score(), before, wide):
                inside = keys if known == 1 else keys[(keys >> (width - known)) == prefix]
                bins += _counts(inside >> shift if known == 1 else (inside >> shift) & 0xFFFF, 1 << bits)
        reached = bins.cumsum()
        digit = int(np.searchsorted(reached, count))
        count -= int(reached[digit - 1]) if digit else 0
        prefix, known = (prefix << bits) | digit, known + bits
    return prefix, count


def _chunk(score: Tensor) -> int:
    return CHUNK if score.device.type == "cpu" else _CHUNK_ELSEWHERE


def _counts(digits: Tensor, bins: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """How often each digit is there; by NumPy on a CPU, which does it in one thread."""
    if digits.device.type == "cpu":
        return np.bincount(digits.numpy(), minlength=bins)
    return torch.bincount(digits, minlength=bins).cpu().numpy()


def _above(score: Tensor, before: Tensor | None, threshold: int, ties: int, wide: bool) -> tuple[Tensor, int]:
    """Mask of the entries above the threshold, the first `ties` equal ones pruned; and how many ties are left to prune."""
    mask = torch.empty(score.shape, dtype=torch.bool, device=score.device)
    flat, start = mask.view(-1), 0
    old = None if before is None else before.reshape(-1)
    for keys in _chunks(score, None, wide):
        part = slice(start, start + keys.numel())
        kept = keys >= threshold
        if old is not None:
            kept &= old[part]
        if ties:
            equal = ((keys == threshold) & kept).nonzero()[:ties, 0]
            kept[equal] = False
            ties -= equal.numel()
        flat[part] = kept
        start += keys.numel()
    return mask, ties


def _chunks(score: Tensor, before: Tensor | None, wide: bool) -> Iterator[Tensor]:
    """The absolute values as integer keys of 64 or 32 bits, a chunk at a time, without those that an old mask removed."""
    flat = score.detach().reshape(-1)
    keep = None if before is None else before.reshape(-1)
    size = _chunk(score)
    for start in range(0, flat.numel(), size):
        part = flat[start : start + size].abs()  # clears the sign bit: -0.0 has the smallest key
        keys = part.double().view(torch.int64) if wide else part.float().view(torch.int32)
        yield keys if keep is None else keys[keep[start : start + size]]
