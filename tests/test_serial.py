"""What passes ask of masks and weights in one thread is what torch's own operations give, bit for bit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sparsec import serial
from sparsec.formats.panels import WORDS, pack_bits, unpack_bits

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SPECIAL = (0.0, -0.0, float("nan"), float("inf"), -float("inf"), 1e-45, 6e-8, -1.0)


@st.composite
def cases(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """A matrix with numbers of every kind, and a mask; each may be a transposed view or a part of something larger."""
    rows, columns, seed = draw(st.integers(0, 9)), draw(st.integers(0, 9)), draw(st.integers(0, 999))
    generator = torch.Generator().manual_seed(seed)
    special = torch.tensor(SPECIAL, dtype=torch.float64)
    numbers = special[torch.randint(len(SPECIAL), (rows, 2 * columns), generator=generator)].to(
        draw(st.sampled_from(DTYPES))
    )
    mask = torch.rand(rows, 2 * columns, generator=generator) < 0.5
    part = slice(None, None, 2) if draw(st.booleans()) else slice(columns)
    numbers, mask = numbers[:, part], mask[:, part]
    return (numbers.t(), mask.t()) if draw(st.booleans()) else (numbers, mask)


def words(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])


@given(cases())
def test_masks_are_applied_compared_and_counted_as_torch_does(case: tuple[Tensor, Tensor]) -> None:
    numbers, mask = case
    right = torch.where(mask, numbers, torch.zeros((), dtype=numbers.dtype))
    assert torch.equal(words(serial.masked(numbers, mask)), words(right))
    assert torch.equal(serial.present(numbers), numbers != 0)
    assert torch.equal(serial.present(numbers, mask), (numbers != 0) | mask)
    assert serial.count(mask) == int(mask.count_nonzero())
    assert torch.equal(words(serial.contiguous(numbers)), words(numbers))
    assert serial.contiguous(numbers).is_contiguous()
    into = numbers.clone()
    assert serial.masked(into, mask, out=into) is into
    assert torch.equal(words(into), words(right))


@given(st.integers(0, 5), st.integers(0, 5), st.sampled_from([1, 2, 4]))
def test_bits_are_packed_as_on_other_devices(rows: int, columns: int, lane: int) -> None:
    flags = torch.rand(rows, columns, 16, lane) < 0.5
    words = (flags.flatten(2) * (1 << torch.arange(16 * lane))).sum(-1).to(WORDS[lane])
    assert torch.equal(pack_bits(flags), words)
    assert torch.equal(unpack_bits(pack_bits(flags)), flags)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn], ids=str)
def test_numbers_of_other_types_are_compared_by_torch(dtype: torch.dtype) -> None:
    assert serial.present(torch.tensor([0.0, 1.0, -2.0]).to(dtype)).tolist() == [False, True, True]
