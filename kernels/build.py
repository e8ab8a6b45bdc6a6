"""Builds and loads the native CPU kernels."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class NativeStatus:
    """Whether the native kernels run in this process, and if not, why."""

    built: bool
    path: str | None = None
    isa: str | None = None
    compiler: str | None = None
    reason: str | None = None


def status() -> NativeStatus:
    """The state of the native kernels in this process."""
    return NativeStatus(built=False, reason="the native library is not part of this version")
