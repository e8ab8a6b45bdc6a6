"""What `--help` looks like on terminals of any width."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsec import compress
from sparsec.command_line import laid_out

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


def test_help_in_80_columns(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Regression: descriptions ran on to the right."""
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        compress.main(["--help"])
    long = [line for line in capsys.readouterr().out.splitlines() if len(line) > 80]
    assert all(line.startswith("  python -m sparsec.compress ") for line in long)
