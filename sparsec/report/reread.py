"""A report read back from its JSON document. It comes from a file, so every value is held against the type of its field."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from enum import Enum
from types import NoneType, UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from sparsec.errors import DataError, some
from sparsec.report.collect import Report
from sparsec.report.schema import VERSION
from sparsec.timing.spread import Spread

T = TypeVar("T")


def reread(document: Any) -> Report:
    """What `document` was made of; its text is the same. Raises DataError that names the first value that does not fit.

    How often a spread was repeated is not in a document: it reads as 0, and `latency` has the number.
    """
    if not isinstance(document, Mapping) or document.get("schema") != VERSION:
        found = document.get("schema") if isinstance(document, Mapping) else type(document).__name__
        raise DataError(
            f"a report must be of the schema {VERSION!r}, got {found!r}; read it with the version that wrote it"
        )
    return restored(Report, document, "report")


def restored(cls: type[T], found: Any, where: str) -> T:
    """A dataclass from an object of JSON. DataError.

    Keys that it does not know are skipped, and what may be None is None where it is not there: other versions have more, or fewer.
    """
    if not isinstance(found, Mapping):
        raise _wrong(where, "an object", found)
    hints = get_type_hints(cls)
    own = {f.name: hints[f.name] for f in fields(cls) if f.init and f.name in found}  # type: ignore[arg-type]
    given = {
        name: _spread(found, name, where) if Spread in get_args(hint) else _value(hint, found[name], f"{where}.{name}")
        for name, hint in own.items()
    }
    bare = [f.name for f in fields(cls) if f.init and f.default is f.default_factory is MISSING]  # type: ignore[arg-type]
    given |= {name: None for name in bare if name not in given and NoneType in get_args(hints[name])}
    try:
        return cls(**given)
    except TypeError as error:  # a field without a default that is not there
        lacks = some(name for name in bare if name not in given)
        raise DataError(f"{where} lacks {lacks}; read it with the version that wrote it") from error


def _spread(found: Mapping[str, Any], name: str, where: str) -> Spread | None:
    """As a document has it: the median under its name, the quartiles beside it."""
    if found[name] is None:
        return None
    numbers = [_value(float, found[name], f"{where}.{name}")]
    numbers += _value(tuple[float, ...], found.get(f"{name}_quartiles"), f"{where}.{name}_quartiles")
    if len(numbers) != 3:
        raise _wrong(f"{where}.{name}_quartiles", "two numbers", found.get(f"{name}_quartiles"))
    median, lower, upper = numbers
    return Spread(median, lower, upper, repeats=0)


def _value(hint: Any, found: Any, where: str) -> Any:
    kind, of = get_origin(hint) or hint, get_args(hint)
    if kind in (Union, UnionType):
        return None if found is None else _value(next(t for t in of if t is not NoneType), found, where)
    if is_dataclass(kind):
        return restored(kind, found, where)  # type: ignore[arg-type]
    if kind is tuple:
        if not isinstance(found, list):
            raise _wrong(where, "a list", found)
        return tuple(_value(of[0], each, f"{where}[{i}]") for i, each in enumerate(found))
    if kind is dict:
        if not isinstance(found, Mapping):
            raise _wrong(where, "an object", found)
        far = math.inf if of[1] is float else None  # as JSON has what is beyond floating point
        return {k: far if v is None and far else _value(of[1], v, f"{where}[{k!r}]") for k, v in found.items()}
    if issubclass(kind, Enum):
        if found not in [member.value for member in kind]:
            raise _wrong(where, f"one of {', '.join(str(member.value) for member in kind)}", found)
        return kind(found)
    allowed = (int, float) if kind is float else kind
    if not isinstance(found, allowed) or (isinstance(found, bool) and kind is not bool):
        raise _wrong(where, {"str": "a text", "bool": "true or false"}.get(kind.__name__, "a number"), found)
    return found


def _wrong(where: str, wanted: str, found: Any) -> DataError:
    return DataError(f"{where} must be {wanted}, got {str(found)[:60]!r}")
