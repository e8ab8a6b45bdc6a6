"""The operators `program` and `step`: a whole token of a model in one call.

A program is a chain (chain.py) that stays: it is read and checked once, and holds its tensors. Its inputs are a token and a
position of each sequence, registers 0 and 1, as fp32 numbers; the register `result` holds the logits. Beside a chain's
instructions, whose numbers and entries are the same, it has:

- a view: VIEW, a register, an offset, three sizes, three strides, in numbers. It defines another register over the same memory;
  a stride of 0 repeats. Registers are [outer, rows, width].
- a tensor: TENSOR. It defines a register of the next tensor's numbers, in a row.
- values side by side: JOIN, how many, the registers. Outer and rows are alike, the widths add up.
- rows of a table: LOOK_UP, the register of the indices, then as of a product the tensors and the layout of one matrix
  [n, width]; dense ones, bitmaps, and quantised values of these and of N:M have rows.
- attention of one query a head: ATTEND, the registers of queries, keys and values, the layer, heads, heads of the cache, their
  width, that of values, two constants (what scores are multiplied by; what they are capped at, softly, or 0), and how many
  positions are seen at most, or 0. Keys and values are appended to the layer's cache first.

`step` runs one token: ids and positions [batch] as fp32; mask [batch, positions], added to the scores, or None; slabs, the keys and
values of each layer [batch, heads, room, width], which it writes to; spans, of each layer the first position that is there and the
one after the last; times, int64, one of each instruction but views, to which its nanoseconds are added, or None. It returns the
logits [batch, 1, words]; nothing, [0], where a tensor of the program has moved meanwhile.

There is no reference: what the native library does not serve runs as the model itself does. There are no gradients.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from sparsec import private
from sparsec.kernels.chain import CODES
from sparsec.kernels.library.loader import library
from sparsec.kernels.ops import LIBRARY
from sparsec.private import OpOverload

NAME = "step"
VIEW, TENSOR, JOIN, LOOK_UP, ATTEND = range(len(CODES) + 1, len(CODES) + 6)
TABLES = ("dense", "bitmap", "dense_int", "bitmap_int", "nm_int")
"""Formats whose rows can be looked up."""

LIBRARY.define(  # type: ignore[no-untyped-call]
    "program(Tensor[] tensors, int batch, int[] code, float[] constants, int result) -> int"
)
LIBRARY.define(  # type: ignore[no-untyped-call]
    f"{NAME}(int program, Tensor ids, Tensor positions, Tensor? mask, Tensor(a!)[] slabs, int[] spans, Tensor(b!)? times) -> Tensor"
)
_program: OpOverload = torch.ops.sparsec.program.default
_step: OpOverload = torch.ops.sparsec.step.default


class Program:
    """A prepared program; it is let go of with this object.

    KernelError, or RuntimeError from the library, for one that is none.
    """

    def __init__(
        self, tensors: Sequence[Tensor], batch: int, code: Sequence[int], constants: Sequence[float], result: int
    ) -> None:
        self.batch = batch
        self._times: Tensor | None = None
        with private.below_autograd():
            self._number = int(_program(list(tensors), batch, list(code), list(constants), result))
        self._end = weakref.finalize(self, library().end_program, self._number)
        self._end.atexit = False

    @contextmanager
    def timed(self, times: Tensor) -> Iterator[Tensor]:
        """Inside, steps add the times of their instructions to these: int64, one of each but views, in nanoseconds."""
        self._times = times
        try:
            yield times
        finally:
            self._times = None

    def step(
        self, ids: Tensor, positions: Tensor, mask: Tensor | None, slabs: Sequence[Tensor], spans: Sequence[int]
    ) -> Tensor | None:
        """The logits of one more token; None where the program's tensors have moved."""
        with private.below_autograd():
            out: Tensor = _step(self._number, ids, positions, mask, slabs, spans, self._times)
        return out if out.numel() else None
