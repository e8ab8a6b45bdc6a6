"""recover on models of 16 bits: no gradient is too small for float16, no update too small for the weights."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from architectures import tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from test_recover import killed_after, recovered, text, told
from torch import Tensor

import sparsec
import sparsec.passes.recover as recover_pass
import sparsec.recover.blocks as blocks
from sparsec.errors import RecoverError
from sparsec.pipeline.base import Context
from sparsec.recover.loop import RAISE_EVERY, Settings, Training
from sparsec.recover.student import Whole


def first_gradients(method: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """What the first step of a training steps by, where weights are kept."""
    found: dict[str, Tensor] = {}

    class Watched(Training):
        def _gradients(self, batch: Sequence[int]) -> tuple[float, int]:
            told = super()._gradients(batch)
            for name, leaf in self.student.leaves.items():
                if name not in found and leaf.grad is not None:
                    found[name] = leaf.grad[self.student.masks.get(name, ...)].clone()
            return told

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recover_pass, "Training", Watched)
        patch.setattr(blocks, "Training", Watched)
        recovered(
            f"recover('{method}', steps=1, dtype='auto')",
            tiny_model("llama")[0].half().to(dtype),
            calibration=text(8, 128),
        )
    return found


@pytest.mark.parametrize("method", ["distill", "blocks", "norms", "lora"])
def test_gradients_of_a_float16_model_are_those_of_float32(method: str) -> None:
    half, whole = first_gradients(method, torch.float16), first_gradients(method, torch.float32)
    assert half.keys() == whole.keys()
    lost = sum(int(((half[name] == 0) & (whole[name] != 0)).sum()) for name in whole)
    assert lost <= sum(g.numel() for g in whole.values()) / 1000
    if method == "blocks":  # later stretches begin where the first ones ended
        whole = dict(list(whole.items())[:4])
    for name, gradient in whole.items():
        assert float((half[name] - gradient).norm()) <= 0.05 * float(gradient.norm()), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("method", ["distill", "lora"])
def test_updates_smaller_than_a_weights_last_bit_add_up(dtype: torch.dtype, method: str) -> None:
    """At 1e-6 a step no weight of 16 bits would ever move."""
    model = tiny_model("llama")[0].to(dtype)
    pruned = sparsec.compile(model, "magnitude(0.5),freeze")
    name = next(w.name for w in pruned.sparsec.graph.masked())
    weight = pruned.sparsec.graph.tensor(name).detach()
    kept = weight != 0
    rate = 0.05 * float(weight[kept].abs().median()) * torch.finfo(dtype).eps
    few, many = (
        recovered(
            f"recover('{method}', steps={n}, batch=4, learning_rate={rate * (30 if method == 'lora' else 1)})", model
        )
        for n in (1, 120)
    )
    moved = [float((c.sparsec.graph.tensor(name) != weight)[kept].float().mean()) for c in (few, many)]
    assert moved[0] < 0.1
    assert moved[1] > 0.5


def test_products_in_another_dtype_than_a_model_of_16_bits_has_are_refused() -> None:
    for dtype, option in ((torch.bfloat16, "fp32"), (torch.float16, "bf16"), (torch.float16, "fp32")):
        with pytest.raises(RecoverError, match=rf"dtype='{option}' is of models stored in float32.*model\.float\(\)"):
            recovered(f"recover(steps=1, dtype='{option}')", tiny_model("llama")[0].to(dtype))
    assert "bfloat16" in told(recovered("recover(steps=1, dtype='bf16')", tiny_model("llama")[0].bfloat16()))


def training(limit: float, scale: float, steps: int = 3) -> Training:
    """A training whose gradients are inf beyond a scale."""
    pruned = sparsec.compile(tiny_model("llama")[0], "magnitude(0.5),freeze")
    student = Whole(pruned.sparsec.graph, [w.name for w in pruned.sparsec.graph.masked()], Context())

    def gradients(numbers: Sequence[int], scale: float) -> tuple[float, int]:
        for number, leaf in enumerate(student.leaves.values()):
            generator = torch.Generator().manual_seed(100 * numbers[0] + number)
            leaf.grad = torch.randn(leaf.shape, generator=generator) * (scale if scale <= limit else math.inf)
        return 1.0, 1

    looks = itertools.count(100.0, -1.0)
    return Training(student, Settings(steps=steps, scale=scale), 4, gradients, lambda: next(looks))


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 16), st.integers(0, 16))
def test_a_scale_too_large_is_halved_until_gradients_are_finite(limit: int, first: int) -> None:
    scaled, plain = training(2.0**limit, 2.0**first), training(1.0, 1.0)
    for made in (scaled, plain):
        made.run()
    assert scaled.at.scale == 2.0 ** min(limit, first)
    assert scaled.at.steps == plain.at.steps == 3
    assert not scaled.at.notes
    for name, leaf in scaled.student.leaves.items():
        assert torch.equal(leaf, plain.student.leaves[name])


def test_gradients_that_are_finite_at_no_scale_are_a_loss_of_nan() -> None:
    made = training(0.0, 2.0**10)
    made.run()
    assert [note.split(":")[0] for note in made.at.notes] == [
        "the loss was NaN or inf in step 1",
        "the loss was NaN or inf in step 1, again",
    ]
    assert made.at.scale == 2.0**10


def test_a_scale_that_was_halved_comes_back() -> None:
    made = training(2.0**16, 2.0**16, RAISE_EVERY + 2)
    made.at.scale = 4.0
    made.run()
    assert made.at.scale == 16.0  # before the first step and before step RAISE_EVERY


def test_a_killed_run_of_float16_goes_on_to_the_same_result(tmp_path: Path) -> None:
    at, spec = f", checkpoint={str(tmp_path / 'state')!r}", "recover(steps=8, batch=2, learning_rate=0.003"
    model = tiny_model("llama")[0].half()
    with killed_after(3):
        recovered(f"{spec}{at})", model)
    assert json.loads((tmp_path / "state" / "recover.json").read_text())["scale"] > 1
    again, whole = recovered(f"{spec}{at})", model), recovered(f"{spec})", model)
    assert "went on from" in told(again)
    for (name, a), b in zip(whole.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b), name
