"""Triton kernels against fp64: on a GPU where there is one, else in Triton's interpreter. And what happens without either."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import warnings
from collections.abc import Iterator

import pytest
import torch
from format_cases import LAYOUTS, some
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import sparsec
from sparsec.errors import KernelError
from sparsec.formats import CSR, Packed, WarpCSR
from sparsec.formats.layout import for_device
from sparsec.kernels import KERNELS, Problem, gpu, operator, operator_args, select, tolerance
from sparsec.kernels.gpu import launch as gpu_launch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SERVED = [name for name in LAYOUTS if not gpu.unsupported(name, torch.float32)]
SLOW = ("bsr16x1", "bsr8x3")  # thousands of turns of a loop that the interpreter takes one by one

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="no triton, neither for a GPU nor its interpreter"
)
every_layout = pytest.mark.parametrize("name", SERVED)


@pytest.fixture
def many_programs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As on a device so large that every product is split."""
    gpu_launch.multiprocessors.cache_clear()
    monkeypatch.setattr(gpu_launch, "PROGRAMS", 10_000)
    yield
    gpu_launch.multiprocessors.cache_clear()


def moved(packed: Packed) -> Packed:
    tensors = {name: t.to(DEVICE) for name, t in packed.tensors().items()}
    return type(packed).from_parts(tensors, packed.scalars())


def assert_right(x: Tensor, packed: Packed, kept: Tensor, bias: Tensor | None) -> None:
    on_device = [None if t is None else t.to(DEVICE) for t in (x, bias)]
    assert on_device[0] is not None
    out = gpu.product(on_device[0], moved(packed), on_device[1]).cpu()
    assert out.dtype == x.dtype
    assert out.shape == (*x.shape[:-1], len(kept))
    exact = x.double() @ kept.double().t() + (0 if bias is None else bias.double())
    wrong = (out.double() - exact).abs() > tolerance(x, kept, bias)
    assert not wrong.any(), f"{packed.describe()} {list(kept.shape)}, {list(x.shape)}: {wrong.nonzero()[:5].tolist()}"


@needs_triton
@every_layout
def test_every_type_and_number_of_rows_is_right(name: str) -> None:
    torch.manual_seed(0)
    # A program for each row of CSR, for 16 rows of the others.
    size = (18, 20) if name in SLOW else (9, 600) if "csr" in name else (33, 300)
    for dtype, tokens in zip(DTYPES * 3, (1, 2, 3, 8, 9, 17, 64, 65, 1), strict=True):
        packed, kept = some(LAYOUTS[name], *size, 0.4, dtype, tokens)
        bias = torch.randn(len(kept)).to(dtype) if tokens % 2 else None
        assert_right(torch.randn(tokens, kept.shape[1]).to(dtype), packed, kept, bias)


@pytest.mark.skipif(DEVICE == "cpu", reason="no GPU: what its libraries do with large weights, nothing else shows")
@pytest.mark.parametrize("dtype", DTYPES)
def test_large_weights_are_multiplied_right_on_a_gpu(dtype: torch.dtype) -> None:
    """Regression: cuSPARSELt ended a float16 product of 2:4 weights in an illegal instruction."""
    packed, kept = some(LAYOUTS["nm2:4"], 1024, 2048, 0.5, dtype)
    for tokens in (17, 65, 512):
        assert_right(torch.randn(tokens, 2048).to(dtype), packed, kept, torch.randn(1024).to(dtype))


@needs_triton
@settings(max_examples=60)
@given(
    name=st.sampled_from(SERVED),
    out_features=st.integers(0, 20),
    in_features=st.integers(0, 40),
    tokens=st.integers(0, 20),
    density=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 1000),
)
def test_any_matrix_is_multiplied_right(
    name: str, out_features: int, in_features: int, tokens: int, density: float, dtype: torch.dtype, seed: int
) -> None:
    packed, kept = some(LAYOUTS[name], out_features, in_features, density, dtype, seed)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, kept.shape[1], generator=generator).to(dtype)
    bias = torch.randn(len(kept), generator=generator).to(dtype) if seed % 2 else None
    assert_right(x, packed, kept, bias)


