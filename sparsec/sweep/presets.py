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

    ask: Callable[[Sequence[str], Axes], Asked]
    """From the passes and the values of placeholders that were given. SpecError where it has no use for them."""
    lacks: str = ""  # what it tells by and an encoder has not


def _seminar(templates: Sequence[str], axes: Axes) -> Asked:
    if templates or axes:
        raise SpecError("--preset seminar has its own passes and values; leave out --passes and --grid")
    return Asked(FixedCells(seminar_cells()), beside_expected)


PRESETS = {
    "seminar": Preset(_seminar, "the time of a decoded token"),
    "tipping": Preset(tipping, "perplexity and top-1 agreement"),
    "patterns": Preset(families, "perplexity and the speed of decoding"),
    "frontier": Preset(frontier),
}
