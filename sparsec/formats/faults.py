"""What is wrong with the parts of a packed matrix, or with what was given to pack: one wording for all formats."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsec.arguments import shown
from sparsec.errors import FormatError


@dataclass(frozen=True, eq=False)
class Field:
    """What one packed tensor must look like."""

    name: str
    tensor: Tensor
    dtypes: tuple[torch.dtype, ...]
    dims: tuple[tuple[str, int | None], ...]  # name and size of every dimension; None: any size

    def fault(self) -> str:
        """`row_ptr must be int32 [out_features + 1 = 5], got int64 [4]`; empty when it fits. Looks at no contents."""
        fits = self.tensor.dtype in self.dtypes and self.tensor.ndim == len(self.dims)
        sizes = zip(self.tensor.shape, (size for _, size in self.dims), strict=False)
        if fits and all(size is None or size == held for held, size in sizes):
            return ""
        wanted = ", ".join(n if size is None or n == str(size) else f"{n} = {size}" for n, size in self.dims)
        return (
            f"{self.name} must be {dtype_names(self.dtypes)} [{wanted}], "
            f"got {dtype_names([self.tensor.dtype])} {list(self.tensor.shape)}"
        )


def field_faults(fields: Sequence[Field]) -> list[str]:
    """The faults of all fields, and of tensors that lie on several devices."""
    faults = [fault for field in fields if (fault := field.fault())]
    strided = [field.name for field in fields if not _whole(field.tensor)]
    if strided:
        faults.append(f"{', '.join(strided)} must lie in memory without gaps; call .contiguous()")
    devices = {field.name: str(field.tensor.device) for field in fields}
    if len(set(devices.values())) > 1:
        faults.append(f"{', '.join(devices)} must be on one device, got {', '.join(devices.values())}")
    return faults


def _whole(tensor: Tensor) -> bool:
    return tensor.layout == torch.strided and tensor.is_contiguous()


def pointer_faults(name: str, pointers: Tensor, end: int, end_name: str, unit: str) -> list[str]:
    """What is wrong with the contents of a tensor that holds where each row, or panel, starts."""
    first, last = int(pointers[0]), int(pointers[-1])
    if first != 0 or last != end:
        return [f"{name} must run from 0 to {end_name} = {end}, got {first} to {last}"]
    falls = (pointers[1:] < pointers[:-1]).nonzero()  # a difference could wrap around
    return [f"{name} must not fall, but does after {unit} {int(falls[0])}"] if len(falls) else []


def cut_faults(what: str, first: int, end: int, step: int, size: int) -> list[str]:
    """Why a matrix of so many rows, or columns, cannot be cut at two of them. step: it can be at multiples of this, and where it
    ends. what: `rows` or `columns`."""
    if not 0 <= first <= end <= size:
        return [f"{what} must be cut at two of 0 to {size}, ascending, got {first} and {end}"]
    if odd := [place for place in (first, end) if place % step and place != size]:
        return [f"{what} can be cut at multiples of {step} alone, got {' and '.join(map(str, odd))}"]
    return []


def count_faults(nnz: int, fewest: Callable[[], int], most: int) -> list[str]:
    """What is wrong with the number of kept weights, which the values bound. fewest: reads the values, where that must be."""
    if nnz == most or (least := fewest()) <= nnz <= most:
        return []
    return [f"nnz must be {most if least == most else f'{least} to {most}'} for these values, got {nnz}"]


def check_dense(title: str, what: str, value: object) -> None:
    """Raises FormatError for what is no tensor that holds an element at every place."""
    if not isinstance(value, Tensor):
        raise FormatError(f"{title}: the {what} must be a Tensor, got {shown(value)}")
    if value.layout != torch.strided:
        raise FormatError(f"{title}: the {what} must be a dense tensor, this one is {value.layout}; use .to_dense()")


def check_pack(title: str, dtypes: tuple[torch.dtype, ...], weight: Tensor, mask: Tensor) -> None:
    """Raises FormatError unless weight [out, in] and its bool mask can be given to `pack`."""
    check_dense(title, "weight", weight)
    check_dense(title, "mask", mask)
    if weight.ndim != 2:
        raise FormatError(
            f"{title} packs a matrix [out, in], got a weight of shape {list(weight.shape)}; reshape it first"
        )
    if mask.shape != weight.shape:
        raise FormatError(
            f"{title} needs a bool mask of the weight's shape {list(weight.shape)}, True where kept, "
            f"got {mask.dtype} {list(mask.shape)}"
        )
    if mask.device != weight.device:
        raise FormatError(
            f"{title} needs mask and weight on one device, got {mask.device} and {weight.device}; move the mask"
        )
    check_plan(title, dtypes, mask, weight.dtype)


def check_plan(title: str, dtypes: tuple[torch.dtype, ...], mask: Tensor, dtype: torch.dtype) -> None:
    """Raises FormatError unless a weight of `dtype` and this mask [out, in] can be packed, as far as any format asks."""
    check_dense(title, "mask", mask)
    if mask.ndim != 2 or mask.dtype != torch.bool:
        raise FormatError(
            f"{title} needs a bool mask of the weight's shape [out, in], True where kept, "
            f"got {mask.dtype} {list(mask.shape)}"
        )
    if mask.is_meta:
        raise FormatError(
            f"{title}: weight and mask are on the meta device, where they hold no values; load them first"
        )
    if dtype not in dtypes:
        other = ", or use lower(csr), which holds float64" if dtype == torch.float64 else ""
        raise FormatError(
            f"{title} holds values of {dtype_names(dtypes)}, got {dtype}; convert the model with .to(dtype){other}"
        )


def check_count(title: str, what: str, count: int, limit: int) -> None:
    """Raises FormatError when more is to be stored than the format can number."""
    if count > limit:
        raise FormatError(
            f"{title} holds at most {limit} {what} per matrix (they are numbered in int32), got {count}; "
            "split the matrix or leave it dense"
        )


def dtype_names(dtypes: Sequence[torch.dtype]) -> str:
    """`float32, bfloat16 or float16`."""
    names = [str(d).removeprefix("torch.") for d in dtypes]
    return " or ".join(filter(None, (", ".join(names[:-1]), names[-1])))
