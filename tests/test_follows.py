"""The graph of a compiled model follows it: moved, converted, or with other tensors in it, whoever asks and however often."""

from __future__ import annotations

import gc

import pytest
import torch
from architectures import tiny_model
from torch import Tensor, nn

import sparsec
from sparsec.ir.verifier import problems, snapshot


class Scaled(nn.Module):
    """A linear, a buffer, and a constant that no state has."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 8)
        self.register_buffer("scale", torch.tensor(2.0))
        self.register_buffer("shift", torch.tensor([0.25]), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """x: [rows, 16]."""
        return self.down(torch.relu(self.up(x) * self.scale) + self.shift)


@pytest.mark.parametrize("passes", ["magnitude(0.5),freeze", "magnitude(0.5),freeze,fuse,lower(bitmap)"])
@torch.no_grad()
def test_buffers_example_and_records_follow_a_conversion(passes: str) -> None:
    x = torch.randn(3, 16)
    made = sparsec.compile(Scaled().eval(), passes, example_inputs=x)
    half = made.to(torch.bfloat16)
    graph = half.sparsec.graph
    assert {t.dtype for t in (*graph.module.buffers(), *graph.module.parameters()) if t.is_floating_point()} == {
        torch.bfloat16
    }
    assert all(own is half.get_buffer(name) for name, own in graph.module.named_buffers() if name in ("scale", "shift"))
    assert [t.dtype for t in graph.example] == [torch.bfloat16]
    assert {w.dtype for w in graph.weights.values()} == {torch.bfloat16}
    assert problems(graph) == []
    torch.testing.assert_close(graph.run(*graph.example), half(*graph.example))


@torch.no_grad()
@pytest.mark.parametrize("passes", ["magnitude(0.5),freeze", "magnitude(0.5),freeze,fuse,lower(bitmap)"])
def test_a_bias_that_is_taken_away_is_gone_from_the_graph_and_comes_back(passes: str) -> None:
    """Regression: the graph went on adding it."""
    x = torch.randn(3, 16)
    made = sparsec.compile(Scaled().eval(), passes, example_inputs=x)
    bias, made.down.bias = made.down.bias, None
    torch.testing.assert_close(made.sparsec.graph.run(x), made(x))
    assert "down.bias" in " ".join(made.sparsec.report().notes)
    made.down.bias = bias
    torch.testing.assert_close(made.sparsec.graph.run(x), made(x))


@torch.no_grad()
def test_extend_probes_a_model_that_was_converted_since() -> None:
    """Regression: the example that the probe runs on stayed in the old type."""
    made = sparsec.compile(Scaled().eval(), "magnitude(0.5)", example_inputs=torch.randn(3, 16)).to(torch.bfloat16)
    lowered = sparsec.extend(made, "freeze,lower(bitmap)", verify="probe")
    assert {w.packed.dtype for w in lowered.sparsec.graph.weights.values() if w.packed is not None} == {torch.bfloat16}


def test_a_report_changes_nothing() -> None:
    model, _ = tiny_model("llama")
    made = sparsec.compile(model, "magnitude(0.5),freeze,sparsity,flops,fuse,lower(bitmap)").to(torch.bfloat16)
    graph = made.sparsec.graph
    before, weights, ops = snapshot(graph), dict(graph.weights), dict(graph.ops)
    text = str(made.sparsec.report())
    assert str(made.sparsec.report()) == text
    assert snapshot(graph) == before
    assert made.sparsec.graph is graph
    assert all(graph.weights[name] is weight for name, weight in weights.items())
    assert all(graph.ops[name] is op for name, op in ops.items())


def test_a_snapshot_tells_a_tensor_from_another_at_its_address() -> None:
    """Regression: a new tensor may be given the id and the memory of one that is gone."""
    model = Scaled().eval()
    graph = sparsec.compile(model, "magnitude(0.5)", example_inputs=torch.randn(3, 16)).sparsec.graph
    for _ in range(20):
        before = snapshot(graph)
        assert snapshot(graph) == before
        values = graph.tensor("up.weight").detach().clone()
        graph.replace_tensor("up.weight", torch.empty(0))
        gc.collect(0)
        graph.replace_tensor("up.weight", values)
        assert snapshot(graph) != before


@torch.no_grad()
def test_a_buffer_of_another_shape_is_followed() -> None:
    x = torch.randn(3, 16)
    made = sparsec.compile(Scaled().eval(), "magnitude(0.5),freeze", example_inputs=x)
    made.scale = torch.linspace(0, 2, 32)
    torch.testing.assert_close(made.sparsec.graph.run(x), made(x))
