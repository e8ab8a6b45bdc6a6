"""The CSR product against fp64, on every instruction set, type and shape; its gradient, shape rule and errors."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sparsec.errors import KernelError
from sparsec.formats import CSR
from sparsec.kernels import KERNELS, Problem, force_isa, operator, operator_args, select, status, tolerance
from sparsec.kernels.loader import library
from sparsec.kernels.ops import csr_linear, packed_and_bias
from sparsec.kernels.reference import reference_linear

NATIVE = ("avx512", "avx2", "portable")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Rows of x on both sides of every switch: 1; lanes 4, 8, 16, 32; from 33 on the dense product (a second group of lanes below
# 30 % density).
TOKENS = (0, 1, 2, 4, 5, 9, 17, 32, 33, 50)
# The last two are split over threads; 7, 31, 100, 333 leave tails after every vector width.
SHAPES = ((1, 1), (5, 7), (3, 31), (40, 100), (200, 333), (300, 400))


@pytest.fixture(params=[*NATIVE, "reference"])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every instruction set that this CPU and library have; the reference too, called directly."""
    if request.param != "reference":
        if not status().built:
            pytest.skip(f"no native kernels: {status().reason}")
        if request.param not in library().usable:
            pytest.skip(f"this CPU has no {request.param}; avx512 is run through SIMDe by test_native_build.py")
        force_isa(request.param)
    yield request.param
    if status().built:
        force_isa(None)


def csr_linear_reference(x: Tensor, *args: Tensor | int | None) -> Tensor:
    return reference_linear(x, *packed_and_bias("csr", args))


def product(isa: str, x: Tensor, packed: CSR, bias: Tensor | None) -> Tensor:
    args = operator_args(packed, bias)
    out = csr_linear_reference(x, *args) if isa == "reference" else csr_linear(x, *args)
    assert isinstance(out, Tensor)
    return out


def assert_right(isa: str, x: Tensor, weight: Tensor, mask: Tensor, bias: Tensor | None, index_bits: int) -> None:
    packed = CSR.pack(weight, mask, index_bits=index_bits)
    out = product(isa, x, packed, bias)
    kept = torch.where(mask, weight, 0).double()
    exact = x.double() @ kept.t() + (0 if bias is None else bias.double())
    assert out.dtype == x.dtype
    assert out.shape == exact.shape
    assert out.is_contiguous()
    assert torch.all((out.double() - exact).abs() <= tolerance(x, kept, bias))


