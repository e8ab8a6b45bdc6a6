"""Every way to pack a matrix, with the masks that it takes, for the tests of formats and of kernels."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

from sparsec.formats import Packed
from sparsec.formats.layout import Layout

INTEGERS = {
    torch.float32: torch.int32,
    torch.bfloat16: torch.int16,
    torch.float16: torch.int16,
    torch.float64: torch.int64,
}
SPECIAL = [0.0, -0.0, float("inf"), float("-inf"), float("nan"), 1e-45, -1e-40, 6e-8, 1.0, 65504.0]
PATTERNS = ("empty", "full", "one row", "one column", "checkerboard", "2:4", "blocks", "random")


@dataclass(frozen=True)
class Sized(Layout):
    """A layout that also knows which sizes and masks it takes."""

    @property
    def rows(self) -> int:
        """The number of rows of a matrix must be a multiple of these."""
        return self.pattern.block[0] if self.pattern.block else 1

    @property
    def columns(self) -> int:
        """And its columns of these."""
        return self.pattern.block[1] if self.pattern.block else self.pattern.nm[1] if self.pattern.nm else 1

    def fit(self, out_features: int, in_features: int) -> tuple[int, int]:
        """The next sizes that are served."""
        return math.ceil(out_features / self.rows) * self.rows, math.ceil(in_features / self.columns) * self.columns

    def legal(self, mask: Tensor) -> Tensor:
        """The mask, less what is too much for N:M: the last kept columns of a group."""
        if self.pattern.nm is None or not mask.numel():
            return mask
        groups = mask.view(mask.shape[0], -1, self.columns)
        return (groups & (groups.cumsum(2) <= self.pattern.nm[0])).view(mask.shape)

    def mask(self, out_features: int, in_features: int, density: float, generator: torch.Generator) -> Tensor:
        """A random mask; in BSR of whole blocks, most of which keep most of their weights."""
        if self.pattern.block is not None:
            blocks = torch.rand(out_features // self.rows, in_features // self.columns, generator=generator) < density
            mask = blocks.repeat_interleave(self.rows, 0).repeat_interleave(self.columns, 1)
            return mask & (torch.rand(mask.shape, generator=generator) < 0.9)
        # At random columns, so that N:M does not always keep the first of a group.
        return self.legal(torch.rand(out_features, in_features, generator=generator) < density)


NAMES = (
    *("csr8", "csr16", "csr32", "bitmap", "bsr16x16", "bsr16x1", "bsr8x3", "bsr24x5", "bsr32x32"),
    *("nm1:4", "nm2:4", "nm3:8", "nm4:8", "wcsr8", "wcsr16"),
)
LAYOUTS = {name: Sized.parse(name) for name in NAMES}


def bits(t: Tensor) -> Tensor:
    """The bit patterns: NaN equals itself, -0.0 differs from 0.0."""
    return t.contiguous().view(INTEGERS[t.dtype])


def some(
    layout: Sized, out_features: int, in_features: int, density: float, dtype: torch.dtype, seed: int = 0
) -> tuple[Packed, Tensor]:
    """A random matrix packed, and dense."""
    generator = torch.Generator().manual_seed(seed)
    shape = layout.fit(out_features, in_features)
    weight = torch.randn(shape, generator=generator).to(dtype)
    mask = layout.mask(*shape, density, generator)
    return layout.pack(weight, mask), torch.where(mask, weight, 0)


@st.composite
def weights_and_masks(draw: st.DrawFn, layout: Sized) -> tuple[Tensor, Tensor]:
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
