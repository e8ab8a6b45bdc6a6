"""Bitmaps on a GPU: tiles of 16 rows of W are decoded on the fly, for gathers of single rows of x or for the matrix units.

Where a weight's value lies is known from the number of set bits before it: of the panel's earlier columns by a running sum, of the
column's earlier rows by a count of bits. A program that starts in the middle of a panel first counts the bits before it, a
sixteenth of a bit of reading per weight.
"""

from __future__ import annotations

import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from sparsec.formats.bitmap import Bitmap
from sparsec.formats.panels import LANES
from sparsec.kernels.gpu.launch import MANY, Config, Launch, interpreted, pick, rows_at_once, splits
from sparsec.kernels.gpu.sums import Partial, multiply

PRODUCT = (
    Config({"TILE": 256}),
    Config({"TILE": 128}, warps=2),
    Config({"TILE": 512}),
    Config({"TILE": 512}, warps=8),
)
"""For one or two rows of x."""
SEVERAL = (*PRODUCT[:2], Config({"TILE": 128}), PRODUCT[3])
MATRIX = (
    Config({"TILE": 64}, stages=1),
    Config({"TILE": 32}, stages=1),
    Config({"TILE": 128}, warps=8, stages=1),
    Config({"TILE": 32}, warps=2, stages=1),
)
EXPAND = Config({"TILE": 256})
LEAST = 16
"""Rows of what the matrix units multiply."""
UNITS = 8
"""Rows of x from which on the matrix units multiply."""


@triton.jit
def count_bits(v):
    """Set bits of an int32 that is not negative; the compiler makes one instruction of it."""
    v = v - ((v >> 1) & 0x55555555)
    v = (v & 0x33333333) + ((v >> 2) & 0x33333333)
    v = (v + (v >> 4)) & 0x0F0F0F0F
    return (v * 0x01010101) >> 24


@triton.jit
def decode(values, words, start):
    """Weights [TILE, 16] of the columns whose 16 bits are `words` [TILE] (int32), and where the next column's values start."""
    lanes = tl.arange(0, 16)
    counts = count_bits(words)
    first = start + tl.cumsum(counts, 0) - counts
    below = count_bits(words[:, None] & ((1 << lanes) - 1)[None, :])
    kept = (words[:, None] >> lanes[None, :]) & 1
    return tl.load(values + first[:, None] + below, mask=kept != 0, other=0.0), start + tl.sum(counts, 0)


@triton.jit
def words_at(bits, panel, columns, in_features):
    """The 16 bits of a panel's columns, as int32; 0 past the last one."""
    words = tl.load(bits + panel * in_features + columns, mask=columns < in_features, other=0)
    return words.to(tl.int32) & 0xFFFF


