"""How the code of a graph is written: it returns what the model returns (a ModelOutput, a tuple, a dict), and names may be any."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import fx

from sparsec.ir.names import is_plain, lookup
from sparsec.private import pytree


class OutputCodeGen(fx.graph.CodeGen):
    """Puts the graph's flat outputs back into the structure that the model returns.

    torch.fx writes `self.class.weight` for the weight of a module called `class`, which is no Python: here it is looked up.
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

    def _gen_python_code(self, nodes: Any, root_module: str, *args: Any, **kwargs: Any) -> Any:
        """torch.fx's own, which is shown a plain name for every tensor whose name would be no Python."""
        awkward = {f"sparsec_tensor_{i}_": node for i, node in enumerate(nodes) if not _is_read_by_plain_name(node)}
        targets = {plain: node.target for plain, node in awkward.items()}
        try:
            for plain, node in awkward.items():
                node.target = plain
            code = super()._gen_python_code(nodes, root_module, *args, **kwargs)
        finally:
            for plain, node in awkward.items():
                node.target = targets[plain]
        source = code.src
        for plain, target in targets.items():
            source = source.replace(f"{root_module}.{plain}", lookup(root_module, target))
        return replace(code, src=source)


def _is_read_by_plain_name(node: fx.Node) -> bool:
    return node.op != "get_attr" or is_plain(str(node.target))
