"""Wanda, SparseGPT and patterns: mask for mask and weight for weight what the papers' formulas say, counts exact, errors named."""

from __future__ import annotations

import numpy as np
import pytest
import slow_pruning
import torch
from architectures import VOCABULARY, tiny_model
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import sparsec
from sparsec.calibrate import Statistics
from sparsec.errors import ActivationError, PipelineError, SpecError, WeightError
from sparsec.passes import Magnitude, SparseGPT, Wanda
from sparsec.passes.sparsegpt import inverse_factor, solve
from sparsec.patterns import Pattern
from sparsec.pipeline import Pipeline

PATTERNS = ["unstructured", "2:4", "1:4", "4:8", "block:2x4", "block:4x1"]
CPU = torch.device("cpu")


@st.composite
def layers(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor | None, str, float]:
    """Weights [out, in], inputs [tokens, in], an old mask or none, a pattern that fits, a sparsity."""
    pattern = draw(st.sampled_from(PATTERNS))
    out, inner = 4 * draw(st.integers(1, 4)), 8 * draw(st.integers(1, 5))
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    weight = torch.randn(out, inner, generator=g, dtype=torch.float64)
    mixing = torch.randn(inner, inner, generator=g, dtype=torch.float64)
    x = torch.randn(draw(st.integers(2, 3)) * inner, inner, generator=g, dtype=torch.float64) @ mixing
    x *= torch.rand(inner, generator=g, dtype=torch.float64) + 0.1
    old = torch.rand(out, inner, generator=g) < 0.8 if draw(st.booleans()) else None
    return weight, x, old, pattern, draw(st.sampled_from([0.0, 0.25, 0.3, 0.5, 0.6, 0.9]))


