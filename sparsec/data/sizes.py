"""Whether a folder's files can hold the model that its config names: transformers takes memory for it before it finds out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from sparsec.counts import MOST_PARTS, counts_asked
from sparsec.errors import DataError

_LEAST_LAYER = 256
"""Bytes of the smallest layer of a transformer that anybody made."""
_LEAST_ENTRY = 1 / 8
"""Bytes of an entry of a weight: a bit, where it is stored as a bitmask."""


def check_counts(where: str, content: Any) -> None:
    """DataError for a config.json that names more layers, or other parts, than the files have room for, before they are made."""
    held = _bytes(where)
    for name, number, most in counts_asked(content, MOST_PARTS if held is None else held // _LEAST_LAYER):
        bound = f"no model has more than {most:,}"
        if held is not None and most <= MOST_PARTS:
            bound = f"the files hold {held:,} bytes; is it whole?"
        raise DataError(f"{where}: config.json: {name} is {number:,}, and {bound}")


def check_room(where: str, model: nn.Module) -> None:
    """DataError for a model, on meta, with more weights than the files can hold."""
    entries, held = sum(p.numel() for p in model.parameters()), _bytes(where)
    if held is not None and entries * _LEAST_ENTRY > held:
        raise DataError(
            f"{where}: config.json names a {type(model).__name__} of {entries:,} weights, and the files hold {held:,} bytes; is it "
            "whole?"
        )


def _bytes(where: str) -> int | None:
    """Of the weights in a folder; None for what is no folder, such as a name on the hub."""
    folder = Path(where)
    if not folder.is_dir():
        return None
    files = [path for end in ("*.safetensors", "*.bin") for path in folder.glob(end)]
    return sum(path.stat().st_size for path in files if path.is_file())
