"""A model whose weights stay in the files that they come from: read where they are asked for, and no memory of the process."""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from sparsec import files
from sparsec.errors import DataError, briefly
from sparsec.memory import is_own
from sparsec.spill import Made, Spill

FILES = "mapped files"


_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
"""What transformers looks for in a folder, in this order."""


def checkpoint_files(folder: Path) -> tuple[Path, ...]:
    """The files that transformers reads a folder's weights from, with the index; none where there is no folder or file."""
    first = next((path for name in _WEIGHTS if (path := folder / name).is_file()), None)
    if first is None:
        return ()
    found = {first, *(folder / name for name in _weight_map(first).values())}
    return tuple(sorted(path for path in found if path.is_file()))


def of_source(spill: Spill, where: str, commit: str | None) -> Spill:
    """The part of a store for what is converted of this source: others may have weights of the same names. commit: of a hub."""
    found = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in checkpoint_files(Path(where))]
    return spill.within(f"source {sha256(repr(found or [where, commit]).encode()).hexdigest()[:16]}")


def check_index(folder: Path) -> None:
    """DataError where another file than the index names holds another tensor of the same name: transformers would take the last."""
    first = next((path for path in checkpoint_files(folder) if path.name == _WEIGHTS[1]), None)
    named = {} if first is None else _weight_map(first)
    with ExitStack() as stack, suppress(OSError, SafetensorError):  # a file that is damaged, transformers names
        opened = {name: stack.enter_context(safe_open(folder / name, framework="pt")) for name in {*named.values()}}
        held = {name: set(file.keys()) for name, file in opened.items()}
        for name, keys in held.items():
            for key in sorted(keys & named.keys()):
                right = named[key]
                if right != name and key in held[right]:
                    here, there = opened[name].get_tensor(key), opened[right].get_tensor(key)
                    if here.dtype != there.dtype or not torch.equal(here, there):
                        raise DataError(
                            f"{folder}: the tensor {key} is in {right}, as its index says, and another one of that name is in "
                            f"{name}; give a checkpoint that holds each tensor once"
                        )


