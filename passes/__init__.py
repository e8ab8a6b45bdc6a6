"""The passes, in one explicit table."""

from sparsec.passes.flops import Flops
from sparsec.passes.freeze import Freeze
from sparsec.passes.lower import Lower
from sparsec.passes.magnitude import Magnitude
from sparsec.passes.mask import Mask
from sparsec.passes.sparsity import Sparsity
from sparsec.passes.zeros import Zeros
from sparsec.pipeline.base import Pass

PASSES: tuple[type[Pass], ...] = (Magnitude, Zeros, Mask, Freeze, Sparsity, Flops, Lower)

__all__ = ["PASSES", "Flops", "Freeze", "Lower", "Magnitude", "Mask", "Sparsity", "Zeros"]
