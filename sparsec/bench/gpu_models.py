"""Decoding of whole models on a GPU: a static cache, every token one replay of a CUDA graph, dense and sparse in turns.

So what is compared is the work of the GPU and not of Python. Each model is recorded as it is and, where asked for, under
torch.compile; the headline is the best sparse mode against the best dense one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from sparsec import memory
from sparsec.bench.gpu import Deadline, said
from sparsec.bench.models import random_model
from sparsec.console.command import DTYPES
from sparsec.pipeline import Pipeline
from sparsec.progress import Progress
from sparsec.study.variants import compiled_by
from sparsec.timing.recorded import Decoder
from sparsec.timing.spread import Spread, ratio
from sparsec.timing.turns import WARM_UP, take_turns

PROMPT_TOKENS = 64
TOKENS = 16
"""Decoded in each round."""
NO_TIME = "no time was left; give more with --budget"
PASSES = "magnitude({sparsity}, scope='layer'),freeze,sparsity,lower(wcsr)"


@dataclass(frozen=True)
class Decoded:
    """One model in one mode."""

    model: str
    layers: int
    dtype: str
    variant: str  # "dense", or its sparsity
    mode: str  # "graph", "compiled graph", or "eager" where no graph could be recorded
    note: str  # why not, or why it did not run
    seconds: Spread | None  # per token; None where it did not run
    speedup: Spread | None  # over dense in the same mode, by round; None where dense did not run in it
    nbytes: int  # of all parameters and buffers


@torch.no_grad()
def time_decoding(
    name: str,
    dtype: str,
    sparsities: Sequence[float],
    device: torch.device,
    rounds: int,
    layers: int | None = None,
    deadline: Deadline | None = None,
    compiling: Deadline | None = None,
    progress: Progress | None = None,
    model: Callable[..., Any] = random_model,
    tokens: int = TOKENS,
    passes: str = PASSES,
) -> list[Decoded]:
    """Times a model with random weights, dense and at every sparsity. The dense one comes first in each mode.

    deadline: after it no further sparse model is made. compiling: after it, and without one, nothing is run under torch.compile,
    which takes minutes. What was not begun, or failed, is a line with its reason.
    """
    dense = model(name, DTYPES[dtype], layers, device=device)
    prompt = torch.arange(PROMPT_TOKENS)[None] % dense.config.vocab_size
    variants = {"dense": dense}
    found = []
    for sparsity in sparsities:
        variant = f"{sparsity:.0%} zero"
        if deadline is not None and deadline.over:
            found.append(_without(name, dense, dtype, variant, False, NO_TIME))
            continue
        try:
            pipeline = Pipeline.parse(passes.replace("{sparsity}", repr(sparsity)))
            variants[variant] = compiled_by({variant: pipeline}, dense, progress=progress)[variant]
        except Exception as error:  # of triton, of the driver, of torch
            found.append(_without(name, dense, dtype, variant, False, said(error)))
    for way in (False, True):
        if way and compiling is None:
            break
        decoders: dict[str, Decoder] = {}
        for variant, candidate in variants.items():
            if way and compiling is not None and compiling.over:
                found.append(_without(name, dense, dtype, variant, way, NO_TIME))
                continue
            try:
                decoders[variant] = Decoder(candidate, prompt, tokens * (WARM_UP + rounds), way)
            except Exception as error:  # of triton, of the driver, of torch
                if variant == "dense" and not way:
                    raise
                found.append(_without(name, dense, dtype, variant, way, said(error)))
        failed: dict[str, str] = {}
        cases = [partial(_seconds, variant, decoder, tokens, failed) for variant, decoder in decoders.items()]
        times = dict(zip(decoders, take_turns(cases, rounds), strict=True))
        found += [_without(name, dense, dtype, variant, way, why) for variant, why in failed.items()]
        base = None if "dense" in failed else times.get("dense")
        for variant, decoder in decoders.items():
            if variant in failed:
                continue
            own = times[variant]
            found.append(
                Decoded(
                    name,
                    dense.config.num_hidden_layers,
                    dtype,
                    variant,
                    decoder.mode,
                    decoder.note,
                    Spread.of(own),
                    None if base is None else ratio(base, own),
                    memory.held(variants[variant]).total,
                )
            )
    return found


def _seconds(variant: str, decoder: Decoder, tokens: int, failed: dict[str, str]) -> float:
    """Per token; one that fails is named, and not run again."""
    if variant not in failed:
        try:
            return decoder.seconds(tokens)
        except Exception as error:  # of the driver, of torch
            failed[variant] = said(error)
    return math.nan


def headlines(found: Sequence[Decoded]) -> list[str]:
    """For every model and sparsity, the best sparse mode over the best dense one."""
    times = [(m, m.seconds.median) for m in found if m.seconds is not None]
    lines = []
    for model, variant in dict.fromkeys((m.model, m.variant) for m in found):
        own, base = (
            min(((s, m.mode) for m, s in times if (m.model, m.variant) == (model, wanted)), default=None)
            for wanted in (variant, "dense")
        )
        if own is not None and base is not None and variant != "dense":
            lines.append(
                f"- {model}, {variant}: {base[0] / own[0]:.2f}x, {1e3 * own[0]:.3f} ms a token ({own[1]}) against "
                f"{1e3 * base[0]:.3f} dense ({base[1]})"
            )
    return lines


def _without(name: str, dense: Any, dtype: str, variant: str, compiled: bool, why: str) -> Decoded:
    """A mode that did not run: no time, and the reason."""
    mode = "compiled graph" if compiled else "graph"
    return Decoded(name, dense.config.num_hidden_layers, dtype, variant, mode, why, None, None, 0)
