"""Panels of 16 output rows, a lane of 32 bits for each: a step is one register, 16 lanes of as many columns as 32 bits hold.

One column in fp32, two in bf16 and fp16. x is broadcast, and no sum runs across a register. What multiplies pairs of numbers
takes a step as it is. The last panel is padded with absent rows, the last step with absent columns.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sparsec import serial

LANES = 16
"""Rows of a panel."""

WORDS = {1: torch.int16, 2: torch.int32, 4: torch.int64}
"""Type of the word that says which weights of a step are kept, by columns of a lane; read as unsigned."""
_NUMPY_WORDS = {1: np.int16, 2: np.int32, 4: np.int64}

_SET_BITS = np.array([i.bit_count() for i in range(256)], dtype=np.uint8)
_LOW_BITS = 0x0102040810204080  # times bytes b0..b7 of 0 or 1, the top byte is b0 | b1 << 1 | ... | b7 << 7


def panel_count(out_features: int) -> int:
    """How many panels hold that many rows."""
    return -(-out_features // LANES)


def lane_columns(dtype: torch.dtype) -> int:
    """Columns that share a lane."""
    return max(1, 4 // dtype.itemsize)


def step_count(columns: int, dtype: torch.dtype) -> int:
    """How many steps hold that many columns."""
    return -(-columns // lane_columns(dtype))


def to_panels(rows: Tensor, lane: int) -> Tensor:
    """[out, columns] -> [panels, steps, 16, lane], contiguous, absent rows and columns zero. lane: columns of a lane."""
    out_features, columns = rows.shape
    panels, steps = panel_count(out_features), -(-columns // lane)
    if (panels * LANES, steps * lane) != (out_features, columns):
        rows = F.pad(rows, (0, steps * lane - columns, 0, panels * LANES - out_features))
    return serial.contiguous(rows.reshape(panels, LANES, steps, lane).transpose(1, 2))


def from_panels(panels: Tensor, out_features: int, columns: int) -> Tensor:
    """The inverse of `to_panels`: [panels, steps, 16, lane] -> [out, columns]."""
    return panels.transpose(1, 2).flatten(2).flatten(0, 1)[:out_features, :columns]


def pack_bits(flags: Tensor) -> Tensor:
    """bool [panels, steps, 16, lane] (contiguous) -> a word for each step [panels, steps], flag i of a step in bit i."""
    lane = flags.shape[-1]
    if flags.device.type == "cpu":
        words = np.packbits(flags.numpy().reshape(-1), bitorder="little").view(_NUMPY_WORDS[lane])
        return torch.from_numpy(words).view(flags.shape[:-2])
    # Flat: a dimension of 1 may have any stride, and then torch refuses to view bytes as words.
    top_bytes = (flags.view(-1).view(torch.int64) * _LOW_BITS).view(torch.uint8)[7::8]
    return top_bytes.clone(memory_format=torch.contiguous_format).view(WORDS[lane]).view(flags.shape[:-2])


def unpack_bits(bits: Tensor) -> Tensor:
    """The inverse of `pack_bits`."""
    places = torch.arange(8, dtype=torch.uint8, device=bits.device)
    flags = bits.contiguous().view(-1).view(torch.uint8).unsqueeze(-1) >> places & 1
    return flags.view(torch.bool).view(*bits.shape, LANES, bits.dtype.itemsize * 8 // LANES)


def set_bits(bits: Tensor) -> Tensor:
    """Set bits of every panel [panels], int64; takes a byte for eight weights, where `unpack_bits` takes eight."""
    held = bits.contiguous().view(-1).view(torch.uint8)
    across = held.numel() // len(bits) if len(bits) else 0
    if bits.device.type == "cpu":  # in one thread: torch would wake others for a part of a millisecond
        return torch.from_numpy(_SET_BITS[held.numpy()].reshape(len(bits), across).sum(1, dtype=np.int64))
    held = held - (held >> 1 & 0x55)
    held = (held & 0x33) + (held >> 2 & 0x33)
    return (held + (held >> 4) & 0x0F).view(len(bits), across).sum(1)


def stray_bits(bits: Tensor, out_features: int, in_features: int) -> tuple[bool, bool]:
    """Whether any bit is set past the last row, and whether any is past the last column."""
    size = bits.dtype.itemsize * 8
    lane = size // LANES
    row = (1 << lane) - 1
    rows = sum(row << lane * r for r in range(out_features - (len(bits) - 1) * LANES, LANES))
    column = (1 << lane) - (1 << (in_features - 1) % lane + 1)
    columns = sum(column << lane * r for r in range(LANES))
    if not bits.numel():
        return False, False
    return bool((bits[-1] & _signed(rows, size)).any()), bool((bits[:, -1] & _signed(columns, size)).any())


def _signed(word: int, size: int) -> int:
    return word - (1 << size) if word >> size - 1 else word
