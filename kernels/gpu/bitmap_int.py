"""Bitmaps of quantised values on a GPU: tiles of 16 rows of W are decoded on the fly, as those of plain values are (bitmap.py).

A lane holds four columns, so that a step's word has 64 bits: its halves, of eight rows each, share what is read of x. Of 8 bits a
code lies where as many bits before it say; of 4 bits the codes of a lane lie in two or three bytes, and name numbers of a table.
Scales of a whole row multiply the sums, those of groups the weights.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from sparsec.formats.code_bytes import LANE
from sparsec.formats.panels import LANES
from sparsec.formats.quantised import Quantised
from sparsec.kernels.gpu.bitmap import EXPAND, LEAST, PRODUCT, SEVERAL, UNITS, count_bits
from sparsec.kernels.gpu.launch import MANY, Config, Launch, interpreted, pick, rows_at_once, splits
from sparsec.kernels.gpu.sums import Partial, multiply
from sparsec.kernels.gpu.wcsr import weights_at

MATRIX = (
    Config({"TILE": 64}, stages=1),
    Config({"TILE": 32}, stages=1),
    Config({"TILE": 64}, warps=8, stages=1),
    Config({"TILE": 64}, warps=2, stages=1),
)


@triton.jit
def halves_at(bits, panel, steps, step_count):
    """The lower and the upper half of a panel's words, as uint32; 0 past the last one."""
    words = tl.load(bits + panel * step_count + steps, mask=steps < step_count, other=0)
    return words.to(tl.uint32), (words >> 32).to(tl.uint32)


@triton.jit
def code_bytes(low, high, BITS: tl.constexpr):
    """Bytes of the codes of each step, and how many codes its lower half has."""
    below = count_bits(low)
    counts = below + count_bits(high)
    if BITS == 4:
        counts = (counts + 1) >> 1
    return counts, below


@triton.jit
def level(code):
    """What a code counts in steps of its scale, as fp32: behind 2 ** 23 it is the last bits of a number."""
    return (code.to(tl.int32) | 0x4B000000).to(tl.float32, bitcast=True) - 8388736.0


@triton.jit
def scale_at(scale, place):
    """A scale, or a middle, as fp32."""
    return (tl.load(scale + place).to(tl.int32) << 16).to(tl.float32, bitcast=True)


@triton.jit
def decode_half(
    values, scale, table, half, begin, skipped, place, BITS: tl.constexpr, GROUP: tl.constexpr, MIDDLE: tl.constexpr
):
    """For each column of a lane the weights [steps, 8] of half a panel, fp32; in steps of its scale where that is of a whole row.

    half: its bits; begin: where the codes of each step lie; skipped: codes of a step that come before; place: of scales.
    """
    rest = half[:, None] >> (tl.arange(0, 8) * 4).to(tl.uint32)[None, :]
    at = (skipped + count_bits(half))[:, None] - count_bits(rest)
    if BITS == 4:
        byte = values + (begin[:, None] + (at >> 1))
        # What lies past a lane's own codes is not looked at, and 64 zeros lie past the last one.
        word = tl.load(byte).to(tl.int32) | tl.load(byte + 1).to(tl.int32) << 8 | tl.load(byte + 2).to(tl.int32) << 16
        word = word >> (at & 1) * 4
    else:
        at += begin[:, None]
    if GROUP:
        factor = scale_at(scale, place)
        if MIDDLE:
            middle = scale_at(scale, place + 16)
    found = ()
    for c in tl.static_range(4):
        kept = (rest >> c) & 1
        if BITS == 4:
            code = tl.load(table + (word & 15), mask=kept != 0, other=128)
            word = word >> (kept << 2).to(tl.int32)
        else:
            code = tl.load(values + at, mask=kept != 0, other=128)
            at += kept.to(tl.int32)
        w = level(code)
        if GROUP:
            w = w * factor
            if MIDDLE:
                w = tl.where(kept != 0, w + middle, 0.0)
        found = found + (w,)
    return found


