"""Which part of a model an op belongs to, read off the module tree: classes on the owner's path, repeated block, output head.

The repeated block is an element of an outermost ModuleList that executes linear products. Inside of it, what stands below a
module whose class says attention is attention, and every other linear is mlp. No model's own attribute names are used.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from torch import nn

from sparsec.ir.facts import GroupName

_AROUND = ("base_model", "model", "base_layer", "original_module", "modules_to_save")
"""Where peft's modules hold the model, or the layer, that they stand around; beside it they hold the adapter."""
_LOW_RANK = re.compile(
    r"(?:^|\.)(?:(?:lora|dora)_(?:embedding_)?(?:[ab]|down|mid|up|magnitude\w*|scale)|adapter_(?:down|up)|(?:hada|lokr)_[wt]\d(?:_[ab])?"
    r"|(?:lora|loras|lora_layer)(?:\.\w+)?\.(?:[ab]|down|up))(?:\.|$)",
    re.IGNORECASE,
)
"""Names that adapters of other libraries and hand-written ones go by: `lora_A`, `lora_b`, `lora_down`, `adapter_up`, `lora.A`."""


class Structure:
    """The module tree of one model, asked by owner path."""

    def __init__(self, model: nn.Module, linear_owners: Iterable[str]) -> None:
        self.modules = dict(model.named_modules(remove_duplicate=False))
        self.first_path = {id(module): path for path, module in model.named_modules()}
        self.head = _output_head(model, self.first_path)
        self.lists = _outermost_lists(self.modules, linear_owners)

    def canonical(self, path: str) -> str:
        """The first path of a module that is registered under several."""
        module = self.modules.get(path)
        return path if module is None else self.first_path[id(module)]

    def block(self, path: str) -> str | None:
        """Path of the repeated block that holds this module, `model.layers.3`; None outside of the blocks."""
        for prefix in self.lists:
            if path.startswith(prefix + "."):
                return prefix + "." + path[len(prefix) + 1 :].split(".")[0]
        return None

    def is_norm(self, path: str) -> bool:
        """Whether the module is a normalisation, by its class."""
        return "norm" in self._class(path)

    def adapter(self, parameter: str) -> bool:
        """Whether a parameter belongs to an adapter (LoRA, DoRA, IA3, prompts, ...).

        Told by the classes of the modules that hold it where it is peft's, else by its own name.
        """
        if _LOW_RANK.search(parameter) or self._magnitude(parameter):
            return True
        holders = (p for p in (*_ancestors(parameter)[1:], "") if of_peft(self.modules.get(p)))
        holder = next(holders, None)  # the innermost
        if holder is None:
            return False
        return parameter[len(holder) :].removeprefix(".").split(".")[0] not in _AROUND

    def _magnitude(self, parameter: str) -> bool:
        """Whether it is the vector of a DoRA layer, `magnitude` beside `lora_a`."""
        holder, _, leaf = parameter.rpartition(".")
        beside = self.modules.get(holder)
        if beside is None or leaf not in ("magnitude", "m"):
            return False
        return any(_LOW_RANK.search(name) for name in (*beside._parameters, *beside._modules))

    def group(self, path: str) -> GroupName:
        """The group of a product or parameter that this module owns, unless the op itself tells more (a router, an embedding)."""
        module = self.modules.get(path)
        if self.head is not None and (path == self.head or path.startswith(self.head + ".")):
            return "lm_head"
        if isinstance(module, nn.Embedding) or "embedding" in self._class(path):
            return "embedding"
        if self.is_norm(path):
            return "norm"
        block = self.block(path)
        inside = [p for p in _ancestors(path) if block is None or p.startswith(block + ".")]
        classes = [self._class(p) for p in inside]
        if block is not None and not any(word in self._class(block) for word in ("layer", "block")):
            classes.append(self._class(block))  # a ModuleList of attention modules
        if any("attention" in c or "attn" in c for c in classes):
            return "attention"
        if any("router" in c for c in classes):
            return "router"
        if any("expert" in c for c in classes):
            return "experts"
        return "mlp" if block is not None or not self.lists else "other"

    def experts_beside(self, path: str, experts: dict[str, int]) -> int | None:
        """Number of experts in the nearest enclosing module (inside the block) that holds fused experts elsewhere.

        `experts` maps owner paths of fused expert parameters to their count.
        """
        block = self.block(path)
        for parent in _ancestors(path)[1:]:
            if block is not None and not (parent == block or parent.startswith(block + ".")):
                return None
            for owner, count in experts.items():
                if owner != path and not path.startswith(owner + ".") and owner.startswith(parent + "."):
                    return count
        return None

    def _class(self, path: str) -> str:
        module = self.modules.get(path)
        return "" if module is None else type(module).__name__.lower()


def of_peft(module: nn.Module | None) -> bool:
    """Whether its class, or one that it is derived from, is peft's."""
    return any(cls.__module__.partition(".")[0] == "peft" for cls in type(module).__mro__)


def _ancestors(path: str) -> list[str]:
    """The path itself, then its parents up to (without) the root."""
    parts = path.split(".") if path else []
    return [".".join(parts[:n]) for n in range(len(parts), 0, -1)]


def _output_head(model: nn.Module, first_path: dict[int, str]) -> str | None:
    """Path of the output embeddings; None where the model does not tell, or where they are the input embeddings themselves."""
    ask = getattr(model, "get_output_embeddings", None)
    head = ask() if callable(ask) else None
    return first_path.get(id(head)) if isinstance(head, nn.Module) else None


def _outermost_lists(modules: dict[str, nn.Module], linear_owners: Iterable[str]) -> list[str]:
    """ModuleLists that execute linear products and do not stand inside another such list."""
    owners = list(linear_owners)
    lists = [
        path
        for path, module in modules.items()
        if isinstance(module, nn.ModuleList) and any(owner.startswith(path + ".") for owner in owners)
    ]
    return [path for path in lists if not any(path != p and path.startswith(p + ".") for p in lists)]
