"""Rewriting a graph's products: from dense ones to ones over packed weights. What the passes `fuse` and `lower` share."""

from sparsec.lowering.dense import use_dense_kernel
from sparsec.lowering.fuse import fuse_products
from sparsec.lowering.rewrite import dense_readers, lower_weight, never_packed, repack

__all__ = ["dense_readers", "fuse_products", "lower_weight", "never_packed", "repack", "use_dense_kernel"]
