"""What masks and weights are asked for most, in one thread where they lie on a CPU.

torch gives element-wise operations on 2**15 numbers and more to several threads. Where another process takes a CPU every such
operation may wait milliseconds for one of them, and passes have many. NumPy takes one thread, and on whole numbers less time than
torch in two: 1536x576 weights of fp32 masked in 0.36 ms instead of 2.4, compared with zero in 0.15 instead of 0.7. It reads weights
by DLPack, since `Tensor.numpy()` marks memory for good as not torch's alone.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

_WHOLE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def masked(tensor: Tensor, mask: Tensor, out: Tensor | None = None) -> Tensor:
    """where(mask, tensor, 0), bit for bit; out: may be `tensor`."""
    if out is None:
        out = torch.empty_like(tensor)
    if tensor.device.type == "cpu":
        np.multiply(_bits(tensor), mask.numpy(), out=out.detach().view(_WHOLE[out.element_size()]).numpy())
        torch.autograd.graph.increment_version(out)  # so that a backward of an earlier forward is refused
        return out
    return torch.where(mask, tensor, torch.zeros((), dtype=tensor.dtype, device=tensor.device), out=out)


def present(tensor: Tensor, mask: Tensor | None = None) -> Tensor:
    """What is not zero, or True in `mask`: bool."""
    half = tensor.dtype in (torch.bfloat16, torch.float16)
    if tensor.device.type != "cpu" or not (half or tensor.dtype in (torch.float32, torch.float64)):
        found = tensor != 0
        return found if mask is None else found.logical_or_(mask)
    # NumPy knows no bf16 and takes forty times as long for fp16: all bits but the sign.
    numbers = np.not_equal(_bits(tensor) << 1 if half else np.from_dlpack(tensor.detach()), 0)
    if mask is not None:
        numbers |= mask.numpy()
    return torch.from_numpy(numbers)


def grown(tensor: Tensor, mask: Tensor) -> int | Tensor:
    """How many values are not zero where `mask` is False. Elsewhere than on a CPU a tensor, which nobody has waited for."""
    found = present(tensor)
    if tensor.device.type != "cpu":
        return found.logical_and_(~mask).count_nonzero()
    return int(np.count_nonzero(np.greater(found.numpy(), mask.numpy())))


def count(mask: Tensor) -> int:
    """How many of a bool tensor are True."""
    return int(np.count_nonzero(mask.numpy()) if mask.device.type == "cpu" else mask.count_nonzero())


def present_along(mask: Tensor, dim: int) -> Tensor:
    """`mask.any(dim)` of a bool tensor; on a CPU a hundred times as fast."""
    if mask.device.type == "cpu":
        return torch.from_numpy(np.logical_or.reduce(mask.numpy(), axis=dim))
    return mask.any(dim)


def looked_up(table: Tensor, places: Tensor) -> Tensor:
    """table[places], places being whole numbers of 0 and more."""
    if places.device.type == "cpu":
        return torch.from_numpy(np.take(table.numpy(), places.numpy()))
    return table[places.int()]


def chosen(tensor: Tensor, mask: Tensor) -> Tensor:
    """tensor[mask], in order."""
    if tensor.device.type == "cpu":
        return torch.from_numpy(_bits(tensor)[mask.numpy()]).view(tensor.dtype)
    return tensor[mask]


def contiguous(tensor: Tensor) -> Tensor:
    """What `tensor.contiguous()` gives."""
    if tensor.is_contiguous() or tensor.device.type != "cpu":
        return tensor.contiguous()
    return torch.from_numpy(np.ascontiguousarray(_bits(tensor))).view(tensor.dtype)


def _bits(tensor: Tensor) -> np.ndarray:
    return np.from_dlpack(tensor.detach().view(_WHOLE[tensor.element_size()]))
