"""The command lines, run in this process on the tiny model."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import re
import shlex
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import sparsec.__main__ as overview
import sparsec.report.__main__ as command
from sparsec.console.commands import COMMANDS
from sparsec.defaults import QUICK, Effort
from sparsec.kernels import KERNELS
from sparsec.kernels.library import loader
from sparsec.passes import PASSES
from sparsec.pipeline import Pipeline
from sparsec.report import schema

TEXT = "Every layer says why it is dense. " * 8
COUNT = ["tiny", "--no-measure"]


@dataclass(frozen=True)
class Done:
    """A run that succeeded: what it printed, the folder with its files, and its JSON."""

    out: str
    folder: Path
    document: dict[str, Any]


def run(folder: Path, *args: str) -> Done:
    """Runs a command that must succeed; standard error, which is no terminal here, has lines of its stages and nothing else."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        assert command.main([*args, "--json", str(folder / "report.json")]) == 0, err.getvalue()
    said = err.getvalue()
    line_of_a_stage = r" *([^\n]+ \.\.\.( .*\d+\.\d s)?|\d+\.\d s in all)"
    assert all(re.fullmatch(line_of_a_stage, line) for line in said.splitlines()), said
    assert "tracing ... " in said
    assert "pass 1 magnitude(0.5) ... " in said
    return Done(out.getvalue(), folder, json.loads((folder / "report.json").read_text()))


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Done]:
    """The one run that measures, with every option that says how away from its default."""
    folder, threads = tmp_path_factory.mktemp("measured"), torch.get_num_threads()
    (folder / "text.txt").write_text(TEXT)
    how = "--dtype bf16 --threads 1 --seed 3 --new-tokens 4 --prompt-tokens 8 --eval-windows 1 --eval-length 64"
    words = ["--text", str(folder / "text.txt"), "--prompt", "Why is it dense?"]
    how += " --beside magnitude(0.9)"
    files = ["--csv", str(folder / "layers.csv"), "--dump-ir", str(folder / "new" / "ir")]
    try:
        yield run(folder, "tiny", "--quick", *how.split(), *words, *files)
    finally:
        torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def counted(tmp_path_factory: pytest.TempPathFactory) -> Done:
    """A run that measures nothing, and prints the IR."""
    return run(tmp_path_factory.mktemp("counted"), *COUNT, "--print-ir", "changed")


