"""Each pruned weight alone in the dense model: what it is worth, and that the model stays what it was."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import report_cases
import torch
from architectures import tiny_model

import sparsec
from sparsec.data import load_model, load_text
from sparsec.defaults import ALONE, QUICK
from sparsec.errors import DataError
from sparsec.evaluate import Windows, compare, compare_embeddings
from sparsec.pipeline import Pipeline
from sparsec.report import __main__ as command
from sparsec.report.pruning import pruning_lines
from sparsec.study import sensitivity, variants
from sparsec.study.measure import measured_report
from sparsec.study.plan import plan
from sparsec.study.sensitivity import sensitivities

WINDOWS = Windows(torch.randint(2, 60, (2, 12), generator=torch.Generator().manual_seed(0)), "a text", "00", 24)
CALIBRATION = torch.randint(2, 60, (4, 16), generator=torch.Generator().manual_seed(0))


def tensors(model: Any) -> dict[str, torch.Tensor]:
    return dict(model.named_parameters(remove_duplicate=False))


def unchanged(model: Any, before: dict[str, torch.Tensor], values: dict[str, torch.Tensor]) -> bool:
    """The very Parameters, with the very values."""
    now = tensors(model)
    return list(now) == list(before) and all(now[n] is before[n] and torch.equal(now[n], values[n]) for n in now)


@pytest.mark.parametrize("passes", ["magnitude(0.7)", "magnitude(0.7),freeze", "sparsegpt(0.6),freeze,fuse"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_it_is_what_a_model_with_that_weight_alone_pruned_gives(name: str, passes: str) -> None:
    model, _ = tiny_model(name)
    encoder = name == "bert"
    before = tensors(model)
    values = {n: p.detach().clone() for n, p in before.items()}
    learnt = {"calibration": CALIBRATION} if "sparsegpt" in passes else {}
    pruned = sparsec.compile(model, passes, **learnt)
    graph = pruned.sparsec.graph
    found = sensitivities(model, graph, WINDOWS, encoder)
    assert unchanged(model, before, values)
    assert set(found) == {weight.name for weight in graph.masked()}
    assert max(found.values()) > 0
    for chosen in list(found)[:: max(1, len(found) // 3)]:
        twin = copy.deepcopy(model)
        with torch.no_grad():
            tensors(twin)[chosen].copy_(graph.read(chosen))
        both = {"dense": model, "twin": twin}
        twins = compare_embeddings(both, WINDOWS) if encoder else compare(both, WINDOWS)
        expected = max(0.0, 1 - twins["twin"].cosine if encoder else twins["twin"].kl)  # rounding may go below 0
        assert found[chosen] == pytest.approx(expected, rel=1e-6, abs=1e-12)


def test_the_model_is_what_it_was_when_it_fails_in_the_middle(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = tiny_model("llama")
    pruned = sparsec.compile(model, "magnitude(0.7),freeze")
    before = tensors(model)
    values = {n: p.detach().clone() for n, p in before.items()}
    calls: list[int] = []

    def failing(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 4:
            assert not unchanged(model, before, values), "a weight stands in"
            raise KeyboardInterrupt
        return compare(*args, **kwargs)

    monkeypatch.setattr(sensitivity, "compare", failing)
    with pytest.raises(KeyboardInterrupt):
        sensitivities(model, pruned.sparsec.graph, WINDOWS, encoder=False)
    assert unchanged(model, before, values)


def test_a_report_has_it_for_what_was_pruned_also_when_that_is_packed_afterwards() -> None:
    loaded = load_model("tiny")
    planned = plan(loaded, load_text(None), replace(QUICK, sensitivity=2))
    assert planned.alone is not None
    assert planned.alone.tokens.shape == (2, ALONE)
    passes = "magnitude(0.5, targets=('mlp',)),freeze,sparsity,flops,fuse,lower(csr)"
    report, _ = measured_report(loaded, Pipeline.parse(passes), planned)
    assert {row.name for row in report.layers if row.sensitivity is not None} == {
        row.name for row in report.layers if row.packed
    }
    assert any("of the dense model with one weight alone as pruning left it, on 2 x 256" in r for r in report.remarks)
    assert "== Sensitivity: " in report.text()


def test_where_the_dense_model_is_gone_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(variants, "SCARCE", 0.0)
    loaded = load_model("tiny")
    planned = plan(loaded, load_text(None), replace(QUICK, sensitivity=1))
    report, _ = measured_report(loaded, Pipeline.parse("magnitude(0.5),freeze,lower(csr)"), planned)
    assert {row.sensitivity for row in report.layers} == {None}
    assert "sensitivity was not measured: memory does not hold the dense model beside the pruned one" in report.remarks


def test_the_ten_most_sensitive_come_first_and_roles_by_their_middle_one() -> None:
    rows = [row for row in report_cases.report().layers if row.criterion]
    many = [replace(row, name=f"x.{i}.{row.name}", sensitivity=float(i)) for i, row in enumerate(rows * 2)]
    text = "\n".join(pruning_lines(many))
    ranked = text.split("== Sensitivity")[1].split("role, its middle")[0]
    assert "the 10 most sensitive" in ranked
    assert [float(line.split()[-1]) for line in ranked.splitlines() if "%" in line] == [
        float(len(many) - 1 - i) for i in range(10)
    ]
    assert "Sensitivity" not in "\n".join(pruning_lines(rows))


def test_it_needs_a_model_that_runs() -> None:
    with pytest.raises(DataError, match="--sensitivity runs the model, and --no-measure runs none"):
        command._run(command.parser().parse_args(["tiny", "--sensitivity", "--no-measure"]))
    assert command.effort(command.parser().parse_args(["tiny", "--sensitivity"])).sensitivity == 1
    assert command.effort(command.parser().parse_args(["tiny", "--sensitivity", "3"])).sensitivity == 3
