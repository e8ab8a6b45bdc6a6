"""One weight of a graph, packed: in the layout that was chosen, its values rounded as far as that may be."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from sparsec.formats.base import Packed
from sparsec.formats.layout import Layout, for_device
from sparsec.formats.parts import DENSE
from sparsec.formats.quantised import Quantised
from sparsec.ir.facts import Weight
from sparsec.ir.graph import Graph
from sparsec.lowering.rounded import codes_like, zero_text
from sparsec.lowering.rounding import admitted
from sparsec.spill import Keep, Made


@dataclass(frozen=True)
class Wanted:
    """layout: of the weight. values: the codec to try within `bound`, "" where the layout's are settled. digits: as of `lower`."""

    layout: Layout
    values: str
    bound: float
    digits: int

    def packed(self, graph: Graph, weight: Weight, store: Keep) -> tuple[Packed | None, Mapping[str, Any]]:
        """The matrix, None where it stays dense, and {"told": texts for all, "reason": of this weight, or ""}.

        store: where it is kept. One that does not last has nothing to be read from.
        """
        if not store.lasting:
            return self._packed(graph, weight)

        def make() -> Made:
            packed, facts = self._packed(graph, weight)
            if packed is None:
                return {}, facts
            return packed.tensors(), {**facts, "layout": str(Layout.of(packed)), "scalars": dict(packed.scalars())}

        tensors, facts = store.made(f"packed {weight.name} {self.layout} {self.values}", make)
        if "layout" not in facts:
            return None, facts
        kind = Layout.parse(facts["layout"], offered=False).kind
        return kind.from_parts(dict(tensors), facts["scalars"]), facts

    def _packed(self, graph: Graph, weight: Weight) -> tuple[Packed | None, dict[str, Any]]:
        layout = self.layout
        matrix, mask = graph.matrix(weight.name), graph.mask_matrix(weight.name)
        if layout.format == DENSE:
            mask = torch.ones_like(matrix, dtype=torch.bool)
        assert mask is not None
        told: list[str] = []
        reason = ""
        if self.values:
            (first, *_), said = admitted(self.values, self.bound, matrix, mask, weight.rounded)
            layout = replace(layout, values=first)
            if said:
                reason = f"{layout}: {said}"
                told.append(said)
            if layout.stays:
                return None, {"told": told, "reason": reason}
        like, said = codes_like(weight, layout, matrix, mask)
        packed = layout.pack(matrix, mask, like, self.digits)
        if isinstance(packed, Quantised):
            said = said or zero_text(like, packed.table)
        if said:
            told.append(said)
        # as a later .to() would lay it out
        return for_device(packed, matrix.device.type), {"told": told, "reason": reason}
