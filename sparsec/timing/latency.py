"""Latency, always as a comparison: the models take turns, so that a slow moment of a shared machine meets all of them.

Prefill is one forward over a prompt, which is all that an encoder does; decode is one token with the key-value cache of that
prompt, batch 1. Under no_grad, as `generate()` runs, and not under inference_mode, where fused products are not shared
(kernels/modules/group.py). On a GPU time is told by events; there a token is one replay of a CUDA graph (recorded.py), and a layer
one of several by cold copies of it.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sparsec.kv_cache import cache_argument, cache_of
from sparsec.progress import Progress, each_of
from sparsec.timing.others import Others
from sparsec.timing.recorded import Decoder
from sparsec.timing.replay import ROTATE_BYTES, Replay, copies
from sparsec.timing.spread import Spread, ratio
from sparsec.timing.turns import WARM_UP, clocked, take_turns


@dataclass(frozen=True)
class Latency:
    """Of one model."""

    prefill_ms: Spread
    decode_ms: Spread | None  # per token; None of what decodes nothing


@dataclass(frozen=True)
class Comparison:
    """Latencies of several models, and how much faster each is than the first: per round, so with its own spread."""

    latencies: dict[str, Latency]
    prefill_speedup: dict[str, Spread]
    decode_speedup: dict[str, Spread]
    notes: tuple[str, ...] = ()  # on how it was measured
    prefill_rounds: dict[str, tuple[float, ...]] = field(default_factory=dict)  # milliseconds, by round
    decode_rounds: dict[str, tuple[float, ...]] = field(default_factory=dict)
    others: float | None = None  # cores that everybody else kept busy meanwhile; None where the system does not tell

    def beside(self, other: Comparison) -> Comparison:
        """Both together, where they were measured one after another: ratios are those of medians to the first model of this one."""
        latencies = self.latencies | other.latencies
        base = next(iter(latencies.values()))
        return Comparison(
            latencies,
            self.prefill_speedup | {n: _apart(base.prefill_ms, own.prefill_ms) for n, own in other.latencies.items()},
            self.decode_speedup
            | {
                n: _apart(base.decode_ms, own.decode_ms)
                for n, own in other.latencies.items()
                if base.decode_ms is not None and own.decode_ms is not None
            },
            tuple(dict.fromkeys((*self.notes, *other.notes))),
            others=max((o for o in (self.others, other.others) if o is not None), default=None),
        )

    def over(self, base: str, name: str) -> tuple[Spread, Spread | None]:
        """How many times as fast as `base` one is in prefill and decode: by round where both took turns."""
        one, two = self.latencies[base], self.latencies[name]
        prefill = _faster(self.prefill_rounds, base, name) or _apart(one.prefill_ms, two.prefill_ms)
        if one.decode_ms is None or two.decode_ms is None:
            return prefill, None
        return prefill, _faster(self.decode_rounds, base, name) or _apart(one.decode_ms, two.decode_ms)


@torch.no_grad()
def compare_latency(
    models: Mapping[str, Any],
    prompt: Tensor,
    repeats: int,
    decode_repeats: int | None,
    progress: Progress | None = None,
    seconds: float | None = None,
) -> Comparison:
    """Times language models on a prompt of token ids [1, tokens]; the first one is the baseline of the speedups.

    decode_repeats: None for encoders. seconds: a time budget, of prefill and of decoding half each; fewer rounds are run where it
    ends.
    """
    half = None if seconds is None else seconds / (1 if decode_repeats is None else 2)
    others = Others()
    on_gpu = any(next(model.parameters()).is_cuda for model in models.values())
    forwards = {n: _prefill(m, prompt, decode_repeats is not None) for n, m in models.items()}
    prefill = _by_name(forwards, repeats, progress, "timing prefill", half)
    if decode_repeats is None:
        return Comparison(
            {name: Latency(Spread.of(times), None) for name, times in prefill.items()},
            _ratios(prefill),
            {},
            prefill_rounds={name: tuple(values) for name, values in prefill.items()},
            others=others.cores(),
        )
    notes: list[str] = []
    if on_gpu:
        decoders = {name: Decoder(model, prompt, WARM_UP + decode_repeats) for name, model in models.items()}
        cases: dict[str, Callable[[], float]] = {name: d.seconds for name, d in decoders.items()}
        notes = [
            f"decoding of {name}: {d.note}, so its launches are in its times" for name, d in decoders.items() if d.note
        ]
        notes.append(
            "decoding: a static cache, each token one replay of a CUDA graph; times are those of events on the GPU"
        )
    else:
        cases = {name: _decode(model, prompt) for name, model in models.items()}
    decode = _by_name(cases, decode_repeats, progress, "timing decode", half)
    return Comparison(
        {name: Latency(Spread.of(prefill[name]), Spread.of(decode[name])) for name in models},
        _ratios(prefill),
        _ratios(decode),
        tuple(notes),
        {name: tuple(values) for name, values in prefill.items()},
        {name: tuple(values) for name, values in decode.items()},
        others.cores(),
    )


def _by_name(
    cases: Mapping[str, Callable[[], float]], rounds: int, progress: Progress | None, what: str, seconds: float | None
) -> dict[str, list[float]]:
    """Milliseconds, by name and round."""
    times = take_turns(list(cases.values()), rounds, WARM_UP, progress, what, seconds)
    return {name: [1e3 * t for t in own] for name, own in zip(cases, times, strict=True)}


def _apart(base: Spread, own: Spread) -> Spread:
    """The same of two that were not measured in the same rounds."""
    return Spread(base.median / own.median, base.median / own.upper, base.median / own.lower, own.repeats)


def _faster(rounds: Mapping[str, tuple[float, ...]], base: str, name: str) -> Spread | None:
    """By round; None where both were not measured in the same ones."""
    return ratio(rounds[base], rounds[name]) if base in rounds and name in rounds else None


def _ratios(times: Mapping[str, list[float]]) -> dict[str, Spread]:
    base = next(iter(times.values()))
    return {name: ratio(base, own) for name, own in times.items()}


def _prefill(model: Any, prompt: Tensor, cached: bool) -> Callable[[], float]:
    prompt = prompt.to(next(model.parameters()).device)
    options = {"use_cache": True} if cached else {}

    def forward() -> None:
        model(input_ids=prompt, **options)

    return partial(Replay.several, forward, 1, prompt.device)


def _decode(model: Any, prompt: Tensor) -> Callable[[], float]:
    """Every call decodes one token further, as generation does."""
    state = model(input_ids=prompt, use_cache=True)
    takes = cache_argument(model)
    cache, token = cache_of(state), state.logits[:, -1:].argmax(dim=-1)
    del state

    def run() -> None:
        nonlocal cache, token
        out = model(input_ids=token, use_cache=True, **{takes: cache})
        cache, token = cache_of(out), out.logits[:, -1:].argmax(dim=-1)

    return clocked(run)


@dataclass(frozen=True)
class PairTime:
    """Of the two sides of a pair of layers, medians over rounds; the speedup is that of the ratios of a round."""

    speedup: float
    dense_ms: float  # of all modules of the first side
    ms: float  # of the second

    @classmethod
    def of(cls, rounds: Sequence[tuple[float, float]]) -> PairTime:
        """From the seconds of both sides, by round."""
        first, second = zip(*rounds, strict=True)
        ratios = [ours / theirs for ours, theirs in rounds]
        return cls(statistics.median(ratios), 1e3 * statistics.median(first), 1e3 * statistics.median(second))


@torch.no_grad()
def layer_times(
    pairs: Mapping[str, tuple[Sequence[nn.Module], Sequence[nn.Module]]],
    rounds: int,
    progress: Progress | None = None,
    seconds: float | None = None,
    rows: int = 1,
) -> dict[str, PairTime]:
    """Times of the first and of the second for pairs of linear layers, at so many rows, and their ratio.

    A pair holds one module each, or those of a fused product in their order, which are given the very same row. Every round
    goes through all the first ones, then through all the second ones, as decoding with one or the other goes through all layers:
    a small layer looped by itself would be timed in a cache that it never finds warm, and one between layers of another kind
    in company that it never has. The first ones have `in_features` or a Conv1D's `weight` [in, out]. On a GPU each pair goes by
    itself, see `replayed_time`. seconds: a time budget for the rounds.
    """
    if any(dense[0].weight.is_cuda for dense, _ in pairs.values()):
        return _replayed_times(pairs, rounds, rows, progress)
    given = {name: _rows(dense[0], rows) for name, (dense, _) in pairs.items()}

    def walk(side: int) -> dict[str, float]:
        return {name: clocked(partial(_through, pair[side], given[name]))() for name, pair in pairs.items()}

    dense, other = take_turns([partial(walk, 0), partial(walk, 1)], rounds, WARM_UP, progress, "timing layers", seconds)
    times = list(zip(dense, other, strict=True))
    return {name: PairTime.of([(ours[name], theirs[name]) for ours, theirs in times]) for name in pairs}


def _rows(dense: nn.Module, rows: int) -> Tensor:
    weight = dense.weight
    assert isinstance(weight, Tensor)
    in_features = dense.in_features if isinstance(dense, nn.Linear) else weight.shape[0]
    return torch.randn(rows, in_features, dtype=weight.dtype, device=weight.device)


def _through(modules: Sequence[nn.Module], x: Tensor) -> None:
    for module in modules:
        module(x)


def _replayed_times(
    pairs: Mapping[str, tuple[Sequence[nn.Module], Sequence[nn.Module]]],
    rounds: int,
    rows: int,
    progress: Progress | None,
) -> dict[str, PairTime]:
    found = {}
    for name, (dense, other) in each_of(progress, "timing layers", pairs.items()):
        found[name] = replayed_time(dense, other, rounds, rows=rows)
    return found


def replayed_time(
    dense: Sequence[nn.Module], other: Sequence[nn.Module], rounds: int, rotate_bytes: int = ROTATE_BYTES, rows: int = 1
) -> PairTime:
    """Of one pair, each side by copies of `rotate_bytes` in all, so that they are cold."""
    x = _rows(dense[0], rows)
    replays = []
    for modules in (dense, other):
        nbytes = sum(t.nbytes for m in modules for t in (*m.parameters(), *m.buffers()))
        twins = [copy.deepcopy(m) for _ in range(copies(nbytes, rotate_bytes)) for m in modules]
        replays.append(Replay([partial(twin, x) for twin in twins], x.device))
    ours, theirs = take_turns([r.seconds for r in replays], rounds, warm_up=1)
    return PairTime.of([(a * len(dense), b * len(other)) for a, b in zip(ours, theirs, strict=True)])
