"""Grid: the numbers that a codec offers each row and group of a matrix, chosen so that rounding to them errs little.

A codec by itself lets a group's scale reach its largest weight. Here scales are searched: clipping the few largest lets the others
lie closer to their numbers (as in AWQ, Lin et al. 2023, arXiv:2306.00978). Scales and middles are then fitted to the codes by least
squares. Errors are squared, and weighed by column where it is known how large the inputs of the columns are.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsec.formats.values import LARGEST, SMALLEST, ZERO, Codec, Codes, check_in_reach, lloyd

RATIOS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)
"""Shares of a group's reach that its scale is tried to cover."""
ROUNDS = 3
"""How often scales and table are fitted to each other."""
REFINED = 3
"""How often scales and middles are fitted to the codes that were taken."""
PIECE = 1 << 18
"""Weights that are searched together."""


@dataclass(frozen=True, eq=False)
class Grid:
    """Scale and middle of every row and group, and the table of the matrix: what codes stand for."""

    codec: Codec
    scale: Tensor  # [out, groups], fp32 numbers that bf16 holds
    middle: Tensor  # [out, groups], likewise
    table: Tensor  # as in Codes

    @classmethod
    def of(cls, codec: Codec, like: Codes, out_features: int, in_features: int) -> Self:
        """That of codes."""
        return cls(codec, *codec.spread(like.scale, out_features, in_features), like.table)

    @classmethod
    def fitted(cls, codec: Codec, weight: Tensor, mask: Tensor, importance: Tensor | None = None) -> Self:
        """The grid for a weight [out, in] where mask [out, in] is True.

        importance: what a column's squared errors count, [in], 0 and more; None: all the same. FormatError for a kept weight that
        is inf, NaN or larger than what codes stand for.
        """
        wide = weight.detach().float().masked_fill(~mask, 0.0)
        check_in_reach(wide)
        weights = wide.new_ones(wide.shape[1]) if importance is None else importance.to(wide)
        if not bool(weights.any()):
            weights = torch.ones_like(weights)
        reach, middle = codec.scales(wide, mask)
        grid = cls(codec, reach, middle, codec.even_table(wide.device))
        if importance is not None:
            grid = grid.with_table(wide, mask, weights)
        for _ in range(ROUNDS if codec.bits == 4 else 1):
            scale, middle = grid._searched(wide, mask, weights, reach)
            grid = replace(grid, scale=scale, middle=middle)
            if importance is not None:
                grid = grid.with_table(wide, mask, weights)
        return grid

    def refined(self, weight: Tensor, mask: Tensor) -> Self:
        """The grid for a weight that moved a little: from these scales on, and by the codes that the weight has now."""
        wide = weight.detach().float().masked_fill(~mask, 0.0)
        ones = wide.new_ones(wide.shape[1])
        scale, middle = self._searched(wide, mask, ones, self.scale, (1.0,), 1)
        return replace(self, scale=scale, middle=middle)

    @property
    def like(self) -> Codes:
        """Scale and table as codes hold them; without codes."""
        none = torch.empty(0, 0, dtype=torch.uint8, device=self.scale.device)
        return Codes(none, self.codec.pack_scales(self.scale, self.middle), self.table)

    def column(self, i: int, values: Tensor) -> Tensor:
        """The nearest numbers to one column's values [out], fp32."""
        group = i // self.codec.group if self.codec.group else 0
        scale, middle = self._columns[0][group], self._columns[1][group]
        return torch.addcmul(middle, self._nearest((values - middle) / self._columns[2][group]), scale)

    def round(self, wide: Tensor) -> Tensor:
        """The nearest numbers to values [out, in], fp32."""
        numbers = self._numbers(self._grouped(wide), self.scale, self.middle)
        return numbers.mul_(self.scale[..., None]).add_(self.middle[..., None]).flatten(1)[:, : wide.shape[1]]

    @cached_property
    def _columns(self) -> tuple[Tensor, Tensor, Tensor]:
        """[groups, out]: scales, middles, and scales to divide by."""
        scale, middle = self.scale.t().contiguous(), self.middle.t().contiguous()
        return scale, middle, scale.clamp(min=SMALLEST)

    @cached_property
    def _nearest_halves(self) -> Tensor:
        """[509], the table's number that is nearest to each multiple of a half from -127 to 127, the lower one of two."""
        levels = self.table.float() - ZERO
        halves = torch.arange(-2 * LARGEST, 2 * LARGEST + 1, device=levels.device) / 2
        return levels[torch.bucketize(halves, (levels[1:] + levels[:-1]) / 2)]

    def _nearest(self, numbers: Tensor) -> Tensor:
        """The table's numbers that are nearest to numbers in steps."""
        if self.codec.bits == 8:
            return numbers.round_().clamp_(-LARGEST, LARGEST)
        # What lies between two codes is a multiple of a half, so numbers between two such ones are all nearest to the same.
        places = (numbers * 2).ceil_().clamp_(-2 * LARGEST, 2 * LARGEST).add_(2 * LARGEST)
        return self._nearest_halves.take(places.to(torch.int64))

    def with_table(self, wide: Tensor, mask: Tensor, weights: Tensor) -> Self:
        """The same with the table of 4 bits that errs least on a weight [out, in], by columns that count `weights` [in]."""
        if self.codec.bits == 8:
            return self
        rows = mask.any(1).nonzero()[:, 0]
        scale, middle, kept = self.scale[rows], self.middle[rows], mask[rows]
        divisor = scale.clamp(min=SMALLEST)
        numbers = (
            (self._grouped(wide[rows]) - middle[..., None]).div_(divisor[..., None]).flatten(1)[:, : wide.shape[1]]
        )
        counted = scale.square().repeat_interleave(self.across(wide), 1)[:, : wide.shape[1]] * weights
        return replace(self, table=lloyd(numbers[kept].clamp_(-LARGEST, LARGEST), counted[kept]))

    def across(self, wide: Tensor) -> int:
        """Columns of a group of a weight [out, in]."""
        return self.codec.group or max(1, wide.shape[1])

    def _grouped(self, wide: Tensor) -> Tensor:
        """[out, in] -> [out, groups, columns of a group], absent columns 0."""
        across = self.across(wide)
        return F.pad(wide, (0, -wide.shape[1] % across)).view(len(wide), self.codec.groups(wide.shape[1]), across)

    def _numbers(self, values: Tensor, scale: Tensor, middle: Tensor) -> Tensor:
        """The nearest ones of the table to values [out, groups, columns]."""
        divisor = scale.clamp(min=SMALLEST)
        return self._nearest((values - middle[..., None]).div_(divisor[..., None]))

    def _searched(
        self,
        wide: Tensor,
        mask: Tensor,
        weights: Tensor,
        reach: Tensor,
        ratios: tuple[float, ...] = RATIOS,
        refined: int = REFINED,
    ) -> tuple[Tensor, Tensor]:
        """For every row and group the scale and middle that err least: among ratios of reach [out, groups], then refined."""
        found, middles = torch.empty_like(reach), torch.empty_like(reach)
        rows = max(1, PIECE // max(1, wide.shape[1]))
        for start in range(0, len(wide), rows):
            part = slice(start, start + rows)
            values, counted = self._grouped(wide[part]), self._grouped(mask[part] * weights)
            middle = self.middle[part]
            best = torch.full_like(middle, torch.inf)
            scale = reach[part]
            for ratio in ratios:
                tried = _as_scale(reach[part] * ratio)
                error = _error(self._numbers(values, tried, middle), tried, middle, values, counted)
                better = error < best
                scale, best = torch.where(better, tried, scale), torch.where(better, error, best)
            for _ in range(refined):
                numbers = self._numbers(values, scale, middle)
                tried, about = self._least_squares(numbers, values, counted, scale, middle)
                error = _error(self._numbers(values, tried, about), tried, about, values, counted)
                better = error < best
                scale, best = torch.where(better, tried, scale), torch.where(better, error, best)
                middle = torch.where(better, about, middle)
            found[part], middles[part] = scale, middle
        return found, middles

    def _least_squares(
        self, numbers: Tensor, values: Tensor, counted: Tensor, scale: Tensor, middle: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Scale and middle for given numbers of the table; as they were where there is no better one."""
        offset = values - middle[..., None]
        square = (counted * numbers.square()).sum(2)
        product = (counted * numbers * offset).sum(2)
        if not self.codec.middle:
            fitted, moved = product / square, middle
        else:
            total, mean, right = counted.sum(2), (counted * numbers).sum(2), (counted * offset).sum(2)
            determinant = total * square - mean.square()
            fitted = (total * product - mean * right) / determinant
            moved = middle + (right - fitted * mean) / total
        fitted, moved = _as_scale(fitted), moved.bfloat16().float()
        sound = fitted.isfinite() & moved.isfinite() & (fitted > 0)
        return torch.where(sound, fitted, scale), torch.where(sound, moved, middle)


def _as_scale(numbers: Tensor) -> Tensor:
    """The nearest numbers that scales may be."""
    return torch.where(numbers > 0, numbers.clamp(min=SMALLEST), numbers).bfloat16().float()


def _error(numbers: Tensor, scale: Tensor, middle: Tensor, values: Tensor, counted: Tensor) -> Tensor:
    """Squared, of every row and group."""
    rounded = numbers.mul_(scale[..., None]).add_(middle[..., None])
    return rounded.sub_(values).square_().mul_(counted).sum(2)
