"""Pass specifications as text."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pass_cases import COMMON, EXAMPLES, last, varied

import sparsec
from sparsec.errors import PipelineError, SpecError, VerifyError
from sparsec.passes import PASSES, Flops, Freeze, Lower, Magnitude, Sparsity
from sparsec.pipeline import Pass, Pipeline, known_passes

NAMES = ", ".join(known_passes())
MASKING = ", ".join(name for name, cls in known_passes().items() if "mask" in cls.produces)


@st.composite
def passes(draw: st.DrawFn) -> Pass:
    """Any, with any options."""
    return draw(varied(last(draw(st.sampled_from([example for _, example in EXAMPLES]))), common=True))


@given(st.lists(passes(), min_size=1, max_size=5))
def test_text_of_passes_reads_back_as_the_same_passes(listed: list[Pass]) -> None:
    pipeline = Pipeline(tuple(listed))
    assert Pipeline.parse(str(pipeline)) == pipeline


PLACES = {"checkpoint"}
"""Options that name a folder: an example that is run would make one."""


@pytest.mark.parametrize("cls", PASSES)
def test_a_pass_shows_all_its_options_in_examples_that_end_in_it(cls: type[Pass]) -> None:
    assert cls.examples
    for example in cls.examples:
        assert type(last(example)) is cls
        Pipeline.parse(example).validate()
    for option in dataclasses.fields(cls):
        shown = any(getattr(last(example), option.name) != option.default for example in cls.examples)
        assert shown or option.name in COMMON or option.name in PLACES, f"no example of {cls.name} gives {option.name}"


tokens = st.sampled_from(
    [
        "magnitude",
        "freeze",
        "lower",
        "csr",
        "(",
        ")",
        ",",
        "=",
        "0.5",
        "-1",
        "'",
        '"',
        "[",
        "]",
        "\n",
        "\\",
        "*",
        "lambda",
        "scope",
        " ",
        "µ",
        "\0",
    ]
)


@given(st.one_of(st.text(max_size=40), st.lists(tokens, max_size=15).map("".join)))
def test_any_text_gives_passes_or_a_spec_error(text: str) -> None:
    try:
        pipeline = Pipeline.parse(text)
    except SpecError:
        pass
    else:
        assert pipeline.passes
        assert Pipeline.parse(str(pipeline)) == pipeline


def test_nothing_in_a_specification_is_evaluated(tmp_path) -> None:
    target = tmp_path / "touched"
    with pytest.raises(SpecError, match="nothing is evaluated"):
        Pipeline.parse(f"magnitude(open({str(target)!r}, 'w'))")
    assert not target.exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "magnitude(0.5),freez,lower(csr)",
            f"unknown pass 'freez', did you mean 'freeze'; passes: {NAMES}\n"
            "  magnitude(0.5),freez,lower(csr)\n"
            "                 ^^^^^",
        ),
        (
            "magnitude(0.5, scop='layer')",
            "magnitude has no option 'scop', did you mean 'scope'; options: sparsity, pattern, allocation, "
            "spread, targets, ignore, scope\n"
            "  magnitude(0.5, scop='layer')\n"
            "                 ^^^^^^^^^^^^",
        ),
        (
            "freeze,\n  magnitude(1.0)",
            "magnitude: sparsity must be a share of zeros in [0, 1), got 1.0; half of the weights is 0.5\n"
            "    magnitude(1.0)\n"
            "    ^^^^^^^^^^^^^^",
        ),
        (
            "magnitude(0.5",
            "not a pass specification: a bracket is not closed\n  magnitude(0.5\n               ^",
        ),
        (
            "magnitude",
            "magnitude: a share of zeros is missing; half of the weights is magnitude(0.5)\n  magnitude\n  ^^^^^^^^^",
        ),
        ("freeze(1)", "freeze takes no such option\n  freeze(1)\n         ^"),
        (
            "µ(0.5),freez",
            f"unknown pass 'μ'; passes: {NAMES}\n  µ(0.5),freez\n  ^",
        ),
    ],
)
def test_errors_point_at_the_fault_and_name_the_way_out(text: str, message: str) -> None:
    with pytest.raises(SpecError) as caught:
        Pipeline.parse(text)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    "text",
    ["magnitude(-0.1)", "magnitude(1)", "magnitude(nan)", "magnitude(True)", "magnitude('0.5')", "magnitude(1e999)"],
)
def test_sparsity_outside_zero_to_one_is_refused(text: str) -> None:
    with pytest.raises(SpecError, match=r"share of zeros in \[0, 1\)"):
        Pipeline.parse(text)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Magnitude(math.nan), "share of zeros"),
        (lambda: Magnitude(0.5, scope="tensor"), "scope must be one of 'global', 'layer', 'row', got 'tensor'"),
        (lambda: Magnitude(0.5, targets=3), "targets must be a pattern"),
        (lambda: Magnitude(0.5, ignore=("",)), "ignore must be a pattern"),
        (lambda: Lower("csr4"), "there is no csr4; there are csr8, csr16, csr32, and csr, which takes what fits"),
        (lambda: Lower("bsr12x16"), "a block has a multiple of 8 rows and at least one column"),
        (lambda: Lower("bsr16x0"), "a block has a multiple of 8 rows and at least one column"),
        (lambda: Lower("csr", index_bits=8), "index_bits= is no option any more: the layout says it, lower(csr8)"),
        (
            lambda: Lower("bsr", block=(16, 16)),
            "block= is no option any more: the layout says it, as in lower(bsr16x16)",
        ),
        (lambda: Lower("nm", tokens=8), "tokens is an option of lower(auto), got lower(nm, tokens=8)"),
        (lambda: Lower(objective="speed"), "objective must be one of 'latency', 'bytes', got 'speed'"),
        (lambda: Lower(tokens=0), "tokens must be a whole number above 0, got 0"),
        (lambda: Lower(prompt_tokens=8), "prompt_tokens and new_tokens, both, in place of tokens"),
        (lambda: Lower(tokens=1, prompt_tokens=8, new_tokens=2), "both, in place of tokens"),
        (lambda: Lower(prompt_tokens=8, new_tokens=0), "new_tokens must be a whole number above 0, got 0"),
        (lambda: Flops(context=0), "context must be a whole number above 0, got 0"),
    ],
)
def test_options_are_checked_in_python_too(build, message: str) -> None:
    with pytest.raises(SpecError) as caught:
        build()
    assert message in str(caught.value)


def test_lists_of_patterns_become_tuples_so_that_passes_stay_hashable() -> None:
    assert Magnitude(0.5, targets=["mlp"], ignore="layers.0") == Magnitude(0.5, targets=("mlp",), ignore=("layers.0",))
    assert hash(Magnitude(0.5, targets=["mlp"]))


def test_passes_may_be_given_as_text_objects_or_both() -> None:
    expected = Pipeline((Magnitude(0.5), Freeze(), Lower("auto")))
    assert Pipeline.of("magnitude(0.5),freeze,lower(auto)") == expected
    assert Pipeline.of([Magnitude(0.5), "freeze,lower"]) == expected
    assert Pipeline.of(expected) is expected
    assert Pipeline.of(Freeze()) == Pipeline((Freeze(),))
    with pytest.raises(SpecError, match="give an instance"):
        Pipeline.of([Freeze])
    with pytest.raises(SpecError, match="got int"):
        Pipeline.of([3])


def test_illegal_order_is_refused_before_anything_runs() -> None:
    with pytest.raises(PipelineError) as caught:
        Pipeline.parse("freeze,lower(csr)").validate()
    assert str(caught.value) == (
        f"pass 1 'freeze' needs 'mask', which no earlier pass produces; put one of {MASKING} before it\n"
        "  freeze,lower(csr)"
    )


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            "magnitude(0.5),lower(csr)",
            "pass 2 'lower' needs 'frozen', which no earlier pass produces; put freeze before",
        ),
        ("magnitude(0.2),freeze,magnitude(0.5),lower(csr)", "which pass 3 'magnitude' took away; put freeze before it"),
        ("magnitude(0.5),lower(csr),freeze", "put pass 3 'freeze' before it"),
        ("freeze,magnitude(0.5)", "put pass 2 'magnitude' before it"),
        ("lower(csr)", "needs 'frozen' and 'mask', .*; put one of magnitude, .*, mask and then freeze before it"),
    ],
)
def test_an_illegal_order_says_what_to_put_where(spec: str, message: str) -> None:
    with pytest.raises(PipelineError, match=message):
        Pipeline.parse(spec).validate()


def test_passes_are_frozen_dataclasses_that_declare_known_facts() -> None:
    for cls in known_passes().values():
        assert dataclasses.is_dataclass(cls)
        assert cls.__dataclass_params__.frozen  # type: ignore[attr-defined]
    Pipeline.parse("magnitude(0.5),mask,zeros,freeze,sparsity,flops,lower").validate()


class _Entry:
    value = "third.party:Thing"

    def __init__(self, name: str, result: object) -> None:
        self.name, self.result = name, result

    def load(self) -> object:
        if isinstance(self.result, Exception):
            raise self.result
        return self.result


@dataclasses.dataclass(frozen=True)
class Halve(Sparsity):
    """A third party's pass."""

    name = "halve"


