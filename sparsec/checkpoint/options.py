"""What others pass to `save_pretrained` (transformers' Trainer, accelerate, peft): honoured, or refused by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from sparsec.arguments import fits, shown, wording
from sparsec.errors import CheckpointError
from sparsec.kernels.modules.packed_layer import PackedLayer
from sparsec.progress import Progress
from sparsec.report.collect import Report

_WRITERS = ("accelerate", "torch", "safetensors")
"""Whose functions write tensors as they are, as is done here without them."""


def usable(model: nn.Module, options: Mapping[str, Any], dense: bool) -> dict[str, Any]:
    """Those that writing takes. dense: whether it writes a dense model. CheckpointError for one that cannot be honoured."""
    unknown = [name for name in options if name not in _RULES and name not in _TAKEN[dense]]
    if unknown:
        raise CheckpointError(f"save_pretrained takes no {', '.join(unknown)}")
    for name, rule in _RULES.items():
        if name in options and (why := rule(model, options[name], dense)):
            raise CheckpointError(f"save_pretrained: {name}: {why}")
    return {name: value for name, value in options.items() if name in _TAKEN[dense] and value is not None}


def _state(model: nn.Module, given: Any, dense: bool) -> str:
    """Trainer and accelerate pass the model's own, which says nothing new; for a model without packed layers any will do."""
    if given is None or not any(isinstance(m, PackedLayer) for m in model.modules()):
        return ""
    held = model.state_dict()
    same = isinstance(given, Mapping) and given.keys() == held.keys() and all(_is(given[n], t) for n, t in held.items())
    return "" if same else "it holds other tensors than the model; load it with load_state_dict, then save"


def _is(given: Any, held: Tensor) -> bool:
    if not isinstance(given, Tensor) or given.shape != held.shape or given.dtype != held.dtype:
        return False
    return given.data_ptr() == held.data_ptr() or given.detach().to(held.device).equal(held)


def _function(model: nn.Module, given: Any, dense: bool) -> str:
    module = str(getattr(given, "__module__", "")).partition(".")[0]
    return "" if given is None or module in _WRITERS else "files are written by safetensors; leave it out"


def _variant(model: nn.Module, given: Any, dense: bool) -> str:
    return "" if given is None or dense else "the files of a packed model are named after their contents; leave it out"


def _tokenizer(model: nn.Module, given: Any, dense: bool) -> str:
    known = given is None or (not isinstance(given, type) and callable(getattr(given, "save_pretrained", None)))
    return "" if known else _must_be("a tokenizer of transformers", given)


def _must_be(what: str, given: Any) -> str:
    return f"it must be {what}, got {shown(given)}"


_PROGRESS = Progress | None
_REPORT = "a report that was measured, as .sparsec.report() gives one"
_RULES: Mapping[str, Callable[[nn.Module, Any, bool], str]] = {
    "state_dict": _state,
    "safe_serialization": lambda model, given, dense: (
        "" if given is True else "weights are written as safetensors alone"
    ),
    "save_function": _function,
    "variant": _variant,
    "distributed_checkpoint": lambda model, given, dense: (
        "" if given is None or given is False else "compiled models are not sharded"
    ),
    "progress": lambda model, given, dense: "" if fits(given, _PROGRESS) else _must_be(wording(_PROGRESS), given),
    "report": lambda model, given, dense: "" if fits(given, Report | None) else _must_be(_REPORT, given),
    "tokenizer": _tokenizer,
    # A packed folder holds no adapter, and names of its own.
    "save_peft_format": lambda model, given, dense: "",
    "save_original_format": lambda model, given, dense: "",
}
_TAKEN = {
    False: ("tokenizer", "max_shard_size", "progress", "report", "name"),
    True: ("tokenizer", "max_shard_size", "variant", "state_dict", "save_original_format"),
}
"""By whether a dense model is written."""
