"""Gives a flat fx graph the return value of the model it was traced from: a ModelOutput, a tuple, a dict, a tensor."""

from __future__ import annotations

from typing import Any

from torch import fx
from torch.utils import _pytree as pytree


class OutputCodeGen(fx.graph.CodeGen):
    """Puts the graph's flat outputs back into the structure that the model returns.

    The structure is shared by copies of the graph: it is never changed.
    """

    def __init__(self, structure: pytree.TreeSpec) -> None:
        super().__init__()
        self.structure = structure

    def __deepcopy__(self, memo: dict[int, Any]) -> OutputCodeGen:
        return self

    def process_outputs(self, outputs: Any) -> Any:
        """What an interpreter returns."""
        return pytree.tree_unflatten(list(outputs), self.structure)

    def generate_output(self, output_args: Any, **_: Any) -> str:
        """The last line of the generated forward."""
        return f"return _structured({output_args!r})"

    def additional_globals(self) -> list[tuple[str, Any]]:
        """What the last line needs."""
        return [("_structured", self.process_outputs)]
