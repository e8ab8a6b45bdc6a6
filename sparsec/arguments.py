"""Arguments of public functions, held against their annotations: a wrong one is refused by name before anything runs.

Python itself checks how many arguments a call has and what they are called; what they are is looked at here, once, so that a
function's own checks are left with what no annotation says (ranges, shapes, what fits together).
"""

from __future__ import annotations

import functools
import inspect
import reprlib
import types
from collections.abc import Callable, Mapping, Sequence
from typing import IO, Any, Literal, ParamSpec, TextIO, TypeVar, Union, get_args, get_origin, get_type_hints

from sparsec.errors import ArgumentError

P = ParamSpec("P")
R = TypeVar("R")

_WORDS = {int: "a whole number", float: "a number", bool: "True or False", str: "a string", type(None): "None"}


def checked(function: Callable[P, R]) -> Callable[P, R]:
    """The function, with every argument held against its annotation first. ArgumentError for one that does not fit.

    An annotation of Any or a type variable allows everything. Elements of sequences, frozen sets and mappings are looked at. A
    function must take as many arguments as it will be given, where it says how many it takes.
    """
    return checked_but()(function)


def checked_but(*own: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """As `checked`; the arguments named are left to the function, which has more to say of them than their type."""

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        signature = inspect.signature(function)
        title = function.__qualname__.removesuffix(".__init__")

        @functools.cache
        def hints() -> dict[str, Any]:  # at the first call: annotations may name what is imported later
            return get_type_hints(function)

        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            for name, value in signature.bind(*args, **kwargs).arguments.items():
                hint = hints().get(name, Any)
                if name not in own and not fits(value, hint):
                    raise ArgumentError(f"{title}: {name} must be {wording(hint)}, got {shown(value)}")
            return function(*args, **kwargs)

        return call

    return decorate


def fits(value: Any, hint: Any) -> bool:
    """Whether a value is what an annotation says. True and False are no numbers, and a string is no sequence of strings."""
    if hint is Any or isinstance(hint, TypeVar):
        return True
    if hint is None or hint is type(None):
        return value is None
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return any(fits(value, each) for each in inner)
    if origin is Literal:
        return any(type(value) is type(each) and value == each for each in inner)
    if origin is Callable:
        return callable(value) and not isinstance(value, type) and _takes(value, inner[0])
    if hint in (int, float):
        return isinstance(value, int | float if hint is float else int) and not isinstance(value, bool)
    if origin is None and getattr(hint, "_is_protocol", False):
        return not isinstance(value, type) and all(hasattr(value, name) for name in vars(hint) if name[0] != "_")
    if origin is None and hint in (IO, TextIO):
        return callable(getattr(value, "write", None))
    if origin is None:
        return isinstance(value, hint)
    if not isinstance(value, origin) or isinstance(value, str | bytes):
        return False
    return _elements_fit(value, origin, inner)


def _takes(function: Callable[..., Any], given: Any) -> bool:
    try:
        inspect.signature(function).bind(*given)
    except TypeError:
        return False
    except ValueError:  # it does not say
        return True
    return True


def _elements_fit(value: Any, origin: type, inner: tuple[Any, ...]) -> bool:
    if issubclass(origin, Mapping):
        return all(fits(key, inner[0]) and fits(each, inner[1]) for key, each in value.items())
    if issubclass(origin, tuple) and inner[-1:] != (...,):
        return len(value) == len(inner) and all(map(fits, value, inner))
    return not isinstance(value, Sequence | frozenset) or all(fits(each, inner[0]) for each in value)


def wording(hint: Any) -> str:
    """An annotation in words: `a whole number or None`."""
    origin, inner = get_origin(hint), get_args(hint)
    if hint in _WORDS or hint is None:
        return _WORDS[type(None) if hint is None else hint]
    if origin in (Union, types.UnionType):
        words = [wording(each) for each in inner]
        return " or ".join(filter(None, (", ".join(words[:-1]), words[-1])))
    if origin is Literal:
        return f"one of {', '.join(map(repr, inner))}"
    if origin is Callable:
        return f"a function of {len(inner[0])} arguments"
    if origin is None:
        return f"a {getattr(hint, '__qualname__', hint)}"
    name = "sequence" if origin.__name__ in ("Sequence", "Iterable") else origin.__name__.lower()
    parts = [wording(each).removeprefix("a ") for each in inner if each is not ...]
    return f"a {name} of {' to '.join(parts) if issubclass(origin, Mapping) else ', '.join(parts)}"


def check_seed(seed: int) -> int:
    """The seed. ArgumentError for one that torch's generators do not take."""
    if not 0 <= seed < 2**63:
        raise ArgumentError(f"seed must be a whole number from 0 to 2**63 - 1, got {shown(seed)}")
    return seed


def shown(value: Any) -> str:
    """A value for a message: its type, and itself where that is short; never an error of its own."""
    try:
        text = reprlib.repr(value)
    except Exception:  # whatever a stranger's __repr__ raises
        text = ""
    name = type(value).__name__
    return "None" if value is None else f"{name} {text}" if text and len(text) < 60 and "\n" not in text else name
