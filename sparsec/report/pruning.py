"""The part of a report that says how each pruned layer came to its mask, and what that cost its outputs."""

from __future__ import annotations

from collections.abc import Sequence

from sparsec.report.records import LayerRow
from sparsec.report.table import heading, paragraph, percent, shorten, table

_NAME = 48


def pruning_lines(layers: Sequence[LayerRow]) -> list[str]:
    """One row for every pruned weight; rows that a calibration measured show their error, worst named below."""
    pruned = [row for row in layers if row.criterion is not None]
    if not pruned:
        return []
    lines = heading("Pruning: one row per pruned weight")
    rows = [
        (
            shorten(row.name.removesuffix(".weight"), _NAME),
            str(row.criterion),
            "-" if row.sparsity_target is None else percent(row.sparsity_target, 2),
            percent(row.sparsity, 2),
            _error(row.error_masked),
            _error(row.error),
        )
        for row in pruned
    ]
    lines += table(("name", "criterion", "target", "reached", "error of mask", "after update"), rows, left=(0, 1))
    measured = [row for row in pruned if row.error is not None]
    if measured:
        worst = max(measured, key=lambda row: row.error or 0.0)
        mean = sum(row.error or 0.0 for row in measured) / len(measured)
        lines += paragraph(
            "error: mean square of the change of a layer's outputs over that of its dense outputs, on sampled calibration tokens; "
            f"mean {_error(mean)}, worst {_error(worst.error)} in {worst.name.removesuffix('.weight')}"
        )
    return lines


def _error(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
