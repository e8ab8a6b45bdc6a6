"""The IR as text (whole texts, kept in tests/golden), and the verifier on graphs that are broken on purpose.

`pytest --refresh-goldens` writes the texts anew.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import sparsec
from sparsec.errors import SpecError, VerifyError
from sparsec.ir.graph import Graph
from sparsec.ir.printer import diff_text, graph_text
from sparsec.ir.tracer import trace
from sparsec.ir.verifier import outputs_differ, problems, snapshot
from sparsec.kernels.library import loader
from sparsec.pipeline import Context, Pipeline
from sparsec.pipeline.instruments import DumpIR, PrintIR, Timing

GOLDEN = Path(__file__).parent / "golden"


def small() -> tuple[nn.Module, torch.Tensor]:
    """Two linears, one of them called twice, with weights that are the same everywhere."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 4, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x + self.down(torch.relu(self.up(x)))
            return self.down(torch.relu(self.up(x)))

    model = Net().eval()
    for i, parameter in enumerate(model.parameters()):
        parameter.data = (torch.arange(parameter.numel()) * (7 + i) % 11 - 5.0).reshape(parameter.shape) / 8
    return model, torch.ones(2, 4)


@pytest.fixture
def lowered() -> Graph:
    model, x = small()
    graph = trace(model, x)
    Pipeline.parse("magnitude(0.5),freeze,sparsity,flops,lower(csr)").run(graph)
    return graph


def test_text_of_a_graph_between_all_passes(request, monkeypatch, tmp_path) -> None:
    # the same on a machine with a compiler and on one without
    missing = replace(loader.status(), reason="not on this machine")
    monkeypatch.setattr(loader, "status", lambda: missing)
    model, x = small()
    graph = trace(model, x)
    with (tmp_path / "changed.txt").open("w") as stream:
        Pipeline.parse("magnitude(0.5),freeze,sparsity,flops,lower(csr)").run(
            graph, instruments=[DumpIR(tmp_path / "dump"), PrintIR("changed", stream)]
        )
    names = ["00-traced", "01-magnitude", "02-freeze", "03-sparsity", "04-flops", "05-lower"]
    assert sorted(p.name for p in (tmp_path / "dump").iterdir()) == [f"{n}.txt" for n in names]
    texts = {
        "ir-lowered.txt": (tmp_path / "dump/05-lower.txt").read_text(),
        "ir-changed.txt": (tmp_path / "changed.txt").read_text(),
    }
    for name, text in texts.items():
        if request.config.getoption("--refresh-goldens"):
            (GOLDEN / name).write_text(text)
        assert text == (GOLDEN / name).read_text(), f"{name} differs; look at it, then run pytest --refresh-goldens"


def test_text_is_the_same_in_every_run(lowered: Graph) -> None:
    model, x = small()
    again = trace(model, x)
    Pipeline.parse("magnitude(0.5),freeze,sparsity,flops,lower(csr)").run(again)
    assert graph_text(again) == graph_text(lowered)


def test_diff_shows_only_what_changed() -> None:
    assert diff_text("a\nb\nc\n", "a\nB\nc\n") == "-b\n+B\n"
    assert diff_text("a\n", "a\n") == ""


def test_printing_before_and_after_shows_whole_graphs(capsys) -> None:
    for when, sign in (("before", "# before pass 1: magnitude(0.5)"), ("after", "# after pass 1: magnitude(0.5)")):
        model, x = small()
        Pipeline.parse("magnitude(0.5)").run(trace(model, x), instruments=[PrintIR(when)])
        text = capsys.readouterr().out
        assert text.startswith(sign)
        assert ("mask" in text) == (when == "after")
    with pytest.raises(SpecError, match="when must be one of before, after, changed"):
        PrintIR("always")  # type: ignore[arg-type]


def test_timing_has_the_seconds_of_every_pass() -> None:
    timing = Timing()
    model, x = small()
    records = Pipeline.parse("magnitude(0.5),freeze").run(trace(model, x), instruments=[timing])
    assert list(timing.seconds) == [1, 2]
    assert all(r.seconds > 0 for r in records)


def test_a_whole_graph_has_no_problems(lowered: Graph) -> None:
    assert problems(lowered, recompute=True) == []


def _change(name: str, **changes: object) -> Callable[[Graph], None]:
    return lambda graph: graph.update(name, **changes) and None


def _change_ops(**changes: object) -> Callable[[Graph], None]:
    return lambda graph: graph.ops.update({n: replace(op, **changes) for n, op in graph.ops.items()})


def _drop_tensor(graph: Graph) -> None:
    del graph.module.up.bias


def _unknown_op(graph: Graph) -> None:
    op = next(iter(graph.ops.values()))
    graph.ops["nowhere"] = replace(op, node="nowhere")


def _unknown_weight(graph: Graph) -> None:
    name, op = next((n, o) for n, o in graph.ops.items() if o.weights)
    graph.ops[name] = replace(op, weights=("nothing.weight",))


def _bad_columns(graph: Graph) -> None:
    graph.weights["up.weight"].packed.col_idx[0] = 99


def _keep_dense(graph: Graph) -> None:
    graph.module.up.register_parameter("weight", nn.Parameter(torch.zeros(8, 4)))


