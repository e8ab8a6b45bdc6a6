"""The part of a report that says how each pruned layer came to its mask, and what that cost its outputs."""

from __future__ import annotations

from collections.abc import Sequence

from sparsec.console.table import WIDTH, fitted, heading, paragraph, percent, shorten
from sparsec.report.layer import LayerRow
from sparsec.report.roles import by_role, middle

_NAME = 48
TOP = 10
"""Weights that are named as the most sensitive ones."""
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


def pruning_lines(layers: Sequence[LayerRow], every: bool = False, width: int = WIDTH) -> list[str]:
    """A row for the pruned weights of a role, or for `every` one; those that were calibrated show their error, worst below."""
    pruned = [row for row in layers if row.criterion is not None]
    if not pruned:
        return []
    named = [(row.name.removesuffix(".weight"), [row]) for row in pruned] if every else by_role(pruned)
    what = "one row per pruned weight" if every else "those of one role in one row; errors are their means"
    lines = heading(f"Pruning: {what}", width)
    rows = [_row(name, members, width) for name, members in named]
    header = ("name", "criterion", "target", "reached", "error of mask", "after update")
    lines += fitted(header, rows, width, left=(0, 1))
    measured = [row for row in pruned if row.error is not None]
    if measured:
        worst = max(measured, key=lambda row: row.error or 0.0)
        mean = sum(row.error or 0.0 for row in measured) / len(measured)
        lines += paragraph(
            "error: mean square of the change of a layer's outputs over that of its dense outputs, on sampled calibration tokens; "
            f"mean {_error(mean)}, worst {_error(worst.error)} in {worst.name.removesuffix('.weight')}",
            width=width,
        )
    return lines + _allocation(pruned, width) + _sensitivity(pruned, width)


def _row(name: str, rows: Sequence[LayerRow], width: int) -> tuple[str, ...]:
    count = f" x{len(rows)}" if rows[1:] else ""
    targets = sorted({round(row.sparsity_target, 6) for row in rows if row.sparsity_target is not None})
    parameters = sum(row.parameters for row in rows)
    return (
        _short(name, width, count),
        str(rows[0].criterion),
        " - ".join(percent(t, 2) for t in dict.fromkeys((*targets[:1], *targets[-1:]))) or "-",
        percent(1 - sum(row.nnz for row in rows) / parameters if parameters else 0.0, 2),
        _error(_mean([row.error_masked for row in rows])),
        _error(_mean([row.error for row in rows])),
    )


def _short(name: str, width: int, count: str = "") -> str:
    """Where a table has less than half of its room left for numbers, a name loses its beginning."""
    return shorten(name, min(_NAME, width // 2 - 2) - len(count)) + count


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _allocation(pruned: Sequence[LayerRow], width: int) -> list[str]:
    """How sparse the layers of each block were asked to become, where not all were asked the same."""
    chosen = [row for row in pruned if row.allocation not in (None, "uniform")]
    if not chosen:
        return []
    what, text = _MEASURES.get(str(chosen[0].allocation), ("measure", ""))
    blocks: dict[str, list[LayerRow]] = {}
    for row in chosen:
        blocks.setdefault(row.block or row.name.removesuffix(".weight"), []).append(row)
    lines = heading(f"Allocation: {chosen[0].allocation}", width)
    body = []
    for name, rows in blocks.items():
        targets = sorted({round(row.sparsity_target or 0.0, 6) for row in rows})
        span = percent(targets[0], 2) + (f" - {percent(targets[-1], 2)}" if targets[1:] else "")
        measures = sorted({row.allocation_measure for row in rows if row.allocation_measure is not None})
        shown = " - ".join(f"{m:.6g}" for m in dict.fromkeys((*measures[:1], *measures[-1:]))) or "-"
        body.append((_short(name, width), str(len(rows)), span, shown))
    lines += fitted(("block", "weights", "target", what), body, width)
    return lines + (paragraph(f"{what}: {text}", width=width) if text else [])


def _error(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _sensitivity(pruned: Sequence[LayerRow], width: int) -> list[str]:
    """The weights whose pruning alone moves the model most, and the middle of each role; not where it was not measured."""
    known = sorted((row for row in pruned if row.sensitivity is not None), key=lambda row: -(row.sensitivity or 0.0))
    if not known:
        return []
    lines = heading("Sensitivity: how far the model's outputs move where one weight alone is pruned", width)
    top = [
        (_short(row.name.removesuffix(".weight"), width), percent(row.sparsity), f"{row.sensitivity:.3g}")
        for row in known[:TOP]
    ]
    lines += fitted((f"the {len(top)} most sensitive" if known[TOP:] else "weight", "zero", "moved by"), top, width)
    by = [(name, middle(row.sensitivity for row in rows), len(rows)) for name, rows in by_role(known)]
    body = [
        (_short(name, width), str(count), f"{value:.3g}")
        for name, value, count in sorted(by, key=lambda found: -(found[1] or 0.0))
    ]
    lines += ["", *fitted(("role, its middle weight", "weights", "moved by"), body, width)]
    said = "moved by: KL(dense || this) in nats a token, of encoders 1 - cosine of the embedding"
    return lines + paragraph(said, width=width)
