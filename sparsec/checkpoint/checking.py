"""Everything that is wrong with a saved model, not only the first of it: what `load` refuses, and what it does not look at."""

from __future__ import annotations

import hashlib
import os
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsec.arguments import checked
from sparsec.checkpoint.folder import CONFIG, config_of, read_json, saved_report, size_of, tensors_of
from sparsec.checkpoint.reading import (
    by_name,
    check_shape,
    computed_faults,
    dense_faults,
    empty_model,
    generation_of,
    joint_faults,
    rest_faults,
    stored_matrix,
    tied_faults,
)
from sparsec.checkpoint.record import BUFFERS, PREFIX, Record
from sparsec.checkpoint.writing import OWN
from sparsec.errors import CheckpointError
from sparsec.formats.base import Packed
from sparsec.progress import Progress, each_of

PIECE = 2**23
"""Bytes that are hashed at a time."""
OTHER = (".safetensors", ".safetensors.index.json", ".bin", ".pt", ".pth", ".gguf")
"""Endings of files that hold weights."""


@dataclass
class Examined:
    """What was looked at in a folder, and what is wrong there."""

    folder: str
    architecture: str = ""
    files: int = 0
    nbytes: int = 0
    layouts: Mapping[str, int] = field(default_factory=dict)  # layout -> how many packed layers
    versions: Mapping[str, str] = field(default_factory=dict)  # of what saved it
    faults: list[str] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)  # what is no fault, and may surprise


@checked
def examine(folder: str | os.PathLike[str], *, progress: Progress | None = None) -> Examined:
    """Looks at every file and tensor of a saved model. CheckpointError where there is none that sparsec saved."""
    place = Path(folder)
    found = Examined(str(place))
    if not os.path.exists(place / CONFIG):
        config_of(place)  # says so
    try:
        read_json(place / CONFIG)
    except CheckpointError as error:
        found.faults.append(str(error))
        return found
    content = config_of(place)
    try:
        record = Record.read(content["quantization_config"], CONFIG, found.faults)
    except CheckpointError as error:
        found.faults.append(str(error))
        return found
    found.layouts = dict(Counter(stored.layout for stored in record.layers.values()).most_common())
    found.versions = record.versions
    found.notices += _newer(record.versions)
    tensors, homes, unread = _files(place, record, found, progress)
    _report(place, record, found)
    index = content.get("transformers_weights")
    listed = _listed(place, index, found)
    # What stands in a file that cannot be read: that is one fault, told of the file.
    lost = {key for key, home in listed.items() if isinstance(home, str) and home in unread} - homes.keys()
    found.faults += _index_faults(str(index), listed, homes, lost)
    named, computed = by_name(record, tensors)
    found.faults += [f"{CONFIG}: {fault}" for fault in tied_faults(record, tensors) + dense_faults(record, tensors)]
    packed = _matrices(record, named, lost, found, progress)
    _fit(place, content, record, packed, named, computed, found)
    found.notices += _strangers(place, {*record.files, str(index), str(record.report.get("file"))})
    return found


def _newer(versions: Mapping[str, str]) -> list[str]:
    here = {"sparsec": version("sparsec"), "torch": torch.__version__}
    return [
        f"saved with {name} {versions[name]}, which is newer than the {own} here"
        for name, own in here.items()
        if name in versions and _release(versions[name]) > _release(own)
    ]


def _release(text: str) -> tuple[int, ...]:
    leading = re.match(r"[0-9]{1,9}(\.[0-9]{1,9})*", text)
    return tuple(int(part) for part in leading[0].split(".")) if leading else ()


def _files(
    place: Path, record: Record, found: Examined, progress: Progress | None
) -> tuple[dict[str, Tensor], dict[str, str], set[str]]:
    """Every tensor that can be read, by its name there the file that holds it, and the files that cannot be read."""
    tensors: dict[str, Tensor] = {}
    homes: dict[str, str] = {}
    unread: set[str] = set()
    done, total = 0, max(sum(_bytes(facts) for facts in record.files.values()) >> 20, 1)
    for name, facts in record.files.items():
        try:
            found.nbytes += size_of(place / name)
            found.files += 1
            done = _hashed(place / name, facts, found, progress, done, total)
            for key, tensor in tensors_of(place / name, facts):
                if key in tensors:
                    found.faults.append(f"{name} holds a tensor {key!r}, which {homes[_stored(key)]} holds too")
                tensors[key], homes[_stored(key)] = tensor, name
        except OSError as error:
            found.faults.append(f"{name} cannot be read: {error.strerror or error}; the model is not whole")
            unread.add(name)
        except CheckpointError as error:
            found.faults.append(_short(error, place))
            unread.add(name)
    if progress is not None:
        progress("hashing", total, total)
    return tensors, homes, unread


def _bytes(facts: Mapping[str, Any]) -> int:
    given = facts.get("bytes")
    return given if type(given) is int and 0 <= given < 2**62 else 0


