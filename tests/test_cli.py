"""The command lines, run in this process on the tiny model."""

from __future__ import annotations

import csv
import importlib.util
import io
import json
from pathlib import Path

import pytest

import sparsec.__main__ as overview
import sparsec.report.__main__ as command
from sparsec.kernels import KERNELS
from sparsec.passes import PASSES
from sparsec.report import schema
from sparsec.report.progress import shown_progress

QUICK = ["tiny", "--quick"]
COUNT = ["tiny", "--no-measure"]


def run(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    """Standard output of a run that must succeed and must not write to standard error, which is no terminal here."""
    assert command.main(args) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out


def refused(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    """The error of a run that must be refused: on standard error, with exit code 2 and no traceback."""
    assert command.main(args) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert "Traceback" not in captured.err
    return captured.err


def test_a_quick_report_has_every_section_and_file(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    json_file, csv_file = tmp_path / "report.json", tmp_path / "layers.csv"
    out = run(capsys, *QUICK, "--json", str(json_file), "--csv", str(csv_file), "--dump-ir", str(tmp_path / "ir"))
    for section in ("Machine", "Model", "Passes", "Layers", "Groups", "Summary", "Sample", "Notes"):
        assert f"== {section}" in out
    assert "quick: 5 repeats and 2 windows of 128 are too few to compare by" in out

    found = json.loads(json_file.read_text())
    assert schema.check(found) == []
    summary = found["summary"]
    assert list(summary) == ["dense", "masked", "lowered"]
    assert summary["dense"]["sparsity"] == 0
    assert summary["masked"]["nnz"] == summary["lowered"]["nnz"] < summary["dense"]["nnz"]
    assert summary["masked"]["bytes"] == summary["dense"]["bytes"] > summary["lowered"]["bytes"]
    assert summary["dense"]["top1"] == 1
    assert summary["lowered"]["perplexity"] == pytest.approx(summary["masked"]["perplexity"], rel=1e-4)
    assert all(v["decode_ms"] > 0 and v["prefill_ms"] > 0 for v in summary.values())
    lowered = [row for row in found["layers"] if row["format"] != "dense"]
    assert len(lowered) == 28
    assert all(row["speedup_measured"] > 0 for row in lowered)
    assert found["evaluation"] | {"text_sha256": "", "text_tokens": 0} == {
        "text": "pydoc_data.topics", "text_sha256": "", "text_tokens": 0,
        "windows": 2, "window_length": 128, "dtype": "float32",
    }  # fmt: skip

    rows = list(csv.DictReader(io.StringIO(csv_file.read_text())))
    assert [row["name"] for row in rows] == [row["name"] for row in found["layers"]]
    dumped = sorted(p.name for p in (tmp_path / "ir").iterdir())
    assert dumped == [
        "00-traced.txt",
        "01-magnitude.txt",
        "02-freeze.txt",
        "03-sparsity.txt",
        "04-flops.txt",
        "05-lower.txt",
    ]


def test_no_measure_counts_and_runs_nothing(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    out = run(capsys, *COUNT, "--json", str(file))
    found = json.loads(file.read_text())
    assert schema.check(found) == []
    assert {found["evaluation"], found["latency"], found["sample"]} == {None}
    assert {v["perplexity"] for v in found["summary"].values()} == {None}
    assert "perplexity" not in out
    assert "model bytes, MB" in out


def test_passes_without_lower_give_no_lowered_model_and_say_so(capsys: pytest.CaptureFixture[str]) -> None:
    out = run(capsys, *COUNT, "--passes", "magnitude(0.5),freeze")
    assert "the passes hold no `lower`, so there is no lowered model" in out
    assert "FLOPs are not counted: add the pass flops" in out


def test_the_ir_is_printed_around_every_pass(capsys: pytest.CaptureFixture[str]) -> None:
    out = run(capsys, *COUNT, "--passes", "magnitude(0.5),freeze,lower(csr)", "--print-ir", "changed")
    titles = [line for line in out.splitlines() if line.startswith("# changed by pass")]
    assert titles == [
        "# changed by pass 1: magnitude(0.5)",
        "# changed by pass 2: freeze",
        "# changed by pass 3: lower(csr)",
    ]
    assert "csr16[" in out


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["tiny", "--passes", "magnitud(0.5)"], "magnitude"),
        (["tiny", "--passes", "magnitude(1.5)"], "sparsity"),
        (["tiny", "--passes", "lower(csr)"], "needs 'frozen'"),
        (["tiny", "--no-measure", "--passes", "magnitude(0.5, targets=('nothing.*',)),freeze"], "nothing.*"),
        (["./no/such/model"], "./no/such/model: there is no such folder or file"),
        (["tiny", "--text", "no-such-file.txt"], "no-such-file.txt: the text must be a file, this does not exist"),
        (["tiny", "--eval-length", "5000"], "evaluation length 5000 is more than the model's 1024 positions"),
        (["tiny", "--eval-windows", "999999"], "windows of 512 need"),
        (["tiny", "--eval-windows", "1", "--prompt-tokens", "700"], "a prompt of 700 tokens is cut from the 512"),
        (["tiny", "--prompt-tokens", "1000"], "need 1043 positions, the model has 1024"),
        (["tiny", "--json", "no/such/folder/report.json"], "no/such/folder/report.json: cannot be written"),
    ],
)  # fmt: skip
def test_bad_input_is_one_clean_error(args: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert words in refused(capsys, *args)


@pytest.mark.parametrize(
    "args", [["--threads", "0"], ["--eval-windows", "-1"], ["--dtype", "int8"], ["--print-ir", "all"]]
)
def test_options_out_of_range_are_refused_by_name(args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        command.main(args)
    assert exit_.value.code == 2
    assert args[0] in capsys.readouterr().err


def test_help_shows_examples_that_can_be_parsed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        command.main(["--help"])
    assert exit_.value.code == 0
    out = capsys.readouterr().out
    lines = [line.split() for line in out.splitlines() if line.startswith("  python -m sparsec.report")]
    assert len(lines) == 5


def test_overview_names_every_pass_kernel_and_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert overview.main([]) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 120
    for cls in PASSES:
        assert f"{cls.name:<12}[{cls.effect.value}]" in out
    assert "sparsity (must be given), scope='global'" in out
    for kernel in KERNELS:
        state = "; ".join(kernel.available()) or "ready"
        assert " ".join(f"{kernel.name} {state}: format {kernel.format}".split()) in " ".join(out.split())
    for module in overview.COMMANDS:
        assert importlib.util.find_spec(module) is None or f"python -m {module} " in out


def test_version_is_the_installed_one(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        overview.main(["--version"])
    assert exit_.value.code == 0
    assert capsys.readouterr().out == "sparsec 0.1.0\n"


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def test_progress_is_drawn_on_a_terminal_and_nowhere_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    pipe, terminal = io.StringIO(), Terminal()
    with shown_progress(pipe) as nothing:
        assert nothing is None
    with shown_progress(terminal) as show:
        assert show is not None
        show("packing", 1, 2)
    assert "packing" in terminal.getvalue()
    assert pipe.getvalue() == ""
