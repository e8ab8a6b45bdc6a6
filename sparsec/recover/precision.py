"""What products are computed in while training: float32, or bfloat16 by autocast where the machine is faster at it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache, partial
from time import perf_counter
from typing import Any

import torch

from sparsec.errors import RecoverError
from sparsec.ir.graph import Graph

Compute = Callable[[], AbstractContextManager[Any]]
"""Gives a context to compute in."""
DTYPES = ("auto", "fp32", "bf16")
_NAMED = {"fp32": torch.float32, "bf16": torch.bfloat16}
_PAYS = 1.2
_SCALE = 2.0**16
_SIZE, _TIMES = 768, 5


def dtype_of(dtype: str, graph: Graph, begun: object = None) -> str:
    """`auto` is `fp32` or `bf16` from here on: as a training was begun that goes on, or else as the machine is faster. It stays
    `auto` for a model stored in 16 bits."""
    if dtype != "auto" or {w.dtype for w in graph.weights.values()} != {torch.float32}:
        return dtype
    if begun in _NAMED:
        return str(begun)
    return "bf16" if bf16_pays(next(graph.module.parameters()).device.type) else "fp32"


def precision(dtype: str, graph: Graph) -> tuple[str, Compute]:
    """(name, what gives a context to compute in). A model stored in 16 bits computes in its own dtype; RecoverError for another."""
    tensor = next(graph.module.parameters())
    held = {w.dtype for w in graph.weights.values()}
    if held != {torch.float32}:
        named = ", ".join(sorted(str(d).removeprefix("torch.") for d in held))
        if dtype != "auto" and held != {_NAMED[dtype]}:
            raise RecoverError(
                f"recover: dtype={dtype!r} is of models stored in float32, and this one is stored and computes in {named}; leave "
                "it out, or convert the model first, as in model.float()"
            )
        return named, nullcontext
    if dtype_of(dtype, graph) == "fp32":
        return "float32", nullcontext
    return "bfloat16 products", partial(_half, tensor.device.type)


def loss_scale(graph: Graph) -> float:
    """What a loss is multiplied with for its gradients: most of them are below float16's smallest number, where it is used."""
    return _SCALE if any(w.dtype == torch.float16 for w in graph.weights.values()) else 1.0


@contextmanager
def _half(device: str) -> Iterator[None]:
    """Inside of another autocast, torch would keep the weights' bfloat16 copies over the steps that change them."""
    with torch.autocast(device, torch.bfloat16):
        try:
            yield
        finally:
            torch.clear_autocast_cache()


@cache
def bf16_pays(device: str) -> bool:
    """Whether products of bfloat16 matrices, with their gradients, take clearly less time here than float32. Measured once."""
    if device != "cpu":
        return bool(torch.cuda.is_bf16_supported())
    times = {}
    for dtype in (torch.float32, torch.bfloat16):
        a = torch.ones(_SIZE, _SIZE, dtype=dtype)
        found = []
        for _ in range(_TIMES):
            start = perf_counter()
            torch.nn.functional.linear(a, a)  # forward, by the input and by the weight
            torch.mm(a, a)
            torch.mm(a.t(), a)
            found.append(perf_counter() - start)
        times[dtype] = min(found)
    return times[torch.float32] > _PAYS * times[torch.bfloat16]
