"""Writes a model into a folder: tensors under new names, then `config.json` by one rename: who loads sees the old or the new."""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from sparsec import files
from sparsec.arguments import checked
from sparsec.checkpoint.folder import CONFIG
from sparsec.checkpoint.record import BUFFERS, PREFIX, History, Record, Stored, dtype_name
from sparsec.data.unowned import unowned
from sparsec.errors import CheckpointError
from sparsec.kernels.modules.dense_linear import DenseLinear
from sparsec.kernels.modules.group import Group, Grouped
from sparsec.kernels.modules.packed_layer import PackedLayer
from sparsec.memory import apart
from sparsec.parallel.shares import refuse_share
from sparsec.progress import Progress, stage

SHARD = 5_000_000_000
"""Bytes of tensors in one file, at most; a larger tensor has a file of its own."""
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}
_SIZE = re.compile(r"([0-9]{1,9}(?:\.[0-9]{1,9})?) *(KB|MB|GB)")
OWN = re.compile(
    r"model-[0-9]{5,}-of-[0-9]{5,}-[0-9a-f]{16}\.safetensors|(model-[0-9a-f]{16}\.safetensors\.index|report-[0-9a-f]{16})\.json"
)
"""Files that a save writes, and that the next one removes: no other is ever deleted, whatever a config names."""


@checked
def save(
    module: nn.Module,
    folder: str | os.PathLike[str],
    *,
    max_shard_size: int | str = SHARD,
    progress: Progress | None = None,
) -> None:
    """Saves a module, its packed matrices as they are, every tensor once. `load(folder, into=...)` is the way back.

    max_shard_size: bytes of a file, or a text such as "2GB". progress: called with (what, done, total). Raises CheckpointError for
    tensors without contents, and where the folder cannot be written; what was in it before then still loads.
    """
    store(module, folder, max_shard_size=max_shard_size, progress=progress)


def store(
    module: nn.Module,
    folder: str | os.PathLike[str],
    *,
    max_shard_size: int | str = SHARD,
    config: Mapping[str, Any] | None = None,
    history: History | None = None,
    progress: Progress | None = None,
) -> Record:
    """As `save`, with what is to be known of a model. config: what else stands in config.json."""
    history = history or History()
    place = Path(folder)
    if isinstance(module, PackedLayer):
        raise CheckpointError("the module is itself a packed layer, which has no path; wrap it in nn.Sequential")
    stored, tied = _tensors(module)
    shards = _shards(stored, shard_bytes(max_shard_size))
    try:
        place.mkdir(parents=True, exist_ok=True)
        with stage(progress, "writing"), files.alone_in(place):
            before = own_files(place)
            named, facts = _write_shards(place, stored, shards, progress)
            record = describe(module, history)
            dense = record.unpacked({n.removeprefix(PREFIX): dtype_name(t) for n, t in stored.items()})
            record = replace(record, files=facts, dense=dense, tied=tied, report=_write_report(place, history.report))
            index = _write_index(place, named, facts)
            content = {**(config or {}), "transformers_weights": index, "quantization_config": record.json()}
            files.write(place / CONFIG, json.dumps(content, indent=2).encode())
            for stale in (before | _orphans(place)) - {*facts, index, record.report.get("file")}:
                (place / stale).unlink(missing_ok=True)
    except CheckpointError:
        raise
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        why = getattr(error, "strerror", None) or error
        raise CheckpointError(
            f"{place} could not be written: {why}; free some room or name a folder of your own; a model that was there "
            "before is as it was"
        ) from error
    return record


def describe(module: nn.Module, history: History) -> Record:
    """What is to be known of a module, without its files. CheckpointError for one of which this process holds a share."""
    refuse_share(module)
    return Record(
        files={},
        layers={p: Stored.of(m.packed, m.bias, history.reasons.get(p, "")) for p, m in _packed(module)},
        dense_kernels=tuple(p for p, m in module.named_modules() if isinstance(m, DenseLinear)),
        groups=_groups(module),
        passes=history.passes,
        calibration=history.calibration,
        unowned=unowned(module),
        versions={"sparsec": version("sparsec"), "torch": torch.__version__},
    )


def _packed(module: nn.Module) -> Iterator[tuple[str, PackedLayer]]:
    return ((path, m) for path, m in module.named_modules(remove_duplicate=False) if isinstance(m, PackedLayer))


