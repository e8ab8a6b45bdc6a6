"""Groups of modules that compute their products in one call: right in the model that runs, whatever is done around them."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import weakref

import pytest
import torch
from architectures import tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from programs import own_code
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.nn.utils import parametrize
from traces import traced as trace

import sparsec
from sparsec.errors import KernelError
from sparsec.formats import CSR
from sparsec.formats.parts import unflatten
from sparsec.kernels import SparseLinear
from sparsec.kernels.fused import fused_linear
from sparsec.kernels.modules import group
from sparsec.kernels.modules.dense_linear import DenseLinear
from sparsec.kernels.modules.group import Group, Grouped
from sparsec.testing import masked_twin

SPEC = "magnitude(0.4),freeze,sparsity,flops,fuse,lower(csr)"


def members_of(graph: sparsec.Graph) -> list[tuple[str, ...]]:
    return [op.members for op in graph.ops.values() if op.members]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Number of parts of every fused call that a group makes, whatever the native library has."""
    seen: list[int] = []

    def counted(x: Tensor, tensors: list[Tensor], layout: list[int]) -> list[Tensor]:
        seen.append(len(unflatten(tensors, layout)))
        return fused_linear(x, tensors, layout)

    monkeypatch.setattr(group, "native_serves", lambda name: True)
    for name in ("fused_linear", "inference_linear"):
        monkeypatch.setattr(group, name, counted)
    return seen


@pytest.mark.parametrize(
    ("name", "targets"),
    [("llama", ""), ("llama", ", targets=('*.0.*',)"), ("qwen2-moe", ""), ("bert", ", targets=('*.1.*',)")],
)
def test_graph_model_and_twin_agree_and_tracing_again_finds_the_same_products(calls, name: str, targets: str) -> None:
    model, call = tiny_model(name)
    compiled = sparsec.compile(model, SPEC.replace("lower(csr", "lower(csr" + targets), verify="probe")
    graph = compiled.sparsec.graph
    assert members_of(graph)
    inputs = call(2, 6)
    with torch.no_grad():
        result, expected, twin = compiled(**inputs)[0], graph.run(**inputs)[0], masked_twin(graph, model)(**inputs)[0]
    assert calls == [len(members) for members in members_of(graph)]
    assert torch.equal(result, expected)
    torch.testing.assert_close(result, twin, rtol=1e-3, atol=1e-5)
    again = trace(compiled)
    assert [(op.kind, op.owner, op.members) for op in again.ops.values()] == [
        (op.kind, op.owner, op.members) for op in graph.ops.values()
    ]
    rows = {row.name: row for row in compiled.sparsec.report().layers}
    for members in members_of(graph):
        for member in members:
            assert rows[member].flops_per_token == 2 * (
                graph.weights[member].nnz if rows[member].format != "dense" else rows[member].parameters
            )


class Siblings(nn.Module):
    """Two packed linears and a dense one in a group."""

    def __init__(self) -> None:
        super().__init__()
        packed = [CSR.pack(torch.randn(n, 6), torch.rand(n, 6) < 0.5) for n in (5, 4)]
        self.a, self.b = (SparseLinear(p, torch.randn(p.shape[0]) if i else None) for i, p in enumerate(packed))
        self.c = DenseLinear(nn.Linear(6, 3))
        shared = Group(3)
        for i, member in enumerate((self.a, self.b, self.c)):
            member.join(shared, i)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.a(x), self.b(x), self.c(x)


def alone(module: Grouped, x: Tensor) -> Tensor:
    return linear(x, module.weight, module.bias)  # type: ignore[attr-defined]


