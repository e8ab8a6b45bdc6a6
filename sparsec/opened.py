"""What a command is given as MODEL, opened: a model that sparsec saved, as it is packed, or any other, dense."""

from __future__ import annotations

import json
import os

import torch

from sparsec.checkpoint import load_saved
from sparsec.checkpoint.folder import read_config, saved_report
from sparsec.checkpoint.places import saved_place
from sparsec.data import LoadedModel, load_model
from sparsec.data.models import tokenizer_of
from sparsec.data.unowned import unowned
from sparsec.errors import CheckpointError, DataError
from sparsec.progress import Progress
from sparsec.report.collect import Report
from sparsec.report.reread import reread


def open_model(
    spec: str | os.PathLike[str] | None,
    dtype: torch.dtype | None = None,
    progress: Progress | None = None,
    seed: int = 0,
) -> LoadedModel:
    """As `load_model`, and takes what sparsec saved. dtype: None is float32, or what a saved model computes in.

    Raises DataError, CheckpointError.
    """
    folder = None if spec is None else saved_place(spec)
    if spec is None or folder is None:
        return load_model(spec, dtype or torch.float32, progress, seed)
    model = load_saved(folder)
    held = next((p.dtype for p in model.parameters() if p.is_floating_point()), None)
    if dtype not in (None, held):
        raise DataError(
            f"{folder}: this model was saved to compute in {str(held).removeprefix('torch.')}; leave --dtype out, or compress the "
            "dense model again in the other"
        )
    source = f"{'folder' if os.path.exists(spec) else 'hub'} {spec}, saved by sparsec"
    name = folder.resolve().name if os.path.exists(spec) else str(spec)
    return LoadedModel(model, tokenizer_of(str(folder)), name, source, "packed by sparsec", None, unowned(model))


def stored_report(spec: str | os.PathLike[str]) -> Report | None:
    """The report that was saved with a model; None for what sparsec did not save. No weight is read.

    Raises CheckpointError where there is none, or it is damaged.
    """
    folder = saved_place(spec)
    if folder is None:
        return None
    document = saved_report(folder, read_config(folder)[1])
    if not document:
        raise CheckpointError(
            f"{spec}: sparsec saved this model, and no report lies beside it; sparsec evaluate measures its quality, and sparsec "
            "check lists its layouts"
        )
    try:
        return reread(json.loads(document))
    except (DataError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{spec}: the report beside this model cannot be read: {error}") from error
