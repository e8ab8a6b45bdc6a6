"""A run that is only planned: what is known of it from shapes alone, pass by pass."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from sparsec.calibrate import CalibrationData
from sparsec.ir.graph import Graph


@dataclass(eq=False)
class Foreseen:
    """data: calls, of which shapes count. streaming: weights, masks and packed tensors lie in mapped files, which are no memory.
    ranks: processes that work together."""

    data: CalibrationData | None = None
    streaming: bool = False
    ranks: int = 1
    zeros: dict[str, float] = field(default_factory=dict)  # sparsity by weight, of those that were pruned
    notes: list[str] = field(default_factory=list)  # what had to be taken for granted

    def pruned(self, graph: Graph, shares: Mapping[str, float], pattern: str) -> None:
        """These weights get masks, without numbers, of these sparsities."""
        for name, share in shares.items():
            self.zeros[name] = max(self.zeros.get(name, 0.0), share)
            graph.put_mask(name, torch.empty(graph.weights[name].shape, dtype=torch.bool, device="meta"), pattern)

    def granted(self, note: str) -> None:
        """Says once what had to be taken for granted."""
        if note not in self.notes:
            self.notes.append(note)
