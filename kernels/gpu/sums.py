"""What the kernels share on the device: the product of two tiles, and the sum over the programs of a split product."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsec.formats import Packed
from sparsec.kernels.gpu.launch import Config, Launch, pick, rows_at_once, splits

CONFIG = Config({"BLOCK": 256})
ONE = (
    Config({"TILE": 512}, warps=1),
    Config({"TILE": 1024}, warps=2),
    Config({"TILE": 256}, warps=1),
    Config({"TILE": 2048}),
)
"""Of lists, row by row, for one or two rows of x; and for more. A tile that is longer than a row is mostly masked."""
SEVERAL = (
    Config({"TILE": 512}, warps=2),
    Config({"TILE": 256}, warps=2),
    Config({"TILE": 1024}),
    Config({"TILE": 512}),
)


@triton.jit
def multiply(a, b, sums, WIDE: tl.constexpr):
    """sums + a @ b in fp32, by the matrix units. WIDE: for Triton's interpreter, which multiplies the bits of bf16 as integers."""
    if WIDE:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, sums, input_precision="ieee")


@triton.jit
def store_row(
    sums, bias, out, row, token, tokens, out_features, HAS_BIAS: tl.constexpr, M: tl.constexpr
):  # fmt: skip
    """Of a kernel of which a program takes a row of W: what its tile of sums for each of M rows of x adds up to, and the bias."""
    for m in tl.static_range(M):
        total = tl.sum(sums[m], 0)
        if HAS_BIAS:
            total += tl.load(bias + row).to(tl.float32)
        place = (tl.program_id(1) * tokens + token + m) * out_features + row
        tl.store(out + place, total.to(out.dtype.element_ty), mask=token + m < tokens)


@triton.jit
def add_up_kernel(
    sums, bias, out, out_features, count, SPLITS: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr
):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    total = tl.zeros([BLOCK], tl.float32)
    for split in tl.static_range(SPLITS):
        total += tl.load(sums + split * count + at, mask=inside, other=0.0)
    if HAS_BIAS:
        total += tl.load(bias + at % out_features, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at, total.to(out.dtype.element_ty), mask=inside)


def add_up(sums: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """out [tokens, out] = the sum of sums [splits, tokens, out] + bias, in a fixed order: a result is the same every time."""
    count = out.numel()
    arguments = {"sums": sums, "bias": out if bias is None else bias, "out": out}
    Launch(
        add_up_kernel,
        (triton.cdiv(count, CONFIG.constants["BLOCK"]),),
        {**arguments, "out_features": out.shape[1], "count": count},
        {"SPLITS": sums.shape[0], "HAS_BIAS": bias is not None},
        CONFIG,
    ).run()


@dataclass(frozen=True)
class Partial:
    """Where the programs of a product write: the result itself, or a sum for each split, to be added up in a fixed order."""

    x: Tensor  # [tokens, in]
    out: Tensor  # [tokens, out]
    bias: Tensor | None
    splits: int
    sums: Tensor  # out, or fp32 [splits, tokens, out]

    @classmethod
    def of(cls, x: Tensor, out_features: int, bias: Tensor | None, splits: int) -> Partial:
        """For x [tokens, in]."""
        out = x.new_empty(x.shape[0], out_features)
        sums = out if splits == 1 else x.new_empty(splits, *out.shape, dtype=torch.float32)
        return cls(x, out, bias, splits, sums)

    def arguments(self) -> dict[str, Tensor | int]:
        """What every kernel takes beside the packed tensors."""
        (tokens, in_features), out_features = self.x.shape, self.out.shape[1]
        sizes = {"out_features": out_features, "in_features": in_features, "tokens": tokens}
        return {"x": self.x, "bias": self.sums if self.bias is None else self.bias, "out": self.sums, **sizes}

    def constants(self) -> dict[str, Any]:
        """What a kernel takes as SPLITS and HAS_BIAS."""
        return {"SPLITS": self.splits, "HAS_BIAS": self.bias is not None and self.splits == 1}

    def result(self) -> Tensor:
        """[tokens, out], once the kernel has been launched."""
        if self.splits > 1:
            add_up(self.sums, self.bias, self.out)
        return self.out


def row_by_row(
    kernel: Any,
    x: Tensor,
    packed: Packed,
    bias: Tensor | None,
    constants: Mapping[str, Any],
    held: Mapping[str, Tensor | int] | None = None,
) -> Tensor:
    """x [tokens, in] @ W.T + bias -> [tokens, out] by a kernel of which a program takes a row of W, TILE weights a turn.

    held: what the kernel takes of W; None: its tensors.
    """
    tokens, out_features = x.shape[0], packed.shape[0]
    m = rows_at_once(tokens)
    stored = packed.tensors()["col_idx"].numel()
    # What is the fastest depends on how long rows are: 256 to 4096 stored weights.
    length = 1 << min(max((stored // out_features).bit_length() - 1, 8), 12)
    choices = ONE if m <= 2 else SEVERAL
    config = pick(f"{packed.describe()} {m} {length}", choices)
    tile = config.constants["TILE"]
    turns = triton.cdiv(stored, out_features * tile)
    partial = Partial.of(x, out_features, bias, splits(x.device, out_features, turns))
    grid = (out_features, partial.splits, triton.cdiv(tokens, m))
    arguments = {**(packed.tensors() if held is None else held), **partial.arguments()}
    all_constants = {**constants, **partial.constants(), "M": m}
    Launch(kernel, grid, arguments, all_constants, config, tile, choices=choices).run()
    return partial.result()
