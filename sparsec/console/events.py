"""What a command does, as lines of JSON for scripts: one for each step that is worth it, and one for the end."""

from __future__ import annotations

import json
import os
import sys
from time import perf_counter
from typing import Any, TextIO

from sparsec.console.progress import Pace
from sparsec.progress import Noted, Progress


class Events:
    """A Progress that writes lines of JSON, and passes everything on to another.

    Each line is an object with `event` (`stage` or a name given to `say`) and `seconds` since the beginning; of a stage also
    `what`, `done`, `total`, and `seconds_left` where that is known. A stage of many steps is told at most ten times a second.
    """

    EVERY = 0.1

    def __init__(self, stream: TextIO, beside: Progress) -> None:
        self._stream: TextIO | None = stream
        self._beside = beside
        self._began = perf_counter()
        self._running: dict[str, Pace] = {}
        self._said: dict[str, float] = {}

    def note(self, what: str, text: str) -> None:
        """Passed on."""
        if isinstance(self._beside, Noted):
            self._beside.note(what, text)

    def __call__(self, what: str, done: int, total: int) -> None:
        now = perf_counter()
        pace = self._running.setdefault(what, Pace.start(now, done, total))
        pace.step(now, done, total)
        if done >= total or now - self._said.get(what, -self.EVERY) >= self.EVERY:
            self._said[what] = now
            left = pace.seconds_left(now)
            self.say(
                "stage", what=what, done=done, total=total, **({} if left is None else {"seconds_left": round(left, 1)})
            )
        if done >= total:
            del self._running[what]
            self._said.pop(what, None)
        self._beside(what, done, total)

    def say(self, event: str, **facts: Any) -> None:
        """One line."""
        told = {"event": event, "seconds": round(perf_counter() - self._began, 2), **facts}
        if self._stream is None:
            return
        try:
            print(json.dumps(told, allow_nan=False), file=self._stream, flush=True)
        except BrokenPipeError:  # a run of hours is not for its lines
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())  # where what is left in the buffer goes
            self._stream = None
            print("notice: nobody reads the lines of --json any more; the run goes on", file=sys.stderr)
