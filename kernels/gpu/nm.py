"""N:M on a GPU: few rows of x by gathers within a group, many through an expanded matrix and torch's dense product.

A program takes a panel of 16 rows of W, in tiles of one dimension as the panel lies in memory: step by step, 16 rows in each.
"""

from __future__ import annotations

import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from sparsec.formats.nm import INDEX_BITS, NM
from sparsec.formats.panels import panel_count
from sparsec.kernels.gpu.launch import FEW, Config, Launch, pick, rows_at_once, splits
from sparsec.kernels.gpu.sums import Partial

ONE = (Config({"TILE": 1024}), Config({"TILE": 512}, warps=2), Config({"TILE": 2048}), Config({"TILE": 2048}, warps=8))
"""For one or two rows of x."""
SEVERAL = (
    Config({"TILE": 512}),
    Config({"TILE": 256}, warps=2),
    Config({"TILE": 1024}, warps=8),
    Config({"TILE": 1024}),
)
EXPAND = Config({"TILE": 1024})


@triton.jit
def each(parts, LANE: tl.constexpr):
    """Of every slot of a lane one number for four rows, [TILE / 4 / LANE]: those of every weight, [TILE / 4 / LANE, 4, LANE]."""
    if LANE == 1:
        joined = parts[0][:, None]
    else:
        joined = tl.join(parts[0], parts[1])
    return tl.broadcast_to(joined[:, None, :], [joined.shape[0], 4, LANE])


@triton.jit
def slots_at(
    values, index, panel, start, slots, LANE: tl.constexpr, N: tl.constexpr, GROUP: tl.constexpr, BITS: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """Weights of a panel from `start` on, at [TILE], their columns, and which there are. slots: of a row."""
    i = tl.arange(0, TILE)
    padded = tl.cdiv(slots, LANE) * LANE * 16
    w = tl.load(values + (panel * padded + start) + i, mask=start + i < padded, other=0.0)
    # Step by step, in it row by row, in it slot by slot. What does not depend on `start` is written apart from it: the compiler
    # takes it out of the loop. Four rows at a time: their bits lie in one byte, or in two.
    quad = tl.arange(0, TILE // (4 * LANE))
    bit = quad % 2 * (4 * BITS)
    words, groups, there = (), (), ()
    for c in tl.static_range(LANE):
        slot = quad // 4 * LANE + c
        inside = start // 16 + slot < slots
        byte = index + (panel * slots + start // 16) * (2 * BITS) + ((slot * 2 + quad % 4 // 2) * BITS + bit // 8)
        word = tl.load(byte, mask=inside).to(tl.int32)
        if 8 % BITS != 0:
            word += tl.load(byte + 1, mask=inside).to(tl.int32) << 8
        words = words + (word >> (bit % 8),)
        if TILE // 16 % N == 0:
            groups = groups + (start // 16 // N * GROUP + slot // N * GROUP,)
        else:
            groups = groups + ((start // 16 + slot) // N * GROUP,)
        there = there + (inside.to(tl.int1),)
    shift = (tl.arange(0, 4) * BITS)[None, :, None]
    columns = each(groups, LANE) + ((each(words, LANE) >> shift) & (GROUP - 1))
    return w, tl.reshape(columns, [TILE]), tl.reshape(each(there, LANE), [TILE])


@triton.jit
def nm_kernel(
    x, values, index, bias, out, out_features, in_features, tokens,
    LANE: tl.constexpr, N: tl.constexpr, GROUP: tl.constexpr, BITS: tl.constexpr,
    SPLITS: tl.constexpr, HAS_BIAS: tl.constexpr, M: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    panel, token = tl.program_id(0), tl.program_id(2) * M
    slots = in_features // GROUP * N
    sums = (tl.zeros([TILE], tl.float32),) * M
    for start in range(tl.program_id(1) * TILE, slots * 16, SPLITS * TILE):
        w, columns, there = slots_at(values, index, panel, start, slots, LANE, N, GROUP, BITS, TILE)
        added = ()
        for m in tl.static_range(M):
            # Past the last row of x the last one is read again, and nothing is stored.
            xs = tl.load(x + tl.minimum(token + m, tokens - 1) * in_features + columns, mask=there, other=0.0)
            added = added + (sums[m] + w.to(tl.float32) * xs.to(tl.float32),)
        sums = added
    rows = panel * 16 + tl.arange(0, 16)
    for m in tl.static_range(M):
        total = tl.sum(tl.sum(tl.reshape(sums[m], [TILE // 16 // LANE, 16, LANE]), 2), 0)
        if HAS_BIAS:
            total += tl.load(bias + rows, mask=rows < out_features, other=0.0).to(tl.float32)
        place = (tl.program_id(1) * tokens + token + m) * out_features + rows
        tl.store(out + place, total.to(out.dtype.element_ty), mask=rows < tl.where(token + m < tokens, out_features, 0))


@triton.jit
def nm_expand_kernel(
    values, index, dense, out_features, in_features,
    LANE: tl.constexpr, N: tl.constexpr, GROUP: tl.constexpr, BITS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    panel = tl.program_id(0)
    slots = in_features // GROUP * N
    w, columns, there = slots_at(values, index, panel, tl.program_id(1) * TILE, slots, LANE, N, GROUP, BITS, TILE)
    rows = panel * 16 + tl.arange(0, TILE) // LANE % 16
    tl.store(dense + rows.to(tl.int64) * in_features + columns, w, mask=there & (rows < out_features))


def nm(x: Tensor, packed: NM, bias: Tensor | None) -> Tensor:
    """x [tokens, in] @ W.T + bias -> [tokens, out]."""
    if x.shape[0] > FEW:
        return F.linear(x, expand(packed), bias)
    tokens, out_features = x.shape[0], packed.shape[0]
    m = rows_at_once(tokens)
    choices = ONE if m <= 2 else SEVERAL
    config = pick(f"nm {m}", choices)
    tile, panels = config.constants["TILE"], panel_count(out_features)
    turns = triton.cdiv(packed.values[0].numel(), tile)
    partial = Partial.of(x, out_features, bias, splits(x.device, panels, turns))
    Launch(
        nm_kernel,
        (panels, partial.splits, triton.cdiv(tokens, m)),
        {**packed.tensors(), **partial.arguments()},
        {**_constants(packed), **partial.constants(), "M": m},
        config,
        tile,
        choices,
    ).run()
    return partial.result()


def expand(packed: NM) -> Tensor:
    """The dense matrix [out, in]."""
    (out_features, in_features), tile = packed.shape, EXPAND.constants["TILE"]
    dense = packed.values.new_zeros(out_features, in_features)
    Launch(
        nm_expand_kernel,
        (panel_count(out_features), triton.cdiv(packed.values[0].numel(), tile)),
        {**packed.tensors(), "dense": dense, "out_features": out_features, "in_features": in_features},
        _constants(packed),
        EXPAND,
        elements=tile,
    ).run()
    return dense


def _constants(packed: NM) -> dict[str, int]:
    return {"LANE": packed.values.shape[3], "N": packed.n, "GROUP": packed.m, "BITS": INDEX_BITS[packed.m]}
