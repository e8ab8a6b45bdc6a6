"""The one way in which times are taken: all cases take turns, so that a slow moment of a shared machine meets all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from time import perf_counter
from typing import TypeVar

from sparsec.progress import Progress

WARM_UP = 2
LEAST = 3  # rounds, whatever the time budget says: a median needs them

T = TypeVar("T")


def take_turns(
    cases: Sequence[Callable[[], T]],
    rounds: int,
    warm_up: int = WARM_UP,
    progress: Progress | None = None,
    what: str = "timing",
    seconds: float | None = None,
) -> list[list[T]]:
    """What each case returns, as a rule seconds, by round. In every round all run once, and each round begins with another one.

    The rounds that warm up do not count. seconds: no round begins after so many, but for the least that a median needs.
    """
    found: list[list[T]] = [[] for _ in cases]
    total, begin = warm_up + rounds, perf_counter()
    step = max(1, len(cases) // total)  # of many cases each part comes first once
    for turn in range(total):
        if seconds is not None and turn >= warm_up + LEAST and perf_counter() - begin > seconds:
            break
        if progress is not None:
            progress(what, turn, total)
        for i in range(len(cases)):
            at = (i + turn * step) % len(cases)
            told = cases[at]()
            if turn >= warm_up:
                found[at].append(told)
    if progress is not None:
        progress(what, total, total)
    return found


def clocked(call: Callable[[], object]) -> Callable[[], float]:
    """A case of one call, by the clock."""

    def seconds() -> float:
        start = perf_counter()
        call()
        return perf_counter() - start

    return seconds
