"""compile(): the same class back, everything that worked before still works, and the numbers are those of the graph."""

from __future__ import annotations

import copy
import pickle
import weakref
from collections.abc import Collection, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from architectures import tiny_model
from torch import nn
from transformers import DynamicCache

import sparsec
from sparsec.ir.tracer import trace
from sparsec.kernels import SparseLinear
from sparsec.passes import lower
from sparsec.pipeline import Context
from sparsec.testing import assert_untouched, masked_twin, state_of

REST = "sparsity,flops,lower(csr)"
SPEC = f"magnitude(0.4),freeze,{REST}"
ARCHITECTURES = [
    "llama", "mistral", "qwen3", "gemma2", "opt", "gpt-neox", "gpt2", "phi3", "qwen2-moe", "mixtral", "bert", "mlp",
]  # fmt: skip


def outputs(model: nn.Module, inputs: dict) -> torch.Tensor:
    with torch.no_grad():
        result = model(**inputs)
    return (
        result if isinstance(result, torch.Tensor) else next(v for v in result.values() if isinstance(v, torch.Tensor))
    )


def sequence(graph: sparsec.Graph) -> list[tuple[str, str]]:
    """(op, owner) of every op in the table."""
    return [(op.kind, op.owner) for op in graph.ops.values()]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_graph_emitted_model_and_dense_twin_agree_and_tracing_again_gives_the_lowered_graph(name: str) -> None:
    model, call = tiny_model(name)
    before = state_of(model)
    example = None if name != "mlp" else call()
    masked = sparsec.compile(model, "magnitude(0.4)", example_inputs=example, verify="probe")
    frozen = sparsec.extend(masked, "freeze", verify="probe")
    compiled = sparsec.extend(frozen, REST, verify="probe")
    assert type(compiled) is type(model)
    assert_untouched(model, before)
    graph = compiled.sparsec.graph
    twin = masked_twin(graph, model)
    inputs = call(2, 6)
    expected = outputs(twin, inputs)
    assert torch.equal(outputs(masked, inputs), expected)
    assert torch.equal(outputs(frozen, inputs), expected)
    assert torch.equal(outputs(_Run(graph), inputs), outputs(compiled, inputs))
    torch.testing.assert_close(outputs(compiled, inputs), expected, rtol=1e-3, atol=1e-5)
    assert any(isinstance(m, SparseLinear) for m in compiled.modules())
    again = trace(compiled, example)
    assert sequence(again) == sequence(graph)


class _Run(nn.Module):
    """A graph as a module."""

    def __init__(self, graph: sparsec.Graph) -> None:
        super().__init__()
        self.graph = graph

    def forward(self, **inputs: torch.Tensor) -> object:
        return self.graph.run(**inputs)


@pytest.fixture(scope="module")
def pair() -> tuple[nn.Module, nn.Module]:
    """(dense twin, lowered) of a tiny Llama."""
    model, _ = tiny_model("llama")
    compiled = sparsec.compile(model, SPEC)
    return masked_twin(compiled.sparsec.graph, model), compiled


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": False},
        {"do_sample": True, "top_k": 8},
        {"num_beams": 3, "do_sample": False},
        {"do_sample": False, "cache_implementation": "static"},
        {"do_sample": False, "use_cache": False},
        {"do_sample": False, "past_key_values": "dynamic"},
    ],
    ids=["greedy", "sampling", "beams", "static cache", "no cache", "dynamic cache"],
)
def test_generate_gives_the_tokens_of_the_dense_twin(pair, options: dict) -> None:
    twin, compiled = pair
    ids = torch.tensor([[0, 0, 5, 9, 7], [3, 8, 1, 4, 6]])
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])  # left padding
    results = []
    for model in (twin, compiled):
        torch.manual_seed(0)
        if options.get("past_key_values"):
            options = options | {"past_key_values": DynamicCache(config=model.config)}
        results.append(model.generate(ids, attention_mask=mask, max_new_tokens=12, pad_token_id=0, **options))
    assert torch.equal(*results)
    assert results[0].shape[1] > 5


