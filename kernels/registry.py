"""Which kernel serves which problem: an explicit ordered table, the fastest first. What `select` returns is what runs.

Every format has one operator, so that graphs hold the same names everywhere. Its implementations ask this table (`dispatch`). The
native library is the one that is not asked about at every call: where no package offers a kernel for the CPU, it is the first of
its format there, and torch goes to it at once.

A package offers a kernel by an entry point of the group `sparsec.kernels` that names a `Kernel`:

    [project.entry-points."sparsec.kernels"]
    my_kernel = "my_package.my_module:MY_KERNEL"

Those offered come before sparsec's own of their format; `refuses` says what they are not for.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsec import private
from sparsec.arguments import checked
from sparsec.errors import KernelError, OfferedError, SparsecError
from sparsec.formats import BSR, CSR, NM, QUANTISED, Bitmap, WarpCSR, kinds
from sparsec.formats.base import Packed
from sparsec.formats.layout import for_device
from sparsec.formats.parts import DENSE, Part, flatten
from sparsec.kernels import gpu
from sparsec.kernels.gpu import semi_structured as gpu_semi_structured
from sparsec.kernels.library import loader
from sparsec.kernels.reference import check_call, dense_product
from sparsec.offered import offered

ENTRY_POINTS = "sparsec.kernels"

Answer = TypeVar("Answer", str, list[str])


@dataclass(frozen=True)
class Problem:
    """One product to be served. `tokens` guides the choice; every kernel serves any number of rows."""

    format: str
    out_features: int
    in_features: int
    tokens: int = 1
    dtype: torch.dtype = torch.float32
    device: str = "cpu"  # device type
    layout: str = ""  # the format with its parameters, such as csr8, where they are known

    @classmethod
    @checked
    def of(cls, packed: Packed, tokens: int = 1) -> Problem:
        """The problem that a packed matrix poses."""
        return cls(packed.format, *packed.shape, tokens, packed.dtype, packed.values.device.type, packed.describe())

    def __str__(self) -> str:
        dtype, rows = str(self.dtype).removeprefix("torch."), f"{self.tokens} row{'s' * (self.tokens != 1)} of x"
        return f"{self.layout or self.format} of {self.out_features}x{self.in_features} in {dtype} on {self.device}, for {rows}"


def always() -> list[str]:
    """Of a kernel that can run on every machine."""
    return []


def serves_all(problem: Problem) -> str:
    """Of a kernel that refuses no problem of its format, types and devices."""
    return ""


def _holds(values: object, kind: type) -> bool:
    return isinstance(values, tuple) and bool(values) and all(isinstance(value, kind) for value in values)


@dataclass(frozen=True, eq=False)
class Kernel:
    """One way to multiply by the packed matrices of a format: what it accepts, and how it is run."""

    name: str
    format: str
    dtypes: tuple[torch.dtype, ...]
    devices: tuple[str, ...] | None  # None: every device
    run: Callable[[Tensor, Any, Tensor | None], Tensor]
    """(x [..., in], packed matrix or dense weight, bias or None) -> [..., out]. They fit each other by then."""
    missing: Callable[[], list[str]] = always  # why it cannot run on this machine
    refuses: Callable[[Problem], str] = serves_all  # why not, where it is not format, type or device

    def __post_init__(self) -> None:
        """KernelError for what is of another kind than it must be."""
        rows = {
            "name and format must be words": all(isinstance(t, str) and t for t in (self.name, self.format)),
            "dtypes must be a tuple of torch.dtype": _holds(self.dtypes, torch.dtype),
            "devices must be None or a tuple of device types": self.devices is None or _holds(self.devices, str),
            "run, missing and refuses must be functions": all(map(callable, (self.run, self.missing, self.refuses))),
        }
        if faults := [rule for rule, held in rows.items() if not held]:
            raise KernelError(f"the kernel {self.name!r}: {'; '.join(faults)}")

    def available(self) -> list[str]:
        """Why it cannot run on this machine; empty when it can. May build the native library."""
        return self._answer("missing", [])

    def unfit(self, problem: Problem) -> list[str]:
        """Why the problem is not for it, whatever the machine; empty when it is."""
        reasons = []
        if problem.format != self.format:
            reasons.append(f"serves format {self.format}, not {problem.format}")
        if problem.dtype not in self.dtypes:
            names = ", ".join(str(d).removeprefix("torch.") for d in self.dtypes)
            reasons.append(f"serves {names}, not {str(problem.dtype).removeprefix('torch.')}")
        if self.devices is not None and problem.device not in self.devices:
            reasons.append(f"runs on {', '.join(self.devices)}, not {problem.device}")
        if not reasons and (reason := self._answer("refuses", "", problem)):
            reasons.append(reason)
        return reasons

    def _answer(self, question: str, kind: Answer, *about: Any) -> Answer:
        """What refuses or missing says; where it raises or says no such thing, that, after a warning: it serves nothing then.

        Sparsec's own raise what the user must mend, such as an unsafe cache folder or an unknown SPARSEC_ISA: that goes through.
        """
        asked = getattr(self, question)
        try:
            found: Answer = asked(*about)
            if isinstance(found, type(kind)):
                return found
            fault = f"must give a {type(kind).__name__}, got {found!r}"
        except Exception as error:  # whatever a stranger's code raises
            if isinstance(error, SparsecError) and str(getattr(asked, "__module__", "")).startswith("sparsec."):
                raise
            fault = f"raised {type(error).__name__}: {error}"
        warnings.warn(f"the kernel {self.name!r} is left out: its {question} {fault}", stacklevel=3)
        said: Any = f"its {question} {fault}"
        answer: Answer = said if isinstance(kind, str) else [said]
        return answer

    def unsupported(self, problem: Problem) -> list[str]:
        """Why it cannot serve the problem here; empty when it can."""
        # The machine last, and only where it matters, since asking may start a build.
        return self.unfit(problem) or self.available()


def native_missing(operator_name: str) -> Callable[[], list[str]]:
    """Asks why the native library does not serve an operator; empty when it does. Asking loads, and may build, it."""

    def reasons() -> list[str]:
        status = loader.status()
        if status.reason is not None:
            return [status.reason]
        if not loader.has_native(operator_name):
            return [f"{status.path} has no {operator_name}; build it again with python -m sparsec.kernels.build"]
        return []

    return reasons


def _native(x: Tensor, packed: Packed, bias: Tensor | None) -> Tensor:
    part = Part(packed.format, tuple(packed.tensors().values()), bias, tuple(packed.scalars().values()))
    with private.below_autograd():
        out: Tensor = torch.ops.sparsec.inference_single(x, *flatten([part]))
    return out


def _reference(x: Tensor, packed: Packed, bias: Tensor | None) -> Tensor:
    return dense_product(x, packed.exact(), bias)


def _dense(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    out: Tensor = torch.ops.sparsec.dense_linear(x, weight, bias)
    return out


def _on_cpu(kind: type[Packed]) -> Kernel:
    """The native library's, of a format that has its header there."""
    name = kind.format
    return Kernel(f"{name}_cpu", name, kind.dtypes, ("cpu",), _native, native_missing(f"{name}_linear"))


