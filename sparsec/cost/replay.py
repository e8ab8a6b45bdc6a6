"""Time on a device: calls are recorded once in a CUDA graph and replayed, so that what Python and the launches cost is left out.

Elsewhere (in tests) they are called one by one and timed by the clock.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from time import perf_counter

import torch

from sparsec.latency import Spread


class Replay:
    """Calls that follow each other on one device."""

    def __init__(self, calls: Sequence[Callable[[], object]], device: torch.device) -> None:
        """Runs every call once, which compiles what has to be compiled, and records them."""
        self.count, self._device = len(calls), device
        self._calls = calls
        self._graph: torch.cuda.CUDAGraph | None = None
        for call in calls:
            call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):
                for call in calls:
                    call()

    def run(self) -> None:
        """All calls, once; does not wait for a GPU."""
        if self._graph is not None:
            self._graph.replay()
            return
        for call in self._calls:
            call()

    def seconds(self) -> float:
        """Of one call, where all follow each other."""
        return self.several(self.run, 1, self._device) / self.count

    @staticmethod
    def several(run: Callable[[], None], times: int, device: torch.device) -> float:
        """Seconds of one run, over some that follow each other; waits for them."""
        if device.type != "cuda":
            start = perf_counter()
            for _ in range(times):
                run()
            return (perf_counter() - start) / times
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        for _ in range(times):
            run()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3 / times


def take_turns(replays: Sequence[Replay], rounds: int) -> list[list[float]]:
    """Seconds per call of each, by round; the first round warms up and does not count."""
    found: list[list[float]] = [[] for _ in replays]
    for turn in range(rounds + 1):
        for times, replay in zip(found, replays, strict=True):
            seconds = replay.seconds()
            if turn:
                times.append(seconds)
    return found


def ratio(base: Sequence[float], other: Sequence[float]) -> Spread:
    """How many times as fast as `base`, by round."""
    return Spread.of([b / t for b, t in zip(base, other, strict=True)])
