"""What a choice among formats and kernels may draw on: this machine's calibration, and the kernels that a dense weight may have."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sparsec.cost.calibration import Calibration, calibrate
from sparsec.cost.choice import OWN, TORCH
from sparsec.ir.facts import Weight
from sparsec.ir.graph import Graph
from sparsec.kernels import status
from sparsec.kernels.dense import NAME as DENSE_OPERATOR
from sparsec.kernels.dense import native_serves
from sparsec.kernels.dense_linear import DTYPES
from sparsec.lowering.dense import no_dense_kernel
from sparsec.progress import Progress


def calibrated(
    graph: Graph, weights: Sequence[Weight], progress: Progress | None
) -> tuple[Calibration | None, list[str]]:
    """The calibration for the dtypes of these weights, measured first where nobody has, and what has to be said about it.

    None where times cannot be predicted: the model knows the native kernels on a CPU. Raises CalibrationError for a file
    that SPARSEC_CALIBRATION names and that cannot be used.
    """
    if not weights:
        return None, []
    native = status()
    devices = sorted({graph.tensor(w.name).device.type for w in weights} - {"cpu"})
    if native.reason is not None:
        return None, [f"formats are chosen by bytes, since only native kernels are worth timing: {native.reason}"]
    if devices:
        return None, [
            f"formats are chosen by bytes: the cost model knows the CPU, and weights are on {', '.join(devices)}"
        ]
    dtypes = list(dict.fromkeys(w.dtype for w in weights))
    found = calibrate(dtypes, progress=progress)
    assert found is not None
    names = {str(d).removeprefix("torch.") for d in dtypes} - found.calibration.dtypes
    notes = list(found.notices)
    if names:
        notes.append(
            f"{found.source} says nothing of {', '.join(sorted(names))}: formats for those are chosen by bytes"
        )
    return found.calibration, notes


def dense_kernels(graph: Graph, weight: Weight, unswappable: Mapping[str, str]) -> tuple[str, ...]:
    """The kernels that may serve it if it stays dense; the first one is what serves it if nothing is done."""
    on_cpu = graph.tensor(weight.name).device.type == "cpu"
    served = weight.dtype in DTYPES and on_cpu and native_serves(DENSE_OPERATOR)
    if any(op.members for op in graph.products_of(weight.name)):
        return (OWN,) if served else (TORCH,)  # a part of a fused product is dense_linear's already
    if not served or weight.name in unswappable or no_dense_kernel(graph, weight.name):
        return (TORCH,)
    return (TORCH, OWN)
