"""`python -m sparsec.bench --device cuda`: every kernel checked, the kernel table, decoding of whole models, in one call.

What is found is written after every stage, so that a run that is cut off leaves what it had.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from sparsec.bench import arguments
from sparsec.bench.cases import cases
from sparsec.bench.gpu import (
    CHECKED,
    CHECKED_ROWS,
    Checked,
    Deadline,
    Line,
    check,
    keep_tuned,
    predicted,
    table_all,
)
from sparsec.bench.gpu_models import PASSES, Decoded, decode
from sparsec.command import DTYPES as TYPES
from sparsec.cost import Calibration, calibrate
from sparsec.cost.calibration import save
from sparsec.cost.replay import read_seconds
from sparsec.errors import KernelError, SparsecError
from sparsec.kernels import gpu
from sparsec.latency import Spread
from sparsec.machine import Machine, gpu_clock, machine
from sparsec.progress import Progress

SCHEMA = "sparsec.bench.cuda/1"
SHAPES = "4096x4096,11008x4096,4096x11008,14336x4096"
FORMATS = "wcsr16,wcsr8,bitmap,bsr64x64,nm2:4"
DTYPES = "bf16,fp16"
ROWS = "1,4,16,64,512"
MODELS = ("pythia-410m", "llama-7b")
MODEL_SPARSITIES = (0.7, 0.9)
BUDGET, FOR_MODELS = 450, 0.4
"""Seconds that a run may take, and the share of them that is kept for whole models."""
FOR_COMPILING = 90
"""Seconds that have to be left where torch.compile is to begin."""
ROUNDS, MODEL_ROUNDS = 20, 10
NEAR = 0.15
"""A prediction within this share of what is measured is a good one."""


def run(options: argparse.Namespace, progress: Progress | None) -> None:
    """All of it. Raises KernelError where no kernel can run, and, at the end, where one computed something wrong."""
    reasons = gpu.missing()
    if reasons:
        raise KernelError(f"--device cuda: {'; '.join(reasons)}; without --device the CPU's kernels are measured")
    device = torch.device("cuda")
    folder: Path = options.out or Path("sparsec-bench-cuda")
    folder.mkdir(parents=True, exist_ok=True)
    budget = options.budget or BUDGET
    whole, table = Deadline(budget), Deadline(budget * (1 - FOR_MODELS))
    compiling = Deadline(budget - FOR_COMPILING)
    report = Report(folder, machine(), device)
    for dtype, rows in CHECKED_ROWS.items():
        report.checked += check(CHECKED, [dtype], rows, device)
        report.write()
    todo = cases(
        arguments.read_shapes(options.shapes or SHAPES),
        arguments.read_formats(options.formats or FORMATS),
        arguments.read_sparsities(options.sparsity),
        arguments.read_dtypes(options.dtypes or DTYPES),
        arguments.read_rows(options.rows or ROWS),
    )
    report.lines, report.left_out = table_all(todo, device, options.repeats or ROUNDS, table, progress)
    report.tuned = keep_tuned()
    report.write()
    if not whole.over:
        report.calibrate(options.dtypes or DTYPES, progress)
    for model in MODELS:
        if whole.over:
            report.left_out.append(f"no time was left for {model}; give more with --budget")
            continue
        try:
            report.models += decode(
                *(model, "bf16", MODEL_SPARSITIES, device, MODEL_ROUNDS, options.layers, compiling, progress),
                passes=PASSES.replace("lower(wcsr)", "lower(auto)") if report.calibration else PASSES,
            )
        except (RuntimeError, SparsecError) as error:
            report.left_out.append(f"{model}: {error}")
        report.write()
    print(report.markdown())
    print(f"written to {folder}")
    wrong = report.wrong()
    if wrong:
        raise KernelError(
            f"{len(wrong)} products are wrong on this GPU: {', '.join(f'{c.layout} {c.dtype}' for c in wrong[:5])}"
        )


class Report:
    """What was found so far, as JSON and as Markdown in one folder."""

    def __init__(self, folder: Path, found: Machine, device: torch.device) -> None:
        self._folder, self._machine, self._device = folder, found, device
        reading = 1 << 30 if device.type == "cuda" else 1 << 20
        self.bandwidth = reading / read_seconds(device, reading)
        self.checked: list[Checked] = []
        self.lines: list[Line] = []
        self.models: list[Decoded] = []
        self.left_out: list[str] = []
        self.tuned = ""
        self.calibration: Calibration | None = None

    def calibrate(self, dtypes: str, progress: Progress | None) -> None:
        """Measures the cost model's constants anew, with the configurations that are the fastest, and holds it to the table.

        They are kept for `lower(auto)`, and written to cost.json. What fails is said, and nothing else depends on it.
        """
        wanted = [TYPES[name] for name in dtypes.split(",")]
        try:
            found = calibrate(wanted, device=self._device.type, force=True, progress=progress)
        except (RuntimeError, SparsecError) as error:
            self.left_out.append(f"the cost model: {str(error).partition(chr(10))[0]}")
            return
        assert found is not None
        self.calibration = found.calibration
        self.left_out += found.notices
        self.lines = predicted(self.lines, found.calibration)
        save(found.calibration, self._folder / "cost.json")
        self.write()

    def wrong(self) -> list[Checked]:
        """Products beyond what rounding allows."""
        return [c for c in self.checked if c.error > 1]

    def write(self) -> None:
        """bench.json and bench.md, anew."""
        content = {
            "schema": SCHEMA,
            "machine": asdict(self._machine),
            "gpu": _gpu(self._device),
            "read_bytes_per_second": self.bandwidth,
            "checked": [asdict(c) for c in self.checked],
            "table": [_record(line) for line in self.lines],
            "models": [asdict(m) for m in self.models],
            "left_out": self.left_out,
            "tuned": self.tuned,
        }
        (self._folder / "bench.json").write_text(
            json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8"
        )
        (self._folder / "bench.md").write_text(self.markdown() + "\n", encoding="utf-8")

    def markdown(self) -> str:
        """All tables."""
        facts = _gpu(self._device)
        lines = [
            f"# sparsec on {facts['name']}",
            "",
            f"torch {self._machine.versions['torch']}, triton {facts['triton']}, commit "
            f"{self._machine.commit or 'unknown'}; clocks before: {facts['clocks']}. "
            f"Plain reading: {self.bandwidth / 1e9:.0f} GB/s. Times by replayed CUDA graphs and events, weights cold in "
            "L2; speedups over F.linear (cuBLAS), by round.",
            "",
            f"Checked against float64: {len(self.checked)} products, {len(self.wrong())} wrong, the largest error "
            f"{max((c.error for c in self.checked), default=0):.2f} of what rounding allows.",
        ]
        lines += [f"- WRONG: {c.layout} {c.dtype}, {c.rows} rows: {c.error:.3g}" for c in self.wrong()]
        if self.lines:
            lines += ["", *_table(_HEADER, [_cells(line, self.bandwidth) for line in self.lines])]
        off = [abs(p.predicted / p.sparse.median - 1) for p in self.lines if p.predicted is not None]
        if off:
            near = sum(o <= NEAR for o in off) / len(off)
            lines += ["", f"The cost model is within {NEAR:.0%} of {near:.0%} of {len(off)} times that it predicts."]
        if self.models:
            header = ("model", "layers", "type", "weights", "mode", "ms/token", "speedup", "quartiles", "GB", "note")
            lines += ["", *_table(header, [_model_cells(m) for m in self.models])]
        lines += ["", *(f"- left out: {said}" for said in dict.fromkeys(self.left_out))]
        return "\n".join(lines)


_HEADER = (
    *(
        "shape",
        "mask",
        "zero",
        "type",
        "rows",
        "format",
        "kernel",
        "F.linear us",
        "us",
        "speedup",
        "quartiles",
        "bytes",
    ),
    *("GB/s", "of read", "predicted us", "config"),
)


def _cells(line: Line, bandwidth: float) -> Sequence[str]:
    case, faster = line.case, line.speedup
    dense = case.out_features * case.in_features * TYPES[case.dtype].itemsize
    return (
        f"{case.out_features}x{case.in_features}",
        str(case.pattern),
        f"{case.sparsity:.0%}",
        case.dtype,
        str(case.rows),
        line.layout,
        line.kernel,
        f"{1e6 * line.dense.median:.1f}",
        f"{1e6 * line.sparse.median:.1f}",
        f"{faster.median:.2f}x",
        f"{faster.lower:.2f}-{faster.upper:.2f}",
        f"{dense / line.nbytes:.2f}x",
        f"{line.bytes_per_second / 1e9:.0f}",
        f"{line.bytes_per_second / bandwidth:.0%}",
        "-" if line.predicted is None else f"{1e6 * line.predicted:.1f}",
        str(line.config),
    )


def _model_cells(m: Decoded) -> Sequence[str]:
    return (
        m.model,
        str(m.layers),
        m.dtype,
        m.variant,
        m.mode,
        *("-" * 3 if m.seconds is None or m.speedup is None else _times(m.seconds, m.speedup)),
        f"{m.nbytes / 1e9:.2f}",
        m.note,
    )


def _times(seconds: Spread, speedup: Spread) -> Sequence[str]:
    return f"{1e3 * seconds.median:.3f}", f"{speedup.median:.2f}x", f"{speedup.lower:.2f}-{speedup.upper:.2f}"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows)]


def _record(line: Line) -> dict[str, Any]:
    case = asdict(replace(line.case, formats=()))
    case["pattern"] = str(line.case.pattern)
    del case["formats"]
    return {**case, **{name: value for name, value in asdict(line).items() if name != "case"}}


def _gpu(device: torch.device) -> dict[str, Any]:
    from importlib.metadata import version

    if device.type != "cuda":
        return {"name": "Triton's interpreter", "triton": version("triton"), "clocks": "none"}
    properties = torch.cuda.get_device_properties(device)
    return {
        "name": properties.name,
        "triton": version("triton"),
        "clocks": gpu_clock(),
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "l2_bytes": properties.L2_cache_size,
        "memory_bytes": properties.total_memory,
    }
