"""Whole models: tokens per second, dense against sparse, each eager and, where asked for, under torch.compile.

dense is the stock model; masked has the zeros of the first sparse variant on torch's kernels, which skip none; dense on sparsec's
kernels has no zeros, so that what kernels give and what zeros give can be told apart; with quantised values what rounding gives.
Peers (peers.py) are other engines with the dense model, each compared within its class of precision.

All modes take turns in every round. A round decodes some tokens one after another, as generation does, so that what a mode
keeps in the caches helps it. The headline is the best mode of sparsec against the best dense one, and against the best dense one
on sparsec's kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from time import sleep
from typing import Any

import torch
from torch import Tensor

from sparsec import private
from sparsec.bench.peers import CLASSES, SETTLE, Peer
from sparsec.bench.session import Session
from sparsec.bench.steps import Step, step_of
from sparsec.defaults import DEFAULT_PASSES
from sparsec.errors import DataError
from sparsec.formats.layout import Layout
from sparsec.formats.values import Codec
from sparsec.passes.lower import AUTO, Lower
from sparsec.pipeline import Pipeline
from sparsec.progress import Progress
from sparsec.report.words import dense_bound
from sparsec.study.variants import ON_SPARSEC, compiled_by, masked_stock
from sparsec.timing.spread import Spread, ratio
from sparsec.timing.turns import WARM_UP, clocked, take_turns

Beside = Callable[[Any, Tensor, int], AbstractContextManager[list[Peer]]]
CODED = {8: "int8", 4: "int4"}
"""Classes of precision of quantised values, by bits."""
PLACEHOLDER = "{sparsity}"
PASSES = DEFAULT_PASSES.replace("magnitude(0.5)", f"magnitude({PLACEHOLDER})")
SHARE_TOKENS = 8


@dataclass(frozen=True)
class DecodingEffort:
    """How much is measured."""

    prompt_tokens: int = 64
    new_tokens: int = 4  # decoded in each round
    repeats: int = 20
    compiled: bool = False

    @property
    def positions(self) -> int:
        """That prompt and decoded tokens take."""
        return self.prompt_tokens + self.new_tokens * (WARM_UP + self.repeats) + SHARE_TOKENS + 1


@dataclass(frozen=True)
class Recipe:
    """What the model is compiled to; `passes` is None for what runs on torch's kernels."""

    name: str
    passes: str | None = None
    whole: bool = False  # all weights, zeros or not: dense on sparsec's kernels
    peer: str = ""  # of another engine with the dense model: its class of precision

    @property
    def backend(self) -> str:
        """Of torch.compile."""
        return "inductor" if self.passes is None else "sparsec"

    @property
    def sparse(self) -> bool:
        """Whether sparsec made its zeros fast, or tried to."""
        return self.passes is not None and not self.whole

    @property
    def values(self) -> str:
        """The codec that its weights are packed with; "" for plain values, and where several may be."""
        named = [p for p in Pipeline.parse(self.passes or "").passes if isinstance(p, Lower) and p.layout != AUTO]
        return Layout.parse(named[0].layout).values if named else ""


STOCK = Recipe("dense")
MASKED = Recipe("masked")
DENSE_ON_SPARSEC = Recipe("dense on sparsec's kernels", ON_SPARSEC, whole=True)
QUANTISED = ("int8", "int4g64")
"""Values of the dense models on sparsec's kernels that are timed beside that of plain ones."""


def dense_on_sparsec(values: str) -> Recipe:
    """No zeros, in quantised values."""
    return Recipe(f"dense:{values} on sparsec's kernels", f"fuse,lower('dense:{values}')", whole=True)


@dataclass(frozen=True)
class Mode:
    """One variant, eager or compiled."""

    variant: Recipe
    compiled: bool
    cache: str  # "dynamic", or "static"
    prefill_ms: tuple[float, ...]  # by round
    decode_ms: tuple[float, ...]  # per token, by round
    step: Step | None  # what a token is made of
    bound: str | None = None  # in words: the bytes that stay dense, and so the smallest that the model can become

    @property
    def name(self) -> str:
        """As it is shown."""
        return (
            self.variant.name
            if self.variant.peer
            else f"{self.variant.name} {'compiled' if self.compiled else 'eager'}"
        )

    @property
    def tokens_per_second(self) -> float:
        """Of decoding."""
        return 1e3 / Spread.of(self.decode_ms).median

    def precision(self, dtype: str) -> str:
        """The class that it is compared in: fp32, bf16, fp16, int8 or int4; dtype: of the run."""
        bits = Codec.parse(self.variant.values).bits if self.step is None else self.step.bits
        return self.variant.peer or CODED.get(bits, dtype)


@dataclass(frozen=True)
class AgainstPeer:
    """A mode of sparsec against the best peer of its class: how many times as fast."""

    mode: Mode
    peer: Mode  # of decoding
    decode: Spread
    prefill_peer: Mode
    prefill: Spread


@dataclass(frozen=True)
class Headline:
    """The best mode of a sparse variant against the best dense one: how many times as fast."""

    variant: Recipe
    sparse: Mode
    dense: Mode
    decode: Spread
    prefill: Spread  # each with its best mode there
    zeros: Spread | None = None  # decoding, against the best dense mode on sparsec's kernels with the same values


def recipes(passes: str | None, sparsities: Sequence[float]) -> list[Recipe]:
    """Of a specification with `{sparsity}` one for each, else one; checked, so that errors come before models are loaded."""
    wanted = PASSES if passes is None else passes
    found = (
        [Recipe(f"{s:.0%} zero", wanted.replace(PLACEHOLDER, repr(s))) for s in sparsities]
        if PLACEHOLDER in wanted
        else [Recipe("sparse", wanted)]
    )
    for variant in found:
        Pipeline.parse(variant.passes or "").validate()
    return found


