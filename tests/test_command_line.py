"""What `--help` looks like on terminals of any width."""

from __future__ import annotations

import re
import shlex

import pytest
from hypothesis import given
from hypothesis import strategies as st

import sparsec.__main__ as overview
from sparsec.command_line import CommandLine, folded, laid_out
from sparsec.console.commands import COMMANDS, Command

WORDS = st.lists(st.text("abc", min_size=1, max_size=12), max_size=30).map(" ".join)


@given(WORDS, st.integers(40, 200))
def test_prose_is_folded_and_says_the_same(text: str, width: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", str(width))
        folded = laid_out(text)
    assert all(len(line) < width for line in folded.splitlines())
    assert folded.split() == text.split()


def test_an_example_stays_whole_and_its_comment_goes_above(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "50")
    example = "  sparsec compress tiny out --measure"
    assert laid_out(f"{example}        # into the model card").splitlines() == ["  # into the model card", example]
    assert laid_out(f"{example}  # short") == f"{example}  # short"


@pytest.mark.parametrize("command", [None, *COMMANDS], ids=lambda command: command.name if command else "sparsec")
def test_help_fits_80_columns(
    command: Command | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Regression: descriptions, examples and the list of commands ran on to the right, and names were cut in two."""
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        overview.main(["--help"] if command is None else [command.name, "--help"], "sparsec")
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if len(line) > 80] == []
    assert not [line for line in lines if re.search(r"[a-z]-$|bit$", line)]


def test_a_word_where_only_options_are_taken_is_answered_so(capsys: pytest.CaptureFixture[str]) -> None:
    """Regression: `sparsec bench tiny` was told to put several words in quotes."""
    parser = CommandLine("x", "", "")
    with pytest.raises(SystemExit):
        parser.parse_args(["tiny"])
    assert "unrecognized arguments: tiny; this command takes options alone" in capsys.readouterr().err


@given(
    st.lists(st.sampled_from(["--passes", "--text", "out", '"wanda(0.5),freeze"', "--json"]), max_size=9),
    st.integers(40, 120),
)
def test_a_folded_example_is_the_same_command(words: list[str], width: int) -> None:
    example = " ".join(["  sparsec compress", *words])
    lines = folded(example, width)
    assert shlex.split("\n".join(lines).replace("\\\n", "")) == shlex.split(example)  # as a shell does it
    assert all(line.startswith("  ") for line in lines)
    if len(lines) > 1:
        assert all(len(line) <= width or line.count(" --") == 1 for line in lines[:-1])


def test_a_long_list_of_names_is_broken_behind_a_comma(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    names = ",".join(f"bitmap:int{i}" for i in range(20))
    parser = CommandLine("x", "", "")
    parser.add_argument("--formats", help=f"default: {names}")
    parser.print_help()
    lines = capsys.readouterr().out.partition("default: ")[2].splitlines()
    assert "".join(line.strip() for line in lines) == names
    assert all(line.endswith(",") for line in lines[:-1])
