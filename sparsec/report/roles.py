"""Layers by role: the q_proj of all blocks is one line. `--layers` and the files show every weight."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence

from sparsec.report.layer import LayerRow


def role(row: LayerRow) -> str:
    """Its name without the numbers of blocks and experts: `self_attn.q_proj`."""
    return ".".join("*" if part.isdigit() else part for part in _inside(row).split("."))


def _inside(row: LayerRow) -> str:
    """Its name within its block."""
    name = row.name.removesuffix(".weight")
    return name.removeprefix(f"{row.block}.") if row.block else name


def by_role(rows: Iterable[LayerRow]) -> list[tuple[str, list[LayerRow]]]:
    """Rows of one role, shape and pruning pass together, in the order of the first of each."""
    found: dict[tuple[object, ...], list[LayerRow]] = {}
    for row in rows:
        found.setdefault((role(row), row.group, row.shape, row.criterion), []).append(row)
    return [(_title(members), members) for members in found.values()]


def _title(rows: Sequence[LayerRow]) -> str:
    """Their role; where that is numbers alone, as in an nn.Sequential, or nobody shares it, the first name and the last."""
    first, last = _inside(rows[0]), _inside(rows[-1])
    if first == last:
        return first
    named = set(role(rows[0]).split(".")) - {"*", "bias"}
    return role(rows[0]) if named else f"{first} .. {last}"


def most(values: Sequence[str]) -> str:
    """What most of them are, and how many: `bitmap x28, dense x2`; one kind is named without a number."""
    kinds = sorted(dict.fromkeys(values), key=lambda kind: -values.count(kind))
    if len(kinds) == 1:
        return kinds[0]
    return ", ".join(f"{kind} x{values.count(kind)}" for kind in kinds[:2]) + (", ..." if kinds[2:] else "")


def middle(values: Iterable[float | None]) -> float | None:
    """Median of those that are known."""
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None
