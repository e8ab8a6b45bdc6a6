"""The kernel table as text, JSON (schema `sparsec.bench/4`) and CSV."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sparsec.bench.kernels import Result
from sparsec.console.table import fitted, paragraph, percent, terminal_width, times
from sparsec.machine import Machine
from sparsec.timing.calls import SLOW_REPEATS, SLOW_SECONDS, CallTimes
from sparsec.timing.spread import Spread

SCHEMA = "sparsec.bench/4"
HEADER = (
    "shape",
    "mask",
    "zero",
    "dtype",
    "rows",
    "format",
    "kernel",
    "F.linear ms",
    "sparse ms",
    "quartiles",
    "masked",
    "speedup",
    "quartiles",
    "zeros",
    "predicted",
    "bytes",
    "GB/s",
    "roof GB/s",
    "binds",
    "of roof",
    "torch.sparse",
)
NEAR = 0.15
NAMES = 6
"""Columns that say what a line is of, the first ones."""
TEXT_COLUMNS = (0, 1, 3, 5, 6, 18)
LEGEND = (
    "Times are medians per call; a speedup is the median over rounds of F.linear / this, in the same round. masked: F.linear of "
    "the weight with the zeros, which it does not skip. zeros: over sparsec's own dense kernel of values stored alike, "
    "so the part that zeros give. predicted: the speedup by the cost model, where weights lie in memory. bytes: dense / "
    "packed, what reading less can give at most. roof GB/s: plain reading (the best of a sum, the own dense kernel and F.linear) "
    "in the same rounds. binds, of roof: the highest of bytes / that bandwidth and the times of decoding and arithmetic "
    "by this machine's constants (bytes alone where none are measured), over the time taken. shape (n): the model has it n times. "
    "torch.sparse: its speedup over F.linear, n/a where it does not serve the type, * where a call takes over "
    f"{SLOW_SECONDS} s and ran {SLOW_REPEATS} times."
)


def about(found: Machine, protocol: str, constants: str) -> list[str]:
    """What the numbers depend on; lines."""
    facts = {
        "cpu": found.cpu,
        "threads": found.threads,
        "torch": found.versions["torch"],
        "native kernels": found.native,
        "commit": found.commit or "unknown",
        "weights": protocol,
        "cost model": constants,
    }
    return paragraph("; ".join(f"{k}: {v}" for k, v in facts.items()))


def doubts(found: Machine) -> list[str]:
    """What makes the times doubtful; lines."""
    if found.load is None or found.load <= found.cores:
        return []
    return paragraph(
        f"the machine was busy before the timing ({found.load:.1f} processes on {found.cores} cores): trust ratios more than "
        "times, and neither much; where products of any size take the same 8 ms, threads waited: run again, or --threads 1",
        "note: ",
    )


def accuracy(results: Sequence[Result]) -> list[str]:
    """How far the cost model is from what was measured; lines."""
    errors = [abs(r.predicted / r.speedup.median - 1) for r in results if r.predicted is not None]
    if not errors:
        return []
    near = sum(error <= NEAR for error in errors)
    return paragraph(f"predicted within {NEAR:.0%} of measured: {near} of {len(errors)} lines")


def text(results: Sequence[Result]) -> list[str]:
    """Lines of the table, none wider than the terminal; a mask, sparsity, type or number of rows that all share stands above it."""
    rows = [cells(r) for r in results]
    shared = [i for i in range(1, NAMES - 1) if len({row[i] for row in rows}) == 1]
    shown = [i for i in range(len(HEADER)) if i not in shared]
    above = ", ".join(f"{HEADER[i]} {rows[0][i]}" for i in shared)
    return [
        *(paragraph(f"all lines: {above}") if above else []),
        *fitted(
            [HEADER[i] for i in shown],
            [[row[i] for i in shown] for row in rows],
            terminal_width(),
            left=[at for at, i in enumerate(shown) if i in TEXT_COLUMNS],
            keys=NAMES - len(shared),
        ),
    ]


def cells(result: Result) -> tuple[str, ...]:
    """Of one line, as in HEADER."""
    case, sparse, faster, other = result.case, result.sparse.seconds, result.speedup, result.torch_sparse_speedup
    auto = "auto: " if result.asked == "auto" else ""
    slow = "*" if result.torch_sparse is not None and result.torch_sparse.slow else ""
    return (
        f"{case.out_features}x{case.in_features}" + (f" ({case.count})" if case.count else ""),
        str(case.pattern),
        f"{case.sparsity:.0%}",
        case.dtype,
        str(case.rows),
        f"{auto}{result.format}",
        result.kernel,
        f"{result.dense.seconds.median * 1e3:.3f}",
        f"{sparse.median * 1e3:.3f}",
        f"{sparse.lower * 1e3:.3f}-{sparse.upper * 1e3:.3f}",
        times(result.masked_speedup.median),
        times(faster.median),
        f"{faster.lower:.2f}-{faster.upper:.2f}",
        "-" if (zeros := result.zeros_speedup) is None else times(zeros.median),
        "-" if result.predicted is None else times(result.predicted),
        times(result.speedup_bytes),
        f"{result.sparse.bytes_per_second / 1e9:.1f}",
        f"{result.bandwidth / 1e9:.1f}",
        result.bound.roof,
        percent(result.share, 0),
        "n/a" if other is None else times(other.median) + slow,
    )


def record(result: Result) -> dict[str, Any]:
    """One line as plain values, in seconds and bytes; the same names in JSON and CSV."""
    case, other = result.case, result.torch_sparse
    return {
        "out_features": case.out_features,
        "in_features": case.in_features,
        "count": case.count,
        "mask": str(case.pattern),
        "sparsity": case.sparsity,
        "dtype": case.dtype,
        "rows": case.rows,
        "asked": result.asked,
        "format": result.format,
        "kernel": result.kernel,
        **_timing("dense", result.dense),
        **_timing("masked", result.masked),
        "dense_on_sparsec_seconds": None if (d := result.dense_on_sparsec) is None else d.seconds.median,
        **_timing("sparse", result.sparse),
        **_spread("speedup", result.speedup),
        "masked_speedup": result.masked_speedup.median,
        "zeros_speedup": None if (z := result.zeros_speedup) is None else z.median,
        "speedup_predicted": result.predicted,
        "speedup_bytes": result.speedup_bytes,
        "bytes_per_second": result.sparse.bytes_per_second,
        "read_bytes_per_second": result.bandwidth,
        "binds": result.bound.roof,
        "roof_seconds": result.bound.seconds,
        "roof_share": result.share,
        "torch_sparse_seconds": None if other is None else other.seconds.median,
        "torch_sparse_repeats": None if other is None else other.seconds.repeats,
        "torch_sparse_speedup": None if (s := result.torch_sparse_speedup) is None else s.median,
    }


def document(results: Sequence[Result], found: Machine, protocol: dict[str, Any], left_out: Sequence[str]) -> str:
    """JSON: `machine`, `protocol` (rotate_bytes, layers), `results` and `left_out`."""
    content = {"schema": SCHEMA, "machine": asdict(found), "protocol": protocol, "results": [*map(record, results)]}
    return json.dumps({**content, "left_out": list(left_out)}, indent=1, allow_nan=False) + "\n"


def write_csv(path: Path, records: Sequence[dict[str, Any]]) -> None:
    """One line per record; a header even where there is none."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(records[0]) if records else [], restval="")
        writer.writeheader()
        writer.writerows(records)


def _timing(name: str, timing: CallTimes) -> dict[str, Any]:
    return {
        f"{name}_bytes": timing.nbytes,
        f"{name}_copies": timing.copies,
        **_spread(f"{name}_seconds", timing.seconds),
    }


def _spread(name: str, spread: Spread) -> dict[str, Any]:
    return {
        name: spread.median,
        f"{name}_lower": spread.lower,
        f"{name}_upper": spread.upper,
        f"{name}_repeats": spread.repeats,
    }
