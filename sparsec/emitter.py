"""Puts a lowered graph back into the user's own model: owners of lowered ops are swapped, everything else stays what it was.

So `generate()`, caches, hooks, device moves and `isinstance` go on working. A site that cannot be swapped is found before
anything is lowered (`unswappable`), and its weight stays dense with the reason.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from sparsec.errors import EmitError, some
from sparsec.formats.base import Packed
from sparsec.ir.facts import Op, Weight
from sparsec.ir.graph import Graph
from sparsec.kernels import SparseLinear
from sparsec.kernels.dense import dense_linear
from sparsec.kernels.modules.dense_linear import DenseLinear
from sparsec.kernels.modules.group import Group, Grouped
from sparsec.kernels.modules.loading import guard_loading
from sparsec.kernels.modules.packed_layer import PackedLayer
from sparsec.kernels.modules.sparse_embedding import SparseEmbedding, not_served
from sparsec.lowering import repack

HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)
"""What goes over to the module that takes another's place."""


def unswappable(model: nn.Module, graph: Graph) -> dict[str, str]:
    """Weight -> why a module that multiplies by it must stay what it is."""
    reasons = {}
    for weight in graph.weights.values():
        why = [r for op in graph.products_of(weight.name) if (r := _reason(model, op.owner_of(weight.name)))]
        if why:
            reasons[weight.name] = why[0]
    return reasons


def unpackable(model: nn.Module, graph: Graph) -> dict[str, str]:
    """Weight -> why no module can hold it packed: those that are `unswappable`, and those that a module holds dense elsewhere."""
    reasons = unswappable(model, graph)
    for weight in graph.weights.values():
        products, lookups = graph.products_of(weight.name), graph.lookups_of(weight.name)
        if products and weight.name not in reasons:
            why = [reason for op in lookups if (reason := _no_lookup(model, op.owner))]
            why += _elsewhere(model, weight, {op.owner_of(weight.name) for op in (*products, *lookups)})
            reasons |= {weight.name: why[0]} if why else {}
    return reasons


def emit(model: nn.Module, graph: Graph) -> tuple[str, ...]:
    """Swaps modules in `model`, the one that the graph was traced from; returns notices.

    Raises EmitError when the model does not hold what the graph says.
    """
    notes = []
    for weight in list(graph.weights.values()):
        if weight.packed is not None:
            for owner in dict.fromkeys(op.owner_of(weight.name) for op in graph.products_of(weight.name)):
                _swap_packed(model, owner, weight, graph)
            for owner in dict.fromkeys(op.owner for op in graph.lookups_of(weight.name)):
                _swap_embedding(model, owner, weight, graph)
        elif weight.mask is not None and not weight.frozen:
            with torch.no_grad():
                graph.tensor(weight.name).masked_fill_(~weight.mask, 0)
            graph.update(weight.name, frozen=True)
            notes.append(weight.name)
    for op in list(graph.ops.values()):
        if op.kind == "linear" and graph.node(op.node).target is dense_linear:
            _swap_dense(model, op.owner, op.weights[0])
        elif op.members:
            _group(model, graph, op)
    guard_loading(model, PackedLayer)
    if not notes:
        return ()
    return (
        f"freeze was missing: the masks of {some(notes)} were written into the weights, so that the model computes what the "
        "graph says",
    )


def adopt(model: nn.Module, graph: Graph, may_overwrite: Callable[[str, Tensor], bool]) -> set[str]:
    """Gives `model`, whose tensors may be somebody else's too, those that passes made; what emission will write to is made here.

    may_overwrite: whether to write into the tensor of a weight. Returns the weights that `model` holds no more as they were.
    """
    for weight in graph.masked():
        if not weight.frozen and not may_overwrite(weight.name, graph.tensor(weight.name)):
            graph.replace_tensor(weight.name, graph.tensor(weight.name).detach().clone())
    before = dict(model.named_parameters())
    made = set()
    for weight in graph.weights.values():
        if weight.packed is None:
            put(model, weight, graph.tensor(weight.name))
        if weight.packed is not None or graph.tensor(weight.name) is not before.get(weight.name):
            made.add(weight.name)
    return made


def put(model: nn.Module, weight: Weight, tensor: Tensor) -> None:
    """Lets `model` hold a tensor under a weight's names as a Parameter, unless it does so already."""
    parameter = tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor, requires_grad=False)
    for name in (weight.name, *weight.aliases):
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        if getattr(module, leaf) is not parameter:
            setattr(module, leaf, parameter)