def _weight_map(index: Path) -> dict[str, str]:
    """The file of each tensor. None of them where this is no index, or a broken one: what is wrong with it, transformers says."""
    if index.suffix != ".json":
        return {}
    with suppress(OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        found = json.loads(index.read_bytes())["weight_map"]
        return {str(key): name for key, name in found.items() if isinstance(name, str)}
    return {}


def loaded_mapped(load: Callable[..., Any], spill: Spill) -> tuple[nn.Module, dict[str, Any]]:
    """What `from_pretrained` returns with its loading info, every parameter mapped; in that, by `FILES`, the files of the source.

    load: calls it with further options. transformers puts a weight that it makes of several, or renames, into files of its own,
    and one of another dtype is converted into one: all of them in the folder of `spill`, one weight at a time. What is there by
    then stays as it is, since another rank may have mapped it.
    """
    folder = spill.folder / "made by transformers"
    folder.mkdir(exist_ok=True)
    files.sweep(spill.folder, ".made-*.tmp")
    aside = spill.folder / f".made-{secrets.token_hex(8)}.tmp"
    try:
        model, info = load(device_map={"": "disk"}, offload_folder=str(aside))
        for made in aside.glob("*") if aside.exists() else ():
            if not (folder / made.name).exists():
                made.replace(folder / made.name)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    index = _index(model)
    _unhook(model)
    read = _put(model, index, spill, info["missing_keys"], {str(aside): str(folder)})
    return model, {**info, FILES: tuple(sorted(path for path in read if not path.is_relative_to(spill.folder)))}


def moved_out(model: nn.Module, spill: Spill) -> None:
    """Keeps every parameter that is held in memory in a file of `spill` instead."""
    for name, parameter in list(model.named_parameters()):
        if is_own(parameter) and not parameter.is_meta:
            parameter.data = spill.made(f"{name} as read", partial(_as_read, parameter))[0]["weight"]


def _as_read(parameter: Tensor) -> Made:
    return {"weight": parameter.detach()}, {}


def _unhook(model: nn.Module) -> None:
    """Takes accelerate's hooks off, and what is left of them: a `forward` that the module holds beside that of its class."""
    from accelerate.hooks import remove_hook_from_module

    for module in model.modules():
        if (hook := getattr(module, "_hf_hook", None)) is not None:
            for each in (hook, *getattr(hook, "hooks", ())):
                each.original_devices = {}  # where weights would go back to
            remove_hook_from_module(module)
            if getattr(vars(module).get("forward"), "__func__", None) is type(module).forward:
                del module.forward
    if hasattr(model, "hf_device_map"):
        del model.hf_device_map


def _index(model: nn.Module) -> Mapping[str, Mapping[str, str]]:
    """Of each parameter the file, its name there, and its dtype in the model."""
    for module in model.modules():
        weights = getattr(getattr(module, "_hf_hook", None), "weights_map", None)
        if weights is not None:
            held: Mapping[str, Mapping[str, str]] = getattr(weights, "dataset", weights).index
            return held
    return {}


def _put(
    model: nn.Module,
    index: Mapping[str, Mapping[str, str]],
    spill: Spill,
    missing: Collection[str],
    moved: Mapping[str, str],
) -> set[Path]:
    """The files that it maps. missing: weights that the checkpoint lacks, which stay without values. moved: folders by their old
    names."""
    made: dict[tuple[str, str], nn.Parameter] = {}
    found: list[tuple[str, nn.Parameter, tuple[str, str]]] = []
    tensors: dict[tuple[str, str], Tensor] = {}
    with ExitStack() as stack:
        opened: dict[str, Any] = {}  # once each: a page that many mappings hold is slow to hand back
        for name, parameter in list(model.named_parameters(remove_duplicate=False)):
            if not parameter.is_meta or name in missing:
                continue
            facts = index.get(name)
            if facts is None or "safetensors_file" not in facts:
                raise DataError(f"{name}: transformers found no file for this weight; is the checkpoint whole?")
            (folder, _, file), key = facts["safetensors_file"].rpartition(os.path.sep), facts["weight_name"]
            path = os.path.join(moved.get(folder, folder), file)
            found.append((name, parameter, (path, key)))
            if (path, key) not in tensors:
                try:
                    if path not in opened:
                        opened[path] = stack.enter_context(safe_open(path, framework="pt"))
                    tensor = opened[path].get_tensor(key)
                except (OSError, SafetensorError, RuntimeError) as error:
                    raise DataError(
                        f"{path}: the tensor {key} cannot be read: {briefly(error)}; is the file whole, and does the index name "
                        "the right one?"
                    ) from error
                if tensor.shape != parameter.shape:
                    raise DataError(
                        f"{path}: the tensor {key} is {list(tensor.shape)}, and the model's config makes {name} "
                        f"{list(parameter.shape)}; is this the config.json of these weights?"
                    )
                tensors[path, key] = tensor
    _check_room([(name, tensors[place], parameter.dtype) for name, parameter, place in found], spill)
    for name, parameter, place in found:
        if place not in made:
            tensor = _converted(name, tensors.pop(place), parameter.dtype, spill)
            made[place] = nn.Parameter(tensor, parameter.requires_grad)
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, made[place])
    return {Path(path) for path, _ in made}


def _check_room(weights: Sequence[tuple[str, Tensor, torch.dtype]], spill: Spill) -> None:
    """Raises DataError, before the first is written, where the disk is too full for the weights that are converted."""
    first = {id(t): (name, t, to) for name, t, to in reversed(weights)}  # a tied tensor is written once, by that name
    odd = {key: each for key, each in first.items() if each[1].dtype != each[2]}
    wanted = {key: t.numel() * to.itemsize for key, (name, t, to) in odd.items() if not spill.has(_key(name, to))}
    needed, free = sum(wanted.values()), shutil.disk_usage(spill.folder).free
    if needed > free:
        name, tensor, to = next(each for each in weights if id(each[1]) in wanted)
        raise DataError(
            f"{spill.folder}: the checkpoint has {tensor.dtype}, {name} for one, and is converted to {to}, which takes "
            f"{needed / 1e6:,.1f} MB there; {free / 1e6:,.1f} MB are free: take the dtype of the checkpoint, or make room"
        )


def _converted(name: str, tensor: Tensor, dtype: torch.dtype, spill: Spill) -> Tensor:
    if tensor.dtype == dtype:
        return tensor

    def convert() -> Made:
        return {"weight": tensor.to(dtype)}, {}

    return spill.made(_key(name, dtype), convert)[0]["weight"]


def _key(name: str, dtype: torch.dtype) -> str:
    return f"{name} in {str(dtype).removeprefix('torch.')}"
