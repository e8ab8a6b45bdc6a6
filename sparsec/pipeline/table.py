"""Which passes there are: sparsec's own, and those that installed packages offer.

A package offers a pass by an entry point of the group `sparsec.passes` that names its class:

    [project.entry-points."sparsec.passes"]
    my_pass = "my_package.my_module:MyPass"
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from importlib.metadata import entry_points

from sparsec.errors import SpecError
from sparsec.pipeline.base import Pass

ENTRY_POINTS = "sparsec.passes"


@cache
def known_passes() -> dict[str, type[Pass]]:
    """Every pass by name, sparsec's own first. Raises SpecError for an entry point that is broken or takes a used name."""
    # By name, at run time: passes import this layer, so this layer must not import them.
    table: dict[str, type[Pass]] = {cls.name: cls for cls in import_module("sparsec.passes").PASSES}
    for entry in entry_points(group=ENTRY_POINTS):
        try:
            cls = entry.load()
        except (ImportError, AttributeError) as error:
            raise SpecError(
                f"entry point {entry.name!r} of group {ENTRY_POINTS!r} ({entry.value}) does not load: {error}"
            ) from error
        if not (isinstance(cls, type) and issubclass(cls, Pass)):
            raise SpecError(
                f"entry point {entry.name!r} of group {ENTRY_POINTS!r} ({entry.value}) is no subclass of sparsec.Pass"
            )
        if cls.name in table:
            raise SpecError(
                f"entry point {entry.name!r} offers a pass {cls.name!r}, but that name is taken by {table[cls.name]!r}"
            )
        table[cls.name] = cls
    return table
