"""What prunes after a training goes on from the trained weights, and says so."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from architectures import tiny_model
from test_recover import recovered, text

import sparsec
from sparsec.metrics import first_tensor

FIRST = "wanda(0.5),freeze,recover(steps=20, batch=4, learning_rate=0.003)"


def notes(compiled: Any, name: str) -> str:
    return " ".join(note for r in compiled.sparsec.records if r.name == name for note in r.notes)


def weights(compiled: Any) -> dict[str, Any]:
    graph = compiled.sparsec.graph
    return {w.name: graph.tensor(w.name).detach() for w in graph.masked()}


@pytest.mark.parametrize(
    ("last", "copy"),
    [("admm(0.7)", True), ("admm(pattern='2:4')", False), ("sparsegpt(0.7)", "changed"), ("wanda(0.7),admm", True)],
)
def test_pruning_after_a_training_begins_with_what_was_trained(last: str, copy: bool | str) -> None:
    model = lambda: tiny_model("llama")[0]  # noqa: E731
    trained = recovered(FIRST, model())
    once = recovered(f"{FIRST},{last},freeze", model(), copy=copy)
    # The trained weights, compiled as if they were a checkpoint that somebody pruned.
    anew = sparsec.compile(trained.sparsec.to_dense(), f"zeros,{last},freeze", calibration=text())
    found, wanted = weights(once), weights(anew)
    for name, weight in found.items():
        torch.testing.assert_close(weight, wanted[name], rtol=1e-4, atol=1e-6)
    if last.startswith("admm"):
        assert "outputs were brought back to those of the weights as they were trained" in notes(once, "admm")


def test_admm_on_the_masks_of_a_training_leaves_what_was_trained() -> None:
    trained, after = recovered(FIRST), recovered(f"{FIRST},admm,freeze")
    for name, weight in weights(trained).items():
        assert torch.equal(weight, weights(after)[name]), name
    assert "put admm before the training, or prune further, as in admm(0.7)" in notes(after, "admm")
    dense = tiny_model("llama")[0]
    later = sparsec.extend(trained, "admm", calibration=text(), teacher=dense)
    for name, weight in weights(trained).items():
        assert torch.equal(weight, weights(later)[name]), name
    part = recovered("wanda(0.5),freeze,recover('norms', steps=2),admm,freeze")
    assert "trained" not in notes(part, "admm"), "norms alone were"
    assert not torch.equal(
        weights(part)["model.layers.0.mlp.up_proj.weight"], weights(trained)["model.layers.0.mlp.up_proj.weight"]
    )


@pytest.mark.parametrize("between", ["wanda(0.7),freeze", "admm(0.7)", "sparsegpt(0.7),freeze"])
def test_trained_weights_that_were_pruned_again_are_not_held_and_that_is_said(between: str) -> None:
    once, twice = recovered(f"{FIRST},{between}"), recovered(f"{FIRST},{between},admm,freeze")
    assert "replaced the dense weights, and they are not held any more" in notes(twice, "admm")
    assert "after a training, prune and bring back in one pass" in notes(twice, "admm")
    for name, weight in weights(once).items():
        found = weights(twice)[name]
        assert float((found - weight).norm()) < 1e-3 * float(weight.norm()), name


def test_admm_after_a_training_of_ones_own_leaves_what_was_trained() -> None:
    dense = tiny_model("llama")[0]
    model = sparsec.masked(sparsec.compile(dense, "wanda(0.5),freeze", calibration=text()))
    optimiser = torch.optim.AdamW(model.parameters(), lr=0.003)
    for _ in range(3):
        model(text(), labels=text()).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    after = sparsec.extend(model.eval(), "admm", calibration=text(), teacher=dense)
    with torch.no_grad():
        assert torch.equal(first_tensor(model(text())), first_tensor(after(text())))
    untouched = sparsec.masked(sparsec.compile(dense, "wanda(0.5),freeze", calibration=text()))
    updated = sparsec.extend(untouched, "admm", calibration=text(), teacher=dense)
    with torch.no_grad():
        assert not torch.equal(first_tensor(untouched(text())), first_tensor(updated(text())))
