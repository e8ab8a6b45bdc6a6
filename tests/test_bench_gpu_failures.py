"""Runs of the GPU's benchmark that fail on the way: what was found stays, and what failed is named."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
import torch

from sparsec.bench import gpu as bench
from sparsec.bench import gpu_run
from sparsec.cost.constants import Found
from sparsec.errors import KernelError
from sparsec.kernels import gpu
from sparsec.machine import machine

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def test_a_product_after_which_nothing_runs_ends_the_run_and_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Regression: a run that an illegal instruction ended left a traceback, and nothing of the stage that it was in."""

    def fails(*_: object) -> None:
        raise torch.AcceleratorError("CUDA error: an illegal instruction\nand more")

    def stages(options: argparse.Namespace, report: gpu_run.GpuReport, *_: object) -> None:
        report.checked.append(bench.Checked("bitmap", "bf16", 1, 0.1))
        bench.go_on("nm2:4 fp16, 65 rows", torch.AcceleratorError("CUDA error: an illegal instruction"), gpu_like)

    monkeypatch.setenv("SPARSEC_NATIVE", "0")  # as the run has it from then on
    gpu_like = torch.device("cuda")
    bench.go_on("a case", RuntimeError("one that harms nothing else"), DEVICE)
    monkeypatch.setattr(torch.cuda, "synchronize", fails)
    monkeypatch.setattr(gpu, "missing", list)
    monkeypatch.setattr(gpu_run, "_stages", stages)
    monkeypatch.setattr(gpu_run, "DEVICE", str(DEVICE))
    options = argparse.Namespace(formats=None, out=tmp_path)
    said = (
        "nm2:4 fp16, 65 rows: AcceleratorError: CUDA error: an illegal instruction; nothing runs on the GPU after that"
    )
    with pytest.raises(KernelError, match=rf"{said} in this process; what was found before is in"):
        gpu_run.run(options, None)
    content = json.loads((tmp_path / "bench.json").read_text())
    assert [c["layout"] for c in content["checked"]] == ["bitmap"]
    assert content["left_out"] == [f"{said} in this process"]


def test_a_cost_model_that_fails_costs_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(dtypes: list[torch.dtype], **options: object) -> Found:
        raise KernelError("no kernel serves it\nand more")

    monkeypatch.setattr(gpu_run, "machine_constants", fails)
    report = gpu_run.GpuReport(tmp_path, machine(), DEVICE)
    report.measure_constants("bf16", bench.Deadline(99), None)
    assert report.constants is None
    assert report.left_out == ["the cost model: KernelError: no kernel serves it"]
