"""Which format and kernel serves one weight best: the candidates with their bytes and predicted times, and the reason in words."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Literal

import torch
from torch import Tensor

from sparsec.cost.constants import Constants
from sparsec.cost.model import Prediction, Work
from sparsec.errors import FormatError, KernelError, OfferedError, SpecError
from sparsec.formats.layout import Layout
from sparsec.kernels import Problem, select

Objective = Literal["latency", "bytes"]
TORCH = "dense_torch"
"""F.linear: what a model runs that nobody compiled."""
OWN = "dense_cpu"
"""The dense kernel of sparsec."""
MARGIN = 1.05
"""A sparse kernel must be predicted so many times as fast as the best dense one: less is noise, and dense weights stay writable."""
FEW = 8
"""Rows of x, up to which a product is bound by reading its weight, and predictions are good."""
MARGIN_MANY = 1.25
"""In place of MARGIN with more rows: arithmetic binds, and small matrices were measured up to 0.7 times as fast as predicted."""
CLOSE = 1.1
"""Sparse candidates predicted within this of the fastest are as fast, as far as the cost model can tell: the smallest is taken."""


@dataclass(frozen=True)
class Candidate:
    """One way to hold and to multiply by a weight."""

    layout: Layout
    kernel: str
    nbytes: int
    predictions: tuple[tuple[int, Prediction], ...]
    """By the setting's products: how many, and one of them. Empty where nothing was measured."""

    @property
    def prediction(self) -> Prediction | None:
        """Of the products that take longest."""
        return max(self.predictions, key=lambda p: p[0] * p[1].seconds)[1] if self.predictions else None

    @property
    def seconds(self) -> float:
        """Of all the setting's products."""
        return sum(times * one.seconds for times, one in self.predictions)

    def careful(self, setting: Setting) -> float:
        """Seconds by which it must beat a dense kernel: those of each number of rows with their margin."""
        margins = (MARGIN if rows <= FEW else MARGIN_MANY for rows, _ in setting.products)
        return sum(m * times * one.seconds for m, (times, one) in zip(margins, self.predictions, strict=True))


@dataclass(frozen=True)
class Setting:
    """What the choices are made for: `new_tokens` products with `rows` rows of x each, after one with a prompt if there is one."""

    objective: Objective
    rows: int = 1  # of x
    constants: Constants | None = None  # None: nothing is measured, so bytes decide
    working_set: int | None = None  # bytes that are read in turn; None: more than a cache holds
    device: str = "cpu"  # its type
    fused: bool = False  # a part of a fused product, whose call all parts share, whatever their formats
    prompt_tokens: int = 0  # rows of x before; 0: no prompt
    new_tokens: int = 1
    values: tuple[str, ...] = ("",)  # codecs that packed values may have; "" for plain ones

    @property
    def products(self) -> tuple[tuple[int, int], ...]:
        """Rows of x, and how many products with so many."""
        decode = (self.rows, self.new_tokens)
        return ((self.prompt_tokens, 1), decode) if self.prompt_tokens else (decode,)


@dataclass(frozen=True)
class Choice:
    """The best candidate, and why it is the best."""

    best: Candidate
    reason: str


def choose(matrix: Tensor, mask: Tensor | None, setting: Setting, dense_kernels: Sequence[str] = (TORCH,)) -> Choice:
    """For a weight [out, in] with its mask, None where it cannot be packed; then only the dense kernels compete. A mask of fewer
    rows stands for all of them.

    dense_kernels: those that may serve it; the first one is what runs if nothing is done. Speedups in the reason are over
    F.linear.
    """
    dense = list(dense_candidates(matrix, setting, dense_kernels))
    sparse = [] if mask is None else list(sparse_candidates(mask, matrix.dtype, setting, matrix.shape[0]))
    work = Work.dense(matrix.shape[0], matrix.shape[1], matrix.dtype)
    base = Candidate(Layout("dense"), TORCH, work.nbytes, _predict(setting, TORCH, "dense", matrix.dtype, work))
    if not base.predictions or setting.objective == "bytes":
        return _smallest(dense[0], sparse)
    return _fastest(base.seconds, dense, sparse, setting)


def dense_candidates(matrix: Tensor, setting: Setting, kernels: Sequence[str]) -> Iterator[Candidate]:
    """The weight as it is."""
    work = Work.dense(matrix.shape[0], matrix.shape[1], matrix.dtype)
    for kernel in kernels:
        yield Candidate(Layout("dense"), kernel, work.nbytes, _predict(setting, kernel, "dense", matrix.dtype, work))


