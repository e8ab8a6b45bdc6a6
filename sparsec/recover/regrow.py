"""Masks that move while training: the weakest of the kept weights go, and as many others come, where the gradient is largest
(RigL, Evci et al. 2020, arXiv:1911.11134) or at random (SET, Mocanu et al. 2018, arXiv:1707.04780).

Counts stay exact in every matrix and, of N:M patterns, in every group; blocks go and come whole. What comes begins at zero, and
`receive` tells which moments it begins with.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparsec import serial
from sparsec.ir.facts import Weight
from sparsec.patterns import Pattern
from sparsec.private import is_traceable_wrapper_subclass

WAYS = ("rigl", "set")
_UNTIL = 0.75
"""Share of the training after which masks stay as they are."""
_SQUARES = ("exp_avg_sq", "max_exp_avg_sq", "square_avg")
"""Averages of squared gradients in torch's optimisers, by whose root a step is divided."""


@dataclass(frozen=True)
class Regrowth:
    """way: `rigl` or `set`. share: of the kept weights that move at first; it falls as a cosine. every: steps between two moves."""

    way: str
    share: float = 0.3
    every: int = 20
    seed: int = 0

    def due(self, step: int, done: float) -> bool:
        """Whether masks move in a step, from 0; done: share of the training."""
        return step > 0 and step % self.every == 0 and done < _UNTIL

    def moving(self, done: float) -> float:
        """The share that moves now."""
        return self.share / 2 * (1 + math.cos(math.pi * min(1.0, done / _UNTIL)))

    def growth(self, gradient: Tensor, step: int, number: int) -> Tensor:
        """How much each weight wants to come: what `moved` takes. number: of the matrix, so that no two draw the same."""
        if self.way == "rigl":
            return gradient.abs()
        generator = torch.Generator().manual_seed(hash((self.seed, step, number)) % (1 << 63))
        return torch.rand(gradient.shape, generator=generator).to(gradient.device)

    @torch.no_grad()
    def move(
        self,
        weight: Weight,
        mask: Tensor,
        leaf: Tensor,
        gradient: Tensor,
        optimizer: torch.optim.Optimizer,
        *,
        step: int,
        number: int,
        done: float,
    ) -> Tensor:
        """The new mask of one weight; what went is zero in `leaf`, which is trained, in its gradient and in its moments.

        gradient: of all of the weight, before it is masked; `set` reads its shape alone.
        """
        new = moved_weight(weight, mask, leaf, self.growth(gradient, step, number), self.moving(done))
        forget(leaf, new, optimizer)
        receive(leaf, mask, new, optimizer)
        return new


