"""The operators of every format: what they refuse and how, their gradients and shape rules, which kernel serves what."""

from __future__ import annotations

import pytest
import torch
from format_cases import LAYOUTS, Layout, some
from torch import Tensor

from sparsec.errors import KernelError
from sparsec.formats import FORMATS
from sparsec.formats.panels import LANES
from sparsec.formats.parts import FORMAT_NUMBERS, scalar_count, tensor_count
from sparsec.kernels import KERNELS, Problem, gpu, operator, operator_args, select, status
from sparsec.kernels.chain import CODES, DTYPES
from sparsec.kernels.library.loader import has_native, library
from sparsec.kernels.ops import OPERATORS, explain, packed_and_bias
from sparsec.kernels.program import ATTEND, JOIN, LOOK_UP, TENSOR, VIEW
from sparsec.kernels.reference import reference_linear

every_layout = pytest.mark.parametrize("name", LAYOUTS)
every_format = pytest.mark.parametrize("name", FORMATS)


def layout_of(name: str) -> Layout:
    """One of a format."""
    return next(layout for layout in LAYOUTS.values() if layout.kind.format == name)


MATRICES = {
    "csr": LAYOUTS["csr16"],
    "bitmap": LAYOUTS["bitmap"],
    "bsr": LAYOUTS["bsr8x3"],
    "nm": LAYOUTS["nm2:4"],
    "wcsr": LAYOUTS["wcsr8"],
}
# The field of the call, how it is spoilt, what is said.
SPOILT = {
    "wcsr": [
        ("values", lambda t: t.double(), "values must be float32, bfloat16 or float16 [stored"),
        ("col_idx", lambda t: t.int(), "col_idx must be int16 or uint8 [stored"),
        ("col_idx", lambda t: t[:-1], "col_idx must be"),
        ("base", lambda t: t[:-1], "base must be int16 [stored // 256 + out_features + 1 = 26, 8]"),
        ("base", lambda t: t.int(), "base must be int16"),
        ("row_ptr", lambda t: t.long(), "row_ptr must be int32 [out_features + 1 = 25]"),
        ("row_ptr", lambda t: t[:0], "must not be negative"),
    ],
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
        ("bits", lambda t: t.int(), "bits must be int16 [panels = 2, steps = 12]"),
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
        ("values", lambda t: t.new_zeros(len(t), 5, 8, 1), "c is a divisor of in_features = 12"),
        ("col_idx", lambda t: t.long(), "col_idx must be int16 or int32 [blocks"),
        ("col_idx", lambda t: t[:-1], "col_idx must be"),
        ("row_ptr", lambda t: t.long(), "row_ptr must be int32 [out_features / r + 1"),
        ("row_ptr", lambda t: t[None], "row_ptr must be"),
    ],
    "nm": [
        ("values", lambda t: t.double(), "values must be float32, bfloat16 or float16 [panels = 2"),
        ("values", lambda t: t.flatten(1), "values must be"),
        ("values", lambda t: t[:, :, :8].contiguous(), "16, slots = 1], got float32 [2, 6, 8, 1]"),
        ("values", lambda t: t.repeat(1, 2, 1, 1), "steps = 6"),
        ("n", lambda _: 4, "n must be from 1 to m - 1 = 3, got 4"),
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
@pytest.mark.parametrize("native", [True, False], ids=["native", "reference"])
def test_arguments_that_do_not_fit_are_refused(native: bool, name: str, field: str, spoil, message: str) -> None:  # type: ignore[no-untyped-def]
    if native and not status().built:
        pytest.skip(f"no native kernels: {status().reason}")
    if native and not has_native(f"{name}_linear"):
        pytest.skip("for GPUs, whose kernels are called after the reference's own check")
    packed, dense = some(MATRICES[name], 24, 12, 0.7, torch.float32)
    bias = torch.randn(len(dense))
    call = {"x": torch.randn(2, 12), **packed.tensors(), "bias": bias, **packed.scalars()}
    function = OPERATORS[name]
    assert function(*call.values()).shape == (2, len(dense))
    call[field] = spoil(call[field])
    x, *args = call.values()
    if not native:
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


NATIVE = [kernel.format for kernel in KERNELS if kernel.devices == ("cpu",)]
ON_GPU = [kernel.format for kernel in KERNELS if kernel.run is gpu.product]
every_native_format = pytest.mark.parametrize("name", [name for name in NATIVE if name in FORMATS])


@every_native_format
def test_the_native_library_serves_the_formats_of_its_kernels(name: str) -> None:
    if not status().built:
        pytest.skip(f"no native kernels: {status().reason}")
    assert has_native(f"{name}_linear")


@every_native_format
def test_selection_takes_the_native_kernel_first(name: str) -> None:
    assert select(Problem(name, 8, 8)).name == (f"{name}_cpu" if status().built else f"{name}_reference")
    triton = name in ON_GPU and not gpu.missing()
    assert select(Problem(name, 8, 8, device="cuda")).name == f"{name}_{'triton' if triton else 'reference'}"


def test_selection_takes_our_own_dense_kernel_on_a_cpu_only() -> None:
    assert select(Problem("dense", 8, 8)).name == ("dense_cpu" if status().built else "dense_torch")
    assert select(Problem("dense", 8, 8, device="cuda")).name == "dense_torch"


@pytest.mark.parametrize("problem", [Problem("csr", 8, 8, dtype=torch.int8), Problem("nosuch", 8, 8)])
def test_a_problem_that_nothing_serves_lists_the_kernels_with_their_reasons(problem: Problem) -> None:
    with pytest.raises(KernelError) as caught:
        select(problem)
    for kernel in [k for k in KERNELS if k.format == problem.format] or KERNELS:
        reasons = kernel.unsupported(problem)
        assert reasons
        assert f"{kernel.name}: {'; '.join(reasons)}" in str(caught.value)


def test_a_type_that_a_format_does_not_hold_is_refused() -> None:
    for name in FORMATS:
        kind = FORMATS[name]
        problem = Problem(name, 8, 8, dtype=torch.float64, device=(kind.devices or ("cpu",))[0])
        if torch.float64 in kind.dtypes:
            assert select(problem).format == name
        else:
            with pytest.raises(KernelError, match=r"serves float32, bfloat16, float16, not float64"):
                select(problem)


@pytest.mark.skipif(not status().built, reason="needs the native library")
def test_the_native_library_numbers_things_as_python_does() -> None:
    formats = [
        f"format {name} {number} {tensor_count(name)} {scalar_count(name)}"
        for name, number in FORMAT_NUMBERS.items()
        if name in NATIVE
    ]
    more = {"view": VIEW, "tensor": TENSOR, "join": JOIN, "look_up": LOOK_UP, "attend": ATTEND}
    instructions = [f"instruction {name} {number}" for name, number in {"product": 0, **CODES, **more}.items()]
    types = [
        f"type {str(dtype).removeprefix('torch.')} {number}" for number, dtype in enumerate((*DTYPES, torch.float64))
    ]
    assert library().numbers == [f"panel {LANES}", *formats, *instructions, *types]
