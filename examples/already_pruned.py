"""A checkpoint that somebody pruned before: its zeros become the mask, and nothing that it computes changes.

Zeros alone make a model neither smaller nor faster; stored and executed as such, they do. Here torch.nn.utils.prune
plays the somebody. `prune.remove` makes the pruning permanent; without it the weight is computed anew at every call,
and sparsec says so instead of pruning it.

    python examples/already_pruned.py [MODEL]
"""

from __future__ import annotations

import sys

import torch
from torch import nn
from torch.nn.utils import prune

import sparsec
from sparsec.data import load_model


def prune_elsewhere(model: nn.Module, amount: float) -> None:
    """Zeros in every linear layer but the output head, which shares its weight with the embedding."""
    for module in model.modules():
        if isinstance(module, nn.Linear) and module is not model.get_output_embeddings():
            prune.l1_unstructured(module, "weight", amount=amount)
            prune.remove(module, "weight")


def main(name: str = "tiny") -> nn.Module:
    model = load_model(name).model
    prune_elsewhere(model, amount=0.6)

    compiled = sparsec.compile(model, passes="zeros,freeze,sparsity,flops,lower(csr)")
    for record in compiled.sparsec.records:
        print(f"{record.spec:>12}: {record.summary}")

    tokens = torch.arange(1, 17).reshape(1, -1)
    with torch.no_grad():
        gap = (model(tokens).logits - compiled(tokens).logits).abs().max()
    print(f"largest difference of any logit: {gap:.2g} (another order of summation, nothing else)")
    return compiled


if __name__ == "__main__":
    main(*sys.argv[1:])
