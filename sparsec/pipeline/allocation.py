"""How sparse each layer becomes, when all together are to reach one sparsity.

uniform        every layer the same
global         what one threshold over all weights leaves to each
owl            blocks with more outliers keep more (Yin et al. 2023, arXiv:2310.05175)
alphapruning   blocks whose spectra have heavier tails keep more (Lu et al. 2024, arXiv:2410.10912)
sensitivity    layers whose pruning alone hurts the model's outputs more, for their size, keep more
a table        patterns and the sparsity of what they match; later ones count, and what none matches has that of the pass

owl and alphapruning work on blocks, as their papers do: all layers of a block become equally sparse.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparsec import serial
from sparsec.calibrate import Site, Standing, Statistics, calibrate
from sparsec.errors import ActivationError, PipelineError, SelectionError, SpecError, WeightError
from sparsec.ir.facts import Weight
from sparsec.ir.graph import Graph
from sparsec.metrics import divergence
from sparsec.patterns import Pattern
from sparsec.pipeline.base import Context
from sparsec.pipeline.options import check_choice, check_sparsity
from sparsec.pipeline.selection import matches
from sparsec.spill import Made

Table = tuple[tuple[str, float], ...]
SPREADS = {"owl": 0.08, "alphapruning": 0.3, "sensitivity": 0.25}
"""Default of `spread`. owl: the sparsest block is 2 * spread above the densest (the paper's lambda is 0.08). alphapruning: before
they are scaled to the total, sparsities are between 1 - spread and 1 + spread (the paper's tau is 0.3). sensitivity: no layer is
further than spread from the sparsity of all."""
DOUBLES = 0.1
"""So much more sparsity doubles what pruning one layer costs the model: on SmolLM2-135M, from 40 to 70 % zeros, the median over
32 layers is a factor of 2.1 to 1.8 for each tenth, and from 1.6 to 4.9 on single layers."""
CALIBRATED = frozenset({"owl", "sensitivity"})
KINDS = ("uniform", "global", *SPREADS)
OUTLIER = 5.0
"""An outlier is this many times the mean of its block: the paper's M."""
TOKENS = 1024
"""Of the calibration data, how many the model is run on for the sensitivity of each layer."""


@dataclass(frozen=True)
class Share:
    """What one layer gets. measure: what it was derived from; None where nothing was measured."""

    sparsity: float
    measure: float | None = None


def check_allocation(value: Any) -> str | Table:
    """One of KINDS, or a table as pairs or a mapping. Raises SpecError."""
    if isinstance(value, str):
        return str(check_choice(value, "allocation", KINDS))
    pairs = tuple(value.items()) if isinstance(value, Mapping) else value
    if not isinstance(pairs, tuple | list) or not pairs or not all(_is_pair(pair) for pair in pairs):
        raise SpecError(
            f"allocation must be one of {', '.join(map(repr, KINDS))}, or pairs of a pattern and a sparsity such as "
            f"(('layers.0.*', 0.3), ('mlp', 0.6)), got {value!r}"
        )
    return tuple(
        (pattern, check_sparsity(share, f"allocation: the sparsity of {pattern!r}")) for pattern, share in pairs
    )


def check_spread(value: Any, allocation: str | Table) -> None:
    """Raises SpecError for a spread where there is none, or one outside of (0, 1)."""
    if value is None:
        return
    if not isinstance(allocation, str) or allocation not in SPREADS:
        raise SpecError(f"spread is an option of allocation {', '.join(map(repr, SPREADS))}; leave it out")
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1:
        raise SpecError(f"spread must be in (0, 1), got {value!r}; the default is {SPREADS[allocation]}")


def allocate(
    graph: Graph,
    chosen: Sequence[Weight],
    sparsity: float,
    pattern: Pattern,
    allocation: str | Table,
    spread: float | None,
    context: Context,
) -> dict[str, Share]:
    """By weight name. All together are `sparsity` sparse, a table aside.

    Raises PipelineError for a share that no layer can give, SelectionError for a table that names what is not pruned.
    """
    if not isinstance(allocation, str):
        return by_table(graph, chosen, sparsity, allocation)
    if allocation == "uniform":
        return {w.name: Share(sparsity) for w in chosen}
    if allocation == "global":
        return _checked(_by_threshold(graph, chosen, sparsity, pattern), allocation, None)
    members = {w.name: [w] for w in chosen} if allocation == "sensitivity" else _by_block(graph, chosen)
    sizes = [sum(w.numel for w in group) for group in members.values()]
    spread = SPREADS[allocation] if spread is None else spread
    if allocation == "owl":
        measured = _outliers(graph, members, context)
        found = _around([-m for m in measured], sizes, sparsity, spread)
    elif allocation == "alphapruning":
        measured = _tails(graph, members, context)
        found = _scaled(measured, sizes, sparsity, spread)
    else:
        measured = _sensitivities(graph, chosen, sparsity, context)
        found = _balanced(measured, sizes, sparsity, spread)
    by_block = dict(zip(members, map(Share, found, measured), strict=True))
    _checked(by_block, allocation, spread)
    return {w.name: by_block[block] for block, group in members.items() for w in group}


def _is_pair(pair: Any) -> bool:
    return isinstance(pair, tuple | list) and len(pair) == 2 and isinstance(pair[0], str) and bool(pair[0])


def _checked(shares: dict[str, Share], allocation: str, spread: float | None) -> dict[str, Share]:
    for name, share in shares.items():
        if not 0 <= share.sparsity < 1:
            hint = f"a spread below {spread:g}, " if spread is not None else ""
            raise PipelineError(
                f"{name}: allocation={allocation!r} would make it {share.sparsity:.3f} sparse, and a layer can give from 0 to "
                f"less than 1; take {hint}a lower sparsity, or allocation='uniform'"
            )
    return shares


def by_table(graph: Graph, chosen: Sequence[Weight], sparsity: float, table: Table) -> dict[str, Share]:
    """Of each weight what the last pattern that matches it says, else `sparsity`. Raises SelectionError."""
    shares = {w.name: Share(sparsity) for w in chosen}
    for pattern, share in table:
        found = [w for w in chosen if matches(graph, w, pattern)]
        if not found:
            others = [w.name for w in graph.weights.values() if matches(graph, w, pattern)]
            owners = [(w.owners or (w.name,))[0] for w in chosen]
            why = (
                f"matches {others[0]}, which this pass does not prune; add it to targets"
                if others
                else f"matches nothing in this model; pruned are {', '.join(owners[:3])}{', ...' if owners[3:] else ''}"
            )
            raise SelectionError(f"allocation: {pattern!r} {why}")
        shares.update((w.name, Share(share)) for w in found)
    return shares


def _by_threshold(graph: Graph, chosen: Sequence[Weight], sparsity: float, pattern: Pattern) -> dict[str, Share]:
    names = [w.name for w in chosen for _ in graph.matrices(w.name)]
    scores = [lambda m=m: m for w in chosen for m in graph.matrices(w.name)]
    old: list[Tensor | None] = [m for w in chosen for m in graph.mask_matrices(w.name)]
    kept = dict.fromkeys(names, 0)
    for name, mask in zip(names, pattern.masks(scores, sparsity, old), strict=True):
        kept[name] += serial.count(mask)
    return {w.name: Share(1 - kept[w.name] / w.numel) for w in chosen}


def _by_block(graph: Graph, chosen: Sequence[Weight]) -> dict[str, list[Weight]]:
    """Weights by the path of their block; one outside of all blocks is its own."""
    found: dict[str, list[Weight]] = {}
    for weight in chosen:
        found.setdefault(graph.ops_of(weight.name)[0].block or weight.name, []).append(weight)
    return found


def _around(measured: Sequence[float], sizes: Sequence[int], sparsity: float, spread: float) -> list[float]:
    """Sparsities in proportion to what was measured, 2 * spread from lowest to highest, their mean over weights as asked."""
    low, high = min(measured), max(measured)
    raw = [2 * spread * (m - low) / (high - low) if high > low else 0.0 for m in measured]
    mean = sum(r * n for r, n in zip(raw, sizes, strict=True)) / sum(sizes)
    return [sparsity + r - mean for r in raw]


def _balanced(measured: Sequence[float], sizes: Sequence[int], sparsity: float, spread: float) -> list[float]:
    """Sparsities at which one more weight costs all layers the same, none further than `spread` from `sparsity`.

    measured: losses of the layers, each pruned alone to `sparsity`. They are taken to double with every DOUBLES of sparsity, so
    they and their slopes are equal for each weight where sparsities differ by the logarithm of loss / size. No layer loses more
    than half of what `sparsity` would leave to it.
    """
    ahead = [-DOUBLES * math.log2(max(m, 1e-12) / n) for m, n in zip(measured, sizes, strict=True)]
    low, high = max(0.0, sparsity - spread), min(sparsity + spread, (1 + sparsity) / 2)

    def cut(offset: float) -> list[float]:
        return [min(high, max(low, a + offset)) for a in ahead]

    below, above = low - max(ahead), high - min(ahead)  # all at low, all at high
    for _ in range(100):
        middle = (below + above) / 2
        total = sum(s * n for s, n in zip(cut(middle), sizes, strict=True))
        below, above = (middle, above) if total < sparsity * sum(sizes) else (below, middle)
    return cut(above)


def _scaled(measured: Sequence[float], sizes: Sequence[int], sparsity: float, spread: float) -> list[float]:
    """Sparsities in proportion to what was measured, from 1 - spread to 1 + spread, scaled so that all weights have that asked."""
    low, high = min(measured), max(measured)
    raw = [1 - spread + 2 * spread * (m - low) / (high - low) if high > low else 1.0 for m in measured]
    scale = sparsity * sum(sizes) / sum(r * n for r, n in zip(raw, sizes, strict=True))
    return [scale * r for r in raw]


def _norms(
    graph: Graph, members: Mapping[str, Sequence[Weight]], context: Context, what: str
) -> dict[str, list[Tensor]]:
    """Of the input columns of every matrix of every weight, in the unpruned model."""
    assert context.calibration is not None
    found: dict[str, list[Tensor]] = {}

    def learn(site: Site, statistics: Sequence[Statistics]) -> Made:
        return {str(e): each.norms for e, each in enumerate(statistics)}, {}

    def settle(site: Site, made: Made) -> None:
        norms = [made[0][str(e)] for e in range(len(made[0]))]
        found.update((name, norms) for name in site.weights)

    names = [w.name for group in members.values() for w in group]
    store = context.store.within(what)
    calibrate(
        graph,
        context.calibration,
        names,
        learn,
        settle,
        feed="dense",
        step=lambda i, n: context.step(what, i, n),
        store=store,
        ranks=context.ranks,
    )
    return found


def _scores(graph: Graph, weight: Weight, norms: Mapping[str, list[Tensor]]) -> list[Tensor]:
    """|W| * ||X_col|| of every matrix, what an old mask removed being zero."""
    masks = graph.mask_matrices(weight.name)
    found = []
    for matrix, mask, norm in zip(graph.matrices(weight.name), masks, norms[weight.name], strict=True):
        scores = matrix.float().abs() * norm
        found.append(scores if mask is None else scores * mask)
    return found


def _outliers(graph: Graph, members: Mapping[str, Sequence[Weight]], context: Context) -> list[float]:
    """Of every block the share of its scores that are more than OUTLIER times their mean."""
    norms = _norms(graph, members, context, "outliers")
    found = []
    for group in members.values():
        count = sum(w.numel for w in group)
        mean = sum(float(s.sum(dtype=torch.float64)) for w in group for s in _scores(graph, w, norms)) / count
        above = sum(int((s > OUTLIER * mean).count_nonzero()) for w in group for s in _scores(graph, w, norms))
        found.append(above / count)
    return found


def _tails(graph: Graph, members: Mapping[str, Sequence[Weight]], context: Context) -> list[float]:
    """Of every block the mean exponent of its matrices' spectra."""
    blocks = list(members.values())

    def tail(block: int) -> float:
        context.step("spectra", block, len(blocks))
        exponents = [_exponent(w.name, matrix) for w in blocks[block] for matrix in graph.matrices(w.name)]
        return sum(exponents) / len(exponents)

    sizes = [sum(w.numel * min(w.matrix_shape) for w in block) for block in blocks]
    found = list(context.ranks.each(sizes, tail))
    context.step("spectra", len(blocks), len(blocks))
    return found


def _exponent(name: str, matrix: Tensor) -> float:
    exponent = tail_exponent(matrix)
    if not math.isfinite(exponent):
        raise WeightError(
            f"{name}: its singular values have no tail to fit (they are equal, or all but a few are zero); "
            "take another allocation, or leave it out with ignore="
        )
    return exponent


def tail_exponent(matrix: Tensor) -> float:
    """Hill estimate of the exponent of the power law that the upper half of a matrix's squared singular values follows.

    matrix: [out, in]. inf where there is no tail. PL_Alpha_Hill of the paper, with k = half of the values.
    """
    wide = matrix.double() if matrix.shape[0] <= matrix.shape[1] else matrix.double().t()
    values = torch.linalg.eigvalsh(wide @ wide.t())
    k = len(values) // 2
    if not k or values[-k - 1] <= 0:
        return math.inf
    total = float((values[-k:] / values[-k - 1]).log().sum())
    return 1 + k / total if total > 1e-6 * k else math.inf


def _sensitivities(graph: Graph, chosen: Sequence[Weight], sparsity: float, context: Context) -> list[float]:
    """Of every layer what pruning it alone does to the model's outputs; the smallest |W| * ||X_col|| of each row go."""
    assert context.calibration is not None
    norms = _norms(graph, {w.name: [w] for w in chosen}, context, "input norms")
    place = {name: i for i, name in enumerate(graph.ops)}
    ordered = sorted(chosen, key=lambda w: place[graph.ops_of(w.name)[0].node])
    calls, tokens = [], 0
    for call in context.calibration.calls:
        calls.append(call)
        tokens += call[0].numel()
        if tokens >= TOKENS:
            break
    found = dict.fromkeys((w.name for w in chosen), 0.0)
    ahead = [len(ordered) - i for i in range(len(ordered))]  # the later a weight, the less of the model runs after it
    with torch.no_grad():
        for c, call in enumerate(calls):
            standing = Standing(graph, call)
            dense = standing.finish()

            def loss(i: int, c: int = c, standing: Standing = standing, dense: Any = dense) -> float:
                weight = ordered[i]
                context.step("sensitivity", c * len(ordered) + i, len(calls) * len(ordered))
                context.ranks.check()
                standing.go(graph.ops_of(weight.name)[0].node)
                with _masked(graph, weight, _smallest(graph, weight, norms, sparsity)):
                    found = divergence(dense, standing.finish())
                if not math.isfinite(found):
                    raise ActivationError(
                        f"with {weight.name} pruned the model gives NaN or inf, or it did before, so no loss can be measured; "
                        "repair the checkpoint, or take another allocation"
                    )
                return found

            for weight, lost in zip(ordered, context.ranks.each(ahead, loss), strict=True):
                found[weight.name] += lost / len(calls)
    context.step("sensitivity", len(calls) * len(ordered), len(calls) * len(ordered))
    return list(found.values())


def _smallest(graph: Graph, weight: Weight, norms: Mapping[str, list[Tensor]], sparsity: float) -> list[Tensor]:
    scores = _scores(graph, weight, norms)
    pairs = zip(scores, graph.mask_matrices(weight.name), strict=True)
    return [Pattern().mask(s, sparsity, old, "row") for s, old in pairs]


@contextmanager
def _masked(graph: Graph, weight: Weight, masks: Sequence[Tensor]) -> Iterator[None]:
    """Meanwhile this weight is read through these masks."""
    graph.update(weight.name, mask=stored_mask(weight, masks), frozen=False)
    try:
        yield
    finally:
        graph.weights[weight.name] = weight


def stored_mask(weight: Weight, masks: Sequence[Tensor]) -> Tensor:
    """Masks [out, in] of a weight's matrices in the layout that the weight is stored in."""
    mask = torch.stack(list(masks)) if weight.kind == "experts" else masks[0]
    return mask.transpose(-1, -2).contiguous() if weight.transposed else mask