@pytest.mark.parametrize(
    ("loaded", "message"),
    [(ImportError("no module"), "does not load"), (SyntaxError("bad"), "does not load"), (int, "no subclass")],
)
def test_a_broken_entry_point_is_left_out_and_named(monkeypatch, loaded: object, message: str) -> None:
    known_passes.cache_clear()
    monkeypatch.setattr("sparsec.offered.entry_points", lambda group: [_Entry("thing", loaded)])
    with pytest.warns(UserWarning, match=f"'thing' .*third.party:Thing.*{message}"):
        assert "thing" not in known_passes()
    known_passes.cache_clear()


class Nameless(Halve):
    name = "no name"


class NoEffect(Halve):
    name = "no_effect"
    effect = "lossy"


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Freeze, "'freeze', is taken by"),
        (Nameless, "its name must be a word of letters, digits and _, got 'no name'"),
        (NoEffect, "NoEffect must be a dataclass with an effect"),
    ],
)
def test_an_entry_point_that_offers_no_usable_pass_stops_no_other(monkeypatch, kind: type, message: str) -> None:
    """Regression: a name that is taken, or none, ended every call."""
    known_passes.cache_clear()
    monkeypatch.setattr("sparsec.offered.entry_points", lambda group: [_Entry("thing", kind), _Entry("halve", Halve)])
    with pytest.warns(UserWarning, match=f"'thing' .*third.party:Thing.* is left out: .*{message}"):
        assert known_passes()["freeze"] is Freeze
    assert known_passes()["halve"] is Halve
    known_passes.cache_clear()


