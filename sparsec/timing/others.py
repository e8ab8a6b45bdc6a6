"""Whether the machine was busy while something was timed: the cores that others kept busy, by the system's own counts."""

from __future__ import annotations

import os
from pathlib import Path
from time import perf_counter

IN_THE_WAY = 0.25
"""Of a core: less is what a system does anyway."""
SHORTEST = 0.2
"""Seconds: the system counts in ticks of a hundredth, and of this process and of all at other moments."""


class Others:
    """Everybody else on the cores that this process may use, from its making on."""

    def __init__(self) -> None:
        self._start = _counts()

    def cores(self) -> float | None:
        """That they kept busy on average since then; None where the system does not tell, and for too short a time."""
        now = _counts()
        if self._start is None or now is None:
            return None
        wall, everybody, own = (after - before for before, after in zip(self._start, now, strict=True))
        return round(max(0.0, everybody - own) / wall, 2) if wall >= SHORTEST else None


def in_the_way(busy: float | None, threads: int, cores: int) -> bool:
    """Whether others, who kept so many cores busy, left too few for so many threads."""
    return busy is not None and busy + min(threads, cores) > cores + IN_THE_WAY


def _counts() -> tuple[float, float, float] | None:
    """Seconds: of the clock, of these cores being busy, of this process being at work."""
    try:
        allowed = {f"cpu{core}" for core in os.sched_getaffinity(0)}
        lines = [line.split() for line in Path("/proc/stat").read_text("utf-8").splitlines()]
        ticks = [[int(word) for word in words[1:9]] for words in lines if words and words[0] in allowed]
        # of a core: user, nice, system, idle, waiting for a disk, two kinds of interrupts, and what a host took
        busy = sum(sum(core) - core[3] - core[4] for core in ticks) / os.sysconf("SC_CLK_TCK")
    except (AttributeError, OSError, ValueError, IndexError):  # another system, or one that keeps it to itself
        return None
    if not ticks:
        return None
    own = os.times()
    return perf_counter(), busy, own.user + own.system
