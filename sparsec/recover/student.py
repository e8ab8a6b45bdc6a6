"""The tensors of a pruned graph that are trained, each under its mask: a pruned weight has no gradient and stays zero.

Whoever trains them reads them by `read`; the graph gets the result by `settle`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sparsec import serial
from sparsec.errors import RecoverError
from sparsec.ir.facts import Weight
from sparsec.ir.graph import Graph
from sparsec.pipeline.base import Context
from sparsec.ranks import Ranks
from sparsec.recover.losses import finite
from sparsec.recover.regrow import Regrowth
from sparsec.recover.stretches import Run, Values

_MASK = "mask "


class Student(ABC):
    """leaves: what the optimiser trains, float32, by name. masks: of those that have one, bool, of the leaf's shape."""

    def __init__(self, graph: Graph, names: Iterable[str]) -> None:
        self.graph = graph
        self.weights: dict[str, Weight] = {name: graph.weights[name] for name in names}
        self.masks: dict[str, Tensor] = {}
        for name in self.weights:
            mask = graph.mask(name)
            if mask is not None:
                self.masks[name] = mask
        self.leaves: dict[str, Tensor] = {}
        self.moves = (
            False  # whether masks may differ from those of the graph: then every copy of the leaves has its masks
        )

    @abstractmethod
    def read(self, target: str) -> Any:
        """The tensor that a graph computes with for a stored one, in its dtype."""

    @abstractmethod
    def result(self, name: str) -> Tensor:
        """What a weight has become, zero where it is pruned."""

    def clean(self) -> None:
        """After a backward: gradients of what is pruned are zero, so that no moment of an optimiser ever holds anything there."""
        for name, leaf in self.leaves.items():
            mask = self.masks.get(name)
            if mask is not None and leaf.grad is not None:
                serial.masked(leaf.grad, mask, out=leaf.grad)

    @torch.no_grad()
    def move(self, regrowth: Regrowth, step: int, done: float, optimizer: torch.optim.Optimizer) -> None:
        """After a backward and before `clean`: masks move by the gradients of all weights, and what went leaves no moment."""
        for number, (name, mask) in enumerate(self.masks.items()):
            leaf = self.leaves[name]
            if leaf.grad is None:
                continue
            self.masks[name] = regrowth.move(
                self.weights[name], mask, leaf, leaf.grad, optimizer, step=step, number=number, done=done
            )

    def run(self, start: int, values: Values, run: Run) -> Values:
        """Runs the stretch that begins at a place, so that what it reads is there."""
        return run(values)

    def sum_gradients(self, ranks: Ranks) -> None:
        """After a backward: every rank has the sum of all ranks' gradients."""
        summed(list(self.leaves.values()), ranks)

    def clip(self, most: float) -> Tensor:
        """Bounds the norm of all gradients together, and gives what it was."""
        return torch.nn.utils.clip_grad_norm_([leaf for leaf in self.leaves.values() if leaf.grad is not None], most)

    def finite(self, gradients: Sequence[Tensor]) -> bool:
        """Whether none of them is NaN or inf."""
        return finite(*gradients)

    def kept(self) -> dict[str, Tensor]:
        """A copy of the leaves, of those with a mask the values that it keeps, one after the other; of masks where they move."""
        found = {
            name: leaf.detach()[self.masks[name]] if name in self.masks else leaf.detach().clone()
            for name, leaf in self.leaves.items()
        }
        return found | ({f"{_MASK}{name}": mask.clone() for name, mask in self.masks.items()} if self.moves else {})

    @torch.no_grad()
    def restore(self, kept: Mapping[str, Tensor]) -> None:
        """Goes back to such a copy."""
        for key, mask in kept.items():
            if key.startswith(_MASK):
                self.masks[key.removeprefix(_MASK)] = mask.clone()
                self.moves = True
        for name, leaf in self.leaves.items():
            if name in self.masks:
                leaf.zero_().masked_scatter_(self.masks[name], kept[name].to(leaf.device))
            else:
                leaf.copy_(kept[name])

    @torch.no_grad()
    def settle(self, context: Context) -> None:
        """Writes the trained weights into the graph, and masks that moved."""
        for name, mask in self.masks.items() if self.moves else ():
            self.graph.update(name, mask=mask)
        write_trained(self.graph, {name: self.result(name) for name in self.weights}, context)