@triton.jit
def bitmap_kernel(
    x, values, bits, panel_ptr, bias, out, out_features, in_features, tokens, span,
    SPLITS: tl.constexpr, HAS_BIAS: tl.constexpr, M: tl.constexpr, UNITS: tl.constexpr, WIDE: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    panel = tl.program_id(0)
    rows = panel * 16 + tl.arange(0, 16)
    token = tl.program_id(2) * M
    start = tl.load(panel_ptr + panel)
    low = tl.program_id(1) * span
    if SPLITS > 1:
        before = tl.zeros([TILE], tl.int32)
        for k in range(0, low, TILE):
            before += count_bits(words_at(bits, panel, k + tl.arange(0, TILE), in_features))
        start += tl.sum(before, 0)
    if UNITS:
        tokens_here = token + tl.arange(0, M)
        sums = tl.zeros([M, 16], tl.float32)
        for k in range(low, tl.minimum(low + span, in_features), TILE):
            columns = k + tl.arange(0, TILE)
            w, start = decode(values, words_at(bits, panel, columns, in_features), start)
            # Past the last row of x the last one is read again, and nothing is stored.
            at = tl.minimum(tokens_here, tokens - 1)[:, None] * in_features + columns[None, :]
            xs = tl.load(x + at, mask=(columns < in_features)[None, :], other=0.0)
            sums = multiply(xs, w, sums, WIDE)
        if HAS_BIAS:
            sums += tl.load(bias + rows, mask=rows < out_features, other=0.0).to(tl.float32)[None, :]
        place = (tl.program_id(1) * tokens + tokens_here)[:, None] * out_features + rows[None, :]
        limit = tl.where(tokens_here < tokens, out_features, 0)
        tl.store(out + place, sums.to(out.dtype.element_ty), mask=rows[None, :] < limit[:, None])
    else:
        totals = (tl.zeros([TILE, 16], tl.float32),) * M
        for k in range(low, tl.minimum(low + span, in_features), TILE):
            columns = k + tl.arange(0, TILE)
            w, start = decode(values, words_at(bits, panel, columns, in_features), start)
            added = ()
            for m in tl.static_range(M):
                at = tl.minimum(token + m, tokens - 1) * in_features + columns
                xs = tl.load(x + at, mask=columns < in_features, other=0.0)
                added = added + (totals[m] + w.to(tl.float32) * xs.to(tl.float32)[:, None],)
            totals = added
        for m in tl.static_range(M):
            total = tl.sum(totals[m], 0)
            if HAS_BIAS:
                total += tl.load(bias + rows, mask=rows < out_features, other=0.0).to(tl.float32)
            place = (tl.program_id(1) * tokens + token + m) * out_features + rows
            limit = tl.where(token + m < tokens, out_features, 0)
            tl.store(out + place, total.to(out.dtype.element_ty), mask=rows < limit)


@triton.jit
def bitmap_expand_kernel(values, bits, panel_ptr, dense, out_features, in_features, TILE: tl.constexpr):
    panel = tl.program_id(0)
    rows = panel * 16 + tl.arange(0, 16)
    start = tl.load(panel_ptr + panel)
    for k in range(0, in_features, TILE):
        columns = k + tl.arange(0, TILE)
        w, start = decode(values, words_at(bits, panel, columns, in_features), start)
        limit = tl.where(rows < out_features, in_features, 0)
        tl.store(
            dense + rows[None, :].to(tl.int64) * in_features + columns[:, None],
            w,
            mask=columns[:, None] < limit[None, :],
        )


def bitmap(x: Tensor, packed: Bitmap, bias: Tensor | None) -> Tensor:
    """x [tokens, in] @ W.T + bias -> [tokens, out]."""
    if x.shape[0] > MANY:
        return F.linear(x, expand(packed), bias)
    (tokens, in_features), out_features = x.shape, packed.shape[0]
    units = tokens >= UNITS
    m = max(LEAST, triton.next_power_of_2(tokens)) if units else rows_at_once(tokens)
    choices = MATRIX if units else PRODUCT if m <= 2 else SEVERAL
    config = pick(f"bitmap {m}", choices)
    tile = config.constants["TILE"]
    panels, turns = triton.cdiv(out_features, LANES), triton.cdiv(in_features, tile)
    partial = Partial.of(x, out_features, bias, splits(x.device, panels, turns))
    Launch(
        bitmap_kernel,
        (panels, partial.splits, triton.cdiv(tokens, m)),
        {**packed.tensors(), **partial.arguments(), "span": triton.cdiv(turns, partial.splits) * tile},
        {**partial.constants(), "M": m, "UNITS": units, "WIDE": interpreted()},
        config,
        LANES * tile,
        choices,
    ).run()
    return partial.result()


def expand(packed: Bitmap) -> Tensor:
    """The dense matrix [out, in]."""
    out_features, in_features = packed.shape
    dense = packed.values.new_empty(out_features, in_features)
    Launch(
        bitmap_expand_kernel,
        (triton.cdiv(out_features, LANES),),
        {**packed.tensors(), "dense": dense, "out_features": out_features, "in_features": in_features},
        {},
        EXPAND,
        elements=LANES * EXPAND.constants["TILE"],
    ).run()
    return dense
