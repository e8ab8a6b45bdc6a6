"""A run of a graph that is finished from many places gives what whole runs give."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from architectures import VOCABULARY, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from traces import traced as trace

from sparsec.calibrate import Standing
from sparsec.calibrate.dataflow import writes
from sparsec.ir.graph import Graph

NAMES = ("llama", "gpt2", "mixtral", "bloom", "gemma2")


@cache
def graph_and_call(name: str) -> tuple[Graph, tuple[Tensor, ...]]:
    graph = trace(tiny_model(name)[0])
    ids = torch.randint(3, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(1))
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return graph, tuple(graph.bind((), {key: given[key] for key in graph.inputs}))


@settings(max_examples=20)
@given(st.sampled_from(NAMES), st.data())
@torch.no_grad()
def test_masking_a_later_weight_gives_what_a_whole_run_with_that_mask_gives(name: str, data: st.DataObject) -> None:
    graph, call = graph_and_call(name)
    names = [w for w in graph.weights if graph.prunable(w)]
    place = {op: i for i, op in enumerate(graph.ops)}
    chosen = data.draw(st.lists(st.sampled_from(names), min_size=1, max_size=5, unique=True))
    chosen.sort(key=lambda w: place[graph.ops_of(w)[0].node])
    standing = Standing(graph, call)
    assert torch.equal(standing.finish().logits, graph.run(*call).logits)
    for weight in chosen:
        standing.go(graph.ops_of(weight)[0].node)
        before = graph.weights[weight]
        graph.update(weight, mask=torch.rand(before.shape) < 0.5, frozen=False)
        try:
            changed = standing.finish().logits
            assert torch.equal(changed, graph.run(*call).logits)
            assert not torch.equal(changed, standing_dense(graph, call, weight, before))
        finally:
            graph.weights[weight] = before
    assert torch.equal(standing.finish().logits, graph.run(*call).logits), "no mask is left behind"


def standing_dense(graph: Graph, call: tuple[Tensor, ...], weight: str, before: object) -> Tensor:
    masked, graph.weights[weight] = graph.weights[weight], before
    try:
        return graph.run(*call).logits
    finally:
        graph.weights[weight] = masked


class Writing(nn.Module):
    """Writes to what an earlier layer made, after another one has read it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        z = self.second(y)
        y[:, 0] = z[:, 1]
        return y + z


@torch.no_grad()
def test_a_graph_that_writes_in_place_is_run_whole() -> None:
    x = torch.randn(3, 8)
    graph = trace(Writing(), x)
    assert any(writes(node) for node in graph.module.graph.nodes)
    standing = Standing(graph, (x,))
    expected = graph.run(x)
    for op in list(graph.ops.values()):
        standing.go(op.node)
        for _ in range(2):
            torch.testing.assert_close(standing.finish(), expected, rtol=0, atol=0)


class Turned(nn.Module):
    """Looks at a weight long before it is multiplied by."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        turned = self.second.weight.flip(0)
        return torch.relu(self.first(x)) @ turned


@torch.no_grad()
def test_a_view_of_a_weight_that_was_made_before_its_mask_is_made_anew() -> None:
    x = torch.randn(3, 8)
    graph = trace(Turned(), x)
    nodes = list(graph.module.graph.nodes)
    view = next(node for node in nodes if node.op == "call_function" and node.all_input_nodes[0].op == "get_attr")
    last = next(node for node in reversed(nodes) if node.op == "call_function")
    assert nodes.index(view) < nodes.index(last) - 1, "the view stands before other work"
    standing = Standing(graph, (x,))
    standing.go(last.name)
    graph.update("second.weight", mask=torch.rand(8, 8) < 0.5, frozen=False)
    torch.testing.assert_close(standing.finish(), graph.run(x), rtol=0, atol=0)


def test_what_is_dead_is_not_held() -> None:
    graph, call = graph_and_call("llama")
    standing = Standing(graph, call)
    last = [op for op in graph.ops.values() if op.weights and graph.is_linear(op.weights[0])][-1]
    with torch.no_grad():
        standing.go(last.node)
    held = [v for v in standing._values.values() if isinstance(v, Tensor) and v.numel() > 1]
    assert len(held) <= 3, [tuple(v.shape) for v in held]


def test_a_node_that_is_not_there_is_named() -> None:
    graph, call = graph_and_call("llama")
    with torch.no_grad(), pytest.raises(KeyError, match="nowhere"):
        Standing(graph, call).go("nowhere")
    ops = [op.node for op in graph.ops.values() if op.weights]
    standing = Standing(graph, call)
    with torch.no_grad():
        standing.go(ops[-1])
    with pytest.raises(KeyError, match="no node that is still ahead"):
        standing.go(ops[0])
