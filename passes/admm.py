"""ADMM: weights that keep a layer's outputs, and zeros where the mask wants them, brought together round by round.

Boža 2024, arXiv:2401.02938, on the Gram matrix that SparseGPT uses. Notation as there: H is that matrix with every input column
scaled to norm 1, and damped; Z the weights that obey the mask, U the scaled dual. The mask is chosen anew in the first rounds,
from all of a matrix, since in these units a weight's square is what its loss alone costs, whatever its row. Two things differ from
the paper. On SmolLM2, masks from a whole matrix instead of a row err by 11 % less; over-relaxation (Boyd et al. 2011, 3.4.3) and
a steeper schedule take half the rounds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from math import gcd
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from sparsec import serial
from sparsec.calibrate import Statistics
from sparsec.errors import ActivationError, SelectionError, SpecError, some
from sparsec.ir.facts import Pruned, Weight
from sparsec.ir.graph import Graph
from sparsec.patterns import CHUNK, Pattern
from sparsec.pipeline.allocation import Share
from sparsec.pipeline.base import Context, PassResult
from sparsec.pipeline.options import check_positive
from sparsec.pipeline.pruning import CalibratedPruning, check_finite
from sparsec.pipeline.settled import joined_masks

_WHAT_HOLDS = {
    False: "compile(..., copy=True) holds them",
    True: "after a training, prune and bring back in one pass, as in admm(0.7)",
}
RELAXATION = 1.5
CHOOSING = 0.8
"""Share of the rounds after which the mask stays."""
_MOST_DAMPING = 10.0
_WEAK = 1e-2
"""Of the median of the Gram matrix's diagonal: columns below it are damped more, so many times as they are smaller."""
_STILL = 1e4
"""Columns damped so many times more keep their weights as they are."""
_SAMPLED = 1 << 16
"""Weights of a matrix that tell where to cut in a round whose mask is not kept."""


