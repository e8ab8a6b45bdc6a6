"""What a training would take, from shapes alone: the weights that train and their optimiser's state, activations, arithmetic."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch

from sparsec.calibrate import CalibrationData
from sparsec.calibrate.data import takes_tokens
from sparsec.calibrate.rehearsal import Rehearsal
from sparsec.calibrate.sites import find_sites
from sparsec.cost.phase import Phase
from sparsec.errors import RecoverError
from sparsec.ir.facts import Weight
from sparsec.ir.graph import Graph
from sparsec.pipeline.foreseen import Foreseen
from sparsec.recover.loop import Settings
from sparsec.recover.stretches import Stretches
from sparsec.recover.whole import KNOWN, TOGETHER

ACTIVATIONS = 3 << 27
"""Bytes of activations that are kept; further ones are computed again for their gradients."""
STATES = {"adamw": 8, "sgd": 4}
"""Bytes of an optimiser's state for every number that trains."""


class Trained(Protocol):
    """What a pass that trains is asked for."""

    @property
    def method(self) -> str:
        """As the pass has it."""

    @property
    def length(self) -> int | None:
        """Tokens of a piece."""

    @property
    def settings(self) -> Settings:
        """For the loop."""

    @property
    def shard(self) -> bool | None:
        """Whether ranks have shares of the weights."""


def training_phases(training: Trained, graph: Graph, foreseen: Foreseen, names: Sequence[str]) -> Iterator[Phase]:
    """One for each stretch of a training block by block, else one. names: weights that train. RecoverError for a plain module."""
    settings, length, blocks = training.settings, training.length, training.method == "blocks"
    if foreseen.data is None or not takes_tokens(graph):
        raise RecoverError("recover: a plan knows how to train on tokens alone; leave recover out of the plan")
    over = foreseen.ranks if training.shard else 1
    copied = blocks or foreseen.streaming or over > 1  # else what is in fp32 trains where it stands
    data = _pieces(graph, foreseen.data, length, 1 if blocks else settings.batch)
    linear = [w.name for w in graph.weights.values() if graph.prunable(w.name)]
    rehearsal = Rehearsal(graph, data, find_sites(graph, linear))
    weights = [graph.weights[name] for name in names]
    cut = [s.weights for s in Stretches(graph).stretches]
    stretches = cut if blocks else [tuple(linear)]
    largest = max(sum(w.numel for w in weights if w.name in read) for read in cut)
    whole = sum(w.numel for w in weights)
    states, filed = _states(graph, foreseen, blocks), blocks and foreseen.streaming
    for read in stretches:
        mine = [w for w in weights if w.name in read or (not blocks and len(w.shape) == 1)]
        if not mine:
            continue
        share = sum(w.numel for w in mine) / whole
        made = (
            2 * rehearsal.nbytes(rehearsal.between(read))
            if blocks
            else min(ACTIVATIONS, rehearsal.nbytes(rehearsal.storages))
        )
        steps = settings.steps or 0
        tokens = steps * settings.batch * (length or rehearsal.tokens)
        passes = 6 + 2  # forward and backward; and the teacher's forward
        dtype = mine[0].dtype
        yield Phase(
            "training",
            mine[0].name.rpartition(".")[0],
            {
                "weights, gradients and moments in training": sum(_each(w, settings, foreseen, copied) for w in mine)
                // over,
                "a stretch and its gradients, whole": 8 * largest if over > 1 else 0,
                "activations of a backward": made,
                "states of dense and pruned": 0 if filed else states,
            },
            {dtype: float(passes) * tokens * sum(w.numel for w in mine if len(w.shape) > 1)},
            float(steps) * sum(w.numel for w in mine) * 40,
            seconds=60 * settings.minutes * share if settings.minutes is not None else 0.0,
            files=sum(w.nbytes_dense for w in mine) if foreseen.streaming else 0,
            passing=states if filed else 0,
        )


def _states(graph: Graph, foreseen: Foreseen, blocks: bool) -> int:
    """Block by block what both models have between two stretches; else what is kept of the dense one."""
    tables = [w for w in graph.weights.values() if w.kind == "embedding"]
    if not tables or foreseen.data is None:
        return 0
    one = sum(call[0].numel() for call in foreseen.data.calls) * tables[0].shape[1] * tables[0].dtype.itemsize
    return 4 * one if blocks else min(KNOWN, one)


def _each(weight: Weight, settings: Settings, foreseen: Foreseen, copied: bool) -> int:
    """Of one weight: in fp32 itself, its gradient, its moments and the best values so far; and what is made of it in its dtype."""
    kept = 1 - foreseen.zeros.get(weight.name, 0.0)
    own = 0 if weight.dtype == torch.float32 and not copied else 4
    narrow = 0 if weight.dtype == torch.float32 else weight.dtype.itemsize
    return int(weight.numel * (own + 4 + STATES[settings.optimizer] + 4 * kept + narrow))


def _pieces(graph: Graph, data: CalibrationData, length: int | None, together: int) -> CalibrationData:
    """Two calls of as many pieces as are computed at once."""
    tokens = min(length or data.calls[0][0].shape[-1], data.calls[0][0].shape[-1])
    some = max(1, min(together, TOGETHER // tokens))
    mask = torch.ones(some, tokens, dtype=torch.int64, device="meta")
    calls = []
    for _ in range(2):
        given = {"input_ids": torch.zeros(some, tokens, dtype=torch.int64, device="meta"), "attention_mask": mask}
        calls.append(tuple(given[name] for name in graph.inputs))
    return CalibrationData(tuple(calls), "")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether that is what an error of torch or of Python tells."""
    texts = ("not enough memory", "out of memory", "can't allocate memory")
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(t in str(error).lower() for t in texts)
