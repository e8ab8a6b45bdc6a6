"""Decoding of whole models on a GPU: a static cache, every token one replay of a CUDA graph, dense and sparse in turns.

So what is compared is the work of the GPU and not of Python. Each model is recorded as it is and, where asked for, under
torch.compile; the headline is the best sparse mode against the best dense one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sparsec.bench.gpu import Deadline
from sparsec.bench.models import random_model
from sparsec.command import DTYPES
from sparsec.compiler import compile
from sparsec.errors import SparsecError
from sparsec.latency import Spread, ratio
from sparsec.progress import Progress
from sparsec.recorded import Decoder

PROMPT_TOKENS = 64
TOKENS = 16
"""Decoded in each round."""
WARM_UP = 2
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
    speedup: Spread | None  # over dense in the same mode, by round
    nbytes: int  # of all parameters and buffers


@torch.no_grad()
def decode(
    name: str,
    dtype: str,
    sparsities: Sequence[float],
    device: torch.device,
    rounds: int,
    layers: int | None = None,
    deadline: Deadline | None = None,
    progress: Progress | None = None,
    model: Callable[..., Any] = random_model,
    tokens: int = TOKENS,
    passes: str = PASSES,
) -> list[Decoded]:
    """Times a model with random weights, dense and at every sparsity. The dense one comes first in each mode.

    deadline: after it, and without one, nothing is run under torch.compile, which takes minutes.
    """
    dense = model(name, DTYPES[dtype], layers, device=device)
    prompt = torch.arange(PROMPT_TOKENS)[None] % dense.config.vocab_size
    variants = {"dense": dense}
    for sparsity in sparsities:
        spec = passes.replace("{sparsity}", repr(sparsity))
        variants[f"{sparsity:.0%} zero"] = compile(dense, spec, progress=progress)
    found = []
    for way in (False, True):
        if way and (deadline is None or deadline.over):
            break
        decoders: dict[str, Decoder] = {}
        for variant, candidate in variants.items():
            try:
                decoders[variant] = Decoder(candidate, prompt, tokens * (WARM_UP + rounds), way)
            except (RuntimeError, SparsecError) as error:
                if variant == "dense" and not way:
                    raise
                found.append(_failed(name, dense, dtype, variant, way, error))
        times: dict[str, list[float]] = {variant: [] for variant in decoders}
        for turn in range(WARM_UP + rounds):
            for variant, decoder in decoders.items():
                seconds = decoder.seconds(tokens)
                if turn >= WARM_UP:
                    times[variant].append(seconds)
        base = times.get("dense")
        for variant, decoder in decoders.items():
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
                    ratio(base if base is not None else own, own),
                    _nbytes(variants[variant]),
                )
            )
    return found


def _failed(name: str, dense: Any, dtype: str, variant: str, compiled: bool, error: Exception) -> Decoded:
    """A mode that could not run: no time, and the reason."""
    mode = "compiled graph" if compiled else "graph"
    said = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
    return Decoded(name, dense.config.num_hidden_layers, dtype, variant, mode, said, None, None, 0)


def _nbytes(model: Any) -> int:
    tensors = {t.data_ptr(): t.nbytes for t in (*model.parameters(), *model.buffers())}
    return sum(tensors.values())