def time_modes(
    model: Any,
    wanted: Sequence[Recipe],
    effort: DecodingEffort,
    progress: Progress | None = None,
    peers: Beside | None = None,
) -> list[Mode]:
    """Times all modes of a dense model [batch 1], itself first, and peers last. DataError when it has not enough positions.

    peers: gives those of a model, a prompt and a number of positions.
    """
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is not None and effort.positions > limit:
        raise DataError(
            f"prompt and decoded tokens need {effort.positions} positions, the model has {limit}; take fewer --prompt-tokens, "
            "--new-tokens or --repeats"
        )
    codecs = dict.fromkeys((*QUANTISED, *filter(None, (v.values for v in wanted))))
    every = (DENSE_ON_SPARSEC, *map(dense_on_sparsec, codecs), *wanted)
    specs = {v: Pipeline.parse(v.passes or "") for v in every}
    models = {STOCK: model, MASKED: model, **compiled_by(specs, model, progress=progress)}
    models[MASKED] = masked_stock(model, models[wanted[0]])
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(model.config.vocab_size, (1, effort.prompt_tokens), generator=generator)
    kinds = [(variant, compiled) for variant in models for compiled in ((False, True) if effort.compiled else (False,))]
    # Every compiled variant and every shape is one more version of the same forward.
    config = private.optional("torch._dynamo.config") if effort.compiled else None
    with (
        nullcontext() if config is None else config.patch(recompile_limit=4 * len(kinds) + 8),
        nullcontext([]) if peers is None else peers(model, prompt, effort.positions) as others,
    ):
        sessions = [
            Session(models[v], prompt, effort.positions, v.backend if compiled else None) for v, compiled in kinds
        ]
        cases = [_settled(s.prefill, others) for s in sessions] + [partial(p.turn, p.prefill) for p in others]
        prefill = _rounds(cases, effort.repeats, progress, "timing prefill")
        for peer in others:
            peer.compare(sessions[0].token)
        decoding = [partial(s.decode, effort.new_tokens) for s in sessions]
        cases = [_settled(decode, others) for decode in decoding]
        cases += [partial(p.turn, partial(p.decode, effort.new_tokens)) for p in others]
        decode = _rounds(cases, effort.repeats, progress, "timing decode")
    found = [
        Mode(
            variant,
            compiled,
            session.cache,
            tuple(before),
            tuple(ms / effort.new_tokens for ms in after),
            step_of(models[variant], session.decode, SHARE_TOKENS, compiled),
            dense_bound(models[variant].sparsec.report()) if variant.sparse else None,
        )
        for (variant, compiled), session, before, after in zip(kinds, sessions, prefill, decode, strict=False)
    ]
    for peer, before, after in zip(others, prefill[len(kinds) :], decode[len(kinds) :], strict=True):
        if not peer.failed:
            variant = Recipe(peer.name, peer=CLASSES[peer.type])
            per_token = tuple(ms / effort.new_tokens for ms in after)
            found.append(Mode(variant, False, "its own", tuple(before), per_token, None))
    return found


def headlines(modes: Sequence[Mode]) -> list[Headline]:
    """One for each sparse variant."""
    dense = [m for m in modes if m.variant == STOCK]
    found = []
    for variant in dict.fromkeys(m.variant for m in modes if m.variant.sparse):
        own_dense = [m for m in modes if m.variant.whole and m.variant.values == variant.values]
        own = [m for m in modes if m.variant == variant]
        base, best = _best(dense, _decode), _best(own, _decode)
        prefill = ratio(_best(dense, _prefill).prefill_ms, _best(own, _prefill).prefill_ms)
        zeros = ratio(_best(own_dense, _decode).decode_ms, best.decode_ms) if own_dense else None
        found.append(Headline(variant, best, base, ratio(base.decode_ms, best.decode_ms), prefill, zeros))
    return found


def against_peers(modes: Sequence[Mode], dtype: str) -> list[AgainstPeer]:
    """One for each mode of sparsec whose class has a peer."""
    found = []
    for mode in modes:
        if mode.variant.passes is None:
            continue
        peers = [m for m in modes if m.variant.peer == mode.precision(dtype)]
        if not peers:
            continue
        decode, prefill = _best(peers, _decode), _best(peers, _prefill)
        ratios = ratio(decode.decode_ms, mode.decode_ms), ratio(prefill.prefill_ms, mode.prefill_ms)
        found.append(AgainstPeer(mode, decode, ratios[0], prefill, ratios[1]))
    return found


def _settled(call: Callable[[], object], others: Sequence[Peer]) -> Callable[[], float]:
    """A case of turns; beside peers it begins when their threads have stopped waiting actively."""
    timed = clocked(call)

    def case() -> float:
        if others:
            sleep(SETTLE)
        return timed()

    return case


def _best(modes: Sequence[Mode], times: Callable[[Mode], tuple[float, ...]]) -> Mode:
    return min(modes, key=lambda m: Spread.of(times(m)).median)


def _decode(mode: Mode) -> tuple[float, ...]:
    return mode.decode_ms


def _prefill(mode: Mode) -> tuple[float, ...]:
    return mode.prefill_ms


def _rounds(
    cases: Sequence[Callable[[], float]], repeats: int, progress: Progress | None, what: str
) -> list[list[float]]:
    """Milliseconds."""
    times = take_turns(cases, repeats, WARM_UP, progress, what)
    return [[1e3 * t for t in own] for own in times]
