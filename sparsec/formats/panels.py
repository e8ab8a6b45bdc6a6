"""Panels of 16 output rows, whose rows lie side by side: the layout in which one register holds one column of 16 outputs.

So x is broadcast and no sum runs across a register. The last panel is padded with absent rows.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from sparsec import serial

LANES = 16
"""Rows of a panel."""

_LOW_BITS = 0x0102040810204080  # times bytes b0..b7 of 0 or 1, the top byte is b0 | b1 << 1 | ... | b7 << 7


def panel_count(out_features: int) -> int:
    """How many panels hold that many rows."""
    return -(-out_features // LANES)


def to_panels(rows: Tensor) -> Tensor:
    """[out, ...] -> [panels, ..., 16], contiguous, absent rows zero."""
    out_features = rows.shape[0]
    panels = panel_count(out_features)
    if panels * LANES != out_features:
        rows = torch.cat([rows, rows.new_zeros(panels * LANES - out_features, *rows.shape[1:])])
    return serial.contiguous(rows.reshape(panels, LANES, *rows.shape[1:]).movedim(1, -1))


def from_panels(panels: Tensor, out_features: int) -> Tensor:
    """The inverse of `to_panels`: [panels, ..., 16] -> [out, ...]."""
    return panels.movedim(-1, 1).flatten(0, 1)[:out_features]


def pack_bits(flags: Tensor) -> Tensor:
    """bool [..., 16] (contiguous) -> int16 [...], flag l in bit l."""
    if flags.device.type == "cpu":
        words = np.packbits(flags.numpy().reshape(-1), bitorder="little").view(np.int16)
        return torch.from_numpy(words).view(flags.shape[:-1])
    # Flat: a dimension of 1 may have any stride, and then torch refuses to view bytes as words.
    top_bytes = (flags.view(-1).view(torch.int64) * _LOW_BITS).view(torch.uint8)[7::8]
    return top_bytes.clone(memory_format=torch.contiguous_format).view(torch.int16).view(flags.shape[:-1])


def unpack_bits(bits: Tensor) -> Tensor:
    """The inverse of `pack_bits`."""
    lanes = torch.arange(LANES, dtype=torch.int32, device=bits.device)
    return (bits.to(torch.int32).unsqueeze(-1) >> lanes & 1).to(torch.bool)
