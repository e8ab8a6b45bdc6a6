"""Where the time of a command went, by its outermost stages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from time import perf_counter

from sparsec.pipeline.base import PassRecord
from sparsec.progress import Noted, Progress


class Account:
    """A Progress that passes everything on to another, and adds up the seconds of every stage that stands in no other."""

    def __init__(self, beside: Progress, clock: Callable[[], float] = perf_counter) -> None:
        self.seconds: dict[str, float] = {}
        self._beside, self._clock = beside, clock
        self._began = clock()
        self._outermost: tuple[str, float] | None = None  # its name, and when it began

    def note(self, what: str, text: str) -> None:
        """Passed on."""
        if isinstance(self._beside, Noted):
            self._beside.note(what, text)

    def __call__(self, what: str, done: int, total: int) -> None:
        now = self._clock()
        if self._outermost is None:
            self._outermost = (what, now)
        name, began = self._outermost
        if what == name and done >= total:
            self.seconds[name] = self.seconds.get(name, 0.0) + now - began
            self._outermost = None
        self._beside(what, done, total)

    @property
    def total(self) -> float:
        """Seconds since it was made."""
        return self._clock() - self._began

    def by_kind(self, passes: Sequence[PassRecord]) -> dict[str, float]:
        """Seconds by stage. In the place of a pass that calibrates: its forward passes, statistics, pruning, and what is left."""
        found: dict[str, float] = {}
        of_passes = {f"pass {p.index} {p.spec}": p for p in passes}
        for stage, seconds in self.seconds.items():
            known = of_passes.get(stage)
            name = stage if known is None else known.name
            for kind, part in {} if known is None else known.spent.items():
                found[kind] = found.get(kind, 0.0) + part
                seconds -= part
            found[name] = found.get(name, 0.0) + seconds
        return found


def rate(source_bytes: int, seconds: float) -> str:
    """Such as `3,556 MB in 52.9 s, 67 MB/s`; the seconds alone where nothing was read from files."""
    if not source_bytes:
        return f"{seconds:,.1f} s"
    return f"{source_bytes / 1e6:,.0f} MB in {seconds:,.1f} s, {source_bytes / 1e6 / max(seconds, 1e-9):,.1f} MB/s"


def told_shares(by_kind: dict[str, float], seconds: float) -> str:
    """Such as `forward 62%, pruning 20%, rest 3%`; what is below half a percent is in the rest."""
    told = {kind: part for kind, part in by_kind.items() if part >= 0.005 * seconds}
    rest = {"rest": seconds - sum(told.values())}
    return ", ".join(f"{kind} {100 * part / seconds:.0f}%" for kind, part in {**told, **rest}.items())
