"""Launches of Triton kernels: what one is, where it goes, and over how many programs it is spread. Imports no triton."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

FEW = 16
"""Rows of x that are multiplied by packed weights one by one; more go through tiles or an expanded matrix."""
MANY = 64
"""Rows of x from which on a bitmap is expanded once instead of once for every tile of rows."""
PROGRAMS = 8
"""Programs for each multiprocessor that a product should have, so that memory latency is hidden."""


@dataclass(frozen=True)
class Config:
    """What a kernel is compiled with."""

    constants: Mapping[str, int]
    warps: int = 4
    stages: int = 2


_picked: dict[str, int] = {}
"""By bucket: which of its configurations is taken, where another one than the first was found to be faster."""
_asked: dict[str, int] = {}
"""How many configurations each bucket has that was asked for."""


def pick(bucket: str, configs: Sequence[Config]) -> Config:
    """The configuration for a bucket, such as "csr16 1": a kernel and how many rows of x it takes."""
    _asked[bucket] = len(configs)
    return configs[min(_picked.get(bucket, 0), len(configs) - 1)]


def take_asked() -> dict[str, int]:
    """How many configurations each bucket has that was asked for since the last such question."""
    found = dict(_asked)
    _asked.clear()
    return found


def preferred() -> dict[str, int]:
    """What `prefer` was told."""
    return dict(_picked)


def prefer(found: Mapping[str, int]) -> None:
    """From now on takes these configurations, by bucket; all others are the first."""
    _picked.clear()
    _picked.update(found)


@dataclass(frozen=True)
class Launch:
    """One call of a kernel."""

    kernel: Any  # triton.JITFunction
    grid: tuple[int, ...]
    arguments: Mapping[str, Tensor | int]
    constants: Mapping[str, Any]
    config: Config
    elements: int = 0  # stored weights, or positions of a bitmap, that a program takes in one turn of its loop
    choices: Sequence[Config] = ()  # among which the configuration was picked; empty where there is but one

    def run(self) -> None:
        """Starts it on the device of its first tensor; waits for nothing. Under `recording` it is only written down."""
        if _recorded is not None:
            _recorded.append(self)
            return
        device = next(a.device for a in self.arguments.values() if isinstance(a, Tensor))
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            self.kernel[self.grid](**self.keywords())

    def keywords(self) -> dict[str, Any]:
        """Everything that the kernel takes."""
        # Fusing is set: what it is by default differs between releases.
        options = {"num_warps": self.config.warps, "num_stages": self.config.stages, "enable_fp_fusion": True}
        return {**self.arguments, **self.constants, **self.config.constants, **options}


_recorded: list[Launch] | None = None


@contextmanager
def recording() -> Iterator[list[Launch]]:
    """Launches go into the list instead of to a device; for compiling ahead of time."""
    global _recorded
    _recorded = []
    try:
        yield _recorded
    finally:
        _recorded = None


def interpreted() -> bool:
    """Whether Triton's interpreter takes the place of a GPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Of a CUDA device; elsewhere a number that makes tests take the same ways."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


@functools.cache
def shared_memory(device: torch.device) -> int:
    """Bytes that a program can have on a CUDA device; elsewhere those of the smallest that kernels are compiled for, sm_80."""
    if device.type == "cuda":
        properties: Any = torch.cuda.get_device_properties(device)
        return int(properties.shared_memory_per_block_optin)
    return 163 << 10


def fitting(configs: Sequence[Config], stage_bytes: int, device: torch.device) -> tuple[Config, ...]:
    """The same configurations with as many stages as the device has room for: of n, n - 1 keep their tiles in shared memory."""
    most = 1 + shared_memory(device) // stage_bytes
    return tuple(replace(config, stages=min(config.stages, most)) for config in configs)


def splits(device: torch.device, programs: int, turns: int) -> int:
    """Into how many programs to split each one's `turns` of its loop (at least 2 for each), so that the device is full: 1 to 16."""
    wanted, found = PROGRAMS * multiprocessors(device), 1
    while found < 16 and programs * found < wanted and turns // (2 * found) >= 2:
        found *= 2
    return found


def rows_at_once(tokens: int) -> int:
    """Rows of x that a program takes: 1, 2, 4 or 8."""
    return min(8, 1 << (tokens - 1).bit_length())
