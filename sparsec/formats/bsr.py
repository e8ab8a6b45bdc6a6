"""BSR: blocks of r rows and c columns, each stored whole if any of its weights is kept; bd + little bits per weight.

The format of block pruning, and the one that saves work in prefill too: a block that is gone is neither read nor multiplied.
In a block a lane holds columns as in a panel (panels.py), so that CPUs multiply many rows by registers as they are. A GPU's
matrix units read single columns: there a lane holds one.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsec import serial
from sparsec.errors import FormatError, SpecError
from sparsec.formats.base import HALF_AND_SINGLE, MAX_COUNT, Packed, Plan
from sparsec.formats.csr import csr_rows
from sparsec.formats.faults import Field, check_count, check_pack, check_plan, count_faults, pointer_faults
from sparsec.formats.panels import lane_columns
from sparsec.formats.positions import flat_positions, starts, unsigned, whole_numbers
from sparsec.formats.rows import row_entries
from sparsec.formats.sound import ascending
from sparsec.patterns import Pattern

DEFAULT_BLOCK = (16, 16)
WORTH_A_LOOK = {"cpu": ((32, 32), (16, 16), (8, 8), (16, 1)), "cuda": ((128, 128), (64, 64), (32, 32), (16, 16))}
"""Blocks by type of device: those that its kernels are good at."""
FULL = 0.6
"""Blocks are worth a look where those that keep any weight are at least this full: an unstructured mask has no such blocks."""


@dataclass(frozen=True, eq=False)
class BSR(Packed):
    """Block sparse rows; block columns ascend within each row of blocks; weights of a block that were not kept are 0.0."""

    format: ClassVar[str] = "bsr"
    packing: ClassVar[float] = 10.5
    order: ClassVar[int] = 2
    title: ClassVar[str] = "BSR"
    dtypes: ClassVar[tuple[torch.dtype, ...]] = HALF_AND_SINGLE
    tensor_names: ClassVar[tuple[str, ...]] = ("values", "col_idx", "row_ptr")
    scalar_names: ClassVar[tuple[str, ...]] = ("in_features", "nnz")
    parameters: ClassVar[tuple[str, ...]] = ("16x16",)
    checked: ClassVar[tuple[str, ...]] = ("16x16", "64x64", "128x128")
    calibrated: ClassVar[Mapping[str, tuple[str, ...]]] = {"cpu": ("16x16",), "cuda": ("16x16", "64x64")}

    filler: ClassVar[int] = 0
    """In the place of weights of a block that were not kept, as a whole number."""

    values: Tensor  # [blocks, c / lane, r, lane]: rows side by side, each with the columns of a lane, 1 where these do not divide c
    col_idx: Tensor  # [blocks], the number of the block's column of blocks; int16 (read as unsigned) or int32
    row_ptr: Tensor  # [out_features / r + 1], int32
    in_features: int
    kept: int

    @classmethod
    def options(cls, parameters: str) -> dict[str, Any]:
        if not parameters:
            return {}
        found = re.fullmatch(r"(\d+)x(\d+)", parameters)
        if found is None or int(found[1]) % 8 or not int(found[1]) or not int(found[2]):
            raise SpecError(
                f"a block has a multiple of 8 rows and at least one column, as in bsr16x16 or bsr8x4; got bsr{parameters}"
            )
        return {"block": (int(found[1]), int(found[2]))}

    @classmethod
    def pattern(cls, parameters: str) -> Pattern:
        return Pattern(block=cls.options(parameters).get("block", DEFAULT_BLOCK))

    @classmethod
    def candidates(cls, mask: Tensor, device: str) -> Iterator[str]:
        for r, c in WORTH_A_LOOK.get(device, WORTH_A_LOOK["cpu"]):
            if mask.numel() and mask.shape[0] % r == 0 and mask.shape[1] % c == 0 and _fullness(mask, r, c) >= FULL:
                yield f"{r}x{c}"

    @classmethod
    def pack(cls, weight: Tensor, mask: Tensor, *, block: tuple[int, int] = DEFAULT_BLOCK) -> Self:
        """Packs weight [out, in] where mask [out, in] is True, bit for bit, in blocks of (rows, columns).

        Raises FormatError for a weight, mask or block that BSR cannot hold.
        """
        check_pack(cls.title, cls.dtypes, weight, mask)
        r, c = _check_block(mask, block)
        rows, columns = weight.shape[0] // r, weight.shape[1] // c
        kept = _kept_blocks(mask, r, c)
        check_count(cls.title, "blocks", kept.numel(), MAX_COUNT)
        zeroed = serial.masked(weight.detach(), mask)
        lane = _lane(c, weight.dtype, weight.device.type)
        blocks = zeroed.view(rows, r, columns, c // lane, lane).permute(0, 2, 3, 1, 4)
        blocks = blocks.reshape(rows * columns, c // lane, r, lane)
        return cls(
            values=blocks.index_select(0, kept),
            col_idx=(kept % max(columns, 1)).to(_index_dtype(columns)),
            row_ptr=starts(kept, rows, columns),
            in_features=weight.shape[1],
            kept=serial.count(mask),
        )

    @classmethod
    def plan(cls, mask: Tensor, dtype: torch.dtype, *, block: tuple[int, int] = DEFAULT_BLOCK) -> Plan:
        """What `pack` would hold. FormatError as there."""
        check_plan(cls.title, cls.dtypes, mask, dtype)
        r, c = _check_block(mask, block)
        blocks = _kept_blocks(mask, r, c).numel()
        check_count(cls.title, "blocks", blocks, MAX_COUNT)
        index_bytes = _index_dtype(mask.shape[1] // c).itemsize
        nbytes = blocks * (r * c * dtype.itemsize + index_bytes) + 4 * (mask.shape[0] // r + 1)
        return Plan(nbytes, blocks * r * c, f"{r}x{c}")

    @property
    def block(self) -> tuple[int, int]:
        """(rows, columns) of a block."""
        if self.values.ndim != 4:
            return (0, 0)
        return (self.values.shape[2], self.values.shape[1] * self.values.shape[3])

    @property
    def shape(self) -> tuple[int, int]:
        return ((self.row_ptr.numel() - 1) * self.block[0], self.in_features)

    @property
    def nnz(self) -> int:
        return self.kept

    @property
    def flops_per_token(self) -> int:
        """Multiply-adds count 2, and whole blocks are multiplied."""
        return 2 * self.values.numel()

    @classmethod
    def from_parts(cls, tensors: Mapping[str, Tensor], scalars: Mapping[str, int]) -> Self:
        return cls(**tensors, in_features=int(scalars["in_features"]), kept=int(scalars["nnz"]))

    def ordered(self, device: str = "") -> Self:
        blocks, steps, r, held = self.values.shape
        lane = _lane(steps * held, self.values.dtype, device or self.values.device.type)
        if lane == held:
            return self
        columns = self.values.transpose(2, 3).reshape(blocks, steps * held, r)
        values = columns.view(blocks, steps * held // lane, lane, r).transpose(2, 3)
        return replace(self, values=values.contiguous())

    def scatter(self) -> Tensor:
        r, c = self.block
        rows, columns = self.row_ptr.numel() - 1, self.in_features // c
        places = csr_rows(self.row_ptr, self.col_idx.numel()) * columns + unsigned(self.col_idx)
        _, steps, _, lane = self.values.shape
        blocks = self.values.new_zeros(rows * columns, steps, r, lane).index_copy(0, places, self.values)
        return blocks.view(rows, columns, steps, r, lane).permute(0, 3, 1, 2, 4).reshape(rows * r, columns * c)

    def rows(self, ids: Tensor) -> Tensor:
        r = self.block[0]
        row_ptr, at = row_entries(self.row_ptr, ids // r)
        inside = (ids % r)[csr_rows(row_ptr, len(at))]
        return replace(
            self, values=self.values[at, :, inside].unsqueeze(2), col_idx=self.col_idx[at], row_ptr=row_ptr
        ).scatter()

    def describe(self) -> str:
        return f"bsr{self.block[0]}x{self.block[1]}"

    @property
    def cut_steps(self) -> tuple[int, int]:
        return self.block

    def _cut_rows(self, first: int, end: int) -> Self:
        r = self.block[0]
        ptr = self.row_ptr[first // r : end // r + 1]
        a, b = int(ptr[0]), int(ptr[-1])
        return self._of_blocks(self.values[a:b], self.col_idx[a:b], ptr - ptr[0], self.in_features)

    def _cut_columns(self, first: int, end: int) -> Self:
        c = self.block[1]
        columns = unsigned(self.col_idx)
        inside = (columns >= first // c) & (columns < end // c)
        row_ptr = F.pad(inside.cumsum(0, dtype=torch.int32), (1, 0))[self.row_ptr.long()]
        col_idx = (columns[inside] - first // c).to(self.col_idx.dtype)
        return self._of_blocks(self.values[inside], col_idx, row_ptr, end - first)

    def _of_blocks(self, values: Tensor, col_idx: Tensor, row_ptr: Tensor, in_features: int) -> Self:
        """Some of these blocks as a matrix. As many weights are kept as differ from what fills blocks up, if anything does here."""
        full = self.kept == self.values.numel()
        kept = values.numel() if full else int((whole_numbers(values) != self.filler).count_nonzero())
        return replace(self, values=values, col_idx=col_idx, row_ptr=row_ptr, in_features=in_features, kept=kept)

    def fields(self) -> list[Field]:
        blocks = ("blocks", self.values.shape[0] if self.values.ndim else 0)
        values = Field("values", self.values, self.dtypes, (blocks, ("c / lane", None), ("r", None), ("lane", None)))
        if values.fault():
            return [values]
        r, c = self.block
        lane = self.values.shape[3] if self.values.shape[3] == 1 else _lane(c, self.values.dtype, "cpu")
        r_fits = ("r, a multiple of 8", r if r % 8 == 0 and r else 8)
        c_fits = ("c / lane, where c is a divisor of in_features", c // lane)
        if c == 0 or self.in_features % c:
            c_fits = (f"c / lane, where c is a divisor of in_features = {self.in_features}", 1)
        rows = ("out_features / r + 1", max(self.row_ptr.numel(), 1))
        return [
            Field("values", self.values, self.dtypes, (blocks, c_fits, r_fits, ("lane", lane))),
            Field("col_idx", self.col_idx, (torch.int16, torch.int32), (blocks,)),
            Field("row_ptr", self.row_ptr, (torch.int32,), (rows,)),
        ]

    def content_faults(self) -> list[str]:
        faults = pointer_faults("row_ptr", self.row_ptr, self.col_idx.numel(), "the number of blocks", "row of blocks")
        return faults or self._column_faults() or self._count_faults()

    def _column_faults(self) -> list[str]:
        count = self.in_features // self.block[1]
        if self.col_idx.device.type == "cpu" and ascending(self.col_idx, self.row_ptr, count):
            return []
        columns = unsigned(self.col_idx)
        outside = ((columns < 0) | (columns >= count)).nonzero()
        if len(outside):
            at = int(outside[0])
            return [f"col_idx must lie in [0, {count}), got {int(columns[at])} at block {at}"]
        rows = csr_rows(self.row_ptr, self.col_idx.numel())
        bad = ((columns.diff() <= 0) & (rows.diff() == 0)).nonzero()
        if len(bad):
            row = int(rows[int(bad[0])])
            return [f"col_idx must ascend strictly within a row of blocks, but does not in row {row}"]
        return []

    def _count_faults(self) -> list[str]:
        return count_faults(self.nnz, lambda: int(self.values.count_nonzero()), self.values.numel())


def _lane(c: int, dtype: torch.dtype, device: str) -> int:
    """Columns of a lane in blocks of c columns on a type of device: no block is padded. Codes lie alike on all."""
    lane = lane_columns(dtype)
    return lane if c % lane == 0 and (device != "cuda" or dtype == torch.uint8) else 1


def _check_block(mask: Tensor, block: tuple[int, int]) -> tuple[int, int]:
    if not isinstance(block, tuple) or len(block) != 2 or not all(type(n) is int and n > 0 for n in block):
        raise FormatError(f"BSR has block=(rows, columns), two positive integers such as (16, 16), got {block!r}")
    r, c = block
    if r % 8:
        raise FormatError(f"BSR needs blocks of 8, 16, 24, ... rows (they fill registers), got {r}x{c}")
    for name, size, step in (("out_features", mask.shape[0], r), ("in_features", mask.shape[1], c)):
        if size % step:
            raise FormatError(
                f"bsr{r}x{c} needs {name} divisible by {step}, got {size}; "
                "take a block that divides the matrix, or lower(bitmap)"
            )
    return r, c


def _fullness(mask: Tensor, r: int, c: int) -> float:
    """Share of kept weights in the r x c blocks that keep any. One look at the first rows sees most unstructured masks."""
    few = mask[: r * max(1, 256 // r)]
    looked = [few, mask] if few.shape[0] < mask.shape[0] else [mask]
    fullness = 0.0
    for part in looked:
        fullness = serial.count(part) / max(1, serial.count(_keeping(part, r, c)) * r * c)
        if fullness < FULL / 2:
            break
    return fullness


def _kept_blocks(mask: Tensor, r: int, c: int) -> Tensor:
    """Ascending flat positions (int64) of the blocks that keep any weight."""
    return flat_positions(_keeping(mask, r, c))


def _keeping(mask: Tensor, r: int, c: int) -> Tensor:
    """Bool [out / r, in / c]: which blocks keep any weight."""
    rows, columns = mask.shape[0] // r, mask.shape[1] // c
    # Rows first: they lie apart, so this half is fast and leaves 1 / r of the work.
    lines = serial.present_along(mask.reshape(rows, r, columns * c), 1)
    return serial.present_along(lines.view(rows, columns, c), 2)


def _index_dtype(columns: int) -> torch.dtype:
    return torch.int16 if columns <= 2**16 else torch.int32
