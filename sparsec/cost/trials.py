"""The kernels tried as a model meets them: through their modules, one call at a time, every weight cold, the kernels in turn.

Cold means that more than the last-level cache can hold has been read since the weight was last touched. All values come from one
arena that the calls walk through, so that a weight of any size costs nothing to make; only indices are written anew.

At one row the calls of all matrices and kernels go round together: as in a model every call follows one on another matrix, and a
moment in which the machine is slow meets all of them instead of making one kernel or one shape look slow.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle

import torch
from torch import Tensor, nn

from sparsec.cost.fit import Timed
from sparsec.cost.model import ReadRate, Work
from sparsec.formats import CSR
from sparsec.formats.base import Packed
from sparsec.formats.layout import Layout
from sparsec.formats.seen import remember
from sparsec.kernels import SparseLinear
from sparsec.kernels.modules.group import Group
from sparsec.progress import Progress
from sparsec.timing.arena import MAX_ARENA, Arena, last_level_cache
from sparsec.timing.turns import WARM_UP, clocked, take_turns

TINY, GROUPED = 64, 3  # of the matrices and groups that tell what a member of a group costs
COPIES = 60  # of them, as many as a model has


@dataclass(frozen=True)
class Trial:
    """A kernel on one matrix: `make` gives the module, on cold weights of its own at every call."""

    kernel: str
    format: str
    work: Work
    make: Callable[[Arena], nn.Module]


def packed_trial(kernel: str, packed: Packed, dtype: torch.dtype) -> Trial:
    """A packed matrix converted to another dtype, with whatever values: what they are does not matter to the time."""
    held = packed.converted(dtype)
    tensors = held.tensors()

    def make(arena: Arena) -> nn.Module:
        own = {name: arena.take(t) if name == "values" else t.clone() for name, t in tensors.items()}
        filled = type(held).from_parts(own, held.scalars())
        remember(filled)  # where values stand is as it was packed, and nothing is read from what they are
        return SparseLinear(filled)

    return Trial(kernel, Layout.of(held).cost_family, Work.of(held), make)


def dense_trial(
    kernel: str, module: Callable[[nn.Linear], nn.Module], out_features: int, in_features: int, dtype: torch.dtype
) -> Trial:
    """A dense matrix; `module` turns an nn.Linear into what is timed."""
    like = torch.empty(out_features, in_features, dtype=dtype)

    def make(arena: Arena) -> nn.Module:
        linear = nn.Linear(in_features, out_features, bias=False, device="meta")
        linear.weight = nn.Parameter(arena.take(like), requires_grad=False)
        return module(linear)

    return Trial(kernel, "dense", Work.dense(out_features, in_features, dtype), make)


@torch.no_grad()
def time_walk(
    trials: Sequence[Trial],
    arena: Arena,
    rounds: int,
    dtype: torch.dtype,
    progress: Progress | None = None,
    what: str = "walking",
) -> list[Timed]:
    """Seconds of one call of each at one row. Every round goes through all of them, in an order that starts elsewhere each time.

    Kernel after kernel, since a model has one or few: what another one leaves behind in caches and predictors costs up to a fifth.
    """
    nbytes = sum(c.work.nbytes for c in trials)
    copies = max(1, min(rounds, -(-2 * last_level_cache() // max(1, nbytes)), -(-MAX_ARENA // max(1, nbytes))))
    shuffled = torch.randperm(len(trials), generator=torch.Generator().manual_seed(0)).tolist()
    order = sorted(shuffled, key=lambda i: (trials[i].kernel, trials[i].format))
    modules = [[c.make(arena) for c in trials] for _ in range(copies)]
    xs = {n: torch.ones(1, n, dtype=dtype) for n in {c.work.in_features for c in trials}}
    cases = [_next(cycle([own[at] for own in modules]), xs[trials[at].work.in_features]) for at in order]
    times = take_turns(cases, rounds, WARM_UP, progress, what)
    medians = {at: statistics.median(own) for at, own in zip(order, times, strict=True)}
    return [Timed(c.work, 1, medians[at]) for at, c in enumerate(trials)]


@torch.no_grad()
def time_member(rounds: int, dtype: torch.dtype, threads_at_work: Callable[[], object]) -> float:
    """Seconds that one more member of a group costs beside the work on its matrix: tiny matrices, alone and in threes.

    threads_at_work: called before each, so that their call follows another one.
    """

    def linear(seed: int) -> SparseLinear:
        weight = torch.rand(TINY, TINY, generator=torch.Generator().manual_seed(seed)).to(dtype)
        return SparseLinear(CSR.pack(weight, weight > 0.5))

    groups = [[linear(GROUPED * i + j) for j in range(GROUPED)] for i in range(COPIES)]
    alone = [linear(-1 - i) for i in range(COPIES)]
    for members in groups:
        group = Group(GROUPED)
        for index, member in enumerate(members):
            member.join(group, index)
    x = torch.ones(1, TINY, dtype=dtype)
    for module in (*alone, *(member for members in groups for member in members)):
        module(x)
    singles, several = cycle(alone), cycle(groups)

    def further() -> float:
        threads_at_work()
        one = clocked(partial(next(singles), x))()
        threads_at_work()
        members = next(several)
        together = clocked(lambda: [member(x) for member in members])()
        return (together - one) / (GROUPED - 1)

    return max(0.0, statistics.median(take_turns([further], rounds)[0]))


@torch.no_grad()
def time_cold(trials: Sequence[Trial], rows: int, arena: Arena, rounds: int, dtype: torch.dtype) -> list[Timed]:
    """Seconds of one call of each; in every round each is called once, on weights that no call has read before."""
    modules = [[c.make(arena) for _ in range(rounds + WARM_UP)] for c in trials]
    x = torch.ones(rows, trials[0].work.in_features, dtype=dtype)
    arena.flush()
    times = take_turns([_next(iter(own), x) for own in modules], rounds)
    return [Timed(c.work, rows, _low(t)) for c, t in zip(trials, times, strict=True)]


@torch.no_grad()
def time_warm(trials: Sequence[Trial], arena: Arena, rounds: int, dtype: torch.dtype) -> list[Timed]:
    """Seconds of one call after another on the same weight, which a cache should be able to hold, at one row."""
    samples = []
    for trial in trials:
        case = clocked(partial(trial.make(arena), torch.ones(1, trial.work.in_features, dtype=dtype)))
        (times,) = take_turns([case], rounds)
        samples.append(Timed(trial.work, 1, _low(times), warm=True))
    return samples


def _next(modules: Iterator[nn.Module], x: Tensor) -> Callable[[], float]:
    """A case that calls the next of the modules."""
    return lambda: clocked(partial(next(modules), x))()


def time_read(nbytes: int) -> ReadRate:
    """Reading so many bytes again and again, with all threads: the memory roof, or that of the cache they fit in."""
    memory = torch.full((nbytes // 8,), 1, dtype=torch.int64)
    (times,) = take_turns([clocked(memory.sum)], max(5, min(100, (1 << 26) // nbytes)), warm_up=0)
    return ReadRate(memory.nbytes, min(times) / memory.nbytes)


def _low(times: Sequence[float]) -> float:
    """The lower quartile: what else the machine does can only add."""
    return statistics.quantiles(times, n=4, method="inclusive")[0]
