"""Warp CSR on a GPU: few rows of x by gathers, many through an expanded matrix and torch's dense product.

A program takes one row of W, its warps side by side. A row's weights are read four at a time, in words that hold several values
or columns: two columns of 8 bits meet their bases in one addition, and taking a word apart costs an instruction a weight. Turns
that are full need no masks, so that only a row's last one has them. Tiles have one dimension: with rows as a second one, some
releases of Triton move every tile through shared memory.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from sparsec.formats.wcsr import WarpCSR
from sparsec.kernels.gpu.launch import FEW, Config, Launch, interpreted
from sparsec.kernels.gpu.sums import row_by_row, store_row

EXPAND = Config({"TILE": 1024}, warps=2)


@triton.jit
def load_live(at, live):
    """What lies at [...]; 0 where it is not live. None: all is."""
    if live is None:
        return tl.load(at)
    else:
        return tl.load(at, mask=live, other=0)


@triton.jit
def words_at(pointer, at, live, ASM: tl.constexpr):
    """The lower and the upper half of the 64-bit words at [...], as uint32. pointer: to anything, aligned to 8 bytes."""
    word = load_live(pointer.to(tl.pointer_type(tl.int64)) + at, live)
    if ASM:  # or else shifting the lower half would be shifting all 64 bits
        return tl.inline_asm_elementwise(
            "mov.b64 {$0, $1}, $2;", "=r,=r,l", [word], dtype=(tl.uint32, tl.uint32), is_pure=True, pack=1
        )
    else:
        return word.to(tl.uint32), (word >> 32).to(tl.uint32)


@triton.jit
def bytes_of(word, ASM: tl.constexpr):
    """The four bytes of an uint32 in 16 bits each: the lower two in one uint32, the upper two in another."""
    if ASM:  # or else a weight takes one instruction more
        return tl.inline_asm_elementwise(
            "prmt.b32 $0, $2, 0, 0x4140; prmt.b32 $1, $2, 0, 0x4342;",
            "=&r,=r,r",
            [word],
            dtype=(tl.uint32, tl.uint32),
            is_pure=True,
            pack=1,
        )
    else:
        return (word & 0xFF) | (word & 0xFF00) << 8, (word >> 16 & 0xFF) | (word >> 8 & 0xFF0000)


@triton.jit
def halves(word, TYPE: tl.constexpr, ASM: tl.constexpr):
    """The two 16-bit floating-point numbers of an uint32, the lower one first, as fp32."""
    if tl.bfloat16 == TYPE:
        return (word << 16).to(tl.float32, bitcast=True), (word & 0xFFFF0000).to(tl.float32, bitcast=True)
    elif ASM:  # or else the upper one is shifted down first
        return tl.inline_asm_elementwise(
            "{.reg .b16 l, h; mov.b32 {l, h}, $2; cvt.f32.f16 $0, l; cvt.f32.f16 $1, h;}",
            "=&f,=f,r",
            [word],
            dtype=(tl.float32, tl.float32),
            is_pure=True,
            pack=1,
        )
    else:
        low = word.to(tl.uint16).to(TYPE, bitcast=True)
        return low.to(tl.float32), (word >> 16).to(tl.uint16).to(TYPE, bitcast=True).to(tl.float32)


@triton.jit
def weights_at(values, quad, live, ASM: tl.constexpr):
    """Four weights that follow each other, as fp32. quad: a quarter of the first one's place, at [...]."""
    if values.dtype.element_ty == tl.float32:
        a, b = words_at(values, 2 * quad, live, ASM)
        c, d = words_at(values, 2 * quad + 1, live, ASM)
        a, b = a.to(tl.float32, bitcast=True), b.to(tl.float32, bitcast=True)
        return a, b, c.to(tl.float32, bitcast=True), d.to(tl.float32, bitcast=True)
    else:
        low, high = words_at(values, quad, live, ASM)
        a, b = halves(low, values.dtype.element_ty, ASM)
        c, d = halves(high, values.dtype.element_ty, ASM)
        return a, b, c, d


