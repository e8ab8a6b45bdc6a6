"""What `sparsec compress` tells of quality, and what it advises."""

from __future__ import annotations

import math

import pytest

from sparsec.data import load_model
from sparsec.data.text import load_text
from sparsec.evaluate import cut, evaluate
from sparsec.glance import LENGTH, WINDOWS, Glance, lose_less
from sparsec.pipeline import Pipeline
from sparsec.report.variant import short_perplexity

MAGNITUDE = "magnitude(0.5, pattern='2:4'),freeze,lower('nm2:4', values='int8')"


@pytest.mark.parametrize(
    ("passes", "worse", "said"),
    [
        (
            MAGNITUDE,
            30.0,
            ["MUCH WORSE", "admm in its place", "admm(0.5, pattern='2:4'),freeze,lower(nm2:4:int8)"],
        ),
        (MAGNITUDE, math.nan, ["MUCH WORSE"]),
        (MAGNITUDE, 1.2, ["admm in its place"]),
        (MAGNITUDE, None, ["admm in its place"]),
        (MAGNITUDE, 1.0, []),
        ("magnitude(0.5, scope='row'),freeze", 30.0, ["MUCH WORSE", "admm in its place"]),
        ("wanda(0.5),freeze", 3.0, ["MUCH WORSE", "take fewer zeros, or put recover(minutes=20) behind freeze"]),
        ("wanda(0.5),freeze,recover(minutes=1)", 3.0, ["MUCH WORSE", "take fewer zeros"]),
        ("wanda(0.5),freeze", 1.2, []),
        ("wanda(0.5),freeze", None, []),
        ("zeros,freeze", 30.0, []),
    ],
)
def test_advice_is_given_where_quality_was_lost(passes: str, worse: float | None, said: list[str]) -> None:
    """Regression: a ruined model was saved without a word about it, but for what it wrote."""
    told = " ".join(lose_less(Pipeline.parse(passes), worse))
    assert bool(told) == bool(said)
    for words in said:
        assert words.replace("'", "") in told.replace("'", "").replace('"', "")
    assert ("MUCH WORSE" in told) == ("MUCH WORSE" in said)
    assert ("recover" in told) == any("recover" in words for words in said)
    assert ("--passes" in told) == (passes == MAGNITUDE and bool(said))


def test_the_perplexity_is_that_of_evaluate() -> None:
    loaded = load_model("tiny")
    glance = Glance(loaded, "abc", 2, None)
    for when in ("before", "after"):
        glance.look(when, loaded.model)
    windows = cut(load_text(), loaded.tokenizer, LENGTH, WINDOWS)
    wanted = short_perplexity(evaluate(loaded.model, windows).perplexity)
    assert f"quality perplexity {wanted} before, {wanted} after; lower is better" in " ".join(glance.lines())
    assert glance.advice(Pipeline.parse(MAGNITUDE)) == []  # the same before and after


def test_a_model_without_a_tokenizer_is_saved_without_a_sample() -> None:
    from dataclasses import replace

    glance = Glance(replace(load_model("tiny"), tokenizer=None), None, 2, None)
    glance.look("before", None)
    assert glance.lines() == ["no sample: tiny has no tokenizer"]
    assert glance.advice(Pipeline.parse(MAGNITUDE)) != []