def _stored(key: str) -> str:
    """The name in the file."""
    return key if key.startswith(BUFFERS) else PREFIX + key


def _short(error: Exception, place: Path) -> str:
    return str(error).removeprefix(f"{place}{os.sep}")


def _hashed(
    path: Path, facts: Mapping[str, Any], found: Examined, progress: Progress | None, done: int, total: int
) -> int:
    """How many MiB of all files are hashed once this one is."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for i, piece in enumerate(iter(lambda: file.read(PIECE), b"")):
            digest.update(piece)
            if progress is not None:
                progress("hashing", min(done + (i * PIECE >> 20), total - 1), total)
    if digest.hexdigest() != facts.get("sha256"):
        found.faults.append(
            f"{path.name} has the SHA-256 {digest.hexdigest()[:16]}..., and must have {str(facts.get('sha256'))[:16]}...: "
            "its contents are not those that were saved"
        )
    return done + (_bytes(facts) >> 20)


def _report(place: Path, record: Record, found: Examined) -> None:
    if not record.report:
        return
    name = record.report["file"]
    try:
        document = saved_report(place, record)
    except CheckpointError as error:
        found.faults.append(_short(error, place))
        return
    if not document:
        found.notices.append(f"{name}, the report, is not there")
    elif hashlib.sha256(document).hexdigest() != record.report["sha256"]:
        found.faults.append(f"{name} has not the SHA-256 that {CONFIG} says: it is not the report that was saved")


def _listed(place: Path, name: Any, found: Examined) -> dict[str, Any]:
    """The file of every tensor, as the index has it, by which transformers finds the files; empty where there is no such index."""
    if not isinstance(name, str) or OWN.fullmatch(name) is None:
        found.faults.append(f"{CONFIG}: transformers_weights must name the index in the folder itself, got {name!r}")
        return {}
    try:
        content = read_json(place / name)
    except CheckpointError as error:
        found.faults.append(_short(error, place))
        return {}
    listed = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(listed, dict):
        found.faults.append(f"{name} has no weight_map")
        return {}
    return listed


def _index_faults(name: str, listed: Mapping[str, Any], homes: Mapping[str, str], lost: set[str]) -> list[str]:
    """What is wrong with the index."""
    if not listed:
        return []
    faults = [f"{name}: {key} is in no file" for key in listed.keys() - homes.keys() - lost]
    faults += [f"{name}: {key}, which {homes[key]} holds, is not listed" for key in homes.keys() - listed.keys()]
    faults += [
        f"{name}: {key} is said to be in {listed[key]!r}, and is in {homes[key]}"
        for key in listed.keys() & homes.keys()
        if listed[key] != homes[key]
    ]
    return sorted(faults)


def _matrices(
    record: Record, named: Mapping[str, Tensor], lost: set[str], found: Examined, progress: Progress | None
) -> dict[str, Packed]:
    """Those that are valid. lost: names of tensors that are told of already."""
    packed = {}
    for path, stored in each_of(progress, "packed layers", record.layers.items()):
        if any(PREFIX + f"{path}.{name}" in lost for name in (*stored.tensors, "bias")):
            continue
        try:
            packed[path], _ = stored_matrix(path, stored, named, "layers")
        except CheckpointError as error:
            found.faults.append(str(error))
    return packed


def _fit(
    place: Path,
    content: Mapping[str, Any],
    record: Record,
    packed: Mapping[str, Packed],
    named: Mapping[str, Tensor],
    computed: Mapping[str, Tensor],
    found: Examined,
) -> None:
    """Whether names and shapes are those of the model's class, made without weights."""
    if "architectures" not in content:
        found.notices.append(
            f"{CONFIG} names no class of transformers: whether names and shapes fit is seen by load(folder, into=module)"
        )
        return
    try:
        model = empty_model(place, content, len(named) + len(computed))
        generation_of(place)
    except CheckpointError as error:
        found.faults.append(_short(error, place))
        return
    found.architecture = type(model).__name__
    modules = dict(model.named_modules(remove_duplicate=False))
    for path in record.layers:
        if path not in modules:
            found.faults.append(f"{CONFIG}: layers names {path!r}, and {found.architecture} has no such module")
        elif path in packed:
            try:
                check_shape(path, packed[path], modules[path], "layers")
            except CheckpointError as error:
                found.faults.append(str(error))
    found.faults += rest_faults(model, record, record.unpacked(named))
    found.faults += [f"{CONFIG}: {fault}" for fault in joint_faults(model, record)]
    found.faults += computed_faults(model, computed)


def _strangers(place: Path, known: set[str]) -> list[str]:
    """Files that hold weights, or are left of a save, and belong to no saved model."""
    told = []
    for name in sorted(os.listdir(place)):
        if name in known:
            continue
        if OWN.fullmatch(name) or (name.startswith(".sparsec-") and name.endswith(".tmp")):
            told.append(f"{name} is left of a save that did not end; a later save removes it")
        elif name.endswith(OTHER):
            told.append(f"{name} is no part of the model")
    return told
