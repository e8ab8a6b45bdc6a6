"""How a command ends, and the files that it writes, looked at before anything slow runs. Needs no torch."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from contextvars import ContextVar, copy_context
from pathlib import Path
from typing import Any, TextIO

from sparsec.errors import DataError, SparsecError, SparsecWarning

STDOUT = "-"
"""As a file's name: the standard output."""
_document: ContextVar[TextIO | None] = ContextVar("_document", default=None)


def guarded(run: Callable[[], int | None], traceback: bool = False, json: str | Path | None = None) -> int:
    """Runs a command; returns the exit code: its own or 0, 2 for bad input, 130 when interrupted.

    json: the file that it writes. Where that is the standard output, everything else goes to the standard error.
    """
    try:
        with _notices():
            return _run(run, json)
    except SparsecError as error:
        if traceback:
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        return 130
    return 0


def _run(run: Callable[[], int | None], json: str | Path | None) -> int:
    if str(json) != STDOUT:
        return run() or 0
    context = copy_context()
    context.run(_document.set, sys.stdout)
    with redirect_stdout(sys.stderr):
        return context.run(run) or 0


@contextmanager
def _notices() -> Iterator[None]:
    """Within it sparsec's warnings are notices on the standard error, without a line of code."""
    with warnings.catch_warnings():
        shown = warnings.showwarning

        def show(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
            if issubclass(category, SparsecWarning):
                print(f"notice: {message}", file=sys.stderr)
            else:
                shown(message, category, *where, **more)

        warnings.showwarning = show
        yield


def writable(path: str | Path) -> str:
    """The path. Raises DataError, before anything slow runs, for a file that could not be written afterwards."""
    if str(path) == STDOUT:
        return STDOUT
    file = Path(path).absolute()
    try:
        fits = not file.is_dir() and file.parent.is_dir() and os.access(file if file.exists() else file.parent, os.W_OK)
    except (OSError, ValueError):  # a name that is too long, or holds a NUL
        fits = False
    if not fits:
        raise DataError(
            f"{str(path) or 'a file without a name'}: cannot be written; a file there must be writable, else its folder must exist "
            "and be writable, and the name must not be a folder's; give another file"
        )
    return str(path)


def writable_folder(path: str, refusal: str) -> None:
    """Raises DataError for a folder that could neither be written to nor be made. refusal: what can then not be done."""
    folder = Path(path).absolute()
    try:
        if b"\0" in os.fsencode(path):
            raise ValueError("it holds a zero byte")
        while not folder.exists() and folder != folder.parent:  # what is missing is made
            if folder.is_symlink():
                raise OSError(f"{folder} is a link that leads nowhere")
            folder = folder.parent
    except (OSError, ValueError) as error:
        raise DataError(f"{path[:60]!r}: no folder can have this name ({error}); give another") from error
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        what = "is a file" if folder.is_file() else "cannot be written to"
        raise DataError(f"{path}: {refusal}, since {folder} {what}; give another folder")


def write_text(path: str | Path, text: str) -> None:
    """Raises DataError where that fails."""
    if str(path) == STDOUT:
        (_document.get() or sys.stdout).write(text)
        return
    try:
        Path(path).write_text(text, encoding="utf-8")
    except (OSError, UnicodeError) as error:
        raise DataError(f"{path}: cannot be written ({error}); give another file") from error
