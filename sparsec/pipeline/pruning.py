"""What passes that prune have in common: their options, what they refuse, and the records they leave.

An algorithm is a subclass that says how much a weight matters; everything else is here or in `sparsec.patterns`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from sparsec.calibrate import FEEDS, ORDERS, Site, Statistics, calibrate
from sparsec.errors import PipelineError, SpecError, WeightError
from sparsec.ir.facts import Pruned, Weight
from sparsec.ir.graph import Graph
from sparsec.patterns import CHUNK, Pattern
from sparsec.pipeline.base import Context, Effect, Pass, PassResult
from sparsec.pipeline.options import check_choice, check_ignore, check_patterns, check_sparsity
from sparsec.pipeline.selection import select

_SLACK = 1e-9


@dataclass(frozen=True)
class PruningPass(Pass):
    """Masks weights of linear layers until a share of them is zero.

    sparsity: share of zeros; an N:M pattern says it by itself. pattern: `unstructured`, `N:M` (`2:4` keeps two of every four
    neighbours in a row) or `block:RxC`. targets and ignore select weights; by default all of attention and MLP.
    """

    effect: ClassVar[Effect] = Effect.LOSSY
    produces: ClassVar[frozenset[str]] = frozenset({"mask", "pattern"})
    invalidates: ClassVar[frozenset[str]] = frozenset({"frozen", "sparsity", "flops"})
    excludes: ClassVar[frozenset[str]] = frozenset({"lowered"})

    sparsity: float | None = None
    pattern: str = field(default="unstructured", kw_only=True)
    targets: tuple[str, ...] | None = field(default=None, kw_only=True)
    ignore: tuple[str, ...] = field(default=(), kw_only=True)

    def __post_init__(self) -> None:
        fixed = Pattern.parse(self.pattern).sparsity
        if self.sparsity is None and fixed is None:
            raise SpecError(f"a share of zeros is missing; half of the weights is {self.name}(0.5)")
        sparsity = check_sparsity(fixed if self.sparsity is None else self.sparsity)
        if fixed is not None and abs(sparsity - fixed) > _SLACK:
            raise SpecError(f"pattern {self.pattern!r} makes a sparsity of {fixed:g}, got {sparsity:g}; leave one out")
        object.__setattr__(self, "sparsity", sparsity)
        object.__setattr__(self, "targets", check_patterns(self.targets, "targets"))
        object.__setattr__(self, "ignore", check_ignore(self.ignore))

    @property
    def share(self) -> float:
        """The sparsity, which is known once the options are checked."""
        assert self.sparsity is not None
        return self.sparsity

    def selected(self, graph: Graph) -> list[Weight]:
        """The weights to prune. Raises SelectionError; WeightError for NaN, inf and shapes that the pattern does not fit."""
        chosen = select(graph, self.targets, self.ignore)
        pattern = Pattern.parse(self.pattern)
        for weight in chosen:
            for why in pattern.misfits(*weight.matrix_shape):
                raise WeightError(f"{weight.name}: {why}; leave it out with ignore=({_owner(weight)!r},)")
            check_finite(graph.tensor(weight.name), weight)
        return chosen

    def record(self, graph: Graph, weight: Weight, mask: Tensor, pruned: Pruned) -> None:
        """Writes one weight's mask [out, in] down."""
        stored = mask.t().contiguous() if weight.kind == "conv1d" else mask
        graph.update(weight.name, mask=stored, pattern=self.pattern, frozen=False, nnz=None, pruned=pruned)

    def result(self, graph: Graph, chosen: Sequence[Weight], how: str, notes: Sequence[str] = ()) -> PassResult:
        """What was masked."""
        total = sum(w.numel for w in chosen)
        zeros = total - sum(graph.weights[w.name].kept for w in chosen)
        share = zeros / total if total else 0.0
        summary = f"{zeros:,} of {total:,} weights in {len(chosen)} matrices masked ({100 * share:.2f} %, {how})"
        return PassResult(changed=bool(chosen), summary=summary, notes=tuple(notes))


