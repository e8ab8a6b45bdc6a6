"""The model that a pruned one learns from: the dense one, by its tensors."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from sparsec import serial
from sparsec.errors import RecoverError, some
from sparsec.ir.graph import Graph
from sparsec.pipeline.base import Context
from sparsec.recover.stretches import Read


def dense_reader(graph: Graph, context: Context) -> Read:
    """Reads the dense parameters by their names in the graph. Raises RecoverError where they are not held, or are pruned."""
    dense = context.dense
    missing = [w.name for w in graph.masked() if w.name not in dense]
    if missing:
        raise RecoverError(
            f"recover needs the dense model to learn from, and {some(missing)} of it is no longer held; give it as "
            "teacher= to sparsec.extend, or put recover into the passes of sparsec.compile; "
            "recover(cross_entropy=1.0) learns from the text alone"
        )
    pruned = [
        (w, mask) for w in graph.masked() if (mask := graph.mask(w.name)) is not None and graph.kept(w.name) < w.numel
    ]
    if pruned and not any(int(serial.grown(dense[w.name], mask)) for w, mask in pruned):
        raise RecoverError(
            "recover learns from the dense model, and the one given has zeros wherever the masks prune, so it is the pruned one "
            "itself; give the model as it was before pruning, or recover(cross_entropy=1.0), which learns from the text alone"
        )

    def read(target: str) -> Any:
        if target in dense:
            return dense[target]
        value = graph.read(target)
        return value.detach() if isinstance(value, Tensor) else value

    return read
