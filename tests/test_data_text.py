"""Texts: the same content gives the same hash, and a text that cannot serve is refused with a way out."""

from __future__ import annotations

import hashlib
import sys
import types
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsec.data import load_text
from sparsec.errors import DataError, MissingExtraError


@given(st.lists(st.text("abc é", min_size=1), min_size=1), st.sampled_from(["\r\n", "\r", "\n"]))
def test_newlines_of_every_system_give_one_hash(
    tmp_path_factory: pytest.TempPathFactory, lines: list[str], newline: str
) -> None:
    content = "x" + "\n".join(lines)
    path = tmp_path_factory.mktemp("texts") / "text.txt"
    path.write_bytes(content.replace("\n", newline).encode())
    text = load_text(str(path))
    assert text.content == content
    assert text.sha256 == hashlib.sha256(content.encode()).hexdigest()


def test_the_embedded_text_is_long_english_prose_in_a_fixed_order() -> None:
    first, second = load_text(), load_text()
    assert first == second
    assert len(first.content) > 300_000
    assert first.content.lower().count(" the ") > 3000
    assert first.name == "pydoc_data.topics"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "does not exist"),
        (b"", "needs words, this one is empty"),
        (b" \r\n\t", "needs words, this one is empty"),
        (b"caf\xe9 latin", r"must be UTF-8, byte 3 is 0xe9 .*iconv"),
    ],
)
def test_a_file_that_cannot_serve_is_named(content: bytes | None, words: str, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=words) as error:
        load_text(str(path))
    assert str(path) in str(error.value)


def test_a_folder_is_no_text(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="this is a folder"):
        load_text(str(tmp_path))


def test_a_dataset_without_the_library_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingExtraError, match=r'pip install "sparsec\[data\]"'):
        load_text("dataset:wikitext,wikitext-2-raw-v1")


class Rows(dict[str, list[str]]):
    """What load_dataset gives, as far as it is used."""

    @property
    def column_names(self) -> list[str]:
        return list(self)


def library(monkeypatch: pytest.MonkeyPatch, asked: list[tuple[object, ...]]) -> None:
    def load_dataset(name: str, config: str | None, split: str) -> Rows:
        asked.append((name, config, split))
        if name == "absent":
            raise FileNotFoundError("no dataset 'absent' on the hub")
        return Rows(text=["one", "", "two\r\nthree"], other=["four"])

    module = types.ModuleType("datasets")
    module.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)


def test_a_text_in_the_place_of_its_path_is_refused() -> None:
    with pytest.raises(DataError, match=r"the text must be a file's path .File name too long"):
        load_text("words " * 1000)


def test_a_dataset_is_joined_with_blank_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[object, ...]] = []
    library(monkeypatch, asked)
    assert load_text("dataset:some/set").content == "one\n\n\n\ntwo\nthree"
    assert load_text("dataset:some/set,small,validation,other").content == "four"
    assert asked == [("some/set", None, "test"), ("some/set", "small", "validation")]
    # What is calibrated on is not what is evaluated on.
    assert load_text("dataset:some/set").name == "some/set test"
    assert load_text("dataset:some/set", split="train").name == "some/set train"


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("dataset:", "is written dataset:NAME"),
        ("dataset:a,b,c,d,e", "is written dataset:NAME"),
        ("dataset:absent", "cannot be loaded .no dataset 'absent'"),
        ("dataset:some,,,column", r"no column 'column' in \['other', 'text'\]"),
    ],
)
def test_a_dataset_that_cannot_serve_is_named(spec: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    library(monkeypatch, [])
    with pytest.raises(DataError, match=words):
        load_text(spec)
