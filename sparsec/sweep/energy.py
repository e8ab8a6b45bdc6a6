"""Energy of a decoded token, where the machine tells: by RAPL's counters of the processor, or by NVML's of a GPU."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

POWERCAP = Path("/sys/class/powercap")
LEAST = 2.0
"""Seconds of decoding: the counters move in steps."""


class EnergyMeter:
    """Reads the counter of a type of device. `absent` says why there is none; then nothing is measured, and nothing guessed."""

    def __init__(self, device: str, powercap: Path = POWERCAP) -> None:
        self._counters: list[Path] = []
        self._gpu: Any = None
        if device == "cuda":
            self.absent = self._find_gpu()
        else:
            self.absent = self._find_packages(powercap)

    def joules(self) -> float:
        """Of the counter: only differences mean something."""
        if self._gpu is not None:
            pynvml, handle = self._gpu
            return float(pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)) / 1e3
        return sum(int(counter.read_text("ascii")) for counter in self._counters) / 1e6

    @torch.no_grad()
    def per_token(self, model: Any, prompt: torch.Tensor, new_tokens: int) -> float | None:
        """Millijoules of the whole package or GPU, idle share included, per token of generation; None where nothing tells."""
        if self.absent:
            return None
        count, start = 0, perf_counter()
        before = self.joules()
        while perf_counter() - start < LEAST:
            count += (
                model.generate(prompt, max_new_tokens=new_tokens, do_sample=False, pad_token_id=0).shape[1]
                - prompt.shape[1]
            )
        spent = self.joules() - before
        return 1e3 * spent / count if spent > 0 else None  # below 0 a counter began anew

    def _find_packages(self, powercap: Path) -> str:
        # intel-rapl:0 is a package; intel-rapl:0:0 is a part of it, and intel-rapl-mmio:0 the same package once more.
        found = powercap.glob("*/energy_uj")
        self._counters = sorted(c for c in found if c.parent.name.count(":") == 1 and "mmio" not in c.parent.name)
        if not self._counters:
            return f"not available: {powercap} has no counter of energy (RAPL) on this machine"
        try:
            self.joules()
        except (OSError, ValueError) as error:
            self._counters = []
            return f"not available: {getattr(error, 'filename', powercap)} cannot be read ({error}); it is for root on most systems"
        return ""

    def _find_gpu(self) -> str:
        try:
            pynvml = import_module("pynvml")
            pynvml.nvmlInit()
            self._gpu = pynvml, pynvml.nvmlDeviceGetHandleByIndex(torch.cuda.current_device())
            self.joules()
        except Exception as error:  # the package is not there, or one of its own errors
            self._gpu = None
            return f"not available: NVML does not tell ({type(error).__name__}: {error})"
        return ""
