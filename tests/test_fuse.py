"""Fused products: found in the graph, right in the model that runs whatever is done around them."""

from __future__ import annotations

import copy
import gc
import pickle
import re
import threading
import weakref
from collections.abc import Callable

import pytest
import torch
from architectures import tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import linear

import sparsec
from sparsec.errors import FormatError, KernelError, SelectionError
from sparsec.formats import CSR
from sparsec.formats.parts import Part, flatten, unflatten
from sparsec.ir.printer import graph_text
from sparsec.ir.tracer import trace
from sparsec.ir.verifier import problems
from sparsec.kernels import SparseLinear, group
from sparsec.kernels.dense_linear import DenseLinear
from sparsec.kernels.fused import fused_linear
from sparsec.kernels.group import Group, Grouped
from sparsec.passes import Fuse
from sparsec.pipeline import Context, Pipeline
from sparsec.testing import check_pass, masked_twin

SPEC = "magnitude(0.4),freeze,sparsity,flops,fuse,lower(csr)"


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


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Number of parts of every fused call that a group makes, whatever the native library has."""
    seen: list[int] = []

    def counted(x: Tensor, tensors: list[Tensor], layout: list[int]) -> list[Tensor]:
        seen.append(len(unflatten(tensors, layout)))
        return fused_linear(x, tensors, layout)

    monkeypatch.setattr(group, "native_serves", lambda name: True)
    monkeypatch.setattr(group, "fused_linear", counted)
    return seen


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
    spec = "magnitude(0.5, scope='layer'),freeze,fuse,sparsity,flops,lower(csr, index_bits=16, targets=('*.0',))"
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
        (1, [9, 0], r"layout\[0\] must be the number of a format"),
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


# ---- the model that runs ----


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
    assert len(calls) == 4 * 6
