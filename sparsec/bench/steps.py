"""What decodes a token in a mode, what it reads for it, and how fast reading alone would be."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from sparsec.bench.shares import shares
from sparsec.cost import machine_constants
from sparsec.emitter import conv1d_type
from sparsec.kernels.modules.packed_layer import PackedLayer
from sparsec.program.decoder import StepForward
from sparsec.program.shares import Shares, step_bytes, step_shares


@dataclass(frozen=True)
class Step:
    """One token of a mode."""

    shares: Shares | None  # None under torch.compile: nothing can be told apart there
    nbytes: int  # of weights, read once
    limit_ms: float | None  # that reading these takes, as this machine was measured; None where it was not
    native: bool = False  # it is one native call
    reason: str = ""  # why it is not, of a model that could be
    bits: int = 0  # of a value in most of its matrices; 0: plain ones


def step_of(model: Any, decode: Callable[[int], object], tokens: int, compiled: bool) -> Step:
    """decode: so many tokens more of a sequence that the model has begun."""
    nbytes, rate, bits = model_bytes(model), _bandwidth(model.dtype), value_bits(model)
    forward = vars(model).get("forward")
    if compiled or not isinstance(forward, StepForward):
        found = None if compiled else shares(model, lambda: decode(tokens), tokens)
        return Step(found, nbytes, _limit(nbytes, rate), bits=bits)
    prepared, reason = forward.prepared(), forward.reason()
    found = step_shares(forward, lambda: decode(1), tokens)
    if prepared is None or found is None:
        hooked = shares(model, lambda: decode(tokens), tokens)
        return Step(
            hooked, nbytes, _limit(nbytes, rate), reason=reason or "its program served no call of this loop", bits=bits
        )
    nbytes = step_bytes(prepared.written)
    return Step(found, nbytes, _limit(nbytes, rate), native=True, bits=bits)


def model_bytes(model: Any) -> int:
    """Of all tensors of a model, each once, without an embedding that no product reads."""
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = getattr(table, "weight", None) is getattr(head, "weight", None)
    apart = set() if tied else {t.data_ptr() for t in (*table.parameters(), *table.buffers())}
    tensors = (*model.parameters(), *model.buffers())
    return sum({t.data_ptr(): t.nbytes for t in tensors if t.data_ptr() not in apart}.values())


def value_bits(model: nn.Module) -> int:
    """Bits of a value, as most weights of the matrices have them; 0 for plain values."""
    found: Counter[int] = Counter({0: 0})
    for module in model.modules():
        if isinstance(module, PackedLayer):
            found[module.packed.codec.bits] += math.prod(module.packed.shape)
        elif isinstance(module, (nn.Linear, *conv1d_type())):
            found[0] += sum(p.numel() for p in module.parameters(recurse=False) if p.dim() > 1)
    return found.most_common(1)[0][0]


def _bandwidth(dtype: torch.dtype) -> float | None:
    """Bytes a second, where this machine was measured before."""
    known = machine_constants([dtype], measuring=False)
    return None if known is None else known.constants.bandwidth


def _limit(nbytes: int, rate: float | None) -> float | None:
    return None if rate is None else 1e3 * nbytes / rate
