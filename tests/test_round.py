"""round: kept weights are numbers of a codec, pruned ones zero, and packing them in codes changes no bit."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from architectures import tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import sparsec
from sparsec.calibrate.factor import inverse_factor
from sparsec.errors import FormatError, PipelineError, SelectionError, SpecError, WeightError
from sparsec.formats.grid import Grid
from sparsec.formats.values import Codec
from sparsec.passes import Round
from sparsec.passes.round import compensate, descend
from sparsec.testing import masks

CODECS = ["int8", "int8g32", "int8g64", "int4g32", "int4g64", "int4mg32", "int4mg64"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@st.composite
def layers(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor, str]:
    """A weight [out, in] of any size and dtype, what is kept of it, inputs [tokens, in], and a codec."""
    out, inner = draw(st.integers(1, 40)), draw(st.integers(1, 100))
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    weight = torch.randn(out, inner, generator=g) * draw(st.sampled_from([1e-3, 1.0, 30.0]))
    weight += draw(st.sampled_from([0.0, 0.0, 1.0, -50.0]))
    if draw(st.booleans()):
        weight *= torch.randn(out, 1, generator=g).exp()
    if draw(st.booleans()):  # many equal ones, and zeros that are kept
        weight = torch.tensor([0.0, -0.0, 0.5, -0.5, 3.0])[torch.randint(5, weight.shape, generator=g)]
    x = torch.randn(draw(st.integers(1, 200)), inner, generator=g) * torch.randn(inner, generator=g).exp()
    if draw(st.booleans()):
        x[:, draw(st.integers(0, inner - 1))] = 0  # a dead column
    if draw(st.integers(0, 9)) == 0:
        x.zero_()
    return weight.to(draw(st.sampled_from(DTYPES))), draw(masks(out, inner)), x, draw(st.sampled_from(CODECS))


def module(weight: Tensor) -> nn.Module:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
    linear.weight.data = weight.clone()
    return nn.Sequential(linear).eval()


def compiled(weight: Tensor, mask: Tensor | None, x: Tensor, spec: str) -> Any:
    data = [(part.to(weight.dtype),) for part in x.split(64)]
    needed = "gptq" in spec or ("round" in spec and "nearest" not in spec)
    given = {} if mask is None else {"masks": {"0.weight": mask}}
    return sparsec.compile(
        module(weight),
        spec,
        example_inputs=torch.zeros(2, weight.shape[1], dtype=weight.dtype),
        calibration=data if needed else None,
        **given,
    )


def error(rounded: Tensor, weight: Tensor, x: Tensor) -> float:
    return float(((rounded.double() - weight.double()) @ x.double().t()).square().sum())


def said(model: Any) -> list[str]:
    """What the last pass noted of rounding."""
    return [note for note in model.sparsec.records[-1].notes if "rounded" in note]


def kept(weight: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask, weight, torch.zeros((), dtype=weight.dtype))


@settings(max_examples=60)
@given(case=layers(), method=st.sampled_from(["gptq", "nearest"]), layout=st.sampled_from(["bitmap", "csr16"]))
def test_what_is_rounded_is_packed_bit_for_bit(case, method: str, layout: str) -> None:
    weight, mask, x, values = case
    if layout == "csr16" and values.startswith("int4m"):
        layout = "bitmap"
    model = compiled(weight, mask, x, f"mask,round('{values}', method='{method}'),freeze")
    found, rounded = model[0].weight.detach(), model.sparsec.graph.rounded("0.weight")
    assert not found[~mask].any(), "a pruned weight is no longer zero"
    assert rounded is not None
    assert rounded.values == values
    codec = Codec.parse(values)
    codes = codec.encode(found, mask, rounded.like)
    assert torch.equal(codec.decode(codes).to(found.dtype), found), "a weight lies beside the grid"
    lowered = sparsec.extend(model, f"lower({layout}, values='{values}')")
    packed = lowered.sparsec.graph.weights["0.weight"].packed
    assert torch.equal(packed.unpack(), found)
    assert torch.equal(packed.scale, rounded.like.scale)
    assert torch.equal(packed.table, rounded.like.table)
    assert torch.equal(packed.scatter(), codes.codes)
    assert said(lowered) == []


@settings(max_examples=30)
@given(case=layers(), factor=st.sampled_from([0.01, 0.3, 1.0]))
def test_a_rounded_weight_is_near_and_no_row_turns_to_nothing(case, factor: float) -> None:
    """GPTQ moves weights further than the nearest number, but never out of what the group's codes reach."""
    weight, mask, x, values = case
    model = compiled(weight, mask, x, f"mask,round('{values}', damping={factor}),freeze")
    found = model[0].weight.detach().float()
    grid = Grid.of(Codec.parse(values), model.sparsec.graph.rounded("0.weight").like, *weight.shape)
    rounding = torch.finfo(weight.dtype).eps * (found.abs() + grid.middle.abs().amax(1, keepdim=True))
    assert bool(((found - kept(grid.round(found), mask)).abs() <= rounding + 1e-30).all())


