"""Where others look for what sparsec brings: transformers for saved models, torch.export for operators."""

from __future__ import annotations

from sparsec.imports import after

METHOD = "sparsec"
"""What a saved model is called in transformers' tables."""


def install() -> None:
    """Enters sparsec there once they are imported."""
    after("transformers.quantizers.auto", "sparsec.checkpoint.hub")
    after("transformers.configuration_utils", "sparsec.config_guard")
    after("torch._export.serde.serialize", "sparsec.kernels")  # what reads a .pt2; private, and told in docs/saving.md
