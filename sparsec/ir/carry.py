"""What a graph knows of weights, taken over to what the model is now.

Its parameters may have been replaced, and modules may have been put around it or into it.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from sparsec.ir.graph import Graph

KEPT = frozenset({"mask", "pattern", "frozen"})
"""Facts about weights alone: they hold in every graph that reads them."""


def rebind(graph: Graph, model: nn.Module) -> list[str]:
    """Lets the graph hold what the model holds now under the same names; returns the names that no longer mean the same.

    `load_state_dict(assign=True)` and assignments put other parameters in place of those that were traced.
    """
    _move(graph, model)
    held = dict(model.named_parameters(remove_duplicate=False))
    odd, known, taken = [], set[str](), set[int]()
    for weight in graph.weights.values():
        names = (weight.name, *weight.aliases)
        known.update(names)
        if weight.packed is not None:
            continue
        first = held.get(weight.name)
        if first is None and weight.kind == "bias":  # taken away: the graph adds zeros
            _put(graph, weight.name, nn.Parameter(torch.zeros_like(graph.tensor(weight.name)), requires_grad=False))
        if (
            first is None
            or any(held.get(n) is not first for n in names)
            or first.shape != weight.shape
            or id(first) in taken
        ):
            odd.append(weight.name)
            continue
        taken.add(id(first))
        if graph.tensor(weight.name) is not first:
            _put(graph, weight.name, first)
    return [*odd, *(name for name in held if name not in known)]


def _put(graph: Graph, name: str, parameter: nn.Parameter) -> None:
    owner, _, leaf = name.rpartition(".")
    graph.module.get_submodule(owner).register_parameter(leaf, parameter)


def _move(graph: Graph, model: nn.Module) -> None:
    """Buffers, the graph's own constants and its example follow a model that was moved or converted."""
    parameters, held = dict(model.named_parameters()), dict(model.named_buffers(remove_duplicate=False))
    device = next((t.device for t in (*parameters.values(), *held.values())), None)
    if device is None or device.type == "meta":
        return
    before = next((t.device for t in graph.example), device)
    for name, own in list(graph.module.named_buffers(remove_duplicate=False)):
        new = own.to(device) if name not in held and own.device == before else held.get(name)
        if new is not None and new is not own:
            owner, _, leaf = name.rpartition(".")
            graph.module.get_submodule(owner).register_buffer(leaf, new)
    became = {}
    for weight in graph.weights.values():
        now = parameters.get(weight.name) if weight.packed is None else weight.packed
        if now is not None:
            became[weight.dtype] = now.dtype
    if any(t.device != device or became.get(t.dtype, t.dtype) != t.dtype for t in graph.example):
        graph.example = tuple(t.to(device, became.get(t.dtype, t.dtype)) for t in graph.example)


def carry(old: Graph, new: Graph) -> list[str]:
    """Gives the weights of a model that was traced again the masks that they had, and what they were rounded to; returns the masked
    ones that are gone.

    A weight is told by its tensor: it may have another name by now.
    """
    told = [w for w in old.weights.values() if w.packed is None and (w.mask is not None or w.rounded is not None)]
    known_by = {id(old.tensor(w.name)): w for w in told}
    for weight in list(new.weights.values()):
        known = known_by.pop(id(new.tensor(weight.name)), None)
        if known is not None:
            new.weights[weight.name] = replace(
                weight,
                mask=known.mask,
                pattern=known.pattern,
                pruned=known.pruned,
                frozen=known.frozen,
                grown=known.grown,
                trained=known.trained,
                rounded=known.rounded,
            )
    new.facts |= old.facts & KEPT
    return [weight.name for weight in known_by.values() if weight.mask is not None]