@dataclass(frozen=True)
class ADMM(CalibratedPruning):
    """Chooses masks and the weights that stay together; without a sparsity it keeps earlier masks and updates the weights.

    The weights as the model came in are what the outputs are brought back to, also where earlier passes changed them; of those that
    were trained since, the trained ones. rounds: each
    costs one product with the Gram matrix. rho: how strongly the mask pulls; below 0.6 the mask does not settle. damping: share of
    the mean of H's diagonal that is added to it; raised tenfold, and said so, while H cannot be factored.
    """

    name: ClassVar[str] = "admm"
    examples: ClassVar[tuple[str, ...]] = (
        "admm(0.5)",
        "wanda(0.5),admm",
        "admm(0.5, rounds=20, rho=1.0, damping=0.01, feed='dense')",
        "admm(0.5, order='true')",
    )
    gram: ClassVar[bool] = True
    dense: ClassVar[bool] = True
    otherwise: ClassVar[str] = "give a share of zeros, as in admm(0.5)"
    without_share: ClassVar[str] = "without a sparsity admm keeps earlier masks"

    rounds: int = field(default=10, kw_only=True)
    rho: float = field(default=0.8, kw_only=True)
    damping: float = field(default=0.1, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self.rounds, "rounds")
        for what, value, most in (("rho", self.rho, 100), ("damping", self.damping, _MOST_DAMPING)):
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= most:
                raise SpecError(f"{what} must be in (0, {most:g}], got {value!r}; the default is {_default(what)}")
        if self.keeps:
            object.__setattr__(self, "requires", frozenset({"mask"}))

    @property
    def keeps(self) -> bool:
        """Whether earlier masks are kept as they are."""
        return self.sparsity is None

    @property
    def needs_dense(self) -> bool:
        """Where an earlier pass may have written its zeros and updates into the weights."""
        return self.keeps

    def selected(self, graph: Graph) -> list[Weight]:
        """Of the masks that are kept, those whose weights were not trained under them. SelectionError where there is no mask."""
        chosen = super().selected(graph)
        if not self.keeps:
            return chosen
        masked = [w for w in chosen if w.mask is not None]
        if not masked:
            names = ", ".join(w.name for w in chosen[:3])
            raise SelectionError(
                f"admm without a sparsity keeps earlier masks, and none of what it selects has one ({names}); name what was "
                "pruned with targets=, or give a share, as in admm(0.5)"
            )
        return [w for w in masked if not _settled(w)]

    def shares(self, graph: Graph, chosen: Sequence[Weight], context: Context) -> dict[str, Share]:
        """Those of the masks that are kept, where they are. Raises WeightError for dense weights that hold NaN or inf."""
        for weight in chosen:
            if weight.name in context.dense:
                check_finite(context.dense[weight.name], weight)
        if not self.keeps:
            return super().shares(graph, chosen, context)
        return {w.name: Share(1 - graph.kept(w.name) / max(1, w.numel)) for w in chosen}

    def run(self, graph: Graph, context: Context) -> PassResult:
        """As the others; and says what outputs are brought back to, where those are not the dense weights' own."""
        done = [w.name for w in super().selected(graph) if _settled(w)] if self.keeps else []
        said = []
        if done:
            said.append(
                f"{some(done)}: trained under the mask that admm without a sparsity keeps, so that there is nothing to bring back; "
                "put admm before the training, or prune further, as in admm(0.7)"
            )
            if not self.selected(graph):
                summary = f"{len(done)} matrices stay as they were trained"
                return PassResult(changed=False, summary=summary, notes=tuple(said))
        before = dict(graph.weights)
        result = super().run(graph, context)
        taken = [w for w in before.values() if graph.weights[w.name].pruned is not w.pruned]
        lost = [w for w in taken if _replaced(w) and (w.trained or w.name not in context.dense)]
        trained = [w.name for w in taken if w.trained and w not in lost]
        if trained:
            said.append(f"{some(trained)}: outputs were brought back to those of the weights as they were trained")
        if lost:
            said.append(
                f"{', '.join(w.name for w in lost)}: an earlier pass replaced the dense weights, and they are not held any more, "
                "so outputs were brought back to those of the weights that it left; "
                + _WHAT_HOLDS[any(w.trained for w in lost)]
            )
        return replace(result, notes=(*result.notes, *said))

    def record(self, graph: Graph, weight: Weight, mask: Tensor, pruned: Pruned) -> None:
        """A mask that is kept stays what it is, with its pattern; what is new are the errors."""
        if not self.keeps:
            super().record(graph, weight, mask, pruned)
            return
        first = weight.pruned.criterion if weight.pruned is not None else "mask"
        told = replace(weight.pruned or pruned, error_masked=pruned.error_masked, error=pruned.error)
        graph.update(
            weight.name,
            frozen=False,
            grown=0,
            nnz=None,
            pruned=replace(told, criterion=first if first.endswith(self.name) else f"{first} + {self.name}"),
        )

    def prune(
        self, matrices: Sequence[Tensor], old: Sequence[Tensor | None], shares: Sequence[float], statistics: Statistics
    ) -> tuple[list[Tensor], list[Tensor], list[str]]:
        """All matrices together, since they share the factor; masks are chosen for each by itself.

        matrices: dense ones, with what earlier masks removed.
        """
        pattern = Pattern.parse(self.pattern)
        if statistics.blind:
            masks = [
                before.clone() if self.keeps and before is not None else pattern.mask(matrix.detach(), share, before)
                for matrix, before, share in zip(matrices, old, shares, strict=True)
            ]
            return masks, [serial.masked(w.detach(), m) for w, m in zip(matrices, masks, strict=True)], []
        norms, inverse, notes = scaled_inverse(statistics.gram, self.damping, self.rho)
        weights = torch.cat([m.detach() for m in matrices]).float()
        before = joined_masks(matrices, old)
        rows = [len(m) for m in matrices]
        chosen = None if self.keeps else shares
        solved, mask = alternate(weights * norms, inverse, chosen, pattern, rows, self.rounds, before)
        dead, still = norms == 0, weakness(statistics.gram) == _STILL
        if dead.any():
            notes.append(f"{int(dead.sum())} of {len(dead)} input columns are zero in all of the text")
        solved.div_(torch.where(dead, 1, norms))
        if still.any():
            solved[:, still] = weights[:, still].masked_fill_(~mask[:, still], 0)
        return list(torch.split(mask, rows)), list(torch.split(solved, rows)), notes

    def scratch(self, rows: Sequence[int], in_features: int) -> int:
        """H, its factor and its inverse while that is made; then the inverse twice, the weights four times, and three masks."""
        return max(16 * in_features, 8 * in_features + 19 * sum(rows)) * in_features

    def enough(self, in_features: int) -> int:
        """Fewer tokens than columns leave the Gram matrix singular."""
        return in_features