def sparse_candidates(
    mask: Tensor, dtype: torch.dtype, setting: Setting, out_features: int | None = None
) -> Iterator[Candidate]:
    """Every layout worth a look that can hold the mask and has a kernel for it. out_features: of a matrix of which the mask shows
    some rows, all others being like them."""
    rows, in_features = mask.shape
    out_features = rows if out_features is None else out_features
    share = out_features / max(1, rows)
    for open_layout in chain.from_iterable(Layout.candidates(mask, setting.device, v) for v in setting.values):
        try:
            layout, plan = open_layout.planned(mask, dtype)
            problem = Problem(
                layout.kind.format, out_features, in_features, setting.rows, dtype, setting.device, layout=str(layout)
            )
            kernel = select(problem).name
        except (FormatError, KernelError):
            continue  # it cannot hold or serve this weight
        except (OfferedError, SpecError) as error:
            warnings.warn(f"{error}; {open_layout} is not considered", stacklevel=2)
            continue
        work = Work(out_features, in_features, round(share * plan.stored), round(share * plan.nbytes))
        yield Candidate(layout, kernel, work.nbytes, _predict(setting, kernel, str(layout), dtype, work))


def _predict(
    setting: Setting, kernel: str, label: str, dtype: torch.dtype, work: Work
) -> tuple[tuple[int, Prediction], ...]:
    known = setting.constants
    cost = None if known is None else known.cost(kernel, label, dtype)
    if known is None or cost is None:
        return ()
    found = []
    for rows, times in setting.products:
        one = cost.predict(work, rows, known.reach(setting.working_set))
        if setting.fused and kernel != TORCH and known.member is not None:
            one = replace(one, call=one.call - cost.call + min(known.member, cost.call))  # a group saves calls
        found.append((times, one))
    return tuple(found)


def _smallest(dense: Candidate, sparse: Sequence[Candidate]) -> Choice:
    best = min(sparse, key=lambda c: c.nbytes, default=None)
    if best is None:
        return Choice(dense, "dense: no format holds it")
    if best.nbytes >= dense.nbytes:
        return Choice(dense, f"dense: the smallest, {best.layout}, takes {_share(best, dense)} of its bytes")
    others = sorted((c for c in sparse if c is not best), key=lambda c: c.nbytes)[:2]
    rest = "".join(f"; {c.layout} {_share(c, dense)}" for c in others)
    return Choice(best, f"{best.layout}: {_share(best, dense)} of the dense bytes{rest}")


def _fastest(base: float, dense: Sequence[Candidate], sparse: Sequence[Candidate], setting: Setting) -> Choice:
    timed = sorted(((c.seconds, c) for c in sparse if c.predictions), key=lambda t: t[0])
    known = [(c.seconds, c) for c in dense if c.predictions]
    if not known:
        return _smallest(dense[0], sparse)
    plain_seconds, plain = min(known, key=lambda t: t[0])
    if known[0][0] < MARGIN * plain_seconds:  # what runs anyway is not worth replacing
        plain_seconds, plain = known[0]
    name = "dense" if plain.kernel == TORCH else f"dense[{plain.kernel}] {base / plain_seconds:.2f}x of F.linear"
    if not timed:
        return Choice(plain, f"{name}")
    least, fastest = timed[0]
    careful = fastest.careful(setting)
    if careful > plain_seconds:
        against = "F.linear"
        if plain.kernel != TORCH:
            against = f"sparsec's dense kernel, itself {base / plain_seconds:.2f}x that of F.linear"
        return Choice(
            plain,
            f"dense: {fastest.layout}, the fastest sparse layout here, is predicted at {plain_seconds / least:.2f}x the speed of "
            f"{against}; it is taken from {careful / least:.2f}x on",
        )
    close = [(s, c) for s, c in timed if s <= CLOSE * least and c.careful(setting) <= plain_seconds]
    seconds, best = min(close, key=lambda t: t[1].nbytes)
    assert best.prediction is not None
    others = [f"{c.layout} {base / s:.2f}x" for s, c in timed if c is not best][:2]
    others += [f"{plain.kernel} {base / plain_seconds:.2f}x"] if plain.kernel != TORCH else []
    rest = f"; {', '.join(others)}" if others else ""
    smaller = "" if best is fastest else f", the smallest of the {len(close)} about as fast"
    bound = f"bound by {best.prediction.binds}{smaller}"
    return Choice(best, f"{best.layout}: predicted {base / seconds:.2f}x of F.linear, {bound}{rest}")


def _share(candidate: Candidate, dense: Candidate) -> str:
    return f"{candidate.nbytes / max(1, dense.nbytes):.0%}"
