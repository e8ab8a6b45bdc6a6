"""The studies that have a name: what each measures and what it says in the end."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from sparsec.errors import SpecError
from sparsec.sweep.families import families
from sparsec.sweep.frontier import frontier
from sparsec.sweep.planners import Asked, FixedCells
from sparsec.sweep.seminar import beside_expected, seminar_cells
from sparsec.sweep.tipping import tipping

Axes = Mapping[str, Sequence[str]]


@dataclass(frozen=True)
class Preset:
    """A study that has a name."""

    text: str  # what it measures, in a line
    ask: Callable[[Sequence[str], Axes], Asked]
    """From the passes and the values of placeholders that were given. SpecError where it has no use for them."""
    lacks: str = ""  # what it tells by and an encoder has not


def _seminar(templates: Sequence[str], axes: Axes) -> Asked:
    if templates or axes:
        raise SpecError("--preset seminar has its own passes and values; leave out --passes and --grid")
    return Asked(FixedCells(seminar_cells()), beside_expected)


PRESETS = {
    "seminar": Preset(
        "dense, masked, CSR and the best layout at 30, 50, 70 and 90 % zeros, beside the seminar's table",
        _seminar,
        "the time of a decoded token",
    ),
    "tipping": Preset(
        "the sparsity at which the model collapses, by method; of other --passes with a placeholder {zeros}, too",
        tipping,
        "perplexity and top-1 agreement",
    ),
    "patterns": Preset(
        "unstructured, N:M and blocks at 50 % zeros, and the sparsity at which each is as fast as unstructured ones",
        families,
        "perplexity and the speed of decoding",
    ),
    "frontier": Preset(
        "dense and admm at 30 to 70 % zeros, with plain, 8-bit and 4-bit values: what nothing beats in quality and bytes, or time",
        frontier,
    ),
}
