"""Products of quantised values in integers: right within what digits promise, and the same on every instruction set."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sparsec.errors import FormatError
from sparsec.formats.base import Packed
from sparsec.formats.layout import Layout
from sparsec.formats.parts import Part, flatten
from sparsec.formats.quantised import Quantised
from sparsec.kernels import force_isa, operator, operator_args, status
from sparsec.kernels.fused import fused_linear
from sparsec.kernels.library.loader import library
from sparsec.kernels.reference import DIGIT_MOST, product_tolerance, tolerance
from sparsec.kernels.registry import Problem, select
from sparsec.lowering.rounding import digits_said

NATIVE = ("amx", "avx512_bf16", "vbmi2", "avx512", "avx2", "portable")
POSITIONS = ("dense", "bitmap", "nm2:4", "nm4:8", "bsr16x16", "bsr32x4", "bsr8x8", "bsr8x1", "bsr24x8")
WIDENED = ("csr8", "csr16", "csr32")
"""Without digits: a group of columns keeps too few of them."""
CODECS = ("int8", "int8g64", "int8g96", "int4g32", "int4g64", "int4mg64", "int4mg128")
TOKENS = (1, 2, 3, 5, 8, 9, 21)


def layouts_of(*positions: str) -> st.SearchStrategy[str]:
    return st.builds("{}:{}".format, st.sampled_from(positions), st.sampled_from(CODECS)).filter(
        # The first needs lanes of four columns, the second a 0 for the zeros that bridge gaps.
        lambda text: not text.startswith(("bsr8x1:int4", "csr8:int4m"))
    )


dtypes = st.sampled_from((torch.float32, torch.bfloat16, torch.float16))


@pytest.fixture(autouse=True)
def native() -> Iterator[None]:
    if not status().built:
        pytest.skip(f"no native kernels: {status().reason}")
    yield
    force_isa(None)


def usable() -> list[str]:
    return [name for name in NATIVE if name in library().usable]


def fitting(text: str, rows: int, columns: int) -> tuple[int, int]:
    """The next sizes that are whole blocks."""
    down, across = Layout.parse(text).pattern.block or (1, 1)
    return -(-rows // down) * down, -(-columns // across) * across


def packed_of(text: str, shape: tuple[int, int], dtype: torch.dtype, density: float = 0.5, **more: int) -> Quantised:
    layout, generator = Layout.parse(text), torch.Generator().manual_seed(shape[0] * 7919 + shape[1])
    weight = torch.randn(shape, generator=generator).to(dtype)
    packed = layout.pack(weight, layout.sample_mask(shape, 1 - density, generator), **more)
    assert isinstance(packed, Quantised)
    return packed


def product(x: Tensor, packed: Packed, bias: Tensor | None = None) -> Tensor:
    out = operator(packed)(x, *operator_args(packed, bias))
    assert isinstance(out, Tensor)
    return out


@given(
    layouts_of(*POSITIONS, *WIDENED),
    st.integers(1, 70),
    st.integers(1, 60),
    dtypes,
    st.sampled_from((1, 2, 3)),
    st.floats(0.0, 1.0),
    st.data(),
)
def test_products_are_right_on_every_instruction_set(
    text: str, rows: int, fours: int, dtype: torch.dtype, digits: int, density: float, data: st.DataObject
) -> None:
    free = not text.startswith("nm")
    rows, columns = fitting(text, rows, data.draw(st.integers(1, 300)) if free else 8 * fours)
    packed = packed_of(text, (rows, columns), dtype, density if free else 0.5, digits=digits)
    x = torch.randn(max(TOKENS), columns, generator=torch.Generator().manual_seed(3))
    x[:, :: data.draw(st.integers(5, 90))] *= data.draw(st.sampled_from((1.0, 30.0)))  # outliers
    x = x.to(dtype)
    bias = torch.randn(rows).to(dtype) if data.draw(st.booleans()) else None
    exact = x.double() @ packed.exact().double().t() + (0 if bias is None else bias.double())
    assert packed.by_digits != text.startswith(WIDENED)
    bound = product_tolerance(x, packed) + (
        0 if bias is None else 4 * torch.finfo(dtype).eps * (bias.double().abs() + exact.abs())
    )
    for isa in usable():
        force_isa(isa)
        assert select(Problem.of(packed)).name == f"{packed.format}_cpu"
        for count in TOKENS:
            out = product(x[:count], packed, bias)
            assert out.dtype == dtype
            assert out.shape == (count, rows)
            assert ((out.double() - exact[:count]).abs() <= bound[:count]).all(), (isa, count)


@given(layouts_of(*POSITIONS), st.integers(1, 50), st.integers(1, 40), st.sampled_from((1, 2)))
def test_every_instruction_set_gives_the_same_integers(text: str, rows: int, fours: int, digits: int) -> None:
    """Scales that are powers of two leave nothing to round."""
    rows, columns = fitting(text, rows, 8 * fours)
    packed = packed_of(text, (rows, columns), torch.float32, digits=digits)
    one = torch.ones_like(packed.scale, dtype=torch.bfloat16)
    packed = type(packed).from_parts({**packed.tensors(), "scale": one.view(torch.int16)}, packed.scalars())
    x = torch.randint(
        -DIGIT_MOST[digits],
        DIGIT_MOST[digits] + 1,
        (max(TOKENS), columns),
        generator=torch.Generator().manual_seed(5),
    )
    x[:, ::32] = DIGIT_MOST[digits]  # so that the unit of every group is 1
    exact = x @ packed.exact().long().t()
    outs = []
    for isa in usable():
        force_isa(isa)
        for count in (1, 2, 5, max(TOKENS)):
            outs.append(product(x[:count].float(), packed))
    width = len(outs) // len(usable())
    for at, out in enumerate(outs):
        assert torch.equal(out, outs[at % width]), usable()[at // width]
        assert torch.allclose(out.double(), exact[: len(out)].double(), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    "text",
    ["dense:int8", "bitmap:int8", "dense:int4g64", "bitmap:int4g64", "bsr16x16:int8", "bsr8x1:int8", "csr32:int8"],
)
def test_sums_never_overflow(text: str) -> None:
    """All codes and all numbers of x at their ends, over more columns than 16 bits count."""
    columns = 65_600
    layout = Layout.parse(text)
    weight = torch.full(fitting(text, 17, columns), 1.0)
    weight[1::2] = -1.0
    x = torch.ones(9, columns)
    x[1::3] = -1.0
    x[2::3, ::2] = -1.0
    for digits in (1, 2, 3):
        packed = layout.pack(weight, torch.ones_like(weight, dtype=torch.bool), digits=digits)
        exact = x.double() @ packed.exact().double().t()
        for isa in usable():
            force_isa(isa)
            for count in (1, 9):
                error = (product(x[:count], packed).double() - exact[:count]).abs()
                assert (error <= product_tolerance(x[:count], packed)).all(), (isa, digits, count)


@pytest.mark.parametrize("text", ["dense:int8", "bitmap:int4mg64"])
def test_numbers_that_are_none_spread_and_small_ones_are_kept(text: str) -> None:
    packed = packed_of(text, (40, 200), torch.float32)
    for isa in usable():
        force_isa(isa)
        for bad in (float("inf"), float("-inf"), float("nan")):
            x = torch.randn(3, 200)
            x[1, 70] = bad
            out = product(x, packed)
            assert out[1].isnan().all(), isa
            assert out[[0, 2]].isfinite().all(), isa
        for size in (1e-36, 1e-30, 1e30):
            x = torch.randn(2, 200) * size
            exact = x.double() @ packed.exact().double().t()
            assert ((product(x, packed).double() - exact).abs() <= product_tolerance(x, packed)).all(), (isa, size)
        assert not product(torch.zeros(2, 200), packed).any()


def test_several_quantised_and_plain_matrices_share_one_call() -> None:
    x = torch.randn(5, 192)
    texts = (
        "bitmap:int8",
        "dense:int4g32",
        "nm2:4:int4mg64",
        "bitmap:int8g64",
        "bsr16x16:int8",
        "bsr8x8:int4g64",
        "csr8:int4g64",
        "csr16:int8",
    )
    matrices: list[Packed] = [
        packed_of(text, fitting(text, 30 + 9 * i, 192), torch.float32, digits=1 + i % 3) for i, text in enumerate(texts)
    ]
    plain = Layout.parse("bitmap")
    matrices.append(plain.pack(torch.randn(20, 192), torch.rand(20, 192) < 0.5))
    parts = [Part(p.format, tuple(p.tensors().values()), None, tuple(p.scalars().values())) for p in matrices]
    for isa in usable():
        force_isa(isa)
        with torch.no_grad():
            outs = fused_linear(x, *flatten(parts))
        for out, packed in zip(outs, matrices, strict=True):
            assert torch.equal(out, product(x, packed)), (isa, packed.describe())


def test_digits_must_be_known() -> None:
    packed = packed_of("bitmap:int8", (8, 64), torch.float32, digits=4)
    with pytest.raises(FormatError, match="digits must be 1, 2 or 3, got 4"):
        packed.check()


def test_a_kernel_without_digits_tells_of_none_and_keeps_to_the_bound_of_plain_values() -> None:
    x = torch.randn(3, 64)
    for text, digits in (("csr8:int8", False), ("bsr16x16:int8", True), ("bitmap:int8", True)):
        packed = packed_of(text, (32, 64), torch.float32)
        assert bool(digits_said(packed, select(Problem.of(packed)))) == digits, text
        assert torch.equal(product_tolerance(x, packed), tolerance(x, packed.exact())) != digits, text
