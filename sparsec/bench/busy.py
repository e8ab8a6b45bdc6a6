"""A busy machine: layers in a row and passes, with nothing beside them and with one process that computes all the time.

The two states take turns, and in each of them dense and sparse layers do.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from time import sleep
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear

from sparsec.bench.models import random_model
from sparsec.compiler import compile
from sparsec.console.table import fitted, paragraph, terminal_width, times
from sparsec.formats import Bitmap
from sparsec.kernels import operator, operator_args
from sparsec.pipeline.base import PassRecord
from sparsec.progress import Progress, each_of
from sparsec.timing.turns import clocked, take_turns

SHAPES, LAYERS, SPARSITY = "1024x1024", 48, 0.5
MODEL_LAYERS = 3  # that passes run on
ROUNDS = 2  # of idle and busy, by turns
LEFT, LONGER = 0.75, 2.5  # what a busy machine has to leave of a speedup, and how many times as long a pass may take
PIPELINES = (
    "magnitude(0.5),freeze,sparsity,flops,fuse,lower(bitmap)",
    "magnitude(0.5, scope='row'),freeze,lower(csr)",
    "wanda(0.5)",
    "sparsegpt(0.5)",
)
_LOOP = """
import os, sys, threading
threading.Thread(target=lambda: (sys.stdin.read(), os._exit(0)), daemon=True).start()
while True:
    pass
"""
_SETTLE = 0.3  # seconds until the system has spread the processes


@dataclass(frozen=True)
class Products:
    """Median seconds of one walk through all layers, idle and busy."""

    shape: tuple[int, int]
    dtype: torch.dtype
    layers: int
    dense: tuple[float, float]
    sparse: tuple[float, float]

    @property
    def speedups(self) -> tuple[float, float]:
        """Of sparse against dense, idle and busy."""
        return self.dense[0] / self.sparse[0], self.dense[1] / self.sparse[1]

    @property
    def left(self) -> float:
        """Of the idle speedup, in the busy state."""
        return self.speedups[1] / self.speedups[0]


@dataclass(frozen=True)
class PassTime:
    """Seconds of one pass, idle and busy."""

    name: str
    idle: float
    busy: float

    @property
    def longer(self) -> float:
        """How many times as long it takes in the busy state."""
        return self.busy / self.idle


@contextmanager
def competitor(wanted: bool = True) -> Iterator[None]:
    """One process that computes all the time; it is ended however the block is left, and ends by itself with this process."""
    if not wanted:
        yield
        return
    # The pipe closes when this process ends in whatever way, and then a second thread of the child ends it.
    child = subprocess.Popen([sys.executable, "-c", _LOOP], stdin=subprocess.PIPE)
    try:
        sleep(_SETTLE)
        yield
    finally:
        child.kill()
        child.wait()
        if child.stdin is not None:
            child.stdin.close()


def products(
    shape: tuple[int, int], dtype: torch.dtype, layers: int, repeats: int, progress: Progress | None = None
) -> Products:
    """Layers with weights of their own, one row of x, bitmap at 50 %."""
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(shape, generator=generator).to(dtype) for _ in range(layers)]
    packed = [Bitmap.pack(w, torch.rand(shape, generator=generator) >= SPARSITY) for w in weights]
    sparse = [(operator(p), operator_args(p, None)) for p in packed]
    x = torch.randn(1, shape[1], generator=generator).to(dtype)

    def run_dense() -> None:
        for w in weights:
            linear(x, w)

    def run_sparse() -> None:
        for product, arguments in sparse:
            product(x, *arguments)

    seconds: dict[tuple[bool, bool], list[float]] = {}  # by busy and sparse
    for busy in each_of(progress, f"{shape[0]}x{shape[1]} idle and busy", (False, True) * ROUNDS):
        with competitor(busy):
            taken = take_turns([clocked(run_dense), clocked(run_sparse)], repeats, warm_up=1)
        for own, kind in zip(taken, (False, True), strict=True):
            seconds.setdefault((busy, kind), []).extend(own)
    found = {key: median(own) for key, own in seconds.items()}
    return Products(
        shape,
        dtype,
        layers,
        (found[False, False], found[True, False]),
        (found[False, True], found[True, True]),
    )


def pass_times(model: nn.Module, calibration: torch.Tensor, progress: Progress | None = None) -> list[PassTime]:
    """Every pass of PIPELINES, once under each spec: the faster of two runs, by turns idle and busy."""
    found: dict[str, PassTime] = {}
    for spec in each_of(progress, "passes idle and busy", PIPELINES):
        seconds: dict[tuple[str, bool], float] = {}
        for turn in range(2 * ROUNDS):
            busy = turn % 2 == 1
            for record in _records(model, spec, calibration, busy):
                before = seconds.get((record.spec, busy), record.seconds)
                seconds[record.spec, busy] = min(before, record.seconds)
        for name in dict.fromkeys(name for name, _ in seconds):
            found.setdefault(name, PassTime(name, seconds[name, False], seconds[name, True]))
    return list(found.values())


def small_model() -> tuple[nn.Module, torch.Tensor]:
    """A few layers as wide as SmolLM2's with random weights, and token ids to calibrate with."""
    model = random_model("smollm2-135m", torch.float32, MODEL_LAYERS)
    return model, torch.randint(0, model.config.vocab_size, (8, 128), generator=torch.Generator().manual_seed(0))


def _records(model: nn.Module, spec: str, calibration: torch.Tensor, busy: bool) -> tuple[PassRecord, ...]:
    with competitor(busy):
        done: Any = compile(model, spec, calibration=calibration if "magnitude" not in spec else None)
    records: tuple[PassRecord, ...] = done.sparsec.records
    return records


def text(walks: Sequence[Products], passes: Sequence[PassTime]) -> list[str]:
    """Two tables, and what is held against what."""
    layers = []
    for p in walks:
        name = f"{p.layers} x {p.shape[0]}x{p.shape[1]} {str(p.dtype).removeprefix('torch.')}"
        milliseconds = (f"{1e3 * s:.2f}" for pair in zip(p.dense, p.sparse, strict=True) for s in pair)
        layers.append([name, *milliseconds, *map(times, p.speedups), f"{p.left:.2f}", _met(p.left >= LEFT)])
    header = (
        *("layers, one row", "dense ms", "bitmap ms", "busy: dense ms", "bitmap ms", "speedup", "busy"),
        *("left of it", f"at least {LEFT}"),
    )
    costs = [[p.name, f"{p.idle:.3f}", f"{p.busy:.3f}", times(p.longer), _met(p.longer <= LONGER)] for p in passes]
    about = (
        "Busy: one other process computes all the time. Layers: medians of walks through all of them, dense (F.linear) and "
        "bitmap by turns. Passes: the faster of two runs. What is to be met is meant for two cores."
    )
    width = terminal_width()
    return [
        *fitted(header, layers, width, left=(0, 8)),
        "",
        *fitted(("pass", "idle s", "busy s", "longer", f"at most {LONGER}x"), costs, width, left=(0, 4)),
        "",
        *paragraph(about),
    ]


def _met(met: bool) -> str:
    return "met" if met else "not met"
