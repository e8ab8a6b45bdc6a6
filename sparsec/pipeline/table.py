"""Which passes there are: sparsec's own, and those that installed packages offer.

A package offers a pass by an entry point of the group `sparsec.passes` that names its class:

    [project.entry-points."sparsec.passes"]
    my_pass = "my_package.my_module:MyPass"
"""

from __future__ import annotations

import warnings
from functools import cache
from importlib import import_module

from sparsec.errors import SpecError
from sparsec.offered import offered
from sparsec.pipeline.base import Pass

ENTRY_POINTS = "sparsec.passes"


@cache
def known_passes() -> dict[str, type[Pass]]:
    """Every pass by name, sparsec's own first.

    An entry point that does not load or is no pass is left out with a warning: another package's fault must not stop this one.
    Raises SpecError when one takes a name that is used.
    """
    # By name, at run time: passes import this layer, so this layer must not import them.
    table: dict[str, type[Pass]] = {cls.name: cls for cls in import_module("sparsec.passes").PASSES}
    for what, cls in offered(ENTRY_POINTS):
        if not (isinstance(cls, type) and issubclass(cls, Pass)):
            warnings.warn(f"{what} is no subclass of sparsec.Pass and is left out", stacklevel=2)
            continue
        if cls.name in table:
            raise SpecError(f"{what} offers a pass {cls.name!r}, but that name is taken by {table[cls.name]!r}")
        table[cls.name] = cls
    return table
