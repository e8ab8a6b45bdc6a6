"""What a command is doing and how long each stage took: a line a stage, and on a terminal a bar for the stage that runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import perf_counter
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars

from sparsec.progress import Progress

SAY_EVERY = 20.0
"""Seconds after which a stage in a pipe says how far it is."""


@contextmanager
def shown_progress(stream: TextIO) -> Iterator[Progress]:
    """A callback that tells the stream of every stage. Stages may stand within stages."""
    if stream.isatty():
        with _bars(stream) as show:
            yield show
        return
    lines = StageLines(stream)
    try:
        yield lines
    finally:
        lines.close()


class StageLines:
    """`what ... 3.2 s` for every stage. One within another begins a line of its own, set in."""

    def __init__(self, stream: TextIO, clock: Callable[[], float] = perf_counter) -> None:
        self._stream, self._clock = stream, clock
        self._running: dict[str, tuple[float, float]] = {}  # when it began, when it last said something
        self._line = ""  # the stage whose line has no end yet

    def __call__(self, what: str, done: int, total: int) -> None:
        """One step."""
        now = self._clock()
        if what not in self._running:
            self.close()
            self._running[what] = (now, now)
            self._write(f"{self._indent(what)}{what} ...")
            self._line = what
        began, said = self._running[what]
        if done >= total:
            self._again(what, f" {_seconds(now - began)}\n")
            del self._running[what]
            self._line = ""
        elif now - said >= SAY_EVERY:
            self._again(what, f" {done} of {total} ({_seconds(now - began)}) ...")
            self._running[what] = (began, now)

    def close(self) -> None:
        """Ends the line that is open."""
        if self._line:
            self._write("\n")
            self._line = ""

    def _again(self, what: str, text: str) -> None:
        if self._line != what:
            self.close()
            self._write(f"{self._indent(what)}{what}:")
            self._line = what
        self._write(text)

    def _indent(self, what: str) -> str:
        return "  " * list(self._running).index(what)

    def _write(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()


@contextmanager
def _bars(stream: TextIO) -> Iterator[Progress]:
    """Bars of the stages that run; what is done stays as a line."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    tasks = {}
    with Bars(*columns, console=Console(file=stream), transient=True) as bars:

        def show(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what.replace("[", r"\["), total=total), perf_counter()
            task, began = tasks[what]
            bars.update(task, completed=done, total=total)
            if done >= total:
                bars.remove_task(task)
                del tasks[what]
                bars.console.print(f"{what}: {_seconds(perf_counter() - began)}", markup=False, highlight=False)

        yield show


def _seconds(seconds: float) -> str:
    return f"{seconds:.1f} s"
