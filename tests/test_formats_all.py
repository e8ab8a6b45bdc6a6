"""What every format owes: each kept bit comes back, bytes are counted and foretold, and they are as few as promised."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from format_cases import INTEGERS, LAYOUTS, bits, weights_and_masks
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from sparsec.errors import FormatError
from sparsec.formats import FORMATS, NM, Packed

every_layout = pytest.mark.parametrize("name", LAYOUTS)
every_format = pytest.mark.parametrize("name", FORMATS)


def one_of(name: str) -> str:
    """A layout of a format."""
    return next(layout for layout, case in LAYOUTS.items() if case.kind.format == name)


def packed_at_random(name: str, dtype: torch.dtype = torch.float32) -> Packed:
    layout, generator = LAYOUTS[name], torch.Generator().manual_seed(0)
    shape = layout.fit(40, 70)
    weight = torch.randn(shape, generator=generator).to(dtype)
    return layout.pack(weight, layout.mask(*shape, 0.5, generator))


@every_layout
@given(st.data())
def test_every_kept_bit_comes_back_and_every_byte_is_foretold(name: str, data: st.DataObject) -> None:
    weight, mask = data.draw(weights_and_masks(LAYOUTS[name]))
    packed = LAYOUTS[name].pack(weight, mask)
    packed.check()
    assert torch.equal(bits(packed.unpack()), bits(torch.where(mask, weight, torch.zeros((), dtype=weight.dtype))))
    assert packed.nnz == int(mask.sum())
    assert packed.shape == tuple(weight.shape)
    assert packed.dtype == weight.dtype
    assert packed.nbytes == sum(t.nbytes for t in packed.tensors().values())
    assert packed.nbytes == LAYOUTS[name].plan(mask, weight.dtype).nbytes
    assert all(t.is_contiguous() for t in packed.tensors().values())


@every_layout
@settings(max_examples=10)
@given(st.data())
def test_parts_make_the_same_matrix_again(name: str, data: st.DataObject) -> None:
    packed = LAYOUTS[name].pack(*data.draw(weights_and_masks(LAYOUTS[name])))
    for twin in (
        type(packed).from_parts(packed.tensors(), packed.scalars()),
        copy.deepcopy(packed),
        pickle.loads(pickle.dumps(packed)),
    ):
        assert (twin.shape, twin.nnz, twin.describe()) == (packed.shape, packed.nnz, packed.describe())
        assert torch.equal(bits(twin.unpack()), bits(packed.unpack()))


@every_layout
def test_a_layout_is_described_by_its_parameters(name: str) -> None:
    assert packed_at_random(name).describe() == name


@every_layout
def test_a_transposed_weight_and_mask_pack_as_they_read(name: str) -> None:
    layout, generator = LAYOUTS[name], torch.Generator().manual_seed(0)
    shape = layout.fit(20, 30)
    weight = torch.randn(shape, generator=generator).t().contiguous().t()
    mask = layout.mask(*shape, 0.5, generator).t().contiguous().t()
    assert not weight.is_contiguous()
    assert torch.equal(layout.pack(weight, mask).unpack(), torch.where(mask, weight, 0.0))


@every_layout
def test_a_parameter_is_packed_without_its_gradient(name: str) -> None:
    layout = LAYOUTS[name]
    weight = nn.Parameter(torch.randn(layout.fit(8, 8)))
    packed = layout.pack(weight, layout.legal(torch.ones(weight.shape, dtype=torch.bool)))
    assert not any(t.requires_grad for t in packed.tensors().values())


@every_layout
def test_packing_leaves_weight_and_mask_alone(name: str) -> None:
    layout, generator = LAYOUTS[name], torch.Generator().manual_seed(0)
    shape = layout.fit(40, 70)
    weight, mask = torch.randn(shape, generator=generator), layout.mask(*shape, 0.5, generator)
    before = weight.clone(), mask.clone()
    packed = layout.pack(weight, mask)
    for tensor in packed.tensors().values():
        tensor.zero_()
    assert torch.equal(weight, before[0])
    assert torch.equal(mask, before[1])


# Value bits b, density d: what the format was made for, 4096 x 4096.
BITS_PER_WEIGHT = {
    "csr32": lambda b, d: (b + 32) * d,
    "csr16": lambda b, d: (b + 16) * d,
    "csr8": lambda b, d: (b + 8) * d,
    "bitmap": lambda b, d: b * d + 1,
    "bsr16x16": lambda b, d: b * d,
    "bsr16x1": lambda b, d: b * d + d,  # 16 bits of column number for 16 weights
    "bsr32x32": lambda b, d: b * d,
    "nm2:4": lambda b, d: b / 2 + 1,
    "nm4:8": lambda b, d: b / 2 + 1.5,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", BITS_PER_WEIGHT)
def test_bits_per_weight_are_those_of_the_table(name: str, dtype: torch.dtype) -> None:
    layout, generator = LAYOUTS[name], torch.Generator().manual_seed(0)
    size = 4096
    for density in (0.7, 0.5, 0.3, 0.1) if layout.pattern.nm is None else (1.0,):
        if name.startswith("bsr"):
            blocks = torch.rand(size // layout.rows, size // layout.columns, generator=generator) < density
            mask = blocks.repeat_interleave(layout.rows, 0).repeat_interleave(layout.columns, 1)
        else:
            mask = layout.mask(size, size, density, generator)
        kept = float(mask.float().mean())
        promised = BITS_PER_WEIGHT[name](dtype.itemsize * 8, kept)
        assert layout.plan(mask, dtype).nbytes * 8 / mask.numel() == pytest.approx(promised, rel=0.03)


@every_layout
def test_unpack_can_be_traced(name: str) -> None:
    """It is the reference kernel: torch.export must see through it with tensors that hold no data."""

    class Unpack(nn.Module):
        def forward(self, *tensors: Tensor) -> Tensor:
            return kind.from_parts(dict(zip(kind.tensor_names, tensors, strict=True)), scalars).unpack()

    packed = packed_at_random(name)
    kind, scalars = type(packed), packed.scalars()
    tensors = tuple(packed.tensors().values())
    program = torch.export.export(Unpack(), tensors, strict=False)
    assert torch.equal(program.module()(*tensors), packed.unpack())


@every_layout
@pytest.mark.parametrize("dtype", list(INTEGERS), ids=str)
def test_a_type_of_values_is_held_or_refused_with_a_way_out(name: str, dtype: torch.dtype) -> None:
    kind = LAYOUTS[name].kind
    if dtype in kind.dtypes:
        assert packed_at_random(name, dtype).dtype == dtype
    else:
        with pytest.raises(FormatError, match=r"got torch.float64; convert the model .* or use lower\(csr\)"):
            packed_at_random(name, dtype)


REFUSALS = {
    "packs a matrix [out, in], got a weight of shape [3]": (torch.ones(3), torch.ones(3).bool()),
    "got torch.int8; convert the model with .to(dtype)": (
        torch.ones(16, 16, dtype=torch.int8),
        torch.ones(16, 16).bool(),
    ),
    "mask of the weight's shape [16, 32], True where kept, got torch.bool [32, 16]": (
        torch.ones(16, 32),
        torch.ones(32, 16).bool(),
    ),
    "True where kept, got torch.float32 [16, 16]": (torch.ones(16, 16), torch.ones(16, 16)),
    "got meta and cpu": (torch.ones(16, 16), torch.ones(16, 16, device="meta").bool()),
}


@every_format
@pytest.mark.parametrize("message", REFUSALS)
def test_what_no_format_holds_is_refused(name: str, message: str) -> None:
    with pytest.raises(FormatError) as caught:
        LAYOUTS[one_of(name)].pack(*REFUSALS[message])
    assert message in str(caught.value)
    assert str(caught.value).startswith(FORMATS[name].title)


@every_format
def test_a_plan_refuses_what_packing_refuses(name: str) -> None:
    layout = LAYOUTS[one_of(name)]
    with pytest.raises(FormatError, match=r"got torch\.int8"):
        layout.plan(torch.ones(16, 16).bool(), torch.int8)
    with pytest.raises(FormatError, match=r"needs a bool mask .* got torch\.float32 \[16, 16\]"):
        layout.plan(torch.ones(16, 16), torch.float32)


@every_format
def test_more_than_int32_numbers_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such a matrix is larger than the memory of this machine, so the limit is lowered."""
    layout = LAYOUTS[one_of(name)]
    module = __import__(layout.kind.__module__, fromlist=["MAX_COUNT"])
    if not hasattr(module, "MAX_COUNT"):
        assert not any("ptr" in n for n in layout.kind.tensor_names)
        return
    monkeypatch.setattr(module, "MAX_COUNT", 0)
    mask = torch.ones(layout.fit(8, 8), dtype=torch.bool)
    for refused in (
        lambda: layout.pack(torch.ones(mask.shape), mask),
        lambda: layout.plan(mask, torch.float32),
    ):
        with pytest.raises(FormatError, match=r"holds at most 0 .* split the matrix or leave it dense"):
            refused()


def test_every_format_stands_in_the_table_under_its_name() -> None:
    assert {name: kind.format for name, kind in FORMATS.items()} == {name: name for name in FORMATS}
    assert {layout.kind for layout in LAYOUTS.values()} == set(FORMATS.values())


@given(st.integers(65, 200), st.sampled_from([4, 8]), st.data())
def test_the_fullest_group_decides_wherever_it_lies(rows: int, m: int, data: st.DataObject) -> None:
    """N:M looks at some rows first; n is that of all."""
    mask = torch.zeros(rows, 2 * m, dtype=torch.bool)
    mask[:, ::m] = True
    row, n = data.draw(st.integers(0, rows - 1)), data.draw(st.integers(1, m - 1))
    mask[row, m : m + n] = True
    weight = torch.randn(mask.shape)
    packed = NM.pack(weight, mask)
    packed.check()
    assert torch.equal(packed.unpack(), torch.where(mask, weight, 0))
    assert packed.describe() == f"nm{NM.plan(mask, torch.float32).parameters}"
    mask[row] = True
    with pytest.raises(FormatError, match=rf"row {row} keeps all \d of group"):
        NM.pack(torch.randn(mask.shape), mask)
