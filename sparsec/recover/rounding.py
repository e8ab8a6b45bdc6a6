"""Weights that are rounded in every forward pass while they are trained, so that they learn to be good where they will lie.

Gradients go straight through, as if nothing were rounded (Bengio et al. 2013, arXiv:1308.3432; Jacob et al. 2017,
arXiv:1712.05877).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from sparsec.errors import RecoverError, SpecError
from sparsec.formats.base import HALF_AND_SINGLE
from sparsec.formats.grid import Grid
from sparsec.formats.values import Codec, Codes
from sparsec.ir.facts import Rounded
from sparsec.ir.graph import Graph
from sparsec.pipeline.base import Context
from sparsec.recover.student import Student, Whole, write_trained

METHODS = ("distill", "blocks")
"""Ways to train that can round."""
REFIT = 50
"""Steps after which scales and tables are fitted to the weights again."""
_SCALE, _TABLE = "scale ", "table "


def check_values(values: str, method: str, regrow: str | None) -> str:
    """The codec's name; "" for none. SpecError for what cannot be trained through."""
    name = Codec.parse(values).name if isinstance(values, str) else None
    if name is None:
        raise SpecError(f"values must be the name of a codec, as in recover(values='int8'), got {values!r}")
    if name and method not in METHODS:
        listed = " or ".join(map(repr, METHODS))
        raise SpecError(f"values={name!r} rounds weights while they are trained: take method={listed}, got {method!r}")
    if name and regrow is not None:
        raise SpecError(
            f"values={name!r} and regrow={regrow!r} exclude each other: move masks first, then train through the rounding"
        )
    return name


class _StraightThrough(torch.autograd.Function):
    """Gives the rounded weight, and the weight its gradient."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, rounded: Tensor) -> Tensor:
        return rounded.view_as(rounded)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return gradients[0], None


class RoundedWhole(Whole):
    """Whole, with the weights that have masks read as the nearest numbers of a codec. What `round` rounded to the same codec keeps
    its scales; those of others are fitted again every REFIT steps."""

    def __init__(self, graph: Graph, names: Iterable[str], context: Context, values: str) -> None:
        super().__init__(graph, names, context)
        self.codec = Codec.parse(values)
        self._steps = 0
        self._likes: dict[str, Codes] = {}
        self._moving: list[str] = []  # those whose scales are fitted again
        # What leaves are rounded to until the next step. That must be told: fused optimisers leave no trace in a tensor.
        self._made: dict[str, Tensor] = {}
        for name in codable(graph, self.weights):
            known = graph.rounded(name)
            if known is not None and known.values == values:
                self._likes[name] = known.like
                continue
            self._moving.append(name)
            self._likes[name] = Grid.fitted(self.codec, *self._matrix(name)).like

    def read(self, target: str) -> Any:
        """The rounded leaf, through which the leaf has its gradient."""
        if target not in self._likes:
            return super().read(target)
        if target not in self._made:
            self._made[target] = self.result(target)
        found: Tensor = _StraightThrough.apply(self.leaves[target], self._made[target])  # type: ignore[no-untyped-call]
        return found.to(self.weights[target].dtype)

    @torch.no_grad()
    def clean(self) -> None:
        """As it is for all, before the step; now and then scales follow the weights."""
        super().clean()
        self._made.clear()
        self._steps += 1
        for name in self._moving if self._steps % REFIT == 0 else ():
            matrix, mask = self._matrix(name)
            self._likes[name] = Grid.of(self.codec, self._likes[name], *matrix.shape).refined(matrix, mask).like

    @torch.no_grad()
    def result(self, name: str) -> Tensor:
        """The rounded leaf, as its codes will be read."""
        if name not in self._likes:
            return super().result(name)
        matrix, mask = self._matrix(name)
        rounded = self.codec.decode(self.codec.encode(matrix, mask, self._likes[name]))
        return rounded.t().contiguous() if self.weights[name].transposed else rounded

    def kept(self) -> dict[str, Tensor]:
        """With scales and tables."""
        found = super().kept()
        for name, like in self._likes.items():
            found |= {f"{_SCALE}{name}": like.scale.clone(), f"{_TABLE}{name}": like.table.clone()}
        return found

    def restore(self, kept: Mapping[str, Tensor]) -> None:
        """With scales and tables."""
        super().restore(kept)
        self._made.clear()
        self._likes |= {name: _like(kept, name, self.leaves[name].device) for name in self._likes}

    def settle(self, context: Context) -> None:
        """Writes the rounded weights into the graph, and what they are rounded to."""
        super().settle(context)
        for name, like in self._likes.items():
            self.graph.update(name, rounded=Rounded(self.codec.name, like))

    def _matrix(self, name: str) -> tuple[Tensor, Tensor]:
        """A leaf [out, in], and what is kept of it."""
        leaf, mask = self.leaves[name].detach(), self.masks[name]
        return (leaf.t(), mask.t()) if self.weights[name].transposed else (leaf, mask)


def codable(graph: Graph, names: Iterable[str]) -> list[str]:
    """Weights that have masks and can be packed in codes. RecoverError for a dtype that no codes stand for."""
    found = [n for n in names if graph.weights[n].mask is not None and graph.is_linear(n)]
    if other := next((n for n in found if graph.weights[n].dtype not in HALF_AND_SINGLE), None):
        raise RecoverError(
            f"recover: values= stand for float32, bfloat16 or float16, and {other} is {graph.weights[other].dtype}; convert the "
            "model first, as in model.float()"
        )
    return found


def round_rest(graph: Graph, names: Iterable[str], values: str, context: Context) -> None:
    """Rounds what training never came to, the nearest way: each of the weights that is not rounded to these values yet, if any."""
    codec = Codec.parse(values)
    for name in codable(graph, names) if values else ():
        known, mask = graph.rounded(name), graph.mask_matrix(name)
        if (known is not None and known.values == values) or mask is None:
            continue
        grid = Grid.fitted(codec, graph.matrix(name), mask)
        rounded = codec.decode(codec.encode(graph.matrix(name), mask, grid.like))
        write_trained(graph, {name: rounded.t() if graph.weights[name].transposed else rounded}, context)
        graph.update(name, rounded=Rounded(values, grid.like))


def likes_of(graph: Graph, values: str) -> dict[str, Tensor]:
    """Scales and tables of the weights that are rounded to these values, to be saved."""
    found: dict[str, Tensor] = {}
    for name, weight in graph.weights.items():
        if weight.rounded is not None and weight.rounded.values == values:
            found |= {f"{_SCALE}{name}": weight.rounded.like.scale, f"{_TABLE}{name}": weight.rounded.like.table}
    return found


def take_likes(graph: Graph, saved: Mapping[str, Tensor], values: str) -> None:
    """Tells a graph what its weights are rounded to, as `likes_of` gave it."""
    for key in saved:
        if key.startswith(_SCALE):
            name = key.removeprefix(_SCALE)
            graph.update(name, rounded=Rounded(values, _like(saved, name, graph.tensor(name).device)))


def _like(held: Mapping[str, Tensor], name: str, device: torch.device) -> Codes:
    scale, table = (held[f"{what}{name}"].to(device) for what in (_SCALE, _TABLE))
    return Codes(torch.empty(0, 0, dtype=torch.uint8, device=device), scale, table)


def whole_student(graph: Graph, names: Iterable[str], context: Context, values: str) -> Student:
    """What trains whole weights, through a codec's rounding where values name one."""
    return RoundedWhole(graph, names, context, values) if values else Whole(graph, names, context)
