"""Who learns what of a span: ranks see a part of the text each, and every site is a job for one of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch

from sparsec.calibrate.sites import Site
from sparsec.calibrate.statistics import Statistics, join_statistics
from sparsec.ir.graph import Graph
from sparsec.ranks import Ranks, share_out
from sparsec.spill import Keep, Made

Learn = Callable[[Site, Sequence[Statistics]], Made]


def learnt(
    graph: Graph,
    sites: Sequence[Site],
    seen: dict[Site, list[Statistics]],
    learn: Learn,
    ranks: Ranks,
    store: Keep,
    device: torch.device,
) -> Iterator[tuple[Site, Made]]:
    """Every site with what was made of its statistics, in order; the same on all ranks.

    seen: statistics of each site, or of none where the store has them all. They go as soon as they are looked at.
    """
    if ranks.alone or not seen:
        for site in sites:
            yield site, store.made(site.key, partial(learn, site, seen.pop(site, [])))
        return
    sizes = [_work(graph, site, seen[site]) for site in sites]
    owners = share_out(sizes, ranks.count)
    whose = [owner for site, owner in zip(sites, owners, strict=True) for _ in seen[site]]
    join_statistics([each for site in sites for each in seen[site]], whose, ranks)
    mine = {i: seen[site] for i, site in enumerate(sites) if owners[i] == ranks.number}
    seen.clear()
    results = ranks.each(sizes, lambda job: learn(sites[job], mine.pop(job)), device)
    for site, made in zip(sites, results, strict=True):
        yield site, store.made(site.key, partial(_given, made))


def _given(made: Made) -> Made:
    return made


def _work(graph: Graph, site: Site, statistics: Sequence[Statistics]) -> int:
    """About in proportion to how long it takes: with a Gram matrix [in, in], which is factored, else by the weights alone."""
    shapes = [graph.weights[name].matrix_shape for name in site.weights]
    rows, columns = sum(out for out, _ in shapes), shapes[0][1]
    one = columns * columns * (columns + rows) if statistics[0].with_gram else columns * rows
    return one * len(statistics)
