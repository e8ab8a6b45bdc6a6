"""The tracer on plain modules: reuse, ties, computed weights, example inputs, rungs, and what it refuses."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
import torch.fx.config as fx_config
from architectures import tiny_model
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from sparsec.errors import TraceError
from sparsec.ir.tracer import trace


class Reused(nn.Module):
    """One linear called twice, one module under two names, one parameter in two linears."""

    def __init__(self) -> None:
        super().__init__()
        self.twice = nn.Linear(8, 8)
        self.first = nn.Linear(8, 8)
        self.second = self.first
        self.tied = nn.Linear(8, 8)
        self.tied.weight = self.twice.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.twice(torch.relu(self.twice(x)))
        return self.tied(torch.relu(self.second(x)))


def linear_ops(graph: Any) -> list[tuple[str, tuple[str, ...]]]:
    return [(op.owner, op.weights) for op in graph.ops.values() if op.kind == "linear"]


class Parts(nn.Module):
    """Calls parts of a list, in a model that holds one of its modules twice."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(8, 8) for _ in range(5)])
        self.again = nn.ModuleList([self.layers[1]])

    def forward(self, x: Tensor) -> Tensor:
        for layer in (*self.layers[:2], *self.layers[1:][::-2]):
            x = torch.relu(layer(x))
        return self.again[0](x)


def test_a_part_of_a_list_of_modules_is_named_as_the_whole() -> None:
    """Regression: torch called them `layers.slice(None, 2, None).0`, which no model has, so that nothing could be lowered."""
    owners = [owner for owner, _ in linear_ops(trace(Parts(), torch.randn(4, 8)))]
    assert owners == ["layers.0", "layers.1", "layers.4", "layers.2", "layers.1"]


def test_reuse_is_several_ops_of_one_weight() -> None:
    model = Reused()
    graph = trace(model, torch.randn(4, 8))
    assert linear_ops(graph) == [
        ("twice", ("twice.weight", "twice.bias")),
        ("twice", ("twice.weight", "twice.bias")),
        ("first", ("first.weight", "first.bias")),
        ("tied", ("twice.weight", "tied.bias")),
    ]
    assert list(graph.ops) == ["twice", "twice_call2", "first", "tied"]
    assert graph.weights["twice.weight"].aliases == ("tied.weight",)
    assert graph.weights["twice.weight"].owners == ("twice", "tied")
    assert graph.weights["first.weight"].aliases == ("second.weight",)
    x = torch.randn(3, 8)
    assert torch.equal(graph.run(x), model(x))


@pytest.mark.parametrize("shape", [(1, 8), (7, 8)])
def test_example_batch_of_one_still_gives_an_open_batch(shape: tuple[int, int]) -> None:
    model = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2))
    graph = trace(model, torch.randn(1, 8))
    assert graph.rung == "dynamic"
    x = torch.randn(shape)
    assert torch.equal(graph.run(x), model(x))
    assert {op.group for op in graph.ops.values()} == {"mlp"}


def test_features_are_fixed_and_a_wrong_width_is_named() -> None:
    graph = trace(nn.Linear(8, 4), torch.randn(3, 8))
    with pytest.raises(TraceError, match=r"input 'input'.*shape \[any, 8\], got \[3, 9\]"):
        graph.run(torch.randn(3, 9))


class NeedsLengthFour(nn.Module):
    """Decides by its length, so that only the batch can stay open."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] != 4:
            raise ValueError("four steps, please")
        return self.fc(x)


class NeedsExactlyThree(nn.Module):
    """Decides by its batch too, so that nothing can stay open."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) if x.shape[0] == 3 and x.shape[1] == 4 else x


@pytest.mark.parametrize(("module", "rung"), [(NeedsLengthFour, "dynamic batch"), (NeedsExactlyThree, "static")])
def test_the_ladder_falls_to_the_highest_rung_that_works(module: type[nn.Module], rung: str) -> None:
    model = module()
    graph = trace(model, torch.randn(3, 4, 6))
    assert graph.rung == rung
    x = torch.randn(3, 4, 6)
    assert torch.equal(graph.run(x), model(x))
    with pytest.raises(TraceError, match="trace again"):
        graph.run(torch.randn(3, 5, 6))


