"""What a command is doing, how long each stage took and will take: a line a stage, on a terminal a bar for the stage that runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, ProgressColumn, Task, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars
from rich.text import Text

from sparsec.progress import Progress

SAY_EVERY = 20.0
"""Seconds after which a stage in a pipe says how far it is."""
INNER_FROM = 5.0
"""Seconds from which a stage within another is worth a line."""


@dataclass
class Pace:
    """How fast a stage is, by the steps that it has done itself, and so how long the others will take."""

    began: float  # seconds, of a clock
    first: int  # steps that were done when it began
    done: int
    total: int
    at: float  # when the last step ended

    @classmethod
    def start(cls, now: float, done: int, total: int) -> Pace:
        """Of a stage that begins."""
        return cls(now, done, done, total, now)

    def step(self, now: float, done: int, total: int) -> None:
        """The total may change: a search learns how much is left."""
        if done != self.done:
            self.at = now
        self.done, self.total = done, total

    def left(self, now: float) -> str:
        """`about 3 min left`, or nothing where no step tells."""
        seconds = self.seconds_left(now)
        return "" if seconds is None else f"about {_rounded(seconds)} left"

    def seconds_left(self, now: float) -> float | None:
        """None where no step tells."""
        if self.done <= self.first or self.done >= self.total:
            return None
        seconds = (self.at - self.began) / (self.done - self.first) * (self.total - self.done) - (now - self.at)
        return max(0.0, seconds)


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
    """`what ... 3.2 s` for every stage. One within another has lines of its own, set in, once it has taken some seconds.

    A line is left open while its stage runs. Where others come between, the stage ends in `3.2 s in all` below them, set in.
    """

    def __init__(self, stream: TextIO, clock: Callable[[], float] = perf_counter) -> None:
        self._stream, self._clock = stream, clock
        self._running: dict[str, Pace] = {}  # the outermost first
        self._said: dict[str, float] = {}  # when it last said something
        self._line = ""  # the stage whose line has no end yet
        self._notes: dict[str, str] = {}

    def note(self, what: str, text: str) -> None:
        """Said with the next line of that stage."""
        self._notes[what] = text

    def __call__(self, what: str, done: int, total: int) -> None:
        """One step. A stage that ends takes those within it along."""
        now = self._clock()
        pace = self._running.setdefault(what, Pace.start(now, done, total))
        pace.step(now, done, total)
        began = pace.began
        if what not in self._said and (len(self._running) == 1 or now - began >= INNER_FROM):
            self._open(what)
            self._said[what] = now
        if done >= total:
            names = list(self._running)
            for name in reversed(names[names.index(what) :]):
                self._end(name, now)
        elif what in self._said and now - self._said[what] >= SAY_EVERY:
            parts = (f"{done} of {total}", _seconds(now - began), pace.left(now), self._notes.get(what, ""))
            self._finish(what, ", ".join(part for part in parts if part))
            self._said[what] = now

    def close(self) -> None:
        """Ends the line that is open."""
        if self._line:
            self._write("\n")
            self._line = ""

    def _end(self, what: str, now: float) -> None:
        if what in self._said:
            seconds = _seconds(now - self._running[what].began)
            if self._line == what:
                self._finish(what, seconds)
            else:  # its name stands above, and lines of others below it
                self.close()
                self._write(f"{'  ' * list(self._running).index(what)}  {seconds} in all\n")
            del self._said[what]
        del self._running[what]
        self._notes.pop(what, None)

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


class _LeftColumn(ProgressColumn):
    """Of a task with a field `pace`."""

    def render(self, task: Task) -> Text:
        pace: Pace = task.fields["pace"]
        return Text(pace.left(perf_counter()))


@dataclass
class _Shown:
    """The two halves of a `Noted`."""

    step: Progress
    put: Callable[[str, str], None]

    def __call__(self, what: str, done: int, total: int) -> None:
        self.step(what, done, total)

    def note(self, what: str, text: str) -> None:
        self.put(what, text)


@contextmanager
def _bars(stream: TextIO) -> Iterator[Progress]:
    """Bars of the stages that run; what is done stays as a line, in the order in which it ended."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), _LeftColumn())
    tasks: dict[str, tuple[TaskID, Pace]] = {}
    with Bars(*columns, console=Console(file=stream), transient=True) as bars:

        def end(what: str) -> None:
            depth, now = len(tasks) - 1, perf_counter()
            task, pace = tasks.pop(what)
            bars.remove_task(task)
            if not depth or now - pace.began >= INNER_FROM:
                line = f"{'  ' * depth}{what} ... {_seconds(now - pace.began)}"
                bars.console.print(line, markup=False, highlight=False)

        def show(what: str, done: int, total: int) -> None:
            now = perf_counter()
            if what not in tasks:
                pace = Pace.start(now, done, total)
                tasks[what] = bars.add_task(what.replace("[", r"\["), total=total, pace=pace), pace
            tasks[what][1].step(now, done, total)
            bars.update(tasks[what][0], completed=done, total=total)
            if done >= total:
                names = list(tasks)
                for name in reversed(names[names.index(what) :]):  # it takes those within it along
                    end(name)

        def note(what: str, text: str) -> None:
            if what in tasks:
                bars.update(tasks[what][0], description=f"{what}, {text}".replace("[", r"\["))

        yield _Shown(show, note)


def _seconds(seconds: float) -> str:
    return f"{seconds:.1f} s"


def _rounded(seconds: float) -> str:
    """No more than a twentieth off."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 10 * 60:
        return f"{seconds / 60:.2g} min"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"
