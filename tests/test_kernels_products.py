"""The product of every format against fp64, on every instruction set, type and shape; gradient, shape rule and errors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import pytest
import torch
from format_cases import LAYOUTS, Layout
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sparsec.errors import KernelError
from sparsec.formats import CSR, FORMATS, Packed
from sparsec.kernels import KERNELS, Problem, force_isa, operator, operator_args, select, status, tolerance
from sparsec.kernels.loader import library
from sparsec.kernels.ops import OPERATORS, explain, has_native, packed_and_bias
from sparsec.kernels.reference import reference_linear

NATIVE = ("avx512", "avx2", "portable")
HALF = (torch.bfloat16, torch.float16)
# Rows of x on both sides of every switch: 1; CSR's lanes 4, 8, 16, 32; 33 and more go through panels, 6 or more tiles of them.
TOKENS = (0, 1, 2, 3, 5, 8, 9, 17, 33, 70)
# The last two are split over threads; 7, 31, 100, 333 leave tails after every vector width.
SHAPES = ((1, 1), (5, 7), (3, 31), (40, 100), (200, 333), (300, 400))

every_layout = pytest.mark.parametrize("name", LAYOUTS)
every_format = pytest.mark.parametrize("name", FORMATS)
half_types = pytest.mark.parametrize("dtype", HALF, ids=str)


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


def layout_of(name: str) -> Layout:
    """One of a format."""
    return next(layout for layout in LAYOUTS.values() if layout.kind.format == name)


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


def some(
    layout: Layout, out_features: int, in_features: int, density: float, dtype: torch.dtype, seed: int = 0
) -> tuple[Packed, Tensor]:
    """A random matrix packed, and dense."""
    generator = torch.Generator().manual_seed(seed)
    shape = layout.fit(out_features, in_features)
    weight = torch.randn(shape, generator=generator).to(dtype)
    mask = layout.mask(*shape, density, generator)
    return layout.pack(weight, mask), torch.where(mask, weight, 0)


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
            assert_right(isa, torch.randn(40, kept.shape[1]).to(dtype), [40], packed, kept, bias)
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
    packed, kept = layout.pack(weight, mask), torch.where(mask, weight, 0)
    x, bias = torch.randn(64, shape[1]), torch.randn(shape[0])
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert_right(isa, x, (1, 3, 20, 64), packed, kept, bias)
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
    for tokens in (1, 2, 33):
        out = product(isa, torch.ones(tokens, shape[1], dtype=dtype), packed, None)
        expected = values.t().expand(tokens, -1)
        assert torch.equal(out.isnan(), expected.isnan())
        assert torch.equal(out.nan_to_num(), expected.nan_to_num())


@half_types
@every_layout
def test_sums_are_rounded_to_the_half_type_as_torch_rounds(isa: str, name: str, dtype: torch.dtype) -> None:
    layout, generator = LAYOUTS[name], torch.Generator().manual_seed(1)
    rows, columns = layout.fit(20000, 2)
    a = torch.randn(rows, generator=generator) * 10.0 ** torch.randint(-6, 5, (rows,), generator=generator)
    weight = torch.zeros(rows, columns, dtype=dtype)
    mask = torch.zeros(rows, columns, dtype=torch.bool)
    weight[:, 0], mask[:, 0] = a.to(dtype), True
    second = None if layout.keeps == 1 or columns == 1 else columns - 1
    bias = torch.zeros(rows, dtype=dtype)
    if second is None:
        bias = torch.randn(rows, generator=generator).to(dtype)
    else:
        weight[:, second], mask[:, second] = torch.randn(rows, generator=generator).to(dtype), True
    out = product(isa, torch.ones(1, columns, dtype=dtype), layout.pack(weight, mask), bias)
    assert torch.equal(out[0], (weight.float().sum(1) + bias.float()).to(dtype))


# ---- what is refused ---------------------------------------------------------------------------------------------------

MATRICES = {
    "csr": LAYOUTS["csr16"],
    "bitmap": LAYOUTS["bitmap"],
    "bsr": LAYOUTS["bsr8x3"],
    "nm": LAYOUTS["nm2:4"],
}
# The field of the call, how it is spoilt, what is said.
SPOILT = {
    "csr": [
        ("values", lambda t: t.int(), "values must be float32, bfloat16, float16 or float64 [stored"),
        ("values", lambda t: t[None], "values must be"),
        ("col_idx", lambda t: t.long(), "col_idx must be uint8, int16 or int32"),
        ("col_idx", lambda t: t[:-1], "col_idx must be"),
        ("row_ptr", lambda t: t.long(), "row_ptr must be int32"),
        ("row_ptr", lambda t: t[:0], "must not be negative"),
    ],
    "bitmap": [
        ("values", lambda t: t.double(), "values must be float32, bfloat16 or float16 [nnz + 16"),
        ("values", lambda t: t[:15], "values must be"),
        ("bits", lambda t: t.int(), "bits must be int16 [panels = 2, in_features = 12]"),
        ("bits", lambda t: t[:, :-1], "bits must be int16"),
        ("panel_ptr", lambda t: t.long(), "panel_ptr must be int32 [panels + 1 = 3]"),
        ("panel_ptr", lambda t: t[:-1], "panel_ptr must be"),
        ("out_features", lambda n: n + 16, "panels = 3"),
        ("out_features", lambda n: -n, "must not be negative"),
    ],
    "bsr": [
        ("values", lambda t: t.double(), "values must be float32, bfloat16 or float16 [blocks"),
        ("values", lambda t: t.flatten(1), "values must be"),
        ("values", lambda t: t.transpose(1, 2).contiguous(), "r, a multiple of 8"),
        ("values", lambda t: t.new_zeros(len(t), 5, 8), "c, a divisor of in_features = 12"),
        ("col_idx", lambda t: t.long(), "col_idx must be int16 or int32 [blocks"),
        ("col_idx", lambda t: t[:-1], "col_idx must be"),
        ("row_ptr", lambda t: t.long(), "row_ptr must be int32 [out_features / r + 1"),
        ("row_ptr", lambda t: t[None], "row_ptr must be"),
    ],
    "nm": [
        ("values", lambda t: t.double(), "values must be float32, bfloat16 or float16 [panels = 2"),
        ("values", lambda t: t.flatten(1), "values must be"),
        ("values", lambda t: t[..., :8].contiguous(), "16], got float32 [2, 3, 2, 8]"),
        ("values", lambda t: t.repeat(1, 1, 2, 1), "n, from 1 to m - 1 = 3"),
        ("index", lambda t: t[:-1], "index must be uint8 [bytes of all slots + 4"),
        ("index", lambda t: t.short(), "index must be uint8"),
        ("m", lambda _: 5, "m must be 4 or 8, got 5"),
        ("m", lambda _: 8, "in_features must be divisible by m = 8, got 12"),
    ],
}
ANY = [
    ("x", lambda t: t[:, :-1], "x must be [..., in_features=12], got [2, 11]"),
    ("x", lambda t: t[0, 0], "x must be [..., in_features=12], got []"),
    ("x", lambda t: t.half(), "x must have the dtype of the weights, torch.float32, got torch.float16; convert x"),
    ("bias", lambda t: t[:-1], "bias must be torch.float32 ["),
    ("bias", lambda t: t.double(), "bias must be torch.float32 ["),
]
CALLS = [(name, *case) for name, cases in SPOILT.items() for case in [*cases, *ANY]]


@pytest.mark.parametrize(("name", "field", "spoil", "message"), CALLS, ids=[f"{c[0]}-{c[1]}-{c[3]}" for c in CALLS])
def test_arguments_that_do_not_fit_are_refused(isa: str, name: str, field: str, spoil, message: str) -> None:  # type: ignore[no-untyped-def]
    packed, dense = some(MATRICES[name], 24, 12, 0.7, torch.float32)
    bias = torch.randn(len(dense))
    call = {"x": torch.randn(2, 12), **packed.tensors(), "bias": bias, **packed.scalars()}
    function = OPERATORS[name]
    assert function(*call.values()).shape == (2, len(dense))
    call[field] = spoil(call[field])
    x, *args = call.values()
    if isa == "reference":
        with pytest.raises(KernelError) as caught:
            reference_linear(x, *packed_and_bias(name, args))
    else:
        with pytest.raises(RuntimeError) as refused:
            function(x, *args)
        with pytest.raises(KernelError) as caught:
            explain(name, refused.value, x, args)
    assert str(caught.value).startswith(f"{name}_linear: ")
    assert message in str(caught.value)


@every_format
def test_the_shape_rule_refuses_what_the_product_refuses(name: str) -> None:
    packed, _ = some(layout_of(name), 24, 12, 0.7, torch.float32)
    args = [t.to("meta") if isinstance(t, Tensor) else t for t in operator_args(packed, None)]
    assert operator(packed)(torch.empty(2, 3, packed.shape[1], device="meta"), *args).shape == (2, 3, packed.shape[0])
    with pytest.raises(KernelError, match=rf"^{name}_linear: x must be"):
        operator(packed)(torch.empty(2, 3, device="meta"), *args)


# ---- gradients and torch's own checks --------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [0, 1, 3])
def test_gradients_of_x_and_bias_are_right(tokens: int) -> None:
    packed, _ = some(LAYOUTS["csr16"], 5, 7, 0.5, torch.float64)
    x = torch.randn(tokens, 7, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(5, dtype=torch.float64, requires_grad=True)
    op = operator(packed)
    assert torch.autograd.gradcheck(lambda x, b: op(x, *operator_args(packed, b)), (x, bias))
    assert torch.autograd.gradgradcheck(lambda x: op(x, *operator_args(packed, None)), (x,))


@every_layout
def test_gradients_are_those_of_the_dense_product(name: str) -> None:
    packed, dense = some(LAYOUTS[name], 20, 12, 0.5, torch.float32)
    x, bias = torch.randn(2, 3, dense.shape[1], requires_grad=True), torch.randn(len(dense), requires_grad=True)
    seed = torch.randn(2, 3, len(dense))
    got = torch.autograd.grad(operator(packed)(x, *operator_args(packed, bias)), (x, bias), seed)
    expected = torch.autograd.grad(torch.nn.functional.linear(x, dense, bias), (x, bias), seed)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)


@every_format
def test_values_that_ask_for_a_gradient_are_refused(name: str) -> None:
    packed, dense = some(layout_of(name), 16, 16, 0.5, torch.float32)
    args = operator_args(packed, None)
    with pytest.raises(KernelError, match="constants"):
        operator(packed)(torch.ones(dense.shape[1]), packed.values.clone().requires_grad_(), *args[1:])


@pytest.mark.parametrize("bias", [False, True])
@every_format
def test_schema_shape_rule_and_gradient_pass_torchs_own_check(name: str, bias: bool) -> None:
    packed, dense = some(layout_of(name), 16, 16, 0.5, torch.float32)
    b = torch.randn(len(dense), requires_grad=True) if bias else None
    x = torch.randn(2, 3, dense.shape[1], requires_grad=True)
    torch.library.opcheck(operator(packed), (x, *operator_args(packed, b)))


# ---- selection ---------------------------------------------------------------------------------------------------------------


@every_format
def test_the_native_library_serves_every_format(name: str) -> None:
    if not status().built:
        pytest.skip(f"no native kernels: {status().reason}")
    assert has_native(f"{name}_linear")


@every_format
def test_selection_takes_the_native_kernel_first(name: str) -> None:
    assert select(Problem(name, 8, 8)).name == (f"{name}_cpu" if status().built else f"{name}_reference")
    assert select(Problem(name, 8, 8, device="cuda")).name == f"{name}_reference"


def test_selection_takes_our_own_dense_kernel_on_a_cpu_only() -> None:
    assert select(Problem("dense", 8, 8)).name == ("dense_cpu" if status().built else "dense_torch")
    assert select(Problem("dense", 8, 8, device="cuda")).name == "dense_torch"


@pytest.mark.parametrize("problem", [Problem("csr", 8, 8, dtype=torch.int8), Problem("nosuch", 8, 8)])
def test_a_problem_that_nothing_serves_lists_every_kernel_with_its_reason(problem: Problem) -> None:
    with pytest.raises(KernelError) as caught:
        select(problem)
    for kernel in KERNELS:
        reasons = kernel.unsupported(problem)
        assert reasons
        assert f"{kernel.name}: {'; '.join(reasons)}" in str(caught.value)


def test_a_type_that_only_csr_holds_is_refused_by_the_others() -> None:
    for name in FORMATS:
        problem = Problem(name, 8, 8, dtype=torch.float64)
        if name == CSR.format:
            assert select(problem).format == name
        else:
            with pytest.raises(KernelError, match=r"serves float32, bfloat16, float16, not float64"):
                select(problem)
