"""Weights that change after they were pruned: what came back is kept, counted and said, however it came back."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from architectures import tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from traces import traced as trace

import sparsec
from sparsec.errors import CompileError, FormatError
from sparsec.ir.graph import Graph
from sparsec.ir.settle import settle
from sparsec.ir.verifier import problems
from sparsec.patterns import Pattern
from sparsec.pipeline import Context, Effect, Pass, PassResult, Pipeline


class Net(nn.Module):
    """Three linears of 16 columns; the middle one is twice in the model."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Linear(16, 16), nn.Linear(16, 16, bias=False), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        """x: [rows, 16]."""
        return self.c(torch.relu(self.b(torch.relu(self.b(self.a(x))))))


X = torch.randn(4, 16, generator=torch.Generator().manual_seed(1))
NAMES = ("a.weight", "b.weight", "c.weight")


@cache
def pruned(spec: str = "magnitude(0.5),freeze,sparsity,flops") -> Net:
    return sparsec.compile(Net().eval(), spec, example_inputs=X)


def fresh(spec: str = "magnitude(0.5),freeze,sparsity,flops") -> Net:
    return copy.deepcopy(pruned(spec))


def said(model: nn.Module) -> str:
    notes = (*model.sparsec.notes, *(n for r in model.sparsec.records for n in r.notes))
    return "\n".join(notes)


def train(model: Net) -> None:
    optimiser = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(2):
        model(X).square().sum().backward()
        optimiser.step()
        optimiser.zero_grad()


def dense_state() -> dict[str, Tensor]:
    return {name: torch.randn_like(p) for name, p in Net().named_parameters()}


def replace_data(model: Net) -> None:
    model.b.weight.data = torch.randn(16, 16)


def replace_parameter(model: Net) -> None:
    model.b.weight = nn.Parameter(torch.randn(16, 16))


def replace_module(model: Net) -> None:
    model.b = nn.Linear(16, 16, bias=False)


def swap(model: Net) -> None:
    torch.utils.swap_tensors(model.b.weight, nn.Parameter(torch.randn(16, 16)))


def write(model: Net) -> None:
    with torch.no_grad():
        model.b.weight.add_(1.0)


def nan(model: Net) -> None:
    with torch.no_grad():
        model.b.weight.masked_fill_(model.b.weight == 0, torch.inf)


WAYS: list[Callable[[Net], object]] = [
    train,
    replace_data,
    replace_parameter,
    replace_module,
    swap,
    write,
    nan,
    lambda model: model.load_state_dict(dense_state()),
    lambda model: model.load_state_dict(dense_state(), assign=True),
]


@pytest.mark.parametrize("change", WAYS, ids=[getattr(w, "__name__", "load") for w in WAYS])
def test_what_came_back_is_kept_counted_and_said(change: Callable[[Net], object]) -> None:
    """Regression: it was dropped by lower, and the report showed the sparsity of before."""
    model = fresh()
    change(model)
    report = model.sparsec.report()
    row = next(r for r in report.layers if r.name == "b.weight")
    assert row.nnz == int(model.b.weight.count_nonzero()) > 200
    assert any("no longer zero" in note and "b.weight" in note for note in report.notes)
    fast = sparsec.extend(model, "lower(csr)", verify="facts")
    assert "no longer zero" in said(fast)
    assert "b.weight" in said(fast)
    with torch.no_grad():
        torch.testing.assert_close(fast(X), model(X), equal_nan=True, rtol=1e-4, atol=1e-3)
    packed = fast.sparsec.graph.weights["b.weight"]
    assert packed.nnz == packed.packed.nnz == row.nnz


def test_a_model_that_did_not_change_says_nothing() -> None:
    model = fresh()
    with torch.no_grad():  # a zero where the mask keeps is kept, and what stays zero stays pruned
        model.a.weight.mul_(2).masked_fill_(model.a.weight > 0, -0.0)
    assert not any("no longer" in note for note in model.sparsec.report().notes)
    fast = sparsec.extend(model, "lower(csr)", verify="facts")
    assert said(fast) == said(model)
    assert fast.sparsec.graph.weights["a.weight"].nnz == pruned().sparsec.graph.weights["a.weight"].nnz


def test_saving_says_what_grew_again_and_saves_it(tmp_path: Path) -> None:
    model = sparsec.compile(tiny_model("llama")[0], "magnitude(0.5),freeze")
    model = copy.deepcopy(model)  # whose guard is its own
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.save_pretrained(tmp_path / "as pruned")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.add_(1.0)
    with pytest.warns(
        UserWarning, match=r"LlamaForCausalLM\.save_pretrained: 738 pruned values.*layers\.1\.mlp\.up_proj"
    ):
        model.save_pretrained(tmp_path / "grown")
    saved = type(model).from_pretrained(tmp_path / "grown")
    assert all(torch.equal(p, model.get_parameter(name)) for name, p in saved.named_parameters())


def test_a_report_changes_nothing() -> None:
    model = fresh()
    write(model)
    before = model.sparsec.graph.weights["b.weight"]
    model.sparsec.report()
    assert model.sparsec.graph.weights["b.weight"].mask is before.mask
    with torch.no_grad():
        model.b.weight.masked_fill_(~before.mask, 0)
    assert not model.sparsec.report().notes, "the masks were written again"


def test_what_was_counted_is_counted_again() -> None:
    model = fresh()
    write(model)
    fast = sparsec.extend(model, "lower(csr)", verify="facts")
    assert {"sparsity", "flops"} <= fast.sparsec.graph.facts
    flops = {op.owner: op.flops for op in fast.sparsec.graph.ops.values() if op.owner == "b"}
    assert flops == {"b": 2.0 * fast.sparsec.graph.weights["b.weight"].nnz}
    assert [r.name for r in fast.sparsec.records][4:] == ["sparsity", "flops", "lower"]


def test_one_line_for_many_layers() -> None:
    model = fresh()
    with torch.no_grad():
        for name in NAMES:
            model.get_parameter(name).fill_(1.0)
    (line,) = [n for n in model.sparsec.report().notes if "no longer" in n]
    assert line.startswith("320 pruned values are no longer zero")
    assert all(name in line for name in NAMES)


def test_a_pattern_that_no_longer_holds_is_withdrawn() -> None:
    spec = "magnitude(pattern='2:4'),freeze"
    model = fresh(spec)
    write(model)
    with pytest.raises(
        FormatError, match=r"b\.weight.* 128 of its pruned values came back after freeze, so prune again"
    ):
        sparsec.extend(model, "lower(nm)")
    report = model.sparsec.report()
    assert {r.name: r.criterion for r in report.layers if r.criterion} == {
        "a.weight": "magnitude 2:4",
        "b.weight": "magnitude",
        "c.weight": "magnitude 2:4",
    }
    assert any("b.weight lost its pattern 2:4" in note for note in report.notes)
    again = sparsec.extend(model, f"{spec},lower(nm)", verify="facts")  # the way out
    assert again.sparsec.graph.weights["b.weight"].packed.describe() == "nm2:4"


@pytest.mark.parametrize(("pattern", "holds"), [("2:4", False), ("block:8x2", False), ("unstructured", True)])
def test_a_pattern_holds_of_its_own_masks_alone(pattern: str, holds: bool) -> None:
    known = Pattern.parse(pattern)
    mask = known.mask(torch.randn(16, 16), 0.5)
    assert known.holds(mask)
    mask[(~mask).nonzero()[0].tolist()[0], (~mask).nonzero()[0].tolist()[1]] = True
    assert known.holds(mask) == holds


def test_zeros_of_a_loaded_state_are_taken_by_the_pass_zeros() -> None:
    model = fresh()
    state = dense_state()
    state["b.weight"].masked_fill_(torch.rand(16, 16) < 0.7, 0)
    model.load_state_dict(state)
    fast = sparsec.extend(model, "zeros(targets='b'),freeze,lower(csr, targets='b')", verify="facts")
    assert fast.sparsec.graph.weights["b.weight"].packed.nnz == int(state["b.weight"].count_nonzero())


def test_another_dtype_is_taken_over() -> None:
    """Regression: the verifier found the table wrong."""
    model = fresh().bfloat16()
    fast = sparsec.extend(model, "lower(csr)", verify="facts")
    assert fast.sparsec.graph.weights["b.weight"].packed.dtype == torch.bfloat16
    assert "no longer" not in said(fast)


def test_a_mask_of_another_shape_goes_and_is_said() -> None:
    model = fresh()
    model.c.weight.data = torch.randn(4, 16)
    model.c.bias.data = torch.randn(4)
    row = next(r for r in model.sparsec.report().layers if r.name == "c.weight")
    assert row.nnz == row.parameters == 64
    fast = sparsec.extend(model, "lower(csr)", verify="facts")
    assert "c.weight is 4x16 now, its mask 8x16" in said(fast)
    with torch.no_grad():
        torch.testing.assert_close(fast(X), model(X))


def test_a_model_without_values_is_refused() -> None:
    with pytest.raises(CompileError, match="meta device"):
        sparsec.extend(fresh().to("meta"), "lower(csr)")
    assert fresh().to("meta").sparsec.report().nnz


def test_masked_layers_that_are_gone_are_named() -> None:
    model = fresh()
    model.b = nn.Sequential(nn.Linear(16, 16, bias=False))
    assert any("b.0.weight" in note for note in model.sparsec.report().notes)
    fast = sparsec.extend(model, "lower(csr)")
    assert "dropped: b.weight" in said(fast)
    assert {n for n, w in fast.sparsec.graph.weights.items() if w.packed is not None} == {"a.weight", "c.weight"}
    with torch.no_grad():
        torch.testing.assert_close(fast(X), model(X))


@dataclass(frozen=True)
class Regrow(Pass):
    """Training between two passes that forgets the masks."""

    name: ClassVar[str] = "regrow"
    effect: ClassVar[Effect] = Effect.LOSSY

    def run(self, graph: Graph, context: Context) -> PassResult:
        with torch.no_grad():
            graph.tensor("b.weight").data.add_(1.0)
        return PassResult(changed=True, summary="")


def test_a_pass_that_lets_values_come_back_loses_none() -> None:
    masked = sparsec.compile(Net().eval(), ["magnitude(0.5),freeze", Regrow(), "sparsity"], example_inputs=X)
    assert masked.sparsec.graph.weights["b.weight"].nnz == 256
    fast = sparsec.compile(Net().eval(), ["magnitude(0.5),freeze", Regrow(), "lower(csr)"], example_inputs=X)
    with torch.no_grad():
        torch.testing.assert_close(fast(X), masked(X))


@cache
def traced() -> Graph:
    return trace(Net().eval(), X)


def test_what_stands_under_a_mask_that_is_not_frozen_did_not_come_back() -> None:
    graph = traced().copy()
    Pipeline.parse("magnitude(0.5)").run(graph)
    assert bool((graph.tensor("b.weight")[~graph.weights["b.weight"].mask] != 0).all())
    assert settle(graph) == ()
    assert graph.kept("b.weight") == int(graph.weights["b.weight"].mask.count_nonzero())


FORMATS = ("csr", "csr32", "bitmap", "bsr8x4", "nm", "auto, objective='bytes'")
PRUNE = ("magnitude(0.3)", "magnitude(0.6, scope='row')", "magnitude(pattern='2:4')", "zeros")


@settings(max_examples=15)
@given(data=st.data())
def test_any_sequence_of_changes_loses_nothing_and_counts_right(data: st.DataObject) -> None:
    """Pruned, frozen, grown, zeroed, pruned again, lowered, with masks kept by hand beside it."""
    graph, context = traced().copy(), Context(owns_weights=True)
    masks = {name: torch.ones(graph.weights[name].shape, dtype=torch.bool) for name in NAMES}  # as last looked at
    frozen = False

    def kept() -> dict[str, Tensor]:
        return {n: masks[n] | (graph.tensor(n) != 0) if frozen else masks[n] for n in NAMES}

    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 999)))
    for step in data.draw(
        st.lists(st.sampled_from(["prune", "freeze", "grow", "zero", "count"]), min_size=2, max_size=8)
    ):
        tensor = graph.tensor(data.draw(st.sampled_from(NAMES))).data  # which no version counter sees
        some = torch.rand(tensor.shape, generator=generator) < 0.2
        if step == "grow":
            tensor.masked_fill_(some, 2.0)
        elif step == "zero":
            tensor.masked_fill_(some, 0.0)
        elif step == "prune":
            before = kept()
            Pipeline.parse(data.draw(st.sampled_from(PRUNE))).run(graph, context, verify="facts")
            masks, frozen = {n: graph.weights[n].mask for n in NAMES}, False
            assert not any((masks[n] & ~before[n]).any() for n in NAMES), "pruning brought a value back"
        else:
            masks = kept()
            freeze = step == "freeze" and "mask" in graph.facts
            Pipeline.parse("freeze" if freeze else "sparsity,flops").run(graph, context, verify="facts")
            frozen = frozen or freeze
        assert {n: graph.kept(n) for n in NAMES} == {n: int(m.count_nonzero()) for n, m in kept().items()}
    if "mask" not in graph.facts:
        return
    want = graph.run(X)
    for layout in data.draw(st.lists(st.sampled_from(FORMATS), min_size=1, max_size=2, unique=True)):
        lowered = graph.copy()
        spec = f"freeze,sparsity,flops,lower({layout})"
        try:
            Pipeline.parse(spec).run(lowered, context, verify="facts")
        except FormatError:
            assert layout == "nm"
            continue
        assert problems(lowered, recompute=True) == []
        torch.testing.assert_close(lowered.run(X), want, rtol=1e-4, atol=1e-4)
        for n in NAMES:
            assert lowered.weights[n].nnz == int(kept()[n].count_nonzero())
