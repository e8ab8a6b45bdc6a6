"""The graph IR: a torch.fx dataflow, and beside it what is known of its weights and ops.

Meaning: a graph computes what its nodes say, with every weight that has an unfrozen mask read as `where(mask, weight, 0)`.
Passes change a graph in place; `copy()` first to keep the old one.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx

from sparsec import serial
from sparsec.ir.facts import MATRIX_KINDS, Op, Pruned, Rounded, Weight


@dataclass(eq=False)
class Graph:
    """A traced model.

    `module` takes the traced call's arguments (`inputs`, by name, in order) and holds the parameters under the names that the
    model gives them, shared with the model it was traced from.
    """

    module: fx.GraphModule
    weights: dict[str, Weight]
    ops: dict[str, Op]
    inputs: tuple[str, ...]
    rung: str  # of the tracing ladder: "dynamic", "dynamic batch", "static"
    facts: frozenset[str] = frozenset()  # what holds now: "mask", "frozen", ...
    notes: list[str] = field(default_factory=list)  # said by the tracer: what was recognised but left alone
    example: tuple[Tensor, ...] = ()  # the arguments that it was traced with

    def tensor(self, name: str) -> Tensor:
        """The stored tensor of a weight that is not packed, in its stored layout."""
        return fetch(self.module, name)

    def read(self, target: str) -> Any:
        """What a get_attr node reads: a weight goes through its mask where that is not frozen."""
        value: Any = self.module
        for part in target.split("."):
            value = getattr(value, part)
        weight = self.weights.get(target)
        if weight is None or weight.mask is None or weight.frozen:
            return value
        return torch.where(weight.mask, value, torch.zeros((), dtype=value.dtype, device=value.device))

    def matrix(self, name: str) -> Tensor:
        """The dense matrix [out, in] of a linear or conv1d weight, with no mask applied; a view where possible."""
        weight = self.weights[name]
        if weight.packed is not None:
            return weight.packed.unpack()
        tensor = self.tensor(name).detach()
        return tensor.t() if weight.transposed else tensor

    def mask(self, name: str) -> Tensor | None:
        """What is kept of a weight now: bool, as stored, True where kept; None without a mask. The one place that tells.

        Training, merging and loading may have brought values back under a frozen mask: those are kept. A zero that the mask
        keeps is kept too. What stands under a mask that is not frozen is not read, so it says nothing.
        """
        weight = self.weights[name]
        if weight.mask is None or not weight.frozen:
            return weight.mask
        tensor = self.tensor(name).detach()
        return weight.mask if tensor.is_meta else serial.present(tensor, weight.mask)

    def kept(self, name: str) -> int:
        """How many values of a weight are kept now: a weight without a mask keeps all, zeros of its own included."""
        weight = self.weights[name]
        if weight.packed is not None:
            return weight.packed.nnz
        mask = self.mask(name)
        return weight.numel if mask is None else serial.count(mask)

    def mask_matrix(self, name: str) -> Tensor | None:
        """What is kept now, as [out, in]."""
        mask = self.mask(name)
        return mask.t() if mask is not None and self.weights[name].transposed else mask

    def matrices(self, name: str, tensor: Tensor | None = None) -> list[Tensor]:
        """The dense matrices [out, in] that a weight holds: one, or one for every expert. Views, with no mask applied.

        tensor: of another one that is stored as this weight is.
        """
        weight = self.weights[name]
        return _matrices(weight, (self.tensor(name) if tensor is None else tensor).detach())

    def rounded(self, name: str) -> Rounded | None:
        """What the kept values of a weight are rounded to now; None where they are not, or no longer are. The one place to ask."""
        weight = self.weights[name]
        if weight.rounded is None or weight.packed is not None or self.tensor(name).is_meta:
            return None
        matrix, mask = self.matrix(name), self.mask_matrix(name)
        kept = torch.ones_like(matrix, dtype=torch.bool) if mask is None else mask
        return weight.rounded if weight.rounded.holds(matrix, kept) else None

    def mask_matrices(self, name: str) -> list[Tensor] | list[None]:
        """What is kept of them now, [out, in]."""
        weight, mask = self.weights[name], self.mask(name)
        if mask is not None:
            return _matrices(weight, mask)
        return [None] * (weight.shape[0] if weight.kind == "experts" else 1)

    def update(self, name: str, **changes: Any) -> Weight:
        """Replaces the record of one weight."""
        self.weights[name] = replace(self.weights[name], **changes)
        return self.weights[name]

    def put_mask(self, name: str, mask: Tensor, pattern: str = "unstructured", pruned: Pruned | None = None) -> Weight:
        """A new mask, bool as stored, that is not frozen yet; what was known of the one before no longer holds."""
        return self.update(
            name,
            mask=mask,
            pattern=pattern,
            frozen=False,
            grown=0,
            trained=self.weights[name].trained and "before",
            nnz=None,
            pruned=pruned,
        )

    def masked(self) -> Iterator[Weight]:
        """Weights with a mask, in the order of the table."""
        return (w for w in list(self.weights.values()) if w.mask is not None)

    def ops_of(self, weight: str) -> list[Op]:
        """Ops whose matrix this weight is, or one of whose matrices, in order of execution."""
        return [op for op in self.ops.values() if weight in op.matrices]

    def products_of(self, weight: str) -> list[Op]:
        """Linear products among them: what pruning is for and what lowering rewrites."""
        return [op for op in self.ops_of(weight) if op.kind in MATRIX_KINDS]

    def lookups_of(self, weight: str) -> list[Op]:
        """Ops that look its rows up, a table's; not those that sum them as well (embedding bags)."""
        return [op for op in self.ops_of(weight) if op.kind == "embedding" and _looks_up(self.node(op.node))]

    def is_linear(self, name: str) -> bool:
        """Whether the weight is the matrix of a linear product (a tied lm_head is one too: its table is also an embedding)."""
        return bool(self.products_of(name))

    def prunable(self, name: str) -> bool:
        """Whether it holds matrices that can be masked: that of a linear product, or those of fused experts."""
        ops = self.ops_of(name)
        return self.is_linear(name) or (bool(ops) and all(op.routed for op in ops))

    def forget(self, facts: frozenset[str]) -> None:
        """These facts no longer hold; what was counted under them is dropped, so that nobody reads a stale figure."""
        self.facts -= facts
        if "flops" in facts:
            self.ops = {name: replace(op, flops=None, flops_dense=None) for name, op in self.ops.items()}
        if "sparsity" in facts:
            for weight in list(self.weights.values()):
                if weight.packed is None:
                    self.update(weight.name, nnz=None)

    def stored(self, name: str, matrices: Sequence[Tensor]) -> Tensor:
        """Matrices [out, in] as one new tensor, of the dtype of a weight and in the layout that it is stored in."""
        tensor = torch.empty_like(self.tensor(name), requires_grad=False, memory_format=torch.contiguous_format)
        for place, matrix in zip(_matrices(self.weights[name], tensor), matrices, strict=True):
            place.copy_(matrix.detach())
        return tensor

    def replace_tensor(self, name: str, tensor: Tensor) -> None:
        """Puts another tensor in a weight's place, in this graph only. It is trained where the old one was."""
        owner, _, attribute = name.rpartition(".")
        trained = self.tensor(name).requires_grad
        setattr(self.module.get_submodule(owner), attribute, torch.nn.Parameter(tensor, requires_grad=trained))

    def node(self, name: str) -> fx.Node:
        """The fx node of that name."""
        node: fx.Node = next(n for n in self.module.graph.nodes if n.name == name)
        return node

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Executes the graph, masks applied. Arguments as in `inputs`."""
        return MaskedInterpreter(self).run(*self.bind(args, kwargs))

    def bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        """Positional arguments of `module` from a call's arguments."""
        unknown = set(kwargs) - set(self.inputs)
        missing = [n for n in self.inputs[len(args) :] if n not in kwargs]
        if unknown or missing or len(args) > len(self.inputs):
            raise TypeError(
                f"this graph was traced with inputs {self.inputs}; unknown {sorted(unknown)}, missing {missing}"
            )
        return [*args, *(kwargs[n] for n in self.inputs[len(args) :])]

    def view(self) -> Graph:
        """The same dataflow and tensors under records of its own: what is written there is not written here."""
        return replace(self, weights=dict(self.weights), ops=dict(self.ops), notes=list(self.notes))

    def copy(self) -> Graph:
        """An independent graph: its tensors, masks and packed tensors too."""
        memo: dict[int, Any] = {}
        module = copy.deepcopy(self.module, memo)
        return Graph(
            module=module,
            weights={k: copy.deepcopy(w, memo) for k, w in self.weights.items()},
            ops=dict(self.ops),
            inputs=self.inputs,
            rung=self.rung,
            facts=self.facts,
            notes=list(self.notes),
            example=self.example,
        )


def _looks_up(node: fx.Node) -> bool:
    return node.target is torch.ops.aten.embedding.default or str(node.target).startswith("sparsec.")


def _matrices(weight: Weight, stored: Tensor) -> list[Tensor]:
    """[out, in], one or one for every expert."""
    turned = stored.transpose(-1, -2) if weight.transposed else stored
    return list(turned.unbind()) if weight.kind == "experts" else [turned]


class MaskedInterpreter(fx.Interpreter):
    """Reads weights through their masks."""

    def __init__(self, graph: Graph) -> None:
        super().__init__(graph.module)
        self.graph_ir = graph

    def fetch_attr(self, target: str) -> Any:
        return self.graph_ir.read(target)


def fetch(module: torch.nn.Module, path: str) -> Tensor:
    """The tensor at a dotted path."""
    owner, _, name = path.rpartition(".")
    tensor = getattr(module.get_submodule(owner), name)
    assert isinstance(tensor, Tensor), path
    return tensor
