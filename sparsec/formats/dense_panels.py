"""All weights of a matrix in panels: the positions of quantised values where nothing is left out.

A plain dense weight stays the model's own row-major Parameter and needs no format; codes have one, so that a lane of 32 bits holds
four columns of a row, as in every other layout (panels.py).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import Tensor

from sparsec.formats.base import HALF_AND_SINGLE, Packed, Plan
from sparsec.formats.faults import Field, check_pack, check_plan
from sparsec.formats.panels import LANES, from_panels, lane_columns, panel_count, step_count, to_panels
from sparsec.formats.rows import panel_rows


@dataclass(frozen=True, eq=False)
class DensePanels(Packed):
    """Panel by panel, in it step by step; absent rows and columns hold 0."""

    format: ClassVar[str] = "dense"
    title: ClassVar[str] = "packed dense"
    dtypes: ClassVar[tuple[torch.dtype, ...]] = HALF_AND_SINGLE
    tensor_names: ClassVar[tuple[str, ...]] = ("values",)
    scalar_names: ClassVar[tuple[str, ...]] = ("out_features", "in_features")

    values: Tensor  # [panels, steps, 16, columns of a lane]
    out_features: int
    in_features: int

    @classmethod
    def pack(cls, weight: Tensor, mask: Tensor) -> Self:
        """Packs all of weight [out, in]; mask [out, in] must be True everywhere, as `held` makes it."""
        check_pack(cls.title, cls.dtypes, weight, mask)
        return cls(to_panels(weight.detach(), lane_columns(weight.dtype)), *weight.shape)

    @classmethod
    def plan(cls, mask: Tensor, dtype: torch.dtype) -> Plan:
        """What `pack` would hold. FormatError as there."""
        check_plan(cls.title, cls.dtypes, mask, dtype)
        stored = panel_count(mask.shape[0]) * step_count(mask.shape[1], dtype) * LANES * lane_columns(dtype)
        return Plan(stored * dtype.itemsize, stored)

    @property
    def shape(self) -> tuple[int, int]:
        return (self.out_features, self.in_features)

    @property
    def nnz(self) -> int:
        return self.out_features * self.in_features

    def scatter(self) -> Tensor:
        return from_panels(self.values, *self.shape)

    def rows(self, ids: Tensor) -> Tensor:
        return panel_rows(self.values, ids)[:, : self.in_features]

    def _cut_rows(self, first: int, end: int) -> Self:
        if first % LANES or (end % LANES and end != self.out_features):
            values = to_panels(self.scatter()[first:end], self.values.shape[-1])
        else:
            values = self.values[first // LANES : panel_count(end)]
        return replace(self, values=values, out_features=end - first)

    def _cut_columns(self, first: int, end: int) -> Self:
        lane = self.values.shape[-1]
        if first % lane or (end % lane and end != self.in_features):
            values = to_panels(self.scatter()[:, first:end], lane)
        else:
            values = self.values[:, first // lane : -(-end // lane)].contiguous()
        return replace(self, values=values, in_features=end - first)

    def fields(self) -> list[Field]:
        lane = lane_columns(self.values.dtype)
        steps = step_count(self.in_features, self.values.dtype)
        shape = (("panels", panel_count(self.out_features)), ("steps", steps), ("16", LANES), ("columns", lane))
        return [Field("values", self.values, self.dtypes, shape)]

    def content_faults(self) -> list[str]:
        past = self.in_features % self.values.shape[-1]
        if past and self.values[:, -1, :, past:].count_nonzero():
            return [f"values must be zero past the last column, {self.in_features - 1}"]
        rest = self.out_features % LANES
        if rest and self.values[-1, :, rest:].count_nonzero():
            return [f"values must be zero past the last row, {self.out_features - 1}"]
        return []
