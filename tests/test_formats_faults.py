"""Bitmap, BSR and N:M: `check` names what was corrupted, `pack` what it cannot hold. (CSR: test_formats_csr.py.)"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sparsec.errors import FormatError
from sparsec.formats import BSR, CSR, NM, Bitmap, Packed
from sparsec.formats.panels import from_panels

WEIGHT = torch.arange(1.0, 24 * 8 + 1).view(24, 8)


def mask_of(*rows: list[int]) -> Tensor:
    """24 x 8, these rows over and over."""
    return torch.tensor(rows, dtype=torch.bool).repeat(24 // len(rows), 1)


def written(tensor: Tensor, place: Any, value: int | float) -> Tensor:
    """A copy with one value overwritten."""
    tensor = tensor.clone()
    tensor[place] = value
    return tensor


MATRICES: dict[type[Packed], Packed] = {
    CSR: CSR.pack(torch.arange(1.0, 601.0).view(2, 300), torch.arange(600).view(2, 300) % 299 == 0, index_bits=8),
    Bitmap: Bitmap.pack(WEIGHT, mask_of([1, 0, 0, 1, 0, 0, 0, 1], [0] * 8)),
    BSR: BSR.pack(WEIGHT, mask_of([1, 0, 0, 0, 0, 0, 1, 1]), block=(8, 2)),
    NM: NM.pack(WEIGHT, mask_of([1, 0, 0, 1, 1, 1, 0, 0], [1, 0, 0, 1, 0, 1, 0, 0])),
}

Spoil = Callable[[Any], Packed]
CORRUPTIONS: list[tuple[type[Packed], str, Spoil]] = [
    # row 0 keeps columns 0 and 299, row 1 column 298: bridged by 255 twice
    (CSR, "nnz must be 3 to 5 for these values, got 6", lambda c: replace(c, kept=6)),
    (CSR, "nnz must be 3 to 5 for these values, got 2", lambda c: replace(c, kept=2)),
    (CSR, "col_idx must lie in [0, 299), got 299 at entry 2", lambda c: replace(c, in_features=299)),
    (
        CSR,
        "ascend strictly within a row, but does not in row 0",
        lambda c: replace(c, col_idx=written(c.col_idx, 1, 0)),
    ),
    (CSR, "col_idx must be int32 [stored = 5], got uint8 [5]", lambda c: replace(c, in_features=2**16 + 1)),
    (Bitmap, "values must be float32, bfloat16 or float16 [nnz + 16", lambda b: replace(b, values=b.values.double())),
    (Bitmap, "values must be", lambda b: replace(b, values=b.values[:15])),
    (Bitmap, "values must end in 16 zeros", lambda b: replace(b, values=written(b.values, -1, 1))),
    (Bitmap, "bits must be int16 [panels = 2, steps = 8]", lambda b: replace(b, bits=b.bits[:1])),
    (
        Bitmap,
        "bits must keep the 24 weights that panel_ptr gives panel 0, got 16",
        lambda b: replace(b, bits=written(b.bits, (0, 0), 0)),
    ),
    (
        Bitmap,
        "bits must be clear past the last row, 23, but are not in the last panel",
        lambda b: replace(b, bits=written(b.bits, (1, 0), b.bits[1, 0] * 256)),
    ),
    (
        Bitmap,
        "panel_ptr must be int32 [panels + 1 = 3], got int64 [3]",
        lambda b: replace(b, panel_ptr=b.panel_ptr.long()),
    ),
    (
        Bitmap,
        "panel_ptr must run from 0 to nnz = 36, got 1 to 36",
        lambda b: replace(b, panel_ptr=written(b.panel_ptr, 0, 1)),
    ),
    (Bitmap, "panel_ptr must run from 0 to nnz = 35, got 0 to 36", lambda b: replace(b, values=b.values[:-1])),
    (
        Bitmap,
        "panel_ptr must not fall, but does after panel 1",
        lambda b: replace(b, panel_ptr=written(b.panel_ptr, 1, 40)),
    ),
    (Bitmap, "must be on one device, got meta, cpu, cpu", lambda b: replace(b, values=b.values.to("meta"))),
    (Bitmap, "must not be negative, got -1 and 8", lambda b: replace(b, out_features=-1)),
    (Bitmap, "[panels = 3, steps = 8]", lambda b: replace(b, out_features=33)),
    (BSR, "values must be float32, bfloat16 or float16 [blocks", lambda b: replace(b, values=b.values.int())),
    (BSR, "values must be", lambda b: replace(b, values=b.values[0])),
    (BSR, "r, a multiple of 8 = 8", lambda b: replace(b, values=b.values[:, :, :4])),
    (BSR, "c is a divisor of in_features = 9", lambda b: replace(b, in_features=9)),
    (BSR, "col_idx must be int16 or int32 [blocks = 6], got int16 [5]", lambda b: replace(b, col_idx=b.col_idx[:-1])),
    (BSR, "col_idx must lie in [0, 4), got 65535 at block 1", lambda b: replace(b, col_idx=written(b.col_idx, 1, -1))),
    (
        BSR,
        "ascend strictly within a row of blocks, but does not in row 0",
        lambda b: replace(b, col_idx=written(b.col_idx, 1, 0)),
    ),
    (
        BSR,
        "row_ptr must be int32 [out_features / r + 1 = 4], got int64 [4]",
        lambda b: replace(b, row_ptr=b.row_ptr.long()),
    ),
    (
        BSR,
        "row_ptr must run from 0 to the number of blocks = 6, got 0 to 4",
        lambda b: replace(b, row_ptr=b.row_ptr[:-1]),
    ),
    (
        BSR,
        "row_ptr must not fall, but does after row of blocks 1",
        lambda b: replace(b, row_ptr=written(b.row_ptr, 1, 5)),
    ),
    (BSR, "nnz must be 72 to 96 for these values, got 71", lambda b: replace(b, kept=71)),
    (BSR, "nnz must be 72 to 96 for these values, got 97", lambda b: replace(b, kept=97)),
    (NM, "values must be float32, bfloat16 or float16 [panels = 2", lambda n: replace(n, values=n.values.int())),
    (NM, "values must be", lambda n: replace(n, values=n.values[0])),
    (NM, "[panels = 2, steps = 4, 16, slots = 1]", lambda n: replace(n, values=n.values.repeat(1, 2, 1, 1))),
    (NM, "n must be from 1 to m - 1 = 3, got 4", lambda n: replace(n, n=4)),
    (NM, "n must be from 1 to m - 1 = 3, got 0", lambda n: replace(n, n=0)),
    (NM, "values must be zero past the last row, 23", lambda n: replace(n, values=written(n.values, (1, 0, 15, 0), 1))),
    (NM, "index must be uint8 [bytes of all slots + 4 = 36], got uint8 [35]", lambda n: replace(n, index=n.index[:-1])),
    (
        NM,
        "index must ascend within a group, but does not in row 0, group 0",
        lambda n: replace(n, index=written(n.index, 0, 3)),
    ),
    (NM, "index must end in 4 zeros, got [0, 0, 0, 1]", lambda n: replace(n, index=written(n.index, -1, 1))),
    (NM, "m must be 4 or 8, got 2", lambda n: replace(n, m=2)),
    (NM, "in_features must be divisible by m = 4, got 9", lambda n: replace(n, in_features=9)),
    (NM, "nnz must be 84 to 96 for these values, got 83", lambda n: replace(n, kept=83)),
    (NM, "nnz must be 84 to 96 for these values, got 97", lambda n: replace(n, kept=97)),
]


@pytest.mark.parametrize(("kind", "message", "spoil"), CORRUPTIONS, ids=[f"{k.format}: {m}" for k, m, _ in CORRUPTIONS])
def test_check_names_the_corrupted_field(kind: type[Packed], message: str, spoil: Spoil) -> None:
    MATRICES[kind].check()
    with pytest.raises(FormatError) as caught:
        spoil(MATRICES[kind]).check()
    assert message in str(caught.value)
    assert str(caught.value).startswith(kind.title)
    assert str(caught.value).endswith("; pack the matrix again from its dense weight")


FULL = torch.ones(24, 8, dtype=torch.bool)
REFUSALS: list[tuple[type[Packed], str, Tensor, dict[str, Any]]] = [
    (
        CSR,
        "csr8 reaches 65536 columns, got in_features=65537; use",
        torch.ones(1, 65537).bool(),
        {"index_bits": 8},
    ),
    (BSR, "block=(rows, columns), two positive integers such as (16, 16), got 16", FULL, {"block": 16}),
    (BSR, "two positive integers such as (16, 16), got (16, 0)", FULL, {"block": (16, 0)}),
    (BSR, "two positive integers such as (16, 16), got (16, 16, 16)", FULL, {"block": (16, 16, 16)}),
    (BSR, "BSR needs blocks of 8, 16, 24, ... rows (they fill registers), got 4x4", FULL, {"block": (4, 4)}),
    (BSR, "bsr16x16 needs out_features divisible by 16, got 24; take a block", FULL, {}),
    (BSR, "bsr8x3 needs in_features divisible by 3, got 8; take a block", FULL, {"block": (8, 3)}),
    (NM, "N:M needs in_features divisible by 4 or 8, got 6", torch.zeros(24, 6).bool(), {}),
    (NM, "at most 7 of 8 columns of a row, but row 0 keeps all 8 of group 0 (columns 0 to 7); prune", FULL, {}),
    (
        NM,
        "at most 3 of 4 columns of a row, but row 7 keeps all 4 of group 2 (columns 8 to 11)",
        torch.zeros(24, 12).index_put((torch.tensor(7), torch.arange(8, 12)), torch.tensor(1.0)).bool(),
        {},
    ),
]


@pytest.mark.parametrize(
    ("kind", "message", "mask", "options"), REFUSALS, ids=[f"{r[0].format}: {r[1]}" for r in REFUSALS]
)
def test_what_a_format_cannot_hold_is_refused_by_pack_and_plan(
    kind: type[Packed], message: str, mask: Tensor, options: dict[str, Any]
) -> None:
    for refused in (
        lambda: kind.pack(torch.ones(mask.shape), mask, **options),  # type: ignore[attr-defined]
        lambda: kind.plan(mask, torch.float32, **options),  # type: ignore[attr-defined]
    ):
        with pytest.raises(FormatError) as caught:
            refused()
        assert message in str(caught.value)


def test_an_unstructured_mask_is_no_n_of_m_mask() -> None:
    mask = torch.rand(256, 1024, generator=torch.Generator().manual_seed(0)) < 0.5
    with pytest.raises(FormatError, match=r"keeps all 8 of group .*; prune with an N:M pattern such as 2:4"):
        NM.pack(torch.ones(mask.shape), mask)


@pytest.mark.parametrize(
    ("row", "described"),
    [
        ([0, 0, 0, 0, 0, 0, 0, 0], "nm1:8"),
        ([1, 0, 0, 0, 0, 0, 0, 1], "nm1:4"),
        ([1, 1, 0, 0, 0, 0, 1, 1], "nm2:4"),
        ([1, 1, 0, 0, 0, 0, 0, 0], "nm2:8"),  # 2:4 holds it too, in twice the bytes
        ([1, 1, 1, 1, 0, 0, 0, 0], "nm4:8"),
        ([1, 1, 1, 0, 0, 0, 1, 0], "nm4:8"),
        ([1, 1, 1, 0, 1, 1, 1, 0], "nm3:4"),
        ([1, 1, 1, 1, 1, 1, 1, 0], "nm7:8"),
    ],
)
def test_n_and_m_are_those_of_the_fewest_bytes(row: list[int], described: str) -> None:
    mask = mask_of(row, [0] * 8)
    packed = NM.pack(WEIGHT, mask)
    packed.check()
    assert packed.describe() == described
    assert torch.equal(packed.unpack(), torch.where(mask, WEIGHT, 0))


def test_slots_without_a_weight_point_to_dropped_columns() -> None:
    """A kernel may add a slot's product without asking whether it is one: each column is pointed to once, by its weight."""
    mask = torch.rand(20, 32, generator=torch.Generator().manual_seed(0)) < 0.2
    packed = NM.pack(torch.ones(20, 32), mask)
    columns = packed.columns()[:20]
    values = from_panels(packed.values, 20, 32 // packed.m * packed.n).view(columns.shape)
    assert (columns.diff(dim=2) > 0).all()
    kept = mask.view(20, -1, packed.m).gather(2, columns)
    assert torch.equal(kept, values != 0)


def test_distances_of_8_bits_are_bridged_where_they_do_not_reach() -> None:
    mask = torch.zeros(3, 2000, dtype=torch.bool)
    mask[0, [0, 255, 511, 1022, 1999]] = True  # distances 0, 255, 256, 511, 977
    mask[2, [256]] = True
    weight = torch.where(mask, 5.0, 7.0)
    packed = CSR.pack(weight, mask, index_bits=8)
    packed.check()
    assert packed.col_idx.tolist() == [0, 255, 255, 1, 255, 255, 1, 255, 255, 255, 212, 255, 1]
    assert packed.row_ptr.tolist() == [0, 11, 11, 13]
    assert packed.nnz == 6
    assert (packed.values == 0).sum() == 7
    assert torch.equal(packed.unpack(), torch.where(mask, weight, 0))


@given(width=st.integers(1, 3000), density=st.floats(0, 0.02), seed=st.integers(0, 1000))
def test_rows_with_long_gaps_come_back_and_their_bytes_are_foretold(width: int, density: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(4, width, generator=generator) < density
    weight = torch.randn(4, width, generator=generator)
    packed = CSR.pack(weight, mask, index_bits=8)
    packed.check()
    assert torch.equal(packed.unpack(), torch.where(mask, weight, 0))
    assert packed.nnz == int(mask.sum())
    assert packed.nbytes == CSR.plan(mask, torch.float32, index_bits=8).nbytes


@pytest.mark.parametrize(("out_features", "panels"), [(0, 0), (1, 1), (16, 1), (17, 2), (32, 2)])
def test_no_panel_more_than_needed_is_stored(out_features: int, panels: int) -> None:
    mask = (torch.arange(8) % 2 == 0).expand(out_features, 8)
    weight = torch.ones(out_features, 8)
    assert Bitmap.pack(weight, mask).bits.shape == (panels, 8)
    assert NM.pack(weight, mask).values.shape[0] == panels


def test_a_block_is_stored_whole_if_it_keeps_any_weight() -> None:
    mask = torch.zeros(16, 8, dtype=torch.bool)
    mask[9, 5] = True
    packed = BSR.pack(torch.ones(16, 8), mask, block=(8, 4))
    assert packed.values.shape == (1, 4, 8, 1)
    assert packed.values.sum() == packed.values[0, 1, 1, 0] == 1
    assert (packed.nnz, packed.flops_per_token, packed.col_idx.tolist()) == (1, 64, [1])


def test_a_bitmap_lies_as_the_kernels_read_it() -> None:
    mask = torch.zeros(18, 3, dtype=torch.bool)
    mask[[0, 15, 17, 2], [1, 1, 0, 0]] = True
    weight = torch.arange(54.0).view(18, 3)
    packed = Bitmap.pack(weight, mask)
    assert packed.bits.tolist() == [[4, -32767, 0], [2, 0, 0]]
    assert packed.values[: packed.nnz].tolist() == [6, 1, 46, 51]
    assert packed.panel_ptr.tolist() == [0, 3, 4]
