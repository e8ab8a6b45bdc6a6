"""Scores in, masks out: the one place where "prune this share" becomes True and False.

A pruning algorithm gives scores (the larger in absolute value, the more a weight matters; so the weights themselves are the scores
of magnitude pruning, with no copy); how many stay, compared with which others, is decided here, so that no algorithm has
variants by pattern. A mask is True where a weight is kept. Scores must not hold NaN: the caller checks, since it knows the name.

Counts are exact: `round(sparsity * total)` entries are zero. Equal scores fall by position: the earlier one is pruned first.
Entries that an earlier mask removed stay removed and count towards the target.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

CHUNK = 1 << 17
"""Scores looked at together while searching a threshold: bounds the scratch memory, not the result."""

_DIGITS = 16  # bits of a key settled per sweep


def prune_count(sparsity: float, total: int) -> int:
    """How many of `total` entries are zero at this sparsity: rounded half to even, as Python's `round` does."""
    return round(sparsity * total)


def unstructured_rows(scores: Tensor, sparsity: float, old: Tensor | None = None) -> Tensor:
    """Mask [rows, n] with exactly `round(sparsity * n)` zeros in every row, more only where `old` has more.

    scores: [rows, n]. old: bool [rows, n] or None.
    """
    n = scores.shape[1]
    mask = torch.empty(scores.shape, dtype=torch.bool, device=scores.device)
    zeros = prune_count(sparsity, n)
    rows = max(1, CHUNK // max(1, n))
    for start in range(0, scores.shape[0], rows):
        part = slice(start, start + rows)
        keys = scores[part].abs()
        if old is not None:
            keys = keys.masked_fill(~old[part], -1.0)
        order = keys.argsort(dim=1, stable=True)[:, :zeros]
        mask[part] = True
        mask[part].scatter_(1, order, False)
    return mask if old is None else mask.logical_and_(old)


def unstructured(scores: Sequence[Callable[[], Tensor]], sparsity: float, old: Sequence[Tensor | None]) -> list[Tensor]:
    """Masks over several weights compared with each other: exactly `round(sparsity * total)` zeros together.

    scores: one function per weight that gives its scores, any shape. They are called several times, one after the other, and their
    results are never kept together; beside them and the masks, the search holds CHUNK keys and 2**16 counters.
    old: a bool mask of the same shape, or None, per weight.

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
        return [
            before.clone() if before is not None else torch.ones_like(score(), dtype=torch.bool)
            for score, before in pairs
        ]
    threshold, ties = _kth_key(pairs, zeros, wide)
    masks = []
    for score, before in pairs:
        mask, ties = _above(score(), before, threshold, ties, wide)
        masks.append(mask)
    return masks


def _kth_key(pairs: list[tuple[Callable[[], Tensor], Tensor | None]], count: int, wide: bool) -> tuple[int, int]:
    """(key of the count-th smallest entry, how many entries equal to it are among the count smallest)."""
    prefix, known = 0, 0  # the leading bits settled so far, and how many
    width = 64 if wide else 32
    while known < width:
        shift = width - known - _DIGITS
        bins = torch.zeros(1 << _DIGITS, dtype=torch.int64)
        for score, before in pairs:
            for keys in _chunks(score(), before, wide):
                inside = keys if known == 0 else keys[(keys >> (width - known)) == prefix]
                bins += torch.bincount((inside >> shift) & ((1 << _DIGITS) - 1), minlength=1 << _DIGITS).cpu()
        reached = bins.cumsum(0)
        digit = int(torch.searchsorted(reached, count))
        count -= int(reached[digit - 1]) if digit else 0
        prefix, known = (prefix << _DIGITS) | digit, known + _DIGITS
    return prefix, count


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
    """The absolute values as int64 keys of 64 or 32 bits, CHUNK at a time, without those that an old mask removed."""
    flat = score.detach().reshape(-1)
    keep = None if before is None else before.reshape(-1)
    for start in range(0, flat.numel(), CHUNK):
        part = flat[start : start + CHUNK].abs()  # clears the sign bit: -0.0 has the smallest key
        keys = part.double().view(torch.int64) if wide else part.float().view(torch.int32).to(torch.int64)
        yield keys if keep is None else keys[keep[start : start + CHUNK]]
