"""What a model is run on to be calibrated: tokens for a language model, example inputs for a plain module."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from sparsec.arguments import check_seed, checked
from sparsec.calibrate.sequences import MOST, Sequences
from sparsec.data.text import Text, load_text, second_text
from sparsec.data.tokens import cut_text
from sparsec.defaults import CALIBRATION_LENGTH, CALIBRATION_SEQUENCES
from sparsec.errors import DataError
from sparsec.ir.graph import Graph

BESIDE = 2
"""Sequences of another text than the one that is trained on, to tell how that fares."""
_TOKENS_PER_CALL = 1024
_CALLS_PER_RANK = 4
"""At least, where there are so many sequences: one call more or less is then little."""
_NO_LABEL = -100
INPUTS = frozenset({"input_ids", "attention_mask"})
"""What a graph may take and still be calibrated on tokens alone."""


@dataclass(frozen=True, eq=False)
class CalibrationData:
    """Calls of a graph.

    calls: for each call the arguments, in the order of `graph.inputs`; an argument that is the same for all calls is the same
    object. source: in words, with the number of sequences and the seed.
    """

    calls: tuple[tuple[Tensor, ...], ...]
    source: str
    training: CalibrationData | None = None  # what to train on, where that is more
    beside: Callable[[], CalibrationData | None] = lambda: None  # some of another text, where there is a tokenizer

    @property
    def uniform(self) -> bool:
        """Whether all calls have the same shapes."""
        return len({tuple(tuple(t.shape) for t in call) for call in self.calls}) == 1

    @property
    def sha256(self) -> str:
        """Of all calls: the same data give the same."""
        found = hashlib.sha256()
        for tensor in (t.detach().cpu().contiguous() for call in self.calls for t in call):
            found.update(f"{tensor.dtype} {list(tensor.shape)};".encode())
            found.update(tensor.flatten().view(torch.uint8).numpy().data)
        return found.hexdigest()

    @property
    def device(self) -> torch.device:
        """Where the arguments are."""
        return self.calls[0][0].device


@checked
def windows(
    text: str | Text | None,
    tokenizer: Any,
    sequences: int = CALIBRATION_SEQUENCES,
    length: int | None = None,
    seed: int = 0,
    limit: int | None = None,
    bos: bool = True,
) -> tuple[Tensor, str]:
    """Token ids [sequences, length] out of a text, and in words where they come from.

    text: a file, `dataset:NAME[,...]` (of its split train, if none is named), a Text, or None for the second half of the embedded
    text (its first half is what evaluation starts with). It is tokenised as one string; windows do not overlap and are drawn at
    random by the seed.
    length: None takes 1024, or what the model takes (`limit`) if that is less. bos: where the tokenizer begins texts with a BOS, so
    does every window. Raises DataError when the text is too short.
    """
    found = from_text(text, tokenizer, sequences, length, seed, limit, bos)
    assert isinstance(found.tokens, Tensor)
    return found.tokens, found.source


def from_text(
    text: str | Text | None, tokenizer: Any, sequences: int, length: int | None, seed: int, limit: int | None, bos: bool
) -> Sequences:
    """As `windows`; and with them the whole text as such sequences, and some of another text."""
    if tokenizer is None:
        raise DataError("calibration on a text needs a tokenizer: give tokenizer=..., or token ids [sequences, length]")
    if limit is not None and length is not None and length > limit:
        raise DataError(f"calibration length {length} is more than the model's {limit} positions; take {limit} or less")
    length = min(CALIBRATION_LENGTH, limit or CALIBRATION_LENGTH) if length is None else length
    if not isinstance(length, int) or not isinstance(sequences, int) or sequences < 1 or length < 2:
        raise DataError(
            f"calibration needs at least 1 sequence of at least 2 tokens, got {sequences!r} of {length!r}; take more"
        )
    read = text if isinstance(text, Text) else load_text(text, split="train")
    content = read.content[len(read.content) // 2 :] if text is None else read.content
    name = f"{read.name}, second half" if text is None else read.name
    cut = cut_text(content, tokenizer, length, bos)
    if len(cut.windows) < sequences:
        raise DataError(
            f"{name}: too little text to calibrate on: {cut.tokens} tokens, {sequences} sequences of {length} need "
            f"{cut.need(sequences)}; take fewer or shorter sequences, or a longer text"
        )
    generator = torch.Generator().manual_seed(check_seed(seed))
    chosen = torch.randperm(len(cut.windows), generator=generator)[:sequences].sort().values
    source = f"{sequences} sequences of {length} tokens of {name} (sha256 {read.sha256[:16]}, seed {seed})"
    whole = cut.windows[: MOST // length]
    named = f"{len(whole)} sequences of {length} tokens, all of {name} (sha256 {read.sha256[:16]}), {cut.beginning.protocol}"
    return Sequences(
        cut.windows[chosen],
        f"{source}, {cut.beginning.protocol}",
        text=(whole, named),
        beside=another_text(read.name, tokenizer, length, bos),
    )


def another_text(name: str, tokenizer: Any, length: int, bos: bool) -> Callable[[], tuple[Tensor, str]] | None:
    """Gives a few sequences of another text than the one of that name, and what they are; None without a tokenizer."""
    if tokenizer is None:
        return None

    def some() -> tuple[Tensor, str]:
        other = second_text(name)
        tokens = cut_text(other.content, tokenizer, length, bos).windows[:BESIDE]
        return tokens, f"{len(tokens)} sequences of {length} tokens of {other.name} (sha256 {other.sha256[:16]})"

    return some


@checked
def samples(graph: Graph, tokens: Tensor | Sequence[Tensor], source: str) -> CalibrationData:
    """Calls of a language model's graph from token ids: [sequences, length], or one vector for each sequence.

    Sequences of one length go some at a time, up to 1024 tokens together; their order does not count. Raises DataError for ids that
    are no ids of this model, and for a graph that takes more than tokens.
    """
    device = next(graph.module.parameters()).device
    if not takes_tokens(graph):
        raise DataError(
            f"this graph takes {', '.join(graph.inputs)}, so it cannot be calibrated on tokens; give calibration= a list of "
            "calls, each a tuple of tensors in that order"
        )
    groups = _groups(tokens)
    vocabulary = _vocabulary(graph)
    for ids in groups:
        _check_ids(ids, vocabulary)
    ones: dict[torch.Size, Tensor] = {}
    calls = []
    for ids in groups:
        mask = ones.setdefault(ids.shape, torch.ones(ids.shape, dtype=torch.int64, device=device))
        given = {"input_ids": ids.to(device, torch.int64), "attention_mask": mask}
        calls.append(tuple(given[name] for name in graph.inputs))
    return CalibrationData(tuple(calls), source)


@checked
def takes_tokens(graph: Graph) -> bool:
    """Whether it can be called with token ids and nothing else."""
    return set(graph.inputs) <= INPUTS and "input_ids" in graph.inputs


def spread(data: CalibrationData, graph: Graph, ranks: int) -> CalibrationData:
    """With fewer sequences in a call, where a language model's calls are too few to be shared out evenly."""
    wanted = _CALLS_PER_RANK * ranks
    if ranks == 1 or len(data.calls) >= wanted or not takes_tokens(graph) or graph.rung == "static":
        return data
    known: dict[tuple[int, torch.Size], Tensor] = {}

    def part(tensor: Tensor, start: int, size: int) -> Tensor:
        found = tensor[start : start + size]
        same = known.setdefault((id(tensor), found.shape), found)
        return same if torch.equal(same, found) else found

    calls = []
    for call in data.calls:
        sequences = call[0].shape[0]
        size = -(-sequences // min(sequences, -(-wanted // len(data.calls))))
        calls += [tuple(part(t, start, size) for t in call) for start in range(0, sequences, size)]
    return replace(data, calls=tuple(calls))


def _check_ids(ids: Tensor, vocabulary: int | None) -> None:
    if ids.is_floating_point() or ids.dtype == torch.bool:
        raise DataError(f"calibration token ids must be integers [sequences, length], got {ids.dtype}")
    bad = (ids < 0) | (ids >= vocabulary) if vocabulary else ids < 0
    if bool(bad.any()):
        found = int(ids[bad][0])
        why = "was another tokenizer used?"
        if found == _NO_LABEL:
            why = (
                "labels hold it where nothing is learned: give the input_ids, with attention_mask where they are padded"
            )
        raise DataError(f"calibration token id {found} is outside the model's vocabulary of {vocabulary or '?'}; {why}")


def _groups(tokens: Tensor | Sequence[Tensor]) -> list[Tensor]:
    """[some, length] each: sequences of equal length stand together, longest first, equal ones in the order of their ids.

    So the same sequences make the same calls, in whatever order and batches they came: sums of floats depend on their order.
    """
    for ids in [tokens] if isinstance(tokens, Tensor) else tokens:
        if ids.layout != torch.strided or ids.is_complex() or ids.is_meta:
            raise DataError(f"calibration token ids must be a dense tensor of integers, got {ids.dtype}, {ids.layout}")
    if isinstance(tokens, Tensor) and (tokens.dim() != 2 or not tokens.numel()):
        raise DataError(f"calibration token ids must be [sequences, length], got {list(tokens.shape)}")
    if not len(tokens):
        raise DataError("calibration data holds no sequence")
    ordered = sorted(tokens, key=lambda ids: (-len(ids), ids.tolist()))
    groups: list[Tensor] = []
    for _, alike in groupby(ordered, key=len):
        groups += _batches(torch.stack(list(alike)))
    return groups


def _batches(ids: Tensor) -> Sequence[Tensor]:
    """Of one size where many fit together so, else nearly of one size."""
    count, length = ids.shape
    most = max(1, _TOKENS_PER_CALL // length)
    whole = max(n for n in range(1, min(count, most) + 1) if count % n == 0)
    return torch.split(ids, whole if 2 * whole > min(count, most) else -(-count // -(-count // most)))


def _vocabulary(graph: Graph) -> int | None:
    tables = [w.shape[0] for w in graph.weights.values() if w.kind == "embedding" and w.group == "embedding"]
    return max(tables, default=None)
