"""Tracing a tiny model takes most of a second, and tests compile the same few models again and again: each is traced once.

`traced` gives what `sparsec.ir.tracer.trace` gives. A model is the same as an earlier one where all is equal that a trace can
see but the values of its weights: classes, settings, shapes, ties, hooks, modes. `--trace-anew` turns it off.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Hashable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sparsec.ir.carry import rebind
from sparsec.ir.graph import Graph
from sparsec.ir.tracer import trace

_KNOWN: dict[Hashable, Graph] = {}
_LOCK = threading.Lock()
WHERE = "name_or_path"
"""Where a model was loaded from, which no call looks at: tests save the same one in many folders."""
_PLAIN = (bool, int, float, str, type(None), tuple, frozenset, torch.dtype, torch.device)
_HOOKS = tuple(name for name in vars(nn.Linear(1, 1)) if "hooks" in name and "state_dict" not in name)
"""Those that a call may run."""


def traced(model: nn.Module, example_inputs: Any = None) -> Graph:
    """The graph of a model, sharing its parameters and buffers."""
    try:
        key = _key(model, example_inputs)
        known = _KNOWN.get(key)
    except (TypeError, RuntimeError, AttributeError, ValueError):  # something that cannot be told apart from others
        return trace(model, example_inputs)
    if known is None:
        graph = trace(model, example_inputs)
        # What was computed from a parameter, and is part of the call, cannot be copied.
        if _plain(graph, model) and all(t.grad_fn is None for t in graph.example):
            with _LOCK:
                _KNOWN[key] = copy.deepcopy(graph)
        return graph
    with _LOCK:
        graph = copy.deepcopy(known)
    assert rebind(graph, model) == []
    held = dict(model.named_buffers(remove_duplicate=False))
    for name, _ in list(graph.module.named_buffers(remove_duplicate=False)):
        if name in held:
            owner, _, leaf = name.rpartition(".")
            graph.module.get_submodule(owner)._buffers[leaf] = held[name]
    return graph


def _plain(graph: Graph, model: nn.Module) -> bool:
    """Whether everything that the graph shares with the model is found by its name."""
    held = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers(remove_duplicate=False))}
    shared = {id(t) for t in held.values()}
    own = [*graph.module.named_parameters(remove_duplicate=False), *graph.module.named_buffers(remove_duplicate=False)]
    return all(held.get(name) is tensor for name, tensor in own if id(tensor) in shared)


def _key(model: nn.Module, example_inputs: Any) -> Hashable:
    if (
        torch.overrides._get_current_function_mode_stack()
        or torch.utils._python_dispatch._get_current_dispatch_mode_stack()
    ):
        raise TypeError("under a mode")
    modes = (
        torch.is_autocast_enabled("cpu"),
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.get_default_dtype(),
    )
    config = getattr(model, "config", None)
    return (modes, _value(example_inputs), repr(config), tuple(_modules(model)), tuple(_tensors(model)))


def _modules(model: nn.Module) -> Iterator[Hashable]:
    for path, module in model.named_modules(remove_duplicate=False):
        if any(vars(module).get(name) for name in _HOOKS) or "forward" in vars(module):
            raise TypeError("hooked")
        settings = {k: v for k, v in vars(module).items() if k[0] != "_" and k != WHERE and isinstance(v, _PLAIN)}
        yield path, type(module), id(type(module).forward), repr(sorted(settings.items(), key=lambda kv: kv[0]))


def _tensors(model: nn.Module) -> Iterator[Hashable]:
    numbers: dict[int, int] = {}
    for kind in (model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False)):
        for name, tensor in kind:
            if type(tensor) not in (Tensor, nn.Parameter):
                raise TypeError("of a class of its own")
            number = numbers.setdefault(id(tensor), len(numbers))
            small = (
                tensor.tolist() if tensor.numel() <= 8 and not tensor.is_meta and not name.endswith("weight") else None
            )
            looks = (tensor.shape, tensor.stride(), tensor.dtype, tensor.device, tensor.requires_grad)
            yield name, number, type(tensor), looks, tensor._backward_hooks is None, repr(small)


def _value(value: Any) -> Hashable:
    if isinstance(value, Tensor):
        if type(value) is not Tensor:
            raise TypeError("of a class of its own")
        return (value.shape, value.dtype, value.device, value.stride(), repr(value.tolist()))
    if isinstance(value, Mapping):
        return tuple((key, _value(each)) for key, each in value.items())
    if isinstance(value, tuple | list):
        return (type(value), *map(_value, value))
    if isinstance(value, _PLAIN):
        return value
    raise TypeError("not a plain value")
