"""A model in a folder of several shards, compiled in memory and from mapped files, and what of the two must be the same."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from architectures import VOCABULARY, tiny_model
from torch import Tensor

import sparsec
from sparsec.data import load_model
from sparsec.report.schema import document
from sparsec.spill import Spill

SHARD = 20_000
"""Bytes of a shard: a tiny model has several."""
_TIMES = re.compile(r"[0-9]+\.[0-9]+ (s|min|MB)\b")


def saved(name: str, folder: Path, dtype: torch.dtype = torch.float32, size: int = SHARD) -> Path:
    """The folder, with a tiny model of this architecture in several files."""
    model: Any = tiny_model(name)[0]
    model.to(dtype).save_pretrained(folder, max_shard_size=size)
    assert len(list(folder.glob("*.safetensors"))) > 1
    return folder


def text(count: int = 4, length: int = 16) -> Tensor:
    """Token ids [count, length] to calibrate on."""
    return torch.randint(3, VOCABULARY, (count, length), generator=torch.Generator().manual_seed(0))


def in_memory(folder: Path, passes: str, dtype: torch.dtype | None = torch.float32, **options: Any) -> Any:
    """Compiled as everything is loaded."""
    return sparsec.compile(load_model(folder, dtype).model, passes, **options)


def streamed(folder: Path, spill: Path, passes: str, dtype: torch.dtype | None = torch.float32, **options: Any) -> Any:
    """Compiled from mapped files."""
    loaded = load_model(folder, dtype, spill=Spill.of(spill))
    return sparsec.compile(loaded.model, passes, copy=False, spill=spill, **options)


def told(model: Any) -> dict[str, Any]:
    """The report of a compiled model, without times; what was measured may differ in its last bits, by where tensors lie."""
    found = document(model.sparsec.report())
    sums = {key: value for key, value in found.items() if isinstance(value, int | float) and "seconds" not in key}
    rows = [{k: round(v, 8) if isinstance(v, float) else v for k, v in row.items()} for row in found["layers"]]
    return sums | {"layers": rows, "passes": [_timeless(each) for each in found["passes"]]}


def _timeless(record: dict[str, Any]) -> dict[str, Any]:
    training = {k: v for k, v in (record["training"] or {}).items() if k != "seconds"}
    texts = [_TIMES.sub("", each) for each in (record["summary"], *record["notes"])]
    return {**record, "seconds": 0, "spent": {}, "summary": texts[0], "notes": texts[1:], "training": training}


def differing(first: Any, second: Any) -> list[str]:
    """Names of what is not the same to the last bit."""
    one, other = first.state_dict(), second.state_dict()
    return sorted({*one} ^ {*other}) + [name for name in one if name in other and not same(one[name], other[name])]


def same(one: Tensor, other: Tensor) -> bool:
    """To the last bit."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return one.contiguous().view(-1).view(torch.uint8).equal(other.contiguous().view(-1).view(torch.uint8))
