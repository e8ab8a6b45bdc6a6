"""ADMM: round for round what the formulas say, masks exact and kept, errors below those of masks alone, dense weights as target."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import slow_pruning
import torch
from architectures import VOCABULARY, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from test_pruning import PATTERNS, as_old, layers, statistics_of
from torch import Tensor, nn

import sparsec
from sparsec.errors import ActivationError, PipelineError, SelectionError, SpecError
from sparsec.ir.tracer import trace
from sparsec.passes import ADMM, SparseGPT, Wanda, admm
from sparsec.passes.admm import RELAXATION, alternate, choosing_rounds, scaled_inverse
from sparsec.patterns import Pattern
from sparsec.pipeline import Context, Pipeline


def error(weight: Tensor, updated: Tensor, x: Tensor) -> float:
    return float(((weight.double() - updated.double()) @ x.double().t()).square().sum())


def mixed(seed: int, out: int = 24, inner: int = 32) -> tuple[Tensor, Tensor]:
    """Weights, and inputs whose columns depend on each other."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(20 * inner, inner, generator=g) @ torch.randn(inner, inner, generator=g)
    return torch.randn(out, inner, generator=g), x * (torch.rand(inner, generator=g) + 0.2)


def options(pattern: str, share: float) -> dict:
    return {"sparsity": None if Pattern.parse(pattern).nm else share, "pattern": pattern}


@settings(max_examples=60)
@given(
    case=layers(),
    rounds=st.integers(1, 12),
    rho=st.sampled_from([0.8, 1.0, 3.0]),
    damping=st.sampled_from([0.01, 0.1]),
    kept=st.booleans(),
)
def test_it_is_the_method_round_for_round(case, rounds: int, rho: float, damping: float, kept: bool) -> None:
    weight, x, old, pattern, share = case
    share = Pattern.parse(pattern).sparsity or share
    kept = kept and old is not None
    gram = x.t() @ x
    norms = gram.diagonal().sqrt()
    h = gram / norms / norms[:, None] + (damping + rho) * torch.eye(len(gram), dtype=gram.dtype)
    solved, mask = alternate(
        weight * norms,
        rho * torch.linalg.inv(h),
        None if kept else [share],
        Pattern.parse(pattern),
        [len(weight)],
        rounds,
        old,
    )
    expected, weights = slow_pruning.admm(
        weight.numpy(),
        x.numpy(),
        None if kept else share,
        pattern,
        rounds,
        choosing_rounds(rounds, Pattern.parse(pattern)),
        rho,
        damping,
        RELAXATION,
        as_old(old, weight),
    )
    assert np.array_equal(mask.numpy(), expected)
    np.testing.assert_allclose((solved / norms).numpy(), weights, rtol=1e-6, atol=1e-8)


