"""The formats whose values may be quantised, each with what it does in its own way.

N:M is a bitmap whose rows keep exactly n of every m columns: four bits for four columns say what 2:4's two numbers of two bits
would, and eight say what 4:8's four numbers of three bits would.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsec import serial
from sparsec.errors import FormatError
from sparsec.formats.base import Packed, Plan
from sparsec.formats.bitmap import Bitmap
from sparsec.formats.bsr import BSR
from sparsec.formats.code_bytes import (
    LANE,
    SPARE,
    byte_starts,
    from_steps,
    in_steps,
    lane_faults,
    step_counts,
    step_faults,
    step_runs,
)
from sparsec.formats.csr import CSR, REACH
from sparsec.formats.dense_panels import DensePanels
from sparsec.formats.faults import Field, count_faults
from sparsec.formats.nm import INDEX_BITS, NM, nm_of, with_full_groups
from sparsec.formats.panels import LANES, from_panels, pack_bits, panel_count, stray_bits, to_panels, unpack_bits
from sparsec.formats.positions import flat_positions
from sparsec.formats.quantised import BYTE, OWN, SCALARS, MaskHeld, Quantised
from sparsec.formats.values import EXAMPLES, ZERO, Codec, Codes
from sparsec.formats.wcsr import WarpCSR
from sparsec.patterns import Pattern


class _Dense(DensePanels):
    dtypes: ClassVar[tuple[torch.dtype, ...]] = BYTE


class _Bitmap(Bitmap):
    dtypes: ClassVar[tuple[torch.dtype, ...]] = BYTE


class _BSR(BSR):
    dtypes: ClassVar[tuple[torch.dtype, ...]] = BYTE
    filler: ClassVar[int] = ZERO

    def _count_faults(self) -> list[str]:
        return count_faults(self.nnz, lambda: int((self.values != ZERO).count_nonzero()), self.values.numel())


class _CSR(CSR):
    dtypes: ClassVar[tuple[torch.dtype, ...]] = BYTE
    filler: ClassVar[int] = ZERO

    def _zeros_at_reach(self) -> int:
        return int((self.values[flat_positions(self.col_idx == REACH)] == ZERO).sum())


class _WarpCSR(WarpCSR):
    dtypes: ClassVar[tuple[torch.dtype, ...]] = BYTE
    filler: ClassVar[int] = ZERO


class QuantisedDense(Quantised):
    """All weights of a matrix in panels, whatever its mask."""

    format: ClassVar[str] = "dense_int"
    title: ClassVar[str] = "quantised dense"
    calibrated: ClassVar[Mapping[str, tuple[str, ...]]] = {"cpu": ("",)}
    positions: ClassVar[type[Packed]] = _Dense
    tensor_names: ClassVar[tuple[str, ...]] = OWN
    scalar_names: ClassVar[tuple[str, ...]] = ("out_features", "in_features", *SCALARS)

    @classmethod
    def held(cls, mask: Tensor, **options: Any) -> MaskHeld:
        everything = torch.ones_like(mask, memory_format=torch.contiguous_format)
        return MaskHeld(everything, everything, options)

    @classmethod
    def _stored_codes(cls, held: MaskHeld, inner: Plan) -> int:
        return serial.count(held.stored)

    @classmethod
    def _stored_bytes(cls, held: MaskHeld, codec: Codec, inner: Plan) -> int:
        return inner.stored * codec.bits // 8

    def scatter(self) -> Tensor:
        return self._wide().scatter().contiguous()

    def _place_faults(self) -> list[str]:
        everything = self.shape[0] * self.shape[1]
        if self.kept != everything:
            return [f"kept must be {everything}, all weights of the matrix, got {self.kept}"]
        return lane_faults(self.values, self.table, *self.shape)


class QuantisedBitmap(Quantised):
    """A bit for every weight, and the codes of those that are kept."""

    format: ClassVar[str] = "bitmap_int"
    title: ClassVar[str] = "quantised bitmap"
    checked: ClassVar[tuple[str, ...]] = ("",)
    calibrated: ClassVar[Mapping[str, tuple[str, ...]]] = {"cpu": ("",)}
    positions: ClassVar[type[Packed]] = _Bitmap
    tensor_names: ClassVar[tuple[str, ...]] = (*OWN, "bits", "panel_ptr")
    scalar_names: ClassVar[tuple[str, ...]] = ("out_features", "in_features", *SCALARS)

    @classmethod
    def _stored_codes(cls, held: MaskHeld, inner: Plan) -> int:
        return serial.count(held.stored)

    @classmethod
    def _stored_bytes(cls, held: MaskHeld, codec: Codec, inner: Plan) -> int:
        if codec.bits == 8:
            return inner.stored - LANES + SPARE
        counts = step_counts(pack_bits(to_panels(held.stored, LANE)))
        return int((counts + 1 >> 1).sum()) + SPARE

    @classmethod
    def _placed(cls, codes: Codes, held: MaskHeld, gaps: bool) -> tuple[Tensor, dict[str, Tensor], dict[str, int]]:
        flags, panels = to_panels(held.stored, LANE), to_panels(codes.codes, LANE)
        if gaps:
            panels = torch.where(panels == 0, ZERO, panels)
        bits = pack_bits(flags)
        counts = step_counts(bits)
        places = {"bits": bits, "panel_ptr": byte_starts(cls.title, counts, codes.table)}
        out_features, in_features = held.stored.shape
        numbers = {"out_features": out_features, "in_features": in_features}
        return in_steps(panels, flags, counts, codes.table), places, numbers

    def _wide_shape(self) -> tuple[int, ...]:
        return (LANES,)

    def _value_field(self, wide: Field) -> Field:
        # At least the zeros; how many more the bits tell.
        return Field("values", self.values, BYTE, ((f"bytes + {SPARE}", max(self.values.numel(), SPARE)),))

    def scatter(self) -> Tensor:
        return from_panels(from_steps(self.values, self.places["bits"], self.table), *self.shape).contiguous()

    def _cut_rows(self, first: int, end: int) -> Self:
        a, b = first // LANES, panel_count(end)
        ptr, above = self.places["panel_ptr"][a : b + 1], a * LANES
        rows = slice(above, min(b * LANES, self.shape[0]))
        values = self.values[int(ptr[0]) : int(ptr[-1])]
        whole = self._of_steps(values, self.places["bits"][a:b], ptr - ptr[0], rows, slice(0, self.shape[1]))
        if (rows.start, rows.stop) != (first, end):
            whole = whole._repacked(slice(first - above, end - above), slice(None))
        return replace(whole, kept=self._kept_in(whole))

    def _cut_columns(self, first: int, end: int) -> Self:
        a, b = first // LANE, -(-end // LANE)
        bits, before = self.places["bits"], a * LANE
        columns = slice(before, min(b * LANE, self.shape[1]))
        counts = step_counts(bits)
        held = counts + 1 >> 1 if self.table.numel() else counts
        values, panel_ptr = step_runs(self.values, self.places["panel_ptr"], held, a, b)
        whole = self._of_steps(values, bits[:, a:b].contiguous(), panel_ptr, slice(0, self.shape[0]), columns)
        if (columns.start, columns.stop) != (first, end):
            whole = whole._repacked(slice(None), slice(first - before, end - before))
        return replace(whole, kept=self._kept_in(whole))

    def _of_steps(self, values: Tensor, bits: Tensor, panel_ptr: Tensor, rows: slice, columns: slice) -> Self:
        """Some of these steps as a matrix, whose kept weights are yet to be counted."""
        return replace(
            self,
            values=F.pad(values, (0, SPARE)),
            scale=self.codec.cut_scales(self.scale, self.shape, rows, columns),
            places={"bits": bits, "panel_ptr": panel_ptr},
            numbers={"out_features": rows.stop - rows.start, "in_features": columns.stop - columns.start},
        )

    def _repacked(self, rows: slice, columns: slice) -> Self:
        codes = self.scatter()[rows, columns].contiguous()
        scale = self.codec.cut_scales(self.scale, self.shape, rows, columns)
        held = MaskHeld(codes != 0, codes != 0, {}, self.n, self.m)
        values, places, numbers = self._placed(Codes(codes, scale, self.table), held, False)
        return replace(self, values=values, scale=scale, places=places, numbers=numbers)

    def _kept_in(self, part: Self) -> int:
        """How many weights a part keeps."""
        return int(step_counts(part.places["bits"]).sum())

    def _place_faults(self) -> list[str]:
        bits = self.places["bits"]
        past_rows, past_columns = stray_bits(bits, *self.shape)
        if past_rows or past_columns:
            return [f"bits must be clear past the last {'row' if past_rows else 'column'}"]
        counts = step_counts(bits)
        starts = byte_starts(self.title, counts, self.table)
        if not torch.equal(starts, self.places["panel_ptr"]):
            return ["panel_ptr must count the bytes of the codes that the bits keep, panel by panel"]
        return step_faults(self.values, counts, starts, self.table) or self._kept_faults(int(counts.sum()))

    def _kept_faults(self, stored: int) -> list[str]:
        return [] if self.kept == stored else [f"kept must be {stored}, as the bits say, got {self.kept}"]


class QuantisedNM(QuantisedBitmap):
    """A bitmap of which every row keeps n of every m columns; those that were not kept hold 0.0."""

    format: ClassVar[str] = "nm_int"
    title: ClassVar[str] = "quantised N:M"
    checked: ClassVar[tuple[str, ...]] = ("2:4",)
    one_cost: ClassVar[bool] = True
    parameters: ClassVar[tuple[str, ...]] = NM.parameters

    @classmethod
    def options(cls, parameters: str) -> dict[str, Any]:
        return NM.options(parameters)

    @classmethod
    def pattern(cls, parameters: str) -> Pattern:
        return NM.pattern(parameters)

    @classmethod
    def candidates(cls, mask: Tensor, device: str) -> Iterable[str]:
        return ()  # its bytes are those of a bitmap

    @classmethod
    def held(cls, mask: Tensor, **options: Any) -> MaskHeld:
        n, m = nm_of(mask, 1, options.get("nm"))
        return MaskHeld(mask, with_full_groups(mask, n, m), {}, n, m)

    def describe(self) -> str:
        return f"nm{self.n}:{self.m}:{self.codec.name}"

    @property
    def cut_steps(self) -> tuple[int, int]:
        return 1, math.lcm(self.m, self.group or 1)

    def layout_faults(self) -> list[str]:
        if self.m not in INDEX_BITS or not 0 < self.n < self.m or self.numbers["in_features"] % self.m:
            return [f"n and m must be of 0 < n < m = 4 or 8, a divisor of in_features, got {self.n} and {self.m}"]
        return super().layout_faults()

    def _kept_in(self, part: Self) -> int:
        if self.kept == self.shape[0] * self.shape[1] // self.m * self.n:
            return part.shape[0] * part.shape[1] // self.m * self.n
        codes = part.scatter()
        return int(((codes != 0) & (codes != ZERO)).count_nonzero())

    def _kept_faults(self, stored: int) -> list[str]:
        flags = from_panels(unpack_bits(self.places["bits"]), *self.shape)
        if not bool((flags.reshape(self.shape[0], self.shape[1] // self.m, self.m).sum(2) == self.n).all()):
            return [f"bits must keep {self.n} of every {self.m} columns of a row"]
        few = stored if self.codec.middle else 0
        return [] if few <= self.kept <= stored else [f"kept must be {few} to {stored}, got {self.kept}"]


class QuantisedBSR(Quantised):
    """Blocks of codes; what was not kept of a block holds 0.0."""

    format: ClassVar[str] = "bsr_int"
    title: ClassVar[str] = "quantised BSR"
    calibrated: ClassVar[Mapping[str, tuple[str, ...]]] = {"cpu": ("16x16",)}
    positions: ClassVar[type[Packed]] = _BSR
    parameters: ClassVar[tuple[str, ...]] = BSR.parameters
    tensor_names: ClassVar[tuple[str, ...]] = (*OWN, "col_idx", "row_ptr")
    scalar_names: ClassVar[tuple[str, ...]] = ("in_features", *SCALARS)

    @classmethod
    def _gaps(cls, held: MaskHeld, codec: Codec, kept: int, inner: Plan) -> bool:
        columns = inner.parameters.split("x")[1]
        if codec.bits == 4 and int(columns) % LANE:
            raise FormatError(
                f"{cls.title}: values of 4 bits need blocks of a multiple of {LANE} columns, got {columns}; use bsr16x16, or "
                "values of 8 bits"
            )
        return super()._gaps(held, codec, kept, inner)


class QuantisedCSR(Quantised):
    """Rows of columns and codes; the zeros that bridge gaps of 8-bit columns have a code too."""

    format: ClassVar[str] = "csr_int"
    title: ClassVar[str] = "quantised CSR"
    by_digits: ClassVar[bool] = False
    twins: ClassVar[Mapping[str, str]] = CSR.twins
    positions: ClassVar[type[Packed]] = _CSR
    parameters: ClassVar[tuple[str, ...]] = CSR.parameters
    tensor_names: ClassVar[tuple[str, ...]] = (*OWN, "col_idx", "row_ptr")
    scalar_names: ClassVar[tuple[str, ...]] = ("in_features", *SCALARS)

    def _wide_shape(self) -> tuple[int, ...]:
        return tuple(self.places["col_idx"].shape)

    def _wide(self) -> Packed:
        wide = super()._wide()
        return self._plain(wide.values[: self.places["col_idx"].numel()])

    def _value_field(self, wide: Field) -> Field:
        stored = self.places["col_idx"].numel()
        return Field("values", self.values, BYTE, (("bytes", (stored + 1) // 2 if self.table.numel() else stored),))

    def _place_faults(self) -> list[str]:
        odd = self.table.numel() and self.places["col_idx"].numel() % 2
        if odd and int(self.values[-1]) >> 4:
            return ["values must be zero in the half past the last code"]
        return super()._place_faults()


class QuantisedWarpCSR(QuantisedCSR):
    """Warp CSR of codes; what pads rows holds 0.0."""

    format: ClassVar[str] = "wcsr_int"
    title: ClassVar[str] = "quantised warp CSR"
    codecs: ClassVar[tuple[str, ...]] = tuple(name for name in EXAMPLES if not Codec.parse(name).middle)
    positions: ClassVar[type[Packed]] = _WarpCSR
    parameters: ClassVar[tuple[str, ...]] = WarpCSR.parameters
    checked: ClassVar[tuple[str, ...]] = WarpCSR.checked
    devices: ClassVar[tuple[str, ...] | None] = WarpCSR.devices
    twins: ClassVar[Mapping[str, str]] = WarpCSR.twins
    widest: ClassVar[int | None] = WarpCSR.widest
    tensor_names: ClassVar[tuple[str, ...]] = (*OWN, "col_idx", "base", "row_ptr")

    # As of any format: no row or column of it is found without the others.
    rows, _cut_rows, _cut_columns = Packed.rows, Packed._cut_rows, Packed._cut_columns

    def _repacked(self, rows: slice, columns: slice) -> Self:
        codes = self.scatter()[rows, columns].contiguous()
        part = replace(self, scale=self.codec.cut_scales(self.scale, self.shape, rows, columns))
        return self._of(codes, part, codes != 0, self.options(self.describe().removeprefix("wcsr").partition(":")[0]))


QUANTISED: dict[str, type[Quantised]] = {
    kind.format.removesuffix("_int"): kind
    for kind in (QuantisedDense, QuantisedBitmap, QuantisedNM, QuantisedBSR, QuantisedCSR, QuantisedWarpCSR)
}
"""By the format of the positions in a layout's string."""
