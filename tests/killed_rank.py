"""`sparsec compress` as one rank of several, which ends or stops itself at a place: `killed_rank.py HOW PLACE RANK COMMAND...`.

Run as a plain process with the environment of torchrun. HOW: a signal's name. PLACE: `calibration`, `solving` or `writing`.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from typing import Any

import torch

import sparsec.__main__
from sparsec.calibrate import statistics
from sparsec.checkpoint import writing
from sparsec.passes import sparsegpt

PLACES: dict[str, tuple[Any, str]] = {
    "calibration": (statistics.Statistics, "add"),
    "solving": (sparsegpt, "solve"),
    "writing": (writing, "save_file"),
}


def ends(how: str, place: str) -> None:
    """The second call of the place's function ends this process, or stops it; of writing, the first in the middle of its file."""
    holder, name = PLACES[place]
    function: Callable[..., Any] = getattr(holder, name)
    calls: list[int] = []

    def ending(*args: Any, **given: Any) -> Any:
        calls.append(1)
        if place == "writing":
            function(*args, **given)
        if len(calls) == 2 or place == "writing":
            print("ending", flush=True, file=sys.__stderr__)
            os.kill(os.getpid(), getattr(signal, how))
        return function(*args, **given)

    setattr(holder, name, ending)


if __name__ == "__main__":
    how, place, rank, *command = sys.argv[1:]
    torch.set_num_threads(1)
    if os.environ["RANK"] == rank:
        ends(how, place)
    sys.exit(sparsec.__main__.main(command))
