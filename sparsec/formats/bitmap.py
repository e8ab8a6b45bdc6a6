"""Bitmap: one bit for every weight and the kept values in order, bd + 1 bits per weight at density d.

Within 2 % of the entropy bound up to 70 % zeros, where every list of columns costs more. Panels of 16 rows, so that one load and
one expansion serve 16 outputs: a step of one column in fp32, of two in bf16 and fp16 (panels.py).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsec import serial
from sparsec.formats.base import HALF_AND_SINGLE, MAX_COUNT, Packed, Plan
from sparsec.formats.code_bytes import step_counts, step_runs
from sparsec.formats.faults import Field, check_count, check_pack, check_plan, pointer_faults
from sparsec.formats.panels import (
    LANES,
    WORDS,
    from_panels,
    lane_columns,
    pack_bits,
    panel_count,
    set_bits,
    step_count,
    stray_bits,
    to_panels,
    unpack_bits,
)
from sparsec.formats.positions import flat_positions, starts
from sparsec.formats.rows import bitmap_rows


@dataclass(frozen=True, eq=False)
class Bitmap(Packed):
    """Panel by panel, in it step by step, in it ascending row, of a row ascending column."""

    format: ClassVar[str] = "bitmap"
    packing: ClassVar[float] = 11.0
    order: ClassVar[int] = 2
    title: ClassVar[str] = "bitmap"
    dtypes: ClassVar[tuple[torch.dtype, ...]] = HALF_AND_SINGLE
    tensor_names: ClassVar[tuple[str, ...]] = ("values", "bits", "panel_ptr")
    scalar_names: ClassVar[tuple[str, ...]] = ("out_features", "in_features")
    checked: ClassVar[tuple[str, ...]] = ("",)

    values: Tensor  # [nnz + 16]: 16 zeros at the end, so that a load of a whole register never leaves the memory
    bits: Tensor  # [panels, steps]; fp32: int16, bit l of bits[p, k] is set where row 16p + l keeps column k; bf16 and fp16: int32,
    # bits 2l and 2l + 1 of bits[p, k] are of row 16p + l and columns 2k and 2k + 1
    panel_ptr: Tensor  # [panels + 1], int32: where each panel's values start
    out_features: int
    in_features: int

    @classmethod
    def pack(cls, weight: Tensor, mask: Tensor) -> Self:
        """Packs weight [out, in] where mask [out, in] is True, bit for bit. FormatError for what a bitmap cannot hold."""
        check_pack(cls.title, cls.dtypes, weight, mask)
        out_features, in_features = weight.shape
        lane = lane_columns(weight.dtype)
        flags = to_panels(mask, lane)
        kept = flat_positions(flags)
        check_count(cls.title, "weights", kept.numel(), MAX_COUNT)
        values = weight.new_empty(kept.numel() + LANES)
        values[kept.numel() :] = 0
        torch.index_select(to_panels(weight.detach(), lane).view(-1), 0, kept, out=values[: kept.numel()])
        panel_ptr = starts(kept, panel_count(out_features), step_count(in_features, weight.dtype) * lane * LANES)
        return cls(values, pack_bits(flags), panel_ptr, out_features, in_features)

    @classmethod
    def plan(cls, mask: Tensor, dtype: torch.dtype) -> Plan:
        """What `pack` would hold. FormatError as there."""
        check_plan(cls.title, cls.dtypes, mask, dtype)
        nnz, panels = serial.count(mask), panel_count(mask.shape[0])
        check_count(cls.title, "weights", nnz, MAX_COUNT)
        word = WORDS[lane_columns(dtype)].itemsize
        bits = word * panels * step_count(mask.shape[1], dtype)
        return Plan((nnz + LANES) * dtype.itemsize + bits + 4 * (panels + 1), nnz + LANES)

    @property
    def shape(self) -> tuple[int, int]:
        return (self.out_features, self.in_features)

    @property
    def nnz(self) -> int:
        return self.values.numel() - LANES

    def ordered(self, device: str = "") -> Self:
        if self.bits.dtype == WORDS[lane_columns(self.values.dtype)]:
            return self
        if self.values.is_meta:
            word, steps = WORDS[lane_columns(self.values.dtype)], step_count(self.in_features, self.values.dtype)
            return replace(self, bits=self.bits.new_empty(len(self.bits), steps, dtype=word))
        flags = unpack_bits(self.bits)
        return type(self).pack(self.scatter(), from_panels(flags, self.out_features, self.in_features))

    def scatter(self) -> Tensor:
        flags = unpack_bits(self.bits)
        panels = self.values.new_zeros(flags.shape).masked_scatter(flags, self.values)
        return from_panels(panels, self.out_features, self.in_features)

    def rows(self, ids: Tensor) -> Tensor:
        flags, places = bitmap_rows(self.bits, ids)
        places = places + self.panel_ptr[ids // LANES].long()[:, None]
        return self.values[places].masked_fill(~flags, 0)[:, : self.in_features]

    def _stored(self) -> Tensor:
        return from_panels(unpack_bits(self.bits), self.out_features, self.in_features)

    def _cut_rows(self, first: int, end: int) -> Self:
        a, b = first // LANES, panel_count(end)
        ptr = self.panel_ptr[a : b + 1]
        values = F.pad(self.values[int(ptr[0]) : int(ptr[-1])], (0, LANES))
        above, rows = a * LANES, min(b * LANES, self.out_features) - a * LANES
        whole = replace(self, values=values, bits=self.bits[a:b], panel_ptr=ptr - ptr[0], out_features=rows)
        if (above, rows) == (first, end - first):
            return whole
        return whole._repacked(slice(first - above, end - above), slice(None))

    def _cut_columns(self, first: int, end: int) -> Self:
        lane = lane_columns(self.values.dtype)
        a, b = first // lane, -(-end // lane)
        values, panel_ptr = step_runs(self.values, self.panel_ptr, step_counts(self.bits), a, b)
        before, columns = a * lane, min(b * lane, self.in_features) - a * lane
        whole = replace(
            self,
            values=F.pad(values, (0, LANES)),
            bits=self.bits[:, a:b].contiguous(),
            panel_ptr=panel_ptr,
            in_features=columns,
        )
        if (before, columns) == (first, end - first):
            return whole
        return whole._repacked(slice(None), slice(first - before, end - before))

    def fields(self) -> list[Field]:
        panels = panel_count(self.out_features)
        steps = step_count(self.in_features, self.values.dtype)
        # At least the 16 zeros; how many more the bits tell.
        values = max(self.values.numel(), LANES)
        return [
            Field("values", self.values, self.dtypes, (("nnz + 16", values),)),
            Field("bits", self.bits, (WORDS[lane_columns(self.values.dtype)],), (("panels", panels), ("steps", steps))),
            Field("panel_ptr", self.panel_ptr, (torch.int32,), (("panels + 1", panels + 1),)),
        ]

    def content_faults(self) -> list[str]:
        faults = pointer_faults("panel_ptr", self.panel_ptr, self.nnz, "nnz", "panel")
        if faults:
            return faults
        counts = set_bits(self.bits)
        wrong = (counts != self.panel_ptr.diff()).nonzero()
        if len(wrong):
            p = int(wrong[0])
            held = int(self.panel_ptr[p + 1] - self.panel_ptr[p])
            return [f"bits must keep the {held} weights that panel_ptr gives panel {p}, got {int(counts[p])}"]
        past_rows, past_columns = stray_bits(self.bits, self.out_features, self.in_features)
        if past_columns:
            return [f"bits must be clear past the last column, {self.in_features - 1}, but are not in the last step"]
        if past_rows:
            return [f"bits must be clear past the last row, {self.out_features - 1}, but are not in the last panel"]
        if self.values[self.nnz :].count_nonzero():
            return [f"values must end in {LANES} zeros, got {self.values[self.nnz :].tolist()}"]
        return []