def _elsewhere(model: nn.Module, weight: Weight, swapped: set[str]) -> list[str]:
    """Modules that hold the weight too, but did not multiply by it in the traced call: their copy would be left without values."""
    modules = {id(model.get_submodule(path)) for path in swapped if _has(model, path)}
    holders = [name.rpartition(".")[0] for name in (weight.name, *weight.aliases)]
    others = [path for path in holders if id(model.get_submodule(path)) not in modules]
    return [
        f"{path or 'the root module'} holds the same tensor, and the traced call neither multiplied by it nor looked it up there"
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
        plain = kind.forward in (nn.Linear.forward, DenseLinear.forward)
    elif isinstance(module, conv1d_type()):
        plain = any(kind.forward is c.forward for c in conv1d_type())
    else:
        return f"its product is written inside {kind.__name__} ({owner or 'the root module'}), which is no nn.Linear"
    patched = module.__dict__.get("forward")  # by accelerate, which leaves the class's own there when it is taken off
    if not plain or (patched is not None and getattr(patched, "__func__", None) is not kind.forward):
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


def _no_lookup(model: nn.Module, owner: str) -> str:
    """Why the module that looks rows up cannot be swapped, "" where it can."""
    try:
        module = model.get_submodule(owner)
    except AttributeError:
        return f"the model has no module {owner!r}"
    if reason := not_served(module):
        return f"it is an embedding's table too, and {reason} ({owner or 'the root module'})"
    return "" if owner else "the model is itself the embedding, and only modules inside of a model can be swapped"


def conv1d_type() -> tuple[type[nn.Module], ...]:
    """transformers' Conv1D; nothing where transformers is not imported, since then no model has one."""
    found = getattr(sys.modules.get("transformers.pytorch_utils"), "Conv1D", None)
    return () if found is None else (found,)


def follower(graph: Graph, weight: str) -> partial[Packed]:
    """What tells a graph of a packed matrix that was packed again in the model."""
    return partial(repack, graph, weight)


def _swap_packed(model: nn.Module, owner: str, weight: Weight, graph: Graph) -> None:
    old = _owner(model, owner, weight.name)
    if not isinstance(old, (nn.Linear, *conv1d_type())):
        raise EmitError(f"{weight.name}: {owner} is a {type(old).__name__}, which cannot be swapped for a SparseLinear")
    assert weight.packed is not None
    bias = old.bias
    assert bias is None or isinstance(bias, Tensor)
    new = SparseLinear(weight.packed, bias)
    new.path, new.follow, new.takes_place_of = owner, follower(graph, weight.name), type(old)
    _swap(model, old, new)


def _swap_embedding(model: nn.Module, owner: str, weight: Weight, graph: Graph) -> None:
    old = _owner(model, owner, weight.name)
    if not_served(old):
        raise EmitError(
            f"{weight.name}: {owner} is a {type(old).__name__}, which cannot be swapped for a SparseEmbedding"
        )
    assert weight.packed is not None
    new = SparseEmbedding.of(old, weight.packed)
    new.path, new.follow = owner, follower(graph, weight.name)
    _swap(model, old, new)


def _swap_dense(model: nn.Module, owner: str, weight: str) -> None:
    old = _owner(model, owner, weight)
    if isinstance(old, DenseLinear):  # executed twice
        return
    if not isinstance(old, nn.Linear):
        raise EmitError(f"{weight}: {owner} is a {type(old).__name__}, which cannot be swapped for a DenseLinear")
    _swap(model, old, DenseLinear(old))


def _group(model: nn.Module, graph: Graph, op: Op) -> None:
    """The modules of a fused product share a group; each keeps its own tensors."""
    group = Group(len(op.members))
    for i, name in enumerate(op.members):
        owner = op.owner_of(name)
        if graph.weights[name].packed is None:
            _swap_dense(model, owner, name)
        member = _owner(model, owner, name)
        assert isinstance(member, Grouped), owner
        member.join(group, i)


def _owner(model: nn.Module, owner: str, weight: str) -> nn.Module:
    try:
        return model.get_submodule(owner)
    except AttributeError as error:
        raise EmitError(f"{weight}: the model has no module {owner!r}, which the graph names as its owner") from error


def _swap(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Puts `new` wherever `old` is, with its mode and its hooks."""
    new.train(old.training)
    for name in HOOKS:
        setattr(
            new, name, getattr(old, name)
        )  # the same dictionaries: the user's handles go on removing what they added
    new._is_full_backward_hook = old._is_full_backward_hook
    for path, module in list(model.named_modules(remove_duplicate=False)):
        if module is old:
            model.set_submodule(path, new)