def refused(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    """The error of a run that must be refused: on standard error, with exit code 2 and no traceback."""
    assert command.main(args) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "\nerror: " in f"\n{captured.err}"  # after lines of the stages that went well
    assert "Traceback" not in captured.err
    return captured.err


def test_a_report_has_every_section(measured: Done) -> None:
    for section in ("Summary", "Passes", "Layers", "Groups", "Compared", "Notes", "Model", "Machine"):
        assert f"== {section}" in measured.out
    assert measured.out.startswith("== Summary ")
    assert "== Sample" not in measured.out, "what a random model writes says nothing"
    assert "a toy this small cannot show a gain" in measured.out
    assert "quick: 5 repeats and 1 windows of 64 are too few to compare by" in measured.out


def test_the_summary_compares_dense_masked_and_lowered(measured: Done) -> None:
    assert schema.check_report(measured.document) == []
    assert list(measured.document["beside"]) == ["magnitude(0.9)"]
    assert measured.document["beside"]["magnitude(0.9)"] > 1
    assert "by magnitude(0.9)" in measured.out
    summary = measured.document["summary"]
    assert list(summary) == ["dense", "masked", "dense_on_sparsec", "lowered"]
    assert summary["dense"]["sparsity"] == 0
    assert summary["masked"]["nnz"] == summary["lowered"]["nnz"] < summary["dense"]["nnz"]
    assert summary["masked"]["bytes"] == summary["dense"]["bytes"]
    assert summary["dense"]["top1"] == 1
    assert summary["lowered"]["perplexity"] == summary["masked"]["perplexity"] > 0  # measured once for what was pruned
    assert summary["dense_on_sparsec"]["perplexity"] == summary["dense"]["perplexity"]
    assert summary["dense_on_sparsec"]["bytes"] == summary["dense"]["bytes"]
    assert [name for name, v in summary.items() if v["zeros_speedup_decode"] is not None] == ["lowered"]
    assert all(v["decode_ms"] > 0 and v["prefill_ms"] > 0 for v in summary.values())
    pruned = [row for row in measured.document["layers"] if row["nnz"] < row["parameters"]]
    assert len(pruned) == 14
    lowered = [row for row in pruned if row["format"] != "dense"]
    assert lowered
    assert all(row["speedup_measured"] > 0 for row in lowered)
    assert all("dense" in row["reason"] or row["format"] != "dense" for row in pruned)


def test_every_option_of_measuring_is_obeyed(measured: Done) -> None:
    found = measured.document
    text = str(measured.folder / "text.txt")
    assert found["model"] | {"architecture": ""} == {
        "name": "tiny", "architecture": "", "source": "random weights, seed 3",
        "source_precision": "random float32, never trained", "dtype": "bfloat16", "encoder": False,
    }  # fmt: skip
    assert found["machine"]["threads"] == 1
    assert found["evaluation"] == {
        "text": text, "text_sha256": hashlib.sha256(TEXT.encode()).hexdigest(), "text_tokens": len(TEXT),
        "windows": 1, "window_length": 64, "dtype": "bfloat16", "bos": None,
        "protocol": "the tokenizer adds no BOS",
    }  # fmt: skip
    how = {"prompt_tokens": 8, "threads": 1, "prefill_repeats": 5, "decode_repeats": 5}
    assert found["latency"] == found["latency"] | how
    sample = found["sample"]
    assert (sample["prompt"], sample["chat"], sample["new_tokens"]) == ("Why is it dense?", False, 4)
    assert list(sample["texts"]) == ["dense", "magnitude(0.9)", "lowered"]
    assert all(len(said) <= 4 for said in sample["texts"].values())  # a token is a byte
    for words in ("random weights, seed 3", "bfloat16", "1 windows of 64"):
        assert words in measured.out


def test_files_asked_for_are_written_and_named(measured: Done) -> None:
    rows = list(csv.DictReader(io.StringIO((measured.folder / "layers.csv").read_text())))
    assert [row["name"] for row in rows] == [row["name"] for row in measured.document["layers"]]
    dumped = sorted(p.name for p in (measured.folder / "new" / "ir").iterdir())
    assert dumped == [
        "00-traced.txt",
        "01-magnitude.txt",
        "02-freeze.txt",
        "03-sparsity.txt",
        "04-flops.txt",
        "05-fuse.txt",
        "06-lower.txt",
    ]
    json_file, csv_file = measured.folder / "report.json", measured.folder / "layers.csv"
    assert measured.out.endswith(f"\nwritten: {json_file}, {csv_file}\n")


def test_no_measure_counts_and_runs_nothing(counted: Done) -> None:
    found = counted.document
    assert schema.check_report(found) == []
    assert {found["evaluation"], found["latency"], found["sample"]} == {None}
    assert {v["perplexity"] for v in found["summary"].values()} == {None}
    assert found["summary"]["masked"]["bytes"] > found["summary"]["lowered"]["bytes"]
    assert "perplexity" not in counted.out
    assert "model bytes, MB" in counted.out


def test_the_ir_is_printed_around_every_pass(counted: Done) -> None:
    titles = [line for line in counted.out.splitlines() if line.startswith("# changed by pass")]
    assert titles == [
        "# changed by pass 1: magnitude(0.5)",
        "# changed by pass 2: freeze",
        "# changed by pass 3: sparsity",
        "# changed by pass 4: flops",
        "# changed by pass 5: fuse",
        "# changed by pass 6: lower(auto)",
    ]
    assert "csr16[" in counted.out


def test_passes_without_lower_give_no_lowered_model_and_say_so(tmp_path: Path) -> None:
    done = run(tmp_path, *COUNT, "--passes", "magnitude(0.5),freeze")
    assert list(done.document["summary"]) == ["dense", "masked"]
    assert "the passes hold no `lower`, so there is no lowered model" in done.out
    assert "FLOPs are not counted: add the pass flops" in done.out


def test_quick_measures_less_unless_told_how_much() -> None:
    def effort(*args: str) -> Effort:
        return command.effort(command.parser().parse_args(args))

    assert effort() == Effort()
    assert effort("--quick") == QUICK
    assert (QUICK.windows, QUICK.length, QUICK.repeats) == (2, 128, 5)
    assert effort("--quick", "--eval-windows", "7").windows == 7


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["tiny", "--passes", "magnitud(0.5)"], "magnitude"),
        (["tiny", "--passes", "magnitude(1.5)"], "sparsity"),
        (["tiny", "--passes", "lower(csr)"], "needs 'frozen'"),
        (["tiny", "--no-measure", "--passes", "magnitude(0.5, targets=('nothing.*',)),freeze"], "nothing.*"),
        (["tiny", "--picture", "layers.0.mlp.up_prj"], "near names: 'model.layers.0.mlp.up_proj'"),
        (["./no/such/model"], "./no/such/model: there is no such folder or file"),
        (["tiny", "--text", "no-such-file.txt"], "no-such-file.txt: the text must be a file, this does not exist"),
        (["tiny", "--eval-length", "5000"], "evaluation length 5000 is more than the model's 1024 positions"),
        (["tiny", "--eval-windows", "999999"], "windows of 512 need"),
        (["tiny", "--eval-windows", "1", "--prompt-tokens", "700"], "a prompt of 700 tokens is cut from the 512"),
        (["tiny", "--prompt-tokens", "1000"], "need 1043 positions, the model has 1024"),
        (["tiny", "--prompt", ""], "the prompt '' has no tokens"),
        (["tiny", "--prompt", "x" * 1000], "the prompt has 1000 tokens, which with 40 new ones need 1040 positions"),
        (["tiny", "--json", "no/such/folder/report.json"], "no/such/folder/report.json: cannot be written"),
        (["tiny", "--dump-ir", __file__], "test_cli.py is a file; give another folder"),
        (["tiny", "--dump-ir", f"{__file__}/below"], "test_cli.py is a file; give another folder"),
    ],
)  # fmt: skip
def test_bad_input_is_one_clean_error(args: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert words in refused(capsys, *args)


@pytest.mark.parametrize(
    ("option", "name", "words"),
    [
        ("--json", "report.json", "report.json: cannot be written"),
        ("--csv", "layers.csv", "layers.csv: cannot be written"),
        ("--dump-ir", "ir", "ir cannot be written to; give another folder"),
    ],
)
def test_what_may_not_be_written_is_refused_before_anything_runs(
    option: str,
    name: str,
    words: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Regression: found out after everything was measured, and the report was lost."""
    path = tmp_path / name
    path.mkdir() if option == "--dump-ir" else path.touch()
    # The system's answer is given here, since root may write to what is read-only.
    monkeypatch.setattr(os, "access", lambda asked, mode: Path(asked) != path)
    monkeypatch.setattr(command, "load_model", lambda *args: pytest.fail("the model was loaded first"))
    assert words in refused(capsys, "tiny", option, str(path))


@pytest.mark.parametrize(
    "args",
    [["--threads", "0"], ["--eval-windows", "-1"], ["--new-tokens", "few"], ["--dtype", "int8"], ["--print-ir", "all"]],
)
def test_options_out_of_range_are_refused_by_name(args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        command.main(args)
    assert exit_.value.code == 2
    said = capsys.readouterr().err
    assert f"argument {args[0]}: " in said
    assert repr(args[1]) in said
    assert "_positive" not in said


def test_help_shows_examples_that_can_be_parsed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        command.main(["--help"])
    assert exit_.value.code == 0
    out = capsys.readouterr().out.replace("\\\n", "")  # where an example goes on
    examples = [shlex.split(line, comments=True) for line in out.splitlines() if line.startswith("  python -m ")]
    assert len(examples) >= 8
    for words in examples:
        assert words[:3] == ["python", "-m", "sparsec.report"]
        Pipeline.parse(command.parser().parse_args(words[3:]).passes).validate()


@pytest.mark.parametrize("width", [80, 120])
def test_overview_names_every_pass_kernel_and_command(
    width: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    assert overview.main([]) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= width
    for cls in PASSES:
        assert f"{cls.name:<12}[{cls.effect.value}]" in out
    assert "magnitude(sparsity=None, pattern='unstructured', " in " ".join(out.split())
    for kernel in KERNELS:
        state = "; ".join(kernel.available()) or "ready"
        assert " ".join(f"{kernel.name} {state}: format {kernel.format}".split()) in " ".join(out.split())
    for command_ in COMMANDS:
        assert f"sparsec {command_.name} " in out
    assert out.count("nm_cusparselt") == 1  # not once more under Machine


def test_overview_refuses_an_unknown_instruction_set(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Regression: a traceback."""
    monkeypatch.setenv("SPARSEC_ISA", "sse9")
    loader._load.cache_clear()
    try:
        assert overview.main([]) == 2
    finally:
        loader._load.cache_clear()
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: SPARSEC_ISA must be one of ")


def test_version_is_the_installed_one(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        overview.main(["--version"])
    assert exit_.value.code == 0
    assert capsys.readouterr().out == "sparsec 0.1.0\n"
