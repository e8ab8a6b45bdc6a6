"""What every storage format promises: the bytes it holds, the work it asks for, and the matrix that comes back out.

A format gives bytes and FLOPs; a kernel gives speed. Only the `lower` pass joins the two.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from sparsec.errors import FormatError, SpecError
from sparsec.formats.faults import Field, cut_faults, field_faults
from sparsec.formats.positions import bits_of
from sparsec.formats.values import PLAIN, Codec
from sparsec.patterns import Pattern

HALF_AND_SINGLE = (torch.float32, torch.bfloat16, torch.float16)
"""Value types of the formats made for speed."""
MAX_COUNT = 2**31 - 1
"""Positions inside a matrix's values are int32."""


@dataclass(frozen=True)
class Plan:
    """What packing would give."""

    nbytes: int  # of all tensors
    stored: int  # values held, fillers and padding included
    parameters: str = ""  # of the layout, read from the mask where they were left open


class Packed(ABC):
    """One sparse matrix [out_features, in_features] in packed form: positions, which the subclass holds, and coded values.

    Subclasses are frozen dataclasses (`eq=False`, since they hold tensors). Each also has

        @classmethod
        def pack(cls, weight: Tensor, mask: Tensor, **options) -> Self

        @classmethod
        def plan(cls, mask: Tensor, dtype: torch.dtype, **options) -> Plan

    where weight is [out, in], mask is a bool tensor of the same shape with True where a weight is kept, and the kept values
    are stored bit for bit, whatever they are (zeros, NaN and inf included). `plan` tells what `pack` would return, and refuses
    with a FormatError what `pack` would refuse, in one or two passes over the mask.

    A layout's string is the format and its parameters: `bsr16x16`. What follows the format's name is read here.
    """

    format: ClassVar[str]
    title: ClassVar[str]
    """The format in messages."""
    dtypes: ClassVar[tuple[torch.dtype, ...]]
    """Of plain values."""
    tensor_names: ClassVar[tuple[str, ...]]
    """Every tensor held, in the order in which the operator takes them; attributes."""
    scalar_names: ClassVar[tuple[str, ...]]
    """The integers that the tensors do not tell, in the order in which the operator takes them; attributes."""

    parameters: ClassVar[tuple[str, ...]] = ("",)
    """Some that are often used, for messages and lists."""
    checked: ClassVar[tuple[str, ...]] = ()
    """Those that are compiled ahead of time for GPUs, and checked on them."""
    calibrated: ClassVar[Mapping[str, tuple[str, ...]]] = {"cpu": ("",), "cuda": ("",)}
    """Those whose constants the cost model measures, by type of device; others have the constants of a relative."""
    one_cost: ClassVar[bool] = False
    """Whether all parameters have the same constants."""
    devices: ClassVar[tuple[str, ...] | None] = None
    """Types of device that it is laid out for; None: every one."""
    twins: ClassVar[Mapping[str, str]] = {}
    """Type of device -> the format that holds the same matrices and has kernels there, where this one has none."""
    packing: ClassVar[float] = 14.5
    """Bytes for every weight of a matrix, half of them kept, that `pack` takes at its worst moment, the packed matrix included."""
    order: ClassVar[int] = 1
    """Of the values in the tensors; raised when it changes, so that what was pickled before is refused, not read wrongly."""
    widest: ClassVar[int | None] = None
    """Columns that it reaches at most; None: any number."""

    values: Tensor

    @classmethod
    def options(cls, parameters: str) -> dict[str, Any]:
        """What `pack` and `plan` take for the parameters of a layout, `16x16` in bsr16x16. SpecError for others."""
        if parameters:
            raise SpecError(f"{cls.format} has no parameters, got {cls.format}{parameters}")
        return {}

    @classmethod
    def pattern(cls, parameters: str) -> Pattern:
        """What a mask must follow for these parameters to serve it."""
        return Pattern()

    @classmethod
    def candidates(cls, mask: Tensor, device: str) -> Iterable[str]:
        """Parameters worth a look for a mask on a type of device, where `lower(auto)` chooses."""
        return ("",)

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor held, by name, in the operator's order."""
        return {name: getattr(self, name) for name in self.tensor_names}

    def scalars(self) -> dict[str, int]:
        """The integers that the tensors do not tell, in the operator's order."""
        return {name: getattr(self, name) for name in self.scalar_names}

    @classmethod
    def from_parts(cls, tensors: Mapping[str, Tensor], scalars: Mapping[str, int]) -> Self:
        """The inverse of `tensors()` and `scalars()`; does not check."""
        return cls(**tensors, **{name: int(number) for name, number in scalars.items()})

    def ordered(self, device: str = "") -> Self:
        """The same matrix with its values in the order that their dtype has on a type of device; the very same object where they
        are. For one whose `values` were converted to another dtype, or moved. device: "" is the one that they are on."""
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "order": self.order}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """FormatError for values in another order."""
        check_order(type(self), state.pop("order", 1))
        self.__dict__.update(state)

    @property
    @abstractmethod
    def nnz(self) -> int:
        """Number of kept weights (the mask's sum, not a count of values that differ from zero)."""

    @abstractmethod
    def scatter(self) -> Tensor:
        """The stored values at their positions [out, in], 0 elsewhere, bit for bit."""

    @property
    def codec(self) -> Codec:
        """How the stored values stand for weights."""
        return PLAIN

    def unpack(self) -> Tensor:
        """The dense matrix [out, in] in its dtype: `where(mask, weight, 0)`, bit for bit where values are plain."""
        return self.scatter()

    def exact(self) -> Tensor:
        """The dense matrix [out, in] that kernels multiply by: where values are quantised, in fp32."""
        return self.unpack()

    def rows(self, ids: Tensor) -> Tensor:
        """Rows of `unpack()`, bit for bit: [n, in_features] of row numbers ids [n], each from 0 to out_features - 1."""
        return self.unpack().index_select(0, ids)

    @property
    def cut_steps(self) -> tuple[int, int]:
        """Rows, and columns, at multiples of which the matrix can be cut; it ends where it ends."""
        return (1, 1)

    def cut_rows(self, first: int, end: int) -> Self:
        """Rows first to end - 1 in the same layout: `unpack()[first:end]`, bit for bit. Its tensors may lie within these.

        FormatError unless 0 <= first <= end <= out_features, both of them multiples of `cut_steps` or out_features. A kept 0.0 may
        not be counted as kept in it, where the layout does not tell it from what it fills up.
        """
        self._check_cut("rows", first, end, self.cut_steps[0], self.shape[0])
        return self if (first, end) == (0, self.shape[0]) else self._cut_rows(first, end)

    def cut_columns(self, first: int, end: int) -> Self:
        """Columns first to end - 1, numbered from 0, in the same layout: `unpack()[:, first:end]`, bit for bit; else as rows."""
        self._check_cut("columns", first, end, self.cut_steps[1], self.shape[1])
        return self if (first, end) == (0, self.shape[1]) else self._cut_columns(first, end)

    def _check_cut(self, what: str, first: int, end: int, step: int, size: int) -> None:
        if faults := cut_faults(what, first, end, step, size):
            raise FormatError(f"{self.describe()} [{self.shape[0]}x{self.shape[1]}]: {'; '.join(faults)}")

    def _cut_rows(self, first: int, end: int) -> Self:
        return self._repacked(slice(first, end), slice(None))

    def _cut_columns(self, first: int, end: int) -> Self:
        return self._repacked(slice(None), slice(first, end))

    def _repacked(self, rows: slice, columns: slice) -> Self:
        """A part of the matrix, unpacked and packed again."""
        pack: Any = self.pack  # type: ignore[attr-defined]
        options = self.options(self.describe().removeprefix(self.format))
        mask = self._stored()[rows, columns].clone(memory_format=torch.contiguous_format)
        part: Self = pack(self.scatter()[rows, columns], mask, **options)
        return part

    def _stored(self) -> Tensor:
        """What takes a place [out, in], bool, as far as it can be told."""
        return bits_of(self.scatter()) != 0

    @abstractmethod
    def fields(self) -> list[Field]:
        """What every tensor must look like, given the others and the scalars; may stop at the first that hides the rest."""

    @abstractmethod
    def content_faults(self) -> list[str]:
        """What is wrong with the contents, once dtypes, shapes and devices are right; names the tensor."""

    def layout_faults(self) -> list[str]:
        """What is wrong with sizes, dtypes, shapes and devices; looks at no contents, so that fake tensors do."""
        out_features, in_features = self.shape
        if out_features < 0 or in_features < 0:
            return [f"out_features and in_features must not be negative, got {out_features} and {in_features}"]
        return field_faults(self.fields())

    def check(self) -> None:
        """Raises FormatError, naming the field, when the tensors do not form a valid matrix."""
        faults = self.layout_faults() or self.content_faults()
        if faults:
            what = f"{self.title} [{self.shape[0]}x{self.shape[1]}]"
            raise FormatError(f"{what}: {'; '.join(faults)}; pack the matrix again from its dense weight")

    def describe(self) -> str:
        """The format with its parameters, such as `csr16`."""
        return self.format

    @property
    def dtype(self) -> torch.dtype:
        """Of x, bias and result."""
        return self.values.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors held."""
        return sum(t.numel() * t.element_size() for t in self.tensors().values())

    def converted(self, dtype: torch.dtype) -> Self:
        """The same matrix for x, bias and result of another dtype; plain values are rounded to it."""
        parts = self.tensors()
        return self.from_parts({**parts, "values": parts["values"].to(dtype)}, self.scalars()).ordered()

    @property
    def sparsity(self) -> float:
        """Share of zeros, 0 for an empty matrix."""
        total = self.shape[0] * self.shape[1]
        return 1.0 - self.nnz / total if total else 0.0

    @property
    def flops_per_token(self) -> int:
        """Multiply-adds count 2."""
        return 2 * self.nnz


def check_order(kind: type[Packed], order: int) -> None:
    """FormatError unless what was pickled holds its values in the order of today."""
    if order != kind.order:
        raise FormatError(
            f"{kind.title}: this was pickled with values in order {order}, they are read in order {kind.order}; "
            "lower the pruned model again with this version"
        )
