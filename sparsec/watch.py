"""Whether the other ranks are alive, told by a thread beside each: a beat a second to rank 0, and what it makes of them all back.

Beats come from a thread, so that a rank that computes for hours is alive and one that was stopped is not. One whose connection
breaks is gone at once; one that is silent for SILENT seconds hangs.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sparsec.errors import RanksError, SparsecError, briefly

BEAT = 1.0
"""Seconds between two beats."""
SILENT = 40.0
"""Seconds without a beat after which a rank hangs. Files are written without beats for as long as the disk takes for a call."""
_GRACE = 10.0
"""Seconds in which a process notices that another one was lost, before it is ended."""
_LETTERS = 1024
_GOES_ON, _DONE, _FAILED = range(3)


class Watch:
    """Of rank `number` of `count`. beats: the group in which ranks tell rank 0 how they are; verdicts: in which it tells all.

    Two groups, since one in which something was waited for in vain is closed.
    """

    def __init__(self, number: int, count: int, beats: Any, verdicts: Any) -> None:
        self.number, self.count = number, count
        self.groups = (beats, verdicts)
        self.ends_process = False
        self._state, self._text = _GOES_ON, ""
        self._lost = ""  # why all end
        self._wake, self._over, self._left = threading.Event(), threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="sparsec ranks", daemon=True)

    def start(self) -> None:
        """The first beat follows."""
        self._thread.start()

    def check(self) -> None:
        """RanksError where a rank was lost."""
        if self._lost:
            raise RanksError(self._lost)

    def lost(self, error: RuntimeError) -> RanksError:
        """What an exchange that broke means: the thread soon knows who it was."""
        self._over.wait(3 * BEAT)
        return RanksError(self._lost or f"a rank is gone: {briefly(error):.200}")

    def instead(self, error: BaseException) -> RanksError | None:
        """Where an exchange broke that others made, such as FSDP: the rank that was lost. None where this rank failed by itself."""
        if isinstance(error, SparsecError) or not isinstance(error, RuntimeError):
            return None
        self._over.wait(3 * BEAT)
        return RanksError(self._lost) if self._lost else None

    def leave(self, error: BaseException | None) -> None:
        """Waits until all have done their part; at once where this one failed. RanksError where another one is lost."""
        if error is not None and not self._lost:
            said = str(error) if isinstance(error, RanksError) else f"rank {self.number} stopped: {briefly(error)}"
            self._state, self._text = _FAILED, said
        elif error is None:
            self._state = _DONE
        self._wake.set()
        self._over.wait(None if error is None else 3 * BEAT)
        self._left.set()
        if error is None:
            self.check()

    @property
    def broken(self) -> bool:
        """Whether another rank was lost: then nothing is waited for any more."""
        return bool(self._lost)

    def close(self) -> None:
        """After its groups are."""
        self._thread.join(2 * BEAT)

    def _run(self) -> None:
        while not self._lost:
            try:
                state, text = (self._conducted if self.number == 0 else self._followed)()
            except Exception as error:  # whatever it is, the others must not be waited for
                state, text = _FAILED, f"rank {self.number} cannot watch the others: {briefly(error)}"
            if state == _DONE:
                break
            if state == _FAILED:
                self._lost = text
            else:
                self._wake.wait(BEAT)
                if self._state != _DONE:
                    self._wake.clear()
                else:
                    time.sleep(BEAT / 20)  # what is left to wait for is short
        self._over.set()
        if self._lost and self.ends_process and not self._left.wait(_GRACE):
            print(f"error: {self._lost}", file=sys.__stderr__, flush=True)
            os._exit(2)

    def _conducted(self) -> tuple[int, str]:
        """As rank 0: hears all, and tells all."""
        heard = {0: (self._state, self._text)}
        letters = {rank: _empty() for rank in range(1, self.count)}
        works: dict[int, Any] = {}
        until = time.monotonic() + SILENT
        for rank, letter in letters.items():
            try:
                works[rank] = dist.irecv(letter, rank, group=self.groups[0])
            except RuntimeError as error:
                heard[rank] = _FAILED, _gone(rank, error)
        for rank, work in works.items():
            try:
                _done(work, max(0.001, until - time.monotonic()))
                heard[rank] = _read(letters[rank])
            except RuntimeError as error:
                heard[rank] = _FAILED, _gone(rank, error)
                if "imed out" in str(error):
                    break  # the others are closed with it
        failed = [each for each in heard.values() if each[0] == _FAILED]
        over = len(heard) == self.count and all(state == _DONE for state, _ in heard.values())
        verdict = failed[0] if failed else (_DONE if over else _GOES_ON, "")
        told: dict[int, Any] = {}
        for rank in letters if not failed else (r for r, (state, _) in heard.items() if r and state != _FAILED):
            with suppress(RuntimeError):  # the next beat says so
                told[rank] = dist.isend(_written(*verdict), rank, group=self.groups[1])
        for work in told.values():
            with suppress(RuntimeError):
                _done(work, 2 * BEAT if failed else max(BEAT, until - time.monotonic()))
        return verdict

    def _followed(self) -> tuple[int, str]:
        """As another one: tells rank 0, and hears of all. Either is taken when the other side is ready for it."""
        until = time.monotonic() + SILENT + 5 * BEAT
        with suppress(RuntimeError):  # the verdict says why
            _done(dist.isend(_written(self._state, self._text), 0, group=self.groups[0]), SILENT)
        letter = _empty()
        try:
            _done(dist.irecv(letter, 0, group=self.groups[1]), max(BEAT, until - time.monotonic()))
        except RuntimeError as error:
            return _FAILED, _gone(0, error)
        return _read(letter)


def _done(work: Any, seconds: float) -> None:
    work.wait(timedelta(seconds=seconds))


def _gone(rank: int, error: RuntimeError) -> str:
    hangs = "imed out" in str(error)
    how = (
        f"hangs: it gave no sign of life for {SILENT:.0f} s"
        if hangs
        else "is gone: its process ended or cannot be reached"
    )
    return f"rank {rank} {how}; so all end; see what it said, and start all of them again"


def _empty() -> Tensor:
    return torch.zeros(_LETTERS, dtype=torch.uint8)


def _written(state: int, text: str) -> Tensor:
    letter, data = _empty(), text.encode()[: _LETTERS - 1]
    letter[0] = state
    letter[1 : 1 + len(data)] = torch.tensor(list(data), dtype=torch.uint8)
    return letter


def _read(letter: Tensor) -> tuple[int, str]:
    return int(letter[0]), bytes(letter[1:].tolist()).rstrip(b"\0").decode(errors="replace")