def correlated(seed: int, out: int = 48, inner: int = 96, tokens: int = 400) -> tuple[Tensor, Tensor, Tensor]:
    """A weight, what is kept of it, and inputs that depend on each other, some of them large."""
    g = torch.Generator().manual_seed(seed)
    mixing = torch.randn(inner, inner, generator=g) / inner**0.5 + torch.eye(inner)
    x = torch.randn(tokens, inner, generator=g) @ mixing * torch.randn(inner, generator=g).exp()
    weight = torch.randn(out, inner, generator=g)
    return weight, torch.rand(out, inner, generator=g) < (0.5 if seed % 2 else 1.0), x


@pytest.mark.parametrize("values", ["int8", "int8g32", "int4g32", "int4mg64"])
def test_calibrated_rounding_errs_less_than_the_nearest_numbers(values: str) -> None:
    codec = Codec.parse(values)
    shares = []
    for seed in range(20):
        weight, mask, x = correlated(seed)
        before, gram = kept(weight, mask), x.t() @ x
        plain = codec.decode(codec.encode(weight, mask))
        grid = Grid.fitted(codec, before, mask, gram.diagonal())
        made_up = compensate(before, mask, grid, inverse_factor(gram, 0.01)[0].float())
        found = descend(before, made_up, mask, grid, gram, 0.01, 2)
        shares.append(error(found, before, x) / error(plain, before, x))
        assert error(found, before, x) <= error(made_up, before, x) * 1.001
        searched = kept(Grid.fitted(codec, before, mask).round(before), mask)
        assert float((searched - before).square().sum()) <= 1.02 * float((plain - before).square().sum())
    assert max(shares) < 0.8
    assert sum(shares) / len(shares) < 0.45


@settings(max_examples=40)
@given(seed=st.integers(0, 2**16), values=st.sampled_from(CODECS), out=st.sampled_from([1, 7, 700]))
def test_gptq_takes_the_paper_s_steps(seed: int, values: str, out: int) -> None:
    """Against a slow twin in float64 that inverts H anew for the columns to come, and is told which numbers were taken."""
    weight, mask, x = correlated(seed, out=out, inner=70)
    weight = kept(weight, mask)
    grid = Grid.fitted(Codec.parse(values), weight, mask, x.square().sum(0))
    gram = x.t() @ x
    factor, _, _ = inverse_factor(gram, 0.01)
    found = compensate(weight, mask, grid, factor.float()).double()
    hessian = gram.double()
    hessian.diagonal().add_(0.01 * hessian.diagonal().mean())
    waiting = weight.double().clone()
    for i in range(weight.shape[1]):
        inverse = torch.linalg.inv(hessian[i:, i:])
        nearest = grid.column(i, waiting[:, i].float()).double()
        lost, least = (waiting[:, i] - found[:, i]).abs(), (waiting[:, i] - nearest).abs()
        slack = 1e-4 * (1 + waiting[:, i].abs())
        assert bool((lost <= least + slack)[mask[:, i]].all()), f"column {i} was not rounded to the nearest"
        assert not found[~mask[:, i], i].any()
        waiting[:, i:] -= torch.outer((waiting[:, i] - found[:, i]) / inverse[0, 0], inverse[0])


