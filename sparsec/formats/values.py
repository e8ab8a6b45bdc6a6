"""Value codecs: how stored values stand for weights. A codec knows nothing of positions, a position format nothing of codecs.

Plain values are the weights themselves, of the dtype of x, bias and result (fp32, bf16, fp16, and fp64 for CSR). In a layout's
string a codec follows a colon; plain values are left out.

    int8       8 bits, a scale for every row
    int8g64    8 bits, a scale for every row and group of 64 columns
    int4g64    4 bits, numbers of a table of 16 that fits the matrix, a scale for every row and group of 64 columns
    int4mg64   the same about a middle of its own for every row and group

Groups are of a multiple of 32 columns; the last one may be shorter. A weight is `scale * (code - 128) + middle`, a code from 1 to
255; 0 stands where nothing is kept. Scales and middles are bf16, rounded before the codes are chosen, so that they cost range and
no accuracy.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

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
_SAMPLE = 1 << 18
"""Weights that a table is fitted to, at most."""
_ROUNDS = 24
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
                f"there are no {name!r} values; known are {known}, and other sizes of groups, as in int4g128; plain values are left out"
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

        like: takes scale and table from these, as where a weight was rounded before. zero: 0.0 has a code,
        whatever that costs. FormatError for a kept weight that is inf or NaN.
        """
        wide = weight.detach().float().masked_fill(~mask, 0.0)
        check_finite(wide)
        if like is None:
            scale, middle = self.scales(wide, mask)
            table = self.fit(wide, mask, scale, middle)
        else:
            scale, middle = self.spread(like.scale, *wide.shape)
            table = like.table
        if zero and self.bits == 4 and not bool((table == ZERO).any()):
            table = table.clone()
            table[(table.int() - ZERO).abs().argmin()] = ZERO
        numbers = self._by_group(wide, middle, scale)
        return Codes(self._nearest(numbers, table).masked_fill_(~mask, 0), self.pack_scales(scale, middle), table)

    def decode(self, codes: Codes) -> Tensor:
        """The weight [out, in], fp32, that codes stand for."""
        scale, middle = self.spread(codes.scale, *codes.codes.shape)
        width = codes.codes.shape[1]
        numbers = self._grouped(codes.codes.float() - ZERO)
        numbers = numbers * scale[..., None] + middle[..., None]
        return numbers.flatten(1)[:, :width].masked_fill(codes.codes == 0, 0.0)

    def scales(self, wide: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and middle [out, groups], fp32 numbers that bf16 holds, so that every kept weight is in reach."""
        values, kept = self._grouped(wide), self._grouped(mask)
        if self.middle:
            low = values.masked_fill(~kept, float("inf")).amin(2)
            high = values.masked_fill(~kept, float("-inf")).amax(2)
            middle = ((low + high) / 2).nan_to_num(0.0, 0.0, 0.0).bfloat16().float()
        else:
            middle = values.new_zeros(values.shape[:2])
        reach = (values - middle[..., None]).abs().masked_fill(~kept, 0.0).amax(2) if values.numel() else middle
        return rounded_up(reach / LARGEST), middle

    def fit(self, wide: Tensor, mask: Tensor, scale: Tensor, middle: Tensor) -> Tensor:
        """The table of a matrix: of 8 bits none, of 4 the 16 numbers with the least squared error (Lloyd 1982, Max 1960)."""
        if self.bits == 8:
            return torch.empty(0, dtype=torch.uint8, device=wide.device)
        numbers = self._by_group(wide, middle, scale)[mask]
        weights = scale.repeat_interleave(self.group or wide.shape[1], 1)[:, : wide.shape[1]][mask].square()
        if not numbers.numel():
            return torch.linspace(1, 255, TABLE, device=wide.device).round().to(torch.uint8)
        step = -(-numbers.numel() // _SAMPLE)
        return lloyd(numbers[::step], weights[::step])

    def spread(self, scale: Tensor, out_features: int, in_features: int) -> tuple[Tensor, Tensor]:
        """Scale and middle [out, groups], fp32, of those of a packed matrix."""
        both = scale.view(torch.bfloat16).float().transpose(1, 3).reshape(-1, scale.shape[2], scale.shape[1])
        both = both[:out_features]
        return both[:, 0], both[:, 1] if self.middle else torch.zeros_like(both[:, 0])

    def pack_scales(self, scale: Tensor, middle: Tensor) -> Tensor:
        """[panels, groups, 1 or 2, 16] of scale and middle [out, groups]; absent rows have 0."""
        both = torch.stack((scale, middle)[: 1 + self.middle], 1)
        both = F.pad(both, (0, 0, 0, 0, 0, panel_count(len(scale)) * LANES - len(scale)))
        panels = both.view(-1, LANES, *both.shape[1:]).permute(0, 3, 2, 1)
        return panels.to(torch.bfloat16).contiguous().view(torch.int16)

    def _grouped(self, matrix: Tensor) -> Tensor:
        """[out, in] -> [out, groups, columns of a group], absent columns 0."""
        out_features, in_features = matrix.shape
        across = self.group or max(in_features, 1)
        return F.pad(matrix, (0, self.groups(in_features) * across - in_features)).view(out_features, -1, across)

    def _by_group(self, wide: Tensor, middle: Tensor, scale: Tensor) -> Tensor:
        """Weights [out, in] in units of their scale, from their middle."""
        numbers = (self._grouped(wide) - middle[..., None]) / scale.clamp(min=torch.finfo(torch.float32).tiny)[..., None]
        return numbers.flatten(1)[:, : wide.shape[1]].contiguous()

    def _nearest(self, numbers: Tensor, table: Tensor) -> Tensor:
        if self.bits == 8:
            return (numbers.round().clamp(-LARGEST, LARGEST) + ZERO).to(torch.uint8)
        levels = table.float() - ZERO
        return table[torch.bucketize(numbers, (levels[1:] + levels[:-1]) / 2)]


PLAIN = Codec()
EXAMPLES = ("int8", "int8g64", "int4g64", "int4mg64")
"""Those that lists and messages name."""


def check_finite(weight: Tensor) -> None:
    """FormatError for a weight [out, in] that holds inf or NaN."""
    bad = ~weight.isfinite()
    if bad.any():
        row, column = bad.nonzero()[0].tolist()
        raise FormatError(
            f"quantised values hold finite weights, but row {row}, column {column} is {float(weight[row, column])}; "
            "use plain values, or mend the weight"
        )


def rounded_up(numbers: Tensor) -> Tensor:
    """Numbers of 0 and more as the least of bf16 that are not smaller."""
    bits = numbers.float().view(torch.int32)
    return (bits + 0xFFFF & -0x10000).view(torch.float32)


def lloyd(numbers: Tensor, weights: Tensor) -> Tensor:
    """16 codes [16] uint8, ascending and all different, with little weighted squared error on numbers in -127 to 127."""
    numbers, order = numbers.double().sort()
    weights = weights.double()[order].clamp(min=1e-300)
    mass, moment = weights.cumsum(0), (weights * numbers).cumsum(0)
    levels = numbers[torch.linspace(0, len(numbers) - 1, 2 * TABLE + 1, device=numbers.device).long()[1::2]]
    for _ in range(_ROUNDS):
        ends = torch.searchsorted(numbers, (levels[1:] + levels[:-1]) / 2).sub_(1)
        ends = torch.cat((ends, ends.new_full((1,), len(numbers) - 1)))
        held, sums = (
            torch.where(ends < 0, 0.0, total[ends.clamp(min=0)]).diff(prepend=total.new_zeros(1)) for total in (mass, moment)
        )
        levels = torch.where(held > 0, sums / held.clamp(min=1e-300), levels)
    codes = (levels.round().clamp(-LARGEST, LARGEST) + ZERO).long().unique()
    if len(codes) < TABLE:
        others = torch.tensor([c for c in range(1, 256) if c not in set(codes.tolist())], device=codes.device)
        codes = torch.cat((codes, others[: TABLE - len(codes)]))
    return codes.sort().values.to(torch.uint8)
