"""Seconds of phases: products and bytes by the cost model's constants, solves by solving some small layers on this machine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from time import perf_counter
from typing import ClassVar, Protocol, runtime_checkable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sparsec.calibrate import Statistics
from sparsec.cost.constants import Constants
from sparsec.cost.fit import non_negative
from sparsec.cost.phase import Attended, Phase
from sparsec.errors import ConstantsError
from sparsec.pipeline.base import Pass

TRIED = ((256, 256), (1024, 256), (256, 1024), (1024, 512), (1024, 1024), (64, 2048))
"""Rows and columns of the layers that are solved."""
_TOKENS = 64
_HEADS = 4


@runtime_checkable
class Solving(Protocol):
    """A pass that solves layers by what they are given. gram: whether it looks at the Gram matrix of that."""

    gram: ClassVar[bool]

    def attempt(self, matrix: Tensor, statistics: Statistics) -> object:
        """What a site of one matrix [out, in] takes."""


@dataclass
class TimeOf:
    """Times phases of passes. constants: of this machine, or of another that SPARSEC_CALIBRATION names."""

    constants: Constants
    _tried: dict[str, float] = field(default_factory=dict)
    _solves: dict[Pass, Callable[[int, int, int], float]] = field(default_factory=dict)

    def seconds(self, p: Pass, phase: Phase) -> float:
        """Of one phase."""
        bandwidth = self.constants.bandwidth
        if bandwidth is None:
            raise ConstantsError(
                "the cost model does not know how fast this machine reads; measure it with: sparsec cost"
            )
        if phase.seconds:
            return phase.seconds
        found = phase.moved / bandwidth + sum(work / self.rate(dtype) for dtype, work in phase.flops.items() if work)
        found += sum(work * self._attending(attended) for attended, work in phase.attention.items())
        if phase.solve is not None and isinstance(p, Solving):
            rows, columns = phase.solve
            if p not in self._solves:
                self._solves[p] = solve_seconds(p)
            found += self._solves[p](sum(rows), columns, max(rows))
        if phase.sample is not None:
            found += phase.sample.scale * self._trying(phase.sample.key, phase.sample.run)
        return found

    def _attending(self, attended: Attended) -> float:
        """Seconds of a FLOP, by some heads of one sequence."""
        x = torch.ones(1, _HEADS, attended.queries, attended.head, dtype=attended.dtype)
        seen = torch.ones(1, _HEADS, attended.keys, attended.head, dtype=attended.dtype)
        attend = partial(F.scaled_dot_product_attention, x, seen, seen, is_causal=attended.queries == attended.keys)
        return self._trying(str(attended), attend) / (4.0 * x.numel() * attended.keys)

    def _trying(self, key: str, run: Callable[[], object]) -> float:
        if key not in self._tried:
            self._tried[key] = _fastest(run)
        return self._tried[key]

    def rate(self, dtype: torch.dtype) -> float:
        """FLOPs a second of large dense products. ConstantsError where none were measured."""
        found = self.constants.peak(dtype)
        if found is None:
            raise ConstantsError(
                f"the cost model knows no dense products in {dtype}; measure them with: sparsec cost --force"
            )
        return found


def solve_seconds(p: Solving) -> Callable[[int, int, int], float]:
    """Seconds of a solve of a layer, from its rows, its columns and the rows of its largest matrix: non-negative multiples of
    columns^3, rows x columns^2, and rows x columns, fitted to what layers of the sizes in TRIED take here."""
    sizes = [(rows, columns) for rows, columns in TRIED if not columns % 16]
    times = []
    for rows, columns in sizes:
        statistics = _statistics(columns, p.gram)
        generator = torch.Generator().manual_seed(0)
        matrix = torch.randn(rows, columns, generator=generator)
        times.append(_fastest(partial(p.attempt, matrix, statistics)))
    terms = torch.tensor([[float(n) ** 3, r * float(n) ** 2, float(r) * n] for r, n in sizes], dtype=torch.float64)
    weighed = terms.numpy() / np.array(times)[:, None]
    factors: list[float] = non_negative(weighed, np.ones(len(times))).tolist()

    def seconds(rows: int, columns: int, _: int) -> float:
        work = (float(columns) ** 3, rows * float(columns) ** 2, float(rows) * columns)
        return sum(f * w for f, w in zip(factors, work, strict=True))

    return seconds


def _statistics(columns: int, gram: bool) -> Statistics:
    found = Statistics(columns, gram, _TOKENS, 64, torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    for _ in range(-(-columns // 512) + 1):
        found.add(torch.randn(512, columns, generator=generator))
    found.settle()
    return found


def _fastest(run: Callable[[], object], tries: int = 2) -> float:
    """Seconds of the fastest of some tries, after one that pays for what is made once."""
    times: Sequence[float] = [_timed(run) for _ in range(1 + tries)]
    return min(times[1:])


def _timed(run: Callable[[], object]) -> float:
    begun = perf_counter()
    run()
    return perf_counter() - begun
