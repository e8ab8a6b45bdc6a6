"""SparseLinear behaves as a module should: moves, copies, pickles, loads, exports, compiles, differentiates."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from sparsec.errors import KernelError, WeightError
from sparsec.formats import CSR
from sparsec.kernels import SparseLinear, status
from sparsec.kernels.ops import OPERATORS


class Block(nn.Module):
    """A sparse linear inside another module, so that owners have a path."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        weight, mask = torch.randn(8, 12), torch.rand(8, 12) < 0.5
        self.proj = SparseLinear(CSR.pack(weight, mask), nn.Parameter(torch.randn(8)) if bias else None)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).relu()


def dense(block: nn.Module, x: Tensor) -> Tensor:
    assert isinstance(block.proj, SparseLinear)
    return nn.functional.linear(x, block.proj.weight, block.proj.bias).relu()


def same(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b)


def test_it_holds_the_packed_tensors_as_buffers_and_keeps_the_bias_parameter() -> None:
    packed = CSR.pack(torch.randn(8, 12), torch.rand(8, 12) < 0.5)
    bias = nn.Parameter(torch.randn(8))
    module = SparseLinear(packed, bias)
    assert module.bias is bias
    assert list(dict(module.named_buffers())) == ["values", "col_idx", "row_ptr"]
    assert module.values is packed.values
    assert module.packed.values is packed.values
    assert (module.in_features, module.out_features, module.format) == (12, 8, "csr")
    assert not isinstance(module, nn.Linear)


def test_a_dense_weight_can_be_read_and_not_written() -> None:
    weight, mask = torch.randn(8, 12), torch.rand(8, 12) < 0.5
    module = SparseLinear(CSR.pack(weight, mask))
    assert torch.equal(module.weight, torch.where(mask, weight, 0.0))
    with pytest.raises(WeightError):
        module.weight = torch.zeros(8, 12)


def test_its_text_tells_format_sparsity_and_kernel() -> None:
    mask = torch.zeros(8, 12, dtype=torch.bool)
    mask[:, ::2] = True
    text = repr(SparseLinear(CSR.pack(torch.randn(8, 12), mask)))
    assert text.startswith("SparseLinear(in_features=12, out_features=8, bias=False, csr16, 50.0% zero, csr_")


@pytest.mark.parametrize("bias", [torch.zeros(7), torch.zeros(8, dtype=torch.bfloat16)])
def test_a_bias_that_does_not_fit_is_refused(bias: Tensor) -> None:
    with pytest.raises(KernelError, match=r"bias must be torch.float32 \[8\]"):
        SparseLinear(CSR.pack(torch.randn(8, 12), torch.ones(8, 12, dtype=torch.bool)), bias)


def through_pickle(block: Block) -> Block:
    twin = pickle.loads(pickle.dumps(block))
    assert isinstance(twin, Block)
    return twin


def through_save(block: Block) -> Block:
    file = io.BytesIO()
    torch.save(block, file)
    file.seek(0)
    twin = torch.load(file, weights_only=False)
    assert isinstance(twin, Block)
    return twin


@pytest.mark.parametrize("copied", [copy.deepcopy, through_pickle, through_save])
def test_a_copy_is_equal_and_independent(copied: Callable[[Block], Block]) -> None:
    block, x = Block(), torch.randn(3, 12)
    twin = copied(block)
    assert torch.equal(twin(x), block(x))
    before = block(x)
    with torch.no_grad():
        twin.proj.values.zero_()
        twin.proj.bias.zero_()
    assert torch.equal(block(x), before)
    assert twin(x).count_nonzero() == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_to_dtype_converts_values_and_leaves_indices(dtype: torch.dtype) -> None:
    block = Block().to(dtype)
    assert block.proj.values.dtype == block.proj.bias.dtype == dtype
    assert (block.proj.col_idx.dtype, block.proj.row_ptr.dtype) == (torch.int16, torch.int32)
    x = torch.randn(3, 12, dtype=dtype)
    same(block(x), dense(block, x))


def test_to_meta_moves_every_tensor() -> None:
    block = Block().to("meta")
    assert {t.device.type for t in (*block.buffers(), *block.parameters())} == {"meta"}
    assert block(torch.empty(2, 3, 12, device="meta")).shape == (2, 3, 8)


@pytest.mark.parametrize("assign", [False, True])
def test_a_loaded_state_is_used_by_the_next_call(assign: bool) -> None:
    block, x = Block(), torch.randn(3, 12)
    block(x)
    other = copy.deepcopy(block)
    with torch.no_grad():
        other.proj.values.mul_(-2)
        other.proj.bias.add_(1)
    block.load_state_dict(other.state_dict(), assign=assign)
    assert torch.equal(block(x), other(x))


def test_an_assigned_state_reaches_everyone_who_shares_the_packed_tensors() -> None:
    """A compiled model's graph holds the same tensors; load_state_dict(assign=True) used to cut them apart."""
    packed = CSR.pack(torch.randn(8, 12), torch.rand(8, 12) < 0.5)
    block, tied = SparseLinear(packed), SparseLinear(packed)
    state = {name: tensor.clone() for name, tensor in block.state_dict().items()}
    state["values"] *= -2
    block.load_state_dict(state, assign=True)
    assert block.values is tied.values is packed.values
    assert packed.values.data_ptr() == state["values"].data_ptr()  # assigned, not copied
    x = torch.randn(3, 12)
    assert torch.equal(tied(x), block(x))
    same(block(x), nn.functional.linear(x, block.weight))


