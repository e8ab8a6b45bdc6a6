"""Tables of a page that sort: a grid of equal rows, so that a browser lays out those that are seen and not hundreds of others."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sparsec.console.table import mega, percent, times
from sparsec.report.layer import LayerRow
from sparsec.report.words import dense_reason

WIDEST = 36
"""Letters of a column of text: longer ones are wrapped. A number never is."""
SPARE = 3
"""Letters of room for a cell's padding, and for the arrow behind a title."""


@dataclass(frozen=True)
class Column:
    """What stands above it, and what that means."""

    title: str
    about: str = ""


@dataclass(frozen=True)
class CellText:
    """What is shown, and the number that it is sorted by."""

    text: str
    value: float | None = None
    shows: int | None = None  # which layer's view


@dataclass(frozen=True)
class SortedTable:
    """Rows as long as there are columns."""

    id: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[CellText]]

    @property
    def style(self) -> str:
        """The widths of the columns, the same in every row, and that of all: known before any row is laid out."""
        letters = [self._letters(i) for i in range(len(self.columns))]
        least = [f"{each}ch" if i else f"min({each}ch, 40vw)" for i, each in enumerate(letters)]
        columns = " ".join(f"minmax({low}, {each}fr)" for low, each in zip(least, letters, strict=True))
        return f"--columns: {columns}; --width: calc({least[0]} + {sum(letters[1:])}ch)"

    def _letters(self, i: int) -> int:
        words = max((len(row[i].text) for row in self.rows if row[i].value is None), default=0)
        numbers = max((len(row[i].text) for row in self.rows if row[i].value is not None), default=0)
        return max(len(self.columns[i].title) + 1, min(WIDEST, words), numbers) + SPARE


def sort_value(value: Any) -> float | None:
    """To sort by; None for what is no finite number."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


@dataclass(frozen=True)
class LayerColumn:
    """Of the table of layers: what stands in it, and how it is shown."""

    title: str
    about: str
    of: Callable[[LayerRow], Any]
    show: Callable[[Any], str] = str
    doubtful: bool = False  # told by the clock


LAYER_COLUMNS = (
    LayerColumn("name", "of the stored weight", lambda r: r.name.removesuffix(".weight")),
    LayerColumn("group", "", lambda r: r.group),
    LayerColumn("shape", "as stored", lambda r: "x".join(map(str, r.shape))),
    LayerColumn("zeros", "share of zeros", lambda r: r.sparsity, percent),
    LayerColumn("MB dense", "", lambda r: r.bytes_dense, mega),
    LayerColumn("MB held", "", lambda r: r.bytes_held, mega),
    LayerColumn("layout", "", lambda r: r.format),
    LayerColumn("kernel", "that executes it", lambda r: r.kernel),
    LayerColumn("by FLOPs", "a bound of the speedup", lambda r: r.speedup_theoretical, times),
    LayerColumn("by bytes", "a bound of the speedup", lambda r: r.speedup_theoretical_bytes, times),
    LayerColumn("predicted", "speedup by the cost model", lambda r: r.speedup_predicted, times),
    LayerColumn("roof", "what binds by the cost model", lambda r: r.binds),
    LayerColumn("measured", "speedup by the clock", lambda r: r.speedup_measured, times, True),
    LayerColumn("ms dense", "measured", lambda r: r.ms_dense, "{:.4f}".format, True),
    LayerColumn("ms", "measured, as it is executed now", lambda r: r.ms, "{:.4f}".format, True),
    LayerColumn("sensitivity", "harm where this weight alone is pruned", lambda r: r.sensitivity, "{:.4g}".format),
    LayerColumn("why", "it is dense, or has its layout", lambda r: dense_reason(r) or r.reason),
)


def layer_table(rows: Sequence[LayerRow], views: Mapping[str, int], doubt: str) -> SortedTable:
    """One row for every stored weight; columns that nothing is known of are left out. views: number of a layer's, by name."""
    columns = [c for c in LAYER_COLUMNS if any(c.of(row) is not None for row in rows)]
    cells = [[_cell(row, column, views, doubt) for column in columns] for row in rows]
    return SortedTable("layer-table", [Column(c.title, c.about) for c in columns], cells)


def _cell(row: LayerRow, column: LayerColumn, views: Mapping[str, int], doubt: str) -> CellText:
    value = column.of(row)
    text = "-" if value is None else column.show(value) + (doubt if column.doubtful else "")
    return CellText(text, sort_value(value), views.get(row.name) if column is LAYER_COLUMNS[0] else None)
