"""Programs compute what the model's own code does: every architecture, dtype, layout, batch, padding and form of cache."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from programs import BITMAP, SERVED, compiled, counted, decode, near, own_code, step, step_forward, tokens
from torch import Tensor
from transformers import DynamicCache, StaticCache

from sparsec.kernels import status
from sparsec.kv_cache import cache_of
from sparsec.program.decoder import BATCH

pytestmark = pytest.mark.skipif(not status().built, reason="no native kernels")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LAYOUTS = (
    *("fuse,lower(dense)", "magnitude(0.5),freeze,fuse,lower(csr)", "magnitude(0.5),freeze,lower(bitmap)"),
    "magnitude(0.5, pattern='block:16x16'),freeze,fuse,lower(bsr16x16)",
    *("magnitude(pattern='2:4'),freeze,fuse,lower(nm)", "magnitude(0.5),freeze,fuse,lower(bitmap, values='int8')"),
    "magnitude(0.5),freeze,fuse,lower(bitmap, values='int4mg64', digits=3)",
)
CACHES: dict[str, Any] = {
    "none": lambda config: None,
    "plain": lambda config: DynamicCache(),
    "of the model": lambda config: DynamicCache(config=config),
}


def compare(model: Any, ids: Tensor, prompt: int, make: Any, padded: int) -> None:
    """fp32: close to the model's own code. 16 bits: an error against fp32 that is at most half as much again as its own code's."""
    with counted() as steps:
        found = decode(model, ids, prompt, make(model.config), padded)
    assert steps.batches == [len(ids)] * (ids.shape[1] - prompt)
    with own_code(model):
        wanted = decode(model, ids, prompt, make(model.config), padded)
    dtype = model.lm_head.bias.dtype if getattr(model.lm_head, "bias", None) is not None else model.dtype
    if dtype == torch.float32:
        near(found, wanted)
        return
    exact_model = copy.deepcopy(model).float()
    with own_code(exact_model):
        exact = torch.stack(decode(exact_model, ids, prompt, make(model.config), padded))
    errors = [(torch.stack(each) - exact).square().mean().sqrt() for each in (found, wanted)]
    assert errors[0] <= 1.5 * errors[1] + torch.finfo(dtype).eps / 8 * exact.abs().max()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SERVED)
def test_every_architecture_is_served(name: str, dtype: torch.dtype) -> None:
    """With its sliding window reached and passed: tiny models have one of 4 positions."""
    model = compiled(name, BITMAP, dtype)
    assert step_forward(model).reason() == ""
    compare(model, tokens(2, 10), 3, CACHES["of the model"], padded=1)


@settings(max_examples=40, deadline=None)
@given(
    name=st.sampled_from(SERVED),
    batch=st.sampled_from([1, 2, 3, 8]),
    prompt=st.integers(1, 9),
    more=st.integers(1, 4),
    padded=st.integers(0, 3),
    cache=st.sampled_from(sorted(CACHES)),
)
def test_steps_are_those_of_the_models_own_code(
    name: str, batch: int, prompt: int, more: int, padded: int, cache: str
) -> None:
    compare(compiled(name), tokens(batch, prompt + more), prompt, CACHES[cache], min(padded, prompt - 1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spec", LAYOUTS)
def test_every_layout_is_served(spec: str, dtype: torch.dtype) -> None:
    for name in ("llama", "opt" if "dense" in spec else "gpt2"):
        compare(compiled(name, spec, dtype), tokens(3, 7), 5, CACHES["plain"], padded=2)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("bloom", "BloomForCausalLM computes attention in a way of its own"),
        ("falcon", "FalconForCausalLM computes attention in a way of its own"),
        ("gptj", "the operator aten.index.Tensor is none that a program has"),
        ("mixtral", "writes in place"),
        ("mamba", "MambaForCausalLM computes attention in a way of its own"),
    ],
)
def test_what_is_not_served_says_why_and_runs_as_ever(name: str, reason: str) -> None:
    model = compiled(name)
    assert reason in step_forward(model).reason()
    ids = tokens(1, 5)
    with counted() as steps:
        found = model.generate(ids, max_new_tokens=3, do_sample=False)
    assert not len(steps)
    with own_code(model):
        assert torch.equal(found, model.generate(ids, max_new_tokens=3, do_sample=False))


def test_a_cache_that_does_not_grow_and_more_sequences_go_the_models_own_way() -> None:
    model = compiled("llama")
    for ids, make in (
        (tokens(1, 6), lambda config: StaticCache(config=config, max_cache_len=16)),
        (tokens(BATCH + 1, 6), lambda config: DynamicCache()),
    ):
        with counted() as steps:
            found = decode(model, ids, 4, make(model.config))
        assert not len(steps)
        with own_code(model):
            near(found, decode(model, ids, 4, make(model.config)))


# ---- caches that are changed between steps ------------------------------------------------------------------------------------

CHANGES = (
    *("step", "step", "tokens", "crop", "reorder", "repeat", "select", "deepcopy", "copy", "pickle", "reset", "past"),
    *("snap", "back"),
)


def changed(cache: Any, how: str, count: int, kept: list[Any], generator: torch.Generator) -> Any:
    """A cache after a change that transformers has, or that its users make; it may fail as transformers does."""
    batch = next((len(layer.keys) for layer in cache.layers if layer.is_initialized), 1)
    if how == "crop":
        cache.crop(-min(count, cache.get_seq_length()))
    elif how == "reorder":
        cache.reorder_cache(torch.randint(0, batch, (batch,), generator=generator))
    elif how == "repeat" and batch < 5:
        cache.batch_repeat_interleave(2)
    elif how == "select":
        cache.batch_select_indices(torch.tensor([batch - 1, 0][: max(1, count % 3)]))
    elif how == "deepcopy":
        return copy.deepcopy(cache)
    elif how == "pickle":
        return pickle.loads(pickle.dumps(cache))
    elif how == "copy":
        new = copy.copy(cache)
        new.layers = [copy.copy(layer) for layer in cache.layers]
        return new if count % 2 else cache
    elif how == "reset" and count == 5:
        cache.reset()
    elif how == "past":
        for layer in cache.layers:
            getattr(layer, "activate_past_recording", lambda: None)()
    elif how == "snap":
        kept[:] = [(each.keys, each.values, getattr(each, "cumulative_length", None)) for each in cache.layers]
    elif how == "back":
        for layer, (keys, values, length) in zip(cache.layers, kept, strict=False):
            if layer.is_initialized and keys is not None:
                layer.keys, layer.values = keys, values
                if length is not None:
                    layer.cumulative_length = length
    return cache


def story(model: Any, cache: Any, script: list[tuple[str, int]], batch: int) -> list[Any]:
    """What a model gives while its cache is changed between steps, failures too, and what the cache holds in the end."""
    generator, told, kept = torch.Generator().manual_seed(0), [], []
    for how, count in [("tokens", 3), *script]:
        try:
            if how in ("step", "tokens"):
                batch = next((len(layer.keys) for layer in cache.layers if layer.is_initialized), batch)
                ids = torch.randint(3, 64, (batch, 1 if how == "step" else count), generator=generator)
                with torch.no_grad():
                    out = step(model, ids, cache)
                assert cache_of(out) is cache
                told.append(out.logits[:, -1])
            else:
                cache = changed(cache, how, count, kept, generator)
        except (RuntimeError, ValueError, IndexError) as error:
            told.append(f"{how}: {type(error).__name__}: {error}")
            if how in ("step", "tokens"):
                break
    for layer in cache.layers:
        if layer.is_initialized:
            told += [layer.keys, layer.values, (layer.get_seq_length(), layer.get_mask_sizes(1))]
    return told


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(["llama", "mistral", "gemma3", "gpt2"]),
    batch=st.integers(1, 3),
    cache=st.sampled_from(["plain", "of the model"]),
    script=st.lists(st.tuples(st.sampled_from(CHANGES), st.integers(1, 5)), min_size=1, max_size=12),
)
def test_a_cache_may_be_changed_between_steps(name: str, batch: int, cache: str, script: list[tuple[str, int]]) -> None:
    model = compiled(name)
    found = story(model, CACHES[cache](model.config), script, batch)
    with own_code(model):
        wanted = story(model, CACHES[cache](model.config), script, batch)
    assert len(found) == len(wanted)
    for got, expected in zip(found, wanted, strict=True):
        if isinstance(expected, Tensor):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4, equal_nan=True)
        else:
            assert got == expected


def test_what_was_taken_out_of_a_cache_stays_as_it_was() -> None:
    """Regression: keys that somebody held were overwritten by steps after a crop, and by reordering."""
    model, ids = compiled("llama"), tokens(2, 9)
    cache = DynamicCache()
    decode(model, ids, 6, cache)
    held = cache.layers[0].keys
    before = held.clone()
    cache.crop(-4)
    with counted() as steps:
        decode(model, tokens(2, 6, seed=1), 2, cache)
    assert len(steps) == 4
    assert torch.equal(held, before)
    held = cache.layers[0].keys
    before = held.clone()
    cache.reorder_cache(torch.tensor([1, 0]))
    assert torch.equal(held, before)
    assert torch.equal(cache.layers[0].keys, before.flip(0))


def test_a_long_text_outgrows_slabs_and_windows() -> None:
    """Slabs begin with 64 positions, and a window's are moved to their beginning."""
    for name in ("llama", "gemma3"):
        model = compiled(name)
        compare(model, tokens(1, 120), 1, CACHES["of the model"], padded=0)
