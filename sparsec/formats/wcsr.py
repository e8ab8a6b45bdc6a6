"""Warp CSR: CSR laid out for the 32 threads of a GPU's warp, with columns in 16 bits, or in 8 with a shared base.

Every row is cut into chunks of 256 stored weights, its last one shorter: L lanes of 8. Weight e of a chunk lies at place
(e mod L) * 8 + e div L, so that a thread reads 8 weights with one load and, at each of the 8 steps, the threads of a warp gather
neighbouring columns of x. A chunk's weights of one step, up to 32, are a group: with 8-bit columns, they are distances from the
group's base. Rows are padded to a multiple of 8 with zeros of column 0 (of the base).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from sparsec.arguments import checked_but
from sparsec.errors import FormatError
from sparsec.formats.base import HALF_AND_SINGLE, MAX_COUNT, Packed, Plan
from sparsec.formats.csr import csr_rows, index_options
from sparsec.formats.faults import Field, check_count, check_pack, check_plan, count_faults, pointer_faults
from sparsec.formats.positions import flat_positions, starts, unsigned, whole_numbers

STEPS = 8
"""Weights that a thread reads at once, and groups of a chunk."""
LANES = 32
CHUNK = STEPS * LANES
REACH = 255
"""The longest distance from its base that 8 bits hold."""
WIDEST = 2**16
SAVES = 0.9
"""8 bits cost an eighth more instructions a weight than 16, so the bytes must be worth it."""


@dataclass(frozen=True, eq=False)
class WarpCSR(Packed):
    """CSR for GPUs: rows in chunks of the width of a warp, columns as 8 or 16 bits."""

    format: ClassVar[str] = "wcsr"
    packing: ClassVar[float] = 31.0
    title: ClassVar[str] = "warp CSR"
    dtypes: ClassVar[tuple[torch.dtype, ...]] = HALF_AND_SINGLE
    tensor_names: ClassVar[tuple[str, ...]] = ("values", "col_idx", "base", "row_ptr")
    scalar_names: ClassVar[tuple[str, ...]] = ("in_features", "nnz")
    parameters: ClassVar[tuple[str, ...]] = ("8", "16")
    checked: ClassVar[tuple[str, ...]] = ("8", "16")
    calibrated: ClassVar[Mapping[str, tuple[str, ...]]] = {"cuda": ("8", "16")}
    devices: ClassVar[tuple[str, ...] | None] = ("cuda",)
    twins: ClassVar[Mapping[str, str]] = {"cpu": "csr"}
    widest: ClassVar[int | None] = WIDEST

    filler: ClassVar[int] = 0
    """What pads rows, as a whole number."""

    values: Tensor  # [stored]
    col_idx: Tensor  # [stored]: columns in int16 (read as unsigned), or distances from the base in uint8
    base: Tensor  # int16 (read as unsigned): [stored // 256 + out_features + 1, 8] with distances, else [0, 8]
    row_ptr: Tensor  # [out_features + 1], int32, multiples of 8
    in_features: int
    kept: int

    @classmethod
    def options(cls, parameters: str) -> dict[str, Any]:
        return index_options(cls.format, parameters, cls.parameters)

    @classmethod
    def candidates(cls, mask: Tensor, device: str) -> tuple[str, ...]:
        return ("8", "16") if device == "cuda" and mask.shape[1] <= WIDEST else ()

    @classmethod
    @checked_but("weight", "mask")
    def pack(cls, weight: Tensor, mask: Tensor, *, index_bits: int | None = None) -> Self:
        """Packs weight [out, in] where mask [out, in] is True, bit for bit.

        `index_bits` is 8 or 16; None takes 8 where that saves a tenth of the bytes. Raises FormatError for a weight, mask or
        width that warp CSR cannot hold.
        """
        check_pack(cls.title, cls.dtypes, weight, mask)
        plan, bits = _planned(mask, index_bits, weight.element_size())
        stored = int(plan.row_ptr[-1])
        places, columns = plan.places(), plan.columns
        values = weight.new_zeros(stored).index_copy_(0, places, weight.detach().reshape(-1)[plan.kept])
        base = torch.zeros(_base_rows(stored, mask.shape[0]) if bits == 8 else 0, STEPS, dtype=torch.int16)
        base = base.to(mask.device)
        col_idx = torch.zeros(stored, dtype=torch.uint8 if bits == 8 else torch.int16, device=mask.device)
        if bits == 8:
            bases = columns[plan.first]
            base.view(-1)[plan.base_places()] = bases.to(torch.int16)
            columns = columns - bases[plan.group]
        col_idx[places] = columns.to(col_idx.dtype)
        return cls(values, col_idx, base, plan.row_ptr, mask.shape[1], plan.kept.numel())

    @classmethod
    @checked_but("mask", "dtype")
    def plan(cls, mask: Tensor, dtype: torch.dtype, *, index_bits: int | None = None) -> Plan:
        """What `pack` would hold. FormatError as there."""
        check_plan(cls.title, cls.dtypes, mask, dtype)
        places, bits = _planned(mask, index_bits, dtype.itemsize)
        return Plan(places.nbytes(bits, dtype.itemsize), int(places.row_ptr[-1]), str(bits))

    @property
    def shape(self) -> tuple[int, int]:
        return (self.row_ptr.numel() - 1, self.in_features)

    @property
    def index_bits(self) -> int:
        """8 or 16."""
        return self.col_idx.element_size() * 8

    @property
    def nnz(self) -> int:
        return self.kept

    @classmethod
    def from_parts(cls, tensors: Mapping[str, Tensor], scalars: Mapping[str, int]) -> Self:
        return cls(**tensors, in_features=int(scalars["in_features"]), kept=int(scalars["nnz"]))

    def columns(self) -> Tensor:
        """Column [stored] (int64) of every stored weight and zero that pads."""
        columns = unsigned(self.col_idx)
        if self.index_bits == 16:
            return columns
        rows = csr_rows(self.row_ptr, self.values.numel())
        start = self.row_ptr.to(torch.int64)[rows]
        at = torch.arange(self.values.numel(), device=rows.device)
        group = (start // CHUNK + rows + (at - start) // CHUNK) * STEPS + at % STEPS
        return columns + unsigned(self.base).view(-1)[group]

    def scatter(self) -> Tensor:
        out_features, in_features = self.shape
        # As integers, so that -0.0 and every NaN keep their bits. Padding goes to a place that is cut off.
        numbers = whole_numbers(self.values)
        places = csr_rows(self.row_ptr, numbers.numel()) * in_features + self.columns()
        end = out_features * in_features
        dense = numbers.new_zeros(end + 1).index_copy(0, torch.where(numbers != self.filler, places, end), numbers)
        return dense[:end].view(self.values.dtype).view(out_features, in_features).clone()

    def describe(self) -> str:
        return f"wcsr{self.index_bits}"

    def layout_faults(self) -> list[str]:
        if self.in_features > WIDEST:
            return [f"in_features must be at most {WIDEST}, got {self.in_features}"]
        return super().layout_faults()

    def fields(self) -> list[Field]:
        stored, rows = self.values.numel(), max(self.row_ptr.numel(), 1)
        short = self.col_idx.dtype == torch.uint8
        bases = ("stored // 256 + out_features + 1", _base_rows(stored, rows - 1)) if short else ("0", 0)
        return [
            Field("values", self.values, self.dtypes, (("stored", stored),)),
            Field("col_idx", self.col_idx, (torch.int16, torch.uint8), (("stored", stored),)),
            Field("base", self.base, (torch.int16,), (bases, ("8", STEPS))),
            Field("row_ptr", self.row_ptr, (torch.int32,), (("out_features + 1", rows),)),
        ]

    def content_faults(self) -> list[str]:
        faults = pointer_faults("row_ptr", self.row_ptr, self.values.numel(), "the number of values", "row")
        if faults:
            return faults
        odd = (self.row_ptr % STEPS).nonzero()
        if len(odd):
            return [f"row_ptr must hold multiples of {STEPS}, got {int(self.row_ptr[odd[0]])} at row {int(odd[0])}"]
        columns = self.columns()
        outside = (columns >= self.in_features).nonzero()  # those of padding too: a GPU reads x there
        if len(outside):
            at = int(outside[0])
            return [f"col_idx must lie in [0, {self.in_features}), got {int(columns[at])} at entry {at}"]
        live = whole_numbers(self.values) != self.filler
        rows = csr_rows(self.row_ptr, self.values.numel())[live]
        places = (rows * self.in_features + columns[live]).sort().values
        twice = (places.diff() == 0).nonzero()
        if len(twice):
            return [f"col_idx must not repeat in a row, but does in row {int(places[twice[0]]) // self.in_features}"]
        return count_faults(self.nnz, lambda: len(places), self.values.numel())


@dataclass(frozen=True, eq=False)
class _Places:
    """Where every kept weight goes."""

    kept: Tensor  # [nnz], int64: places in the flattened mask, ascending
    columns: Tensor  # [nnz], int64
    row_ptr: Tensor  # [out_features + 1], int32: multiples of 8
    group: Tensor  # [nnz], int64: number of the group that a weight belongs to
    first: Tensor  # [groups], int64: number of each group's first weight
    row: Tensor  # [groups], int64
    chunk: Tensor  # [groups], int64: within the row
    step: Tensor  # [groups], int64: 0 to 7

    def places(self) -> Tensor:
        """Of every kept weight among the stored ones [nnz] (int64)."""
        lane = torch.arange(self.kept.numel(), device=self.kept.device) - self.first[self.group]
        start = self.row_ptr.to(torch.int64)[self.row] + self.chunk * CHUNK + self.step
        return start[self.group] + lane * STEPS

    def base_places(self) -> Tensor:
        """Of every group in the flattened `base` [groups] (int64)."""
        start = self.row_ptr.to(torch.int64)[self.row] // CHUNK
        return (start + self.row + self.chunk) * STEPS + self.step

    def nbytes(self, bits: int, value_bytes: int) -> int:
        stored, rows = int(self.row_ptr[-1]), self.row_ptr.numel() - 1
        bases = 2 * STEPS * _base_rows(stored, rows) if bits == 8 else 0
        return stored * (value_bytes + bits // 8) + bases + 4 * (rows + 1)


def _base_rows(stored: int, out_features: int) -> int:
    """Chunks that `base` has room for: row r's start at row_ptr[r] // 256 + r, so that no two rows share one."""
    return stored // CHUNK + out_features + 1


