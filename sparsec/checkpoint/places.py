"""Where a model lies that sparsec saved: a folder, or a repository of the hub, of which the files come into its local cache."""

from __future__ import annotations

import json
import os
from pathlib import Path

from sparsec.checkpoint.folder import CONFIG, read_json
from sparsec.checkpoint.record import SCHEMA
from sparsec.data.folders import local_path
from sparsec.data.hub import fetched, hub_name
from sparsec.errors import DataError
from sparsec.transformers_hook import METHOD


def saved_folder(spec: str | os.PathLike[str]) -> Path | None:
    """The folder, where sparsec saved a model in it; None for anything else."""
    path = Path(spec).expanduser()
    try:
        content = json.loads((path / CONFIG).read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    held = content.get("quantization_config") if isinstance(content, dict) else None
    ours = isinstance(held, dict) and (held.get("quant_method") == METHOD or held.get("schema") == SCHEMA)
    return path if ours else None


def saved_place(spec: str | os.PathLike[str]) -> Path | None:
    """As `saved_folder`, and takes the name of a repository, whose files are then fetched.

    DataError where those do not come, CheckpointError for a folder whose config.json is no JSON.
    """
    spec = os.fspath(spec)
    name, path = hub_name(spec), local_path(spec)
    if path is not None:
        if (path / CONFIG).exists():
            read_json(path / CONFIG)
        return saved_folder(path)
    if name is None or "/" not in name.id:
        return None
    try:
        config = fetched(name, (CONFIG,))
    except DataError:  # `load_model` looks for it too, and says more
        return None
    return None if saved_folder(config) is None else fetched(name, ("*.safetensors", "*.json", "*.model", "*.txt"))
