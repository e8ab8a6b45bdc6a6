"""Fused products in the graph: which linears become one, how that reads, and the operator itself."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from architectures import tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import linear
from traces import traced as trace

import sparsec
from sparsec.errors import FormatError, SelectionError
from sparsec.formats import CSR
from sparsec.formats.parts import Part, flatten, unflatten
from sparsec.ir.printer import graph_text
from sparsec.ir.verifier import problems
from sparsec.kernels import SparseLinear
from sparsec.kernels.fused import fused_linear
from sparsec.kernels.modules.dense_linear import DenseLinear
from sparsec.passes import Fuse
from sparsec.pipeline import Context, Pipeline
from sparsec.testing import check_pass


class Block(nn.Module):
    """`readers` linears of one value, their results added up and multiplied once more."""

    def __init__(self, readers: list[bool], in_features: int = 6, out_features: int = 5) -> None:
        super().__init__()
        self.readers = nn.ModuleList(nn.Linear(in_features, out_features, bias=bias) for bias in readers)
        self.last = nn.Linear(out_features, in_features)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(sum(reader(x) for reader in self.readers).relu())


@st.composite
def models(draw: st.DrawFn) -> tuple[nn.Module, Tensor]:
    sizes = draw(st.integers(1, 7)), draw(st.integers(1, 7))
    blocks = [
        Block(draw(st.lists(st.booleans(), min_size=1, max_size=4)), *sizes) for _ in range(draw(st.integers(1, 2)))
    ]
    return nn.Sequential(*blocks).eval(), torch.randn(*draw(st.sampled_from([(2,), (3, 2)])), sizes[0])


def members_of(graph: sparsec.Graph) -> list[tuple[str, ...]]:
    return [op.members for op in graph.ops.values() if op.members]


# ---- the pass ----


@settings(max_examples=8)
@given(models(), st.sampled_from(["", "magnitude(0.5)", "magnitude(0.5),freeze"]))
def test_linears_of_one_value_become_one_product(case: tuple[nn.Module, Tensor], after: str) -> None:
    model, x = case
    graph, record = check_pass(Fuse(), model, (x,), after=after)
    expected = [
        tuple(f"{b}.readers.{i}.weight" for i in range(len(block.readers)))
        for b, block in enumerate(model)
        if len(block.readers) > 1
    ]
    assert members_of(graph) == expected
    assert record.changed == bool(expected)
    assert problems(graph, recompute=True) == []


def test_a_fused_product_is_one_line_of_text() -> None:
    model = nn.Sequential(Block([True, False]))
    graph = trace(model, torch.randn(2, 6))
    spec = "magnitude(0.5, scope='layer'),freeze,fuse,sparsity,flops,lower(csr16, targets=('*.0',))"
    Pipeline.parse(spec).run(graph)
    (line,) = [line for line in graph_text(graph).splitlines() if "fused_linear" in line]
    assert line.replace("csr_cpu", "csr_reference") == (
        "%readers_0_0, %readers_0_1 = fused_linear(%expect_shape) @0.readers.0 + 1  # f32 [5x6] csr16[csr_reference] 50.0% zero + "
        "f32 [5x6] dense unstructured mask, frozen 50.0% zero, 60 FLOP/token, 234 B (dense 240 B)"
    )
    assert not any("getitem" in line for line in graph_text(graph).splitlines())


class Twice(Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.readers[0](x) + self.readers[1](x) + self.readers[0](x)


class Written(Block):
    def forward(self, x: Tensor) -> Tensor:
        x = x * 2
        first = self.readers[0](x)
        x.view(-1).add_(1)  # the second reader reads the same node of the graph, but another value
        return first + self.readers[1](x)


class Doubling(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def tied() -> nn.Module:
    model = Block([False, False, False])
    model.readers[1].weight = model.readers[0].weight
    return model


def own_forward() -> nn.Module:
    model = Block([True, True])
    model.readers[1] = Doubling(6, 5)
    return model


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: Twice([True, True]), "readers.0 is not fused .* multiplied by more than once"),
        (tied, "readers.0 is not fused .* multiplied by more than once"),
        (own_forward, "readers.1 is not fused .* with a forward of its own"),
        (lambda: Written([True, True]), None),
        (lambda: Block([True]), None),
    ],
)
def test_what_cannot_be_fused_is_left_alone_and_said(make: Callable[[], nn.Module], reason: str | None) -> None:
    model, x = make(), torch.randn(3, 6)
    compiled = sparsec.compile(model, "fuse", example_inputs=x, verify="probe")
    assert members_of(compiled.sparsec.graph) == []
    (record,) = compiled.sparsec.records
    assert not record.changed
    assert record.summary == "no two linears read the same value, so nothing was fused"
    if reason is not None:
        assert any(re.search(reason, note) for note in record.notes)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x))


def test_targets_and_ignore_choose_the_members() -> None:
    x = torch.randn(3, 6)
    for p in (Fuse(ignore=("readers.1",)), Fuse(targets=("readers.0", "readers.2"))):
        graph = trace(Block([True, True, True]), x)
        Pipeline((p,)).run(graph, Context())
        assert members_of(graph) == [("readers.0.weight", "readers.2.weight")]
    with pytest.raises(SelectionError, match="'reader' matches nothing"):
        Pipeline((Fuse(targets=("reader",)),)).run(trace(Block([True]), x))


def test_on_another_device_nothing_is_fused_and_that_is_said() -> None:
    graph = trace(Block([True, True]), torch.randn(3, 6))
    graph.module.to("meta")
    (record,) = Pipeline((Fuse(),)).run(graph)
    assert not record.changed
    assert record.notes == ("nothing on meta is fused: every product is a kernel of its own there",)


def test_the_verifier_sees_a_part_that_is_not_what_the_table_says() -> None:
    graph = trace(Block([True, True]), torch.randn(3, 6))
    Pipeline((Fuse(),)).run(graph)
    (op,) = (op for op in graph.ops.values() if op.members)
    node = graph.node(op.node)
    x, tensors, layout = node.args
    node.args = (x, [tensors[2], *tensors[1:]], layout)
    assert any("the part of readers.0.weight reads readers_1_weight" in p for p in problems(graph))
    node.args = (x, tensors[:-1], layout)
    assert any("needs 2 tensors from 2 on, got 1" in p for p in problems(graph))


# ---- the operator ----


def parts_of(*modules: nn.Module) -> tuple[list[Tensor], list[int]]:
    parts = [module.part() for module in modules]  # type: ignore[operator]
    return [t for tensors, _ in parts for t in tensors], [word for _, words in parts for word in words]


def test_gradients_of_the_operator_are_those_of_its_parts() -> None:
    weight, mask, bias = torch.randn(5, 6), torch.rand(5, 6) < 0.5, torch.randn(5)
    packed = CSR.pack(weight, mask)
    leaves = [torch.randn(3, 6), torch.randn(4, 6), bias]
    grads = []
    for fused in (True, False):
        x, dense, b = (leaf.clone().requires_grad_() for leaf in leaves)
        if fused:
            parts = [
                Part("csr", tuple(packed.tensors().values()), b, tuple(packed.scalars().values())),
                Part("dense", (dense,)),
            ]
            outputs = fused_linear(x, *flatten(parts))
        else:
            outputs = [linear(x, weight * mask, b), linear(x, dense)]
        sum(out.square().sum() for out in outputs).backward()
        grads.append((x.grad, dense.grad, b.grad))
    torch.testing.assert_close(*grads)


def test_the_operator_passes_torchs_own_checks() -> None:
    x, mask = torch.randn(3, 6), torch.rand(5, 6) < 0.5
    tensors, layout = parts_of(SparseLinear(CSR.pack(torch.randn(5, 6), mask)), DenseLinear(nn.Linear(6, 4)))
    for gradients in (False, True):
        given_x = x.clone().requires_grad_(gradients)
        torch.library.opcheck(fused_linear, (given_x, [t.detach() for t in tensors], layout))


@pytest.mark.parametrize(
    ("tensors", "layout", "words"),
    [
        (1, [99, 0], r"layout\[0\] must be the number of a format"),
        (1, [0, 2], "the second of them 0 or 1"),
        (1, [0], "needs 2 entries of layout"),
        (1, [0, 1], "needs 2 tensors from 0 on, got 1"),
        (2, [0, 0], "the layout's 1 parts have 1 tensors, got 2"),
    ],
)
def test_a_layout_that_does_not_fit_is_refused(tensors: int, layout: list[int], words: str) -> None:
    with pytest.raises(FormatError, match=words):
        unflatten([torch.randn(5, 6)] * tensors, layout)


def test_a_part_that_does_not_fit_x_is_refused_by_name() -> None:
    with pytest.raises(
        RuntimeError, match=r"_linear: x must be \[..., in_features=6\]"
    ):  # the library cannot raise KernelError
        fused_linear(torch.randn(3, 7), [torch.randn(5, 6)], [0, 0])


@settings(max_examples=12, deadline=None)
@given(
    at=st.integers(1, 5),
    architecture=st.sampled_from(["llama", "gpt2", "opt"]),
    last=st.sampled_from(["lower(bitmap)", "lower(auto, objective='bytes')", "lower(auto)"]),
)
def test_extend_ends_where_one_compile_does(at: int, architecture: str, last: str) -> None:
    """Wherever the passes are cut, after fuse too, whose dense parts are modules of sparsec by then."""
    model, call = tiny_model(architecture)
    whole = Pipeline.parse(f"magnitude(0.9),freeze,sparsity,flops,fuse,{last}")
    once = sparsec.compile(model, whole)
    twice = sparsec.extend(sparsec.compile(model, Pipeline(whole.passes[:at])), Pipeline(whole.passes[at:]))

    def state(compiled: sparsec.Compiled) -> dict[str, object]:
        return {w.name: (w.format, w.reason, w.nbytes) for w in compiled.graph.weights.values()}

    assert state(twice.sparsec) == state(once.sparsec)
    assert [type(m) for m in twice.modules()] == [type(m) for m in once.modules()]
    with torch.no_grad():
        torch.testing.assert_close(twice(**call(1, 5))[0], once(**call(1, 5))[0], rtol=0, atol=0)
