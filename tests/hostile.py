"""What a careless or hostile user may hand to any public function, and what may come of it."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sparsec.errors import SparsecError


class Odd:
    """Of a class that nobody knows."""


def closed_file() -> io.StringIO:
    """A stream that takes nothing any more."""
    stream = io.StringIO()
    stream.close()
    return stream


@cache
def values(folder: Path) -> dict[str, Any]:
    """Hostile values by name. Some are right for some arguments; then the call has to work."""
    (folder / "binary").write_bytes(bytes(range(256)))
    (folder / "empty").write_text("")
    numbers = {
        "True": True, "3": 3, "0": 0, "-1": -1, "huge": 2**70, "1.5": 1.5, "NaN": math.nan, "-inf": -math.inf, "1j": 1j,
    }  # fmt: skip
    strings = {
        "''": "", "a word": "surely-no-such-thing", "NUL": "a\0b", "surrogate": "\udce9", "long": "x" * 20000, "bytes": b"x",
    }  # fmt: skip
    empty = {
        "None": None,
        "[]": [],
        "()": (),
        "{}": {},
        "[None]": [None],
        "[[]]": [[]],
        "['']": [""],
        "(None,)": (None,),
    }
    odd = {
        "[3]": [3],
        "{3: 4}": {3: 4},
        "{'a': None}": {"a": None},
        "a set": {None},
        "a range": range(3),
        "object": Odd(),
    }
    code = {"a class": int, "a function": len, "an error": ValueError("x"), "a dtype": torch.int8}
    modules = {"a module": nn.ReLU(), "a script": torch.jit.script(nn.Linear(4, 4))}
    files = {
        "a folder": folder, "its name": str(folder), "a binary file": folder / "binary", "an empty file": str(folder / "empty"),
        "no file": folder / "missing" / "file", "a closed file": closed_file(),
    }  # fmt: skip
    tensors = {
        "no elements": torch.zeros(0), "a number": torch.tensor(3), "NaN tensor": torch.full((4, 4), math.nan),
        "ids": torch.full((2, 4), 10**9), "sparse": torch.eye(4).to_sparse(), "meta": torch.zeros(4, 4, device="meta"),
        "complex": torch.zeros(4, 4, dtype=torch.complex64), "five axes": torch.zeros(1, 1, 1, 1, 1),
    }  # fmt: skip
    return {**numbers, **strings, **empty, **odd, **code, **modules, **files, **tensors}


@dataclass(frozen=True)
class Target:
    """A public function, how to make the arguments of a call that works, and arguments that are left alone."""

    function: Callable[..., Any]
    arguments: Callable[[], dict[str, Any]]
    skip: frozenset[str] = field(default=frozenset())


CALLBACKS = frozenset({"learn", "progress", "settle", "step"})
"""Arguments for which modules are no hostile value: they can be called, and what comes of that is their own error."""


def outcome(target: Target, arguments: dict[str, Any]) -> str:
    """Empty when a call worked or was refused in words, else what came out of it."""
    try:
        target.function(**arguments)
    except SparsecError as error:
        return "" if str(error).strip() else f"a {type(error).__name__} without a word"
    except TypeError as error:  # Python's own check of a call, made before anything of the function runs
        if error.__traceback__ is not None and error.__traceback__.tb_next is None:
            return ""
        return f"TypeError: {error}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""
