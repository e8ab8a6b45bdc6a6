"""Every pass with its options in use, for the tests of passes: from the examples that each pass gives."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

from hypothesis import strategies as st

from sparsec.errors import SpecError
from sparsec.passes import PASSES
from sparsec.patterns import Pattern
from sparsec.pipeline import Pass, Pipeline
from sparsec.pipeline.pruning import PruningPass

EXAMPLES = [(cls, example) for cls in PASSES for example in cls.examples]

shares = st.sampled_from([0.0, 0.1, 0.3, 0.5, 0.75, 0.99])
texts = st.text("abz*.?[]_0'\"\\ \nµ", min_size=1, max_size=8)
allocations = st.sampled_from([None, "global", "sensitivity", (("mlp", 0.6), ("layers.0.*", 0.25))])
COMMON = {
    "targets": st.none() | st.lists(texts, min_size=1, max_size=3).map(tuple),
    "ignore": st.lists(texts, max_size=3).map(tuple),
    "pattern": st.sampled_from(["unstructured", "block:2x2", "2:4", "1:16"]),
    "allocation": allocations,
    "spread": st.sampled_from([None, None, 0.05]),
}
"""Options that many passes share."""


def last(example: str) -> Pass:
    """The pass that an example is of."""
    return Pipeline.parse(example).passes[-1]


def before(example: str) -> str:
    """The passes that run first in an example."""
    return ",".join(str(Pipeline((p,))) for p in Pipeline.parse(example).passes[:-1])


@st.composite
def varied(draw: st.DrawFn, p: Pass, common: bool = False) -> Pass:
    """The same pass with other numbers, up to those that it has; common: and with other options of those that many share."""
    changes: dict[str, Any] = {}
    for option in fields(p):
        value = getattr(p, option.name)
        if common and option.name in COMMON:
            changes[option.name] = draw(COMMON[option.name])
        elif option.name == "sparsity":
            changes["sparsity"] = draw(shares | st.floats(0, 1, exclude_max=True))
        elif type(value) is float:
            changes[option.name] = draw(st.floats(value / 100, value))
        elif type(value) is int:
            changes[option.name] = draw(st.integers(min(1, value), value))
    if isinstance(p, PruningPass) and Pattern.parse(changes.get("pattern", p.pattern)).sparsity is not None:
        changes["sparsity"] = None
    try:
        return replace(p, **changes)
    except SpecError:  # options that exclude each other
        return p
