"""The factor of a Gram matrix's inverse: its rows are the updates with which weights that stay make up for one that changes.

Frantar and Alistarh 2023, arXiv:2301.00774; Frantar et al. 2023, arXiv:2210.17323. Notation as there: H is the Hessian of a layer's
squared output error, the Gram matrix of its inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparsec.errors import ActivationError

_MOST_DAMPING = 10.0


def inverse_factor(
    gram: Tensor, damping: float, otherwise: str = "prune these layers with wanda"
) -> tuple[Tensor, Tensor, list[str]]:
    """(upper Cholesky factor of the inverse of H in float64 [in, in], dead columns bool [in], notes).

    gram: [in, in], the sum of x.T @ x; H is it up to a factor, which cancels. A column that is zero in all of the text is dead: its
    weights do nothing. otherwise: what to do in place of this, for the error. Raises ActivationError when H cannot be factored even
    with ten times its mean diagonal added.
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
        hessian = gram.double()
        hessian.diagonal().copy_(diagonal + added * scale)
        factor, failed = torch.linalg.cholesky_ex(hessian.flip(0, 1))
        if not failed:
            torch.eye(len(gram), out=hessian)
            torch.linalg.solve_triangular(factor.flip(0, 1), hessian, upper=True, out=hessian)
            factor = hessian
        if not failed and bool(factor.isfinite().all()):
            break
        if added >= _MOST_DAMPING:
            raise ActivationError(
                f"the Gram matrix of {len(gram)} input columns cannot be factored, even with {added:g} times its mean diagonal "
                f"added; calibrate on more or other text, or {otherwise}"
            )
        added *= 10
    if added > damping:
        notes.append(f"the Gram matrix could not be factored; damping was raised from {damping:g} to {added:g}")
    return factor, dead, notes
