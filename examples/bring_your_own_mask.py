"""Masks from elsewhere: any rule you like decides what stays, sparsec does the rest.

The rule here is 2:4: of every four weights in a row, the two of the largest magnitude stay.

    python examples/bring_your_own_mask.py [MODEL]
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor, nn

import sparsec
from sparsec.data import load_model


def two_of_four(weight: Tensor) -> Tensor:
    """Mask [out, in], True where a weight is kept."""
    groups = weight.abs().reshape(weight.shape[0], -1, 4)
    kept = groups.topk(2, dim=-1).indices
    return torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, kept, True).reshape(weight.shape)


def main(name: str = "tiny") -> nn.Module:
    model = load_model(name).model
    # The traced graph knows which weights are linear layers of the blocks, whatever the model calls them.
    graph = sparsec.trace(model)
    mlp = [w.name for w in graph.weights.values() if w.group == "mlp" and w.kind == "linear"]
    masks = {weight: two_of_four(graph.matrix(weight)) for weight in mlp}

    compiled = sparsec.compile(model, passes="mask,freeze,sparsity,flops,lower(csr)", masks=masks)
    for record in compiled.sparsec.records:
        print(f"{record.spec:>12}: {record.summary}")
    return compiled


if __name__ == "__main__":
    main(*sys.argv[1:])
