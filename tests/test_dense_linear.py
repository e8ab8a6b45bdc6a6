"""DenseLinear is the nn.Linear it takes the place of, faster: same Parameters, same state, same gradients, same refusals."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from architectures import tiny_model
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import linear
from traces import traced as trace

import sparsec
from sparsec.errors import KernelError
from sparsec.ir.verifier import problems
from sparsec.kernels import tolerance
from sparsec.kernels.dense import check_dense_call, dense_linear
from sparsec.kernels.modules import dense_linear as module_file
from sparsec.kernels.modules.dense_linear import DenseLinear
from sparsec.lowering import setting
from sparsec.lowering.dense import no_dense_kernel


def within(out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    exact = linear(x.double(), weight.double(), None if bias is None else bias.double())
    return bool(((out.double() - exact).abs() <= tolerance(x, weight, bias)).all())


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[torch.dtype]:
    """The dtype of every product that the operator computes, whatever the native library has."""
    seen: list[torch.dtype] = []

    def counted(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        seen.append(x.dtype)
        return dense_linear(x, weight, bias)

    monkeypatch.setattr(module_file, "native_serves", lambda name: True)
    monkeypatch.setattr(module_file, "dense_linear", counted)
    return seen


@given(
    st.integers(0, 40), st.integers(1, 70), st.integers(1, 40), st.booleans(),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
)  # fmt: skip
def test_products_are_right_for_every_shape_and_dtype(
    rows: int, in_features: int, out_features: int, bias: bool, dtype: torch.dtype
) -> None:
    module = DenseLinear(nn.Linear(in_features, out_features, bias=bias, dtype=dtype))
    x = torch.randn(rows, in_features, dtype=dtype)
    with torch.no_grad():
        assert within(module(x), x, module.weight, module.bias)


def test_parameters_are_shared_and_the_module_is_a_linear() -> None:
    original = nn.Linear(6, 5)
    module = DenseLinear(original)
    assert isinstance(module, nn.Linear)
    assert module.weight is original.weight
    assert module.bias is original.bias
    assert list(module.state_dict()) == list(original.state_dict())
    assert (module.in_features, module.out_features) == (6, 5)


def test_it_follows_its_parameters_through_copies_moves_and_loads(products) -> None:
    module, x = DenseLinear(nn.Linear(6, 5)), torch.randn(2, 6)
    with torch.no_grad():
        for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
            twin.weight.mul_(-2)
            torch.testing.assert_close(twin(x), linear(x, -2 * module.weight, module.bias))
        module.weight = nn.Parameter(torch.randn(5, 6))
        torch.testing.assert_close(module(x), linear(x, module.weight, module.bias))
        module.to(torch.bfloat16)
        assert module(x.bfloat16()).dtype == torch.bfloat16
    assert products == [torch.float32] * 3 + [torch.bfloat16]


def test_gradients_autocast_and_other_types_are_torchs_own(products) -> None:
    module, x = DenseLinear(nn.Linear(6, 5)), torch.randn(2, 6, requires_grad=True)
    module(x).square().sum().backward()
    expected = torch.autograd.grad(
        linear(x, module.weight, module.bias).square().sum(), (x, module.weight, module.bias)
    )
    torch.testing.assert_close((x.grad, module.weight.grad, module.bias.grad), expected)
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            assert module(x).dtype == torch.bfloat16
        assert module.double()(x.double()).dtype == torch.float64
        assert module.to("meta")(x.to("meta").double()).shape == (2, 5)
    assert products == []


def test_gradients_of_the_operator_are_those_of_a_linear() -> None:
    leaves = [torch.randn(2, 6), torch.randn(5, 6), torch.randn(5)]
    grads = []
    for function in (dense_linear, linear):
        own = [leaf.clone().requires_grad_() for leaf in leaves]
        function(*own).square().sum().backward()
        grads.append([leaf.grad for leaf in own])
    torch.testing.assert_close(*grads)
    for asked in (False, True):
        torch.library.opcheck(dense_linear, tuple(leaf.clone().requires_grad_(asked) for leaf in leaves))


def test_an_x_that_does_not_fit_is_refused_by_name(products) -> None:
    module = DenseLinear(nn.Linear(6, 5))
    with torch.no_grad():
        with pytest.raises(KernelError, match=r"^dense_linear: x must be \[..., in_features=6\], got \[2, 7\]"):
            module(torch.randn(2, 7))
        with pytest.raises(KernelError, match=r"^dense_linear: x must have the dtype of the weights"):
            module(torch.randn(2, 6, dtype=torch.bfloat16))
        with pytest.raises(KernelError, match=r"stored row by row, got shape \[6, 5\].*call \.contiguous\(\)"):
            check_dense_call(torch.randn(2, 5), torch.randn(5, 6).t(), None)


def test_torch_compile_and_export_see_a_plain_linear() -> None:
    torch.compiler.reset()
    module, x = DenseLinear(nn.Linear(6, 5)), torch.randn(2, 6)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(module, backend="aot_eager", fullgraph=True)(x), module(x))
        program = torch.export.export(module, (x,), strict=False)
    assert [n.target for n in program.graph.nodes if n.op == "call_function"] == [torch.ops.aten.linear.default]


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the native library had a dense kernel, whether or not it was built."""
    monkeypatch.setattr(setting, "native_serves", lambda name: True)


