"""Times the kernels as a model meets them: through their modules, one call at a time, every weight cold, the kernels in turn.

Cold means that more than the last-level cache can hold has been read since the weight was last touched. All values come from one
arena that the calls walk through, so that a weight of any size costs nothing to make; only indices are written anew.

At one row the calls of all matrices and kernels go round together: as in a model every call follows one on another matrix, and a
moment in which the machine is slow meets all of them instead of making one kernel or one shape look slow.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import torch
from torch import Tensor, nn

from sparsec.cost.fit import Sample
from sparsec.cost.model import Read, Work
from sparsec.formats import CSR
from sparsec.formats.base import Packed
from sparsec.formats.layout import Layout
from sparsec.kernels import SparseLinear
from sparsec.kernels.modules.group import Group

MIN_ARENA, MAX_ARENA = 1 << 28, 1 << 30  # bytes
UNKNOWN_CACHE = 1 << 26
FILL = 0x3C  # as every byte: about 0.0115 in fp32 and bf16, 1.06 in fp16, never a subnormal, which some CPUs multiply slowly
LINE = 64
WARM_UP = 2
TINY, GROUPED = 64, 3  # of the matrices and groups that tell what a member of a group costs
COPIES = 60  # of them, as many as a model has


class Arena:
    """Memory several times as large as the last-level cache, handed out in turn, over and over."""

    def __init__(self) -> None:
        size = min(MAX_ARENA, max(MIN_ARENA, 4 * last_level_cache()))
        self._memory = torch.full((size,), FILL, dtype=torch.uint8)
        self._at = 0

    def take(self, like: Tensor) -> Tensor:
        """A tensor of that shape and dtype, not read for an arena's length; its content is not to be changed."""
        nbytes = like.nbytes
        assert nbytes <= self._memory.nbytes
        if self._at + nbytes > self._memory.nbytes:
            self._at = 0
        taken = self._memory[self._at : self._at + nbytes]
        self._at += -(-nbytes // LINE) * LINE
        return taken.view(like.dtype).view(like.shape)

    def flush(self) -> None:
        """Reads all of it, after which nothing else is in a cache."""
        self._memory.view(torch.int64).sum()


@dataclass(frozen=True)
class Contender:
    """A kernel on one matrix: `make` gives the module, on cold weights of its own at every call."""

    kernel: str
    format: str
    work: Work
    make: Callable[[Arena], nn.Module]


def packed_contender(kernel: str, packed: Packed, dtype: torch.dtype) -> Contender:
    """A packed matrix with values of another dtype in place of its own: what they are does not matter to the time."""
    tensors = packed.tensors()
    values = tensors["values"].to(dtype)

    def with_values(new: Tensor) -> Packed:
        return type(packed).from_parts({**tensors, "values": new}, packed.scalars())

    def make(arena: Arena) -> nn.Module:
        parts = {name: t.clone() for name, t in tensors.items() if name != "values"}
        return SparseLinear(type(packed).from_parts({"values": arena.take(values), **parts}, packed.scalars()))

    return Contender(kernel, Layout.of(packed).cost_family, Work.of(with_values(values)), make)


def dense_contender(
    kernel: str, module: Callable[[nn.Linear], nn.Module], out_features: int, in_features: int, dtype: torch.dtype
) -> Contender:
    """A dense matrix; `module` turns an nn.Linear into what is timed."""
    like = torch.empty(out_features, in_features, dtype=dtype)

    def make(arena: Arena) -> nn.Module:
        linear = nn.Linear(in_features, out_features, bias=False, device="meta")
        linear.weight = nn.Parameter(arena.take(like), requires_grad=False)
        return module(linear)

    return Contender(kernel, "dense", Work.dense(out_features, in_features, dtype), make)


@torch.no_grad()
def time_walk(
    contenders: Sequence[Contender],
    arena: Arena,
    rounds: int,
    dtype: torch.dtype,
    progress: Callable[[int, int], None] | None = None,
) -> list[Sample]:
    """Seconds of one call of each at one row. Every round goes through all of them, in an order that starts elsewhere each time.

    Kernel after kernel, since a model has one or few: what another one leaves behind in caches and predictors costs up to a fifth.
    """
    nbytes = sum(c.work.nbytes for c in contenders)
    copies = max(1, min(rounds, -(-2 * last_level_cache() // max(1, nbytes)), -(-MAX_ARENA // max(1, nbytes))))
    shuffled = torch.randperm(len(contenders), generator=torch.Generator().manual_seed(0)).tolist()
    order = sorted(shuffled, key=lambda i: (contenders[i].kernel, contenders[i].format))
    modules = [[c.make(arena) for c in contenders] for _ in range(copies)]
    xs = {n: torch.ones(1, n, dtype=dtype) for n in {c.work.in_features for c in contenders}}
    times: list[list[float]] = [[] for _ in contenders]
    for turn in range(rounds + WARM_UP):
        if progress is not None:
            progress(turn, rounds + WARM_UP)
        start = turn * len(order) // (rounds + WARM_UP)
        for at in (*order[start:], *order[:start]):
            seconds = _call(modules[turn % copies][at], xs[contenders[at].work.in_features])
            if turn >= WARM_UP:
                times[at].append(seconds)
    return [Sample(c.work, 1, statistics.median(t)) for c, t in zip(contenders, times, strict=True)]


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
    extra = []
    for turn in range(rounds + WARM_UP):
        threads_at_work()
        one = _call(alone[turn % COPIES], x)
        threads_at_work()
        start = perf_counter()
        for member in groups[turn % COPIES]:
            member(x)
        extra.append((perf_counter() - start - one) / (GROUPED - 1))
    return max(0.0, statistics.median(extra[WARM_UP:]))


@torch.no_grad()
def time_cold(
    contenders: Sequence[Contender], rows: int, arena: Arena, rounds: int, dtype: torch.dtype
) -> list[Sample]:
    """Seconds of one call of each; in every round each is called once, on weights that no call has read before."""
    modules = [[c.make(arena) for _ in range(rounds + WARM_UP)] for c in contenders]
    x = torch.ones(rows, contenders[0].work.in_features, dtype=dtype)
    times: list[list[float]] = [[] for _ in contenders]
    arena.flush()
    for turn in range(rounds + WARM_UP):
        for i in range(len(contenders)):
            at = (i + turn) % len(contenders)
            seconds = _call(modules[at][turn], x)
            if turn >= WARM_UP:
                times[at].append(seconds)
    return [Sample(c.work, rows, _low(t)) for c, t in zip(contenders, times, strict=True)]


@torch.no_grad()
def time_warm(contenders: Sequence[Contender], arena: Arena, rounds: int, dtype: torch.dtype) -> list[Sample]:
    """Seconds of one call after another on the same weight, which a cache should be able to hold, at one row."""
    samples = []
    for contender in contenders:
        module = contender.make(arena)
        x = torch.ones(1, contender.work.in_features, dtype=dtype)
        times = [_call(module, x) for _ in range(rounds + WARM_UP)][WARM_UP:]
        samples.append(Sample(contender.work, 1, _low(times), warm=True))
    return samples


def _call(module: nn.Module, x: Tensor) -> float:
    start = perf_counter()
    module(x)
    return perf_counter() - start


def last_level_cache() -> int:
    """Bytes, as the system says."""
    sizes = [p.read_text().strip() for p in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    known = [int(s[:-1]) * units[s[-1]] for s in sizes if s[:-1].isdigit() and s[-1] in units]
    return max(known, default=UNKNOWN_CACHE)


def time_read(nbytes: int) -> Read:
    """Reading so many bytes again and again, with all threads: the memory roof, or that of the cache they fit in."""
    memory = torch.full((nbytes // 8,), 1, dtype=torch.int64)
    times = []
    for _ in range(max(5, min(100, (1 << 26) // nbytes))):
        start = perf_counter()
        memory.sum()
        times.append(perf_counter() - start)
    return Read(memory.nbytes, min(times) / memory.nbytes)


def _low(times: Sequence[float]) -> float:
    """The lower quartile: what else the machine does can only add."""
    return statistics.quantiles(times, n=4, method="inclusive")[0]
