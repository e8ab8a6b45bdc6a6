"""What a choice among formats and kernels may draw on: this machine's constants, and the kernels that a dense weight may have."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from sparsec.cost.choice import OWN, TORCH
from sparsec.cost.constants import Constants, machine_constants
from sparsec.cost.measure import MEASURED_BYTES, MEASURING
from sparsec.cost.phase import Phase
from sparsec.ir.facts import Weight
from sparsec.ir.graph import Graph
from sparsec.kernels import gpu, status
from sparsec.kernels.dense import NAME as DENSE_OPERATOR
from sparsec.kernels.dense import native_serves
from sparsec.kernels.modules.dense_linear import DTYPES
from sparsec.lowering.dense import no_dense_kernel
from sparsec.progress import Progress


def constants_for(
    graph: Graph, weights: Sequence[Weight], progress: Progress | None
) -> tuple[Constants | None, list[str]]:
    """The constants for the dtypes of these weights, measured first where nobody has, and what has to be said about it.

    None where times cannot be predicted: the model knows the native kernels on a CPU and the Triton kernels on a GPU. Raises
    ConstantsError for a file that SPARSEC_CALIBRATION names and that cannot be used.
    """
    if not weights:
        return None, []
    devices = sorted({graph.tensor(w.name).device.type for w in weights})
    reason = unpredicted(devices)
    if reason:
        return None, [f"formats are chosen by bytes: {reason}"]
    dtypes = list(dict.fromkeys(w.dtype for w in weights))
    found = machine_constants(dtypes, device=devices[0], progress=progress)
    assert found is not None
    names = {str(d).removeprefix("torch.") for d in dtypes} - found.constants.dtypes
    notes = list(found.notices)
    if names:
        notes.append(
            f"{found.source} says nothing of {', '.join(sorted(names))}: formats for those are chosen by bytes"
        )
    return found.constants, notes


def measuring(graph: Graph) -> Iterator[Phase]:
    """Measuring this machine, where nobody has: before a choice by times."""
    linear = [w for w in graph.weights.values() if graph.is_linear(w.name)]
    dtypes = list(dict.fromkeys(w.dtype for w in linear))
    if dtypes and not unpredicted(["cpu"]) and machine_constants(dtypes, measuring=False) is None:
        yield Phase(MEASURING, "once, and then kept", {"what is read and multiplied to measure it": MEASURED_BYTES})


def unpredicted(devices: Sequence[str]) -> str:
    """Why the cost model has nothing to say of products on these types of devices; "" where it has."""
    if len(devices) > 1:
        return f"weights are on {' and '.join(devices)}, and the cost model knows one device at a time"
    if devices[0] not in ("cpu", "cuda"):
        return f"the cost model knows the CPU and CUDA devices, and weights are on {devices[0]}"
    if devices[0] == "cuda":
        return "; ".join(gpu.missing())
    reason = status().reason
    return "" if reason is None else f"only native kernels are worth timing: {reason}"


def dense_kernels(graph: Graph, weight: Weight, unswappable: Mapping[str, str]) -> tuple[str, ...]:
    """The kernels that may serve it if it stays dense; the first one is what serves it if nothing is done."""
    if no_own_kernel(graph, weight.name, unswappable):
        return (TORCH,)
    # a part of a fused product is dense_linear's already
    return (OWN,) if any(op.members for op in graph.products_of(weight.name)) else (TORCH, OWN)


def no_own_kernel(graph: Graph, name: str, unswappable: Mapping[str, str]) -> str:
    """Why sparsec's dense kernel cannot serve a dense weight, "" where it can."""
    device, dtype = graph.tensor(name).device.type, graph.weights[name].dtype
    if device != "cpu":
        return f"sparsec has no dense kernel for {device}"
    if dtype not in DTYPES:
        return f"sparsec's dense kernel does not serve {str(dtype).removeprefix('torch.')}"
    if not native_serves(DENSE_OPERATOR):
        return f"sparsec's dense kernel is native code, which is not there: {status().reason or 'it was built without'}"
    if any(op.members for op in graph.products_of(name)):
        return ""
    return unswappable.get(name, "") or no_dense_kernel(graph, name)
