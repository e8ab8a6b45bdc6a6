"""recover(values=): training through the rounding ends in weights that are packed bit for bit, and every zero stays."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import tiny_model
from test_recover import text

import sparsec
from sparsec.errors import RecoverError, SpecError
from sparsec.ir.facts import Rounded
from sparsec.ir.graph import Graph
from sparsec.ir.tracer import trace
from sparsec.pipeline import Context, Pipeline
from sparsec.recover.loop import OPTIMIZERS
from sparsec.recover.rounding import REFIT, RoundedWhole


def recovered(spec: str, name: str = "llama", dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    model = tiny_model(name)[0].to(dtype)
    return sparsec.compile(model, f"magnitude(0.5),freeze,{spec}", calibration=text(), **options)


def check(made: Any, values: str) -> None:
    """All masked weights are rounded, zeros are zeros, and packing changes no bit."""
    graph = made.sparsec.graph
    masks = {w.name: w.mask for w in graph.masked()}
    dense = {name: graph.matrix(name).clone() for name in masks}
    for name, mask in masks.items():
        assert not graph.tensor(name)[~mask].any()
        assert graph.rounded(name) is not None, name
        assert graph.rounded(name).values == values
    lowered = sparsec.extend(made, f"lower(bitmap, values='{values}')")
    for name, matrix in dense.items():
        assert torch.equal(lowered.sparsec.graph.weights[name].packed.unpack(), matrix)
    assert not [note for note in lowered.sparsec.records[-1].notes if "rounded" in note]


@pytest.mark.parametrize("method", ["distill", "blocks"])
@pytest.mark.parametrize(
    ("values", "name", "dtype"),
    [("int4mg32", "llama", torch.float32), ("int8", "gpt2", torch.float32), ("int4g32", "llama", torch.bfloat16)],
)
def test_what_was_trained_through_the_rounding_is_packed_bit_for_bit(
    method: str, values: str, name: str, dtype: torch.dtype
) -> None:
    made = recovered(f"recover('{method}', steps=3, values='{values}')", name, dtype)
    check(made, values)


def test_training_through_the_rounding_comes_near_to_the_dense_model() -> None:
    """With rounded weights that were not made anew after a fused step, training ended further away than it had begun."""
    through = recovered("recover(steps=60, values='int4g64', learning_rate=0.001, seed=1)")
    before = recovered("round('int4g64', method='nearest')")
    dense, ids = tiny_model("llama")[0], text()
    with torch.no_grad():
        goal = dense(ids).logits.log_softmax(-1)
        lost = [float((goal.exp() * (goal - m(ids).logits.log_softmax(-1))).sum(-1).mean()) for m in (through, before)]
    assert lost[0] < 0.4 * lost[1]


def student_of(values: str, spec: str = "magnitude(0.5),freeze") -> tuple[Graph, RoundedWhole]:
    model, example = tiny_model("llama")
    graph = trace(model, example())
    Pipeline.parse(spec).run(graph, Context())
    return graph, RoundedWhole(graph, [w.name for w in graph.masked()], Context(), values)


def test_the_forward_pass_is_rounded_and_the_gradient_goes_straight_through() -> None:
    _, student = student_of("int4g32")
    for name, leaf in student.leaves.items():
        read = student.read(name)
        assert Rounded("int4g32", student._likes[name]).holds(read.detach(), student.masks[name])
        assert not torch.equal(read, leaf)
        slope = torch.randn(read.shape, generator=torch.Generator().manual_seed(0))
        (read * slope).sum().backward()
        assert torch.equal(leaf.grad, slope)
    student.clean()
    for name, leaf in student.leaves.items():
        assert not leaf.grad[~student.masks[name]].any()


def test_a_step_is_seen_and_scales_follow_the_weights_now_and_then() -> None:
    _, student = student_of("int4g32")
    name = next(iter(student.leaves))
    before, like = student.read(name).detach().clone(), student._likes[name]
    student.read(name).square().sum().backward()
    student.clean()
    OPTIMIZERS["sgd"]([student.leaves[name]], 0.2, 0.0).step()  # a fused one changes no tensor's version
    now = student.read(name).detach()
    assert not torch.equal(before, now)
    kept = student.kept()
    lost = float((now - student.leaves[name]).square().sum())
    for _ in range(REFIT - 1):
        student.clean()
    assert student._likes[name] is not like
    assert float((student.read(name) - student.leaves[name]).square().sum()) < lost
    student.restore(kept)
    assert torch.equal(student.read(name).detach(), now), "the best weights come back with their scales"


def test_what_was_rounded_before_keeps_its_scales() -> None:
    graph, student = student_of("int4g32", "magnitude(0.5),freeze,round('int4g32', method='nearest')")
    for name in student.leaves:
        assert student._likes[name] is graph.weights[name].rounded.like
        assert torch.equal(student.read(name).detach(), graph.tensor(name))
    for _ in range(REFIT):
        student.clean()
    assert all(student._likes[name] is graph.weights[name].rounded.like for name in student.leaves)
    assert student_of("int8", "magnitude(0.5),freeze,round('int4g32', method='nearest')")[1]._moving


@pytest.mark.parametrize("method", ["distill", "blocks"])
def test_a_run_that_was_stopped_goes_on_through_the_rounding(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = f"recover('{method}', steps=4, values='int4g32', checkpoint={str(tmp_path / 'state')!r})"
    whole = recovered(f"recover('{method}', steps=4, values='int4g32')")
    first = recovered(spec)
    again = recovered(spec)  # from what was saved last
    for made in (first, again):
        check(made, "int4g32")
    for name, tensor in whole.state_dict().items():
        assert torch.equal(first.state_dict()[name], tensor), name
        assert torch.equal(again.state_dict()[name], tensor), name


def test_what_no_time_was_left_for_is_rounded_all_the_same() -> None:
    made = recovered("recover('blocks', minutes=0.00001, values='int8')")
    check(made, "int8")


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        (
            "recover('lora', values='int8')",
            "values='int8' rounds weights .*: take method='distill' or 'blocks', got 'lora'",
        ),
        ("recover('norms', values='int4g64')", "take method='distill' or 'blocks', got 'norms'"),
        ("recover(values='int3')", "there are no 'int3' values"),
        ("recover(values=8)", "values must be the name of a codec"),
        ("recover(values='int8', regrow='set')", "values='int8' and regrow='set' exclude each other"),
    ],
)
def test_values_that_cannot_be_trained_through_are_refused(spec: str, said: str) -> None:
    with pytest.raises(SpecError, match=said):
        sparsec.Pipeline.parse(spec)


def test_a_dtype_that_no_codes_stand_for_is_refused() -> None:
    with pytest.raises(RecoverError, match=r"and .* is torch\.float64; convert the model first"):
        recovered("recover(steps=1, values='int8')", dtype=torch.float64)
