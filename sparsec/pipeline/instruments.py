"""What stands around passes instead of in them: timing, printing, dumping.

An instrument is a context manager per pass; it sees the graph before and after.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from time import perf_counter
from typing import Literal, Protocol, TextIO, get_args

from sparsec.arguments import checked, checked_but, shown
from sparsec.errors import ArgumentError, SpecError
from sparsec.ir.graph import Graph
from sparsec.ir.printer import diff_text, graph_text
from sparsec.pipeline.base import Pass
from sparsec.pipeline.spec import unparse_one


class Instrument(Protocol):
    """Something that watches passes run."""

    def around(self, index: int, p: Pass, graph: Graph) -> AbstractContextManager[None]:
        """Entered before pass `index` (from 1) runs, left after it."""


class Timing:
    """Seconds by pass index."""

    def __init__(self) -> None:
        self.seconds: dict[int, float] = {}

    @contextmanager
    def around(self, index: int, p: Pass, graph: Graph) -> Iterator[None]:
        """Measures wall time."""
        start = perf_counter()
        yield
        self.seconds[index] = perf_counter() - start


class First:
    """Does something once, before the first pass: what is slow, and would be in vain where the model or the passes are refused."""

    def __init__(self, do: Callable[[], None]) -> None:
        self._do = do

    @contextmanager
    def around(self, index: int, p: Pass, graph: Graph) -> Iterator[None]:
        """Does it before pass 1."""
        if index == 1:
            self._do()
        yield


When = Literal["before", "after", "changed"]


class PrintIR:
    """Prints the graph before every pass, after every pass, or only the lines that a pass changed.

    stream: None for standard output. Raises ArgumentError for a closed one.
    """

    @checked_but("when")
    def __init__(self, when: When = "after", stream: TextIO | None = None) -> None:
        if when not in get_args(When):
            raise SpecError(f"when must be one of {', '.join(get_args(When))}, got {when!r}")
        if getattr(stream, "closed", False):
            raise ArgumentError("PrintIR: stream is closed; give an open one, or None for standard output")
        self.when, self.stream = when, stream

    @contextmanager
    def around(self, index: int, p: Pass, graph: Graph) -> Iterator[None]:
        """Prints around one pass."""
        old = graph_text(graph) if self.when != "after" else ""
        if self.when == "before":
            self._print(f"before pass {index}: {unparse_one(p)}", old)
        yield
        if self.when == "after":
            self._print(f"after pass {index}: {unparse_one(p)}", graph_text(graph))
        elif self.when == "changed":
            self._print(
                f"changed by pass {index}: {unparse_one(p)}", diff_text(old, graph_text(graph)) or "(nothing)\n"
            )

    def _print(self, title: str, text: str) -> None:
        print(f"# {title}\n{text}", file=sys.stdout if self.stream is None else self.stream)


class DumpIR:
    """Writes the graph to a folder: `00-traced.txt`, then one numbered file after each pass."""

    @checked
    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    @contextmanager
    def around(self, index: int, p: Pass, graph: Graph) -> Iterator[None]:
        """Writes around one pass."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except (OSError, ValueError) as error:  # ValueError: a name with a NUL in it
            raise ArgumentError(
                f"DumpIR: folder {shown(self.folder)} cannot be made ({error}); give another one"
            ) from error
        if index == 1:
            self._write("00-traced.txt", graph)
        yield
        self._write(f"{index:02d}-{p.name}.txt", graph)

    def _write(self, name: str, graph: Graph) -> None:
        (self.folder / name).write_text(graph_text(graph), encoding="utf-8")
