"""Value codecs: how stored values stand for weights. A codec knows nothing of positions, a position format nothing of codecs.

Plain values are the weights themselves, of the dtype of x, bias and result (fp32, bf16, fp16, and fp64 for CSR). In a layout's
string a codec follows a colon; plain values are left out.

    int8       8 bits, a scale for every row
    int8g64    8 bits, a scale for every row and group of 64 columns
    int4g64    4 bits, numbers of a table of 16, a scale for every row and group of 64 columns
    int4mg64   the same about a middle of its own for every row and group

Groups are of a multiple of 32 columns; the last one may be shorter. A weight is `scale * (code - 128) + middle`, a code from 1 to
255; 0 stands where nothing is kept. Scales and middles are bf16, rounded before the codes are chosen, so that they cost range and
no accuracy.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sparsec import serial
from sparsec.errors import FormatError, SpecError
from sparsec.formats.panels import LANES, panel_count

ZERO = 128
"""The code of 0.0; also added to a number to make a code of it."""
LARGEST = 127
"""The largest number of a code."""
GROUP_STEP = 32
"""Columns that a group is a multiple of: activations are scaled by as many, or twice as many."""
TABLE = 16
"""Codes that 4 bits choose among."""
SMALLEST = 2.0**-126
"""The smallest scale but 0: those below are numbers that kernels may take for 0."""
LIMIT = 2.0**126
"""The largest weight: twice that, and the error of a rounded scale, still are numbers of fp32."""
_ROUNDS = 64
_STILL = 1 / 64
"""Of one step: what moves less has come to rest."""
_CELLS = 32
"""Of one step, into which the numbers are sorted that a table is fitted to."""
_NAME = re.compile(r"int(?:(8)|(8)g([1-9][0-9]{0,5})|(4)(m?)g([1-9][0-9]{0,5}))")


@dataclass(frozen=True, eq=False)
class Codes:
    """A matrix in codes."""

    codes: Tensor  # [out, in], uint8; 0 where nothing is kept
    scale: Tensor  # [panels, groups, 1 or 2, 16], int16: bits of bf16, of each row its scale, then its middle
    table: Tensor  # [16], uint8: the codes that are used, ascending; [0] where that is any


@dataclass(frozen=True)
class Codec:
    """Turns weights into codes, and back. `Codec.parse` reads its name; that of plain values is empty."""

    bits: int = 0  # 8 or 4; 0: plain values
    group: int = 0  # columns that share a scale; 0: all of a row
    middle: bool = False  # whether a group has one

    @classmethod
    def parse(cls, name: str) -> Codec:
        """From its name in a layout's string. SpecError for others."""
        if not name:
            return PLAIN
        found = _NAME.fullmatch(name)
        if found is None:
            known = ", ".join(map(repr, EXAMPLES))
            raise SpecError(
                f"there are no {name!r} values; known are {known}, and groups of other sizes, as in int4g128; plain values are "
                "left out"
            )
        if found[1]:
            return cls(8)
        bits, group = int(found[2] or found[4]), int(found[3] or found[6])
        if group % GROUP_STEP:
            raise SpecError(
                f"{name}: a group is a multiple of {GROUP_STEP} columns, got {group}; write {name[: name.index('g') + 1]}64"
            )
        return cls(bits, group, bool(found[5]))

    @property
    def name(self) -> str:
        """In a layout's string, after a colon."""
        return f"int{self.bits}{'m' * self.middle}{f'g{self.group}' if self.group else ''}" if self.bits else ""

    def groups(self, in_features: int) -> int:
        """How many a row has."""
        return -(-in_features // self.group) if self.group else 1

    def scale_shape(self, out_features: int, in_features: int) -> tuple[int, int, int, int]:
        """Of the scales of a matrix."""
        return panel_count(out_features), self.groups(in_features), 1 + self.middle, LANES

    def encode(self, weight: Tensor, mask: Tensor, like: Codes | None = None, *, zero: bool = False) -> Codes:
        """The nearest codes of a weight [out, in] where mask [out, in] is True; others do not matter.

        like: scale and table are of these, as where a weight was rounded before. zero: 0.0 has a code,
        whatever that costs. FormatError for a kept weight that is inf, NaN or larger than `LIMIT`.
        """
        wide = serial.masked(weight.detach(), mask).float()
        check_in_reach(wide)
        scale, middle = self.scales(wide, mask) if like is None else self.spread(like.scale, *wide.shape)
        numbers = self._in_steps(wide, scale, middle)
        table = self.even_table(wide.device) if like is None else like.table
        if zero and self.bits == 4 and not bool((table == ZERO).any()):
            table = table.clone()
            table[(table.int() - ZERO).abs().argmin()] = ZERO
        codes = _nearest(numbers, table)
        return Codes(serial.masked(codes, mask, out=codes), self.pack_scales(scale, middle), table)

    def decode(self, codes: Codes) -> Tensor:
        """The weight [out, in], fp32, that codes stand for."""
        return self._decoded(codes.codes, *self.spread(codes.scale, *codes.codes.shape))

    def decode_rows(self, codes: Tensor, scale: Tensor, ids: Tensor) -> Tensor:
        """Rows [n, in], fp32, that codes [n, in] stand for. scale: of the whole matrix, as in Codes. ids [n]: their numbers."""
        both = scale[ids // LANES, :, :, ids % LANES].view(torch.bfloat16).float()
        return self._decoded(codes, both[..., 0], both[..., -1])

    def _decoded(self, codes: Tensor, scale: Tensor, middle: Tensor) -> Tensor:
        """scale and middle [out, groups]."""
        numbers = self._grouped(codes.float().sub_(ZERO)) * scale[..., None]
        if self.middle:
            numbers += middle[..., None]
        return numbers.flatten(1)[:, : codes.shape[1]].masked_fill(codes == 0, 0.0)

    def scales(self, wide: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and middle [out, groups], fp32 numbers that bf16 holds, so that every kept weight is in reach."""
        values = self._grouped(wide)
        middle = values.new_zeros(values.shape[:2])
        if not values.numel():
            return middle, middle
        if not self.middle:
            return rounded_up(values.abs().amax(2) / LARGEST), middle
        dropped = ~self._grouped(mask)
        low = values.masked_fill(dropped, float("inf")).amin(2)
        high = values.masked_fill(dropped, float("-inf")).amax(2)
        middle = ((low + high) / 2).nan_to_num(0.0, 0.0, 0.0).bfloat16().float()
        reach = torch.maximum(high - middle, middle - low).clamp(min=0.0)  # -inf where nothing is kept
        return rounded_up(reach / LARGEST), middle

    def even_table(self, device: torch.device | None = None) -> Tensor:
        """16 codes at even steps, 0.0 among them where there is no middle; of 8 bits none.

        A table that errs less on the weights alone (`lloyd`) has no number near 0.0, since what was there is pruned. It spoils
        small weights that were kept for the size of their inputs, and pays only where that size is known (grid.py).
        """
        if self.bits == 8:
            return torch.empty(0, dtype=torch.uint8, device=device)
        first, last = (1, 255) if self.middle else (1, ZERO + LARGEST * 7 // 8)
        return torch.linspace(first, last, TABLE, device=device).round().to(torch.uint8)

    def spread(self, scale: Tensor, out_features: int, in_features: int) -> tuple[Tensor, Tensor]:
        """Scale and middle [out, groups], fp32, of those of a packed matrix."""
        both = scale.view(torch.bfloat16).float().transpose(1, 3).flatten(0, 1)
        both = both[:out_features]
        return both[:, 0], both[:, 1] if self.middle else torch.zeros_like(both[:, 0])

    def pack_scales(self, scale: Tensor, middle: Tensor) -> Tensor:
        """[panels, groups, 1 or 2, 16] of scale and middle [out, groups]; absent rows have 0."""
        both = torch.stack((scale, middle)[: 1 + self.middle], 1)
        both = F.pad(both, (0, 0, 0, 0, 0, panel_count(len(scale)) * LANES - len(scale)))
        panels = both.view(panel_count(len(scale)), LANES, *both.shape[1:]).permute(0, 3, 2, 1)
        return panels.to(torch.bfloat16).contiguous().view(torch.int16)

    def cut_scales(self, scale: Tensor, shape: tuple[int, int], rows: slice, columns: slice) -> Tensor:
        """Those of a part of a packed matrix of this shape, which ends where groups end, of its scales."""
        held = self.spread(scale, *shape)
        first, end, _ = columns.indices(shape[1])
        groups = slice(self.groups(first), self.groups(end)) if self.group else slice(None)
        return self.pack_scales(*(each[rows, groups] for each in held))

    def _grouped(self, matrix: Tensor) -> Tensor:
        """[out, in] -> [out, groups, columns of a group], absent columns 0."""
        out_features, in_features = matrix.shape
        across = self.group or max(in_features, 1)
        groups = self.groups(in_features)
        return F.pad(matrix, (0, groups * across - in_features)).view(out_features, groups, across)

    def _in_steps(self, wide: Tensor, scale: Tensor, middle: Tensor) -> Tensor:
        """Weights [out, in] in steps of their scale from their middle, -127 to 127."""
        numbers = self._grouped(wide)
        if self.middle:
            numbers = numbers - middle[..., None]
        numbers = numbers / scale.clamp(min=SMALLEST)[..., None]
        return numbers.clamp_(-LARGEST, LARGEST).flatten(1)[:, : wide.shape[1]]


PLAIN = Codec()
EXAMPLES = ("int8", "int8g64", "int4g64", "int4mg64")
"""Those that lists and messages name."""


def check_in_reach(weight: Tensor) -> None:
    """FormatError for a weight [out, in] that holds inf, NaN, or what no step reaches."""
    if not weight.numel() or bool(weight.abs().amax() <= LIMIT):
        return
    row, column = (~(weight.abs() <= LIMIT)).nonzero()[0].tolist()
    raise FormatError(
        f"quantised values hold finite weights of at most {LIMIT:.0e}, but row {row}, column {column} is "
        f"{float(weight[row, column])}; use plain values, or mend the weight"
    )


def rounded_up(numbers: Tensor) -> Tensor:
    """Numbers of 0 and more as the least of bf16 that are not smaller; those above 0 at least as `SMALLEST`."""
    bits = torch.where(numbers > 0, numbers.clamp(min=SMALLEST), 0.0).view(torch.int32)
    return (bits + 0xFFFF & -0x10000).view(torch.float32)


def _nearest(numbers: Tensor, table: Tensor) -> Tensor:
    """The nearest codes of numbers in -127 to 127, of a table where there is one: uint8."""
    if not table.numel():
        return numbers.round().add_(ZERO).to(torch.uint8)
    # Twice the number that lies between two codes is whole, so that a list by twice the number, rounded up, tells the nearer one.
    levels = table.int() - ZERO
    twice = torch.arange(-2 * LARGEST, 2 * LARGEST + 1, dtype=torch.int32, device=table.device)
    nearest = table[torch.bucketize(twice, levels[1:] + levels[:-1])]
    return serial.looked_up(nearest, (numbers * 2).ceil_().add_(2 * LARGEST).to(torch.int16))


def lloyd(numbers: Tensor, weights: Tensor) -> Tensor:
    """16 codes [16] uint8, ascending and all different, with little squared error on numbers [n] in -127 to 127.

    weights [n]: of each number's squared error (Lloyd 1982, Max 1960).
    """
    if not numbers.numel():
        return torch.linspace(1, 255, TABLE).round().to(torch.uint8).to(numbers.device)
    held, shares = numbers.cpu().double().numpy(), weights.cpu().double().numpy()
    shares = shares / shares.max() if shares.max() > 0 else np.ones_like(shares)
    cells = ((held + LARGEST) * _CELLS).astype(np.int64)
    count = 2 * LARGEST * _CELLS + 1
    mass = np.append(np.bincount(cells, shares, count).cumsum(), 0.0)
    moment = np.append(np.bincount(cells, shares * held, count).cumsum(), 0.0)
    quantiles = (np.arange(TABLE) + 0.5) / TABLE * mass[-2]
    levels = np.searchsorted(mass[:-1], quantiles) / _CELLS - LARGEST
    for _ in range(_ROUNDS):
        ends = np.floor(((levels[1:] + levels[:-1]) / 2 + LARGEST) * _CELLS).astype(np.int64)
        bounds = np.concatenate(([-1], ends, [count - 1]))  # the sums have a 0 at -1 too
        own, sums = mass[bounds[1:]] - mass[bounds[:-1]], moment[bounds[1:]] - moment[bounds[:-1]]
        before, levels = levels, np.where(own > 0, sums / np.where(own > 0, own, 1.0), levels)
        if np.abs(levels - before).max() < _STILL:
            break
    codes = np.unique(np.clip(np.rint(levels), -LARGEST, LARGEST).astype(np.int64) + ZERO)
    others = np.setdiff1d(np.arange(1, 256), codes)[: TABLE - len(codes)]
    return torch.from_numpy(np.sort(np.concatenate((codes, others))).astype(np.uint8)).to(numbers.device)
