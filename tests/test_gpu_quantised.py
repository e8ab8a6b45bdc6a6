"""Triton kernels on quantised values against what the codes stand for: on a GPU, or else in Triton's interpreter."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_gpu_kernels import DEVICE, DTYPES, many_programs, moved, needs_triton
from torch import Tensor

from sparsec.errors import FormatError
from sparsec.formats import QUANTISED, Packed
from sparsec.formats.layout import Layout, for_device
from sparsec.formats.values import EXAMPLES, ZERO, Codec, Codes
from sparsec.kernels import KERNELS, Problem, gpu, operator, operator_args, tolerance
from sparsec.kernels.gpu import launch as gpu_launch

__all__ = ["many_programs"]  # a fixture

CODECS = (*EXAMPLES, "int8g32", "int4g96", "int4mg32")
WARP = tuple(f"{name}:{codec}" for name in ("wcsr8", "wcsr16") for codec in CODECS if "m" not in codec)
"""Padding has the code of 0.0, which values about a middle do not have."""
LAYOUTS = (*(f"bitmap:{codec}" for codec in CODECS), *WARP)


def packed_at_random(
    name: str, out_features: int, in_features: int, density: float, dtype: torch.dtype, seed: int = 0
) -> Packed:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out_features, in_features, generator=generator).to(dtype)
    layout = Layout.parse(name)
    mask = layout.sample_mask((out_features, in_features), 1 - density, generator)
    return layout.pack(weight + 0.5, mask)


def assert_right(x: Tensor, packed: Packed, bias: Tensor | None) -> None:
    exact = packed.exact()
    there = None if bias is None else bias.to(DEVICE)
    out = gpu.product(x.to(DEVICE), moved(packed), there).cpu()
    assert out.dtype == x.dtype
    wanted = x.double() @ exact.double().t() + (0 if bias is None else bias.double())
    bound = tolerance(x, exact, bias)
    if len(x) > gpu_launch.MANY and x.dtype != torch.float32:
        # The interpreter cuts off, where a GPU rounds, what an expanded weight has too much.
        bound = bound + torch.finfo(x.dtype).eps * (x.double().abs() @ exact.double().abs().t())
    wrong = (out.double() - wanted).abs() > bound
    assert not wrong.any(), f"{packed.describe()} {list(packed.shape)}, {list(x.shape)}: {wrong.nonzero()[:5].tolist()}"


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "name", [*(f"bitmap:{codec}" for codec in EXAMPLES), "wcsr8:int8", "wcsr16:int8g64", "wcsr8:int4g64"]
)
def test_every_number_of_rows_is_right(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    for tokens, shape in (
        (1, (33, 300)),
        (2, (17, 301)),
        (3, (16, 66)),
        (8, (33, 300)),
        (17, (5, 130)),
        (65, (17, 99)),
    ):
        packed = packed_at_random(name, *shape, 0.5, dtype)
        bias = torch.randn(shape[0]).to(dtype) if tokens % 2 else None
        assert_right(torch.randn(tokens, shape[1]).to(dtype), packed, bias)


@needs_triton
@settings(max_examples=40)
@given(
    name=st.sampled_from(LAYOUTS),
    out_features=st.integers(0, 20),
    in_features=st.integers(0, 140) | st.integers(256, 700),
    tokens=st.integers(0, 20),
    density=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 1000),
)
def test_any_matrix_is_multiplied_right(
    name: str, out_features: int, in_features: int, tokens: int, density: float, dtype: torch.dtype, seed: int
) -> None:
    packed = packed_at_random(name, out_features, in_features, density, dtype, seed)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, in_features, generator=generator).to(dtype)
    bias = torch.randn(out_features, generator=generator).to(dtype) if seed % 2 else None
    assert_right(x, packed, bias)


@needs_triton
@pytest.mark.parametrize("name", ["nm2:4:int8", "nm2:4:int4mg64", "nm3:8:int4g32"])
def test_n_of_m_are_multiplied_right(name: str) -> None:
    torch.manual_seed(0)
    for tokens in (1, 9):
        assert_right(torch.randn(tokens, 136), packed_at_random(name, 17, 136, 0.5, torch.float32), torch.randn(17))


@needs_triton
@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_an_expanded_matrix_is_what_the_codes_stand_for(name: str, dtype: torch.dtype) -> None:
    for shape in ((33, 300), (1, 7)):
        packed = packed_at_random(name, *shape, 0.5, dtype)
        expand = import_module(f"sparsec.kernels.gpu.{packed.format}").expand
        found = expand(moved(packed)).cpu()
        assert found.dtype == dtype
        error = (found.double() - packed.exact().double()).abs()
        step = torch.finfo(dtype).eps if dtype != torch.float32 else 0.0
        assert bool((error <= step * packed.exact().abs()).all())


@needs_triton
@pytest.mark.parametrize("name", ["bitmap:int8", "bitmap:int4mg64", "wcsr8:int8g64", "wcsr16:int4g64"])
def test_products_split_over_programs_add_up(name: str, many_programs: None) -> None:
    rows, columns = (
        (3, 6001) if name.startswith("wcsr") else (17, 1101)
    )  # a turn takes 512 stored weights, or 64 columns
    packed = packed_at_random(name, rows, columns, 0.6, torch.bfloat16)
    bias = torch.randn(rows).bfloat16()
    for tokens in (1, 9):
        x = torch.randn(tokens, columns).bfloat16()
        with gpu_launch.recording() as launches:
            gpu.product(x, packed, bias)
        assert len(launches) == 2
        assert launches[0].constants["SPLITS"] > 1
        assert_right(x, packed, bias)


@settings(max_examples=60)
@given(
    codec=st.sampled_from(["int8", "int8g64", "int4g64", "int4g32"]),
    bits=st.sampled_from(["8", "16"]),
    out_features=st.integers(0, 20),
    in_features=st.integers(0, 700),
    density=st.sampled_from([0.0, 0.003, 0.3, 1.0]),
    seed=st.integers(0, 99),
)
def test_codes_in_csr_are_laid_out_for_each_kind_of_device(
    codec: str, bits: str, out_features: int, in_features: int, density: float, seed: int
) -> None:
    packed = packed_at_random(f"csr{bits}:{codec}", out_features, in_features, density, torch.float32, seed)
    there = for_device(packed, "cuda")
    back = for_device(there, "cpu")
    for kind, found in (("wcsr", there), ("csr", back)):
        found.check()
        assert found.describe() == f"{kind}{bits}:{codec}"
        assert torch.equal(found.exact(), packed.exact())
        assert (found.nnz, found.dtype, found.shape) == (packed.nnz, packed.dtype, packed.shape)


def test_codes_that_have_no_zero_stay_in_csr() -> None:
    """What pads a row of warp CSR is 0.0, and these values have no code of it: no other one takes its place."""
    weight, mask = torch.randn(4, 12), torch.ones(4, 12, dtype=torch.bool)
    middle = Layout.parse("csr16:int4mg64").pack(weight, mask)
    assert for_device(middle, "cuda") is middle
    codes = Codec.parse("int4g64").encode(weight, mask)
    table = codes.table.clone()
    table[(table == ZERO).nonzero()[0, 0]] = ZERO + 1
    without = Layout.parse("csr16:int4g64").pack(weight, mask, Codes(codes.codes, codes.scale, table))
    without.check()
    assert for_device(without, "cuda") is without
    with pytest.raises(FormatError, match="no code of the table is 0"):
        without.in_format(QUANTISED["wcsr"], index_bits=16)


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES)
def test_x_that_is_not_aligned_is_read_number_by_number(dtype: torch.dtype) -> None:
    packed = packed_at_random("bitmap:int8", 17, 64, 0.5, dtype)
    flat = torch.randn(129).to(dtype).to(DEVICE)
    for x, words in ((flat[:128].view(2, 64), True), (flat[1:].view(2, 64), False)):
        with gpu_launch.recording() as launches:
            gpu.product(x, moved(packed), None)
        assert launches[0].constants["WORDS"] == words
        assert_right(x.cpu() if DEVICE == "cuda" else x, packed, None)


@needs_triton
def test_what_is_not_there_is_not_multiplied() -> None:
    """What lies behind a row of x, and is NaN, meets no weight."""
    for columns in (13, 16):
        packed = packed_at_random("bitmap:int4g64", 17, columns, 1.0, torch.bfloat16)
        x = torch.zeros(9, columns, dtype=torch.bfloat16, device=DEVICE)
        x[1::2] = float("nan")
        assert gpu.product(x[:1], moved(packed), None).eq(0).all()
        for tokens in (2, 9):
            assert gpu.product(x[:tokens], moved(packed), None)[::2].eq(0).all()


@needs_triton
@pytest.mark.parametrize("tokens", [9, 65])
def test_the_largest_weights_of_fp16_stay_finite(tokens: int) -> None:
    """Rounded to a code they may stand for more than fp16 holds."""
    weight = torch.full((16, 64), 65504.0).half()
    weight[:, ::2] = -65504.0
    packed = Layout.parse("bitmap:int4g64").pack(weight, torch.ones(16, 64, dtype=torch.bool))
    assert packed.exact().abs().max() > 65504
    x = torch.zeros(tokens, 64).half()
    x[:, 0] = 0.5
    found = gpu.product(x.to(DEVICE), moved(packed), None).cpu()
    assert bool((found.double() / -32752 - 1).abs().max() < 0.01)


def test_values_that_no_triton_kernel_multiplies_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    served = {name for name, kind in QUANTISED.items() for k in KERNELS if k.name == f"{kind.format}_triton"}
    assert served == set(gpu.CODED)
    for name in QUANTISED:
        parameters = {"nm": "2:4", "bsr": "16x16", "csr": "8", "wcsr": "8"}.get(name, "")
        said = gpu.unsupported(f"{name}{parameters}:int8", torch.float32)
        assert bool(said) == (name not in served)
    assert (
        "no Triton kernel multiplies dense:int8; quantised values have one in bitmap, nm, wcsr, as bitmap:int8"
        in gpu.unsupported("dense:int8", torch.float32)
    )
    kernels = {kernel.name: kernel for kernel in KERNELS}
    assert not kernels["bitmap_int_triton"].unfit(Problem("bitmap_int", 8, 8, device="cuda", layout="bitmap:int8"))
    assert "dense_int_triton" not in kernels
    monkeypatch.setattr(gpu, "missing", list)
    monkeypatch.setattr(gpu, "_warned", set())
    with pytest.warns(
        RuntimeWarning, match="slow reference kernels on this GPU: no Triton kernel multiplies dense:int8"
    ):
        gpu.warn_of_reference(packed_at_random("dense:int8", 4, 4, 0.5, torch.float32))


@pytest.mark.parametrize("name", [f"{name}:int8" for name in gpu.CODED])
def test_every_operator_has_an_implementation_for_cuda(name: str) -> None:
    packed = packed_at_random(name.replace("nm", "nm2:4").replace("wcsr", "wcsr16"), 8, 8, 0.5, torch.float32)
    assert torch._C._dispatch_has_kernel_for_dispatch_key(operator(packed).name(), "CUDA")
    if DEVICE == "cuda":
        x = torch.randn(3, packed.shape[1], device=DEVICE)
        there = moved(packed)
        torch.testing.assert_close(operator(there)(x, *operator_args(there, None)), x @ there.unpack().t())
