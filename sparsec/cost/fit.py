"""The constants of a kernel from its measured times: non-negative least squares on relative errors.

Which roof bound a measurement cannot be told from cold times alone, since bytes and decode work grow together. So the decode rate
comes from warm times, of weights in a cache; cold times then give the call, the bandwidth that the kernel reaches, and by how much
decoding is slower while memory is read too.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from sparsec.cost.model import KernelCost, Rate, RowsRate, Work

Matrix = NDArray[np.float64]
ROUNDS = 8  # of assigning measurements to roofs; it mostly settles within five
STARTS = (1.0, 2.0, 4.0)  # times the seconds of plain reading: which roofs bind is a search with local optima
REWEIGHTINGS = 5
TOLERATED = 0.1


@dataclass(frozen=True)
class Timed:
    """One measured product."""

    work: Work
    rows: int
    seconds: float
    warm: bool = False  # its weight lay in a cache


def fit(kernel: str, format_name: str, dtype: str, samples: Sequence[Timed], read_per_byte: float) -> KernelCost:
    """A kernel's constants from its samples: warm ones and cold ones at one row, and cold ones at more.

    read_per_byte: seconds of plain reading from memory, from which the search for the binding roofs starts. A kernel for many rows
    alone has no others: then it is what it takes for those, and nothing is known of fewer.
    """
    warm = [s for s in samples if s.warm]
    cold = [s for s in samples if not s.warm and s.rows == 1]
    decode = _decode(warm) if warm else Rate(0.0, 0.0)
    best = start = KernelCost(kernel, format_name, dtype, 0.0, 0.0, read_per_byte, decode, (), 0.0)
    for slower in STARTS if cold else ():
        found = replace(start, per_byte=slower * read_per_byte)
        for _ in range(ROUNDS):
            before, found = found, _refined(found, cold)
            if best is start or _misfit(found, cold) < _misfit(best, cold):
                best = found
            if found == before:
                break
    counts = sorted({s.rows for s in samples if s.rows > 1})
    rows = tuple(RowsRate(n, _multiply(best, [s for s in samples if s.rows == n and not s.warm])) for n in counts)
    done = replace(best, rows=rows)
    errors = [abs(done.predict(s.work, s.rows).seconds / s.seconds - 1) for s in samples if not s.warm]
    return replace(done, error=float(np.quantile(errors, 0.9)))


def non_negative(a: Matrix, b: Matrix) -> Matrix:
    """The x >= 0 that minimises |a @ x - b|, by trying every subset of the few columns: [n, k], [n] -> [k]."""
    best, least = np.zeros(a.shape[1]), float(b @ b)
    used = [i for i in range(a.shape[1]) if a[:, i].any()]
    for size in range(1, len(used) + 1):
        for columns in itertools.combinations(used, size):
            part = a[:, columns]
            x = np.linalg.lstsq(part, b, rcond=None)[0]
            left = part @ x - b
            # a column that adds nothing, such as the positions of a dense matrix beside its values, stays out
            if (x >= 0).all() and float(left @ left) < (1 - 1e-9) * least:
                best, least = np.zeros(a.shape[1]), float(left @ left)
                best[list(columns)] = x
    return best


def _solve(columns: Sequence[Sequence[float]], seconds: Sequence[float]) -> list[float]:
    """Coefficients >= 0 of the columns, least squares of the relative errors; beyond TOLERATED they count less and less, since
    what was disturbed by other work on the machine says nothing of the kernel."""
    a, t = np.array(columns, dtype=np.float64).T, np.array(seconds, dtype=np.float64)
    scale = np.maximum(np.abs(a).max(axis=0), np.finfo(np.float64).tiny)  # the columns differ by many powers of ten
    a = a / scale / t[:, None]
    weights = np.ones(len(t))
    for _ in range(REWEIGHTINGS):
        found = non_negative(a * weights[:, None], weights)
        errors = np.abs(a @ found - 1)
        if (errors <= TOLERATED).all():
            break
        weights = np.sqrt(TOLERATED / np.maximum(TOLERATED, errors))
    return [float(v) for v in found / scale]


def _decode(warm: Sequence[Timed]) -> Rate:
    works = [s.work for s in warm]
    columns: list[list[float]] = [[1.0] * len(works), [w.out_features for w in works]]
    columns += [[w.stored for w in works], [w.positions for w in works]]
    _, _, per_stored, per_position = _solve(columns, [s.seconds for s in warm])
    return Rate(per_stored, per_position)


def _refined(cost: KernelCost, cold: Sequence[Timed]) -> KernelCost:
    """Each measurement goes to the roof that binds it by the constants so far; then the constants anew."""
    parts = [cost.predict(s.work) for s in cold]
    bytes_bind = [p.read >= p.decode for p in parts]
    columns = [[1.0] * len(cold), [float(s.work.out_features) for s in cold]]
    columns.append([s.work.nbytes * bound for s, bound in zip(cold, bytes_bind, strict=True)])
    columns.append([p.decode * (not bound) for p, bound in zip(parts, bytes_bind, strict=True)])
    call, per_output, per_byte, slower = _solve(columns, [s.seconds for s in cold])
    decode = Rate(cost.decode.per_stored * slower, cost.decode.per_position * slower) if slower else cost.decode
    return replace(cost, call=call, per_output=per_output, per_byte=per_byte or cost.per_byte, decode=decode)


def _misfit(cost: KernelCost, cold: Sequence[Timed]) -> float:
    return sum(min(1.0, abs(cost.predict(s.work).seconds / s.seconds - 1)) for s in cold)


def _multiply(cost: KernelCost, samples: Sequence[Timed]) -> Rate:
    """What is left of the time with many rows once the call is paid."""
    left = [max(s.seconds - cost.predict(s.work).call, 0.05 * s.seconds) for s in samples]
    return Rate(*_solve([[s.work.stored for s in samples], [s.work.positions for s in samples]], left))
