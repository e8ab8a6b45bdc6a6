"""The benchmark measures what it says, writes what it prints, and refuses what it cannot read."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from sparsec.bench import HEADER, SCHEMA, Case, main, measure


def test_a_measurement_counts_bytes_copies_and_the_bound() -> None:
    result = measure(Case(64, 96, 0.5, "fp32", 1), repeats=3, rotate_bytes=100_000)
    assert result.dense.nbytes == 64 * 96 * 4
    assert result.dense.copies == -(-100_000 // result.dense.nbytes)
    assert result.sparse.copies == -(-100_000 // result.sparse.nbytes)
    assert result.bound == result.dense.nbytes / result.sparse.nbytes
    assert result.format == "csr16"
    assert result.torch_sparse is not None
    for timing in (result.dense, result.sparse, result.torch_sparse):
        assert 0 < timing.lower <= timing.median <= timing.upper


def test_the_command_writes_what_it_prints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = ["--json", str(tmp_path / "b.json"), "--csv", str(tmp_path / "b.csv")]
    arguments = [
        "--shapes",
        "8x8,16x8",
        "--sparsity",
        "0.5",
        "--dtypes",
        "fp32,bf16",
        "--repeats",
        "2",
        "--rotate-mb",
        "0",
    ]
    assert main([*arguments, *files]) == 0
    printed = capsys.readouterr().out
    assert "cache-warm" in printed
    written = json.loads((tmp_path / "b.json").read_text())
    assert written["schema"] == SCHEMA
    assert [r["case"]["out_features"] for r in written["results"]] == [8, 16, 8, 16]
    with (tmp_path / "b.csv").open() as file:
        rows = list(csv.reader(file))
    assert tuple(rows[0]) == HEADER
    assert len(rows) == 5
    assert all(cell in printed for row in rows for cell in row)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shapes", "8by8"], "--shapes takes OUTxIN"),
        (["--sparsity", "1.0"], "--sparsity must lie in [0, 1)"),
        (["--sparsity", "half"], "--sparsity takes numbers"),
        (["--dtypes", "fp8"], "--dtypes takes fp32, bf16, fp16, got 'fp8'"),
        (["--rows", "0"], "--rows be at least 1"),
        (["--repeats", "1"], "--repeats must be at least 2"),
    ],
)
def test_options_out_of_range_are_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    assert message in capsys.readouterr().err