def _on_gpu(kind: type[Packed]) -> Kernel:
    """Triton's, of a format that has its file in gpu/."""

    def refuses(problem: Problem) -> str:
        return gpu.unsupported(problem.layout, problem.dtype)

    return Kernel(f"{kind.format}_triton", kind.format, kind.dtypes, ("cuda",), gpu.product, gpu.missing, refuses)


def reference_kernel(kind: type[Packed]) -> Kernel:
    """The last of every format: expands the matrix and multiplies, on every device that the format is laid out for."""
    return Kernel(f"{kind.format}_reference", kind.format, kind.dtypes, kind.devices, _reference)


def _semi_structured() -> Kernel:
    """Of 2:4: takes many rows of x to the library for it."""

    def refuses(problem: Problem) -> str:
        shape = (problem.out_features, problem.in_features)
        return gpu_semi_structured.unsupported(problem.layout, problem.dtype, shape, problem.tokens)

    def reasons() -> list[str]:
        return gpu.missing() or gpu_semi_structured.missing()

    name, dtypes = gpu_semi_structured.NAME, gpu_semi_structured.DTYPES
    return Kernel(name, NM.format, dtypes, ("cuda",), gpu.cusparselt, reasons, refuses)


_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

KERNELS: tuple[Kernel, ...] = (
    *(_on_cpu(CSR), _on_gpu(CSR)),
    *(_on_cpu(Bitmap), _on_gpu(Bitmap)),
    *(_on_cpu(BSR), _on_gpu(BSR)),
    *(_on_cpu(NM), _semi_structured(), _on_gpu(NM)),
    _on_gpu(WarpCSR),
    *(_on_cpu(QUANTISED[name]) for name in ("dense", "bitmap", "nm", "bsr", "csr")),
    *(_on_gpu(QUANTISED[name]) for name in gpu.CODED),
    *(reference_kernel(kind) for kind in kinds().values()),
    Kernel("dense_cpu", DENSE, _FLOATS, ("cpu",), _dense, native_missing("dense_linear")),
    Kernel("dense_torch", DENSE, _FLOATS, None, F.linear),
)
"""Sparsec's own."""
added: list[Kernel] = []
"""By `add`, the last one first."""
added_to: list[Callable[[str], None]] = []
"""Called with the format of a kernel that was added."""