@pytest.mark.parametrize("index_bits", [16, 32])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
def test_product_is_right_for_every_shape(isa: str, dtype: torch.dtype, index_bits: int) -> None:
    torch.manual_seed(0)
    for out_features, in_features in SHAPES:
        weight = torch.randn(out_features, in_features).to(dtype)
        bias = torch.randn(out_features).to(dtype)
        for tokens in TOKENS:
            x = torch.randn(tokens, in_features).to(dtype)
            for density, b in ((0.5, None), (0.2, bias)):
                assert_right(isa, x, weight, torch.rand(weight.shape) < density, b, index_bits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_many_rows_are_right_through_the_dense_product_of_the_half_type(isa: str, dtype: torch.dtype) -> None:
    if isa == "reference":
        pytest.skip("the reference has no such choice")
    library().force_half_product(True)
    try:
        weight = torch.randn(70, 90).to(dtype)
        mask = torch.rand(weight.shape) < 0.4
        for b in (None, torch.randn(70).to(dtype)):
            assert_right(isa, torch.randn(40, 90).to(dtype), weight, mask, b, 16)
    finally:
        library().force_half_product(None)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_product_is_right_for_every_number_of_threads(isa: str, threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        # All non-zeros in few rows, then empty rows: an equal split of rows would leave threads without work.
        weight = torch.randn(500, 600)
        mask = torch.zeros(weight.shape, dtype=torch.bool)
        mask[[0, 3, 250, 251, 252]] = True
        mask[100:140] = torch.rand(40, 600) < 0.9
        for tokens in (1, 3, 20, 64):
            assert_right(isa, torch.randn(tokens, 600), weight, mask, torch.randn(500), 16)
    finally:
        torch.set_num_threads(before)


@given(
    out_features=st.integers(0, 40),
    in_features=st.integers(0, 80),
    tokens=st.integers(0, 40),
    density=st.floats(0, 1),
    dtype=st.sampled_from(DTYPES),
    index_bits=st.sampled_from([16, 32]),
    seed=st.integers(0, 1000),
)
def test_any_matrix_is_multiplied_right(
    out_features: int, in_features: int, tokens: int, density: float, dtype: torch.dtype, index_bits: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out_features, in_features, generator=generator).to(dtype)
    mask = torch.rand(weight.shape, generator=generator) < density
    x = torch.randn(tokens, in_features, generator=generator).to(dtype)
    bias = torch.randn(out_features, generator=generator).to(dtype) if seed % 2 else None
    for isa in ("native", "reference"):
        assert_right(isa, x, weight, mask, bias, index_bits)


def test_a_column_beyond_32767_is_read_unsigned(isa: str) -> None:
    weight = torch.randn(3, 65536)
    mask = torch.zeros(weight.shape, dtype=torch.bool)
    mask[:, -40:] = True
    for tokens in (1, 2, 40):
        assert_right(isa, torch.randn(tokens, 65536), weight, mask, None, 16)


def test_x_of_any_strides_and_dimensions_is_taken(isa: str) -> None:
    packed = CSR.pack(torch.randn(6, 10), torch.rand(6, 10) < 0.5)
    dense = packed.unpack()
    for x in (
        torch.randn(10),
        torch.randn(10, 4).t(),
        torch.randn(2, 3, 20)[..., ::2],
        torch.randn(1, 1, 10).expand(2, 40, 10),
        torch.randn(2, 0, 10),
        torch.randn(2, 7, 10)[:, -1:],
    ):
        torch.testing.assert_close(product(isa, x, packed, None), x @ dense.t())


def test_nan_in_the_weight_stays_in_its_row(isa: str) -> None:
    weight = torch.randn(4, 40)
    weight[2, 17] = float("nan")
    packed = CSR.pack(weight, torch.ones(4, 40, dtype=torch.bool))
    for tokens in (1, 3, 33):
        out = product(isa, torch.randn(tokens, 40), packed, None)
        assert out.isnan().any(0).tolist() == [False, False, True, False]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_values_are_converted_exactly(isa: str, dtype: torch.dtype) -> None:
    """Every one of the 65536 bit patterns times 1 comes back: subnormals, infinities and rounding included."""
    values = torch.arange(-32768, 32768).to(torch.int16).view(dtype).view(-1, 1)
    packed = CSR.pack(values, torch.ones(values.shape, dtype=torch.bool))
    for tokens in (1, 2, 33):
        out = product(isa, torch.ones(tokens, 1, dtype=dtype), packed, None)
        expected = values.t().expand(tokens, -1)
        assert torch.equal(out.isnan(), expected.isnan())
        assert torch.equal(out.nan_to_num(), expected.nan_to_num())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sums_are_rounded_to_the_half_type_as_torch_rounds(isa: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    a = (
        torch.randn(20000, 1, generator=generator)
        .mul(10.0 ** torch.randint(-6, 5, (20000, 1), generator=generator))
        .to(dtype)
    )
    b = torch.randn(20000, 1, generator=generator).to(dtype)
    packed = CSR.pack(torch.cat([a, b], 1), torch.ones(20000, 2, dtype=torch.bool))
    out = product(isa, torch.ones(1, 2, dtype=dtype), packed, None)
    assert torch.equal(out[0], (a.float() + b.float()).to(dtype)[:, 0])


CALLS = {
    "x must be [..., in_features=10]": {"x": torch.ones(2, 9)},
    "x must have the dtype of the weights": {"x": torch.ones(2, 10).double()},
    "values must be float32": {"values": torch.ones(3, dtype=torch.int32), "x": torch.ones(2, 10, dtype=torch.int32)},
    "col_idx must be": {"col_idx": torch.zeros(3, dtype=torch.int64)},
    "col_idx must be uint8": {"col_idx": torch.zeros(2, dtype=torch.int16)},
    "bias must be": {"bias": torch.ones(5)},
}


@pytest.mark.parametrize("message", CALLS)
def test_arguments_that_do_not_fit_are_refused(isa: str, message: str) -> None:
    args = {
        "x": torch.ones(2, 10),
        "values": torch.ones(3),
        "col_idx": torch.tensor([0, 1, 2], dtype=torch.int16),
        "row_ptr": torch.tensor([0, 1, 1, 2, 3], dtype=torch.int32),
        "bias": None,
        "in_features": 10,
        "nnz": 3,
    }
    function = csr_linear_reference if isa == "reference" else csr_linear
    assert function(*args.values()).shape == (2, 4)
    with pytest.raises(RuntimeError) as caught:
        function(*(args | CALLS[message]).values())
    assert message in str(caught.value).replace("got bias", "bias")


@pytest.mark.parametrize("tokens", [0, 1, 3])
def test_gradients_of_x_and_bias_are_right(tokens: int) -> None:
    packed = CSR.pack(torch.randn(5, 7, dtype=torch.float64), torch.rand(5, 7) < 0.5)
    x = torch.randn(tokens, 7, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, b: csr_linear(x, *operator_args(packed, b)), (x, bias))
    assert torch.autograd.gradgradcheck(lambda x: csr_linear(x, *operator_args(packed, None)), (x,))


def test_values_that_ask_for_a_gradient_are_refused() -> None:
    packed = CSR.pack(torch.randn(5, 7), torch.rand(5, 7) < 0.5)
    args = operator_args(packed, None)
    with pytest.raises(KernelError, match="constants"):
        csr_linear(torch.ones(7), args[0].clone().requires_grad_(), *args[1:])


@pytest.mark.parametrize("bias", [False, True])
def test_schema_shape_rule_and_gradient_pass_torchs_own_check(bias: bool) -> None:
    packed = CSR.pack(torch.randn(5, 7), torch.rand(5, 7) < 0.5)
    b = torch.randn(5, requires_grad=True) if bias else None
    torch.library.opcheck(operator(packed), (torch.randn(2, 3, 7, requires_grad=True), *operator_args(packed, b)))


def test_selection_takes_the_native_kernel_first() -> None:
    expected = "csr_cpu" if status().built else "csr_reference"
    assert select(Problem("csr", 8, 8)).name == expected
    assert select(Problem("csr", 8, 8, device="cuda")).name == "csr_reference"


@pytest.mark.parametrize("problem", [Problem("csr", 8, 8, dtype=torch.int8), Problem("nosuch", 8, 8)])
def test_a_problem_that_nothing_serves_lists_every_kernel_with_its_reason(problem: Problem) -> None:
    with pytest.raises(KernelError) as caught:
        select(problem)
    for kernel in KERNELS:
        reasons = kernel.unsupported(problem)
        assert reasons
        assert f"{kernel.name}: {'; '.join(reasons)}" in str(caught.value)
