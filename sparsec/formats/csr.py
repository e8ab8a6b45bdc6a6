"""CSR: kept values row by row, with their column numbers in 32, 16 or 8 bits.

Bits per kept weight are value bits + index bits, so an fp32 matrix pays from 50 % zeros with the 32-bit columns of the
textbook, from 33 % with 16 and from 20 % with 8. 16-bit columns are unsigned numbers in torch.int16 (column 65535 reads -1):
torch 2.13 cannot unpickle torch.uint16, and most of its operations do not take it. 8-bit ones are distances to the previous
kept column of the row (Han et al. 2016, arXiv:1510.00149): a gap above 255 is bridged by zeros that are stored though they
were not kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsec import serial
from sparsec.arguments import checked_but
from sparsec.errors import FormatError, SpecError
from sparsec.formats.base import MAX_COUNT, Packed, Plan
from sparsec.formats.faults import Field, check_count, check_pack, check_plan, count_faults, pointer_faults
from sparsec.formats.positions import columns, flat_positions, starts, unsigned, whole_numbers
from sparsec.formats.rows import row_entries
from sparsec.formats.sound import ascending, distances_ascend

VALUE_DTYPES: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INDEX_DTYPES: dict[int, torch.dtype] = {8: torch.uint8, 16: torch.int16, 32: torch.int32}
WIDE = 2**16
"""Columns that 16 bits reach."""
REACH = 255
"""The longest distance that 8 bits hold."""


@dataclass(frozen=True, eq=False)
class CSR(Packed):
    """Compressed sparse rows; columns ascend within each row."""

    format: ClassVar[str] = "csr"
    title: ClassVar[str] = "CSR"
    dtypes: ClassVar[tuple[torch.dtype, ...]] = VALUE_DTYPES
    tensor_names: ClassVar[tuple[str, ...]] = ("values", "col_idx", "row_ptr")
    scalar_names: ClassVar[tuple[str, ...]] = ("in_features", "nnz")
    parameters: ClassVar[tuple[str, ...]] = ("8", "16", "32")
    checked: ClassVar[tuple[str, ...]] = ("16", "32")
    calibrated: ClassVar[Mapping[str, tuple[str, ...]]] = {"cpu": ("8", "16"), "cuda": ("32",)}
    twins: ClassVar[Mapping[str, str]] = {"cuda": "wcsr"}

    filler: ClassVar[int] = 0
    """What bridges gaps, as a whole number."""

    values: Tensor  # [stored]: the kept weights, and with 8-bit columns the zeros that bridge gaps
    col_idx: Tensor  # [stored]: columns in int16 (read as unsigned) or int32; distances in uint8, at a row's first the column
    row_ptr: Tensor  # [out_features + 1], int32
    out_features: int
    in_features: int
    kept: int

    @classmethod
    def options(cls, parameters: str) -> dict[str, Any]:
        return index_options(cls.format, parameters, cls.parameters)

    @classmethod
    def candidates(cls, mask: Tensor, device: str) -> tuple[str, ...]:
        if mask.shape[1] > WIDE:
            return ("32",)
        return () if device == "cuda" else ("8", "16")  # on a GPU warp CSR serves

    @classmethod
    @checked_but("weight", "mask")
    def pack(cls, weight: Tensor, mask: Tensor, *, index_bits: int | None = None) -> Self:
        """Packs weight [out, in] where mask [out, in] is True, bit for bit.

        `index_bits` is 8, 16 or 32; None takes 16 where they fit, else 32. Raises FormatError for a weight, mask or width
        that CSR cannot hold.
        """
        check_pack(cls.title, cls.dtypes, weight, mask)
        out_features, in_features = weight.shape
        bits = _index_bits(in_features, index_bits)
        kept = flat_positions(mask)
        check_count(cls.title, "weights", kept.numel(), MAX_COUNT)
        row_ptr = starts(kept, out_features, in_features)
        values = weight.detach().reshape(-1).index_select(0, kept)
        if bits == 8:
            col_idx, values, row_ptr = _bridged(_distances(kept, row_ptr, in_features), values, row_ptr)
        else:
            # In place: `kept` is the only scratch, 8 bytes per kept weight.
            col_idx = columns(kept, in_features, INDEX_DTYPES[bits])
        return cls(values, col_idx, row_ptr, out_features, in_features, kept.numel())

    @classmethod
    @checked_but("mask", "dtype")
    def plan(cls, mask: Tensor, dtype: torch.dtype, *, index_bits: int | None = None) -> Plan:
        """What `pack` would hold. FormatError as there."""
        check_plan(cls.title, cls.dtypes, mask, dtype)
        out_features, in_features = mask.shape
        bits = _index_bits(in_features, index_bits)
        stored = serial.count(mask)
        check_count(cls.title, "weights", stored, MAX_COUNT)
        if bits == 8 and _has_empty_window(mask):
            kept = flat_positions(mask)
            stored += int(_fillers(_distances(kept, starts(kept, out_features, in_features), in_features)).sum())
        return Plan(stored * (dtype.itemsize + bits // 8) + 4 * (out_features + 1), stored, str(bits))

    @property
    def shape(self) -> tuple[int, int]:
        return (self.out_features, self.in_features)

    @property
    def index_bits(self) -> int:
        """8, 16 or 32."""
        return self.col_idx.element_size() * 8

    @property
    def nnz(self) -> int:
        return self.kept

    @classmethod
    def from_parts(cls, tensors: Mapping[str, Tensor], scalars: Mapping[str, int]) -> Self:
        row_ptr = tensors["row_ptr"]
        sizes = row_ptr.numel() - 1, int(scalars["in_features"]), int(scalars["nnz"])
        return cls(tensors["values"], tensors["col_idx"], row_ptr, *sizes)

    def scatter(self) -> Tensor:
        rows = csr_rows(self.row_ptr, self.col_idx.numel())
        dense = self.values.new_zeros(self.out_features * self.in_features)
        positions = rows * self.in_features + csr_columns(self.col_idx, self.row_ptr, rows)
        return dense.index_copy(0, positions, self.values).view(self.out_features, self.in_features)

    def rows(self, ids: Tensor) -> Tensor:
        row_ptr, at = row_entries(self.row_ptr, ids)
        return replace(
            self, values=self.values[at], col_idx=self.col_idx[at], row_ptr=row_ptr, out_features=len(ids)
        ).scatter()

    def describe(self) -> str:
        return f"csr{self.index_bits}"

    def _cut_rows(self, first: int, end: int) -> Self:
        ptr = self.row_ptr[first : end + 1]
        a, b = int(ptr[0]), int(ptr[-1])
        kept = int(self._weights()[a:b].count_nonzero())
        return replace(
            self,
            values=self.values[a:b],
            col_idx=self.col_idx[a:b],
            row_ptr=ptr - ptr[0],
            out_features=end - first,
            kept=kept,
        )

    def _cut_columns(self, first: int, end: int) -> Self:
        rows = csr_rows(self.row_ptr, self.values.numel())
        numbers = csr_columns(self.col_idx, self.row_ptr, rows)
        inside = (numbers >= first) & (numbers < end) & self._weights()
        row_ptr = F.pad(inside.cumsum(0, dtype=torch.int32), (1, 0))[self.row_ptr.long()]
        numbers, values, width = numbers[inside] - first, self.values[inside], end - first
        if self.index_bits == 8:
            kept = rows[inside] * width + numbers
            col_idx, held, row_ptr = _bridged(_distances(kept, row_ptr, width), values, row_ptr, self.filler)
        else:
            col_idx, held = numbers.to(self.col_idx.dtype), values
        return replace(self, values=held, col_idx=col_idx, row_ptr=row_ptr, in_features=width, kept=values.numel())

    def _weights(self) -> Tensor:
        """Which entries [stored] are kept weights, and bridge no gap: a filler where there are any, as far as it can be told."""
        if self.kept == self.values.numel():
            return torch.ones_like(self.col_idx, dtype=torch.bool)
        return (self.col_idx != REACH) | (whole_numbers(self.values) != self.filler)

    def fields(self) -> list[Field]:
        stored = (("stored", self.values.numel()),)
        widths = tuple(d for bits, d in INDEX_DTYPES.items() if bits == 32 or self.in_features <= WIDE)
        return [
            Field("values", self.values, self.dtypes, stored),
            Field("col_idx", self.col_idx, widths, stored),
            Field("row_ptr", self.row_ptr, (torch.int32,), (("out_features + 1", self.out_features + 1),)),
        ]

    def content_faults(self) -> list[str]:
        return (
            pointer_faults("row_ptr", self.row_ptr, self.values.numel(), "the number of values", "row")
            or self._column_faults()
            or self._count_faults()
        )

    def _column_faults(self) -> list[str]:
        sound = distances_ascend if self.index_bits == 8 else ascending
        if self.col_idx.device.type == "cpu" and sound(self.col_idx, self.row_ptr, self.in_features):
            return []
        rows = csr_rows(self.row_ptr, self.col_idx.numel())
        columns = csr_columns(self.col_idx, self.row_ptr, rows)
        outside = ((columns < 0) | (columns >= self.in_features)).nonzero()
        if len(outside):
            at = int(outside[0])
            return [f"col_idx must lie in [0, {self.in_features}), got {int(columns[at])} at entry {at}"]
        bad = ((columns.diff() <= 0) & (rows.diff() == 0)).nonzero()
        if len(bad):
            return [f"col_idx must ascend strictly within a row, but does not in row {int(rows[int(bad[0])])}"]
        return []

    def _count_faults(self) -> list[str]:
        most = self.values.numel()
        if self.index_bits == 8:
            # A filler looks like a kept zero at distance 255, so nnz can only be bounded.
            return count_faults(self.nnz, lambda: most - self._zeros_at_reach(), most)
        return count_faults(self.nnz, lambda: most, most)

    def _zeros_at_reach(self) -> int:
        # Of int8, 255 is -1: torch compares uint8 ten times as slowly.
        far = flat_positions(self.col_idx == REACH)
        return int((self.values[far] == 0).sum())


def csr_rows(row_ptr: Tensor, stored: int) -> Tensor:
    """Row number [stored] (int64) of every entry."""
    lengths = row_ptr.diff().to(torch.int64)
    rows = torch.arange(lengths.numel(), device=row_ptr.device)
    return torch.repeat_interleave(rows, lengths, output_size=stored)


def csr_columns(col_idx: Tensor, row_ptr: Tensor, rows: Tensor) -> Tensor:
    """Column number [stored] (int64) of every entry, of which `rows` are the rows."""
    wide = unsigned(col_idx)
    if col_idx.dtype != torch.uint8:
        return wide
    reached = torch.cat([wide.new_zeros(1), wide.cumsum(0)])
    return reached[1:] - reached[row_ptr.to(torch.int64)][rows]


def index_options(format_name: str, parameters: str, known: tuple[str, ...]) -> dict[str, Any]:
    """Of a format of column numbers whose parameters are their bits. SpecError for what is none of them."""
    if parameters and parameters not in known:
        names = ", ".join(f"{format_name}{bits}" for bits in known)
        raise SpecError(
            f"there is no {format_name}{parameters}; there are {names}, and {format_name}, which takes what fits"
        )
    return {"index_bits": int(parameters)} if parameters else {}


def _index_bits(in_features: int, wanted: int | None) -> int:
    if wanted is None:
        return 16 if in_features <= WIDE else 32
    if wanted not in INDEX_DTYPES:
        raise FormatError(f"CSR has index_bits 8, 16 or 32, got {wanted}")
    if wanted < 32 and in_features > WIDE:
        raise FormatError(f"csr{wanted} reaches {WIDE} columns, got in_features={in_features}; use csr32")
    return wanted


def _has_empty_window(mask: Tensor) -> bool:
    """Whether 128 columns in a row, from a multiple of 128 on, are all dropped. Without one no distance exceeds 255."""
    windows = mask.shape[1] // 128
    kept = serial.present_along(mask[:, : windows * 128].reshape(mask.shape[0], windows, 128), 2)
    return not bool(kept.all())


def _distances(kept: Tensor, row_ptr: Tensor, in_features: int) -> Tensor:
    """Distance [nnz] (int64) of every kept weight from the one before it in its row; at the first of a row its column."""
    first = row_ptr[:-1][row_ptr.diff() > 0].to(torch.int64)
    distances = kept.diff(prepend=kept.new_zeros(1))
    distances[first] = kept[first] % max(in_features, 1)
    return distances


def _fillers(distances: Tensor) -> Tensor:
    """How many zeros bridge the gap before each kept weight."""
    return (distances - 1).clamp_(min=0).div_(REACH, rounding_mode="floor")


def _bridged(distances: Tensor, values: Tensor, row_ptr: Tensor, filler: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """col_idx, values and row_ptr with the zeros that bridge gaps. filler: their value."""
    if not distances.numel() or int(distances.max()) <= REACH:
        return distances.to(torch.uint8), values, row_ptr
    fillers = _fillers(distances)
    before = fillers.cumsum(0)
    stored = values.numel() + int(before[-1])
    check_count(CSR.title, "weights and zeros that bridge gaps", stored, MAX_COUNT)
    places = before + torch.arange(values.numel(), device=values.device)
    col_idx = torch.full((stored,), REACH, dtype=torch.uint8, device=values.device)
    col_idx[places] = (distances - REACH * fillers).to(torch.uint8)
    before = torch.cat([before.new_zeros(1), before])[row_ptr.to(torch.int64)]
    return col_idx, values.new_full((stored,), filler).index_copy_(0, places, values), row_ptr + before.to(torch.int32)
