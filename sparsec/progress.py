"""How long work says how far it is."""

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Protocol, TypeVar, runtime_checkable

T = TypeVar("T")
Progress = Callable[[str, int, int], None]
"""Called with (what, done, total): a stage begins with the first call of its name and ends when done reaches total."""


@runtime_checkable
class Noted(Protocol):
    """A Progress that also takes notes on a stage, such as the loss of a training."""

    def __call__(self, what: str, done: int, total: int) -> None:
        """As every Progress."""

    def note(self, what: str, text: str) -> None:
        """Before a step of that stage."""


@contextmanager
def stage(progress: Progress | None, what: str) -> Iterator[None]:
    """A stage that cannot say how far it is: begun and, unless it fails, done."""
    if progress is not None:
        progress(what, 0, 1)
    yield
    if progress is not None:
        progress(what, 1, 1)


def each_of(progress: Progress | None, what: str, items: Collection[T]) -> Iterator[T]:
    """The items, as a stage that says how many are done; it ends with the last one."""
    for done, item in enumerate(items):
        if progress is not None:
            progress(what, done, len(items))
        yield item
    if progress is not None:
        progress(what, len(items), len(items))
