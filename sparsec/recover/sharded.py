"""A student whose weights, gradients and moments lie in shares over the ranks, by torch's FSDP2: a stretch is whole while it runs.

What several stretches read, or the head, is whole on every rank, and its gradients are summed.
"""

from __future__ import annotations

import socket
from collections.abc import Iterable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, fx, nn

from sparsec import memory
from sparsec.ir.graph import Graph
from sparsec.pipeline.base import Context
from sparsec.ranks import Ranks
from sparsec.recover.losses import finite
from sparsec.recover.stretches import Run, Stretches, Values
from sparsec.recover.student import Student, summed, write_trained

FULL = 0.8
"""Share of the memory that is free from which on weights in training are shared out."""
_STATE = 20
"""Bytes in training of a weight: itself, its gradient, two moments, and the best value so far, in float32."""


def to_be_shared(wanted: bool | None, graph: Graph, names: Iterable[str], ranks: Ranks) -> bool:
    """Whether weights are to be shared out over the ranks. wanted: None where they fit on no rank as a whole."""
    if ranks.alone or wanted is not None:
        return bool(wanted) and not ranks.alone
    device = next(graph.module.parameters()).device
    beside = ranks.told(socket.gethostname()).count(socket.gethostname()) if device.type == "cpu" else 1
    free = memory.free(device)
    needed = _STATE * sum(graph.weights[name].numel for name in names)
    return any(ranks.told(free is not None and needed > FULL * free / beside))


def told_sharing(shared: bool, wanted: bool | None, ranks: Ranks) -> list[str]:
    """What is to be said of it."""
    if shared:
        return [f"each of {ranks.count} ranks had a share of every weight and its moments"]
    return ["shard=True shares weights out over ranks, and there is one; torchrun starts more"] if wanted else []


class _Part(nn.Module):
    """Weights of one stretch. Within `forward` they are whole, elsewhere shares: fully_shard sees to that."""

    def __init__(self, weights: Sequence[Tensor]) -> None:
        super().__init__()
        self.weights = nn.ParameterList([nn.Parameter(weight) for weight in weights])

    def forward(self, values: Values, run: Run) -> Values:
        """`values` by themselves: fully_shard looks for what needs gradients among the arguments."""
        return run(values)


