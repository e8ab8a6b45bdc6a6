"""`python -m sparsec.bench --device cuda`: every kernel checked, the kernel table, decoding of whole models, in one call.

What is found is written after every stage, so that a run that is cut off leaves what it had.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from sparsec.bench import arguments
from sparsec.bench.cases import Asked, cases, pattern_of
from sparsec.bench.gpu import (
    CHECKED_ROWS,
    LONG_ROWS,
    SPLIT,
    Checked,
    Deadline,
    DeviceLostError,
    GpuMeasured,
    Line,
    check_kernels,
    keep_tuned,
    predicted,
    said,
    table_all,
)
from sparsec.bench.gpu_models import PASSES, Decoded, headlines, time_decoding
from sparsec.console.command import DTYPES as TYPES
from sparsec.cost import Constants, machine_constants
from sparsec.cost.constants import save_file
from sparsec.errors import CacheError, KernelError, SpecError
from sparsec.formats.layout import Layout
from sparsec.kernels import gpu
from sparsec.kernels.gpu import launch as gpu_launch
from sparsec.machine import Machine, gpu_clock, machine
from sparsec.progress import Progress
from sparsec.timing.replay import read_seconds

DEVICE = "cuda"
SCHEMA = "sparsec.bench.cuda/1"
SHAPES = "4096x4096,11008x4096,4096x11008,14336x4096"
FORMATS = "wcsr16,wcsr8,bitmap,bsr64x64,nm2:4"
DTYPES = "bf16,fp16"
ROWS = "1,4,16,64,512"
MODELS = ("pythia-410m", "llama-7b")
MODEL_SPARSITIES = (0.7, 0.9)
BUDGET, FOR_TABLE, FOR_CONSTANTS = 450, 0.55, 0.7
"""Seconds that a run may take, and after which share of them the table and the constants begin nothing more."""
FOR_COMPILING = 60
"""Seconds that have to be left where torch.compile is to begin on a model."""
WRITE_EVERY = 10
"""Cases of the table."""
ROUNDS, MODEL_ROUNDS = 20, 10
NEAR = 0.15
"""A prediction within this share of what is measured is a good one."""


def run(options: argparse.Namespace, progress: Progress | None) -> None:
    """All of it. Raises KernelError where no kernel can run, and, at the end, where one computed something wrong."""
    reasons = gpu.missing()
    if reasons:
        raise KernelError(f"--device cuda: {'; '.join(reasons)}; without --device the CPU's kernels are measured")
    formats = arguments.read_formats(options.formats or FORMATS)
    if unfit := [str(f) for f in formats if pattern_of(f) is None]:
        raise SpecError(
            f"--formats: with --device cuda leave out {', '.join(unfit)}: F.linear stands in every line, and lower(auto) chooses "
            f"for the whole models; the default is {FORMATS}"
        )
    # Nothing of the CPU is measured here, and its library takes half a minute to build.
    os.environ.setdefault("SPARSEC_NATIVE", "0")
    device = torch.device(DEVICE)
    folder: Path = options.out or Path("sparsec-bench-cuda")
    folder.mkdir(parents=True, exist_ok=True)
    gpu.take_tuned()  # so that nothing takes it later on: here all is tuned anew
    gpu_launch.prefer({})
    report = GpuReport(folder, machine(), device)
    try:
        _stages(options, report, formats, progress)
    except DeviceLostError as error:
        report.left_out.append(str(error))
        raise KernelError(f"{error}; what was found before is in {folder}") from error
    finally:
        report.write()
    print(report.markdown())
    print(f"written to {folder}")
    wrong = report.wrong()
    if wrong:
        raise KernelError(
            f"{len(wrong)} products are wrong on this GPU: {', '.join(f'{c.layout} {c.dtype}' for c in wrong[:5])}"
        )


def _stages(
    options: argparse.Namespace, report: GpuReport, formats: Sequence[Asked], progress: Progress | None
) -> None:
    """Checks, table, constants, models. Raises DeviceLostError where a stage leaves the GPU unusable."""
    device = report.device
    budget = options.budget or BUDGET
    whole, table, measuring = (Deadline(budget * share) for share in (1, FOR_TABLE, FOR_CONSTANTS))
    compiling = Deadline(budget - FOR_COMPILING)
    for dtype, rows in CHECKED_ROWS.items():
        if table.over:
            report.left_out.append(f"no time was left to check {dtype}; give more with --budget")
            continue
        for product in chain(
            check_kernels(Layout.checked(), [dtype], rows, device),
            check_kernels(SPLIT, [dtype], (1,), device, LONG_ROWS),
        ):
            report.checked.append(product)
        report.write()
    todo = cases(
        arguments.read_shapes(options.shapes or SHAPES),
        formats,
        arguments.read_sparsities(options.sparsity),
        arguments.read_dtypes(options.dtypes or DTYPES),
        arguments.read_rows(options.rows or ROWS),
    )
    for i, found in enumerate(table_all(todo, device, options.repeats or ROUNDS, table, progress)):
        report.add(found)
        if i % WRITE_EVERY == 0:
            report.write()
    try:
        report.tuned = keep_tuned()
    except (CacheError, OSError) as error:
        report.left_out.append(f"the fastest configurations could not be kept: {error}")
    report.write()
    first = (options.dtypes or DTYPES).partition(",")[0]
    report.measure_constants(first, measuring, progress)
    for model in MODELS:
        if whole.over:
            report.left_out.append(f"no time was left for {model}; give more with --budget")
            continue
        try:
            report.models += time_decoding(
                *(model, first, MODEL_SPARSITIES, device, MODEL_ROUNDS, options.layers, whole, compiling, progress),
                passes=PASSES.replace("lower(wcsr)", "lower(auto)") if report.constants else PASSES,
            )
        except Exception as error:  # of triton, of the driver, of torch
            report.left_out.append(f"{model}: {said(error)}")
        gc.collect()  # what recorded a graph of it still names the model
        report.write()


class GpuReport:
    """What was found so far, as JSON and as Markdown in one folder."""

    def __init__(self, folder: Path, found: Machine, device: torch.device) -> None:
        self.device = device
        self._folder, self._machine = folder, found
        reading = 1 << 30 if device.type == "cuda" else 1 << 20
        self.bandwidth = reading / read_seconds(device, reading)
        self.checked: list[Checked] = []
        self.lines: list[Line] = []
        self.models: list[Decoded] = []
        self.left_out: list[str] = []
        self.tuned = ""
        self.constants: Constants | None = None
        self._clocks = gpu_clock() if device.type == "cuda" else "none"

    def add(self, found: GpuMeasured) -> None:
        """Takes in what a case gave."""
        self.lines += found.lines
        self.checked += found.checked
        self.left_out += found.left_out

    def measure_constants(self, dtype: str, deadline: Deadline, progress: Progress | None) -> None:
        """Measures the cost model's constants of a dtype anew, with the configurations that are the fastest, and holds it to the
        table.

        They are kept for `lower(auto)`, and written to cost.json. What fails, or takes longer than there is time, is said, and
        nothing else depends on it.
        """

        def watched(what: str, done: int, total: int) -> None:
            if deadline.over:
                raise TimeoutError("no time was left for it; give more with --budget")
            if progress is not None:
                progress(what, done, total)

        try:
            found = machine_constants([TYPES[dtype]], device=self.device.type, force=True, progress=watched)
            assert found is not None
            save_file(found.constants, self._folder / "cost.json")
        except Exception as error:  # of triton, of the driver, of torch
            self.left_out.append(f"the cost model: {said(error)}")
            return
        self.constants = found.constants
        self.left_out += found.notices
        self.lines = predicted(self.lines, found.constants)
        self.write()

    def wrong(self) -> list[Checked]:
        """Products beyond what rounding allows."""
        return [c for c in self.checked if c.wrong]

    def write(self) -> None:
        """bench.json and bench.md, anew."""
        content = {
            "schema": SCHEMA,
            "machine": asdict(self._machine),
            "gpu": _gpu(self.device, self._clocks),
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
        facts = _gpu(self.device, self._clocks)
        lines = [
            f"# sparsec on {facts['name']}",
            "",
            f"torch {self._machine.versions['torch']}, triton {facts['triton']}, commit "
            f"{self._machine.commit or 'unknown'}; clocks before: {facts['clocks']}. "
            f"Plain reading: {self.bandwidth / 1e9:.0f} GB/s. Times by replayed CUDA graphs and events, weights cold in "
            "L2; speedups over F.linear (cuBLAS), by round.",
            "",
            f"Checked against float64: {len(self.checked)} products, {len(self.wrong())} wrong, the largest error "
            f"{max((c.error for c in self.checked if c.error is not None), default=0):.2f} of what rounding allows.",
        ]
        for c in self.wrong():
            how = c.note or ("NaN or infinite" if c.error is None else f"{c.error:.3g} of what rounding allows")
            lines.append(f"- WRONG: {c.layout} {c.dtype}, {c.rows} rows: {how}")
        if self.lines:
            lines += ["", *_table(_HEADER, [_cells(line, self.bandwidth) for line in self.lines])]
        off = [abs(p.predicted / p.sparse.median - 1) for p in self.lines if p.predicted is not None]
        if off:
            near = sum(o <= NEAR for o in off) / len(off)
            lines += ["", f"The cost model is within {NEAR:.0%} of {near:.0%} of {len(off)} times that it predicts."]
        if self.models:
            header = ("model", "layers", "type", "weights", "mode", "ms/token", "speedup", "quartiles", "GB", "note")
            lines += ["", *_table(header, [_model_cells(m) for m in self.models]), "", *headlines(self.models)]
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
        "-" if m.seconds is None else f"{1e3 * m.seconds.median:.3f}",
        *("--" if m.speedup is None else (f"{m.speedup.median:.2f}x", f"{m.speedup.lower:.2f}-{m.speedup.upper:.2f}")),
        f"{m.nbytes / 1e9:.2f}",
        m.note,
    )


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows)]


def _record(line: Line) -> dict[str, Any]:
    case = asdict(replace(line.case, formats=()))
    case["pattern"] = str(line.case.pattern)
    del case["formats"]
    return {**case, **{name: value for name, value in asdict(line).items() if name != "case"}}


def _gpu(device: torch.device, clocks: str) -> dict[str, Any]:
    """clocks: before anything was measured."""
    if device.type != "cuda":
        return {"name": "Triton's interpreter", "triton": gpu.triton_version(), "clocks": clocks}
    properties = torch.cuda.get_device_properties(device)
    return {
        "name": properties.name,
        "triton": gpu.triton_version(),
        "clocks": clocks,
        "clocks_after": gpu_clock(),
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "l2_bytes": properties.L2_cache_size,
        "memory_bytes": properties.total_memory,
    }
