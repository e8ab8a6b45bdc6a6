"""Sparse weights as the package compressed-tensors stores them, read to dense ones with zeros.

`sparse-bitmask` keeps of a weight, under its module's name: `shape`; `bitmask`, a bit per entry, rows padded to bytes, the least
bit first; `compressed`, the values in row order; `row_offsets`, the place of each row's first value. `sparse-24-bitmask` keeps two
values of every four, [rows, columns/2], and no offsets. Releases of the package from 0.15 on read neither.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sparsec.errors import DataError

METHOD = "compressed-tensors"
_PARTS = {
    "sparse-bitmask": ("shape", "compressed", "bitmask", "row_offsets"),
    "sparse-24-bitmask": ("shape", "compressed", "bitmask"),
    "dense": (),
}
_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_INDEX = "model.safetensors.index.json"


def sparse_format(where: str, stored: Mapping[str, Any]) -> str:
    """How a checkpoint's weights lie, by its `quantization_config`. DataError where they are more than sparse."""
    sparsity = stored.get("sparsity_config") or {}
    found = sparsity.get("format") if isinstance(sparsity, dict) else sparsity
    quantised = stored.get("format") not in (None, "dense") or stored.get("config_groups")
    if quantised or stored.get("kv_cache_scheme"):
        kind = f"{stored.get('format') or 'config_groups'}{f' on top of {found}' if found else ''}"
        raise DataError(
            f"{where}: compressed-tensors stored its weights quantised ({kind}), and sparsec reads sparse ones of floating point "
            "alone; give the model that it was quantised from"
        )
    if stored.get("transform_config"):
        raise DataError(
            f"{where}: its weights are transformed by compressed-tensors (transform_config), and sparsec reads the sparse ones "
            "alone; give the model that it was made from"
        )
    if not found:
        return "dense"
    if found not in _PARTS:
        raise DataError(
            f"{where}: compressed-tensors' format {found!r} is none that sparsec reads, which are {', '.join(_PARTS)}"
        )
    return str(found)


def dense_weights(folder: Path, layout: str, shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
    """Every tensor of a checkpoint by its name in the model, weights dense. Each is checked before memory is taken for it.

    layout: of `sparse_format`. shapes: those that the model knows. Raises DataError that names file and tensor.
    """
    held: dict[str, Tensor] = {}
    for path in _shards(folder):
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 - no dictionary
                    if name in held:
                        raise DataError(f"{path}: {name} stands in two files")
                    held[name] = file.get_tensor(name)
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror or error}); is the checkpoint whole?") from error
        except (SafetensorError, RuntimeError, TypeError, AttributeError) as error:  # also a dtype that torch has not
            raise DataError(f"{path}: this file is damaged: {error}") from error
    for module, parts in _compressed(str(folder), held, _PARTS[layout]):
        name = f"{module}.weight"
        if name in held:
            raise DataError(f"{folder}: {name} is stored both dense and as {layout}")
        held[name] = _dense(f"{folder}: {module}", parts, shapes.get(name))
    return held


def _shards(folder: Path) -> list[Path]:
    """The files of a checkpoint, in the folder itself."""
    index = folder / _INDEX
    if not index.is_file():
        return [folder / "model.safetensors"]
    try:
        names = set(json.loads(index.read_bytes())["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"{index}: this is no index of a checkpoint ({type(error).__name__}: {error})") from error
    for name in names:
        if not isinstance(name, str) or name != Path(name).name or not name.endswith(".safetensors"):
            raise DataError(f"{index}: must name .safetensors files in its own folder, got {name!r}")
    return [folder / name for name in sorted(names)]


def _compressed(
    where: str, held: dict[str, Tensor], wanted: tuple[str, ...]
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Takes out what belongs to a compressed weight, module by module."""
    modules = [name.removesuffix(".bitmask") for name in held if name.endswith(".bitmask")] if wanted else []
    modules += [m for n in held if (m := n.removesuffix(".compressed")) != n and m not in modules] if wanted else []
    for module in modules:
        if lacking := [part for part in wanted if f"{module}.{part}" not in held]:
            raise DataError(f"{where}: {module} lacks {', '.join(lacking)}; is the checkpoint whole?")
        yield module, {part: held.pop(f"{module}.{part}") for part in wanted}


def _dense(where: str, parts: Mapping[str, Tensor], known: torch.Size | None) -> Tensor:
    """One weight. Its size is bounded by that of its bitmask, which is in the file."""
    values, bitmask = parts["compressed"], parts["bitmask"]
    shape = _shape(where, parts["shape"])
    if known is not None and tuple(known) != shape:
        raise DataError(f"{where}.shape is {list(shape)}, and the model's weight is {list(known)}")
    packed = (*shape[:-1], -(-shape[-1] // 8))
    if bitmask.dtype != torch.uint8 or tuple(bitmask.shape) != packed:
        raise DataError(
            f"{where}.bitmask must be uint8 {list(packed)} for a weight {list(shape)}, got {_told(bitmask)}"
        )
    if values.dtype not in _FLOATS:
        raise DataError(
            f"{where}.compressed holds {values.dtype}, which is quantised; sparsec reads floating-point values of 16 bits and more"
        )
    mask = torch.from_numpy(numpy.unpackbits(bitmask.numpy(), axis=-1, count=shape[-1], bitorder="little")).view(
        torch.bool
    )
    counts = mask.sum(-1)
    count = int(counts.sum())
    if "row_offsets" in parts:
        offsets = parts["row_offsets"]
        if tuple(values.shape) != (count,):
            raise DataError(
                f"{where}.compressed must be [{count}], one value per bit of the bitmask, got {_told(values)}"
            )
        starts = torch.cumsum(counts, 0) - counts
        if offsets.dtype not in (torch.int64, torch.int32) or not torch.equal(offsets.to(torch.int64), starts):
            raise DataError(
                f"{where}.row_offsets do not follow from the bitmask: they must count the values before each row"
            )
    else:
        if len(shape) != 2 or shape[1] % 4 or tuple(values.shape) != (shape[0], shape[1] // 2):
            raise DataError(
                f"{where}.compressed must hold two values of every four of a weight [rows, columns], whose shape is {list(shape)}, "
                f"got {_told(values)}"
            )
        if not bool((mask.view(shape[0], -1, 4).sum(-1) == 2).all()):
            raise DataError(f"{where}.bitmask must have two bits set of every four, and has not")
    dense = torch.zeros(shape, dtype=values.dtype)
    dense[mask] = values.flatten()
    return dense


def _shape(where: str, stored: Tensor) -> tuple[int, ...]:
    """What `.shape` holds: [dimensions], or [dimensions, 1]."""
    sizes = stored.flatten().tolist() if not stored.is_floating_point() and stored.numel() <= 8 else []
    if not sizes or any(size < 1 for size in sizes) or math.prod(sizes) >= 2**48:
        raise DataError(f"{where}.shape must hold the sizes of a weight, got {_told(stored)} {sizes or ''}".rstrip())
    return tuple(sizes)


def _told(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