class DecidesByValue(nn.Module):
    """Has no graph: the branch hangs on a number in the input."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) if x.sum() > 0 else x


def test_a_model_without_a_graph_says_which_rung_failed_where() -> None:
    with pytest.raises(TraceError) as caught:
        trace(DecidesByValue(), torch.randn(3, 4, 6))
    text = str(caught.value)
    for rung in ("dynamic:", "dynamic batch:", "static:"):
        assert rung in text
    assert "test_tracer_modules.py" in text
    assert "if x.sum() > 0" in text


class TwoInputs(nn.Module):
    """Two tensors, a constant, a dict as result."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x: Tensor, y: Tensor, scale: float = 1.0) -> dict[str, Any]:
        return {"sum": self.fc(x) * scale + y, "both": (x, y)}


@pytest.mark.parametrize("named", [True, False])
def test_inputs_by_name_or_position_and_structured_outputs(named: bool) -> None:
    model = TwoInputs()
    x, y = torch.randn(4, 8), torch.randn(4, 8)
    graph = trace(model, {"x": x, "y": y, "scale": 2.0} if named else (x, y, 2.0))
    assert graph.inputs == ("x", "y")
    result = graph.run(y=y, x=x)
    assert torch.equal(result["sum"], model(x, y, 2.0)["sum"])
    assert torch.equal(result["both"][1], y)
    assert [t.shape for t in graph.example] == [x.shape, y.shape]


def test_a_plain_module_of_pixels_is_asked_for_its_inputs() -> None:
    """Regression: it was asked for a config, which only models of transformers have."""

    class Pixels(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, pixel_values: Tensor) -> Tensor:
            return self.linear(pixel_values)

    with pytest.raises(TraceError, match="what to call it with is not known; give example_inputs="):
        trace(Pixels())


@pytest.mark.parametrize(
    ("inputs", "said"),
    [
        (None, "give example_inputs"),
        ({"z": torch.ones(2, 8)}, "does not take these example inputs"),
        ((torch.ones(2, 8), [torch.ones(2, 8)]), "'y' must be a tensor"),
        ({"x": 1.0, "y": 2.0}, "hold no tensor"),
    ],
)
def test_bad_example_inputs_are_refused_with_the_way_out(inputs: Any, said: str) -> None:
    with pytest.raises(TraceError, match=said):
        trace(TwoInputs(), inputs)


class Masked(nn.Module):
    """A weight that is multiplied by a mask at every call, by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8))
        self.register_buffer("mask", torch.rand(8, 8) > 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight * self.mask)


def computed_models() -> list[tuple[nn.Module, str]]:
    return [
        (nn.Sequential(nn.Linear(8, 8), Masked()), "1.weight"),
        (
            nn.Sequential(nn.Linear(8, 8), parametrizations.orthogonal(nn.Linear(8, 8))),
            "1.parametrizations.weight.original",
        ),
        (nn.Sequential(nn.Linear(8, 8), prune.l1_unstructured(nn.Linear(8, 8), "weight", 0.5)), "1.weight_orig"),
    ]


@pytest.mark.parametrize(
    ("which", "way_out"), enumerate(["a Parameter of its own", "parametrize.remove_parametrizations", "prune.remove"])
)
def test_computed_weights_are_left_alone_and_named(which: int, way_out: str) -> None:
    model, parameter = computed_models()[which]
    model.eval()
    before = {path: dict(vars(m)) for path, m in model.named_modules()}
    graph = trace(model, torch.randn(4, 8))
    assert {path: dict(vars(m)) for path, m in model.named_modules()} == before
    x = torch.randn(5, 8)
    with torch.no_grad():
        assert torch.equal(graph.run(x), model(x))
    (note,) = graph.notes
    assert note.startswith("1: its weight is computed at every call")
    assert parameter in note
    assert way_out in note
    weight = graph.weights[parameter]
    assert (weight.kind, weight.group) == ("other", "mlp")
    assert weight.reason is not None
    assert not graph.prunable(parameter)
    assert graph.prunable("0.weight")


class TransposedTwin(nn.Module):
    """A weight that two products read in two ways, and a third reader looks at."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8, bias=False)
        self.bias = nn.Parameter(torch.randn(8))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, self.fc(x) @ self.fc.weight.t(), self.fc.weight) + self.fc.weight.sum()


def test_a_matrix_has_one_layout_and_other_readers_are_told() -> None:
    model = TransposedTwin()
    graph = trace(model, torch.randn(4, 8))
    x = torch.randn(5, 8)
    assert torch.equal(graph.run(x), model(x))
    assert [op.kind for op in graph.ops_of("fc.weight")] == ["linear", "linear", "matmul", "other"]
    weight = graph.weights["fc.weight"]
    assert weight.kind == "linear"
    assert "also read as a plain tensor" in (weight.reason or "")