@checked
def add(kernel: Kernel) -> None:
    """Puts a kernel before all others of its format, for models too that are lowered already. KernelError for a taken name.

    What torch.compile(backend="sparsec") has compiled by then keeps its kernels until it is compiled again.
    """
    if any(k.name == kernel.name for k in known()):
        raise KernelError(f"the name {kernel.name!r} is taken by another kernel; give yours one of its own")
    added.insert(0, kernel)
    _table.cache_clear()
    for follow in added_to:
        follow(kernel.format)


def known() -> tuple[Kernel, ...]:
    """Every kernel, in the order in which they are asked: those of other packages, then sparsec's own."""
    return _table(tuple(kinds()))


@functools.cache
def _table(formats: tuple[str, ...]) -> tuple[Kernel, ...]:
    own = {kernel.format for kernel in KERNELS}
    references = [reference_kernel(kinds()[name]) for name in formats if name not in own]
    return (*others(), *KERNELS, *references)


@functools.cache
def _offered() -> tuple[Kernel, ...]:
    found: dict[str, Kernel] = {}
    for what, kernel in offered(ENTRY_POINTS):
        if not isinstance(kernel, Kernel):
            warnings.warn(f"{what} is no sparsec.kernels.Kernel and is left out", stacklevel=2)
        elif kernel.name in found or any(k.name == kernel.name for k in KERNELS):
            warnings.warn(f"{what} is left out: the name of its kernel, {kernel.name!r}, is taken", stacklevel=2)
        else:
            found[kernel.name] = kernel
    return tuple(found.values())


def others() -> tuple[Kernel, ...]:
    """The kernels of other packages."""
    return (*added, *_offered())


def foreign(format_name: str, device: str) -> bool:
    """Whether a package offers a kernel for a format on a type of device."""
    return any(k.format == format_name and (k.devices is None or device in k.devices) for k in others())


@checked
def select(problem: Problem, kernels: tuple[Kernel, ...] | None = None) -> Kernel:
    """The first kernel that serves the problem here; kernels: among which, all known ones by default.

    When none does, KernelError lists every kernel of the format with its reasons, and all kernels where none is of that format.
    """
    table = known() if kernels is None else kernels
    for kernel in _fitting(problem, table):
        if not kernel.available():  # which may change: a library that refused once is not asked again
            return kernel
    listed = [k for k in table if k.format == problem.format] or table
    refusals = [f"  {kernel.name}: {'; '.join(kernel.unsupported(problem))}" for kernel in listed]
    raise KernelError(f"no kernel serves {problem}:\n" + "\n".join(refusals))


@functools.lru_cache(4096)
def _fitting(problem: Problem, kernels: tuple[Kernel, ...]) -> tuple[Kernel, ...]:
    return tuple(kernel for kernel in kernels if not kernel.unfit(problem))


def dispatch(x: Tensor, packed: Packed, bias: Tensor | None) -> Tensor:
    """x [..., in] @ W.T + bias -> [..., out] by the kernel that `select` names. KernelError for arguments that do not fit.

    A matrix that is laid out for another kind of machine, and has no kernel here, is laid out anew at every call.
    """
    check_call(x, packed, bias)
    tokens = math.prod(x.shape[:-1])
    try:
        kernel = select(Problem.of(packed, tokens))
    except KernelError:
        there = for_device(packed, x.device.type)
        if there is packed:
            raise
        return dispatch(x, there, bias)
    if x.device.type == "cuda" and kernel.run is _reference:
        gpu.warn_of_reference(packed)
    return _run(kernel, x, packed, bias)


def _run(kernel: Kernel, x: Tensor, packed: Packed, bias: Tensor | None) -> Tensor:
    """OfferedError, naming the kernel, where one of another package raises or gives another shape."""
    shape = (*x.shape[:-1], packed.shape[0])
    try:
        out = kernel.run(x, packed, bias)
    except SparsecError:
        raise
    except Exception as error:
        if kernel not in others():
            raise
        raise OfferedError(f"the kernel {kernel.name!r} raised {type(error).__name__}: {error}") from error
    if not isinstance(out, Tensor) or out.shape != shape or out.dtype != x.dtype:
        got = f"{out.dtype} {list(out.shape)}" if isinstance(out, Tensor) else repr(out)
        raise OfferedError(f"the kernel {kernel.name!r} must give {x.dtype} {list(shape)}, got {got}")
    return out
