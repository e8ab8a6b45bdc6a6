"""Products on a GPU: when Triton kernels can serve them, and how a product reaches the kernel of its format.

Triton is imported by the first product on a CUDA device and not before; without it, and on devices that it does not serve, the
reference computes, and one warning says why. With TRITON_INTERPRET=1 the kernels run on CPU tensors, in Python: for tests.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import json
import math
import re
import warnings
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsec import cache
from sparsec.errors import CacheError, KernelError
from sparsec.formats.base import Packed
from sparsec.formats.layout import Layout
from sparsec.formats.nm import NM
from sparsec.kernels.gpu import launch as gpu_launch
from sparsec.kernels.gpu import semi_structured as gpu_semi_structured

OLDEST = (8, 0)
"""The compute capability from which on a device is served: Ampere."""
MAX_OFFSET = 2**31 - 1
"""Kernels count elements in int32."""
LARGEST_BLOCK = 128
CODED = ("bitmap", "nm", "wcsr")
"""The positions whose quantised values have a Triton kernel."""


@functools.cache
def missing() -> list[str]:
    """Why Triton kernels cannot run on this machine's GPU; empty when they can."""
    if importlib.util.find_spec("triton") is None:
        return ['triton is not installed; run `pip install "sparsec[triton]"`']
    if not torch.cuda.is_available():
        return ["torch sees no CUDA device"]
    if torch.version.hip is not None:
        return ["the kernels are written for CUDA, and this torch is built for ROCm"]
    capability = torch.cuda.get_device_capability()
    if capability < OLDEST:
        name = torch.cuda.get_device_name()
        return [
            f"{name} has compute capability {capability[0]}.{capability[1]}, below the {OLDEST[0]}.{OLDEST[1]} served; "
            "move the model to the CPU, which has kernels for it"
        ]
    return []


@functools.cache  # asked at every product
def unsupported(layout: str, dtype: torch.dtype) -> str:
    """Why no Triton kernel serves a layout (such as csr16, `Packed.describe`) with values of a type, "" where one does."""
    if dtype == torch.float64:
        return "no Triton kernel multiplies float64"
    if layout == "csr8":
        return "csr8 has to be read from a row's first entry on; on a GPU use wcsr, which holds 8-bit columns too"
    found = Layout.parse(layout) if layout else None
    if found is not None and found.values and found.format not in CODED:
        return f"no Triton kernel multiplies {layout}; quantised values have one in {', '.join(CODED)}, as bitmap:{found.values}"
    block = found.options.get("block", ()) if found is not None else ()
    if max(block, default=0) > LARGEST_BLOCK:
        return f"{layout} has blocks of more than {LARGEST_BLOCK} rows or columns, which no multiprocessor's registers hold"
    return ""


def identity() -> tuple[str, str]:
    """The name and the compute capability, such as sm_90, of this machine's GPU; "none" twice where torch sees none."""
    if not torch.cuda.is_available():
        return "none", "none"
    return torch.cuda.get_device_name(), "sm_{}{}".format(*torch.cuda.get_device_capability())


def triton_version() -> str:
    """Of the installed triton; "none" without, "unknown" where it is distributed under another name."""
    if importlib.util.find_spec("triton") is None:
        return "none"
    try:
        return version("triton")
    except PackageNotFoundError:
        return "unknown"


