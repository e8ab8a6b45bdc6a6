"""The factor of a Gram matrix's inverse: its rows are the updates with which weights that stay make up for one that changes.

Frantar and Alistarh 2023, arXiv:2301.00774; Frantar et al. 2023, arXiv:2210.17323. Notation as there: H is the Hessian of a layer's
squared output error, the Gram matrix of its inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparsec.errors import ActivationError

_MOST_DAMPING = 10.0
_BLOCK = 256
"""Columns that are factored together; products do the rest, in place."""


def inverse_factor(
    gram: Tensor, damping: float, otherwise: str = "prune these layers with wanda"
) -> tuple[Tensor, Tensor, list[str]]:
    """(upper Cholesky factor of the inverse of H, of the dtype of gram [in, in], dead columns bool [in], notes).

    gram: [in, in], the sum of x.T @ x; H is it up to a factor, which cancels. A column that is zero in all of the text is dead: its
    weights do nothing. otherwise: what to do in place of this, for the error. Computed in one matrix of float64. Raises
    ActivationError when H cannot be factored even with ten times its mean diagonal added.
    """
    diagonal = gram.diagonal().double()
    dead = diagonal == 0
    scale = float(diagonal.mean()) or 1.0
    diagonal = torch.where(dead, scale, diagonal)
    notes = []
    added = damping
    while True:
        # From the last column to the first H = R R', R upper; so H's inverse is U' U with U the inverse of R: half of the work of
        # inverting H and factoring that.
        hessian = gram.to(torch.float64, copy=True)
        hessian.diagonal().copy_(diagonal + added * scale)
        if _factor(hessian):
            _invert(hessian)
            factor = hessian.to(gram.dtype)
            parts = torch.split(factor, _BLOCK)  # looking at all of it at once would take half as much memory again
            if all(bool(part.isfinite().all()) for part in parts):
                break
        del hessian
        if added >= _MOST_DAMPING:
            raise ActivationError(
                f"the Gram matrix of {len(gram)} input columns cannot be factored, even with {added:g} times its mean diagonal "
                f"added; calibrate on more or other text, or {otherwise}"
            )
        added *= 10
    if added > damping:
        notes.append(f"the Gram matrix could not be factored; damping was raised from {damping:g} to {added:g}")
    return factor, dead, notes


def factor_bytes(columns: int) -> int:
    """What `inverse_factor` takes at its worst moment beside the Gram matrix, which is float32: its own in float64, the result, and
    copies of a block and of what is above it."""
    block = min(columns, _BLOCK)
    return 12 * columns**2 + 24 * block * (block + columns)


def _factor(matrix: Tensor) -> bool:
    """Replaces a symmetric matrix by upper R with matrix = R R', zeros below; only what is on and above the diagonal is read.
    Whether there is one."""
    for block in reversed(_blocks(len(matrix))):
        before = slice(0, block.start)
        lower, failed = torch.linalg.cholesky_ex(matrix[block, block].triu().flip(0, 1))
        if failed:
            return False
        corner = lower.flip(0, 1)
        matrix[block, block] = corner
        matrix[block, before] = 0
        above = matrix[before, block]
        above.copy_(torch.linalg.solve_triangular(corner.t(), above, upper=False, left=False))
        for band in _blocks(block.start):
            matrix[: band.stop, band].addmm_(above[: band.stop], above[band].t(), alpha=-1)
    return True


def _invert(upper: Tensor) -> None:
    """Replaces an upper triangular matrix by its inverse."""
    for block in _blocks(len(upper)):
        before = slice(0, block.start)
        corner = upper[block, block]
        corner.copy_(torch.linalg.solve_triangular(corner, torch.eye(len(corner)).to(corner), upper=True))
        above = upper[before, block] @ corner
        torch.mm(upper[before, before], above.neg_(), out=upper[before, block])


def _blocks(n: int) -> list[slice]:
    return [slice(start, min(start + _BLOCK, n)) for start in range(0, n, _BLOCK)]