def statistics_of(x: Tensor, gram: bool = False) -> Statistics:
    found = Statistics(x.shape[1], gram, 64, -(-len(x) // 7), CPU)
    for part in x.split(7):
        found.add(part)
    found.settle()
    return found


def as_old(old: Tensor | None, weight: Tensor) -> np.ndarray:
    return np.ones(weight.shape, dtype=bool) if old is None else old.numpy()


def options(pattern: str, share: float) -> dict:
    return {"sparsity": None if Pattern.parse(pattern).nm else share, "pattern": pattern}


def before(weight: Tensor, old: Tensor | None) -> Tensor:
    return weight if old is None else weight.masked_fill(~old, 0.0)


@settings(max_examples=80)
@given(case=layers())
def test_wanda_is_the_papers_mask_for_mask(case) -> None:
    weight, x, old, pattern, share = case
    p = Wanda(**options(pattern, share))
    (mask,), updated, _ = p.prune([before(weight, old).float()], [old], [p.share], statistics_of(x))
    assert updated is None
    expected = slow_pruning.wanda(before(weight, old).numpy(), x.numpy(), p.share, pattern, as_old(old, weight))
    assert np.array_equal(mask.numpy(), expected)


@settings(max_examples=80)
@given(case=layers(), block_size=st.sampled_from([8, 16, 128]))
def test_sparsegpt_is_the_papers_mask_for_mask_and_weight_for_weight(case, block_size: int) -> None:
    weight, x, old, pattern, share = case
    assume(old is None or not pattern.startswith("block"))
    share = Pattern.parse(pattern).sparsity or share
    factor, _, notes = inverse_factor(x.t() @ x, 0.01)
    assert notes == []
    solved = before(weight, old).clone()
    mask = solve(solved, factor, [share], Pattern.parse(pattern), block_size, [len(weight)], old)
    # Whole blocks of a pattern are chosen in each block of columns; where those do not come out even, counts differ by rounding.
    assume(not pattern.startswith("block") or (weight.shape[1] <= block_size))
    expected, weights = slow_pruning.sparsegpt(
        before(weight, old).numpy(), x.numpy(), share, pattern, block_size, 0.01, as_old(old, weight)
    )
    assert np.array_equal(mask.numpy(), expected)
    np.testing.assert_allclose(solved.numpy(), weights, rtol=1e-6, atol=1e-7 * float(np.abs(weights).max() + 1))


@settings(max_examples=40)
@given(case=layers(), split=st.integers(1, 3), another=st.sampled_from([0.2, 0.5, 0.8]))
def test_matrices_that_share_their_inputs_are_solved_each_for_itself(case, split: int, another: float) -> None:
    weight, x, old, pattern, share = case
    assume(old is None)
    rows = [4 * split, len(weight)]
    other = torch.randn(rows[0], weight.shape[1], dtype=torch.float64, generator=torch.Generator().manual_seed(split))
    factor, _, _ = inverse_factor(x.t() @ x, 0.01)
    fixed = Pattern.parse(pattern).sparsity
    shares = [fixed, fixed] if fixed else [another, share]
    both = torch.cat([other, weight])
    mask = solve(both, factor, shares, Pattern.parse(pattern), 16, rows)
    for alone, part, place in ((other, shares[0], slice(0, rows[0])), (weight, shares[1], slice(rows[0], None))):
        one = alone.clone()
        assert torch.equal(mask[place], solve(one, factor, [part], Pattern.parse(pattern), 16, [len(alone)]))
        torch.testing.assert_close(both[place], one)


@settings(max_examples=80)
@given(case=layers(), algorithm=st.sampled_from([Wanda, SparseGPT, Magnitude]))
def test_counts_are_exact_and_what_is_masked_is_zero(case, algorithm) -> None:
    weight, x, old, pattern, share = case
    p = algorithm(**options(pattern, share))
    chosen = Pattern.parse(pattern)
    w = before(weight, old).float()
    if algorithm is Magnitude:
        masks, updated = [chosen.mask(weight.float(), p.share, old)], None  # sees what the mask hides
    else:
        masks, updated, _ = p.prune([w], [old], [p.share], statistics_of(x, gram=algorithm is SparseGPT))
    (mask,) = masks
    gone = ~mask
    if old is not None:
        assert not (mask & ~old).any(), "what was gone came back"
    if updated is not None:
        assert (updated[0][gone] == 0).all()
    if chosen.nm is not None:
        n, m = chosen.nm
        kept = mask.view(-1, m).sum(1)
        left = torch.ones_like(mask) if old is None else old
        assert torch.equal(kept, left.view(-1, m).sum(1).clamp(max=n))
    elif chosen.block is not None and old is None:
        r, c = chosen.block
        tiles = mask.view(len(mask) // r, r, -1, c).permute(0, 2, 1, 3).reshape(-1, r * c).sum(1)
        assert set(tiles.tolist()) <= {0, r * c}
        assert int((tiles == 0).sum()) == round(p.share * len(tiles))
    elif old is None and algorithm is Wanda:
        assert (gone.sum(1) == round(p.share * mask.shape[1])).all()
    elif old is None:
        assert int(gone.sum()) == round(p.share * mask.numel())


@settings(max_examples=40)
@given(case=layers(), algorithm=st.sampled_from([Wanda, SparseGPT]))
def test_a_text_read_twice_teaches_nothing_new(case, algorithm) -> None:
    weight, x, old, pattern, share = case
    p = algorithm(**options(pattern, share))
    gram = algorithm is SparseGPT
    once = p.prune([weight.float()], [old], [p.share], statistics_of(x, gram))[0][0]
    twice = p.prune([weight.float()], [old], [p.share], statistics_of(torch.cat([x, x]), gram))[0][0]
    assert float((once != twice).float().mean()) <= 0.01  # rounding may turn a near tie


@settings(max_examples=40)
@given(seed=st.integers(0, 999), share=st.sampled_from([0.3, 0.5, 0.7]))
def test_sparsegpt_errs_less_than_wanda_and_wanda_less_than_magnitude_where_inputs_matter(
    seed: int, share: float
) -> None:
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(32, 48, generator=g)
    x = (
        torch.randn(400, 48, generator=g)
        @ torch.randn(48, 48, generator=g)
        * torch.logspace(-0.5, 0.5, 48)[torch.randperm(48, generator=g)]
    )

    def error(mask: Tensor, updated: Tensor | None = None) -> float:
        new = weight * mask if updated is None else updated
        return float(((weight - new) @ x.t()).square().sum())

    magnitude = error(Pattern().mask(weight, share))
    wanda = error(Wanda(share).prune([weight], [None], [share], statistics_of(x))[0][0])
    (mask,), (updated,), _ = SparseGPT(share).prune([weight], [None], [share], statistics_of(x, gram=True))
    assert error(mask, updated) < wanda < magnitude


def test_dead_columns_are_named_and_their_weights_go_first() -> None:
    x = torch.randn(50, 8)
    x[:, 3] = 0
    weight = torch.randn(4, 8) + 5
    for p, gram in ((Wanda(0.125), False), (SparseGPT(0.125), True)):
        (mask,), _, notes = p.prune([weight], [None], [p.share], statistics_of(x, gram))
        assert notes[0].startswith("1 of 8 input columns are zero in all of the text")
        assert not mask[:, 3].any()
        assert int((~mask).sum()) == 4


@pytest.mark.parametrize("algorithm", [Wanda, SparseGPT])
def test_a_dead_layer_is_named_and_keeps_its_largest_weights(algorithm) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    with torch.no_grad():
        model[0].bias.fill_(-100.0)  # so that the second layer reads zeros
    x = torch.randn(128, 8)
    out = sparsec.compile(model, [algorithm(0.5)], example_inputs=x, calibration=[(x,)])
    (note,) = out.sparsec.records[0].notes
    assert note == "2.weight: all that is read is zero in all of the text; masks are by magnitude alone"
    before, weight = model[2].weight.detach(), out.sparsec.graph.weights["2.weight"]
    rows = torch.stack([Pattern().mask(row[None], 0.5)[0] for row in before])
    assert torch.equal(weight.mask, rows if algorithm is Wanda else Pattern().mask(before, 0.5))
    assert torch.equal(out[2].weight, before * weight.mask)
    assert "MB of activations and 0.0 MB of statistics" in out.sparsec.records[0].summary


def test_too_few_tokens_are_said_once() -> None:
    model = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 4))
    for spec, tokens, said in (
        ("wanda(0.5)", 127, ["2 layers were shown no more than 127 tokens, and wanda needs 128 of them"]),
        ("wanda(0.5)", 128, []),
        ("sparsegpt(0.5)", 7, ["1 layers were shown no more than 7 tokens, and sparsegpt needs 8 of them"]),
        ("sparsegpt(0.5)", 8, []),
    ):
        x = torch.randn(tokens, 8)
        notes = sparsec.compile(model, spec, example_inputs=x, calibration=[(x,)]).sparsec.records[0].notes
        assert [note.partition(" to be trusted")[0] for note in notes] == said


def test_layers_of_which_nothing_is_left_and_dead_ones_are_named() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    with torch.no_grad():
        model[1].weight.mul_(1e-9)
        model[2].weight.zero_()
    x = torch.randn(2, 8)
    notes = sparsec.compile(model, "magnitude(0.7)", example_inputs=x).sparsec.records[0].notes
    assert notes == ("1.weight, 2.weight: not one weight is left; spare them with ignore=(...), or prune less",)
    notes = sparsec.compile(model, "magnitude(0.5, scope='layer')", example_inputs=x).sparsec.records[0].notes
    assert notes == ("2.weight: every weight is zero, with and without the mask",)


@pytest.mark.parametrize("pattern", ["1:3", "2:6", "5:7", "block:2x3"])
def test_sparsegpt_takes_patterns_that_128_is_no_multiple_of(pattern: str) -> None:
    model = nn.Linear(42, 6)
    x = torch.randn(64, 42)
    mask = sparsec.compile(
        model, [SparseGPT(None if ":" in pattern[:2] else 0.5, pattern=pattern)], example_inputs=x, calibration=[(x,)]
    )
    kept = mask.sparsec.graph.weights["weight"].mask
    if pattern.startswith("block"):
        assert torch.equal(kept, kept[::2, ::3].repeat_interleave(2, 0).repeat_interleave(3, 1))
    else:
        n, m = map(int, pattern.split(":"))
        assert (kept.view(6, -1, m).sum(2) == n).all()


def test_a_gram_matrix_that_cannot_be_factored_raises_the_damping_and_says_so() -> None:
    gram = torch.eye(6)
    gram[0, 1] = gram[1, 0] = 1.05  # no Gram matrix of anything, as rounding can make it
    _, _, notes = inverse_factor(gram, 0.01)
    assert notes == ["the Gram matrix could not be factored; damping was raised from 0.01 to 0.1"]
    gram[0, 1] = gram[1, 0] = 1e6
    with pytest.raises(ActivationError, match="6 input columns cannot be factored, even with 10 times"):
        inverse_factor(gram, 0.01)


def test_a_layer_whose_gram_matrix_cannot_be_factored_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise ActivationError("the Gram matrix cannot be factored")

    monkeypatch.setattr("sparsec.passes.sparsegpt.inverse_factor", fails)
    with pytest.raises(ActivationError, match=r"^0\.weight: the Gram matrix cannot"):
        sparsec.compile(
            nn.Sequential(nn.Linear(8, 8)),
            "sparsegpt(0.5)",
            calibration=[(torch.randn(9, 8),)],
            example_inputs=torch.ones(2, 8),
        )


@pytest.mark.parametrize(
    ("name", "spec"),
    [
        ("llama", "wanda(0.5)"),
        ("llama", "sparsegpt(0.5)"),
        ("llama", "sparsegpt(pattern='2:4')"),
        ("llama", "magnitude(pattern='2:4')"),
        ("gpt2", "sparsegpt(pattern='2:4')"),
        ("mixtral", "sparsegpt(0.5)"),
        ("opt", "wanda(0.5)"),
    ],
)
def test_a_lowered_model_computes_what_its_pruned_one_does(name: str, spec: str) -> None:
    model, call = tiny_model(name)
    ids = torch.randint(3, VOCABULARY, (4, 8), generator=torch.Generator().manual_seed(0))
    untouched = {n: p.clone() for n, p in model.named_parameters()}
    pruned = sparsec.compile(model, f"{spec},freeze", calibration=ids, verify="facts")
    assert all(torch.equal(p, untouched[n]) for n, p in model.named_parameters())
    for form in ("bitmap", "csr", "auto", *(["nm"] if "2:4" in spec else [])):
        lowered = sparsec.extend(pruned, f"sparsity,flops,fuse,lower({form})", verify="probe")
        with torch.no_grad():
            torch.testing.assert_close(lowered(**call())[0], pruned(**call())[0], rtol=1e-4, atol=1e-5)
        assert [r.index for r in lowered.sparsec.records] == [1, 2, 3, 4, 5, 6]
    for weight in pruned.sparsec.graph.masked():
        assert weight.pruned.criterion == Pipeline.parse(spec).passes[0].name
        assert weight.pruned.target == 0.5
        assert bool((pruned.get_parameter(weight.name)[~weight.mask] == 0).all())


def test_a_conv1d_is_pruned_along_its_inputs() -> None:
    model, _ = tiny_model("gpt2")
    pruned = sparsec.compile(model, "magnitude(pattern='2:4')")
    weight = next(w for w in pruned.sparsec.graph.masked() if w.kind == "conv1d")
    assert (weight.mask.t().reshape(-1, 4).sum(1) == 2).all()


def test_updated_weights_lie_where_the_old_ones_did() -> None:
    model, _ = tiny_model("gpt2")  # its matrices are stored as [in, out]
    ids = torch.randint(3, VOCABULARY, (16, 8), generator=torch.Generator().manual_seed(0))
    pruned = sparsec.compile(model, "sparsegpt(0.3)", calibration=ids)
    for weight in pruned.sparsec.graph.masked():
        old, new = model.get_parameter(weight.name), pruned.get_parameter(weight.name)
        assert not torch.equal(old * weight.mask, new), weight.name
        assert float((old * weight.mask - new).norm()) < 0.7 * float(old.norm()), weight.name


def test_a_later_pass_keeps_what_an_earlier_one_removed_and_counts_it() -> None:
    model, _ = tiny_model("llama")
    ids = torch.randint(3, VOCABULARY, (4, 8))
    both = sparsec.compile(model, "magnitude(0.3, scope='layer'),wanda(0.5)", calibration=ids)
    first = sparsec.compile(model, "magnitude(0.3, scope='layer')")
    for weight in both.sparsec.graph.masked():
        assert not (weight.mask & ~first.sparsec.graph.weights[weight.name].mask).any()
        assert weight.pruned.criterion == "wanda"


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("magnitude", "a share of zeros is missing"),
        ("wanda()", "a share of zeros is missing; half of the weights is wanda\\(0.5\\)"),
        ("wanda(0.6, pattern='2:4')", "pattern '2:4' makes a sparsity of 0.5, got 0.6"),
        ("magnitude(0.5, pattern='4:2')", "N between 1 and M - 1 are kept"),
        ("magnitude(0.5, pattern='triangle')", "pattern must be 'unstructured', 'N:M' such as '2:4', or 'block:RxC'"),
        ("magnitude(0.5, pattern='block:1x1')", "at least 2 weights"),
        ("magnitude(0.5, pattern='block:8x8', scope='row')", "a block spans rows"),
        ("wanda(0.5, feed='cold')", "feed must be one of 'pruned', 'dense'"),
        ("wanda(0.5, feed='dense', order='true')", "order='true' prunes by what pruned layers make"),
        ("sparsegpt(0.5, damping=0)", "damping must be in"),
        ("sparsegpt(pattern='2:4', block_size=6)", "block_size must be a multiple of 4"),
    ],
)
def test_options_that_make_no_sense_are_refused(spec: str, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        Pipeline.parse(spec)


@pytest.mark.parametrize(
    "text", ["magnitude(0.5, pattern='2:4')", "sparsegpt(0.5, pattern='4:8', feed='dense')", "wanda(0.5)"]
)
def test_specifications_print_as_they_are_read(text: str) -> None:
    assert str(Pipeline.parse(text)) == text
    assert Pipeline.parse("magnitude(pattern='2:4')") == Pipeline.parse("magnitude(0.5, pattern='2:4')")


@pytest.mark.parametrize(
    "spec", ["magnitude(pattern='2:4')", "wanda(pattern='2:4')", "magnitude(0.5, pattern='block:4x4')"]
)
def test_shapes_that_a_pattern_does_not_fit_are_refused_by_name(spec: str) -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.odd = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.odd(x)

    x = torch.randn(4, 6)
    with pytest.raises(WeightError, match=r"odd\.weight: .*6.*ignore=\('odd',\)"):
        sparsec.compile(Odd(), spec, example_inputs=x, calibration=[(x,)])


def test_extend_refuses_what_it_cannot_go_on_with() -> None:
    model, _ = tiny_model("llama")
    with pytest.raises(sparsec.SparsecError, match="compile the model first"):
        sparsec.extend(model, "freeze")
    lowered = sparsec.compile(model, "magnitude(0.5),freeze,lower(csr)")
    with pytest.raises(sparsec.SparsecError, match="is lowered already"):
        sparsec.extend(lowered, "sparsity")
    with pytest.raises(PipelineError, match="the pass 'wanda' needs calibration data"):
        sparsec.extend(sparsec.compile(model, "magnitude(0.2)"), "wanda(0.5)")
