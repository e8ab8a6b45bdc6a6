"""Lets transformers know of sparsec's saved models when both are imported, in whatever order, and imports neither for it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

TABLES = "transformers.quantizers.auto"
"""Where transformers keeps its table of ways in which models are stored."""
METHOD = "sparsec"
"""What a saved model is called in it."""
OURS = "sparsec.checkpoint.hub"
"""What enters itself there when it is imported."""


class _Waiting(MetaPathFinder):
    """Imports OURS as soon as TABLES has been imported."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != TABLES or self not in sys.meta_path:
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
                    install()
                    raise
                import_module(OURS)

            loader.exec_module = then_ours
        return spec


def install() -> None:
    """Enters OURS now, or when transformers comes to its tables."""
    if TABLES in sys.modules:
        import_module(OURS)
    elif not any(isinstance(finder, _Waiting) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Waiting())
