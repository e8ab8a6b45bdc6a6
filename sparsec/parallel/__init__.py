"""Packed layers under transformers' tensor parallelism: each process holds a share of every matrix, as the model's plan says."""
