"""What fits into memory, asked before it is filled."""

from __future__ import annotations

from pathlib import Path

from sparsec.errors import DataError


def available_bytes() -> int | None:
    """Memory that can be had without swapping; None where the system does not tell."""
    info = Path("/proc/meminfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:")), None)


def require_room(nbytes: int, what: str, way_out: str) -> None:
    """DataError where so many bytes cannot be had."""
    available = available_bytes()
    if available is not None and nbytes > available:
        raise DataError(
            f"{what} needs about {nbytes / 2**30:.1f} GiB, and {available / 2**30:.1f} GiB are free; {way_out}"
        )
