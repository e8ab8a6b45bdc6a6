"""sparsec.masked: zeros that survive other people's training, step by step."""

from __future__ import annotations

import copy
import gc
import pickle
import warnings
import weakref
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

import pytest
import torch
from architectures import Mlp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_, parametrize
from transformers.optimization import Adafactor

import sparsec
from sparsec.errors import CompileError, MaskError, SparsecWarning
from sparsec.recover.holding import Guard

PATTERNS = (
    "magnitude(0.5)",
    "magnitude(0.7, scope='row')",
    "magnitude(pattern='2:4')",
    "magnitude(pattern='4:8')",
    "magnitude(0.5, pattern='block:4x4')",
)


class Noise(torch.optim.Optimizer):
    """Somebody's own: it writes everywhere, and past autograd's version counters."""

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        super().__init__(parameters, {})

    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Gradients, their signs and noise."""
        for parameter in (p for group in self.param_groups for p in group["params"]):
            moment = self.state[parameter].setdefault("moment", torch.zeros_like(parameter))
            moment.mul_(0.9).add_(parameter.grad)
            parameter.data.add_(moment + parameter.grad.sign(), alpha=-0.01).add_(torch.randn_like(parameter))


OPTIMISERS: dict[str, Callable[[list[Tensor]], torch.optim.Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1, nesterov=True),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01, amsgrad=True),
    "AdamW foreach": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=True),
    "AdamW fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.9, centered=True),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=0.01, weight_decay=0.1),
    "Rprop": lambda p: torch.optim.Rprop(p, lr=0.01),
    "Muon": lambda p: torch.optim.Muon([each for each in p if each.dim() == 2], lr=0.01),
    "Adafactor": lambda p: Adafactor(p, lr=0.01, relative_step=False, scale_parameter=False, beta1=0.9),
    "noise": Noise,
}
X = torch.randn(8, 16, generator=torch.Generator().manual_seed(1))
ROWS = torch.arange(32).view(2, 16)


@cache
def _pruned(spec: str) -> nn.Module:
    return sparsec.compile(Mlp().eval(), f"{spec},freeze", example_inputs=X)


def fresh(spec: str = PATTERNS[0]) -> Any:
    return sparsec.masked(copy.deepcopy(_pruned(spec)))


def masks(model: nn.Module) -> dict[str, Tensor]:
    return {w.name: w.mask.clone() for w in model.sparsec.kept.masked()}


def parameters(model: nn.Module) -> dict[str, Tensor]:
    """Those with masks, whatever became of their names."""
    graph = model.sparsec.kept
    return {w.name: graph.tensor(w.name) for w in graph.masked()}


def came_back(model: nn.Module, kept: dict[str, Tensor]) -> int:
    """Pruned values that are not zero, read without asking anybody."""
    return sum(int((model.get_parameter(name)[~mask] != 0).sum()) for name, mask in kept.items())


def step(model: Any, optimiser: torch.optim.Optimizer, x: Tensor = X) -> None:
    optimiser.zero_grad()
    model(x).square().sum().backward()
    optimiser.step()


@pytest.mark.parametrize("name", OPTIMISERS)
@settings(max_examples=6)
@given(data=st.data())
def test_zeros_survive_any_optimiser_and_its_moments_hold_nothing_there(name: str, data: st.DataObject) -> None:
    model = fresh(data.draw(st.sampled_from(PATTERNS)))
    before, kept = {n: p.clone() for n, p in model.named_parameters()}, masks(model)
    accumulated, clipped = data.draw(st.integers(1, 2)), data.draw(st.booleans())
    noisy = data.draw(st.booleans())
    torch.manual_seed(data.draw(st.integers(0, 99)))
    optimiser = OPTIMISERS[name](list(model.parameters()))
    for _ in range(data.draw(st.integers(1, 3))):
        optimiser.zero_grad()
        for _ in range(accumulated):
            model(torch.randn(4, 16)).square().sum().backward()
        for path, mask in kept.items():
            assert not model.get_parameter(path).grad[~mask].any()
            if noisy:
                model.get_parameter(path).grad.add_(torch.randn(mask.shape))
        if clipped:
            clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        assert came_back(model, kept) == 0
        for path, mask in kept.items():
            for moment in optimiser.state[model.get_parameter(path)].values():
                if (
                    isinstance(moment, Tensor) and moment.shape == mask.shape and name != "Rprop"
                ):  # which keeps step sizes
                    assert not moment[~mask].any()
    assert all(torch.equal(mask, kept[path]) for path, mask in masks(model).items())
    changed = [n for n, p in model.named_parameters() if not torch.equal(p, before[n])]
    assert set(changed) >= set(kept)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not model.sparsec.report().notes
        fast = sparsec.extend(model, "lower(csr)", verify="facts")
    for weight in fast.sparsec.graph.weights.values():
        if weight.packed is not None:
            assert weight.nnz == int(kept[weight.name].count_nonzero())
    torch.testing.assert_close(fast(X), model(X), rtol=1e-3, atol=1e-3)
    assert not [hook for m in fast.modules() for hook in m._forward_pre_hooks.values()]


def test_without_masked_training_brings_values_back() -> None:
    """What the tests above would see if nothing were held."""
    model = copy.deepcopy(_pruned(PATTERNS[0]))
    step(model, torch.optim.SGD(model.parameters(), lr=0.1))
    assert came_back(model, masks(model)) > 100


def test_a_gradient_that_is_not_finite_leaves_nothing_at_pruned_positions() -> None:
    model = fresh()
    kept = masks(model)
    (model(X).sum() * torch.inf).backward()
    assert not any(model.get_parameter(n).grad[~mask].any() for n, mask in kept.items())
    gradients = torch.autograd.grad(model(X).sum(), [model.get_parameter(n) for n in kept])
    assert not any(g[~mask].any() for g, mask in zip(gradients, kept.values(), strict=True))


def test_what_is_no_optimiser_of_torch_is_undone_before_the_model_runs_or_is_read() -> None:
    model = fresh()
    kept = masks(model)
    for read in (lambda: model(X), model.state_dict, lambda: model.mid(torch.randn(2, 32)), model.up.state_dict):
        model(X).sum().backward()
        for p in model.parameters():
            p.data.sub_(p.grad + 1.0)
        assert came_back(model, kept) > 100
        with warnings.catch_warnings():  # it followed a gradient, so it is training
            warnings.simplefilter("error")
            read()
        assert came_back(model, kept) == 0


def test_a_write_that_no_gradient_led_to_is_undone_and_said() -> None:
    model = fresh()
    kept = masks(model)
    with torch.no_grad():
        model.mid.weight.add_(1.0)
    text = rf"{int((~kept['mid.weight']).sum())} pruned values were written past every optimiser.*mid\.weight"
    with pytest.warns(SparsecWarning, match=text):
        model.sparsec.report()
    assert came_back(model, kept) == 0


@pytest.mark.parametrize("trained", ["by a step", "and run again"])
def test_it_is_said_of_a_model_that_was_trained_before(trained: str) -> None:
    model = fresh()
    model(X).square().sum().backward()
    if trained == "by a step":
        torch.optim.SGD(model.parameters(), lr=0.1).step()
    else:
        model(X)
    with torch.no_grad():
        model.mid.weight.add_(1.0)
    with pytest.warns(SparsecWarning, match="written past every optimiser"):
        model(X)


@pytest.mark.parametrize("assign", [True, False])
def test_a_loaded_state_keeps_the_zeros_and_that_is_said(assign: bool) -> None:
    model = fresh()
    kept = masks(model)
    dense = {name: torch.randn_like(p) for name, p in Mlp().named_parameters()}
    with pytest.warns(SparsecWarning, match="a loaded state"):
        model.load_state_dict(dense, assign=assign)
    assert came_back(model, kept) == 0
    assert all(torch.equal(model.get_parameter(n)[mask], dense[n][mask]) for n, mask in kept.items())
    step(model, torch.optim.AdamW(model.parameters()))
    assert came_back(model, kept) == 0


def test_parameters_may_be_moved_converted_and_thawed() -> None:
    model = fresh().bfloat16()
    kept = masks(model)
    model.requires_grad_(False)
    model(X.bfloat16())
    model.mid.weight.requires_grad_(True)
    step(model, Noise([model.mid.weight]), X.bfloat16())
    assert model.mid.weight.grad.dtype == torch.bfloat16
    assert not model.mid.weight.grad[~kept["mid.weight"]].any()
    assert came_back(model, kept) == 0
    model.up.weight = nn.Parameter(torch.randn(32, 16, dtype=torch.bfloat16))
    with pytest.warns(SparsecWarning):
        model(X.bfloat16())
    step(model, Noise([model.up.weight]), X.bfloat16())
    assert not model.up.weight.grad[~kept["up.weight"]].any()
    assert came_back(model, kept) == 0


def test_a_table_with_gradients_of_its_rows() -> None:
    module = nn.Sequential(nn.Embedding(32, 8, sparse=True), nn.Linear(8, 8, bias=False))
    module[1].weight = nn.Parameter(torch.randn(8, 8))
    made = sparsec.compile(module, "magnitude(0.5, targets='*'),freeze", example_inputs=ROWS)
    graph = made.sparsec.kept
    graph.update("0.weight", mask=torch.rand(32, 8) > 0.5, frozen=True, pattern="unstructured")
    with torch.no_grad():
        made[0].weight.masked_fill_(~graph.weights["0.weight"].mask, 0)
    made = sparsec.masked(made)
    optimiser = torch.optim.SparseAdam([made[0].weight])
    made(ROWS).square().sum().backward()
    assert made[0].weight.grad.is_sparse
    assert not made[0].weight.grad.to_dense()[~masks(made)["0.weight"]].any()
    optimiser.step()
    assert came_back(made, masks(made)) == 0


def test_copies_are_held_each_by_itself() -> None:
    model = fresh()
    twin = copy.deepcopy(copy.deepcopy(model))
    before, kept = copy.deepcopy(model.state_dict()), masks(model)
    step(twin, Noise(twin.parameters()))
    assert came_back(twin, kept) == 0
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    for each in (model, twin):
        each.mid.weight.data.add_(1.0)
        with pytest.warns(SparsecWarning):
            each(X)
        assert came_back(each, kept) == 0
    twin.sparsec.kept.update("mid.weight", mask=torch.ones(32, 32, dtype=torch.bool))
    step(model, Noise(model.parameters()))
    step(twin, Noise(twin.parameters()))
    assert came_back(model, kept) == 0
    assert came_back(twin, {"mid.weight": kept["mid.weight"]}) > 100, "a mask that moves is taken from the graph"


def test_a_masked_model_is_freed_like_any_other() -> None:
    model = fresh()
    optimiser = torch.optim.AdamW(model.parameters())
    step(model, optimiser)
    gone, holding = weakref.ref(model), weakref.ref(model.sparsec.holding)
    gc.collect()
    gc.disable()
    try:
        del model
        assert gone() is None
        del optimiser
        assert holding() is None
    finally:
        gc.enable()


def test_what_came_out_of_a_pickle_or_was_copied_in_part_says_that_it_has_no_masks() -> None:
    model = fresh()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lost = [pickle.loads(pickle.dumps(model)), copy.deepcopy(model.mid)]
        dense = model.sparsec.to_dense()
        step(dense.train(), Noise(dense.parameters()))
    for part, x in zip(lost, (X, torch.randn(2, 32)), strict=True):
        part.eval()(x)
        with pytest.warns(SparsecWarning, match=r"came without its masks.*'zeros,freeze'"):
            part.train()(x)
    again = sparsec.masked(sparsec.compile(lost[0], "zeros,freeze", example_inputs=X)).train()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(again, Noise(again.parameters()))
    assert came_back(again, masks(model)) == 0


def test_extend_that_does_not_lower_goes_on_holding() -> None:
    model = fresh()
    more = sparsec.extend(model, "magnitude(0.8),freeze")
    kept = masks(more)
    assert sum(int(m.sum()) for m in kept.values()) < sum(int(m.sum()) for m in masks(model).values())
    step(more, Noise(more.parameters()))
    assert came_back(more, kept) == 0
    step(model, Noise(model.parameters()))
    assert came_back(model, masks(model)) == 0
    assert sparsec.masked(more) is more
    used = sparsec.extend(more, "lower(csr)", copy=False)
    assert not [
        hook for m in used.modules() for hook in (*m._forward_pre_hooks.values(), *m._state_dict_pre_hooks.values())
    ]


def test_what_grew_before_it_was_masked_is_kept_and_said() -> None:
    model = copy.deepcopy(_pruned(PATTERNS[0]))
    with torch.no_grad():
        model.mid.weight.add_(1.0)
    with pytest.warns(SparsecWarning, match="no longer zero and count as kept"):
        sparsec.masked(model)
    assert came_back(model, {"mid.weight": model.sparsec.graph.weights["mid.weight"].mask}) == 0
    assert bool(model.mid.weight.all())


def test_a_compiled_model_holds_by_gradients_and_steps() -> None:
    model = fresh()
    kept, optimiser = masks(model), Noise(model.parameters())
    step(torch.compile(model, backend="aot_eager", fullgraph=True), optimiser)
    assert not any(model.get_parameter(n).grad[~mask].any() for n, mask in kept.items())
    assert came_back(model, kept) == 0


def test_a_call_with_other_tensors_leaves_those_alone() -> None:
    model = fresh()
    given_ = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    before = copy.deepcopy(given_)
    torch.func.functional_call(model, given_, (X,))
    assert all(torch.equal(t, before[name]) for name, t in given_.items())


def sharded(model: Any) -> None:
    model.mid.weight = nn.Parameter(model.mid.weight.data[:4].clone())


def computed(model: Any) -> None:
    parametrize.register_parametrization(model.mid, "weight", nn.Identity())


@pytest.mark.parametrize("change", [sharded, computed])
def test_a_weight_that_cannot_be_held_stops_the_training(change: Callable[[Any], None]) -> None:
    model = fresh()
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    change(model)
    with pytest.raises(MaskError, match=r"mid\.weight .*cannot be held"):
        model(X)
    optimiser.step()  # of what it was given, and that of others
    if change is sharded:
        with pytest.raises(MaskError, match=r"mid\.weight .*cannot be held"):
            torch.optim.SGD(model.parameters(), lr=0.1).step()


def test_refusals_say_the_way_out() -> None:
    for model, why in (
        (sparsec.extend(_pruned(PATTERNS[0]), "lower(csr)"), "lowered already.*before the pass lower runs"),
        (sparsec.compile(Mlp().eval(), "sparsity", example_inputs=X), "has no masks: sparsity prunes nothing"),
        (Mlp(), r"masked takes what sparsec\.compile gave back.*'zeros,freeze'"),
        (sparsec.compile(Mlp().eval(), "magnitude(0.5),freeze", example_inputs=X, copy="changed"), "with copy=True"),
        (torch.compile(fresh()), r"\._orig_mod"),
        (pickle.loads(pickle.dumps(fresh())), "zeros,freeze"),
        (None, "takes a torch.nn.Module"),
    ):
        with pytest.raises(CompileError, match=why):
            sparsec.masked(model)
    model = copy.deepcopy(_pruned(PATTERNS[0]))
    model.mid = nn.Sequential(nn.Linear(32, 32))
    with pytest.raises(MaskError, match=r"mid\.weight is in the model no more"):
        sparsec.masked(model)


def test_guards_of_others_are_left_alone() -> None:
    model = fresh()
    calls: list[int] = []
    handle = model.mid.register_forward_pre_hook(lambda module, args: calls.append(1))
    more = sparsec.extend(model, "magnitude(0.8),freeze")
    more(X)
    handle.remove()
    model(X)
    assert calls == [1]
    assert sum(isinstance(hook, Guard) for m in more.modules() for hook in m._forward_pre_hooks.values()) == 4
