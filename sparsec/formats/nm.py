"""N:M: in every group of m columns a row keeps at most n, so slots take the place of lists: bn/m + index bits n/m.

Each slot holds a value and log2(m) bits that say which column of the group it belongs to (Mishra et al. 2021,
arXiv:2104.08378). n and m are read from the mask. Panels of 16 rows: a step is one slot of 16 outputs in fp32, two slots in
bf16 and fp16 (panels.py).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsec import serial
from sparsec.arguments import checked_but
from sparsec.errors import FormatError, SpecError
from sparsec.formats.base import HALF_AND_SINGLE, Packed, Plan
from sparsec.formats.faults import Field, check_pack, check_plan, count_faults
from sparsec.formats.panels import LANES, from_panels, lane_columns, panel_count, step_count, to_panels
from sparsec.formats.positions import bits_of, flat_positions
from sparsec.formats.rows import panel_rows
from sparsec.formats.sound import slots_ascend
from sparsec.patterns import Pattern

INDEX_BITS: dict[int, int] = {4: 2, 8: 3}
"""By m."""
FEW_ROWS = 64
PADDING = 4  # bytes at the end of index, so that a load of 4 never leaves the memory


@dataclass(frozen=True, eq=False)
class NM(Packed):
    """n slots for every row and group of m columns, ascending by column; a slot without a kept weight holds 0.0."""

    format: ClassVar[str] = "nm"
    order: ClassVar[int] = 2
    title: ClassVar[str] = "N:M"
    dtypes: ClassVar[tuple[torch.dtype, ...]] = HALF_AND_SINGLE
    tensor_names: ClassVar[tuple[str, ...]] = ("values", "index")
    scalar_names: ClassVar[tuple[str, ...]] = ("out_features", "in_features", "n", "m", "nnz")
    parameters: ClassVar[tuple[str, ...]] = ("2:4", "4:8")
    checked: ClassVar[tuple[str, ...]] = ("2:4", "4:8")
    calibrated: ClassVar[Mapping[str, tuple[str, ...]]] = {"cpu": ("1:8", "1:4", "2:4"), "cuda": ("2:4",)}
    one_cost: ClassVar[bool] = True

    values: Tensor  # [panels, steps, 16, slots of a lane]: slots in order, 0.0 past the last
    index: Tensor  # uint8 [panels * in_features / m * n * 2 b + 4]: b bits a lane, lanes 0-7 in b bytes, 8-15 in the next b
    out_features: int
    in_features: int
    n: int  # slots of a group
    m: int
    kept: int

    @classmethod
    def options(cls, parameters: str) -> dict[str, Any]:
        if not parameters:
            return {}
        found = re.fullmatch(r"(\d+):(\d+)", parameters)
        nm = (int(found[1]), int(found[2])) if found is not None else (0, 0)
        if nm[1] not in INDEX_BITS or not 0 < nm[0] < nm[1]:
            raise SpecError(f"N:M is packed for M of 4 and 8 and 0 < N < M, as in nm2:4; got nm{parameters}")
        return {"nm": nm}

    @classmethod
    def pattern(cls, parameters: str) -> Pattern:
        return Pattern(nm=cls.options(parameters).get("nm", (2, 4)))

    @classmethod
    @checked_but("weight", "mask")
    def pack(cls, weight: Tensor, mask: Tensor, *, nm: tuple[int, int] | None = None) -> Self:
        """Packs weight [out, in] where mask [out, in] is True, bit for bit.

        nm: N and M; None takes those with the fewest bytes that hold the mask.
        Raises FormatError for a weight that N:M cannot hold and for a mask that keeps a whole group of columns in a row.
        """
        check_pack(cls.title, cls.dtypes, weight, mask)
        out_features, in_features = weight.shape
        n, m = nm_of(mask, weight.element_size(), nm)
        # Every row keeps exactly n columns of a group once those without a weight are counted in.
        slots = flat_positions(with_full_groups(mask, n, m))
        values = serial.masked(weight.detach(), mask).reshape(-1).index_select(0, slots)
        columns = slots.bitwise_and_(m - 1).to(torch.uint8)
        slots_of_row = in_features // m * n
        index = _pack_index(to_panels(columns.view(out_features, slots_of_row), 1), INDEX_BITS[m])
        values = to_panels(values.view(out_features, slots_of_row), lane_columns(weight.dtype))
        return cls(values, index, out_features, in_features, n, m, serial.count(mask))

    @classmethod
    @checked_but("mask", "dtype")
    def plan(cls, mask: Tensor, dtype: torch.dtype, *, nm: tuple[int, int] | None = None) -> Plan:
        """What `pack` would hold. FormatError as there."""
        check_plan(cls.title, cls.dtypes, mask, dtype)
        n, m = nm_of(mask, dtype.itemsize, nm)
        panels, slots = panel_count(mask.shape[0]), mask.shape[1] // m * n
        stored = panels * step_count(slots, dtype) * lane_columns(dtype) * LANES
        return Plan(stored * dtype.itemsize + panels * slots * 2 * INDEX_BITS[m] + PADDING, stored, f"{n}:{m}")

    @property
    def shape(self) -> tuple[int, int]:
        return (self.out_features, self.in_features)

    @property
    def nnz(self) -> int:
        return self.kept

    @classmethod
    def from_parts(cls, tensors: Mapping[str, Tensor], scalars: Mapping[str, int]) -> Self:
        sizes = (int(scalars[name]) for name in cls.scalar_names)
        return cls(tensors["values"], tensors["index"], *sizes)

    def ordered(self, device: str = "") -> Self:
        lane = lane_columns(self.values.dtype)
        if self.values.shape[-1] == lane:
            return self
        return replace(self, values=to_panels(self._slots(self.values.shape[0] * LANES), lane))

    def scatter(self) -> Tensor:
        columns = self.columns()
        # As integers: torch 2.13 scatters half types through fp32, which changes the bits of a NaN.
        numbers = bits_of(self._slots(len(columns))).view(columns.shape)
        dense = numbers.new_zeros(*columns.shape[:2], self.m).scatter(2, columns, numbers)
        return dense.view(self.values.dtype).flatten(1)[: self.out_features]

    def _slots(self, rows: int) -> Tensor:
        """The values [rows, slots of a row]; absent rows are counted from 0 as those that exist."""
        return from_panels(self.values, rows, self.in_features // self.m * self.n)

    def columns(self) -> Tensor:
        """Column within its group (int64) of every slot [16 * panels, groups, n]."""
        b = INDEX_BITS[self.m]
        halves = self.index[:-PADDING].view(-1, b).to(torch.int64)
        words = halves[:, 0]
        for byte in range(1, b):
            words = words | halves[:, byte] << 8 * byte
        lanes = torch.arange(LANES // 2, device=words.device)
        panels, groups = panel_count(self.out_features), self.in_features // self.m
        columns = (words.unsqueeze(1) >> b * lanes & (self.m - 1)).view(panels, groups * self.n, LANES)
        return columns.transpose(1, 2).reshape(panels * LANES, groups, self.n)

    def rows(self, ids: Tensor) -> Tensor:
        b, groups = INDEX_BITS[self.m], self.in_features // self.m
        lane = ids % LANES
        held = self.index[:-PADDING].view(panel_count(self.out_features), groups * self.n, 2, b)[
            ids // LANES, :, lane // 8
        ]
        words = (held.long() << 8 * torch.arange(b, device=held.device)).sum(2)
        columns = (words >> (b * (lane % 8))[:, None] & (self.m - 1)).view(len(ids), groups, self.n)
        numbers = bits_of(panel_rows(self.values, ids)[:, : groups * self.n].contiguous()).view(columns.shape)
        dense = numbers.new_zeros(len(ids), groups, self.m).scatter(2, columns, numbers)
        return dense.view(self.values.dtype).flatten(1)

    def describe(self) -> str:
        return f"nm{self.n}:{self.m}"

    def layout_faults(self) -> list[str]:
        if self.m not in INDEX_BITS:
            return [f"m must be 4 or 8, got {self.m}"]
        if not 0 < self.n < self.m:
            return [f"n must be from 1 to m - 1 = {self.m - 1}, got {self.n}"]
        if self.in_features % self.m:
            return [f"in_features must be divisible by m = {self.m}, got {self.in_features}"]
        return super().layout_faults()

    @property
    def cut_steps(self) -> tuple[int, int]:
        return (1, self.m)

    def _stored(self) -> Tensor:
        return replace(self, values=torch.ones_like(self.values)).scatter() != 0

    def _cut_rows(self, first: int, end: int) -> Self:
        a, b = first // LANES, panel_count(end)
        slots = self.in_features // self.m * self.n
        index = self.index[:-PADDING].view(-1, 2 * INDEX_BITS[self.m])[a * slots : b * slots].reshape(-1)
        above, rows = a * LANES, min(b * LANES, self.out_features) - a * LANES
        whole = replace(self, values=self.values[a:b], index=F.pad(index, (0, PADDING)), out_features=rows)
        if (above, rows) != (first, end - first):
            whole = whole._repacked(slice(first - above, end - above), slice(None))
        return self._counted(whole)

    def _cut_columns(self, first: int, end: int) -> Self:
        a, b = first // self.m * self.n, end // self.m * self.n
        panels, lane = panel_count(self.out_features), self.values.shape[-1]
        # Absent rows have slots too, zeros of column 0.
        values = to_panels(self._slots(panels * LANES)[:, a:b], lane)
        slots = self.in_features // self.m * self.n
        index = self.index[:-PADDING].view(panels, slots, 2 * INDEX_BITS[self.m])[:, a:b].reshape(-1)
        part = replace(self, values=values, index=F.pad(index, (0, PADDING)), in_features=end - first)
        return self._counted(part)

    def _counted(self, part: Self) -> Self:
        """With the number of weights that it keeps: all slots where all of these are kept, else those that hold no +0.0."""
        out_features, in_features = self.shape
        if self.kept == out_features * in_features // self.m * self.n:
            return replace(part, kept=part.out_features * part.in_features // self.m * self.n)
        return replace(part, kept=int(bits_of(part.values).count_nonzero()))

    def fields(self) -> list[Field]:
        panels, slots, dtype = panel_count(self.out_features), self.in_features // self.m * self.n, self.values.dtype
        shape = (("panels", panels), ("steps", step_count(slots, dtype)), ("16", LANES), ("slots", lane_columns(dtype)))
        index_bytes = panels * slots * 2 * INDEX_BITS[self.m] + PADDING
        return [
            Field("values", self.values, self.dtypes, shape),
            Field("index", self.index, (torch.uint8,), (("bytes of all slots + 4", index_bytes),)),
        ]

    def content_faults(self) -> list[str]:
        if faults := self._index_faults():
            return faults
        slots, lane = self.in_features // self.m * self.n, self.values.shape[-1]
        if slots % lane and self.values[:, -1, :, slots % lane :].count_nonzero():
            return [f"values must be zero past the last slot, {slots - 1}, but are not in the last step"]
        if self.out_features % LANES and self.values[-1, :, self.out_features % LANES :].count_nonzero():
            return [f"values must be zero past the last row, {self.out_features - 1}, but are not in the last panel"]
        return count_faults(self.nnz, lambda: int(self.values.count_nonzero()), self.out_features * slots)

    def _index_faults(self) -> list[str]:
        if self.index[-PADDING:].any():
            return [f"index must end in {PADDING} zeros, got {self.index[-PADDING:].tolist()}"]
        b, groups = INDEX_BITS[self.m], self.in_features // self.m
        words = self.index[:-PADDING].view(panel_count(self.out_features), groups, self.n, 2, b)
        if self.index.device.type == "cpu" and slots_ascend(words, b, self.out_features):
            return []
        bad = (self.columns()[: self.out_features].diff(dim=2) <= 0).nonzero()
        if not len(bad):
            return []
        row, group = bad[0, :2].tolist()
        return [f"index must ascend within a group, but does not in row {row}, group {group}"]


def nm_of(mask: Tensor, value_bytes: int, wanted: tuple[int, int] | None) -> tuple[int, int]:
    """n and m of the packing with the fewest bytes that holds the mask; of equal ones m = 4. FormatError for none.

    wanted: these, where the mask fits into them.
    """
    in_features = mask.shape[1]
    if wanted is not None:
        if wanted[1] not in INDEX_BITS or not 0 < wanted[0] < wanted[1]:
            known = ", ".join(map(str, INDEX_BITS))
            raise FormatError(f"nm: M must be one of {known}, and N from 1 to M - 1, got {wanted[0]}:{wanted[1]}")
        _check_fits(mask, *wanted)
        return wanted
    fits: list[tuple[float, int, int]] = []
    for m, b in INDEX_BITS.items():
        if in_features % m == 0:
            n = max(_fullest(mask, m)[0], 1)
            if n < m:
                fits.append((n / m * (8 * value_bytes + b), m, n))
    if fits:
        _, m, n = min(fits)
        return n, m
    if in_features % 4:
        raise FormatError(
            f"N:M needs in_features divisible by 4 or 8, got {in_features}; use lower(bitmap), which takes any size"
        )
    m = 4 if in_features % 8 else 8
    _, row, group = _fullest(mask, m)
    raise FormatError(
        f"N:M holds at most {m - 1} of {m} columns of a row, but row {row} keeps all {m} of group {group} "
        f"(columns {m * group} to {m * group + m - 1}); prune with an N:M pattern such as 2:4, or use lower(bitmap)"
    )


def _check_fits(mask: Tensor, n: int, m: int) -> None:
    if mask.shape[1] % m:
        raise FormatError(f"nm{n}:{m} needs in_features divisible by {m}, got {mask.shape[1]}; use lower(bitmap)")
    most, row, group = _fullest(mask, m)
    if most > n:
        raise FormatError(
            f"nm{n}:{m} holds at most {n} of {m} columns of a row, but row {row} keeps {most} of group {group} (columns "
            f"{m * group} to {m * group + m - 1}); prune with pattern='{n}:{m}', or use lower(nm)"
        )


def _fullest(mask: Tensor, m: int) -> tuple[int, int, int]:
    """Kept columns of the fullest group, its row, its number. A look at some rows finds a full one in most unstructured masks."""
    most = row = group = 0
    for part in (mask[:FEW_ROWS], mask):
        if part.numel() and most < m:
            counts = _group_counts(part, m)
            row, group = divmod(int(counts.argmax()), counts.shape[1])
            most = int(counts[row, group])
    return most, row, group


def _words(mask: Tensor, m: int) -> Tensor:
    """Groups of m flags as integers [out, in / m], one byte a flag."""
    return mask.reshape(-1).view({4: torch.int32, 8: torch.int64}[m]).view(mask.shape[0], -1 if mask.numel() else 0)


def _group_counts(mask: Tensor, m: int) -> Tensor:
    """Kept columns [out, in / m] of every group."""
    ones = int.from_bytes(b"\1" * m, "little")
    # The top byte of the product is the sum of all bytes.
    return _words(mask, m) * ones >> 8 * (m - 1)


def with_full_groups(mask: Tensor, n: int, m: int) -> Tensor:
    """The mask with exactly n columns in every group, the lowest that were not kept added: bool [out, in]."""
    flags = torch.arange(2**m, device=mask.device).unsqueeze(1) >> torch.arange(m, device=mask.device) & 1
    missing = (n - flags.sum(1, keepdim=True)).clamp(min=0)
    free = 1 - flags
    table = (flags + free * (free.cumsum(1) <= missing)).to(torch.bool)
    low_bits = sum(1 << 8 * (m - 1) - 7 * lane for lane in range(m))
    # The top byte of the product has the flags side by side.
    codes = (_words(mask, m) * low_bits >> 8 * (m - 1) & 2**m - 1).to(torch.int64)
    return _words(table, m).view(-1)[codes.view(-1)].view(torch.bool).view(mask.shape)


def _pack_index(columns: Tensor, bits: int) -> Tensor:
    """uint8 [..., 16] -> uint8 [bytes + 4]: every 8 lanes in `bits` bytes, lane l at bit l * bits, little endian."""
    words = columns.view(-1).view(torch.int64)  # flat: a dimension of 1 may have any stride
    width, held = 8, bits
    while width < 64:  # bytes to pairs to fours to eights: the upper half of each moves down to the lower one
        keep = (1 << 2 * held) - 1
        keep_all = sum(keep << at for at in range(0, 64, 2 * width))
        words = (words | words >> (width - held)) & keep_all
        width, held = 2 * width, 2 * held
    packed = words.view(-1, 1).view(torch.uint8)[:, :bits].reshape(-1)
    return torch.cat([packed, packed.new_zeros(PADDING)])
