"""Quantised matrices: the positions of a plain format, and codes of 8 or 4 bits in place of its values.

One class for each format of positions (coded.py). In it the tensors of the plain format keep their names and meaning, but for
`values`, which holds codes (code_bytes.py), and the starts of a bitmap's panels, which count bytes. A lane of 32 bits holds four
columns of a row.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple, Self, cast

import numpy as np
import torch
from torch import Tensor

from sparsec import serial
from sparsec.errors import FormatError, SpecError
from sparsec.formats.base import HALF_AND_SINGLE, Packed, Plan
from sparsec.formats.code_bytes import narrow, widen
from sparsec.formats.faults import Field, check_pack, check_plan
from sparsec.formats.quantised_rows import codes_of_rows
from sparsec.formats.values import EXAMPLES, LARGEST, TABLE, ZERO, Codec, Codes
from sparsec.patterns import Pattern

BYTE = (torch.uint8,)
OWN = ("like", "values", "scale", "table")
"""The tensors that do not come from the plain format."""
SCALARS = ("group", "kept", "n", "m", "digits")
DIGITS = (1, 2, 3)


class MaskHeld(NamedTuple):
    """What a format stores of a mask."""

    mask: Tensor  # [out, in]: what has a code
    stored: Tensor  # [out, in]: what takes a place
    options: dict[str, Any]  # of the plain format's `pack`
    n: int = 0  # of N:M
    m: int = 0


@dataclass(frozen=True, eq=False)
class Quantised(Packed):
    """One matrix in codes. x, bias and result may have any of three dtypes: that of `like`."""

    positions: ClassVar[type[Packed]]
    """The plain format, of codes that take a byte each."""
    dtypes: ClassVar[tuple[torch.dtype, ...]] = HALF_AND_SINGLE
    calibrated: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    packing: ClassVar[float] = 20.0
    by_digits: ClassVar[bool] = True
    """Whether native kernels make digits of x; else they widen the codes."""
    codecs: ClassVar[tuple[str, ...]] = EXAMPLES
    """Those that are checked on GPUs."""

    like: Tensor  # [0], of the dtype of x, bias and result, which `.to(dtype)` changes as it changes a bias
    values: Tensor  # uint8: bitmap and N:M [bytes + 64], CSR [bytes], BSR [blocks, c / 4, r, bytes of a lane],
    # dense [panels, steps, 16, bytes of a lane]
    scale: Tensor  # Codes.scale
    table: Tensor  # Codes.table
    places: Mapping[str, Tensor]  # the other tensors of the plain format
    numbers: Mapping[str, int]  # its scalars
    group: int  # columns that share a scale; 0: all of a row
    kept: int
    n: int = 0  # of N:M
    m: int = 0
    digits: int = 2  # of seven bits, that native kernels make of a number of x: 1, 2 or 3

    @classmethod
    def options(cls, parameters: str) -> dict[str, Any]:
        return cls.positions.options(parameters)

    @classmethod
    def pattern(cls, parameters: str) -> Pattern:
        return cls.positions.pattern(parameters)

    @classmethod
    def candidates(cls, mask: Tensor, device: str) -> Iterable[str]:
        return cls.positions.candidates(mask, device)

    @classmethod
    def held(cls, mask: Tensor, **options: Any) -> MaskHeld:
        """What is stored of a mask [out, in]. FormatError for one that the positions cannot hold."""
        return MaskHeld(mask, mask, options)

    @classmethod
    def pack(
        cls, weight: Tensor, mask: Tensor, *, codec: Codec, like: Codes | None = None, digits: int = 2, **options: Any
    ) -> Self:
        """Packs weight [out, in] where mask [out, in] is True, rounded to the nearest codes.

        like: scale and table of it. FormatError for what the positions, or the codec, cannot hold.
        """
        check_pack(cls.title, cls.dtypes, weight, mask)
        held = cls.held(mask, **options)
        kept = serial.count(held.mask)
        gaps = cls._gaps(held, codec, kept, cls._inner_plan(held))
        codes = codec.encode(weight, held.mask, like, zero=gaps)
        values, places, numbers = cls._placed(codes, held, gaps)
        own = (weight.detach().new_empty(0), values, codes.scale, codes.table)
        return cls(*own, places, numbers, codec.group, kept, held.n, held.m, digits)

    def in_format(self, kind: type[Quantised], **options: Any) -> Quantised:
        """The same codes at the positions of another format. FormatError where that cannot hold them.

        As many weights are kept; which 0.0 was kept is not told from what fills up.
        """
        codes = self.scatter()
        kept = (codes != 0) & (codes != ZERO)
        zeros = self.kept - int(kept.count_nonzero())
        if zeros:
            flat = codes.view(-1)
            kept.view(-1)[torch.cat([(flat == code).nonzero()[:, 0] for code in (ZERO, 0)])[:zeros]] = True
        return kind._of(codes.masked_fill_(codes == 0, ZERO).masked_fill_(~kept, 0), self, kept, options)

    @classmethod
    def _of(cls, codes: Tensor, other: Quantised, kept: Tensor, options: Mapping[str, Any]) -> Self:
        """Codes [out, in], 0 where `kept` is False, that mean what those of another matrix of this shape do."""
        held = cls.held(kept, **options)
        count = serial.count(kept)
        gaps = cls._gaps(held, other.codec, count, cls._inner_plan(held))
        if gaps and other.table.numel() and not bool((other.table == ZERO).any()):
            raise FormatError(
                f"{cls.title}: places are stored that nothing is kept in, and no code of the table is 0.0"
            )
        values, places, numbers = cls._placed(Codes(codes, other.scale, other.table), held, gaps)
        own = (other.like, values, other.scale, other.table)
        return cls(*own, places, numbers, other.group, count, held.n, held.m, other.digits)

    @classmethod
    def plan(cls, mask: Tensor, dtype: torch.dtype, *, codec: Codec, **options: Any) -> Plan:
        """What `pack` would hold. FormatError as there."""
        check_plan(cls.title, cls.dtypes, mask, dtype)
        held = cls.held(mask, **options)
        inner = cls._inner_plan(held)
        cls._gaps(held, codec, serial.count(held.mask), inner)
        stored = cls._stored_bytes(held, codec, inner)
        own = 2 * int(np.prod(codec.scale_shape(*mask.shape))) + (TABLE if codec.bits == 4 else 0)
        parameters = f"{held.n}:{held.m}" if held.m else inner.parameters
        return Plan(inner.nbytes - inner.stored + stored + own, stored, parameters)

    @classmethod
    def _inner_plan(cls, held: MaskHeld) -> Plan:
        plan: Plan = cast(Any, cls.positions).plan(held.stored, torch.uint8, **held.options)
        return plan

    @classmethod
    def _stored_bytes(cls, held: MaskHeld, codec: Codec, inner: Plan) -> int:
        """How long `values` is."""
        return inner.stored if codec.bits == 8 else (inner.stored + 1) // 2

    @classmethod
    def _gaps(cls, held: MaskHeld, codec: Codec, kept: int, inner: Plan) -> bool:
        """Whether more is stored than the `kept` weights, which then is 0.0. FormatError where the codec cannot be had so."""
        gaps = cls._stored_codes(held, inner) != kept
        if gaps and codec.middle:
            name = codec.name
            raise FormatError(
                f"{cls.title}: with this mask places are stored that nothing is kept in, and {name} values have no 0.0 for them; "
                f"use values='{name.replace('m', '')}', or lower(bitmap, values='{name}')"
            )
        return gaps

    @classmethod
    def _stored_codes(cls, held: MaskHeld, inner: Plan) -> int:
        """How many weights have a code, those that are not kept included."""
        return inner.stored

    @classmethod
    def _placed(cls, codes: Codes, held: MaskHeld, gaps: bool) -> tuple[Tensor, dict[str, Tensor], dict[str, int]]:
        """`values`, the other tensors of the plain format, and its scalars."""
        inner: Packed = cast(Any, cls.positions).pack(codes.codes, held.stored, **held.options)
        values = inner.values.masked_fill_(inner.values == 0, ZERO) if gaps else inner.values
        places = {name: t for name, t in inner.tensors().items() if name not in OWN}
        return narrow(values, codes.table), places, {n: v for n, v in inner.scalars().items() if n != "nnz"}

    @property
    def shape(self) -> tuple[int, int]:
        return self._husk().shape

    @property
    def nnz(self) -> int:
        return self.kept

    @property
    def codec(self) -> Codec:
        return Codec(4 if self.table.numel() else 8, self.group, self.scale.ndim == 4 and self.scale.shape[2] == 2)

    @property
    def dtype(self) -> torch.dtype:
        return self.like.dtype

    def converted(self, dtype: torch.dtype) -> Self:
        return replace(self, like=self.like.to(dtype))

    def tensors(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) if name in OWN else self.places[name] for name in self.tensor_names}

    def scalars(self) -> dict[str, int]:
        return {name: getattr(self, name) if name in SCALARS else self.numbers[name] for name in self.scalar_names}

    @classmethod
    def from_parts(cls, tensors: Mapping[str, Tensor], scalars: Mapping[str, int]) -> Self:
        places = {name: tensors[name] for name in cls.tensor_names if name not in OWN}
        numbers = {name: int(scalars[name]) for name in cls.scalar_names if name not in SCALARS}
        like, values, scale, table = (tensors[name] for name in OWN)
        return cls(like, values, scale, table, places, numbers, *(int(scalars[name]) for name in SCALARS))

    def _plain(self, values: Tensor) -> Packed:
        """The plain format, with codes that take a byte each."""
        numbers = {**self.numbers, "nnz": self.kept}
        scalars = {name: numbers[name] for name in self.positions.scalar_names}
        return self.positions.from_parts({"values": values, **self.places}, scalars)

    def _husk(self) -> Packed:
        """The same with values that have a shape alone."""
        return self._plain(torch.empty(self._wide_shape(), dtype=torch.uint8, device="meta"))

    def _wide_shape(self) -> tuple[int, ...]:
        """Of codes that take a byte each."""
        shape = tuple(self.values.shape)
        return (*shape[:3], 2 * shape[3]) if len(shape) == 4 and self.table.numel() else shape

    def _wide(self) -> Packed:
        """The plain format, with its codes."""
        return self._plain(widen(self.values, self.table))

    def scatter(self) -> Tensor:
        """The codes at their positions [out, in], uint8, 0 elsewhere."""
        return self._wide().scatter()

    def exact(self) -> Tensor:
        return self.codec.decode(Codes(self.scatter(), self.scale, self.table))

    def unpack(self) -> Tensor:
        return self._rounded(self.exact())

    def rows(self, ids: Tensor) -> Tensor:
        codes = codes_of_rows(self._husk(), self.values, self.table, ids)
        return self._rounded(self.codec.decode_rows(codes, self.scale, ids))

    @property
    def cut_steps(self) -> tuple[int, int]:
        rows, columns = self._husk().cut_steps
        return rows, math.lcm(columns, self.group or 1)

    def _cut_rows(self, first: int, end: int) -> Self:
        return self._rewrapped(self._wide().cut_rows(first, end), slice(first, end), slice(None))

    def _cut_columns(self, first: int, end: int) -> Self:
        return self._rewrapped(self._wide().cut_columns(first, end), slice(None), slice(first, end))

    def _rewrapped(self, inner: Packed, rows: slice, columns: slice) -> Self:
        """A part of the matrix. inner: of the plain format, with codes that take a byte each."""
        places = {name: t for name, t in inner.tensors().items() if name not in OWN}
        numbers = {name: number for name, number in inner.scalars().items() if name != "nnz"}
        return replace(
            self,
            values=narrow(inner.values, self.table),
            scale=self.codec.cut_scales(self.scale, self.shape, rows, columns),
            places=places,
            numbers=numbers,
            kept=inner.nnz,
        )

    def _rounded(self, exact: Tensor) -> Tensor:
        # The nearest number of a half type may be inf where the weight was its largest.
        largest = torch.finfo(self.dtype).max
        return exact.clamp_(-largest, largest).to(self.dtype)

    def describe(self) -> str:
        return f"{self._husk().describe()}:{self.codec.name}"

    def layout_faults(self) -> list[str]:
        if self.like.ndim != 1 or self.like.numel():
            return [f"like must be [0], got {list(self.like.shape)}"]
        if self.table.ndim != 1 or self.table.numel() not in (0, TABLE):
            return [f"table must be [0] or [{TABLE}], got {list(self.table.shape)}"]
        if self.group < 0 or self.kept < 0:
            return [f"group and kept must not be negative, got {self.group} and {self.kept}"]
        if self.digits not in DIGITS:
            return [f"digits must be 1, 2 or 3, got {self.digits}"]
        if not self.m == self.n == 0 and self.format != "nm_int":
            return [f"n and m must be 0, got {self.n} and {self.m}"]
        try:
            Codec.parse(self.codec.name)
        except SpecError as error:
            return [f"group, scale and table must be those of a codec: {error}"]
        return super().layout_faults()

    def fields(self) -> list[Field]:
        husk = self._husk()
        shape = self.codec.scale_shape(*husk.shape)
        names = ("panels", "groups", "scale and middle", "16")
        return [
            Field("like", self.like, self.dtypes, (("0", 0),)),
            Field("scale", self.scale, (torch.int16,), tuple(zip(names, shape, strict=True))),
            Field("table", self.table, BYTE, ((str(self.table.numel()), self.table.numel()),)),
            *(self._value_field(field) if field.name == "values" else field for field in husk.fields()),
        ]

    def _value_field(self, wide: Field) -> Field:
        """What `values` must look like. wide: the same of codes that take a byte each."""
        *dims, (name, size) = wide.dims
        if self.table.numel() and size is not None:
            name, size = f"{name}, two in a byte", size // 2
        return Field("values", self.values, BYTE, (*dims, (name, size)))

    def content_faults(self) -> list[str]:
        scale, middle = self.codec.spread(self.scale, *self.shape)
        if not bool(((scale >= 0) & (scale * LARGEST + middle.abs()).isfinite()).all()):
            return ["scale must hold finite numbers of 0 and more, and middles, that give finite weights"]
        if self.table.numel() and (not bool((self.table.int().diff() > 0).all()) or not int(self.table[0])):
            return [f"table must ascend from 1 or more, got {self.table.tolist()}"]
        return self._place_faults()

    def _place_faults(self) -> list[str]:
        """What is wrong with positions and codes."""
        wide = self._wide()
        if faults := wide.content_faults():
            return faults
        if not bool(wide.values.all()):
            return ["values must hold no 0"]
        if self.codec.middle and self.kept != wide.values.numel():
            return [f"kept must be {wide.values.numel()} for these values, got {self.kept}"]
        return []
