"""Masks from scores: exact counts, ties by position, and memory that does not grow with the model."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from allocated import peak_allocation
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from traces import traced as trace

from sparsec import patterns
from sparsec.passes import Magnitude
from sparsec.patterns import Pattern, prune_count
from sparsec.pipeline import Context

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
# Few different values: ties are the normal case in de-quantised checkpoints.
SOME_VALUES = [0.0, -0.0, 1.0, -1.0, 0.5, -2.0, 1e-40, -1e-40, 3e38, 1 / 3]


@st.composite
def scored(draw: st.DrawFn) -> tuple[list[torch.Tensor], list[torch.Tensor | None], float]:
    dtype = draw(st.sampled_from(DTYPES))
    values = [v for v in SOME_VALUES if abs(v) < 6e4 or dtype != torch.float16]
    scores: list[torch.Tensor] = []
    old: list[torch.Tensor | None] = []
    for _ in range(draw(st.integers(1, 3))):
        shape = draw(st.tuples(st.integers(1, 5), st.integers(0, 7)))
        n = shape[0] * shape[1]
        flat = draw(st.lists(st.sampled_from(values), min_size=n, max_size=n))
        scores.append(torch.tensor(flat, dtype=dtype).reshape(shape))
        kept = draw(st.none() | st.lists(st.booleans(), min_size=n, max_size=n))
        old.append(None if kept is None else torch.tensor(kept, dtype=torch.bool).reshape(shape))
    return scores, old, draw(st.floats(0, 0.999))


def by_sorting(scores: list[torch.Tensor], old: list[torch.Tensor | None], sparsity: float) -> list[torch.Tensor]:
    """The slow twin: one stable sort over everything, removed entries first."""
    flat = torch.cat([s.double().abs().reshape(-1) for s in scores])
    kept = torch.cat(
        [
            (torch.ones_like(s, dtype=torch.bool) if m is None else m).reshape(-1)
            for s, m in zip(scores, old, strict=True)
        ]
    )
    order = np.lexsort((np.arange(len(flat)), flat.numpy(), kept.numpy()))
    mask = kept.clone()
    mask[torch.from_numpy(order[: prune_count(sparsity, len(flat))].copy())] = False
    return [m.reshape(s.shape) for m, s in zip(mask.split([s.numel() for s in scores]), scores, strict=True)]


@pytest.mark.parametrize(
    ("sparsity", "total", "zeros"),
    [
        (0.5, 10, 5),
        (0.3, 10, 3),
        (0.29, 100, 29),
        (0.26, 10, 3),
        (0.0, 7, 0),
        (0.99, 10, 10),
        (0.5, 0, 0),
        (0.3, 101, 30),
    ],
)
def test_counts_are_rounded(sparsity: float, total: int, zeros: int) -> None:
    assert prune_count(sparsity, total) == zeros


@pytest.mark.parametrize("chunk", [3, 1 << 18])
@given(case=scored())
def test_threshold_search_agrees_with_sorting_everything(case, chunk: int) -> None:
    scores, old, sparsity = case
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(patterns, "CHUNK", chunk)
        masks = list(Pattern().masks([lambda s=s: s for s in scores], sparsity, old))
    for mask, expected in zip(masks, by_sorting(scores, old, sparsity), strict=True):
        assert torch.equal(mask, expected)


@pytest.mark.parametrize("chunk", [3, 1 << 18])
@given(case=scored())
def test_rows_are_pruned_like_matrices_of_one_row(case, chunk: int) -> None:
    scores, old, sparsity = case
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(patterns, "CHUNK", chunk)
        mask = Pattern().mask(scores[0], sparsity, old[0], "row")
    for i, row in enumerate(scores[0]):
        before = None if old[0] is None else old[0][i]
        assert torch.equal(mask[i], by_sorting([row], [before], sparsity)[0])


@given(case=scored())
def test_number_of_zeros_is_exact(case) -> None:
    scores, old, sparsity = case
    masks = Pattern().masks([lambda s=s: s for s in scores], sparsity, old)
    removed = sum(int((~m).sum()) for m in old if m is not None)
    wanted = prune_count(sparsity, sum(s.numel() for s in scores))
    assert sum(int((~m).sum()) for m in masks) == max(wanted, removed)


@given(case=scored(), data=st.data())
def test_weights_of_different_dtypes_are_compared_by_value(case, data) -> None:
    scores, old, sparsity = case
    mixed = [s.to(data.draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))) for s in scores]
    for mask, expected in zip(
        Pattern().masks([lambda s=s: s for s in mixed], sparsity, old), by_sorting(mixed, old, sparsity), strict=True
    ):
        assert torch.equal(mask, expected)


def test_old_masks_are_not_handed_out_for_change() -> None:
    old = torch.tensor([True, False])
    mask = next(Pattern().masks([lambda: torch.ones(2)], 0.0, [old]))
    mask[:] = False
    assert old.tolist() == [True, False]


def test_global_threshold_needs_scratch_below_five_percent_of_the_weights() -> None:
    weights = [torch.randn(1536, 576) for _ in range(30)]  # 27M weights, 106 MB
    scores = [lambda w=w: w for w in weights]
    peak = peak_allocation(lambda: list(Pattern().masks(scores, 0.5, [None] * len(weights))))
    masks = sum(w.numel() for w in weights)
    assert peak - masks < 0.05 * sum(w.nbytes for w in weights)


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_the_magnitude_pass_keeps_to_that_on_one_large_weight_too(scope: str) -> None:
    model = nn.Sequential(nn.Linear(5120, 5120, bias=False))  # 26M weights, 105 MB
    graph = trace(model, torch.randn(2, 5120))
    p = Magnitude(0.5, scope=scope)
    peak = peak_allocation(lambda: p.run(graph, Context()))
    weight = model[0].weight
    assert peak - weight.numel() < 0.05 * weight.nbytes


class Sizes(TorchDispatchMode):
    """The operators that compute as many numbers at once as torch gives to several threads."""

    def __init__(self) -> None:
        super().__init__()
        self.large: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.numel() >= 1 << 15 and not func.is_view:
            self.large.add(str(func))
        return out


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_search_opens_no_parallel_region(dtype: torch.dtype) -> None:
    """Each would wait for a thread whose CPU another process has."""
    matrix, old = torch.randn(200, 400).to(dtype), torch.rand(200, 400) < 0.9
    with Sizes() as sizes:
        list(Pattern().masks([lambda: matrix], 0.5, [old]))
        Pattern().mask(matrix, 0.5, compared="row")
    assert sizes.large <= {"aten.empty.memory_format"}
