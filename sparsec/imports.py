"""Has a module imported as soon as another one has been, in whatever order the user imports, and imports neither for it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any


def after(theirs: str, ours: str) -> None:
    """Imports `ours` now, or when somebody imports `theirs`."""
    if theirs in sys.modules:
        import_module(ours)
    elif _Waiting(theirs, ours) not in sys.meta_path:
        sys.meta_path.insert(0, _Waiting(theirs, ours))


class _Waiting(MetaPathFinder):
    def __init__(self, theirs: str, ours: str) -> None:
        self.names = (theirs, ours)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Waiting) and other.names == self.names

    def __hash__(self) -> int:
        return hash(self.names)

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        theirs, ours = self.names
        if name != theirs or self not in sys.meta_path:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(name)
        if spec is not None and spec.loader is not None:
            loader: Any = spec.loader
            run = loader.exec_module

            def then_ours(module: ModuleType) -> None:
                try:
                    run(module)
                except BaseException:  # it may be imported again
                    after(theirs, ours)
                    raise
                import_module(ours)

            loader.exec_module = then_ours
        return spec