def test_modes_copies_and_pickles_keep_working(pair) -> None:
    _, compiled = pair
    ids = torch.tensor([[3, 8, 1, 4]])
    expected = outputs(compiled, {"input_ids": ids})
    assert not compiled.training
    assert compiled.train().training
    assert compiled.model.layers[0].mlp.up_proj.training
    compiled.eval()
    twin = copy.deepcopy(compiled)
    assert torch.equal(outputs(twin, {"input_ids": ids}), expected)
    assert twin.sparsec.model() is twin
    own = {id(t) for t in (*twin.parameters(), *twin.buffers())}
    assert all(id(p) in own for p in twin.sparsec.graph.module.parameters())
    for weight in twin.sparsec.graph.weights.values():
        assert weight.packed is None or {id(t) for t in weight.packed.tensors().values()} <= own
    shared = {t.data_ptr() for t in compiled.buffers()} & {t.data_ptr() for t in twin.buffers()}
    assert not shared - {0}
    layer = pickle.loads(pickle.dumps(compiled.model.layers[0].mlp.up_proj))
    x = torch.randn(2, 32)
    assert torch.equal(layer(x), compiled.model.layers[0].mlp.up_proj(x))


def test_a_state_goes_into_a_model_compiled_in_the_same_way(pair) -> None:
    model, call = tiny_model("llama")
    other = sparsec.compile(model, SPEC)
    for tensor in other.state_dict().values():
        if tensor.is_floating_point():
            tensor.zero_()
    other.load_state_dict(pair[1].state_dict())
    assert torch.equal(outputs(other, call(2, 5)), outputs(pair[1], call(2, 5)))


def test_moving_the_model_moves_the_graph_and_leaves_nothing_behind(pair) -> None:
    compiled = copy.deepcopy(pair[1])
    compiled.to(torch.bfloat16)
    held = {t.data_ptr() for t in compiled.buffers()}
    for weight in compiled.sparsec.graph.weights.values():
        if weight.packed is not None:
            assert weight.packed.values.dtype == torch.bfloat16
            assert {t.data_ptr() for t in weight.packed.tensors().values()} <= held
    report = compiled.sparsec.report()
    assert report.bytes_held == sum(
        t.nbytes for t in {id(t): t for t in (*compiled.parameters(), *compiled.buffers())}.values()
    )
    assert report.layers[0].bytes_dense == 2 * report.layers[0].parameters
    assert outputs(compiled, {"input_ids": torch.tensor([[3, 8, 1, 4]])}).dtype == torch.bfloat16


def test_torch_compile_on_top(pair) -> None:
    _, compiled = pair
    inputs = {"input_ids": torch.tensor([[3, 8, 1, 4]])}
    expected = outputs(compiled, inputs)
    faster = torch.compile(compiled, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(outputs(faster, inputs), expected, rtol=1e-4, atol=1e-5)


def test_gradients_reach_what_stays_trainable(pair) -> None:
    twin, compiled = pair
    ids = torch.tensor([[3, 8, 1, 4], [2, 7, 9, 5]])
    grads = []
    for model in (twin, compiled):
        model.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        grads.append(model.model.embed_tokens.weight.grad)
        model.zero_grad()
    torch.testing.assert_close(*grads, rtol=1e-3, atol=1e-6)
    assert grads[0].abs().sum() > 0


def test_hooks_on_a_swapped_module_are_carried_over() -> None:
    model, call = tiny_model("llama")
    seen = []
    model.model.layers[0].mlp.up_proj.register_forward_hook(lambda m, x, y: seen.append(type(m).__name__))
    compiled = sparsec.compile(model, SPEC)
    seen.clear()
    outputs(compiled, call(2, 4))
    assert seen == ["SparseLinear"]


def test_handles_of_hooks_go_on_working_when_the_model_is_consumed() -> None:
    model, call = tiny_model("llama")
    seen = []
    handle = model.model.layers[0].mlp.up_proj.register_forward_hook(lambda *_: seen.append(1))
    compiled = sparsec.compile(model, SPEC, copy=False)
    handle.remove()
    seen.clear()
    outputs(compiled, call(2, 4))
    assert seen == []


def test_no_tensor_is_held_twice_and_dense_weights_are_gone(pair) -> None:
    _, compiled = pair
    assert "sparsec" not in dict(compiled.named_modules())
    graph = compiled.sparsec.graph
    model_tensors = {id(t) for t in (*compiled.parameters(), *compiled.buffers())}
    for tensor in (*graph.module.parameters(), *graph.module.buffers()):
        assert id(tensor) in model_tensors or tensor.numel() < 256, "the graph holds a tensor of its own"
    for weight in graph.weights.values():
        if weight.packed is not None:
            assert all(id(t) in model_tensors for t in weight.packed.tensors().values())
            assert weight.mask is None


def test_consuming_a_model_frees_each_dense_weight_as_it_is_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lower, "LARGE", 0)
    model, _ = tiny_model("llama")
    waiting = {n: weakref.ref(p) for n, p in model.named_parameters() if "_proj" in n}
    left = []

    def counted(self: Context, what: str, items: Collection[Any]) -> Iterator[Any]:
        for item in items:
            left.append(sum(r() is not None for r in waiting.values()))
            yield item

    monkeypatch.setattr(Context, "each_of", counted)
    compiled = sparsec.compile(model, SPEC, copy=False)
    assert compiled is model
    assert left[-len(waiting) :] == list(range(len(waiting), 0, -1))
    assert not any(r() is not None for r in waiting.values())