@torch.no_grad()
def receive(leaf: Tensor, before: Tensor, now: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """Gives what came into a mask the mean of the second moments of what stayed.

    Zero would make Adam's steps up to six times the learning rate, for dozens of steps: the second moment rises more slowly than
    the first (beta2 0.999 and beta1 0.9), and what corrects for that counts the steps of the whole tensor.
    """
    came, stayed = now & ~before, now & before
    if not bool(came.any()) or not bool(stayed.any()):
        return
    for name in _SQUARES:
        moment = optimizer.state.get(leaf, {}).get(name)
        if _plain(moment) and moment.shape == now.shape:
            moment[came.to(moment.device)] = moment[stayed.to(moment.device)].float().mean().to(moment.dtype)


@torch.no_grad()
def forget(leaf: Tensor, mask: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """Makes zero what a mask prunes: in a leaf, its gradient and an optimiser's moments of it. Moments that a library keeps in
    other numbers than floats, or in tensors of its own kind, stay."""
    if leaf.grad is not None and leaf.grad.layout != torch.strided:
        leaf.grad = under(mask, leaf.grad)
    for tensor in (leaf, leaf.grad, *optimizer.state.get(leaf, {}).values()):
        if _plain(tensor) and tensor.shape == mask.shape:
            serial.masked(tensor, mask.to(tensor.device), out=tensor)


def _plain(value: Any) -> bool:
    if is_traceable_wrapper_subclass(value) or not isinstance(value, Tensor):
        return False
    return value.layout == torch.strided and value.is_floating_point()


def under(mask: Tensor, gradient: Tensor) -> Tensor:
    """A gradient, of all of a weight or of rows of it, exactly zero where the mask prunes, whatever stood there."""
    if gradient.layout == torch.strided:
        return torch.where(mask, gradient, 0)
    rows = gradient.coalesce()  # of an embedding
    values = torch.where(mask[rows.indices()[0]], rows.values(), 0)
    return torch.sparse_coo_tensor(rows.indices(), values, rows.shape, is_coalesced=True, check_invariants=False)


def moved_weight(weight: Weight, mask: Tensor, values: Tensor, growth: Tensor, share: float) -> Tensor:
    """A weight's new mask, all of its shape as stored; each of its matrices by itself."""
    if weight.kind == "experts":
        parts = zip(mask, values, growth, strict=True)
        return torch.stack([_turned(weight, *part, share) for part in parts])
    return _turned(weight, mask, values, growth, share)


def _turned(weight: Weight, mask: Tensor, values: Tensor, growth: Tensor, share: float) -> Tensor:
    pattern = Pattern.parse(weight.pattern or "unstructured")
    if not weight.transposed:
        return moved(mask, values, growth, pattern, share)
    return moved(mask.t(), values.t(), growth.t(), pattern, share).t().contiguous()


def moved(mask: Tensor, values: Tensor, growth: Tensor, pattern: Pattern, share: float) -> Tensor:
    """A mask [out, in] of as many weights and the same pattern, in which a share of what it kept has gone for others.

    values: the smallest of the kept ones go. growth: not negative, the largest of those that are then not kept come.
    """
    if pattern.nm is not None:
        return _moved_in_groups(mask, values, growth, pattern.nm[1], share)
    if pattern.block is not None:
        r, c = pattern.block
        kept = _blocks(mask.float(), r, c) > 0
        small = _moved_units(
            kept, _blocks(values.float().square(), r, c), _blocks(growth.float().square(), r, c), share
        )
        return small.repeat_interleave(r, 0).repeat_interleave(c, 1)
    return _moved_units(mask, values.float().abs(), growth, share)


def _moved_units(kept: Tensor, sizes: Tensor, growth: Tensor, share: float) -> Tensor:
    """Units of any shape, each kept or not."""
    flat = kept.flatten().clone()
    inside = int(flat.sum())
    count = min(round(share * inside), flat.numel() - inside)
    if count <= 0:
        return kept.clone()
    weakest = sizes.flatten().masked_fill(~flat, math.inf).topk(count, largest=False).indices
    flat[weakest] = False
    strongest = growth.flatten().float().masked_fill(flat, -1.0).topk(count).indices
    flat[strongest] = True
    return flat.view(kept.shape)


def _moved_in_groups(mask: Tensor, values: Tensor, growth: Tensor, wide: int, share: float) -> Tensor:
    """At most one swap in a group: its weakest for the one that grows most, in the groups where that grows most."""
    kept = mask.reshape(-1, wide).clone()
    sizes = values.float().abs().reshape(-1, wide).masked_fill(~kept, math.inf)
    wanted = growth.float().reshape(-1, wide).masked_fill(kept, -1.0)
    best = wanted.max(1)
    can = kept.any(1) & ~kept.all(1)
    count = min(round(share * int(kept.sum())), int(can.sum()))
    if count <= 0:
        return mask.clone()
    chosen = best.values.masked_fill(~can, -2.0).topk(count).indices
    kept[chosen, sizes[chosen].argmin(1)] = False
    kept[chosen, best.indices[chosen]] = True
    return kept.view(mask.shape)


def _blocks(matrix: Tensor, r: int, c: int) -> Tensor:
    """[out, in] -> [out / r, in / c], the sums of blocks."""
    out_features, in_features = matrix.shape
    return matrix.reshape(out_features // r, r, in_features // c, c).sum((1, 3))