@needs_triton
@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("csr16", (3, 8000)),
        ("wcsr8", (3, 8000)),
        ("wcsr16", (3, 8000)),
        ("bitmap", (17, 1100)),
        ("bsr16x16", (17, 200)),
        ("nm2:4", (17, 1000)),
        ("nm3:8", (17, 1000)),
        ("bitmap", (17, 1101)),
        ("nm1:4", (17, 1004)),
    ],
)
def test_products_split_over_programs_add_up(name: str, size: tuple[int, int], many_programs: None) -> None:
    packed, kept = some(LAYOUTS[name], *size, 0.6, torch.bfloat16)
    bias = torch.randn(len(kept)).bfloat16()
    for tokens in (1, 9):
        x = torch.randn(tokens, kept.shape[1]).bfloat16()
        with gpu_launch.recording() as launches:
            gpu.product(x, packed, bias)
        # What writes a part of every sum, and what adds the parts up.
        assert len(launches) == 2
        assert launches[0].constants["SPLITS"] > 1
        assert_right(x, packed, kept, bias)


@needs_triton
@pytest.mark.parametrize("name", ["wcsr8", "wcsr16"])
@given(
    counts=st.lists(st.integers(0, 300), min_size=1, max_size=3),
    far=st.booleans(),
    splits=st.sampled_from([1, 2, 4]),
    tokens=st.sampled_from([1, 2, 3, 17]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 1000),
)
def test_rows_of_any_number_of_turns_are_right(
    name: str, counts: list[int], far: bool, splits: int, tokens: int, dtype: torch.dtype, seed: int
) -> None:
    from sparsec.kernels.gpu import sums as gpu_sums

    generator = torch.Generator().manual_seed(seed)
    columns = 5000 if far else 300
    weight = torch.randn(len(counts), columns, generator=generator).to(dtype)
    mask = torch.zeros(weight.shape, dtype=torch.bool)
    for row, count in zip(mask, counts, strict=True):
        row[torch.randperm(columns, generator=generator)[:count]] = True
    bias = torch.randn(len(counts), generator=generator).to(dtype) if seed % 2 else None
    x = torch.randn(tokens, columns, generator=generator).to(dtype)
    with pytest.MonkeyPatch.context() as patched:
        # A turn of 64 weights in the place of 1024.
        for table in ("ONE", "SEVERAL"):
            patched.setattr(gpu_sums, table, (gpu_launch.Config({"TILE": 64}, warps=1),))
        patched.setattr(gpu_sums, "splits", lambda *_: splits)
        assert_right(x, LAYOUTS[name].pack(weight, mask), torch.where(mask, weight, 0), bias)


@needs_triton
@pytest.mark.parametrize("name", ["csr16", "csr32", "wcsr8", "wcsr16"])
def test_columns_beyond_32767_and_far_apart_are_found(name: str) -> None:
    torch.manual_seed(0)
    weight = torch.randn(5, 65536)
    mask = torch.rand(weight.shape) < torch.tensor([[0.0], [0.0001], [0.001], [0.01], [0.00001]])
    mask[2, -40:] = mask[4, -1] = mask[4, 0] = True
    packed = LAYOUTS[name].pack(weight, mask)
    packed.check()
    kept = torch.where(mask, weight, 0)
    for tokens in (1, 17):
        assert_right(torch.randn(tokens, 65536), packed, kept, None)


@needs_triton
@every_layout
def test_x_of_any_dimensions_and_strides_is_taken(name: str) -> None:
    packed, kept = some(LAYOUTS[name], 6, 10, 0.5, torch.float32)
    x = torch.randn(kept.shape[1], 2, 3).permute(1, 2, 0)
    assert not x.is_contiguous()
    assert_right(x, packed, kept, torch.randn(len(kept)))


@needs_triton
@pytest.mark.parametrize("name", ["bsr8x3", "bsr24x5", "bsr16x16"])
def test_an_infinite_weight_stays_in_its_row(name: str) -> None:
    layout = LAYOUTS[name]
    weight = torch.randn(layout.fit(60, 20))
    weight[layout.rows, 0] = float("inf")
    packed = layout.pack(weight, torch.ones(weight.shape, dtype=torch.bool))
    out = gpu.product(torch.rand(2, weight.shape[1]).to(DEVICE), moved(packed), None).cpu()
    assert out.isinf().sum(1).tolist() == [1, 1]
    assert not out.isnan().any()


@needs_triton
def test_a_result_is_the_same_every_time(many_programs: None) -> None:
    packed, kept = some(LAYOUTS["wcsr16"], 8, 20_000, 0.5, torch.float32)
    x = torch.randn(2, kept.shape[1], device=DEVICE)
    first = gpu.product(x, moved(packed), None)
    assert torch.equal(first, gpu.product(x, moved(packed), None))


