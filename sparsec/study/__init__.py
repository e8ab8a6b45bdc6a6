"""Variants of one model built and compared: dense, masked, dense on sparsec's kernels, lowered."""
