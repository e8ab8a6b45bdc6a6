"""Several processes that know each other, as torchrun starts them, each running the same script."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parent


def together(script: Path, *arguments: object, processes: int = 2, timeout: float = 300) -> list[Any]:
    """What each of them printed in its last line, as JSON, by rank. AssertionError with what it said where one fails.

    A process that fails takes the others with it: they would wait for it.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, str(script), *map(str, arguments)]
    started = [
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=_environment(rank, processes, port)
        )
        for rank in range(processes)
    ]
    try:
        told = [each.communicate(timeout=timeout) for each in started]
    finally:
        for each in started:
            each.kill()
    for each, (_, errors) in zip(started, told, strict=True):
        assert each.returncode == 0, errors[-3000:]
    return [json.loads(out.strip().splitlines()[-1]) for out, _ in told]


def _environment(rank: int, processes: int, port: str) -> dict[str, str]:
    own = {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(TESTS),
    }
    return {**os.environ, **own}