def test_offsets_that_32_bits_do_not_hold_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "MAX_OFFSET", 100)
    packed, kept = some(LAYOUTS["wcsr16"], 4, 20, 0.5, torch.float32)
    with pytest.raises(
        KernelError, match=r"wcsr_linear: x has 120 elements, and the GPU kernels count to 100; give fewer"
    ):
        gpu.product(torch.randn(6, kept.shape[1]), packed, None)
    with pytest.raises(KernelError, match=r"the result has 104 elements"):
        gpu.product(torch.randn(2, 20), some(LAYOUTS["wcsr16"], 52, 20, 0.01, torch.float32)[0], None)


@pytest.mark.skipif(
    DEVICE == "cuda" or importlib.util.find_spec("triton") is None, reason="there is a GPU, or no triton"
)
def test_without_a_gpu_the_registry_says_so() -> None:
    assert gpu.missing() == ["torch sees no CUDA device"]
    for name in ("csr", "bitmap", "bsr", "nm", "wcsr"):
        assert select(Problem(name, 8, 8, device="cuda")).name == f"{name}_reference"
    with pytest.raises(KernelError, match=r"(?s)no kernel serves .*wcsr_triton: runs on cuda, not cpu"):
        select(Problem("wcsr", 8, 8))


def test_what_no_kernel_serves_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "use wcsr" in gpu.unsupported("csr8", torch.float32)
    assert "float64" in gpu.unsupported("csr16", torch.float64)
    assert "more than 128 rows" in gpu.unsupported("bsr8x256", torch.float32)
    assert gpu.unsupported("bsr128x128", torch.float32) == ""
    triton = next(k for k in KERNELS if k.name == "csr_triton")
    assert triton.unsupported(Problem("csr", 8, 8, device="cuda", layout="csr8")) == [
        gpu.unsupported("csr8", torch.float32)
    ]
    monkeypatch.setattr(gpu, "_warned", set())
    packed = some(LAYOUTS["csr8"], 4, 4, 0.5, torch.float32)[0]
    with pytest.warns(RuntimeWarning, match="slow reference kernels on this GPU"):
        gpu.warn_of_reference(packed)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gpu.warn_of_reference(packed)  # and says nothing more


def test_an_old_device_and_a_missing_triton_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Turing")
    if importlib.util.find_spec("triton") is not None:
        assert gpu.missing.__wrapped__() == [
            "Turing has compute capability 7.5, below the 8.0 served; move the model to the CPU, which has kernels for it"
        ]
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert gpu.missing.__wrapped__() == ['triton is not installed; run `pip install "sparsec[triton]"`']


@given(
    st.integers(0, 12),
    st.integers(0, 600),
    st.sampled_from([0.0, 0.003, 0.3, 1.0]),
    st.sampled_from(DTYPES),
    st.integers(0, 99),
)
def test_csr_is_laid_out_for_each_kind_of_device(
    out_features: int, in_features: int, density: float, dtype: torch.dtype, seed: int
) -> None:
    packed, kept = some(LAYOUTS["csr8" if seed % 2 else "csr16"], out_features, in_features, density, dtype, seed)
    for device, kind in (("cuda", WarpCSR), ("cpu", CSR)):
        there = for_device(packed, device)
        there.check()
        if device == "cuda":
            assert isinstance(there, kind)
        assert torch.equal(there.unpack(), kept)
        assert (there.nnz, there.dtype, there.shape) == (packed.nnz, packed.dtype, packed.shape)
        back = for_device(there, "cpu")
        assert back.describe() == packed.describe()
        assert torch.equal(back.unpack().view(dtype=torch.uint8), kept.view(dtype=torch.uint8))
    bitmap = some(LAYOUTS["bitmap"], 4, 4, 0.5, dtype)[0]
    assert for_device(bitmap, "cuda") is bitmap


def test_zeros_that_were_kept_stay_counted_on_another_device() -> None:
    weight, mask = torch.tensor([[0.0, 1.0, -0.0, 2.0, -0.0]]), torch.tensor([[True, True, False, True, True]])
    for bits in (8, 16):
        packed = CSR.pack(weight, mask, index_bits=bits)
        there = for_device(packed, "cuda")
        there.check()
        assert (there.describe(), there.nnz) == (f"wcsr{bits}", 4)
        back = for_device(there, "cpu")
        assert (back.describe(), back.nnz) == (f"csr{bits}", 4)
        assert torch.equal(torch.signbit(back.unpack()), torch.signbit(packed.unpack()))
        assert int(torch.signbit(back.unpack()).sum()) == 1


