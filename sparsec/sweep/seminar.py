"""The study of the first seminar: dense, masked and CSR by zeros, beside the table that it expected, and the best layout."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from sparsec.console.table import fitted, heading, paragraph, percent
from sparsec.report.variant import Variant, short_perplexity
from sparsec.sweep.grid import Cell, grid_cells
from sparsec.sweep.planners import Results
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


def seminar_cells() -> list[Cell]:
    """In the order of the table."""
    return grid_cells(list(SETUPS.values()), {"zeros": ZEROS})


@dataclass(frozen=True)
class SetupFound:
    """One setup beside what was expected of it. Shares of dense; ranges are None where the seminar's table has no such row."""

    setup: str
    zeros: float
    cell: str
    bytes: float
    time: float | None  # of a decoded token
    expected_bytes: Range | None
    expected_time: Range | None
    missed: tuple[str, ...]  # of bytes, time, perplexity
    reasons: tuple[str, ...]

    @property
    def name(self) -> str:
        """As its row has it."""
        return f"{self.setup} {self.zeros:.0%}"


@dataclass(frozen=True)
class BesideExpected:
    """Every setup that was measured."""

    setups: tuple[SetupFound, ...]

    def lines(self, results: Results, width: int) -> list[str]:
        """Each setup of the seminar, what it expected, what came out, met or not, and the reason where it was not."""
        header = ["setup", "bytes", "expected", "time a token", "expected", "perplexity", "met"]
        rows = [_row(setup, results[setup.cell]) for setup in self.setups]
        lines = heading("Beside what the seminar expected, in shares of dense", width)
        lines += fitted(header, rows, width, left=(0, 6))
        for reason in dict.fromkeys(reason for setup in self.setups for reason in setup.reasons):
            lines += paragraph(reason, "- ", width=width)
        return lines


def beside_expected(results: Results) -> BesideExpected | None:
    """None without a dense reference."""
    dense = results[DENSE].figures if DENSE in results else None
    if dense is None:
        return None
    found = []
    for zeros in ZEROS:
        for setup, template in SETUPS.items():
            (cell,) = grid_cells([template], {"zeros": [zeros]})
            own = results[cell.spec].figures if cell.spec in results else None
            if own is not None:
                found.append(_found(setup, zeros, cell.spec, own, dense))
    return BesideExpected(tuple(found))


def _found(setup: str, zeros: str, cell: str, own: Variant, dense: Variant) -> SetupFound:
    size = own.bytes / dense.bytes
    slow = None if own.speedup_decode is None else 1 / own.speedup_decode.median
    sizes, times = EXPECTED.get((setup, zeros), (None, None))
    found = SetupFound(setup, float(zeros), cell, size, slow, sizes, times, (), ())
    missed: dict[str, str] = {}
    if sizes is not None and not _within(size, sizes):
        missed["bytes"] = _why_bytes(found.name, size, sizes, own, dense)
    if slow is not None and times is not None and not _within(slow, times):
        missed["time"] = _why_time(found.name, slow, times)
    if sizes is not None and (ratio := _over(own, dense)) is not None and ratio > NEAR:
        missed["perplexity"] = (
            f"perplexity: magnitude looks at no data; {found.name} has {ratio:.1f} times that of dense. wanda and admm lose "
            "less"
        )
    return replace(found, missed=tuple(missed), reasons=tuple(missed.values()))


def _row(found: SetupFound, result: CellResult) -> list[str]:
    assert result.figures is not None
    perplexity = result.figures.perplexity
    met = "yes" if not found.missed else f"not {', '.join(found.missed)}"
    if found.expected_bytes is None:
        met = "not in it" + (f": {result.layouts}" if result.layouts else "")
    return [
        found.name,
        percent(found.bytes, 0),
        _range(found.expected_bytes),
        "-" if found.time is None else percent(found.time, 0),
        _range(found.expected_time),
        "-" if perplexity is None else short_perplexity(perplexity),
        met,
    ]


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
