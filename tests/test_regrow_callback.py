"""sparsec.RegrowCallback: masks that move in transformers' Trainer, in every step, saved, resumed and lowered."""

from __future__ import annotations

import copy
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from test_masked import OPTIMISERS, PATTERNS, came_back, fresh, masks
from test_masked_trainers import ROWS, language_model
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

import sparsec
from sparsec.errors import RecoverError, SparsecWarning, SpecError
from sparsec.patterns import Pattern
from sparsec.recover.callback import MASKS

FEW = ("SGD", "AdamW", "AdamW fused", "RMSprop", "Adafactor", "noise")


def step(callback: Any, model: nn.Module, optimiser: Any, number: int, batches: list[Tensor], of: int = 8) -> None:
    """One step as Trainer takes it."""
    state = SimpleNamespace(global_step=number, max_steps=of)
    callback.on_step_begin(None, state, None, model=model)
    for x in batches:
        model(x).square().mean().backward()
    callback.on_pre_optimizer_step(None, state, None, model=model, optimizer=optimiser)
    optimiser.step()
    optimiser.zero_grad()


def obeys(model: Any, before: dict[str, Tensor], optimiser: Any) -> None:
    """Counts, patterns and zeros as they must be after every step."""
    now = masks(model)
    assert came_back(model, now) == 0
    for name, mask in now.items():
        pattern = Pattern.parse(model.sparsec.kept.weights[name].pattern or "unstructured")
        assert int(mask.sum()) == int(before[name].sum())
        assert pattern.holds(mask)
        for moment in optimiser.state[model.get_parameter(name)].values():
            if isinstance(moment, Tensor) and moment.shape == mask.shape:
                assert not moment[~mask].any()


@pytest.mark.parametrize("way", ["rigl", "set"])
@pytest.mark.parametrize("name", FEW)
@settings(max_examples=4, deadline=None)
@given(data=st.data())
def test_counts_patterns_zeros_and_moments_hold_after_every_step(way: str, name: str, data: st.DataObject) -> None:
    model = fresh(data.draw(st.sampled_from(PATTERNS)))
    before, optimiser = masks(model), OPTIMISERS[name](list(model.parameters()))
    torch.manual_seed(data.draw(st.integers(0, 99)))
    callback = sparsec.RegrowCallback(way, share=data.draw(st.floats(0.1, 1.0)), every=data.draw(st.integers(2, 3)))
    for number in range(5):
        batches = [torch.randn(4, 16) for _ in range(data.draw(st.integers(1, 2)))]
        step(callback, model, optimiser, number, batches)
        obeys(model, before, optimiser)
    now = masks(model)
    assert any(not torch.equal(now[each], before[each]) for each in before)
    with warnings.catch_warnings():
        warnings.simplefilter("error", SparsecWarning)
        fast = sparsec.extend(model, "lower(auto, objective='bytes')", verify="facts")
    x = torch.randn(4, 16)
    torch.testing.assert_close(fast(x), model(x), rtol=1e-3, atol=1e-2)


def test_rigl_grows_where_the_gradient_of_all_micro_batches_is_largest() -> None:
    model = fresh("magnitude(0.5, scope='layer')")
    plain, before = copy.deepcopy(model.sparsec.to_dense()), masks(model)
    batches = [torch.randn(4, 16, generator=torch.Generator().manual_seed(n)) for n in range(3)]
    for x in batches:
        plain(x).square().mean().backward()
    step(sparsec.RegrowCallback("rigl", 0.2, 2), model, torch.optim.SGD(model.parameters(), lr=0.0), 2, batches)
    for name, mask in masks(model).items():
        came, gradient = mask & ~before[name], plain.get_parameter(name).grad.abs()
        assert came.any()
        assert gradient[came].min() >= gradient[~mask & ~before[name]].max()


@pytest.mark.parametrize("way", ["rigl", "set"])
@pytest.mark.parametrize(
    ("make", "squares"),
    [
        (lambda p: torch.optim.AdamW(p, lr=0.01, amsgrad=True), ("exp_avg_sq", "max_exp_avg_sq")),
        (lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.9), ("square_avg",)),
    ],
    ids=["AdamW", "RMSprop"],
)
def test_what_comes_has_the_mean_second_moment_of_what_stayed(way: str, make: Any, squares: tuple[str, ...]) -> None:
    model = fresh("magnitude(0.5, scope='layer')")
    optimiser, callback = make(list(model.parameters())), sparsec.RegrowCallback(way, 0.2, 5)
    for number in range(5):
        step(callback, model, optimiser, number, [torch.randn(4, 16)], of=40)
    before, seen = masks(model), 0
    optimiser.step = lambda: None  # to look at what it finds
    step(callback, model, optimiser, 5, [torch.randn(4, 16)], of=40)
    for name, mask in masks(model).items():
        came, stayed, state = (
            mask & ~before[name],
            mask & before[name],
            optimiser.state[model.get_parameter(name)],
        )
        seen += int(came.sum())
        for moment in (value for value in state.values() if value.shape == mask.shape):
            assert not moment[~mask].any()
        for square in (state[each] for each in squares):
            torch.testing.assert_close(square[came], square[stayed].mean().expand(int(came.sum())), rtol=1e-5, atol=0)
            assert (square[came] > 0).all()
        for first in (state[each] for each in ("exp_avg", "momentum_buffer") if each in state):
            assert not first[came].any()
    assert seen


