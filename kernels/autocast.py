"""Products under `torch.autocast`: the result has autocast's dtype, as that of an nn.Linear has.

A packed matrix stays in its own dtype, which x is brought to: packed values are as many bytes as the product reads, so that casting
them at every call, as autocast does with a dense weight, would cost as much as the product. The sums are therefore those
of the wider type.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from sparsec import private
from sparsec.private import OpOverload

DEVICES = {"cpu": "AutocastCPU", "cuda": "AutocastCUDA"}
"""Types of devices whose autocast is followed, and torch's names for it."""


def follow(library: torch.library.Library, name: str, op: OpOverload) -> None:
    """Makes an operator `(x, values or weight, ...) -> Tensor` do under autocast what a linear does."""
    for device, key in DEVICES.items():
        off = private.DispatchKeySet(getattr(private.DispatchKey, key))
        torch.library.impl(library, name, key)(partial(_product, op, device, off))


def _product(op: OpOverload, device: str, off: Any, x: Tensor, values: Tensor, *args: Any) -> Tensor:
    with private.without_keys(off):
        # As autocast: neither what is wider than fp32 nor what is no floating-point number is touched.
        if not all(t.is_floating_point() and t.dtype != torch.float64 and t.device.type == device for t in (x, values)):
            out: Tensor = op(x, values, *args)
            return out
        out = op(x.to(values.dtype), values, *args)
        return out.to(torch.get_autocast_dtype(device))
