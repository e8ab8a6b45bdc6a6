"""Contenders that take turns: every round times each once, so that a slow moment of a shared machine meets all of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from sparsec.timing.latency import Spread

MIN_BATCH_SECONDS = 0.002  # shorter measurements are lost in the timer and in the waking of threads
SLOW_SECONDS = 0.5
SLOW_REPEATS = 3
WARM_UP = 3


@dataclass(frozen=True)
class Contender:
    """One call per copy of the weight, walked through in order."""

    calls: Sequence[Callable[[], Tensor]]
    nbytes: int  # of one copy


@dataclass(frozen=True)
class Timing:
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


def speedup(base: Timing, other: Timing) -> Spread:
    """How many times as fast as `base`, per round."""
    return Spread.of([b / t for b, t in zip(base.rounds, other.rounds, strict=False)])


def interleaved(contenders: Sequence[Contender], repeats: int, whole_stacks: bool = False) -> list[Timing]:
    """Every contender once per round, each time on the next copies of its weight, for long enough to be measurable.

    whole_stacks: a measurement goes through all copies as often as it takes, as a model goes through its layers.
    """
    batches, limits = zip(*(_effort(c, repeats, whole_stacks) for c in contenders), strict=True)
    seconds: list[list[float]] = [[] for _ in contenders]
    positions = [0] * len(contenders)
    for turn in range(repeats):
        for i, contender in enumerate(contenders):
            if turn >= limits[i]:
                continue
            copies = len(contender.calls)
            chosen = [contender.calls[(positions[i] + k) % copies] for k in range(batches[i])]
            positions[i] += batches[i]
            start = time.perf_counter()
            for call in chosen:
                call()
            seconds[i].append((time.perf_counter() - start) / batches[i])
    return [
        Timing(Spread.of(times), c.nbytes, len(c.calls), tuple(times))
        for c, times in zip(contenders, seconds, strict=True)
    ]


def _effort(contender: Contender, repeats: int, whole_stacks: bool) -> tuple[int, int]:
    """(calls per measurement, number of measurements)."""
    once = _seconds(contender.calls[0])
    if once > SLOW_SECONDS:
        return 1, min(repeats, SLOW_REPEATS)
    for call in contender.calls[:WARM_UP]:
        call()
    once = min(once, _seconds(contender.calls[-1]))
    batch = max(1, int(MIN_BATCH_SECONDS / max(1e-7, once)))
    return -(-batch // len(contender.calls)) * len(contender.calls) if whole_stacks else batch, repeats


def _seconds(call: Callable[[], Tensor]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