def digest() -> str:
    """Of what the kernels are made from: their sources, the version of triton, and whether the library for 2:4 is there."""
    sources = [path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py"))]
    found = triton_version()
    library = "" if gpu_semi_structured.absent() else "cuSPARSELt"
    return hashlib.sha256(b"".join([*sources, found.encode(), library.encode()])).hexdigest()[:16]


def tuned_file() -> Path:
    """Where the configurations lie that were found to be the fastest on this machine's GPU: JSON, bucket -> number. CacheError."""
    name = re.sub(r"\W+", "-", identity()[0]).lower()
    return cache.folder() / f"gpu-{name}-{digest()}.json"


@functools.cache
def take_tuned() -> None:
    """Prefers the configurations of `tuned_file`, once in a process; a damaged file is named in a warning and not used."""
    try:
        file = tuned_file()
    except CacheError as error:
        warnings.warn(f"no tuned configurations are used: {error}", RuntimeWarning, stacklevel=2)
        return
    if not file.is_file():
        return
    try:
        found = json.loads(file.read_text())
        if not all(isinstance(k, str) and type(n) is int and n >= 0 for k, n in found.items()):
            raise ValueError("it does not map names to numbers")
    except (ValueError, RecursionError, AttributeError, OSError) as error:
        warnings.warn(
            f"{file} cannot be used: {error}; delete it, or tune again: python -m sparsec.bench --device cuda",
            stacklevel=2,
        )
        return
    gpu_launch.prefer(found)


def product(x: Tensor, packed: Packed, bias: Tensor | None) -> Tensor:
    """x [..., in] @ W.T + bias -> [..., out] by the Triton kernel of W's format; arguments are checked already.

    Raises KernelError where an offset would pass 32 bits.
    """
    take_tuned()
    return _flat(x, packed, bias, kernel_of(packed.format))


def cusparselt(x: Tensor, packed: NM, bias: Tensor | None) -> Tensor:
    """The same by cuSPARSELt, and by Triton where that takes no weight now: what it refuses is named, and not asked again."""

    def run(x: Tensor, packed: Any, bias: Tensor | None) -> Tensor:
        triton = import_module("sparsec.kernels.gpu.nm")
        found = gpu_semi_structured.linear(x, packed, bias, triton.expand)
        return kernel_of(NM.format)(x, packed, bias) if found is None else found

    return _flat(x, packed, bias, run)


def _flat(
    x: Tensor, packed: Packed, bias: Tensor | None, run: Callable[[Tensor, Any, Tensor | None], Tensor]
) -> Tensor:
    out_features, in_features = packed.shape
    tokens, shape = math.prod(x.shape[:-1]), (*x.shape[:-1], out_features)
    if not tokens * out_features:
        return x.new_empty(shape)
    if not in_features or not packed.values.numel():
        return x.new_zeros(shape) if bias is None else bias.expand(shape).clone()
    for name, count in (
        ("x", x.numel()),
        ("the result", tokens * out_features),
        ("the packed weight", largest(packed)),
    ):
        if count > MAX_OFFSET:
            raise KernelError(
                f"{packed.format}_linear: {name} has {count} elements, and the GPU kernels count to {MAX_OFFSET}; "
                + ("leave this layer dense" if "weight" in name else "give fewer rows at a time")
            )
    strided = [name for name, tensor in packed.tensors().items() if not tensor.is_contiguous()]
    if strided:
        raise KernelError(f"{packed.format}_linear: {strided[0]} has gaps in memory; call .contiguous() on it")
    bias = None if bias is None else bias.contiguous()
    return run(x.reshape(tokens, in_features).contiguous(), packed, bias).view(shape)


def largest(packed: Packed) -> int:
    """Elements of the largest tensor held."""
    return max(t.numel() for t in packed.tensors().values())


def kernel_of(format_name: str) -> Callable[[Tensor, Any, Tensor | None], Tensor]:
    """The function (x [tokens, in], packed, bias) -> [tokens, out] that launches the kernels of a format."""
    # Here and not above: importing them imports triton.
    found: Callable[[Tensor, Any, Tensor | None], Tensor] = getattr(
        import_module(f"sparsec.kernels.gpu.{format_name}"), format_name
    )
    return found


_warned: set[str] = set()


def warn_of_reference(packed: Packed) -> None:
    """One warning for each reason why the reference has to serve on a CUDA device."""
    reason = "; ".join(missing()) or unsupported(packed.describe(), packed.dtype)
    if reason and reason not in _warned:
        _warned.add(reason)
        warnings.warn(f"sparsec runs on its slow reference kernels on this GPU: {reason}", RuntimeWarning, stacklevel=3)
