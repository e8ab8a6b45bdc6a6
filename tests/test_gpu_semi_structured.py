"""2:4 with many rows on a GPU: when the library for it is asked, with what, and what is kept of its answers.

There is no library without a GPU: one is put in its place that holds the compressed weight as its API gives it (rows of W, nine
sixteenths as wide) and multiplies in float64.
"""

from __future__ import annotations

import gc
import importlib.util
import threading
import warnings
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from format_cases import LAYOUTS, some
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import sparsec
from sparsec.cost import measure_gpu
from sparsec.formats import NM
from sparsec.formats.layout import Layout
from sparsec.kernels import KERNELS, Problem, SparseLinear, gpu, select, tolerance
from sparsec.kernels.gpu import semi_structured as semi
from sparsec.memory import held

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no triton"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the kernels' own tests reach the library itself"),
]


class Library:
    """Takes the place of cuSPARSELt."""

    def __init__(self) -> None:
        self.weights: list[Tensor] = []
        self.plans: list[tuple[int, int, int]] = []
        self.searched = 0
        self.refusal = ""

    def compress(self, dense: Tensor) -> Tensor:
        if self.refusal:
            raise RuntimeError(self.refusal)
        out_features, in_features = dense.shape
        assert not out_features % 16
        assert not in_features % 16
        assert dense.is_contiguous()
        assert int((dense != 0).view(out_features, -1, 4).sum(2).max()) <= 2
        self.weights.append(dense.clone())
        # The first entry says which weight it is.
        return torch.full((out_features, in_features * 9 // 16), len(self.weights) - 1, dtype=dense.dtype)

    def search(self, weight: Tensor, turned: Tensor, bias: Tensor | None, *rest: object) -> tuple[int, int, int, int]:
        assert rest == (None, None, True)
        self.searched += 1
        return 3, 2, 1, 38

    def multiply(
        self, weight: Tensor, turned: Tensor, *, bias: Tensor | None, transpose_result: bool, **plan: int
    ) -> Tensor:
        assert transpose_result
        assert not turned.is_contiguous(), "the library reads it as it lies, row by row of x"
        assert not turned.shape[1] % 8
        self.plans.append((plan["alg_id"], plan["split_k"], plan["split_k_mode"]))
        out = turned.t().double() @ self.weights[int(weight[0, 0])].double().t()
        return (out if bias is None else out + bias.double()).to(turned.dtype)


@pytest.fixture
def library() -> Iterator[Library]:
    with pytest.MonkeyPatch.context() as patch:
        yield installed(patch)


def installed(patch: pytest.MonkeyPatch) -> Library:
    found = Library()
    patch.delenv(semi.SWITCH, raising=False)
    patch.setattr(semi, "_type_of", lambda packed: "cuda")
    patch.setattr(torch.backends.cusparselt, "is_available", lambda: True)
    patch.setattr(torch, "_cslt_compress", found.compress)
    patch.setattr(torch, "_cslt_sparse_mm", found.multiply)
    patch.setattr(torch._C, "_cusparselt", SimpleNamespace(mm_search=found.search), raising=False)
    patch.setattr(semi, "_plans", {})
    patch.setattr(semi, "_refused", [])
    return found


def weight(rows: int = 32, columns: int = 48, dtype: torch.dtype = torch.bfloat16, seed: int = 0, n: int = 2) -> NM:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(rows, columns // 4, 4, generator=generator)
    mask = (scores.argsort(2).argsort(2) < n).view(rows, columns)
    return NM.pack(torch.randn(rows, columns, generator=generator).to(dtype), mask)


@given(
    rows=st.integers(1, 4),
    columns=st.integers(1, 4),
    tokens=st.integers(64, 140),
    dtype=st.sampled_from(semi.DTYPES),
    n=st.sampled_from([1, 2]),
    with_bias=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(max_examples=20)
def test_many_rows_are_multiplied_by_the_library(
    rows: int, columns: int, tokens: int, dtype: torch.dtype, n: int, with_bias: bool, seed: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        library = installed(patch)
        packed = weight(16 * rows, 16 * columns, dtype, seed, n)
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(tokens, 16 * columns, generator=generator).to(dtype)
        bias = torch.randn(16 * rows, generator=generator).to(dtype) if with_bias else None
        dense = packed.unpack()
        for _ in range(2):
            out = gpu.cusparselt(x, packed, bias)
            exact = x.double() @ dense.double().t() + (0 if bias is None else bias.double())
            assert out.shape == exact.shape
            assert out.is_contiguous()
            assert bool(((out.double() - exact).abs() <= tolerance(x, dense, bias)).all())
        assert len(library.weights) == 1, "compressed once"
        assert torch.equal(library.weights[0], dense)
        assert library.searched == 1
        assert library.plans == [(3, 2, 1)] * 2


@pytest.mark.parametrize(
    ("packed", "tokens"),
    [
        (weight(), 63),
        (weight(dtype=torch.float32), 64),
        (weight(24), 64),
        (weight(columns=40), 64),
        (weight(n=3), 64),
        (some(LAYOUTS["nm4:8"], 32, 48, 0.5, torch.bfloat16)[0], 64),
    ],
    ids=["few rows", "fp32", "24 rows of W", "40 columns", "3:4", "4:8"],
)
def test_what_it_is_not_for_goes_another_way(library: Library, packed: NM, tokens: int) -> None:
    x = torch.randn(tokens, packed.shape[1]).to(packed.dtype)
    out = gpu.cusparselt(x, packed, None)
    assert not library.weights
    assert bool(
        ((out.double() - x.double() @ packed.unpack().double().t()).abs() <= tolerance(x, packed.unpack(), None)).all()
    )
    served = [k for k in KERNELS if k.name == "nm_cusparselt"]
    assert served[0].refuses(Problem.of(packed, tokens))


def test_the_switch_and_a_torch_without_it_are_named(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    assert semi.missing() == []
    monkeypatch.setenv(semi.SWITCH, "0")
    assert semi.missing() == ["SPARSEC_SEMI_STRUCTURED=0 turns it off"]
    assert semi.linear(torch.randn(64, 48).bfloat16(), weight(), None, NM.unpack) is None
    monkeypatch.delenv(semi.SWITCH)
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: False)
    assert semi.missing() == ["this torch was built without cuSPARSELt"]
    assert semi.linear(torch.randn(64, 48).bfloat16(), weight(), None, NM.unpack) is None
    assert not library.weights


def test_a_weight_that_is_refused_is_named_once_and_expanded(library: Library) -> None:
    library.refusal = "architecture mismatch\nand more"
    packed, x = weight(), torch.randn(64, 48).bfloat16()
    said = "go through expanded weights: cuSPARSELt refused nm2:4 of 32x48, 64 rows: architecture mismatch$"
    with pytest.warns(RuntimeWarning, match=said):
        out = gpu.cusparselt(x, packed, None)
    assert bool(
        ((out.double() - x.double() @ packed.unpack().double().t()).abs() <= tolerance(x, packed.unpack(), None)).all()
    )
    library.refusal = ""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(gpu.cusparselt(x, packed, None), out)
    assert not library.weights
    assert "refused" in semi.missing()[0]


def test_values_written_anew_are_compressed_anew_and_nothing_outlives_its_weight(library: Library) -> None:
    packed, x = weight(), torch.randn(64, 48).bfloat16()
    gc.collect()
    before = len(semi._twins)
    first = gpu.cusparselt(x, packed, None)
    # The operator is handed the same memory by other tensors, in a compiled model.
    again = NM.from_parts({n: t.detach() for n, t in packed.tensors().items()}, packed.scalars())
    assert torch.equal(gpu.cusparselt(x, again, None), first)
    assert len(library.weights) == 1
    packed.values.mul_(2)
    assert torch.equal(gpu.cusparselt(x, packed, None), 2 * first)
    assert len(library.weights) == 2
    assert len(semi._twins) == before + 1
    del packed, again
    gc.collect()
    assert len(semi._twins) == before


def test_while_a_graph_is_recorded_nothing_is_made_or_searched(
    library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed, x = weight(), torch.randn(300, 48).bfloat16()
    monkeypatch.setattr(semi, "_recording", lambda: True)
    expanded = gpu.cusparselt(x, packed, None)
    assert not library.weights
    monkeypatch.setattr(semi, "_recording", lambda: False)
    gpu.cusparselt(x[:64], packed, None)
    monkeypatch.setattr(semi, "_recording", lambda: True)
    torch.testing.assert_close(gpu.cusparselt(x, packed, None), expanded)
    assert library.plans[-1] == semi.UNTRIED
    assert library.searched == 1


def test_the_registry_names_it_from_64_rows_on(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "missing", list)
    kernels = tuple(
        k
        if k.name == "nm_cusparselt" or not k.name.startswith("nm_triton")
        else type(k)(**{**vars(k), "missing": list})
        for k in KERNELS
    )
    for tokens, dtype, layout, name in (
        (64, torch.bfloat16, "nm2:4", "nm_cusparselt"),
        (63, torch.bfloat16, "nm2:4", "nm_triton"),
        (64, torch.float32, "nm2:4", "nm_triton"),
        (64, torch.bfloat16, "nm4:8", "nm_triton"),
    ):
        problem = Problem("nm", 64, 64, tokens, dtype, "cuda", layout=layout)
        assert select(problem, kernels).name == name
    assert "serves nm1:4 and nm2:4, not an unknown pattern" in semi.unsupported("", torch.bfloat16, (64, 64), 64)


def test_lowering_says_what_the_second_form_takes(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    packed = weight(64, 64)
    with monkeypatch.context() as patch:
        patch.setattr(semi, "_type_of", lambda packed: "cpu")
        assert semi.held_bytes(packed) == 0, "on the CPU nothing is held twice"
        assert semi.linear(torch.randn(64, 64).bfloat16(), packed, None, NM.unpack) is None
    assert semi.held_bytes(packed) == 64 * 64 * 2 * 9 // 16
    assert semi.held_bytes(weight(dtype=torch.float32)) == 0
    model = torch.nn.Sequential(torch.nn.Linear(256, 512)).bfloat16()
    example = torch.randn(2, 256).bfloat16()
    passes = "magnitude(pattern='2:4'),freeze,lower(nm)"
    compiled = sparsec.compile(model, passes=passes, example_inputs=(example,))
    notes = compiled.sparsec.records[-1].notes
    said = "through cuSPARSELt, whose form of them takes 0.1 MB beside the packed one from the first such product on"
    assert any(said in note for note in notes), notes
    monkeypatch.setenv(semi.SWITCH, "0")
    assert semi.held_bytes(packed) == 0


def test_the_second_form_counts_as_memory_once_it_is_there(library: Library) -> None:
    module = SparseLinear(weight(64, 64))
    before = held(module).total
    gpu.cusparselt(torch.randn(63, 64).bfloat16(), module.packed, None)
    assert held(module).total == before
    gpu.cusparselt(torch.randn(64, 64).bfloat16(), module.packed, None)
    assert held(module).total == before + semi.held_bytes(module.packed)


def test_it_is_made_where_no_pool_of_this_thread_is_in_use(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    threads = []
    compress = library.compress
    monkeypatch.setattr(
        torch, "_cslt_compress", lambda dense: (threads.append(threading.get_ident()), compress(dense))[1]
    )
    gpu.cusparselt(torch.randn(64, 48).bfloat16(), weight(), None)
    assert len(threads) == 1
    assert threads[0] != threading.get_ident()


def test_weights_in_one_memory_are_told_apart(library: Library) -> None:
    a, b = weight(seed=1), weight(seed=2)
    both = {n: torch.stack([a.tensors()[n], b.tensors()[n]]) for n in a.tensors()}
    x = torch.randn(64, 48).bfloat16()
    for i, packed in enumerate((a, b)):
        view = NM.from_parts({n: t[i] for n, t in both.items()}, packed.scalars())
        for _ in range(2):
            assert torch.equal(gpu.cusparselt(x, view, None), gpu.cusparselt(x, packed, None))
    assert semi.beside(both["values"].untyped_storage()) == 2 * semi.held_bytes(a)


def test_a_form_that_is_made_anew_lies_where_the_old_one_did(library: Library) -> None:
    """A recorded graph goes on to read it there."""
    packed, x = weight(), torch.randn(64, 48).bfloat16()
    addresses = []
    for _ in range(2):
        gpu.cusparselt(x, packed, None)
        ((_, found),) = semi._twins[packed.values.untyped_storage()].values()
        addresses.append(found.data_ptr())
        packed.index.add_(0)
    assert len(library.weights) == 2
    assert addresses[0] == addresses[1]


def test_no_room_is_no_refusal_and_a_dead_device_no_way_on(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    packed, x = weight(), torch.randn(64, 48).bfloat16()
    expanded = x.double() @ packed.unpack().double().t()
    for error in (torch.OutOfMemoryError("full"), torch.AcceleratorError("illegal access")):

        def fails(dense: Tensor, error: Exception = error) -> Tensor:
            raise error

        with monkeypatch.context() as patch:
            patch.setattr(torch, "_cslt_compress", fails)
            if isinstance(error, torch.OutOfMemoryError):
                with pytest.warns(RuntimeWarning, match="no room for cuSPARSELt's form of a 2:4 weight"):
                    out = gpu.cusparselt(x, packed, None)
                assert bool(((out.double() - expanded).abs() <= tolerance(x, packed.unpack(), None)).all())
            else:
                with pytest.raises(torch.AcceleratorError):
                    gpu.cusparselt(x, packed, None)
        assert semi.missing() == []
    gpu.cusparselt(x, packed, None)
    assert len(library.weights) == 1


def test_a_product_that_fails_at_other_rows_is_expanded(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    packed, x = weight(), torch.randn(200, 48).bfloat16()
    first = gpu.cusparselt(x[:64], packed, None)

    def fails(*args: object, **options: object) -> Tensor:
        raise RuntimeError("operation not supported")

    monkeypatch.setattr(torch, "_cslt_sparse_mm", fails)
    with pytest.warns(RuntimeWarning, match="nm2:4 of 32x48, 200 rows: operation not supported"):
        out = gpu.cusparselt(x, packed, None)
    torch.testing.assert_close(out[:64], first)
    assert semi.beside(packed.values.untyped_storage()) > 0, "a recorded graph may still read it"


def test_a_calibration_knows_both_ways_of_many_rows(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "missing", list)
    kernels = tuple(
        type(k)(**{**vars(k), "missing": list}) if k.name == "nm_triton" else k for k in KERNELS if k.format == "nm"
    )
    monkeypatch.setattr(measure_gpu, "known", lambda: kernels)
    layouts = (Layout.parse("nm2:4"),)
    sizes = measure_gpu.Sizes(layouts=layouts, rotate_bytes=1, again=1)
    found = {}
    for rows in (1, 64):
        x = torch.randn(rows, 64).bfloat16()
        trials = measure_gpu._trials((32, 64), 0.5, x, False, sizes, torch.Generator().manual_seed(0))
        found[rows] = [name for name, *_ in trials]
    assert found == {1: ["dense_torch", "nm_triton"], 64: ["dense_torch", "nm_cusparselt", "nm_triton"]}
    assert semi.missing() == []