def scaled_inverse(gram: Tensor, damping: float, rho: float) -> tuple[Tensor, Tensor, list[str]]:
    """(norms of the input columns [in], rho * (H + rho I)^-1 [in, in], notes), in fp32.

    gram: [in, in], the sum of x.T @ x; H is it with the norms divided out, and damping added, `weakness` times. No eigenvalue is
    below rho, so that fp32 is enough: on SmolLM2 errors are those of fp64 in four digits. Raises ActivationError when H cannot be
    factored even with ten times its mean diagonal added.
    """
    gram = gram.float()
    weak, norms = weakness(gram), gram.diagonal().sqrt()
    divisors = torch.where(norms == 0, 1, norms)
    scaled = gram / divisors
    scaled.div_(divisors[:, None])
    diagonal = scaled.diagonal().clone()
    added, notes = damping, []
    while True:
        scaled.diagonal().copy_(diagonal + added * weak + rho)
        factor, failed = torch.linalg.cholesky_ex(scaled)
        if not failed and bool(factor.isfinite().all()):
            break
        if added >= _MOST_DAMPING:
            raise ActivationError(
                f"the Gram matrix of {len(gram)} input columns cannot be factored, even with {added:g} times its mean diagonal "
                "added; calibrate on more or other text, or prune these layers with wanda"
            )
        added = min(10 * added, _MOST_DAMPING)
    if added > damping:
        notes.append(f"the Gram matrix could not be factored; damping was raised from {damping:g} to {added:g}")
    return norms, torch.cholesky_inverse(factor).mul_(rho), notes


def weakness(gram: Tensor) -> Tensor:
    """How many times more each input column is damped [in], from 1 to _STILL. A column that is nearly zero in all of the text would
    else do other columns' work with huge weights."""
    squares = gram.diagonal()
    alive = squares[squares > 0]
    if not len(alive):
        return torch.full_like(squares, _STILL)
    return (_WEAK * alive.median() / squares).clamp(1, _STILL)


