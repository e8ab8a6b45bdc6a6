"""The packed matrices among the inputs of a compiled graph, looked at before it runs (sparsec/formats/seen.py)."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from torch import fx

from sparsec.formats import kinds
from sparsec.formats.base import Packed
from sparsec.formats.parts import DENSE, unflatten
from sparsec.formats.seen import NOTHING, LookedAt, look_at
from sparsec.kernels.embedding import EMBEDDINGS
from sparsec.kernels.fused import fused_linear
from sparsec.kernels.ops import OPERATORS

_PRODUCTS: dict[Any, str] = {op: name for name, op in OPERATORS.items()}
_TABLES: dict[Any, str] = {op: name for name, op in EMBEDDINGS.items()}
_MODULE = re.compile(r"l_\w*?_modules_(?P<path>.+)_buffers_")
"""What torch.compile calls an input that is a module's buffer."""


class Matrices:
    """Those that a graph multiplies by, or looks rows up in, and whose tensors are its inputs."""

    def __init__(self, graph: fx.Graph) -> None:
        inputs = {node: at for at, node in enumerate(n for n in graph.nodes if n.op == "placeholder")}
        found = {
            (name, *given): None
            for name, given in _given(graph)
            if all(g in inputs for g in given if isinstance(g, fx.Node))
        }
        self._known = [_Matrix(name, given, inputs) for name, *given in found]

    def look(self, args: Sequence[Any]) -> None:
        """Raises FormatError, naming the layer and the tensor, where one is not valid."""
        for matrix in self._known:
            for at, (_, number, version, address) in zip(matrix.places, matrix.seen.marks, strict=False):
                tensor = args[at]
                if id(tensor) != number or tensor._version != version or tensor.data_ptr() != address:
                    matrix.look(args)
                    break


class _Matrix:
    """One of them: where its tensors are, and what of them was looked at."""

    __slots__ = ("_kind", "_layer", "_scalars", "places", "seen")

    def __init__(self, name: str, given: Sequence[Any], inputs: dict[fx.Node, int]) -> None:
        self._kind: type[Packed] = kinds()[name]
        count = len(self._kind.tensor_names)
        self.places = [inputs[node] for node in given[:count]]
        self._scalars = [inputs[number] if isinstance(number, fx.Node) else -1 - number for number in given[count:]]
        self.seen: LookedAt = NOTHING
        told = _MODULE.match(given[0].name)
        self._layer = told["path"].replace("_modules_", ".") if told else name

    def look(self, args: Sequence[Any]) -> None:
        tensors = dict(zip(self._kind.tensor_names, (args[at] for at in self.places), strict=True))
        numbers = (int(args[at]) if at >= 0 else -1 - at for at in self._scalars)
        self.seen = look_at(
            self._kind.from_parts(tensors, dict(zip(self._kind.scalar_names, numbers, strict=True))), self._layer
        )


def _given(graph: fx.Graph) -> Iterator[tuple[str, list[Any]]]:
    """The format of every packed matrix, its tensors and its scalars."""
    for node in graph.nodes:
        if node.kwargs:
            continue
        if (name := _PRODUCTS.get(node.target)) is not None:
            count = len(kinds()[name].tensor_names)
            yield name, [*node.args[1 : 1 + count], *node.args[2 + count :]]
        elif (name := _TABLES.get(node.target)) is not None:
            yield name, list(node.args[1:])
        elif node.target is fused_linear:
            yield from ((p.format, [*p.tensors, *p.scalars]) for p in unflatten(*node.args[1:]) if p.format != DENSE)