def _wrong_key(graph: Graph) -> None:
    graph.weights["other"] = graph.weights["up.bias"]


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (_drop_tensor, "up.bias"),
        (_unknown_op, "'nowhere' is not a node"),
        (_unknown_weight, "names the weight 'nothing.weight'"),
        (_bad_columns, "up.weight: CSR .*col_idx"),
        (_keep_dense, "still holds the dense tensor"),
        (_wrong_key, "the record of 'other' says 'up.bias'"),
        (_change("up.weight", nnz=3), "nnz is 3"),
        (_change("up.weight", mask=torch.ones(8, 4).bool()), "still holds a mask"),
        (_change("up.weight", shape=(4, 8)), "packed as"),
        (_change("up.bias", shape=(9,)), "but the table says"),
        (_change("up.bias", frozen=True), "frozen without a mask"),
        (_change("up.bias", mask=torch.ones(8)), "not bool"),
        (_change("up.bias", mask=torch.ones(8).bool()), "without a pattern|a mask is not frozen"),
        (
            _change("up.bias", mask=torch.zeros(8).bool(), pattern="unstructured", frozen=True),
            "a masked entry is not zero",
        ),
        (_change("up.bias", nnz=2), "nnz is 2 of 8 without a mask"),
        (_change("up.bias", nnz=None), "'sparsity' is said to hold, but nobody counted"),
        (_change_ops(flops=123.0), "FLOPs are 123"),
        (_change_ops(flops=None), "'flops' is said to hold, but nobody counted"),
    ],
)
def test_the_verifier_finds_what_is_broken(lowered: Graph, break_it: Callable[[Graph], None], message: str) -> None:
    import re

    break_it(lowered)
    assert any(re.search(message, p) for p in problems(lowered, recompute=True)), problems(lowered, recompute=True)


def test_a_broken_dataflow_is_found(lowered: Graph) -> None:
    nodes = list(lowered.module.graph.nodes)
    product = next(n for n in nodes if n.name == next(iter(lowered.ops)))
    later = nodes[-2]
    product.args = (later, *product.args[1:])
    assert any(p.startswith("torch.fx:") for p in problems(lowered))


def test_a_snapshot_sees_tensors_masks_and_dataflow_but_not_facts() -> None:
    model, x = small()
    graph = trace(model, x)
    before = snapshot(graph)
    graph.update("up.weight", nnz=3, reason="a fact")
    assert snapshot(graph) == before
    contents = snapshot(graph, contents=True)
    graph.tensor("down.weight").data.mul_(2)  # goes around the version counter
    assert snapshot(graph) == before
    assert snapshot(graph, contents=True) != contents
    with torch.no_grad():
        graph.tensor("up.weight").add_(1)
    changed = snapshot(graph)
    assert changed != before
    graph.update("up.weight", mask=torch.ones(8, 4).bool())
    assert snapshot(graph) != changed


def test_outputs_are_compared_exactly_or_within_rounding() -> None:
    a = {"x": torch.tensor([1.0, float("nan"), -0.0]), "n": 3}
    assert outputs_differ(a, {"x": torch.tensor([1.0, float("nan"), 0.0]), "n": 3}, exact=True) == ""
    b = {"x": torch.tensor([1.0 + 1e-6, float("nan"), 0.0]), "n": 3}
    assert "not bit-identical" in outputs_differ(a, b, exact=True)
    assert outputs_differ(a, b, exact=False) == ""
    assert "off by" in outputs_differ(a, {"x": torch.tensor([1.1, float("nan"), 0.0]), "n": 3}, exact=False)
    assert "other places" in outputs_differ(a, {"x": torch.tensor([1.0, 2.0, 0.0]), "n": 3}, exact=False)
    assert "instead of" in outputs_differ(a, {"x": torch.ones(2), "n": 3}, exact=False)
    assert "1 output tensors" in outputs_differ([torch.ones(1), torch.ones(1)], [torch.ones(1)], exact=True)


def test_an_analysis_that_changes_something_is_caught() -> None:
    from dataclasses import dataclass

    from sparsec.passes import Sparsity
    from sparsec.pipeline import PassResult

    @dataclass(frozen=True)
    class Meddler(Sparsity):
        def run(self, graph: Graph, context: Context) -> PassResult:
            graph.update("up.weight", mask=torch.ones(8, 4).bool(), pattern="unstructured")
            return PassResult(False, "looked only")

    model, x = small()
    with pytest.raises(VerifyError, match="declared an analysis"):
        Pipeline((Meddler(),)).run(trace(model, x))


def test_a_copy_of_a_graph_shares_nothing(lowered: Graph) -> None:
    twin = lowered.copy()
    x = torch.randn(2, 4)
    with torch.no_grad():
        expected = lowered.run(x)
        twin.weights["up.weight"].packed.values.zero_()
        twin.tensor("up.bias").zero_()
        assert torch.equal(lowered.run(x), expected)
        assert not torch.equal(twin.run(x), expected)


def test_a_call_with_wrong_arguments_names_the_inputs(lowered: Graph) -> None:
    with pytest.raises(TypeError, match=r"traced with inputs \('x',\); unknown \['y'\], missing \['x'\]"):
        lowered.run(y=torch.ones(2, 4))


def test_public_names_are_there() -> None:
    assert all(hasattr(sparsec, name) for name in sparsec.__all__)