@pytest.mark.parametrize("way", ["rigl", "set"])
def test_what_comes_takes_no_longer_steps_than_what_stayed(way: str) -> None:
    """Regression: its second moment began at zero, and AdamW's steps for it were several times the learning rate."""
    torch.manual_seed(0)
    model = fresh("magnitude(0.5, scope='layer')")
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.0)
    callback, x = sparsec.RegrowCallback(way, 0.2, 400), torch.randn(64, 16)
    for number in range(400):
        step(callback, model, optimiser, number, [x], of=4000)
    before = masks(model)
    step(callback, model, optimiser, 400, [x], of=4000)
    for number in range(401, 416):
        held = {name: model.get_parameter(name).detach().clone() for name in before}
        step(callback, model, optimiser, number, [x], of=4000)
        for name, mask in masks(model).items():
            steps = (model.get_parameter(name).detach() - held[name]).abs()[mask & ~before[name]]
            assert len(steps)
            assert float(steps.median()) < 2e-4


def test_masks_stay_where_a_gradient_is_not_finite_and_that_is_said() -> None:
    model = fresh()
    before = masks(model)
    with pytest.warns(SparsecWarning, match=r"not finite in step 3.*up\.weight"):
        step(
            sparsec.RegrowCallback(every=2),
            model,
            torch.optim.SGD(model.parameters(), lr=0.0),
            2,
            [torch.full((4, 16), torch.inf)],
        )
    assert all(torch.equal(mask, before[name]) for name, mask in masks(model).items())
    obeys(model, before, torch.optim.SGD(model.parameters()))


def test_nothing_is_recorded_between_two_moves() -> None:
    model = fresh()
    holding, optimiser = model.sparsec.holding, torch.optim.SGD(model.parameters(), lr=0.01)
    for number in range(4):
        step(sparsec.RegrowCallback(every=2), model, optimiser, number, [torch.randn(4, 16)])
        assert holding.record(on=False) == {}


def trainer(model: Any, folder: Path, callback: Any, **options: Any) -> Trainer:
    given_ = {
        "output_dir": str(folder),
        "max_steps": 8,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 0.01,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "save_steps": 4,
        "logging_strategy": "no",
    }
    args = TrainingArguments(**given_ | options)
    return Trainer(model=model, args=args, train_dataset=ROWS, eval_dataset=ROWS, callbacks=[callback])


@pytest.mark.parametrize("way", ["rigl", "set"])
def test_a_resumed_run_ends_where_one_without_a_stop_does(way: str, tmp_path: Path) -> None:
    first, second = language_model(), language_model()
    before = masks(first)
    with warnings.catch_warnings():
        warnings.simplefilter("error", SparsecWarning)
        trainer(first, tmp_path, sparsec.RegrowCallback(way, every=2)).train()
        trainer(second, tmp_path, sparsec.RegrowCallback(way, every=2)).train(
            resume_from_checkpoint=str(tmp_path / "checkpoint-4")
        )
    ended, again = masks(first), masks(second)
    assert all(torch.equal(ended[name], again[name]) for name in ended)
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name
    middle = load_file(tmp_path / "checkpoint-4" / MASKS)
    assert middle.keys() == before.keys()
    for name, mask in middle.items():
        assert not torch.equal(mask, before[name])
        assert not torch.equal(mask, ended[name])
        assert int(mask.sum()) == int(before[name].sum()) == int(ended[name].sum())
    fast = sparsec.extend(second.eval(), "lower(auto, objective='bytes')", verify="facts")
    assert any(weight.packed is not None for weight in fast.sparsec.graph.weights.values())