def summed(leaves: Sequence[Tensor], ranks: Ranks) -> None:
    """Gradients become the sums over the ranks, in place."""
    known = torch.tensor([leaf.grad is not None for leaf in leaves], dtype=torch.int64)
    ranks.sum([known])
    for leaf, holders in zip(leaves, known.tolist(), strict=True):
        if holders and leaf.grad is None:  # such as of an expert that saw no token here
            leaf.grad = torch.zeros_like(leaf)
    ranks.sum(leaf.grad for leaf in leaves if leaf.grad is not None)


@torch.no_grad()
def write_trained(graph: Graph, trained: Mapping[str, Tensor], context: Context) -> None:
    """Puts trained weights into a graph, zero where its masks prune them; in place where that is allowed."""
    for name, tensor in trained.items():
        before, mask = graph.tensor(name), graph.weights[name].mask
        value = tensor.to(before.dtype)
        if mask is not None:
            value = serial.masked(value, mask)
        context.write(graph, name, value.contiguous())
        graph.update(name, trained="under")


class Whole(Student):
    """Every trained tensor is a leaf: the graph's own where that is owned and float32, else a float32 copy, from which the graph's
    dtype is made."""

    def __init__(self, graph: Graph, names: Iterable[str], context: Context) -> None:
        super().__init__(graph, names)
        for name in self.weights:
            stored = graph.tensor(name)
            own = stored.dtype == torch.float32 and context.owns(name)
            if own and not context.may_overwrite(name, stored):
                # Lent memory: the graph gets the copy, so that nothing is held twice.
                graph.replace_tensor(name, stored.detach().clone())
                context.replaced(self.weights[name], stored, graph.tensor(name))
            leaf = graph.tensor(name).detach()
            self.leaves[name] = (leaf if own else leaf.to(torch.float32, copy=True)).requires_grad_()

    def read(self, target: str) -> Any:
        """The leaf, or what the graph holds for what is not trained."""
        leaf = self.leaves.get(target)
        if leaf is None:
            value = self.graph.read(target)
            return value.detach() if isinstance(value, Tensor) else value
        return leaf.to(self.weights[target].dtype)

    def result(self, name: str) -> Tensor:
        """The leaf."""
        return self.leaves[name].detach()


class LowRank(Student):
    """To every weight W [.., out, in], as stored, comes M * (A @ B) * alpha / rank, M its mask: it merges without losing a zero.

    A begins as zeros, so the graph computes at first what it did. Hu et al. 2021, arXiv:2106.09685; under masks: Zimmer et al.
    2023, arXiv:2312.15230.
    """

    def __init__(self, graph: Graph, names: Iterable[str], rank: int, alpha: float, seed: int) -> None:
        super().__init__(graph, names)
        self._masks_of, self.masks = self.masks, {}  # the leaves are small matrices that have none
        self._scale = alpha / rank
        generator = torch.Generator().manual_seed(seed)
        for name, weight in self.weights.items():
            *experts, rows, columns = weight.shape
            few = min(rank, rows, columns)
            device = graph.tensor(name).device
            bound = columns**-0.5
            right = torch.empty(*experts, few, columns).uniform_(-bound, bound, generator=generator)
            self.leaves[f"{name} A"] = torch.zeros(*experts, rows, few, device=device).requires_grad_()
            self.leaves[f"{name} B"] = right.to(device).requires_grad_()

    def read(self, target: str) -> Any:
        """The merged weight, through which both factors have gradients."""
        if target not in self.weights:
            value = self.graph.read(target)
            return value.detach() if isinstance(value, Tensor) else value
        return self._merged(target).to(self.weights[target].dtype)

    def _merged(self, name: str) -> Tensor:
        product = (self.leaves[f"{name} A"] @ self.leaves[f"{name} B"]) * self._scale
        mask = self._masks_of.get(name)
        stored = self.graph.tensor(name).detach().float()
        return stored + (product if mask is None else torch.where(mask, product, product.new_zeros(())))

    def result(self, name: str) -> Tensor:
        """Merged."""
        return self._merged(name).detach()


def trained_names(graph: Graph, method: str) -> list[str]:
    """Weights with masks, and what has one dimension: norms and biases."""
    masked = [w.name for w in graph.masked()]
    if not masked:
        raise RecoverError(
            "recover trains under masks, and no weight has one; prune first, for instance with wanda(0.5),freeze"
        )
    spare = [w.name for w in graph.weights.values() if len(w.shape) == 1 and w.dtype.is_floating_point]
    if method == "norms" and not spare:
        raise RecoverError(
            "recover(method='norms') trains norms and biases, and this model has none; take method='distill'"
        )
    return {"norms": spare, "lora": masked}.get(method, [*masked, *spare])
