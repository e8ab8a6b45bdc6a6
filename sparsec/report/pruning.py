"""The part of a report that says how each pruned layer came to its mask, and what that cost its outputs."""

from __future__ import annotations

from collections.abc import Sequence

from sparsec.report.records import LayerRow
from sparsec.report.table import heading, paragraph, percent, shorten, table

_NAME = 48
_MEASURES = {
    "owl": ("outliers", "share of scores |W| * ||X_col|| above 5 times the block's mean"),
    "alphapruning": (
        "exponent",
        "of the power law that the spectra's upper halves follow, mean over the block's matrices",
    ),
    "sensitivity": (
        "divergence",
        "of the model's outputs from the dense ones with this layer alone pruned; KL in nats, or relative error",
    ),
}


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
    return lines + _allocation(pruned)


def _allocation(pruned: Sequence[LayerRow]) -> list[str]:
    """How sparse the layers of each block were asked to become, where not all were asked the same."""
    chosen = [row for row in pruned if row.allocation not in (None, "uniform")]
    if not chosen:
        return []
    what, text = _MEASURES.get(str(chosen[0].allocation), ("measure", ""))
    blocks: dict[str, list[LayerRow]] = {}
    for row in chosen:
        blocks.setdefault(row.block or row.name.removesuffix(".weight"), []).append(row)
    lines = heading(f"Allocation: {chosen[0].allocation}")
    body = []
    for name, rows in blocks.items():
        targets = sorted({round(row.sparsity_target or 0.0, 6) for row in rows})
        span = percent(targets[0], 2) + (f" - {percent(targets[-1], 2)}" if targets[1:] else "")
        measures = sorted({row.allocation_measure for row in rows if row.allocation_measure is not None})
        shown = " - ".join(f"{m:.6g}" for m in dict.fromkeys((*measures[:1], *measures[-1:]))) or "-"
        body.append((shorten(name, _NAME), str(len(rows)), span, shown))
    lines += table(("block", "weights", "target", what), body)
    return lines + (paragraph(f"{what}: {text}") if text else [])


def _error(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
