"""Triton kernels on 16-bit values, of which a lane holds two columns: what does not fill a lane, a step or a panel."""

from __future__ import annotations

import pytest
import torch
from format_cases import LAYOUTS, Sized, some
from test_gpu_kernels import DEVICE, DTYPES, assert_right, moved, needs_triton

from sparsec.kernels import gpu


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize(
    ("name", "size"),
    [
        *(("bitmap", size) for size in ((17, 301), (5, 1), (1, 3))),
        *(("nm1:4", size) for size in ((17, 4), (5, 300))),
        *(("nm3:8", size) for size in ((17, 8), (33, 200))),
        *(
            ("bsr8x3", (16, 6)),
            ("bsr24x5", (48, 10)),
            ("bsr8x2", (16, 4)),
            ("bsr24x10", (48, 20)),
            ("bsr64x32", (64, 32)),
        ),
    ],
)
def test_lanes_that_are_not_filled_are_right(name: str, size: tuple[int, int], dtype: torch.dtype) -> None:
    """In 16-bit types two columns, or two slots, share a lane: a last one alone, blocks of odd and of even width."""
    packed, kept = some(LAYOUTS.get(name) or Sized.parse(name), *size, 0.6, dtype)
    assert kept.shape == size
    for tokens in (1, 17, 65):
        assert_right(torch.randn(tokens, size[1]).to(dtype), packed, kept, torch.randn(size[0]).to(dtype))


@needs_triton
@pytest.mark.parametrize("name", ["bitmap", "nm1:4", "nm3:8"])
def test_what_is_not_there_is_not_multiplied(name: str) -> None:
    """The half of a lane past the last column or slot meets no infinity of x."""
    torch.manual_seed(0)
    packed, kept = some(LAYOUTS[name], 17, 13, 1.0, torch.bfloat16)
    padded = torch.zeros(3, 2 * kept.shape[1], dtype=torch.bfloat16, device=DEVICE)
    padded[:, kept.shape[1] :] = float("nan")
    x = padded.view(6, -1)  # every second row is NaN, and lies right behind the one before
    for rows in (x[:1], x[::2]):
        assert gpu.product(rows, moved(packed), None).eq(0).all()
    for tokens in (2, 9):
        mixed = torch.zeros(tokens, kept.shape[1], dtype=torch.bfloat16, device=DEVICE)
        mixed[1::2] = float("nan")
        assert gpu.product(mixed, moved(packed), None)[::2].eq(0).all()
