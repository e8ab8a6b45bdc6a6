"""Allocation: totals are those asked for, measures are the papers', tables that cannot be are refused by name."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
from architectures import VOCABULARY, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import sparsec
from sparsec.errors import ActivationError, PipelineError, SelectionError, SpecError, WeightError
from sparsec.metrics import kl_rows
from sparsec.passes import Magnitude, Wanda
from sparsec.pipeline import Pipeline
from sparsec.pipeline.allocation import _around, _balanced, _scaled, tail_exponent

IDS = torch.randint(3, VOCABULARY, (8, 16), generator=torch.Generator().manual_seed(0))


class Blocks(nn.Module):
    """Three blocks of two linears, so unlike that allocations differ."""

    def __init__(self) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.layers = nn.ModuleList(
            nn.ModuleList([nn.Linear(16, 32, bias=False), nn.Linear(32, 16, bias=False)]) for _ in range(3)
        )
        for i, block in enumerate(self.layers):
            for linear in block:
                linear.weight.data = torch.randn(linear.weight.shape, generator=g) * torch.rand(
                    16 * 32, generator=g
                ).pow(i + 1).view(linear.weight.shape)

    def forward(self, x: Tensor) -> Tensor:
        for up, down in self.layers:
            x = x + down(torch.relu(up(x)))
        return x


def inputs(model: nn.Module, calls: list[tuple[Tensor, ...]]) -> dict[str, Tensor]:
    """What every linear reads, rows of all calls."""
    seen: dict[str, list[Tensor]] = {}
    handles = [
        m.register_forward_pre_hook(lambda m, args, n=n: seen.setdefault(f"{n}.weight", []).append(args[0].detach()))
        for n, m in model.named_modules()
        if isinstance(m, nn.Linear)
    ]
    with torch.no_grad():
        for call in calls:
            model(*call)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts) for name, parts in seen.items()}


def pruned(spec: str, calls: list[tuple[Tensor, ...]] | None = None) -> nn.Module:
    data = calls or [(torch.randn(12, 16, generator=torch.Generator().manual_seed(i)),) for i in range(3)]
    return sparsec.compile(Blocks(), spec, example_inputs=data[0], calibration=data)


def targets(model: nn.Module) -> dict[str, float]:
    """By block."""
    return {w.name[:8]: w.pruned.target for w in model.sparsec.graph.masked()}


@settings(max_examples=200)
@given(
    measured=st.lists(st.floats(-5, 5), min_size=1, max_size=8),
    sparsity=st.floats(0.05, 0.9),
    spread=st.floats(0.01, 0.5),
    seed=st.integers(0, 99),
)
def test_all_weights_together_are_as_sparse_as_asked(
    measured: list[float], sparsity: float, spread: float, seed: int
) -> None:
    sizes = np.random.default_rng(seed).integers(1, 100, len(measured)).tolist()
    for found in (_around(measured, sizes, sparsity, spread), _scaled(measured, sizes, sparsity, spread)):
        assert np.dot(found, sizes) / sum(sizes) == pytest.approx(sparsity)
        order = np.argsort(measured, kind="stable")
        assert all(a <= b + 1e-12 for a, b in zip(np.array(found)[order], np.array(found)[order][1:], strict=False))
    if max(measured) - min(measured) > 1e-6:
        apart = _around(measured, sizes, sparsity, spread)
        assert max(apart) - min(apart) == pytest.approx(2 * spread)
        scaled = _scaled(measured, sizes, sparsity, spread)
        assert max(scaled) / min(scaled) == pytest.approx((1 + spread) / (1 - spread))


@settings(max_examples=60)
@given(rows=st.integers(2, 12), columns=st.integers(2, 12), seed=st.integers(0, 999))
def test_the_tail_exponent_is_the_papers(rows: int, columns: int, seed: int) -> None:
    matrix = torch.randn(rows, columns, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    values = np.sort(np.linalg.svd(matrix.numpy(), compute_uv=False) ** 2)[::-1]  # lambda_1 >= lambda_2 >= ...
    k = len(values) // 2
    expected = 1 + k / sum(np.log(values[i] / values[k]) for i in range(k))
    assert tail_exponent(matrix) == pytest.approx(expected, rel=1e-6)
    assert tail_exponent(matrix.t()) == pytest.approx(expected, rel=1e-6)


def test_owl_counts_outliers_of_a_block_as_the_paper_does() -> None:
    calls = [(torch.randn(12, 16, generator=torch.Generator().manual_seed(i)),) for i in range(3)]
    model = pruned("wanda(0.5, allocation=owl, spread=0.1)", calls)
    seen = inputs(Blocks(), calls)
    dense = dict(Blocks().named_parameters())
    ratios = []
    for i in range(3):
        scores = [
            (dense[f"layers.{i}.{j}.weight"].detach().abs() * seen[f"layers.{i}.{j}.weight"].square().mean(0).sqrt())
            for j in range(2)
        ]
        scores = torch.cat([s.flatten() for s in scores]).double().numpy()
        ratios.append((scores > 5 * scores.mean()).mean())
    low, high = min(ratios), max(ratios)
    assert low < high
    kept = np.array([(r - low) / (high - low) * 0.2 for r in ratios])
    expected = 1 - (kept - kept.mean() + 0.5)  # what is kept: around 1 - sparsity
    found = targets(model)
    np.testing.assert_allclose(list(found.values()), expected, atol=1e-6)
    for weight in model.sparsec.graph.masked():
        assert int((~weight.mask).sum(1).max()) == round(weight.pruned.target * weight.mask.shape[1])
        assert (weight.pruned.allocation, weight.pruned.measure) == ("owl", pytest.approx(ratios[int(weight.name[7])]))


def test_alphapruning_needs_no_text_and_prunes_light_tails_most() -> None:
    model = sparsec.compile(Blocks(), "magnitude(0.5, allocation=alphapruning)", example_inputs=torch.ones(2, 16))
    exponents = [np.mean([tail_exponent(linear.weight.detach()) for linear in block]) for block in Blocks().layers]
    found = targets(model)
    assert np.argsort(list(found.values())).tolist() == np.argsort(exponents).tolist()
    total = sum(int((~w.mask).sum()) for w in model.sparsec.graph.masked())
    assert abs(total - round(0.5 * 6 * 16 * 32)) <= 6
    equal = Blocks()
    nn.init.orthogonal_(equal.layers[1][0].weight)
    with pytest.raises(WeightError, match=r"layers\.1\.0\.weight: its singular values have no tail to fit"):
        sparsec.compile(equal, "magnitude(0.5, allocation=alphapruning)", example_inputs=torch.ones(2, 16))


def test_sensitivity_is_the_loss_of_pruning_one_layer_alone() -> None:
    calls = [(torch.randn(12, 16, generator=torch.Generator().manual_seed(i)),) for i in range(2)]
    model = pruned("wanda(0.5, allocation=sensitivity, spread=0.45)", calls)
    seen, losses = inputs(Blocks(), calls), {}
    for i, j in product(range(3), range(2)):
        alone, name = Blocks(), f"layers.{i}.{j}.weight"
        weight = alone.get_parameter(name)
        scores = weight.detach().abs() * seen[name].square().mean(0).sqrt()
        smallest = scores.argsort(dim=1, stable=True)[:, : scores.shape[1] // 2]
        weight.data.scatter_(1, smallest, 0.0)
        with torch.no_grad():
            change = [(alone(x) - Blocks()(x)).square().sum() / Blocks()(x).square().sum() for (x,) in calls]
        losses[name] = float(sum(change)) / 2
    found = {w.name: w.pruned for w in model.sparsec.graph.masked()}
    assert found.keys() == losses.keys()
    np.testing.assert_allclose([found[n].measure for n in losses], list(losses.values()), rtol=1e-3)
    # All six layers have one size; far from the bounds, twice the loss is a tenth less.
    logs = np.log2(list(losses.values()))
    targets = np.array([found[n].target for n in losses])
    inside = (targets > 0.06) & (targets < 0.74)
    assert inside.sum() >= 2
    np.testing.assert_allclose(np.ptp((targets + 0.1 * logs)[inside]), 0, atol=1e-3)
    assert np.mean(targets) == pytest.approx(0.5, abs=1e-6)


@given(
    st.lists(st.tuples(st.floats(1e-9, 10), st.integers(1, 10**6)), min_size=1, max_size=30),
    st.floats(0.02, 0.98),
    st.floats(0.01, 0.6),
)
def test_balanced_shares_reach_the_total_stay_near_it_and_cost_the_same_for_each_weight(
    layers: list[tuple[float, int]], sparsity: float, spread: float
) -> None:
    losses, sizes = [m for m, _ in layers], [n for _, n in layers]
    found = _balanced(losses, sizes, sparsity, spread)
    low, high = max(0, sparsity - spread), min(sparsity + spread, (1 + sparsity) / 2)
    assert all(low <= s <= high < 1 for s in found)
    assert sum(s * n for s, n in zip(found, sizes, strict=True)) == pytest.approx(sparsity * sum(sizes), rel=1e-6)
    # The loss for each weight at the new sparsity: equal for all that no bound holds, less above and more below.
    costs = [m / n * 2 ** ((s - sparsity) / 0.1) for s, (m, n) in zip(found, layers, strict=True)]
    free = [c for c, s in zip(costs, found, strict=True) if low + 1e-9 < s < high - 1e-9]
    for cost, s in zip(costs, found, strict=True):
        for equal in free:
            if s >= high - 1e-9:
                assert cost <= equal * (1 + 1e-6)
            elif s <= low + 1e-9:
                assert cost >= equal * (1 - 1e-6)
            else:
                assert cost == pytest.approx(equal, rel=1e-6)


def test_sensitivity_of_a_language_model_is_a_divergence_and_leaves_no_mask_behind() -> None:
    model, _ = tiny_model("llama")
    out = sparsec.compile(model, "magnitude(0.5, allocation=sensitivity, targets='mlp')", calibration=IDS)
    graph = out.sparsec.graph
    assert all((w.mask is not None) == (w.group == "mlp" and w.kind == "linear") for w in graph.weights.values())
    assert all(0 < w.pruned.measure < 0.1 for w in graph.masked())


@settings(max_examples=50)
@given(st.integers(0, 999))
def test_kl_is_that_of_the_definition(seed: int) -> None:
    a, b = torch.randn(2, 300, 7, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 3
    p, q = a.softmax(-1), b.softmax(-1)
    expected = (p * (p / q).log()).sum(-1)
    torch.testing.assert_close(kl_rows(a, b).double(), expected, rtol=1e-4, atol=1e-5)
    assert (kl_rows(a, a) == 0).all()


@pytest.mark.parametrize("pattern", ["unstructured", "block:4x4"])
def test_global_allocation_is_that_of_one_threshold(pattern: str) -> None:
    whole = pruned(f"magnitude(0.6, pattern='{pattern}')").sparsec.graph
    shared = pruned(f"magnitude(0.6, pattern='{pattern}', allocation='global')").sparsec.graph
    for weight in whole.masked():
        assert torch.equal(weight.mask, shared.weights[weight.name].mask)
    rows = pruned(f"wanda(0.6, pattern='{pattern}', allocation='global')").sparsec.graph
    for weight in rows.masked():
        assert weight.pruned.target == pytest.approx(whole.weights[weight.name].mask.logical_not().float().mean())


def test_uniform_allocation_makes_every_layer_equally_sparse_where_it_is_asked_for() -> None:
    for weight in pruned("magnitude(0.6, allocation='uniform')").sparsec.graph.masked():
        assert weight.mask.logical_not().sum() == round(0.6 * weight.numel)
    shares = {w.mask.float().mean() for w in pruned("magnitude(0.6)").sparsec.graph.masked()}
    assert len(shares) > 1  # one threshold over all, unless another is asked for


def test_a_table_says_it_layer_by_layer_and_the_last_word_counts() -> None:
    model, _ = tiny_model("llama")
    table = {"mlp": 0.6, "layers.0.*": 0.2, "layers.0.mlp.down_proj": 0.0}
    for algorithm in (Magnitude, Wanda):
        out = sparsec.compile(model, [algorithm(0.4, allocation=table)], calibration=IDS)
        for weight in out.sparsec.graph.masked():
            inside = 0.0 if "0.mlp.down" in weight.name else 0.2 if "layers.0" in weight.name else None
            expected = inside if inside is not None else 0.6 if weight.group == "mlp" else 0.4
            assert weight.pruned.target == expected
            assert weight.pruned.allocation == "table"
            count = (~weight.mask).sum() if algorithm is Magnitude else (~weight.mask).sum(1)[0]
            size = weight.numel if algorithm is Magnitude else weight.mask.shape[1]
            assert int(count) == round(expected * size)
    text = str(Pipeline((Wanda(0.4, allocation=table),)))
    assert Pipeline.parse(text) == Pipeline((Wanda(0.4, allocation=table),))


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        (
            "wanda(0.95, allocation=owl, spread=0.2)",
            PipelineError,
            r"layers\.\d: allocation='owl' would make it 1\.\d+ sparse",
        ),
        ("wanda(0.1, allocation=owl, spread=0.5)", PipelineError, "would make it -0.* take a spread below 0.5"),
        ("wanda(0.5, allocation=(('layers.7', 0.2),))", SelectionError, "'layers.7' matches nothing in this model"),
        (
            "wanda(0.5, allocation=(('layers.1', 0.2),), ignore='layers.1')",
            SelectionError,
            "matches layers.1.0.weight, which this pass does not prune; add it to targets",
        ),
        ("wanda(0.5, allocation=(('mlp', 1.0),))", SpecError, "the sparsity of 'mlp' must be a share of zeros"),
        ("wanda(0.5, allocation=('mlp', 0.5))", SpecError, "allocation must be one of .* or pairs of a pattern"),
        ("wanda(0.5, allocation=())", SpecError, "allocation must be one of"),
        ("wanda(0.5, allocation=best)", SpecError, "'sensitivity', got 'best'"),
        ("wanda(0.5, spread=0.1)", SpecError, "spread is an option of allocation 'owl'"),
        ("wanda(0.5, allocation=owl, spread=1)", SpecError, r"spread must be in \(0, 1\), got 1"),
        ("wanda(pattern='2:4', allocation=owl)", SpecError, "makes every layer equally sparse"),
        ("magnitude(0.5, scope='global', allocation=owl)", SpecError, "nothing is left to allocate"),
    ],
)
def test_allocations_that_cannot_be_are_refused(spec: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        pruned(spec)


def test_magnitude_asks_for_a_text_where_its_allocation_does() -> None:
    assert Magnitude(0.5, allocation="owl").needs_calibration
    assert not Magnitude(0.5, allocation="alphapruning").needs_calibration
    with pytest.raises(PipelineError, match="the pass 'magnitude' needs calibration data"):
        sparsec.compile(tiny_model("llama")[0], "magnitude(0.5, allocation=owl)")


def test_the_report_shows_the_table() -> None:
    text = str(pruned("wanda(0.5, allocation=owl)").sparsec.report())
    assert "== Allocation: owl " in text
    table = text[text.index("== Allocation") :].splitlines()
    assert table[1].split() == ["block", "weights", "target", "outliers"]
    assert [line.split()[:2] for line in table[3:6]] == [["layers.0", "2"], ["layers.1", "2"], ["layers.2", "2"]]
    assert "Allocation" not in str(pruned("wanda(0.5)").sparsec.report())


def test_a_model_that_gives_nan_has_no_sensitivities() -> None:
    model = tiny_model("llama")[0]
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(
        ActivationError, match="the model gives NaN or inf, or it did before, so no loss can be measured"
    ):
        sparsec.compile(model, "magnitude(0.5, allocation=sensitivity)", calibration=IDS)
