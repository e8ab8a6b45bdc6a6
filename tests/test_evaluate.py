"""Perplexity, top-1 agreement and latency against slow or planted truths."""

from __future__ import annotations

import math
import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from sparsec.data import Text, load_model
from sparsec.errors import DataError
from sparsec.evaluate import Evaluation, Windows, cut, evaluate, top1_agreement, window_loss
from sparsec.latency import WARM_UP, Spread, compare, interleaved, layer_speedups


def characters(content: str, verbose: bool) -> dict[str, list[int]]:
    """A tokenizer: one token per character."""
    return {"input_ids": [ord(c) for c in content]}


class Planted(nn.Module):
    """A language model whose logits are given, window by window."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits)  # [windows, length, vocabulary]
        self.calls = 0

    def forward(self, input_ids: Tensor, use_cache: bool) -> Any:
        self.calls += 1
        return SimpleNamespace(logits=self.logits[self.calls - 1][None])


def windows_of(tokens: Tensor) -> Windows:
    return Windows(tokens, "text", "0" * 64, tokens.numel())


def slow_loss(logits: Tensor, tokens: Tensor) -> float:
    """The definition, token by token, in float64."""
    probabilities = torch.softmax(logits.double(), dim=-1)
    losses = [-math.log(float(probabilities[i, int(tokens[i + 1])])) for i in range(len(tokens) - 1)]
    return sum(losses) / len(losses)


@given(
    length=st.sampled_from([2, 3, 17, 255, 256, 257, 258, 513]),
    vocabulary=st.integers(1, 9),
    seed=st.integers(0, 99),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_window_loss_is_the_definition(length: int, vocabulary: int, seed: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = (3 * torch.randn(length, vocabulary, generator=generator)).to(dtype)
    tokens = torch.randint(vocabulary, (length,), generator=generator)
    loss, best = window_loss(logits, tokens)
    assert loss == pytest.approx(slow_loss(logits, tokens), rel=1e-5, abs=1e-6)
    assert torch.equal(best.long(), logits.argmax(dim=-1))


def test_perplexity_is_exp_of_the_mean_over_windows() -> None:
    """Means of windows are averaged, as the papers do; over windows of one length that is the mean over tokens."""
    logits = torch.randn(3, 5, 7, generator=torch.Generator().manual_seed(0))
    tokens = torch.randint(7, (3, 5), generator=torch.Generator().manual_seed(1))
    found = evaluate(Planted(logits), windows_of(tokens))
    each = [slow_loss(logit, token) for logit, token in zip(logits, tokens, strict=True)]
    assert found.perplexity == pytest.approx(math.exp(sum(each) / 3), rel=1e-6)


def test_a_model_that_knows_nothing_has_the_vocabulary_as_perplexity() -> None:
    found = evaluate(Planted(torch.zeros(2, 9, 11)), windows_of(torch.zeros(2, 9, dtype=torch.int64)))
    assert found.perplexity == pytest.approx(11)


def test_nan_and_overflow_are_kept_not_hidden() -> None:
    nothing = torch.zeros(1, 3, dtype=torch.int64)
    assert math.isnan(evaluate(Planted(torch.full((1, 3, 4), math.nan)), windows_of(nothing)).perplexity)
    wrong = torch.zeros(1, 3, 4)
    wrong[..., 1] = 1e5
    assert evaluate(Planted(wrong), windows_of(nothing)).perplexity == math.inf


@given(text=st.text("ab", min_size=2, max_size=60), length=st.integers(2, 9), count=st.none() | st.integers(1, 4))
def test_windows_are_consecutive_pieces_and_the_rest_is_dropped(text: str, length: int, count: int | None) -> None:
    tokens = [ord(c) for c in text]
    if len(tokens) < length * (count or 1):
        with pytest.raises(DataError, match=f"the text has {len(tokens)} tokens, .* need {length * (count or 1)}"):
            cut(Text("text", text), characters, length, count)
        return
    found = cut(Text("text", text), characters, length, count)
    assert found.count == (count or len(tokens) // length)
    assert found.tokens.flatten().tolist() == tokens[: found.count * length]
    assert found.tokens_in_text == len(tokens)


@pytest.mark.parametrize(
    ("length", "count", "words"),
    [
        (1, 1, "length must be at least 2"),
        (4, 0, "windows must be at least 1, got 0"),
        (9, 1, "length 9 is more than the model's 8 positions; take 8 or less"),
    ],
)
def test_windows_that_cannot_be_are_refused(length: int, count: int, words: str) -> None:
    with pytest.raises(DataError, match=words):
        cut(Text("text", "abc" * 9), characters, length, count, limit=8)


@given(st.lists(st.booleans(), min_size=1, max_size=30))
def test_top1_counts_the_positions_that_agree(agree: list[bool]) -> None:
    first = torch.arange(len(agree), dtype=torch.int32)[None]
    second = torch.where(torch.tensor(agree)[None], first, first + 1).to(torch.int32)
    found = top1_agreement(Evaluation((0.0,), first, torch.float32), Evaluation((0.0,), second, torch.float32))
    assert found == pytest.approx(sum(agree) / len(agree))


def test_top1_on_other_windows_is_refused() -> None:
    one, two = (Evaluation((0.0,), torch.zeros(n, 4, dtype=torch.int32), torch.float32) for n in (1, 2))
    with pytest.raises(ValueError, match="needs the same windows"):
        top1_agreement(one, two)


def test_a_real_model_agrees_with_itself_and_with_the_definition() -> None:
    loaded = load_model("tiny")
    found = cut(Text("text", "To be, or not to be, that is the question. " * 4), loaded.tokenizer, 32, 3)
    seen: list[tuple[str, int, int]] = []
    once = evaluate(loaded.model, found, lambda *step: seen.append(step))
    twice = evaluate(loaded.model, found)
    assert top1_agreement(once, twice) == 1.0
    assert seen == [("evaluating", i, 3) for i in range(4)]
    with torch.no_grad():
        logits = [loaded.model(input_ids=window[None]).logits[0] for window in found.tokens]
    each = [slow_loss(logit, window) for logit, window in zip(logits, found.tokens, strict=True)]
    assert once.perplexity == pytest.approx(math.exp(sum(each) / 3), rel=1e-5)


def test_models_take_turns() -> None:
    order: list[str] = []
    cases = {name: (lambda name=name: order.append(name)) for name in "abc"}
    times = interleaved(cases, repeats=4)
    rounds = ["".join(order[i : i + 3]) for i in range(0, len(order), 3)]
    assert rounds == (["abc", "bca", "cab"] * 2)[: 4 + WARM_UP]
    assert {name: len(t) for name, t in times.items()} == {"a": 4, "b": 4, "c": 4}


def test_quartiles() -> None:
    assert Spread.of([4.0, 1.0, 3.0, 2.0, 5.0]) == Spread(median=3.0, lower=2.0, upper=4.0, repeats=5)
    assert Spread.of([7.0]) == Spread(7.0, 7.0, 7.0, 1)


class Recorder(nn.Module):
    """Notes how many tokens each call brings, and how many the cache holds."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.calls: list[tuple[int, int]] = []

    def forward(self, input_ids: Tensor, past_key_values: int = 0, use_cache: bool = True) -> Any:
        self.calls.append((input_ids.shape[1], past_key_values))
        held = past_key_values + input_ids.shape[1]
        return SimpleNamespace(logits=torch.zeros(1, input_ids.shape[1], 4), past_key_values=held)


