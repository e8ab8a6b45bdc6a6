"""A compiled model that is moved to another kind of device is laid out for it, and its graph with it."""

from __future__ import annotations

import copy
import weakref

import pytest
import torch
from torch import Tensor, nn

import sparsec
from sparsec.errors import FormatError
from sparsec.formats.layout import Layout
from sparsec.formats.parts import unflatten
from sparsec.ir.verifier import problems
from sparsec.kernels import SparseLinear
from sparsec.kernels.dense import native_serves
from sparsec.lowering import use_dense_kernel


class Model(nn.Module):
    """Two linears of one value, and one that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(64, 48)
        self.b = nn.Linear(64, 32, bias=False)
        self.c = nn.Linear(80, 16)

    def forward(self, x: Tensor) -> Tensor:
        """x: [rows, 64]."""
        joined = torch.cat([self.a(x), self.b(x)], -1)
        return self.c(joined) + self.c(torch.relu(joined))


def lay_out(model: nn.Module, device: str) -> None:
    """As `.to(device)` does at its end, with no such device at hand."""
    for module in model.modules():
        if isinstance(module, SparseLinear):
            module.lay_out(device)


def formats(model: nn.Module) -> list[str]:
    return [w.packed.describe() for w in model.sparsec.kept.weights.values() if w.packed is not None]


@pytest.mark.parametrize("spec", ["lower(csr8)", "lower(csr)"])
@torch.no_grad()
def test_modules_and_graph_change_together_and_compute_the_same(spec: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 64)
    compiled = sparsec.compile(Model().eval(), passes=f"magnitude(0.5),freeze,{spec}", example_inputs=(x,))
    graph, expected = compiled.sparsec.kept, compiled(x)
    before = formats(compiled)
    kept = [w.nnz for w in graph.weights.values() if w.packed is not None]
    old = weakref.ref(graph.weights["a.weight"].packed.values)
    for device, kernel in (("cuda", "wcsr_"), ("cpu", "csr_")):
        lay_out(compiled, device)
        torch.testing.assert_close(compiled(x), expected)
        torch.testing.assert_close(graph.run(x), expected)
        assert problems(graph) == []
        assert all(f.startswith("wcsr" if device == "cuda" else "csr") for f in formats(compiled))
        assert [w.nnz for w in graph.weights.values() if w.packed is not None] == kept
        assert all(op.kernel.startswith(kernel) for op in graph.ops.values() if op.kind == "sparse_linear")
        # One set of tensors: nothing is held twice, and what was there before is gone.
        for name in ("a", "b", "c"):
            packed, module = graph.weights[f"{name}.weight"].packed, compiled.get_submodule(name)
            assert all(module.get_buffer(part) is tensor for part, tensor in packed.tensors().items())
            assert {n for n, _ in module.named_buffers()} == set(packed.tensors())
            held = {n for n, _ in graph.module.named_buffers() if n.startswith(f"{name}.")}
            assert held == {f"{name}.{part}" for part in packed.tensors()}
        assert old() is None
    assert formats(compiled) == before


@torch.no_grad()
def test_a_copy_is_laid_out_without_touching_the_original() -> None:
    x = torch.randn(3, 64)
    compiled = sparsec.compile(Model().eval(), passes="magnitude(0.5),freeze,lower(csr)", example_inputs=(x,))
    expected, before = compiled(x), formats(compiled)
    twin = copy.deepcopy(compiled)
    assert copy.deepcopy(compiled.a).follow is None
    lay_out(twin, "cuda")
    torch.testing.assert_close(twin(x), expected)
    torch.testing.assert_close(twin.sparsec.kept.run(x), expected)
    assert all(f.startswith("wcsr") for f in formats(twin))
    assert problems(twin.sparsec.kept) == []
    assert twin.sparsec.kept.weights["a.weight"].packed.values is twin.a.values
    assert formats(compiled) == before
    assert torch.equal(compiled(x), expected)


@torch.no_grad()
def test_modules_of_one_weight_share_what_the_first_one_made() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(16, 16, bias=False), nn.Linear(16, 16)
            self.b.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.relu(self.a(x)))

    x = torch.randn(3, 16)
    compiled = sparsec.compile(Tied().eval(), passes="magnitude(0.5),freeze,lower(csr)", example_inputs=(x,))
    expected = compiled(x)
    lay_out(compiled, "cuda")
    assert compiled.a.values is compiled.b.values
    torch.testing.assert_close(compiled(x), expected)


def test_meta_tensors_are_left_as_they_are() -> None:
    packed = sparsec.formats.CSR.pack(torch.randn(4, 8), torch.rand(4, 8) < 0.5)
    module = SparseLinear(packed).to("meta")
    assert module.format == "csr"


@torch.no_grad()
def test_a_part_of_a_fused_product_is_laid_out_too() -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 64)
    compiled = sparsec.compile(Model().eval(), passes="magnitude(0.5),freeze,fuse,lower(csr)", example_inputs=(x,))
    graph, expected = compiled.sparsec.kept, compiled(x)
    (fused,) = (op for op in graph.ops.values() if op.members)
    lay_out(compiled, "cuda")
    torch.testing.assert_close(compiled(x), expected)  # where the CPU's library knows no such part, each for itself
    assert problems(graph) == []
    _, tensors, layout = graph.node(fused.node).args
    parts = unflatten(tensors, layout)
    assert [part.format for part in parts] == ["wcsr", "wcsr"]
    assert [len(part.tensors) for part in parts] == [4, 4]
    assert [part.bias is not None for part in parts] == [True, False]
    lay_out(compiled, "cpu")
    torch.testing.assert_close(graph.run(x), expected)
    assert problems(graph) == []


@torch.no_grad()
def test_dense_products_are_torchs_own_on_another_device() -> None:
    """Regression: the report after `.to("cuda")` named the CPU's dense kernel."""
    compiled = sparsec.compile(Model().eval(), passes="fuse", example_inputs=(torch.randn(5, 64),))
    graph = compiled.sparsec.kept
    use_dense_kernel(graph, "a.weight", "dense_cpu")
    (fused,) = (op.node for op in graph.ops.values() if op.members)
    here = {"dense_cpu" if native_serves("dense_linear") else "dense_torch", None}
    for device, kernels in (("cpu", here), ("meta", {"dense_torch", None})):
        compiled.to(device)
        compiled.sparsec.report()
        assert set(graph.ops[fused].member_kernels) == kernels


@pytest.mark.parametrize("layout", ["csr8", "csr16", "csr32"])
def test_a_layout_comes_back_as_what_it_was(layout: str) -> None:
    """Regression: csr32 came back as csr16."""
    linear = SparseLinear(Layout.parse(layout).pack(torch.randn(6, 40), torch.rand(6, 40) > 0.5))
    for device in ("cuda", "cpu"):
        linear.lay_out(device)
    assert linear.packed.describe() == layout


def test_a_type_that_a_format_cannot_hold_is_said_at_the_conversion() -> None:
    """Regression: it was said at the next call, by which time every layer was converted."""
    linear = SparseLinear(Layout.parse("bitmap").pack(torch.randn(6, 40), torch.rand(6, 40) > 0.5))
    linear.path = "mlp.up"
    with pytest.raises(FormatError, match=r"mlp.up: .*float64.*lower\(csr\)"):
        linear.double()
    assert linear.to(torch.bfloat16).packed.dtype == torch.bfloat16
    assert (
        SparseLinear(Layout.parse("csr").pack(torch.randn(6, 40), torch.rand(6, 40) > 0.5)).double().packed.check()
        is None
    )
