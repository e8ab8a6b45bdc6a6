"""A tokenizer that begins texts with a BOS begins every window with it, once; the papers' protocol does not."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing

from sparsec.calibrate import strings, windows
from sparsec.data import Text
from sparsec.data.tiny import END, byte_tokenizer
from sparsec.data.tokens import beginning, encode
from sparsec.errors import ArgumentError, DataError
from sparsec.evaluate import cut
from sparsec.evaluate.__main__ import main

BOS = 256


def begins(before: str = f"{END} ", after: str = "") -> Any:
    """A byte tokenizer that puts END before a text, or what is said."""
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{before}$A{after}", special_tokens=[(END, BOS)]
    )
    return tokenizer


WITH, WITHOUT = begins(), byte_tokenizer()


@given(text=st.text("abc", min_size=30, max_size=60), length=st.integers(2, 9), bos=st.booleans())
@settings(max_examples=30)
def test_every_window_begins_with_one_bos(text: str, length: int, bos: bool) -> None:
    found = cut(Text("text", text), WITH, length, None, bos=bos)
    plain = encode(WITHOUT, text)
    if bos:
        assert found.tokens[:, 0].tolist() == [BOS] * found.count
        assert found.tokens[:, 1:].flatten().tolist() == plain[: found.count * (length - 1)]
        assert found.count == len(plain) // (length - 1)
    else:
        assert found.tokens.flatten().tolist() == [BOS, *plain][: found.count * length]
    drawn, source = windows(Text("text", text), WITH, 3, length, bos=bos)
    assert (drawn[:, 0] == BOS).all() or not bos
    assert ("every window begins with <|end|>" if bos else "without a <|end|> for each window") in source


def test_a_tokenizer_that_adds_none_changes_nothing() -> None:
    text = Text("text", "abcdefgh" * 9)
    for bos in (True, False):
        found = cut(text, WITHOUT, 8, None, bos=bos)
        assert found.tokens.flatten().tolist() == encode(WITHOUT, text.content)
        assert found.beginning.protocol == "the tokenizer adds no BOS"


def test_what_stands_before_is_told_from_what_stands_after() -> None:
    assert beginning(begins("", f" {END}")).ids == ()
    assert beginning(begins(f"{END} ", f" {END}")).ids == (BOS,)
    assert beginning(begins(f"{END} {END} ")).ids == (BOS, BOS)
    assert [ids.tolist() for ids in strings(["ab"], WITH)] == [[BOS, *encode(WITHOUT, "ab")]]
    assert [ids.tolist() for ids in strings(["ab"], WITH, bos=False)] == [encode(WITHOUT, "ab")]


@pytest.mark.parametrize(
    "wrong",
    [7, "name", lambda text, verbose: [1, 2], lambda text: {"input_ids": [1]}, lambda text, verbose: {"input_ids": 3}],
)
def test_what_is_no_tokenizer_is_refused(wrong: Any) -> None:
    with pytest.raises(DataError, match="tokenizer"):
        cut(Text("text", "abc" * 9), wrong, 4, 1)


def test_windows_without_room_for_text_are_refused() -> None:
    with pytest.raises(DataError, match="none of the text fits"):
        cut(Text("text", "abc" * 9), begins(f"{END} {END} "), 2, 1)
    with pytest.raises(ArgumentError, match="bos must be True or False"):
        cut(Text("text", "abc" * 9), WITH, 4, 1, bos="no")  # type: ignore[arg-type]


def test_the_command_names_the_protocol(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from sparsec.data import load_model

    loaded = replace(load_model("tiny"), tokenizer=WITH)
    monkeypatch.setattr("sparsec.evaluate.__main__.open_model", lambda *args: loaded)
    file = tmp_path / "out.json"
    for option, token, said in (
        ([], END, "every window begins with <|end|>"),
        (["--no-bos"], None, "cut from the text tokenised as one string, without a <|end|> for each window"),
    ):
        assert main(["tiny", "--windows", "2", "--length", "16", "--json", str(file), *option]) == 0
        assert said in " ".join(capsys.readouterr().out.split())
        found = json.loads(file.read_text())
        assert (found["bos"], found["protocol"]) == (token, said)
