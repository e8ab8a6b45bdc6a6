"""Warp CSR: how rows are cut into chunks and groups, how many bytes that takes, and what `check` names."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sparsec.errors import FormatError
from sparsec.formats import WarpCSR


def random_mask(rows: int, columns: int, density: float, seed: int = 0) -> Tensor:
    return torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)) < density


def written(tensor: Tensor, place: int | tuple[int, int], value: int) -> Tensor:
    tensor = tensor.clone()
    tensor[place] = value
    return tensor


@given(
    st.integers(1, 6),
    st.sampled_from([1, 8, 255, 256, 257, 300, 2000, 65536]),
    st.sampled_from([0.0, 0.0005, 0.01, 0.1, 0.5, 1.0]),
    st.sampled_from([8, 16]),
    st.integers(0, 99),
)
def test_every_matrix_comes_back_with_groups_within_reach(
    rows: int, columns: int, density: float, bits: int, seed: int
) -> None:
    # Rows of different densities: their chunks do not end together.
    mask = random_mask(rows, columns, 1.0, seed) & (
        torch.rand(rows, columns) < density * torch.linspace(0.2, 1, rows)[:, None]
    )
    weight = torch.randn(rows, columns).masked_fill_(torch.rand(rows, columns) < 0.1, -0.0)
    packed = WarpCSR.pack(weight, mask, index_bits=bits)
    packed.check()
    expected = torch.where(mask, weight, 0)
    assert torch.equal(packed.unpack().view(torch.int32), expected.view(torch.int32))
    assert packed.nbytes == WarpCSR.plan(mask, torch.float32, index_bits=bits).nbytes
    assert not (packed.row_ptr % 8).any()
    # Padding is at most 7 a row where the groups are as full as can be, which they always are with 16 bits.
    if bits == 16:
        assert torch.equal(packed.row_ptr.diff(), (mask.sum(1) + 7) // 8 * 8)


def test_lanes_of_a_step_hold_neighbouring_weights() -> None:
    weight = torch.arange(1.0, 601.0).view(1, 600)
    for bits in (8, 16):
        packed = WarpCSR.pack(weight, weight > 0, index_bits=bits)
        columns = packed.columns()
        for chunk, lanes in ((columns[:256], 32), (columns[256:512], 32), (columns[512:], 11)):
            assert torch.equal(chunk.view(lanes, 8).t().flatten(), torch.arange(8 * lanes) + int(chunk[0]))


@pytest.mark.parametrize(
    ("columns", "stored"),
    [
        ([*range(8), 255], 16),  # 2 lanes, and the last group alone reaches from 8 on
        ([0, 255, *range(300, 314)], 16),  # a group as far as a base reaches
        ([0, 256, *range(300, 314)], 120),  # and one further: the first group is 1 long, the second takes the rest
        ([0, 1, 2, *range(202, 3002, 200)], 32),  # the fullest group decides: 0, 1, 2, 202
    ],
)
def test_groups_reach_255_columns_and_the_fullest_decides_the_lanes(columns: list[int], stored: int) -> None:
    mask = torch.zeros(1, 4000, dtype=torch.bool)
    mask[0, columns] = True
    packed = WarpCSR.pack(torch.ones(mask.shape), mask, index_bits=8)
    packed.check()
    assert torch.equal(packed.unpack(), mask.float())
    assert packed.values.numel() == stored


@pytest.mark.parametrize(
    ("dtype", "density", "bits", "wanted"),
    [
        (torch.bfloat16, 0.5, 8, 24.5 * 0.5),
        (torch.bfloat16, 0.3, 8, 24.5 * 0.3),
        (torch.bfloat16, 0.1, 16, 32 * 0.1),
        (torch.float32, 0.3, 8, 40.5 * 0.3),
    ],
)
def test_bits_per_weight_are_those_of_the_table(dtype: torch.dtype, density: float, bits: int, wanted: float) -> None:
    mask = random_mask(256, 11008, density)
    found = 8 * WarpCSR.plan(mask, dtype, index_bits=bits).nbytes / mask.numel()
    assert wanted < found < 1.03 * wanted
    # Left to itself it takes 8 bits while groups reach, 16 where weights are far apart.
    packed = WarpCSR.pack(mask.to(dtype), mask)
    assert packed.index_bits == (16 if density < 0.2 else 8)
    assert packed.nbytes == WarpCSR.plan(mask, dtype).nbytes


MASK = random_mask(4, 700, 0.4)
CORRUPTIONS: list[tuple[int, str, Callable[[WarpCSR], WarpCSR]]] = [
    (16, "col_idx must be int16 or uint8 [stored", lambda c: replace(c, col_idx=c.col_idx.int())),
    (
        16,
        "base must be int16 [0, 8], got int16 [1, 8]",
        lambda c: replace(c, base=torch.zeros(1, 8, dtype=torch.int16)),
    ),
    (8, "base must be int16 [stored // 256 + out_features + 1 = ", lambda c: replace(c, base=c.base[:-1])),
    (16, "row_ptr must run from 0 to the number of values", lambda c: replace(c, row_ptr=written(c.row_ptr, -1, 8))),
    (16, "row_ptr must hold multiples of 8, got 9 at row 1", lambda c: replace(c, row_ptr=written(c.row_ptr, 1, 9))),
    (16, "col_idx must lie in [0, 700), got 65535 at entry 0", lambda c: replace(c, col_idx=written(c.col_idx, 0, -1))),
    (8, "col_idx must lie in [0, 700), got ", lambda c: replace(c, base=written(c.base, (0, 7), 699))),
    (
        16,
        "col_idx must not repeat in a row, but does in row 0",
        lambda c: replace(c, col_idx=written(c.col_idx, 1, int(c.col_idx[0]))),
    ),
    (16, "nnz must be ", lambda c: replace(c, kept=1)),
    (16, "in_features must be at most 65536, got 70000", lambda c: replace(c, in_features=70_000)),
]


@pytest.mark.parametrize(("bits", "said", "spoil"), CORRUPTIONS, ids=[said for _, said, _ in CORRUPTIONS])
def test_check_names_what_was_corrupted(bits: int, said: str, spoil: Callable[[WarpCSR], WarpCSR]) -> None:
    packed = WarpCSR.pack(torch.ones(MASK.shape), MASK, index_bits=bits)
    packed.check()
    with pytest.raises(FormatError) as caught:
        spoil(packed).check()
    assert said in str(caught.value)


def test_what_it_cannot_hold_is_refused() -> None:
    wide = torch.zeros(1, 65537)
    with pytest.raises(FormatError, match=r"reaches 65536 columns, got in_features=65537; use lower\(csr32\)"):
        WarpCSR.pack(wide, wide == 0)
    with pytest.raises(FormatError, match="index_bits 8 or 16, got 32"):
        WarpCSR.plan(wide[:, :8] == 0, torch.float32, index_bits=32)
