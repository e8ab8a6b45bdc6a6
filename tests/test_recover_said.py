"""recover: one folder keeps one training, a stop costs nothing that was trained, and what did nothing is said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import tiny_model
from test_recover import killed_after, recovered, text, told

import sparsec
import sparsec.recover.precision as precision
from sparsec.errors import PipelineError, SpecError
from sparsec.pipeline import Pipeline
from sparsec.recover.figures import Looking
from sparsec.recover.loop import Training

FIRST = "magnitude(0.5),freeze"


def test_two_trainings_in_one_folder_are_refused_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    def never(self: Any) -> None:
        raise AssertionError("trained")

    with monkeypatch.context() as patch:
        patch.setattr(Training, "run", never)
        for one, two in (("a", "a"), ("a", "./a"), ("a", str(tmp_path / "b" / ".." / "a"))):
            spec = f"recover('norms', steps=2, checkpoint={one!r}),recover(steps=2, checkpoint={two!r})"
            with pytest.raises(
                PipelineError, match=r"pass 4 'recover' and pass 3 'recover' keep .* its own checkpoint="
            ):
                recovered(f"{FIRST},{spec}")
    spec = f"{FIRST},recover('norms', steps=2, checkpoint='a'),recover(steps=2, checkpoint='b')"
    first, again = recovered(spec), recovered(spec)
    assert "went on from step 2" in again.sparsec.records[3].notes[0]
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize("method", ["distill", "blocks"])
@pytest.mark.parametrize("faster", ["fp32", "bf16"])
def test_a_run_that_goes_on_computes_as_it_began(
    method: str, faster: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = f"recover('{method}', steps=4, checkpoint={str(tmp_path)!r})"
    monkeypatch.setattr(precision, "bf16_pays", lambda device: faster == "bf16")
    with killed_after(2):
        recovered(spec)
    assert json.loads((tmp_path / "recover.json").read_text())["dtype"] == faster
    whole = recovered(f"recover('{method}', steps=4)")
    monkeypatch.setattr(precision, "bf16_pays", lambda device: faster != "bf16")
    again = recovered(spec)
    assert "went on from" in told(again)
    assert ("bfloat16" in told(again)) == (faster == "bf16")
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize("method", ["distill", "blocks", "norms", "lora"])
def test_an_interrupt_of_the_last_figures_keeps_what_is_trained(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = recovered(f"recover('{method}', steps=3)")
    own, calls = Looking.figures, 0

    def figures(self: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyboardInterrupt
        return own(self)

    monkeypatch.setattr(Looking, "figures", figures)
    made = recovered(f"recover('{method}', steps=3),lower(bitmap)")
    assert "interrupted while the figures after the training were taken; the trained weights stay" in told(made)
    assert "no figures on 1 sequences held out" in told(made)
    training = made.sparsec.records[2].training
    assert training.held_out.perplexity_before > 0
    assert training.held_out.perplexity_after is None
    assert made.sparsec.report()
    with torch.no_grad():
        torch.testing.assert_close(made(text()).logits, plain(text()).logits, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("pattern", ["0.8, scope='layer'", "pattern='2:4'"])
def test_masks_that_moved_in_vain_are_back_where_they_were(pattern: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The best weights were those before the first step, and went to the places of masks that had moved since."""
    before = sparsec.compile(tiny_model("llama")[0], f"magnitude({pattern}),freeze")
    monkeypatch.setattr(Training, "_look", lambda self: None)  # nothing is ever better
    spec = f"magnitude({pattern}),freeze,recover(steps=4, regrow='rigl', regrow_every=1, learning_rate=0.01)"
    after = recovered(spec, verify="facts")
    assert "training made nothing better" in told(after)
    for weight in after.sparsec.graph.masked():
        known = before.sparsec.graph.weights[weight.name]
        assert torch.equal(weight.mask, known.mask)
        assert torch.equal(after.sparsec.graph.tensor(weight.name), before.sparsec.graph.tensor(weight.name))


@pytest.mark.parametrize("name", ["mixtral", "qwen2-moe", "falcon"])
def test_models_that_write_in_place_learn_logits_too(name: str) -> None:
    model = tiny_model(name)[0]
    spec = "recover(steps=4, batch=2, dtype='fp32', recompute={})"
    made, again = (recovered(spec.format(recompute), model) for recompute in (False, True))
    for a, b in zip(made.parameters(), again.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6)
    held = made.sparsec.records[2].training.held_out
    assert "KL from the dense model" in told(made)
    assert held.divergence_after <= held.divergence_before
    with torch.no_grad():
        wanted, found = (m(text()[:1]).logits.log_softmax(-1) for m in (model, made))
    apart = float((wanted.exp() * (wanted - found)).sum(-1).mean())
    assert abs(apart - held.divergence_after) < 1e-6 + 0.01 * apart
    assert "perplexity" in told(recovered("recover(steps=1, cross_entropy=1.0)", model))


def test_a_length_that_cuts_nothing_is_said() -> None:
    model, example = tiny_model("mlp")
    calls = [(example(2, 4 + i)["x"],) for i in range(6)]

    def said(length: str) -> bool:
        made = recovered(f"recover(steps=1{length})", model, calibration=calls, example_inputs=example())
        return "cuts sequences of token ids, and these calls are of other tensors; they stay whole" in told(made)

    assert said(", length=8")
    assert not said("")
    assert not said(", length=None")
    assert "they stay whole" not in told(recovered("recover(steps=1, length=8)"))


def test_a_teacher_from_whom_nothing_is_learned_is_said() -> None:
    dense = tiny_model("llama")[0]
    pruned = sparsec.compile(dense, FIRST)

    def said(spec: str, **options: Any) -> bool:
        made = sparsec.extend(pruned, spec, teacher=dense, **options)
        return any("teacher= was given, and none of" in note for note in made.sparsec.notes)

    assert said("lower(bitmap)")
    assert said("recover(steps=1, cross_entropy=1.0)", calibration=text())
    assert said("sparsegpt(0.7)", calibration=text())
    assert not said("recover(steps=1)", calibration=text())
    assert not said("recover(steps=1, cross_entropy=1.0, hidden=0.1)", calibration=text())
    assert not said("admm", calibration=text())
    assert not said("admm(0.7)", calibration=text())
    assert not said("wanda(0.7)", calibration="self", calibration_sequences=2, calibration_length=8)


def test_masks_that_move_in_every_step_are_refused() -> None:
    with pytest.raises(SpecError, match=r"every must be at least 2 steps, got 1.* take 20 or more"):
        sparsec.RegrowCallback(every=1)
    Pipeline.parse(
        f"{FIRST},recover(steps=2, regrow='rigl', regrow_every=1)"
    )  # where what comes learns in its own step
