"""A storage format of your own, and a kernel for it: a flat list of kept weights and where each of them stands.

The reference kernel, which expands the matrix, comes with a format. An installed package offers both by entry points of the groups
`sparsec.formats` and `sparsec.kernels`; then nothing has to be added by hand.

    python examples/write_a_format.py
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

import sparsec
from sparsec import formats, kernels
from sparsec.formats.base import Packed, Plan
from sparsec.formats.faults import Field, check_pack, check_plan


@dataclass(frozen=True, eq=False)
class Flat(Packed):
    """The kept weights, row by row, and the place of each in the flattened matrix."""

    format: ClassVar[str] = "flat"
    title: ClassVar[str] = "flat"
    dtypes: ClassVar[tuple[torch.dtype, ...]] = (torch.float32, torch.bfloat16, torch.float16)
    tensor_names: ClassVar[tuple[str, ...]] = ("values", "places")
    scalar_names: ClassVar[tuple[str, ...]] = ("out_features", "in_features")

    values: Tensor  # [nnz]
    places: Tensor  # [nnz], int32
    out_features: int
    in_features: int

    @classmethod
    def pack(cls, weight: Tensor, mask: Tensor) -> Self:
        check_pack(cls.title, cls.dtypes, weight, mask)
        places = mask.flatten().nonzero()[:, 0]
        return cls(weight.detach().flatten()[places], places.int(), *mask.shape)

    @classmethod
    def plan(cls, mask: Tensor, dtype: torch.dtype) -> Plan:
        check_plan(cls.title, cls.dtypes, mask, dtype)
        kept = int(mask.sum())
        return Plan(kept * (dtype.itemsize + 4), kept)

    @property
    def shape(self) -> tuple[int, int]:
        return self.out_features, self.in_features

    @property
    def nnz(self) -> int:
        return self.values.numel()

    def scatter(self) -> Tensor:
        dense = self.values.new_zeros(self.out_features * self.in_features)
        return dense.index_copy(0, self.places.long(), self.values).view(self.shape)

    def fields(self) -> list[Field]:
        nnz = (("nnz", self.nnz),)
        return [Field("values", self.values, self.dtypes, nnz), Field("places", self.places, (torch.int32,), nnz)]

    def content_faults(self) -> list[str]:
        places, end = self.places.tolist(), self.out_features * self.in_features
        return [] if places == sorted(set(places) & set(range(end))) else [f"places must ascend within [0, {end})"]


def by_sums(x: Tensor, packed: Flat, bias: Tensor | None) -> Tensor:
    """x [..., in] @ W.T + bias -> [..., out], one product for every kept weight."""
    row, column = (f(packed.places.long(), packed.in_features) for f in (torch.floor_divide, torch.remainder))
    out = x.new_zeros(*x.shape[:-1], packed.out_features).index_add_(-1, row, x[..., column] * packed.values)
    return out if bias is None else out + bias


FLAT_SUMS = kernels.Kernel("flat_sums", "flat", (torch.float32,), None, by_sums)


@torch.no_grad()
def main(sparsity: str = "0.9") -> nn.Module:
    formats.add(Flat)
    model, x = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 8)).eval(), torch.randn(2, 64)
    compiled = sparsec.compile(model, f"magnitude({sparsity}, scope='layer'),freeze,lower(flat)", example_inputs=x)
    print(compiled.sparsec.report())
    expanded = compiled(x)
    kernels.add(FLAT_SUMS)  # from now on it serves fp32
    print(compiled[0], f"off by {float((compiled(x) - expanded).abs().max()):.1e}", sep="\n")
    return compiled


if __name__ == "__main__":
    main(*sys.argv[1:])
