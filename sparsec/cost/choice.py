"""Which format and kernel serves one weight best: the candidates with their bytes and predicted times, and the reason in words."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from sparsec.cost.calibration import Calibration
from sparsec.cost.model import Prediction, Work
from sparsec.errors import FormatError, KernelError
from sparsec.formats import FORMATS, NM
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
BLOCKS = {"cpu": ((32, 32), (16, 16), (8, 8), (16, 1)), "cuda": ((128, 128), (64, 64), (32, 32), (16, 16))}
"""By type of device, those that its kernels are good at."""
FULL = 0.6
"""Blocks are worth a look where those that keep any weight are at least this full: an unstructured mask has no such blocks."""
WIDE = 1 << 16  # columns that 16 bits reach


@dataclass(frozen=True)
class Candidate:
    """One way to hold and to multiply by a weight."""

    format: str  # "dense", or a key of FORMATS
    label: str  # in words: csr8, bsr16x16
    kernel: str
    options: dict[str, Any]  # of pack
    nbytes: int
    prediction: Prediction | None  # None where nothing was measured


@dataclass(frozen=True)
class Setting:
    """What the choices are made for."""

    objective: Objective
    rows: int = 1  # of x
    calibration: Calibration | None = None  # None: nothing is measured, so bytes decide
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
        yield Candidate("dense", "dense", kernel, {}, work.nbytes, prediction)


def sparse_candidates(mask: Tensor, dtype: torch.dtype, setting: Setting) -> Iterator[Candidate]:
    """Every format that can hold the mask and has a kernel for it; with an option that decides, each of its values."""
    out_features, in_features = mask.shape
    for name, label, options in _packings(mask, setting.device):
        try:
            if name == NM.format:
                label = NM.planned_layout(mask, dtype)
            problem = Problem(name, out_features, in_features, setting.rows, dtype, setting.device, layout=label)
            kernel = select(problem).name
            nbytes: int = FORMATS[name].planned_nbytes(mask, dtype, **options)  # type: ignore[attr-defined]
        except (FormatError, KernelError):
            continue  # it cannot hold or serve this weight
        work = Work(out_features, in_features, _stored(name, options, nbytes, mask.shape, dtype), nbytes)
        yield Candidate(name, label, kernel, options, nbytes, _predict(setting, kernel, label, dtype, work))


def _packings(mask: Tensor, device: str) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(format, label, options) worth a look on a type of device."""
    lists = "wcsr" if device == "cuda" and mask.shape[1] <= WIDE else "csr"
    for bits in (8, 16) if mask.shape[1] <= WIDE else (32,):
        yield lists, f"{lists}{bits}", {"index_bits": bits}
    yield "bitmap", "bitmap", {}
    yield "nm", "nm", {}
    for r, c in BLOCKS.get(device, BLOCKS["cpu"]):
        if mask.numel() and mask.shape[0] % r == 0 and mask.shape[1] % c == 0 and _fullness(mask, r, c) >= FULL:
            yield "bsr", f"bsr{r}x{c}", {"block": (r, c)}


def _fullness(mask: Tensor, r: int, c: int) -> float:
    """Share of kept weights in the r x c blocks that keep any. One look at the first rows sees most unstructured masks."""
    few = mask[: r * max(1, 256 // r)]
    looked = [few, mask] if few.shape[0] < mask.shape[0] else [mask]
    fullness = 0.0
    for part in looked:
        kept = part.reshape(part.shape[0] // r, r, part.shape[1] // c, c).any(3).any(1)
        fullness = float(part.count_nonzero()) / max(1, int(kept.count_nonzero()) * r * c)
        if fullness < FULL / 2:
            break
    return fullness


def _stored(name: str, options: dict[str, Any], nbytes: int, shape: torch.Size, dtype: torch.dtype) -> int:
    """How many values a packed matrix of so many bytes holds, fillers and padding included."""
    out_features, in_features = shape
    match name:
        case "csr" | "wcsr":  # with wcsr's bases counted in, at most 2 % too many
            return (nbytes - 4 * (out_features + 1)) // (dtype.itemsize + int(options["index_bits"]) // 8)
        case "bitmap":
            panels = -(-out_features // 16)
            return (nbytes - 2 * panels * in_features - 4 * (panels + 1)) // dtype.itemsize
        case "bsr":
            r, c = map(int, options["block"])
            index = 2 if in_features // c <= WIDE else 4
            return (nbytes - 4 * (out_features // r + 1)) // (r * c * dtype.itemsize + index) * r * c
        case "nm":  # an index takes 2 or 3 bits; with 3 this is at most 6 % too many
            return (nbytes - 4) * 16 // (16 * dtype.itemsize + 4)
    return nbytes // dtype.itemsize


def _predict(setting: Setting, kernel: str, label: str, dtype: torch.dtype, work: Work) -> Prediction | None:
    known = setting.calibration
    cost = None if known is None else known.cost(kernel, label, dtype)
    if known is None or cost is None:
        return None
    found = cost.predict(work, setting.rows, known.reach(setting.working_set))
    if setting.fused and kernel != TORCH and known.member is not None:
        found = replace(found, call=found.call - cost.call + known.member)
    return found


def _smallest(dense: Candidate, sparse: Sequence[Candidate]) -> Choice:
    best = min(sparse, key=lambda c: c.nbytes, default=None)
    if best is None:
        return Choice(dense, "dense: no format holds it")
    if best.nbytes >= dense.nbytes:
        return Choice(dense, f"dense: the smallest, {best.label}, takes {_share(best, dense)} of its bytes")
    others = sorted((c for c in sparse if c is not best), key=lambda c: c.nbytes)[:2]
    rest = "".join(f"; {c.label} {_share(c, dense)}" for c in others)
    return Choice(best, f"{best.label}: {_share(best, dense)} of the dense bytes{rest}")


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
        return Choice(plain, f"{name}: {fastest.label} predicted {plain_seconds / least:.2f}x of that, below {margin}x")
    close = [(s, c) for s, c in timed if s <= CLOSE * least and s * margin <= plain_seconds]
    seconds, best = min(close, key=lambda t: t[1].nbytes)
    assert best.prediction is not None
    others = [f"{c.label} {base / s:.2f}x" for s, c in timed if c is not best][:2]
    others += [f"{plain.kernel} {base / plain_seconds:.2f}x"] if plain.kernel != TORCH else []
    rest = f"; {', '.join(others)}" if others else ""
    smaller = "" if best is fastest else f", the smallest of the {len(close)} about as fast"
    bound = f"bound by {best.prediction.binds}{smaller}"
    return Choice(best, f"{best.label}: predicted {base / seconds:.2f}x of F.linear, {bound}{rest}")


def _share(candidate: Candidate, dense: Candidate) -> str:
    return f"{candidate.nbytes / max(1, dense.nbytes):.0%}"
