"""A language model's logits on a window, a part of the rows at a time: all of a large vocabulary take as much memory as the model.

The body of the model runs once, and the rest of its forward, from the head on, for each part.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from sparsec.errors import DataError
from sparsec.private import pytree

LOGITS = 1 << 24
"""Of one part at most: 64 MB of float32."""
_PATCHING = threading.RLock()


@runtime_checkable
class Partwise(Protocol):
    """What gives logits in parts by itself."""

    def logits_in_parts(self, window: Tensor, rows: int) -> Iterator[Tensor]:
        """[rows, vocabulary] and fewer in the last one. window: tokens [length]."""
        ...


def part_rows(model: Any, length: int) -> int:
    """Rows of a part for windows of a length; all where the model does not tell its vocabulary."""
    vocabulary = getattr(getattr(model, "config", None), "vocab_size", None)
    return min(length, max(1, LOGITS // vocabulary)) if isinstance(vocabulary, int) and vocabulary > 0 else length


def logits_in_parts(name: str, model: Any, window: Tensor, rows: int) -> Iterator[Tensor]:
    """[rows, vocabulary] and fewer in the last one, in order; one model's parts are to be taken before its next window's.

    window: tokens [length]. DataError for a model that is no causal language model of transformers.
    """
    if isinstance(model, Partwise):
        yield from model.logits_in_parts(window, rows)
        return
    body = _body(model)
    if rows >= len(window) or body is None:
        yield from torch.split(_logits(name, model, window), rows)
        return
    places = torch.split(torch.arange(len(window), device=window.device), rows)
    remembered = _Remembered()
    hook = body.register_forward_hook(remembered)
    try:
        first = _logits(name, model, window, logits_to_keep=places[0])
    finally:
        hook.remove()
    found = remembered.found
    if len(found) != 1 or len(first) != len(places[0]):  # not the forward that is known here
        yield from torch.split(_logits(name, model, window), rows)
        return
    yield first
    del first
    for place in places[1:]:
        with _giving(body, _copied(found[0])):
            part = _logits(name, model, window, logits_to_keep=place)
        yield part
        del part


class _Remembered:
    """A hook that keeps what a module gave in the thread that made it."""

    def __init__(self) -> None:
        self.thread = threading.get_ident()
        self.found: list[Any] = []

    def __call__(self, module: nn.Module, args: Any, out: Any) -> None:
        if threading.get_ident() == self.thread:
            self.found.append(_copied(out))


def _copied(out: Any) -> Any:
    """With tensors of its own: what stands before the head may write to them."""
    return pytree.tree_map_only(Tensor, Tensor.clone, out)


@contextmanager
def _giving(body: nn.Module, out: Any) -> Iterator[None]:
    """In this thread a call of the body gives what it gave before; all others call it as ever."""
    mine = threading.get_ident()
    with _PATCHING:
        own, forward = body.__dict__.get("forward"), body.forward
        body.__dict__["forward"] = lambda *a, **k: out if threading.get_ident() == mine else forward(*a, **k)
        try:
            yield
        finally:
            if own is None:
                del body.__dict__["forward"]
            else:
                body.__dict__["forward"] = own


def _body(model: Any) -> nn.Module | None:
    """What a model runs before its head; None where its forward does not take the rows that logits are wanted of."""
    forward, decoder = getattr(model, "forward", None), getattr(model, "get_decoder", None)
    body = decoder() if callable(decoder) else getattr(model, "base_model", None)
    takes = callable(forward) and "logits_to_keep" in inspect.signature(forward).parameters
    if not takes or not isinstance(body, nn.Module) or body is model:
        return None
    # A hook would run once more on what the body gave, and one on the model may mix rows. Another thread's does neither.
    hooks = [
        h for h in (*body._forward_hooks.values(), *model._forward_hooks.values()) if not isinstance(h, _Remembered)
    ]
    return None if hooks else body


def _logits(name: str, model: Any, window: Tensor, **kept: Tensor) -> Tensor:
    """[length, vocabulary], or of the rows that are to be kept. DataError for a model that is no causal language model."""
    try:
        out = model(input_ids=window[None], use_cache=False, **kept)
    except TypeError as error:
        raise DataError(
            f"{name}: a causal language model of transformers is evaluated; {type(model).__name__} is none ({error})"
        ) from error
    logits = getattr(out, "logits", None)
    if not isinstance(logits, Tensor):
        raise DataError(
            f"{name}: {type(model).__name__} gives no logits, so it is no causal language model; evaluate one that is"
        )
    return logits[0]
