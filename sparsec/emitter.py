"""Puts a lowered graph back into the user's own model: owners of lowered ops are swapped, everything else stays what it was.

So `generate()`, caches, hooks, device moves and `isinstance` go on working. A site that cannot be swapped is found before
anything is lowered (`unswappable`), and its weight stays dense with the reason.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from sparsec.errors import EmitError
from sparsec.ir.facts import Weight
from sparsec.ir.graph import Graph
from sparsec.kernels import SparseLinear

_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)


def unswappable(model: nn.Module, graph: Graph) -> dict[str, str]:
    """Weight -> why the module that executes it cannot become a SparseLinear."""
    reasons = {}
    for weight in graph.weights.values():
        products = graph.products_of(weight.name)
        why = [r for op in products if (r := _reason(model, op.owner))] or _elsewhere(
            model, weight, {op.owner for op in products}
        )
        if products and why:
            reasons[weight.name] = why[0]
    return reasons


def emit(model: nn.Module, graph: Graph) -> tuple[str, ...]:
    """Swaps modules in `model`, the one that the graph was traced from; returns notices.

    Raises EmitError when the model does not hold what the graph says.
    """
    notes = []
    for weight in list(graph.weights.values()):
        if weight.packed is not None:
            for owner in dict.fromkeys(op.owner for op in graph.products_of(weight.name)):
                _swap(model, graph, owner, weight)
        elif weight.mask is not None and not weight.frozen:
            with torch.no_grad():
                graph.tensor(weight.name).masked_fill_(~weight.mask, 0)
            graph.update(weight.name, frozen=True)
            notes.append(weight.name)
    if not notes:
        return ()
    listed = ", ".join(notes[:3]) + (f" and {len(notes) - 3} more" if len(notes) > 3 else "")
    return (
        f"freeze was missing: the masks of {listed} were written into the weights, so that the model computes what the graph says",
    )


def _elsewhere(model: nn.Module, weight: Weight, swapped: set[str]) -> list[str]:
    """Modules that hold the weight too, but did not multiply by it in the traced call: their copy would be left without values."""
    modules = {id(model.get_submodule(path)) for path in swapped if _has(model, path)}
    holders = [name.rpartition(".")[0] for name in (weight.name, *weight.aliases)]
    others = [path for path in holders if id(model.get_submodule(path)) not in modules]
    return [
        f"{path or 'the root module'} holds the same tensor, and the traced call did not multiply by it there"
        for path in others
    ]


def _has(model: nn.Module, path: str) -> bool:
    return any(path == name for name, _ in model.named_modules(remove_duplicate=False))


def _reason(model: nn.Module, owner: str) -> str:
    try:
        module = model.get_submodule(owner)
    except AttributeError:
        return f"the model has no module {owner!r}"
    kind = type(module)
    if isinstance(module, nn.Linear):
        plain = kind.forward is nn.Linear.forward
    elif isinstance(module, Conv1D):
        plain = kind.forward is Conv1D.forward
    else:
        return f"its product is written inside {kind.__name__} ({owner or 'the root module'}), which is no nn.Linear"
    if not plain or "forward" in module.__dict__:  # such as accelerate's patched instances
        return f"{owner} is a {kind.__name__} with a forward of its own"
    if not owner:
        return "the model is itself the linear, and only modules inside of a model can be swapped; wrap it in nn.Sequential"
    more = [n for n, _ in (*module.named_parameters(), *module.named_buffers()) if n not in ("weight", "bias")]
    if more:
        return f"{owner} also holds {', '.join(more)}, which a SparseLinear would lose"
    parent = model.get_submodule(owner.rpartition(".")[0])
    if isinstance(parent, nn.TransformerEncoderLayer):
        return "the fast path of nn.TransformerEncoderLayer reads its weights past the linear modules"
    return ""


def _swap(model: nn.Module, graph: Graph, owner: str, weight: Weight) -> None:
    try:
        old = model.get_submodule(owner)
    except AttributeError as error:
        raise EmitError(
            f"{weight.name}: the model has no module {owner!r}, which the graph names as its owner"
        ) from error
    if not isinstance(old, nn.Linear | Conv1D):
        raise EmitError(f"{weight.name}: {owner} is a {type(old).__name__}, which cannot be swapped for a SparseLinear")
    assert weight.packed is not None
    new = SparseLinear(weight.packed, old.bias)
    new.train(old.training)
    for name in _HOOKS:
        setattr(
            new, name, getattr(old, name)
        )  # the same dictionaries: the user's handles go on removing what they added
    new._is_full_backward_hook = old._is_full_backward_hook
    for path, module in list(model.named_modules(remove_duplicate=False)):
        if module is old:
            model.set_submodule(path, new)
