"""Single rows of packed matrices: as `unpack` has them, bit for bit, whatever the layout and however values are stored."""

from __future__ import annotations

import pytest
import torch
from format_cases import LAYOUTS, bits, weights_and_masks
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparsec.errors import KernelError
from sparsec.formats import Packed
from sparsec.formats.layout import Layout
from sparsec.kernels.embedding import embedding_args, embedding_operator

POSITIONS = ("dense", "bitmap", "nm2:4", "nm4:8", "bsr16x16", "bsr8x4", "csr8", "csr16", "csr32")
CODECS = ("int8", "int8g32", "int4g64", "int4mg32")
WITHOUT_GAPS = ("dense", "bitmap", "csr16")
"""Those that have a place for nothing but what is kept, so that values with a middle can always be had."""

every_layout = pytest.mark.parametrize("name", LAYOUTS)
every_position = pytest.mark.parametrize("positions", POSITIONS)


def ids_of(data: st.DataObject, rows: int) -> Tensor:
    """Any number of row numbers, the same one several times among them."""
    return torch.tensor(data.draw(st.lists(st.integers(0, rows - 1), max_size=20)) if rows else [], dtype=torch.int64)


@st.composite
def quantised(draw: st.DrawFn, positions: str) -> Packed:
    """Sizes that fill no panel, no lane and no group; rows that keep nothing; gaps that 8 bits do not reach."""
    values = draw(st.sampled_from(CODECS if positions in WITHOUT_GAPS else CODECS[:-1]))
    layout = Layout.parse(f"{positions}:{values}")
    down, across = layout.pattern.block or (1, (layout.pattern.nm or (1, 1))[1])
    out_features, in_features = draw(st.integers(1, 50)), draw(st.sampled_from([1, 7, 32, 65, 130, 600]))
    shape = -(-out_features // down) * down, -(-in_features // across) * across
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    weight = torch.randn(shape, generator=generator).to(draw(st.sampled_from(layout.kind.dtypes)))
    mask = torch.rand(shape, generator=generator) < draw(st.sampled_from([0.0, 0.01, 0.5, 1.0]))
    if layout.pattern.nm is not None:
        groups = mask.view(shape[0], -1, across)
        mask = (groups & (groups.cumsum(2) <= layout.pattern.nm[0])).view(shape)
    mask[draw(st.integers(0, shape[0] - 1))] = False
    return layout.pack(weight, mask)


def assert_rows(packed: Packed, ids: Tensor) -> None:
    found = packed.rows(ids)
    assert found.dtype == packed.dtype
    assert torch.equal(bits(found), bits(packed.unpack()[ids]))


@every_layout
@settings(max_examples=25)
@given(st.data())
def test_rows_are_those_of_the_whole_matrix_bit_for_bit(name: str, data: st.DataObject) -> None:
    packed = LAYOUTS[name].pack(*data.draw(weights_and_masks(LAYOUTS[name])))
    assert_rows(packed, ids_of(data, packed.shape[0]))


@every_position
@settings(max_examples=30)
@given(st.data())
def test_rows_of_quantised_values_are_those_of_the_whole_matrix(positions: str, data: st.DataObject) -> None:
    packed = data.draw(quantised(positions))
    assert_rows(packed, ids_of(data, packed.shape[0]))


@every_position
@settings(max_examples=10)
@given(st.data())
def test_the_operator_takes_ids_of_any_shape(positions: str, data: st.DataObject) -> None:
    packed = data.draw(quantised(positions))
    shape = data.draw(st.lists(st.integers(0, 4), max_size=3))
    ids = torch.randint(packed.shape[0], shape).to(data.draw(st.sampled_from([torch.int32, torch.int64])))
    look_up, args = embedding_operator(packed), embedding_args(packed)
    expected = packed.unpack()[ids.long()]
    assert torch.equal(look_up(ids, *args), expected)
    assert (
        look_up(ids.to("meta"), *(a.to("meta") if isinstance(a, Tensor) else a for a in args)).shape == expected.shape
    )


@pytest.mark.parametrize("layout", ["dense:int8", "dense:int4g64", "bitmap:int4mg64", "bitmap", "csr16"])
def test_an_id_that_no_row_has_is_refused_as_torch_does(layout: str) -> None:
    packed = Layout.parse(layout).pack(torch.randn(20, 64), torch.ones(20, 64, dtype=torch.bool))
    look_up, args = embedding_operator(packed), embedding_args(packed)
    for bad in (-1, 20, 31, 2**40):  # 20 to 31 are rows of the last panel that do not exist
        with pytest.raises(IndexError):
            torch.nn.functional.embedding(torch.tensor([0, bad]), packed.unpack())
        with pytest.raises(IndexError, match=rf"ids must lie from 0 to 19, the last row, got {bad}"):
            look_up(torch.tensor([0, bad]), *args)
    with pytest.raises(KernelError, match=r"ids must be int32 or int64, got torch\.float32"):
        look_up(torch.tensor([1.0]), *args)
    with pytest.raises(KernelError, match="on one device, got meta and cpu"):
        look_up(torch.empty(2, dtype=torch.int64, device="meta"), *args)


def test_a_table_has_no_gradient_and_one_that_is_asked_for_is_refused() -> None:
    packed = Layout.parse("bitmap").pack(torch.randn(20, 64), torch.rand(20, 64) < 0.5)
    values, *rest = embedding_args(packed)
    ids = torch.tensor([3, 3, 1])
    assert isinstance(values, Tensor)
    assert not embedding_operator(packed)(ids, values, *rest).requires_grad
    with pytest.raises(KernelError, match="packed values are constants and have no gradient"):
        embedding_operator(packed)(ids, values.clone().requires_grad_(), *rest)


@pytest.mark.parametrize("layout", ["dense:int4g64", "bitmap:int8", "csr8"])
def test_look_ups_are_compiled_exported_and_mapped(layout: str) -> None:
    packed = Layout.parse(layout).pack(torch.randn(20, 64), torch.rand(20, 64) < 0.5)
    look_up, args = embedding_operator(packed), embedding_args(packed)

    def three(ids: Tensor) -> Tensor:
        return 3 * look_up(ids, *args)

    ids = torch.randint(20, (4, 5))
    expected = 3 * packed.unpack()[ids]
    assert torch.equal(torch.compile(three, backend="aot_eager", fullgraph=True)(ids), expected)
    assert torch.equal(torch.vmap(three)(ids), expected)
    assert torch.equal(torch.vmap(three, in_dims=1)(ids), expected.transpose(0, 1))
    torch.library.opcheck(look_up, (ids, *args))