@settings(max_examples=20)
@given(seed=st.integers(0, 2**16), values=st.sampled_from(CODECS), sweeps=st.integers(0, 3))
def test_coordinate_descent_never_errs_more_and_ends_where_no_weight_can_better(
    seed: int, values: str, sweeps: int
) -> None:
    weight, mask, x = correlated(seed, out=9, inner=70)
    weight = kept(weight, mask)
    gram = x.t() @ x
    grid = Grid.fitted(Codec.parse(values), weight, mask)
    first = kept(grid.round(weight), mask)
    hessian = gram.double()
    hessian.diagonal().add_(0.01 * hessian.diagonal().mean())

    def lost(rounded: Tensor) -> Tensor:
        change = (rounded - weight).double()
        return ((change @ hessian) * change).sum(1)

    some = descend(weight, first, mask, grid, gram, 0.01, sweeps)
    more = descend(weight, some, mask, grid, gram, 0.01, 1)
    slack = 1e-5 * lost(torch.zeros_like(weight))
    assert bool((lost(some) <= lost(first) + slack).all())
    assert bool((lost(more) <= lost(some) + slack).all())
    assert not more[~mask].any()
    if sweeps == 0:
        assert torch.equal(some, first)
    settled = descend(weight, some, mask, grid, gram, 0.01, 15)
    for row, column in torch.nonzero(mask)[::37].tolist():
        for step in (-1.0, 1.0):
            tried = settled.clone()
            moved = settled[:, column] + step * grid.scale.amax() * 9
            tried[row, column] = grid.column(column, moved)[row]
            assert lost(tried)[row] >= lost(settled)[row] - slack[row]


def test_columns_that_come_later_make_up_for_the_error() -> None:
    """Two inputs that are always the same: what the first rounds away the second takes."""
    weight = torch.tensor([[0.30, 0.20, 1.0, 1.0]]).repeat(1, 8)
    x = torch.randn(64, 32)
    x[:, 1] = x[:, 0]
    found = compiled(weight, None, x, "round('int4g32', sweeps=0, damping=0.001)")[0].weight.detach()
    assert abs(float(found[0, 0] + found[0, 1] - 0.5)) < 0.03


@pytest.mark.parametrize(
    "spec", ["round('int4g32')", "round('int4g32', order='true')", "round('int4g32', feed='dense')"]
)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_model_is_rounded_as_a_whole(name: str, spec: str) -> None:
    model, example = tiny_model(name)
    ids = torch.randint(0, 60, (6, 24), generator=torch.Generator().manual_seed(1))
    rounded = sparsec.compile(model, f"magnitude(0.5),freeze,{spec},sparsity", calibration=ids)
    graph = rounded.sparsec.graph
    for weight in graph.masked():
        assert graph.rounded(weight.name) is not None
        assert weight.rounded.error is not None
        assert weight.rounded.error < 0.1
    lowered = sparsec.extend(rounded, "fuse,lower(bitmap, values='int4g32')")
    assert said(lowered) == []
    inputs = example()
    with torch.no_grad():
        before, after = (m(**inputs)[0] for m in (rounded, lowered))
    assert float((before - after).abs().max()) < 1e-3 * float(before.abs().max())


def made(spec: str = "magnitude(0.5),round('int4g32', method='nearest'),freeze") -> Any:
    torch.manual_seed(0)
    return sparsec.compile(
        nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 32)), spec, example_inputs=torch.zeros(2, 64)
    )