@settings(max_examples=60)
@given(case=layers())
def test_masks_have_the_pattern_and_the_count_and_what_they_remove_is_zero(case) -> None:
    weight, x, old, pattern, share = case
    p = ADMM(**options(pattern, share))
    (mask,), (updated,), notes = p.prune([weight.float()], [old], [p.share], statistics_of(x, gram=True))
    assert notes == []
    assert bool((updated[~mask] == 0).all())
    assert not torch.signbit(updated[~mask]).any()
    assert bool(updated.isfinite().all())
    left = torch.ones_like(mask) if old is None else old
    assert not (mask & ~left).any(), "what was gone came back"
    n_m, block = Pattern.parse(pattern).nm, Pattern.parse(pattern).block
    if n_m is not None:
        kept = mask.view(-1, n_m[1]).sum(1)
        assert torch.equal(kept, left.view(-1, n_m[1]).sum(1).clamp(max=n_m[0]))
    elif block is None:
        assert int((~mask).sum()) == max(round(p.share * mask.numel()), int((~left).sum()))
    elif old is None:
        assert Pattern.parse(pattern).holds(mask)
        size = block[0] * block[1]
        assert int((~mask).sum()) == size * round(p.share * (mask.numel() // size))


@settings(max_examples=40)
@given(case=layers(), density=st.sampled_from([0.2, 0.5, 0.9]))
def test_an_earlier_mask_is_kept_bit_for_bit_and_errs_no_more_than_before(case, density: float) -> None:
    weight, x, _, _, _ = case
    w = weight.float()
    mask = torch.rand(w.shape, generator=torch.Generator().manual_seed(0)) < density
    before = mask.clone()
    (kept,), (updated,), _ = ADMM().prune([w], [mask], [0.0], statistics_of(x, gram=True))
    assert torch.equal(kept, before)
    assert torch.equal(mask, before)
    assert bool((updated[~mask] == 0).all())
    # What the damping asks for beside the outputs is in what is made small.
    squares = x.float().square().sum(0) * 0.1
    changed, masked = (error(w, new, x) + float(((w - new).square() * squares).sum()) for new in (updated, w * mask))
    assert changed <= masked * 1.001


@settings(max_examples=30)
@given(
    seed=st.integers(0, 999),
    share=st.sampled_from([0.3, 0.5, 0.7]),
    pattern=st.sampled_from([p for p in PATTERNS if not p.startswith("block")]),
)
def test_it_errs_less_than_sparsegpt(seed: int, share: float, pattern: str) -> None:
    weight, x = mixed(seed)
    seen = statistics_of(x, gram=True)
    errors = []
    for p in (ADMM(**options(pattern, share)), SparseGPT(**options(pattern, share))):
        _, updated, _ = p.prune([weight], [None], [p.share], seen)
        errors.append(error(weight, updated[0], x))
    assert errors[0] < errors[1]


@settings(max_examples=30)
@given(seed=st.integers(0, 999), pattern=st.sampled_from(["unstructured", "2:4", "block:1x4"]))
def test_rows_in_another_order_give_the_same_rows(seed: int, pattern: str) -> None:
    weight, x = mixed(seed)
    order = torch.randperm(len(weight), generator=torch.Generator().manual_seed(seed))
    p, seen = ADMM(**options(pattern, 0.5)), statistics_of(x, gram=True)
    (mask,), (updated,), _ = p.prune([weight], [None], [p.share], seen)
    (other,), (moved,), _ = p.prune([weight[order]], [None], [p.share], seen)
    assert float((other != mask[order]).float().mean()) <= 0.01  # rounding may turn a near tie
    same = (other == mask[order]).all(1)
    torch.testing.assert_close(moved[same], updated[order][same], rtol=1e-3, atol=1e-3)


@settings(max_examples=20)
@given(seed=st.integers(0, 999), pattern=st.sampled_from(["unstructured", "2:4", "block:4x4"]))
def test_matrices_that_share_their_inputs_are_solved_each_for_itself(seed: int, pattern: str) -> None:
    weight, x = mixed(seed)
    other, seen = weight[:8] * 3 + 0.1, statistics_of(x, gram=True)
    p = ADMM(**options(pattern, 0.5))
    masks, updated, _ = p.prune([other, weight], [None, None], [p.share, p.share], seen)
    for one, mask, new in zip((other, weight), masks, updated, strict=True):
        (alone,), (by_itself,), _ = p.prune([one], [None], [p.share], seen)
        assert float((alone != mask).float().mean()) <= 0.01
        same = (alone == mask).all(1)
        torch.testing.assert_close(new[same], by_itself[same], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("columns", [384, 385, 576])
def test_where_to_cut_on_the_way_is_read_off_a_sample_of_every_column(
    columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = torch.randn(700, columns, generator=torch.Generator().manual_seed(0))
    for period in (2, 3, 5, 7):
        weight[:, ::period] *= 20
    x = torch.randn(2 * columns, columns, generator=torch.Generator().manual_seed(1))
    eased: list[float] = []

    def watched(mask: Tensor, *args: Any, **options: Any) -> None:
        choose(mask, *args, **options)
        eased.append(1 - float(mask.float().mean()))

    choose = admm._choose
    monkeypatch.setattr(admm, "_choose", watched)
    (mask,), (updated,), _ = ADMM(0.6).prune([weight], [None], [0.6], statistics_of(x, gram=True))
    last = len(eased)
    assert last == 8
    for i, share in enumerate(eased, 1):
        assert abs(share - 0.6 * (1 - (1 - i / last) ** 4)) < 0.01
    assert int((~mask).sum()) == round(0.6 * mask.numel())
    (_,), (second,), _ = SparseGPT(0.6).prune([weight], [None], [0.6], statistics_of(x, gram=True))
    assert error(weight, updated, x) < error(weight, second, x)


def test_dead_columns_are_named_go_first_and_keep_their_values_where_they_stay() -> None:
    x = torch.randn(50, 8)
    x[:, 3] = 0
    weight = torch.randn(4, 8) + 5
    seen = statistics_of(x, gram=True)
    (mask,), (updated,), notes = ADMM(0.125).prune([weight], [None], [0.125], seen)
    assert notes == ["1 of 8 input columns are zero in all of the text"]
    assert not mask[:, 3].any()
    assert int((~mask).sum()) == 4
    assert bool(updated.isfinite().all())
    old = torch.ones(4, 8, dtype=torch.bool)
    old[0] = False
    _, (updated,), _ = ADMM().prune([weight], [old], [0.0], seen)
    assert torch.equal(updated[1:, 3], weight[1:, 3])
    assert bool((updated[0] == 0).all())


@settings(max_examples=40)
@given(
    seed=st.integers(0, 999),
    size=st.floats(-30, -1.5).map(lambda x: 10**x),
    kind=st.sampled_from(["small", "in one token", "another's shadow"]),
    pattern=st.sampled_from(["unstructured", "2:4"]),
    kept=st.booleans(),
)
def test_a_nearly_dead_column_gets_no_huge_weights(seed: int, size: float, kind: str, pattern: str, kept: bool) -> None:
    weight, x = mixed(seed)
    column = {"small": x[:, 5], "in one token": 0 * x[:, 5], "another's shadow": x[:, 6]}[kind] * size
    column[0] = size
    x[:, 5] = column
    seen, second = statistics_of(x, gram=True), SparseGPT(**options(pattern, 0.5))
    p = ADMM() if kept else ADMM(**options(pattern, 0.5))
    masks = [Pattern.parse(pattern).mask(weight, 0.5) if kept else None]
    _, (updated,), _ = p.prune([weight], masks, [0.5], seen)
    _, (other,), _ = second.prune([weight], masks, [0.5], seen)
    assert bool(updated.half().isfinite().all())
    assert float(updated[:, 5].abs().max()) <= 60
    elsewhere = x.clone()  # a text in which it does something else
    elsewhere[:, 5] = torch.randn(len(x), generator=torch.Generator().manual_seed(seed)) * 30 * size
    for text in (x, elsewhere) if size < 1e-3 else (x,):
        assert error(weight, updated, text) < error(weight, other, text)


def test_fewer_tokens_than_columns_are_enough_to_solve_and_too_few_to_trust() -> None:
    x = torch.randn(3, 16)
    weight = torch.randn(8, 16)
    (mask,), (updated,), notes = ADMM(0.5).prune([weight], [None], [0.5], statistics_of(x, gram=True))
    assert notes == []
    assert bool(updated.isfinite().all())
    assert int(mask.sum()) == 64
    said = sparsec.compile(nn.Linear(16, 8), "admm(0.5)", example_inputs=x, calibration=[(x,)]).sparsec.records[0].notes
    assert said == (
        "1 layers were shown no more than 3 tokens, and admm needs 16 of them to be trusted; calibrate on more text",
    )


def test_a_gram_matrix_that_cannot_be_factored_raises_the_damping_and_says_so() -> None:
    gram = torch.eye(6)
    gram[0, 1] = gram[1, 0] = 2.0  # no Gram matrix of anything, as rounding can make it
    _, _, notes = scaled_inverse(gram, 0.1, 0.8)
    assert notes == ["the Gram matrix could not be factored; damping was raised from 0.1 to 1"]
    gram[0, 1] = gram[1, 0] = 1e6
    with pytest.raises(ActivationError, match="6 input columns cannot be factored, even with 10 times"):
        scaled_inverse(gram, 0.1, 0.8)


def test_a_dead_layer_is_named_and_keeps_its_largest_weights() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    with torch.no_grad():
        model[0].bias.fill_(-100.0)  # so that the second layer reads zeros
    x = torch.randn(128, 8)
    out = sparsec.compile(model, "admm(0.5)", example_inputs=x, calibration=[(x,)])
    (note,) = out.sparsec.records[0].notes
    assert note == "2.weight: all that is read is zero in all of the text; masks are by magnitude alone"
    before, weight = model[2].weight.detach(), out.sparsec.graph.weights["2.weight"]
    assert torch.equal(weight.mask, Pattern().mask(before, 0.5))
    assert torch.equal(out[2].weight, before * weight.mask)


def ids() -> Tensor:
    return torch.randint(3, VOCABULARY, (8, 16), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
@pytest.mark.parametrize("first", ["wanda(0.5)", "wanda(pattern='2:4')", "sparsegpt(0.5)"])
def test_earlier_masks_of_a_model_are_kept_and_its_layers_err_less(name: str, first: str) -> None:
    model, call = tiny_model(name)
    untouched = {n: p.clone() for n, p in model.named_parameters()}
    alone = sparsec.compile(model, f"{first},freeze", calibration=ids())
    after = sparsec.compile(model, f"{first},admm(feed='dense'),freeze", calibration=ids(), verify="facts")
    assert all(torch.equal(p, untouched[n]) for n, p in model.named_parameters())
    errors = []
    for weight in after.sparsec.graph.masked():
        before = alone.sparsec.graph.weights[weight.name]
        if not first.startswith("sparsegpt"):  # whose masks hang on what earlier layers became
            assert torch.equal(weight.mask, before.mask), weight.name
        assert weight.pattern == before.pattern
        assert weight.pruned.criterion == f"{before.pruned.criterion} + admm"
        assert weight.pruned.target == before.pruned.target
        assert bool((after.get_parameter(weight.name)[~weight.mask] == 0).all())
        errors.append(weight.pruned.error < weight.pruned.error_masked)
    assert sum(errors) >= 0.9 * len(errors)
    lowered = sparsec.extend(after, "lower(bitmap)", verify="probe")
    with torch.no_grad():
        torch.testing.assert_close(lowered(**call())[0], after(**call())[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("copy", [True, False, "changed"])
def test_the_dense_weights_are_the_target_also_where_zeros_were_written(copy: bool | str) -> None:
    def pruned(spec: str) -> nn.Module:
        return sparsec.compile(tiny_model("llama")[0], spec, calibration=ids(), copy=copy)

    plain, frozen = pruned("wanda(0.5),admm,freeze"), pruned("wanda(0.5),freeze,admm,freeze")
    twice = pruned("wanda(0.5),admm,admm,freeze")
    for weight in plain.sparsec.graph.masked():
        assert torch.equal(plain.get_parameter(weight.name), frozen.get_parameter(weight.name)), weight.name
        known = twice.sparsec.graph.weights[weight.name]
        assert known.pruned.criterion == "wanda + admm"
        assert known.pruned.error_masked > 0


def test_a_later_admm_counts_what_is_gone() -> None:
    model, _ = tiny_model("llama")
    first = sparsec.compile(model, "magnitude(0.3, scope='layer')")
    both = sparsec.compile(model, "magnitude(0.3, scope='layer'),admm(0.7)", calibration=ids())
    for weight in both.sparsec.graph.masked():
        assert not (weight.mask & ~first.sparsec.graph.weights[weight.name].mask).any()
        assert int((~weight.mask).sum()) == round(0.7 * weight.numel)
        assert weight.pruned.criterion == "admm"


def test_weights_that_nobody_holds_as_they_came_in_are_said() -> None:
    model, _ = tiny_model("llama")
    out = sparsec.compile(model, "wanda(0.3),freeze,admm(0.5)", calibration=ids(), copy=False)
    assert (
        "an earlier pass replaced the dense weights, and they are not held any more" in out.sparsec.records[2].notes[-1]
    )
    x, dense = torch.randn(32, 8), nn.Linear(8, 8)
    data = sparsec.calibrate.CalibrationData(((x,),), "here")
    given = {"weight": dense.weight.detach().clone()}
    for context, said in ((Context(calibration=data), 1), (Context(calibration=data, dense=given), 0)):
        graph = trace(dense, x)
        Pipeline.parse("wanda(0.5),freeze").run(graph, context)
        zeroed = graph.tensor("weight").detach().clone()
        (record,) = Pipeline.parse("admm").run(graph, context)
        assert len(record.notes) == said
        change = float((graph.tensor("weight").detach() - zeroed).norm())
        assert change < 1e-4 if said else change > 0.1, "outputs of the zeroed weights are right already"


def test_without_a_share_and_without_a_mask_nothing_runs() -> None:
    model, _ = tiny_model("llama")
    with pytest.raises(
        PipelineError, match=r"pass 1 'admm' needs 'mask', .* or give a share of zeros, as in admm\(0\.5\)"
    ):
        sparsec.compile(model, "admm", calibration=ids())
    with pytest.raises(SelectionError, match="none of what it selects has one"):
        sparsec.compile(model, "wanda(0.5, targets='mlp'),admm(targets='attention')", calibration=ids())
    out = sparsec.compile(model, "wanda(0.5, targets='mlp'),admm", calibration=ids())
    assert {w.group for w in out.sparsec.graph.masked()} == {"mlp"}


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            "admm(pattern='block:4x4')",
            "pattern is of masks that are chosen, and without a sparsity admm keeps earlier masks",
        ),
        ("admm(allocation='owl')", "allocation is of masks that are chosen"),
        ("admm(0.5, rounds=0)", "rounds must be"),
        ("admm(0.5, rho=0)", r"rho must be in \(0, 100\], got 0; the default is 0.8"),
        ("admm(0.5, damping=-1)", r"damping must be in \(0, 10\], got -1; the default is 0.1"),
        ("admm(0.4, pattern='2:4')", "makes a sparsity of 0.5"),
    ],
)
def test_options_that_make_no_sense_are_refused(spec: str, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        Pipeline.parse(spec)


@pytest.mark.parametrize(
    "text", ["admm", "admm(0.5, rounds=20)", "wanda(0.5),admm(feed='dense')", "admm(0.5, pattern='2:4')"]
)
def test_specifications_print_as_they_are_read(text: str) -> None:
    assert str(Pipeline.parse(text)) == text


def test_wanda_is_helped_where_inputs_depend_on_each_other() -> None:
    weight, x = mixed(0)
    (mask,), _, _ = Wanda(0.5).prune([weight], [None], [0.5], statistics_of(x))
    _, (updated,), _ = ADMM().prune([weight], [mask], [0.5], statistics_of(x, gram=True))
    assert error(weight, updated, x) < 0.6 * error(weight, weight * mask, x)