def right(module: Siblings, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(alone(m, x) for m in (module.a, module.b, module.c))  # type: ignore[return-value]


def held(module: Siblings) -> object:
    return module.a._group._slot.held


@torch.no_grad()
def test_one_call_serves_all_and_nothing_stays_behind(calls) -> None:
    module, x = Siblings(), torch.randn(2, 6)
    torch.testing.assert_close(module(x), right(module, x))
    assert calls == [3]
    assert held(module) is None


@torch.no_grad()
@pytest.mark.parametrize("change", ["write", "replace"])
def test_after_a_change_a_member_shares_again(calls, monkeypatch, change: str) -> None:
    """Who is replaced is asked when it comes for its result, and computes once by itself; who is written to before that."""
    module, x = Siblings(), torch.randn(2, 6)
    module(x)
    if change == "write":
        module.b.values.mul_(2)
    else:
        module.b.values = module.b.values * 2
    own = []
    monkeypatch.setattr(module.b, "_op", lambda *args, op=module.b._op: own.append(1) or op(*args))
    for _ in range(3):
        torch.testing.assert_close(module(x), right(module, x))
    assert own == [1] * (change == "replace")
    assert calls == [3] * 4


@torch.no_grad()
@pytest.mark.parametrize("tensor", ["values", "bias", "x"])
def test_between_two_members_other_memory_is_noticed(calls, tensor: str) -> None:
    """`.data = ` and `swap_tensors` change neither the tensor's identity nor, always, its version."""
    for swap in (False, True):
        module, x = Siblings(), torch.randn(2, 6)
        target = x if tensor == "x" else getattr(module.b, tensor)
        module.a(x)
        if swap and tensor != "x":  # a group knows x weakly, and such a tensor is not swapped
            torch.utils.swap_tensors(target, type(target)(target * 2))
        else:
            target.data = target * 2
        torch.testing.assert_close(module.b(x), alone(module.b, x))


@torch.no_grad()
def test_a_call_with_other_tensors_between_two_members_is_computed_with_them(calls) -> None:
    module, x = Siblings(), torch.randn(2, 6)
    module.a(x)
    doubled = torch.func.functional_call(module.b, {"values": module.b.values * 2, "bias": module.b.bias * 2}, (x,))
    torch.testing.assert_close(doubled, 2 * alone(module.b, x))


CHANGES = ["nothing", "write x", "write weight", "replace weight", "replace bias"]
episodes = st.tuples(
    st.sampled_from(CHANGES), st.sampled_from(CHANGES), st.permutations("abc"), st.integers(0, 1), st.integers(0, 1)
)


@settings(max_examples=60)
@given(st.lists(episodes, min_size=1, max_size=4))
def test_any_order_of_calls_and_changes_gives_each_module_its_own_product(
    steps: list[tuple[str, str, list[str], int, int]],
) -> None:
    """Each episode: a change, one member called, another change, the other members called; then the same in order."""
    module, xs = Siblings(), [torch.randn(2, 6), torch.randn(1, 6)]

    def change(what: str, which: int, x: Tensor) -> None:
        target = (module.a, module.b, module.c)[which]
        name = "weight" if target is module.c else "values"
        match what:
            case "write x":
                x.mul_(-2)
            case "write weight":
                getattr(target, name).add_(1)
            case "replace weight":
                old = getattr(target, name)
                setattr(target, name, nn.Parameter(old + 1) if name == "weight" else old + 1)
            case "replace bias":
                target.bias = None if target.bias is not None else nn.Parameter(torch.randn(target.out_features))

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(group, "native_serves", lambda name: True)
        for before, between, order, i, which in steps:
            for names in (list("abc"), order):
                change(before, which, xs[i])
                for at, name in enumerate(names):
                    member = getattr(module, name)
                    torch.testing.assert_close(member(xs[i]), alone(member, xs[i]))
                    if at == 0:
                        change(between, which + 1, xs[i])


@torch.no_grad()
@pytest.mark.parametrize("at", ["a", "b", "c"])
def test_a_member_whose_bias_is_computed_at_every_call_is_right(calls, at: str) -> None:
    module, x = Siblings(), torch.randn(2, 6)
    module.a.bias = nn.Parameter(torch.randn(5))
    module(x)
    member = getattr(module, at)
    parametrize.register_parametrization(member, "bias", nn.Tanh())
    for _ in range(2):
        torch.testing.assert_close(module(x), right(module, x))
        member.parametrizations.bias.original.add_(1)


@torch.no_grad()
def test_an_equal_tensor_is_not_the_same_tensor(calls) -> None:
    module, x = Siblings(), torch.randn(2, 6)
    module.a(x)
    y = x.clone()
    x.data.fill_(7)  # unseen by the version counter, and y is another object
    torch.testing.assert_close(module.b(y), alone(module.b, y))


@torch.no_grad()
def test_hooks_see_and_change_what_they_always_did(calls) -> None:
    module, x = Siblings(), torch.randn(2, 6)
    seen: list[Tensor] = []
    module.b.register_forward_pre_hook(lambda m, args: (args[0] + 1,))
    module.c.register_forward_hook(lambda m, args, out: seen.append(out))
    a, b, c = module(x)
    torch.testing.assert_close(b, alone(module.b, x + 1))
    torch.testing.assert_close((a, c), (alone(module.a, x), alone(module.c, x)))
    assert seen[0] is c
    module.a.register_forward_hook(lambda m, args, out: args[0].zero_().sum().item() or None)
    _, b, c = module(x)
    torch.testing.assert_close((b, c), (alone(module.b, x + 1), alone(module.c, x)))
    assert x.count_nonzero() == 0


@torch.no_grad()
def test_copies_compute_with_their_own_tensors(calls) -> None:
    module, x = Siblings(), torch.randn(2, 6)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        calls.clear()
        for tensor in (*twin.parameters(), twin.a.values, twin.b.values):
            tensor.mul_(-3)
        torch.testing.assert_close(twin(x), right(twin, x))
        torch.testing.assert_close(module(x), right(module, x))
        assert calls == [3, 3]
        assert twin.a._group is twin.b._group is not module.a._group
    calls.clear()
    leader, follower = copy.deepcopy(module.a), copy.copy(module.b)
    torch.testing.assert_close(leader(x), alone(module.a, x))
    assert calls == []
    assert follower._group is None
    module.a(x)
    replica = module.b._replicate_for_data_parallel()  # shares the group without having joined it
    replica._parameters["bias"] = module.b.bias
    replica._buffers["values"] = 2 * module.b.values
    torch.testing.assert_close(replica(x), alone(replica, x))
    module.a(x)
    torch.testing.assert_close(follower(x), alone(module.b, x))
    torch.testing.assert_close(module.b(x), alone(module.b, x))


@torch.no_grad()
def test_a_sibling_that_is_gone_moved_or_converted_leaves_the_others_right(calls) -> None:
    x = torch.randn(2, 6)
    for change in ("gone", "moved", "converted"):
        module = Siblings()
        if change == "gone":
            module.b = nn.Identity()
            gc.collect()
        else:
            module.b.to("meta" if change == "moved" else torch.float64)
        torch.testing.assert_close((module.a(x), module.c(x)), (alone(module.a, x), alone(module.c, x)))
        assert held(module) is None
        if change == "converted":
            torch.testing.assert_close(module.b(x.double()), alone(module.b, x.double()))
            with pytest.raises(KernelError, match="x must have the dtype of the weights"):
                module.b(x)


@torch.no_grad()
def test_results_that_nobody_takes_go_with_x(calls) -> None:
    module, x = Siblings(), torch.randn(2, 6)
    module.a(x)
    result = weakref.ref(held(module).results[1])
    assert result() is not None
    del x
    assert result() is None
    x = torch.randn(2, 6)
    torch.testing.assert_close(module.b(x), alone(module.b, x))


@torch.no_grad()
def test_threads_do_not_take_each_others_results(calls) -> None:
    module = Siblings()
    turns, wrong = threading.Barrier(4), []

    def work() -> None:
        with torch.no_grad():
            for _ in range(20):
                x = torch.randn(2, 6)
                a = module.a(x)
                turns.wait(60)
                if not (mine := held(module)) or mine.x() is not x:
                    wrong.append("another thread's results")
                turns.wait(60)
                found = (a, module.b(x), module.c(x))
                if not all(torch.allclose(f, e, atol=1e-5) for f, e in zip(found, right(module, x), strict=True)):
                    wrong.append(x)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert calls == [3] * 80


def test_gradients_inference_mode_and_autocast_use_own_products(calls) -> None:
    module = Siblings()
    x = torch.randn(2, 6, requires_grad=True)
    sum(out.sum() for out in module(x)).backward()
    expected = torch.autograd.grad(sum(out.sum() for out in right(module, x)), x)
    torch.testing.assert_close(x.grad, *expected)
    with torch.inference_mode():
        y = torch.randn(2, 6)
        first = module.a(y)
        y.add_(1)
        torch.testing.assert_close((first, module.b(y)), (alone(module.a, y - 1), alone(module.b, y)))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert module.c(x).dtype == torch.bfloat16
        module.a(x)
        assert module.c(x).dtype == torch.bfloat16
    assert calls == []


@torch.no_grad()
def test_torch_compile_computes_each_product_by_itself(calls) -> None:
    torch.compiler.reset()
    module, x = Siblings(), torch.randn(2, 6)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), right(module, x))
    assert calls == []


def test_generate_uses_the_groups_and_gives_the_tokens_of_the_dense_twin(calls) -> None:
    model, _ = tiny_model("llama")
    compiled = sparsec.compile(model, SPEC)
    ids = torch.tensor([[3, 8, 1, 4]])
    options = {"max_new_tokens": 6, "pad_token_id": 0, "do_sample": False}
    expected = masked_twin(compiled.sparsec.graph, model).generate(ids, **options)
    assert torch.equal(compiled.generate(ids, **options), expected)
    calls.clear()
    with own_code(compiled):  # of which a program serves all tokens but the first
        assert torch.equal(compiled.generate(ids, **options), expected)
    assert len(calls) == 4 * 6
