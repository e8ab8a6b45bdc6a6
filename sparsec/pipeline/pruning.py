"""What passes that prune have in common: their options, what they refuse, and the records they leave.

An algorithm is a subclass that says how much a weight matters; everything else is here or in `sparsec.patterns`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from sparsec.calibrate import FEEDS, ORDERS, Site, Statistics, calibrate
from sparsec.calibrate.rehearsal import rehearse
from sparsec.cost.phase import Phase
from sparsec.errors import ActivationError, PipelineError, SpecError, WeightError
from sparsec.ir.facts import Pruned, Weight
from sparsec.ir.graph import Graph
from sparsec.patterns import CHUNK, Pattern
from sparsec.pipeline.allocation import (
    CALIBRATED,
    Share,
    Table,
    allocate,
    by_table,
    check_allocation,
    check_spread,
    stored_mask,
)
from sparsec.pipeline.base import Context, Effect, Pass, PassResult
from sparsec.pipeline.foreseen import Foreseen
from sparsec.pipeline.options import check_choice, check_ignore, check_patterns, check_sparsity
from sparsec.pipeline.selection import select_weights
from sparsec.pipeline.settled import Settled
from sparsec.spill import Made

_SLACK = 1e-9


@dataclass(frozen=True)
class PruningPass(Pass):
    """Masks weights of linear layers until a share of them is zero.

    sparsity: share of zeros; an N:M pattern says it by itself. pattern: `unstructured`, `N:M` (`2:4` keeps two of every four
    neighbours in a row) or `block:RxC`. allocation: how the zeros are shared out among layers: `uniform`, `global`, `owl`,
    `alphapruning`, `sensitivity`, or pairs of a pattern and a sparsity (default: uniform, unless the pass says otherwise); spread:
    how far apart layers then are. targets and ignore select weights; by default all of attention, MLP and experts.
    """

    effect: ClassVar[Effect] = Effect.LOSSY
    produces: ClassVar[frozenset[str]] = frozenset({"mask", "pattern"})
    invalidates: ClassVar[frozenset[str]] = frozenset({"frozen", "sparsity", "flops"})
    excludes: ClassVar[frozenset[str]] = frozenset({"lowered"})

    without_share: ClassVar[str] = ""  # what the pass does where no sparsity is given; empty: it needs one

    sparsity: float | None = None
    pattern: str = field(default="unstructured", kw_only=True)
    allocation: str | Table | None = field(default=None, kw_only=True)
    spread: float | None = field(default=None, kw_only=True)
    targets: tuple[str, ...] | None = field(default=None, kw_only=True)
    ignore: tuple[str, ...] = field(default=(), kw_only=True)

    def __post_init__(self) -> None:
        fixed = Pattern.parse(self.pattern).sparsity
        object.__setattr__(self, "targets", check_patterns(self.targets, "targets"))
        object.__setattr__(self, "ignore", check_ignore(self.ignore))
        if self.sparsity is None and fixed is None:
            self._check_without_share()
            return
        sparsity = check_sparsity(fixed if self.sparsity is None else self.sparsity)
        if fixed is not None and abs(sparsity - fixed) > _SLACK:
            raise SpecError(f"pattern {self.pattern!r} makes a sparsity of {fixed:g}, got {sparsity:g}; leave one out")
        object.__setattr__(self, "sparsity", sparsity)
        if self.allocation is not None:
            object.__setattr__(self, "allocation", check_allocation(self.allocation))
        check_spread(self.spread, self.sharing)
        if fixed is not None and self.sharing != "uniform":
            raise SpecError(f"pattern {self.pattern!r} makes every layer equally sparse; leave allocation out")

    def _check_without_share(self) -> None:
        """Raises SpecError where the pass chooses masks, or is told how to."""
        example = f"half of the weights is {self.name}(0.5)"
        if not self.without_share:
            raise SpecError(f"a share of zeros is missing; {example}")
        for option in ("pattern", "allocation", "spread"):
            if getattr(self, option) not in (None, "unstructured"):
                raise SpecError(f"{option} is of masks that are chosen, and {self.without_share}; {example}")

    @property
    def needs_calibration(self) -> bool:
        """Whether the allocation has to see what layers are given."""
        return self.allocation in CALIBRATED

    @property
    def sharing(self) -> str | Table:
        """The allocation, as given or by default."""
        return "uniform" if self.allocation is None else self.allocation

    @property
    def share(self) -> float:
        """The sparsity, which is known once the options are checked."""
        assert self.sparsity is not None
        return self.sparsity

    def selected(self, graph: Graph) -> list[Weight]:
        """The weights to prune. Raises SelectionError; WeightError for NaN, inf and shapes that the pattern does not fit."""
        chosen = self.fitting(graph)
        for weight in chosen:
            check_finite(graph.tensor(weight.name), weight)
        return chosen

    def fitting(self, graph: Graph) -> list[Weight]:
        """The weights to prune, by names and shapes alone. Raises SelectionError, and WeightError as `selected` does for shapes."""
        chosen = select_weights(graph, self.targets, self.ignore)
        pattern = Pattern.parse(self.pattern)
        for weight in chosen:
            for why in pattern.misfits(*weight.matrix_shape):
                raise WeightError(f"{weight.name}: {why}; leave it out with ignore=({_owner(weight)!r},)")
        return chosen

    def foresee(self, graph: Graph, chosen: Sequence[Weight], foreseen: Foreseen) -> None:
        """Writes down the masks that these weights would get."""
        if self.sparsity is None:  # those that are there stay
            return
        shares = dict.fromkeys((w.name for w in chosen), self.share)
        if not isinstance(self.sharing, str):
            shares = {name: each.sparsity for name, each in by_table(graph, chosen, self.share, self.sharing).items()}
        elif self.sharing != "uniform":
            foreseen.granted(f"{self.name}: layers are taken to be equally sparse; {self.sharing!r} looks at weights")
        foreseen.pruned(graph, shares, self.pattern)

    def shares(self, graph: Graph, chosen: Sequence[Weight], context: Context) -> dict[str, Share]:
        """How sparse each weight shall be. Raises PipelineError, SelectionError, ActivationError."""
        if self.needs_calibration and context.calibration is None:
            raise PipelineError(f"the pass {self.name!r} needs calibration data; {NO_CALIBRATION}")
        pattern = Pattern.parse(self.pattern)
        return allocate(graph, chosen, self.share, pattern, self.sharing, self.spread, context)

    def settled_shares(self, graph: Graph, chosen: Sequence[Weight], context: Context) -> dict[str, Share]:
        """The same, and kept: what they follow from may be gone when a killed run goes on."""

        def make() -> Made:
            shares = self.shares(graph, chosen, context)
            return {}, {name: (share.sparsity, share.measure) for name, share in shares.items()}

        if not all(context.ranks.told(context.store.has("shares"))):
            context.store.drop(
                "shares"
            )  # of a killed run, where not all ranks had come so far: they are made by all together
        return {name: Share(*pair) for name, pair in context.store.made("shares", make)[1].items()}

    def pruned(self, share: Share, error_masked: float | None = None, error: float | None = None) -> Pruned:
        """The record of a weight that got this share."""
        allocation = self.sharing if isinstance(self.sharing, str) else "table"
        return Pruned(self.name, share.sparsity, allocation, share.measure, error_masked, error)

    def record(self, graph: Graph, weight: Weight, mask: Tensor, pruned: Pruned) -> None:
        """Writes the mask of a weight down, as it is stored."""
        graph.put_mask(weight.name, mask, self.pattern, pruned)

    def result(self, graph: Graph, chosen: Sequence[Weight], how: str, notes: Sequence[str] = ()) -> PassResult:
        """What was masked."""
        total = sum(w.numel for w in chosen)
        zeros = total - sum(graph.kept(w.name) for w in chosen)
        share = zeros / total if total else 0.0
        tied = [w.name for w in chosen if w.kind == "embedding"]
        if tied:
            notes = (
                *notes,
                f"{', '.join(tied)}: is the table of an embedding too, so that the zeros are in what tokens become as well",
            )
        notes = (*notes, *self._emptied(graph, chosen))
        summary = f"{zeros:,} of {total:,} weights in {len(chosen)} matrices masked ({100 * share:.2f} %, {how})"
        return PassResult(changed=bool(chosen), summary=summary, notes=tuple(notes))

    def _emptied(self, graph: Graph, chosen: Sequence[Weight]) -> list[str]:
        """Which layers have nothing left that was not asked to go, and which were zero before."""
        now = [(graph.weights[w.name], graph.kept(w.name)) for w in chosen if w.numel]
        gone = [w.name for w, kept in now if not kept and w.pruned and w.pruned.target < 1]
        dead = [w.name for w, kept in now if kept and _all_zero(graph.tensor(w.name))]
        said = []
        if gone:
            said.append(f"{', '.join(gone)}: not one weight is left; spare them with ignore=(...), or prune less")
        if dead:
            said.append(f"{', '.join(dead)}: every weight is zero, with and without the mask")
        return said


@dataclass(frozen=True)
class CalibratedPruning(PruningPass):
    """Pruning that looks at what each layer is given, block by block.

    feed: `pruned` feeds each block by the pruned ones before it, `dense` by the unpruned ones. order: `block` shows every layer
    the inputs of its unpruned block, as the papers' code does; `true` prunes layer by layer.
    """

    wants: ClassVar[str] = "a text to calibrate on"
    gram: ClassVar[bool] = False  # whether the statistics hold the Gram matrix
    dense: ClassVar[bool] = (
        False  # whether `prune` is given the weights as the model came in, where they are held and were not trained since
    )

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

    @property
    def uses_dense(self) -> bool:
        """Where `prune` is given them."""
        return self.dense or self.needs_dense

    def scores(self, matrix: Tensor, statistics: Statistics) -> Tensor:
        """How much each weight of a matrix [out, in] matters, compared within its row; the larger in absolute value the more."""
        raise NotImplementedError(f"{type(self).__name__} gives no scores: it needs `scores`, or a `prune` of its own")

    def prune(
        self, matrices: Sequence[Tensor], old: Sequence[Tensor | None], shares: Sequence[float], statistics: Statistics
    ) -> tuple[list[Tensor], list[Tensor] | None, list[str]]:
        """Masks [out, in], new weights where they change, and notes, for matrices [out, in] that read the same values.

        old: earlier masks; what they removed is zero in the matrices, unless the pass asks for `dense` ones. shares: how sparse
        each of them shall be. By `scores`; a pass that changes weights while it chooses has its own.
        """
        pattern = Pattern.parse(self.pattern)
        masks = [
            pattern.mask(self.scores(matrix, statistics), share, before, "row")
            for matrix, before, share in zip(matrices, old, shares, strict=True)
        ]
        dead = int((statistics.norms == 0).sum())
        columns = len(statistics.norms)
        return masks, None, [f"{dead} of {columns} input columns are zero in all of the text"] if dead else []

    def attempt(self, matrix: Tensor, statistics: Statistics) -> object:
        """What a site of one matrix [out, in] takes, to be timed."""
        return self.prune([matrix], [None], [self.sparsity or 0.5], statistics)

    def scratch(self, rows: Sequence[int], in_features: int) -> int:
        """Bytes that `prune` takes at its worst moment for matrices of so many rows, masks and new weights included."""
        of_scores = 4 + Pattern.parse(self.pattern).scratch(4, earlier=True)
        return int(max(8.0, of_scores) * max(rows) + sum(rows)) * in_features

    def phases(self, graph: Graph, foreseen: Foreseen) -> Iterator[Phase]:
        """As the calibration goes. Raises PipelineError without calls, TraceError where no shapes are known."""
        if foreseen.data is None:
            raise PipelineError(f"the pass {self.name!r} needs calibration data; {NO_CALIBRATION}")
        chosen = self.fitting(graph)
        names, how = [w.name for w in chosen], (self.gram, self.feed, self.order, foreseen.streaming)
        filed = {w.name: w.numel * (1 + self.gram * w.dtype.itemsize) for w in chosen}  # masks, and new numbers
        yield from rehearse(graph, foreseen.data, names, *how, scratch=self.scratch, filed=filed)
        self.foresee(graph, chosen, foreseen)

    def enough(self, in_features: int) -> int:
        """How many tokens a layer must have seen for its statistics to be trusted."""
        return 128

    def run(self, graph: Graph, context: Context) -> PassResult:
        """Raises PipelineError without calibration data, ActivationError, SelectionError, WeightError."""
        data = context.calibration
        if data is None:
            raise PipelineError(f"the pass {self.name!r} needs calibration data; {NO_CALIBRATION}")
        chosen = self.selected(graph)
        shares = self.settled_shares(graph, chosen, context)
        notes: list[str] = []
        short: list[tuple[int, int]] = []  # of each layer that saw too few: tokens, and how many are needed
        scratch = 0

        def settle(site: Site, made: Made) -> None:
            nonlocal scratch
            tensors, facts = made
            scratch = max(scratch, facts["scratch"])
            notes.extend(facts["notes"])
            short.extend((seen, needed) for seen, needed in facts["short"])
            for name in site.weights:
                if (updated := tensors.get(f"weight {name}")) is not None:
                    context.write(graph, name, updated)
                pruned = self.pruned(shares[name], *facts["errors"][name])
                self.record(graph, graph.weights[name], tensors[f"mask {name}"], pruned)

        profile = calibrate(
            graph,
            data,
            [w.name for w in chosen],
            lambda site, statistics: self._learnt(graph, context, shares, site, statistics),
            settle,
            gram=self.gram,
            feed=self.feed,
            order=self.order,
            step=lambda done, total: context.step(self.name, done, total),
            store=context.store,
            ranks=context.ranks,
        )
        if short:
            seen, needed = max(n for n, _ in short), max(n for _, n in short)
            notes.append(
                f"{len(short)} layers were shown no more than {seen} tokens, and {self.name} needs {needed} of them to be trusted; "
                "calibrate on more text"
            )
        how = f"on {data.source}; {profile}; pruning a layer takes about {scratch / 1e6:.1f} MB more"
        return replace(self.result(graph, chosen, how, notes), spent=profile.spent)

    def _learnt(
        self,
        graph: Graph,
        context: Context,
        shares: Mapping[str, Share],
        site: Site,
        statistics: Sequence[Statistics],
    ) -> Made:
        """Masks and weights of a site's matrices, as they are stored, and what is to be said of them."""
        known = [graph.weights[name] for name in site.weights]
        dense = [context.dense.get(w.name) if self.dense and not w.trained else None for w in known]
        settled = [Settled(graph, w.name, shares[w.name].sparsity, held) for w, held in zip(known, dense, strict=True)]
        notes: list[str] = []
        scratch = 0
        for e, each in enumerate(statistics):
            old = [s.old[e] for s in settled]
            before = [s.matrices[e] if self.dense else s.masked(e) for s in settled]
            scratch = max(scratch, self.scratch([len(m) for m in before], len(each.squares)))
            which = ", ".join(site.weights) + (f", expert {e}" if len(statistics) > 1 else "")
            try:
                masks, updated, said = self.prune(before, old, [s.share for s in settled], each)
            except ActivationError as error:
                raise ActivationError(f"{which}: {error}") from error
            notes.extend(f"{which}: {text}" for text in said)
            for i, s in enumerate(settled):
                s.add(before[i], masks[i], None if updated is None else updated[i], each.sample)
        notes.extend(self._unseen(site, statistics))
        needed = self.enough(len(statistics[0].squares))
        few = len(statistics) == 1 and not statistics[0].blind and statistics[0].tokens < needed
        tensors = {f"mask {s.weight.name}": stored_mask(s.weight, s.masks) for s in settled}
        tensors |= {f"weight {s.weight.name}": graph.stored(s.weight.name, s.updated) for s in settled if s.updated}
        return tensors, {
            "errors": {s.weight.name: s.errors for s in settled},
            "notes": notes,
            "scratch": scratch,
            "short": [(statistics[0].tokens, needed)] * len(known) if few else [],
        }

    def _unseen(self, site: Site, statistics: Sequence[Statistics]) -> list[str]:
        """Of which nothing can be learned: what reads zeros alone, experts to which the text sent no token, or too few."""
        if len(statistics) == 1:
            what = (
                f"{', '.join(site.weights)}: all that is read is zero in all of the text; masks are by magnitude alone"
            )
            return [what] if statistics[0].blind else []
        needed = self.enough(len(statistics[0].squares))
        none = [str(e) for e, each in enumerate(statistics) if each.blind]
        few = [f"{e} ({each.tokens})" for e, each in enumerate(statistics) if not each.blind and each.tokens < needed]
        said = []
        if none:
            said.append(f"experts {', '.join(none)} saw no token of the text; their masks are by magnitude alone")
        if few:
            said.append(f"experts {', '.join(few)} saw fewer than {needed} tokens; calibrate on more text")
        return [f"{', '.join(site.weights)}: {text}" for text in said]


NO_CALIBRATION = (
    "in Python give calibration= token ids [sequences, length], a list of strings, or a text file's path with tokenizer=..., or "
    "tokenizer=... alone for the embedded text; on the command line --calibration FILE"
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


def _all_zero(tensor: Tensor) -> bool:
    """Looked at a piece at a time, up to the first that is not: `any` of a whole weight would copy it as bool."""
    return not any(bool(part.any()) for part in torch.split(tensor.detach().reshape(-1), CHUNK))


def _owner(weight: Weight) -> str:
    return weight.owners[0] if weight.owners else weight.name
