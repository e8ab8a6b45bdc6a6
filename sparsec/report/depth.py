"""Where zeros lie and time goes by depth: a character for every block of the model, or for a few of them together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from sparsec.console.table import WIDTH, heading, percent, shorten
from sparsec.report.layer import LayerRow
from sparsec.report.picture import RAMP, shade
from sparsec.report.roles import role

CHARACTERS = 60
"""Of a bar, at most: more blocks are put together in equal shares."""
_COLUMNS = 80
_NAME = 36


def by_depth(rows: Iterable[LayerRow], characters: int = CHARACTERS) -> list[list[LayerRow]]:
    """The weights of each block, in order; of more blocks than characters, those of as many neighbours as it takes."""
    blocks: dict[str, list[LayerRow]] = {}
    for row in rows:
        if row.block is not None:
            blocks.setdefault(row.block, []).append(row)
    every, count = list(blocks.values()), min(characters, len(blocks))
    shares = [every[i * len(every) // count : (i + 1) * len(every) // count] for i in range(count)]
    return [[row for block in share for row in block] for share in shares]


def depth_lines(rows: Sequence[LayerRow]) -> list[str]:
    """A bar of the zeros and one of the time, 80 columns at most; none of what is not known, or where there are no blocks."""
    depth = by_depth(rows)
    lines = []
    if any(row.criterion is not None for block in depth for row in block):
        lines.append(_bar("zeros", [_sparsity(block) for block in depth], "zero"))
    products = [[row for row in block if row.multiplied] for block in depth]
    for how, ms in (("of the measured time", _measured), ("of the predicted time", _predicted)):
        times = [_sum(block, ms) for block in products]
        known = [each for each in times if each is not None]
        if known and len(known) == len(times) and sum(known):
            lines.append(_bar("time", [each / sum(known) for each in known], how))
            break
    return lines


def depth_table(rows: Iterable[LayerRow], width: int = WIDTH) -> list[str]:
    """The zeros of every role that was pruned, block by block."""
    rows = list(rows)
    roles = dict.fromkeys(role(row) for row in rows if row.block is not None and row.criterion is not None)
    if not roles:
        return []
    names = [shorten(name, min(_NAME, width // 3)) for name in roles]
    longest = max(map(len, names))
    depth = by_depth(rows, min(CHARACTERS, width - longest - len("    100.0% to 100.0%")))
    found = {name: [_sparsity([row for row in block if role(row) == name]) for block in depth] for name in roles}
    known = [share for shares in found.values() for share in shares if share is not None]
    low, high = min(known), max(known)
    lines = heading(f"Zeros by role and block: {_scale(low, high, 1)}, blank where a block has none", width)
    for name, shares in zip(names, found.values(), strict=True):
        own = [share for share in shares if share is not None]
        drawn = "".join(" " if share is None else shade(share, low, high) for share in shares)
        lines.append(f"{name:<{longest}}  {drawn}  {percent(min(own))} to {percent(max(own))}")
    return lines


def _measured(row: LayerRow) -> float | None:
    return row.ms


def _predicted(row: LayerRow) -> float | None:
    return row.ms_predicted


def _sum(rows: Sequence[LayerRow], ms: Callable[[LayerRow], float | None]) -> float | None:
    """None where it is not known of every one."""
    known = [value for row in rows if (value := ms(row)) is not None]
    return sum(known) if len(known) == len(rows) else None


def _sparsity(rows: Sequence[LayerRow]) -> float | None:
    parameters = sum(row.parameters for row in rows)
    return 1.0 - sum(row.nnz for row in rows) / parameters if parameters else None


def _bar(label: str, values: Sequence[float | None], what: str) -> str:
    """The longest legend that fits."""
    known = [0.0 if value is None else value for value in values]
    low, high = min(known), max(known)
    flat = percent(low) == percent(high)
    drawn = "".join(shade(value, low, low if flat else high) for value in known)
    legends = (
        f"  {_scale(low, high, 1)} {what}, by block",
        f"  {_scale(low, high, 1)} {what}",
        f"  {_scale(low, high, 1)}",
        f" {RAMP[0]}{percent(low, 0)} {RAMP[-1]}{percent(high, 0)}",
    )
    lines = [f"{label:<9}{drawn}{legend}" for legend in legends]
    return next((line for line in lines if len(line) <= _COLUMNS), lines[-1])


def _scale(low: float, high: float, digits: int) -> str:
    one, two = percent(low, digits), percent(high, digits)
    return f"all {one}" if one == two else f"{RAMP[0]} {one} to {RAMP[-1]} {two}"
