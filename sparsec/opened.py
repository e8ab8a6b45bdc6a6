"""What a command is given as MODEL, opened: a model that sparsec saved, as it is packed, or any other, dense."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch

from sparsec.checkpoint import load
from sparsec.data import LoadedModel, load_model
from sparsec.data.models import tokenizer_of
from sparsec.errors import DataError
from sparsec.progress import Progress
from sparsec.transformers_hook import METHOD


def open_model(
    spec: str | os.PathLike[str] | None,
    dtype: torch.dtype | None = None,
    progress: Progress | None = None,
    seed: int = 0,
) -> LoadedModel:
    """As `load_model`, and takes what sparsec saved. dtype: None is float32, or what a saved model computes in.

    Raises DataError, CheckpointError.
    """
    folder = None if spec is None else saved_folder(spec)
    if folder is None:
        return load_model(spec, dtype or torch.float32, progress, seed)
    model = load(folder)
    held = next((p.dtype for p in model.parameters() if p.is_floating_point()), None)
    if dtype not in (None, held):
        raise DataError(
            f"{folder}: this model was saved to compute in {str(held).removeprefix('torch.')}; leave --dtype out, or compress the "
            "dense model again in the other"
        )
    name = folder.resolve().name
    return LoadedModel(
        model, tokenizer_of(str(folder)), name, f"folder {folder}, saved by sparsec", "packed by sparsec", None
    )


def saved_folder(spec: str | os.PathLike[str]) -> Path | None:
    """The folder, where sparsec saved a model in it; None for anything else."""
    path = Path(spec).expanduser()
    try:
        content = json.loads((path / "config.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    held = content.get("quantization_config") if isinstance(content, dict) else None
    return path if isinstance(held, dict) and held.get("quant_method") == METHOD else None
