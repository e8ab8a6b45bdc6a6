"""Latency: models take turns, decoding is one token on a growing cache, layers go one after the other."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparsec.timing.latency import compare_latency, layer_times
from sparsec.timing.spread import Spread
from sparsec.timing.turns import WARM_UP, take_turns


def test_models_take_turns() -> None:
    order: list[str] = []
    times = take_turns([lambda name=name: order.append(name) or name for name in "abc"], rounds=4)
    rounds = ["".join(order[i : i + 3]) for i in range(0, len(order), 3)]
    assert rounds == (["abc", "bca", "cab"] * 2)[: 4 + WARM_UP]
    assert times == [["a"] * 4, ["b"] * 4, ["c"] * 4]


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


class Renamed(Recorder):
    """The same as transformers names it from 5.24 on: the old name is refused, as its warning would be."""

    def forward(self, input_ids: Tensor, cache: int = 0, use_cache: bool = True) -> Any:  # type: ignore[override]
        out = super().forward(input_ids, cache, use_cache)
        return SimpleNamespace(logits=out.logits, cache=out.past_key_values)


@pytest.mark.parametrize("kind", [Recorder, Renamed])
def test_decoding_is_one_token_on_a_growing_cache(kind: type[Recorder]) -> None:
    models = {"dense": kind(), "sparse": kind()}
    found = compare_latency(models, torch.zeros(1, 6, dtype=torch.int64), repeats=3, decode_repeats=5)
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
    found = layer_times({n: ([d], [s]) for n, (d, s) in pairs.items()}, rounds=2)
    assert found["p"].speedup > 1 > found["q"].speedup
    assert found["p"].dense_ms >= 8 > found["q"].dense_ms
    assert found["q"].ms >= 8 > found["p"].ms
    assert seen[:8] == [
        ("p dense", (1, 3)), ("q dense", (1, 5)), ("p sparse", (1, 3)), ("q sparse", (1, 5)),
        ("p sparse", (1, 3)), ("q sparse", (1, 5)), ("p dense", (1, 3)), ("q dense", (1, 5)),
    ]  # fmt: skip
