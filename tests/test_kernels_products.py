"""The product of every format against fp64, on every instruction set, type and shape."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import pytest
import torch
from format_cases import LAYOUTS, some
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sparsec.formats import Packed
from sparsec.kernels import force_isa, operator, operator_args, status, tolerance
from sparsec.kernels.library.loader import library
from sparsec.kernels.reference import reference_linear

NATIVE = ("amx", "avx512_bf16", "vbmi2", "avx512", "avx2", "portable")
HALF = (torch.bfloat16, torch.float16)
# Rows of x on both sides of every switch: 1; CSR's lanes 4, 8, 16, 32; 33 and more go through panels, 6 or more tiles of them;
# one, two, three or five matrix tiles of 16 rows.
TOKENS = (0, 1, 2, 3, 5, 8, 9, 17, 33, 70)
# The last two are split over threads; 7, 31, 100, 333 leave tails after every vector width.
SHAPES = ((1, 1), (5, 7), (3, 31), (40, 100), (200, 333), (300, 400))

every_layout = pytest.mark.parametrize("name", LAYOUTS)
half_types = pytest.mark.parametrize("dtype", HALF, ids=str)


@pytest.fixture(params=[*NATIVE, "reference"])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every instruction set that this CPU and library have; the reference too, called directly."""
    if request.param != "reference":
        if not status().built:
            pytest.skip(f"no native kernels: {status().reason}")
        if request.param not in library().usable:
            pytest.skip(
                f"this CPU has no {request.param}; those of avx512 and above are run through SIMDe by test_native_build.py"
            )
        force_isa(request.param)
    yield request.param
    if status().built:
        force_isa(None)


def product(isa: str, x: Tensor, packed: Packed, bias: Tensor | None) -> Tensor:
    if isa == "reference":
        return reference_linear(x, packed, bias)
    out = operator(packed)(x, *operator_args(packed, bias))
    assert isinstance(out, Tensor)
    return out


def assert_right(
    isa: str, x: Tensor, tokens: Iterable[int], packed: Packed, kept: Tensor, bias: Tensor | None = None
) -> None:
    """The product with the first rows of x, so many as `tokens` says; `kept` is the dense matrix that was packed."""
    exact = x.double() @ kept.double().t() + (0 if bias is None else bias.double())
    allowed = tolerance(x, kept, bias)
    for count in tokens:
        out = product(isa, x[:count], packed, bias)
        assert out.dtype == x.dtype
        assert out.shape == (count, len(kept))
        assert out.is_contiguous()
        wrong = (out.double() - exact[:count]).abs() > allowed[:count]
        assert not wrong.any(), f"{packed.describe()} {list(kept.shape)}, {count} rows: {wrong.nonzero()[:5].tolist()}"


@every_layout
def test_product_is_right_for_every_shape_and_type(isa: str, name: str) -> None:
    layout = LAYOUTS[name]
    torch.manual_seed(0)
    for i, dtype in enumerate(layout.kind.dtypes):
        for j, shape in enumerate(dict.fromkeys(layout.fit(*shape) for shape in SHAPES)):
            # Every type and every shape meets both: few weights and a bias, many and none.
            density, bias = (0.5, None) if (i + j) % 2 else (0.2, torch.randn(shape[0]).to(dtype))
            packed, kept = some(layout, *shape, density, dtype)
            assert_right(isa, torch.randn(max(TOKENS), shape[1]).to(dtype), TOKENS, packed, kept, bias)


@half_types
@every_layout
def test_many_rows_are_right_through_the_dense_product_of_the_half_type(
    isa: str, name: str, dtype: torch.dtype
) -> None:
    if isa == "reference":
        pytest.skip("the reference has no such choice")
    library().force_half_product(True)
    try:
        # More rows than are expanded at a time.
        packed, kept = some(LAYOUTS[name], 300, 90, 0.4, dtype)
        for bias in (None, torch.randn(len(kept)).to(dtype)):
            assert_right(isa, torch.randn(130, kept.shape[1]).to(dtype), [40, 130], packed, kept, bias)
    finally:
        library().force_half_product(None)


