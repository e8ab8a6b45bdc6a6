"""Codes of single rows of a quantised matrix, read where they are stored."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from sparsec.formats.base import Packed
from sparsec.formats.bitmap import Bitmap
from sparsec.formats.bsr import BSR
from sparsec.formats.csr import CSR, csr_rows
from sparsec.formats.panels import LANES
from sparsec.formats.rows import bitmap_rows, panel_rows, row_entries


def codes_of_rows(plain: Packed, values: Tensor, table: Tensor, ids: Tensor) -> Tensor:
    """Of rows ids [n]: [n, in], uint8, 0 where nothing is kept. plain: where codes of a byte each would stand, its values unused.

    values, table: those of the quantised matrix.
    """
    width = plain.shape[1]
    if isinstance(plain, Bitmap):
        flags, at = bitmap_rows(plain.bits, ids, even=bool(table.numel()))
        first = plain.panel_ptr[ids // LANES].long()[:, None]
        return _stored(values, table, at, first).masked_fill(~flags, 0)[:, :width]
    if isinstance(plain, CSR):
        row_ptr, at = row_entries(plain.row_ptr, ids)
        codes = _stored(values, table, at)
        return replace(plain, values=codes, col_idx=plain.col_idx[at], row_ptr=row_ptr, out_features=len(ids)).scatter()
    if isinstance(plain, BSR):
        r = plain.block[0]
        row_ptr, at = row_entries(plain.row_ptr, ids // r)
        codes = _whole(values[at, :, (ids % r)[csr_rows(row_ptr, len(at))]], table).unsqueeze(2)
        return replace(plain, values=codes, col_idx=plain.col_idx[at], row_ptr=row_ptr).scatter()
    return _whole(panel_rows(values, ids), table)[:, :width]


def _stored(values: Tensor, table: Tensor, at: Tensor, first: Tensor | int = 0) -> Tensor:
    """The codes at places of a run of them that begins at a byte."""
    if not table.numel():
        return values[first + at]
    return table[(values[first + at // 2] >> 4 * (at % 2).to(torch.uint8) & 15).int()]


def _whole(held: Tensor, table: Tensor) -> Tensor:
    """Codes of a byte each, of bytes [..., bytes] that hold one or two."""
    return table[torch.stack((held & 15, held >> 4), -1).flatten(-2).int()] if table.numel() else held