def test_decoding_is_one_token_on_a_growing_cache() -> None:
    models = {"dense": Recorder(), "sparse": Recorder()}
    found = compare(models, torch.zeros(1, 6, dtype=torch.int64), repeats=3, decode_repeats=5)
    for name, model in models.items():
        assert model.calls == [(6, 0)] * (3 + WARM_UP) + [(6, 0)] + [(1, 6 + i) for i in range(5 + WARM_UP)]
        assert found.latencies[name].prefill_ms.repeats == 3
        assert found.latencies[name].decode_ms.repeats == 5
    assert found.decode_speedup["dense"] == Spread(1.0, 1.0, 1.0, 5)


def test_layers_are_timed_one_model_after_the_other_at_one_row() -> None:
    seen: list[tuple[str, tuple[int, ...]]] = []

    class Layer(nn.Linear):
        def __init__(self, name: str, features: int, seconds: float) -> None:
            super().__init__(features, 2)
            self.name, self.seconds = name, seconds

        def forward(self, x: Tensor) -> Tensor:
            seen.append((self.name, tuple(x.shape)))
            time.sleep(self.seconds)
            return x

    pairs: dict[str, tuple[nn.Module, nn.Module]] = {
        "p": (Layer("p dense", 3, 8e-3), Layer("p sparse", 3, 1e-3)),
        "q": (Layer("q dense", 5, 1e-3), Layer("q sparse", 5, 8e-3)),
    }
    found = layer_speedups({n: ([d], [s]) for n, (d, s) in pairs.items()}, rounds=2)
    assert found["p"] > 1 > found["q"]
    assert seen[:8] == [
        ("p dense", (1, 3)), ("q dense", (1, 5)), ("p sparse", (1, 3)), ("q sparse", (1, 5)),
        ("p sparse", (1, 3)), ("q sparse", (1, 5)), ("p dense", (1, 3)), ("q dense", (1, 5)),
    ]  # fmt: skip
