"""The machine and the versions that a number was measured on, and a block of them for bug reports."""

from __future__ import annotations

import os
import platform
import subprocess
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path

import torch

from sparsec.kernels import known, status


@dataclass(frozen=True)
class Machine:
    """Facts that a measurement depends on."""

    cpu: str
    isa: str  # the widest vector unit that torch sees
    cores: int  # that this process may use
    memory_bytes: int | None
    gpu: str | None
    system: str
    python: str
    versions: dict[str, str]  # by distribution; "missing" for an optional one that is not there
    commit: str | None  # of a checkout; "-dirty" where files differ
    threads: int  # of torch
    kernels: dict[str, str]  # by name: "ready", or why it cannot run here
    native: str  # the native library in words
    load: float | None  # runnable processes over the last minute


PACKAGES = (
    "sparsec",
    "torch",
    "triton",
    "transformers",
    "tokenizers",
    "safetensors",
    "numpy",
    "gguf",
    "accelerate",
    "datasets",
)


def machine() -> Machine:
    """Of this process, now. May build the native kernels."""
    return Machine(
        cpu=cpu_name(),
        isa=torch.backends.cpu.get_cpu_capability(),
        cores=cores(),
        memory_bytes=memory_bytes(torch.device("cpu")),
        gpu=torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        python=platform.python_version(),
        versions={name: _version(name) for name in PACKAGES},
        commit=_commit(),
        threads=torch.get_num_threads(),
        kernels={kernel.name: "; ".join(kernel.available()) or "ready" for kernel in known()},
        native=_native(),
        load=load_average(),
    )


def gpu_clock() -> str:
    """Of the GPU's multiprocessors, as the driver says at this moment."""
    try:
        return f"SM {torch.cuda.clock_rate()} MHz"
    except Exception as error:  # it asks the driver through a package with errors of its own
        return f"unknown ({str(error).partition(chr(10))[0]})"


def _native() -> str:
    found = status()
    if found.reason is not None:
        return f"not built: {found.reason}"
    return f"built with {found.compiler or 'a compiler that is not known'}, runs {found.isa}"


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "missing"


def cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def load_average() -> float | None:
    """Processes that ran or waited over the last minute; None where the system does not tell."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def cpu_name() -> str:
    """The processor as it names itself."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(errors="replace").splitlines():
            if line.lower().startswith(("model name", "cpu model")):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def memory_bytes(device: torch.device) -> int | None:
    """Of the machine, or of a GPU; None where the system does not tell."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):  # Windows has no sysconf, others may lack the name
        return None


@cache
def _commit() -> str | None:
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        return None
