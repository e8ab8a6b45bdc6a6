"""The key-value cache by the name that transformers has for it: `past_key_values`, from 5.24 on `cache` (the old name warns)."""

from __future__ import annotations

import inspect
from typing import Any


def cache_argument(model: Any) -> str:
    """What the forward of a model calls its cache."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def cache_of(output: Any) -> Any:
    """The cache in what a model gave back."""
    return output.cache if hasattr(output, "cache") else output.past_key_values
