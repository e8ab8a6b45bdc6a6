"""Several matrices as one flat list of arguments: what the operator `fused_linear` takes, and how a part of it is found again.

Its tensors are those of every part, one after the other: the packed tensors, then the bias if the part has one. Its layout has
for every part the number of its format, whether it has a bias (0 or 1), and the integers that the format needs. The same
functions serve the operator (whose tensors are tensors) and the graph (whose tensors are nodes).
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from sparsec.errors import FormatError
from sparsec.formats import kinds

DENSE = "dense"
FORMAT_NUMBERS: dict[str, int] = {
    DENSE: 0,
    "csr": 1,
    "bitmap": 2,
    "bsr": 3,
    "nm": 4,
    "wcsr": 5,
    "dense_int": 6,
    "bitmap_int": 7,
    "nm_int": 8,
    "bsr_int": 9,
    "csr_int": 10,
    "wcsr_int": 11,
}
"""Part of the operator's interface: the native library has the same numbers, all but those of warp CSR, which is for GPUs."""
_FOREIGN = 1 << 30
"""Numbers of other formats begin here: the native library knows none of them, so that each computes by itself."""

T = TypeVar("T")


@dataclass(frozen=True)
class Part(Generic[T]):
    """One matrix of a fused product. A dense one has one tensor, the weight [out, in]."""

    format: str
    tensors: tuple[T, ...]
    bias: T | None = None
    scalars: tuple[int, ...] = ()

    @property
    def arguments(self) -> tuple[T | int | None, ...]:
        """What the format's own operator takes after x."""
        return (*self.tensors, self.bias, *self.scalars)


def format_number(format_name: str) -> int:
    """The same in every process."""
    if format_name in FORMAT_NUMBERS:
        return FORMAT_NUMBERS[format_name]
    return _FOREIGN | zlib.crc32(format_name.encode()) >> 2


def in_library(format_name: str) -> bool:
    """Whether the native library multiplies by a format, so that it may be a part of one of its calls."""
    return format_name == DENSE or (format_name in FORMAT_NUMBERS and kinds()[format_name].devices is None)


def tensor_count(format_name: str) -> int:
    """How many tensors a part of this format has, without the bias."""
    return 1 if format_name == DENSE else len(kinds()[format_name].tensor_names)


def scalar_count(format_name: str) -> int:
    """How many integers a part of this format has."""
    return 0 if format_name == DENSE else len(kinds()[format_name].scalar_names)


def flatten(parts: Iterable[Part[T]]) -> tuple[list[T], list[int]]:
    """(tensors, layout) of parts."""
    tensors: list[T] = []
    layout: list[int] = []
    for part in parts:
        tensors += part.tensors
        if part.bias is not None:
            tensors.append(part.bias)
        layout += (format_number(part.format), int(part.bias is not None), *part.scalars)
    return tensors, layout


def unflatten(tensors: Sequence[T], layout: Sequence[int]) -> list[Part[T]]:
    """The inverse of `flatten`. FormatError, with the place, for a layout that is none or does not fit the tensors."""
    parts: list[Part[T]] = []
    at = 0
    for name, word, end in _walk(layout):
        bias_at = at + tensor_count(name)
        last = bias_at + layout[word + 1]
        if last > len(tensors):
            raise FormatError(
                f"fused_linear: part {len(parts)} ({name}) needs {last - at} tensors from {at} on, got {len(tensors) - at}"
            )
        bias = tensors[bias_at] if last > bias_at else None
        parts.append(Part(name, tuple(tensors[at:bias_at]), bias, tuple(layout[word + 2 : end])))
        at = last
    if at != len(tensors):
        raise FormatError(f"fused_linear: the layout's {len(parts)} parts have {at} tensors, got {len(tensors)}")
    return parts


@functools.lru_cache(1024)
def part_formats(layout: tuple[int, ...]) -> frozenset[str]:
    """The formats of the parts of a layout. FormatError for one that is none."""
    return frozenset(name for name, _, _ in _walk(layout))


def _walk(layout: Sequence[int]) -> Iterator[tuple[str, int, int]]:
    """The format of every part, and where its entries of the layout begin and end. FormatError for one that is none."""
    known = kinds()
    names = {format_number(name): name for name in (*FORMAT_NUMBERS, *known)}
    count = word = 0
    while word < len(layout):
        name = names.get(layout[word])
        if name is None or (name != DENSE and name not in known):
            raise FormatError(
                f"fused_linear: layout[{word}] must be the number of a format ({_listed(names)}), got {layout[word]}"
            )
        end = word + 2 + scalar_count(name)
        if end > len(layout) or layout[word + 1] not in (0, 1):
            raise FormatError(
                f"fused_linear: part {count} ({name}) needs {scalar_count(name) + 2} entries of layout from {word} on, the "
                f"second of them 0 or 1 (whether it has a bias), got {list(layout[word:])}"
            )
        yield name, word, end
        count, word = count + 1, end


def _listed(names: dict[int, str]) -> str:
    return ", ".join(f"{number} {name}" for number, name in names.items())
