"""Pass specifications as text: `magnitude(0.5, scope='layer'),freeze,lower(csr)`.

Python's own grammar reads them, and nothing is evaluated: names and literals only. `print(parse(text))` is canonical, and
`parse(print(passes)) == passes`.
"""

from __future__ import annotations

import ast
import difflib
import keyword
import math
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, fields
from typing import Any

from sparsec.errors import SpecError
from sparsec.pipeline.base import Pass

MAX_LENGTH = 10_000
"""A longer specification is refused, since Python's parser recurses."""


def parse(text: str, table: Mapping[str, type[Pass]]) -> tuple[Pass, ...]:
    """Passes from text. Raises SpecError with a caret under the fault and the nearest right name."""
    return tuple(_build(node, text, table) for node in _items(text))


def unparse(passes: Sequence[Pass]) -> str:
    """Canonical text of a sequence of passes: keyword options at their defaults are left out."""
    return ",".join(unparse_one(p) for p in passes)


def unparse_one(p: Pass) -> str:
    """Canonical text of one pass. Options without a keyword stand first."""
    arguments = []
    for option in fields(p):
        value = getattr(p, option.name)
        if not option.kw_only and (_default(option) is MISSING or value is not None):
            arguments.append(_word(value))
        elif option.kw_only and (value != _default(option) or type(value) is not type(_default(option))):
            arguments.append(f"{option.name}={_literal(value)}")
    return f"{p.name}({', '.join(arguments)})" if arguments else p.name


def signature(cls: type[Pass]) -> str:
    """A pass with its options and their defaults, for listings."""
    parts = []
    for option in fields(cls):
        default = _default(option)
        parts.append(option.name if default is MISSING else f"{option.name}={default!r}")
    return f"{cls.name}({', '.join(parts)})" if parts else cls.name


def _items(text: str) -> list[ast.expr]:
    if not text.strip():
        raise SpecError("an empty pass specification; for example: magnitude(0.5),freeze,lower(csr)")
    if len(text) > MAX_LENGTH:
        raise SpecError(f"a pass specification of {len(text)} characters; at most {MAX_LENGTH} are read")
    if "\0" in text:
        raise SpecError("a pass specification cannot hold a NUL character")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", SyntaxWarning)  # such as an invalid escape: an error here, not a warning
            # The bracket lets a specification span lines; its one column is taken off in `_fail`.
            body = ast.parse(f"[{text}\n]", mode="eval").body
    except SyntaxError as error:
        raise _fail(text, *_syntax_fault(text, error)) from None
    except (RecursionError, MemoryError, ValueError) as error:
        raise SpecError(f"not a pass specification: {type(error).__name__}: {error}") from None
    if not isinstance(body, ast.List):
        raise SpecError(f"not a pass specification: {text!r}; passes are separated by commas")
    if not body.elts:
        raise SpecError(f"no pass in {text!r}; for example: magnitude(0.5),freeze,lower(csr)")
    return body.elts


def _syntax_fault(text: str, error: SyntaxError) -> tuple[tuple[int, int, int], str]:
    """Where and what. Python points at the start of what is not closed; the fault is where the text ends."""
    if any(sign in error.msg for sign in ("never closed", "does not match", "unterminated")):
        lines = text.splitlines()
        column = len(lines[-1].encode()) + (1 if len(lines) == 1 else 0)
        if "unterminated" in error.msg:
            what = "a quote is not closed"
        else:
            ours = (error.lineno or 0) > len(
                text.splitlines()
            )  # the bracket around it all, which nothing of the text closes
            what = "a closing bracket does not fit" if "match" in error.msg and not ours else "a bracket is not closed"
        return (len(lines), column, 1), f"not a pass specification: {what}"
    place = (error.lineno or 1, (error.offset or 1) - 1, 1)
    odd = _odd_word(re.split(r"\r\n?|\n", f"[{text}\n]")[place[0] - 1], place[1])
    what = f"{error.msg.partition('. ')[0]}; quote what is no name: {odd!r}" if odd else error.msg
    return place, f"not a pass specification: {what}"


def _odd_word(line: str, column: int) -> str:
    """The word at a column, or that ends before it, if it is none of Python's: nm2:4, layers.0.*; else ""."""
    found = [m[0] for m in re.finditer(r"[\w.:*-]+", line) if m.start() <= column <= m.end()]
    word = found[0] if found else ""
    plain = word.isidentifier() or re.fullmatch(r"[\W_]*|-?[\d.]+(?:e-?\d+)?", word) is not None
    return "" if plain and word != "*" else word


