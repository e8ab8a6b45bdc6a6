"""What installed packages offer by entry points: passes, formats and kernels."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from importlib.metadata import entry_points
from typing import Any


def offered(group: str) -> Iterator[tuple[str, Any]]:
    """(the entry point in words, what it names) of a group.

    One that does not load is left out with a warning: another package's fault must not stop this one.
    """
    for entry in entry_points(group=group):
        what = f"entry point {entry.name!r} of group {group!r} ({entry.value})"
        try:
            found = entry.load()
        except (Exception, SystemExit) as error:  # whatever a stranger's module raises while it is imported
            warnings.warn(f"{what} does not load and is left out: {type(error).__name__}: {error}", stacklevel=3)
            continue
        yield what, found
