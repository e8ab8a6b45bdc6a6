"""Calibration: what the walk shows of every linear is what the model itself would show, block by block, and bad data is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache

import pytest
import torch
from architectures import CAUSAL_LMS, VOCABULARY, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from traces import traced as trace
from transformers.pytorch_utils import Conv1D

import sparsec
from sparsec.calibrate import CalibrationData, Site, Statistics, calibrate, samples, windows
from sparsec.calibrate.kept import Place
from sparsec.calibrate.sites import find_sites, spans_by_block
from sparsec.calibrate.walk import Walker
from sparsec.data import Text, load_text
from sparsec.data.tiny import byte_tokenizer
from sparsec.errors import ActivationError, DataError
from sparsec.ir.graph import Graph
from sparsec.pipeline.selection import select_weights
from sparsec.spill import Keep, Made

NAMES = [name for name in CAUSAL_LMS if name not in ("mamba",)]
LONG = 7


def tokens(sequences: int, length: int = LONG, seed: int = 0) -> Tensor:
    return torch.randint(3, VOCABULARY, (sequences, length), generator=torch.Generator().manual_seed(seed))


def chosen(graph: Graph) -> list[str]:
    return [w.name for w in select_weights(graph, None, ())]


def inputs_of_experts(module: nn.Module, hidden: Tensor, chosen: Tensor) -> Iterator[tuple[str, int, Tensor]]:
    """(parameter, expert, rows that its matrix is multiplied with), by the definition of such a layer."""
    for expert in range(module.gate_up_proj.shape[0]):
        rows = hidden[(chosen == expert).any(dim=-1)]
        gate, up = (rows @ module.gate_up_proj[expert].t()).chunk(2, dim=-1)
        yield "gate_up_proj", expert, rows
        yield "down_proj", expert, module.act_fn(gate) * up


@contextmanager
def seen_inputs(model: nn.Module) -> Iterator[dict[str, list[list[Tensor]]]]:
    """What every weight's matrices are multiplied with while the model runs: lists of one, or one for every expert."""
    seen: dict[str, list[list[Tensor]]] = {}
    names = {id(p): name for name, p in model.named_parameters()}
    handles = []

    def look_at_experts(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        for parameter, expert, rows in inputs_of_experts(module, args[0], args[1]):
            name = names[id(getattr(module, parameter))]
            lists = seen.setdefault(name, [[] for _ in range(module.gate_up_proj.shape[0])])
            lists[expert].append(rows.detach())

    for module in model.modules():
        if hasattr(module, "gate_up_proj") and isinstance(module.gate_up_proj, nn.Parameter):
            handles.append(module.register_forward_pre_hook(look_at_experts))
        if isinstance(module, nn.Linear | Conv1D) and id(module.weight) in names:
            name = names[id(module.weight)]
            handles.append(
                module.register_forward_pre_hook(
                    lambda m, args, name=name: seen.setdefault(name, [[]])[0].append(
                        args[0].detach().reshape(-1, args[0].shape[-1])
                    )
                )
            )
    yield seen
    for handle in handles:
        handle.remove()


def run_on(model: nn.Module, ids: Tensor) -> dict[str, list[Tensor]]:
    with seen_inputs(model) as seen, torch.no_grad():
        for row in ids:
            model(input_ids=row[None], attention_mask=torch.ones(1, len(row), dtype=torch.int64), use_cache=False)
    return {name: [torch.cat(parts) for parts in lists] for name, lists in seen.items()}


@cache
def traced_llama() -> tuple[nn.Module, Graph]:
    """Only to be read."""
    model, _ = tiny_model("llama")
    return model, trace(model)


def half(matrix: Tensor) -> Tensor:
    """A mask that takes a good part of a matrix away, by a rule that needs no statistics."""
    return (torch.arange(matrix.numel()).view(matrix.shape) * 7919 % 11) < 6


def looking(
    look: Callable[[Site, Sequence[Statistics]], object],
) -> tuple[Callable[[Site, Sequence[Statistics]], Made], Callable[[Site, Made], None]]:
    """For `calibrate`: what looks at the statistics, and does then what it wants to."""
    seen: dict[Site, Sequence[Statistics]] = {}

    def learn(site: Site, statistics: Sequence[Statistics]) -> Made:
        seen[site] = statistics
        return {}, {}

    return learn, lambda site, made: (look(site, seen.pop(site)), None)[1]


@pytest.mark.parametrize("name", NAMES)
def test_statistics_are_those_of_what_the_model_multiplies_its_weights_with(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sparsec.calibrate.data._TOKENS_PER_CALL", 2 * LONG)  # three calls of two sequences
    model, _ = tiny_model(name)
    ids = tokens(6)
    expected = run_on(model, ids)
    graph = trace(model)
    data = samples(graph, ids, "test")
    assert len(data.calls) == 3
    found: dict[str, Sequence[Statistics]] = {}
    look = looking(lambda s, t: found.update(dict.fromkeys(s.weights, t)))
    calibrate(graph, data, chosen(graph), *look, gram=True, feed="dense")
    assert set(found) == set(chosen(graph))
    assert ("moe" in name or name == "mixtral") == any(len(each) > 1 for each in found.values())
    for weight, each in found.items():
        for statistics, rows in zip(each, expected[weight], strict=True):
            x = rows.double()
            assert statistics.tokens == len(x)
            if len(x):
                torch.testing.assert_close(statistics.gram.double(), x.t() @ x, rtol=1e-4, atol=1e-4)
                torch.testing.assert_close(statistics.norms.double(), x.square().mean(0).sqrt(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("order", ["block", "true"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "qwen2-moe"])
def test_each_linear_sees_what_the_pruned_ones_before_it_make(
    name: str, order: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sparsec.calibrate.data._TOKENS_PER_CALL", 2 * LONG)
    model, _ = tiny_model(name)
    twin = copy.deepcopy(model)
    ids = tokens(4)
    graph = trace(model)
    blocks: dict[str, list[str]] = {}
    for op in graph.ops.values():
        for weight in op.matrices:
            if weight in chosen(graph):
                blocks.setdefault(op.block or "", []).append(weight)
    waiting: list[str] = []

    def prune(site: Site, found: Sequence[Statistics]) -> None:
        block = graph.ops_of(site.weights[0])[0].block or ""
        if order == "true" or not waiting or waiting[0] not in blocks[block]:
            for weight in waiting:  # the twin follows: what was pruned before this block, or before this linear
                twin.get_parameter(weight).data.mul_(half(twin.get_parameter(weight)))
            waiting.clear()
        expected = run_on(twin, ids)
        for weight in site.weights:
            for statistics, rows in zip(found, expected[weight], strict=True):
                if len(rows):
                    norms = rows.double().square().mean(0).sqrt()
                    torch.testing.assert_close(statistics.norms.double(), norms, rtol=1e-3, atol=1e-5)
            stored = graph.tensor(weight)
            graph.update(weight, mask=half(stored), pattern="unstructured")
            waiting.append(weight)

    calibrate(graph, samples(graph, ids, "test"), chosen(graph), *looking(prune), order=order)
    assert set(waiting) <= set(chosen(graph))
    assert all(graph.weights[w].mask is not None for w in chosen(graph))


def test_only_the_hidden_state_is_kept_between_two_blocks() -> None:
    model, _ = tiny_model("llama")
    graph = trace(model)
    walker = Walker(graph, samples(graph, tokens(3), "test"), find_sites(graph, chosen(graph)))
    spans = spans_by_block(find_sites(graph, chosen(graph)), walker.lives)
    assert [span.name for span in spans] == ["model.layers.0", "model.layers.1"]
    with torch.no_grad():
        walker.run(spans[0].start, spans[0].end, {}, keep=Place(Keep(), 1))
    assert [v.shape for v in walker.states[0].values()] == [(3, LONG, 32)]


def test_linears_of_one_value_share_their_statistics() -> None:
    model, _ = tiny_model("llama")
    graph = trace(model)
    sites = find_sites(graph, chosen(graph))
    names = [tuple(w.split(".")[-2] for w in site.weights) for site in sites[:4]]
    assert names == [("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",)]


def norms_and_inputs(
    model: nn.Module, graph: Graph, inputs: list[tuple[Tensor]], order: str
) -> tuple[dict[str, Tensor], dict[str, list[Tensor]]]:
    """By weight: the norms that calibration finds when nothing is pruned, and what the model multiplies it with."""
    found: dict[str, Tensor] = {}
    data = CalibrationData(tuple(inputs), "test")
    look = looking(lambda s, t: found.update(dict.fromkeys(s.weights, t[0].norms)))
    calibrate(graph, data, chosen(graph), *look, order=order)
    with seen_inputs(model) as seen, torch.no_grad():
        for (x,) in inputs:
            model(x)
    return found, {name: parts for name, (parts,) in seen.items()}


class Reused(nn.Module):
    """A linear that is called twice, and one that writes in place to what another reads."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)])

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.layers[0](x))
        x = x + self.layers[1](torch.tanh(self.layers[0](x)))
        y = x * 2
        y.add_(1.0)
        return self.layers[2](torch.sigmoid(y))


@pytest.mark.parametrize("order", ["block", "true"])
def test_a_linear_that_is_called_twice_sees_both_calls(order: str) -> None:
    torch.manual_seed(0)
    model = Reused().eval()
    inputs = [(torch.randn(5, 8),), (torch.randn(5, 8),)]
    graph = trace(model, inputs[0])
    found, seen = norms_and_inputs(model, graph, inputs, order)
    for weight, norms in found.items():
        x = torch.cat(seen[weight])
        torch.testing.assert_close(norms, x.square().mean(0).sqrt(), rtol=1e-4, atol=1e-6)


class Streams(nn.Module):
    """Two streams of one shape through three blocks; `write`: one is written to in place, and so is a sum that starts as zeros."""

    def __init__(self, write: bool) -> None:
        super().__init__()
        self.write = write
        self.layers = nn.ModuleList(nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)]) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x, y = x * 1.5, torch.tanh(x)
        seen = torch.zeros(5, 8)
        for first, second in self.layers:
            more = first(torch.sigmoid(y))
            x = x.add_(more) if self.write else x + more
            y = y + second(torch.tanh(x))
            seen = seen.add_(y) if self.write else seen + y
            y = (y + seen).view(5, 8)
        return x + y


@pytest.mark.parametrize("write", [True, False])
@pytest.mark.parametrize("order", ["block", "true"])
def test_values_of_several_streams_are_what_they_are_in_the_model_in_place_or_not(order: str, write: bool) -> None:
    torch.manual_seed(0)
    model = Streams(write).eval()
    inputs = [(torch.randn(5, 8),) for _ in range(3)]
    graph = trace(model, inputs[0])
    assert write == any(node.target is torch.ops.aten.add_.Tensor for node in graph.module.graph.nodes)
    found, seen = norms_and_inputs(model, graph, inputs, order)
    assert len(found) == 6
    for weight, norms in found.items():
        torch.testing.assert_close(norms, torch.cat(seen[weight]).square().mean(0).sqrt(), rtol=1e-4, atol=1e-6)


@settings(max_examples=25)
@given(lengths=st.lists(st.integers(2, 9), min_size=1, max_size=4), seed=st.integers(0, 99))
def test_sequences_of_any_lengths_count_token_by_token(lengths: list[int], seed: int) -> None:
    model, graph = traced_llama()
    rows = [tokens(1, n, seed + i)[0] for i, n in enumerate(lengths)]
    found: dict[str, Statistics] = {}
    data = samples(graph, rows, "test")
    look = looking(lambda s, t: found.update(dict.fromkeys(s.weights, t[0])))
    calibrate(graph, data, chosen(graph), *look, feed="dense")
    with seen_inputs(model) as seen, torch.no_grad():
        for row in rows:
            model(input_ids=row[None], use_cache=False)
    for weight, statistics in found.items():
        x = torch.cat(seen[weight][0])
        assert statistics.tokens == sum(lengths)
        torch.testing.assert_close(statistics.norms, x.square().mean(0).sqrt(), rtol=1e-4, atol=1e-6)


def test_a_model_that_takes_one_length_only_is_calibrated_at_that_length() -> None:
    model, _ = tiny_model("mamba")
    pruned = sparsec.compile(model, "wanda(0.5, targets='mlp'),freeze", calibration=tokens(2, 6))
    assert all(w.pruned is not None for w in pruned.sparsec.graph.masked())


def test_activations_that_are_not_finite_name_the_block() -> None:
    model, _ = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].input_layernorm.weight[3] = float("nan")
    with pytest.raises(ActivationError, match=r"model\.layers\.1: .*q_proj.* NaN or inf"):
        sparsec.compile(model, "wanda(0.5)", calibration=tokens(2))


def test_windows_are_drawn_by_the_seed_and_do_not_overlap() -> None:
    text = Text("letters", "".join(chr(97 + i % 26) + str(i) for i in range(400)))
    ids, source = windows(text, byte_tokenizer(), sequences=5, length=16, seed=3)
    again, _ = windows(text, byte_tokenizer(), sequences=5, length=16, seed=3)
    other, _ = windows(text, byte_tokenizer(), sequences=5, length=16, seed=4)
    assert torch.equal(ids, again)
    assert not torch.equal(ids, other)
    assert len({tuple(row.tolist()) for row in ids}) == 5
    assert "5 sequences of 16 tokens of letters" in source
    assert "seed 3" in source


def test_the_embedded_text_gives_its_second_half() -> None:
    ids, source = windows(None, byte_tokenizer(), sequences=2, length=64)
    content = load_text().content
    # A window of bytes may begin or end within a character.
    assert byte_tokenizer().decode(ids[0]).strip("\N{REPLACEMENT CHARACTER}") in content[len(content) // 2 :]
    assert "second half" in source


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"sequences": 99, "length": 64},
            r"letters: too little text to calibrate on: 500 tokens, 99 sequences of 64 need 6336",
        ),
        ({"length": 64, "limit": 32}, "length 64 is more than the model's 32 positions"),
        ({"sequences": 0}, "at least 1 sequence of at least 2 tokens, got 0"),
        ({"tokenizer": None}, "needs a tokenizer"),
    ],
)
def test_windows_say_what_is_wrong(options: dict, message: str) -> None:
    with pytest.raises(DataError, match=message):
        windows(Text("letters", "a" * 500), **{"tokenizer": byte_tokenizer(), **options})


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (torch.zeros(2, 3), "must be integers"),
        (torch.zeros(4, dtype=torch.int64), r"must be \[sequences, length\], got \[4\]"),
        (torch.full((2, 3), VOCABULARY), f"id {VOCABULARY} is outside the model's vocabulary of {VOCABULARY}"),
        (torch.full((2, 3), -1), "id -1 is outside"),
        ([], "holds no sequence"),
    ],
)
def test_token_ids_that_cannot_be_are_refused(ids, message: str) -> None:
    graph = trace(tiny_model("llama")[0])
    with pytest.raises(DataError, match=message):
        samples(graph, ids, "test")
