"""Which format and kernel serves one weight best: the candidates with their bytes and predicted times, and the reason in words."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
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
    prediction: Prediction | None  # None where nothing was measured


@dataclass(frozen=True)
class Setting:
    """What the choices are made for."""

    objective: Objective
    rows: int = 1  # of x
    constants: Constants | None = None  # None: nothing is measured, so bytes decide
    working_set: int | None = None  # bytes that are read in turn; None: more than a cache holds
    device: str = "cpu"  # its type
    fused: bool = False  # a part of a fused product, whose call all parts share, whatever their formats

    @property
    def margin(self) -> float:
        """How many times as fast as dense a sparse kernel must be predicted."""
        return MARGIN if self.rows <= FEW else MARGIN_MANY


@dataclass(frozen=True)
class Choice:
    """The best candidate, and why it is the best."""

    best: Candidate
    reason: str


def choose(matrix: Tensor, mask: Tensor | None, setting: Setting, dense_kernels: Sequence[str] = (TORCH,)) -> Choice:
    """For a weight [out, in] with its mask, None where it cannot be packed; then only the dense kernels compete.

    dense_kernels: those that may serve it; the first one is what runs if nothing is done. Speedups in the reason are over
    F.linear.
    """
    dense = list(dense_candidates(matrix, setting, dense_kernels))
    sparse = [] if mask is None else list(sparse_candidates(mask, matrix.dtype, setting))
    work = Work.dense(matrix.shape[0], matrix.shape[1], matrix.dtype)
    base = _predict(setting, TORCH, "dense", matrix.dtype, work)
    if base is None or setting.objective == "bytes":
        return _smallest(dense[0], sparse)
    return _fastest(base.seconds, dense, sparse, setting.margin)


def dense_candidates(matrix: Tensor, setting: Setting, kernels: Sequence[str]) -> Iterator[Candidate]:
    """The weight as it is."""
    work = Work.dense(matrix.shape[0], matrix.shape[1], matrix.dtype)
    for kernel in kernels:
        prediction = _predict(setting, kernel, "dense", matrix.dtype, work)
        yield Candidate(Layout("dense"), kernel, work.nbytes, prediction)


def sparse_candidates(mask: Tensor, dtype: torch.dtype, setting: Setting) -> Iterator[Candidate]:
    """Every layout worth a look that can hold the mask and has a kernel for it."""
    out_features, in_features = mask.shape
    for open_layout in Layout.candidates(mask, setting.device):
        try:
            layout, plan = open_layout.planned(mask, dtype)
            problem = Problem(
                layout.format, out_features, in_features, setting.rows, dtype, setting.device, layout=str(layout)
            )
            kernel = select(problem).name
        except (FormatError, KernelError):
            continue  # it cannot hold or serve this weight
        except (OfferedError, SpecError) as error:
            warnings.warn(f"{error}; {open_layout} is not considered", stacklevel=2)
            continue
        work = Work(out_features, in_features, plan.stored, plan.nbytes)
        prediction = _predict(setting, kernel, str(layout), dtype, work)
        yield Candidate(layout, kernel, plan.nbytes, prediction)


def _predict(setting: Setting, kernel: str, label: str, dtype: torch.dtype, work: Work) -> Prediction | None:
    known = setting.constants
    cost = None if known is None else known.cost(kernel, label, dtype)
    if known is None or cost is None:
        return None
    found = cost.predict(work, setting.rows, known.reach(setting.working_set))
    if setting.fused and kernel != TORCH and known.member is not None:
        found = replace(found, call=found.call - cost.call + min(known.member, cost.call))  # a group saves calls
    return found


def _smallest(dense: Candidate, sparse: Sequence[Candidate]) -> Choice:
    best = min(sparse, key=lambda c: c.nbytes, default=None)
    if best is None:
        return Choice(dense, "dense: no format holds it")
    if best.nbytes >= dense.nbytes:
        return Choice(dense, f"dense: the smallest, {best.layout}, takes {_share(best, dense)} of its bytes")
    others = sorted((c for c in sparse if c is not best), key=lambda c: c.nbytes)[:2]
    rest = "".join(f"; {c.layout} {_share(c, dense)}" for c in others)
    return Choice(best, f"{best.layout}: {_share(best, dense)} of the dense bytes{rest}")


def _fastest(base: float, dense: Sequence[Candidate], sparse: Sequence[Candidate], margin: float) -> Choice:
    timed = sorted(((c.prediction.seconds, c) for c in sparse if c.prediction is not None), key=lambda t: t[0])
    known = [(c.prediction.seconds, c) for c in dense if c.prediction is not None]
    if not known:
        return _smallest(dense[0], sparse)
    plain_seconds, plain = min(known, key=lambda t: t[0])
    if known[0][0] < MARGIN * plain_seconds:  # what runs anyway is not worth replacing
        plain_seconds, plain = known[0]
    name = "dense" if plain.kernel == TORCH else f"dense[{plain.kernel}] {base / plain_seconds:.2f}x of F.linear"
    if not timed:
        return Choice(plain, f"{name}")
    least, fastest = timed[0]
    if least * margin > plain_seconds:
        return Choice(
            plain, f"{name}: {fastest.layout} predicted {plain_seconds / least:.2f}x of that, below {margin}x"
        )
    close = [(s, c) for s, c in timed if s <= CLOSE * least and s * margin <= plain_seconds]
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
