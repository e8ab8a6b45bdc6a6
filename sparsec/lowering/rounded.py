"""What weights that were rounded are packed like: the scale and table of their codes, and what is said of those that are not."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from sparsec.errors import FormatError
from sparsec.formats.layout import Layout
from sparsec.formats.parts import DENSE
from sparsec.formats.values import Codes
from sparsec.ir.facts import Weight
from sparsec.lowering.rounding import AUTO


def check_rounded(weights: Iterable[Weight], values: str) -> None:
    """FormatError for a weight that was rounded to another codec's numbers than those named; "auto" and "" name none."""
    for weight in weights:
        rounded = weight.rounded
        if rounded is None or values in ("", AUTO, rounded.values):
            continue
        owner = weight.owners[0] if weight.owners else weight.name
        raise FormatError(
            f"{weight.name}: was rounded to {rounded.values}, and {values} would round it once more; take "
            f"values='{rounded.values}', or round('{values}') before, or leave it out with ignore=({owner!r},)"
        )


def codes_like(weight: Weight, layout: Layout, matrix: Tensor, mask: Tensor) -> tuple[Codes | None, str]:
    """What a weight's codes take scale and table from, None where that is the codec's own choice; and what to say.

    matrix, mask: [out, in], what is packed.
    """
    rounded = weight.rounded
    if rounded is None:
        return None, ""
    if not layout.values:
        return (
            None,
            f"was rounded to {rounded.values}, and plain values store it all the same; values='{rounded.values}' stores its codes",
        )
    if layout.values == rounded.values and rounded.holds(matrix, mask):
        return rounded.like, ""
    if layout.format == DENSE and weight.mask is not None:
        return (
            None,
            "dense stores what is pruned too, and 0.0 is none of the 16 numbers; so it was rounded once more, to the nearest",
        )
    told = f"was rounded to {rounded.values} and holds other numbers now, so the nearest were taken; round it again after training"
    return None, told


def zero_text(like: Codes | None, table: Tensor) -> str:
    """What to say where a layout changed the table of codes, since it stores places that hold 0.0."""
    if like is None or bool((like.table.cpu() == table.cpu()).all()):
        return ""
    return "the layout stores places that hold 0.0, so one of the 16 numbers that it was rounded to became 0.0"
