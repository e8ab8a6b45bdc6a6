"""Whether stored positions are sound, fast: what content_faults asks first of a matrix on a CPU, before it looks for what to name.

In one thread by NumPy, which compares small integers by whole registers: the columns of 53M weights as 16 bits in 0.03 s, where
torch, which also says where the fault is, takes 0.8 s.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor

_UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32}


def ascending(columns: Tensor, row_ptr: Tensor, width: int) -> bool:
    """Whether columns (16 or 32 bits, read as unsigned) ascend strictly within every row and are below `width`.

    row_ptr runs from 0 to their number and does not fall.
    """
    numbers = _numbers(columns)
    if not numbers.size:
        return True
    rises = np.greater(numbers[1:], numbers[:-1])
    begins = _begins(row_ptr)[1:]
    rises[begins - 1] = True
    return bool(rises.all()) and int(numbers.max()) < width


def distances_ascend(distances: Tensor, row_ptr: Tensor, width: int) -> bool:
    """The same of columns as distances of 8 bits: only the first of a row may be 0, and none leads past the width."""
    numbers = _numbers(distances)
    if not numbers.size:
        return True
    begins = _begins(row_ptr)
    if np.count_nonzero(numbers == 0) != np.count_nonzero(numbers[begins] == 0):
        return False
    return int(np.add.reduceat(numbers, begins, dtype=np.int64).max()) < width


def slots_ascend(words: Tensor, bits: int, rows: int) -> bool:
    """Whether numbers of so many bits rise from each slot of a group to the next.

    words: uint8 [panels, groups, slots, halves, bits], a half the numbers of 8 rows, row by row from the lowest bit on. rows: that
    exist; those past them, which the last panel has too, may hold anything.
    """
    if not words.numel():
        return True
    held = _numbers(words)
    if bits == 2:  # 16 rows lie in a word as they are
        numbers = held.reshape(*held.shape[:3], 4).view(np.uint32)
    else:
        numbers = held[..., 0].astype(np.uint32)
        for byte in range(1, bits):
            numbers |= held[..., byte].astype(np.uint32) << np.uint32(8 * byte)
    fields = 16 // numbers.shape[-1]
    first = np.uint32(sum(1 << bits * row for row in range(fields)))  # the lowest bit of each row
    low, high = numbers[:, :, :-1], numbers[:, :, 1:]
    less = np.zeros(low.shape, np.uint32)
    for bit in range(bits):  # the higher bit of two numbers decides, and where it is the same the lower ones have
        one, other = low >> np.uint32(bit), high >> np.uint32(bit)
        less = (~one & other) | (~(one ^ other) & less)
    less = ~less & first
    for word in range(numbers.shape[-1]):
        there = min(max(rows - (len(words) - 1) * 16 - fields * word, 0), fields)
        less[-1, :, :, word] &= np.uint32((1 << bits * there) - 1)
    return not less.any()


def _numbers(tensor: Tensor) -> np.ndarray:
    return np.from_dlpack(tensor).view(_UNSIGNED[tensor.element_size()])


def _begins(row_ptr: Tensor) -> np.ndarray:
    """Where each row that is not empty begins."""
    starts = np.from_dlpack(row_ptr)
    return starts[:-1][starts[1:] > starts[:-1]]
