"""What a command is doing and how long each stage took: a line a stage, and on a terminal a bar for the stage that runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import perf_counter
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars

from sparsec.progress import Progress

SAY_EVERY = 20.0
"""Seconds after which a stage in a pipe says how far it is."""
INNER_FROM = 1.0
"""Seconds from which a stage within another is worth a line."""


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
    """`what ... 3.2 s` for every stage. One within another has lines of its own, set in, once it has taken a second.

    A line is left open while its stage runs; what comes between ends it, and the stage goes on in a line of the same form.
    """

    def __init__(self, stream: TextIO, clock: Callable[[], float] = perf_counter) -> None:
        self._stream, self._clock = stream, clock
        self._running: dict[str, float] = {}  # when it began; the outermost first
        self._said: dict[str, float] = {}  # when it last said something
        self._line = ""  # the stage whose line has no end yet

    def __call__(self, what: str, done: int, total: int) -> None:
        """One step. A stage that ends takes those within it along."""
        now = self._clock()
        began = self._running.setdefault(what, now)
        if what not in self._said and (len(self._running) == 1 or now - began >= INNER_FROM):
            self._open(what)
            self._said[what] = now
        if done >= total:
            names = list(self._running)
            for name in reversed(names[names.index(what) :]):
                self._end(name, now)
        elif what in self._said and now - self._said[what] >= SAY_EVERY:
            self._finish(what, f"{done} of {total}, {_seconds(now - began)}")
            self._said[what] = now

    def close(self) -> None:
        """Ends the line that is open."""
        if self._line:
            self._write("\n")
            self._line = ""

    def _end(self, what: str, now: float) -> None:
        if what in self._said:
            self._finish(what, _seconds(now - self._running[what]))
            del self._said[what]
        del self._running[what]

    def _finish(self, what: str, text: str) -> None:
        if self._line != what:
            self._open(what)
        self._write(f" {text}\n")
        self._line = ""

    def _open(self, what: str) -> None:
        self.close()
        self._write(f"{'  ' * list(self._running).index(what)}{what} ...")
        self._line = what

    def _write(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()


@contextmanager
def _bars(stream: TextIO) -> Iterator[Progress]:
    """Bars of the stages that run; what is done stays as a line, in the order in which it ended."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    tasks: dict[str, tuple[TaskID, float]] = {}
    with Bars(*columns, console=Console(file=stream), transient=True) as bars:

        def end(what: str) -> None:
            depth, now = len(tasks) - 1, perf_counter()
            task, began = tasks.pop(what)
            bars.remove_task(task)
            if not depth or now - began >= INNER_FROM:
                line = f"{'  ' * depth}{what} ... {_seconds(now - began)}"
                bars.console.print(line, markup=False, highlight=False)

        def show(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what.replace("[", r"\["), total=total), perf_counter()
            bars.update(tasks[what][0], completed=done, total=total)
            if done >= total:
                names = list(tasks)
                for name in reversed(names[names.index(what) :]):  # it takes those within it along
                    end(name)

        yield show


def _seconds(seconds: float) -> str:
    return f"{seconds:.1f} s"
