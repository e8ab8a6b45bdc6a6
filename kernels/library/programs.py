"""Runs programs that may hang, fail, or print anything: compilers."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path

from sparsec.errors import BuildError
from sparsec.files import TICK

_SAID = 20
"""Lines of what a program printed, in an error."""


def run(commands: Sequence[Sequence[str]], patience: float, folder: Path | None = None) -> list[str]:
    """What each program prints, run at once as far as there are cores.

    patience: seconds for all of them; then they are ended, with everything that they started. folder: where they stand and put
    what they need meanwhile; never the folder of this process. Raises BuildError with a program's own words.
    """
    waiting, outs, left = list(commands), list[str](), patience
    running: list[subprocess.Popen[bytes]] = []
    try:
        while waiting or running:
            while waiting and len(running) < (os.cpu_count() or 1):
                running.append(_start(waiting.pop(0), folder))
            out, left = _finish(running[0], left, patience)
            outs.append(out)
            running.pop(0)
    finally:
        for process in running:
            _end(process)
    return outs


def _start(command: Sequence[str], folder: Path | None) -> subprocess.Popen[bytes]:
    environment = dict(os.environ) if folder is None else {**os.environ, "TMPDIR": str(folder)}
    pipe, nothing = subprocess.PIPE, subprocess.DEVNULL
    try:
        # A session of its own, so that it can be ended with all that it starts.
        return subprocess.Popen(
            list(command),
            stdin=nothing,
            stdout=pipe,
            stderr=pipe,
            cwd=folder or os.sep,
            env=environment,
            start_new_session=True,
        )
    except (OSError, ValueError) as error:
        raise BuildError(f"{shlex.join(command)} could not be started: {error}") from error


def _finish(process: subprocess.Popen[bytes], left: float, patience: float) -> tuple[str, float]:
    """What it prints, and how many seconds are left."""
    while True:
        try:
            found = process.communicate(timeout=TICK)
            break
        except subprocess.TimeoutExpired:
            left -= TICK
            if left <= 0:
                command = shlex.join(process.args)  # type: ignore[arg-type]
                raise BuildError(
                    f"the compiler did not end within {patience:.0f} s, and was ended: {command}"
                ) from None
    out, err = (text.decode("utf-8", "replace") for text in found)
    if process.returncode:
        status = process.returncode
        how = f"exit status {status}" if status > 0 else f"ended by {signal.Signals(-status).name}: too little memory?"
        said = "\n".join((err or out).splitlines()[:_SAID])
        command = shlex.join(process.args)  # type: ignore[arg-type]
        raise BuildError(f"the compiler failed ({how}): {command}\n{said}")
    return out, left


def _end(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):  # something that left the session holds its output
        process.communicate(timeout=5)
