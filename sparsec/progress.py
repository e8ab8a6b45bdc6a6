"""How long work says how far it is."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

Progress = Callable[[str, int, int], None]
"""Called with (what, done, total): a stage begins with the first call of its name and ends when done reaches total."""


@contextmanager
def stage(progress: Progress | None, what: str) -> Iterator[None]:
    """A stage that cannot say how far it is: begun and, unless it fails, done."""
    if progress is not None:
        progress(what, 0, 1)
    yield
    if progress is not None:
        progress(what, 1, 1)
