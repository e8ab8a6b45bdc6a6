"""Seconds of one call, of contenders that take turns, each time for long enough to be measurable."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import cycle, islice

from torch import Tensor

from sparsec.timing.spread import Spread
from sparsec.timing.turns import clocked, take_turns

MIN_BATCH_SECONDS = 0.002  # shorter measurements are lost in the timer and in the waking of threads
SLOW_SECONDS = 0.5
SLOW_REPEATS = 3
WARM_UP_CALLS = 3


@dataclass(frozen=True)
class Contender:
    """One call per copy of the weight, walked through in order."""

    calls: Sequence[Callable[[], Tensor]]
    nbytes: int  # of one copy


@dataclass(frozen=True)
class CallTimes:
    """Seconds per call."""

    seconds: Spread
    nbytes: int  # that one call reads of the weight
    copies: int  # that were walked through
    rounds: tuple[float, ...]  # seconds per call, by round; fewer for a contender whose calls are slow

    @property
    def bytes_per_second(self) -> float:
        """Weight bytes read."""
        return self.nbytes / self.seconds.median

    @property
    def slow(self) -> bool:
        """Whether it was measured only a few times, since one call takes so long."""
        return self.seconds.median > SLOW_SECONDS


def time_calls(contenders: Sequence[Contender], repeats: int, whole_stacks: bool = False) -> list[CallTimes]:
    """Every contender once per round, each time on the next copies of its weight, for long enough to be measurable.

    whole_stacks: a measurement goes through all copies as often as it takes, as a model goes through its layers.
    """
    cases = [_case(c, *_effort(c, repeats, whole_stacks)) for c in contenders]
    found = take_turns(cases, repeats, warm_up=0)
    rounds = [tuple(t for t in times if t is not None) for times in found]
    return [CallTimes(Spread.of(r), c.nbytes, len(c.calls), r) for c, r in zip(contenders, rounds, strict=True)]


def _case(contender: Contender, batch: int, limit: int) -> Callable[[], float | None]:
    """Seconds per call of the next batch; None once it has had its measurements."""
    calls, turns = cycle(contender.calls), iter(range(limit))

    def run(chosen: list[Callable[[], Tensor]]) -> None:
        for call in chosen:
            call()

    def case() -> float | None:
        if next(turns, None) is None:
            return None
        chosen = list(islice(calls, batch))
        return clocked(lambda: run(chosen))() / batch

    return case


def _effort(contender: Contender, repeats: int, whole_stacks: bool) -> tuple[int, int]:
    """(calls per measurement, number of measurements)."""
    once = clocked(contender.calls[0])()
    if once > SLOW_SECONDS:
        return 1, min(repeats, SLOW_REPEATS)
    for call in contender.calls[:WARM_UP_CALLS]:
        call()
    once = min(once, clocked(contender.calls[-1])())
    batch = max(1, int(MIN_BATCH_SECONDS / max(1e-7, once)))
    return -(-batch // len(contender.calls)) * len(contender.calls) if whole_stacks else batch, repeats