@pytest.mark.parametrize("gradients", [False, True])
def test_an_x_that_does_not_fit_is_refused_in_the_words_of_the_reference(gradients: bool) -> None:
    module = Block().proj
    with torch.set_grad_enabled(gradients):
        with pytest.raises(KernelError, match=r"^csr_linear: x must be \[..., in_features=12\], got \[2, 11\]"):
            module(torch.randn(2, 11))
        with pytest.raises(KernelError, match=r"^csr_linear: x must have the dtype of the weights, torch.float32, got"):
            module(torch.randn(2, 12, dtype=torch.float64))
        with pytest.raises(KernelError, match=r"^csr_linear: x and the packed weight must be on one device, got meta"):
            module(torch.randn(2, 12, device="meta"))


def test_a_refusal_that_only_the_native_library_knows_keeps_its_words() -> None:
    if not status().built:
        pytest.skip("needs the native library: only it looks at the end of row_ptr")
    module = Block().proj
    module(torch.randn(2, 12))
    module.row_ptr.numpy()[-1] += 1  # which no counter of versions sees
    with pytest.raises(KernelError, match=r"^csr_linear: the starts run from \d+ to \d+, the values hold \d+ entries$"):
        module(torch.randn(2, 12))


def test_a_failure_of_another_kind_is_not_renamed(monkeypatch: pytest.MonkeyPatch) -> None:
    module, x = Block().proj, torch.randn(2, 12)

    def out_of_memory(*_: object) -> Tensor:
        raise RuntimeError("not enough memory")

    monkeypatch.setattr(module, "_op", out_of_memory)
    with pytest.raises(RuntimeError, match=r"^not enough memory$") as caught:
        module(x)
    assert not isinstance(caught.value, KernelError)


def test_autocast_is_followed() -> None:
    """It used to end in a bare C++ error that named a source file."""
    model = nn.Sequential(nn.Linear(12, 12), Block())
    x = torch.randn(3, 12)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert model(x).dtype == torch.bfloat16
    assert model.to(torch.bfloat16)(x.to(torch.bfloat16)).dtype == torch.bfloat16


def test_functional_call_uses_the_given_bias() -> None:
    block, x = Block(), torch.randn(3, 12)
    out = torch.func.functional_call(block, {"proj.bias": torch.full((8,), 100.0)}, (x,))
    same(out, nn.functional.linear(x, block.proj.weight, torch.full((8,), 100.0)))


def test_gradients_equal_the_dense_ones() -> None:
    block = Block()
    x = torch.randn(2, 3, 12, requires_grad=True)
    for function in (block, lambda x: dense(block, x)):
        x.grad = block.proj.bias.grad = None
        function(x).square().sum().backward()
        grads = (x.grad, block.proj.bias.grad)
        if function is block:
            ours = grads
    for a, b in zip(ours, grads, strict=True):
        same(a, b)


def test_without_gradients_nothing_is_recorded() -> None:
    block, x = Block(), torch.randn(3, 12, requires_grad=True)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            out = block(x)
        assert out.grad_fn is None
        same(out, dense(block, x).detach())


def test_export_shows_one_operator_owned_by_the_module() -> None:
    block, x = Block().eval(), torch.randn(2, 3, 12)
    auto = torch.export.Dim.AUTO
    with torch.no_grad():
        program = torch.export.export(block, (x,), dynamic_shapes=({0: auto, 1: auto},), strict=False)
    nodes = [n for n in program.graph.nodes if n.op == "call_function"]
    assert [n.target for n in nodes] == [OPERATORS["csr"], torch.ops.aten.relu.default]
    owner_path, owner_class = list(nodes[0].meta["nn_module_stack"].values())[-1]
    assert owner_path == "proj"
    assert "SparseLinear" in str(owner_class)
    assert {s.target for s in program.graph_signature.input_specs if s.target} == {
        "proj.bias",
        "proj.values",
        "proj.col_idx",
        "proj.row_ptr",
    }
    module = program.module(check_guards=False)
    for shape in ((1, 1, 12), (5, 9, 12)):
        y = torch.randn(shape)
        assert torch.equal(module(y), block(y))


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_traced_graph_keeps_the_gradient(dynamic: bool) -> None:
    """The exported graph calls the operator itself, without SparseLinear's choice of path."""
    block, x = Block(), torch.randn(2, 3, 12)
    shapes = ({0: torch.export.Dim.AUTO},) if dynamic else None
    with torch.no_grad():
        module = torch.export.export(block, (x,), dynamic_shapes=shapes, strict=False).module(check_guards=False)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    module(a).square().sum().backward()
    dense(block, b).square().sum().backward()
    assert a.grad is not None
    assert b.grad is not None
    same(a.grad, b.grad)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile_needs_no_graph_break_and_keeps_gradients(backend: str) -> None:
    torch.compiler.reset()
    block = Block()
    compiled = torch.compile(block, backend=backend, fullgraph=True)
    with torch.no_grad():
        for rows in (1, 4):
            x = torch.randn(rows, 12)
            same(compiled(x), block(x))
    if backend == "inductor":
        return  # one build of C++ is enough; aot_eager has the same gradient
    a, b = (torch.ones(4, 12).requires_grad_() for _ in range(2))
    compiled(a).square().sum().backward()
    block(b).square().sum().backward()
    assert a.grad is not None
    assert b.grad is not None
    same(a.grad, b.grad)
