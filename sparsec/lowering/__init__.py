"""Rewriting a graph's products: from dense ones to ones over packed weights. What the passes `fuse` and `lower` share."""

from sparsec.lowering.rewrite import dense_readers, lower_weight

__all__ = ["dense_readers", "lower_weight"]
