"""The backend "sparsec" of torch.compile: which calls become one, and that nothing else changes."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
import torch
from architectures import tiny_model
from format_cases import LAYOUTS
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch._dynamo.backends.registry import lookup_backend
from torch._inductor import config
from torch._inductor.utils import run_and_get_code
from torch.fx.experimental.proxy_tensor import make_fx

import sparsec
from sparsec.errors import CompileError
from sparsec.inductor import SLOT, FuseProducts
from sparsec.inductor import sparsec as backend
from sparsec.kernels import SparseLinear
from sparsec.kernels.fused import inference_linear, inference_single
from sparsec.kernels.modules.dense_linear import DenseLinear

KINDS = [*(layout for name, layout in LAYOUTS.items() if not name.startswith("wcsr")), None]
"""Every way to pack a matrix, and dense."""
WIDTH = math.lcm(*(layout.columns for layout in LAYOUTS.values()))


def member(kind: int, out_features: int, in_features: int, bias: bool, dtype: torch.dtype, seed: int) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    layout = KINDS[kind]
    if layout is not None:
        out_features = layout.fit(out_features, in_features)[0]
    b = torch.randn(out_features, generator=generator).to(dtype) if bias else None
    weight = torch.randn(out_features, in_features, generator=generator).to(dtype)
    if layout is None:
        linear = nn.Linear(in_features, out_features, bias=bias, dtype=dtype)
        linear.weight = nn.Parameter(weight, requires_grad=False)
        if b is not None:
            linear.bias = nn.Parameter(b, requires_grad=False)
        return DenseLinear(linear)
    mask = layout.legal(layout.mask(out_features, in_features, 0.5, generator))
    return SparseLinear(layout.pack(weight, mask), b)


def products(graph: fx.Graph) -> list[fx.Node]:
    return [n for n in graph.nodes if n.op == "call_function" and "sparsec" in str(n.target)]


@settings(max_examples=40, deadline=None)
@given(
    readers=st.lists(st.tuples(st.integers(0, len(KINDS) - 1), st.booleans(), st.booleans()), min_size=1, max_size=6),
    rows=st.integers(0, 3),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 99),
)
def test_calls_of_one_value_become_one_and_the_results_stay(readers, rows: int, dtype, seed: int) -> None:
    """readers: kind, bias, and which of two values each reads."""
    in_features = WIDTH
    modules = [member(kind, 20, in_features, bias, dtype, seed + i) for i, (kind, bias, _) in enumerate(readers)]

    def forward(x: Tensor, y: Tensor) -> list[Tensor]:
        return [m(y if other else x) for m, (_, _, other) in zip(modules, readers, strict=True)]

    x, y = torch.randn(2, rows, in_features).to(dtype)
    with torch.no_grad():
        expected = forward(x, y)
        traced = make_fx(forward)(x, y)
        # DenseLinear calls F.linear while make_fx traces: as under dynamo, it should be our operator.
        for node in list(traced.graph.nodes):
            if node.target is torch.ops.aten.linear.default:
                node.target, node.args = torch.ops.sparsec.dense_linear.default, (*node.args, None)[:3]
        before = len(products(traced.graph))
        FuseProducts()(traced.graph)
        traced.graph.lint()
        traced.recompile()
        found = traced(x, y)
    if before == len(readers):
        reading = Counter(other for _, _, other in readers)
        wanted = [inference_single if count == 1 else inference_linear for count in reading.values()]
        assert [n.target for n in products(traced.graph)] == wanted
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2 if dtype == torch.bfloat16 else 1e-4, atol=1e-2)


def test_a_weight_that_is_computed_later_stays_a_call_of_its_own() -> None:
    graph = fx.Graph()
    x, w = graph.placeholder("x"), graph.placeholder("w")
    dense = torch.ops.sparsec.dense_linear.default
    meta = {"val": torch.empty(1, 4, device="meta")}
    first = graph.call_function(dense, (x, w, None))
    late = graph.call_function(torch.ops.aten.mul.Tensor, (w, 2.0))
    second = graph.call_function(dense, (x, late, None))
    third = graph.call_function(dense, (x, w, None))
    for node in (first, second, third):
        node.meta.update(meta)
    graph.output((first, second, third))
    module = fx.GraphModule({}, graph)
    FuseProducts()(graph)
    graph.lint()
    module.recompile()
    assert [len(n.args[1]) for n in products(graph)] == [2, 1]
    a, b = torch.randn(1, 4), torch.randn(4, 4)
    for got, factor in zip(module(a, b), (1.0, 2.0, 1.0), strict=True):
        torch.testing.assert_close(got, factor * a @ b.T)


@pytest.mark.parametrize(
    "how",
    [{}, {"mode": "max-autotune-no-cudagraphs"}, {"options": {"cpp_wrapper": True}}],
    ids=["plain", "mode", "c++"],
)
def test_a_model_computes_what_it_did_in_one_call_for_each_value(how: dict[str, Any]) -> None:
    model, call = tiny_model("llama")
    compiled = sparsec.compile(model, "magnitude(0.5),freeze,fuse,lower(bitmap)")
    groups = [op for op in compiled.sparsec.graph.ops.values() if op.members]
    inputs = call(1, 12)  # more rows than a chain takes
    torch.compiler.reset()
    with torch.no_grad():
        expected = compiled(**inputs)[0]
        faster = torch.compile(compiled, backend="sparsec", **how)
        result, code = run_and_get_code(lambda: faster(**inputs)[0])
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-5)
    text = "".join(code)
    linears = sum(isinstance(m, SparseLinear) for m in compiled.modules())
    fused = linears - sum(len(op.members) - 1 for op in groups)
    assert groups
    calls = [text.count(f"torch.ops.sparsec.{name}.default(") for name in ("inference_linear", "inference_single")]
    if "options" not in how:  # in C++ the calls are written otherwise
        assert calls == [len(groups), fused - len(groups)]
    assert "bitmap_linear" not in text


def test_a_hook_that_writes_to_what_is_read_is_seen() -> None:
    """q and k read the same tensor object, which a hook of k writes to: not the same value."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k = (member(0, 16, 32, False, torch.float32, seed) for seed in (1, 2))

        def forward(self, x: Tensor) -> Tensor:
            x = x + 1
            return self.q(x) + self.k(x)

    module = Two().eval()
    module.k.register_forward_pre_hook(lambda m, args: (args[0].mul_(3.0),))
    x = torch.randn(2, 32)
    torch.compiler.reset()
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(module, backend="sparsec")(x), module(x))


