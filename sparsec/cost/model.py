"""The cost of one product with one kernel: a call, then whichever roof binds.

    seconds = call + outputs * set-up + max(bytes / bandwidth, decode work / decode rate, FLOPs / peak)

after the roofline model (Williams, Waterman and Patterson 2009, doi 10.1145/1498765.1498785). The constants are a kernel's own and
are measured (`sparsec.cost.constants`): two kernels on one machine reach different shares of its bandwidth. They are held as
seconds per unit, the inverse of the rates, so that work which costs nothing is 0 and not infinite.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch

from sparsec.formats.base import Packed

Roof = Literal["bytes", "decode", "flops", "call"]
TIE = 0.95  # roofs nearer to each other than this are one: the earlier of bytes, decode, flops is named


@dataclass(frozen=True)
class Work:
    """What one product with a matrix [out_features, in_features] asks of a kernel."""

    out_features: int
    in_features: int
    stored: int  # values that are held, fillers and padding included
    nbytes: int  # of all tensors held, each read once

    @classmethod
    def of(cls, packed: Packed) -> Work:
        """Of a packed matrix."""
        return cls(*packed.shape, packed.values.numel(), packed.nbytes)

    @classmethod
    def dense(cls, out_features: int, in_features: int, dtype: torch.dtype) -> Work:
        """Of a dense matrix."""
        count = out_features * in_features
        return cls(out_features, in_features, count, count * dtype.itemsize)

    @property
    def positions(self) -> int:
        """Weights, zeros included."""
        return self.out_features * self.in_features


@dataclass(frozen=True)
class ReadRate:
    """Plain reading with all threads."""

    nbytes: int  # walked through again and again
    per_byte: float  # seconds


@dataclass(frozen=True)
class Rate:
    """Seconds of arithmetic, linear in what a kernel walks over: CSR goes by stored value, a bitmap by position."""

    per_stored: float
    per_position: float

    def seconds(self, work: Work) -> float:
        """For one product."""
        return self.per_stored * work.stored + self.per_position * work.positions


@dataclass(frozen=True)
class RowsRate:
    """Multiply-adds with so many rows of x at once."""

    rows: int  # above 1
    rate: Rate  # seconds for all the rows together


@dataclass(frozen=True)
class KernelCost:
    """One kernel on one machine with one dtype; times are seconds, of weights that lie in memory and not in a cache."""

    kernel: str  # as in sparsec.kernels.known()
    format: str  # as a packed matrix describes itself: csr8, bitmap, bsr16x16, dense; nm for all N:M
    dtype: str  # "float32"
    call: float  # the module's call, waking threads, the first bytes to arrive
    per_output: (
        float  # a matrix row's loop is set up, its sum is reduced; short rows cost more than long ones of as many bytes
    )
    per_byte: float  # at the bandwidth that this kernel reaches
    decode: Rate  # one row, weights near at hand
    rows: tuple[RowsRate, ...]  # ascending
    error: float  # of the fit: 9 in 10 of its own measurements lie within this share of what it predicts

    def predict(self, work: Work, rows: int = 1, reach: float = 1.0) -> Prediction:
        """rows: of x. reach: how much faster than memory the bytes come, where a cache holds them (`Constants.reach`)."""
        read, decode = self.per_byte * work.nbytes / reach, self.decode.seconds(work)
        call = self.call + self.per_output * work.out_features
        return Prediction(call, read, decode, self._multiply(work, rows, max(read, decode)))

    def _multiply(self, work: Work, rows: int, single: float) -> float:
        """Seconds for the multiply-adds of many rows, between measured numbers of rows on a straight line in log-log."""
        if rows <= 1 or not self.rows:
            return 0.0
        last = self.rows[-1]
        if rows >= last.rows:
            return last.rate.seconds(work) * rows / last.rows
        points = [(1, single), *((r.rows, r.rate.seconds(work)) for r in self.rows)]
        at = next(i for i, (known, _) in enumerate(points) if known >= rows)
        (low, before), (high, after) = points[at - 1], points[at]
        if min(before, after) <= 0:
            return max(before, after)
        share = math.log(rows / low) / math.log(high / low)
        return math.exp((1 - share) * math.log(before) + share * math.log(after))


@dataclass(frozen=True)
class Prediction:
    """Seconds of one product by part."""

    call: float
    read: float
    decode: float
    multiply: float

    @property
    def seconds(self) -> float:
        """The whole."""
        return self.call + max(self.read, self.decode, self.multiply)

    @property
    def binds(self) -> Roof:
        """What the time goes into: the highest roof, or the call where that is more than half of the time."""
        highest = max(self.read, self.decode, self.multiply)
        if self.call > highest:
            return "call"
        roofs: tuple[tuple[Roof, float], ...] = (
            ("bytes", self.read),
            ("decode", self.decode),
            ("flops", self.multiply),
        )
        return next(name for name, seconds in roofs if seconds >= TIE * highest)
