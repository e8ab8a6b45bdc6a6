"""The command line of the benchmark, read and checked before anything slow runs."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TypeVar

from sparsec.bench.cases import Asked, asked
from sparsec.bench.models import CONFIGS, shapes
from sparsec.console.command import DTYPES
from sparsec.console.output import writable
from sparsec.errors import SpecError
from sparsec.options.shared import MAX_THREADS, MAX_WHOLE

ONLY_TABLE = ("shapes", "formats", "rows", "rotate_mb")
ONLY_MODELS = ("passes", "prompt_tokens", "new_tokens", "compile", "peers")
ONLY_CPU = (
    "end_to_end",
    "passes",
    "prompt_tokens",
    "new_tokens",
    "compile",
    "peers",
    "rotate_mb",
    "threads",
    "json",
    "csv",
)
ONLY_GPU = ("out", "budget")
NOT_BUSY = ("formats", "rows", "rotate_mb", "end_to_end", *ONLY_MODELS, "json", "csv")
T = TypeVar("T")


def check(options: argparse.Namespace) -> None:
    """SpecError for numbers out of range and options of the other mode; DataError for files that cannot be written."""
    if options.busy:
        others = [name for name in NOT_BUSY if getattr(options, name) is not None]
        for name in ["device"] * (options.device == "cuda") + others:
            raise SpecError(f"--{name.replace('_', '-')}: leave it out with --busy")
    for name in ("shapes", "formats", "rows", "dtypes"):
        if getattr(options, name) == "":
            raise SpecError(f"--{name} names none; leave it out for the usual ones")
    elsewhere = ONLY_CPU if options.device == "cuda" else ONLY_GPU
    for name in elsewhere:
        if getattr(options, name) is not None:
            way = "out with --device cuda" if options.device == "cuda" else "in only with --device cuda"
            raise SpecError(f"--{name.replace('_', '-')}: leave it {way}")
    other, way = (ONLY_TABLE, "leave it out with") if options.end_to_end else (ONLY_MODELS, "it goes with")
    for name in other:
        if getattr(options, name) is not None:
            raise SpecError(f"--{name.replace('_', '-')} says nothing here; {way} --end-to-end")
    limits = (
        ("threads", 1),
        ("repeats", 2),
        ("layers", 1),
        ("rotate_mb", 0),
        ("prompt_tokens", 1),
        ("new_tokens", 1),
        ("budget", 1),
    )
    for name, least in limits:
        value = getattr(options, name)
        if value is not None and value < least:
            raise SpecError(f"--{name.replace('_', '-')} must be at least {least}, got {value}")
        most = MAX_THREADS if name == "threads" else MAX_WHOLE
        if value is not None and value > most:
            raise SpecError(f"--{name.replace('_', '-')} must be at most {most}, got {value}")
    if options.layers is not None and options.rotate_mb is not None:
        raise SpecError("--layers and --rotate-mb exclude each other: a stack of layers is what is walked through")
    for path in (options.json, options.csv):
        if path is not None:
            writable(path)


def read_sparsities(text: str) -> list[float]:
    """Shares in [0, 1)."""
    found = _list("--sparsity", text, float)
    if any(not 0 <= s < 1 for s in found):
        raise SpecError(f"--sparsity must lie in [0, 1), got {text}")
    return found


def read_dtypes(text: str) -> list[str]:
    """Keys of DTYPES."""
    found = list(dict.fromkeys(text.split(",")))
    unknown = [d for d in found if d not in DTYPES]
    if unknown:
        raise SpecError(f"--dtypes takes {', '.join(DTYPES)}, got {unknown[0]!r}")
    return found


def read_rows(text: str) -> list[int]:
    """Numbers of at least 1."""
    found = _list("--rows", text, int)
    if any(not 1 <= r <= MAX_WHOLE for r in found):
        raise SpecError(f"--rows must be from 1 to {MAX_WHOLE}, got {text}")
    return found


def read_formats(text: str) -> list[Asked]:
    """As they are named, each once."""
    return [asked(label) for label in dict.fromkeys(text.split(","))]


def read_shapes(text: str) -> dict[tuple[int, int], int | None]:
    """(out, in), with how often a model that was named has it."""
    found: dict[tuple[int, int], int | None] = {}
    for part in text.split(","):
        if part in CONFIGS:
            for shape, count in shapes(part).items():
                found[shape] = (found.get(shape) or 0) + count
        else:
            found.setdefault(_shape(part), None)
    return found


def _shape(text: str) -> tuple[int, int]:
    parts = text.split("x")
    if len(parts) != 2 or not all(p.isdecimal() and int(p) > 0 for p in parts):
        raise SpecError(f"--shapes takes OUTxIN such as 11008x4096, or one of {', '.join(CONFIGS)}; got {text!r}")
    return int(parts[0]), int(parts[1])


def _list(option: str, text: str, kind: Callable[[str], T]) -> list[T]:
    try:
        return list(dict.fromkeys(kind(part) for part in text.split(",")))
    except ValueError:
        raise SpecError(f"{option} takes numbers by commas, got {text!r}") from None
