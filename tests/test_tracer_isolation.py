"""What a trace leaves as it was: the user's hooks, other threads, and names of any kind."""

from __future__ import annotations

import copy
import io
import logging
import threading
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.modules import module as torch_module

import sparsec
from sparsec.errors import TraceError
from sparsec.ir.printer import graph_text
from sparsec.ir.tracer import trace
from sparsec.kernels import SparseLinear

SPEC = "magnitude(0.5, targets='*'),freeze,sparsity,fuse,lower(csr)"


class Named(nn.Module):
    """A linear under any name, and one behind it."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.add_module(name, nn.Linear(8, 8))
        self.add_module("out", nn.Linear(8, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.relu(self._modules[self.name](x)))


AWKWARD = [
    "class",
    "None",
    "lambda",
    "self",
    "a b",
    "é漢",
    "1",
    "x",
    'a"b',
    "a'b",
    "\n",
    "\\",
    "@1",
    "a@1",
    "[0]",
    "{}",
    "%s",
]
names = st.sampled_from(AWKWARD) | st.text(st.characters(exclude_characters=".", exclude_categories=["Cs"]), min_size=1)


@settings(max_examples=25)
@given(name=names.filter(lambda name: name != "out" and not hasattr(nn.Module(), name) and name != "name"))
def test_a_module_may_have_any_name(name: str) -> None:
    x = torch.randn(3, 8)
    compiled = sparsec.compile(Named(name), SPEC, example_inputs=x)
    graph = compiled.sparsec.graph
    assert isinstance(compiled._modules[name], SparseLinear)
    assert [op.owner for op in graph.ops.values()] == [name, "out"]
    expected = compiled(x)
    assert torch.equal(graph.module(x), expected)
    assert torch.equal(copy.deepcopy(compiled).sparsec.graph.module(x), expected)
    assert len(graph_text(graph).splitlines()) == len([n for n in graph.module.graph.nodes if n.op != "get_attr"])
    assert str(compiled.sparsec.report())


def test_a_part_that_hides_behind_a_method_is_named() -> None:
    class Hidden(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.forward = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return x

    with pytest.raises(TraceError, match=r"its part 'forward' cannot be read by that name.*another name"):
        sparsec.compile(Hidden(), SPEC, example_inputs=torch.randn(3, 8))


def test_no_hook_of_the_user_sees_a_fake_tensor_and_all_run_afterwards() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    fakes: list[bool] = []

    def look(*given: Any, **named: Any) -> None:
        flat = [t for value in given for t in (value if isinstance(value, tuple) else (value,))]
        fakes.append(any(isinstance(t, FakeTensor) for t in flat))

    model[0].register_forward_hook(look)
    model[0].register_forward_pre_hook(look)
    model[2].register_full_backward_hook(look)
    of_all = [torch_module.register_module_forward_hook(look), torch_module.register_module_forward_pre_hook(look)]
    before = dict(torch_module._global_forward_hooks)
    try:
        graph = trace(model, torch.randn(3, 8))
        assert fakes == []
        assert torch_module._global_forward_hooks == before
        assert any("2 forward hooks (0) are no part of the graph" in note for note in graph.notes)
        compiled = sparsec.compile(model, SPEC, example_inputs=torch.randn(3, 8))
        fakes.clear()
        compiled(torch.randn(3, 8)).sum().backward()
    finally:
        for handle in of_all:
            handle.remove()
    assert len(fakes) == 2 + 1 + 2 * 4
    assert not any(fakes)


def test_models_are_compiled_from_several_threads_while_another_one_trains() -> None:
    """torch.export has state of the whole process; a product in another thread must not lose its gradients meanwhile."""
    torch.manual_seed(0)
    models = [nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)) for _ in range(3)]
    x = torch.randn(3, 8)
    alone = [sparsec.compile(model, SPEC, example_inputs=x)(x) for model in models]
    results: list[Any] = [None] * len(models)
    wrong: list[str] = []
    done = threading.Event()
    busy = sparsec.compile(models[0], SPEC, example_inputs=x)
    seen: list[int] = []
    busy[0].register_forward_hook(lambda *_: seen.append(1))

    def train() -> None:
        while not done.is_set():
            seen.clear()
            given = x.clone().requires_grad_()
            busy(given).sum().backward()
            if given.grad is None or not bool(given.grad.any()) or len(seen) != 1:
                wrong.append("no gradient, or a hook was left out")

    def compile_one(i: int) -> None:
        try:
            results[i] = sparsec.compile(models[i], SPEC, example_inputs=x)(x)
        except Exception as error:
            wrong.append(repr(error))

    trainer = threading.Thread(target=train)
    threads = [threading.Thread(target=compile_one, args=(i,)) for i in range(len(models))]
    for thread in (trainer, *threads):
        thread.start()
    for thread in threads:
        thread.join()
    done.set()
    trainer.join()
    assert wrong == []
    assert all(torch.equal(found, expected) for found, expected in zip(results, alone, strict=True))


class Broken(nn.Module):
    """Decides by values, and multiplies what does not fit: torch logs a traceback of the one, and prints a graph of the other."""

    def __init__(self, by_values: bool) -> None:
        super().__init__()
        self.by_values = by_values
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        if self.by_values and x.sum() > 0:
            return x
        return self.linear(x) @ torch.zeros(3, 5)


@pytest.mark.parametrize("by_values", [True, False])
def test_what_torch_says_of_a_rung_that_fails_stands_in_the_error_alone(by_values: bool, capfd: Any) -> None:
    """Regression: a page of tracebacks and graphs on stderr before the error."""
    log = io.StringIO()
    handler = logging.StreamHandler(log)
    torchs = logging.getLogger("torch._subclasses.fake_tensor")
    torchs.addHandler(handler)
    handlers = {h: list(h.filters) for h in (*torchs.handlers, *logging.root.handlers)}
    with pytest.raises(
        TraceError, match="Could not guard" if by_values else r"reduction dim.*\(at test_tracer_isolation\.py"
    ):
        trace(Broken(by_values), torch.randn(3, 8))
    assert capfd.readouterr() == ("", "")
    assert {h: list(h.filters) for h in handlers} == handlers
    assert "print" not in vars(torch.export._trace)
    torchs.error("still heard")
    torchs.removeHandler(handler)
    assert log.getvalue() == "still heard\n"


class ByKeyword(nn.Module):
    """Takes what it is given by name alone, or beside a first argument."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, **kwargs: Tensor) -> Tensor:
        return self.linear(kwargs["x"]) * kwargs["scale"]


class Beside(ByKeyword):
    def forward(self, x: Tensor, **kwargs: Tensor) -> Tensor:  # type: ignore[override]
        return self.linear(x) * kwargs["scale"]


@pytest.mark.parametrize("kind", [ByKeyword, Beside])
def test_a_forward_that_takes_keywords_is_traced_by_a_dict(kind: type[nn.Module]) -> None:
    """Regression: AssertionError('Must provide a tree_name') of torch.export, for every size."""
    model, inputs = kind(), {"x": torch.randn(3, 8), "scale": torch.randn(3, 8)}
    compiled = sparsec.compile(model, SPEC, example_inputs=inputs)
    assert compiled.sparsec.graph.rung == "dynamic"
    assert "forward" not in vars(model)
    assert isinstance(compiled.linear, SparseLinear)
    more = {name: torch.randn(5, 8) for name in inputs}
    torch.testing.assert_close(compiled(**more), compiled.sparsec.graph.run(**more))
    with pytest.raises(TraceError, match="does not take these example inputs"):
        trace(model, (torch.randn(3, 8), torch.randn(3, 8)))
