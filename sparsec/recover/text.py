"""What is trained on: calibration data as single sequences, some of them held out to see whether training helps."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparsec.calibrate import CalibrationData
from sparsec.calibrate.data import takes_tokens
from sparsec.errors import DataError
from sparsec.ir.graph import Graph

Call = tuple[Tensor, ...]
LENGTH = 256
"""Tokens of a piece, at most, where nobody says another number."""
_HELD = 2048
"""Tokens, at most, that are held out; and no more than an eighth of all sequences."""


@dataclass(frozen=True, eq=False)
class TrainingText:
    """Calls of one sequence each, or a plain module's calls as they are. stackable: several make one call, one after the other.

    second: of another text, which is not trained on.
    """

    trained: tuple[Call, ...]
    held: tuple[Call, ...]
    source: str
    stackable: bool
    second: tuple[Call, ...] = ()
    second_source: str = ""


def training_text(graph: Graph, data: CalibrationData, length: int | None, batch: int) -> TrainingText:
    """Sequences that are trained on are cut into pieces of `length` tokens; those that are looked at stay whole.

    Raises DataError for a text too short to train on and to hold some out.
    """
    stackable = takes_tokens(graph)
    other = data.beside() if stackable else None
    data = data.training or data
    calls = _sequences(graph, data) if stackable else list(data.calls)
    if stackable and len(calls) < 2:
        calls = _cut(calls, length)
    if len(calls) < 2:
        raise DataError(
            f"recover: {data.source} gives {len(calls)} sequence, and training needs at least 2, one of them to be held out; take "
            "a longer text, more calibration_sequences=, or a shorter length="
        )
    tokens = max(1, sum(c[0].numel() if stackable else 1 for c in calls) // len(calls))
    held = max(1, min(len(calls) // 8, _HELD // tokens))
    # Held out from all over the text, the same ones for the same data.
    chosen = {round((i + 0.5) * len(calls) / held) for i in range(held)}
    trained = [c for i, c in enumerate(calls) if i not in chosen]
    trained = _cut(trained, length) if stackable else trained
    if len(trained) < batch:
        raise DataError(
            f"recover: a batch of {batch} sequences is more than the {len(trained)} that {data.source} leaves for training; "
            "lower batch= or length=, or take a longer text"
        )
    return TrainingText(
        tuple(trained),
        tuple(c for i, c in enumerate(calls) if i in chosen),
        data.source,
        stackable,
        () if other is None else tuple(_sequences(graph, other)),
        "" if other is None else other.source,
    )


def _sequences(graph: Graph, data: CalibrationData) -> list[Call]:
    place = graph.inputs.index("input_ids")
    ones: dict[torch.Size, Tensor] = {}
    found = []
    for call in data.calls:
        for row in torch.split(call[place], 1):
            if row.shape[1] > 1:
                mask = ones.setdefault(row.shape, torch.ones_like(row))
                found.append(tuple(row if name == "input_ids" else mask for name in graph.inputs))
    return found


def _cut(calls: list[Call], length: int | None) -> list[Call]:
    """As few pieces of each sequence as `length` tokens allow, as even as they can be: no token is lost, and none stands alone."""
    found: list[Call] = []
    for call in calls:
        tokens = call[0].shape[1]
        count = 1 if length is None else min(-(-tokens // length), tokens // 2)
        found += zip(*(torch.tensor_split(tensor, count, dim=1) for tensor in call), strict=True)
    return found
