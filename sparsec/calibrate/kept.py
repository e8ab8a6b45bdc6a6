"""What is alive between two spans of a walk, kept where a killed run finds it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from sparsec.spill import Keep, Made


@dataclass(frozen=True)
class Place:
    """The begin of a span, as the store of a walk names it."""

    store: Keep
    span: int

    def key(self, call: int | str) -> str:
        """Of what one call holds there, or of what is the same for all."""
        return f"at {self.span:05d} {call}"

    @property
    def reached(self) -> str:
        """Of the mark that everything before it is settled."""
        return f"reached {self.span:05d}"


def gone() -> Made:
    """For what must be in a store."""
    raise AssertionError("a walk that goes on does not find what it had kept")


def flat(values: Mapping[fx.Node, Any]) -> Made:
    """What is alive, as tensors and JSON."""
    tensors: dict[str, Tensor] = {}

    def told(value: Any, name: str) -> Any:
        if isinstance(value, Tensor):
            tensors[name] = value
            return {"tensor": name}
        if isinstance(value, tuple | list):
            return {"list": [told(each, f"{name} {i}") for i, each in enumerate(value)]}
        return {"value": value}

    return tensors, {node.name: told(value, node.name) for node, value in values.items()}


def whole(made: Made, named: Mapping[str, fx.Node]) -> dict[fx.Node, Any]:
    """The same, by node. named: the nodes of the graph."""
    tensors, facts = made

    def value(told: Mapping[str, Any]) -> Any:
        if "tensor" in told:
            return tensors[told["tensor"]]
        return [value(each) for each in told["list"]] if "list" in told else told["value"]

    return {named[name]: value(told) for name, told in facts.items()}