def _planned(mask: Tensor, index_bits: int | None, value_bytes: int) -> tuple[_Places, int]:
    """The plan and its index bits; those that were not asked for are 8 where that saves a tenth of the bytes, else 16."""
    if index_bits not in (None, 8, 16):
        raise FormatError(f"{WarpCSR.title} has index_bits 8 or 16, got {index_bits}")
    out_features, in_features = mask.shape
    if in_features > WIDEST:
        raise FormatError(f"{WarpCSR.title} reaches {WIDEST} columns, got in_features={in_features}; use lower(csr32)")
    kept = flat_positions(mask)
    rows = starts(kept, out_features, in_features).to(torch.int64)
    columns = kept.remainder(max(in_features, 1))
    plans = {bits: _plan(kept, columns, rows, bits) for bits in (16, 8) if index_bits in (None, bits)}
    if index_bits is None:
        long, short = (plans[bits].nbytes(bits, value_bytes) for bits in (16, 8))
        index_bits = 8 if short < SAVES * long else 16
    return plans[index_bits], index_bits


def _plan(kept: Tensor, columns: Tensor, begins: Tensor, bits: int) -> _Places:
    """Cuts all rows into chunks at the same time, chunk by chunk. begins: [out_features + 1], each row's first weight."""
    begin, end = begins[:-1], begins[1:]
    at, chunk = begin.clone(), 0
    firsts, counts, chunk_of = [], [], []
    stored = torch.zeros_like(begin)
    while bool((at < end).any()):
        rest = end - at
        lanes = (rest + STEPS - 1).div(STEPS, rounding_mode="floor").clamp(max=LANES)
        steps = torch.arange(STEPS, device=at.device)
        first = at.unsqueeze(1) + lanes.unsqueeze(1) * steps
        count = (end.unsqueeze(1) - first).clamp(min=0).minimum(lanes.unsqueeze(1))
        if bits == 8:
            far = (_span(columns, first, count) > REACH).any(1)
            if bool(far.any()):
                first[far], count[far] = _greedy(columns, at[far], end[far])
        at = at + count.sum(1)
        # A last chunk has as many lanes as its fullest group; every other one has 32.
        stored += torch.where(at < end, CHUNK, STEPS * count.amax(1))
        firsts.append(first)
        counts.append(count)
        chunk_of.append(torch.full_like(count, chunk))
        chunk += 1
    total = int(stored.sum())
    check_count(WarpCSR.title, "weights and zeros that pad rows", total, MAX_COUNT)
    row_ptr = torch.cat([stored.new_zeros(1), stored.cumsum(0)]).to(torch.int32)
    # [rows, chunks, steps], so that groups come in the order of the weights
    empty = begin.new_zeros(begin.numel(), 0, STEPS)
    first, count, number = (torch.stack(t, 1) if t else empty for t in (firsts, counts, chunk_of))
    row = torch.arange(begin.numel(), device=at.device).view(-1, 1, 1).expand(count.shape)
    step = torch.arange(STEPS, device=at.device).expand(count.shape)
    live = count > 0
    group = torch.repeat_interleave(torch.arange(int(live.sum()), device=at.device), count[live])
    return _Places(kept, columns, row_ptr, group, first[live], row[live], number[live], step[live])


def _span(columns: Tensor, first: Tensor, count: Tensor) -> Tensor:
    """Distance between the first and the last column of every group [rows, 8]; 0 for an empty one."""
    most = columns.numel() - 1
    return torch.where(count > 0, columns[(first + count - 1).clamp(0, most)] - columns[first.clamp(max=most)], 0)


def _greedy(columns: Tensor, at: Tensor, end: Tensor) -> tuple[Tensor, Tensor]:
    """One chunk of 8 groups, each as long as its base reaches: first weight and count [rows, 8]."""
    firsts, counts = [], []
    lanes = torch.arange(LANES, device=at.device)
    for _ in range(STEPS):
        members = at.unsqueeze(1) + lanes
        inside = members < end.unsqueeze(1)
        known = columns[members.clamp(max=columns.numel() - 1)]
        near = inside & (known - known[:, :1] <= REACH)
        firsts.append(at)
        counts.append(near.sum(1))
        at = at + counts[-1]
    return torch.stack(firsts, 1), torch.stack(counts, 1)
