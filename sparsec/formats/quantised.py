"""Quantised matrices: the positions of a plain format, and codes of 8 or 4 bits in place of its values.

One class for each format of positions, made by `quantised`. In it the tensors of the plain format keep their names and meaning, but
for `values`, which holds codes (values.py), and the starts of a bitmap's panels, which count bytes. A lane of 32 bits holds four
columns of a row. N:M is a bitmap whose rows keep exactly n of every m columns: four bits for four columns say what 2:4's two
numbers of two bits would, and eight say what 4:8's four numbers of three bits would.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self, cast

import numpy as np
import torch
from torch import Tensor

from sparsec import serial
from sparsec.errors import FormatError
from sparsec.formats.base import HALF_AND_SINGLE, Packed, Plan
from sparsec.formats.bitmap import Bitmap
from sparsec.formats.bsr import BSR
from sparsec.formats.csr import CSR, REACH
from sparsec.formats.dense_panels import DensePanels
from sparsec.formats.faults import Field, check_pack, check_plan, field_faults
from sparsec.formats.nm import NM, nm_of, with_full_groups
from sparsec.formats.panels import LANES, from_panels, pack_bits, to_panels, unpack_bits
from sparsec.formats.values import TABLE, ZERO, Codec, Codes
from sparsec.patterns import Pattern

SPARE = 64
"""Bytes of zeros after codes that follow each other, so that a load of a whole register never leaves the memory."""
_BYTE = (torch.uint8,)


class _Bitmap(Bitmap):
    dtypes: ClassVar[tuple[torch.dtype, ...]] = _BYTE


class _NM(_Bitmap):
    """A bitmap that keeps n of every m columns of a row."""

    title: ClassVar[str] = "N:M"


class _BSR(BSR):
    dtypes: ClassVar[tuple[torch.dtype, ...]] = _BYTE


class _CSR(CSR):
    dtypes: ClassVar[tuple[torch.dtype, ...]] = _BYTE


class _Dense(DensePanels):
    dtypes: ClassVar[tuple[torch.dtype, ...]] = _BYTE


@dataclass(frozen=True, eq=False)
class Quantised(Packed):
    """One matrix in codes. x, bias and result may have any of three dtypes: that of `like`."""

    positions: ClassVar[type[Packed]]
    """The plain format, of codes that take a byte each."""
    dtypes: ClassVar[tuple[torch.dtype, ...]] = HALF_AND_SINGLE
    calibrated: ClassVar[Mapping[str, tuple[str, ...]]] = {}

    like: Tensor  # [0], of the dtype of x, bias and result, which `.to(dtype)` changes as it changes a bias
    values: Tensor  # uint8: bitmap and N:M [bytes + 64], CSR [bytes], BSR [blocks, c / 4, r, bytes of a lane], dense [panels, steps, 16, bytes]
    scale: Tensor  # Codes.scale
    table: Tensor  # Codes.table
    places: Mapping[str, Tensor]  # the other tensors of the plain format
    numbers: Mapping[str, int]  # its scalars
    group: int  # columns that share a scale; 0: all of a row
    kept: int
    n: int = 0  # of N:M
    m: int = 0

    @classmethod
    def options(cls, parameters: str) -> dict[str, Any]:
        return NM.options(parameters) if cls.positions is _NM else cls.positions.options(parameters)

    @classmethod
    def pattern(cls, parameters: str) -> Pattern:
        return NM.pattern(parameters) if cls.positions is _NM else cls.positions.pattern(parameters)

    @classmethod
    def candidates(cls, mask: Tensor, device: str) -> Iterable[str]:
        return () if cls.positions is _NM else cls.positions.candidates(mask, device)

    @classmethod
    def held(cls, mask: Tensor, **options: Any) -> tuple[Tensor, dict[str, Any], tuple[int, int]]:
        """What is stored of a mask [out, in], what the plain format's `pack` takes, and n and m. FormatError as there."""
        if cls.positions is _Dense:
            return torch.ones_like(mask), {}, (0, 0)
        if cls.positions is not _NM:
            return mask, options, (0, 0)
        check_plan(NM.title, _BYTE, mask, torch.uint8)
        n, m = nm_of(mask, 1, options.get("nm"))
        return with_full_groups(mask, n, m), {}, (n, m)

    @classmethod
    def pack(cls, weight: Tensor, mask: Tensor, *, codec: Codec, like: Codes | None = None, **options: Any) -> Self:
        """Packs weight [out, in] where mask [out, in] is True, rounded to the nearest codes.

        like: scale and table of it. FormatError for what the positions, or the codec, cannot hold.
        """
        check_pack(cls.title, cls.dtypes, weight, mask)
        stored, options, (n, m) = cls.held(mask, **options)
        if cls.positions is _Dense:
            mask = stored
        gaps = cls._gaps(mask, stored, options)
        if gaps and codec.middle:
            raise FormatError(
                f"{cls.title}: this mask leaves places that are stored and hold 0.0, which {codec.name} values lack; use "
                f"int4g{codec.group} values, or lower(bitmap, values='{codec.name}')"
            )
        codes = codec.encode(weight, mask, like, zero=gaps)
        inner = cast(Any, cls.positions).pack(codes.codes, stored, **options)
        wide = _kept_values(inner)
        if gaps:
            wide = torch.where(wide == 0, ZERO, wide)
        places = {name: t for name, t in inner.tensors().items() if name != "values"}
        packed, starts = _narrow(wide, places.get("bits"), codes.table)
        if starts is not None:
            places["panel_ptr"] = starts
        kept = serial.count(mask)
        own = (weight.new_empty(0), packed, codes.scale, codes.table)
        return cls(*own, places, inner.scalars(), codec.group, kept, n, m)

    @classmethod
    def _gaps(cls, mask: Tensor, stored: Tensor, options: dict[str, Any]) -> bool:
        """Whether the format stores more than a mask keeps."""
        if cls.positions in (_Bitmap, _Dense):
            return False
        flags = cast(Any, cls.positions).pack(mask.to(torch.uint8), stored, **options)
        return not bool(_kept_values(flags).all())

    @classmethod
    def plan(cls, mask: Tensor, dtype: torch.dtype, *, codec: Codec, **options: Any) -> Plan:
        """What `pack` would hold. FormatError as there."""
        check_plan(cls.title, cls.dtypes, mask, dtype)
        stored, options, (n, m) = cls.held(mask, **options)
        inner: Plan = cast(Any, cls.positions).plan(stored, torch.uint8, **options)
        nbytes, count = inner.nbytes, inner.stored
        if issubclass(cls.positions, _Bitmap):
            count -= LANES
            nbytes += SPARE - LANES
        if codec.bits == 4:
            halves = count
            if issubclass(cls.positions, _Bitmap):
                halves = int((_step_counts(_step_words(stored)) + 1 & ~1).sum())
            nbytes += (halves + 1) // 2 - count
        nbytes += 2 * int(np.prod(codec.scale_shape(*mask.shape))) + (TABLE if codec.bits == 4 else 0)
        parameters = f"{n}:{m}" if m else inner.parameters
        return Plan(nbytes, count, parameters)

    @property
    def shape(self) -> tuple[int, int]:
        return self._plain(fake=True).shape

    @property
    def nnz(self) -> int:
        return self.kept

    @property
    def codec(self) -> Codec:
        return Codec(4 if self.table.numel() else 8, self.group, self.scale.ndim == 4 and self.scale.shape[2] == 2)

    @property
    def dtype(self) -> torch.dtype:
        return self.like.dtype

    def tensors(self) -> dict[str, Tensor]:
        own = {"like": self.like, "values": self.values, "scale": self.scale, "table": self.table}
        return {name: own[name] if name in own else self.places[name] for name in self.tensor_names}

    def scalars(self) -> dict[str, int]:
        own = {"group": self.group, "kept": self.kept, "n": self.n, "m": self.m}
        return {name: own[name] if name in own else self.numbers[name] for name in self.scalar_names}

    @classmethod
    def from_parts(cls, tensors: Mapping[str, Tensor], scalars: Mapping[str, int]) -> Self:
        own = ("like", "values", "scale", "table")
        places = {name: tensors[name] for name in cls.tensor_names if name not in own}
        numbers = {name: int(scalars[name]) for name in cls.positions.scalar_names}
        rest = (int(scalars[name]) for name in ("group", "kept", "n", "m"))
        return cls(*(tensors[name] for name in own), places, numbers, *rest)

    def _plain(self, fake: bool = False) -> Packed:
        """The plain format, of codes that take a byte each. fake: with values that have a shape alone, on meta."""
        bitmap = issubclass(self.positions, _Bitmap)
        shape = (self.kept + LANES,) if bitmap else self._wide_shape()
        values = torch.empty(shape, dtype=torch.uint8, device="meta") if fake else self._wide()
        places = dict(self.places)
        if bitmap and not fake:
            counts = _step_counts(places["bits"]).sum(1)
            places["panel_ptr"] = torch.cat([counts.new_zeros(1), counts.cumsum(0)]).to(torch.int32)
        return self.positions.from_parts({"values": values, **places}, self.numbers)

    def _wide_shape(self) -> tuple[int, ...]:
        shape = tuple(self.values.shape)
        if len(shape) == 4 and self.table.numel():
            return (*shape[:3], 2 * shape[3])
        return (int(self.places["col_idx"].numel()),) if "col_idx" in self.places and len(shape) == 1 else shape

    def _wide(self) -> Tensor:
        """Codes that take a byte each, in the plain format's order; 0 where a bridge or nothing is stored."""
        if issubclass(self.positions, _Bitmap):
            wide = _widen(self.values[:-SPARE], self.places["bits"], self.table)
            return torch.cat([wide, wide.new_zeros(LANES)])
        wide = _widen(self.values.view(-1), None, self.table)
        shape = self._wide_shape()
        wide = wide[: int(np.prod(shape))].view(shape)
        if self.positions is _Dense:  # absent rows and columns hold codes that nobody reads
            wide = to_panels(from_panels(wide, self.numbers["out_features"], self.numbers["in_features"]), shape[3])
        if self.positions is _CSR and self.places["col_idx"].dtype == torch.uint8:
            wide = torch.where((self.places["col_idx"] == REACH) & (wide == ZERO), 0, wide)
        return wide

    def scatter(self) -> Tensor:
        """The codes at their positions [out, in], uint8, 0 elsewhere."""
        return self._plain().scatter()

    def unpack(self) -> Tensor:
        return self.exact().to(self.dtype)

    def exact(self) -> Tensor:
        return self.codec.decode(Codes(self.scatter(), self.scale, self.table))

    def ordered(self, device: str = "") -> Self:
        return self

    def describe(self) -> str:
        positions = f"nm{self.n}:{self.m}" if self.positions is _NM else self._plain(fake=True).describe()
        return f"{positions}:{self.codec.name}"

    def layout_faults(self) -> list[str]:
        if self.like.ndim != 1 or self.like.numel():
            return [f"like must be [0], got {list(self.like.shape)}"]
        if self.table.ndim != 1 or self.table.numel() not in (0, TABLE):
            return [f"table must be [0] or [{TABLE}], got {list(self.table.shape)}"]
        if self.group < 0 or self.kept < 0:
            return [f"group and kept must not be negative, got {self.group} and {self.kept}"]
        if self.values.ndim == 4 and (fault := next(f.fault() for f in self._plain(fake=True).fields() if f.name == "values")):
            return [fault]
        return super().layout_faults()

    def fields(self) -> list[Field]:
        plain = self._plain(fake=True)
        # Codes of 4 bits share bytes, and a bitmap's bytes hold some more: what the bits tell is checked with the contents.
        others = [f for f in plain.fields() if f.name != "values"]
        dims = [(str(size), size) for size in self.values.shape]
        if self.values.ndim == 4:
            lane = 4 // (2 if self.table.numel() else 1)
            dims = [*dims[:3], ("bytes of a lane", lane)]
        elif self.positions is _CSR:
            stored = self.places["col_idx"].numel()
            dims = [("bytes", (stored + 1) // 2 if self.table.numel() else stored)]
        shape = self.codec.scale_shape(*plain.shape)
        names = ("panels", "groups", "scale and middle", "16")
        return [
            Field("like", self.like, self.dtypes, (("0", 0),)),
            Field("values", self.values, _BYTE, tuple(dims)),
            Field("scale", self.scale, (torch.int16,), tuple(zip(names, shape, strict=True))),
            Field("table", self.table, _BYTE, ((str(self.table.numel()), self.table.numel()),)),
            *others,
        ]

    def content_faults(self) -> list[str]:
        if faults := self._code_faults():
            return faults
        plain = self._plain()
        if faults := field_faults([f for f in plain.fields() if f.name == "values"]) or plain.content_faults():
            return faults
        if isinstance(plain, _Bitmap):
            starts = _byte_starts(self.places["bits"], self.table)
            if not torch.equal(starts, self.places["panel_ptr"]):
                return ["panel_ptr must count the bytes of the codes that the bits keep, panel by panel"]
            if not self.m and self.kept != plain.nnz:
                return [f"kept must be {plain.nnz}, as the bits say, got {self.kept}"]
            if self.m and not nm_holds(plain, self.n, self.m):
                return [f"bits must keep {self.n} of every {self.m} columns of a row"]
        if self.kept > self.shape[0] * self.shape[1]:
            return [f"kept must be at most {self.shape[0] * self.shape[1]}, got {self.kept}"]
        return []

    def _code_faults(self) -> list[str]:
        scale, middle = self.codec.spread(self.scale, *self.shape)
        if not bool((scale.isfinite() & (scale >= 0) & middle.isfinite()).all()):
            return ["scale must hold finite numbers of 0 and more, then finite middles"]
        if self.table.numel() and (not bool((self.table.int().diff() > 0).all()) or not int(self.table[0])):
            return [f"table must ascend from 1 on, got {self.table.tolist()}"]
        if issubclass(self.positions, _Bitmap):
            wanted = int(_byte_starts(self.places["bits"], self.table)[-1]) + SPARE
            if self.values.numel() != wanted:
                return [f"values must be [{wanted}], the bytes that the bits keep and {SPARE} zeros, got {list(self.values.shape)}"]
            if self.values[-SPARE:].count_nonzero():
                return [f"values must end in {SPARE} zeros"]
        return []


def _kept_values(inner: Packed) -> Tensor:
    return inner.values[: inner.nnz] if isinstance(inner, Bitmap) else inner.values


def nm_holds(plain: Bitmap, n: int, m: int) -> bool:
    """Whether every row keeps n of every m columns."""
    flags = unpack_bits(plain.bits).transpose(1, 2).flatten(2).flatten(0, 1)[: plain.out_features, : plain.in_features]
    return plain.in_features % m == 0 and bool((flags.reshape(plain.out_features, -1, m).sum(2) == n).all())


def _step_words(mask: Tensor) -> Tensor:
    """The words of a bitmap of a mask [out, in]."""
    return pack_bits(to_panels(mask, 4))


def _step_counts(bits: Tensor) -> Tensor:
    """Set bits of every step [panels, steps], int64."""
    held = bits.contiguous().view(-1).view(torch.uint8)
    table = torch.tensor([i.bit_count() for i in range(256)], dtype=torch.uint8, device=bits.device)
    return table[held.int()].view(*bits.shape, bits.dtype.itemsize).sum(-1, dtype=torch.int64)


def _byte_starts(bits: Tensor, table: Tensor) -> Tensor:
    """Where each panel's codes begin, in bytes: [panels + 1], int32. FormatError for more than int32 numbers."""
    counts = _step_counts(bits)
    if table.numel():
        counts = (counts + 1) // 2
    ends = counts.sum(1).cumsum(0)
    if ends.numel() and int(ends[-1]) > 2**31 - 1:
        raise FormatError(f"quantised values take at most {2**31 - 1} bytes per matrix, got {int(ends[-1])}; split the matrix")
    return torch.cat([ends.new_zeros(1), ends]).to(torch.int32)


def _halves(bits: Tensor) -> tuple[Tensor, int]:
    """Place of every code among halves of bytes, each step's padded to whole bytes, and how many halves there are."""
    counts = _step_counts(bits).view(-1)
    padded = counts + 1 & ~1
    skipped = (padded - counts).cumsum(0) - (padded - counts)
    places = torch.arange(int(counts.sum()), device=bits.device) + skipped.repeat_interleave(counts)
    return places, int(padded.sum())


def _narrow(wide: Tensor, bits: Tensor | None, table: Tensor) -> tuple[Tensor, Tensor | None]:
    """Codes as they are stored, and where each panel's begin where they have bits."""
    starts = None if bits is None else _byte_starts(bits, table)
    if table.numel():
        inverse = torch.zeros(256, dtype=torch.uint8, device=wide.device)
        inverse[table.long()] = torch.arange(TABLE, dtype=torch.uint8, device=wide.device)
        numbers = inverse[wide.int()]
        if bits is not None:
            places, count = _halves(bits)
            numbers = numbers.new_zeros(count).index_copy_(0, places, numbers)
        shape = wide.shape
        flat = numbers.reshape(-1)
        if flat.numel() % 2:
            flat = torch.cat([flat, flat.new_zeros(1)])
        pairs = flat.view(-1, 2)
        wide = pairs[:, 0] | pairs[:, 1] << 4
        if len(shape) == 4:
            wide = wide.view(*shape[:3], shape[3] // 2)
    if bits is not None:
        wide = torch.cat([wide, wide.new_zeros(SPARE)])
    return wide.contiguous(), starts


def _widen(values: Tensor, bits: Tensor | None, table: Tensor) -> Tensor:
    """The inverse of `_narrow`, flat."""
    if not table.numel():
        return values
    numbers = torch.stack((values & 15, values >> 4), 1).view(-1)
    if bits is not None:
        numbers = numbers[_halves(bits)[0].clamp(max=max(numbers.numel() - 1, 0))]
    return table[numbers.int()]


def quantised(kind: type[Packed], base: type[Packed]) -> type[Quantised]:
    """The class of quantised matrices with the positions of a plain format. base: that of codes of a byte each."""
    title = f"quantised {kind.title}"
    own = {
        "__doc__": f"{kind.title} of codes.",
        "__module__": __name__,
        "format": f"{kind.format}_int",
        "title": title,
        "positions": base,
        "parameters": kind.parameters,
        "tensor_names": ("like", "values", "scale", "table", *[n for n in base.tensor_names if n != "values"]),
        "scalar_names": (*base.scalar_names, "group", "kept", "n", "m"),
    }
    return type(f"Quantised{kind.__name__}", (Quantised,), own)


QuantisedDense = quantised(DensePanels, _Dense)
QuantisedBitmap = quantised(Bitmap, _Bitmap)
QuantisedNM = quantised(NM, _NM)
QuantisedBSR = quantised(BSR, _BSR)
QuantisedCSR = quantised(CSR, _CSR)
QUANTISED: dict[str, type[Quantised]] = {
    kind.format.removesuffix("_int"): kind for kind in (QuantisedDense, QuantisedBitmap, QuantisedNM, QuantisedBSR, QuantisedCSR)
}
"""By the format of the positions in a layout's string."""
