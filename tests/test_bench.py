"""The benchmark measures what it says, writes what it prints, and refuses what it cannot read."""

from __future__ import annotations

import csv
import itertools
import json
from pathlib import Path

import pytest
import torch

from sparsec.bench import HEADER, SCHEMA, Case, main, measure
from sparsec.rotation import Rotation


def test_a_measurement_counts_bytes_copies_and_the_bound() -> None:
    result = measure(Case(64, 96, 0.5, "fp32", 1), Rotation(100_000), repeats=3)
    assert result.dense.nbytes == 64 * 96 * 4
    assert result.dense.copies == -(-100_000 // result.dense.nbytes)
    assert result.sparse.copies == -(-100_000 // result.sparse.nbytes)
    assert result.bound == result.dense.nbytes / result.sparse.nbytes
    assert result.format == "csr16"
    assert result.torch_sparse is not None
    for timing in (result.dense, result.sparse, result.torch_sparse):
        assert 0 < timing.seconds.lower <= timing.seconds.median <= timing.seconds.upper
        assert timing.seconds.repeats == 3


def test_copies_are_equal_lie_apart_and_use_the_memory_again() -> None:
    rotation = Rotation(1000)
    tensors = [torch.randn(3, 5), torch.arange(7, dtype=torch.int16)]
    twins = rotation.copies("a", tensors)
    assert len(twins) == -(-1000 // (60 + 14))
    assert all(torch.equal(a, b) for pair in twins for a, b in zip(pair, tensors, strict=True))
    places = sorted((t.data_ptr(), t.data_ptr() + t.nbytes) for pair in twins for t in pair)
    assert all(begin % 64 == 0 for begin, _ in places)
    assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(places))
    other = rotation.copies("b", [torch.ones(4)])
    assert all(torch.equal(a, b) for pair in twins for a, b in zip(pair, tensors, strict=True))
    again = rotation.copies("a", [torch.ones(4)])
    assert again[0][0].data_ptr() == twins[0][0].data_ptr() != other[0][0].data_ptr()
    assert len(Rotation(0).copies("a", tensors)) == 1


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
    assert written["rotate_bytes"] == 0
    assert written["machine"]["commit"] in (None, *printed.split())
    assert {"cpu", "threads", "native", "versions"} <= set(written["machine"])
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
