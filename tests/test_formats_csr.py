"""CSR gives back every kept bit, counts its bytes honestly, and `check` refuses what is not a matrix."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sparsec.errors import FormatError
from sparsec.formats import CSR, FORMATS

BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float64: torch.int64}
SPECIAL = [0.0, -0.0, float("inf"), float("-inf"), float("nan"), 1e-45, -1e-40, 6e-8, 1.0, 65504.0]


def bits(t: Tensor) -> Tensor:
    return t.contiguous().view(BITS[t.dtype])


@st.composite
def weights_and_masks(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Any bit pattern, special values more often; masks empty, full, one row, one column, checkerboard, random."""
    out_features, in_features = draw(st.integers(0, 9)), draw(st.integers(0, 40))
    dtype = draw(st.sampled_from(list(BITS)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    width = BITS[dtype]
    info = torch.iinfo(width)
    raw = torch.randint(info.min, info.max, (out_features, in_features), generator=generator, dtype=width).view(dtype)
    special = torch.tensor(SPECIAL).to(dtype)
    chosen = special[torch.randint(len(SPECIAL), raw.shape, generator=generator)]
    weight = torch.where(torch.rand(raw.shape, generator=generator) < 0.5, chosen, raw)
    rows, cols = torch.arange(out_features)[:, None], torch.arange(in_features)[None, :]
    masks = {
        "empty": torch.zeros(raw.shape, dtype=torch.bool),
        "full": torch.ones(raw.shape, dtype=torch.bool),
        "one row": (rows == 0).expand(raw.shape),
        "one column": (cols == in_features - 1).expand(raw.shape),
        "checkerboard": (rows + cols) % 2 == 0,
        "random": torch.rand(raw.shape, generator=generator) < draw(st.floats(0, 1)),
    }
    return weight, masks[draw(st.sampled_from(list(masks)))]


@given(weights_and_masks(), st.sampled_from([None, 16, 32]))
def test_unpack_gives_back_every_kept_bit(pair: tuple[Tensor, Tensor], index_bits: int | None) -> None:
    weight, mask = pair
    packed = CSR.pack(weight, mask, index_bits=index_bits)
    packed.check()
    expected = torch.where(mask, weight, torch.zeros((), dtype=weight.dtype))
    assert torch.equal(bits(packed.unpack()), bits(expected))
    assert packed.nnz == int(mask.sum())
    assert packed.shape == tuple(weight.shape)
    assert packed.describe() == f"csr{index_bits or 16}"
    held = packed.values.nbytes + packed.col_idx.nbytes + packed.row_ptr.nbytes
    assert (
        packed.nbytes == held == packed.nnz * (weight.element_size() + (index_bits or 16) // 8) + 4 * (len(weight) + 1)
    )


@given(weights_and_masks())
def test_parts_make_the_same_matrix_again(pair: tuple[Tensor, Tensor]) -> None:
    packed = CSR.pack(*pair)
    for twin in (
        CSR.from_parts(packed.tensors(), packed.scalars()),
        copy.deepcopy(packed),
        pickle.loads(pickle.dumps(packed)),
    ):
        assert twin.shape == packed.shape
        assert torch.equal(bits(twin.unpack()), bits(packed.unpack()))


def test_a_transposed_weight_and_mask_pack_as_they_read() -> None:
    weight, mask = torch.randn(6, 4).t(), (torch.rand(6, 4) < 0.5).t()
    assert torch.equal(CSR.pack(weight, mask).unpack(), torch.where(mask, weight, 0.0))


@pytest.mark.parametrize(("in_features", "index_bits"), [(65536, 16), (65537, 32)])
def test_the_smallest_index_that_fits_is_taken(in_features: int, index_bits: int) -> None:
    weight = torch.zeros(2, in_features)
    mask = torch.zeros(2, in_features, dtype=torch.bool)
    weight[1, -1], mask[1, -1] = 5.0, True
    weight[0, 32768], mask[0, 32768] = 7.0, True  # the sign bit of a 16-bit column
    packed = CSR.pack(weight, mask)
    packed.check()
    assert packed.index_bits == index_bits
    assert torch.equal(packed.unpack(), weight)


def test_a_kept_zero_is_counted() -> None:
    packed = CSR.pack(torch.zeros(3, 4), torch.ones(3, 4, dtype=torch.bool))
    assert (packed.nnz, packed.sparsity, packed.flops_per_token) == (12, 0.0, 24)


def test_bytes_follow_the_bits_per_weight() -> None:
    mask = torch.rand(1024, 2048) < 0.5
    for dtype, index_bits, expected in ((torch.float32, 16, 1.33), (torch.float32, 32, 1.0), (torch.bfloat16, 16, 1.0)):
        weight = torch.ones(mask.shape, dtype=dtype)
        packed = CSR.pack(weight, mask, index_bits=index_bits)
        assert weight.nbytes / packed.nbytes == pytest.approx(expected, rel=0.02)


def small() -> CSR:
    """Rows of 2, 0 and 3 entries out of 5 columns."""
    mask = torch.tensor([[1, 0, 1, 0, 0], [0, 0, 0, 0, 0], [1, 1, 0, 0, 1]], dtype=torch.bool)
    return CSR.pack(torch.arange(15.0).view(3, 5), mask)


CORRUPTIONS = {
    "float16 or float64 [stored = 5], got float32 [1, 5]": lambda c: replace(c, values=c.values[None]),
    "values must be float32, bfloat16, float16 or float64 [stored = 5], got int32 [5]": lambda c: replace(
        c, values=c.values.int()
    ),
    "col_idx must be uint8, int16 or int32 [stored = 5], got int64 [5]": lambda c: replace(c, col_idx=c.col_idx.long()),
    "col_idx must be uint8, int16 or int32 [stored = 5], got int16 [4]": lambda c: replace(c, col_idx=c.col_idx[:-1]),
    "col_idx must be int32 [stored = 5], got int16 [5]": lambda c: replace(c, in_features=70000),
    "col_idx must lie in [0, 5), got 65535": lambda c: replace(c, col_idx=-(c.col_idx > 3).short() + c.col_idx * 0),
    "col_idx must lie in [0, 4), got 4": lambda c: replace(c, in_features=4),
    "col_idx must ascend strictly within a row, but does not in row 2": lambda c: replace(
        c, col_idx=torch.tensor([0, 2, 1, 1, 4], dtype=torch.int16)
    ),
    "row_ptr must be int32 [out_features + 1 = 4], got int64 [4]": lambda c: replace(c, row_ptr=c.row_ptr.long()),
    "row_ptr must be int32 [out_features + 1 = 4], got int32 [3]": lambda c: replace(c, row_ptr=c.row_ptr[[0, 1, 3]]),
    "row_ptr must run from 0 to the number of values = 5, got 0 to 4": lambda c: replace(
        c, row_ptr=c.row_ptr.clamp(max=4)
    ),
    "row_ptr must run from 0 to the number of values = 5, got 1": lambda c: replace(c, row_ptr=c.row_ptr.clamp(min=1)),
    "row_ptr must not fall, but does after row 1": lambda c: replace(c, row_ptr=c.row_ptr[[0, 3, 1, 3]]),
    "must be on one device": lambda c: replace(c, values=c.values.to("meta")),
    "must not be negative": lambda c: replace(c, in_features=-1),
}


@pytest.mark.parametrize("message", CORRUPTIONS)
def test_check_names_the_corrupted_field(message: str) -> None:
    small().check()
    with pytest.raises(FormatError) as caught:
        CORRUPTIONS[message](small()).check()
    assert message in str(caught.value)


REFUSALS = {
    "packs a matrix [out, in], got a weight of shape [3]": lambda: CSR.pack(torch.ones(3), torch.ones(3).bool()),
    "got torch.int8": lambda: CSR.pack(torch.ones(3, 4, dtype=torch.int8), torch.ones(3, 4).bool()),
    "got torch.bool [4, 3]": lambda: CSR.pack(torch.ones(3, 4), torch.ones(4, 3).bool()),
    "got torch.float32 [3, 4]": lambda: CSR.pack(torch.ones(3, 4), torch.ones(3, 4)),
    "got meta and cpu": lambda: CSR.pack(torch.ones(3, 4), torch.ones(3, 4, device="meta").bool()),
    "index_bits 8, 16 or 32, got 4": lambda: CSR.pack(torch.ones(3, 4), torch.ones(3, 4).bool(), index_bits=4),
    "use csr32": lambda: CSR.pack(torch.ones(1, 65537), torch.ones(1, 65537).bool(), index_bits=16),
}


@pytest.mark.parametrize("message", REFUSALS)
def test_pack_refuses_what_it_cannot_hold(message: str) -> None:
    with pytest.raises(FormatError) as caught:
        REFUSALS[message]()
    assert message in str(caught.value)


def test_every_format_stands_in_the_table_under_its_name() -> None:
    assert {name: kind.format for name, kind in FORMATS.items()} == {name: name for name in FORMATS}