def test_a_module_registered_under_two_names_is_swapped_under_both() -> None:
    shared = nn.Linear(8, 8)

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = shared, shared

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(torch.relu(self.a(x)))

    compiled = sparsec.compile(Twice(), SPEC, example_inputs=torch.randn(3, 8))
    assert compiled.a is compiled.b
    assert isinstance(compiled.a, SparseLinear)
    assert len(compiled.sparsec.graph.ops_of("a.weight")) == 2


def test_two_modules_on_one_parameter_share_the_packed_tensors() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6, bias=False))
    model[1].weight = model[0].weight
    compiled = sparsec.compile(model, SPEC, example_inputs=torch.randn(3, 6))
    assert compiled[0].values is compiled[1].values
    assert compiled[0].bias is not None
    assert compiled[1].bias is None


class OwnForward(nn.Linear):
    """Adds something: swapping it would lose that."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + 1


class Functional(nn.Module):
    """A product outside of any nn.Linear."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight)


@pytest.mark.parametrize(
    ("module", "reason"), [(OwnForward(6, 6), "with a forward of its own"), (Functional(), "which is no nn.Linear")]
)
def test_a_site_that_cannot_be_swapped_stays_dense_and_says_why(module: nn.Module, reason: str) -> None:
    model = nn.Sequential(nn.Linear(6, 6), module)
    x = torch.randn(3, 6)
    compiled = sparsec.compile(model, SPEC, example_inputs=x)
    assert isinstance(compiled[0], SparseLinear)
    assert type(compiled[1]) is type(module)
    weight = compiled.sparsec.graph.weights["1.weight"]
    assert reason in weight.reason
    assert any("1.weight stays dense" in note for note in compiled.sparsec.records[-1].notes)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), masked_twin(compiled.sparsec.graph, model)(x))
    assert reason in " ".join(str(compiled.sparsec.report()).split())


def test_an_instance_with_a_patched_forward_stays_dense() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    model[1].forward = partial(_doubled, model[1])
    compiled = sparsec.compile(model, SPEC, example_inputs=torch.randn(3, 6), copy=False)
    assert isinstance(compiled[0], SparseLinear)
    assert "with a forward of its own" in compiled.sparsec.graph.weights["1.weight"].reason