def test_a_third_party_pass_is_found_by_its_entry_point(monkeypatch) -> None:
    known_passes.cache_clear()
    monkeypatch.setattr("sparsec.offered.entry_points", lambda group: [_Entry("halve", Halve)])
    assert Pipeline.parse("halve").passes == (Halve(),)
    known_passes.cache_clear()


def test_a_quote_and_a_bracket_that_are_open_are_told_apart() -> None:
    for text, what in (
        ("magnitude(0.5", "a bracket is not closed"),
        ("magnitude(0.5, scope='layer)", "a quote is not closed"),
        ("magnitude(0.5]", "a closing bracket does not fit"),
    ):
        with pytest.raises(SpecError, match=what):
            Pipeline.parse(text)


HALF_MADE = sparsec.trace(torch.nn.Sequential(torch.nn.Linear(4, 4)), torch.ones(2, 4))


def odd_run(members: dict[str, object]) -> sparsec.Pass:
    return type("Odd", (Halve,), members)()


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"run": lambda self, graph, context: None}, r"pass 1 'halve' must give a PassResult .*got None"),
        ({"run": lambda self, graph, context: sparsec.PassResult(True, "x", (3,))}, r"pass 1 'halve' must give"),
        (
            {
                "run": lambda self, graph, context: (
                    graph.weights.update({"0.weight": 7}) or sparsec.PassResult(True, "x")
                )
            },
            r"after pass 1 'halve' the graph cannot be read any more: AttributeError",
        ),
        ({"produces": ["mask"]}, r"pass 'halve': produces must be a frozenset of facts, got \['mask'\]"),
        ({"effect": "lossy"}, r"pass 'halve': name must be a word and effect a sparsec.Effect, got 'lossy'"),
    ],
)
def test_a_pass_that_breaks_its_promises_is_named(members: dict[str, object], message: str) -> None:
    """Regression: AttributeError or TypeError of whatever read its result next."""
    with pytest.raises((VerifyError, PipelineError), match=message):
        Pipeline.of([odd_run(members)]).run(HALF_MADE.view())
