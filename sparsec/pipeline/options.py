"""Checks that passes make on their options; each raises SpecError with the option, the value and the rule."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from sparsec.errors import SpecError


def check_sparsity(value: Any, name: str = "sparsity") -> float:
    """A share of zeros in [0, 1)."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:  # NaN compares false
        raise SpecError(f"{name} must be a share of zeros in [0, 1), got {value!r}; half of the weights is 0.5")
    return float(value)


def check_choice(value: Any, name: str, choices: Iterable[Any]) -> Any:
    """One of a few values."""
    listed = list(choices)
    if not any(type(value) is type(c) and value == c for c in listed):
        raise SpecError(f"{name} must be one of {', '.join(map(repr, listed))}, got {value!r}")
    return value


def check_positive(value: Any, name: str) -> int:
    """A whole number above 0."""
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        raise SpecError(f"{name} must be a whole number above 0, got {value!r}")
    return value


def check_whole(value: Any, name: str) -> int:
    """A whole number from 0 to 2**32 - 1, as a seed is."""
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 1 << 32:
        raise SpecError(f"{name} must be a whole number from 0 to 2**32 - 1, got {value!r}")
    return value


def check_number(value: Any, name: str, above: float | None = None, most: float = math.inf) -> float:
    """Finite, at least 0 or more than `above`, at most `most`."""
    number = not isinstance(value, bool) and isinstance(value, int | float) and math.isfinite(value)
    if not number or value < 0 or value > most or (above is not None and value <= above):
        rule = f"above {above:g}" if above is not None else f"from 0 to {most:g}" if most < math.inf else "0 or more"
        raise SpecError(f"{name} must be a number {rule}, got {value!r}")
    return float(value)


def check_ignore(value: str | Sequence[str], name: str = "ignore") -> tuple[str, ...]:
    """Patterns, or an empty tuple for none."""
    return () if isinstance(value, tuple | list) and not value else check_patterns(value, name) or ()


def check_patterns(value: str | Sequence[str] | None, name: str) -> tuple[str, ...] | None:
    """Module-path globs or groups: one, or a sequence of them; None stays None."""
    if value is None:
        return None
    listed = (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list | tuple) else (value,)
    if not listed or not all(isinstance(v, str) and v for v in listed):
        raise SpecError(
            f"{name} must be a pattern or a tuple of patterns such as ('attention', 'layers.0.*'), got {value!r}"
        )
    return listed