def _doubled(linear: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    return 2 * nn.functional.linear(x, linear.weight, linear.bias)


class Idle(nn.Module):
    """Holds a tied linear that the traced call does not execute."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.idle, self.last = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.idle.weight = self.used.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.used(x) + (self.idle(x) if self.training else 0))


def test_a_tied_module_that_was_not_executed_keeps_its_weight() -> None:
    compiled = sparsec.compile(Idle(), SPEC, example_inputs=torch.randn(3, 6))
    assert "idle holds the same tensor" in compiled.sparsec.graph.weights["used.weight"].reason
    assert compiled.idle.weight.shape == (6, 6)
    assert isinstance(compiled.last, SparseLinear)


def test_layers_whose_fast_path_reads_the_weights_itself_stay_dense() -> None:
    model = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), nn.Linear(8, 8)).eval()
    x = torch.randn(3, 4, 8)
    compiled = sparsec.compile(model, SPEC, example_inputs=x)
    assert isinstance(compiled[1], SparseLinear)
    assert "fast path" in compiled.sparsec.graph.weights["0.linear1.weight"].reason
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), masked_twin(compiled.sparsec.graph, model)(x))


def test_a_linear_that_holds_more_than_weight_and_bias_stays_dense() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    model[1].register_buffer("scale", torch.ones(6))
    compiled = sparsec.compile(model, SPEC, example_inputs=torch.randn(3, 6))
    assert "also holds scale" in compiled.sparsec.graph.weights["1.weight"].reason
    assert "scale" in dict(compiled[1].named_buffers())


@pytest.mark.parametrize("name", ["mixtral", "qwen2-moe"])
def test_fused_experts_that_stay_dense_are_said(name: str) -> None:
    compiled = sparsec.compile(tiny_model(name)[0])
    notes = compiled.sparsec.records[-1].notes
    (note,) = [note for note in notes if "no kernel multiplies by fused experts that are sparse" in note]
    assert "and 1 more stay dense: " in note
    assert "dense because: no kernel multiplies by fused experts" in str(compiled.sparsec.report())


def test_unfrozen_masks_are_written_by_emission_which_says_so() -> None:
    model, _ = tiny_model("llama")
    compiled = sparsec.compile(model, "magnitude(0.5)")
    assert "freeze was missing" in compiled.sparsec.notes[-1]
    assert sparsec.compile(model, "magnitude(0.5),freeze").sparsec.notes == compiled.sparsec.notes[:-1]


def test_masks_of_the_user_take_the_place_of_pruning() -> None:
    model, _ = tiny_model("llama")
    weight = model.model.layers[0].mlp.up_proj.weight
    mask = torch.rand(weight.shape) < 0.3
    compiled = sparsec.compile(model, masks={"model.layers.0.mlp.up_proj": mask})
    assert [r.name for r in compiled.sparsec.records] == ["mask", "freeze", "sparsity", "flops", "fuse", "lower"]
    layer = compiled.model.layers[0].mlp.up_proj
    assert torch.equal(layer.weight, torch.where(mask, weight, 0.0))
    assert sum(isinstance(m, SparseLinear) for m in compiled.modules()) == 1
    both = sparsec.compile(model, SPEC, masks={"model.layers.0.mlp.up_proj": mask})
    assert both.sparsec.records[0].name == "mask"
    assert not (both.model.layers[0].mlp.up_proj.weight[~mask] != 0).any()


def test_what_is_saved_before_lowering_is_an_ordinary_checkpoint_with_zeros(tmp_path) -> None:
    model, call = tiny_model("llama")
    pruned = sparsec.compile(model, "magnitude(0.5),freeze")
    pruned.save_pretrained(tmp_path / "pruned")
    again = type(model).from_pretrained(tmp_path / "pruned")
    lowered = sparsec.compile(again, "zeros,freeze,lower(csr)")
    inputs = call(2, 5)
    torch.testing.assert_close(outputs(lowered, inputs), outputs(pruned, inputs), rtol=1e-3, atol=1e-5)


def test_progress_is_told_for_the_long_passes() -> None:
    steps = []
    sparsec.compile(
        tiny_model("llama")[0], "magnitude(0.5, scope=layer),freeze,lower(csr)", progress=lambda *a: steps.append(a)
    )
    assert {what for what, _, _ in steps} >= {"magnitude", "freeze", "lower"}
    assert all(0 <= done <= total for _, done, total in steps)
