"""`copy=False` consumes a model, and nothing that another module of the process holds."""

from __future__ import annotations

from collections.abc import Callable

import numpy
import pytest
import torch
from torch import Tensor, nn

import sparsec
from sparsec.holders import held_elsewhere
from sparsec.kernels import SparseLinear
from sparsec.memory import shared_copy

X = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
SPEC = "magnitude(0.5, targets='*')"


class Tower(nn.Module):
    """A linear directly in the model, and one within a part of it."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(8, 8)
        self.body = nn.Sequential(nn.ReLU(), nn.Linear(8, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self.proj(x))


class Towers(nn.Module):
    """Two towers on the same Parameters."""

    def __init__(self, first: Tower) -> None:
        super().__init__()
        self.first, self.second = first, Tower()
        self.second.proj.weight, self.second.body[1].weight = first.proj.weight, first.body[1].weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(x)


def view(model: Tower) -> nn.Module:
    other = Tower()
    other.proj.weight = nn.Parameter(model.proj.weight.detach())  # the same memory, another Parameter
    return other


def listed(model: Tower) -> nn.Module:
    return nn.Sequential(model.proj)


OTHERS: dict[str, Callable[[Tower], nn.Module]] = {
    "shared copy": shared_copy,
    "changed": lambda model: sparsec.compile(
        model, "magnitude(0.5, targets='proj'),freeze", example_inputs=X, copy="changed"
    ),
    "towers": Towers,
    "view": view,
    "listed": listed,
}


LOWERED = f"{SPEC},freeze,lower(csr)"


@pytest.mark.parametrize(
    ("name", "passes"), [("view", SPEC), ("view", f"{SPEC},freeze"), *((n, LOWERED) for n in OTHERS)]
)
def test_what_another_module_holds_is_neither_written_to_nor_freed(name: str, passes: str) -> None:
    """Regression: the other model lost its weights, or was pruned with this one, in silence."""
    model = Tower().eval()
    other = OTHERS[name](model)
    with torch.no_grad():
        before = other(X)
    made = sparsec.compile(model, passes, example_inputs=X, copy=False)
    (said,) = [note for note in made.sparsec.notes if "copy=False" in note]
    assert ("body" if name == "changed" else "proj") in said
    assert f"{type(other).__name__}" in said
    report = made.sparsec.report()
    assert {row.name for row in report.layers if row.nnz < row.parameters} >= {"proj.weight", "body.1.weight"}
    assert said in report.notes
    with torch.no_grad():
        assert torch.equal(other(X), before)


@pytest.mark.parametrize("passes", [SPEC, f"{SPEC},freeze", LOWERED])
def test_a_state_dict_that_the_user_keeps_stays_what_it_was(passes: str) -> None:
    """Regression: it was given the mask's zeros, in silence."""
    model = Tower().eval()
    state = model.state_dict()
    before = {name: tensor.clone() for name, tensor in state.items()}
    made = sparsec.compile(model, passes, example_inputs=X, copy=False)
    (said,) = [note for note in made.sparsec.notes if "copy=False" in note]
    assert "state dict" in said
    assert all(torch.equal(tensor, before[name]) for name, tensor in state.items())


def test_consuming_a_model_takes_no_memory_away_from_who_reads_it_past_torch() -> None:
    """Regression: an array over a weight's own memory read what was freed, and the process died."""
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))
    model.requires_grad_(False)
    array, mine = numpy.from_dlpack(model[0].weight), model[2].weight
    sparsec.compile(model, LOWERED, example_inputs=torch.randn(3, 64), copy=False)
    assert (array == 0).sum() > 1000
    assert mine.shape == (8, 64)


def test_a_pruned_model_that_is_lowered_in_place_leaves_its_twin_alone() -> None:
    pruned = sparsec.compile(Tower().eval(), f"{SPEC},freeze", example_inputs=X)
    twin = shared_copy(pruned)
    with torch.no_grad():
        before = twin(X)
        fast = sparsec.extend(pruned, "lower(csr)", copy=False)
        assert torch.equal(twin(X), before)
        torch.testing.assert_close(fast(X), before)
    assert any("proj of a Tower" in note for note in fast.sparsec.notes)
    assert isinstance(sparsec.extend(twin, "lower(csr)", copy=False).proj, SparseLinear)


def test_what_stands_around_a_model_or_is_gone_is_nobody_else() -> None:
    model = Tower().eval()
    around = nn.ModuleDict({"tower": model, "body": model.body})
    gone = Towers(model)
    gone.loop = [gone]  # type: ignore[assignment]
    del gone
    assert held_elsewhere(model) == {}
    made = sparsec.compile(model, LOWERED, example_inputs=X, copy=False)
    assert made.sparsec.notes == ()
    assert isinstance(around["body"][1], SparseLinear)


def test_a_model_that_shares_memory_is_converted_by_itself() -> None:
    """Regression: `pruned.half()` converted the dense model's shared weights too."""
    model = Tower().eval()
    pruned = sparsec.compile(model, "magnitude(0.5, targets='proj'),freeze", example_inputs=X, copy="changed")
    assert pruned.body[1].weight.data_ptr() == model.body[1].weight.data_ptr()
    pruned.bfloat16()
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    model(X)
