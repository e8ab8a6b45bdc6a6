"""BSR on a GPU: whole blocks, by the matrix units from two rows of x on; with few rows the blocks are split over programs.

A matrix that comes from a CPU is laid out anew, with one column in a lane (`BSR.ordered`). With two it is multiplied right as well,
by more instructions.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from sparsec.formats.bsr import BSR
from sparsec.kernels.gpu.launch import Config, Launch, fitting, interpreted, pick, splits
from sparsec.kernels.gpu.sums import Partial, multiply

PRODUCT = (Config({}), Config({}, warps=2), Config({}, warps=8), Config({}, stages=3))
MATRIX = (Config({}, stages=3), Config({}, stages=4), Config({}, warps=8, stages=3), Config({}, warps=2))
"""Of these the last one spills registers with large blocks, and the last two in fp32."""
LEAST = 16
"""Sides of what the matrix units multiply."""
TOKENS = 64
"""Rows of x that a program takes at most."""
LARGE = 1 << 14
"""Bytes of a block from which on fewer rows of x and more warps are taken, so that registers suffice."""
LARGE_PRODUCT = (Config({}, warps=8),)


@triton.jit
def bsr_kernel(
    x, values, col_idx, row_ptr, bias, out, out_features, in_features, tokens,
    R: tl.constexpr, C: tl.constexpr, LANE: tl.constexpr, SIDE_R: tl.constexpr, SIDE_C: tl.constexpr, SHORT: tl.constexpr,
    SPLITS: tl.constexpr, HAS_BIAS: tl.constexpr, M: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    r, c = tl.arange(0, SIDE_R), tl.arange(0, SIDE_C)
    token = tl.program_id(2) * M + tl.arange(0, M)
    sums = tl.zeros([M, SIDE_R] if M > 1 else [SIDE_C, SIDE_R], tl.float32)
    for b in range(tl.load(row_ptr + row) + tl.program_id(1), tl.load(row_ptr + row + 1), SPLITS):
        column = tl.load(col_idx + b).to(tl.int32)
        if SHORT:
            column = column & 0xFFFF
        # A side that is no power of two is filled up with zeros.
        place = (c // LANE)[:, None] * (R * LANE) + r[None, :] * LANE + (c % LANE)[:, None]
        w = tl.load(values + b * (C * R) + place, mask=(r < R)[None, :] & (c < C)[:, None], other=0.0)
        if M > 1:
            # Past the last row of x the last one is read again, and nothing is stored.
            at = tl.minimum(token, tokens - 1)[:, None] * in_features + column * C + c[None, :]
            xs = tl.load(x + at, mask=(c < C)[None, :], other=0.0)
            sums = multiply(xs, w, sums, WIDE)
        else:
            xs = tl.load(x + tl.program_id(2) * in_features + column * C + c, mask=c < C, other=0.0)
            sums += w.to(tl.float32) * xs.to(tl.float32)[:, None]
    if M > 1:
        totals = sums
    else:
        totals = tl.sum(sums, 0)[None, :]
    rows = row * R + r
    if HAS_BIAS:
        totals += tl.load(bias + rows, mask=r < R, other=0.0).to(tl.float32)[None, :]
    place = (tl.program_id(1) * tokens + token)[:, None] * out_features + rows[None, :]
    limit = tl.where(token < tokens, R, 0)
    tl.store(out + place, totals.to(out.dtype.element_ty), mask=r[None, :] < limit[:, None])


def bsr(x: Tensor, packed: BSR, bias: Tensor | None) -> Tensor:
    """x [tokens, in] @ W.T + bias -> [tokens, out]."""
    tokens, out_features, (r, c) = x.shape[0], packed.shape[0], packed.block
    units = tokens > 1
    large = r * c * x.element_size() >= LARGE
    limit = LEAST if large and x.element_size() == 4 else TOKENS
    m = min(limit, max(LEAST, triton.next_power_of_2(tokens))) if units else 1
    side_r, side_c = (max(triton.next_power_of_2(n), LEAST if units else 1) for n in (r, c))
    choices: Sequence[Config] = LARGE_PRODUCT if large else PRODUCT
    if units:
        most = 2 if x.element_size() == 4 else 3 if large else 4
        choices = fitting(MATRIX[:most], (m + side_r) * side_c * x.element_size(), x.device)
    config = pick(f"bsr{r}x{c} {m}{' large' if large else ''}", choices)
    programs, turns = out_features // r, triton.cdiv(packed.col_idx.numel(), out_features // r)
    tiles = triton.cdiv(tokens, m)
    partial = Partial.of(x, out_features, bias, splits(x.device, programs * tiles, turns))
    Launch(
        bsr_kernel,
        (programs, partial.splits, tiles),
        {**packed.tensors(), **partial.arguments()},
        {
            "R": r,
            "C": c,
            "LANE": packed.values.shape[3],
            "SIDE_R": side_r,
            "SIDE_C": side_c,
            "SHORT": packed.col_idx.element_size() == 2,
            **partial.constants(),
            "M": m,
            "WIDE": interpreted(),
        },
        config,
        r * c,
        choices,
    ).run()
    return partial.result()