def alternate(
    dense: Tensor,
    inverse: Tensor,
    shares: Sequence[float] | None,
    pattern: Pattern,
    rows: Sequence[int],
    rounds: int,
    old: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(weights, mask), both [out, in].

    dense: [out, in], times the norms of the input columns. inverse: of `scaled_inverse`. rows, shares: how many rows each of the
    matrices has whose masks are chosen for itself, and how sparse it shall be; None: `old` is the mask. What `old` removed stays
    removed and counts.

    A round of the method, over-relaxed: Z = M (W + U), U = W + U - Z, W = dense + (Z - U - dense) inverse,
    W = relaxation W + (1 - relaxation) Z. Only V = W + U is held: Z is what the mask keeps of it, and U the rest.
    """
    value = dense.clone()  # V
    choosing = choosing_rounds(rounds, pattern)
    mask = torch.empty(dense.shape, dtype=torch.bool, device=dense.device) if shares is not None else old
    assert mask is not None, "neither shares nor a mask"
    pulled, step = torch.empty_like(dense), inverse * RELAXATION
    parts = [slice(top - n, top) for top, n in zip(accumulate(rows), rows, strict=True)]
    for round_ in range(1, rounds + 1):
        for part, share in zip(parts, shares or (), strict=shares is not None):
            if round_ in choosing:
                eased = share * (1 - (1 - round_ / choosing[-1]) ** 4)
                before = None if old is None else old[part]
                _choose(mask[part], value[part], pattern, eased, before, exact=round_ == choosing[-1])
        if round_ == rounds:
            break
        for piece in _pieces(dense):
            v, w, kept = value[piece], dense[piece], value[piece] * mask[piece]
            torch.add(v, w, out=pulled[piece])
            torch.sub(kept.mul(2), pulled[piece], out=pulled[piece])  # Z - U - dense
            v.sub_(kept, alpha=RELAXATION).add_(w, alpha=RELAXATION)
        value.addmm_(pulled, step)
    return value.masked_fill_(~mask, 0), mask


def choosing_rounds(rounds: int, pattern: Pattern) -> Sequence[int]:
    """The rounds, from 1, in which the mask is chosen anew.

    N:M and blocks in 1, 3, 6, 10, ...: a choice among groups takes as long as a round, and more of them err by 0.5 % less.
    """
    last = max(1, round(CHOOSING * rounds))
    if pattern.nm is None and pattern.block is None:
        return range(1, last + 1)
    return [r for r in accumulate(range(1, last + 1)) if r <= last]


def _choose(mask: Tensor, value: Tensor, pattern: Pattern, share: float, old: Tensor | None, exact: bool) -> None:
    """The mask of one matrix, in place. exact: as the pattern says; else unstructured ones are cut where a sample says."""
    if exact or pattern.nm is not None or pattern.block is not None:
        mask.copy_(pattern.mask(value, share, old))
        return
    threshold = _threshold(value, share, old)
    for piece in _pieces(value):
        torch.gt(value[piece].abs(), threshold, out=mask[piece])
        if old is not None:
            mask[piece] &= old[piece]


def _threshold(value: Tensor, share: float, old: Tensor | None) -> float:
    """Below it, about, lies this share of the magnitudes, those that `old` removed among them."""
    flat, every = value.view(-1), max(1, value.numel() // _SAMPLED)
    while gcd(every, value.shape[1]) > 1:  # so that every column is looked at
        every += 1
    some = flat[::every].abs()
    if old is not None:
        some = some.masked_fill_(~old.reshape(-1)[::every], -1)
    below = round(share * len(some))
    if not below:
        return -0.5
    if some.device.type == "cpu":  # where NumPy takes a fifth of the time
        return float(np.partition(some.numpy(), below - 1)[below - 1])
    return float(some.kthvalue(below).values)


def _pieces(matrix: Tensor) -> list[slice]:
    """Rows that are worked on together: on a CPU so few that they stay in its cache, and that torch takes one thread."""
    rows = max(1, CHUNK // max(1, matrix.shape[1])) if matrix.device.type == "cpu" else max(1, len(matrix))
    return [slice(start, start + rows) for start in range(0, len(matrix), rows)]


def _settled(weight: Weight) -> bool:
    """Whether it was trained under its mask, and is zero where that prunes."""
    return weight.trained == "under" and weight.frozen


def _replaced(weight: Weight) -> bool:
    """Whether the weight that outputs are to be brought back to has been overwritten: by a mask's zeros, or by updates."""
    return (weight.frozen or _updated(weight)) and not _settled(weight)


def _updated(weight: Weight) -> bool:
    """Whether the pass that pruned it changed the weights that it kept."""
    return weight.pruned is not None and weight.pruned.error != weight.pruned.error_masked


def _default(option: str) -> object:
    return ADMM.__dataclass_fields__[option].default
