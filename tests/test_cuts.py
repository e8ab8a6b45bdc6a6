"""Parts of packed matrices: rows and columns as `unpack` has them, bit for bit, valid, and as `pack` would have made them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from format_cases import LAYOUTS, bits, weights_and_masks
from hypothesis import given, settings
from hypothesis import strategies as st
from test_rows import POSITIONS, quantised
from torch import Tensor

from sparsec.errors import FormatError
from sparsec.formats import Packed
from sparsec.formats.layout import Layout

every_layout = pytest.mark.parametrize("name", LAYOUTS)
every_position = pytest.mark.parametrize("positions", POSITIONS)
by_rows_and_columns = pytest.mark.parametrize("dim", [0, 1], ids=["rows", "columns"])


def places(data: st.DataObject, packed: Packed, dim: int) -> tuple[int, int]:
    """Two at which it can be cut, equal ones and both ends among them."""
    step, size = packed.cut_steps[dim], packed.shape[dim]
    legal = st.one_of(st.just(size), st.integers(0, size // step).map(lambda n: n * step))
    first, end = sorted((data.draw(legal), data.draw(legal)))
    return first, end


def cut(packed: Packed, dim: int, first: int, end: int) -> Packed:
    return packed.cut_columns(first, end) if dim else packed.cut_rows(first, end)


def assert_cut(packed: Packed, dim: int, first: int, end: int) -> Packed:
    part = cut(packed, dim, first, end)
    part.check()
    assert type(part) is type(packed)
    assert part.describe() == packed.describe()
    assert part.dtype == packed.dtype
    whole = packed.unpack()
    assert torch.equal(bits(part.unpack()), bits(whole[:, first:end] if dim else whole[first:end]))
    exact = packed.exact()
    assert torch.equal(part.exact(), exact[:, first:end] if dim else exact[first:end]) or exact.isnan().any()
    assert part.nnz <= packed.nnz
    return part


@by_rows_and_columns
@every_layout
@given(st.data())
def test_a_part_is_that_of_the_whole_matrix_bit_for_bit(name: str, dim: int, data: st.DataObject) -> None:
    weight, mask = data.draw(weights_and_masks(LAYOUTS[name]))
    packed = LAYOUTS[name].pack(weight, mask)
    first, end = places(data, packed, dim)
    part = assert_cut(packed, dim, first, end)
    rows, columns = (slice(None), slice(first, end)) if dim else (slice(first, end), slice(None))
    # What is not told from what fills up is a zero.
    zeros = bits(weight[rows, columns])[mask[rows, columns]] == 0
    kept = int(mask[rows, columns].sum())
    assert kept - int(zeros.sum()) <= part.nnz <= kept


@by_rows_and_columns
@every_layout
@settings(max_examples=20)
@given(st.data())
def test_a_part_is_what_its_own_dense_weight_would_be_packed_to(name: str, dim: int, data: st.DataObject) -> None:
    """Without zeros among the kept weights, every tensor is the same."""
    weight, mask = data.draw(weights_and_masks(LAYOUTS[name]))
    weight = torch.where(weight == 0, torch.ones((), dtype=weight.dtype), weight)
    packed = LAYOUTS[name].pack(weight, mask)
    first, end = places(data, packed, dim)
    rows, columns = (slice(None), slice(first, end)) if dim else (slice(first, end), slice(None))
    part = cut(packed, dim, first, end)
    again = LAYOUTS[name].pack(weight[rows, columns], mask[rows, columns].clone(memory_format=torch.contiguous_format))
    assert part.scalars() == again.scalars()
    for tensor, wanted in zip(part.tensors().values(), again.tensors().values(), strict=True):
        assert tensor.dtype == wanted.dtype
        assert torch.equal(whole(tensor), whole(wanted))


@by_rows_and_columns
@settings(max_examples=30)
@given(st.data())
def test_gaps_that_8_bits_do_not_reach_are_bridged_anew(dim: int, data: st.DataObject) -> None:
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    weight = torch.randn(5, 1500, generator=generator)
    mask = torch.rand(5, 1500, generator=generator) < 0.003
    weight[mask] = torch.where(torch.rand(int(mask.sum()), generator=generator) < 0.2, -0.0, weight[mask])
    for layout in map(Layout.parse, ("csr8", "csr8:int8")):
        packed = layout.pack(weight, mask)
        first, end = places(data, packed, dim)
        part = assert_cut(packed, dim, first, end)
        rows, columns = (slice(None), slice(first, end)) if dim else (slice(first, end), slice(None))
        if not layout.values:
            assert part.nnz == int(mask[rows, columns].sum())
        if dim:
            wanted = layout.pack(weight[:, first:end], mask[:, first:end].contiguous()).tensors()["col_idx"]
            assert layout.values or torch.equal(part.tensors()["col_idx"], wanted)


def whole(tensor: Tensor) -> Tensor:
    return bits(tensor) if tensor.is_floating_point() else tensor


@by_rows_and_columns
@every_position
@settings(max_examples=40)
@given(st.data())
def test_a_part_of_quantised_values_is_that_of_the_whole_matrix(positions: str, dim: int, data: st.DataObject) -> None:
    packed: Any = data.draw(quantised(positions))
    part: Any = assert_cut(packed, dim, *places(data, packed, dim))
    assert part.codec == packed.codec
    assert torch.equal(part.table, packed.table)


@by_rows_and_columns
@pytest.mark.parametrize("name", [*LAYOUTS, *(f"{p}:int4g64" for p in POSITIONS if "x4" not in p), "dense:int8"])
def test_parts_make_up_the_whole(name: str, dim: int) -> None:
    layout = Layout.parse(name)
    down, across = layout.pattern.block or (1, (layout.pattern.nm or (1, 1))[1])
    shape = (4 * down * 16, across * 64 * 20)
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    mask = layout.sample_mask(shape, layout.pattern.sparsity or 0.6, torch.Generator().manual_seed(1))
    packed = layout.pack(weight, mask)
    size = shape[dim]
    parts = [cut(packed, dim, at, at + size // 4) for at in range(0, size, size // 4)]
    assert torch.equal(torch.cat([p.unpack() for p in parts], dim), packed.unpack())
    assert sum(p.nnz for p in parts) == packed.nnz
    assert sum(p.nbytes for p in parts) < 1.25 * packed.nbytes


@pytest.mark.parametrize(
    ("name", "dim", "first", "end", "message"),
    [
        ("bsr16x16", 1, 0, 24, r"bsr16x16 \[48x192\]: columns can be cut at multiples of 16 alone, got 24"),
        ("bsr16x16", 0, 8, 24, r"rows can be cut at multiples of 16 alone, got 8 and 24"),
        ("nm2:4", 1, 2, 192, r"nm2:4 .*columns can be cut at multiples of 4 alone, got 2"),
        ("dense:int4g64", 1, 32, 64, r"dense:int4g64 .*columns can be cut at multiples of 64 alone, got 32"),
        ("bitmap", 0, 3, 49, r"rows must be cut at two of 0 to 48, ascending, got 3 and 49"),
        ("csr8", 1, 7, 3, r"columns must be cut at two of 0 to 192, ascending, got 7 and 3"),
    ],
)
def test_a_cut_that_a_layout_cannot_have_is_refused(name: str, dim: int, first: int, end: int, message: str) -> None:
    layout = Layout.parse(name)
    mask = layout.sample_mask((48, 192), layout.pattern.sparsity or 0.5, torch.Generator().manual_seed(0))
    packed = layout.pack(torch.randn(48, 192), mask)
    with pytest.raises(FormatError, match=message):
        cut(packed, dim, first, end)