class Unused(nn.Module):
    """Holds parameters that its forward does not read."""

    def __init__(self) -> None:
        super().__init__()
        self.used = nn.Linear(8, 8)
        self.spare = nn.Linear(8, 4)
        self.table = nn.Embedding(8, 4)
        self.norm = nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


def test_unread_parameters_are_in_the_table_but_not_executed() -> None:
    graph = trace(Unused(), torch.randn(4, 8))
    kinds = {name: (w.kind, w.group, w.owners) for name, w in graph.weights.items() if not name.startswith("used")}
    assert kinds == {
        "spare.weight": ("linear", "mlp", ()),
        "spare.bias": ("bias", "mlp", ()),
        "table.weight": ("embedding", "embedding", ()),
        "norm.weight": ("other", "norm", ()),
        "norm.bias": ("bias", "norm", ()),
    }
    assert graph.tensor("spare.weight").shape == (4, 8)
    assert not graph.prunable("spare.weight")


def test_a_model_without_linears_has_nothing_to_prune() -> None:
    graph = trace(nn.Sequential(nn.Conv1d(3, 3, 3), nn.BatchNorm1d(3)), torch.randn(2, 3, 9))
    assert not any(graph.prunable(name) for name in graph.weights)
    assert {op.kind for op in graph.ops.values()} == {"other", "norm"}


def test_torchs_own_encoder_layer_shows_its_linears() -> None:
    torch.manual_seed(0)
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2).eval()
    graph = trace(model, torch.randn(3, 5, 16))
    groups = {w.name.split(".", 2)[2]: w.group for w in graph.weights.values() if w.kind == "linear"}
    assert groups == {
        "self_attn.in_proj_weight": "attention",
        "self_attn.out_proj.weight": "attention",
        "linear1.weight": "mlp",
        "linear2.weight": "mlp",
    }
    x = torch.randn(4, 7, 16)
    with torch.no_grad():
        torch.testing.assert_close(graph.run(x), model(x))  # eager runs one fused operator instead


@pytest.fixture
def sparse_operator() -> Any:
    """An operator of the sparsec namespace as an emitted model calls it."""
    library = torch.library.Library("sparsec", "FRAGMENT")
    library.define("probe_linear(Tensor x, Tensor values, Tensor? bias, int in_features) -> Tensor")

    def run(x: Tensor, values: Tensor, bias: Tensor | None, in_features: int) -> Tensor:
        return nn.functional.linear(x, values.reshape(-1, in_features), bias)

    library.impl("probe_linear", run, "CompositeExplicitAutograd")
    yield torch.ops.sparsec.probe_linear
    library._destroy()


def test_an_emitted_model_traces_to_sparse_ops_at_the_same_owners(sparse_operator: Any) -> None:
    class Sparse(nn.Module):
        def __init__(self, linear: nn.Linear) -> None:
            super().__init__()
            self.in_features, self.bias = linear.in_features, linear.bias
            self.register_buffer("values", linear.weight.detach().flatten())

        def forward(self, x: Tensor) -> Tensor:
            return sparse_operator(x, self.values, self.bias, self.in_features)

    model, example = tiny_model("opt")
    before = trace(model)
    for path in [op.owner for op in before.ops.values() if op.kind == "linear" and op.owner != "lm_head"]:
        model.set_submodule(path, Sparse(model.get_submodule(path)))
    after = trace(model)
    kinds = {"linear": "sparse_linear"}
    expected = [
        (kinds[op.kind] if op.kind in kinds and op.owner != "lm_head" else op.kind, op.owner, op.group)
        for op in before.ops.values()
    ]
    assert [(op.kind, op.owner, op.group) for op in after.ops.values()] == expected
    assert list(after.ops) == list(before.ops)
    with torch.no_grad():
        assert torch.equal(after.run(**example(3, 5, 1)).logits, model(**example(3, 5, 1)).logits)


class Undecided(nn.Module):
    """Has no graph."""

    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if float(x.sum()) > 0 else x


@pytest.mark.parametrize("collects", [True, False])
def test_settings_of_the_process_are_what_they_were_after_a_trace_and_after_a_failed_one(collects: bool) -> None:
    was = gc.isenabled()
    (gc.enable if collects else gc.disable)()
    before = dict(vars(fx_config))
    try:
        trace(nn.Sequential(nn.Linear(4, 4)), torch.ones(2, 4))
        assert gc.isenabled() == collects
        with pytest.raises(TraceError):
            trace(Undecided(), torch.ones(2, 4))
        assert gc.isenabled() == collects
        assert dict(vars(fx_config)) == before
    finally:
        (gc.enable if was else gc.disable)()
