"""A model of transformers, saved packed: the folder that `sparsec.load` and transformers read."""

from __future__ import annotations

import json
import os
import warnings
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from torch import nn

from sparsec import files
from sparsec.checkpoint.card import card
from sparsec.checkpoint.record import History, Record
from sparsec.checkpoint.writing import SHARD, describe, store
from sparsec.errors import CheckpointError, CompileError
from sparsec.ir.groups import of_peft
from sparsec.kernels.modules.packed_layer import PackedLayer
from sparsec.progress import Progress
from sparsec.report.reread import reread

_DENSE = frozenset(
    {"model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json"}
)
"""Weights in the names that transformers gives them."""


def save_packed(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    name: str | None = None,
    tokenizer: Any = None,
    max_shard_size: int | str = SHARD,
    history: History | None = None,
    progress: Progress | None = None,
) -> Record:
    """Saves a model of transformers with its packed weights, its configs, its tokenizer if given, and a model card.

    name: by which the card loads it; that of the folder.
    """
    config: Any = getattr(model, "config", None)
    if config is None or not hasattr(config, "to_json_string"):
        raise CheckpointError(
            f"{type(model).__name__} has no config of transformers; sparsec.save(module, folder) saves any module"
        )
    content = {**json.loads(config.to_json_string()), "architectures": [type(model).__name__]}
    content.pop("quantization_config", None)
    place = Path(folder)
    if (kind := describe(model, History()).dtype or getattr(model, "dtype", None)) is not None:
        content["dtype"] = str(kind).removeprefix("torch.")  # a config keeps the one it was made with
    record = store(model, place, max_shard_size=max_shard_size, config=content, history=history, progress=progress)
    told = reread(json.loads(history.report)) if history is not None and history.report else None
    # After the weights: where those could not be written, a model that was there before keeps what is its own.
    generation: Any = getattr(model, "generation_config", None)
    try:
        if generation is not None:
            files.write(place / "generation_config.json", generation.to_json_string().encode())
        if tokenizer is not None:
            tokenizer.save_pretrained(place)
        files.write(place / "README.md", card(record, type(model).__name__, name or place.name, told).encode())
    except OSError as error:
        raise CheckpointError(
            f"the weights in {place} are saved, and what goes with them could not be written: {error}; make room and save again"
        ) from error
    if others := sorted({path.name for path in place.iterdir()} & _DENSE):
        warnings.warn(
            f"{place} also holds {', '.join(others)}, which sparsec and transformers leave aside from now on, and which other "
            "programs may take for this model; remove them, or save into a folder of its own",
            stacklevel=2,
        )
    return record


def guard_saving(model: nn.Module, saveable: Any) -> None:
    """Has `model` save as its `.sparsec` does, and its parts that hold packed layers refuse to save themselves by halves."""
    for part in model.modules():
        if not hasattr(type(part), "save_pretrained") or of_peft(part):  # which saves the adapter alone
            continue
        for name in ("save_pretrained", "push_to_hub"):
            if part is model:
                object.__setattr__(part, name, getattr(saveable, name))
            elif any(isinstance(m, PackedLayer) for m in part.modules()):
                object.__setattr__(part, name, partial(_refuse_part, f"{type(part).__name__}.{name}"))


def _refuse_part(kind: str, *args: Any, **kwargs: Any) -> NoReturn:
    raise CompileError(f"{kind}: this is a part of a compiled model; save the whole, or sparsec.save(part, folder)")