def test_what_warp_csr_cannot_hold_stays_csr() -> None:
    wide = torch.zeros(1, 70_000)
    packed = CSR.pack(wide, wide == 1)
    assert for_device(packed, "cuda") is packed
    double = CSR.pack(wide[:, :8].double(), wide[:, :8] == 0)
    assert for_device(double, "cuda") is double


@every_layout
def test_every_operator_has_an_implementation_for_cuda(name: str) -> None:
    packed = some(LAYOUTS[name], 8, 8, 0.5, torch.float32)[0]
    assert torch._C._dispatch_has_kernel_for_dispatch_key(operator(packed).name(), "CUDA")
    if DEVICE == "cuda":
        x = torch.randn(3, packed.shape[1], device=DEVICE)
        there = moved(packed)
        torch.testing.assert_close(operator(there)(x, *operator_args(there, None)), x @ there.unpack().t())


def test_a_model_on_the_cpu_is_not_lowered_to_warp_csr() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(8, 8))
    said = r"0\.weight: wcsr is laid out for cuda, and this weight is on cpu; use lower\(csr\), which becomes wcsr when"
    with pytest.raises(KernelError, match=said):
        sparsec.compile(model, passes="magnitude(0.5),freeze,lower(wcsr)", example_inputs=(torch.randn(2, 8),))


def test_triton_is_imported_by_a_gpu_alone_and_transformers_by_models() -> None:
    code = """
import importlib.util, sys
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name.partition(".")[0] == "triton" else find(name, *rest)
sys.modules["triton"] = None
import torch, sparsec
import sparsec.bench.__main__, sparsec.cost.__main__, sparsec.evaluate.__main__, sparsec.report.__main__
from torch import nn
assert "transformers" not in sys.modules, "its import takes longer than all the others together"
free = ("_launch", "_semi_structured")
assert not [name for name in sys.modules if name.startswith("sparsec.kernels.gpu_") and not name.endswith(free)]
model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
x = torch.randn(2, 8)
compiled = sparsec.compile(model, passes="magnitude(0.5),freeze,lower(csr)", example_inputs=(x,))
compiled(x)
assert sparsec.kernels.gpu.missing() == ['triton is not installed; run `pip install "sparsec[triton]"`']
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@needs_triton
def test_strided_arguments_are_taken_or_refused() -> None:
    """Regression: every second entry of a bias was read as if they lay side by side."""
    torch.manual_seed(0)
    for name in ("wcsr16", "bitmap", "bsr16x16", "nm2:4"):
        packed, kept = some(LAYOUTS[name], 32, 32, 0.5, torch.float32)
        bias = torch.randn(64)[::2]
        for tokens in (1, 17):
            assert_right(torch.randn(32, tokens).t(), packed, kept, bias)
    values = packed.values.repeat_interleave(2, -1)[..., ::2]
    strided = type(packed).from_parts({**packed.tensors(), "values": values}, packed.scalars())
    with pytest.raises(KernelError, match=r"nm_linear: values has gaps in memory; call .contiguous\(\) on it"):
        gpu.product(torch.randn(1, 32), strided, None)


def test_no_more_stages_than_shared_memory_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_launch, "shared_memory", lambda device: 99 << 10)
    wanted = [gpu_launch.Config({}, stages=n) for n in (1, 2, 3, 4)]
    for stage_bytes, stages in ((72 << 10, [1, 2, 2, 2]), (33 << 10, [1, 2, 3, 4]), (100 << 10, [1, 1, 1, 1])):
        found = gpu_launch.fitting(wanted, stage_bytes, torch.device("cpu"))
        assert [c.stages for c in found] == stages


@given(st.integers(1, 6), st.integers(1, 300), st.sampled_from([0.0, 0.1, 0.6]), st.integers(0, 99))
def test_a_matrix_that_keeps_zeros_is_whole_on_every_device(
    out_features: int, in_features: int, share: float, seed: int
) -> None:
    """Regression: the zeros were dropped, and still counted."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out_features, in_features, generator=generator)
    weight[torch.rand(weight.shape, generator=generator) < 0.5] = 0
    mask = torch.rand(weight.shape, generator=generator) >= share
    packed = CSR.pack(weight, mask)
    for device in ("cuda", "cpu", "cuda"):
        packed = for_device(packed, device)
        packed.check()
        assert packed.nnz == int(mask.count_nonzero())
        assert torch.equal(packed.unpack(), torch.where(mask, weight, 0))
