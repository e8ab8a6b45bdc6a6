"""Which quantised values a weight gets: what would spoil it is kept wider, and said."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import sparsec
from sparsec.errors import SpecError
from sparsec.formats.values import Codec
from sparsec.kernels import status
from sparsec.lowering.rounding import ORDER, admitted, rounding_error

CODECS = st.sampled_from(("int8", "int8g64", "int4g64", "int4mg64", "int4g32"))


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 32))


@given(CODECS, st.integers(1, 40), st.integers(1, 150), st.floats(0.001, 1.0), st.floats(0.0, 1.0))
def test_the_first_codec_stays_within_the_bound_and_narrower_ones_do_not(
    values: str, rows: int, columns: int, bound: float, density: float
) -> None:
    generator = torch.Generator().manual_seed(rows)
    weight = torch.randn(rows, columns, generator=generator).exp()
    mask = torch.rand(rows, columns, generator=generator) < density
    found, said = admitted(values, bound, weight, mask)
    own = rounding_error(Codec.parse(values), weight, mask)
    assert (found[0] == values) == (own <= bound)
    assert bool(said) == (own > bound)
    if found[0]:
        assert rounding_error(Codec.parse(found[0]), weight, mask) <= bound
    every, _ = admitted("auto", bound, weight, mask)
    assert every[-1] == ""
    assert list(every) == [n for n in ORDER if not n or rounding_error(Codec.parse(n), weight, mask) <= bound]


def test_a_matrix_that_four_bits_would_spoil_is_kept_in_eight_with_the_reason() -> None:
    net = model()
    with torch.no_grad():
        net[2].weight.copy_(torch.randn(32, 64).exp())  # type: ignore[operator, union-attr]
    x = torch.randn(3, 128)
    made = sparsec.compile(net, "magnitude(0.5),freeze,lower(bitmap, values='int4g64', bound=0.04)", example_inputs=x)
    spoilt = made.sparsec.graph.weights["2.weight"]
    assert spoilt.format == "bitmap:int8g64"
    assert "int4g64 would err by" in (spoilt.reason or "")
    assert any("over the bound of 4%" in note and "2.weight" in note for note in made.sparsec.records[-1].notes)


@pytest.mark.parametrize("layout", ["bitmap", "dense", "auto"])
def test_values_auto_takes_the_fewest_bits_within_the_bound(layout: str) -> None:
    x = torch.randn(3, 128)
    objective = ", objective='bytes'" if layout == "auto" else ""
    passes = "" if layout == "dense" else "magnitude(0.5),freeze,"
    for bound, wanted in ((0.5, "int4g64"), (0.02, "int8"), (0.0001, "")):
        spec = f"{passes}lower({layout}, values='auto', bound={bound}{objective})"
        made = sparsec.compile(model(), spec, example_inputs=x)
        formats = {w.format.partition(":")[2] for w in made.sparsec.graph.weights.values() if len(w.shape) == 2}
        assert formats == {wanted}, (spec, formats)


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("lower(bitmap, bound=0.2)", "bound is an option of quantised values"),
        ("lower(bitmap, digits=3)", "digits is an option of quantised values"),
        ("lower('bitmap:int8', values='int4g64')", "names two kinds of values"),
        ("lower(values='int8g50')", "write int8g64"),
        ("lower(bitmap, values='int8', bound=0)", "bound must be a number above 0"),
    ],
)
def test_what_makes_no_sense_is_refused(spec: str, said: str) -> None:
    with pytest.raises(SpecError, match=said):
        sparsec.Pipeline.parse(spec)


@pytest.mark.skipif(not status().built, reason="the reference makes no digits")
def test_the_error_of_digits_is_measured_and_said() -> None:
    errors = []
    for digits in (1, 2, 3):
        spec = f"magnitude(0.5),freeze,lower(bitmap, values='int8', digits={digits})"
        made = sparsec.compile(model(), spec, example_inputs=torch.randn(3, 128))
        (note,) = [n for n in made.sparsec.records[-1].notes if "of each number of x" in n]
        assert note.startswith(f"{digits} digit")
        errors.append(float(note.split("change products by ")[1].split(" ")[0]))
    assert 1e-3 < errors[0] < 0.1
    assert 1e-5 < errors[1] < 1e-3
    assert errors[2] < 1e-5
