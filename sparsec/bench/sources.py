"""The model of an end-to-end run: a real one, or a known architecture with random weights and as many layers as fit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from sparsec.bench.models import CONFIGS, config, on_meta, random_model
from sparsec.bench.room import available_bytes, require_room
from sparsec.data import load_model
from sparsec.errors import DataError, SpecError
from sparsec.progress import Progress

ROOM_SHARE = 0.8  # of the free memory; the rest is for activations and for what others do meanwhile


@dataclass(frozen=True, eq=False)
class Source:
    """A causal language model, and what has to be said about it."""

    model: Any
    name: str
    origin: str


def source(
    spec: str, dtype: torch.dtype, sparse_models: int, layers: int | None = None, progress: Progress | None = None
) -> Source:
    """sparse_models: how many of them will be held beside it. Raises DataError, SpecError."""
    if spec in CONFIGS:
        return _random(spec, dtype, sparse_models, layers)
    if layers is not None:
        raise SpecError(
            f"--layers with --end-to-end is for models with random weights ({', '.join(CONFIGS)}), not {spec}"
        )
    loaded = load_model(spec, dtype, progress)
    if loaded.is_encoder:
        raise DataError(
            f"{spec}: {type(loaded.model).__name__} is an encoder and decodes nothing, and --end-to-end times decoding; "
            "`sparsec report` times its forwards, and --shapes the products of its layers"
        )
    return Source(loaded.model, loaded.name, loaded.source)


def _random(name: str, dtype: torch.dtype, sparse_models: int, layers: int | None) -> Source:
    own = config(name).num_hidden_layers
    if layers is not None and layers > own:
        raise SpecError(f"--layers: {name} has {own} layers, got {layers}")
    fixed, each = _sizes(name, dtype)
    # The dense model, the masked one, and what the sparse ones take, at most as much as dense.
    models = 2 + sparse_models
    if layers is None:
        available = available_bytes()
        room = None if available is None else int(ROOM_SHARE * available / models) - fixed
        layers = own if room is None else min(own, room // each)
        if layers < 1:
            raise DataError(
                f"{name}: not even one layer fits into {ROOM_SHARE:.0%} of the free memory, {(available or 0) / 2**30:.1f} GiB, "
                f"as {models} models; take fewer --sparsity or a smaller type"
            )
        why = "as many as fit into memory"
    else:
        require_room(models * (fixed + layers * each), f"{name} with {layers} layers", "take fewer --layers")
        why = "as asked for"
    origin = "random weights in the published shapes"
    if layers < own:
        origin += (
            f", {layers} of {own} layers ({why}): tokens per second are not the whole model's, and lm_head weighs more"
        )
    return Source(random_model(name, dtype, layers), name, origin)


def _sizes(name: str, dtype: torch.dtype) -> tuple[int, int]:
    """(bytes without any layer, bytes of a layer)."""
    one, two = (sum(p.numel() for p in on_meta(name, n).parameters()) * dtype.itemsize for n in (1, 2))
    return 2 * one - two, two - one