def _build(node: ast.expr, text: str, table: Mapping[str, type[Pass]]) -> Pass:
    call = node if isinstance(node, ast.Call) else None
    name = call.func if call is not None else node
    if not isinstance(name, ast.Name):
        raise _fail(text, _place(node), "a pass is a name, with options in brackets where it has some")
    cls = table.get(name.id)
    if cls is None:
        hint = _nearest(name.id, table)
        raise _fail(text, _place(name), f"unknown pass {name.id!r}{hint}; passes: {', '.join(table)}")
    options = {f.name: f for f in fields(cls)}
    positional = [f.name for f in options.values() if not f.kw_only]
    values: dict[str, Any] = {}
    for i, argument in enumerate(call.args if call is not None else ()):
        if isinstance(argument, ast.Starred) or i >= len(positional):
            raise _fail(text, _place(argument), _misplaced(cls))
        values[positional[i]] = _value(argument, text)
    for given in call.keywords if call is not None else ():
        if given.arg is None or (given.arg not in options and given.arg not in cls.gone):
            hint = _nearest(given.arg or "", options)
            known = ", ".join(options) or "none"
            raise _fail(text, _place(given), f"{cls.name} has no option {given.arg!r}{hint}; options: {known}")
        if given.arg in values:
            raise _fail(text, _place(given), f"{cls.name}: option {given.arg!r} is given twice")
        values[given.arg] = _value(given.value, text)
    missing = [f.name for f in options.values() if f.name not in values and _default(f) is MISSING]
    if missing:
        raise _fail(text, _place(node), f"{cls.name} needs {', '.join(missing)}: {signature(cls)}")
    try:
        return cls(**values)
    except SpecError as error:
        raise _fail(text, _place(node), f"{cls.name}: {error}") from None


def _value(node: ast.expr, text: str) -> Any:
    """A literal; a bare name stands for itself as text."""
    match node:
        case ast.Constant(value=(bool() | int() | float() | str() | None) as value):
            return value
        case ast.Name():
            return node.id
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=(int() | float()) as number)) if number is not True:
            return -number
        case ast.Tuple() | ast.List():
            return tuple(_value(e, text) for e in node.elts)
    raise _fail(
        text, _place(node), "only names, numbers, strings and tuples of them are read here; nothing is evaluated"
    )


def _literal(value: Any) -> str:
    if isinstance(value, float) and math.isinf(value):
        return "-1e999" if value < 0 else "1e999"
    if isinstance(value, tuple):
        inner = ", ".join(_literal(v) for v in value)
        return f"({inner},)" if len(value) == 1 else f"({inner})"
    return repr(value)


def _word(value: Any) -> str:
    """A positional string prints bare where that reads back: lower(csr)."""
    if isinstance(value, str) and value.isidentifier() and value.isascii() and not keyword.iskeyword(value):
        return value
    return _literal(value)


def _default(option: Field[Any]) -> Any:
    return option.default if option.default_factory is MISSING else option.default_factory()


def _misplaced(cls: type[Pass]) -> str:
    name = next((f.name for f in fields(cls) if f.kw_only), None)
    return f"{signature(cls)}: options are keywords, as in {name}=..." if name else f"{cls.name} takes no such option"


def _nearest(word: str, known: Mapping[str, Any]) -> str:
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f", did you mean {near[0]!r}" if near else ""


def _place(node: ast.expr | ast.keyword) -> tuple[int, int, int]:
    """(line from 1, column from 0 in characters of the bracketed text, width)."""
    width = (node.end_col_offset or node.col_offset + 1) - node.col_offset if node.end_lineno == node.lineno else 1
    return node.lineno, node.col_offset, width


def _fail(text: str, place: tuple[int, int, int], message: str) -> SpecError:
    line, column, width = place
    lines = text.splitlines() or [""]
    shown = lines[min(line, len(lines)) - 1]
    # ast counts columns in UTF-8 bytes, and on the first line also the bracket
    start = max(0, column - (1 if line == 1 else 0))
    encoded = shown.encode()
    before = len(encoded[:start].decode(errors="ignore"))
    marked = len(encoded[start : start + width].decode(errors="ignore"))
    return SpecError(f"{message}\n  {shown}\n  {' ' * before}{'^' * max(1, marked)}")
