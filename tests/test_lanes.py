"""The order of values in panels and blocks: a lane is 32 bits, one column in fp32, two in bf16 and fp16."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparsec.errors import FormatError
from sparsec.formats import BSR, NM, Bitmap
from sparsec.formats.layout import for_device
from sparsec.formats.panels import from_panels, pack_bits, set_bits, stray_bits, to_panels
from sparsec.kernels import SparseLinear


def test_in_16_bit_types_a_lane_holds_two_columns() -> None:
    """Two columns of a row side by side: rows 0 to 15 of columns 0 and 1 are a step, bits 2l and 2l + 1 are of row l."""
    mask = torch.zeros(18, 3, dtype=torch.bool)
    mask[[0, 15, 17, 2, 2], [1, 1, 0, 0, 2]] = True
    weight = torch.arange(54.0).view(18, 3).bfloat16()
    packed = Bitmap.pack(weight, mask)
    assert packed.bits.tolist() == [[1 << 1 | 1 << 4 | -(1 << 31), 1 << 4], [1 << 2, 0]]
    assert packed.values[: packed.nnz].tolist() == [1, 6, 46, 8, 51]
    slots = NM.pack(torch.arange(64.0).view(16, 4).bfloat16(), torch.tensor([False, True, False, True]).expand(16, 4))
    assert slots.values.shape == (1, 1, 16, 2)
    assert slots.values[0, 0, 3].tolist() == [13, 15]
    block = BSR.pack(torch.arange(32.0).view(8, 4).bfloat16(), torch.ones(8, 4, dtype=torch.bool), block=(8, 4))
    assert block.values.shape == (1, 2, 8, 2)
    assert block.values[0, 1, 3].tolist() == [14, 15]
    assert BSR.pack(torch.ones(8, 3).half(), torch.ones(8, 3, dtype=torch.bool), block=(8, 3)).values.shape == (
        1,
        3,
        8,
        1,
    )


def test_values_in_another_order_are_refused() -> None:
    """As a pickle of an earlier version has them."""
    packed = Bitmap.pack(torch.ones(16, 4).bfloat16(), torch.ones(16, 4, dtype=torch.bool))
    old = Bitmap.__new__(Bitmap)
    with pytest.raises(
        FormatError, match="pickled with values in order 1, they are read in order 2; lower the pruned model again"
    ):
        old.__setstate__({k: v for k, v in packed.__getstate__().items() if k != "order"})
    bits = torch.full((1, 4), -1, dtype=torch.int16)
    with pytest.raises(FormatError, match=r"bits must be int32 \[panels = 1, steps = 2\], got int16 \[1, 4\]"):
        replace(packed, bits=bits).check()
    module = SparseLinear(packed)
    state = module.__getstate__()
    del state["order"]
    with pytest.raises(FormatError, match="in order 1"):
        SparseLinear.__new__(SparseLinear).__setstate__(state)


@given(st.data(), st.sampled_from([Bitmap, NM, BSR]), st.sampled_from([torch.float16, torch.bfloat16]))
def test_a_matrix_that_is_converted_is_the_one_that_is_packed_in_the_other_dtype(
    data: st.DataObject, kind: type[Any], half: torch.dtype
) -> None:
    out, columns = (
        8 * data.draw(st.integers(1, 5)),
        data.draw(st.integers(1, 5)) * (8 if kind is NM else 2 if kind is BSR else 3),
    )
    options: dict[str, Any] = {"nm": (3, 4)} if kind is NM else {}
    if kind is BSR:
        options = {"block": (8, data.draw(st.sampled_from([1, 2])))}
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    mask = torch.rand(out, columns, generator=generator) < 0.5
    if kind is NM:
        mask[:, ::4] = False
    weight = torch.randn(out, columns, generator=generator)
    wide, narrow = kind.pack(weight, mask, **options), kind.pack(weight.to(half), mask, **options)
    for start, end in ((wide, narrow), (narrow, kind.pack(weight.to(half).float(), mask, **options))):
        found = replace(start, values=start.values.to(end.dtype)).ordered()
        found.check()
        assert all(torch.equal(t, end.tensors()[name]) for name, t in found.tensors().items())
        module, wanted = SparseLinear(start), SparseLinear(end)
        module.to(end.dtype)
        assert all(torch.equal(t, end.tensors()[name]) for name, t in module.packed.tensors().items())
        wanted.load_state_dict(SparseLinear(start).state_dict())
        assert all(torch.equal(t, end.tensors()[name]) for name, t in wanted.packed.tensors().items())


@given(st.data(), st.sampled_from([torch.float32, torch.bfloat16]))
def test_blocks_are_laid_out_for_a_gpu_and_back(data: st.DataObject, dtype: torch.dtype) -> None:
    """A lane holds one column there; both orders are the same matrix, and both are multiplied right."""
    c = data.draw(st.sampled_from([1, 2, 3, 4]))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    mask = torch.rand(8 * data.draw(st.integers(1, 4)), c * data.draw(st.integers(1, 4)), generator=generator) < 0.5
    weight = torch.randn(mask.shape, generator=generator).to(dtype)
    here = BSR.pack(weight, mask, block=(8, c))
    there = for_device(here, "cuda")
    there.check()
    assert there.values.shape[-1] == 1
    assert torch.equal(there.unpack(), here.unpack())
    assert all(torch.equal(t, here.tensors()[name]) for name, t in for_device(there, "cpu").tensors().items())
    x = torch.randn(3, mask.shape[1], generator=generator).to(dtype)
    assert torch.equal(SparseLinear(there)(x), SparseLinear(here)(x))
    module = SparseLinear(here)
    module.load_state_dict(SparseLinear(there).state_dict())
    assert torch.equal(module.packed.values, here.values)


@given(st.integers(1, 40), st.integers(1, 9), st.sampled_from([1, 2, 4]), st.integers(0, 99))
def test_bits_are_counted_and_strays_found_as_in_flags(out: int, columns: int, lane: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    flags = to_panels(torch.ones(out, columns, dtype=torch.bool), lane)
    flags &= torch.rand(flags.shape, generator=generator) < 0.5
    bits = pack_bits(flags)
    assert torch.equal(set_bits(bits), flags.sum((1, 2, 3)))
    assert stray_bits(bits, out, columns) == (False, False)
    whole = torch.ones_like(flags)
    past_rows = from_panels(whole, len(whole) * 16, columns)[out:].any()
    past_columns = from_panels(whole, out, whole.shape[1] * lane)[:, columns:].any()
    assert stray_bits(pack_bits(whole), out, columns) == (bool(past_rows), bool(past_columns))
