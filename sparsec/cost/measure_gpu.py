"""The constants of the kernels on a GPU: products by cold and by warm weights, recorded in CUDA graphs and timed by events.

Launches from Python take longer than most products of decoding. They are left out here: whoever wants the speed of the kernels
records the decoding of a token, or compiles it, and then pays for a launch what a graph pays for it.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sparsec.cost.fit import Timed, fit
from sparsec.cost.model import KernelCost, ReadRate, Work
from sparsec.formats.base import Packed
from sparsec.formats.layout import Layout
from sparsec.kernels import Kernel, Problem, known
from sparsec.kernels.gpu import semi_structured as gpu_semi_structured
from sparsec.progress import Progress, each_of
from sparsec.timing.replay import ROTATE_BYTES, Replay, dense_calls, packed_calls, read_seconds
from sparsec.timing.turns import take_turns

MEASURING = "measuring the GPU"


@dataclass(frozen=True)
class Sizes:
    """What is timed; the defaults are for a GPU, tests take smaller ones."""

    layouts: tuple[Layout, ...] | None = None  # None: all whose constants are wanted
    cold: tuple[tuple[int, int], ...] = (
        *((1024, 1024), (4096, 1024), (1024, 4096), (4096, 4096)),
        *((11008, 4096), (4096, 11008)),
    )
    warm: tuple[tuple[int, int], ...] = ((1024, 1024), (2048, 1024), (2048, 2048))  # an L2 cache holds them
    many: tuple[tuple[int, int], ...] = ((4096, 4096), (11008, 4096), (4096, 11008))
    densities: tuple[float, ...] = (0.5, 0.3, 0.1)  # of `many`, one for each shape
    rows: tuple[int, ...] = (2, 4, 8, 16, 64, 512)
    reads: tuple[int, ...] = tuple(1 << n for n in range(20, 31, 2))  # bytes
    rotate_bytes: int = ROTATE_BYTES
    again: int = 32  # calls by a warm weight
    rounds: int = 5


def measure_reads(device: torch.device, sizes: Sizes, progress: Progress | None = None) -> tuple[ReadRate, ...]:
    """The roof of every level of memory; the last one is the memory itself."""
    todo = each_of(progress, f"{MEASURING}: reading", sizes.reads)
    return tuple(ReadRate(nbytes, read_seconds(device, nbytes) / nbytes) for nbytes in todo)


@torch.no_grad()
def measure_kernels(
    dtypes: Sequence[torch.dtype],
    device: torch.device,
    read_per_byte: float,
    sizes: Sizes,
    progress: Progress | None = None,
) -> list[KernelCost]:
    """The constants of every kernel that serves one of the dtypes on the device, and of cuBLAS."""
    todo = [
        *((shape, d, 1, False) for shape in sizes.cold for d in sizes.densities),
        *((shape, d, 1, True) for shape in sizes.warm for d in sizes.densities),
        *((shape, d, n, False) for shape, d in zip(sizes.many, sizes.densities, strict=True) for n in sizes.rows),
    ]
    generator = torch.Generator(device).manual_seed(0)
    found = []
    for dtype in dtypes:
        name = str(dtype).removeprefix("torch.")
        samples: dict[tuple[str, str], list[Timed]] = {}
        for shape, density, rows, warm in each_of(progress, f"{MEASURING}: timing kernels with {name}", todo):
            x = torch.ones(rows, shape[1], dtype=dtype, device=device)
            named = list(_trials(shape, density, x, warm, sizes, generator))
            times = take_turns([replay.seconds for *_, replay in named], sizes.rounds, warm_up=1)
            for (kernel, layout, work, _), own in zip(named, times, strict=True):
                sample = Timed(work, rows, statistics.median(own), warm)
                samples.setdefault((kernel, layout), []).append(sample)
        found += [fit(kernel, layout, name, own, read_per_byte) for (kernel, layout), own in samples.items()]
    return found


def _trials(
    shape: tuple[int, int], density: float, x: Tensor, warm: bool, sizes: Sizes, generator: torch.Generator
) -> Iterator[tuple[str, str, Work, Replay]]:
    """(kernel, format as it describes itself, work, calls) of all that multiply by a weight of that shape."""
    weight = torch.randn(shape, generator=generator, device=x.device).to(x.dtype)
    dense = dense_calls(weight, x, 0 if warm else sizes.rotate_bytes)
    yield "dense_torch", "dense", Work.dense(*shape, x.dtype), Replay(dense * (sizes.again if warm else 1), x.device)
    for kernel, packed in _packed(weight, density, sizes.layouts, generator, x.shape[0]):
        calls = packed_calls(packed, x, 0 if warm else sizes.rotate_bytes)
        label = Layout.of(packed).cost_family
        calls = calls * (sizes.again if warm else 1)
        replay = Replay(calls, x.device)
        # Asked once it has run: what a library refuses is known by then.
        serving = _kernel(packed, x.shape[0]) or kernel
        yield serving.name, label, Work.of(packed), replay
        if serving.name == gpu_semi_structured.NAME:  # and what other patterns have in its place
            with gpu_semi_structured.turned_off():
                other, replay = _kernel(packed, x.shape[0]) or kernel, Replay(calls, x.device)
            yield other.name, label, Work.of(packed), replay


def _packed(
    weight: Tensor, density: float, layouts: tuple[Layout, ...] | None, generator: torch.Generator, rows: int = 1
) -> Iterator[tuple[Kernel, Packed]]:
    """In every layout that has a kernel on a GPU for so many rows."""
    for layout in Layout.calibrated("cuda", 1 - density):
        if layouts is not None and layout not in layouts:
            continue
        packed = layout.pack(weight, layout.sample_mask((weight.shape[0], weight.shape[1]), 1 - density, generator))
        kernel = _kernel(packed, rows)
        if kernel is not None and not kernel.name.endswith("_reference"):
            yield kernel, packed


def _kernel(packed: Packed, rows: int) -> Kernel | None:
    """The one that serves so many rows on a GPU."""
    problem = replace(Problem.of(packed, rows), device="cuda")
    return next((k for k in known() if k.format == packed.format and not k.unsupported(problem)), None)