@every_layout
def test_product_is_right_for_every_number_of_threads(isa: str, name: str) -> None:
    layout, before = LAYOUTS[name], torch.get_num_threads()
    shape = layout.fit(500, 600)
    # All non-zeros in few rows, then empty rows: an equal split of rows would leave threads without work.
    weight = torch.randn(shape)
    mask = torch.zeros(shape, dtype=torch.bool)
    mask[[0, 3, 250, 251, 252]] = True
    mask[100:140] = torch.rand(40, shape[1]) < 0.9
    mask = layout.legal(mask)
    x, bias = torch.randn(64, shape[1]), torch.randn(shape[0])
    try:
        for dtype in (torch.float32, torch.bfloat16):
            packed, kept = layout.pack(weight.to(dtype), mask), torch.where(mask, weight, 0).to(dtype)
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                assert_right(isa, x.to(dtype), (1, 3, 20, 64), packed, kept, bias.to(dtype))
    finally:
        torch.set_num_threads(before)


@given(
    name=st.sampled_from(list(LAYOUTS)),
    out_features=st.integers(0, 40),
    in_features=st.integers(0, 80),
    tokens=st.integers(0, 40),
    density=st.floats(0, 1),
    half=st.sampled_from([None, *HALF]),
    seed=st.integers(0, 1000),
)
def test_any_matrix_is_multiplied_right(
    name: str, out_features: int, in_features: int, tokens: int, density: float, half: torch.dtype | None, seed: int
) -> None:
    dtype = half or torch.float32
    packed, kept = some(LAYOUTS[name], out_features, in_features, density, dtype, seed)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, kept.shape[1], generator=generator).to(dtype)
    bias = torch.randn(len(kept), generator=generator).to(dtype) if seed % 2 else None
    for isa in ("native", "reference"):
        assert_right(isa, x, [tokens], packed, kept, bias)


@every_layout
def test_full_and_empty_matrices_are_multiplied_right(isa: str, name: str) -> None:
    layout = LAYOUTS[name]
    shape = layout.fit(50, 70)
    weight, bias = torch.randn(shape), torch.randn(shape[0])
    for full in (True, False):
        mask = layout.legal(torch.full(shape, full))
        x = torch.randn(40, shape[1])
        assert_right(isa, x, (1, 4, 40), layout.pack(weight, mask), torch.where(mask, weight, 0), bias)


@pytest.mark.parametrize("name", ["csr8", "csr16", "csr32", "bsr16x1"])
def test_a_column_beyond_32767_is_read_unsigned(isa: str, name: str) -> None:
    layout = LAYOUTS[name]
    weight = torch.randn(layout.fit(3, 65536))
    mask = torch.zeros(weight.shape, dtype=torch.bool)
    mask[:, -40:] = True
    assert_right(isa, torch.randn(40, 65536), (1, 2, 40), layout.pack(weight, mask), torch.where(mask, weight, 0))


@pytest.mark.parametrize("dtype", LAYOUTS["csr8"].kind.dtypes, ids=str)
def test_gaps_that_8_bits_do_not_reach_are_bridged(isa: str, dtype: torch.dtype) -> None:
    weight = torch.randn(40, 3000).to(dtype)
    mask = torch.rand(weight.shape) < 0.002
    packed = LAYOUTS["csr8"].pack(weight, mask)
    assert packed.values.numel() > packed.nnz
    assert_right(
        isa,
        torch.randn(40, 3000).to(dtype),
        (1, 2, 5, 40),
        packed,
        torch.where(mask, weight, 0),
        torch.randn(40).to(dtype),
    )


@every_layout
def test_x_of_any_strides_and_dimensions_is_taken(isa: str, name: str) -> None:
    packed, dense = some(LAYOUTS[name], 6, 10, 0.5, torch.float32)
    columns = dense.shape[1]
    for x in (
        torch.randn(columns),
        torch.randn(columns, 4).t(),
        torch.randn(2, 3, 2 * columns)[..., ::2],
        torch.randn(1, 1, columns).expand(2, 40, columns),
        torch.randn(2, 0, columns),
        torch.randn(2, 7, columns)[:, -1:],
    ):
        torch.testing.assert_close(product(isa, x, packed, None), x @ dense.t(), rtol=1e-4, atol=1e-5)


@every_layout
def test_nan_in_the_weight_stays_in_its_row(isa: str, name: str) -> None:
    layout = LAYOUTS[name]
    shape = layout.fit(20, 40)
    weight, mask = torch.randn(shape), layout.legal(torch.ones(shape, dtype=torch.bool))
    column = int(mask[2].nonzero()[-1])
    weight[2, column] = float("nan")
    packed = layout.pack(weight, mask)
    for tokens in (1, 3, 33):
        out = product(isa, torch.randn(tokens, shape[1]), packed, None)
        assert out.isnan().any(0).nonzero().flatten().tolist() == [2]


