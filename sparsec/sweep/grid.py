"""What a study measures: pass specifications with placeholders such as `wanda({sparsity})`, and the values that go in."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

from sparsec.errors import PipelineError, SpecError
from sparsec.pipeline import Pipeline
from sparsec.study.variants import split

_PLACE = re.compile(r"\{([A-Za-z_]\w*)\}")
MOST = 10_000
"""Cells: more is a slip of the keyboard."""


@dataclass(frozen=True)
class Cell:
    """One set of passes, and the values that its placeholders had."""

    pipeline: Pipeline
    values: tuple[tuple[str, str], ...] = ()  # (placeholder, what stands for it)
    timed: bool = True  # False: its quality and bytes alone are wanted
    template: str = ""  # that the values went into

    @property
    def spec(self) -> str:
        """Canonical text of the passes; two cells of one specification are one."""
        return str(self.pipeline)

    @property
    def pruning(self) -> Pipeline:
        """The passes before `lower`: cells that share them share masks, calibration and quality."""
        return split(self.pipeline)[0]


def grid_cells(templates: Sequence[str], axes: Mapping[str, Sequence[str]]) -> list[Cell]:
    """Every template with every combination of the values that it has placeholders for, those that prune alike side by side.

    Raises SpecError for a placeholder without values, values without a placeholder, and passes that are none.
    """
    used = {name for template in templates for name in places(template)}
    _check_axes(used, axes)
    found: dict[str, Cell] = {}
    for template in templates:
        names = places(template)
        if (count := _count(axes[name] for name in names)) > MOST:
            raise SpecError(
                f"{template}: its values make {count:,} cells, at most {MOST:,} are measured; take fewer values"
            )
        for chosen in product(*(axes[name] for name in names)):
            values = dict(zip(names, chosen, strict=True))
            cell = Cell(_pipeline(template, values), tuple(values.items()), template=template)
            found.setdefault(cell.spec, cell)
    prunings = list(dict.fromkeys(cell.pruning for cell in found.values()))
    return sorted(found.values(), key=lambda cell: prunings.index(cell.pruning))


def places(template: str) -> list[str]:
    """The placeholders of a template, each once, in order."""
    return list(dict.fromkeys(_PLACE.findall(template)))


def axis(text: str) -> tuple[str, list[str]]:
    """Of `sparsity=0.3,0.5`: the name and the values; a comma within brackets or quotes does not part them. SpecError."""
    name, mark, rest = text.partition("=")
    values = [value.strip() for value in _parted(rest)]
    if not mark or not _PLACE.fullmatch("{" + name.strip() + "}") or not all(values):
        raise SpecError(
            f"{text!r}: values of a placeholder are given as NAME=VALUE,VALUE,..., such as sparsity=0.3,0.5"
        )
    return name.strip(), values


def _parted(text: str) -> list[str]:
    parts, depth, quote = [""], 0, ""
    for sign in text:
        if quote:
            quote = "" if sign == quote else quote
        elif sign in "'\"":
            quote = sign
        else:
            depth += (sign in "([") - (sign in ")]")
        if sign == "," and not depth and not quote:
            parts.append("")
        else:
            parts[-1] += sign
    return parts


def _check_axes(used: Iterable[str], axes: Mapping[str, Sequence[str]]) -> None:
    for name in used:
        if name not in axes:
            near = difflib.get_close_matches(name, axes, n=1, cutoff=0.5)
            guess = f"; did you mean {near[0]!r}, which has some?" if near else f"; add --grid {name}=VALUE,VALUE"
            raise SpecError(f"the placeholder {{{name}}} has no values{guess}")
    for name, values in axes.items():
        if name not in used:
            raise SpecError(
                f"values are given for {name!r}, and no passes have a placeholder {{{name}}}; leave them out"
            )
        if not values:
            raise SpecError(f"the placeholder {{{name}}} has an empty list of values; give at least one")


def _count(sizes: Iterable[Sequence[str]]) -> int:
    found = 1
    for values in sizes:
        found *= len(values)
    return found


def _pipeline(template: str, values: Mapping[str, str]) -> Pipeline:
    text = _PLACE.sub(lambda place: values[place[1]], template)
    try:
        pipeline = Pipeline.parse(text)
        pipeline.validate()
    except (SpecError, PipelineError) as error:
        with_values = ", ".join(f"{name}={value}" for name, value in values.items())
        raise SpecError(f"{template}{' with ' + with_values if values else ''}: {error}") from error
    return pipeline
