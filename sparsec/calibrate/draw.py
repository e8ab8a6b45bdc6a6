"""From what a user gives to calibrate on to calls of a graph: what needs no graph is read before the model is traced."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from io import IOBase
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from sparsec.calibrate.data import CalibrationData, another_text, from_text, samples, takes_tokens
from sparsec.calibrate.self_written import SELF, own_text
from sparsec.calibrate.sequences import Sequences, sequences
from sparsec.data.text import Text
from sparsec.defaults import CALIBRATION_SEQUENCES
from sparsec.errors import DataError
from sparsec.ir.graph import Graph
from sparsec.progress import Progress

CalibrationInput = CalibrationData | Tensor | str | Path | Text | Mapping[str, Any] | Iterable[Any] | Any | None
"""See FORMS of `sparsec.calibrate.sequences`, which says what is none of them."""


@dataclass(frozen=True, eq=False)
class Unread:
    """Not read yet: only its graph tells whether a module with example inputs takes tokens."""

    given: Any


@dataclass(frozen=True, eq=False)
class Draw:
    """How calibration input is read. number, length, seed: of what is drawn from a text; length also cuts what is given.

    model: the dense one, which writes the text for `calibration="self"`.
    """

    tokenizer: Any = None
    number: int = CALIBRATION_SEQUENCES
    length: int | None = None
    seed: int = 0
    bos: bool = True
    limit: int | None = None  # positions of the model
    pad: int | None = None
    model: nn.Module | None = None
    progress: Progress | None = None

    def before_trace(self, given: CalibrationInput, plain: bool) -> CalibrationData | Sequences | Unread | None:
        """plain: a module with example inputs. Raises DataError."""
        if given is None or isinstance(given, CalibrationData | Sequences):
            return given
        if isinstance(given, str | Path | Text):
            return self.drawn(given if isinstance(given, Text) else str(given))
        if isinstance(given, tuple) and len(given) == 2 and isinstance(given[1], str) and not isinstance(given[0], str):
            return Sequences(self._read(given[0]).tokens, given[1])  # as `windows` gives them
        if plain:
            once = isinstance(given, Iterable) and not isinstance(
                given, Tensor | Mapping | tuple | list | IOBase | nn.Module
            )
            return Unread(list(given) if once else given)
        return self._read(given)

    def drawn(self, text: str | Text | None = None) -> Sequences:
        """From a text, by default the embedded one, or `self`: what the dense model writes. Raises DataError."""
        if text == SELF:
            return self._own_text()
        return from_text(text, self.tokenizer, self.number, self.length, self.seed, self.limit, self.bos)

    def calls(self, graph: Graph, drawn: CalibrationData | Sequences | Unread | None) -> CalibrationData | None:
        """Raises DataError for what the graph cannot be called with."""
        if isinstance(drawn, Unread):
            if not takes_tokens(graph):
                return _by_input(graph, drawn.given)
            drawn = self._read(drawn.given)
        if not isinstance(drawn, Sequences):
            return drawn
        graph.notes += [note for note in drawn.notes if note not in graph.notes]
        data = samples(graph, drawn.tokens, drawn.source)
        if drawn.text is not None:
            data = replace(data, training=samples(graph, *drawn.text))
        if (beside := drawn.beside) is None:
            return data

        def others() -> CalibrationData | None:
            tokens, source = beside()
            return samples(graph, tokens, source) if len(tokens) else None

        return replace(data, beside=others)

    def _own_text(self) -> Sequences:
        if self.model is None:
            raise DataError(
                "calibration='self' needs the dense model, which is not at hand here; give it as teacher=, or give token ids or a "
                "text"
            )
        tokens, source = own_text(
            self.model, self.tokenizer, self.number, self.length, self.seed, self.limit, self.bos, self.progress
        )
        return Sequences(tokens, source, beside=another_text("", self.tokenizer, tokens.shape[1], self.bos))

    def _read(self, given: Any) -> Sequences:
        return sequences(given, self.tokenizer, self.length, self.limit, self.bos, self.pad)


def _by_input(graph: Graph, given: Any) -> CalibrationData:
    """Calls of a graph that takes more than tokens: tuples in the order of its inputs, or dicts by their names."""
    listed = [given] if isinstance(given, Mapping) else given
    names = ", ".join(graph.inputs)
    if not isinstance(listed, list | tuple) or not listed:
        raise DataError(
            f"this graph takes {names}, so it cannot be calibrated on tokens; give calibration= a list of calls, each a tuple of "
            "tensors in that order"
        )
    found = []
    for call in listed:
        if isinstance(call, Mapping) and set(graph.inputs) <= set(call):
            call = tuple(call[name] for name in graph.inputs)
        if not isinstance(call, tuple) or not all(isinstance(t, Tensor) for t in call):
            raise DataError(
                f"a calibration call must be a tuple of tensors, {names}, or a dict of them; got {type(call).__name__}"
            )
        if len(call) != len(graph.inputs):
            raise DataError(f"a calibration call has {len(call)} tensors, the graph takes {names}")
        found.append(call)
    return CalibrationData(tuple(found), f"{len(found)} calls")