@half_types
@every_layout
def test_half_values_are_converted_exactly(isa: str, name: str, dtype: torch.dtype) -> None:
    """Every one of the 65536 bit patterns times 1 comes back: subnormals, infinities and rounding included."""
    layout = LAYOUTS[name]
    shape = layout.fit(65536, 1)
    values = torch.arange(shape[0]).to(torch.int16).view(dtype).view(-1, 1)
    weight, mask = values.expand(shape), torch.zeros(shape, dtype=torch.bool)
    mask[:, 0] = True
    packed = layout.pack(weight, mask)
    if isa != "reference":
        library().force_half_product(False)  # torch's own may take subnormal numbers for 0
    try:
        for tokens in (1, 2, 33):
            out = product(isa, torch.ones(tokens, shape[1], dtype=dtype), packed, None)
            expected = values.t().expand(tokens, -1)
            if isa in ("amx", "avx512_bf16") and dtype == torch.bfloat16:  # and so do tiles and products of pairs
                small = expected.abs() < torch.finfo(dtype).tiny
                assert ((out == expected) | (out == 0))[small].all()
                out = out.where(~small, expected)
            assert torch.equal(out.isnan(), expected.isnan())
            assert torch.equal(out.nan_to_num(), expected.nan_to_num())
    finally:
        if isa != "reference":
            library().force_half_product(None)


@pytest.mark.parametrize("isa", ["amx", "avx512_bf16"], indirect=True)
@every_layout
def test_tiles_are_right_beyond_what_goes_through_them_at_once(isa: str, name: str) -> None:
    """More than 32 tiles of tokens, more than two runs of columns, more than one group of panels; and few of each."""
    generator = torch.Generator().manual_seed(2)
    for out_features, in_features, tokens in ((272, 1100, 530), (40, 1100, 16), (272, 40, 530)):
        packed, kept = some(LAYOUTS[name], out_features, in_features, 0.4, torch.bfloat16)
        x = torch.randn(tokens, kept.shape[1], generator=generator).bfloat16()
        assert_right(isa, x, [tokens], packed, kept, torch.randn(len(kept), generator=generator).bfloat16())


@pytest.mark.parametrize("isa", ["amx"], indirect=True)
def test_tiles_and_the_dense_product_of_torch_take_turns(isa: str) -> None:
    """Both set up the tile registers of the threads that they share."""
    packed, kept = some(LAYOUTS["bitmap"], 272, 300, 0.5, torch.bfloat16)
    x = torch.randn(100, 300, generator=torch.Generator().manual_seed(3)).bfloat16()
    dense = torch.nn.functional.linear(x, kept)
    for _ in range(3):
        assert_right(isa, x, (100, 9), packed, kept)
        assert torch.equal(torch.nn.functional.linear(x, kept), dense)


@half_types
@every_layout
def test_sums_are_rounded_to_the_half_type_as_torch_rounds(isa: str, name: str, dtype: torch.dtype) -> None:
    layout, generator = LAYOUTS[name], torch.Generator().manual_seed(1)
    rows, columns = layout.fit(20000, 2)
    a = torch.randn(rows, generator=generator) * 10.0 ** torch.randint(-6, 5, (rows,), generator=generator)
    weight = torch.zeros(rows, columns, dtype=dtype)
    mask = torch.zeros(rows, columns, dtype=torch.bool)
    weight[:, 0], mask[:, 0] = a.to(dtype), True
    second = None if (layout.pattern.nm or (0, 0))[0] == 1 or columns == 1 else columns - 1
    bias = torch.zeros(rows, dtype=dtype)
    if second is None:
        bias = torch.randn(rows, generator=generator).to(dtype)
    else:
        weight[:, second], mask[:, second] = torch.randn(rows, generator=generator).to(dtype), True
    out = product(isa, torch.ones(1, columns, dtype=dtype), layout.pack(weight, mask), bias)
    assert torch.equal(out[0], (weight.float().sum(1) + bias.float()).to(dtype))


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_matrix_without_columns_gives_the_bias(name: str) -> None:
    """Regression: bitmap and N:M left the result's memory as it was."""
    weight = torch.zeros(192, 0)
    packed = LAYOUTS[name].pack(weight, weight.bool())
    if packed.format == "wcsr":  # for GPUs
        return
    for rows in (1, 2, 33):
        assert torch.equal(product("native", torch.zeros(rows, 0), packed, torch.ones(192)), torch.ones(rows, 192))