def _tensors(module: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """What is stored, by its name in the file, and further names in the module of the same tensors."""
    stored: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    first: dict[tuple[Any, ...], str] = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        if not isinstance(tensor, Tensor):
            raise CheckpointError(
                f"{name} is a {type(tensor).__name__}: extra state of a module cannot be saved as a tensor"
            )
        if name.startswith(BUFFERS):
            raise CheckpointError(
                f"{name}: a name that begins with {BUFFERS!r} means a computed buffer in the files; give the module another name"
            )
        if tensor.is_meta:
            raise CheckpointError(
                f"{name} is on meta, which has no contents: an offloaded model is saved after its hooks were taken off, with "
                "accelerate.hooks.remove_hook_from_module(model, recurse=True), and its weights were loaded"
            )
        if tensor.layout != torch.strided or tensor.is_quantized:
            raise CheckpointError(f"{name} is {tensor.layout} {tensor.dtype}, and only plain tensors can be saved")
        held = tensor.detach()
        key = (held.data_ptr(), held.shape, held.stride(), held.dtype, held.device) if held.numel() else (id(tensor),)
        if key in first:
            tied[name] = first[key]
        else:
            first[key] = name
            stored[PREFIX + name] = held
    persistent = {*tied, *first.values()}
    for name, buffer in module.named_buffers():
        if name not in persistent and not buffer.is_meta:
            stored[BUFFERS + name] = buffer.detach()
    return stored, tied


def _groups(module: nn.Module) -> tuple[tuple[str, ...], ...]:
    found: dict[int, list[tuple[int, str]]] = {}
    known: dict[int, Group] = {}
    for path, m in module.named_modules():
        if isinstance(m, Grouped) and m._group is not None:
            known[id(m._group)] = m._group
            found.setdefault(id(m._group), []).append((m._index, path))
    return tuple(
        tuple(path for _, path in sorted(members)) for key, members in found.items() if len(members) == known[key].size
    )


def shard_bytes(given: int | str, option: str = "max_shard_size") -> int:
    """Of a size, or a text such as '2GB'. CheckpointError, with the option's name."""
    if isinstance(given, str) and given.strip().isdecimal():
        given = int(given)
    elif isinstance(given, str) and (found := _SIZE.fullmatch(given.strip().upper())) is not None:
        given = int(float(found[1]) * _UNITS[found[2]])
    if type(given) is not int or given < 1:
        raise CheckpointError(f"{option} must be a number of bytes or a text such as '2GB', got {given!r}")
    return given


def _shards(tensors: Mapping[str, Tensor], most: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    held = 0
    for name, tensor in tensors.items():
        if shards[-1] and held + tensor.nbytes > most:
            shards.append([])
            held = 0
        shards[-1].append(name)
        held += tensor.nbytes
    return shards


def _write_shards(
    place: Path, tensors: Mapping[str, Tensor], shards: list[list[str]], progress: Progress | None
) -> tuple[dict[str, str], dict[str, dict[str, Any]]]:
    """The file of each tensor, by its name there; of each file its hash and bytes. A file is named after its contents."""
    named, facts, there = {}, {}, set(os.listdir(place))
    files.sweep(place, ".sparsec-*.tmp")
    for i, names in enumerate(shards):
        if progress is not None:
            progress("writing", i, len(shards))
        aside = (
            place / f".sparsec-{secrets.token_hex(8)}.tmp"
        )  # a folder: safetensors has temporary files of its own beside
        aside.mkdir()
        try:
            whole = apart({n: tensors[n].contiguous() for n in names})
            made = aside / "tensors"
            save_file(whole, made, metadata={"format": "pt"})
            digest = _sha256(made)
            name = f"model-{i + 1:05d}-of-{len(shards):05d}-{digest[:16]}.safetensors"
            facts[name] = {"sha256": digest, "bytes": made.stat().st_size}
            os.chmod(made, 0o666 & ~_umask())
            files.put_in_place(made, place / name)
        except BaseException:  # a full disk gets its room back
            for written in facts.keys() - there:
                (place / written).unlink(missing_ok=True)
            raise
        finally:
            shutil.rmtree(aside, ignore_errors=True)
        named.update(dict.fromkeys(whole, name))
    return named, facts


def _write_index(place: Path, named: Mapping[str, str], facts: Mapping[str, Mapping[str, Any]]) -> str:
    content = {"metadata": {"total_size": sum(f["bytes"] for f in facts.values())}, "weight_map": dict(named)}
    data = json.dumps(content, indent=1).encode()
    name = f"model-{hashlib.sha256(data).hexdigest()[:16]}.safetensors.index.json"
    files.write(place / name, data)
    return name


def _write_report(place: Path, document: bytes) -> dict[str, Any]:
    """The file that holds it, named after its contents."""
    if not document:
        return {}
    digest = hashlib.sha256(document).hexdigest()
    files.write(place / f"report-{digest[:16]}.json", document)
    return {"file": f"report-{digest[:16]}.json", "sha256": digest, "bytes": len(document)}


def own_files(place: Path) -> set[str]:
    """Files of tensors that an earlier save left there."""
    try:
        content = json.loads((place / CONFIG).read_bytes())
        record = Record.read(content["quantization_config"], str(place / CONFIG))
        named = {*record.files, str(record.report.get("file")), str(content.get("transformers_weights"))}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return set()
    return {name for name in named if OWN.fullmatch(name)}


def _orphans(place: Path) -> set[str]:
    """Finished files of saves that were killed before any config.json named them. Not those of a save that runs, where a disk knows
    no locks."""
    old = time.time() - files.STALE
    return {path.name for path in place.iterdir() if OWN.fullmatch(path.name) and path.lstat().st_mtime < old}


def _sha256(path: Path) -> str:
    """Of a file's contents."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
