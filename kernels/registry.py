"""Which kernel serves which problem: an explicit ordered table, the fastest first.

Kernels of one format share its operator. The dispatcher picks the implementation by device; this table says which one
that is, and why the others cannot.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch._ops import OpOverload

from sparsec.arguments import checked
from sparsec.errors import KernelError
from sparsec.formats import FORMATS, NM, WarpCSR
from sparsec.formats.base import Packed
from sparsec.kernels import gpu, gpu_semi_structured, loader
from sparsec.kernels.dense import dense_linear
from sparsec.kernels.ops import OPERATORS, has_native


@dataclass(frozen=True)
class Problem:
    """One product to be served. `tokens` guides the choice; every kernel serves any number of rows."""

    format: str
    out_features: int
    in_features: int
    tokens: int = 1
    dtype: torch.dtype = torch.float32
    device: str = "cpu"  # device type
    density: float = 0.5
    layout: str = ""  # the format with its parameters, such as csr8, where they are known

    @classmethod
    @checked
    def of(cls, packed: Packed, tokens: int = 1) -> Problem:
        """The problem that a packed matrix poses."""
        device = next(iter(packed.tensors().values())).device.type
        return cls(packed.format, *packed.shape, tokens, packed.dtype, device, 1.0 - packed.sparsity, packed.describe())

    def __str__(self) -> str:
        dtype, rows = str(self.dtype).removeprefix("torch."), f"{self.tokens} row{'s' * (self.tokens != 1)} of x"
        return f"{self.layout or self.format} of {self.out_features}x{self.in_features} in {dtype} on {self.device}, for {rows}"


@dataclass(frozen=True)
class Kernel:
    """One implementation of a format's operator."""

    name: str
    format: str
    op: OpOverload
    dtypes: tuple[torch.dtype, ...]
    devices: tuple[str, ...] | None  # None: every device
    missing: Callable[[], list[str]]
    refuses: Callable[[Problem], str] = lambda problem: ""  # why not, where it is not format, type or device

    def available(self) -> list[str]:
        """Why it cannot run on this machine; empty when it can. May build the native library."""
        return self.missing()

    def unsupported(self, problem: Problem) -> list[str]:
        """Why it cannot serve the problem; empty when it can."""
        reasons = []
        if problem.format != self.format:
            reasons.append(f"serves format {self.format}, not {problem.format}")
        if problem.dtype not in self.dtypes:
            names = ", ".join(str(d).removeprefix("torch.") for d in self.dtypes)
            reasons.append(f"serves {names}, not {str(problem.dtype).removeprefix('torch.')}")
        if self.devices is not None and problem.device not in self.devices:
            reasons.append(f"runs on {', '.join(self.devices)}, not {problem.device}")
        if not reasons and (reason := self.refuses(problem)):
            reasons.append(reason)
        # Last, and only where it matters, since asking may start a build.
        return reasons or self.available()


def native_missing(operator_name: str) -> Callable[[], list[str]]:
    """Asks why the native library does not serve an operator; empty when it does. Asking loads, and may build, it."""

    def reasons() -> list[str]:
        status = loader.status()
        if status.reason is not None:
            return [status.reason]
        if not has_native(operator_name):
            return [f"{status.path} has no {operator_name}; build it again with python -m sparsec.kernels.build"]
        return []

    return reasons


def _of_format(kind: type[Packed]) -> tuple[Kernel, ...]:
    """The kernels of a format and their slow twin."""
    name, op = kind.format, OPERATORS[kind.format]
    triton = Kernel(
        *(f"{name}_triton", name, op, kind.dtypes, ("cuda",), gpu.missing),
        refuses=lambda problem: gpu.unsupported(problem.layout, problem.dtype),
    )
    if kind is WarpCSR:  # a layout for warps: elsewhere csr serves
        return (triton, Kernel(f"{name}_reference", name, op, kind.dtypes, ("cuda",), list))
    return (
        Kernel(f"{name}_cpu", name, op, kind.dtypes, ("cpu",), native_missing(f"{name}_linear")),
        *([_semi_structured(op)] if kind is NM else []),
        triton,
        Kernel(f"{name}_reference", name, op, kind.dtypes, None, list),
    )


def _semi_structured(op: OpOverload) -> Kernel:
    """Of 2:4: what takes many rows of x to the library for it, and is reached through the Triton kernels."""

    def refuses(problem: Problem) -> str:
        shape = (problem.out_features, problem.in_features)
        return gpu_semi_structured.unsupported(problem.layout, problem.dtype, shape, problem.tokens)

    def reasons() -> list[str]:
        return gpu.missing() or gpu_semi_structured.missing()

    return Kernel(gpu_semi_structured.NAME, NM.format, op, gpu_semi_structured.DTYPES, ("cuda",), reasons, refuses)


_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

KERNELS: tuple[Kernel, ...] = (
    *(kernel for kind in FORMATS.values() for kernel in _of_format(kind)),
    Kernel("dense_cpu", "dense", dense_linear, _FLOATS, ("cpu",), native_missing("dense_linear")),
    Kernel("dense_torch", "dense", torch.ops.aten.linear.default, _FLOATS, None, list),
)


@checked
def select(problem: Problem, kernels: tuple[Kernel, ...] = KERNELS) -> Kernel:
    """The first kernel that serves the problem.

    When none does, KernelError lists every kernel of the format with its reasons, and all kernels where none is of that format.
    """
    refusals = []
    for kernel in [k for k in kernels if k.format == problem.format] or kernels:
        reasons = kernel.unsupported(problem)
        if not reasons:
            return kernel
        refusals.append(f"  {kernel.name}: {'; '.join(reasons)}")
    raise KernelError(f"no kernel serves {problem}:\n" + "\n".join(refusals))
