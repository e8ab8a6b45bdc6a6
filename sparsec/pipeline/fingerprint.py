"""What a run is of: a model, a text, passes and versions. Ranks that work on one model are asked for theirs before they begin."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version

import torch
from torch import Tensor

from sparsec.calibrate import CalibrationData
from sparsec.errors import SpillError
from sparsec.ir.graph import Graph
from sparsec.pipeline.pipeline import Pipeline
from sparsec.ranks import ALONE, Ranks, together
from sparsec.spill import Keep

_LOOKED_AT = 64
"""Numbers of each weight that tell one model from another."""


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
    return _facts(pipeline.learning_part, graph, data) | {"values of the weights": _values(graph, None)}


def going_on(
    store: Keep, pipeline: Pipeline, graph: Graph, data: CalibrationData | None, masks: Mapping[str, Tensor]
) -> None:
    """Before a run in a store that lasts: SpillError where what is kept there is of another run. Reads some of every weight."""
    if not store.lasting:
        return
    facts = _facts(pipeline, graph, data) | {"values of the weights": _values(graph, _LOOKED_AT)}
    facts["masks"] = _hashed(mask for _, mask in sorted(masks.items()) if isinstance(mask, Tensor))
    before = store.made("run", lambda: ({}, facts))[1]
    if differing := [name for name in {**before, **facts} if before.get(name) != facts.get(name)]:
        raise SpillError(
            f"spill: this folder keeps what another run made ({', '.join(differing)} differ); give every run a folder of its own, "
            "or delete this one"
        )


def _facts(passes: Pipeline | None, graph: Graph, data: CalibrationData | None) -> dict[str, str]:
    text = "" if data is None else f"{data.source} (sha256 {data.sha256[:16]})"
    more = data.training.sha256[:16] if data is not None and data.training is not None else ""
    return {
        **versions(),
        "passes": str(passes),
        "calibration": text,
        "text to train on": more,
        "shapes of the weights": _shapes(graph),
    }


def _shapes(graph: Graph) -> str:
    listed = [(w.name, w.shape, str(w.dtype), w.pattern, w.trained) for w in graph.weights.values()]
    return f"sha256 {hashlib.sha256(repr(listed).encode()).hexdigest()[:16]}"


def _values(graph: Graph, most: int | None) -> str:
    """most: numbers of a tensor that are looked at; None: all."""
    held = (
        tensor
        for weight in graph.weights.values()
        for tensor in (weight.mask, None if weight.packed is not None else graph.tensor(weight.name))
        if tensor is not None and not tensor.is_meta
    )
    return f"sha256 {_hashed(held, most)[:16]}"


def _hashed(tensors: Iterable[Tensor], most: int | None = None) -> str:
    found = hashlib.sha256()
    for tensor in tensors:
        flat = tensor.detach().reshape(-1)
        some = flat if most is None else flat[:: max(1, flat.numel() // most)]
        found.update(some.cpu().contiguous().view(torch.uint8).numpy().data)
    return found.hexdigest()
