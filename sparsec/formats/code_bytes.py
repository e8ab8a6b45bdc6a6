"""Codes as they are stored: a byte for each, or for two of 4 bits, each the number of a code in a table of 16.

In a bitmap codes follow each other, and each step of 16 rows and four columns begins at a byte of its own (panels.py).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsec import serial
from sparsec.formats.base import MAX_COUNT
from sparsec.formats.faults import check_count
from sparsec.formats.panels import LANES, unpack_bits
from sparsec.formats.values import TABLE

SPARE = 64
"""Bytes of zeros after the codes of a bitmap, so that a load of a whole register never leaves the memory."""
LANE = 4
"""Columns of a lane."""


def numbered(codes: Tensor, table: Tensor) -> Tensor:
    """The numbers in a table of codes that stand in it, uint8; of others 0."""
    numbers = torch.zeros(256, dtype=torch.uint8, device=codes.device)
    numbers[table.long()] = torch.arange(TABLE, dtype=torch.uint8, device=codes.device)
    return serial.looked_up(numbers, codes)


def paired(numbers: Tensor) -> Tensor:
    """Numbers [..., even] below 16 as bytes [..., half of it], the first of two in the lower half."""
    return numbers[..., ::2] | numbers[..., 1::2] << 4


def unpaired(values: Tensor) -> Tensor:
    """The inverse of `paired`."""
    return torch.stack((values & 15, values >> 4), -1).flatten(-2)


def narrow(codes: Tensor, table: Tensor) -> Tensor:
    """Codes as they are stored: [n] as [n] bytes, or [n / 2, rounded up]; [..., lane] of lanes of 4 as [..., 4 or 2]."""
    if not table.numel():
        return codes.contiguous()
    numbers = numbered(codes, table)
    return paired(F.pad(numbers, (0, numbers.shape[-1] % 2))).contiguous()


def widen(values: Tensor, table: Tensor) -> Tensor:
    """The inverse of `narrow`, with one more at the end where the number was odd."""
    return table[unpaired(values).int()] if table.numel() else values


def step_counts(bits: Tensor) -> Tensor:
    """Set bits of every step [panels, steps] of a bitmap, int64."""
    counts = torch.tensor([i.bit_count() for i in range(256)], dtype=torch.uint8, device=bits.device)
    held = serial.looked_up(counts, bits.contiguous().view(-1).view(torch.uint8))
    return held.view(*bits.shape, bits.element_size()).sum(-1, dtype=torch.int64)


def byte_starts(title: str, counts: Tensor, table: Tensor) -> Tensor:
    """Where the codes of each panel begin, in bytes: [panels + 1], int32. counts: those of its steps.

    FormatError for more than int32 numbers.
    """
    ends = (counts + 1 >> 1 if table.numel() else counts).sum(1).cumsum(0)
    check_count(title, "bytes of codes", int(ends[-1]) if len(ends) else 0, MAX_COUNT)
    return F.pad(ends, (1, 0)).to(torch.int32)


def step_runs(values: Tensor, panel_ptr: Tensor, counts: Tensor, first: int, end: int) -> tuple[Tensor, Tensor]:
    """Of a bitmap, the values of steps first to end - 1 of every panel, and where each panel starts among them.

    counts: values of every step [panels, steps].
    """
    ends = F.pad(counts.cumsum(1), (1, 0)) + panel_ptr[:-1, None]
    begin, stop = ends[:, first], ends[:, end]
    runs = [values[a:b] for a, b in zip(begin.tolist(), stop.tolist(), strict=True)]
    panel_ptr = F.pad((stop - begin).cumsum(0), (1, 0)).to(torch.int32)
    return torch.cat(runs) if runs else values[:0], panel_ptr


def in_steps(codes: Tensor, flags: Tensor, counts: Tensor, table: Tensor) -> Tensor:
    """Codes [panels, steps, 16, 4] as a bitmap stores those whose flags are set: [bytes + 64]. counts: the flags of each step."""
    if table.numel():
        numbers, held = _with_fillers(numbered(codes, table), flags, counts)
        values = paired(serial.chosen(numbers, held))
    else:
        values = serial.chosen(codes, flags)
    return F.pad(values, (0, SPARE))


def from_steps(values: Tensor, bits: Tensor, table: Tensor) -> Tensor:
    """The inverse of `in_steps`: [panels, steps, 16, 4], 0 where no flag is set."""
    flags = unpack_bits(bits)
    if not table.numel():
        return values.new_zeros(flags.shape).masked_scatter(flags, values)
    numbers, held = _with_fillers(values.new_zeros(flags.shape), flags, flags.flatten(2).sum(2))
    found = numbers.masked_scatter(held, unpaired(values))[..., :-1].reshape(flags.shape)
    return table[found.int()].mul_(flags)


def _with_fillers(numbers: Tensor, flags: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Numbers and flags of every step [panels, steps, 65], the last a 0 that is set where the others are of an odd number."""
    odd = counts.bitwise_and(1).bool().unsqueeze(-1)
    return F.pad(numbers.flatten(2), (0, 1)), torch.cat((flags.flatten(2), odd), -1)


def step_faults(values: Tensor, counts: Tensor, starts: Tensor, table: Tensor) -> list[str]:
    """What is wrong with the codes of a bitmap of which steps keep `counts`; starts: what `byte_starts` gives."""
    wanted = int(starts[-1]) + SPARE
    if values.numel() != wanted:
        return [f"values must be [{wanted}], the bytes that the bits keep and {SPARE} zeros, got {list(values.shape)}"]
    if values[-SPARE:].count_nonzero():
        return [f"values must end in {SPARE} zeros"]
    if not table.numel():
        return [] if bool(values[:-SPARE].all()) else ["values must hold no 0 before the last 64"]
    ends = (counts + 1 >> 1).view(-1).cumsum(0)[counts.view(-1) % 2 == 1] - 1
    return ["values must be zero in the half past a step's last code"] if (values[ends] >> 4).any() else []


def lane_faults(values: Tensor, table: Tensor, out_features: int, in_features: int) -> list[str]:
    """What is wrong with the codes of a dense matrix in panels [panels, steps, 16, bytes]: past its edges they must be 0."""
    past, rest = in_features % LANE, out_features % LANES
    last = values[:, -1:]
    if past and (unpaired(last) if table.numel() else last)[..., past:].count_nonzero():
        return [f"values must be zero past the last column, {in_features - 1}"]
    if rest and values[-1:, :, rest:].count_nonzero():
        return [f"values must be zero past the last row, {out_features - 1}"]
    if not table.numel() and int(values.count_nonzero()) != out_features * in_features:
        return ["values must hold no 0 within the matrix"]
    return []
