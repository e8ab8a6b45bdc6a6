"""The study of the first seminar: dense, masked and CSR by zeros, beside the table that it expected, and the best layout."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sparsec.console.table import WIDTH, fitted, heading, paragraph, percent
from sparsec.report.variant import Variant, short_perplexity
from sparsec.sweep.grid import Cell, grid_cells
from sparsec.sweep.run import DENSE, CellResult

ZEROS = ("0.3", "0.5", "0.7", "0.9")
SETUPS = {
    "Masked": "magnitude({zeros}),freeze,sparsity,flops",
    "CSR": "magnitude({zeros}),freeze,sparsity,flops,lower(csr)",
    "Best": "magnitude({zeros}),freeze,sparsity,flops,fuse,lower(auto)",
}
"""The last one is not the seminar's: what lower(auto) chooses."""
Range = tuple[float, float]
EXPECTED: Mapping[tuple[str, str], tuple[Range, Range]] = {
    ("Masked", "0.3"): ((0.98, 1.02), (0.95, 1.05)),
    ("CSR", "0.3"): ((0.85, 0.95), (0.95, 1.05)),
    ("Masked", "0.5"): ((0.98, 1.02), (0.95, 1.05)),
    ("CSR", "0.5"): ((0.60, 0.70), (0.90, 1.00)),
    ("Masked", "0.7"): ((0.98, 1.02), (0.95, 1.05)),
    ("CSR", "0.7"): ((0.40, 0.50), (0.70, 0.85)),
}
"""Shares of dense: bytes, and time of a token. Where it says about 100 %, 2 % of the bytes and 5 % of the time are let pass."""
NEAR = 1.1
"""Perplexity over the dense model's that is still about the same."""


@dataclass(frozen=True)
class Row:
    """One setup, and where it stands against what was expected."""

    setup: str
    zeros: str
    figures: Variant


def seminar_cells() -> list[Cell]:
    """In the order of the table."""
    return grid_cells(list(SETUPS.values()), {"zeros": ZEROS})


def beside_expected(results: Sequence[CellResult], width: int = WIDTH) -> list[str]:
    """Lines: each setup of the seminar, what it expected, what came out, met or not, and the reason where it was not."""
    by_spec = {result.spec: result for result in results}
    dense = by_spec[DENSE].figures if DENSE in by_spec else None
    if dense is None:
        return []
    rows, reasons = [], []
    for zeros in ZEROS:
        for setup, template in SETUPS.items():
            (cell,) = grid_cells([template], {"zeros": [zeros]})
            result = by_spec.get(cell.spec)
            if result is not None and result.figures is not None:
                row, why = _row(Row(setup, zeros, result.figures), dense, result.layouts)
                rows.append(row)
                reasons += why
    header = ["setup", "bytes", "expected", "time a token", "expected", "perplexity", "met"]
    lines = heading("Beside what the seminar expected, in shares of dense", width)
    lines += fitted(header, rows, width, left=(0, 6))
    for reason in dict.fromkeys(reasons):
        lines += paragraph(reason, "- ", width=width)
    return lines


def _row(row: Row, dense: Variant, layouts: str) -> tuple[list[str], list[str]]:
    name = f"{row.setup} {float(row.zeros):.0%}"
    size = row.figures.bytes / dense.bytes
    slow = 1 / row.figures.speedup_decode.median if row.figures.speedup_decode is not None else None
    expected = EXPECTED.get((row.setup, row.zeros))
    shown = [name, percent(size, 0), _range(expected and expected[0]), "-" if slow is None else percent(slow, 0)]
    shown += [
        _range(expected and expected[1]),
        "-" if row.figures.perplexity is None else short_perplexity(row.figures.perplexity),
    ]
    if expected is None:
        return [*shown, "not in it" + (f": {layouts}" if layouts else "")], []
    missed, why = [], []
    if not _within(size, expected[0]):
        missed.append("bytes")
        why.append(_why_bytes(name, size, expected[0], row.figures, dense))
    if slow is not None and not _within(slow, expected[1]):
        missed.append("time")
        why.append(_why_time(name, slow, expected[1]))
    if (ratio := _over(row.figures, dense)) is not None and ratio > NEAR:
        missed.append("perplexity")
        why.append(
            f"perplexity: magnitude looks at no data; {name} has {ratio:.1f} times that of dense. wanda and sparsegpt lose less"
        )
    return [*shown, "yes" if not missed else f"not {', '.join(missed)}"], why


def _over(own: Variant, dense: Variant) -> float | None:
    if own.perplexity is None or dense.perplexity is None:
        return None
    return own.perplexity / dense.perplexity


def _why_bytes(name: str, size: float, expected: Range, own: Variant, dense: Variant) -> str:
    pruned = (own.parameters - own.nnz) / own.parameters
    if size > expected[1]:
        return (
            f"bytes of {name}: CSR stores a column index with every kept weight, and what is not pruned stays dense, embeddings "
            f"above all: {pruned:.0%} of all parameters are zero"
        )
    return f"bytes of {name}: fewer than expected: columns take 16 bits here, half of what 32-bit CSR has"


def _why_time(name: str, slow: float, expected: Range) -> str:
    if slow < expected[0]:
        return f"time of {name}: shorter than expected: a product reads fewer bytes, and sparsec's kernels keep up with the memory"
    return f"time of {name}: longer than expected: CSR costs more instructions a weight than a dense product does"


def _within(value: float, allowed: Range) -> bool:
    return allowed[0] <= round(value, 2) <= allowed[1]


def _range(allowed: Range | None) -> str:
    if allowed is None:
        return "-"
    low, high = (round(100 * each) for each in allowed)
    return "about 100%" if low < 100 < high else f"{low}-{high}%"
