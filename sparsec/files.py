"""Files that are whole or not there, whenever the process is killed, and a lock that dies with its process."""

from __future__ import annotations

import contextlib
import glob
import os
import secrets
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

TICK = 0.1
"""Seconds. What waits counts these and does not look at the clock: a process that was stopped has waited for nothing."""
STALE = 3600.0
"""Seconds after which what is not finished is nobody's work any more."""


def write(path: Path, data: bytes) -> None:
    """Writes the file whole or not at all. OSError where that fails."""
    sweep(path.parent, f".{glob.escape(path.name)}-*.tmp")
    made = path.with_name(f".{path.name}-{secrets.token_hex(8)}.tmp")
    try:
        with made.open("xb") as file:
            file.write(data)
        put_in_place(made, path)
    except BaseException:
        made.unlink(missing_ok=True)
        raise


def put_in_place(made: Path, path: Path) -> None:
    """Puts a finished file of the same disk into its place, where it is not seen before all of it is on the disk."""
    to_disk(made)
    os.replace(made, path)
    # Some network disks refuse this of a folder: there a power failure may take the new file away, whole.
    with contextlib.suppress(OSError):
        to_disk(path.parent)


def sweep(folder: Path, pattern: str, age: float = STALE) -> None:
    """Deletes what processes left that were killed: files and folders that have not changed for so many seconds."""
    for left in folder.glob(pattern):
        with contextlib.suppress(OSError):  # another process sweeps too
            if time.time() - left.lstat().st_mtime >= age:
                shutil.rmtree(left) if left.is_dir() else left.unlink()


@contextlib.contextmanager
def lock(path: Path, patience: float, waits: Callable[[str], None]) -> Iterator[bool]:
    """Whether this process holds the lock; the system lets go of it when the process ends, however it ends.

    patience: seconds after which the block runs without it. waits: told once which process is waited for.
    """
    if sys.platform == "win32":
        yield False
        return
    import fcntl

    with path.open("a+") as file:
        held, ticks = False, 0
        while not held and ticks * TICK <= patience:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                held = True
            except BlockingIOError:
                if not ticks:
                    file.seek(0)
                    waits(file.read().strip() or "unknown")
                time.sleep(TICK)
                ticks += 1
            except OSError:  # a disk that knows no locks
                break
        if held:
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()
        yield held


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Waits until no other process is in a block like this one with the same folder. Leaves no file; where a system or a disk knows
    no locks of folders, nobody waits."""
    if sys.platform == "win32":
        yield
        return
    import fcntl

    number = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(number, fcntl.LOCK_EX)
        yield
    finally:
        os.close(number)


def to_disk(path: Path) -> None:
    """Comes back when what was written to a file or a folder would survive a power failure."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
