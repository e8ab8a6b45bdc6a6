"""load: a model that sparsec saved, or one that others pruned, to a model that runs on its sparse weights."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable

import torch
from torch import nn

from sparsec import serial
from sparsec.arguments import checked_but
from sparsec.checkpoint.places import saved_place
from sparsec.checkpoint.reading import load_saved
from sparsec.compiler import compile
from sparsec.data import load_model
from sparsec.errors import CheckpointError, SparsecWarning
from sparsec.pipeline import Pass, Pipeline
from sparsec.progress import Progress

ADOPT_PASSES = "zeros,freeze,sparsity,flops,fuse,lower(auto)"
PRUNED = 0.05
"""The least share of zeros in a matrix that somebody pruned. Weights of 16 bits hold next to none by nature."""


@checked_but("place", "passes")
def load(
    place: str | os.PathLike[str],
    *,
    into: nn.Module | None = None,
    passes: Pipeline | str | Pass | Iterable[str | Pass] | None = None,
    dtype: torch.dtype | None = None,
    progress: Progress | None = None,
) -> nn.Module:
    """A model ready to run on the CPU, with its `.sparsec`.

    place: a folder that `save` or `save_pretrained` wrote, whose files are mapped and must stay; a folder of transformers or of
    compressed-tensors, or a GGUF file, whose zeros are masks; or the name of either on the hub, as `org/name` or
    `org/name@revision`.
    into: for a module that sparsec saved and that is not from transformers: one of the same structure as was compiled, on meta or
    not, which is filled.
    passes: what to do with a model that sparsec did not save; default `zeros,freeze,sparsity,flops,fuse,lower(auto)`.
    dtype: of such a model; default: the checkpoint's own, float32 for a GGUF file. progress: called with (what, done, total).

    Raises CheckpointError for what is damaged or does not fit, `into` then is as it was, and for a checkpoint that nobody pruned;
    DataError for a model that cannot be found or read.
    """
    if not isinstance(place, str | os.PathLike):
        raise CheckpointError(f"a model is named by a string or a path, got {type(place).__name__}")
    saved = saved_place(place)
    if saved is not None or into is not None:
        if passes is not None or dtype is not None:
            raise CheckpointError(
                f"{place}: what sparsec saved is packed already, and takes no passes and no dtype; "
                "`compile` the model that it was made from"
            )
        return load_saved(saved or place, into=into)
    pipeline = Pipeline.of(ADOPT_PASSES if passes is None else passes)  # refused before a model is read
    loaded = load_model(place, dtype, progress)
    if passes is None:
        _check_pruned(os.fspath(place), loaded.model)
    model: nn.Module = compile(loaded.model, pipeline, copy=False, progress=progress)
    if passes is None and not any(weight.packed for weight in vars(model)["sparsec"].graph.weights.values()):
        warnings.warn(
            f"{loaded.name}: its zeros gain nothing in any layout here, so every matrix stays dense; .sparsec.report() tells why",
            SparsecWarning,
            stacklevel=3,
        )
    return model


def _check_pruned(place: str, model: nn.Module) -> None:
    """CheckpointError for a model none of whose matrices holds zeros to speak of."""
    most = 0.0
    for weight in (p.detach() for p in model.parameters() if p.ndim > 1 and p.numel()):
        most = max(most, 1 - serial.count(serial.present(weight)) / weight.numel())
        if most >= PRUNED:
            return
    raise CheckpointError(
        f"{place}: nobody pruned this model, at most {most:.1%} of a matrix is zero, so there is nothing to pack; prune it with "
        f"sparsec.load({place!r}, passes=...), or sparsec.compile(sparsec.data.load_model({place!r}).model, passes)"
    )
