"""What lies in the folder of a saved model: JSON and files of tensors, each looked at before it is believed.

Only plain files are read, and those that links lead to (the cache of the hub is made of links): a pipe or a device would never end.
"""

from __future__ import annotations

import contextlib
import json
import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from sparsec.checkpoint.record import BUFFERS, PREFIX, Record
from sparsec.errors import CheckpointError

CONFIG = "config.json"
MOST = 2**26
"""Bytes of JSON: a hundred times what a model of a thousand packed layers takes."""
AGAIN = 10
"""Times that a folder is looked at which others save into meanwhile."""


def read_json(path: Path) -> Any:
    """CheckpointError for what cannot be read, is no JSON, names a key twice, or is too large."""
    try:
        if size_of(path) > MOST:
            raise CheckpointError(f"{path} has {size_of(path)} bytes, and must have {MOST} at most")
        return json.loads(path.read_bytes(), object_pairs_hook=_once)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path} is no JSON: {error}") from error


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {twice!r} stands there twice")
    return made


def size_of(path: Path, wanted: object = None) -> int:
    """Bytes of a plain file; OSError where there is none, CheckpointError for what is none, or not of the bytes that are wanted."""
    try:
        found = path.stat()
    except ValueError as error:  # a NUL in the name
        raise CheckpointError(f"{str(path)!r} is no name of a file: {error}") from error
    if not stat.S_ISREG(found.st_mode):
        raise CheckpointError(f"{path} is no plain file")
    if wanted is not None and found.st_size != wanted:
        raise CheckpointError(
            f"{path} has {found.st_size} bytes, and must have {wanted}: it is not the file that was saved"
        )
    return found.st_size


def read_config(place: Path) -> tuple[dict[str, Any], Record]:
    """config.json, and what it says of a saved model."""
    content = config_of(place)
    return content, Record.read(content["quantization_config"], str(place / CONFIG))


def config_of(place: Path) -> dict[str, Any]:
    """config.json of a saved model."""
    path = place / CONFIG
    if not os.path.exists(path):  # False too for a name that is too long
        raise CheckpointError(f"{path} cannot be read: there is none; a saved model is a folder that holds it")
    content = read_json(path)
    if not isinstance(content, dict) or "quantization_config" not in content:
        raise CheckpointError(f"{path} has no quantization_config: this is no model that sparsec saved")
    return content


def read_whole(place: Path) -> tuple[dict[str, Any], Record, dict[str, Tensor]]:
    """config.json, its record, and every tensor, mapped. Whoever saves into the folder meanwhile takes files away that an older
    config.json names: then the new one is read."""
    for _ in range(AGAIN):
        content, record = read_config(place)
        try:
            return content, record, dict(file_tensors(place, record))
        except CheckpointError:
            if read_config(place)[1].files == record.files:
                raise
    raise CheckpointError(f"{place} was saved to {AGAIN} times while it was read; load it when that is done")


def saved_report(place: Path, record: Record) -> bytes:
    """The report's document, empty where there is none; CheckpointError for one that is not the one that was saved."""
    if not record.report:
        return b""
    path: Path = place / record.report["file"]
    try:
        size_of(path, record.report["bytes"])
        return path.read_bytes()
    except FileNotFoundError:  # a copy of the weights alone
        return b""
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error


def file_tensors(place: Path, record: Record) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the files, by its name in the module; of a buffer that the module computes with BUFFERS before it."""
    seen: set[str] = set()
    for name, facts in record.files.items():
        for key, tensor in tensors_of(place / name, facts):
            if key in seen:
                raise CheckpointError(f"{place / name} holds a tensor {key!r}, which another file holds too")
            seen.add(key)
            yield key, tensor


def tensors_of(path: Path, facts: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """Those of one file. facts: what the record says of it."""
    with _read(path):
        size_of(path, facts.get("bytes", -1))
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 - no dictionary
                if not key.startswith((PREFIX, BUFFERS)):
                    raise CheckpointError(f"{path} holds a tensor {key!r}, which is no name of sparsec's")
                yield (key if key.startswith(BUFFERS) else key.removeprefix(PREFIX)), file.get_tensor(key)


@contextlib.contextmanager
def _read(path: Path) -> Iterator[None]:
    """CheckpointError for a file of tensors that cannot be read, or is damaged."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}; the model is not whole") from error
    except (SafetensorError, RuntimeError, TypeError, AttributeError) as error:  # also a dtype that torch has not
        raise CheckpointError(f"{path} is damaged: {error}") from error


def check_files(files: Sequence[str], record: Record, name: str) -> Path:
    """The folder of the files that transformers is about to load. CheckpointError unless they are those of the record, in one
    folder, and within the one that was asked for, if `name` is one: an index may name any."""
    paths = [Path(file) for file in files]
    if {path.name for path in paths} != set(record.files):
        raise CheckpointError(f"{CONFIG} names other files than are loaded: {', '.join(sorted(record.files))}")
    folders = {path.parent for path in paths}
    if len(folders) > 1 or (os.path.isdir(name) and os.path.relpath(min(folders), name).startswith(os.pardir)):
        raise CheckpointError(f"{name}: the index names files of other folders: {', '.join(sorted(files)[:3])}")
    for path in paths:
        with _read(path):
            size_of(path, record.files[path.name].get("bytes", -1))
    return min(folders, default=Path())
