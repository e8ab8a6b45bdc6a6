"""What is kept of each pruned weight to look at: histograms, threshold, where its zeros lie."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import report_cases
import torch
from architectures import tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import sparsec
from sparsec import memory
from sparsec.data import load_model, load_text
from sparsec.defaults import QUICK
from sparsec.errors import SelectionError
from sparsec.ir.facts import Weight
from sparsec.pipeline import Pipeline
from sparsec.report.picture import drawable, picture, pictures
from sparsec.report.views import GRID, LayerView, bands
from sparsec.study import variants, views
from sparsec.study.measure import measured_report
from sparsec.study.plan import plan
from sparsec.study.views import BINS, CORNER, LayerViews

GOLDEN = Path(__file__).parent / "golden" / "picture.txt"
CALIBRATION = torch.randint(0, 60, (4, 16), generator=torch.Generator().manual_seed(0))
PASSES = (
    "magnitude({0}, scope='layer')",
    "magnitude({0})",
    "magnitude({0}, scope='row'),freeze",
    "magnitude(pattern='2:4'),freeze",
    "magnitude({0}, pattern='block:2x2')",
    "wanda({0}),freeze",
    "sparsegpt({0})",
    "magnitude(0.2),freeze,magnitude({0}),freeze,sparsity",
)


def watched(model: Any, passes: str, **options: Any) -> tuple[dict[str, LayerView], Any]:
    found = LayerViews()
    made = sparsec.compile(model, passes, instruments=[found], **options)
    return {view.name: view for view in found.found()}, made


def stacked(weight: Weight, tensor: Tensor) -> Tensor:
    """[out, in], experts one below the other."""
    turned = tensor.transpose(-1, -2) if weight.transposed else tensor
    return turned.reshape(-1, turned.shape[-1])


@settings(max_examples=25, deadline=None)
@given(
    passes=st.sampled_from(PASSES),
    share=st.sampled_from((0.25, 0.5, 0.75, 0.9)),
    name=st.sampled_from(("llama", "gpt2", "mixtral")),
    sample=st.sampled_from((97, 1 << 18)),
)
def test_a_view_is_what_the_mask_and_the_first_values_say(passes: str, share: float, name: str, sample: int) -> None:
    model, _ = tiny_model(name)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(views, "SAMPLE", sample)
        spec = passes.format(share)
        learnt = {"calibration": CALIBRATION} if "wanda" in spec or "sparsegpt" in spec else {}
        found, made = watched(model, spec, **learnt)
    graph = made.sparsec.graph
    pruned = {w.name for w in graph.masked() if graph.kept(w.name) < w.numel}
    assert set(found) == pruned != set()
    for view in found.values():
        weight = graph.weights[view.name]
        mask, values = stacked(weight, graph.mask(view.name)), stacked(weight, before[view.name]).abs()
        check_histogram(view, mask, values, sample)
        check_places(view, mask)
        went, stayed = values[~mask].max(), values[mask].min() if mask.any() else torch.tensor(float("inf"))
        if view.threshold is not None:
            assert went <= view.threshold
            assert not mask.any() or view.threshold <= stayed
        elif "sparsegpt" not in spec:
            assert went > stayed, "a cut by magnitude is one, whatever pass made it"


def check_histogram(view: LayerView, mask: Tensor, values: Tensor, sample: int) -> None:
    assert len(view.counts) == len(view.kept) == len(view.edges) - 1 == BINS
    assert view.sampled == (sample if sample < mask.numel() else None)
    assert sum(view.counts) == (view.sampled or mask.numel())
    assert all(kept <= count for kept, count in zip(view.kept, view.counts, strict=True))
    assert view.edges[0] == 0
    assert view.edges[-1] == pytest.approx(float(values.max()))
    widths = {round((b - a) / view.edges[-1], 6) for a, b in pairwise(view.edges[:-1])}
    assert len(widths) == 1
    if view.sampled is None:
        assert sum(view.kept) == int(mask.sum())
        edges = torch.tensor(view.edges)
        for chosen, counts in ((values, view.counts), (values[mask], view.kept)):
            # values at an edge may go either way by rounding
            for i in range(BINS):
                near = 1e-5 * float(edges[-1])
                inside = ((chosen > edges[i] + near) & (chosen < edges[i + 1] - near)).sum()
                around = ((chosen >= edges[i] - near) & (chosen <= edges[i + 1] + near)).sum()
                assert inside <= counts[i] <= around


def check_places(view: LayerView, mask: Tensor) -> None:
    rows, columns = mask.shape
    down, across = bands(rows), bands(columns)
    assert (len(view.zeros), len(view.zeros[0])) == (min(GRID, rows), min(GRID, columns))
    assert view.shape == (rows, columns)
    assert view.sparsity == pytest.approx(1 - float(mask.float().mean()), abs=1e-6)
    (a, b), (c, d) = down[-1], across[0]
    assert view.zeros[-1][0] == pytest.approx(1 - float(mask[a:b, c:d].float().mean()))
    assert view.corner == tuple(
        "".join("#" if kept else "." for kept in row) for row in mask[:CORNER, :CORNER].tolist()
    )


@given(length=st.integers(1, 5000))
def test_cells_cover_a_side_once(length: int) -> None:
    found = bands(length)
    assert [i for begin, end in found for i in range(begin, end)] == list(range(length))
    assert max(e - b for b, e in found) - min(e - b for b, e in found) <= 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_small_dtypes_are_seen_exactly(dtype: torch.dtype) -> None:
    model = tiny_model("llama")[0].to(dtype)
    before = {n: p.detach().abs() for n, p in model.named_parameters()}
    found, made = watched(model, "magnitude(0.5, scope='layer')")
    for view in found.values():
        mask = made.sparsec.graph.mask(view.name)
        check_histogram(view, mask, before[view.name].float(), 1 << 18)
        assert view.threshold == float(before[view.name][mask].min())


def test_magnitude_by_layer_has_a_threshold_and_wanda_none() -> None:
    model, _ = tiny_model("llama")
    assert all(v.threshold is not None for v in watched(model, "magnitude(0.5, scope='layer'),freeze")[0].values())
    found, _ = watched(model, "wanda(0.5),freeze", calibration=CALIBRATION)
    assert {view.threshold for view in found.values()} == {None}


@pytest.mark.parametrize("lower", ["lower(csr)", "fuse,lower(bitmap)"])
def test_lowering_and_extending_leave_the_views_as_they_are(lower: str) -> None:
    model, _ = tiny_model("llama")
    masked, _ = watched(model, "magnitude(0.5, scope='layer'),freeze")
    assert watched(model, f"magnitude(0.5, scope='layer'),freeze,{lower}", copy=False)[0] == masked
    again = LayerViews()
    for copy in (True, False):
        made = sparsec.compile(tiny_model("llama")[0], "magnitude(0.5, scope='layer')", instruments=[again])
        first = again.found()
        sparsec.extend(made, f"freeze,{lower}", instruments=[again], copy=copy)
        assert again.found() == first


def test_a_second_pruning_of_untouched_values_has_a_threshold_too() -> None:
    found, passes = LayerViews(), "magnitude({}, scope='layer'),freeze"
    made = sparsec.compile(tiny_model("llama")[0], passes.format(0.3), instruments=[found])
    sparsec.extend(made, passes.format(0.6), instruments=[found])
    both = {view.name: view for view in found.found()}
    assert all(view.threshold is not None for view in both.values())
    assert both == watched(tiny_model("llama")[0], passes.format(0.6))[0]


def test_values_trained_between_two_prunings_have_no_threshold() -> None:
    found = LayerViews()
    made = sparsec.compile(tiny_model("llama")[0], "magnitude(0.3, scope='layer'),freeze", instruments=[found])
    with torch.no_grad():
        for p in made.parameters():
            p.mul_(2.0)
    assert all(view.threshold is not None for view in found.found())
    sparsec.extend(made, "magnitude(0.6, scope='layer'),freeze", instruments=[found])
    assert {view.threshold for view in found.found()} == {None}


def test_what_cannot_be_sorted_into_bins_and_what_was_not_pruned_has_no_view() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 6), nn.Linear(6, 4))
    with torch.no_grad():
        model[0].weight[0, 0] = float("nan")
        model[2].weight.zero_()
    found, _ = watched(model, "magnitude(0.5, scope='layer', targets=('1', '2'))", example_inputs=torch.ones(2, 8))
    assert set(found) == {"1.weight", "2.weight"}
    assert found["2.weight"].counts == (24, *[0] * (BINS - 1))
    assert found["2.weight"].threshold == 0.0


def test_a_report_takes_them_in_either_way_of_building(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    for share in (0.4, 0.0):
        monkeypatch.setattr(variants, "SCARCE", share)
        loaded, found = load_model("tiny"), LayerViews()
        effort = plan(loaded, load_text(None), QUICK)
        report, _ = measured_report(loaded, Pipeline.parse("magnitude(0.5),freeze,lower(csr)"), effort, [found])
        assert report.in_turn == (share > 0)
        seen.append(found.found())
    assert seen[0] == seen[1] != ()


def test_what_the_views_hold_is_not_counted_as_the_models(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded, found = load_model("tiny"), LayerViews()
    monkeypatch.setattr("sparsec.memory.resident", lambda device: 1000 + found.nbytes)
    watched = {"instruments": [found]}
    builder = variants.Builder(
        loaded.model, Pipeline.parse("magnitude(0.5),freeze"), None, None, watched, watching=True
    )
    made = builder.prune()
    assert found.nbytes > 0
    assert builder.built.resident["masked"] == memory.shared(loaded.model, made)


def test_a_picture_of_a_whole_weight(request: pytest.FixtureRequest) -> None:
    found, _ = watched(report_cases.model(), report_cases.SPEC)
    text = "\n".join(pictures(tuple(found.values()), ("model.layers.1.mlp.up_proj.weight", "model.norm.weight"))) + "\n"
    if request.config.getoption("--refresh-goldens"):
        GOLDEN.write_text(text, encoding="utf-8")
    assert text == GOLDEN.read_text(encoding="utf-8")


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(1, 70),
    columns=st.integers(1, 70),
    share=st.sampled_from((0.1, 0.5, 0.9)),
    far=st.sampled_from((1.0, 1000.0)),
    name=st.text("abc.", min_size=1, max_size=100),
)
def test_a_picture_fits_80_columns_of_ascii(rows: int, columns: int, share: float, far: float, name: str) -> None:
    model = nn.Sequential(nn.Linear(columns, rows, bias=False))
    with torch.no_grad():
        model[0].weight[0, 0] *= far
    found, _ = watched(model, f"magnitude({share})", example_inputs=torch.ones(2, columns))
    for view in found.values():
        lines = picture(replace(view, name=name))
        assert max(map(len, lines)) <= 80
        assert all(line.isascii() and line == line.rstrip() for line in lines)
        if view.threshold is not None:  # under the bin that it falls into
            at = next(line for line in lines if line.strip() == "^").index("^") - 9
            assert view.edges[at] <= view.threshold <= view.edges[at + 1]


def test_pictures_are_asked_for_by_name_end_or_glob() -> None:
    names = [f"model.layers.{i}.mlp.{n}_proj.weight" for i in (1, 10) for n in ("up", "down")]
    assert drawable(["layers.1.*"], names) == tuple(names[:2])
    assert drawable(["up_proj", "layers.10.mlp.up_proj.weight"], names) == (names[0], names[2])
    assert drawable([], names) == ()
    with pytest.raises(SelectionError, match=r"'up_prj' names no matrix of this model; near names: 'up_proj'"):
        drawable(["down_proj", "up_prj"], names)