class ShardedWhole(Student):
    """leaves, masks: of this rank's share of a weight, cut in the first dimension, or of all of it."""

    def __init__(self, graph: Graph, names: Iterable[str], ranks: Ranks, stretches: Stretches) -> None:
        super().__init__(graph, names)
        device = next(graph.module.parameters()).device
        self._ranks, self._mesh = ranks, ranks.mesh(device)
        self._parts: dict[int, _Part] = {}
        self._home: dict[str, tuple[_Part, int]] = {}
        cuts = stretches.cuts()
        read = [_stored_tensors(stretches, start, end) for start, end in pairwise([*cuts, len(stretches.steps)])]
        for start, own, others in ((cuts[i], read[i], [*read[:i], *read[i + 1 :]]) for i in range(len(cuts) - 1)):
            mine = [name for name in self.weights if name in own and not any(name in other for other in others)]
            if mine:
                self._share_out(start, mine)
        for name in self.weights:
            if name not in self._home:
                self.leaves[name] = graph.tensor(name).detach().to(torch.float32, copy=True).requires_grad_()

    def _share_out(self, start: int, names: Sequence[str]) -> None:
        # Here, since they take half a second, and not every build of torch has them.
        from torch.distributed.fsdp import fully_shard
        from torch.distributed.tensor import Shard, distribute_tensor

        part = _Part([self.graph.tensor(name).detach().to(torch.float32, copy=True) for name in names])
        sharded: Any = fully_shard(part, mesh=self._mesh, reshard_after_forward=True)
        sharded.unshard()  # once, since torch may lay shares out anew before their first use
        sharded.reshard()
        self._parts[start] = part
        for number, name in enumerate(names):
            self._home[name] = part, number
            self.leaves[name] = _local(self._shared(name)).detach().requires_grad_()
            if (mask := self.masks.get(name)) is not None:
                self.masks[name] = _local(distribute_tensor(mask, self._mesh, [Shard(0)], src_data_rank=None)).clone()
        memory.trim()

    def _shared(self, name: str) -> Tensor:
        part, number = self._home[name]
        shared: Tensor = part.weights[number]
        return shared

    def run(self, start: int, values: Values, run: Run) -> Values:
        """With the weights of that stretch whole."""
        part = self._parts.get(start)
        if part is None:
            return run(values)
        found: Values = part(values, partial(self._touched, part, run))
        return found

    def _touched(self, part: _Part, run: Run, values: Values) -> Values:
        """Every rank has a gradient of every weight: an expert may see no token here and some elsewhere. No view leaves a stretch:
        what is written into one would take the hook along that makes weights whole again."""
        found = run(values)
        if not torch.is_grad_enabled():
            return found
        mine = [name for name, (home, _) in self._home.items() if home is part]
        experts = [self._shared(name).reshape(-1)[0] for name in mine if self.weights[name].kind == "experts"]
        nothing = torch.stack(experts).sum() * 0 if experts else None
        for node, value in found.items():
            if isinstance(value, Tensor) and value.requires_grad:
                if nothing is not None:
                    value, nothing = value + nothing.to(value.dtype), None
                found[node] = value if value._base is None else value.clone()
        return found

    def read(self, target: str) -> Any:
        """The leaf, or what the graph holds for what is not trained. Of shared weights only while their stretch runs."""
        if target not in self.weights:
            value = self.graph.read(target)
            return value.detach() if isinstance(value, Tensor) else value
        leaf = self._shared(target) if target in self._home else self.leaves[target]
        assert not hasattr(leaf, "full_tensor"), f"{target} is read outside of its stretch"
        return leaf.to(self.weights[target].dtype)

    def sum_gradients(self, ranks: Ranks) -> None:
        """Those of shares were summed by torch, as means over the ranks."""
        for name in self._home:
            shared = self._shared(name)
            if shared.grad is not None:
                self.leaves[name].grad = _local(shared.grad).detach().mul_(ranks.count)
                shared.grad = None
        summed([leaf for name, leaf in self.leaves.items() if name not in self._home], ranks)

    def clip(self, most: float) -> Tensor:
        """By the norm of all shares together."""
        found = {name: leaf.grad for name, leaf in self.leaves.items() if leaf.grad is not None}
        parts = [[grad for name, grad in found.items() if (name in self._home) is shared] for shared in (True, False)]
        squares, rest = (torch.nn.utils.get_total_norm(part).double().cpu().square() for part in parts)
        self._ranks.sum([squares])
        norm = (squares + rest).sqrt().float()
        device = self._mesh.device_type
        torch.nn.utils.clip_grads_with_norm_([self.leaves[name] for name in found], most, norm.to(device))
        return norm

    def finite(self, gradients: Sequence[Tensor]) -> bool:
        """On all ranks."""
        return all(self._ranks.told(finite(*gradients)))

    def result(self, name: str) -> Tensor:
        """All ranks ask for it together."""
        if name not in self._home:
            return self.leaves[name].detach()
        shared: Any = self._shared(name)
        whole: Tensor = shared.full_tensor().detach()
        return whole

    @torch.no_grad()
    def settle(self, context: Context) -> None:
        """One after the other, so that no more than one is whole."""
        for name in self.weights:
            write_trained(self.graph, {name: self.result(name)}, context)


def _local(tensor: Any) -> Tensor:
    """This rank's part of a DTensor."""
    part: Tensor = tensor.to_local()
    return part


def _stored_tensors(stretches: Stretches, start: int, end: int) -> set[str]:
    """Names of those that are read in [start, end), through views too."""
    found, seen = set[str](), set[fx.Node]()
    waiting = [
        used for node in stretches.steps[start:end] if node not in stretches.views for used in node.all_input_nodes
    ]
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        if node.op == "get_attr":
            found.add(str(node.target))
        elif node in stretches.views:
            waiting += node.all_input_nodes
    return found
