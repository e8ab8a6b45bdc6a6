"""Every command with hostile words in the place of every option: exit code 0 or 2, an error in words, no traceback."""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import sparsec.__main__ as overview
from sparsec.command_line import CommandLine
from sparsec.console.commands import COMMANDS, Command, find
from sparsec.errors import DataError

WORDS = ("", " ", "x", "-1", "0", "1.5", "nan", "1e400", "9" * 30, "\udce9", "=", ",", "'", "x" * 5000)
BASE = {
    "report": ["tiny", "--no-measure", "--passes", "magnitude(0.5)"],
    "evaluate": ["tiny", "--windows", "1", "--length", "8"],
    "bench": ["--shapes", "8x8", "--formats", "csr", "--sparsity", "50", "--rotate-mb", "1", "--repeats", "2"],
    "plan": ["tiny", "--passes=magnitude(0.5),freeze,lower(csr)"],
    "compress": ["tiny", "saved", "--no-sample", "--passes=magnitude(0.5),freeze,lower(csr)"],
    "study": ["tiny", "--passes=magnitude(0.5),freeze", "--windows=1", "--length=16", "--repeats=1", "--new-tokens=1"],
    "generate": ["tiny", "abc", "--new-tokens=1"],
    "cost": ["--show"],
    "check": ["nowhere"],
    "kernels.build": ["--status"],
    "kernels.gpu_compile": [],
}
"""The least work of each command, for what is accepted after all."""


class _FoundError(Exception):
    """Carries the parser out of a command."""


def options_of(command: Command, monkeypatch: pytest.MonkeyPatch) -> list[argparse.Action]:
    """Those that take a word, read off the parser that the command makes."""

    def found(self: argparse.ArgumentParser, *_: object) -> None:
        raise _FoundError(self)

    with monkeypatch.context() as patched:
        patched.setattr(CommandLine, "parse_args", found)
        with pytest.raises(_FoundError) as caught:
            command.run([], command.name)
    parser: argparse.ArgumentParser = caught.value.args[0]
    return [a for a in parser._actions if a.nargs != 0]


@pytest.fixture(autouse=True)
def _as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    threads = torch.get_num_threads()
    monkeypatch.chdir(tmp_path)
    logging.disable(logging.ERROR)
    yield
    logging.disable(logging.NOTSET)
    torch.set_num_threads(threads)


def said(command: Command, words: list[str]) -> str:
    """Empty when the command did what was asked or refused it in words, else what came out of it."""
    out, err = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = command.run(words, command.name)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    text = err.getvalue()
    if code not in (0, 1, 2) or "Traceback" in text:
        return f"exit {code}: {text[-200:]}"
    return "" if code == 0 or "error: " in text else f"exit {code} without a word"


def no_report(*args: object, **kwargs: object) -> None:
    """In the place of the report's own work: a second for every word that is accepted would be minutes."""
    raise DataError("the words were accepted")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("command", COMMANDS, ids=lambda c: c.name)
def test_any_word_is_served_or_refused_in_words(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "binary").write_bytes(bytes(range(256)))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for work in (
        "report.__main__.measured_report",
        "study.__main__.measure_cells",
        "compress.compile",
        "generate.generated",
    ):
        monkeypatch.setattr(f"sparsec.{work}", no_report)
    paths = (str(tmp_path), str(tmp_path / "missing" / "file"), str(tmp_path / "binary"))
    found = []
    for action in options_of(command, monkeypatch):
        for word in (*WORDS, *paths):
            words = (
                [*BASE[command.name], f"{action.option_strings[-1]}={word}"]
                if action.option_strings
                else [word, *BASE[command.name][1:]]
            )
            problem = said(command, words)
            found += [f"{words[-1][:80]}: {problem}"] if problem else []
    assert found == []


@pytest.mark.parametrize("command", COMMANDS, ids=lambda c: c.name)
def test_an_output_that_cannot_be_written_is_refused_before_any_work(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    outputs = {"--json", "--csv"} & {s for a in options_of(command, monkeypatch) for s in a.option_strings}
    for option in outputs:
        base = [word for word in BASE[command.name] if word != "--show"]  # the slow way
        assert command.run([*base, option, str(tmp_path / "missing" / "file")], command.name) == 2
        assert "cannot be written" in capsys.readouterr().err


@pytest.mark.parametrize("command", COMMANDS, ids=lambda c: c.name)
def test_an_option_that_is_not_there_names_a_near_one(
    command: Command, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [a.option_strings[-1] for a in options_of(command, monkeypatch) if a.option_strings]
    near = max(options, key=len)
    with pytest.raises(SystemExit) as end:
        command.run([*BASE[command.name], f"{near[:-3]}{near[-2:]}=1"], command.name)
    assert end.value.code == 2
    assert f"did you mean {near}?" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("passes", ["magnitude(0.5)", "wanda(0.5)"])
@pytest.mark.parametrize("option", ["calibration", "text"])
@pytest.mark.parametrize("name", ["report", "evaluate"])
def test_a_text_that_is_missing_is_refused_before_any_work(
    name: str, option: str, passes: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Regression: where no pass learns, --calibration was not looked at, and an empty name was none."""
    monkeypatch.setattr(f"sparsec.{name}.__main__.{'open_model' if name == 'evaluate' else 'load_model'}", no_report)
    for word, why in (
        ("missing.txt", "missing.txt: the text must be a file, this does not exist"),
        ("", "is a folder"),
    ):
        assert find(name).run(["tiny", "--passes", passes, f"--{option}", word], name) == 2
        assert why in capsys.readouterr().err


def test_an_unknown_command_names_near_ones(capsys: pytest.CaptureFixture[str]) -> None:
    assert overview.main(["reprot"]) == 2
    assert "did you mean 'report'" in capsys.readouterr().err