@dataclass(frozen=True)
class CalibratedPruning(PruningPass):
    """Pruning that looks at what each layer is given, block by block.

    feed: `pruned` feeds each block by the pruned ones before it, `dense` by the unpruned ones. order: `block` shows every layer
    the inputs of its unpruned block, as the papers' code does; `true` prunes layer by layer.
    """

    gram: ClassVar[bool] = False  # whether the statistics hold the Gram matrix

    feed: str = field(default="pruned", kw_only=True)
    order: str = field(default="block", kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self.feed, "feed", FEEDS)
        check_choice(self.order, "order", ORDERS)
        if self.feed == "dense" and self.order == "true":
            raise SpecError("order='true' prunes by what pruned layers make, and feed='dense' by what unpruned ones do")

    @property
    def needs_calibration(self) -> bool:
        """Always."""
        return True

    @abstractmethod
    def prune(
        self, matrices: Sequence[Tensor], old: Sequence[Tensor | None], statistics: Statistics
    ) -> tuple[list[Tensor], list[Tensor] | None, list[str]]:
        """Masks [out, in], new weights where they change, and notes, for matrices [out, in] that read the same values.

        old: earlier masks; what they removed is zero in the matrices.
        """

    def run(self, graph: Graph, context: Context) -> PassResult:
        """Raises PipelineError without calibration data, ActivationError, SelectionError, WeightError."""
        data = context.calibration
        if data is None:
            raise PipelineError(f"the pass {self.name!r} needs calibration data; {NO_CALIBRATION}")
        chosen = self.selected(graph)
        notes: list[str] = []

        def prune(site: Site, statistics: Statistics) -> None:
            weights = [graph.weights[name] for name in site.weights]
            old = [graph.mask_matrix(name) for name in site.weights]
            before = [_masked(graph.matrix(n), mask) for n, mask in zip(site.weights, old, strict=True)]
            masks, updated, said = self.prune(before, old, statistics)
            notes.extend(f"{', '.join(site.weights)}: {text}" for text in said)
            sample = statistics.sample
            for i, (weight, mask) in enumerate(zip(weights, masks, strict=True)):
                cut = _masked(before[i], mask)
                error = masked_error = _relative_error(before[i], cut, sample)
                if updated is not None:
                    error = _relative_error(before[i], updated[i].to(weight.dtype), sample)
                    graph.write_matrix(weight.name, updated[i], in_place=context.owns_weights)
                pruned = Pruned(self.name, self.share, masked_error, error)
                self.record(graph, weight, mask, pruned)

        profile = calibrate(
            graph,
            data,
            [w.name for w in chosen],
            prune,
            gram=self.gram,
            feed=self.feed,
            order=self.order,
            step=lambda done, total: context.step(self.name, done, total),
        )
        how = f"on {data.source}; {profile}"
        return self.result(graph, chosen, how, notes)


NO_CALIBRATION = (
    "in Python give calibration= token ids [sequences, length], a list of strings, or a text file's path with tokenizer=...; "
    "on the command line --calibration FILE"
)


def check_finite(tensor: Tensor, weight: Weight) -> None:
    """Raises WeightError for NaN or inf."""
    # A piece at a time: isfinite of a whole weight would take more scratch than the threshold search.
    parts = torch.split(tensor.detach().reshape(-1), CHUNK)
    bad = sum(int(part.isfinite().logical_not().count_nonzero()) for part in parts)
    if bad:
        raise WeightError(
            f"{weight.name}: holds {bad} NaN or inf among {tensor.numel()} values, which have no magnitude to compare; "
            f"repair the checkpoint, or leave it out with ignore=({_owner(weight)!r},)"
        )


def _owner(weight: Weight) -> str:
    return weight.owners[0] if weight.owners else weight.name


def _masked(matrix: Tensor, mask: Tensor | None) -> Tensor:
    return (
        matrix if mask is None else torch.where(mask, matrix, torch.zeros((), dtype=matrix.dtype, device=matrix.device))
    )


def _relative_error(before: Tensor, after: Tensor, sample: Tensor) -> float:
    """Mean square of (before - after) @ x over that of before @ x, on sampled rows x [rows, in]."""
    dense = (sample @ before.float().t()).square().sum(dtype=torch.float64)
    lost = (sample @ (before.float() - after.float()).t()).square().sum(dtype=torch.float64)
    return float(lost / dense) if dense > 0 else 0.0
