"""How time is taken: turns, medians, replayed CUDA graphs, weights that are cold."""