@triton.jit
def columns_at(col_idx, base, row, begin, quad, live, WIDTH: tl.constexpr, ASM: tl.constexpr):
    """Columns of four weights that follow each other, as uint32. begin: where their row starts; quad: as above, from there."""
    if WIDTH == 8:
        word = load_live((col_idx + begin).to(tl.pointer_type(tl.int32)) + quad, live)
        low, high = bytes_of(word.to(tl.uint32, bitcast=True), ASM)
        base_low, base_high = words_at(base, (begin // 256 + row + quad // 64) * 2 + quad % 2, live, ASM)
        # No sum reaches 2 ** 16, so that nothing is carried from one column into the other.
        low += base_low
        high += base_high
    else:
        low, high = words_at(col_idx + begin, quad, live, ASM)
    return low & 0xFFFF, low >> 16, high & 0xFFFF, high >> 16


@triton.jit
def turn(
    sums, x, values, col_idx, base, row, begin, start, live_quads, token, tokens, in_features,
    WIDTH: tl.constexpr, M: tl.constexpr, ASM: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """A tile of sums for each row of x, with the products of TILE stored weights added. live_quads: None, or where the row ends."""
    quad = start // 4 + tl.arange(0, TILE // 4)
    live = None if live_quads is None else quad < live_quads
    v0, v1, v2, v3 = weights_at(values + begin, quad, live, ASM)
    c0, c1, c2, c3 = columns_at(col_idx, base, row, begin, quad, live, WIDTH, ASM)
    added = ()
    for m in tl.static_range(M):
        # Past the last row of x the last one is read again, and nothing is stored.
        xs = x + tl.minimum(token + m, tokens - 1) * in_features
        total = sums[m] + v0 * tl.load(xs + c0).to(tl.float32)
        total += v1 * tl.load(xs + c1).to(tl.float32)
        total += v2 * tl.load(xs + c2).to(tl.float32)
        total += v3 * tl.load(xs + c3).to(tl.float32)
        added = added + (total,)
    return added


@triton.jit
def wcsr_kernel(
    x, values, col_idx, base, row_ptr, bias, out, out_features, in_features, tokens,
    WIDTH: tl.constexpr, ASM: tl.constexpr, SPLITS: tl.constexpr, HAS_BIAS: tl.constexpr, M: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    row, token = tl.program_id(0), tl.program_id(2) * M
    begin = tl.multiple_of(tl.load(row_ptr + row), 8)
    count = tl.multiple_of(tl.load(row_ptr + row + 1) - begin, 8)
    full = count // TILE * TILE
    sums = (tl.zeros([TILE // 4], tl.float32),) * M
    for start in range(tl.program_id(1) * TILE, full, SPLITS * TILE):
        sums = turn(
            sums, x, values, col_idx, base, row, begin, start, None, token, tokens, in_features, WIDTH, M, ASM, TILE
        )
    if full < count and full // TILE % SPLITS == tl.program_id(1):
        sums = turn(
            sums, x, values, col_idx, base, row, begin, full, count // 4, token, tokens, in_features, WIDTH, M, ASM, TILE
        )  # fmt: skip
    store_row(sums, bias, out, row, token, tokens, out_features, HAS_BIAS, M)


@triton.jit
def wcsr_expand_kernel(
    values, col_idx, base, row_ptr, dense, in_features, WIDTH: tl.constexpr, ASM: tl.constexpr, TILE: tl.constexpr
):
    row = tl.program_id(0)
    begin = tl.multiple_of(tl.load(row_ptr + row), 8)
    count = tl.multiple_of(tl.load(row_ptr + row + 1) - begin, 8)
    to = dense + row.to(tl.int64) * in_features
    for start in range(0, count, TILE):
        quad = start // 4 + tl.arange(0, TILE // 4)
        live = quad < count // 4
        v0, v1, v2, v3 = weights_at(values + begin, quad, live, ASM)
        c0, c1, c2, c3 = columns_at(col_idx, base, row, begin, quad, live, WIDTH, ASM)
        # Zeros are there already; and padding, which is zero, has no column of its own.
        tl.store(to + c0, v0.to(dense.dtype.element_ty), mask=live & (v0 != 0))
        tl.store(to + c1, v1.to(dense.dtype.element_ty), mask=live & (v1 != 0))
        tl.store(to + c2, v2.to(dense.dtype.element_ty), mask=live & (v2 != 0))
        tl.store(to + c3, v3.to(dense.dtype.element_ty), mask=live & (v3 != 0))


def wcsr(x: Tensor, packed: WarpCSR, bias: Tensor | None) -> Tensor:
    """x [tokens, in] @ W.T + bias -> [tokens, out]."""
    if x.shape[0] > FEW:
        return F.linear(x, expand(packed), bias)
    return row_by_row(wcsr_kernel, x, packed, bias, _constants(packed))


def expand(packed: WarpCSR) -> Tensor:
    """The dense matrix [out, in]; a kept zero comes back as +0.0."""
    dense = packed.values.new_zeros(packed.shape)
    Launch(
        wcsr_expand_kernel,
        (packed.shape[0],),
        {**packed.tensors(), "dense": dense, "in_features": packed.in_features},
        _constants(packed),
        EXPAND,
        elements=EXPAND.constants["TILE"],
    ).run()
    return dense


def _constants(packed: WarpCSR) -> dict[str, Any]:
    # The interpreter knows no assembly.
    return {"WIDTH": packed.index_bits, "ASM": not interpreted()}
