"""What a program does not take: the model's own code gives the same result or the same error, and leaves the same cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from programs import compiled, decode, own_code, tokens
from torch import Tensor
from transformers import DynamicCache

from sparsec.kernels import status
from sparsec.kv_cache import cache_argument, cache_of

pytestmark = pytest.mark.skipif(not status().built, reason="no native kernels")


def _cache_of(name: str, batch: int = 2) -> DynamicCache:
    cache = DynamicCache()
    decode(compiled(name), tokens(batch, 4), 4, cache)
    return cache


BAD: dict[str, Callable[[Any], tuple[Tensor, dict[str, Any]]]] = {
    "a mask that is too short": lambda m: (tokens(2, 1), {"attention_mask": torch.ones(2, 3, dtype=torch.int64)}),
    "a mask that is too long": lambda m: (tokens(2, 1), {"attention_mask": torch.ones(2, 9, dtype=torch.int64)}),
    "a mask of one sequence": lambda m: (tokens(2, 1), {"attention_mask": torch.ones(1, 5, dtype=torch.int64)}),
    "a mask of floats": lambda m: (tokens(2, 1), {"attention_mask": torch.ones(2, 5)}),
    "a mask that hides the token": lambda m: (tokens(2, 1), {"attention_mask": torch.tensor([[1, 1, 1, 1, 0]] * 2)}),
    "a mask that hides all": lambda m: (tokens(2, 1), {"attention_mask": torch.zeros(2, 5, dtype=torch.int64)}),
    "a mask of four dimensions": lambda m: (tokens(2, 1), {"attention_mask": torch.zeros(2, 1, 1, 5)}),
    "positions that jump": lambda m: (tokens(2, 1), {"position_ids": torch.tensor([[90], [7]])}),
    "a position for all": lambda m: (tokens(2, 1), {"position_ids": torch.tensor([[11]])}),
    "positions below 0": lambda m: (tokens(2, 1), {"position_ids": torch.tensor([[-1], [-3]])}),
    "positions beyond the model's": lambda m: (tokens(2, 1), {"position_ids": torch.tensor([[5000], [3]])}),
    "positions of another shape": lambda m: (tokens(2, 1), {"position_ids": torch.arange(3)[None]}),
    "more sequences than the cache": lambda m: (tokens(3, 1), {}),
    "a token that is none": lambda m: (torch.full((2, 1), 64), {}),
    "a token below 0": lambda m: (torch.full((2, 1), -1), {}),
    "tokens of int32": lambda m: (tokens(2, 1).int(), {}),
    "a cache of another model": lambda m: (tokens(2, 1), {"cache": _cache_of("qwen3")}),
    "a cache of bf16": lambda m: (tokens(2, 1), {"cache": _half_of(_cache_of("llama"))}),
    "a cache of fewer layers": lambda m: (tokens(2, 1), {"cache": _first_of(_cache_of("llama"))}),
    "a cache of nothing": lambda m: (tokens(2, 1), {"cache": DynamicCache()}),
    "no cache": lambda m: (tokens(2, 1), {"cache": None}),
    "an option that is none": lambda m: (tokens(2, 1), {"labels": tokens(2, 1)}),
    "all hidden states": lambda m: (tokens(2, 1), {"output_hidden_states": True}),
    "a tuple": lambda m: (tokens(2, 1), {"return_dict": False}),
    "logits of no token": lambda m: (tokens(2, 1), {"logits_to_keep": torch.tensor([0])}),
}


def _half_of(cache: DynamicCache) -> DynamicCache:
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys.bfloat16(), layer.values.bfloat16()
    return cache


def _first_of(cache: DynamicCache) -> DynamicCache:
    cache.layers = cache.layers[:1]
    return cache


def _told(model: Any, case: str, name: str) -> list[Any]:
    cache = _cache_of(name)
    with torch.no_grad():  # whose layers are slabs then
        model(tokens(2, 1), **{cache_argument(model): cache})
        cache.crop(-1)
        ids, given = BAD[case](model)
        more = {k: v for k, v in given.items() if k != "cache"}
        cache = given.get("cache", cache)
        try:
            out = model(ids, use_cache=True, **{cache_argument(model): cache}, **more)
            logits = (
                out[-2 if len(out) == 2 and isinstance(out, tuple) else 0] if isinstance(out, tuple) else out.logits
            )
            told: list[Any] = [logits, list(out.keys()) if not isinstance(out, tuple) else len(out)]
            cache = cache if isinstance(out, tuple) else cache_of(out)
        except (RuntimeError, ValueError, IndexError, TypeError) as error:
            told = [type(error), str(error)]
    for layer in cache.layers if cache is not None else ():
        told += [layer.keys, layer.values, layer.get_seq_length()] if layer.is_initialized else []
    return told


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_the_same_as_ever(case: str, name: str) -> None:
    """The same result or the same error as the model's own code, and the same cache after it."""
    model = compiled(name)
    found = _told(model, case, name)
    with own_code(model):
        wanted = _told(model, case, name)
    assert len(found) == len(wanted), (found[:2], wanted[:2])
    for got, expected in zip(found, wanted, strict=True):
        if isinstance(expected, Tensor):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4, equal_nan=True)
        else:
            assert got == expected