def test_the_best_model_comes_back_with_its_masks(tmp_path: Path) -> None:
    model = language_model()
    with warnings.catch_warnings():
        warnings.simplefilter("error", SparsecWarning)
        made = trainer(
            model,
            tmp_path,
            sparsec.RegrowCallback(every=2),
            eval_strategy="steps",
            eval_steps=2,
            save_steps=2,
            load_best_model_at_end=True,
            metric_for_best_model="loss",
            greater_is_better=True,  # the worst, so that it is not the last
        )
        made.train()
        assert made.state.best_model_checkpoint == str(tmp_path / "checkpoint-2")
        sparsec.extend(model.eval(), "lower(csr)", verify="facts")
    best = load_file(tmp_path / "checkpoint-2" / MASKS)
    assert all(torch.equal(mask, best[name]) for name, mask in masks(model).items())
    saved = type(model).from_pretrained(tmp_path / "checkpoint-2").state_dict()
    assert all(torch.equal(value, saved[name]) for name, value in model.state_dict().items())


def test_checkpoints_whose_masks_are_missing_or_others_are_refused(tmp_path: Path) -> None:
    trainer(language_model(), tmp_path, sparsec.RegrowCallback(every=2)).train()
    checkpoint = tmp_path / "checkpoint-4"
    file = checkpoint / MASKS
    kept = {each: mask.clone() for each, mask in load_file(file).items()}  # the file is written over below
    name = next(iter(kept))

    def refused(why: str, model: Any = None, late: bool = False) -> None:
        callback = sparsec.RegrowCallback(every=2)
        made = trainer(language_model() if model is None else model, tmp_path, callback)
        if late:
            made = trainer(language_model(), tmp_path, _Nothing())
            made.add_callback(callback)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SparsecWarning)
            with pytest.raises(RecoverError, match=why):
                made.train(resume_from_checkpoint=str(checkpoint))

    refused("give the callback to the Trainer when that is made", late=True)
    file.write_bytes(load_bytes := (tmp_path / "checkpoint-8" / MASKS).read_bytes())
    refused(rf"{MASKS}.*not of the weights that were loaded.*output_dir")
    file.write_bytes(load_bytes[:100])
    refused(rf"{MASKS}: cannot be read")
    save_file({each: mask for each, mask in kept.items() if each != name}, file)
    refused(rf"of another model: {name} needs a mask of bool .*got none")
    save_file(kept | {name: kept[name].float()}, file)
    refused(rf"of another model: {name} .*got float32")
    file.unlink()
    refused(rf"checkpoint-4.{MASKS}: this file is missing.*zeros,freeze")


class _Nothing(sparsec.RegrowCallback):
    """A callback that does nothing."""

    def on_init_end(self, *_: Any, **__: Any) -> None: ...
    def on_train_begin(self, *_: Any, **__: Any) -> None: ...
    def on_step_begin(self, *_: Any, **__: Any) -> None: ...
    def on_save(self, *_: Any, **__: Any) -> None: ...
    def on_train_end(self, *_: Any, **__: Any) -> None: ...


def test_models_whose_masks_cannot_move_are_refused(tmp_path: Path) -> None:
    held = language_model()
    plain = held.sparsec.to_dense()
    with pytest.raises(RecoverError, match=r"LlamaForCausalLM.*sparsec\.masked"):
        trainer(plain, tmp_path, sparsec.RegrowCallback())
    with pytest.raises(RecoverError, match="several masked models"):
        sparsec.RegrowCallback().on_init_end(None, None, None, model=nn.Sequential(fresh(), fresh()))
    for name in masks(held):
        held.get_parameter(name).requires_grad_(False)
    with pytest.raises(RecoverError, match=r"no masked weight.*requires_grad"):
        trainer(held, tmp_path, sparsec.RegrowCallback()).train()


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"way": "grow"}, r"way must be one of 'rigl', 'set', got 'grow'"),
        ({"share": 0}, r"share must be a number above 0, got 0"),
        ({"share": 1.5}, r"share must be a number.*got 1\.5"),
        ({"every": 0}, r"every must be a whole number above 0, got 0"),
        ({"seed": -1}, r"seed must be a whole number from 0 to 2\*\*32 - 1, got -1"),
    ],
)
def test_wrong_options_are_named(options: dict[str, Any], why: str) -> None:
    with pytest.raises(SpecError, match=why):
        sparsec.RegrowCallback(**options)


def test_a_state_that_waits_for_its_masks_is_held_when_the_model_runs() -> None:
    model = fresh()
    sparsec.RegrowCallback().on_init_end(None, None, None, model=model)
    dense = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    with warnings.catch_warnings():
        warnings.simplefilter("error", SparsecWarning)
        model.load_state_dict(dense)
    assert all(torch.equal(p, dense[name]) for name, p in model.named_parameters())
    with pytest.warns(SparsecWarning, match="a loaded state"):
        model(torch.randn(2, 16))
    assert came_back(model, masks(model)) == 0


def test_importing_sparsec_imports_no_trainer() -> None:
    script = (
        "import sys, sparsec; assert 'transformers' not in sys.modules; sparsec.RegrowCallback; "
        "print('transformers.trainer' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
