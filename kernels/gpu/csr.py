"""CSR on a GPU: few rows of x by gathers, many through an expanded matrix and torch's dense product.

For what warp CSR does not hold: more than 65536 columns. Rows begin anywhere, so that nothing is read in wider words. A program
takes one row of W, its warps side by side.
"""

from __future__ import annotations

import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from sparsec.formats.csr import CSR
from sparsec.kernels.gpu.launch import FEW, Config, Launch
from sparsec.kernels.gpu.sums import row_by_row, store_row

EXPAND = Config({"TILE": 512}, warps=2)


@triton.jit
def columns_at(col_idx, at, live, WIDTH: tl.constexpr):
    """Columns of a row's stored weights at [TILE], as uint32. col_idx: from where the row starts."""
    c = tl.load(col_idx + at, mask=live, other=0)
    if WIDTH == 16:
        c = c.to(tl.uint16, bitcast=True)
    return c.to(tl.uint32)


@triton.jit
def csr_kernel(
    x, values, col_idx, row_ptr, bias, out, out_features, in_features, tokens,
    WIDTH: tl.constexpr, SPLITS: tl.constexpr, HAS_BIAS: tl.constexpr, M: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    row, token = tl.program_id(0), tl.program_id(2) * M
    begin = tl.load(row_ptr + row)
    count = tl.load(row_ptr + row + 1) - begin
    sums = (tl.zeros([TILE], tl.float32),) * M
    for start in range(tl.program_id(1) * TILE, count, SPLITS * TILE):
        at = start + tl.arange(0, TILE)
        live = at < count
        v = tl.load(values + begin + at, mask=live, other=0.0).to(tl.float32)
        c = columns_at(col_idx + begin, at, live, WIDTH)
        added = ()
        for m in tl.static_range(M):
            # Past the last row of x the last one is read again, and nothing is stored.
            xs = tl.load(x + tl.minimum(token + m, tokens - 1) * in_features + c)
            added = added + (sums[m] + v * xs.to(tl.float32),)
        sums = added
    store_row(sums, bias, out, row, token, tokens, out_features, HAS_BIAS, M)


@triton.jit
def csr_expand_kernel(values, col_idx, row_ptr, dense, in_features, WIDTH: tl.constexpr, TILE: tl.constexpr):
    row = tl.program_id(0)
    begin = tl.load(row_ptr + row)
    count = tl.load(row_ptr + row + 1) - begin
    for start in range(0, count, TILE):
        at = start + tl.arange(0, TILE)
        live = at < count
        v = tl.load(values + begin + at, mask=live, other=0.0)
        c = columns_at(col_idx + begin, at, live, WIDTH)
        tl.store(dense + row.to(tl.int64) * in_features + c, v, mask=live)


def csr(x: Tensor, packed: CSR, bias: Tensor | None) -> Tensor:
    """x [tokens, in] @ W.T + bias -> [tokens, out]."""
    if x.shape[0] > FEW:
        return F.linear(x, expand(packed), bias)
    return row_by_row(csr_kernel, x, packed, bias, {"WIDTH": packed.index_bits})


def expand(packed: CSR) -> Tensor:
    """The dense matrix [out, in]."""
    dense = packed.values.new_zeros(packed.shape)
    Launch(
        csr_expand_kernel,
        (packed.shape[0],),
        {**packed.tensors(), "dense": dense, "in_features": packed.in_features},
        {"WIDTH": packed.index_bits},
        EXPAND,
        elements=EXPAND.constants["TILE"],
    ).run()
    return dense
