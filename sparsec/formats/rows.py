"""Single rows of matrices that lie in panels of 16 rows, as an embedding looks them up: nothing else is read or expanded."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsec.formats.panels import LANES


def panel_rows(panels: Tensor, ids: Tensor) -> Tensor:
    """Rows [n, steps * lane] of panels [panels, steps, 16, lane], by their numbers ids [n]."""
    return panels[ids // LANES, :, ids % LANES].flatten(1)


def bitmap_rows(bits: Tensor, ids: Tensor, even: bool = False) -> tuple[Tensor, Tensor]:
    """What the words of a bitmap [panels, steps] keep of the rows ids [n]: flags [n, columns], and the place of each column's
    value among those of its panel [n, columns], int64; absent columns count too.

    even: whether the values of every step are filled up to an even number.
    """
    lane = bits.dtype.itemsize * 8 // LANES
    words, shift = bits[ids // LANES], (lane * (ids % LANES)).long()
    before = words & ((1 << shift) - 1).to(bits.dtype)[:, None]  # of the rows before, in the same step
    of_step, of_rows = _counts(torch.stack((words, before)))
    if even:
        of_step = of_step + 1 & ~1
    columns = torch.arange(lane, device=bits.device)
    flags = words[..., None].long() >> shift[:, None, None] + columns & 1
    first = of_step.cumsum(1) - of_step + of_rows
    places = first[..., None] + flags.cumsum(2) - flags
    return flags.bool().flatten(1), places.flatten(1)


def _counts(words: Tensor) -> Tensor:
    """Set bits of every word, int64: in numbers of 2, 4 and 8 bits side by side (Hacker's Delight, section 5-1). No table, which
    would have to be brought to a GPU at every call."""
    held, size = words.long(), 8 * words.dtype.itemsize
    if size < 64:
        held = held & ((1 << size) - 1)
    held = held - (held >> 1 & 0x5555555555555555)
    held = (held & 0x3333333333333333) + (held >> 2 & 0x3333333333333333)
    held = held + (held >> 4) & 0x0F0F0F0F0F0F0F0F
    return held * 0x0101010101010101 >> 56


def row_entries(row_ptr: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Of rows ids [n] that lie one after the other: where each starts if there are no others, int32 [n + 1]; which entries they
    have."""
    first = row_ptr[ids].long()
    counts = row_ptr[ids + 1].long() - first
    ends = counts.cumsum(0)
    at = torch.repeat_interleave(first - ends + counts, counts)
    return torch.cat((ends.new_zeros(1), ends)).to(torch.int32), at + torch.arange(len(at), device=at.device)