@triton.jit
def decode_codes(
    values, scale, table, bits, panel, k, step_count, groups, start,
    BITS: tl.constexpr, GROUP: tl.constexpr, MIDDLE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """The weights of both halves, TILE columns from k on, and where the codes of the next ones start."""
    steps = k // 4 + tl.arange(0, TILE // 4)
    low, high = halves_at(bits, panel, steps, step_count)
    lengths, below = code_bytes(low, high, BITS)
    begin = start + tl.cumsum(lengths, 0) - lengths
    row = tl.arange(0, 8)[None, :]
    place = row
    if GROUP:
        if GROUP % TILE == 0:
            place = (panel * groups + k // GROUP) * (16 * (1 + MIDDLE)) + row
        else:
            # Past the last column the scales of the last group are read again.
            group = tl.minimum(steps * 4 // GROUP, groups - 1)
            place = ((panel * groups + group) * (16 * (1 + MIDDLE)))[:, None] + row
    first = decode_half(values, scale, table, low, begin, below * 0, place, BITS, GROUP, MIDDLE)
    second = decode_half(values, scale, table, high, begin, below, place + 8, BITS, GROUP, MIDDLE)
    return first, second, start + tl.sum(lengths, 0)


@triton.jit
def in_type(w, TYPE: tl.constexpr):
    """A weight as a number of x's type; the largest where the nearest one is inf."""
    if tl.float16 == TYPE:
        w = tl.minimum(tl.maximum(w, -65504.0), 65504.0)
    return w.to(TYPE)


@triton.jit
def all_columns(first, second, TYPE: tl.constexpr):
    """The weights [columns, 16] of steps, in x's type."""
    a = tl.join(tl.join(first[0], first[2]), tl.join(first[1], first[3]))
    b = tl.join(tl.join(second[0], second[2]), tl.join(second[1], second[3]))
    w = tl.permute(in_type(tl.join(a, b), TYPE), (0, 2, 3, 4, 1))
    return tl.reshape(w, [4 * w.shape[0], 16])


@triton.jit
def four_of(x, steps, in_features, WORDS: tl.constexpr, ASM: tl.constexpr):
    """Four numbers of a row of x for each step, as fp32; 0 past the last one."""
    if WORDS:
        a, b, c, d = weights_at(x, steps, steps * 4 < in_features, ASM)
        return a, b, c, d
    else:
        found = ()
        for c in tl.static_range(4):
            columns = steps * 4 + c
            found = found + (tl.load(x + columns, mask=columns < in_features, other=0.0).to(tl.float32),)
        return found


@triton.jit
def bitmap_int_kernel(
    x, values, scale, table, bits, panel_ptr, bias, out, out_features, in_features, tokens, groups, span,
    BITS: tl.constexpr, GROUP: tl.constexpr, MIDDLE: tl.constexpr, SPLITS: tl.constexpr, HAS_BIAS: tl.constexpr,
    M: tl.constexpr, UNITS: tl.constexpr, WORDS: tl.constexpr, ASM: tl.constexpr, WIDE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    STEPS: tl.constexpr = TILE // 4
    panel = tl.program_id(0)
    token = tl.program_id(2) * M
    start = tl.load(panel_ptr + panel)
    step_count = tl.cdiv(in_features, 4)
    low = tl.program_id(1) * span
    if SPLITS > 1:
        before = tl.zeros([STEPS], tl.int32)
        for k in range(0, low // 4, STEPS):
            lower, upper = halves_at(bits, panel, k + tl.arange(0, STEPS), step_count)
            lengths, _ = code_bytes(lower, upper, BITS)
            before += lengths
        start += tl.sum(before, 0)
    if UNITS:
        # Numbers of a group that a whole tile belongs to are multiplied as they are, and what comes out by their scale.
        LATER: tl.constexpr = GROUP > 0 and GROUP % TILE == 0 and not MIDDLE
        rows = panel * 16 + tl.arange(0, 16)
        tokens_here = token + tl.arange(0, M)
        sums = tl.zeros([M, 16], tl.float32)
        for k in range(low, tl.minimum(low + span, in_features), TILE):
            columns = k + tl.arange(0, TILE)
            first, second, start = decode_codes(
                values,
                scale,
                table,
                bits,
                panel,
                k,
                step_count,
                groups,
                start,
                BITS,
                0 if LATER else GROUP,
                MIDDLE,
                TILE,
            )
            # Past the last row of x the last one is read again, and nothing is stored.
            at = tl.minimum(tokens_here, tokens - 1)[:, None] * in_features + columns[None, :]
            xs = tl.load(x + at, mask=(columns < in_features)[None, :], other=0.0)
            # The interpreter cuts off what it should round.
            w = all_columns(first, second, tl.float32 if WIDE else x.dtype.element_ty)
            if LATER:
                own = multiply(xs, w, tl.zeros([M, 16], tl.float32), WIDE)
                sums += own * scale_at(scale, (panel * groups + k // GROUP) * 16 + tl.arange(0, 16))[None, :]
            else:
                sums = multiply(xs, w, sums, WIDE)
        if GROUP == 0:
            sums *= scale_at(scale, rows)[None, :]
        if HAS_BIAS:
            sums += tl.load(bias + rows, mask=rows < out_features, other=0.0).to(tl.float32)[None, :]
        place = (tl.program_id(1) * tokens + tokens_here)[:, None] * out_features + rows[None, :]
        limit = tl.where(tokens_here < tokens, out_features, 0)
        tl.store(out + place, sums.to(out.dtype.element_ty), mask=rows[None, :] < limit[:, None])
    else:
        totals = (tl.zeros([STEPS, 8], tl.float32),) * (2 * M)
        for k in range(low, tl.minimum(low + span, in_features), TILE):
            steps = k // 4 + tl.arange(0, STEPS)
            first, second, start = decode_codes(
                values, scale, table, bits, panel, k, step_count, groups, start, BITS, GROUP, MIDDLE, TILE
            )
            added = ()
            for m in tl.static_range(M):
                xs = four_of(x + tl.minimum(token + m, tokens - 1) * in_features, steps, in_features, WORDS, ASM)
                one, other = totals[2 * m], totals[2 * m + 1]
                for c in tl.static_range(4):
                    one += first[c] * xs[c][:, None]
                    other += second[c] * xs[c][:, None]
                added = added + (one, other)
            totals = added
        for m in tl.static_range(M):
            for h in tl.static_range(2):
                rows = panel * 16 + h * 8 + tl.arange(0, 8)
                total = tl.sum(totals[2 * m + h], 0)
                if GROUP == 0:
                    total *= scale_at(scale, rows)
                if HAS_BIAS:
                    total += tl.load(bias + rows, mask=rows < out_features, other=0.0).to(tl.float32)
                place = (tl.program_id(1) * tokens + token + m) * out_features + rows
                limit = tl.where(token + m < tokens, out_features, 0)
                tl.store(out + place, total.to(out.dtype.element_ty), mask=rows < limit)


@triton.jit
def bitmap_int_expand_kernel(
    values, scale, table, bits, panel_ptr, dense, out_features, in_features, groups,
    BITS: tl.constexpr, GROUP: tl.constexpr, MIDDLE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    STEPS: tl.constexpr = TILE // 4
    panel = tl.program_id(0)
    start = tl.load(panel_ptr + panel)
    step_count = tl.cdiv(in_features, 4)
    for k in range(0, in_features, TILE):
        steps = k // 4 + tl.arange(0, STEPS)
        halves = decode_codes(
            values, scale, table, bits, panel, k, step_count, groups, start, BITS, GROUP, MIDDLE, TILE
        )
        start = halves[2]
        for h in tl.static_range(2):
            rows = panel * 16 + h * 8 + tl.arange(0, 8)
            limit = tl.where(rows < out_features, in_features, 0)
            to = dense + rows.to(tl.int64)[None, :] * in_features
            for c in tl.static_range(4):
                w = halves[h][c]
                if GROUP == 0:
                    w *= scale_at(scale, rows)[None, :]
                columns = (steps * 4 + c)[:, None]
                tl.store(to + columns, in_type(w, dense.dtype.element_ty), mask=columns < limit[None, :])


def bitmap_int(x: Tensor, packed: Quantised, bias: Tensor | None) -> Tensor:
    """x [tokens, in] @ W.T + bias -> [tokens, out]."""
    if x.shape[0] > MANY:
        return F.linear(x, expand(packed), bias)
    (tokens, in_features), out_features = x.shape, packed.shape[0]
    units = tokens >= UNITS
    m = max(LEAST, triton.next_power_of_2(tokens)) if units else rows_at_once(tokens)
    choices = MATRIX if units else PRODUCT if m <= 2 else SEVERAL
    config = pick(f"bitmap:{packed.codec.name} {m}", choices)
    tile = config.constants["TILE"]
    panels, turns = triton.cdiv(out_features, LANES), triton.cdiv(in_features, tile)
    partial = Partial.of(x, out_features, bias, splits(x.device, panels, turns))
    words = in_features % LANE == 0 and x.data_ptr() % 8 == 0
    way = {"M": m, "UNITS": units, "WORDS": words and not units, "ASM": not interpreted(), "WIDE": interpreted()}
    Launch(
        bitmap_int_kernel,
        (panels, partial.splits, triton.cdiv(tokens, m)),
        {**_arguments(packed), **partial.arguments(), "span": triton.cdiv(turns, partial.splits) * tile},
        {**_constants(packed), **partial.constants(), **way},
        config,
        LANES * tile,
        choices,
    ).run()
    return partial.result()


def expand(packed: Quantised) -> Tensor:
    """The dense matrix [out, in] in the dtype of x."""
    out_features, in_features = packed.shape
    dense = torch.empty(out_features, in_features, dtype=packed.dtype, device=packed.values.device)
    Launch(
        bitmap_int_expand_kernel,
        (triton.cdiv(out_features, LANES),),
        {**_arguments(packed), "dense": dense, "out_features": out_features, "in_features": in_features},
        _constants(packed),
        EXPAND,
        elements=LANES * EXPAND.constants["TILE"],
    ).run()
    return dense


def _arguments(packed: Quantised) -> dict[str, Tensor | int]:
    """What every kernel takes of a packed matrix."""
    tensors = packed.tensors()
    table = packed.table if packed.table.numel() else packed.values  # without one nothing is read of it
    names = ("values", "scale", "bits", "panel_ptr")
    return {**{name: tensors[name] for name in names}, "table": table, "groups": packed.scale.shape[1]}


def _constants(packed: Quantised) -> dict[str, Any]:
    codec = packed.codec
    return {"BITS": codec.bits, "GROUP": codec.group, "MIDDLE": codec.middle}