def test_gradients_are_those_of_the_model() -> None:
    module = nn.Sequential(nn.Linear(32, 32), member(0, 16, 32, True, torch.float32, 1))
    module[1].bias.requires_grad_(True)
    x = torch.randn(3, 32)
    torch.compiler.reset()
    module(x).square().sum().backward()
    expected = [p.grad.clone() for p in module.parameters() if p.grad is not None]
    module.zero_grad()
    torch.compile(module, backend="sparsec")(x).square().sum().backward()
    found = [p.grad for p in module.parameters() if p.grad is not None]
    assert len(found) == len(expected) == 3
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_options_are_inductors_and_the_place_of_the_pass_is_taken() -> None:
    assert lookup_backend("sparsec") is backend  # known by its entry point
    module = member(0, 16, 32, False, torch.float32, 1)
    x = torch.randn(1, 32)
    torch.compiler.reset()
    seen = []

    class Spy(FuseProducts):
        def __call__(self, graph: fx.Graph) -> None:
            seen.append(config.max_fusion_size)

    with torch.no_grad():
        # Without inductor's cache on disk: from there a graph comes back that was compiled before, and no pass runs.
        options = {"max_fusion_size": 7, "post_grad_custom_post_pass": Spy(), "force_disable_caches": True}
        torch.compile(module, backend="sparsec", options=options)(x)
    assert seen == [7]
    with pytest.raises(CompileError, match=f"the option {SLOT} is taken"):
        backend(fx.symbolic_trace(nn.ReLU()), [x], options={SLOT: None})
