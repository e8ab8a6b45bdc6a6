"""Time on a device: calls are recorded once in a CUDA graph and replayed, so that what Python and the launches cost is left out.

Elsewhere (in tests) they are called one by one and timed by the clock.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from time import perf_counter

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsec.formats.base import Packed
from sparsec.kernels import gpu, operator, operator_args
from sparsec.timing.turns import take_turns

ROTATE_BYTES = 1 << 29
"""Of copies of a weight that a contender walks through, so that each is cold in L2: eight times that of the largest GPUs."""
MAX_COPIES = 1024
"""As each is recorded. Of weights of less than 64 kB these do not fill the L2 cache of the largest GPUs, which then stay warm."""


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
            graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream(device)
            try:
                with torch.cuda.graph(graph):
                    for call in calls:
                        call()
            except BaseException:
                torch.cuda.set_stream(stream)  # where a recording fails, torch leaves its own
                raise
            self._graph = graph

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


def copies(nbytes: int, rotate_bytes: int) -> int:
    """Of a weight of so many bytes, for `rotate_bytes` in all."""
    return min(MAX_COPIES, max(1, -(-rotate_bytes // max(1, nbytes))))


def dense_calls(weight: Tensor, x: Tensor, rotate_bytes: int) -> list[Callable[[], Tensor]]:
    """`F.linear` by cold copies of a weight [out, in]."""
    return [partial(F.linear, x, weight.clone()) for _ in range(copies(weight.nbytes, rotate_bytes))]


def packed_calls(packed: Packed, x: Tensor, rotate_bytes: int) -> list[Callable[[], Tensor]]:
    """The product by cold copies of a packed weight."""
    calls: list[Callable[[], Tensor]] = []
    for _ in range(copies(packed.nbytes, rotate_bytes)):
        tensors = {name: t.clone() for name, t in packed.tensors().items()}
        twin = type(packed).from_parts(tensors, packed.scalars())
        if x.is_cuda:  # as a model calls it
            calls.append(partial(operator(twin), x, *operator_args(twin, None)))
        else:
            calls.append(partial(gpu.product, x, twin, None))
    return calls


def read_seconds(device: torch.device, nbytes: int) -> float:
    """Of plain reading, the best of some sums over so many bytes, again and again."""
    memory = torch.ones(nbytes // 4, device=device)
    replay = Replay([memory.sum], device)
    return min(take_turns([replay.seconds], 5, warm_up=0)[0])