@pytest.mark.parametrize("spec", ["lower(dense)", "fuse,lower(dense)"])
def test_a_model_with_dense_kernels_only_is_the_model_it_was(spec: str, tmp_path, served) -> None:
    model, call = tiny_model("llama")
    model.lm_head.weight = model.model.embed_tokens.weight
    model.config.tie_word_embeddings = True
    compiled = sparsec.compile(model, spec, verify="probe")
    graph = compiled.sparsec.graph
    assert problems(graph, recompute=True) == []
    assert type(compiled.lm_head) is DenseLinear
    assert type(compiled.model.layers[0].self_attn.o_proj) is DenseLinear
    assert compiled.lm_head.weight is compiled.model.embed_tokens.weight
    assert compiled.state_dict().keys() == model.state_dict().keys()
    inputs = call(2, 6)
    with torch.no_grad():
        result = compiled(**inputs).logits
        torch.testing.assert_close(result, model(**inputs).logits, rtol=1e-3, atol=1e-5)
        assert torch.equal(result, graph.run(**inputs).logits)
    assert {op.kind for op in graph.ops.values() if op.matrices and op.group == "mlp"} == (
        {"linear", "fused_linear"} if "fuse" in spec else {"linear"}
    )
    assert all(
        op.kernel_of(name) == "dense_cpu" for op in graph.ops.values() if "linear" in op.kind for name in op.matrices
    )
    assert [(op.kind, op.owner) for op in trace(compiled).ops.values()] == [
        (op.kind, op.owner) for op in graph.ops.values()
    ]
    compiled.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(loaded(**inputs).logits, model(**inputs).logits, rtol=1e-3, atol=1e-5)


def test_lower_dense_needs_no_mask_and_serves_a_masked_weight_as_it_is(served) -> None:
    model, call = tiny_model("llama")
    compiled = sparsec.compile(model, "magnitude(0.5),freeze,sparsity,lower(dense)", verify="probe")
    graph = compiled.sparsec.graph
    assert {op.kernel for op in graph.ops.values() if op.kind == "linear"} == {"dense_cpu"}
    rows = [row for row in compiled.sparsec.report().layers if graph.is_linear(row.name)]
    assert {row.format for row in rows} == {"dense"}
    assert 0.4 < sum(row.parameters - row.nnz for row in rows) / sum(row.parameters for row in rows) < 0.6
    pruned = sparsec.compile(model, "magnitude(0.5),freeze")
    with torch.no_grad():
        torch.testing.assert_close(compiled(**call(2, 6)).logits, pruned(**call(2, 6)).logits, rtol=1e-3, atol=1e-5)
    mixed = sparsec.compile(model, "magnitude(0.5),freeze,lower(csr, targets=mlp),lower(dense)", verify="facts")
    kernels = {op.group: op.kernel for op in mixed.sparsec.graph.ops.values() if op.kernel}
    assert kernels["mlp"].startswith("csr")
    assert kernels["attention"] == "dense_cpu"


def test_lower_dense_says_which_weights_torch_goes_on_to_serve_and_why() -> None:
    model, _ = tiny_model("gpt2")
    record = sparsec.compile(model, "lower(dense, targets=mlp)").sparsec.records[-1]
    assert record.summary.startswith("0 of ")
    assert not record.changed
    assert len(record.notes) == 1
    assert ": torch's kernel serves them, since " in record.notes[0]
    double = nn.Sequential(nn.Linear(6, 6)).double()
    in_double = sparsec.compile(double, "lower(dense)", example_inputs=torch.ones(2, 6).double())
    assert "does not serve float64" in in_double.sparsec.records[-1].notes[0]


def test_what_cannot_have_the_dense_kernel_says_why() -> None:
    model, _ = tiny_model("gpt2")
    graph = trace(model)
    reasons = {w.name: no_dense_kernel(graph, w.name) for w in graph.weights.values()}
    assert reasons["transformer.h.0.attn.c_attn.weight"] == "it is stored as [in, out] (conv1d)"
    assert reasons["transformer.ln_f.weight"] == "no product multiplies by it"
    turned = nn.Sequential(nn.Linear(6, 6))
    turned[0].weight = nn.Parameter(torch.randn(6, 6).t())
    assert "rows do not lie" in no_dense_kernel(trace(turned, torch.randn(2, 6)), "0.weight")
