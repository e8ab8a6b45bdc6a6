"""The passes, in one explicit table."""

from sparsec.passes.admm import ADMM
from sparsec.passes.flops import Flops
from sparsec.passes.freeze import Freeze
from sparsec.passes.fuse import Fuse
from sparsec.passes.lower import Lower
from sparsec.passes.magnitude import Magnitude
from sparsec.passes.mask import Mask
from sparsec.passes.recover import Recover
from sparsec.passes.round import Round
from sparsec.passes.sparsegpt import SparseGPT
from sparsec.passes.sparsity import Sparsity
from sparsec.passes.wanda import Wanda
from sparsec.passes.zeros import Zeros
from sparsec.pipeline.base import Pass

PASSES: tuple[type[Pass], ...] = (
    Magnitude,
    Wanda,
    SparseGPT,
    ADMM,
    Zeros,
    Mask,
    Freeze,
    Recover,
    Round,
    Sparsity,
    Flops,
    Fuse,
    Lower,
)

__all__ = [
    "ADMM",
    "PASSES",
    "Flops",
    "Freeze",
    "Fuse",
    "Lower",
    "Magnitude",
    "Mask",
    "Recover",
    "Round",
    "SparseGPT",
    "Sparsity",
    "Wanda",
    "Zeros",
]
