"""Several processes that work on one model: who they are, what they share out, add up and tell each other.

The one place that knows torch.distributed. Each rank makes the same calls in the same order, as everywhere there; only jobs and
sums differ. `together` begins and ends it. Meanwhile a thread beside each watches the others (`sparsec.watch`), and no wait is
longer than that allows: a rank that died or hangs ends the others with its name.
"""

from __future__ import annotations

import atexit
import io
import os
import pickle
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from contextvars import ContextVar
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from sparsec.errors import RanksError
from sparsec.watch import Watch

T = TypeVar("T")
MEET = timedelta(minutes=5)
"""How long the first rank waits for the last one to come."""
_WORK = timedelta(days=1)
"""How long one waits for another that is known to be alive."""
_IN_FLIGHT = 1 << 26
"""Bytes that are on their way at once."""
_MADE_ALIKE = "every rank must make the same call of sparsec; what one does by itself goes under `with sparsec.ranks.by_itself():`"


class Ranks:
    """number: of this one, from 0; count: of all. One alone exchanges nothing and waits for nobody."""

    def __init__(self, number: int = 0, count: int = 1) -> None:
        self.number, self.count = number, count
        self._watch: Watch | None = None
        self._groups: list[Any] = []

    @property
    def alone(self) -> bool:
        """Whether there is nobody else."""
        return self.count == 1

    @property
    def first(self) -> bool:
        """Whether this one speaks and writes for all."""
        return self.number == 0

    def check(self) -> None:
        """RanksError where another one died, failed or hangs."""
        if self._watch is not None:
            self._watch.check()

    def mine(self, sizes: Sequence[int]) -> list[int]:
        """Numbers of the jobs that fall to this one."""
        return [job for job, owner in enumerate(share_out(sizes, self.count)) if owner == self.number]

    def each(self, sizes: Sequence[int], work: Callable[[int], T], device: torch.device | None = None) -> Iterator[T]:
        """What `work` makes of every job, in order. Each job is done by one rank, and its result, tensors within it and all, goes
        to every one: sizes say how much there is to do, device where tensors are put."""
        if self.alone:
            yield from (work(job) for job in range(len(sizes)))
            return
        owners = share_out(sizes, self.count)
        done = {job: work(job) for job, owner in enumerate(owners) if owner == self.number}
        yield from self._exchanged(owners, done, device or torch.device("cpu"))

    def add_up(self, tensors: Iterable[tuple[Tensor, int]]) -> None:
        """Pairs of a tensor and a rank, the same on all: there it becomes the sum over all ranks, in place; elsewhere it is spent.

        For one number of ranks the order of the sum is always the same.
        """
        waiting: list[tuple[Any, Tensor, Tensor, int]] = []
        held = 0
        for tensor, to in () if self.alone else tensors:
            whole = tensor.contiguous()
            waiting.append((dist.reduce(whole, to, group=self._group(whole), async_op=True), tensor, whole, to))
            held += whole.nbytes
            if held >= _IN_FLIGHT:
                self._taken(waiting)
                held = 0
        self._taken(waiting)

    def sum(self, tensors: Iterable[Tensor]) -> None:
        """Every tensor becomes the sum over all ranks, in place, and on all of them the same."""
        if not self.alone:
            for tensor in tensors:
                self._wait(dist.all_reduce(tensor, group=self._group(tensor), async_op=True))

    def of_first(self, number: float) -> float:
        """A number as the first rank has it."""
        if self.alone:
            return number
        told = torch.tensor([number if self.first else 0.0], dtype=torch.float64)
        self.sum([told])
        return float(told)

    def clock(self) -> float:
        """Seconds, as `perf_counter`; of the first rank, so that all see a time pass alike."""
        return self.of_first(time.perf_counter())

    def told(self, mine: T) -> list[T]:
        """What each rank has to say, by rank; no tensors on a GPU."""
        if self.alone:
            return [mine]
        text = pickle.dumps(mine)
        sizes = torch.zeros(self.count, dtype=torch.int64)
        sizes[self.number] = len(text)
        self.sum([sizes])
        padded = torch.zeros(int(sizes.max()), dtype=torch.uint8)
        padded[: len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        all_of_them = [torch.empty_like(padded) for _ in range(self.count)]
        self._wait(dist.all_gather(all_of_them, padded, group=self._groups[0], async_op=True))
        return [pickle.loads(t[:n].numpy().tobytes()) for t, n in zip(all_of_them, sizes.tolist(), strict=True)]

    def mesh(self, device: torch.device) -> Any:
        """All of them in a row, a DeviceMesh, for torch's FSDP. Of the user's own group: torch keeps what it knows of a mesh,
        and the groups of `together` go with it."""
        from torch.distributed.device_mesh import init_device_mesh

        return init_device_mesh(device.type, (self.count,))

    def agree(self, known: Callable[[], Mapping[str, str]]) -> None:
        """RanksError where ranks differ in one of these facts, each by its name. One alone is not asked."""
        if self.alone:
            return
        facts = known()
        for number, others in enumerate(self.told(dict(facts))):
            differing = [name for name in {**facts, **others} if facts.get(name) != others.get(name)]
            if differing and (number == 0 or self.first):
                said = "; ".join(
                    f"{name}: {facts.get(name) or 'none'} here, {others.get(name) or 'none'} there"
                    for name in differing
                )
                raise RanksError(
                    f"rank {number} differs from rank {self.number} in {', '.join(differing)} ({said}); start all ranks with "
                    f"the same versions, files, text and options, and {_MADE_ALIKE}"
                )
        self.told(None)  # nobody goes on before all have compared

    def _exchanged(self, owners: Sequence[int], done: Mapping[int, T], device: torch.device) -> Iterator[T]:
        texts: dict[int, tuple[bytes, list[tuple[torch.dtype, torch.Size]]]] = {}
        tensors: dict[int, list[Tensor]] = {}
        for job, result in done.items():
            text, tensors[job] = _taken_apart(result)
            texts[job] = text, [(t.dtype, t.shape) for t in tensors[job]]
        known = {job: text for each in self.told(texts) for job, text in each.items()}
        for job, owner in enumerate(owners):
            text, kinds = known[job]
            own = tensors.pop(job) if owner == self.number else [None] * len(kinds)
            found = []
            waiting = []
            for (dtype, shape), tensor in zip(kinds, own, strict=True):
                wire = _empty_wire(dtype, shape, device) if tensor is None else _wire(tensor, device)
                if wire.numel():
                    waiting.append(dist.broadcast(wire, owner, group=self._group(wire), async_op=True))
                found.append((wire, dtype, shape))
            for sent in waiting:
                self._wait(sent)
            parts = [
                _unwired(wire, dtype, shape) if tensor is None else tensor.to(device)
                for (wire, dtype, shape), tensor in zip(found, own, strict=True)
            ]
            yield _put_together(text, parts)

    def _taken(self, waiting: list[tuple[Any, Tensor, Tensor, int]]) -> None:
        for work, tensor, whole, to in waiting:
            self._wait(work)
            if to == self.number and whole is not tensor:
                tensor.copy_(whole)
        waiting.clear()

    def _group(self, tensor: Tensor) -> Any:
        return self._groups[0 if tensor.device.type == "cpu" else -1]

    def _wait(self, work: Any) -> None:
        """As `work.wait()`, which would wait for ever where a rank hangs."""
        pause = 2e-5
        try:
            while not work.is_completed():
                self.check()
                time.sleep(pause)
                pause = min(1.5 * pause, 2e-3)
            work.wait()
        except RuntimeError as error:
            if isinstance(error, RanksError):
                raise
            assert self._watch is not None
            raise self._watch.lost(error) from error

    def _meet(self) -> None:
        """The groups in which ranks speak: on the CPU, and where tensors are. A watch has two of its own."""
        try:
            beats, verdicts = (dist.new_group(backend="gloo", timeout=MEET) for _ in range(2))
            self._groups = [dist.new_group(backend="gloo", timeout=_WORK)]
            if dist.get_backend() != "gloo":
                self._groups.append(dist.new_group(timeout=_WORK))
        except RuntimeError as error:
            raise RanksError(
                f"rank {self.number} waited for the others, and not all of {self.count} came ({str(error).splitlines()[0]:.200}); "
                f"{_MADE_ALIKE}"
            ) from error
        self._watch = Watch(self.number, self.count, beats, verdicts)
        self._watch.start()

    def _leave(self, error: BaseException | None, groups: Sequence[Any]) -> None:
        """error: why this one ends, which ends the others."""
        assert self._watch is not None
        try:
            self._watch.leave(error)
        finally:
            for group in (*groups, *self._watch.groups):
                group.abort()  # else it would wait for what never comes
            self._watch.close()
            for group in () if self._watch.broken else (*groups, *self._watch.groups):
                dist.destroy_process_group(group)
            self._groups = []


ALONE = Ranks()
"""One process, as mostly."""
_here: ContextVar[Ranks | None] = ContextVar("_here", default=None)


@contextmanager
def together(ends_process: bool = False) -> Iterator[Ranks]:
    """Within it the ranks of the process group that the user initialised work as one; without a group, one works alone.

    ends_process: where another one is lost and this one does not notice, since it computes, the process ends a little later. Raises
    RanksError where not all come.
    """
    held = _here.get()
    if held is None and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        ranks = Ranks(dist.get_rank(), dist.get_world_size())
        ranks._meet()
        assert ranks._watch is not None
        ranks._watch.ends_process = ends_process
    else:
        yield held or ALONE
        return
    token = _here.set(ranks)
    try:
        yield ranks
    except BaseException as error:
        lost = ranks._watch.instead(error)
        ranks._leave(lost or error, ranks._groups)
        if lost is not None:
            raise lost from error
        raise
    else:
        ranks._leave(None, ranks._groups)
    finally:
        _here.reset(token)


@contextmanager
def launched() -> Iterator[Ranks]:
    """`together` in a command that torchrun may have started: the process group begins and ends with it, and the first rank alone
    speaks. Raises RanksError where not all ranks come."""
    named = all(name in os.environ for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"))
    if not named or os.environ["WORLD_SIZE"] == "1" or not dist.is_available() or dist.is_initialized():
        with together() as ranks:
            yield ranks
        return
    try:
        dist.init_process_group("gloo", timeout=MEET)
    except (RuntimeError, ValueError) as error:
        raise RanksError(
            f"rank {os.environ['RANK']} of {os.environ['WORLD_SIZE']} cannot reach the others at {os.environ['MASTER_ADDR']}, port "
            f"{os.environ['MASTER_PORT']} ({str(error).splitlines()[0]:.200}); start all of them with torchrun"
        ) from error
    try:
        with ExitStack() as quiet:
            if dist.get_rank():
                quiet.enter_context(redirect_stdout(io.StringIO()))
                quiet.enter_context(redirect_stderr(io.StringIO()))
            yield quiet.enter_context(together(ends_process=True))
    except RanksError:
        atexit.register(_end)  # taking connections down would wait for a rank that hangs
        raise
    dist.destroy_process_group()


def _end() -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(2)


def first_here(ranks: Ranks) -> int:
    """The rank that torchrun counts first on this machine; this one itself where nothing tells."""
    return ranks.number - (0 if ranks.alone else int(os.environ.get("LOCAL_RANK", "0")))


@contextmanager
def by_itself() -> Iterator[None]:
    """Within it this process works by itself, whatever process group there is: `if rank == 0:` may then stand around a call."""
    token = _here.set(ALONE)
    try:
        yield
    finally:
        _here.reset(token)


def share_out(sizes: Sequence[int], count: int) -> list[int]:
    """The rank that does each job: the largest first, each to whom least was given. Loads differ by the largest job at most."""
    loads = [0] * count
    owners = [0] * len(sizes)
    for job in sorted(range(len(sizes)), key=lambda job: (-sizes[job], job)):
        owners[job] = min(range(count), key=lambda rank: (loads[rank], rank))
        loads[owners[job]] += sizes[job]
    return owners


def _taken_apart(value: object) -> tuple[bytes, list[Tensor]]:
    """Pickled, with every tensor left out."""
    tensors: list[Tensor] = []
    into = io.BytesIO()
    pickler = pickle.Pickler(into)

    def leave_out(part: object) -> int | None:
        if not isinstance(part, Tensor):
            return None
        tensors.append(part.detach())
        return len(tensors) - 1

    pickler.persistent_id = leave_out  # type: ignore[method-assign]
    pickler.dump(value)
    return into.getvalue(), tensors


def _put_together(text: bytes, tensors: Sequence[Tensor]) -> Any:
    unpickler = pickle.Unpickler(io.BytesIO(text))
    unpickler.persistent_load = tensors.__getitem__  # type: ignore[method-assign]
    return unpickler.load()


def _wire(tensor: Tensor, device: torch.device) -> Tensor:
    """Its bytes; of bool on a CPU one bit each, since masks are most of what is told."""
    if tensor.dtype == torch.bool and device.type == "cpu":
        return torch.from_numpy(np.packbits(tensor.cpu().contiguous().reshape(-1).numpy()))
    return tensor.to(device).contiguous().reshape(-1).view(torch.uint8)


def _empty_wire(dtype: torch.dtype, shape: torch.Size, device: torch.device) -> Tensor:
    if dtype == torch.bool and device.type == "cpu":
        return torch.empty(-(-shape.numel() // 8), dtype=torch.uint8)
    return torch.empty(shape.numel() * dtype.itemsize, dtype=torch.uint8, device=device)


def _unwired(wire: Tensor, dtype: torch.dtype, shape: torch.Size) -> Tensor:
    if dtype == torch.bool and wire.device.type == "cpu":
        return torch.from_numpy(np.unpackbits(wire.numpy(), count=shape.numel())).view(torch.bool).reshape(shape)
    return wire.view(dtype).reshape(shape)
