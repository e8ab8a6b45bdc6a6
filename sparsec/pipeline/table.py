"""Which passes there are: sparsec's own, and those that installed packages offer.

A package offers a pass by an entry point of the group `sparsec.passes` that names its class:

    [project.entry-points."sparsec.passes"]
    my_pass = "my_package.my_module:MyPass"
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping
from dataclasses import is_dataclass
from functools import cache
from importlib import import_module

from sparsec.offered import offered
from sparsec.pipeline.base import Effect, Pass

ENTRY_POINTS = "sparsec.passes"


@cache
def known_passes() -> dict[str, type[Pass]]:
    """Every pass by name, sparsec's own first.

    An entry point that does not load, is no pass or takes a name that is used is left out with a warning: another package's fault
    must not stop this one.
    """
    # By name, at run time: passes import this layer, so this layer must not import them.
    table: dict[str, type[Pass]] = {cls.name: cls for cls in import_module("sparsec.passes").PASSES}
    for what, cls in offered(ENTRY_POINTS):
        if not (isinstance(cls, type) and issubclass(cls, Pass)):
            warnings.warn(f"{what} is no subclass of sparsec.Pass and is left out", stacklevel=2)
        elif fault := _fault(cls, table):
            warnings.warn(f"{what} is left out: {fault}", stacklevel=2)
        else:
            table[cls.name] = cls
    return table


def _fault(cls: type[Pass], table: Mapping[str, type[Pass]]) -> str:
    """Why a pass cannot be written in a specification; "" if it can."""
    name = getattr(cls, "name", None)
    if not (isinstance(name, str) and name.isidentifier()):
        return f"its name must be a word of letters, digits and _, got {name!r}"
    if name in table:
        return f"the name of its pass, {name!r}, is taken by {table[name]!r}"
    if inspect.isabstract(cls) or not is_dataclass(cls) or not isinstance(getattr(cls, "effect", None), Effect):
        return f"{cls.__qualname__} must be a dataclass with an effect and a method run"
    return ""
