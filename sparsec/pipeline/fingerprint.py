"""What a run is of: a model, a text, passes and versions. Ranks that work on one model are asked for theirs before they begin."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version

import torch

from sparsec.calibrate import CalibrationData
from sparsec.ir.graph import Graph
from sparsec.pipeline.pipeline import Pipeline
from sparsec.ranks import ALONE, Ranks, together


@contextmanager
def by_all_ranks(pipeline: Pipeline) -> Iterator[Ranks]:
    """Within it ranks share the work of passes that learn from data, where there are several; of others each does all.

    Raises RanksError where not all come.
    """
    if not pipeline.learning:
        yield ALONE
        return
    with together() as ranks:
        yield ranks


def versions() -> dict[str, str]:
    """Of what computes."""
    return {f"version of {name}": version(name) for name in ("sparsec", "torch", "transformers")}


def facts_of_run(pipeline: Pipeline, graph: Graph, data: CalibrationData | None) -> dict[str, str]:
    """By what it is of. Reads all weights."""
    text = "" if data is None else f"{data.source} (sha256 {data.sha256[:16]})"
    more = data.training.sha256[:16] if data is not None and data.training is not None else ""
    return {
        **versions(),
        "passes": str(pipeline.learning_part),
        "calibration": text,
        "text to train on": more,
        "shapes of the weights": _shapes(graph),
        "values of the weights": _values(graph),
    }


def _shapes(graph: Graph) -> str:
    listed = [(w.name, w.shape, str(w.dtype), w.pattern, w.trained) for w in graph.weights.values()]
    return f"sha256 {hashlib.sha256(repr(listed).encode()).hexdigest()[:16]}"


def _values(graph: Graph) -> str:
    found = hashlib.sha256()
    for weight in graph.weights.values():
        for tensor in (weight.mask, None if weight.packed is not None else graph.tensor(weight.name)):
            if tensor is not None and not tensor.is_meta:
                flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
                found.update(flat.numpy().data)
    return f"sha256 {found.hexdigest()[:16]}"
