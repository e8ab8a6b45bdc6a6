"""The tracer on random plain modules: reused and tied linears, any nesting, with and without biases."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from sparsec.ir.tracer import trace

WIDTH = 4


@dataclass(frozen=True)
class Layer:
    """One step of a random module: a linear of its own, an earlier one again, or an own one that shares an earlier weight."""

    how: str  # "new", "again", "tied"
    bias: bool
    nested: bool
    pick: int  # of the earlier linears


class Random(nn.Module):
    """Runs its steps one after the other."""

    def __init__(self, layers: list[Layer]) -> None:
        super().__init__()
        self.order: list[str] = []
        for i, layer in enumerate(layers):
            made = list(dict.fromkeys(self.order))
            if layer.how == "again" and made:
                self.order.append(made[layer.pick % len(made)])
                continue
            linear = nn.Linear(WIDTH, WIDTH, bias=layer.bias)
            if layer.how == "tied" and made:
                linear.weight = self.linear(made[layer.pick % len(made)]).weight
            self.add_module(f"step{i}", nn.Sequential(nn.Tanh(), linear) if layer.nested else linear)
            self.order.append(f"step{i}.1" if layer.nested else f"step{i}")

    def linear(self, path: str) -> nn.Linear:
        """The linear at a path."""
        module = self.get_submodule(path)
        assert isinstance(module, nn.Linear)
        return module

    def forward(self, x: Tensor) -> Tensor:
        """x [batch, 4] -> [batch, 4]."""
        for path in self.order:
            x = self.get_submodule(path.split(".")[0])(x)
        return x


layers = st.builds(
    Layer,
    how=st.sampled_from(["new", "again", "tied"]),
    bias=st.booleans(),
    nested=st.booleans(),
    pick=st.integers(0, 7),
)


@settings(max_examples=20)
@given(steps=st.lists(layers, min_size=1, max_size=6), batch=st.integers(0, 5))
def test_random_modules_give_equal_graphs_and_true_tables(steps: list[Layer], batch: int) -> None:
    model = Random(steps).eval()
    graph = trace(model, torch.randn(3, WIDTH))
    x = torch.randn(batch, WIDTH)
    assert torch.equal(graph.run(x), model(x))
    assert torch.equal(graph.module(x), model(x))
    first = {id(p): name for name, p in model.named_parameters()}
    expected = []
    for path in model.order:
        linear = model.linear(path)
        bias = () if linear.bias is None else (first[id(linear.bias)],)
        expected.append((path, (first[id(linear.weight)], *bias)))
    assert [(op.owner, op.weights) for op in graph.ops.values() if op.kind == "linear"] == expected
    for name, weight in graph.weights.items():
        users = [path for path in model.order if name in dict(expected)[path]]
        assert weight.owners == tuple(dict.fromkeys(users))
        assert weight.kind == ("bias" if name.endswith("bias") else "linear")
        assert all(model.get_parameter(alias) is graph.tensor(name) for alias in weight.aliases)
    everything = dict(model.named_parameters(remove_duplicate=False))
    assert sum(1 + len(w.aliases) for w in graph.weights.values()) == len(everything)