def rounded_names(model: Any) -> list[str]:
    graph = model.sparsec.graph
    return [name for name in graph.weights if graph.rounded(name) is not None]


def test_what_a_weight_was_rounded_to_is_known_to_copies_and_extensions() -> None:
    model = made()
    assert rounded_names(model) == ["0.weight", "2.weight"]
    for other in (
        copy.deepcopy(model),
        sparsec.extend(model, "sparsity"),
        sparsec.extend(model, "magnitude(0.7),freeze"),
    ):
        assert rounded_names(other) == ["0.weight", "2.weight"]
    around = nn.Sequential(sparsec.extend(model, "sparsity"))
    assert [w.rounded is not None for w in sparsec.extend(around, "flops").sparsec.graph.masked()] == [True, True]
    assert "rounded to int4g32" in sparsec.ir.printer.graph_text(model.sparsec.graph)


@pytest.mark.parametrize("way", ["trained", "loaded", "converted"])
def test_a_weight_that_changed_is_said_and_rounded_to_the_nearest(way: str) -> None:
    model = made()
    rounded = model[0].weight.detach().clone()
    if way == "trained":
        with torch.no_grad():
            model[0].weight.mul_(1.37)
    elif way == "loaded":
        state = {name: torch.where(t == 0, t, t + 0.01) for name, t in model.state_dict().items()}
        model.load_state_dict({**model.state_dict(), "0.weight": state["0.weight"]})
    else:
        model.to(torch.bfloat16)
    lowered = sparsec.extend(model, "lower(bitmap, values='int4g32')")
    notes = "".join(lowered.sparsec.notes)
    if way == "converted":
        assert "rounded" not in notes
        unpacked = lowered.sparsec.graph.weights["0.weight"].packed.unpack()
        assert torch.equal(unpacked, rounded.bfloat16())
        return
    assert "weights that were rounded hold other numbers now: 0.weight (int4g32)." in notes
    assert rounded_names(model) == ["2.weight"]
    now, packed = model[0].weight.detach(), lowered.sparsec.graph.weights["0.weight"].packed
    codec, mask = Codec.parse("int4g32"), now != 0
    assert torch.equal(packed.unpack(), codec.decode(codec.encode(now, mask)))


def test_a_weight_that_a_pass_trained_is_not_taken_for_rounded() -> None:
    model, _ = tiny_model("llama")
    ids = torch.randint(0, 60, (6, 24), generator=torch.Generator().manual_seed(1))
    spec = "magnitude(0.5),freeze,round('int8', method='nearest'),recover(steps=2),lower(bitmap, values='int8')"
    (note,) = said(sparsec.compile(model, spec, calibration=ids))
    assert "was rounded to int8 and holds other numbers now, so the nearest were taken" in note


def test_plain_values_after_rounding_are_kept_and_said() -> None:
    model = made()
    lowered = sparsec.extend(model, "lower(bitmap)")
    (note,) = lowered.sparsec.records[-1].notes
    assert note == (
        "0.weight, 2.weight: was rounded to int4g32, and plain values store it all the same; values='int4g32' stores its codes"
    )
    assert torch.equal(lowered.sparsec.graph.weights["0.weight"].packed.unpack(), model[0].weight.detach())


@pytest.mark.parametrize(
    "spec", ["lower(bitmap, values='int8')", "lower(auto, values='int8', objective='bytes')", "lower('csr16:int4g64')"]
)
def test_another_codec_is_refused_before_anything_is_packed(spec: str) -> None:
    model = made()
    with pytest.raises(
        FormatError, match=r"0\.weight: was rounded to int4g32, and \S+ would round it once more; take values='int4g32'"
    ):
        sparsec.extend(model, spec, copy=False)


