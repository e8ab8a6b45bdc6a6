"""Every way to pack a matrix, with the masks that it takes, for the tests of formats and of kernels."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from sparsec.formats import BSR, CSR, NM, Bitmap, Packed, WarpCSR

INTEGERS = {
    torch.float32: torch.int32,
    torch.bfloat16: torch.int16,
    torch.float16: torch.int16,
    torch.float64: torch.int64,
}
SPECIAL = [0.0, -0.0, float("inf"), float("-inf"), float("nan"), 1e-45, -1e-40, 6e-8, 1.0, 65504.0]
PATTERNS = ("empty", "full", "one row", "one column", "checkerboard", "2:4", "blocks", "random")


@dataclass(frozen=True)
class Layout:
    """A format with its options; sizes of a matrix must be multiples of `rows` and `columns`."""

    kind: type[Packed]
    options: dict[str, Any] = field(default_factory=dict)
    rows: int = 1
    columns: int = 1
    keeps: int = 0  # of `columns` columns in a row at most; 0: any number

    def pack(self, weight: Tensor, mask: Tensor) -> Packed:
        packed: Packed = self.kind.pack(weight, mask, **self.options)  # type: ignore[attr-defined]
        return packed

    def planned_nbytes(self, mask: Tensor, dtype: torch.dtype) -> int:
        planned: int = self.kind.planned_nbytes(mask, dtype, **self.options)  # type: ignore[attr-defined]
        return planned

    def fit(self, out_features: int, in_features: int) -> tuple[int, int]:
        """The next sizes that are served."""
        return math.ceil(out_features / self.rows) * self.rows, math.ceil(in_features / self.columns) * self.columns

    def legal(self, mask: Tensor) -> Tensor:
        """The mask, less what is too much for N:M: the last kept columns of a group."""
        if not self.keeps or not mask.numel():
            return mask
        groups = mask.view(mask.shape[0], -1, self.columns)
        return (groups & (groups.cumsum(2) <= self.keeps)).view(mask.shape)

    def mask(self, out_features: int, in_features: int, density: float, generator: torch.Generator) -> Tensor:
        """A random mask; in BSR of whole blocks, most of which keep most of their weights."""
        if self.kind is BSR:
            blocks = torch.rand(out_features // self.rows, in_features // self.columns, generator=generator) < density
            mask = blocks.repeat_interleave(self.rows, 0).repeat_interleave(self.columns, 1)
            return mask & (torch.rand(mask.shape, generator=generator) < 0.9)
        # At random columns, so that N:M does not always keep the first of a group.
        return self.legal(torch.rand(out_features, in_features, generator=generator) < density)


def bsr(rows: int, columns: int) -> Layout:
    return Layout(BSR, {"block": (rows, columns)}, rows, columns)


LAYOUTS = {
    "csr8": Layout(CSR, {"index_bits": 8}),
    "csr16": Layout(CSR, {"index_bits": 16}),
    "csr32": Layout(CSR, {"index_bits": 32}),
    "bitmap": Layout(Bitmap),
    "bsr16x16": bsr(16, 16),
    "bsr16x1": bsr(16, 1),
    "bsr8x3": bsr(8, 3),
    "bsr24x5": bsr(24, 5),
    "bsr32x32": bsr(32, 32),
    "nm1:4": Layout(NM, {}, 1, 4, 1),
    "nm2:4": Layout(NM, {}, 1, 4, 2),
    "nm3:8": Layout(NM, {}, 1, 8, 3),
    "nm4:8": Layout(NM, {}, 1, 8, 4),
    "wcsr8": Layout(WarpCSR, {"index_bits": 8}),
    "wcsr16": Layout(WarpCSR, {"index_bits": 16}),
}


def bits(t: Tensor) -> Tensor:
    """The bit patterns: NaN equals itself, -0.0 differs from 0.0."""
    return t.contiguous().view(INTEGERS[t.dtype])


def some(
    layout: Layout, out_features: int, in_features: int, density: float, dtype: torch.dtype, seed: int = 0
) -> tuple[Packed, Tensor]:
    """A random matrix packed, and dense."""
    generator = torch.Generator().manual_seed(seed)
    shape = layout.fit(out_features, in_features)
    weight = torch.randn(shape, generator=generator).to(dtype)
    mask = layout.mask(*shape, density, generator)
    return layout.pack(weight, mask), torch.where(mask, weight, 0)


@st.composite
def weights_and_masks(draw: st.DrawFn, layout: Layout) -> tuple[Tensor, Tensor]:
    """Any bit pattern, special values more often, and every kind of mask, in sizes that the layout takes."""
    shape = layout.fit(draw(st.integers(0, 40)), draw(st.integers(0, 70)))
    dtype = draw(st.sampled_from(layout.kind.dtypes))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    width = INTEGERS[dtype]
    info = torch.iinfo(width)
    raw = torch.randint(info.min, info.max, shape, generator=generator, dtype=width).view(dtype)
    special = torch.tensor(SPECIAL).to(dtype)
    chosen = special[torch.randint(len(SPECIAL), shape, generator=generator)]
    weight = torch.where(torch.rand(shape, generator=generator) < 0.5, chosen, raw)
    rows, columns = torch.arange(shape[0])[:, None], torch.arange(shape[1])[None, :]
    masks = {
        "empty": torch.zeros(shape, dtype=torch.bool),
        "full": torch.ones(shape, dtype=torch.bool),
        "one row": (rows == 0).expand(shape),
        "one column": (columns == shape[1] - 1).expand(shape),
        "checkerboard": (rows + columns) % 2 == 0,
        "2:4": (rows + columns) % 4 >= 2,
        "blocks": (rows // 16 + columns // 16) % 2 == 0,
        "random": torch.rand(shape, generator=generator) < draw(st.floats(0, 1)),
    }
    assert set(masks) == set(PATTERNS)
    return weight, layout.legal(masks[draw(st.sampled_from(PATTERNS))].contiguous())
