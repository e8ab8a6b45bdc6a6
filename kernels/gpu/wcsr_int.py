"""Warp CSR of quantised values on a GPU: as plain ones (wcsr.py), but that four weights lie in a word of 32 or 16 bits.

Codes of 4 bits name numbers of a table. Scales of a whole row multiply the sum, those of groups the weights. What pads a row has
the code of 0.0.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from sparsec.formats.quantised import Quantised
from sparsec.kernels.gpu.bitmap_int import in_type, level, scale_at
from sparsec.kernels.gpu.launch import FEW, Launch, interpreted
from sparsec.kernels.gpu.sums import row_by_row, store_row
from sparsec.kernels.gpu.wcsr import EXPAND, columns_at, load_live


@triton.jit
def levels_at(values, table, begin, quad, live, BITS: tl.constexpr):
    """Four weights that follow each other in steps of their scale, fp32. begin: where their row starts; quad: a quarter of the
    first one's place from there."""
    found = ()
    if BITS == 4:
        word = load_live((values + begin // 2).to(tl.pointer_type(tl.int16)) + quad, live).to(tl.int32)
        for i in tl.static_range(4):
            found = found + (level(tl.load(table + (word >> 4 * i & 15))),)
    else:
        word = load_live((values + begin).to(tl.pointer_type(tl.int32)) + quad, live)
        for i in tl.static_range(4):
            found = found + (level(word >> 8 * i & 255),)
    return found


@triton.jit
def decoded(
    values, table, scale, col_idx, base, row, begin, quad, live, groups,
    BITS: tl.constexpr, GROUP: tl.constexpr, WIDTH: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Four weights that follow each other, 0 where they are not live, and their columns. Without groups: in steps of the row's
    scale."""
    columns = columns_at(col_idx, base, row, begin, quad, live, WIDTH, ASM)
    levels = levels_at(values, table, begin, quad, live, BITS)
    found = ()
    for i in tl.static_range(4):
        w = levels[i]
        if GROUP:
            w = w * scale_at(scale, (row // 16 * groups + (columns[i] // GROUP).to(tl.int32)) * 16 + row % 16)
        if live is not None:
            w = tl.where(live, w, 0.0)
        found = found + (w,)
    return found, columns


@triton.jit
def coded_turn(
    sums, x, values, table, scale, col_idx, base, row, begin, start, live_quads, token, tokens, in_features, groups,
    BITS: tl.constexpr, GROUP: tl.constexpr, WIDTH: tl.constexpr, M: tl.constexpr, ASM: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """A tile of sums for each row of x, with the products of TILE stored weights added. live_quads: None, or where the row ends."""
    quad = start // 4 + tl.arange(0, TILE // 4)
    live = None if live_quads is None else quad < live_quads
    w, c = decoded(values, table, scale, col_idx, base, row, begin, quad, live, groups, BITS, GROUP, WIDTH, ASM)
    added = ()
    for m in tl.static_range(M):
        # Past the last row of x the last one is read again, and nothing is stored.
        xs = x + tl.minimum(token + m, tokens - 1) * in_features
        total = sums[m]
        for i in tl.static_range(4):
            total += w[i] * tl.load(xs + c[i]).to(tl.float32)
        added = added + (total,)
    return added


@triton.jit
def wcsr_int_kernel(
    x, values, scale, table, col_idx, base, row_ptr, bias, out, out_features, in_features, tokens, groups,
    BITS: tl.constexpr, GROUP: tl.constexpr, WIDTH: tl.constexpr, ASM: tl.constexpr, SPLITS: tl.constexpr,
    HAS_BIAS: tl.constexpr, M: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    row, token = tl.program_id(0), tl.program_id(2) * M
    begin = tl.multiple_of(tl.load(row_ptr + row), 8)
    count = tl.multiple_of(tl.load(row_ptr + row + 1) - begin, 8)
    full = count // TILE * TILE
    sums = (tl.zeros([TILE // 4], tl.float32),) * M
    for start in range(tl.program_id(1) * TILE, full, SPLITS * TILE):
        sums = coded_turn(
            sums, x, values, table, scale, col_idx, base, row, begin, start, None, token, tokens, in_features, groups,
            BITS, GROUP, WIDTH, M, ASM, TILE,
        )  # fmt: skip
    if full < count and full // TILE % SPLITS == tl.program_id(1):
        sums = coded_turn(
            sums, x, values, table, scale, col_idx, base, row, begin, full, count // 4, token, tokens, in_features, groups,
            BITS, GROUP, WIDTH, M, ASM, TILE,
        )  # fmt: skip
    if GROUP == 0:
        scaled = ()
        for m in tl.static_range(M):
            scaled = scaled + (sums[m] * scale_at(scale, row),)
        sums = scaled
    store_row(sums, bias, out, row, token, tokens, out_features, HAS_BIAS, M)


@triton.jit
def wcsr_int_expand_kernel(
    values, scale, table, col_idx, base, row_ptr, dense, in_features, groups,
    BITS: tl.constexpr, GROUP: tl.constexpr, WIDTH: tl.constexpr, ASM: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    begin = tl.multiple_of(tl.load(row_ptr + row), 8)
    count = tl.multiple_of(tl.load(row_ptr + row + 1) - begin, 8)
    to = dense + row.to(tl.int64) * in_features
    for start in range(0, count, TILE):
        quad = start // 4 + tl.arange(0, TILE // 4)
        live = quad < count // 4
        w, c = decoded(values, table, scale, col_idx, base, row, begin, quad, live, groups, BITS, GROUP, WIDTH, ASM)
        for i in tl.static_range(4):
            v = w[i]
            if GROUP == 0:
                v *= scale_at(scale, row)
            # Zeros are there already; and padding, which is zero, has no column of its own.
            tl.store(to + c[i], in_type(v, dense.dtype.element_ty), mask=live & (v != 0))


def wcsr_int(x: Tensor, packed: Quantised, bias: Tensor | None) -> Tensor:
    """x [tokens, in] @ W.T + bias -> [tokens, out]."""
    if x.shape[0] > FEW:
        return F.linear(x, expand(packed), bias)
    return row_by_row(wcsr_int_kernel, x, packed, bias, _constants(packed), _arguments(packed))


def expand(packed: Quantised) -> Tensor:
    """The dense matrix [out, in] in the dtype of x."""
    dense = packed.like.new_zeros(packed.shape)
    Launch(
        wcsr_int_expand_kernel,
        (packed.shape[0],),
        {**_arguments(packed), "dense": dense, "in_features": packed.shape[1]},
        _constants(packed),
        EXPAND,
        elements=EXPAND.constants["TILE"],
    ).run()
    return dense


def _arguments(packed: Quantised) -> dict[str, Tensor | int]:
    """What both kernels take of a packed matrix."""
    tensors = packed.tensors()
    tensors["table"] = packed.table if packed.table.numel() else packed.values  # without one nothing is read of it
    return {**{name: t for name, t in tensors.items() if name != "like"}, "groups": packed.scale.shape[1]}


def _constants(packed: Quantised) -> dict[str, Any]:
    codec, width = packed.codec, 8 * packed.places["col_idx"].element_size()
    # The interpreter knows no assembly.
    return {"BITS": codec.bits, "GROUP": codec.group, "WIDTH": width, "ASM": not interpreted()}