def test_dense_codes_of_a_pruned_weight_are_rounded_once_more_and_said() -> None:
    model = made("magnitude(0.5),round('int4mg32', method='nearest'),freeze")
    (note,) = said(sparsec.extend(model, "lower(dense, values='int4mg32')"))
    assert "dense stores what is pruned too, and 0.0 is none of the 16 numbers" in note
    eight = sparsec.extend(made("magnitude(0.5),round('int8', method='nearest'),freeze"), "lower(dense, values='int8')")
    assert said(eight) == []
    assert (
        said(sparsec.extend(made(), "lower(dense, values='int4g32')")) == []
    )  # 0.0 is one of the numbers at even steps


def test_places_without_a_weight_cost_no_number_where_the_steps_are_even() -> None:
    model = made("magnitude(0.97),round('int4g32', method='nearest'),freeze")
    lowered = sparsec.extend(model, "lower(bsr8x8, values='int4g32')")
    assert not any("became 0.0" in n for n in lowered.sparsec.records[-1].notes)


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("round", "round needs values: round"),
        ("round('')", r"round needs the values to round to, got ''; known are 'int8'"),
        ("round('int5')", "there are no 'int5' values"),
        ("round('int4g48')", "a group is a multiple of 32 columns, got 48"),
        ("round('int8', method='best')", "method must be one of 'gptq', 'nearest'"),
        ("round('int8', damping=0)", r"damping must be in \(0, 1\]"),
        ("round('int8', damping=True)", r"damping must be in \(0, 1\]"),
        ("round('int8', sweeps=-1)", "sweeps must be a whole number"),
        (
            "round('int8', method='nearest', sweeps=3)",
            "sweeps does nothing with method='nearest'; leave it out, or take",
        ),
        ("round('int8', method='nearest', feed='dense')", "feed does nothing with method='nearest'"),
        ("round('int8', feed='dense', order='true')", "order='true' rounds by what rounded layers make"),
    ],
)
def test_options_that_make_no_sense_are_refused(spec: str, said: str) -> None:
    with pytest.raises(SpecError, match=said):
        sparsec.Pipeline.parse(spec)


def test_weights_that_no_code_stands_for_are_refused_by_name_and_nothing_is_changed() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].weight.data[3, 4] = torch.nan
    with pytest.raises(WeightError, match=r"1\.weight: .*row 3, column 4 is nan.*ignore=\('1',\)"):
        sparsec.compile(model, "round('int8', method='nearest')", example_inputs=torch.zeros(2, 8))
    mask = torch.ones(8, 8, dtype=torch.bool)
    mask[3, 4] = False
    made = sparsec.compile(
        model, "mask,round('int8', method='nearest'),freeze", example_inputs=torch.zeros(2, 8), masks={"1": mask}
    )
    assert bool(made[1].weight.isfinite().all()), "what is pruned is not looked at"
    with pytest.raises(WeightError, match=r"0\.weight: is torch\.float64, and quantised values stand for"):
        sparsec.compile(model.double(), "round('int8', method='nearest')", example_inputs=torch.zeros(2, 8).double())


def test_calibration_is_asked_for_and_too_little_of_it_is_said() -> None:
    with pytest.raises(PipelineError, match="needs calibration data"):
        made("round('int8')")
    weight, mask, x = correlated(0)
    (note,) = compiled(weight, mask, x[:40], "mask,round('int8')").sparsec.records[-1].notes
    assert "1 inputs have more columns than tokens were seen (96 and 40)" in note
    (note,) = compiled(weight, mask, torch.zeros_like(x), "mask,round('int8')").sparsec.records[-1].notes
    assert "0.weight: all that is read is zero in all of the text; numbers are the nearest" in note


def test_fused_experts_stay_as_they_are_and_that_is_said() -> None:
    model, _ = tiny_model("mixtral")
    made = sparsec.compile(model, "round('int8', method='nearest')")
    assert any("fused experts, which nothing packs in codes yet" in note for note in made.sparsec.records[-1].notes)
    with pytest.raises(SelectionError, match=r"nothing to round: .*fused experts"):
        sparsec.compile(model, Round("int8", method="nearest", targets=("experts",)))
