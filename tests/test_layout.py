"""The noun of the house: what a layout is called, what it plans, packs and refuses."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import sparsec
from sparsec.errors import FormatError, SpecError
from sparsec.formats import CSR, FORMATS
from sparsec.formats.layout import Layout, spellings
from sparsec.formats.parts import DENSE
from sparsec.kernels import KERNELS, gpu
from sparsec.patterns import Pattern

BITS = st.sampled_from([8, 16, 32])
LAYOUTS = st.one_of(
    st.sampled_from((*FORMATS, *spellings())),
    BITS.map("csr{}".format),
    st.tuples(st.sampled_from([8, 16, 24]), st.integers(1, 40)).map(lambda rc: f"bsr{rc[0]}x{rc[1]}"),
    st.sampled_from([4, 8]).flatmap(lambda m: st.integers(1, m - 1).map(lambda n: f"nm{n}:{m}")),
).map(Layout.parse)
PACKED = LAYOUTS.filter(lambda layout: layout.format != DENSE)


@st.composite
def masks(draw: st.DrawFn) -> Tensor:
    """Of any size and density, and such as blocks and N:M hold."""
    shape = draw(st.sampled_from([(16, 16), (16, 40), (48, 16), (24, 7), (1, 3), (0, 8), (8, 0), (3, 300)]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    mask = torch.rand(shape, generator=generator) < draw(st.sampled_from([0.0, 0.05, 0.3, 1.0]))
    return mask & (torch.arange(shape[1]) % 2 == 0) if draw(st.booleans()) else mask


@given(layout=LAYOUTS)
def test_what_is_printed_is_read_back(layout: Layout) -> None:
    assert Layout.parse(str(layout)) == layout
    assert str(Layout.parse(str(layout))) == str(layout)


@given(text=st.one_of(st.text(max_size=12), st.from_regex(r"(csr|bsr|nm|bitmap|dense)[0-9x:]{1,5}", fullmatch=True)))
def test_any_other_text_is_refused(text: str) -> None:
    try:
        layout = Layout.parse(text)
    except SpecError:
        return
    assert str(layout) == text


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("bitmp", "did you mean 'bitmap'"),
        ("csr9", "there is no csr9; there are csr8, csr16, csr32"),
        ("wcsr32", "there is no wcsr32; there are wcsr8, wcsr16"),
        ("bsr12x16", "a block has a multiple of 8 rows"),
        ("nm2:5", "M of 4 and 8"),
        ("bitmap8", "bitmap has no parameters"),
        ("dense8", "dense has no parameters"),
        ("bitmap:", "is no layout, did you mean 'bitmap'"),
        ("bitmap:int7", "no 'int7' values; known are 'int8', 'int8g64', 'int4g64', 'int4mg64'"),
        ("nm2:4:int4", "no 'int4' values; known are"),
        ("bitmap:int8g50", "a group is a multiple of 32 columns, got 50; write int8g64"),
        ("bitmap:int4mg0", "no 'int4mg0' values"),
        ("dense:int4mg16", "write int4mg64"),
        ("bsr016x16", "is no layout"),
        ("bsr\uff11\uff16x16", "is no layout"),
        ("nm" + "1" * 5000 + ":4", "is no layout"),
        (None, "None is no layout"),
    ],
)
def test_a_refusal_names_the_rule(text: str, said: str) -> None:
    with pytest.raises(SpecError) as caught:
        Layout.parse(text)
    assert said in str(caught.value)


def test_the_format_of_a_package_holds_plain_values_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FORMATS, "mine", CSR)
    held = "dense, bitmap, nm, bsr, csr, wcsr"
    with pytest.raises(SpecError, match=f"mine holds plain values only; layouts with quantised values: {held}"):
        Layout.parse("mine8:int8")


@given(layout=PACKED, mask=masks(), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_a_plan_is_what_is_packed_and_a_misfit_is_what_is_refused(
    layout: Layout, mask: Tensor, dtype: torch.dtype
) -> None:
    weight = torch.randn(mask.shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    misfits = layout.misfits(weight, mask)
    if misfits:
        with pytest.raises(FormatError) as caught:
            layout.pack(weight, mask)
        assert misfits == [str(caught.value)]
        return
    packed, (settled, plan) = layout.pack(weight, mask), layout.planned(mask, dtype)
    packed.check()
    assert (plan.nbytes, plan.stored) == (packed.nbytes, packed.values.numel())
    assert settled.format == layout.format
    assert layout.parameters in ("", settled.parameters)
    if packed.values.numel():  # an empty matrix does not tell its block
        assert Layout.of(packed) == settled
    if not layout.values:
        assert torch.equal(settled.pack(weight, mask).unpack(), torch.where(mask, weight, 0))
    elif mask.any():
        assert (settled.pack(weight, mask).exact() - torch.where(mask, weight, 0))[mask].abs().max() < 0.5


@given(
    layout=LAYOUTS, sparsity=st.sampled_from([0.0, 0.3, 0.5, 0.9]), rows=st.integers(1, 3), columns=st.integers(1, 3)
)
def test_a_sample_mask_is_one_that_the_layout_holds(layout: Layout, sparsity: float, rows: int, columns: int) -> None:
    block = layout.pattern.block or (1, layout.pattern.nm[1] if layout.pattern.nm else 1)
    shape = (block[0] * rows * 8, block[1] * columns * 8)
    mask = layout.sample_mask(shape, sparsity, torch.Generator().manual_seed(0))
    assert layout.pattern.holds(mask)
    if layout.format != DENSE:
        assert layout.misfits(mask.float(), mask) == []
    exact = layout.pattern.sparsity
    zeros = 1 - mask.float().mean().item()
    if exact is not None:
        assert zeros == pytest.approx(exact)
    elif layout.pattern == Pattern():
        assert zeros == pytest.approx(sparsity, abs=0.35)
    with pytest.raises(SpecError):
        Layout.parse("bsr16x16").sample_mask((17, 16), 0.5, torch.Generator())


@given(mask=masks(), device=st.sampled_from(["cpu", "cuda"]))
def test_candidates_are_layouts_of_the_device(mask: Tensor, device: str) -> None:
    found = list(Layout.candidates(mask, device))
    assert len(found) == len(set(found))
    assert all(Layout.parse(str(layout)) == layout for layout in found)
    names = {layout.format for layout in found}
    assert ("wcsr" in names) == (device == "cuda")
    assert ("csr" in names) == (device == "cpu")


def test_the_lists_hold_layouts_and_every_format_is_in_them() -> None:
    named = [Layout.parse(text) for text in spellings()]
    assert {layout.format for layout in named} == {*FORMATS, DENSE}
    assert {layout.kind.format for layout in Layout.checked()} == {k.format for k in KERNELS if k.run is gpu.product}
    measured = {layout.format for device in ("cpu", "cuda") for layout in Layout.calibrated(device, 0.5)}
    assert measured == {*FORMATS, DENSE}
    at_half = [str(layout) for layout in Layout.calibrated("cpu", 0.5)]
    at_tenth = [str(layout) for layout in Layout.calibrated("cpu", 0.9)]
    assert ("nm2:4" in at_half, "nm1:8" in at_half) == (True, False)
    assert ("nm2:4" in at_tenth, "nm1:8" in at_tenth) == (False, True)


@pytest.mark.parametrize(
    ("layout", "found"), [("'nm2:4'", "nm2:4"), ("nm", "nm2:4"), ("csr8", "csr8"), ("bsr8x8", "bsr8x8")]
)
def test_lower_takes_a_layout_by_its_name(layout: str, found: str) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(32, 16))
    pattern = "block:8x8" if "bsr" in layout else "2:4"
    passes = f"magnitude(0.5, pattern='{pattern}'),freeze,lower({layout})"
    compiled = sparsec.compile(model, passes, example_inputs=torch.ones(2, 32))
    assert compiled.sparsec.graph.weights["0.weight"].format == found


@pytest.mark.parametrize(
    ("text", "odd"),
    [
        ("magnitude(0.5),freeze,lower(nm2:4)", "nm2:4"),
        ("magnitude(0.5, pattern=2:4),lower(nm1:4)", "2:4"),
        ("lower(nm2:4:int8)", "nm2:4:int8"),
        ("lower(16x16)", "16x16"),
        ("zeros,\r\rlower(auto, targets=model.layers.0.*)", "model.layers.0.*"),
        ("magnitude(0.5, ignore=*)", "*"),
    ],
)
def test_the_word_that_needs_quotes_is_named_whole(text: str, odd: str) -> None:
    """Regression: only the first word with a colon, up to a second one, and none behind a keyword."""
    with pytest.raises(SpecError, match=rf"invalid [a-z ]+; quote what is no name: {re.escape(repr(odd))}\n"):
        sparsec.Pipeline.parse(text)
