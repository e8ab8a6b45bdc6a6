"""Which products are timed on a machine, and the constants that come of them.

Small and large, wide and tall, at three densities for one row; fewer for many rows. A matrix is packed once for all dtypes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from sparsec.cost.fit import Timed, fit
from sparsec.cost.model import KernelCost, ReadRate
from sparsec.cost.trials import (
    Trial,
    dense_trial,
    packed_trial,
    time_cold,
    time_member,
    time_read,
    time_walk,
    time_warm,
)
from sparsec.formats.base import Packed
from sparsec.formats.layout import Layout
from sparsec.kernels import Kernel, Problem, known
from sparsec.kernels.dense import NAME as DENSE_OPERATOR
from sparsec.kernels.dense import native_serves
from sparsec.kernels.modules.dense_linear import DTYPES as DENSE_DTYPES
from sparsec.kernels.modules.dense_linear import DenseLinear
from sparsec.progress import Progress, each_of
from sparsec.timing.arena import Arena

MEASURING = "measuring the machine"
DENSITIES = (0.5, 0.3, 0.1)
SHAPES = ((192, 576), (576, 576), (576, 1536), (1536, 576), (2048, 768), (768, 3072))
COLD = (
    *((shape, d) for shape in SHAPES for d in DENSITIES),
    ((2048, 2048), 0.4),
)
WARM = tuple((shape, d) for shape in ((64, 1024), (256, 512), (512, 1024)) for d in DENSITIES)
MANY = (((576, 1536), 0.5), ((1536, 576), 0.1), ((2048, 768), 0.3))
MANY_ROWS = (2, 4, 8, 32, 128, 512)
WALK_ROUNDS, MEMBER_ROUNDS = 40, 60
READS = tuple(1 << n for n in range(18, 31, 2))  # bytes
MEASURED_BYTES = READS[-1] + (1 << 26)
"""Held at the worst moment of a measurement: by the largest read. Packed matrices of three dtypes are less."""


def measure_reads(progress: Progress | None = None) -> tuple[ReadRate, ...]:
    """The roof of every level of memory; the last one is the memory itself."""
    return tuple(time_read(nbytes) for nbytes in each_of(progress, f"{MEASURING}: reading", READS))


def measure_member(dtype: torch.dtype) -> float:
    """Seconds that a member of a group costs beside the work on its matrix."""
    arena = Arena()
    big = dense_trial("dense_torch", _as_it_is, 1024, 1024, dtype).make(arena)
    return time_member(MEMBER_ROUNDS, dtype, partial(big, torch.ones(1, 1024, dtype=dtype)))


def measure_kernels(
    dtypes: Sequence[torch.dtype], read_per_byte: float, progress: Progress | None = None
) -> list[KernelCost]:
    """The constants of every kernel on the CPU that is fast enough to be measured: the references are not."""
    arena, generator = Arena(), torch.Generator().manual_seed(0)
    samples: dict[tuple[str, str, torch.dtype], list[Timed]] = {}
    timers: list[tuple[tuple[tuple[int, int], float], Callable[..., list[Timed]], int]] = [
        *((case, time_warm, 30) for case in WARM),
        *((case, partial(time_cold, rows=n), 5 if n < 128 else 3) for case in MANY for n in MANY_ROWS),
    ]
    packed: dict[Any, list[tuple[Kernel, Packed]]] = {
        (shape, d): list(_matrices(shape, d, generator)) for shape, d in COLD
    }
    for dtype in dtypes:
        walk = [c for case, found in packed.items() for c in _trials(case[0], found, dtype)]
        what = f"{MEASURING}: walking through {str(dtype).removeprefix('torch.')} layers"
        for trial, sample in zip(walk, time_walk(walk, arena, WALK_ROUNDS, dtype, progress, what), strict=True):
            samples.setdefault((trial.kernel, trial.format, dtype), []).append(sample)
    for case, timer, rounds in each_of(progress, f"{MEASURING}: timing kernels", timers):
        if case not in packed:
            packed[case] = list(_matrices(case[0], case[1], generator))
        for dtype in dtypes:
            trials = _trials(case[0], packed[case], dtype)
            times = timer(trials, arena=arena, rounds=rounds, dtype=dtype)
            for trial, sample in zip(trials, times, strict=True):
                samples.setdefault((trial.kernel, trial.format, dtype), []).append(sample)
    return [fit(k, f, str(d).removeprefix("torch."), found, read_per_byte) for (k, f, d), found in samples.items()]


def _matrices(shape: tuple[int, int], density: float, generator: torch.Generator) -> Iterator[tuple[Kernel, Packed]]:
    for layout in Layout.calibrated("cpu", 1 - density):
        problem = Problem(layout.kind.format, *shape, layout=str(layout))
        serving = [k for k in known() if not k.name.endswith("_reference") and not k.unsupported(problem)]
        if serving:
            mask = layout.sample_mask(shape, 1 - density, generator)
            packed = layout.pack(mask.float(), mask)
            yield from ((kernel, packed) for kernel in serving)


def _trials(shape: tuple[int, int], packed: Sequence[tuple[Kernel, Packed]], dtype: torch.dtype) -> list[Trial]:
    found = [dense_trial("dense_torch", _as_it_is, *shape, dtype)]
    if dtype in DENSE_DTYPES and native_serves(DENSE_OPERATOR):
        found.append(dense_trial("dense_cpu", DenseLinear, *shape, dtype))
    return found + [packed_trial(k.name, p, dtype) for k, p in packed if dtype in k.dtypes]


def _as_it_is(linear: nn.Linear) -> nn.Module:
    return linear
