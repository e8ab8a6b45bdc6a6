"""A model whose weights stay in the files that they come from: read where they are asked for, and no memory of the process."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from sparsec.errors import DataError, briefly
from sparsec.memory import is_own
from sparsec.spill import Made, Spill

FILES = "mapped files"


def loaded_mapped(load: Callable[..., Any], spill: Spill) -> tuple[nn.Module, dict[str, Any]]:
    """What `from_pretrained` returns with its loading info, every parameter mapped; in that, by `FILES`, the files of the source.

    load: calls it with further options. transformers puts a weight that it makes of several, or renames, into files of its own,
    and one of another dtype is converted into one: all of them in the folder of `spill`, one weight at a time.
    """
    from accelerate.hooks import remove_hook_from_module

    folder = spill.folder / "made by transformers"
    model, info = load(device_map={"": "disk"}, offload_folder=str(folder))
    index = _index(model)
    remove_hook_from_module(model, recurse=True)
    if hasattr(model, "hf_device_map"):
        del model.hf_device_map
    read = _put(model, index, spill)
    return model, {**info, FILES: tuple(sorted(path for path in read if not path.is_relative_to(spill.folder)))}


def moved_out(model: nn.Module, spill: Spill) -> None:
    """Keeps every parameter that is held in memory in a file of `spill` instead."""
    for name, parameter in list(model.named_parameters()):
        if is_own(parameter):
            parameter.data = spill.made(f"{name} as read", partial(_as_read, parameter))[0]["weight"]


def _as_read(parameter: Tensor) -> Made:
    return {"weight": parameter.detach()}, {}


def _index(model: nn.Module) -> Mapping[str, Mapping[str, str]]:
    """Of each parameter the file, its name there, and its dtype in the model."""
    for module in model.modules():
        weights = getattr(getattr(module, "_hf_hook", None), "weights_map", None)
        if weights is not None:
            held: Mapping[str, Mapping[str, str]] = getattr(weights, "dataset", weights).index
            return held
    return {}


def _put(model: nn.Module, index: Mapping[str, Mapping[str, str]], spill: Spill) -> set[Path]:
    """The files that it maps."""
    made: dict[tuple[str, str], nn.Parameter] = {}
    with ExitStack() as stack:
        opened: dict[str, Any] = {}  # once each: a page that many mappings hold is slow to hand back
        for name, parameter in list(model.named_parameters(remove_duplicate=False)):
            if not parameter.is_meta:
                continue
            facts = index.get(name)
            if facts is None or "safetensors_file" not in facts:
                raise DataError(f"{name}: transformers found no file for this weight; is the checkpoint whole?")
            path, key = facts["safetensors_file"], facts["weight_name"]
            if (path, key) not in made:
                try:
                    if path not in opened:
                        opened[path] = stack.enter_context(safe_open(path, framework="pt"))
                    tensor = opened[path].get_tensor(key)
                except (OSError, SafetensorError, RuntimeError) as error:
                    raise DataError(
                        f"{path}: the tensor {key} cannot be read: {briefly(error)}; is the file whole, and does the index name "
                        "the right one?"
                    ) from error
                tensor = _converted(name, tensor, parameter.dtype, spill)
                made[path, key] = nn.Parameter(tensor, parameter.requires_grad)
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, made[path, key])
    return {Path(path) for path, _ in made}


def _converted(name: str, tensor: Tensor, dtype: torch.dtype, spill: Spill) -> Tensor:
    if tensor.dtype == dtype:
        return tensor

    def convert() -> Made:
        return {"weight": tensor.to(dtype)}, {}

    return spill.made(f"{name} in {str(dtype).removeprefix('torch.')}", convert)[0]["weight"]
