"""Texts to evaluate and to calibrate on: a file, a named dataset, or the prose that every Python carries.

A perplexity means nothing without its text, so a text knows its hash. Newlines are normalised before hashing and
tokenising: the same text from Windows and from Linux must give the same number.
"""

from __future__ import annotations

import ast
import hashlib
from dataclasses import dataclass
from pathlib import Path

from sparsec.arguments import checked
from sparsec.errors import DataError, MissingExtraError, first_words

DATASET_PREFIX = "dataset:"
EMBEDDED = "pydoc_data.topics"
WAY_OUT = "give a UTF-8 text file, dataset:NAME[,CONFIG[,SPLIT[,COLUMN]]], or nothing for the embedded text"


@dataclass(frozen=True)
class Text:
    """A text with its origin."""

    name: str
    content: str

    @property
    def sha256(self) -> str:
        """Hash of the UTF-8 bytes, newlines being single line feeds."""
        return hashlib.sha256(self.content.encode()).hexdigest()


@checked
def load_text(spec: str | None = None, split: str = "test") -> Text:
    """Reads a text: a path, `dataset:NAME[,CONFIG[,SPLIT[,COLUMN]]]` (default: `split`, the column text), or None.

    None is the embedded text: the language reference in the standard library's `pydoc_data.topics`, 465 kB of English.
    Raises DataError (missing, empty, not UTF-8) and MissingExtraError (datasets is not installed).
    """
    if spec is None:
        return _embedded()
    text = _dataset(spec, split) if spec.startswith(DATASET_PREFIX) else _file(Path(spec).expanduser())
    if not text.content.strip():
        raise DataError(f"{text.name}: a text needs words, this one is empty; {WAY_OUT}")
    return text


@checked
def second_text(first: str, other: str = "") -> Text:
    """Another text than those of the names given, of another kind: the embedded one, or beside that what the modules of Python's
    standard library say of themselves."""
    if not any(name.startswith(EMBEDDED) for name in (first, other)):
        return _embedded()
    found = []
    for path in sorted(Path(ast.__file__).parent.glob("*.py")):
        try:
            found.append(ast.get_docstring(ast.parse(path.read_bytes())) or "")
        except (OSError, SyntaxError, ValueError):
            continue
    return Text("docstrings of the standard library", _normalise("\n\n".join(text for text in found if text)))


def _normalise(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _file(path: Path) -> Text:
    try:
        found = path.is_file()
    except OSError as error:  # a whole text in the place of its path, for one
        raise DataError(f"{str(path)[:60]!r}: the text must be a file's path ({error.strerror}); {WAY_OUT}") from error
    if not found:
        what = "is a folder" if path.is_dir() else "is none" if path.exists() else "does not exist"
        raise DataError(f"{path}: the text must be a file, this {what}; {WAY_OUT}")
    try:
        return Text(str(path), _normalise(path.read_bytes().decode("utf-8")))
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: the text must be UTF-8, byte {error.start} is {error.object[error.start]:#04x} ({error.reason}); "
            f"convert it, for example with `iconv -f latin1 -t utf-8`"
        ) from error
    except OSError as error:
        raise DataError(f"{path}: the text cannot be read ({error.strerror}); {WAY_OUT}") from error


def _dataset(spec: str, usual: str) -> Text:
    parts = [part.strip() for part in spec.removeprefix(DATASET_PREFIX).split(",")]
    if not 1 <= len(parts) <= 4 or not parts[0]:
        raise DataError(f"{spec!r}: a dataset is written dataset:NAME[,CONFIG[,SPLIT[,COLUMN]]]; {WAY_OUT}")
    name, config, split, column = (*parts, *[""] * (4 - len(parts)))
    split, column = split or usual, column or "text"
    try:
        import datasets
    except ImportError as error:
        raise MissingExtraError(
            f'{spec!r}: named datasets need the package datasets; `pip install "sparsec[data]"`, or give a text file'
        ) from error
    try:
        rows = datasets.load_dataset(name, config or None, split=split)
    except Exception as error:  # the library raises its own, its file system's and its HTTP client's errors
        raise DataError(f"{spec!r}: the dataset cannot be loaded ({first_words(error)}); {WAY_OUT}") from error
    if column not in rows.column_names:
        raise DataError(
            f"{spec!r}: no column {column!r} in {sorted(rows.column_names)}; name one of them as the fourth part"
        )
    # Joined with blank lines, as in the SparseGPT and Wanda papers' code.
    return Text(f"{name} {config} {split}".replace("  ", " "), _normalise("\n\n".join(map(str, rows[column]))))


def _embedded() -> Text:
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise DataError("this Python comes without pydoc_data, the embedded text; give a UTF-8 text file") from error
    return Text(EMBEDDED, _normalise("\n\n".join(topics[key] for key in sorted(topics))))
