"""The IR around every pass, kept for a page: all of it at the beginning and at the end, and what each pass changed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from sparsec.ir.graph import Graph
from sparsec.ir.printer import diff_text, graph_text
from sparsec.pipeline import Pass
from sparsec.pipeline.spec import unparse_one


@dataclass(frozen=True)
class Changed:
    """What one pass did to the text."""

    index: int  # from 1
    spec: str
    lines: tuple[str, ...]  # that differ, each after `-` or `+`


class KeptIR:
    """An instrument: give it to `compile` or `extend`, and read it afterwards."""

    def __init__(self) -> None:
        self.traced, self.final = "", ""
        self.passes: list[Changed] = []

    @contextmanager
    def around(self, index: int, p: Pass, graph: Graph) -> Iterator[None]:
        """Keeps what one pass changed."""
        old = graph_text(graph)
        self.traced = self.traced or old
        yield
        self.final = graph_text(graph)
        self.passes.append(Changed(index, unparse_one(p), tuple(diff_text(old, self.final).splitlines())))
