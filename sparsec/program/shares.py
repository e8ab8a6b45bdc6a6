"""Where the time of a token goes when a program decodes it: the nanoseconds of its instructions, by what they compute.

The product that gives the logits is the head; whatever is neither product nor attention is the rest: norms, activations, rotary
embeddings, rows of the embedding. What is around the instructions, Python and the handing over of the cache, is apart.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from time import perf_counter

import torch
from torch import Tensor

from sparsec.errors import KernelError
from sparsec.kernels.chain import CODES, PRODUCT
from sparsec.kernels.program import ATTEND, JOIN, LOOK_UP, TENSOR, VIEW
from sparsec.program.decoder import StepForward
from sparsec.program.writer import Written


@dataclass(frozen=True)
class Shares:
    """Seconds of one token by part."""

    linears: float
    lm_head: float
    attention: float | None  # None for a model whose attention is no module of that name
    rest: float
    around: float | None = None  # outside of the instructions of a native call; None where there is none

    @property
    def total(self) -> float:
        """Of all parts."""
        return self.linears + self.lm_head + (self.attention or 0.0) + self.rest + (self.around or 0.0)


@dataclass(frozen=True)
class Instruction:
    """One of a program."""

    kind: int  # PRODUCT, of CODES, VIEW, TENSOR, JOIN, LOOK_UP or ATTEND
    tensors: tuple[Tensor, ...]  # of the model, that it reads


def instructions(written: Written) -> Iterator[Instruction]:
    """Those of a program, in order. KernelError for a code that is none."""
    code, at, used = written.code, 0, 0
    elements = set(CODES.values())
    while at < len(code):
        kind, count = code[at], 0
        if kind in (PRODUCT, LOOK_UP):
            count, words = code[at + 2], 4 + code[at + 3]
        elif kind in elements:
            words = 4
        elif kind == VIEW:
            words = 9
        elif kind == TENSOR:
            count, words = 1, 1
        elif kind == JOIN:
            words = 2 + code[at + 1]
        elif kind == ATTEND:
            words = 12
        else:
            raise KernelError(f"a program names no instruction at entry {at}: {kind}")
        yield Instruction(kind, tuple(written.tensors[used : used + count]))
        at, used = at + words, used + count
    if at != len(code) or used != len(written.tensors):
        raise KernelError(f"a program of {len(code)} entries and {len(written.tensors)} tensors has {at} and {used}")


def step_bytes(written: Written) -> int:
    """Bytes of the model that a token reads whole, each once: all but tables, of which it reads a row, and the cache."""
    read = {
        (t.data_ptr(), t.nbytes): t.nbytes
        for each in instructions(written)
        if each.kind != LOOK_UP
        for t in each.tensors
    }
    return sum(read.values())


def step_shares(forward: StepForward, decode: Callable[[], object], tokens: int) -> Shares | None:
    """Medians of so many tokens, batch 1, each one call of `decode`; None where no program serves the model, or did not run."""
    prepared = forward.prepared()
    if prepared is None:
        return None
    parts = [_part(each.kind) for each in instructions(prepared.written) if each.kind != VIEW]
    last = max(i for i, part in enumerate(parts) if part == "linears")
    parts[last] = "lm_head"
    found: list[dict[str, float]] = []
    for _ in range(tokens):
        with prepared.timed(torch.zeros(len(parts), dtype=torch.int64)) as times:
            start = perf_counter()
            decode()
            elapsed = perf_counter() - start
        spent = dict.fromkeys(("linears", "lm_head", "attention", "rest"), 0.0)
        for part, nanoseconds in zip(parts, times.tolist(), strict=True):
            spent[part] += nanoseconds / 1e9
        if not any(spent.values()):
            return None
        found.append(spent | {"around": elapsed - sum(spent.values())})
    return Shares(**{name: statistics.median(each[name] for each in found) for name in found[0]})


def _part(kind: int) -> str:
    return {PRODUCT: "linears", ATTEND: "attention"}.get(kind, "rest")
