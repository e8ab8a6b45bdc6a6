"""Round: the kept weights become numbers that codes of 8 or 4 bits stand for, so that packing them in codes loses nothing more.

GPTQ (Frantar et al. 2023, arXiv:2210.17323) under the mask, on the Gram matrix that SparseGPT uses. Columns are rounded in turn,
and those to come make up for the error. A pruned weight counts as rounded to zero, so what others did to it is made up for too.
Then coordinate descent (QuantEase, Behdin et al. 2023, arXiv:2309.01885): each kept weight in turn takes the number that is best
while all others stay. That moves nothing that is pruned.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import prod
from typing import ClassVar

import torch
from torch import Tensor

from sparsec.calibrate import FEEDS, ORDERS, Site, Statistics, calibrate
from sparsec.calibrate.factor import factor_bytes, inverse_factor
from sparsec.calibrate.rehearsal import rehearse
from sparsec.cost.phase import Phase
from sparsec.errors import ActivationError, FormatError, PipelineError, SelectionError, SpecError, WeightError, some
from sparsec.formats.base import HALF_AND_SINGLE
from sparsec.formats.grid import Grid
from sparsec.formats.values import EXAMPLES, Codec, Codes, check_in_reach
from sparsec.ir.facts import Rounded, Weight
from sparsec.ir.graph import Graph
from sparsec.pipeline.base import Context, Effect, Pass, PassResult
from sparsec.pipeline.foreseen import Foreseen
from sparsec.pipeline.options import check_choice, check_ignore, check_patterns, check_whole
from sparsec.pipeline.pruning import NO_CALIBRATION
from sparsec.pipeline.selection import select_weights
from sparsec.spill import Made

METHODS = ("gptq", "nearest")
_PARTS = ("weight", "codes", "scale", "table")
_TOGETHER = (1 << 15) - 1
"""Numbers that are updated one column after the other before the rest is: so few that torch does not share them among threads."""


@dataclass(frozen=True)
class Round(Pass):
    """Rounds the kept weights to the numbers of a codec; what is pruned stays zero. `lower(..., values=)` then packs just these.

    values: the codec, as in `lower`: "int8", "int8g64", "int4g64", "int4mg64", and groups of other sizes. method: `gptq` looks at
    what each layer is given, and lets weights make up for the errors of others; `nearest` takes the nearest numbers and needs no
    text. Both search the scale of every row and group; with `gptq` a column counts as much as its inputs are large. damping: share
    of the mean of the Hessian's diagonal that is added to it; raised tenfold, and said so, while it cannot be factored. sweeps: of
    coordinate descent after GPTQ. feed, order: as of passes that prune. targets and ignore select weights; by default all of
    attention and MLP.
    """

    name: ClassVar[str] = "round"
    effect: ClassVar[Effect] = Effect.LOSSY
    excludes: ClassVar[frozenset[str]] = frozenset({"lowered"})
    examples: ClassVar[tuple[str, ...]] = (
        "magnitude(0.5),round('int4g64')",
        "round('int8', method='nearest')",
        "magnitude(0.5),freeze,round('int4mg32', damping=0.1, sweeps=4, order='true')",
        "sparsegpt(0.5),freeze,round('int8g64', sweeps=0, feed='dense')",
    )
    wants: ClassVar[str] = "a text to calibrate on, but for method='nearest'"
    gram: ClassVar[bool] = True

    values: str
    method: str = field(default="gptq", kw_only=True)
    damping: float = field(default=0.01, kw_only=True)
    sweeps: int = field(default=2, kw_only=True)
    feed: str = field(default="pruned", kw_only=True)
    order: str = field(default="block", kw_only=True)
    targets: tuple[str, ...] | None = field(default=None, kw_only=True)
    ignore: tuple[str, ...] = field(default=(), kw_only=True)

    def __post_init__(self) -> None:
        if not isinstance(self.values, str) or not self.values:
            known = ", ".join(map(repr, EXAMPLES))
            raise SpecError(
                f"round needs the values to round to, got {self.values!r}; known are {known}, as in round('int4g64')"
            )
        object.__setattr__(self, "values", Codec.parse(self.values).name)
        check_choice(self.method, "method", METHODS)
        if isinstance(self.damping, bool) or not isinstance(self.damping, int | float) or not 0 < self.damping <= 1:
            raise SpecError(f"damping must be in (0, 1], got {self.damping!r}; the paper's is 0.01")
        check_whole(self.sweeps, "sweeps")
        check_choice(self.feed, "feed", FEEDS)
        check_choice(self.order, "order", ORDERS)
        if self.feed == "dense" and self.order == "true":
            raise SpecError(
                "order='true' rounds by what rounded layers make, and feed='dense' by what unrounded ones do"
            )
        for option in ("damping", "sweeps", "feed", "order") if self.method == "nearest" else ():
            if getattr(self, option) != self.__dataclass_fields__[option].default:
                raise SpecError(f"{option} does nothing with method='nearest'; leave it out, or take method='gptq'")
        object.__setattr__(self, "targets", check_patterns(self.targets, "targets"))
        object.__setattr__(self, "ignore", check_ignore(self.ignore))

    @property
    def needs_calibration(self) -> bool:
        """With GPTQ."""
        return self.method == "gptq"

    def phases(self, graph: Graph, foreseen: Foreseen) -> Iterator[Phase]:
        """As the calibration goes. Raises PipelineError without calls."""
        names = [w.name for w in select_weights(graph, self.targets, self.ignore) if graph.is_linear(w.name)]
        if self.method == "nearest":
            for name in names:
                weight = graph.weights[name]
                taken = {"a rounded weight and its workspace": 56 * weight.numel}
                rows, columns = weight.matrix_shape
                yield Phase("rounding", name, taken, files=self._kept(weight), solve=((rows,), columns))
        elif foreseen.data is None:
            raise PipelineError(
                f"the pass {self.name!r} needs calibration data; {NO_CALIBRATION}, or take method='nearest'"
            )
        else:
            how = (self.gram, self.feed, self.order, foreseen.streaming)
            filed = {name: self._kept(graph.weights[name]) for name in names}
            yield from rehearse(graph, foreseen.data, names, *how, scratch=_scratch, filed=filed)

    def run(self, graph: Graph, context: Context) -> PassResult:
        """Raises PipelineError without calibration data, ActivationError, SelectionError, WeightError."""
        chosen, notes = self._selected(graph)
        errors: list[float] = []
        spent: dict[str, float] = {}
        if self.method == "nearest":
            for weight in context.each_of("round", chosen):
                made = context.store.made(f"weight {weight.name}", partial(self._nearest, graph, weight.name))
                self._write(graph, weight.name, made[0], context)
            how = "to the nearest numbers"
        else:
            how, spent = self._calibrated(graph, context, chosen, errors, notes)
        tied = [w.name for w in chosen if w.kind == "embedding"]
        if tied:
            notes.append(
                f"{some(tied)}: is the table of an embedding too, so that what tokens become is rounded as well"
            )
        kept, total = sum(graph.kept(w.name) for w in chosen), sum(w.numel for w in chosen)
        summary = f"{kept:,} of {total:,} weights in {len(chosen)} matrices rounded to {self.values}, {how}"
        return PassResult(changed=bool(chosen), summary=summary, notes=tuple(notes), spent=spent)

    def _selected(self, graph: Graph) -> tuple[list[Weight], list[str]]:
        """The weights to round, and notes on others. Raises SelectionError, and WeightError for what no code stands for."""
        found = select_weights(graph, self.targets, self.ignore)
        chosen = [w for w in found if graph.is_linear(w.name)]
        others = [w.name for w in found if not graph.is_linear(w.name)]
        told = (
            f"{some(others)}: fused experts, which nothing packs in codes yet, so they stay as they are"
            if others
            else ""
        )
        if not chosen:
            raise SelectionError(f"nothing to round: {told}; name linear layers with targets=")
        for weight in chosen:
            owner = weight.owners[0] if weight.owners else weight.name
            way_out = f"leave it out with ignore=({owner!r},)"
            if weight.dtype not in HALF_AND_SINGLE:
                served = ", ".join(str(d).removeprefix("torch.") for d in HALF_AND_SINGLE)
                raise WeightError(
                    f"{weight.name}: is {weight.dtype}, and quantised values stand for {served}; convert the model first, or "
                    f"{way_out}"
                )
            matrix, mask = _matrix(graph, weight.name)
            try:
                check_in_reach(matrix.masked_fill(~mask, 0))
            except FormatError as error:
                raise WeightError(f"{weight.name}: {error}, or {way_out}") from error
        return chosen, [told] if told else []

    def _calibrated(
        self, graph: Graph, context: Context, chosen: Sequence[Weight], errors: list[float], notes: list[str]
    ) -> tuple[str, dict[str, float]]:
        """Rounds them all, and says how, and what took how long."""
        data = context.calibration
        if data is None:
            raise PipelineError(
                f"the pass {self.name!r} needs calibration data; {NO_CALIBRATION}, or take method='nearest'"
            )
        short: list[tuple[int, int]] = []  # of each site that saw too few: tokens, and how many are needed

        def learn(site: Site, statistics: Sequence[Statistics]) -> Made:
            (seen,) = statistics
            which = ", ".join(site.weights)
            said = []
            if seen.blind:
                said.append(f"{which}: all that is read is zero in all of the text; numbers are the nearest")
            few = not seen.blind and seen.tokens < len(seen.squares)
            try:
                factor, _, told = self._factor(seen)
            except ActivationError as error:
                raise ActivationError(f"{which}: {error}") from error
            said.extend(f"{which}: {text}" for text in told)
            tensors: dict[str, Tensor] = {}
            lost: dict[str, float] = {}
            for name in site.weights:
                matrix, mask = _matrix(graph, name)
                before = matrix.float().masked_fill(~mask, 0)
                rounded, grid = self._solved(before, mask, factor, seen)
                made = self._made(graph, name, rounded, grid)
                tensors |= {f"{part} {name}": tensor for part, tensor in made.items()}
                (after,) = graph.matrices(name, made["weight"])
                whole = float((seen.sample @ before.t()).square().sum())
                change = float((seen.sample @ (after.float() - before).t()).square().sum())
                lost[name] = change / whole if whole > 0 else 0.0
            return tensors, {"notes": said, "lost": lost, "short": [(seen.tokens, len(seen.squares))] if few else []}

        def settle(site: Site, made: Made) -> None:
            tensors, facts = made
            notes.extend(facts["notes"])
            short.extend((seen, needed) for seen, needed in facts["short"])
            for name in site.weights:
                errors.append(facts["lost"][name])
                self._write(graph, name, {part: tensors[f"{part} {name}"] for part in _PARTS}, context, errors[-1])

        profile = calibrate(
            graph,
            data,
            [w.name for w in chosen],
            learn,
            settle,
            gram=self.gram,
            feed=self.feed,
            order=self.order,
            step=lambda done, total: context.step(self.name, done, total),
            store=context.store,
            ranks=context.ranks,
        )
        if short:
            seen, needed = max(short, key=lambda each: each[1])
            notes.append(
                f"{len(short)} inputs have more columns than tokens were seen ({needed} and {seen}), so little is known of them; "
                "calibrate on more text"
            )
        told = ""
        if errors:
            told = f", which changes outputs by {sum(errors) / len(errors):.2g} of their mean square, at most by {max(errors):.2g}"
        return f"on {data.source}{told}; {profile}", profile.spent

    def attempt(self, matrix: Tensor, statistics: Statistics) -> object:
        """What a site of one matrix [out, in] takes, to be timed."""
        mask = torch.ones_like(matrix, dtype=torch.bool)
        if self.method == "nearest":
            return _in_codes(matrix, mask, Grid.fitted(Codec.parse(self.values), matrix, mask))
        factor, _, _ = self._factor(statistics)
        rounded, grid = self._solved(matrix, mask, factor, statistics)
        return _in_codes(rounded, mask, grid)

    def _factor(self, seen: Statistics) -> tuple[Tensor, Tensor, list[str]]:
        return inverse_factor(seen.gram, self.damping, "round these layers with method='nearest'")

    def _solved(self, before: Tensor, mask: Tensor, factor: Tensor, seen: Statistics) -> tuple[Tensor, Grid]:
        grid = Grid.fitted(Codec.parse(self.values), before, mask, seen.gram.diagonal())
        rounded = compensate(before, mask, grid, factor)
        return descend(before, rounded, mask, grid, seen.gram, self.damping, self.sweeps), grid

    def _kept(self, weight: Weight) -> int:
        """Bytes of a rounded weight and its scales."""
        matrices = weight.shape[0] if weight.kind == "experts" else 1
        return weight.nbytes_dense + 2 * matrices * prod(Codec.parse(self.values).scale_shape(*weight.matrix_shape))

    def _nearest(self, graph: Graph, name: str) -> Made:
        matrix, mask = _matrix(graph, name)
        return self._made(graph, name, matrix.float(), Grid.fitted(Codec.parse(self.values), matrix, mask)), {}

    def _made(self, graph: Graph, name: str, numbers: Tensor, grid: Grid) -> dict[str, Tensor]:
        """Of numbers [out, in] the nearest ones of a grid, as the weight is stored and as its codes will be read; and the grid."""
        weight, mask = graph.weights[name], _matrix(graph, name)[1]
        found = _in_codes(numbers, mask, grid).to(weight.dtype)
        if not bool(found.isfinite().all()):
            raise WeightError(
                f"{name}: holds weights near the largest number of {weight.dtype}, which rounding up would make infinite; leave it "
                f"out with ignore=({(weight.owners or (name,))[0]!r},)"
            )
        like = grid.like
        return {"weight": graph.stored(name, [found]), "codes": like.codes, "scale": like.scale, "table": like.table}

    def _write(
        self, graph: Graph, name: str, made: Mapping[str, Tensor], context: Context, error: float | None = None
    ) -> None:
        context.write(graph, name, made["weight"])
        like = Codes(made["codes"], made["scale"], made["table"])
        graph.update(name, rounded=Rounded(self.values, like, error))


def _scratch(rows: Sequence[int], columns: int) -> int:
    """The factor while it is made; then that, the Hessian, and copies of one matrix while its columns are rounded and go down."""
    return max(factor_bytes(columns), (8 * columns + 52 * max(rows)) * columns)


def _in_codes(numbers: Tensor, mask: Tensor, grid: Grid) -> Tensor:
    """What is read where codes of a grid stand for numbers [out, in]."""
    return grid.codec.decode(grid.codec.encode(numbers, mask, grid.like))


def _matrix(graph: Graph, name: str) -> tuple[Tensor, Tensor]:
    """A weight [out, in], and what is kept of it."""
    matrix, mask = graph.matrix(name), graph.mask_matrix(name)
    return matrix, torch.ones_like(matrix, dtype=torch.bool) if mask is None else mask


def compensate(weight: Tensor, mask: Tensor, grid: Grid, factor: Tensor) -> Tensor:
    """Numbers of a grid [out, in] in place of a weight [out, in], zero where mask [out, in] is False; algorithm 1 of GPTQ.

    factor: upper [in, in] of `inverse_factor`.
    """
    out_features, in_features = weight.shape
    waiting, kept = _turned(weight), _turned(mask)
    rounded = torch.empty_like(waiting)
    step = _columns(out_features)
    for start in range(0, in_features, step):
        end = min(start + step, in_features)
        errors = torch.empty(end - start, out_features, device=weight.device)
        for i in range(start, end):
            rounded[i] = grid.column(i, waiting[i]).masked_fill_(~kept[i], 0)
            torch.div(waiting[i] - rounded[i], factor[i, i], out=errors[i - start])
            waiting[i + 1 : end] -= torch.outer(factor[i, i + 1 : end], errors[i - start])
        waiting[end:].addmm_(factor[start:end, end:].t(), errors, alpha=-1)
    return rounded.t().contiguous()


def descend(
    weight: Tensor, rounded: Tensor, mask: Tensor, grid: Grid, gram: Tensor, damping: float, sweeps: int
) -> Tensor:
    """`rounded` [out, in] after some sweeps over its columns. In each every kept weight takes the number that brings the outputs
    nearest to those of `weight` [out, in] while all others stay, so the error never grows.

    gram: [in, in], of the inputs; damping is added to it as in `inverse_factor`.
    """
    out_features, in_features = weight.shape
    hessian = gram.clone()
    diagonal = hessian.diagonal()
    diagonal += damping * (float(diagonal.mean()) or 1.0)
    now, kept = _turned(rounded), _turned(mask)
    slope = hessian @ (now - weight.t())  # half of the error's gradient, [in, out]
    step = _columns(out_features)
    for _ in range(sweeps):
        for start in range(0, in_features, step):
            end = min(start + step, in_features)
            changes = torch.empty(end - start, out_features, device=weight.device)
            for i in range(start, end):
                best = grid.column(i, now[i] - slope[i] / hessian[i, i]).masked_fill_(~kept[i], 0)
                torch.sub(best, now[i], out=changes[i - start])
                now[i] = best
                slope[i + 1 : end] += torch.outer(hessian[i + 1 : end, i], changes[i - start])
            slope[:start].addmm_(hessian[:start, start:end], changes)
            slope[end:].addmm_(hessian[end:, start:end], changes)
            slope[start:end].addmm_(hessian[start:end, start:end].triu(), changes)  # what was below came in turn
    return now.t().contiguous()


def _turned(matrix: Tensor) -> Tensor:
    """A copy [in, out] of a matrix [out, in], in which a column is in one piece."""
    return matrix.t().clone(memory_format=torch.contiguous_format)


def _columns(out_features: int) -> int:
    """How many are updated one by one before all others are, in one product."""
    return min(max(_TOGETHER // max(1, out_features), 8), 128)
